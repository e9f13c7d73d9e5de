"""Weights of the official code and of timm: read without running code, renamed there and back, fitted to a model."""

import argparse
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.sequencer import checkpoint_filter_fn
from torch import nn

import sequencer2d.registry  # noqa: F401 - so that timm knows our variants
from sequencer2d.adapters import ModelFileError, fit, infer_config, load_weights, read_state_dict, to_official, to_ours
from sequencer2d.model import Sequencer2D, SequencerConfig
from sequencer2d.weights import load_model
from sequencer2d.zoo import VARIANTS, create_model


@pytest.fixture
def model(tiny_config: SequencerConfig) -> Sequencer2D:
    """With no two parameters alike."""
    torch.manual_seed(0)
    return filled(Sequencer2D(tiny_config))


def filled(model: Sequencer2D) -> Sequencer2D:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


OFFICIAL = [name for name, variant in VARIANTS.items() if variant.official_name]


@pytest.mark.parametrize("name", OFFICIAL)
def test_renaming_there_and_back_loses_nothing(name: str) -> None:
    with torch.device("meta"):
        state = create_model(name).state_dict()
    official = to_official(state)
    assert len(official) == len(state)
    assert not any(name.startswith(("stages.", "head.fc", "pos_embed")) for name in official)
    back = to_ours(official)
    assert set(back) == set(state)
    assert all(back[name] is state[name] for name in state)


def test_official_names_are_those_that_timm_translates(model: Sequencer2D) -> None:
    """timm's own translation of the official code's names is the oracle."""
    assert_same(checkpoint_filter_fn(to_official(state_of(model)), model), state_of(model))


def test_official_names_by_hand() -> None:
    """As the official code builds them for S (models/two_dim_sequencer.py): a stage ends in its downsampling."""
    with torch.device("meta"):
        names = set(to_official(create_model("sequencer2d_s").state_dict()))
    assert {"stem.proj.weight", "blocks.0.4.down.weight", "blocks.1.3.down.bias", "blocks.2.8.down.weight"} <= names
    assert {"blocks.3.2.rnn_tokens.rnn_v.weight_ih_l0_reverse", "blocks.0.0.mlp_channels.fc1.bias"} <= names
    assert {"head.weight", "head.bias", "norm.weight"} <= names
    assert not any(name.startswith("blocks.3.3") for name in names)
    with torch.device("meta"):
        vanilla = set(to_official(create_model("v_sequencer_s_pe").state_dict()))
    assert {"absolute_pos_embed", "blocks.0.0.rnn_tokens.rnn.weight_hh_l0"} <= vanilla


def test_a_convolutional_stem_has_no_official_name() -> None:
    with torch.device("meta"), pytest.raises(ModelFileError, match="no convolutional stem"):
        to_official(create_model("sequencer2d_conv_t_patch4_32").state_dict())


def wrappings() -> dict[str, Any]:
    def other(state: dict[str, Any]) -> dict[str, Any]:
        return {name: tensor + 1 for name, tensor in state.items()}

    options = argparse.Namespace(model="sequencer2d_s", lr=2e-3)
    return {
        "raw": lambda state: state,
        "official, raw": to_official,
        "official, model": lambda state: {"model": to_official(state)},
        "timm, with options": lambda state: {"epoch": 3, "arch": "s", "args": options, "state_dict": state},
        "timm, averaged": lambda state: {"state_dict": other(state), "state_dict_ema": state},
        "official, averaged": lambda state: {"model": to_official(other(state)), "model_ema": to_official(state)},
        "data parallel": lambda state: {"state_dict": {f"module.{name}": t for name, t in state.items()}},
        "compiled": lambda state: {f"_orig_mod.{name}": t for name, t in state.items()},
        "compiled data parallel": lambda state: {f"_orig_mod.module.{name}": t for name, t in state.items()},
        "wrapped twice": lambda state: {"model": {"state_dict": state}},
        "Lightning": lambda state: {"state_dict": {f"model.{name}": t for name, t in state.items()}, "epoch": 1},
        "Lightning, averaged": lambda state: {
            "state_dict": {f"model.{name}": t + 1 for name, t in state.items()}
            | {f"ema.module.{name}": t for name, t in state.items()}
        },
    }


@pytest.mark.parametrize("kind", wrappings())
def test_every_kind_of_checkpoint_is_read(kind: str, model: Sequencer2D, tmp_path: Path) -> None:
    torch.save(wrappings()[kind](state_of(model)), tmp_path / "weights.pth")
    assert_same(read_state_dict(tmp_path / "weights.pth"), state_of(model))
    fresh = Sequencer2D(model.config)
    assert load_weights(fresh, tmp_path / "weights.pth") == []
    assert_same(state_of(fresh), state_of(model))


