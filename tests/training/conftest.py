"""Runs to train: a tiny one, and one that several processes must train as one does."""

from pathlib import Path
from typing import Any

import pytest

from runs import make_images, tiny_run
from sequencer2d.training.config import TrainConfig


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A run of seconds. Files whose tests need another one have a fixture of this name of their own."""
    return tiny_run(tmp_path)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """All that is drawn at random but what each rank draws for itself; batches that do not divide evenly."""
    return {
        "model": "sequencer2d_conv_p_patch2_16",
        "model_args": {"layers": [1, 1], "embed_dims": [8, 8], "hidden_sizes": [2, 2], "stem_widths": [8]},
        "data": str(make_images(tmp_path / "colours")),
        "val_fraction": 0.25,
        "epochs": 3,
        "batch_size": 7,
        "accumulate": 2,
        "augment": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "random_erasing": 0.5},
        "optim": {"learning_rate": 1e-2, "warmup_epochs": 1, "ema_decay": 0.9, "clip_grad_norm": 1.0},
        "precision": "fp32",
        "log_every": 1,
        "run_dir": str(tmp_path / "run"),
    }
