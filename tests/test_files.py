"""An interrupted write leaves the old file or the new one, and nothing else."""

import errno
import os
from pathlib import Path

import pytest

from sequencer2d import files
from sequencer2d.files import write_atomic


@pytest.mark.parametrize("content", ["größer ≥ 1", b"\x00\xff"])
def test_content_is_written_as_it_is(content: str | bytes, tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", content)
    assert (tmp_path / "a").read_bytes() == (content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_other(
    step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(type(error)):
        write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_place_that_takes_no_file_is_named_as_the_user_named_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        write_atomic(tmp_path / "nowhere" / "a.json", b"new")
    assert error.value.filename == str(tmp_path / "nowhere" / "a.json")


def test_a_new_file_appears_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    sync = os.fsync

    def look(handle: int) -> None:
        seen.append((tmp_path / "a").exists())
        sync(handle)

    monkeypatch.setattr(files.os, "fsync", look)
    write_atomic(tmp_path / "a", b"new")
    assert seen == [False]
    assert (tmp_path / "a").exists()


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_missing_folder_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "runs" / "a", b"")
    assert not (tmp_path / "runs").exists()
