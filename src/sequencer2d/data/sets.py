"""A data set in memory: labelled images in up to three splits, whatever they were read from."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Int, Int64, UInt8
from PIL import Image

from sequencer2d.data.images import ImageError, Picture, Reduction, open_image, open_picture
from sequencer2d.data.splits import stratified_split

Opened = TypeVar("Opened")


class ImageSet(ABC):
    """The images of one split with their labels, by index."""

    labels: Int64[np.ndarray, "N"]
    """Index of each image's class in `ImageData.class_names`."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        """One image, mode RGB; smaller, where it is a JPEG and `reduction` allows it (see `open_image`).

        Raises:
            ImageError: The image is not usable.
        """

    def picture(self, index: int, reduction: Reduction | None = None) -> Picture:
        """The same in the form that comes fastest, which may be shared: not to be written to."""
        return self.image(index, reduction)

    @abstractmethod
    def name(self, index: int) -> str:
        """Identifies an image within the whole data set, the same on every machine: `train/cat/0001.jpg`."""

    @abstractmethod
    def subset(self, indices: Sequence[int] | Int[np.ndarray, "M"]) -> "ImageSet":
        """The images at these indices, in their order."""


class ArrayImages(ImageSet):
    """Images of one size that are kept in memory."""

    def __init__(self, array: UInt8[np.ndarray, "N H W 3"], labels: Int[np.ndarray, "N"], names: Sequence[str]) -> None:
        assert len(array) == len(labels) == len(names)
        self.array = array
        self.labels = labels.astype(np.int64)
        self.names = list(names)

    def image(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        return Image.fromarray(self.array[index])

    def name(self, index: int) -> str:
        return self.names[index]

    def subset(self, indices: Sequence[int] | Int[np.ndarray, "M"]) -> "ArrayImages":
        indices = np.asarray(indices, dtype=np.int64)
        return ArrayImages(self.array[indices], self.labels[indices], [self.names[i] for i in indices])


class FileImages(ImageSet):
    """Image files below a folder, opened when asked for. `files` are POSIX paths relative to `root`."""

    def __init__(self, root: Path, files: Sequence[str], labels: Int[np.ndarray, "N"]) -> None:
        assert len(files) == len(labels)
        self.root = root
        self.files = list(files)
        self.labels = labels.astype(np.int64)

    def image(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        return self._open(open_image, index, reduction)

    def picture(self, index: int, reduction: Reduction | None = None) -> Picture:
        return self._open(open_picture, index, reduction)

    def _open(
        self, open_file: Callable[[Path, Reduction | None], Opened], index: int, reduction: Reduction | None
    ) -> Opened:
        try:
            return open_file(self.root / self.files[index], reduction)
        except ImageError:
            if not self.root.is_dir():
                raise FileNotFoundError(f"{self.root}, the folder of the images, is gone") from None
            raise

    def name(self, index: int) -> str:
        return self.files[index]

    def subset(self, indices: Sequence[int] | Int[np.ndarray, "M"]) -> "FileImages":
        indices = np.asarray(indices, dtype=np.int64)
        return FileImages(self.root, [self.files[i] for i in indices], self.labels[indices])


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A data set. Its splits share no image."""

    name: str
    """Name in the catalogue, or of the folder."""
    class_names: tuple[str, ...]
    """Name of each label."""
    train: ImageSet
    """What the weights are learnt from."""
    val: ImageSet
    """What everything else is chosen by."""
    test: ImageSet | None
    """What is read once, for the published number; never used to choose. `None`: the data bring none with labels."""
    val_source: str
    """Where `val` comes from: "given", or how it was split off; "none" where it was not to be."""
    class_ids: tuple[str, ...] = ()
    """What weights may call the classes instead: the names of their folders, where `classes.json` has others."""

    def has_classes(self, names: tuple[str, ...]) -> bool:
        """Whether these are its classes, in its order, by their names or by their ids."""
        return names in (self.class_names, self.class_ids)


def split_off_val(
    images: ImageSet, val_fraction: float | None, seed: int, *, of: str
) -> tuple[ImageSet, ImageSet, str]:
    """Divides `images` into train and val, and says so for `ImageData.val_source`; `of` names what is divided."""
    if val_fraction is None:
        return images, images.subset([]), "none"
    train, val = stratified_split(images.labels, val_fraction, seed)
    source = f"split: {100 * val_fraction:g}% of {of}, stratified, seed {seed}"
    return images.subset(train), images.subset(val), source


def split_names(data: ImageData) -> dict[str, list[str]]:
    """Names of the images in each split, ready for JSON, so that a run can record what it was trained on."""
    splits = {"train": data.train, "val": data.val, "test": data.test}
    return {key: [images.name(i) for i in range(len(images))] if images else [] for key, images in splits.items()}
