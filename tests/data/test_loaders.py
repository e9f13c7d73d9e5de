"""Which images, in which order, with which random numbers: the same for any number of workers, and after a stop."""

import itertools
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data._utils import signal_handling

from batches import PREPROCESSING, assert_same, epoch, random_transform
from sequencer2d.data import loaders
from sequencer2d.data.augment import AugmentConfig
from sequencer2d.data.images import ImageError, Reduction
from sequencer2d.data.loaders import STOP_SIGNALS, Batch, CachedImages, ShuffledBatches, TrainLoader, eval_loader
from sequencer2d.data.sets import ArrayImages, FileImages, ImageSet
from sequencer2d.data.transforms import BatchTransform, EvalTransform, TrainTransform

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # on a machine of one core
    pytest.mark.filterwarnings("ignore:.* use of fork:DeprecationWarning"),  # Python 3.12 and 3.13, beside threads
]


def numbered(count: int) -> ArrayImages:
    """Images of 8×8 whose pixels, and whose labels, are their index."""
    array = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
    return ArrayImages(array, np.arange(count), [f"images/{i}" for i in range(count)])


class Damaged(ImageSet):
    """Some of the images cannot be read."""

    def __init__(self, images: ImageSet, damaged: set[int]) -> None:
        self.images, self.damaged, self.labels = images, damaged, images.labels

    def image(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        if index in self.damaged:
            raise ImageError(f"{self.name(index)}: truncated")
        return self.images.image(index)

    def name(self, index: int) -> str:
        return self.images.name(index)

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Damaged":
        raise NotImplementedError


def train_loader(images: ImageSet, *, batch_size: int = 4, seed: int = 0, num_workers: int = 0) -> TrainLoader:
    return TrainLoader(images, random_transform(), batch_size=batch_size, seed=seed, num_workers=num_workers)


def labels(batches: Sequence[Batch]) -> list[int]:
    return torch.cat([batch.labels for batch in batches]).tolist()


@settings(deadline=None)
@given(
    num_images=st.integers(1, 60),
    batch_size=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1),
    number=st.integers(0, 1000),
)
def test_an_epoch_has_every_image_once_but_for_the_dropped_tail(
    num_images: int, batch_size: int, seed: int, number: int
) -> None:
    batches = ShuffledBatches(num_images, batch_size, seed)
    batches.set_epoch(number)
    drawn = list(batches)
    indices = [index for batch in drawn for index, _ in batch]
    assert len(drawn) == len(batches)
    assert {len(batch) for batch in drawn} == {min(batch_size, num_images)}
    assert len(set(indices)) == len(indices) > num_images - batch_size
    assert set(indices) <= set(range(num_images))


def test_every_image_has_its_own_random_numbers() -> None:
    seeds = [seed for batch in ShuffledBatches(500, 10, seed=0) for _, seed in batch]
    assert len(set(seeds)) == 500


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_number_of_workers_changes_nothing(num_workers: int) -> None:
    images = Damaged(numbered(23), {5})
    alone, helped = train_loader(images), train_loader(images, num_workers=num_workers)
    for number in (0, 1):
        assert_same(epoch(helped, number), epoch(alone, number))


def test_order_and_augmentation_follow_from_seed_and_epoch() -> None:
    images = numbered(24)
    assert_same(epoch(train_loader(images, seed=3), 2), epoch(train_loader(images, seed=3), 2))
    runs = [epoch(train_loader(images, seed=seed), number) for seed in (0, 1) for number in (0, 1)]
    for one, other in itertools.combinations(runs, 2):
        assert sorted(labels(one)) == sorted(labels(other)) == list(range(24))
        assert labels(one) != labels(other)


