"""WebDataset shards: tar files of images and labels that are read from end to end, so that a network suffices.

A sample is a key and its members: `000000123.jpg`, the image; `000000123.cls`, its label as a number; and
`000000123.json`, its original name. `shards.json` beside the tar files lists them with their sizes and checksums, and
for each image the label and where it lies; so the length of an epoch is known, one image can be read alone, and a
damaged shard is noticed before its images are used.

```
shards/
  train-000000.tar  train-000001.tar  …  val-000000.tar  test-000000.tar
  shards.json
```

Tar files of other tools have no such list: `foreign_shards` makes it.
"""

import hashlib
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from io import BytesIO
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from sequencer2d.data.fetch import ShardError, check_url, fetch, is_url
from sequencer2d.data.foreign_shards import index_tars, local_tars
from sequencer2d.data.images import IMAGE_EXTENSIONS, Picture, Reduction, open_picture
from sequencer2d.data.scratch import made_whole
from sequencer2d.data.sets import FileImages, ImageData, ImageSet, split_off_val
from sequencer2d.data.shard_files import SPLITS, Shard, samples
from sequencer2d.files import write_atomic

FORMAT = "sequencer2d-shards/1"
INDEX = "shards.json"
_BRACES = re.compile(r"([\w.-]*)\{(\d+)\.\.(\d+)\}([\w.-]*)")

# Writing


