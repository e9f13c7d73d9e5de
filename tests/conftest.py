"""What every test file stands on: signatures checked at run time, one thread, and the smallest model and photo."""

from jaxtyping import install_import_hook

# Types and tensor shapes in signatures are checked at every call; as in typing, an int is a float, too.
# This must come before the package is first imported.
install_import_hook("sequencer2d", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from sequencer2d.model import SequencerConfig  # noqa: E402

torch.set_num_threads(1)  # small tensors gain nothing from more, and runners have few cores


@pytest.fixture
def tiny_config() -> SequencerConfig:
    """Two stages of two blocks for images of 16 pixels; about 10,000 parameters."""
    return SequencerConfig(
        layers=(2, 2),
        patch_sizes=(2, 2),
        embed_dims=(8, 16),
        hidden_sizes=(2, 4),
        mlp_ratios=(2.0, 2.0),
        num_classes=5,
    )


@pytest.fixture
def photo() -> Image.Image:
    """Smooth gradients, hard edges and noise, 300×200."""
    y, x = np.mgrid[:200, :300]
    noise = np.random.RandomState(0).randint(-20, 20, (200, 300, 3))
    smooth = np.stack([x * 255 / 300, y * 255 / 200, 127 + 127 * np.sin(x / 9)], axis=-1)
    edges = 60 * ((x // 25 + y // 25) % 2)[..., None]
    return Image.fromarray((smooth + edges + noise).clip(0, 255).astype(np.uint8))
