"""Recipes: configs that are kept, one YAML file each, with their claim in its head."""

import difflib
from importlib.resources import files
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from sequencer2d.training.config import TrainConfig

set_parsing_settings(docstring_parse_attribute_docstrings=True)
_FOLDER = Path(str(files("sequencer2d") / "recipes"))


def list_recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """A recipe's file, by its path or by the name of a shipped one (`cifar10`, `recipes/cifar10.yaml`).

    Raises:
        FileNotFoundError: There is no such file and no such recipe; the message lists the near ones.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = _FOLDER / f"{Path(name).stem}.yaml"
    if shipped.is_file() and Path(name).parent in (Path(), Path("recipes")):
        return shipped
    near = difflib.get_close_matches(Path(name).stem, list_recipes(), n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"shipped are {', '.join(list_recipes())}"
    raise FileNotFoundError(f"no config file {name}, and no recipe of that name: {hint}")


def add_config_options(parser: ArgumentParser) -> None:
    """Adds `--config` and an option for every field of `TrainConfig`."""
    parser.add_argument("--config", action="config", help="a recipe: a YAML file or the name of a shipped one")
    parser.add_class_arguments(TrainConfig)


def config_from_yaml(path: Path) -> TrainConfig:
    """Reads a recipe or the config of a run.

    Raises:
        ValueError: The file is no YAML, or has a key or value that a config does not have.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig, "config")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it must hold keys and values")
        return parser.instantiate(parser.parse_object({"config": values})).config
    except Exception as error:
        raise ValueError(f"{path} is no config: {error}") from error
