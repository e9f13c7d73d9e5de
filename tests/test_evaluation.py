"""Evaluation: the numbers against counting by hand, and the split against that of the training."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from sequencer2d import evaluation
from sequencer2d.data.catalog import load_data
from sequencer2d.data.sets import FileImages, ImageData
from sequencer2d.data.shards import write_shards
from sequencer2d.evaluation import Evaluation, calibration_images, evaluate, evaluate_images
from sequencer2d.model import Sequencer2D, SequencerConfig
from sequencer2d.native import available
from sequencer2d.preprocessing import Preprocessing
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.run import train
from sequencer2d.weights import ModelCard, save_model


class Brightness(Sequencer2D):
    """Answers 0 … 5 by the brightness of the image, with confidence 0.9."""

    def __init__(self) -> None:
        super().__init__(
            SequencerConfig(
                layers=(1,), patch_sizes=(4,), embed_dims=(4,), hidden_sizes=(1,), mlp_ratios=(1.0,), num_classes=6
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        level = ((x.mean((1, 2, 3)) * 0.5 + 0.5) * 5).round().long()
        return (torch.nn.functional.one_hot(level, 6) * (0.9 - 0.02) + 0.02).log()


def tiny_model(num_classes: int) -> Sequencer2D:
    """One block, with a head that says something."""
    torch.manual_seed(0)
    model = Sequencer2D(
        SequencerConfig(
            layers=(1,),
            patch_sizes=(2,),
            embed_dims=(8,),
            hidden_sizes=(2,),
            mlp_ratios=(2.0,),
            num_classes=num_classes,
        )
    )
    torch.nn.init.normal_(model.get_parameter("head.fc.weight"))
    return model


def save_tiny(folder: Path, class_names: tuple[str, ...], crop_pct: float = 1.0) -> tuple[Path, ModelCard]:
    """Its model file, for images of 8 pixels."""
    model = tiny_model(len(class_names))
    preprocessing = Preprocessing(image_size=8, crop_pct=crop_pct)
    card = ModelCard(architecture="x", config=model.config, class_names=class_names, preprocessing=preprocessing)
    save_model(model, card, folder / "m.safetensors")
    return folder / "m.safetensors", card


def insects(root: Path, count: int = 3) -> Path:
    """A tree that is not divided; images of a class differ."""
    for label, name in enumerate(("ant", "bee")):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (90 * label, 10 * number, 0)).save(root / name / f"{number}.png")
    return root


@pytest.fixture
def grey_steps(tmp_path: Path) -> FileImages:
    """Image i shows level i // 2; the labels are wrong for images 0 and 5; image 11 is unreadable."""
    files, labels = [], []
    for number in range(12):
        level = number // 2
        Image.new("RGB", (8, 8), (level * 51,) * 3).save(tmp_path / f"{number}.png")
        files.append(f"{number}.png")
        labels.append({0: 3, 5: 0}.get(number, level))
    (tmp_path / "11.png").write_bytes(b"")
    return FileImages(tmp_path, files, np.array(labels))


