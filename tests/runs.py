"""Small runs: images of three colours, a config that trains on them in a second, and a way to stop it."""

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sequencer2d.training.checkpoints import newest_checkpoint
from sequencer2d.training.config import AugmentConfig, OptimConfig, TrainConfig
from sequencer2d.training.task import SequencerTask

COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}


def make_images(
    root: Path, colours: dict[str, tuple[int, int, int]] = COLOURS, count: int = 12, side: int = 16
) -> Path:
    """Noisy one-coloured squares, a class folder per colour."""
    generator = np.random.RandomState(0)
    for name, colour in colours.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            noise = generator.randint(-40, 40, (side, side, 3))
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(
                root / name / f"{number:02d}.png"
            )
    return root


def tiny_run(tmp_path: Path) -> TrainConfig:
    """Everything that has a state is on: averaged weights, mixing, accumulation, stochastic depth, dropout."""
    return TrainConfig(
        model="sequencer2d_conv_p_patch2_16",
        model_args={
            "layers": [1, 1],
            "embed_dims": [8, 8],
            "hidden_sizes": [2, 2],
            "stem_widths": [8],
            "drop_path_rate": 0.2,
            "drop_rate": 0.1,
        },
        data=str(make_images(tmp_path / "colours")),
        val_fraction=0.25,
        epochs=4,
        batch_size=5,
        accumulate=2,
        augment=AugmentConfig(mixup_alpha=0.8, cutmix_alpha=1.0, random_erasing=0.3),
        optim=OptimConfig(learning_rate=1e-2, warmup_epochs=1, ema_decay=0.9),
        precision="fp32",
        run_dir=str(tmp_path / "run"),
        log_every=1,
    )


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of a run but for those that a clock makes."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("elapsed_s", "images_per_s")} for line in lines]


def assert_same(run_dir: Path, other: Path) -> None:
    """The same curves and weights within what the order of a sum makes of single precision."""
    ours, theirs = rows(run_dir), rows(other)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for one, two in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, rel=2e-4), (one, two)
    assert_close(*(load_file(folder / "model.safetensors") for folder in (run_dir, other)))


def assert_close(weights: dict[Any, torch.Tensor], expected: dict[Any, torch.Tensor]) -> None:
    """All weights together: AdamW makes a whole step of a gradient that is nothing but rounding."""
    assert weights.keys() == expected.keys()
    names = [name for name, value in expected.items() if value.is_floating_point()]  # the others are counts
    ours, theirs = (torch.cat([values[name].flatten() for name in names]) for values in (weights, expected))
    assert (ours - theirs).norm() < 5e-3 * theirs.norm()


def last_checkpoint(run_dir: Path) -> Path:
    path = newest_checkpoint(run_dir / "checkpoints")
    assert path
    return path


def stop_at(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Sends this process a Ctrl-C during a batch, counted from 0."""
    original = SequencerTask.training_step
    counter = itertools.count()

    def training_step(self: SequencerTask, *arguments: Any) -> Any:
        if next(counter) == batch:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(SequencerTask, "training_step", training_step)