def test_files_that_timm_writes_are_read(tmp_path: Path) -> None:
    """`timm.models.save_for_hf` writes what its repositories on the hub hold."""
    theirs = timm.create_model("sequencer2d_s", num_classes=7, layers=[1, 1, 1, 1]).eval()
    head = theirs.get_submodule("head.fc")
    assert isinstance(head, nn.Linear)
    nn.init.normal_(head.weight)
    timm.models.save_for_hf(theirs, str(tmp_path), safe_serialization="both")
    theirs.double()  # in which no processor's order of sums matters
    image = torch.randn(1, 3, 56, 56, dtype=torch.float64)
    for file in ("model.safetensors", "pytorch_model.bin"):
        ours = create_model("sequencer2d_s", num_classes=7, layers=(1, 1, 1, 1), pretrained=tmp_path / file).eval()
        torch.testing.assert_close(ours.double()(image), theirs(image), rtol=0, atol=1e-5)
        found, card = load_model(tmp_path / file)
        torch.testing.assert_close(found.double()(image), theirs(image), rtol=0, atol=1e-5)
        assert card.class_names == tuple("0123456")


def test_timm_reads_ours(model: Sequencer2D, tmp_path: Path) -> None:
    config = model.config
    save_file(state_of(model), tmp_path / "ours.safetensors")
    shapes = {name: getattr(config, name) for name in ("layers", "patch_sizes", "embed_dims", "hidden_sizes")}
    theirs = timm.create_model(
        "sequencer2d_s", num_classes=5, **shapes, mlp_ratios=(2.0, 2.0), checkpoint_path=tmp_path / "ours.safetensors"
    )
    image = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(theirs.eval()(image), model(image), rtol=0, atol=1e-5)


class Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_a_file_that_would_run_code_is_refused_and_runs_none(model: Sequencer2D, tmp_path: Path) -> None:
    torch.save({"model": state_of(model), "extra": Exploit(tmp_path / "marker")}, tmp_path / "bad.pth")
    with pytest.raises(ModelFileError, match=r"bad\.pth.*could run code"):
        read_state_dict(tmp_path / "bad.pth")
    assert not (tmp_path / "marker").exists()


