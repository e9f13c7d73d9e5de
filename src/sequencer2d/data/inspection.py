"""Looking at image files one by one: can each be decoded, what is it, and what are its fingerprints?"""

import os
import signal
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from PIL import Image

from sequencer2d.cores import num_cores
from sequencer2d.data.duplicates import thumbnail
from sequencer2d.data.images import ImageError, open_image, orientation

DIGEST_BYTES = 16
UNSTABLE = -1
"""In place of a time of change, and equal to none: a second look may well find otherwise."""
CHUNK_FILES, CHUNK_BYTES = 128, 4_000_000
"""What one process looks at in one go, at most: some tenths of a second, for which Ctrl-C has to wait."""
ALONE = 256
"""Up to so many files, starting processes takes longer than looking."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A file that could be decoded."""

    format: str
    """What Pillow takes it for, whatever the extension says: `JPEG`, `PNG`, …"""
    mode: str
    """In the file: `RGB`, `L`, `CMYK`, …"""
    width: int
    height: int
    """In pixels, upright."""
    turned: bool
    """Whether the EXIF orientation turns or mirrors it."""
    frames: int
    """More than 1: an animation or several pages, of which the first is used."""
    file_digest: bytes
    """Of the bytes of the file."""
    pixel_digest: bytes
    """Of the decoded RGB pixels and the size."""
    thumbnail: bytes
    """See `duplicates.thumbnail`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspected:
    """What was found out about a file, and which state of the file that holds for."""

    file: str
    """Relative to the folder of the data set."""
    size: int
    mtime_ns: int
    """Time of the last change, or `UNSTABLE`."""
    found: Picture | str
    """A picture, or why it is none."""


def inspect_file(root: Path, file: str) -> Inspected:
    """Decodes one file. Whatever is wrong with it, the answer is an `Inspected`.

    A file that cannot be opened, or changes meanwhile, is reported, and not remembered.
    """
    path = root / file
    try:
        before = path.stat()
        if not stat.S_ISREG(before.st_mode):
            return Inspected(file=file, size=0, mtime_ns=UNSTABLE, found="not a regular file")
        with path.open("rb") as opened:
            digest = blake2b(digest_size=DIGEST_BYTES)
            while block := opened.read(2**20):
                digest.update(block)
        found = _look(path, digest.digest())
        after = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        return Inspected(file=file, size=0, mtime_ns=UNSTABLE, found=f"cannot be opened: {reason}")
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        return Inspected(file=file, size=0, mtime_ns=UNSTABLE, found="changed while it was read; check again")
    return Inspected(file=file, size=before.st_size, mtime_ns=before.st_mtime_ns, found=found)


def _look(path: Path, file_digest: bytes) -> Picture | str:
    try:
        image = open_image(path)
    except ImageError as error:
        return str(error).removeprefix(f"{path}: ")
    with Image.open(path) as header:  # only read as far as needed to tell what it is
        turned = orientation(header) > 1
        kind, mode, frames = header.format or "unknown", header.mode, _frames(header)
    pixels = blake2b(f"{image.width} {image.height} ".encode(), digest_size=DIGEST_BYTES)
    pixels.update(image.tobytes())
    return Picture(
        format=kind,
        mode=mode,
        width=image.width,
        height=image.height,
        turned=turned,
        frames=frames,
        file_digest=file_digest,
        pixel_digest=pixels.digest(),
        thumbnail=thumbnail(image),
    )


def _frames(image: Image.Image) -> int:
    """How many there are; 1 where those behind the first, which is all that is used, are damaged."""
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # Pillow's answers to damage are of many kinds
        return 1


def inspect_files(
    root: Path,
    files: Sequence[str],
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Inspected]:
    """Looks at files in several processes; answers come as they are ready, in any order.

    Args:
        root: Folder of the data set.
        files: Paths relative to it.
        workers: Processes; default: one per core, and none for few files. The processes are spawned, so a script that
            calls this must be importable (`if __name__ == "__main__":`).
        progress: Called with the number of files done since the last call.

    Raises:
        RuntimeError: A process died, say because the memory is full. What was yielded before, holds.
    """
    workers = workers if workers is not None else (0 if len(files) <= ALONE else num_cores())
    chunks = _chunks(root, files)
    for done in _in_processes(root, chunks, workers) if workers else (_inspect(root, chunk) for chunk in chunks):
        yield from done
        if progress:
            progress(len(done))


def _inspect(root: Path, files: list[str]) -> list[Inspected]:
    return [inspect_file(root, file) for file in files]


def _in_processes(root: Path, chunks: Iterator[list[str]], workers: int) -> Iterator[list[Inspected]]:
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_leave_ctrl_c_to_main)
    try:
        with _ctrl_c_ignored():  # which the new processes inherit
            running: set[Future[list[Inspected]]] = {
                pool.submit(_inspect, root, chunk) for chunk in islice(chunks, 2 * workers)
            }
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(_inspect, root, chunk) for chunk in islice(chunks, len(done))}
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(root: Path, files: Sequence[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    num_bytes = 0
    for file in files:
        chunk.append(file)
        try:
            num_bytes += os.stat(root / file).st_size
        except (OSError, ValueError):
            num_bytes += 0  # `inspect_file` will say so
        if len(chunk) == CHUNK_FILES or num_bytes >= CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """While it lasts, Ctrl-C does nothing; only the main thread can say so."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave_ctrl_c_to_main() -> None:
    """A terminal sends Ctrl-C to the processes of the pool, too; they end with their chunk."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
