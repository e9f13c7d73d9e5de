"""Batches of images: which, in which order, and with which random numbers.

Order and augmentation are functions of (seed, epoch, position) alone, whatever the number of workers, so that a run
can be repeated, and continued inside an epoch.
"""

import random
import signal
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sequencer2d.data.augment import SMALL_IMAGE_SIZE
from sequencer2d.data.images import ImageError, Reduction
from sequencer2d.data.sets import ImageSet
from sequencer2d.data.transforms import BatchTransform

Key = tuple[int, int]
"""Index of an image and the seed of its augmentation."""


class Batch(NamedTuple):
    """What a loader yields."""

    images: UInt8[Tensor, "B H W C"]
    labels: Int64[Tensor, "B"]
    indices: Int64[Tensor, "B"]
    """Of the images in their `ImageSet`."""
    skipped: list[str]
    """One message for each image of the batch that could not be read and is therefore missing from it."""


class ShuffledBatches(Sampler[list[Key]]):
    """A new permutation every epoch, cut into batches; the incomplete last one is dropped unless it is the only one."""

    def __init__(self, num_images: int, batch_size: int, seed: int) -> None:
        self.num_images = num_images
        self.batch_size = min(batch_size, num_images)
        self.seed = seed
        self.epoch = 0
        self.first_batch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def sampler(self) -> "ShuffledBatches":
        """Itself: of a batch sampler, Lightning calls `sampler.set_epoch`."""
        return self

    def __len__(self) -> int:
        return self.num_images // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(self.num_images).tolist()
        seeds = generator.integers(2**32, size=self.num_images).tolist()
        first, self.first_batch = self.first_batch, 0
        for batch in range(first, len(self)):
            chosen = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            yield list(zip(order[chosen], seeds[chosen], strict=True))


class TrainLoader(DataLoader[Any]):
    """Shuffled, augmented batches of one epoch after another; its position is part of a checkpoint."""

    def __init__(
        self, images: ImageSet, transform: BatchTransform, *, batch_size: int, seed: int, num_workers: int
    ) -> None:
        self.batches = ShuffledBatches(len(images), batch_size, seed)
        self.position = 0
        super().__init__(
            TransformedImages(images, transform),
            batch_sampler=self.batches,
            collate_fn=as_it_is,
            num_workers=num_workers,
            worker_init_fn=leave_ctrl_c_to_main,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.position = self.batches.first_batch
        for batch in super().__iter__():
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self.position % len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.first_batch = self.position = state["batch"]


def eval_loader(
    images: ImageSet, transform: BatchTransform, *, batch_size: int, num_workers: int = 0
) -> DataLoader[Any]:
    """All images once, in order, as `Batch`es."""
    keys = [
        [(index, 0) for index in range(start, min(start + batch_size, len(images)))]
        for start in range(0, len(images), batch_size)
    ]
    return DataLoader(
        TransformedImages(images, transform),
        batch_sampler=keys,
        collate_fn=as_it_is,
        num_workers=num_workers,
        worker_init_fn=leave_ctrl_c_to_main,
    )


class TransformedImages(Dataset[Batch]):
    """Decodes the images of a batch and transforms them; those that cannot be decoded are left out by name."""

    def __init__(self, images: ImageSet, transform: BatchTransform) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[Key]) -> Batch:
        decoded, good, skipped = [], [], []
        for key in keys:
            try:
                decoded.append(self.images.image(key[0], self.transform.reduction(key[1])))
                good.append(key)
            except ImageError as error:
                skipped.append(str(error))
        if not good:
            empty = torch.zeros(0, dtype=torch.int64)
            return Batch(torch.zeros((0, 1, 1, 3), dtype=torch.uint8), empty, empty, skipped)
        indices, seeds = zip(*good, strict=True)
        images = torch.from_numpy(self.transform(decoded, seeds))
        return Batch(images, torch.from_numpy(self.images.labels[list(indices)]), torch.tensor(indices), skipped)


def as_it_is(batch: Any) -> Any:
    """A batch comes whole out of its data set, so there is nothing to collate."""
    return batch


class CachedImages(ImageSet):
    """Keeps small images decoded in memory, as uint8, once they have been read."""

    def __init__(self, images: ImageSet, max_bytes: int = 2**31) -> None:
        self.images = images
        self.labels = images.labels
        self.free_bytes = max_bytes
        self.decoded: dict[int, np.ndarray] = {}

    def name(self, index: int) -> str:
        return self.images.name(index)

    def subset(self, indices: Sequence[int] | np.ndarray) -> "CachedImages":
        return CachedImages(self.images.subset(indices), self.free_bytes)

    def image(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        if index in self.decoded:
            return Image.fromarray(self.decoded[index])
        image = self.images.image(index)
        if max(image.size) <= SMALL_IMAGE_SIZE:
            array = np.asarray(image)
            if array.nbytes <= self.free_bytes:
                self.free_bytes -= array.nbytes
                self.decoded[index] = array
        return image


def leave_ctrl_c_to_main(worker: int) -> None:
    """A terminal sends Ctrl-C to the workers too, which must live until the main process has finished its update."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def seed_generators(seed: int) -> None:
    """Seeds the three global generators that augmentation draws from, and no device's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