def test_safetensors_of_any_length_of_header_are_none_of_pytorchs(
    model: Sequencer2D, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one in 32 the first byte is that of a pickle, and not every PyTorch looks at the name."""
    path, weights = tmp_path / "model.safetensors", state_of(model)
    for length in range(300):
        save_file(weights, path, {"padding": "x" * length})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    monkeypatch.setattr(torch, "load", None)
    assert read_state_dict(path).keys() == weights.keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"not a file of weights at all", "neither a whole safetensors file nor PyTorch's"),
        (b"PK\x03\x04 not really", "cannot be read as weights"),
        ([torch.zeros(1)], "holds a list"),
        ({"fc.weight": torch.zeros(2, 2)}, r"no weights of a Sequencer, but fc\.weight"),
        ({}, "no weights of a Sequencer, but nothing"),
    ],
)
def test_a_file_of_something_else_is_named(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ModelFileError, match=rf"other\.pth.*{message}"):
        read_state_dict(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth does not exist"):
        create_model("sequencer2d_s", pretrained=tmp_path / "none.pth")


@pytest.mark.parametrize(("classes", "note"), [(3, ["classifier of 5 classes begun anew"]), (5, [])])
def test_a_head_for_other_classes_begins_anew(classes: int, note: list[str], model: Sequencer2D) -> None:
    state, notes = fit(state_of(model), Sequencer2D(replace(model.config, num_classes=classes)))
    assert notes == note
    assert ("head.fc.weight" in state) == (classes == 5)


@pytest.mark.parametrize("missing", [("head.fc.weight", "head.fc.bias"), ("head.fc.bias",)])
def test_a_classifier_that_is_not_there_is_said(missing: tuple[str, ...], model: Sequencer2D) -> None:
    state = {name: tensor for name, tensor in state_of(model).items() if name not in missing}
    for classes in (5, 7):
        fitted, notes = fit(state, Sequencer2D(replace(model.config, num_classes=classes)))
        assert notes == ["no classifier in the weights, begun anew"]
        assert not any(name.startswith("head.") for name in fitted)


def test_widths_that_no_round_ratio_makes_are_found(tiny_config: SequencerConfig) -> None:
    for dim in range(7, 400):
        for width in (dim + 6, 2 * dim - 1, 3 * dim):
            state = {
                "stages.0.blocks.0.norm1.weight": torch.empty(dim, device="meta"),
                "stages.0.blocks.0.mlp_channels.fc1.weight": torch.empty(width, dim, device="meta"),
                "stages.0.blocks.0.rnn_tokens.rnn_h.weight_hh_l0": torch.empty(8, 2, device="meta"),
                "stem.proj.weight": torch.empty(dim, 3, 2, 2, device="meta"),
            }
            assert int(dim * infer_config(state).mlp_ratios[0]) == width


def test_timm_resamples_a_position_embedding_through_us(tmp_path: Path) -> None:
    small = {"layers": (1,), "embed_dims": (8,), "hidden_sizes": (4,), "patch_sizes": (4,), "mlp_ratios": (2.0,)}
    donor = filled(create_model("v_sequencer_s_pe", pos_embed_size=(4, 4), **small))
    save_file(state_of(donor), tmp_path / "weights.safetensors")
    theirs: Any = timm.create_model(
        "v_sequencer_s_pe",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.safetensors")},
        pos_embed_size=(6, 5),
        **small,
    )
    assert theirs.pos_embed.weight.shape == (1, 6, 5, 8)


def test_without_classes_the_head_is_left_out(model: Sequencer2D) -> None:
    bare = Sequencer2D(replace(model.config, num_classes=0))
    state, notes = fit(state_of(model), bare)
    bare.load_state_dict(state)
    assert notes == ["classifier of 5 classes left out"]


@pytest.mark.parametrize("stem_widths", [(), (8,)])
def test_one_channel_sees_a_grey_image_as_three_do(stem_widths: tuple[int, ...], tiny_config: SequencerConfig) -> None:
    config = replace(tiny_config, stem_widths=stem_widths)
    three = filled(Sequencer2D(config))
    one = Sequencer2D(replace(config, in_chans=1)).eval()
    state, notes = fit(state_of(three), one)
    one.load_state_dict(state)
    assert notes == ["first convolution adapted from 3 to 1 channels"]
    grey = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(one(grey), three(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_four_channels_repeat_the_first(model: Sequencer2D) -> None:
    four = Sequencer2D(replace(model.config, in_chans=4))
    state, _ = fit(state_of(model), four)
    weight, before = state["stem.proj.weight"], model.stem.get_parameter("proj.weight")
    torch.testing.assert_close(weight, before[:, [0, 1, 2, 0]] * 3 / 4)


def test_a_position_embedding_is_resampled_for_another_grid(tiny_config: SequencerConfig) -> None:
    donor = filled(Sequencer2D(replace(tiny_config, pos_embed_size=(8, 8))))
    nn.init.constant_(donor.pos_embed.get_parameter("weight"), 0.5)
    target = Sequencer2D(replace(tiny_config, pos_embed_size=(4, 6)))
    state, notes = fit(state_of(donor), target)
    assert notes == ["position embedding resampled from 8×8 to 4×6"]
    torch.testing.assert_close(state["pos_embed.weight"], torch.full((1, 4, 6, 8), 0.5))


@pytest.mark.parametrize(
    ("change", "parameter"),
    [
        ({"embed_dims": (8, 32)}, "stages.1.downsample.down.weight"),
        ({"layers": (2, 3)}, "stages.1.blocks.2"),
        ({"layers": (1, 2)}, "stages.0.blocks.1"),
        ({"mixer": "BiGRU2D"}, "weight_ih_l0"),
        ({"stem_widths": (8,)}, "stem"),
        ({"patch_sizes": (4, 2)}, "stem.proj.weight"),
    ],
)
def test_another_architecture_is_an_error_that_names_the_parameter(
    change: dict[str, Any], parameter: str, model: Sequencer2D, tmp_path: Path
) -> None:
    other = Sequencer2D(replace(model.config, **change))
    before = state_of(other)
    torch.save(state_of(model), tmp_path / "weights.pth")
    with pytest.raises(ModelFileError, match=rf"weights\.pth: .*{re.escape(parameter)}.*the same architecture"):
        load_weights(other, tmp_path / "weights.pth")
    assert_same(state_of(other), before)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_architecture_is_found_in_the_weights(name: str) -> None:
    with torch.device("meta"):
        state = create_model(name, num_classes=12).state_dict()
    assert infer_config(state) == replace(VARIANTS[name].config, num_classes=12, shuffle=False)


@pytest.mark.parametrize("name", ["sequencer2d_s_add", "gru_sequencer2d_s", "v_sequencer_s_pe"])
def test_an_official_file_is_a_model_without_a_word_about_it(name: str, tmp_path: Path) -> None:
    small = {"embed_dims": (32, 32), "hidden_sizes": (16, 16), "patch_sizes": (4, 2), "mlp_ratios": (2.0, 2.0)}
    model = filled(create_model(name, layers=(1, 2), num_classes=4, **small))
    torch.save({"model": to_official(state_of(model))}, tmp_path / "official.pth")
    loaded, card = load_model(tmp_path / "official.pth")
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(image), model(image))
    assert card.config == model.config


def test_weights_are_adapted_in_the_precision_of_the_model(model: Sequencer2D) -> None:
    one = Sequencer2D(replace(model.config, in_chans=1))
    rounded = {name: tensor.bfloat16() for name, tensor in state_of(model).items()}
    state, _ = fit(rounded, one)
    weight = rounded["stem.proj.weight"].float().sum(1, keepdim=True)
    assert torch.equal(state["stem.proj.weight"], weight)
