"""Batches of images: which, in which order, and with which random numbers.

Order and augmentation are functions of (seed, epoch, position) alone, whatever the number of workers, so that a run
can be repeated, and continued inside an epoch.
"""

import copy
import gc
import logging
import math
import multiprocessing
import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sequencer2d.data.augment import SMALL_IMAGE_SIZE
from sequencer2d.data.images import ImageError, Picture, Reduction
from sequencer2d.data.sets import ImageSet
from sequencer2d.data.shards import ShardImages
from sequencer2d.data.streaming import shuffled, stream
from sequencer2d.data.transforms import BatchTransform, picture_size

Key = tuple[int, int]
"""Index of an image and the seed of its augmentation."""
StreamedKey = tuple[int, int, bytes]
"""The same, and the image's file."""
SHUFFLE_BUFFER = 4096
"""Images that wait in memory while shards are streamed: half a gigabyte of ImageNet."""


log = logging.getLogger(__name__)


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
"""What asks a training to stop: Ctrl-C, the system, and Slurm ahead of the end of a job."""


class Batch(NamedTuple):
    """What a loader yields."""

    images: UInt8[Tensor, "B H W C"]
    labels: Int64[Tensor, "B"]
    indices: Int64[Tensor, "B"]
    """Of the images in their `ImageSet`."""
    skipped: list[str]
    """One message for each image of the batch that could not be read and is therefore missing from it."""


