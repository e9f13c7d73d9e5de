"""The named variants, and `create_model`."""

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any

from sequencer2d.model import Sequencer2D, SequencerConfig


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A named architecture with the preprocessing it is meant for."""

    config: SequencerConfig
    image_size: int
    """Side of the square input in pixels; other sizes work too."""
    crop_pct: float
    """Part of the resized side that evaluation keeps."""
    source: str


def _paper(*layers: int, source: str = "paper, table 4") -> Variant:
    config = SequencerConfig(
        layers=layers,
        patch_sizes=(7, 2, 1, 1),
        embed_dims=(192, 384, 384, 384),
        hidden_sizes=(48, 96, 96, 96),
        mlp_ratios=(3.0, 3.0, 3.0, 3.0),
    )
    return Variant(config=config, image_size=224, crop_pct=0.875, source=source)


def _small(image_size: int, config: SequencerConfig) -> Variant:
    return Variant(config=config, image_size=image_size, crop_pct=1.0, source="ours, small images")


_TINY = SequencerConfig(
    layers=(2, 3),
    patch_sizes=(2, 2),
    embed_dims=(96, 192),
    hidden_sizes=(24, 48),
    mlp_ratios=(3.0, 3.0),
)
_CONV_TINY = SequencerConfig(
    layers=(2, 2),
    patch_sizes=(4, 2),
    embed_dims=(128, 256),
    hidden_sizes=(32, 64),
    mlp_ratios=(2.0, 2.0),
    stem_widths=(32, 128),
)
_CONV_PICO = SequencerConfig(
    layers=(2, 1),
    patch_sizes=(2, 2),
    embed_dims=(64, 96),
    hidden_sizes=(16, 24),
    mlp_ratios=(2.0, 2.0),
    stem_widths=(64,),
)

VARIANTS: dict[str, Variant] = {
    "sequencer2d_s": _paper(4, 3, 8, 3),
    "sequencer2d_m": _paper(4, 3, 14, 3),
    "sequencer2d_l": _paper(8, 8, 16, 4),
    "sequencer2d_xs": _paper(2, 2, 4, 3, source="the student's notebook"),
    # Small images: 8 to 16 tokens a side, so that the LSTMs have a sequence to run over.
    "sequencer2d_t_patch2_32": _small(32, _TINY),
    "sequencer2d_t_patch4_32": _small(32, replace(_TINY, patch_sizes=(4, 1))),
    "sequencer2d_t_patch4_64": _small(64, replace(_TINY, patch_sizes=(4, 2))),
    # The same with an overlapping convolutional stem, which learns from fewer images.
    "sequencer2d_conv_p_patch2_16": _small(16, _CONV_PICO),
    "sequencer2d_conv_t_patch4_32": _small(32, _CONV_TINY),
    "sequencer2d_conv_t_patch4_64": _small(64, _CONV_TINY),
}


def list_models(contains: str = "") -> list[str]:
    """Names of all variants, or of those whose name contains a text."""
    return [name for name in VARIANTS if contains in name]


def get_variant(name: str) -> Variant:
    """The variant of that name.

    Raises:
        ValueError: No variant has it; the message lists the near ones.
    """
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(VARIANTS)}"
        raise ValueError(f"no model is named {name!r}: {hint} (all: sequencer2d models)")
    return VARIANTS[name]


def get_config(name: str, **overrides: Any) -> SequencerConfig:
    """The architecture of a variant with some of its fields changed.

    Raises:
        ValueError: No such variant, no such field, or a value that does not fit the others.
    """
    config = get_variant(name).config
    known = {field.name: getattr(config, field.name) for field in fields(config)}
    for key, value in overrides.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"a Sequencer has no argument {key!r}: {hint}")
        known[key] = tuple(value) if isinstance(value, list | tuple) else value
    try:
        return SequencerConfig(**known)
    except TypeError as error:
        changes = ", ".join(f"{key}={value!r}" for key, value in overrides.items())
        raise ValueError(f"{changes}: {error}; stages take one number each, such as layers=[2, 2]") from error


def create_model(name: str, **overrides: Any) -> Sequencer2D:
    """A freshly initialised model of the zoo, any argument of `SequencerConfig` changed.

    Example: `create_model("sequencer2d_s", num_classes=10, drop_path_rate=0.1)`

    Raises:
        ValueError: No such variant, no such argument, or a value that does not fit the others.
    """
    return Sequencer2D(get_config(name, **overrides))
