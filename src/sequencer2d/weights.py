"""A model file: one `.safetensors` with the weights and, in its metadata, all that using them needs. No pickle.

The files of others, the official code's and timm's, are read too: what they do not say follows from their weights.
"""

import json
import logging
import tempfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.data import ImageNetInfo
from torch import nn

from sequencer2d.adapters import ModelFileError, fit, infer_config, is_pickle, read_state_dict
from sequencer2d.errors import first_line
from sequencer2d.files import write_atomic
from sequencer2d.hub import PREFIX, upload
from sequencer2d.model import Sequencer2D, SequencerConfig
from sequencer2d.peers import Classifier, Peer, PeerConfig, build_model, fit_peer, is_peer
from sequencer2d.preprocessing import Preprocessing
from sequencer2d.zoo import VARIANTS, find_model_file, timm_name

FORMAT = "sequencer2d/1"

log = logging.getLogger("sequencer2d")


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What travels with the weights."""

    architecture: str
    """Name of the variant that `config` was derived from, or `timm/NAME`."""
    config: SequencerConfig | PeerConfig
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    training: dict[str, Any] = field(default_factory=dict)
    """How it was trained, and how well it did: plain data for people to read."""

    def __post_init__(self) -> None:
        if len(self.class_names) != self.config.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for num_classes={self.config.num_classes}")

    def check_channels(self, source: str | Path) -> None:
        """Raises ValueError, which names the source, where the model does not take RGB, as which files are read."""
        channels = getattr(self.config, "in_chans", 3)
        if channels != 3:
            raise ValueError(
                f"{source} takes images of {channels} channels, and files are read as RGB, of 3; "
                "give it tensors in Python: load_model(…)[0](images)"
            )

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
            config=_dataclass_from_json(
                PeerConfig if is_peer(metadata["architecture"]) else SequencerConfig, metadata["config"]
            ),
            class_names=tuple(json.loads(metadata["class_names"])),
            preprocessing=_dataclass_from_json(Preprocessing, metadata["preprocessing"]),
            training=json.loads(metadata["training"]),
        )


def save_model(model: nn.Module, card: ModelCard, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes weights and card to one file, atomically.

    Args:
        model: In whatever precision, also as `torch.compile` returned it.
        card: Its description.
        path: Of a `.safetensors` file.
        dtype: Round weights and statistics to this type, such as `torch.bfloat16` for half the size. Whole numbers
            stay, and `load_model` gives an fp32 model, of the rounded weights, in any case. Default: as they are.

    Raises:
        ValueError: The card describes another architecture than the model's, the model has been changed since it was
            made, as by `quantize`, or is wrapped in another, or `dtype` is no type of floating point.
        OSError: The folder is missing or read-only, or the disk is full; an older file of that name stays whole.
    """
    model = getattr(model, "_orig_mod", model)  # within what torch.compile returned
    if not isinstance(model, Sequencer2D | Peer):
        raise ValueError(f"a {type(model).__name__} is no model of this package; give the one inside, such as .module")
    if card.config != model.config:
        raise ValueError("the card describes another architecture than the model has; give it config=model.config")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} must be a type of floating point, such as torch.bfloat16")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    names = tensors.keys()
    if isinstance(model, Sequencer2D):
        with torch.device("meta"):
            names = Sequencer2D(model.config).state_dict().keys()
    if tensors.keys() != names:
        raise ValueError(
            f"the model has not the weights of its architecture (such as {min(tensors.keys() ^ names)}); "
            "save the model that it was made from, before quantize or other changes"
        )
    write_atomic(Path(path), save(tensors, metadata=card.to_metadata()))


def load_model(source: str | Path) -> tuple[Classifier, ModelCard]:
    """A model in evaluation mode on the CPU, and its card: a Sequencer, or what was trained to compare with.

    Args:
        source: A `.safetensors` file or a run folder of ours; a file of weights of the official code or of timm;
            `hf-hub:user/name`, a repository of the Hugging Face hub; or a name of the zoo that has weights, in the
            package or published.

    Raises:
        FileNotFoundError: Nothing lies there, the folder holds no finished model, or there is no network.
        ModelFileError: The file holds something else, is damaged, or does not fit its own description.
    """
    return _load(find_model_file(source))


