"""Checkpoints to go on from: written whole or not at all, named by their checksum, the last few kept.

`step-00001200-0123456789abcdef.ckpt` is the state after 1,200 updates; the digits are the first of its SHA-256, so a
file that was damaged later is known as such. Nothing is deleted that is in question: it is set aside by another name.
"""

import hashlib
import io
import logging
import re
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from sequencer2d.files import write_atomic

log = logging.getLogger("sequencer2d")

_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.ckpt")


class CheckpointError(RuntimeError):
    """There are checkpoints, and none of them is whole."""


class CheckpointFolder(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, for the folder `checkpoints/` of a run.

    Lightning has a checkpoint made before it logs the metrics of that step. So a checkpoint is kept in memory until
    `publish` is called, when they are written.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.pending: tuple[Path, bytes] | None = None
        """A checkpoint that is not written yet, on the rank that writes."""

    def path(self, updates: int) -> Path:
        """Where `save_checkpoint` is asked to write; the checksum is added to the name."""
        return self.folder / f"step-{updates:08d}.ckpt"

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Keeps a checkpoint to be published, in the place of any other."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        self.pending = Path(path), buffer.getvalue()

    def publish(self) -> None:
        """Writes the checkpoint that was saved, if there is one, and then removes those older than the last `keep`."""
        if self.pending is None:
            return
        (path, content), self.pending = self.pending, None
        write_atomic(path.with_stem(f"{path.stem}-{_digits(content)}"), content)
        for old in find_checkpoints(self.folder)[self.keep :]:
            old.unlink(missing_ok=True)


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder by their names, newest first."""
    found = [path for path in folder.glob("step-*.ckpt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (updates_of(path), path.stat().st_mtime_ns), reverse=True)


def updates_of(path: Path) -> int:
    """The number of updates that a checkpoint's name tells."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named as a checkpoint of a run: step-00001200-0123456789abcdef.ckpt")
    return int(match[1])


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None if there is none of any kind. Damaged newer ones are set aside.

    Raises:
        CheckpointError: There are only damaged ones.
    """
    found = find_checkpoints(folder)
    for position, path in enumerate(found):
        if is_whole(path):
            for damaged in found[:position]:
                log.warning("%s is damaged (its checksum is another); going on from %s", damaged, path.name)
                damaged.replace(damaged.with_suffix(".damaged"))
            return path
    if found:
        raise CheckpointError(
            f"{found[0]} and all other checkpoints there are damaged (their checksums are others); "
            "restore one, or begin again with another --run-dir"
        )
    return None


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is what was written."""
    match = _NAME.fullmatch(path.name)
    return match is not None and _digits(path.read_bytes()) == match[2]


def go_back_to(path: Path) -> None:
    """Sets the checkpoints aside that are newer than this one, from which a run is to go on."""
    found = find_checkpoints(path.parent)
    for later in found[: found.index(path)]:
        later.replace(later.with_suffix(".later"))


def _digits(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
