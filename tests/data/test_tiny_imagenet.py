"""Tiny-ImageNet's official layout is read as it lies, and what is missing in it is named."""

import re
from pathlib import Path

import pytest

from sequencer2d.data.catalog import load_data, split_names

WORDS = {
    "n01443537": "goldfish, Carassius auratus",
    "n01742172": "boa constrictor, Constrictor constrictor",
    "n02012849": "crane",
    "n03126707": "crane",
    "n03710637": "maillot",
    "n03710721": "maillot, tank suit",
}


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """Three training images a class, two validation images; `wnids.txt` is in no order, as in the official one."""
    root = tmp_path / "tiny-imagenet-200"
    for wnid in WORDS:
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").touch()
        for i in range(3):
            (root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG").touch()
    for split in ("val", "test"):
        (root / split / "images").mkdir(parents=True)
        for i in range(12):
            (root / split / "images" / f"{split}_{i}.JPEG").touch()
    labelled = enumerate(2 * list(WORDS))
    boxes = [f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n" for i, wnid in labelled]
    (root / "val/val_annotations.txt").write_text("".join(boxes))
    (root / "wnids.txt").write_text("\n".join(reversed(WORDS)))
    lines = [f"{wnid}\t{words}\n" for wnid, words in {"n00001740": "entity", **WORDS}.items()]
    (root / "words.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("how", ["root", "parent", "path"])
def test_official_layout(how: str, official: Path) -> None:
    before = sorted(official.rglob("*"))
    if how == "path":
        data = load_data(str(official))
    else:
        data = load_data("tiny-imagenet", root=official if how == "root" else official.parent)
    assert (data.name, data.val_source, data.test) == ("tiny-imagenet", "given", None)
    assert (len(data.train), len(data.val)) == (18, 12)
    names = split_names(data)
    assert names["val"][7] == "val/images/val_7.JPEG"
    assert data.class_names[data.val.labels[7]] == "boa constrictor"
    assert names["train"][3] == "train/n01742172/images/n01742172_0.JPEG"
    assert data.class_names[data.train.labels[3]] == "boa constrictor"
    assert sorted(official.rglob("*")) == before


def test_class_names_are_whole_and_unique(official: Path) -> None:
    assert load_data(str(official)).class_names == (
        "goldfish",
        "boa constrictor",
        "crane (n02012849)",
        "crane (n03126707)",
        "maillot (n03710637)",
        "maillot (tank suit)",
    )


def test_class_names_that_share_two_synonyms(official: Path) -> None:
    words = (official / "words.txt").read_text().replace("\tcrane\n", "\tcrane, bird\n")
    (official / "words.txt").write_text(words)
    assert load_data(str(official)).class_names[2:4] == ("crane (n02012849)", "crane (n03126707)")


@pytest.mark.parametrize(
    "piece",
    [
        "wnids.txt",
        "words.txt",
        "val/val_annotations.txt",
        "val/images",
        "train/n02012849",
        "val/images/val_3.JPEG",
    ],
)
def test_missing_piece_is_named(piece: str, official: Path) -> None:
    (official / piece).rename(official.parent / "gone")
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(str(official / piece))}.*: missing; unpack"):
        load_data("tiny-imagenet", root=official)


def test_class_without_images_is_named(official: Path) -> None:
    for file in (official / "train/n02012849/images").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="train/n02012849/images: no images"):
        load_data(str(official))


@pytest.mark.parametrize("line", ["val_0.JPEG\tn99999999\t0\t0\t1\t1", "val_0.JPEG", ""])
def test_annotation_that_makes_no_sense_is_named(line: str, official: Path) -> None:
    annotations = official / "val/val_annotations.txt"
    lines = annotations.read_text().splitlines()
    annotations.write_text("\n".join([*lines[:4], line, *lines[4:]]))
    with pytest.raises(ValueError, match=r"val_annotations\.txt:5: no class of wnids\.txt in '"):
        load_data(str(official))


def test_word_that_is_missing_is_named(official: Path) -> None:
    (official / "words.txt").write_text("n01443537\tgoldfish\n")
    with pytest.raises(ValueError, match=r"words\.txt: no line for n01742172"):
        load_data(str(official))


def test_empty_annotations(official: Path) -> None:
    (official / "val/val_annotations.txt").write_text("")
    with pytest.raises(ValueError, match=r"val_annotations\.txt: the file is empty"):
        load_data(str(official))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; unpack tiny-imagenet-200\.zip"):
        load_data("tiny-imagenet", root=tmp_path / "nowhere")
