"""Writing files so that an interruption leaves the old one or the new one, never a half; and where caches lie."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedWriter
from pathlib import Path

_UNFINISHED = ".unfinished"
"""How the names of files end that are being written."""


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes a file at once, as `atomic_file` does.

    In the place of what is no text, such as parts of a file's name, stands its escape, as JSON has it.
    """
    with atomic_file(path) as file:
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BufferedWriter]:
    """A file to write piece by piece: a temporary one beside `path`, flushed to disk before it takes the name.

    Raises:
        OSError: As `open` and `write` do; after this or any other exception what was at `path` before is untouched.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_UNFINISHED)
    except OSError as error:
        error.filename = str(path)  # the user knows of no other
        raise
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
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
    for path in folder.glob(f".*{_UNFINISHED}"):
        path.unlink()


def cache_folder(kind: str) -> Path:
    """Where this user's caches of a kind lie: in `XDG_CACHE_HOME`, or what the platform has in its place."""
    if "XDG_CACHE_HOME" in os.environ:
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return base / "sequencer2d" / kind


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
