"""Data sets by name: what every one of them promises, the digits, ImageNet, and names that are wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sequencer2d.data.catalog import ArrayImages, FileImages, ImageSet, find_folder, load_data, split_names
from sequencer2d.data.images import ImageError


def make_tree(root: Path, *files: str) -> Path:
    """A folder of 4×4 images."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (200, 100, 50)).save(root / file)
    return root


@pytest.fixture(params=["array", "files"])
def five_images(request: pytest.FixtureRequest, tmp_path: Path) -> ImageSet:
    names = [f"a/{i}.png" for i in range(5)]
    if request.param == "files":
        return FileImages(make_tree(tmp_path, *names), names, np.array([0, 0, 1, 1, 2]))
    return ArrayImages(np.full((5, 4, 4, 3), (200, 100, 50), dtype=np.uint8), np.array([0, 0, 1, 1, 2]), names)


def test_image_set(five_images: ImageSet) -> None:
    assert len(five_images) == 5
    assert five_images.labels.dtype == np.int64
    assert five_images.image(0).mode == "RGB"
    assert five_images.image(0).getpixel((0, 0)) == (200, 100, 50)


@pytest.mark.parametrize("indices", [[4, 2], np.array([4, 2]), (4, 2)])
def test_subset_keeps_image_label_and_name_together(five_images: ImageSet, indices) -> None:
    subset = five_images.subset(indices)
    assert type(subset) is type(five_images)
    assert [subset.name(i) for i in range(len(subset))] == ["a/4.png", "a/2.png"]
    assert subset.labels.tolist() == [2, 1]
    assert len(five_images.subset([])) == 0


def test_bad_file_is_an_image_error(tmp_path: Path) -> None:
    images = FileImages(tmp_path, ["gone.png"], np.array([0]))
    with pytest.raises(ImageError, match=r"gone\.png"):
        images.image(0)


def test_digits() -> None:
    data = load_data("digits")
    assert data.test is not None
    assert (data.name, data.class_names) == ("digits", tuple("0123456789"))
    assert len(data.train) + len(data.val) + len(data.test) == 1797
    assert data.val_source == "split: 10% of train, stratified, seed 0"
    assert np.bincount(data.test.labels).min() >= 34
    pixels = np.stack([np.asarray(data.test.image(i)) for i in range(len(data.test))])
    assert pixels.shape == (len(data.test), 8, 8, 3)
    assert np.unique(pixels).tolist() == [round(level * 255 / 16) for level in range(17)]


def test_digits_test_images_do_not_depend_on_the_seed() -> None:
    first, other = (split_names(load_data("digits", seed=seed)) for seed in (0, 1))
    assert first["test"] == other["test"]
    assert first["val"] != other["val"]
    assert split_names(load_data("digits", seed=1)) == other


def test_val_fraction_is_respected_and_written_down() -> None:
    data = load_data("digits", val_fraction=0.125)
    assert len(data.val) / (len(data.val) + len(data.train)) == pytest.approx(0.125, abs=0.005)
    assert data.val_source == "split: 12.5% of train, stratified, seed 0"


def test_split_names_survive_json_and_share_nothing(tmp_path: Path) -> None:
    names = split_names(load_data("digits"))
    assert json.loads(json.dumps(names)) == names
    assert len(set(names["train"] + names["val"] + names["test"])) == 1797
    root = make_tree(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(3)))
    assert split_names(load_data(str(root)))["test"] == []


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 2.0])
@pytest.mark.parametrize("name", ["digits", "cifar10", "tiny-imagenet"])
def test_val_fraction_out_of_range(name: str, fraction: float) -> None:
    with pytest.raises(ValueError, match=f"val_fraction={fraction}"):
        load_data(name, val_fraction=fraction)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("cifar", "cifar10 or cifar100"),
        ("Digits", "digits"),
        ("tiny_imagenet", "tiny-imagenet"),
        ("imagnet", "imagenet"),
    ],
)
def test_unknown_name_lists_the_near_ones(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown data set '{name}'; did you mean {near}") as error:
        load_data(name)
    assert "Known: cifar10, cifar100, digits, imagenet, tiny-imagenet; or give a folder's path" in str(error.value)


@pytest.mark.parametrize("name", ["", "qqqq"])
def test_unknown_name_without_near_ones(name: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown data set '{name}'\. Known: cifar10,"):
        load_data(name)


def test_missing_folder_and_file() -> None:
    with pytest.raises(FileNotFoundError, match="no/such/folder: no such folder"):
        load_data("no/such/folder")
    with pytest.raises(ValueError, match="a file, where a folder of images is needed"):
        load_data(__file__)


def test_root_is_not_silently_ignored(tmp_path: Path) -> None:
    root = make_tree(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(3)))
    with pytest.raises(ValueError, match="a folder of its own"):
        load_data(str(root), root="elsewhere")


def test_name_of_the_catalogue_wins_over_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path / "digits", *(f"{c}/{i}.png" for c in "ab" for i in range(3)))
    monkeypatch.chdir(tmp_path)
    assert len(load_data("digits").class_names) == 10
    assert load_data("./digits").class_names == ("a", "b")


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path / "pets", *(f"{c}/{i}.png" for c in "ab" for i in range(3)))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert load_data("~/pets").name == "pets"


def test_imagenet(tmp_path: Path) -> None:
    make_tree(tmp_path, "train/n02/a.png", "train/n01/b.png", "val/n01/c.png", "val/n02/d.png")
    data = load_data("imagenet", root=tmp_path)
    assert (data.name, data.class_names, data.val_source) == ("imagenet", ("n01", "n02"), "given")
    assert split_names(data)["val"] == ["val/n01/c.png", "val/n02/d.png"]


def test_imagenet_says_which_layout_it_expects(tmp_path: Path) -> None:
    layout = r"train/<wnid>/\*\.JPEG and val/<wnid>/\*\.JPEG"
    with pytest.raises(ValueError, match=layout):
        load_data("imagenet")
    make_tree(tmp_path, "train/n01/a.png", "train/n02/a.png")
    with pytest.raises(FileNotFoundError, match=layout):
        load_data("imagenet", root=tmp_path)
    make_tree(tmp_path, "val/ILSVRC2012_val_00000001.png")  # as the official archive unpacks
    with pytest.raises(ValueError, match=r"val: no class folders; sort the images into one folder per class"):
        load_data("imagenet", root=tmp_path)


@pytest.mark.parametrize("name", ["imagenet", "tiny-imagenet"])
def test_what_is_checked_is_what_is_trained_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once `prepare` has made the set, its folder in the root, else the root."""
    monkeypatch.chdir(tmp_path)
    root = Path("data")
    assert find_folder(name, root=root) == root
    make_tree(root / name, *(f"{split}/{c}/{i}.png" for split in ("train", "val") for c in "ab" for i in range(2)))
    (root / name / "classes.json").write_text('{"a": "ant", "b": "bee"}')
    for given in (root, None):
        assert find_folder(name, root=given) == root / name
        assert load_data(name, root=given).class_names == ("ant", "bee")