def test_the_same_image_is_augmented_otherwise_in_another_epoch() -> None:
    noise = np.random.RandomState(0).randint(0, 256, (24, 8, 8, 3)).astype(np.uint8)
    loader = train_loader(ArrayImages(noise, np.arange(24), [f"images/{i}" for i in range(24)]))
    first, second = (
        {
            label: pixels
            for batch in epoch(loader, n)
            for label, pixels in zip(labels([batch]), batch.images, strict=True)
        }
        for n in (0, 1)
    )
    assert np.mean([not torch.equal(first[i], second[i]) for i in range(24)]) > 0.8


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # by Lightning, of PyTorch
def test_lightning_tells_the_loader_the_epoch(tmp_path: Path) -> None:
    """Otherwise every epoch would repeat the first, order and augmentation alike."""

    class Recorder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.epochs: dict[int, list[Batch]] = {}

        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            self.epochs.setdefault(self.current_epoch, []).append(batch)
            return self.weight

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters())

    images = numbered(12)
    recorder = Recorder()
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(recorder, train_loader(images))
    for number in range(3):
        assert_same(recorder.epochs[number], epoch(train_loader(images), number))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 3, 5])
def test_a_stopped_epoch_continues_with_exactly_what_was_left(done: int, num_workers: int) -> None:
    """Five batches an epoch; a worker has more of them ready than were taken."""
    images = numbered(23)
    whole = [epoch(train_loader(images), number) for number in (4, 5)]
    stopped = train_loader(images, num_workers=num_workers)
    stopped.batches.set_epoch(4)
    taken = list(itertools.islice(stopped, done))
    state = stopped.state_dict()

    continued = train_loader(images, num_workers=num_workers)
    continued.load_state_dict(state)
    rest = epoch(continued, 4 if done < 5 else 5)
    assert_same([*taken, *rest], whole[0] if done < 5 else [*whole[0], *whole[1]])
    assert_same(epoch(continued, 5), whole[1])


def test_a_loader_that_was_restored_but_not_read_keeps_its_place() -> None:
    loader = train_loader(numbered(23))
    loader.load_state_dict({"batch": 3})
    assert loader.state_dict() == {"batch": 3, "world_size": 1}


def test_an_unreadable_image_is_left_out_and_named_once_an_epoch() -> None:
    batches = epoch(train_loader(Damaged(numbered(24), {3, 17})))
    assert sorted(labels(batches)) == sorted(set(range(24)) - {3, 17})
    assert sorted(message for batch in batches for message in batch.skipped) == [
        "images/17: truncated",
        "images/3: truncated",
    ]
    assert all(len(batch.images) == len(batch.labels) == 4 - len(batch.skipped) for batch in batches)


def test_a_batch_of_unreadable_images_is_empty() -> None:
    (batch,) = eval_loader(Damaged(numbered(3), {0, 1, 2}), EvalTransform(PREPROCESSING), batch_size=4)
    assert (len(batch.images), len(batch.labels), len(batch.skipped)) == (0, 0, 3)
    assert (batch.images.ndim, batch.images.dtype, batch.labels.dtype) == (4, torch.uint8, torch.int64)


def test_a_truncated_file_is_skipped_by_its_path(tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "a.jpg")
    photo.save(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:5000])
    images = FileImages(tmp_path, ["a.jpg", "c.jpg", "b.jpg"], np.array([0, 1, 2]))
    (batch,) = eval_loader(images, EvalTransform(PREPROCESSING), batch_size=4)
    assert batch.labels.tolist() == [0, 2]
    assert len(batch.skipped) == 1
    assert batch.skipped[0].startswith(str(tmp_path / "c.jpg"))


class Noting:
    """A transform that notes how many images it is given at a time."""

    def __init__(self, transform: BatchTransform) -> None:
        self.transform = transform
        self.reduction = transform.reduction
        self.counts: list[int] = []

    def __call__(self, images: Sequence[Any], seeds: Sequence[int]) -> Any:
        self.counts.append(len(images))
        return self.transform(images, seeds)


