"""Weights of others: the official repository's and timm's files read safely, renamed, and fitted to a model.

Our parameter names are timm's. The official repository's differ (models/two_dim_sequencer.py, vanilla_sequencer.py):

| official              | timm and ours                |
| --------------------- | ---------------------------- |
| `blocks.i.j.…`        | `stages.i.blocks.j.…`        |
| `blocks.i.N.down.…`   | `stages.i+1.downsample.down.…` |
| `head.…`              | `head.fc.…`                  |
| `absolute_pos_embed`  | `pos_embed.weight`           |
"""

import argparse
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor

from sequencer2d.errors import first_line
from sequencer2d.layers import resample_grid
from sequencer2d.model import Sequencer2D, SequencerConfig

State = dict[str, Tensor]

_WRAPPERS = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model")
"""Under these keys checkpoints keep their weights; averaged ones, which were evaluated, first."""
_PREFIXES = ("ema.module.", "module.", "_orig_mod.", "model.")


class ModelFileError(ValueError):
    """A file that is no model of this package; the message names the file and what to do."""


def read_state_dict(path: str | Path) -> State:
    """The weights of a file, by our names.

    Reads safetensors, and PyTorch's pickles with `weights_only=True`, which runs no code. Takes raw state dicts and
    checkpoints that wrap one (`model`, `state_dict`, and their averages, which go first), of the official code, of
    timm, of Lightning and ours, also as saved from `DataParallel` or `torch.compile`.

    Raises:
        FileNotFoundError: There is no such file.
        ModelFileError: It cannot be read, or holds other things than the weights of a Sequencer.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file of weights")
    return to_ours(_unwrap(_read(path), path), path)


def to_ours(state: State, source: str | Path = "the state dict") -> State:
    """Weights by our names; those of the official code are recognised and renamed.

    Raises:
        ModelFileError: The names are neither ours nor the official code's.
    """
    if any(re.match(r"stages\.\d+\.blocks\.\d+\.rnn_tokens\.", name) for name in state):
        return state
    if not any(re.match(r"blocks\.\d+\.\d+\.rnn_tokens\.", name) for name in state):
        names = ", ".join(list(state)[:3]) or "nothing"
        raise ModelFileError(f"{source} holds no weights of a Sequencer, but {names}, …")
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(
            r"^blocks\.(\d+)\.\d+\.down\.", lambda match: f"stages.{int(match[1]) + 1}.downsample.down.", name
        )
        name = re.sub(r"^blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", name)
        name = re.sub(r"^head\.", "head.fc.", name)
        renamed["pos_embed.weight" if name == "absolute_pos_embed" else name] = tensor
    return renamed


def to_official(state: State) -> State:
    """Weights of ours by the official code's names. (timm's names are ours.)

    Raises:
        ModelFileError: The official code has no such layer: a convolutional stem.
    """
    if any(name.startswith("stem.steps.") for name in state):
        raise ModelFileError("the official code has no convolutional stem, so these weights cannot be named for it")
    blocks = Counter(stage for stage, _ in {tuple(name.split(".")[1:4:2]) for name in state if ".blocks." in name})
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^stages\.(\d+)\.blocks\.(\d+)\.", r"blocks.\1.\2.", name)
        if match := re.match(r"stages\.(\d+)\.downsample\.(.*)", name):
            before = int(match[1]) - 1
            name = f"blocks.{before}.{blocks[str(before)]}.{match[2]}"
        name = re.sub(r"^head\.fc\.", "head.", name)
        renamed["absolute_pos_embed" if name == "pos_embed.weight" else name] = tensor
    return renamed


def fit(state: State, model: Sequencer2D, *, same_classes: bool = True) -> tuple[State, list[str]]:
    """Weights fitted to a model that differs in classes, image channels or grid; and what was changed, in words.

    As timm does (timm/models/_builder.py, `load_pretrained`): a classifier for another number of classes is left out
    and begins anew, the first convolution is summed or repeated over the channels, a position embedding is resampled.

    With `same_classes` off, the classifier begins anew in any case.

    Raises:
        ModelFileError: Another parameter is missing, surplus, or of another shape.
    """
    own, notes = model.state_dict(), []
    state = {  # of the model's precision, in which they are adapted
        name: tensor.to(own[name].dtype) if name in own and tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    head = [state.pop(name, None) for name in ("head.fc.weight", "head.fc.bias")]
    if head[0] is None or head[1] is None:
        notes += ["no classifier in the weights, begun anew"] if model.num_classes else []
    elif not same_classes:
        notes.append(f"classifier of {len(head[0])} other classes begun anew")
    elif len(head[0]) != model.num_classes:
        notes.append(f"classifier of {len(head[0])} classes " + ("begun anew" if model.num_classes else "left out"))
    else:
        state |= {"head.fc.weight": head[0], "head.fc.bias": head[1]}
    first = "stem.steps.0.0.weight" if model.config.stem_widths else "stem.proj.weight"
    if first in state and state[first].shape[1] == 3 != model.in_chans:
        state[first] = adapt_input_conv(model.in_chans, state[first])
        notes.append(f"first convolution adapted from 3 to {model.in_chans} channels")
    if note := resample_positions(state, model):
        notes.append(note)
    for name in state:
        if name not in own:
            raise ModelFileError(f"the weights have {name}, which the model lacks; give the same architecture")
    for name, tensor in own.items():
        if name not in state and not name.startswith("head."):
            raise ModelFileError(f"the weights have no {name}; give the same architecture")
        if name in state and state[name].shape != tensor.shape:
            raise ModelFileError(
                f"{name} is {list(state[name].shape)}, where {list(tensor.shape)} is needed; give the same architecture"
            )
    return state, notes


def resample_positions(state: State, model: Sequencer2D) -> str | None:
    """Brings a position embedding to the model's grid, in place, and says so; None if there was nothing to do."""
    if "pos_embed.weight" not in state or not model.config.pos_embed_size:
        return None
    before, after = tuple(state["pos_embed.weight"].shape[1:3]), model.config.pos_embed_size
    if before == after:
        return None
    state["pos_embed.weight"] = resample_grid(state["pos_embed.weight"], *after)
    return f"position embedding resampled from {before[0]}×{before[1]} to {after[0]}×{after[1]}"