def write_shards(
    data: ImageData,
    root: Path,
    *,
    images_per_shard: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> list[Shard]:
    """Writes all splits of a data set as shards. Image files keep their bytes; other images become PNG.

    The training images are shuffled once, so that neighbours in a shard are not of one class; the others keep their
    order. The folder appears whole, or not at all (see `scratch`); called again this finishes it, or does nothing.

    Args:
        data: What to write; its sources stay as they are.
        root: Folder to make; it may exist if it is empty.
        images_per_shard: Largest number of images in a tar file. Readers hold a few whole shards in memory: aim at 50
            to 200 MB.
        progress: Called with the number of images written and in all.

    Returns:
        What `shards.json` lists.

    Raises:
        ValueError: `images_per_shard` is below 1, or the folder holds other shards.
        FileExistsError: It holds something else.
        BlockingIOError: Another process is writing it.
        OSError: An image cannot be read, or a shard not be written; nothing of it is left.
    """
    if images_per_shard < 1:
        raise ValueError(f"images_per_shard={images_per_shard} must be at least 1")
    splits = {"train": data.train, "val": data.val, "test": data.test}
    images_of = {split: images for split, images in splits.items() if images}
    with made_whole(root.resolve()) as scratch:
        if scratch is None:
            return _written_before(root, data.class_names, {split: len(images) for split, images in images_of.items()})
        folder = scratch / root.resolve().name
        folder.mkdir()
        shards: list[Shard] = []
        done, total = 0, sum(map(len, images_of.values()))
        for split, images in images_of.items():
            order = np.random.RandomState(0).permutation(len(images)) if split == "train" else np.arange(len(images))
            for number, start in enumerate(range(0, len(images), images_per_shard)):
                chosen = order[start : start + images_per_shard].tolist()
                content = _tar(images, chosen, start)
                file = f"{split}-{number:06d}.tar"
                shards.append(_describe(content, file, split, start, len(data.class_names)))
                write_atomic(folder / file, content)
                done += len(chosen)
                if progress:
                    progress(done, total)
        classes = {"class_names": data.class_names, "class_ids": data.class_ids}
        index = {"format": FORMAT, **classes, "shards": [_listed(shard) for shard in shards]}
        write_atomic(folder / INDEX, json.dumps(index, separators=(",", ":"), ensure_ascii=False))
    return shards


def _listed(shard: Shard) -> dict[str, Any]:
    return {name: value for name, value in asdict(shard).items() if name != "keys"}


def _written_before(root: Path, class_names: tuple[str, ...], num_images: dict[str, int]) -> list[Shard]:
    """What an earlier call has written, if these are the classes and as many images."""
    if not (root / INDEX).is_file():
        raise FileExistsError(f"{root}: exists and is not an empty folder; remove it, or give another one")
    names, _, shards = _read_index(str(root / INDEX))
    counts = Counter[str]()
    for shard in shards:
        counts[shard.split] += shard.num_images
    if (names, dict(counts)) != (class_names, num_images):
        raise ValueError(f"{root}: holds the shards of another data set or split; remove it, or give another folder")
    return shards


def _describe(content: bytes, file: str, split: str, first_key: int, num_classes: int) -> Shard:
    labels, offsets, sizes = _find_images(content, file, first_key, num_classes)
    return Shard(
        file=file,
        split=split,
        first_key=first_key,
        num_images=len(labels),
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        labels=labels,
        offsets=offsets,
        sizes=sizes,
    )


def _tar(images: ImageSet, indices: Sequence[int], first_key: int) -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, index in enumerate(indices, start=first_key):
            content, extension = _encoded(images, index)
            members = {
                extension: content,
                ".cls": str(images.labels[index]).encode(),
                ".json": json.dumps({"name": images.name(index)}).encode(),
            }
            for ending, member in members.items():
                info = tarfile.TarInfo(f"{key:09d}{ending}")
                info.size = len(member)
                tar.addfile(info, BytesIO(member))
    return buffer.getvalue()


def _encoded(images: ImageSet, index: int) -> tuple[bytes, str]:
    """An image as a file, and its extension."""
    if isinstance(images, FileImages):
        path = images.root / images.files[index]
        return path.read_bytes(), path.suffix.lower()
    buffer = BytesIO()
    images.image(index).save(buffer, "PNG")
    return buffer.getvalue(), ".png"


def _find_images(content: bytes, file: str, first_key: int, num_classes: int) -> tuple[list[int], list[int], list[int]]:
    """Labels, offsets and sizes of the images in a tar file. Raises ShardError, naming what is not as we write it."""
    labels, offsets, sizes = [], [], []
    for key, (found, members) in enumerate(samples(BytesIO(content), file), start=first_key):
        name = f"{file}/{key:09d}"
        if found != f"{key:09d}":
            raise ShardError(f"{name}: missing, or in another place; write the shards again")
        images = [member for ending, member in members.items() if ending in IMAGE_EXTENSIONS]
        if len(images) != 1:
            raise ShardError(f"{name}: {len(images)} images, where one is needed; write the shards again")
        label = content[members[".cls"].offset_data :][: members[".cls"].size] if ".cls" in members else b""
        if not label.isdigit() or int(label) >= num_classes:
            raise ShardError(
                f"{name}.cls: label {label.decode(errors='replace')!r} is not one of the {num_classes} classes; "
                "write the shards again"
            )
        labels.append(int(label))
        offsets.append(images[0].offset_data)
        sizes.append(images[0].size)
    return labels, offsets, sizes


# Reading


@dataclass(frozen=True)
class ShardLocation:
    """Where shards lie: what stands before and after the name of a file."""

    before: str
    after: str = ""

    def url(self, file: str) -> str:
        return f"{self.before}{file}{self.after}"


def is_shards(name: str) -> bool:
    """Whether `--data NAME` means shards: a URL, a pattern of tar files, a folder of these, or their list."""
    if is_url(name) or _BRACES.search(name):
        return True
    path = Path(name).expanduser()
    return path.name == INDEX or path.suffix == ".tar" or (path / INDEX).is_file() or bool(local_tars(path))


class ShardImages(ImageSet):
    """Images in shards. One by one they are read where they lie; `data.streaming` reads whole shards ahead."""

    def __init__(
        self, location: ShardLocation, shards: Sequence[Shard], num_classes: int, listed_in: str = INDEX
    ) -> None:
        def joined(lists: list[list[int]]) -> Int[np.ndarray, "N"]:
            return np.concatenate([np.array(numbers, dtype=np.int64) for numbers in [*lists, []]])

        self.location = location
        self.shards = list(shards)
        self.num_classes = num_classes
        self.listed_in = listed_in
        self.labels = joined([shard.labels for shard in shards])
        self.offsets = joined([shard.offsets for shard in shards])
        self.sizes = joined([shard.sizes for shard in shards])
        self.positions = joined([list(range(shard.num_images)) for shard in shards])
        self.shard_numbers = np.repeat(np.arange(len(shards)), [shard.num_images for shard in shards])

    def image(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        """Also raises what `fetch` does."""
        picture = self.picture(index, reduction)
        return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)

    def picture(self, index: int, reduction: Reduction | None = None) -> Picture:
        shard = self.shards[self.shard_numbers[index]]
        content = self._fetch(shard, start=int(self.offsets[index]), size=int(self.sizes[index]))
        return self.decode(index, content, reduction)

    def decode(self, index: int, content: bytes, reduction: Reduction | None = None) -> Picture:
        """The image at an index, of which the bytes are at hand.

        Raises:
            ImageError: The image is not usable.
        """
        return open_picture(_NamedBytes(content, self.name(index)), reduction)

    def read_shard(self, number: int, stop: Event | None = None) -> bytes:
        """A whole tar file, verified.

        Raises:
            ShardError: It is not the one that shards.json describes; the message says what is wrong with it. The list
                of a set of other tools is removed from the cache, so that the next start makes it anew.
            OSError, ImportError: As `fetch`.
        """
        shard = self.shards[number]
        url = self.location.url(shard.file)
        content = self._fetch(shard, size=shard.size, stop=stop)
        if not shard.sha256:
            self._check_headers(content, shard)
        elif hashlib.sha256(content).hexdigest() != shard.sha256:
            if shard.keys is None:
                _find_images(content, url, shard.first_key, self.num_classes)  # tells the defect, where it finds one
                raise ShardError(f"{url}: not the file that {self.listed_in} describes; copy both again")
            raise self._changed(shard)
        return content

    def _fetch(self, shard: Shard, *, size: int, start: int = 0, stop: Event | None = None) -> bytes:
        try:
            return fetch(self.location.url(shard.file), start=start, size=size, total=shard.size, stop=stop)
        except ShardError as error:
            if shard.keys is None:
                raise
            raise self._changed(shard) from error

    def _check_headers(self, content: bytes, shard: Shard) -> None:
        """Whether each image still lies where the list says."""
        for offset, size, key in zip(shard.offsets, shard.sizes, shard.keys or (), strict=True):
            header = content[offset - tarfile.BLOCKSIZE : offset]
            try:
                found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
            except tarfile.TarError:
                found = None
            if found != size:
                raise self._changed(shard, key)

    def _changed(self, shard: Shard, *keys: str) -> ShardError:
        """The error to raise of a file of other tools, whose list is of no more use, and removed."""
        what = "/".join([self.location.url(shard.file), *keys])
        try:
            Path(self.listed_in).unlink(missing_ok=True)
        except OSError as error:
            step = f"remove {self.listed_in} ({error.strerror}), and run again, to list it anew"
        else:
            step = f"its list, {self.listed_in}, is removed: run again, to list it anew"
        return ShardError(f"{what}: changed since it was listed; {step}")

    def name(self, index: int) -> str:
        shard = self.shards[self.shard_numbers[index]]
        return f"{shard.file}/{shard.key(int(self.positions[index]))}"

    def subset(self, indices: Sequence[int] | Int[np.ndarray, "M"]) -> "ShardImages":
        part = ShardImages(self.location, [], self.num_classes, self.listed_in)
        part.shards = self.shards
        for column in ("labels", "offsets", "sizes", "positions", "shard_numbers"):
            setattr(part, column, getattr(self, column)[np.asarray(indices, dtype=np.int64)])
        return part


class _NamedBytes(BytesIO):
    """Bytes that messages call by a name."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


def load_shards(name: str, *, val_fraction: float | None, seed: int) -> ImageData:
    """Reads the list of shards; of the images, none. Tar files without a list are read through once, for one.

    Args:
        name: The folder of shards.json or that file: a path, `http(s)://…`, `s3://bucket/prefix`. Or `pipe:` and a
            command that prints the file whose name replaces `{}`. Where a name in the place of `{}` has braces, as in
            `train-{000000..000099}.tar`, only these training shards are used. Tar files of other tools, which have no
            list beside them, are a folder, one file, or a name with braces (see `index_tars`).
        val_fraction: Share of validation images where there are no such shards.
        seed: Of that split.

    Raises:
        ValueError: The list, a tar file without one, or their address cannot be understood, or there is nothing to
            train on.
        OSError, ImportError: It cannot be read.
    """
    location, wanted = _locate(name)
    url = location.url(INDEX)
    listed_in = INDEX
    attempts = None if wanted is None or not url.startswith("pipe:") else 2  # tar files of other tools have none
    try:
        class_names, class_ids, shards = _read_index(url, attempts)
    except (FileNotFoundError, PermissionError, ConnectionError) as error:  # a command cannot say what is missing
        if isinstance(error, ConnectionError) and not url.startswith("pipe:"):
            raise
        files = dict.fromkeys(wanted, "train") if wanted else local_tars(Path(location.before))
        if not files or (is_url(url) and wanted is None):
            raise
        class_names, shards, listed_in = index_tars(location.url, files)
        class_ids = ()
    else:
        missing = sorted((wanted or set()) - {shard.file for shard in shards})
        if missing:
            raise ValueError(f"{url}: does not list {missing[0]}; name shards that it has")
        shards = [shard for shard in shards if wanted is None or shard.file in wanted or shard.split != "train"]
    images = {
        split: ShardImages(location, [shard for shard in shards if shard.split == split], len(class_names), listed_in)
        for split in SPLITS
    }
    train, val, val_source = images["train"], images["val"], "given"
    if not len(train):
        raise ValueError(f"{url}: lists no training images; write the shards again")
    if not len(val):
        train, val, val_source = split_off_val(train, val_fraction, seed, of="train")
    return ImageData(
        name=_short_name(location),
        class_names=class_names,
        train=train,
        val=val,
        test=images["test"] if len(images["test"]) else None,
        val_source=val_source,
        class_ids=class_ids,
    )


def _locate(name: str) -> tuple[ShardLocation, set[str] | None]:
    """Where the shards lie, and which of the training shards are meant; None for all."""
    check_url(name)
    wanted = None
    if braces := _BRACES.search(name):
        before, first, last, after = braces.groups()
        numbers = range(int(first), int(last) + 1)
        wanted = {f"{before}{number:0{len(first)}d}{after}" for number in numbers}
        location = ShardLocation(name[: braces.start()], name[braces.end() :])
    elif name.startswith("pipe:"):
        before, placeholder, after = name.partition("{}")
        if not placeholder:
            raise ValueError(f"{name}: write {{}} where the name of a file belongs: first {INDEX}, then each shard")
        location = ShardLocation(before, after)
    else:
        folder, _, file = name.rstrip("/").rpartition("/")
        if file.endswith(".tar"):
            wanted = {file}
        location = ShardLocation(f"{folder or '.'}/" if file == INDEX or wanted else f"{name.rstrip('/')}/")
    if not is_url(name):
        location = ShardLocation(f"{Path(location.before).expanduser()}/", location.after)
    return location, wanted


def _short_name(location: ShardLocation) -> str:
    """The last folder, of letters that suit a file name."""
    before = location.before if is_url(location.before) else str(Path(location.before).resolve())
    return (re.findall(r"[\w.-]+", re.sub(r":\d+", "", before)) or ["shards"])[-1]


def _read_index(url: str, attempts: int | None = None) -> tuple[tuple[str, ...], tuple[str, ...], list[Shard]]:
    """Names and ids of the classes, and the shards; lists of before 2026-12 have no ids."""
    try:
        content = fetch(url, attempts=attempts)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{url}: missing; prepare shards writes it; tar files of other tools need none but their names, "
            "as in train-{000000..000099}.tar"
        ) from error
    try:
        index = json.loads(content)
        if index["format"] != FORMAT:
            raise ValueError(f"format {index['format']!r} is not {FORMAT}")
        names = [field.name for field in fields(Shard) if field.name != "keys"]
        shards = [Shard(**{name: entry[name] for name in names}) for entry in index["shards"]]
        class_names = tuple(map(str, index["class_names"]))
        class_ids = tuple(map(str, index.get("class_ids", ())))
        unknown = {label for shard in shards for label in shard.labels} - set(range(len(class_names)))
        if unknown:
            raise ValueError(f"label {unknown.pop()} is not one of the {len(class_names)} classes")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ShardError(f"{url}: not a list of shards ({reason}); write the shards again") from error
    return class_names, class_ids, shards
