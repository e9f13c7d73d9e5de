"""Every kernel that this processor runs, one after the other, and nn.LSTM to compare with."""

from collections.abc import Iterator

import pytest

from sequencer2d.native import available, library

KERNELS = [*library.kernels()] if available() else []


@pytest.fixture(params=KERNELS)
def kernel_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Forces a kernel as users do."""
    monkeypatch.setenv(library.VARIABLE, request.param)
    library.kernel.cache_clear()
    yield request.param
    library.kernel.cache_clear()
