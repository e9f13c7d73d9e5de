"""Writing files so that an interruption leaves the old one or the new one, never a half."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes a file through a temporary one beside it, flushed to disk before it takes the name.

    Raises:
        OSError: As `open` and `write` do; what was at `path` before is then untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file it could not take
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def remove_unfinished(folder: Path) -> None:
    """Removes what `write_atomic` left in a folder when its process was killed. No other may be writing there."""
    for path in folder.glob(".*.????????"):
        if path.is_file():
            path.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
