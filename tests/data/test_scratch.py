"""`kill -9` before every change to the disk: the folder is there whole or not at all, and the next run makes it."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from official_archives import (
    cifar_archive,
    folder_files,
    imagenet_archives,
    snapshot,
    tar_of,
    tiny_files,
    write_files,
    write_zip,
)
from sequencer2d.data import scratch as module
from sequencer2d.data.scratch import made_whole

LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "tiny-imagenet": lambda folder: write_zip(folder / "t.zip", tiny_files()),
    "tiny-imagenet, unpacked": lambda folder: write_files(folder, tiny_files()),
    "cifar10": lambda folder: cifar_archive(folder, "cifar10")[0],
    "cifar100": lambda folder: cifar_archive(folder, "cifar100")[0],
    "imagenet": imagenet_archives,
    "pets": lambda folder: write_files(folder, folder_files()),
    "pets, zipped": lambda folder: write_zip(folder / "x.zip", folder_files()),
    "pets, in a tar": lambda folder: write_files(folder, {"x.tar": tar_of(folder_files())}) / "x.tar",
    "shards": lambda folder: write_files(folder, folder_files()),
}
"""How the source of each is made; what follows a comma is no part of the name."""

DRIVER = """
    import json, os, signal, sys
    from pathlib import Path
    from sequencer2d.data.catalog import load_data
    from sequencer2d.data.cifar import DATASETS
    from sequencer2d.data.prepare import prepare
    from sequencer2d.data.shards import write_shards

    name, source, root, step = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
    for attribute, value in json.loads(sys.argv[5]).items():
        setattr(DATASETS[name], attribute, value)

    def make(data):
        if name == "shards":
            write_shards(load_data(source, val_fraction=0.34), data / name, images_per_shard=3)
        else:
            prepare(name, data, source)

    def run(data, fatal):  # in a process of its own that kills itself before its `fatal`-th change to the disk
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        count = 0

        def hook(event, arguments):
            nonlocal count
            if event in EVENTS and any(str(data) in str(argument) for argument in arguments):
                count += 1
                if count == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

        os.sync = lambda: None
        os.fsync = lambda file: None
        sys.addaudithook(hook)
        make(data)
        os._exit(0)

    def files(data):
        if not data.exists():
            return None
        return {path.relative_to(data): path.read_bytes() for path in data.rglob("*") if path.is_file()}

    assert run(root / "whole", 0) == 0
    whole = files(root / "whole" / name)
    assert whole
    fatal, kept, killed_twice = 1, 0, 0
    while True:
        data = root / str(fatal)
        status = run(data, fatal)
        assert status in (0, -signal.SIGKILL), status
        assert files(data / name) in (None, whole), f"half of it after kill {fatal}"
        kept += files(data / name) is not None
        if status == 0:
            break
        killed_twice += run(data, max(1, fatal // 2)) != 0
        assert files(data / name) in (None, whole), f"half of it after two kills, {fatal}"
        assert run(data, 0) == 0
        assert files(data / name) == whole, fatal
        assert run(data, 0) == 0
        assert files(data / name) == whole, f"not left alone after kill {fatal}"
        assert sorted(p.name for p in data.iterdir()) in ([f".prepare-{name}.lock", name], [name]), fatal
        fatal += step
    print(fatal, kept, killed_twice)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_at_any_instant(layout: str, tmp_path: Path) -> None:
    steps = {"cifar10": 11, "cifar100": 41}  # hundreds of files that are all alike
    _kill_many_times(layout, steps.get(layout, 3 if "," in layout else 1), tmp_path)


@pytest.mark.parametrize(("layout", "step"), [("tiny-imagenet", 11), ("cifar10", 53), ("shards", 5)])
def test_killed_at_some_instants(layout: str, step: int, tmp_path: Path) -> None:
    _kill_many_times(layout, step, tmp_path)


def _kill_many_times(layout: str, step: int, folder: Path) -> None:
    name = layout.partition(",")[0]
    source = LAYOUTS[layout](folder / "source")
    checksums = cifar_archive(folder / "again", name)[1] if "cifar" in name else {}
    before = snapshot(folder / "source")
    driver = folder / "driver.py"
    driver.write_text(textwrap.dedent(DRIVER))
    command = [sys.executable, str(driver), name, str(source), str(folder / "out"), str(step), json.dumps(checksums)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(module.__file__).parents[2])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    assert result.returncode == 0, result.stderr
    kills, kept, killed_twice = map(int, result.stdout.split())
    assert kills // step >= 4
    assert killed_twice >= 1
    assert kept >= 1
    assert snapshot(folder / "source") == before


def make(target: Path, files: dict[str, bytes]) -> bool:
    with made_whole(target) as scratch:
        if scratch is None:
            return False
        write_files(scratch / target.name, files)
        write_files(scratch / "unpacked", {"x": b""})
    return True


def test_what_is_there_is_left_alone_and_an_empty_folder_is_filled(tmp_path: Path) -> None:
    target = tmp_path / "root" / "pets"
    target.mkdir(parents=True)
    assert make(target, {"cat/1": b"one"})
    assert not make(target, {"cat/1": b"two"})
    assert snapshot(tmp_path / "root") == {"pets": None, "pets/cat": None, "pets/cat/1": b"one"}
    (tmp_path / "root" / "file").write_bytes(b"mine")
    assert not make(tmp_path / "root" / "file", {"cat/1": b"two"})
    assert (tmp_path / "root" / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(kind: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        with made_whole(tmp_path / "root" / "pets") as scratch:
            assert scratch is not None
            write_files(scratch / "pets", {"cat/1": b"one"})
            raise kind

    with pytest.raises(kind):
        fail()
    assert snapshot(tmp_path / "root") == {}


@pytest.mark.parametrize(
    ("number", "step"), [(errno.ENOSPC, "Free some space or choose"), (errno.EROFS, "Choose another folder")]
)
def test_a_disk_that_is_full_or_read_only(number: int, step: str, tmp_path: Path) -> None:
    message = rf"^pets: cannot be written to {tmp_path}/root: {os.strerror(number)}\. {step}"
    with pytest.raises(OSError, match=message), made_whole(tmp_path / "root" / "pets"):
        raise OSError(number, os.strerror(number), "pets/cat/1")
    assert snapshot(tmp_path / "root") == {}


def test_two_at_once(tmp_path: Path) -> None:
    scratch = tmp_path / ".prepare-pets"
    scratch.mkdir()
    with (
        FileLock(tmp_path / ".prepare-pets.lock"),
        pytest.raises(BlockingIOError, match="pets: another process is preparing it"),
    ):
        make(tmp_path / "pets", {"cat/1": b"one"})
    assert scratch.is_dir()  # the other's
    assert make(tmp_path / "pets", {"cat/1": b"one"})