def _load(path: Path) -> tuple[Classifier, ModelCard]:
    metadata = _metadata(path)
    if metadata is None or "format" not in metadata or metadata["format"] == "pt":
        return _load_foreign(path)
    if metadata["format"] != FORMAT:
        hint = "a newer sequencer2d reads it" if metadata["format"].startswith("sequencer2d/") else "it is not ours"
        raise ModelFileError(f"{path} is of format {metadata['format']!r}; {hint}")
    try:
        card = ModelCard.from_metadata(metadata)
        model = build_model(card.config)
        with safe_open(path, framework="pt") as file:
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelFileError(f"{path} does not fit its own description: {first_line(error)}") from error
    return model.eval(), card


def _metadata(path: Path) -> dict[str, str] | None:
    """The description in a safetensors file, or None if the file is of another kind."""
    with path.open("rb") as file:
        start = file.read(2)
    if not start:
        raise ModelFileError(f"{path} is not a whole safetensors file: it is empty")
    if path.suffix != ".safetensors" and is_pickle(start):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ModelFileError(f"{path} is not a whole safetensors file ({error}); give another") from error


def _load_foreign(path: Path) -> tuple[Sequencer2D, ModelCard]:
    """Weights without our description: what they are follows from their names and shapes, the rest is the variant's."""
    state = read_state_dict(path)
    try:
        config = infer_config(state)
        model = Sequencer2D(config)
        model.load_state_dict(fit(state, model)[0])
    except (KeyError, ValueError, RuntimeError, StopIteration) as error:
        why = first_line(error) if str(error) else "it has no recurrent weights"
        raise ModelFileError(f"{path} holds weights of no Sequencer that is known here: {why}") from error
    found = _variant_name(config)
    log.info(
        "%s holds weights of %s, with %d classes", path, found or "an architecture without a name", config.num_classes
    )
    name = found or _BASE
    variant = VARIANTS[name]
    preprocessing = Preprocessing(image_size=variant.image_size, crop_pct=variant.crop_pct)
    class_names, preprocessing = _timms_description(path, _class_names(config.num_classes), preprocessing)
    card = ModelCard(architecture=name, config=config, class_names=class_names, preprocessing=preprocessing)
    return model.eval(), card


def _timms_description(
    path: Path, class_names: tuple[str, ...], preprocessing: Preprocessing
) -> tuple[tuple[str, ...], Preprocessing]:
    """Class names and preprocessing as timm's `config.json` beside the weights has them (timm/models/_hub.py).

    Raises:
        ModelFileError: There is such a file, and it cannot be understood.
    """
    file = path.with_name("config.json")
    if not file.is_file():
        return class_names, preprocessing
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        given = described.get("pretrained_cfg", {})
        names = described.get("label_names") or given.get("label_names") or class_names
        return tuple(names) if len(names) == len(class_names) else class_names, replace(
            preprocessing,
            image_size=given.get("input_size", (3, 0, preprocessing.image_size))[-1],
            crop_pct=given.get("crop_pct", preprocessing.crop_pct),
            mean=tuple(given.get("mean", preprocessing.mean)),
            std=tuple(given.get("std", preprocessing.std)),
            interpolation=given.get("interpolation", preprocessing.interpolation),
        )
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelFileError(f"{file} is no description of timm's ({error}); remove or correct it") from error


_BASE = "sequencer2d_s"
"""The variant that an architecture without a name counts as a change of."""


def _variant_name(config: SequencerConfig) -> str | None:
    """The first variant of an architecture, whatever its classes and channels."""
    for name, variant in VARIANTS.items():
        if config == replace(variant.config, num_classes=config.num_classes, in_chans=config.in_chans):
            return name
    return None


def _class_names(count: int) -> tuple[str, ...]:
    """ImageNet's WordNet ids for 1,000 classes, in the order that published weights have; else numbers."""
    return tuple(ImageNetInfo().label_names() if count == 1000 else map(str, range(count)))


def load_weights_into(model: Classifier, source: str | Path, *class_names: tuple[str, ...]) -> list[str]:
    """Copies the weights of a model to start a training from; returns what had to be changed, in words.

    The classifier is copied only where its classes are those of the data, under one of the names that these have.

    Raises:
        FileNotFoundError, ModelFileError: As `load_model`, or a parameter other than the classifier's does not fit.
    """
    donor, card = load_model(source)
    try:
        state, notes = _fitted(donor, model, same_classes=card.class_names in class_names)
    except ModelFileError as error:
        raise ModelFileError(
            f"{source} is a {card.architecture}: {error}: train the same --model and --model-args"
        ) from error
    model.load_state_dict(state, strict=False)
    return notes


def training_of(file: Path) -> dict[str, Any]:
    """How a model file of ours was trained, from its card; nothing for the files of others."""
    metadata = _metadata(file) or {}
    return json.loads(metadata["training"]) if metadata.get("format") == FORMAT else {}