def load_weights(model: Sequencer2D, path: str | Path, state: State | None = None) -> list[str]:
    """Reads a file of weights into a model; returns what had to be changed, in words.

    Args:
        model: To be filled.
        path: Of the file.
        state: What `read_state_dict` gave of it, where it has been read.

    Raises:
        FileNotFoundError, ModelFileError: As `read_state_dict` and `fit`; the model stays as it was.
    """
    try:
        state, notes = fit(read_state_dict(path) if state is None else state, model)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
    model.load_state_dict(state, strict=False)
    return notes


def infer_config(state: State) -> SequencerConfig:
    """The architecture that weights belong to, from the names and shapes alone.

    What leaves no trace in the weights (dropout, stochastic depth, shuffling) is as in a new `SequencerConfig`.
    """
    stages = sorted({int(name.split(".")[1]) for name in state if name.startswith("stages.")})
    layers = [len({name.split(".")[3] for name in state if name.startswith(f"stages.{i}.blocks.")}) for i in stages]
    dims = [len(state[f"stages.{i}.blocks.0.norm1.weight"]) for i in stages]
    mixer, gates = _infer_mixer(state)
    hidden = [
        next(t for name, t in state.items() if name.startswith(f"stages.{i}.") and "weight_hh_l0" in name).shape[0]
        // gates
        for i in stages
    ]
    widths = [len(state[f"stages.{i}.blocks.0.mlp_channels.fc1.weight"]) for i in stages]
    ratios = [
        ratio if int(dim * (ratio := width / dim)) == width else math.nextafter(ratio, math.inf)  # against rounding
        for width, dim in zip(widths, dims, strict=True)
    ]
    steps = sorted(int(name.split(".")[2]) for name in state if re.fullmatch(r"stem\.steps\.\d+\.0\.weight", name))
    stem = tuple(len(state[f"stem.steps.{i}.0.weight"]) for i in steps)
    residuals = [
        sum(bool(re.fullmatch(rf"stem\.steps\.{i}\.\d+\.body\.0\.weight", key)) for key in state) for i in steps
    ]
    first = state["stem.steps.0.0.weight" if steps else "stem.proj.weight"]
    patches = [2 ** len(steps) if steps else first.shape[-1]]
    patches += [state[f"stages.{i}.downsample.down.weight"].shape[-1] for i in stages[1:]]
    return SequencerConfig(
        layers=tuple(layers),
        patch_sizes=tuple(patches),
        embed_dims=tuple(dims),
        hidden_sizes=tuple(hidden),
        mlp_ratios=tuple(ratios),
        stem_widths=stem,
        stem_depths=tuple(1 + count for count in residuals) if any(residuals) else (),
        mixer=mixer,
        pos_embed_size=tuple(state["pos_embed.weight"].shape[1:3]) if "pos_embed.weight" in state else (),
        num_classes=len(state["head.fc.weight"]) if "head.fc.weight" in state else 0,
        in_chans=first.shape[1],
    )


