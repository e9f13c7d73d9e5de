"""Image folders in the layouts that people have, and what is said about those that cannot be trained on."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from sequencer2d.data.catalog import load_data, split_names
from sequencer2d.data.folders import image_files


def make_tree(root: Path, *files: str) -> Path:
    """Empty files: reading a layout opens none."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def some(*folders: str, count: int = 10) -> list[str]:
    return [f"{folder}/{i}.png" for folder in folders for i in range(count)]


def test_train_and_val(tmp_path: Path) -> None:
    files = [*some("train/cat", "train/dog"), "val/cat/a.jpg", "val/dog/b.jpg"]
    data = load_data(str(make_tree(tmp_path / "pets", *files)))
    assert (data.name, data.class_names, data.val_source) == ("pets", ("cat", "dog"), "given")
    assert data.test is None
    assert split_names(data) == {"train": files[:20], "val": files[20:], "test": []}
    assert data.val.labels.tolist() == [0, 1]


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_all_three_splits(val: str, tmp_path: Path) -> None:
    make_tree(tmp_path, *some("train/cat", "train/dog"), f"{val}/dog/b.jpg", "test/dog/c.jpg", "test/cat/d.jpg")
    data = load_data(str(tmp_path))
    assert data.val_source == "given"
    assert split_names(data)["val"] == [f"{val}/dog/b.jpg"]
    assert split_names(data)["test"] == ["test/cat/d.jpg", "test/dog/c.jpg"]
    assert data.val.labels.tolist() == [1]


@pytest.mark.parametrize("test", [[], some("test/cat", "test/dog")])
def test_val_is_split_off_train(test: list[str], tmp_path: Path) -> None:
    make_tree(tmp_path, *some("train/cat", "train/dog"), *test)
    data = load_data(str(tmp_path), val_fraction=0.2, seed=3)
    names = split_names(data)
    assert data.val_source == "split: 20% of train, stratified, seed 3"
    assert np.bincount(data.val.labels).tolist() == [2, 2]
    assert sorted(names["train"] + names["val"]) == some("train/cat", "train/dog")
    assert names["test"] == test


def test_one_tree_is_split(tmp_path: Path) -> None:
    data = load_data(str(make_tree(tmp_path, *some("cat", "dog"))))
    names = split_names(data)
    assert data.val_source == "split: 10% of the images, stratified, seed 0"
    assert (len(names["train"]), len(names["val"]), data.test) == (18, 2, None)
    assert sorted(names["train"] + names["val"]) == some("cat", "dog")


def test_labels_follow_the_folder_of_each_image(tmp_path: Path) -> None:
    data = load_data(str(make_tree(tmp_path, *some("b", count=3), *some("a", count=7), *some("B", count=2))))
    assert data.class_names == ("B", "a", "b")
    for images in (data.train, data.val):
        for i in range(len(images)):
            assert images.name(i).startswith(data.class_names[images.labels[i]] + "/")


def test_nested_images_count_and_other_files_do_not(tmp_path: Path) -> None:
    images = ["a/1.JPG", "a/deep/er/2.jpeg", "a/deep/3.webp", "b/1.png", "b/2.tif"]
    rest = ["a/notes.txt", "a/.hidden.png", "a/.thumbs/4.png", ".git/x.png", "readme.png", "b/Thumbs.db", "b/png"]
    names = split_names(load_data(str(make_tree(tmp_path, *images, *rest))))
    assert sorted(names["train"] + names["val"]) == sorted(images)


