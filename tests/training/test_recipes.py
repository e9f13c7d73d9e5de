"""Every shipped recipe is a config of a model that exists, and a wrong name or file says what is wrong."""

from pathlib import Path

import pytest
import torch

from sequencer2d.training.config import TrainConfig, resolve
from sequencer2d.training.recipes import config_from_yaml, find_recipe, list_recipes
from sequencer2d.zoo import create_model, get_variant


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_resolves_and_its_model_exists(name: str) -> None:
    config = config_from_yaml(find_recipe(name))
    model = config.model if config.model != "auto" else "sequencer2d_s"
    variant = get_variant(model)
    image_size = config.image_size or variant.image_size
    resolved = resolve(config, model=model, image_size=image_size, crop_pct=config.crop_pct or variant.crop_pct)
    assert resolved.optim.warmup_epochs is not None
    assert resolved.optim.warmup_epochs < resolved.epochs
    with torch.device("meta"):
        create_model(model, **config.model_args)


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_states_its_command_in_its_head(name: str) -> None:
    lines = find_recipe(name).read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("#")]
    assert any(f"sequencer2d train --config {name}" in line for line in head)


def test_a_recipe_is_found_by_name_file_name_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = find_recipe("digits")
    monkeypatch.chdir(tmp_path)
    assert find_recipe("digits.yaml") == find_recipe("recipes/digits.yaml") == find_recipe(shipped) == shipped
    Path("digits.yaml").write_text("epochs: 3")
    assert find_recipe("digits.yaml") == Path("digits.yaml"), "a file of one's own comes first"


@pytest.mark.parametrize("name", ["digit", "recipes/didgits.yaml", "elsewhere/digits.yaml"])
def test_an_unknown_recipe_is_told_the_near_ones(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"no config file {name}.*did you mean digits"):
        find_recipe(name)


def test_a_far_name_is_told_all_recipes() -> None:
    with pytest.raises(FileNotFoundError, match=", ".join(list_recipes())):
        find_recipe("xyz")


def test_what_a_recipe_leaves_out_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("optim: {weight_decay: 0.1}\nepochs: 7\n")
    config = config_from_yaml(tmp_path / "a.yaml")
    assert (config.epochs, config.optim.weight_decay) == (7, 0.1)
    assert config.to_dict() == {
        **TrainConfig().to_dict(),
        "epochs": 7,
        "optim": {**TrainConfig().to_dict()["optim"], "weight_decay": 0.1},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: [", "expected the node content"),
        ("epoch: 3", "epoch"),
        ("optim: {nesterov: true}", "nesterov"),
        ("epochs: many", "epochs"),
        ("epochs: 0", "epochs=0 must be at least 1"),
        ("augment: {crop: center}", "crop"),
        ("precision: fp8", "precision"),
    ],
)
def test_a_wrong_recipe_is_an_error_that_names_file_and_key(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)a\.yaml is no config: .*{message}"):
        config_from_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["[]", "3"])
def test_yaml_that_is_no_mapping_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"a\.yaml is no config"):
        config_from_yaml(tmp_path / "a.yaml")
