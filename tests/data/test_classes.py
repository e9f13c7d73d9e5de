"""Class names come from `classes.json` where it names every class folder, and are told apart."""

import json
import logging
from pathlib import Path

import pytest

from sequencer2d.data.catalog import load_data
from sequencer2d.data.classes import distinct_names, read_class_names, write_class_names


def make_tree(root: Path, *folders: str) -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for i in range(2):
            (root / folder / f"{i}.png").touch()
    return root


def test_names_are_written_and_read(tmp_path: Path) -> None:
    names = {"n01": "Löwe", "n02": "boa constrictor"}
    write_class_names(tmp_path, names)
    assert json.loads((tmp_path / "classes.json").read_text(encoding="utf-8")) == names
    assert read_class_names(tmp_path, ["n01", "n02"]) == ("Löwe", "boa constrictor")
    assert read_class_names(tmp_path, ["n02"]) == ("boa constrictor",)


@pytest.mark.parametrize("layout", [["n01", "n02"], ["train/n01", "train/n02", "val/n02"]])
def test_load_folder_uses_them(layout: list[str], tmp_path: Path) -> None:
    make_tree(tmp_path, *layout)
    write_class_names(tmp_path, {"n02": "crane", "n01": "zebra"})
    data = load_data(str(tmp_path))
    assert data.class_names == ("zebra", "crane")  # in the order of the folders
    assert data.train.name(0).split("/")[-2] == "n01"


def test_names_that_repeat_are_told_apart(tmp_path: Path) -> None:
    write_class_names(tmp_path, {"n01": "crane", "n02": "crane", "n03": "ox"})
    assert read_class_names(tmp_path, ["n01", "n02", "n03"]) == ("crane (n01)", "crane (n02)", "ox")
    assert distinct_names({"a": ["maillot"], "b": ["maillot", "tank suit"]}) == {
        "a": "maillot (a)",
        "b": "maillot (tank suit)",
    }


@pytest.mark.parametrize("text", ['{"n01": "one"}', '{"n01": "one", "n02": 2}', "[1, 2]", "no json", '{"n01": ""}'])
def test_incomplete_or_foreign_file(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "classes.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert read_class_names(tmp_path, ["n01", "n02"]) == ("n01", "n02")
    assert "classes.json does not name every class folder" in caplog.text


def test_without_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_class_names(tmp_path, ["b", "a"]) == ("b", "a")
    assert caplog.text == ""
