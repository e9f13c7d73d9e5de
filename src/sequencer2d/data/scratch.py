"""A folder that appears whole or not at all: made in a scratch folder beside it, and renamed at the very end.

What a killed process leaves of it is removed by the next. A lock keeps two apart; the system releases it with the
process, however that ends.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC, EROFS
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def made_whole(target: Path) -> Iterator[Path | None]:
    """Gives a scratch folder, in which the folder `target.name` is to be made; at the end it becomes `target`.

    Whatever else is in the scratch folder, and all of it after an exception, is removed.

    Args:
        target: Folder to make; it may exist if it is empty. Its parent is made.

    Yields:
        The scratch folder, on the disk of `target`; `None` where something is at `target` already, which stays as it
        is.

    Raises:
        BlockingIOError: Another process is making it.
        OSError: As the file system does; where it is full or read-only, the message says what to do.

    Example:
        with made_whole(Path("data/pets")) as scratch:
            if scratch is not None:
                (scratch / "pets").mkdir()
    """
    parent = target.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with FileLock(parent / f".prepare-{target.name}.lock", blocking=False):
            scratch = parent / f".prepare-{target.name}"
            if scratch.exists():
                shutil.rmtree(scratch)
            if target.exists() and not (target.is_dir() and not any(target.iterdir())):
                yield None
                return
            scratch.mkdir()
            try:
                yield scratch
                _publish(scratch / target.name, target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except Timeout as error:
        raise BlockingIOError(f"{target}: another process is preparing it; wait for that, and run again") from error
    except OSError as error:
        step = _NEXT_STEP.get(error.errno or 0)
        if step is None:
            raise
        raise OSError(f"{target.name}: cannot be written to {parent}: {error.strerror}. {step}") from error


_FULL = "Free some space or choose another folder"
_NEXT_STEP = {ENOSPC: _FULL, EDQUOT: _FULL, EROFS: "Choose another folder"}


def _publish(tree: Path, target: Path) -> None:
    """Gives the tree its place, once all of it is on the disk: a power failure cannot leave empty files there."""
    if hasattr(os, "sync"):
        os.sync()
    os.rename(tree, target)