def test_every_number_is_what_counting_by_hand_gives(grey_steps: FileImages) -> None:
    preprocessing = Preprocessing(image_size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    names = tuple("abcdef")
    result, answers = evaluate_images(
        Brightness(), preprocessing, grey_steps, data="x", split="val", class_names=names, batch_size=5
    )
    assert result.num_images == 11
    assert [message.rsplit("/")[-1] for message in result.skipped] == ["11.png: the file is empty"]
    assert result.top1 == 9 / 11
    assert result.top5 is not None
    assert result.loss == pytest.approx((-9 * np.log(0.9) - 2 * np.log(0.02)) / 11, abs=1e-6)
    assert result.ece == pytest.approx(0.9 - 9 / 11, abs=1e-6)
    assert result.confusion[3] == [1, 0, 0, 2, 0, 0]  # rows are the truth
    assert result.confusion[0] == [1, 0, 1, 0, 0, 0]
    assert result.per_class[0] == {"name": "a", "num_images": 2, "recall": 0.5, "precision": 0.5}
    assert result.per_class[2] == {"name": "c", "num_images": 1, "recall": 1.0, "precision": 0.5}
    assert answers.indices.tolist() == list(range(11))
    assert answers.probabilities.argmax(1).tolist() == [number // 2 for number in range(11)]
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_batch_size_changes_nothing(grey_steps: FileImages) -> None:
    model = tiny_model(6)
    losses = [
        evaluate_images(
            model, Preprocessing(image_size=8), grey_steps, data="x", split="val", class_names=tuple("abcdef"),
            batch_size=batch_size,
        )[0].loss
        for batch_size in (1, 4, 100)
    ]  # fmt: skip
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def test_the_val_split_is_that_of_the_training_and_test_is_the_default(tmp_path: Path) -> None:
    args = {"layers": [1, 1], "embed_dims": [8, 8], "hidden_sizes": [2, 2], "stem_widths": [8]}
    config = TrainConfig(
        epochs=1, seed=7, val_fraction=0.2, precision="fp32", run_dir=str(tmp_path / "run"), model_args=args
    )
    result = train(config)
    again = evaluate(result.run_dir)
    assert again.split == "test"
    assert result.evaluation is not None
    assert again == result.evaluation
    val = evaluate(result.run_dir / "model.safetensors", split="val")
    split = json.loads((result.run_dir / "split.json").read_text())
    assert val.num_images == len(split["val"])
    assert val.top1 == pytest.approx(result.val_top1)


@pytest.mark.skipif(not available(), reason="the package was installed without kernels")
def test_int8_measures_its_ranges_on_other_images_than_it_is_evaluated_on(
    grey_steps: FileImages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file, card = save_tiny(tmp_path, tuple("abcdef"))
    parts = {name: grey_steps.subset(range(3 * i, 3 * i + 3)) for i, name in enumerate(("train", "val", "test"))}
    images = ImageData(name="x", class_names=card.class_names, val_source="given", **parts)  # type: ignore[arg-type]
    monkeypatch.setattr(evaluation, "load_data", lambda *_, **__: images)
    measured = []
    monkeypatch.setattr(
        evaluation, "calibration_images", lambda images, *args: measured.append(images) or torch.randn(3, 3, 8, 8)
    )
    splits: list[tuple[Literal["train", "val", "test"], str]] = [("test", "val"), ("val", "train"), ("train", "val")]
    for split, others in splits:
        result = evaluate(file, data="x", split=split, precision="int8")
        assert result.precision == "int8"
        assert measured.pop() is parts[others]
        fp32 = evaluate(file, data="x", split=split)
        assert result.loss != fp32.loss
        assert result.loss == pytest.approx(fp32.loss, rel=0.05)
        bf16 = evaluate(file, data="x", split=split, precision="bf16")
        assert bf16.loss != fp32.loss
        assert bf16.loss == pytest.approx(fp32.loss, rel=0.05)


@pytest.mark.parametrize(
    "precision",
    [
        "fp32",
        "bf16",
        pytest.param("int8", marks=pytest.mark.skipif(not available(), reason="installed without kernels")),
    ],
)
def test_size_and_flips_are_as_asked_in_every_precision(
    precision: Literal["fp32", "bf16", "int8"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = save_tiny(tmp_path, ("ant", "bee"), crop_pct=0.5)
    pixels = np.random.RandomState(0).randint(0, 256, (12, 30, 30, 3), dtype=np.uint8)
    for mirrored in (False, True):
        for number, image in enumerate(pixels[:, :, ::-1] if mirrored else pixels):
            folder = tmp_path / str(mirrored) / ("train", "val")[number % 2] / ("ant", "bee")[number // 2 % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}.png")
    seen: list[torch.Size] = []
    forward = Sequencer2D.forward
    monkeypatch.setattr(Sequencer2D, "forward", lambda self, x: seen.append(x.shape[1:]) or forward(self, x))

    def result(mirrored: bool = False, **options: Any) -> Evaluation:
        seen.clear()
        return evaluate(file, data=str(tmp_path / str(mirrored)), precision=precision, **options)

    plain, larger, flipped = result(), result(image_size=14), result(flips=True)
    assert (plain.image_size, larger.image_size, flipped.image_size) == (8, 14, 8)
    assert (plain.flips, larger.flips, flipped.flips) == (False, False, True)
    assert len({plain.loss, larger.loss, flipped.loss}) == 3
    assert abs(result(mirrored=True).loss - plain.loss) > 1e-3
    if precision != "int8":  # whose ranges come from other images
        assert result(mirrored=True, flips=True).loss == pytest.approx(flipped.loss, rel=1e-3)
    assert set(seen) == {(3, 8, 8)}
    result(image_size=14)
    assert set(seen) == {(3, 14, 14)}
    both = json.loads(json.dumps(result(flips=True, image_size=14).to_dict()))
    assert (both["flips"], both["image_size"]) == (True, 14)
    with pytest.raises(ValueError, match="image_size=0 must be at least 1"):
        result(image_size=0)


def test_images_for_calibration_are_from_all_over_and_readable(grey_steps: FileImages) -> None:
    preprocessing = Preprocessing(image_size=8, mean=(0.0, 0.0, 0.0), std=(0.2, 0.2, 0.2))
    few = calibration_images(grey_steps, preprocessing, count=4)  # 0, 4, 7 and 11, which is unreadable
    assert few.mean((1, 2, 3)).tolist() == pytest.approx([0.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="no readable image to measure the ranges of int8 on"):
        calibration_images(grey_steps.subset([11]), preprocessing)


def test_other_classes_are_an_error_that_names_them(tmp_path: Path) -> None:
    insects(tmp_path / "insects")
    model = Brightness()
    card = ModelCard(
        architecture="x",
        config=model.config,
        class_names=("ant", "cat", "dog", "eel", "fox", "gnu"),
        preprocessing=Preprocessing(image_size=8),
    )
    save_model(model, card, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"6 classes and insects has 2.*lack cat, dog, eel …; the model.*know bee"):
        evaluate(tmp_path / "m.safetensors", data=str(tmp_path / "insects"))
    with pytest.raises(ValueError, match="give --data"):
        evaluate(tmp_path / "m.safetensors")


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """Of the classes ant and bee."""
    return save_tiny(tmp_path, ("ant", "bee"))[0]


def test_wrong_options_are_named(model_file: Path, tmp_path: Path) -> None:
    data = str(insects(tmp_path / "insects"))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"num_workers": -1}, "num_workers=-1 at least 0"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            evaluate(model_file, data=data, **options)
    wrong: Any = "fp16"
    with pytest.raises(ValueError, match="precision='fp16' must be one of fp32, bf16, int8"):
        inspect.unwrap(evaluate)(model_file, data=data, precision=wrong)  # which types are not checked of


@pytest.mark.parametrize("count", [1, 12])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_of_other_data_that_are_not_divided_all_images_are_evaluated(
    count: int, precision: Literal["fp32", "int8"], model_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if precision == "int8" and not available():
        pytest.skip("the package was installed without kernels")
    data = str(insects(tmp_path / "insects", count))
    result = evaluate(model_file, data=data, precision=precision)
    assert (result.split, result.num_images) == ("all", 2 * count)
    assert not caplog.messages
    if count > 1:
        assert evaluate(model_file, data=data, split="val").num_images == 2
        assert "insects has no validation images: these 2 are split off its training images" in caplog.text


def test_the_training_s_own_images_are_known_by_their_folder_and_their_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a part of what was trained on would be evaluated as if it were new."""
    monkeypatch.chdir(tmp_path)
    insects(tmp_path / "insects", 10)
    args = {"layers": [1, 1], "embed_dims": [8, 8], "hidden_sizes": [2, 2], "stem_widths": [8]}
    run_dir = train(
        TrainConfig(
            data="./insects",
            epochs=1,
            batch_size=6,
            precision="fp32",
            run_dir="run",
            model="sequencer2d_conv_p_patch2_16",
            model_args=args,
        )
    ).run_dir
    by_name = evaluate(run_dir, data=str(tmp_path / "insects"))
    assert (by_name.split, by_name.num_images) == ("val", 2)
    shutil.copytree("insects", "copy")
    caplog.clear()
    assert evaluate(run_dir, data="copy").split == "all"
    assert "18 of these 20 images are called as images that the model was trained on" in caplog.text
    Image.new("RGB", (8, 8)).save(tmp_path / "insects" / "ant" / "new.png")
    for data in (None, "insects"):
        with pytest.raises(ValueError, match="1 are new and 0 are gone; restore them, or name other data"):
            evaluate(run_dir, data=data)


def test_classes_may_be_known_by_the_names_of_their_folders(model_file: Path, tmp_path: Path) -> None:
    """As published weights know ImageNet's, of which `prepare` has the names in words."""
    data = insects(tmp_path / "insects")
    (data / "classes.json").write_text('{"ant": "Formica rufa", "bee": "Apis mellifera"}')
    assert evaluate(model_file, data=str(data)).class_names == ("ant", "bee")
    write_shards(load_data(str(data), val_fraction=0.34), tmp_path / "shards", images_per_shard=4)
    assert load_data(str(tmp_path / "shards")).class_ids == ("ant", "bee")
    assert evaluate(model_file, data=str(tmp_path / "shards")).num_images == 2
    (data / "classes.json").write_text('{"ant": "bee", "bee": "ant"}')
    (data / "ant").rename(data / "cat")
    with pytest.raises(ValueError, match="the data lack ant"):
        evaluate(model_file, data=str(data))


def test_a_model_that_tells_what_but_not_where_its_data_are() -> None:
    with pytest.raises(ValueError, match=r"does not say where the cifar10 lies that it was trained on; give --data"):
        evaluate("sequencer2d_conv_l_patch4_32")
