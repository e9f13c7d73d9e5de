"""What is found in a folder, what counts as wrong, and that the folder itself is left alone."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sequencer2d.data import inspection
from sequencer2d.data.check import KINDS, Report, check_folder
from sequencer2d.data.images import open_image


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def picture(seed: int, side: int = 24) -> Image.Image:
    """Unlike every other one: eight by eight squares of random colours."""
    squares = np.random.RandomState(seed).randint(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three splits of two classes with 4 images each; nothing about them is worth knowing."""
    root = tmp_path / "pets"
    seed = 0
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(4):
                picture(seed := seed + 1).save(root / split / name / f"{number}.png")
    return root


def found(report: Report) -> set[tuple[str, tuple[str, ...]]]:
    return {(finding.kind, finding.files) for finding in report.findings}


def test_a_good_folder(root: Path) -> None:
    report = check_folder(root)
    assert report.findings == ()
    assert not report.wrong
    assert report.num_images == 24
    assert report.class_counts == {split: {"cat": 4, "dog": 4} for split in ("train", "val", "test")}
    assert (report.formats, report.modes, report.sizes) == ({"PNG": 24}, {"RGB": 24}, {"24×24": 24})


def truncate(root: Path) -> None:
    file = root / "train/cat/0.png"
    file.write_bytes(file.read_bytes()[:-200])


def truncate_another(root: Path) -> None:
    file = root / "val/dog/0.png"
    file.write_bytes(file.read_bytes()[:-200])


def empty_class(root: Path) -> None:
    for file in (root / "val/dog").iterdir():
        file.unlink()


def leak(root: Path) -> None:
    picture(1).save(root / "val/cat/0.png", pnginfo=None, compress_level=1)  # other bytes, the same pixels


def near_leak(root: Path) -> None:
    open_image(root / "train/cat/0.png").save(root / "test/cat/9.jpg", quality=80)


def conflict(root: Path) -> None:
    (root / "train/dog/9.png").write_bytes((root / "train/cat/0.png").read_bytes())


def near_conflict(root: Path) -> None:
    open_image(root / "train/cat/0.png").save(root / "train/dog/9.jpg", quality=80)


def duplicate(root: Path) -> None:
    (root / "train/cat/9.png").write_bytes((root / "train/cat/0.png").read_bytes())


def near_duplicate(root: Path) -> None:
    open_image(root / "train/cat/0.png").save(root / "train/cat/9.jpg", quality=80)


def imbalance(root: Path) -> None:
    for number in range(10, 20):
        picture(number + 100).save(root / f"train/cat/{number}.png")


def missing_class(root: Path) -> None:
    empty_class(root)
    (root / "val/dog").rmdir()


def unlabelled(root: Path) -> None:
    picture(99).save(root / "train/loose.png")


def extension(root: Path) -> None:
    picture(1).save(root / "train/cat/0.png", "JPEG", quality=95)


def mode(root: Path) -> None:
    picture(1).convert("L").save(root / "train/cat/0.png")


def turned(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1).save(root / "train/cat/0.png", exif=exif)


def frames(root: Path) -> None:
    picture(1).save(root / "train/cat/0.png", save_all=True, append_images=[picture(98)])


def size(root: Path) -> None:
    picture(1, side=40).save(root / "train/cat/0.png")


def blank(root: Path) -> None:
    Image.new("RGB", (24, 24), "grey").save(root / "train/cat/0.png")