def test_pictures_of_formats_that_are_not_read_are_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [*some("cat", "dog"), "cat/a.HEIC", "dog/deep/b.heic", "dog/c.dng", "dog/notes.txt", "dog/._d.heic"]
    for _ in range(2):
        assert len(split_names(load_data(str(make_tree(tmp_path, *files))))["train"]) == 18
    told = "left out, since their format is not read: 2 .heic, 1 .dng; convert them to JPEG or PNG"
    assert caplog.messages == [f"{tmp_path}: {told}"]


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs symbolic links")
def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    make_tree(tmp_path / "elsewhere", "deep/3.png")
    root = make_tree(tmp_path / "root", "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    (root / "a/linked").symlink_to(tmp_path / "elsewhere")
    (root / "a/again").symlink_to(tmp_path / "elsewhere/deep")
    (root / "a/self").symlink_to(root / "a")
    (root / "a/up").symlink_to(root)
    files = image_files(root, root / "a")
    assert sum(file.endswith("3.png") for file in files) == 1
    assert [file for file in files if not file.startswith(("a/linked", "a/again", "a/up"))] == ["a/1.png", "a/2.png"]


def test_no_file_is_asked_for_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ImageNet's 1.28 million files it would take minutes."""
    make_tree(tmp_path, *some("a", "b", count=500))
    calls = []
    for name in ("stat", "lstat"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real, **kwargs: calls.append(args) or real(*args, **kwargs))
    assert len(load_data(str(tmp_path)).train) == 900
    assert len(calls) < 100


@pytest.mark.parametrize("names", [("train", "car"), ("car", "test"), ("train", "test", "val", "car")])
def test_class_may_be_called_like_a_split(names: tuple[str, ...], tmp_path: Path) -> None:
    """CIFAR-100 has a class "train"."""
    data = load_data(str(make_tree(tmp_path, *some(*names))))
    assert data.class_names == tuple(sorted(names))
    assert data.test is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"root: no class folders$"),
        (
            some("Train/a", "Train/b", "Test/a"),
            r"root: Test, Train: call the folders of the splits train, val and test",
        ),
        (some("testing/a", "training/b"), r"root: testing, training: call the folders of the splits"),
        (["1.png", "2.png"], r"root: no class folders; sort the images into one folder per class"),
        (some("cat"), r"root: only one class folder, cat; two or more"),
        ([*some("cat", "dog"), "fox/readme.txt"], r"root: no images in fox; fill or remove"),
        ([*some("cat"), "fox/1.png"], r"root: only one image in fox; splitting"),
        ([f"{i:03}/1.png" for i in range(9)], r"only one image in 000, 001, 002, 003, 004 and 4 more"),
        ([*some("train/cat"), "val/cat/1.png"], r"train: only one class folder, cat"),
        ([*some("train/cat", "train/dog"), "val/fox/1.png"], r"val: fox not among the classes of the train folder"),
        ([*some("train/cat", "train/dog"), "test/fox/1.png"], r"test: fox not among the classes"),
        ([*some("train/cat", "train/dog"), "val/cat/x.txt"], r"val: no images in cat"),
        ([*some("train/cat", "train/dog"), "val/1.png"], r"val: no class folders; sort"),
        ([*some("train/cat", "train/dog"), "test/1.png"], r"test: no class folders; sort"),
        (some("val/cat", "val/dog"), r"root: has val, but no train folder with class folders"),
        (some("cat", "dog", "test/cat", "test/dog"), r"root: has test, but no train folder"),
        (some("train", "val"), r"root: has train, val, but no train folder with class folders in it"),
        (some("train/a", "train/b", "val/a", "valid/a"), r"root: val, valid are all validation folders; keep one"),
    ],
)
def test_folder_that_cannot_be_trained_on(files: list[str], message: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(ValueError, match=message) as error:
        load_data(str(make_tree(root, *files)))
    assert str(error.value).startswith(str(root))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="names of folders are text there")
def test_a_class_whose_name_is_no_text_is_told_of_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'d\\udcffg': not UTF-8; rename the class folders"):
        load_data(str(make_tree(tmp_path, *some("cat", "d\udcffg"))))


def test_what_systems_put_between_images_is_none_of_them(tmp_path: Path) -> None:
    of_systems = ["@eaDir/1.jpg/THUMB.jpg", "$RECYCLE.BIN/x/1.jpg", "lost+found/1.jpg", "__MACOSX/cat/1.jpg"]
    make_tree(tmp_path, *some("cat", "dog"), *of_systems, "cat/@eaDir/0.png/THUMB.jpg")
    data = load_data(str(tmp_path))
    assert data.class_names == ("cat", "dog")
    assert len(data.train) + len(data.val) == 20


def test_data_may_stay_undivided(tmp_path: Path) -> None:
    data = load_data(str(make_tree(tmp_path, "cat/1.jfif", "cat/2.JPE", "dog/1.png")), val_fraction=None)
    assert split_names(data) == {"train": ["cat/1.jfif", "cat/2.JPE", "dog/1.png"], "val": [], "test": []}
    digits = load_data("digits", val_fraction=None)
    assert (len(digits.train) + len(digits.test or ()), len(digits.val)) == (1797, 0)
