"""A model file gives back what was saved, says what is wrong with any other file, and never runs code."""

import errno
import json
import os
import pickle
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sequencer2d import files
from sequencer2d.adapters import ModelFileError
from sequencer2d.model import Sequencer2D, SequencerConfig
from sequencer2d.peers import build_model
from sequencer2d.preprocessing import Preprocessing
from sequencer2d.weights import FORMAT, ModelCard, load_model, load_weights_into, save_model
from sequencer2d.zoo import create_model

CLASSES = ("猫", 'dog "Rex"', "naïve, ligne\n2", "", "🐟")


@pytest.fixture
def card(tiny_config: SequencerConfig) -> ModelCard:
    return ModelCard(
        architecture="sequencer2d_t_patch2_32",
        config=replace(tiny_config, patch_sizes=(4, 2), stem_widths=(4, 8), drop_path_rate=0.1),
        class_names=CLASSES,
        preprocessing=Preprocessing(image_size=16, crop_pct=0.9, mean=(0.1, 0.2, 0.3), interpolation="bilinear"),
        training={"data": "größe", "seed": 3, "val_top1": 0.75, "data_root": None},
    )


@pytest.fixture
def model(card: ModelCard) -> Sequencer2D:
    """With no two parameters alike, and running statistics that are not the initial ones."""
    torch.manual_seed(0)
    assert isinstance(card.config, SequencerConfig)
    model = Sequencer2D(card.config)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model(torch.randn(4, 3, 16, 16))
    return model