class ShuffledBatches(Sampler[list[Key]]):
    """A new permutation every epoch, cut into batches; the incomplete last one is dropped unless it is the only one.

    Of every batch each rank has a share: a run from its front and one from its end, so that images which mixing pairs
    (the first with the last, and so on) are on the same rank, and the batch is the same however many ranks there are.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.num_images = num_images
        self.batch_size = min(batch_size, num_images)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
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
            yield self.share(list(zip(order[chosen], seeds[chosen], strict=True)))

    def share(self, batch: list[Key]) -> list[Key]:
        """This rank's images of a batch. Mixing leaves the last image of an odd batch out; the last rank has it."""
        even = len(batch) - len(batch) % 2
        start, stop = _runs(even // 2, self.world_size)[self.rank]
        odd = batch[even:] if self.rank == self.world_size - 1 else []
        return batch[start:stop] + batch[even - stop : even - start] + odd


def _runs(count: int, parts: int) -> list[tuple[int, int]]:
    """Start and end of equal runs of 0 … `count`."""
    cuts = [-(-count * part // parts) for part in range(parts + 1)]
    return list(pairwise(cuts))


class Streamed:
    """Batches of images in shards. The main process reads the shards; workers are sent the files."""

    failure: Exception | None = None
    """Why the batches ended early. Raised by `ImageLoader`, once all that was read before it has been used."""

    def stream_batches(
        self, images: ShardImages, keys: Sequence[Key], batch_size: int
    ) -> Generator[list[StreamedKey], None, None]:
        """These images with their files, in batches, of which the last one may be smaller."""
        self.failure = None
        try:
            with closing(stream(images, [index for index, _ in keys])) as files:
                for start in range(0, len(keys), batch_size):
                    yield [(index, seed, next(files)) for index, seed in keys[start : start + batch_size]]
        except (OSError, ValueError, ImportError) as error:
            self.failure = error


class StreamedBatches(ShuffledBatches, Streamed):
    """One rank's shuffled batches of images in shards: its places in every batch are filled from its own shards."""

    def __init__(self, images: ShardImages, batch_size: int, seed: int, *, rank: int = 0, world_size: int = 1) -> None:
        if len(images) < world_size:
            raise ValueError(f"{len(images)} images in shards are too few for {world_size} processes")
        super().__init__(len(images), max(batch_size, world_size), seed, rank=rank, world_size=world_size)
        self.images = images

    def order(self) -> list[Key]:
        """This rank's images of the epoch, in their order."""
        start, stop = self._places
        run = (start * len(self), stop * len(self))
        return shuffled(
            self.images, seed=self.seed, epoch=self.epoch, rank=self.rank, run=run, buffer_size=SHUFFLE_BUFFER
        )

    @property
    def _places(self) -> tuple[int, int]:
        """Start and end in every batch."""
        return _runs(self.batch_size, self.world_size)[self.rank]

    def __iter__(self) -> Iterator[list[StreamedKey]]:  # type: ignore[override]
        first, self.first_batch = self.first_batch, 0
        start, stop = self._places
        share = stop - start
        yield from self.stream_batches(self.images, self.order()[first * share :], share)


class OrderedBatches(Sampler[list[StreamedKey]], Streamed):
    """All images in shards once, in order."""

    def __init__(self, images: ShardImages, batch_size: int) -> None:
        self.images = images
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[list[StreamedKey]]:
        keys = [(index, 0) for index in range(len(self.images))]
        yield from self.stream_batches(self.images, keys, self.batch_size)


class ImageLoader(DataLoader[Any]):
    """Yields `Batch`es, and then the error that ended them."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        yield from super().__iter__()
        if isinstance(self.batch_sampler, Streamed) and self.batch_sampler.failure:
            failure, self.batch_sampler.failure = self.batch_sampler.failure, None
            try:
                raise failure
            finally:
                del failure  # its traceback has this frame: a circle, which would keep the workers alive


class TrainLoader(ImageLoader):
    """Shuffled, augmented batches of one epoch after another; its position is part of a checkpoint.

    `batch_size` counts the images of all `world_size` processes together. Each has its share of every batch; of images
    in shards, each sees a part of its own.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: BatchTransform,
        *,
        batch_size: int,
        seed: int,
        num_workers: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if isinstance(images, ShardImages):
            self.batches = StreamedBatches(images, batch_size, seed, rank=rank, world_size=world_size)
        else:
            self.batches = ShuffledBatches(len(images), batch_size, seed, rank=rank, world_size=world_size)
        self.position = 0
        super().__init__(
            TransformedImages(images, transform),
            batch_sampler=self.batches,
            collate_fn=as_it_is,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **_workers(num_workers),
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.position = self.batches.first_batch
        for batch in super().__iter__():
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self.position % len(self), "world_size": self.batches.world_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there. With another number of processes, an epoch of shards that was begun is not exact."""
        self.batches.first_batch = self.position = state["batch"]
        before, now = state.get("world_size", self.batches.world_size), self.batches.world_size
        if isinstance(self.batches, StreamedBatches) and before != now and state["batch"] and self.batches.rank == 0:
            log.warning(
                "stopped inside an epoch with %d processes, going on with %d: shards are divided anew, so that until "
                "the end of this epoch some images come again and others do not come",
                *(before, now),
            )


def eval_loader(
    images: ImageSet,
    transform: BatchTransform,
    *,
    batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> ImageLoader:
    """All images once, in order, as `Batch`es; of `world_size` processes each has a run of them."""
    start, stop = _runs(len(images), world_size)[rank]
    if world_size > 1:
        images = images.subset(range(start, stop))
    keys: Any = [
        [(index, 0) for index in range(start, min(start + batch_size, len(images)))]
        for start in range(0, len(images), batch_size)
    ]
    if isinstance(images, ShardImages):
        keys = OrderedBatches(images, batch_size)
    return ImageLoader(
        TransformedImages(images, transform),
        batch_sampler=keys,
        collate_fn=as_it_is,
        **_workers(num_workers),
    )


DECODED_PIXELS = 2**25
"""Of a batch's images that wait, decoded in full, to be transformed together; as RGB a hundred megabytes."""


class TransformedImages(Dataset[Batch]):
    """Decodes the images of a batch and transforms them; those that cannot be decoded are left out by name.

    Large ones are transformed before the next are decoded: a batch of photographs in full size would fill the memory.
    """

    def __init__(self, images: ImageSet, transform: BatchTransform) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[Key | StreamedKey]) -> Batch:
        transformed: list[np.ndarray] = []
        decoded: list[Picture] = []
        seeds: list[int] = []
        indices: list[int] = []
        skipped: list[str] = []
        num_pixels = 0
        for index, seed, *file in keys:
            try:
                decoded.append(self._decode(index, seed, *file))
            except ImageError as error:
                skipped.append(str(error))
                continue
            indices.append(index)
            seeds.append(seed)
            num_pixels += math.prod(picture_size(decoded[-1]))
            if num_pixels > DECODED_PIXELS:
                transformed.append(self.transform(decoded, seeds))
                decoded, seeds, num_pixels = [], [], 0
        if decoded:
            transformed.append(self.transform(decoded, seeds))
        if not indices:
            empty = torch.zeros(0, dtype=torch.int64)
            return Batch(torch.zeros((0, 1, 1, 3), dtype=torch.uint8), empty, empty, skipped)
        images = torch.from_numpy(transformed[0] if len(transformed) == 1 else np.concatenate(transformed))
        return Batch(images, torch.from_numpy(self.images.labels[indices]), torch.tensor(indices), skipped)

    def _decode(self, index: int, seed: int, content: bytes | None = None) -> Picture:
        reduction = self.transform.reduction(seed)
        if content is None:
            return self.images.picture(index, reduction)
        assert isinstance(self.images, ShardImages)
        return self.images.decode(index, content, reduction)


def as_it_is(batch: Any) -> Any:
    """A batch comes whole out of its data set, so there is nothing to collate."""
    return batch


class CachedImages(ImageSet):
    """Keeps small images decoded in memory once they have been read, at four bytes a pixel."""

    def __init__(self, images: ImageSet, max_bytes: int = 2**31) -> None:
        self.images = images
        self.labels = images.labels
        self.free_bytes = max_bytes
        self.decoded: dict[int, Image.Image] = {}

    def name(self, index: int) -> str:
        return self.images.name(index)

    def subset(self, indices: Sequence[int] | np.ndarray) -> "CachedImages":
        return CachedImages(self.images.subset(indices), self.free_bytes)

    def image(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        return self.picture(index).copy()

    def picture(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        if index in self.decoded:
            return self.decoded[index]
        image = self.images.image(index)
        num_bytes = 4 * image.width * image.height
        if max(image.size) <= SMALL_IMAGE_SIZE and num_bytes <= self.free_bytes:
            self.free_bytes -= num_bytes
            self.decoded[index] = image
        return image


class Worker(multiprocessing.Process):
    """A process that the signals to stop cannot end while it is being started: they wait until it ignores them."""

    def start(self) -> None:
        with _held_back():
            super().start()


@contextmanager
def _held_back() -> Iterator[None]:
    """Blocks the stop signals in this thread, and in the processes that it starts. Elsewhere they arrive as ever."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _workers(count: int) -> dict[str, Any]:
    """Arguments of a loader with so many workers."""
    if not count:
        return {}
    context: Any = copy.copy(multiprocessing.get_context())
    context.Process = Worker
    return {"num_workers": count, "worker_init_fn": begin_worker, "multiprocessing_context": context}


def begin_worker(worker: int) -> None:
    """Leaves to the main process what is its own: Ctrl-C, and the end of what it had when it forked.

    A terminal sends Ctrl-C to the workers too, and a job scheduler its signals: they must live until the main process
    has finished its update. And were a worker to collect the main process's garbage, a loader's old iterator in it
    would close the files, and release the locks, of workers that are not its own: "Bad file descriptor", or a loader
    that waits for ever.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # also forgets one that came while `Worker` was being started
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    gc.freeze()
