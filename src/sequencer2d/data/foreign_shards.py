"""WebDataset tar files of other tools, which have no list beside them: read through once, and the list is kept.

A sample is an image and its label: a member `.cls`, a number or a word; or `.json`, with one of `LABEL_FIELDS` in it;
or `.txt`, the name of the class. Of local files only the headers and labels are read; of others everything, four files
at a time, and a checksum is taken. The list lies in the user's cache folder. It is made anew when a local file changes,
or `classes.json`; of a remote tar file a change is noticed when it is read.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from io import BufferedReader, BytesIO
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any

from sequencer2d.data.fetch import ShardError, fetch, is_url
from sequencer2d.data.folders import VAL_NAMES, subfolders
from sequencer2d.data.images import IMAGE_EXTENSIONS
from sequencer2d.data.shard_files import Sample, Shard, samples
from sequencer2d.files import cache_folder, write_atomic

FORMAT = "sequencer2d-index/1"
LABEL_FIELDS = ("cls", "label", "class", "class_name")
CLASSES_FILE = "classes.json"
MAX_LABEL_BYTES = 1 << 20
MAX_WORD = 200
"""Characters; what is longer is a caption."""
MAX_CLASS_SHARE = 0.5
"""Of the number of images; more words than that are captions, too."""
MAX_CLASSES_OF_FEW = 100_000
"""The same of less than 100 images, whose labels may be of a larger set."""
READERS = 4

log = logging.getLogger(__name__)


def local_tars(folder: Path) -> dict[str, str]:
    """The tar files in a folder, or in its folders `train`, `val` and `test`, each with its split; by name.

    Without such folders, a name that has `val`, `valid`, `validation` or `test` as one of its words tells the split;
    all others are for training. None, where the folder has others: it may be one of images.
    """
    if not folder.is_dir():
        return {}
    splits = {inner.name: _split([inner.name]) for inner in subfolders(folder)}
    if not splits:
        return {file: _split(re.split(r"[^a-z]+", file.lower())) for file in _tars(folder)}
    if not all(name in ("train", "test", *VAL_NAMES) and not subfolders(folder / name) for name in splits):
        return {}
    return {f"{name}/{file}": split for name, split in splits.items() for file in _tars(folder / name)}


def _tars(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.tar") if not path.name.startswith("."))


def _split(words: Iterable[str]) -> str:
    found = ["val" if word in VAL_NAMES else word for word in words if word in (*VAL_NAMES, "test")]
    return found[0] if found else "train"


def index_tars(url_of: Callable[[str], str], files: dict[str, str]) -> tuple[tuple[str, ...], list[Shard], str]:
    """Lists the images of tar files, or takes the list that was made before.

    The classes are those of the training files: numbers from 0 to the largest, or words in their order. `classes.json`
    beside the tar files, which maps labels to names, says which there are, and what they are called.

    Args:
        url_of: The path, URL or command that reads a file.
        files: Split of each file.

    Returns:
        Names of the classes, the shards in the order of `files`, and the file that keeps the list.

    Raises:
        ShardError: A file is damaged, a sample lacks its image or label, or a label is unknown.
        OSError, ImportError: As `fetch`.
    """
    files = dict(sorted(files.items()))
    urls = [url_of(file) for file in files]
    cache = _cache_file(urls)
    named = _named_classes(url_of(CLASSES_FILE))
    stamps = [*map(_stamp, urls), named and [list(item) for item in named.items()]]  # their order counts
    known = _read_cache(cache, stamps)
    if known is not None:
        return *known, str(cache)
    log.info("%s: no shards.json; its %d tar files are read through once, to list their images", urls[0], len(files))
    tars = _read_all(urls)
    class_names, label_of = _classes(tars, list(files.values()), named)
    shards = [
        Shard(
            file=file,
            split=split,
            first_key=0,
            num_images=len(tar.keys),
            size=tar.size,
            sha256=tar.sha256,
            labels=[_label(label_of, word, f"{tar.url}/{key}") for word, key in zip(tar.words, tar.keys, strict=True)],
            offsets=tar.offsets,
            sizes=tar.sizes,
            keys=tar.keys,
        )
        for (file, split), tar in zip(files.items(), tars, strict=True)
    ]
    count = sum(shard.num_images for shard in shards)
    log.info(
        "%d images of %d classes in %d tar files; the list is kept in %s", count, len(class_names), len(tars), cache
    )
    _write_cache(cache, class_names, shards, stamps)
    return class_names, shards, str(cache)


# Reading a tar file


@dataclass(kw_only=True)
class _Tar:
    """What was found in a file; the lists have an entry per image."""

    url: str
    size: int
    sha256: str = ""
    keys: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    """Labels as they are written."""
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


def _read_all(urls: list[str]) -> list[_Tar]:
    stop = Event()
    threads = ThreadPoolExecutor(READERS, thread_name_prefix="index")
    try:
        return list(threads.map(lambda url: _read_tar(url, stop), urls))
    finally:
        stop.set()
        threads.shutdown(cancel_futures=True)


def _read_tar(url: str, stop: Event) -> _Tar:
    if is_url(url):
        content = fetch(url, stop=stop)
        tar = _Tar(url=url, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        return _filled(tar, BytesIO(content))
    with open(url, "rb") as file:
        return _filled(_Tar(url=url, size=os.fstat(file.fileno()).st_size), file)


def _filled(tar: _Tar, file: BufferedReader | BytesIO) -> _Tar:
    for sample in samples(file, tar.url):
        name = f"{tar.url}/{sample.key}"
        images = [member for ending, member in sample.members.items() if ending in IMAGE_EXTENSIONS]
        if len(images) != 1:
            has = ", ".join(sample.members)
            raise ShardError(
                f"{name}: {len(images)} images among {has}, where one is needed; mend or leave out the file"
            )
        tar.keys.append(sample.key)
        tar.words.append(_word(sample, file, name))
        tar.offsets.append(images[0].offset_data)
        tar.sizes.append(images[0].size)
    if not tar.keys:
        raise ShardError(f"{tar.url}: not a tar file of samples, or an empty one; mend or leave out the file")
    return tar


def _word(sample: Sample, file: BufferedReader | BytesIO, name: str) -> str:
    """The label of a sample as it is written."""
    for ending in (".cls", ".json", ".txt"):
        member = sample.members.get(ending)
        if member is None or member.size > MAX_LABEL_BYTES:
            continue
        file.seek(member.offset_data)
        content = file.read(member.size)
        word = _from_json(content, name) if ending == ".json" else content.decode(errors="replace").strip()
        if word is None:
            continue
        if not word or len(word) > MAX_WORD or not word.isprintable():
            raise ShardError(f"{name}{ending}: {word[:40]!r} is no label, but a number or one word is needed; mend it")
        return word
    raise ShardError(
        f"{name}: no label among {', '.join(sample.members)}; needed is .cls, .txt, or .json with "
        f"{' or '.join(LABEL_FIELDS)} in it"
    )


def _from_json(content: bytes, name: str) -> str | None:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ShardError(f"{name}.json: no JSON ({error}); mend or leave out the file") from error
    if isinstance(value, dict):
        value = next((value[key] for key in LABEL_FIELDS if key in value), None)
    return str(value).strip() if isinstance(value, int | str) and not isinstance(value, bool) else None


# Classes


def _named_classes(url: str) -> dict[str, str] | None:
    """`classes.json` beside the tar files, if it is there; a command is not asked."""
    if url.startswith("pipe:"):
        return None
    try:
        content = fetch(url)
    except (FileNotFoundError, PermissionError):
        return None
    try:
        names = json.loads(content)
        assert isinstance(names, dict)
    except (ValueError, AssertionError) as error:
        raise ShardError(f"{url}: does not map labels to names of classes; mend or remove it") from error
    return {str(label): str(name) for label, name in names.items()}


def _classes(
    tars: list[_Tar], splits: list[str], named: dict[str, str] | None
) -> tuple[tuple[str, ...], dict[str, int]]:
    """The names of the classes, and the number of each label."""
    if named is not None:
        return tuple(named.values()), {label: number for number, label in enumerate(named)}
    words = {word for tar, split in zip(tars, splits, strict=True) if split == "train" for word in tar.words}
    are_numbers = all(re.fullmatch(r"\d{1,9}", word) for word in words)
    count = max(map(int, words), default=-1) + 1 if are_numbers else len(words)
    num_images = sum(len(tar.keys) for tar in tars)
    if count < 2 or count > (MAX_CLASS_SHARE * num_images if num_images >= 100 else MAX_CLASSES_OF_FEW):
        raise ShardError(
            f"{tars[0].url}: {count:,} different labels for {num_images:,} images; needed are two classes or "
            "more, not captions or names"
        )
    labels = map(str, range(count)) if are_numbers else sorted(words)
    found = {label: number for number, label in enumerate(labels)}
    return tuple(found), found


def _label(label_of: dict[str, int], word: str, name: str) -> int:
    number = label_of.get(word, label_of.get(word.lstrip("0") or "0"))
    if number is None:
        raise ShardError(
            f"{name}: label {word!r} is not one of the {len(label_of):,} classes of {CLASSES_FILE} or of the training "
            "images; mend or leave out the file"
        )
    return number


# Cache


def _cache_file(urls: list[str]) -> Path:
    absolute = [url if is_url(url) else str(Path(url).resolve()) for url in urls]
    name = "".join(re.findall(r"[\w.-]+", PurePosixPath(urls[0]).stem))[-40:]
    return cache_folder("shards") / f"{name}-{hashlib.sha256(json.dumps(absolute).encode()).hexdigest()[:16]}.json"


def _stamp(url: str) -> list[int] | None:
    """Size and time of change of a local file that exists."""
    if is_url(url) or not os.path.exists(url):
        return None
    status = os.stat(url)
    return [status.st_size, status.st_mtime_ns]


def _read_cache(cache: Path, stamps: list[Any]) -> tuple[tuple[str, ...], list[Shard]] | None:
    try:
        content = json.loads(cache.read_bytes())
        if content["format"] != FORMAT or content["stamps"] != stamps:
            return None
        return tuple(content["class_names"]), [Shard(**entry) for entry in content["shards"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: cannot be read, and is made again: %s", cache, error)
        return None


def _write_cache(cache: Path, class_names: tuple[str, ...], shards: list[Shard], stamps: list[Any]) -> None:
    """A list that cannot be kept costs time later, so that is no more than a warning."""
    shown = [asdict(shard) for shard in shards]
    content = {"format": FORMAT, "class_names": class_names, "stamps": stamps, "shards": shown}
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cache, json.dumps(content, separators=(",", ":")))
    except OSError as error:
        log.warning("The next start will take as long: %s: %s", cache, error.strerror or error)
