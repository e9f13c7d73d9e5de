"""Training with the kernels ends where training with PyTorch's layers ends."""

from dataclasses import replace
from pathlib import Path

import pytest

from sequencer2d.native import available
from sequencer2d.training.recipes import config_from_yaml, find_recipe
from sequencer2d.training.run import train


@pytest.mark.slow
@pytest.mark.skipif(not available(), reason="the package was installed without kernels")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_backends_learn_the_digits_equally_well(precision: str, tmp_path: Path) -> None:
    accuracy: dict[str, float] = {}
    for backend in ("native", "torch"):
        recipe = config_from_yaml(find_recipe("digits"))
        result = train(replace(recipe, epochs=8, precision=precision, backend=backend, run_dir=str(tmp_path / backend)))
        assert result.val_top1 is not None
        accuracy[backend] = result.val_top1
    assert min(accuracy.values()) > 0.95
    assert abs(accuracy["native"] - accuracy["torch"]) <= 0.02
