"""The named variants: what they are for, what may be changed, and what a wrong name is told."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from sequencer2d.model import SequencerConfig
from sequencer2d.zoo import VARIANTS, create_model, get_config, list_models

SMALL = [name for name, variant in VARIANTS.items() if variant.image_size <= 64]


def test_models_are_listed_by_a_part_of_their_name() -> None:
    assert list_models() == list(VARIANTS)
    assert {"sequencer2d_s", "sequencer2d_m", "sequencer2d_l", "sequencer2d_xs"} <= set(list_models())
    assert list_models("_32") == [name for name in VARIANTS if name.endswith("_32")] != []
    assert list_models("resnet") == []


@pytest.mark.parametrize(
    "name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name not in SMALL)]
)
def test_every_variant_gives_logits_at_its_image_size(name: str) -> None:
    size = VARIANTS[name].image_size
    logits = create_model(name, num_classes=3)(torch.zeros(2, 3, size, size))
    assert logits.shape == (2, 3)


@pytest.mark.parametrize("name", SMALL)
def test_variants_for_small_images_leave_the_lstms_a_sequence(name: str) -> None:
    """The notebook's 7×7 patches leave a grid of 4×4 tokens of a 32×32 image."""
    size = VARIANTS[name].image_size
    tokens = create_model(name).stem(torch.zeros(1, 3, size, size))
    assert min(tokens.shape[1:3]) >= 8


@pytest.mark.parametrize("name", [name for name in SMALL if "_patch" in name])
def test_names_of_small_variants_state_patch_and_image_size(name: str) -> None:
    patch, size = name.rsplit("_patch")[1].split("_")
    assert VARIANTS[name].config.patch_sizes[0] == int(patch)
    assert VARIANTS[name].image_size == int(size)


def test_xs_is_the_notebooks() -> None:
    config = get_config("sequencer2d_xs")
    assert (config.layers, config.patch_sizes) == ((2, 2, 4, 3), (7, 2, 1, 1))


def test_any_field_can_be_overridden_and_the_rest_stays() -> None:
    overrides: dict[str, Any] = {
        "layers": [1, 1],
        "embed_dims": [8, 8],
        "num_classes": 2,
        "in_chans": 1,
        "drop_path_rate": 0.1,
    }
    assert get_config("sequencer2d_t_patch2_32", **overrides) == SequencerConfig(
        layers=(1, 1),
        patch_sizes=(2, 2),
        embed_dims=(8, 8),
        hidden_sizes=(24, 48),
        mlp_ratios=(3.0, 3.0),
        num_classes=2,
        in_chans=1,
        drop_path_rate=0.1,
    )
    assert VARIANTS["sequencer2d_t_patch2_32"].config.num_classes == 1000


@pytest.mark.parametrize(
    ("name", "hint"),
    [("sequencer2d", "sequencer2d_s"), ("sequencer_s", "sequencer2d_s"), ("SEQUENCER2D-M", "sequencer2d_")],
)
def test_a_wrong_name_is_told_the_near_ones(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{hint}"):
        create_model(name)


def test_a_far_name_is_told_all_of_them() -> None:
    with pytest.raises(ValueError, match="resnet50") as caught:
        create_model("resnet50")
    assert all(name in str(caught.value) for name in VARIANTS)


def test_an_unknown_argument_is_told_the_near_one() -> None:
    with pytest.raises(ValueError, match="'drop_path': did you mean drop_path_rate"):
        create_model("sequencer2d_s", drop_path=0.1)


def test_an_argument_that_does_not_fit_the_variant_is_named() -> None:
    with pytest.raises(ValueError, match="patch_sizes has 4 entries, layers has 2"):
        create_model("sequencer2d_s", layers=(2, 2))


OTHER_TYPES = {
    "get_config(S, layers=[2, 1.5, 1, 1])": "layers[1]=1.5 must be a whole number",
    "get_config(S, layers='4383')": "layers='4383' must be a list of numbers, such as layers=[2, 2]",
    "get_config(S, layers=4)": "layers=4 must be a list of numbers",
    "get_config(S, hidden_sizes=(True, 96, 96, 96))": "hidden_sizes[0]=True must be a whole number",
    "get_config(S, mlp_ratios=('3', 3, 3, 3))": "mlp_ratios[0]='3' must be a number",
    "get_config(S, num_classes=2.5)": "num_classes=2.5 must be a whole number",
    "get_config(S, num_classes='x')": "num_classes='x' must be a whole number",
    "get_config(S, num_classes=True)": "num_classes=True must be a whole number",
    "get_config(S, in_chans=None)": "in_chans=None must be a whole number",
    "get_config(S, shuffle='no')": "shuffle='no' must be True or False",
    "get_config(S, init='zero')": "init='zero' must be 'official' or 'torch'",
    "get_config(S, drop_path_decay=0)": "drop_path_decay=0 must be True or False",
    "get_config(S, shuffle=1)": "shuffle=1 must be True or False",
    "get_config(S, drop_rate='0.1')": "drop_rate='0.1' must be a number",
    "get_config(S, mixer=None)": "mixer=None must be a text",
    "create_model(None)": "not by None",
    "create_model(['sequencer2d_s'])": "not by ['sequencer2d_s']",
    "create_model(S, pretrained=1)": "pretrained=1 must be True, False, or say where weights are",
    "create_model(S, pretrained='')": "pretrained='' must be True, False, or say where weights are",
    "costs(get_config(S), True)": "image_size=True must be a side in pixels",
    "costs(get_config(S), 224.0)": "image_size=224.0 must be a side in pixels",
    "costs(get_config(S), (224,))": "image_size=(224,) must be a side in pixels",
    "costs(get_config(S), '224')": "image_size='224' must be a side in pixels",
    "asdict(get_config(S, layers=array([4, 3, 8, 3]), mlp_ratios=[3, 3, 3, 3], num_classes=int64(9)))": "",
    "costs(get_config(S), int64(224)) == costs(get_config(S), [224, 224]) == costs(get_config(S), 224) or 1 / 0": "",
}
"""What users may write, and a part of the error that they get; none where it is right."""

PROGRAM = """
import json, sys
from dataclasses import asdict
from numpy import array, int64
from sequencer2d.flops import costs
from sequencer2d.zoo import create_model, get_config

S = "sequencer2d_s"
for expression in json.load(sys.stdin):
    try:
        json.dumps(eval(expression))
        print()
    except ValueError as error:
        print(error)
"""


def test_values_of_another_type_are_named_and_numbers_of_numpy_taken() -> None:
    """In a process of its own: the checks of the test suite would refuse them before we do."""
    wishes = json.dumps(list(OTHER_TYPES))
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=wishes, capture_output=True, text=True, check=False)
    assert len(done.stdout.splitlines()) == len(OTHER_TYPES), done.stderr
    for (expression, hint), message in zip(OTHER_TYPES.items(), done.stdout.splitlines(), strict=True):
        assert hint in message if hint else not message, f"{expression}: {message}"
