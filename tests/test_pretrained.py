"""The weights in the package: small, true to their card, and used by name without a network."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from timm.data import resolve_data_config
from torch import nn

from sequencer2d import zoo
from sequencer2d.cli import DONE, WRONG_INPUT, main
from sequencer2d.data.catalog import load_data
from sequencer2d.evaluation import evaluate
from sequencer2d.model import Sequencer2D
from sequencer2d.prediction import model_and_paths
from sequencer2d.weights import load_model, save_model
from sequencer2d.zoo import PACKAGED, VARIANTS, create_model, find_model_file, packaged_file

NAMES = sorted(path.stem for path in PACKAGED.glob("*.safetensors"))
DIGITS = "sequencer2d_conv_p_patch2_16"
MAX_BYTES = 8_000_000


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def digits(tmp_path: Path) -> list[Path]:
    """Test images as files, of every class the first five: `3-01.png` shows a three."""
    images = load_data("digits").test
    assert images is not None
    files = []
    for label in range(10):
        for number, index in enumerate((images.labels == label).nonzero()[0][:5]):
            files.append(tmp_path / f"{label}-{number:02d}.png")
            images.image(int(index)).resize((40, 40), Image.Resampling.BICUBIC).save(files[-1])
    return files


def test_digits_are_in_the_package() -> None:
    assert DIGITS in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_file_is_small_rounded_and_that_variant(name: str) -> None:
    path = packaged_file(name)
    assert path is not None
    assert path.stat().st_size <= MAX_BYTES
    with safe_open(path, framework="pt") as file:
        types = {file.get_tensor(tensor).dtype for tensor in file.keys()}  # noqa: SIM118 - not a dict
    assert types <= {torch.bfloat16, torch.int64}
    model, card = load_model(name)
    created = create_model(name, pretrained=True).eval()
    assert {parameter.dtype for parameter in created.parameters()} == {torch.float32}
    size = card.preprocessing.image_size
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        assert torch.equal(created(images), model(images))
    assert card.architecture == name
    described = created.default_cfg
    assert described["num_classes"] == created.num_classes == len(card.class_names)
    assert tuple(described["label_names"]) == card.class_names
    assert (described["input_size"], described["crop_pct"]) == ((3, size, size), card.preprocessing.crop_pct)
    assert tuple(described["mean"]) == card.preprocessing.mean
    assert "data_root" not in card.training
    assert not any(str(value).startswith("/") for value in card.training.values())


def test_other_classes_begin_anew_with_a_word_and_other_channels_are_adapted_to(
    caplog: pytest.LogCaptureFixture,
) -> None:
    own, _ = load_model(DIGITS)
    with caplog.at_level("INFO", logger="sequencer2d"):
        model = create_model(DIGITS, pretrained=True, num_classes=3, in_chans=1).eval()
    assert "classifier of 10 classes begun anew; first convolution adapted from 3 to 1 channels" in caplog.text
    assert model.get_parameter("head.fc.weight").shape == (3, 96)
    name = "stages.1.blocks.0.rnn_tokens.fc.weight"
    assert torch.equal(model.get_parameter(name), own.get_parameter(name))
    other = create_model(DIGITS, pretrained=DIGITS, num_classes=10)
    assert torch.equal(other.get_parameter("head.fc.weight"), own.get_parameter("head.fc.weight"))
    assert create_model(DIGITS).num_classes == 1000


def test_a_name_without_weights_says_so() -> None:
    with pytest.raises(FileNotFoundError, match=f"no weights of v_sequencer_s_pe .*{DIGITS}"):
        find_model_file("v_sequencer_s_pe")


def test_evaluation_by_name_gives_what_the_card_says() -> None:
    _, card = load_model(DIGITS)
    found = evaluate(DIGITS, split="val")
    assert found.num_images == card.training["num_val"]
    assert found.top1 == pytest.approx(card.training["rounded_val_top1"], abs=0.5 / found.num_images)


def right(out: str) -> int:
    """Of lines such as `/tmp/3-01.png: 3 99.0%`, how many name the class of the file."""
    lines = [line.rpartition("/")[2] for line in out.splitlines()]
    return sum(line[0] == line.partition(": ")[2][0] for line in lines)


def test_predict_by_name_knows_digits(digits: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", DIGITS, *map(str, digits), "--top-k", "1"]) == DONE
    captured = capsys.readouterr()
    assert right(captured.out) >= 47  # of 50
    assert "no model is named" not in captured.err


def test_predict_without_a_model_asks_the_default_and_says_which(
    digits: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "DEFAULT_MODEL", DIGITS)
    for images in ([digits[0]], digits[10:12], [digits[0].parent]):
        assert main(["predict", *map(str, images), "--top-k", "1"]) == DONE
        captured = capsys.readouterr()
        count = 50 if images[0].is_dir() else len(images)
        assert len(captured.out.splitlines()) == count
        assert right(captured.out) >= 0.9 * count
        said = f"no model is named: {DIGITS} of the package answers, with 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n"
        assert captured.err == said


def test_options_of_predict_stand_anywhere(digits: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    one, two = map(str, digits[:2])
    outputs = set()
    for words in (
        f"{DIGITS} {one} {two} --top-k 2 --flips",
        f"--top-k 2 {DIGITS} --flips {one} {two}",
        f"{DIGITS} --top-k=2 {one} --flips {two}",
        f"{DIGITS} --flips --top-k 2 -- {one} {two}",
    ):
        assert main(["predict", *words.split()]) == DONE
        outputs.add(capsys.readouterr().out)
    assert len(outputs) == 1
    assert outputs.pop().count("%") == 4


def test_a_model_is_told_from_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("run/model.safetensors", "run/samples/00.png", "photos/deep/1.JPG", "started/config.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    models = ["run", "run/model.safetensors", "started", "weights.pth", "nowhere"]
    for model in [*(str(tmp_path / name) for name in models), "hf-hub:user/name.png", *VARIANTS]:
        assert model_and_paths([model, "a.jpg", "b"]) == (model, ["a.jpg", "b"])
        assert main(["predict", model]) == WRONG_INPUT
        assert f"{model} is no image; name one, behind the model" in capsys.readouterr().err
    images = ["photos", "photos/deep/1.JPG", "nothing.png"]
    for image in [*(str(tmp_path / name) for name in images), "-"]:
        assert model_and_paths([image]) == (None, [image])
        assert model_and_paths([image, "weights.pth"]) == (None, [image, "weights.pth"])


def test_models_says_which_weights_are_in_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "sequencer2d"]) == DONE
    shown = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert {name for name, weights in shown.items() if weights == "package"} == set(NAMES)
    assert shown["sequencer2d_s"] == "hub"


def test_weights_of_a_file_bring_their_classes_and_preprocessing(tmp_path: Path) -> None:
    """As the package's own do; unless another number is asked for."""
    own, card = load_model(DIGITS)
    assert isinstance(own, Sequencer2D)
    names = tuple(f"class {number}" for number in range(7))
    own.reset_classifier(7)
    nn.init.normal_(own.get_parameter("head.fc.weight"))
    described = replace(
        card,
        config=own.config,
        class_names=names,
        preprocessing=replace(card.preprocessing, image_size=24, mean=(0.1, 0.2, 0.3)),
    )
    save_model(own, described, tmp_path / "model.safetensors")
    torch.save(own.state_dict(), tmp_path / "weights.pth")
    for source in (tmp_path, tmp_path / "weights.pth"):
        model = create_model(DIGITS, pretrained=source)
        assert torch.equal(model.get_parameter("head.fc.weight"), own.get_parameter("head.fc.weight"))
    model = create_model(DIGITS, pretrained=tmp_path)
    assert model.config == own.config
    assert tuple(model.default_cfg["label_names"]) == names
    assert resolve_data_config(model=model)["input_size"] == (3, 24, 24)
    assert tuple(resolve_data_config(model=model)["mean"]) == (0.1, 0.2, 0.3)
    assert create_model(DIGITS, pretrained=tmp_path, num_classes=3).num_classes == 3