@pytest.fixture
def saved(model: Sequencer2D, card: ModelCard, tmp_path: Path) -> Path:
    save_model(model, card, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - not a dict


def rewrite(path: Path, **changes: str) -> None:
    """Changes the metadata of a model file."""
    tensors, metadata = read(path)
    save_file(tensors, path, {**metadata, **changes})


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("by", ["file", "folder", "text"])
def test_saved_and_loaded_is_the_same(by: str, saved: Path, model: Sequencer2D, card: ModelCard) -> None:
    loaded, loaded_card = load_model({"file": saved, "folder": saved.parent, "text": str(saved)}[by])
    assert_same_weights(loaded, model)
    assert loaded_card == card
    assert loaded.config == card.config
    assert not loaded.training
    image = torch.randn(1, 3, 16, 16)
    assert torch.equal(loaded(image), model.eval()(image))


def test_the_file_describes_all_that_prediction_needs(saved: Path, card: ModelCard) -> None:
    """Without our code: plain JSON in the header of a plain safetensors file."""
    _, metadata = read(saved)
    assert metadata["format"] == FORMAT
    assert metadata["architecture"] == card.architecture
    assert json.loads(metadata["class_names"]) == list(CLASSES)
    assert "猫" in metadata["class_names"]
    assert json.loads(metadata["training"]) == card.training
    for kind in ("config", "preprocessing"):
        described = getattr(card, kind)
        values = {field.name: getattr(described, field.name) for field in fields(described)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        assert json.loads(metadata[kind]) == plain


def test_a_file_from_before_an_option_loads_with_what_it_was_made_by(saved: Path, model: Sequencer2D) -> None:
    config = json.loads(read(saved)[1]["config"])
    del config["drop_path_decay"], config["init"]
    rewrite(saved, config=json.dumps(config))
    assert load_model(saved)[0].config == model.config


def test_a_card_needs_a_name_for_every_class(card: ModelCard) -> None:
    with pytest.raises(ValueError, match="2 class names for num_classes=5"):
        replace(card, class_names=("a", "b"))


def test_loading_nothing_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors does not exist"):
        load_model(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"hf-hub:user/name, or one of sequencer2d_s, sequencer2d_m"):
        load_model("sequencer2d_xs")


def test_loading_an_unfinished_run_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors; .*train --resume "):
        load_model(tmp_path)


def test_an_empty_file_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(ModelFileError, match=r"a\.safetensors.*it is empty"):
        load_model(tmp_path / "a.safetensors")


class Exploit:
    """What a hostile pickle does: unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_code_is_refused(legacy: bool, tmp_path: Path) -> None:
    path, marker = tmp_path / "model.pth", tmp_path / "marker"
    torch.save({"state_dict": Exploit(marker)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelFileError, match=r"model\.pth cannot be read as weights: it holds objects that could run"):
        load_model(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Exploit(marker)))
    assert marker.exists(), "the pickle does no harm, so the test shows nothing"


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_a_truncated_file_is_an_error(keep: int, saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ModelFileError, match=r"model\.safetensors is not a whole safetensors file"):
        load_model(saved)


def test_weights_of_something_else_are_an_error(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelFileError, match=r"other\.safetensors holds no weights of a Sequencer, but weight"):
        load_model(tmp_path / "other.safetensors")


def test_weights_without_lstms_are_an_error(model: Sequencer2D, tmp_path: Path) -> None:
    others = {name: value for name, value in model.state_dict().items() if "weight_hh" not in name}
    save_file(others, tmp_path / "other.safetensors")
    with pytest.raises(
        ModelFileError, match=r"other\.safetensors holds weights of no Sequencer that is known here: \w"
    ):
        load_model(tmp_path / "other.safetensors")


def test_weights_without_our_description_are_described_by_their_shapes(model: Sequencer2D, tmp_path: Path) -> None:
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    loaded, card = load_model(tmp_path / "bare.safetensors")
    assert_same_weights(loaded, model)
    assert card.config == replace(model.config, drop_path_rate=0.0)
    assert card.class_names == ("0", "1", "2", "3", "4")


def test_a_description_of_timms_beside_the_weights_counts(model: Sequencer2D, tmp_path: Path) -> None:
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    described = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "input_size": [3, 40, 40], "crop_pct": 0.8}
    content = {"architecture": "x", "label_names": list(CLASSES), "pretrained_cfg": described}
    (tmp_path / "config.json").write_text(json.dumps(content))
    _, card = load_model(tmp_path)
    assert card.class_names == CLASSES
    expected = Preprocessing(image_size=40, crop_pct=0.8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    assert card.preprocessing == expected
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"config\.json is no description of timm's"):
        load_model(tmp_path)


def test_rounded_weights_and_statistics_take_half_the_space_and_are_widened_again(
    model: Sequencer2D, card: ModelCard, saved: Path, tmp_path: Path
) -> None:
    save_model(model, card, tmp_path / "rounded.safetensors", dtype=torch.bfloat16)
    tensors, _ = read(tmp_path / "rounded.safetensors")
    whole = {name for name, tensor in tensors.items() if tensor.dtype != torch.bfloat16}
    assert whole == {name for name in tensors if name.endswith("num_batches_tracked")} != set()
    assert {name for name in tensors if name.endswith("running_var")}
    fewer_bytes = saved.stat().st_size - (tmp_path / "rounded.safetensors").stat().st_size
    assert fewer_bytes > 0.49 * 4 * sum(parameter.numel() for parameter in model.parameters())
    loaded, card_loaded = load_model(tmp_path / "rounded.safetensors")
    assert card_loaded == card
    for name, tensor in loaded.state_dict().items():
        before = model.state_dict()[name]
        assert tensor.dtype == before.dtype
        expected = before.bfloat16().float() if before.is_floating_point() else before
        assert torch.equal(tensor, expected), name
    assert next(model.parameters()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"dtype=torch\.int8 must be a type of floating point"):
        save_model(model, card, tmp_path / "int8.safetensors", dtype=torch.int8)


def test_a_card_of_another_architecture_is_not_saved(model: Sequencer2D, card: ModelCard, tmp_path: Path) -> None:
    model.reset_classifier(3)
    with pytest.raises(ValueError, match="another architecture"):
        save_model(model, card, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def test_published_weights_have_imagenets_classes_and_their_variants_preprocessing(tmp_path: Path) -> None:
    shallow = create_model("sequencer2d_s", layers=(1, 1, 1, 1))
    save_file(shallow.state_dict(), tmp_path / "model.safetensors")
    _, card = load_model(tmp_path / "model.safetensors")
    assert (card.class_names[0], len(card.class_names)) == ("n01440764", 1000)
    assert card.preprocessing == Preprocessing(image_size=224, crop_pct=0.875)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "sequencer2d/2"}, "sequencer2d/2"),
        ({"config": '{"cell": "gru", "layers": [1]}'}, "no cell; a newer sequencer2d may read the file"),
        ({"config": "[]"}, "does not fit its own description"),
        ({"config": '{"layers": [2, 2]'}, "does not fit its own description"),
        ({"class_names": '["a", "b"]'}, "2 class names for num_classes=5"),
        ({"preprocessing": "{}"}, "image_size"),
        ({"preprocessing": '{"image_size": 16, "crop_pct": 7}'}, "crop_pct"),
    ],
)
def test_a_description_that_cannot_be_understood_is_an_error(
    changes: dict[str, str], message: str, saved: Path
) -> None:
    rewrite(saved, **changes)
    with pytest.raises(ModelFileError, match=rf"model\.safetensors.*{message}"):
        load_model(saved)


def test_a_description_of_other_weights_is_an_error(saved: Path, card: ModelCard) -> None:
    config = json.loads(read(saved)[1]["config"])
    for change in ({"layers": [2, 3]}, {"layers": [2, 1]}, {"embed_dims": [8, 32]}):
        rewrite(saved, config=json.dumps({**config, **change}))
        with pytest.raises(ModelFileError, match="does not fit its own description"):
            load_model(saved)


def test_a_description_that_lacks_a_part_is_an_error(saved: Path) -> None:
    tensors, metadata = read(saved)
    for part in set(metadata) - {"format"}:
        save_file(tensors, saved, {key: value for key, value in metadata.items() if key != part})
        with pytest.raises(ModelFileError, match=part):
            load_model(saved)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_model_whole(
    step: str, saved: Path, model: Sequencer2D, card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        save_model(build_model(card.config), replace(card, training={}), saved)
    loaded, loaded_card = load_model(saved)
    assert_same_weights(loaded, model)
    assert loaded_card == card


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_leaves_the_old_model_whole(saved: Path, model: Sequencer2D, card: ModelCard) -> None:
    saved.parent.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            save_model(model, replace(card, training={}), saved)
    finally:
        saved.parent.chmod(0o700)
    assert load_model(saved)[1] == card


def test_weights_for_the_same_classes_bring_the_head(saved: Path, model: Sequencer2D, card: ModelCard) -> None:
    fresh = build_model(card.config)
    assert load_weights_into(fresh, saved, CLASSES) == []
    assert_same_weights(fresh, model)


@pytest.mark.parametrize(
    "classes", [CLASSES[::-1], ("a", "b", "c")], ids=["the same ones in another order", "other ones"]
)
def test_weights_for_other_classes_leave_the_head_as_it_began(
    classes: tuple[str, ...], saved: Path, model: Sequencer2D, card: ModelCard
) -> None:
    fresh = build_model(replace(card.config, num_classes=len(classes)))
    assert load_weights_into(fresh, saved, classes) == ["classifier of 5 other classes begun anew"]
    for name, tensor in fresh.state_dict().items():
        expected = torch.zeros_like(tensor) if name.startswith("head") else model.state_dict()[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize(
    ("change", "parameter"),
    [
        ({"embed_dims": (8, 32)}, "stages.1.downsample.down.weight"),
        ({"layers": (2, 3)}, "stages.1.blocks.2"),
        ({"layers": (1, 2)}, "stages.0.blocks.1"),
        ({"stem_widths": ()}, "stem"),
    ],
    ids=["wider", "deeper", "shallower", "another stem"],
)
def test_weights_of_another_architecture_are_an_error_that_names_the_parameter(
    change: dict[str, Any], parameter: str, saved: Path, card: ModelCard
) -> None:
    other = build_model(replace(card.config, **change))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ModelFileError, match=parameter):
        load_weights_into(other, saved, CLASSES)
    torch.testing.assert_close(dict(other.state_dict()), before, rtol=0, atol=0)


def test_a_compiled_model_is_saved_as_the_one_inside(
    saved: Path, model: Sequencer2D, card: ModelCard, tmp_path: Path
) -> None:
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    save_model(compiled, card, tmp_path / "compiled.safetensors")
    assert_same_weights(load_model(tmp_path / "compiled.safetensors")[0], model)
    with pytest.raises(ValueError, match=r"a DataParallel is no model of this package; .*\.module"):
        save_model(nn.DataParallel(model), card, saved)
    assert load_model(saved)[1] == card


def test_weights_that_do_not_fit_their_description_are_named(saved: Path) -> None:
    config = json.loads(read(saved)[1]["config"])
    rewrite(saved, config=json.dumps({**config, "layers": [2, 3]}))
    with pytest.raises(ModelFileError, match=r'does not fit its own description: .*"stages\.1\.blocks\.2\.'):
        load_model(saved)
    tensors, metadata = read(saved)
    del metadata["preprocessing"]
    save_file(tensors, saved, metadata)
    with pytest.raises(ModelFileError, match="description: there is no 'preprocessing'"):
        load_model(saved)


def test_weights_may_know_the_classes_by_another_name(saved: Path, model: Sequencer2D, card: ModelCard) -> None:
    fresh = build_model(card.config)
    assert load_weights_into(fresh, saved, ("a", "b", "c", "d", "e"), CLASSES) == []
    assert_same_weights(fresh, model)