@pytest.mark.parametrize(
    ("break_it", "kind", "files", "reason"),
    [
        (truncate, "unreadable", ("train/cat/0.png",), "truncated"),
        (empty_class, "empty class", ("val/dog",), "no images"),
        (leak, "leak", ("train/cat/0.png", "val/cat/0.png"), "the same pixels, in train and val"),
        (near_leak, "near leak", ("train/cat/0.png", "test/cat/9.jpg"), "in test and train"),
        (conflict, "conflict", ("train/cat/0.png", "train/dog/9.png"), "the same file, as cat and dog"),
        (near_conflict, "near conflict", ("train/cat/0.png", "train/dog/9.jpg"), "as cat and dog"),
        (duplicate, "duplicate", ("train/cat/0.png", "train/cat/9.png"), "the same file"),
        (near_duplicate, "near duplicate", ("train/cat/0.png", "train/cat/9.jpg"), "differ by"),
        (imbalance, "imbalance", ("train",), "14 images of cat, 4 of dog"),
        (missing_class, "missing class", ("val",), "no images of dog"),
        (unlabelled, "unlabelled", ("train/loose.png",), "in train, but without a class"),
        (extension, "extension", ("train/cat/0.png",), "JPEG inside"),
        (mode, "mode", ("train/cat/0.png",), "L: grey becomes RGB"),
        (turned, "turned", ("train/cat/0.png",), "24×24 when upright"),
        (frames, "frames", ("train/cat/0.png",), "2 frames"),
        (size, "size", ("train/cat/0.png",), "40×40, where 24×24 is usual"),
        (blank, "blank", ("train/cat/0.png",), "grey all over"),
    ],
)
def test_each_kind_of_finding(
    break_it: Callable[[Path], None], kind: str, files: tuple[str, ...], reason: str, root: Path
) -> None:
    break_it(root)
    report = check_folder(root)
    finding = next(finding for finding in report.findings if finding.kind == kind)
    assert sorted(finding.files) == sorted(files)
    assert reason in finding.reason
    also = {"empty class": {"layout", "missing class"}}.get(kind, set())
    assert {other for other, _ in found(report)} - also == {kind}
    assert report.wrong == finding.wrong == KINDS[kind][0]


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (["cat/1.png"], "only one class folder, cat"),
        (["cat/1.png", "cat/2.png", "dog/1.png"], "only one image in dog"),
        (["1.png", "2.png"], "no class folders"),
        (["val/cat/1.png", "val/dog/1.png"], "no train folder"),
        (["train/cat/1.png", "train/dog/1.png", "test/1.png"], "no class folders"),
        (["train/cat/1.png", "train/dog/1.png", "val/cow/1.png"], "cow not among the classes"),
    ],
)
def test_what_training_refuses_is_a_finding_and_the_images_are_checked(
    files: list[str], problem: str, tmp_path: Path
) -> None:
    for seed, file in enumerate(files):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(tmp_path / file)
    report = check_folder(tmp_path)
    assert problem in next(finding.reason for finding in report.findings if finding.kind == "layout")
    assert report.wrong
    assert report.num_images == len(files)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder"),
        (Path.touch, "a file, where a folder"),
        (Path.mkdir, "no images"),
        (lambda path: (path / "cat").mkdir(parents=True), "no images"),
    ],
)
def test_nothing_to_check_is_wrong_input(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make(tmp_path / "pets")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        check_folder(tmp_path / "pets")
    assert str(error.value).startswith(str(tmp_path / "pets"))


def test_other_files_are_listed_and_the_json_is_complete(root: Path) -> None:
    for number in range(30):
        (root / f"train/cat/bad{number}.png").touch()
    for file in ("readme.txt", "train/cat/Thumbs.db", "val/dog/photo.heic", ".hidden"):
        (root / file).write_text("x")
    report = check_folder(root)
    assert report.other_files == ("readme.txt", "train/cat/Thumbs.db", "val/dog/photo.heic")
    written = json.loads(json.dumps(report.to_dict()))
    assert [f["files"] for f in written["findings"] if f["kind"] == "unreadable"] == [
        [file] for file in sorted(f"train/cat/bad{number}.png" for number in range(30))
    ]
    assert written["wrong"] is True
    assert written["findings"][0]["wrong"] is True


def test_tiny_imagenet_with_a_test_image_that_was_trained_on(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    for folder in ("train/n01/images", "train/n02/images", "val/images", "test/images"):
        (root / folder).mkdir(parents=True)
    (root / "wnids.txt").write_text("n01\nn02\n")
    (root / "words.txt").write_text("n01\tcat\nn02\tdog\n")
    (root / "val/val_annotations.txt").write_text("v1.JPEG\tn01\t0\nv2.JPEG\tn02\t0\n")
    for seed, file in enumerate(["train/n01/images/a", "train/n02/images/b", "val/images/v1", "val/images/v2"]):
        picture(seed).save(root / f"{file}.JPEG")
    (root / "test/images/t.JPEG").write_bytes((root / "train/n01/images/a.JPEG").read_bytes())
    for path in (root, tmp_path):
        report = check_folder(path)
        assert report.class_counts == {split: {"n01": 1, "n02": 1} for split in ("train", "val")}
        assert found(report) == {
            ("leak", ("train/n01/images/a.JPEG", "test/images/t.JPEG")),
            ("unlabelled", ("test/images/t.JPEG",)),
        }
        assert report.other_files == ()


def state(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [root, *root.rglob("*")]}


def test_nothing_in_the_folder_changes(root: Path) -> None:
    near_leak(root)
    before = state(root)
    check_folder(root)
    assert state(root) == before


def test_a_file_that_goes_or_changes_meanwhile_is_a_finding(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = open_image

    def changing(path: Path) -> Image.Image:
        image = real(path)
        if path.match("cat/0.png"):
            path.write_bytes(path.read_bytes() + b" ")
        (root / "val/dog/3.png").unlink(missing_ok=True)
        return image

    monkeypatch.setattr(inspection, "open_image", changing)
    reasons = {f.files: f.reason for f in check_folder(root).findings if f.kind == "unreadable"}
    assert reasons[("train/cat/0.png",)].startswith("changed while it was read")
    assert reasons[("val/dog/3.png",)] == "cannot be opened: No such file or directory"
    assert len(reasons) == 4  # one cat of each split, and the dog
    monkeypatch.undo()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_odd_files_do_not_stop_it(root: Path) -> None:
    os.mkfifo(root / "train/cat/pipe.png")  # opening it would wait for ever
    (root / "train/cat/nowhere.png").symlink_to(root / "nothing")
    (root / "train/cat/loop").symlink_to(root)
    (root / "train/cat" / os.fsdecode(b"\xff.png")).touch()
    bad = {f.files[0]: f.reason for f in check_folder(root).findings if f.kind == "unreadable"}
    assert bad.pop("train/cat/pipe.png") == "not a regular file"
    assert bad.pop("train/cat/nowhere.png") == "cannot be opened: No such file or directory"
    assert set(bad.values()) == {"the file is empty"}


def test_progress_reaches_the_end_and_begins_with_what_is_known(root: Path) -> None:
    steps: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        steps.append((done, total))

    check_folder(root, progress=note)
    assert (steps[0], steps[-1]) == ((0, 24), (24, 24))
    check_folder(root, progress=note)
    assert steps[-1] == (24, 24)
    assert steps.count((0, 24)) == 1


@pytest.mark.slow
def test_processes_find_what_one_finds(root: Path) -> None:
    for break_it in (near_leak, extension, truncate_another):
        break_it(root)
    alone, several = (check_folder(root, workers=workers, cache=False) for workers in (0, 2))
    assert alone == several
    assert {finding.kind for finding in alone.findings} == {"extension", "near leak", "unreadable"}


def test_an_animation_that_is_damaged_behind_its_first_frame_is_an_image(root: Path) -> None:
    file = root / "train/cat/moving.gif"
    picture(90).save(file, save_all=True, append_images=[picture(91), picture(92)])
    content = file.read_bytes()
    last = content.rindex(b"\x2c\0\0\0\0\x18\0\x18\0")  # place and size of the last frame
    file.write_bytes(content[: last + 5])
    with pytest.raises(Exception, match="unpack"), Image.open(file) as image:
        _ = image.n_frames  # type: ignore[attr-defined]
    kinds = {f.kind for f in check_folder(root).findings if any("moving.gif" in name for name in f.files)}
    assert "unreadable" not in kinds
