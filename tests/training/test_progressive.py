"""Training images grow by the number of the epoch, up to full size; validation images always have it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runs import tiny_run
from sequencer2d.model import Sequencer2D
from sequencer2d.training.config import TrainConfig, resolve
from sequencer2d.training.finetune_config import ProgressiveConfig
from sequencer2d.training.progressive import resized, size_in
from sequencer2d.training.run import train


def test_sizes_grow_on_a_line_in_multiples_of_the_stride() -> None:
    config = ProgressiveConfig(start_size=96, epochs=4)
    assert [size_in(epoch, config, 224, 32) for epoch in range(6)] == [96, 128, 160, 192, 224, 224]
    assert [size_in(epoch, config, 224, 14) for epoch in range(5)] == [98, 126, 154, 196, 224]
    assert size_in(0, ProgressiveConfig(), 224, 14) == 224
    assert size_in(0, ProgressiveConfig(start_size=3, epochs=2), 30, 14) == 14
    assert size_in(1, ProgressiveConfig(start_size=29, epochs=2), 30, 14) == 28


def test_resizing_keeps_the_mean_and_leaves_full_size_alone() -> None:
    images = torch.randn(2, 3, 32, 32).cumsum(-1)
    assert resized(images, 32) is images
    small = resized(images, 16)
    assert small.shape == (2, 3, 16, 16)
    assert torch.allclose(small.mean((2, 3)), images.mean((2, 3)), atol=0.1)


def test_a_run_trains_on_growing_images_and_validates_on_full_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[bool, list[int]] = {True: [], False: []}
    original = Sequencer2D.forward

    def forward(self: Sequencer2D, x: torch.Tensor) -> torch.Tensor:
        sizes[torch.is_grad_enabled()].append(x.shape[-1])
        return original(self, x)

    monkeypatch.setattr(Sequencer2D, "forward", forward)
    result = train(replace(tiny_run(tmp_path), progressive=ProgressiveConfig(start_size=8, epochs=2)))
    assert result.finished
    steps = len(sizes[True]) // 4
    assert sizes[True] == [8] * steps + [12] * steps + [16] * 2 * steps
    assert set(sizes[False]) == {16}


def test_the_number_of_epochs_follows_and_is_checked() -> None:
    config = TrainConfig(epochs=9, progressive=ProgressiveConfig(start_size=128))
    resolved = resolve(config, model="sequencer2d_s", image_size=224, crop_pct=1.0)
    assert resolved.progressive == ProgressiveConfig(start_size=128, epochs=4)
    with pytest.raises(ValueError, match="start_size=128 is larger than image_size=96"):
        resolve(config, model="sequencer2d_s", image_size=96, crop_pct=1.0)
    with pytest.raises(ValueError, match=r"progressive\.epochs=10 is longer than epochs=9"):
        TrainConfig(epochs=9, progressive=ProgressiveConfig(start_size=128, epochs=10))
    with pytest.raises(ValueError, match=r"progressive\.epochs=3 needs progressive\.start_size"):
        ProgressiveConfig(epochs=3)
    with pytest.raises(ValueError, match=r"progressive\.start_size=0"):
        ProgressiveConfig(start_size=0)
