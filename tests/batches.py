"""What the tests of loaders share: a transform that draws, an epoch, and a comparison of batches."""

from collections.abc import Sequence

import torch

from sequencer2d.data.augment import AugmentConfig
from sequencer2d.data.loaders import Batch, TrainLoader
from sequencer2d.data.transforms import TrainTransform
from sequencer2d.preprocessing import Preprocessing
from sequencer2d.training.config import TrainConfig, resolve

PREPROCESSING = Preprocessing(image_size=8)


def random_transform() -> TrainTransform:
    augment = AugmentConfig(crop="padded", auto_augment="rand-m9-mstd0.5-inc1")
    config = resolve(TrainConfig(augment=augment), model="any", image_size=8, crop_pct=1.0)
    return TrainTransform(config.augment, PREPROCESSING)


def epoch(loader: TrainLoader, number: int = 0) -> list[Batch]:
    loader.batches.set_epoch(number)
    return list(loader)


def assert_same(some: Sequence[Batch], others: Sequence[Batch]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.indices, other.indices)
        assert one.skipped == other.skipped
