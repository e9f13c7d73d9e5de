"""Shards as files: what is written comes back, whole or not at all; what is damaged is named."""

import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from official_archives import snapshot
from sequencer2d.cli import DONE, WRONG_INPUT, main
from sequencer2d.data.catalog import load_data
from sequencer2d.data.fetch import ShardError
from sequencer2d.data.images import ImageError
from sequencer2d.data.loaders import eval_loader
from sequencer2d.data.sets import ArrayImages, FileImages, ImageData
from sequencer2d.data.shards import FORMAT, ShardImages, is_shards, load_shards, write_shards
from sequencer2d.data.transforms import EvalTransform
from sequencer2d.preprocessing import Preprocessing

CLASSES = ("blue", "green", "red")


def load(name: str | Path) -> ImageData:
    return load_shards(str(name), val_fraction=0.25, seed=0)


@pytest.fixture
def data(tmp_path: Path) -> ImageData:
    """14 training images in files of two formats, 5 validation images in memory, 3 test images in files."""
    generator = np.random.RandomState(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(17):
        path = folder / (f"{i:02d}.JPEG" if i % 2 else f"{i:02d}.png")
        Image.fromarray(generator.randint(0, 256, (12, 9, 3)).astype(np.uint8)).save(path)
    files = sorted(path.name for path in folder.iterdir())
    array = generator.randint(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    return ImageData(
        name="mixed",
        class_names=CLASSES,
        train=FileImages(folder, files[:14], np.arange(14) % 3),
        val=ArrayImages(array, np.array([2, 0, 1, 1, 0]), [f"val/{i}" for i in range(5)]),
        test=FileImages(folder, files[14:], np.array([0, 1, 2])),
        val_source="given",
    )


@pytest.fixture
def shards(data: ImageData, tmp_path: Path) -> Path:
    write_shards(data, tmp_path / "shards", images_per_shard=4)
    return tmp_path / "shards"


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Writes a shard with other members, at the same size."""
    content = members(path)
    change(content)
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, member in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(member)
            tar.addfile(info, BytesIO(member))
    path.write_bytes(buffer.getvalue().ljust(path.stat().st_size, b"\0"))


def test_a_folder_of_shards_looks_as_documented(shards: Path) -> None:
    assert sorted(path.name for path in shards.iterdir()) == [
        "shards.json", "test-000000.tar", *(f"train-00000{i}.tar" for i in range(4)), "val-000000.tar",
        "val-000001.tar",
    ]  # fmt: skip
    index = json.loads((shards / "shards.json").read_text())
    assert index["format"] == FORMAT
    assert index["class_names"] == list(CLASSES)
    assert [shard["num_images"] for shard in index["shards"]] == [4, 4, 4, 2, 4, 1, 3]
    assert {shard["file"]: shard["size"] for shard in index["shards"]} == {
        path.name: path.stat().st_size for path in shards.glob("*.tar")
    }
    assert [path.name for path in shards.parent.glob(".*") if path.suffix != ".lock"] == []


def test_files_keep_their_bytes_and_labels_and_names(data: ImageData, shards: Path) -> None:
    assert isinstance(data.train, FileImages)
    written: dict[str, bytes] = {}
    for path in sorted(shards.glob("train-*.tar")):
        written |= members(path)
    assert len(written) == 3 * 14
    originals = {file: i for i, file in enumerate(data.train.files)}
    seen = []
    for key in range(14):
        name = json.loads(written[f"{key:09d}.json"])["name"]
        extension = ".jpeg" if name.endswith(".JPEG") else ".png"
        assert written[f"{key:09d}{extension}"] == (data.train.root / name).read_bytes()
        assert int(written[f"{key:09d}.cls"]) == data.train.labels[originals[name]]
        seen.append(name)
    assert sorted(seen) == data.train.files
    assert seen != data.train.files  # else a shard would hold a single class


def test_what_is_read_is_what_was_written(data: ImageData, shards: Path) -> None:
    read = load(shards)
    assert (read.name, read.class_names, read.val_source) == ("shards", CLASSES, "given")
    for before, after in ((data.val, read.val), (data.test, read.test)):
        assert before is not None
        assert after is not None
        np.testing.assert_array_equal(before.labels, after.labels)
        for i in range(len(before)):
            np.testing.assert_array_equal(np.asarray(before.image(i)), np.asarray(after.image(i)))
    assert sorted(data.train.image(i).tobytes() for i in range(14)) == sorted(
        read.train.image(i).tobytes() for i in range(14)
    )
    assert read.train.name(5) == "train-000001.tar/000000005"
    assert len({read.train.name(i) for i in range(14)}) == 14


def test_writing_again_gives_the_same_bytes(data: ImageData, shards: Path, tmp_path: Path) -> None:
    write_shards(data, tmp_path / "again", images_per_shard=4)
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of webdataset
def test_the_webdataset_library_reads_them(data: ImageData, shards: Path) -> None:
    webdataset: Any = pytest.importorskip("webdataset", reason="reads the shards as others do; not installed")
    pattern = str(shards / "train-{000000..000003}.tar")
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False).decode("rgb8").to_tuple("png;jpeg", "cls"))
    read = load(shards).train
    assert [label for _, label in samples] == read.labels.tolist()
    for i, (pixels, _) in enumerate(samples):
        np.testing.assert_array_equal(pixels, np.asarray(read.image(i)))


def test_a_failure_leaves_nothing(data: ImageData, tmp_path: Path) -> None:
    assert isinstance(data.train, FileImages)
    (data.train.root / data.train.files[-1]).unlink()
    before = snapshot(tmp_path)
    with pytest.raises(FileNotFoundError, match=data.train.files[-1]):
        write_shards(data, tmp_path / "shards", images_per_shard=2)
    assert snapshot(tmp_path) == before


def test_written_again_it_is_left_alone(data: ImageData, shards: Path) -> None:
    before = snapshot(shards)
    again = write_shards(data, shards, images_per_shard=9)
    assert [shard.num_images for shard in again] == [4, 4, 4, 2, 4, 1, 3]
    with pytest.raises(ValueError, match=r"shards: holds the shards of another data set or split; remove it"):
        write_shards(replace(data, test=None), shards)
    assert snapshot(shards) == before


def test_a_folder_with_something_in_it_is_left_alone(data: ImageData, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"full: exists and is not an empty folder"):
        write_shards(data, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="images_per_shard=0"):
        write_shards(data, tmp_path / "new", images_per_shard=0)


@pytest.mark.parametrize(
    "shape", ["{}", "{}/", "{}/shards.json", "pipe:cat {}/{{}}", "{}/train-{{000000..000003}}.tar"]
)
def test_shards_by_folder_file_pattern_and_command(shape: str, shards: Path) -> None:
    name = shape.format(shards)
    assert is_shards(name)
    data = load_data(name)
    assert data.name == "shards"
    assert (len(data.train), len(data.val)) == (14, 5)
    assert data.train.image(13).size == (9, 12)


def test_a_pattern_chooses_training_shards(shards: Path) -> None:
    for name in (f"{shards}/train-{{000001..000002}}.tar", f"pipe:cat {shards}/train-{{000001..000002}}.tar"):
        data = load(name)
        assert [data.train.name(i)[:12] for i in range(len(data.train))] == ["train-000001"] * 4 + ["train-000002"] * 4
        assert len(data.val) == 5
    assert len(load(shards / "train-000003.tar").train) == 2
    with pytest.raises(ValueError, match=r"shards.json: does not list train-000004.tar"):
        load(f"{shards}/train-{{000002..000004}}.tar")


def test_validation_images_are_split_off_where_there_are_none(shards: Path) -> None:
    index = json.loads((shards / "shards.json").read_text())
    index["shards"] = [shard for shard in index["shards"] if shard["split"] == "train"]
    (shards / "shards.json").write_text(json.dumps(index))
    whole = load(f"{shards}/train-{{000000..000003}}.tar")
    names = [images.name(i) for images in (whole.train, whole.val) for i in range(len(images))]
    assert len(set(names)) == len(names) == 14
    assert whole.val_source.startswith("split: 25% of train")
    assert whole.test is None


def corrupt_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.find(b"000000006.")] = 255
    path.write_bytes(content)


def flip_a_pixel(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.find(b"IHDR") + 40] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3000])


def drop(pattern: str) -> Callable[[Path], None]:
    def change(content: dict[str, bytes]) -> None:
        for name in [name for name in content if re.fullmatch(pattern, name)]:
            del content[name]

    return lambda path: rewrite(path, change)


def relabel(label: bytes) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda content: content.update({"000000005.cls": label}))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "header": (corrupt_header, r"train-000001.tar: damaged tar header at byte [\d,]+; copy it again"),
    "bits": (flip_a_pixel, r"train-000001.tar: not the file that shards.json describes; copy both again"),
    "shorter": (truncate, r"train-000001.tar: [\d,]+ bytes, where its list says [\d,]+"),
    "no image": (drop(r"000000005\.(png|jpeg)"), r"train-000001.tar/000000005: 0 images, where one is needed"),
    "no sample": (drop(r"000000005\..*"), r"train-000001.tar/000000005: missing"),
    "no label": (drop(r"000000005\.cls"), r"train-000001.tar/000000005.cls: label '' is not one of the 3 classes"),
    "unknown label": (relabel(b"3"), r"train-000001.tar/000000005.cls: label '3' is not one of the 3 classes"),
    "a word": (relabel(b"cat"), r"train-000001.tar/000000005.cls: label 'cat' is not one of the 3 classes"),
    "gone": (Path.unlink, r"train-000001.tar"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_before_its_images_are_used(damage: str, shards: Path) -> None:
    spoil, message = DAMAGES[damage]
    spoil(shards / "train-000001.tar")
    images = load(shards).train
    assert isinstance(images, ShardImages)
    with pytest.raises((ShardError, FileNotFoundError), match=message):
        images.read_shard(1)
    images.read_shard(0)


def test_an_image_that_was_unreadable_all_along_is_skipped_by_name(data: ImageData, tmp_path: Path) -> None:
    assert isinstance(data.test, FileImages)
    (data.test.root / data.test.files[1]).write_bytes(b"\x89PNG nothing")
    write_shards(data, tmp_path / "shards")
    images = load(tmp_path / "shards").test
    assert images is not None
    with pytest.raises(ImageError, match=r"^test-000000.tar/000000001: not an image"):
        images.image(1)
    (batch,) = eval_loader(images, EvalTransform(Preprocessing(image_size=8)), batch_size=4)
    assert batch.labels.tolist() == [0, 2]
    assert len(batch.skipped) == 1
    assert batch.skipped[0].startswith("test-000000.tar/000000001: not an image")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(format="sequencer2d-shards/2"), "format 'sequencer2d-shards/2'"),
        (lambda index: index.pop("class_names"), "no 'class_names'"),
        (lambda index: index["shards"][0].pop("sha256"), "no 'sha256'"),
        (lambda index: index["shards"][0].update(file="../../etc/passwd"), "plain name of a tar file"),
        (lambda index: index["shards"][0].update(file="x;touch y.tar"), "plain name of a tar file"),
        (lambda index: index["shards"][0].update(split="extra"), "split='extra'"),
        (lambda index: index["shards"][0]["labels"].pop(), "must be 4 each"),
        (lambda index: index["shards"][0]["labels"].__setitem__(0, 3), "label 3 is not one of the 3 classes"),
        (lambda index: index["shards"][0]["offsets"].__setitem__(0, 10**9), "must lie within"),
        (lambda index: index.update(shards=7), "not iterable"),
    ],
)
def test_a_list_that_makes_no_sense_is_named(change: Callable[[Any], Any], message: str, shards: Path) -> None:
    index = json.loads((shards / "shards.json").read_text())
    change(index)
    (shards / "shards.json").write_text(json.dumps(index))
    with pytest.raises(ShardError, match=rf"shards.json: not a list of shards .*{re.escape(message)}"):
        load(shards)


def test_a_list_that_is_no_json_or_missing_is_named(shards: Path, tmp_path: Path) -> None:
    (shards / "shards.json").write_text("{")
    with pytest.raises(ShardError, match=r"shards.json: not a list"):
        load(shards)
    with pytest.raises(FileNotFoundError, match=r"shards.json: missing; prepare shards"):
        load(tmp_path / "nothing" / "shards.json")
    with pytest.raises(ValueError, match=r"write {} where the name of a file belongs"):
        load("pipe:cat shards.tar")
    with pytest.raises(ValueError, match=r"root='x' is for the data sets of the catalogue"):
        load_data("http://host/shards", root="x")


def test_the_verb_writes_what_train_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "digits"
    arguments = ["prepare", "shards", "--source", "digits", "--root", str(root), "--images-per-shard", "500"]
    assert main(arguments) == DONE
    out = capsys.readouterr().out
    assert re.search(r"train +1,295 images in 3 shards", out)
    assert str(root / "shards.json") in out
    data, original = load_data(str(root)), load_data("digits")
    assert data.class_names == original.class_names
    np.testing.assert_array_equal(data.val.labels, original.val.labels)
    assert main(arguments) == DONE
    assert "already and is unchanged" in capsys.readouterr().out
    assert main([*arguments, "--val-fraction", "0.5"]) == WRONG_INPUT
    assert "holds the shards of another data set or split" in capsys.readouterr().err