@pytest.mark.parametrize(
    "transform", [EvalTransform(PREPROCESSING), TrainTransform(AugmentConfig(crop="padded", hflip=0.5), PREPROCESSING)]
)
def test_large_images_are_transformed_before_the_next_are_decoded(
    transform: BatchTransform, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, noting = Damaged(numbered(9), {3}), Noting(transform)
    (whole,) = eval_loader(images, noting, batch_size=9)
    monkeypatch.setattr(loaders, "DECODED_PIXELS", 3 * 8 * 8 - 1)
    (parts,) = eval_loader(images, noting, batch_size=9)
    assert noting.counts == [8, 3, 3, 2]
    for one, other in zip(whole[:3], parts[:3], strict=True):
        assert torch.equal(one, other)
    assert whole.skipped == parts.skipped == ["images/3: truncated"]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4, 10, 50])
def test_evaluation_has_every_image_once_and_in_order(batch_size: int, num_workers: int) -> None:
    loader = eval_loader(numbered(10), EvalTransform(PREPROCESSING), batch_size=batch_size, num_workers=num_workers)
    batches = list(loader)
    assert labels(batches) == list(range(10))
    assert torch.cat([batch.images for batch in batches])[:, 0, 0, 0].tolist() == list(range(10))


class Counting(ArrayImages):
    """Counts how often each image is read."""

    reads = 0

    def image(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        self.reads += 1
        return super().image(index, reduction)


def counting(count: int, side: int) -> Counting:
    array = np.random.RandomState(0).randint(0, 256, (count, side, side, 3)).astype(np.uint8)
    return Counting(array, np.arange(count), [str(i) for i in range(count)])


def test_cached_images_are_read_once_and_stay_equal() -> None:
    images = counting(3, side=8)
    cached = CachedImages(images)
    for _ in range(3):
        for index in range(3):
            image = cached.image(index)
            np.testing.assert_array_equal(np.asarray(image), images.array[index])
            image.paste((0, 0, 0), (0, 0, 8, 8))  # what a caller does to its image is no business of the next one's
    assert images.reads == 3
    assert [cached.name(i) for i in range(3)] == ["0", "1", "2"]
    assert cached.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("side", "max_bytes", "kept"),
    [(8, 8 * 8 * 4 * 2, 2), (8, 8 * 8 * 4 * 2 - 1, 1), (8, 0, 0), (96, 2**31, 4), (97, 2**31, 0)],
)
def test_the_cache_keeps_small_images_up_to_its_size(side: int, max_bytes: int, kept: int) -> None:
    images = counting(4, side)
    cached = CachedImages(images, max_bytes)
    for _ in range(2):
        for index in range(4):
            cached.image(index)
    assert images.reads == 2 * 4 - kept


def test_an_unreadable_image_stays_unreadable_in_the_cache() -> None:
    cached = CachedImages(Damaged(numbered(2), {1}))
    for _ in range(2):
        with pytest.raises(ImageError, match="images/1: truncated"):
            cached.image(1)


def test_a_subset_of_cached_images_has_its_own_indices() -> None:
    cached = CachedImages(numbered(5))
    cached.image(0)
    part = cached.subset([3, 0])
    assert [part.image(i).getpixel((0, 0)) for i in (0, 1)] == [(3, 3, 3), (0, 0, 0)]
    assert part.labels.tolist() == [3, 0]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_to_stop_does_not_end_a_worker_that_is_being_started(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would end the training, too, when it goes to the whole group of processes."""
    original = signal_handling._set_worker_signal_handlers

    def struck() -> None:  # in the worker, before and after PyTorch sets handlers of its own
        os.kill(os.getpid(), number)
        original()
        os.kill(os.getpid(), number)

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", struck)
    images = ArrayImages(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int64), ["a", "b", "c", "d"])
    loader = eval_loader(images, EvalTransform(PREPROCESSING), batch_size=2, num_workers=1)
    assert [len(batch.images) for batch in loader] == [2, 2]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
