"""A model file: one `.safetensors` with the weights and, in its metadata, all that using them needs. No pickle."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from sequencer2d.files import write_atomic
from sequencer2d.model import Sequencer2D, SequencerConfig
from sequencer2d.preprocessing import Preprocessing

FORMAT = "sequencer2d/1"


class ModelFileError(ValueError):
    """A file that is no model of this package; the message names the file and what to do."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What travels with the weights."""

    architecture: str
    """Name of the variant that `config` was derived from."""
    config: SequencerConfig
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    training: dict[str, Any] = field(default_factory=dict)
    """How it was trained, and how well it did: plain data for people to read."""

    def __post_init__(self) -> None:
        if len(self.class_names) != self.config.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for num_classes={self.config.num_classes}")

    def to_metadata(self) -> dict[str, str]:
        """Text by text, as safetensors wants it."""
        return {
            "format": FORMAT,
            "architecture": self.architecture,
            "config": json.dumps(asdict(self.config)),
            "class_names": json.dumps(self.class_names, ensure_ascii=False),
            "preprocessing": json.dumps(asdict(self.preprocessing)),
            "training": json.dumps(self.training, ensure_ascii=False),
        }

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> "ModelCard":
        """The inverse of `to_metadata`. Raises ValueError, KeyError or TypeError for metadata of another shape."""
        return cls(
            architecture=metadata["architecture"],
            config=_dataclass_from_json(SequencerConfig, metadata["config"]),
            class_names=tuple(json.loads(metadata["class_names"])),
            preprocessing=_dataclass_from_json(Preprocessing, metadata["preprocessing"]),
            training=json.loads(metadata["training"]),
        )


def save_model(model: Sequencer2D, card: ModelCard, path: str | Path) -> None:
    """Writes weights and card to one file, atomically.

    Raises:
        OSError: The folder is missing or read-only, or the disk is full; an older file of that name stays whole.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(Path(path), save(tensors, metadata=card.to_metadata()))


def load_model(source: str | Path) -> tuple[Sequencer2D, ModelCard]:
    """The model of a `.safetensors` file or of a run folder, in evaluation mode on the CPU, and its card.

    Raises:
        FileNotFoundError: Nothing lies there, or the folder holds no finished model.
        ModelFileError: The file is of another format, damaged, or does not fit its own description.
    """
    path = find_model_file(source)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ModelFileError(f"{path} is not a whole safetensors file ({error}); {_kind(path)}") from error
    if metadata.get("format", FORMAT) != FORMAT and metadata["format"].startswith("sequencer2d/"):
        raise ModelFileError(f"{path} is of format {metadata['format']!r}; a newer sequencer2d reads it")
    if metadata.get("format") != FORMAT:
        raise ModelFileError(
            f"{path} holds weights but not the description that `sequencer2d train` writes beside them "
            f"(format {FORMAT!r}, found {metadata.get('format', 'none')!r}); "
            "load foreign weights with create_model(…).load_state_dict(…)"
        )
    try:
        card = ModelCard.from_metadata(metadata)
        model = Sequencer2D(card.config)
        model.load_state_dict(tensors)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        first_line = str(error).splitlines()[0]
        raise ModelFileError(f"{path} does not fit its own description: {first_line}") from error
    return model.eval(), card


def find_model_file(source: str | Path) -> Path:
    """The model file that a path means: itself, or `model.safetensors` of a run folder."""
    path = Path(source)
    if path.is_dir():
        path = path / "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(
                f"{source} holds no model.safetensors; a run writes it when its training ends "
                "(continue a stopped run with `sequencer2d train --run-dir …`)"
            )
    if not path.is_file():
        raise FileNotFoundError(f"{source} does not exist; give a model file or the folder of a run")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{source} cannot be read; check its permissions")
    return path


def load_weights_into(model: nn.Module, source: str | Path, class_names: tuple[str, ...]) -> list[str]:
    """Copies weights of a model file to start a training from; returns the names of the parameters left as they were.

    The classifier is copied only when the file's class names are the same.

    Raises:
        ModelFileError: A parameter other than the classifier's is missing or of another shape.
    """
    donor, card = load_model(source)
    tensors = donor.state_dict()
    if card.class_names != class_names:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    own = model.state_dict()
    extra = [name for name in tensors if name not in own]
    if extra:
        raise ModelFileError(
            f"{source} is a {card.architecture} with {extra[0]}, which the model lacks; "
            "train the same --model and --model-args"
        )
    for name, tensor in own.items():
        given = tensors.get(name)
        if given is None and name.startswith("head."):
            continue
        if given is None or given.shape != tensor.shape:
            shape = "missing" if given is None else f"of shape {list(given.shape)}"
            raise ModelFileError(
                f"{source} is a {card.architecture} whose {name} is {shape}, where {list(tensor.shape)} is needed; "
                "train the same --model and --model-args"
            )
    model.load_state_dict(tensors, strict=False)
    return [name for name in own if name not in tensors]


def _dataclass_from_json(kind: type, text: str) -> Any:
    values = json.loads(text)
    unknown = set(values) - {field.name for field in fields(kind)}
    if unknown:
        raise ValueError(f"{kind.__name__} has no {', '.join(sorted(unknown))}; a newer sequencer2d may read the file")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _kind(path: Path) -> str:
    """A guess at what a file that is no safetensors is, from its first bytes."""
    with path.open("rb") as file:
        start = file.read(8)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "it looks like a PyTorch pickle, which is not opened because it can run code"
    if not start:
        return "it is empty"
    return "give the model.safetensors of a run"