def _infer_mixer(state: State) -> tuple[str, int]:
    """The name of the mixer, and how many gates its cells have."""
    prefix = "stages.0.blocks.0.rnn_tokens."
    tokens = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if "rnn.weight_hh_l0" in tokens:
        return "BiLSTM1D", 4
    if "rnn_h.weight_hh_l0" not in tokens:
        return "VerticalBiLSTM", 4
    if "rnn_v.weight_hh_l0" not in tokens:
        return "HorizontalBiLSTM", 4
    rows, hidden = tokens["rnn_v.weight_hh_l0"].shape
    gates = rows // hidden
    if gates != 4:
        return {3: "BiGRU2D", 1: "BiRNN2D"}[gates], gates
    if "rnn_v.weight_hh_l0_reverse" not in tokens:
        return "LSTM2D", gates
    if "fc.weight" not in tokens:
        return "UnfusedBiLSTM2D", gates
    return ("AddBiLSTM2D" if tokens["fc.weight"].shape[1] == 2 * hidden else "BiLSTM2D"), gates


def is_pickle(start: bytes) -> bool:
    """Whether a file that begins with these two bytes is PyTorch's, as a zip or in the older form."""
    return start == b"PK" or start[:1] == b"\x80"


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(2)
    if not start:
        raise ModelFileError(f"{path} is empty")
    if path.suffix == ".safetensors" or not is_pickle(start):  # a header of some lengths begins like a pickle
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ModelFileError(f"{path} is neither a whole safetensors file nor PyTorch's ({error})") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options that a checkpoint of timm's holds
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for files that are none of its own
        why = first_line(error)
        if "Unsupported" in str(error) or "Weights only load failed" in str(error):
            why = "it holds objects that could run code; save model.state_dict() instead"
        raise ModelFileError(f"{path} cannot be read as weights: {why}") from error


def _unwrap(checkpoint: Any, path: Path) -> State:
    while wrapped := [
        key for key in _WRAPPERS if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict)
    ]:
        checkpoint = checkpoint[wrapped[0]]
    if not isinstance(checkpoint, dict):
        raise ModelFileError(f"{path} holds a {type(checkpoint).__name__}, not a dictionary of weights")
    state = {name: tensor for name, tensor in checkpoint.items() if isinstance(tensor, Tensor)}
    while prefixes := [prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in state)]:
        state = {name.removeprefix(prefixes[0]): t for name, t in state.items() if name.startswith(prefixes[0])}
    return state
