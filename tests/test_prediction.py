"""Prediction: an answer per file, in order, whatever the file."""

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from sequencer2d import prediction
from sequencer2d.evaluation import evaluate
from sequencer2d.model import Sequencer2D, SequencerConfig
from sequencer2d.native import available, weights
from sequencer2d.prediction import Prediction, model_and_paths, predict, write_predictions
from sequencer2d.preprocessing import Preprocessing
from sequencer2d.weights import ModelCard, load_model, save_model


@pytest.fixture
def model_file(tmp_path: Path, tiny_config: SequencerConfig) -> Path:
    torch.manual_seed(0)
    model = Sequencer2D(tiny_config)
    torch.nn.init.normal_(model.get_parameter("head.fc.weight"))
    card = ModelCard(
        architecture="tiny",
        config=tiny_config,
        class_names=("ant", "bee", "cat", "dog", "élan"),
        preprocessing=Preprocessing(image_size=16),
    )
    save_model(model, card, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    (root / "deep").mkdir(parents=True)
    for number in range(5):
        Image.new("RGB", (20 + number, 30), (50 * number, 90, 200)).save(root / f"{number}.png")
    Image.new("L", (9, 9), 77).save(root / "deep" / "grey.JPG")
    (root / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    (root / "notes.txt").write_text("not an image")
    return root


def test_every_image_below_a_folder_is_answered_in_order_bad_ones_with_an_error(model_file: Path, folder: Path) -> None:
    answers = list(predict(model_file, [folder], batch_size=2))
    assert [Path(answer.path).name for answer in answers] == [
        "0.png", "1.png", "2.png", "3.png", "4.png", "bad.jpg", "grey.JPG",
    ]  # fmt: skip
    assert [answer.error is not None for answer in answers] == [False] * 5 + [True, False]
    for answer in answers:
        if answer.error is None:
            probabilities = [probability for _, probability in answer.classes]
            assert probabilities == sorted(probabilities, reverse=True)
            assert sum(probabilities) == pytest.approx(1, abs=1e-5)  # five of five classes


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
def test_folders_are_read_as_training_reads_them(model_file: Path, folder: Path, tmp_path: Path) -> None:
    """Links to folders are followed, what is hidden is left out."""
    links = tmp_path / "links"
    links.mkdir()
    (links / "pictures").symlink_to(folder)
    (links / "._0.png").write_bytes(b"x")
    answers = [Path(answer.path) for answer in predict(model_file, [links])]
    assert [path.relative_to(links / "pictures") for path in answers] == [
        Path(answer.path).relative_to(folder) for answer in predict(model_file, [folder])
    ]
    assert model_and_paths([str(links)]) == (None, [str(links)])


def test_one_at_a_time_gives_the_same(model_file: Path, folder: Path) -> None:
    files = sorted(folder.glob("?.png"))
    together = list(predict(model_file, files, batch_size=64))
    alone = [answer for file in files for answer in predict(model_file, [file], top_k=99)]
    for one, other in zip(together, alone, strict=True):
        assert [name for name, _ in one.classes] == [name for name, _ in other.classes]
        assert [p for _, p in one.classes] == pytest.approx([p for _, p in other.classes], abs=1e-6)


def test_missing_files_and_folders_without_images_are_answers_too(model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "void").mkdir()
    missing, void = predict(model_file, [tmp_path / "none.png", tmp_path / "void"])
    assert missing.error is not None
    assert "none.png" in missing.error
    assert void.error is not None
    assert not missing.classes


def test_pictures_of_formats_that_are_not_read_are_told_of(
    model_file: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = len(list(predict(model_file, [folder])))
    (folder / "IMG_1.HEIC").touch()
    assert len(list(predict(model_file, [folder]))) == known
    assert f"{folder}: left out, since their format is not read: 1 .heic;" in caplog.text


def test_standard_input_is_one_image(model_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (folder / "3.png").read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    (answer,) = predict(model_file, ["-"])
    (expected,) = predict(model_file, [folder / "3.png"])
    assert answer.classes == expected.classes
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    (answer,) = predict(model_file, ["-"])
    assert answer.error is not None


def test_top_k_is_as_asked_and_at_least_one(model_file: Path, folder: Path) -> None:
    (answer,) = predict(model_file, [folder / "0.png"], top_k=2)
    assert len(answer.classes) == 2
    with pytest.raises(ValueError, match="top_k=0"):
        next(predict(model_file, [folder / "0.png"], top_k=0))


def test_weights_without_a_classifier_answer_nothing(
    tmp_path: Path, tiny_config: SequencerConfig, folder: Path
) -> None:
    torch.save(Sequencer2D(replace(tiny_config, num_classes=0)).state_dict(), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"bare\.pth has weights without a classifier"):
        next(predict(tmp_path / "bare.pth", [folder]))


def test_flips_make_left_and_right_the_same(model_file: Path, tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "photo.png")
    photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored.png")
    files = [tmp_path / "photo.png", tmp_path / "mirrored.png"]
    one, mirrored = (dict(answer.classes) for answer in predict(model_file, files))
    assert one != pytest.approx(mirrored, abs=1e-2)
    one, mirrored = (dict(answer.classes) for answer in predict(model_file, files, flips=True))
    assert one == pytest.approx(mirrored, abs=1e-5)


def test_files_of_answers_hold_the_same_as_the_answers(model_file: Path, folder: Path, tmp_path: Path) -> None:
    answers = list(predict(model_file, [folder]))
    write_predictions(answers, tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["path"], line["error"]) for line in lines] == [(answer.path, answer.error) for answer in answers]
    assert [tuple(row.values()) for row in lines[0]["classes"]] == list(answers[0].classes)
    write_predictions(answers, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 6 * 5 + 1
    assert [row["path"] for row in table if row["error"]] == [str(folder / "bad.jpg")]
    with pytest.raises(ValueError, match=r"must end in \.jsonl, \.csv or \.parquet"):
        write_predictions(answers, tmp_path / "out.xlsx")


@pytest.fixture
def parquet() -> Any:
    return pytest.importorskip("pyarrow.parquet", reason="the extra parquet is not installed")


def test_a_parquet_file_has_the_columns_of_the_csv_and_grows_by_groups(
    parquet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "ROW_GROUP", 4)
    answers = [
        Prediction(path="a.png", classes=(("élan", 0.75), ("bee", 0.25))),
        Prediction(path="bad.jpg", error="not an image"),
        Prediction(path="c.png", classes=(("cat", 0.5), ("dog", 0.125))),
    ]
    write_predictions(answers, tmp_path / "out.parquet")
    assert parquet.ParquetFile(tmp_path / "out.parquet").num_row_groups == 2
    table = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert table[0] == {"path": "a.png", "rank": 1, "class": "élan", "probability": 0.75, "error": None}
    assert table[2] == {"path": "bad.jpg", "rank": None, "class": None, "probability": None, "error": "not an image"}
    write_predictions(answers, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(table[0])
    for row, same in zip(rows, table, strict=True):
        written = same | {"probability": same["probability"] and f"{same['probability']:.6f}"}
        assert row == {name: "" if value is None else str(value) for name, value in written.items()}
    write_predictions([], tmp_path / "none.parquet")
    assert parquet.read_table(tmp_path / "none.parquet").num_rows == 0


def test_a_name_that_is_no_text_is_written_to_parquet(parquet: Any, tmp_path: Path) -> None:
    answer = Prediction(path="b\udcff.png", error="b\udcff.png: not an image")
    write_predictions([answer], tmp_path / "out.parquet")
    (row,) = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert row["path"] == r"b\udcff.png"


def test_an_interrupted_parquet_file_is_not_there(
    parquet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "ROW_GROUP", 1)

    def interrupted() -> Iterator[Prediction]:
        yield Prediction(path="a.png", classes=(("bee", 0.25),))
        raise KeyboardInterrupt

    (tmp_path / "out.parquet").write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt):
        write_predictions(interrupted(), tmp_path / "out.parquet")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("out.parquet", b"before")]


def test_without_pyarrow_the_extra_is_named_before_anything_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never() -> Iterator[Prediction]:
        pytest.fail("predicted")
        yield

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'sequencer2d\[parquet\]'"):
        write_predictions(never(), tmp_path / "out.parquet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not available(), reason="the package was installed without kernels")
def test_weights_are_packed_once_for_all_images(
    model_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = []
    original = weights.pack
    monkeypatch.setattr(weights, "pack", lambda *arguments: packed.append(1) or original(*arguments))
    assert len(list(predict(model_file, [folder], batch_size=1))) == 7
    assert len(packed) == 4  # blocks


def test_a_model_of_grey_images_says_that_files_are_rgb(tmp_path: Path, folder: Path, model_file: Path) -> None:
    model, card = load_model(model_file)
    assert isinstance(model.config, SequencerConfig)
    grey = Sequencer2D(replace(model.config, in_chans=1))
    file = tmp_path / "grey.safetensors"
    save_model(grey, replace(card, config=grey.config), file)
    for use in (lambda: list(predict(file, [folder])), lambda: evaluate(file)):
        with pytest.raises(ValueError, match=r"grey\.safetensors takes images of 1 channels, and files are read as"):
            use()
