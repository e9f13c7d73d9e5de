"""A second look is quick, never wrong, and survives whatever becomes of the cache; training gets the bad files."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sequencer2d.data import check, inspection, verdicts
from sequencer2d.data.check import Report, check_folder
from sequencer2d.data.verdicts import cache_file, known_bad


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    random = np.random.RandomState(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(4):
            squares = Image.fromarray(random.randint(0, 256, (8, 8, 3), dtype=np.uint8))
            squares.resize((24, 24)).save(root / name / f"{number}.png")
    (root / "dog/bad.png").write_bytes((root / "dog/1.png").read_bytes()[:100])
    return root


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that were decoded."""
    files: list[str] = []
    real = inspection.inspect_file

    def noted(root: Path, file: str) -> inspection.Inspected:
        files.append(file)
        return real(root, file)

    monkeypatch.setattr(inspection, "inspect_file", noted)
    return files


def content(report: Report) -> dict[str, Any]:
    return {name: value for name, value in report.to_dict().items() if name != "num_cached"}


def test_a_second_look_opens_nothing_and_finds_the_same(root: Path, looked_at: list[str]) -> None:
    first = check_folder(root)
    assert len(looked_at) == first.num_images == 9
    looked_at.clear()
    second = check_folder(root)
    assert looked_at == []
    assert (first.num_cached, second.num_cached) == (0, 9)
    assert content(first) == content(second)


def test_new_and_changed_files_are_looked_at(root: Path, looked_at: list[str]) -> None:
    check_folder(root)
    looked_at.clear()
    Image.new("RGB", (24, 24)).save(root / "cat/new.png")
    os.utime(root / "cat/0.png", ns=(1, 1))
    (root / "cat/1.png").write_bytes((root / "cat/2.png").read_bytes() + b" ")
    (root / "cat/3.png").unlink()
    report = check_folder(root)
    assert sorted(looked_at) == ["cat/0.png", "cat/1.png", "cat/new.png"]
    assert report.num_images == 9
    looked_at.clear()
    check_folder(root)
    assert looked_at == []


def test_a_file_that_could_not_be_opened_is_tried_again(root: Path, looked_at: list[str]) -> None:
    (root / "cat/x.png").symlink_to(root / "later.png")
    assert any(finding.files == ("cat/x.png",) for finding in check_folder(root).findings)
    looked_at.clear()
    check_folder(root)
    assert looked_at == ["cat/x.png"]


def test_without_a_cache_none_is_read_or_written(root: Path, cache: Path, looked_at: list[str]) -> None:
    check_folder(root, cache=False)
    assert list(cache.iterdir()) == []
    check_folder(root)
    looked_at.clear()
    assert check_folder(root, cache=False).num_cached == 0
    assert len(looked_at) == 9


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [half, flipped, lambda _: b"", lambda _: b"PK\x03\x04", lambda _: b"hello"])
def test_a_damaged_cache_is_ignored_and_replaced(
    damage: Any, root: Path, looked_at: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = check_folder(root)
    file = cache_file(root)
    file.write_bytes(damage(file.read_bytes()))
    looked_at.clear()
    with caplog.at_level(logging.WARNING):
        assert set(known_bad(root)) <= {"dog/bad.png"}  # whose verdict lies apart, and may be whole
        assert check_folder(root) == first
    assert len(looked_at) == 9
    assert str(file) in caplog.text
    assert check_folder(root).num_cached == 9


def test_a_pickle_in_its_place_is_not_loaded(root: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    check_folder(root)
    array = np.empty(1, dtype=object)
    array[0] = Trap()
    with cache_file(root).open("wb") as file:
        np.savez(file, allow_pickle=True, text=array)
    assert known_bad(root) == {}
    assert not (tmp_path / "sprung").exists()


def test_another_version_is_not_used(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_folder(root)
    monkeypatch.setattr(verdicts, "VERSION", "another")
    assert known_bad(root) == {}
    assert check_folder(root).num_cached == 0


def test_a_cache_that_cannot_be_written_is_a_warning(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert check_folder(root).num_images == 9
    assert "The next check will take as long" in caplog.text


def test_an_interrupted_check_keeps_what_it_found(
    root: Path, monkeypatch: pytest.MonkeyPatch, looked_at: list[str]
) -> None:
    real = check.inspect_files

    def interrupted(*args: Any, **options: Any) -> Iterator[inspection.Inspected]:
        for position, verdict in enumerate(real(*args, **options)):
            if position == 5:
                raise KeyboardInterrupt
            yield verdict

    with monkeypatch.context() as patch:
        patch.setattr(check, "inspect_files", interrupted)
        with pytest.raises(KeyboardInterrupt):
            check_folder(root)
    looked_at.clear()
    assert check_folder(root).num_cached == 5
    assert len(looked_at) == 4


def test_known_bad_names_what_is_still_bad(root: Path) -> None:
    assert known_bad(root) == {}
    Image.new("RGB", (1, 9)).save(root / "cat/thin.png")
    check_folder(root)
    bad = known_bad(root)
    assert set(bad) == {"cat/thin.png", "dog/bad.png"}
    assert "1×9 pixels are too few" in bad["cat/thin.png"]
    Image.new("RGB", (9, 9)).save(root / "cat/thin.png")
    assert set(known_bad(root)) == {"dog/bad.png"}
    (root / "dog/bad.png").unlink()
    assert known_bad(root) == {}


def test_of_good_files_training_reads_nothing(root: Path) -> None:
    check_folder(root)
    with np.load(cache_file(root)) as archive:
        bad = archive["bad"]
    np.savez(cache_file(root), bad=bad)
    assert len(bad) < 400
    assert set(known_bad(root)) == {"dog/bad.png"}


def test_each_folder_has_a_cache_of_its_own_by_whatever_path(root: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(root)
    assert cache_file(root) == cache_file(tmp_path / "link") == cache_file(tmp_path / "other" / ".." / "pets")
    assert cache_file(root) != cache_file(tmp_path / "other" / "pets")
