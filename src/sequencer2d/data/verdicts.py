"""What `check` found out about each file, kept in the user's cache folder: for the next check, and for training."""

import io
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from sequencer2d.data.duplicates import THUMBNAIL_BYTES
from sequencer2d.data.inspection import DIGEST_BYTES, Inspected, Picture
from sequencer2d.files import cache_folder, write_atomic

VERSION = f"3, Pillow {PIL.__version__}"
"""Another version of the format, or of the library that decodes, does not know what this one found."""
_BINARY = {"file_digest": DIGEST_BYTES, "pixel_digest": DIGEST_BYTES, "thumbnail": THUMBNAIL_BYTES}
_PLAIN = [field.name for field in fields(Picture) if field.name not in _BINARY]

logger = logging.getLogger(__name__)


def cache_file(root: Path) -> Path:
    """Where the verdicts on a folder are kept; its name says which folder to a human, its digits to us."""
    path = root.resolve()
    return cache_folder("check") / f"{path.name}-{blake2b(os.fsencode(path), digest_size=8).hexdigest()}.npz"


def save_verdicts(root: Path, verdicts: Sequence[Inspected]) -> None:
    """Writes them, atomically. A cache that cannot be written costs time later, so that is no more than a warning."""
    rows = [[v.file, v.size, v.mtime_ns, _plain(v.found)] for v in verdicts]
    pictures = [v.found for v in verdicts if isinstance(v.found, Picture)]
    bad = [row for row in rows if isinstance(row[-1], str)]
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {"text": _as_array(root, rows), "bad": _as_array(root, bad)}
    for name, size in _BINARY.items():
        arrays[name] = _stacked([getattr(picture, name) for picture in pictures], size)
    np.savez(buffer, **arrays)
    file = cache_file(root)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, buffer.getvalue())
    except OSError as error:
        logger.warning("The next check will take as long: %s: %s", file, error.strerror or error)


def _as_array(root: Path, rows: list[list[Any]]) -> np.ndarray:
    text = json.dumps({"version": VERSION, "folder": str(root.resolve()), "files": rows})
    return np.frombuffer(text.encode(), np.uint8)


def load_verdicts(root: Path) -> dict[str, Inspected]:
    """By file, those on files that have not changed since; nothing where there are none or they are damaged."""
    return {verdict.file: verdict for verdict in _read(root) if _is_unchanged(root, verdict)}


def known_bad(root: Path) -> dict[str, str]:
    """Files, relative to `root`, that `check` could not decode and that have not changed since, each with the reason.

    Empty where no check was made. The verdicts on good files are not read: those on ImageNet are half a gigabyte.
    """
    verdicts = [(verdict, verdict.found) for verdict in _read(root, only_bad=True)]
    return {verdict.file: str(reason) for verdict, reason in verdicts if _is_unchanged(root, verdict)}


def _read(root: Path, *, only_bad: bool = False) -> list[Inspected]:
    file = cache_file(root)
    try:
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as archive:  # reads what is asked for
            content = json.loads(archive["bad" if only_bad else "text"].tobytes())
            if content["version"] != VERSION:
                logger.info("Everything is looked at again: what was found by version %s", content["version"])
                return []
            binary = {} if only_bad else {name: archive[name] for name in _BINARY}
        position = itertools.count()
        return [
            Inspected(file=name, size=size, mtime_ns=mtime_ns, found=_found(what, binary, position))
            for name, size, mtime_ns, what in content["files"]
        ]
    except FileNotFoundError:
        return []
    # A damaged archive is answered with OSError, BadZipFile, ValueError, KeyError, RuntimeError and more
    except Exception as error:
        logger.warning("What earlier checks found cannot be read, and is not used: %s: %s", file, error)
        return []


def _found(what: list[Any] | str, binary: dict[str, np.ndarray], position: Iterator[int]) -> Picture | str:
    """Turns `_plain` round. `position` counts the pictures, which have a row in each of the binary arrays."""
    if isinstance(what, str):
        return what
    row = next(position)
    digests = {name: array[row].tobytes() for name, array in binary.items()}
    return Picture(**dict(zip(_PLAIN, what, strict=True)), **digests)


def _plain(found: Picture | str) -> list[Any] | str:
    return found if isinstance(found, str) else [getattr(found, name) for name in _PLAIN]


def _stacked(values: list[bytes], size: int) -> np.ndarray:
    return np.frombuffer(b"".join(values), np.uint8).reshape(-1, size)


def _is_unchanged(root: Path, verdict: Inspected) -> bool:
    try:
        now = os.stat(root / verdict.file)
    except (OSError, ValueError):
        return False
    return (now.st_size, now.st_mtime_ns) == (verdict.size, verdict.mtime_ns)