def _fitted(donor: Classifier, model: Classifier, *, same_classes: bool) -> tuple[dict[str, torch.Tensor], list[str]]:
    if isinstance(donor, Sequencer2D) and isinstance(model, Sequencer2D):
        return fit(donor.state_dict(), model, same_classes=same_classes)
    if isinstance(donor, Peer) and isinstance(model, Peer) and donor.config.name == model.config.name:
        return fit_peer(donor, model, same_classes=same_classes)
    raise ModelFileError("the model to train is another")


def from_pretrained(repo_id: str) -> tuple[Classifier, ModelCard]:
    """The model of a repository on the Hugging Face hub, ours or timm's; the same as `load_model("hf-hub:…")`.

    Raises:
        FileNotFoundError, ModelFileError: As `load_model`.
    """
    return _load(find_model_file(PREFIX + repo_id.removeprefix(PREFIX), instead="load_model('path/to/file')"))


def push_to_hub(source: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Puts a model on the Hugging Face hub, with a model card; returns its address there.

    The repository gets `model.safetensors`, `README.md`, and `config.json`, by which timm loads it, too
    (`import sequencer2d.registry; timm.create_model("hf-hub:user/name")`).

    Args:
        source: A model file or run folder.
        repo_id: `user/name`; made if it does not exist.
        private: Make it so that others do not see it.

    Raises:
        FileNotFoundError, ModelFileError: As `load_model`.
        ValueError: It is a model of timm's.
        OSError: The hub refuses or cannot be reached; the message says why.
    """
    model, card = load_model(source)
    if isinstance(card.config, PeerConfig):
        raise ValueError(
            f"{source} is a {card.architecture}: timm puts its models on the hub (timm.models.push_to_hf_hub)"
        )
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, card, Path(folder, "model.safetensors"))
        Path(folder, "config.json").write_text(json.dumps(_timm_config(card), indent=2), encoding="utf-8")
        Path(folder, "README.md").write_text(model_card(card, repo_id), encoding="utf-8")
        return upload(Path(folder), repo_id, private=private)


def _timm_config(card: ModelCard) -> dict[str, Any]:
    """As timm writes it (timm/models/_hub.py, `save_config_for_hf`)."""
    assert isinstance(card.config, SequencerConfig)
    name = _variant_name(card.config) or _BASE
    variant = VARIANTS[name]
    own = replace(variant, config=card.config, image_size=card.preprocessing.image_size, hub_id="")
    changed = {
        field_name: value
        for field_name, value in asdict(card.config).items()
        if value != getattr(variant.config, field_name) and field_name != "num_classes"
    }
    preprocessing = asdict(card.preprocessing)
    del preprocessing["image_size"]  # it is in the input size
    return {
        "architecture": timm_name(name),
        "num_classes": card.config.num_classes,
        "num_features": card.config.embed_dims[-1],
        "model_args": changed,
        "label_names": card.class_names,
        "pretrained_cfg": {
            **own.default_cfg(),
            **preprocessing,
        },
    }


def model_card(card: ModelCard, repo_id: str) -> str:
    """A README for the hub: what the model is, what it was trained on, how well it does, how to use it."""
    training = card.training
    rows = [
        ("architecture", card.architecture),
        (
            "classes",
            f"{len(card.class_names)}: {', '.join(card.class_names[:10])}{', …' if len(card.class_names) > 10 else ''}",
        ),
        ("image size", f"{card.preprocessing.image_size}²"),
        ("trained on", training.get("data", "not said")),
        *([("validation accuracy", f"{training['val_top1']:.2%}")] if training.get("val_top1") else []),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
library_name: sequencer2d
pipeline_tag: image-classification
license: apache-2.0
tags: [image-classification, sequencer2d, timm, lstm]
---
# {repo_id}

An image classifier whose tokens are mixed by LSTMs instead of attention: *Sequencer: Deep LSTM for Image
Classification* (Tatsunami and Taki, NeurIPS 2022).

| | |
| --- | --- |
{table}

```bash
pip install sequencer2d
sequencer2d predict {PREFIX}{repo_id} image.jpg
```

```python
from sequencer2d import load_model

model, card = load_model("{PREFIX}{repo_id}")
```
"""


def _dataclass_from_json(kind: type, text: str) -> Any:
    values = json.loads(text)
    unknown = set(values) - {field.name for field in fields(kind)}
    if unknown:
        raise ValueError(f"{kind.__name__} has no {', '.join(sorted(unknown))}; a newer sequencer2d may read the file")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
