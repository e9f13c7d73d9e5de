"""The named variants, and `create_model`."""

import difflib
import json
import logging
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sequencer2d.adapters import load_weights, read_state_dict
from sequencer2d.hub import PREFIX, NotInRepository, download
from sequencer2d.layers import set_backend
from sequencer2d.model import Sequencer2D, SequencerConfig
from sequencer2d.peers import is_peer
from sequencer2d.preprocessing import Preprocessing

log = logging.getLogger("sequencer2d")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A named architecture with the preprocessing it is meant for."""

    config: SequencerConfig
    image_size: int
    """Side of the square input in pixels; other sizes work too."""
    crop_pct: float
    """Part of the resized side that evaluation keeps."""
    source: str
    official_name: str = ""
    """In the official code, where it has this variant."""
    hub_id: str = ""
    """Repository of published weights on the Hugging Face hub."""

    @property
    def grid_sizes(self) -> tuple[int, ...]:
        """Tokens along a side in each stage, for a square image of `image_size`."""
        return grid_sizes(self.config, self.image_size)

    def default_cfg(self) -> dict[str, Any]:
        """What timm wants to know of a model beside its weights, such as for `timm.data.resolve_data_config`."""
        preprocessing = Preprocessing(image_size=self.image_size, crop_pct=self.crop_pct)
        return {
            "hf_hub_id": self.hub_id or None,
            "num_classes": self.config.num_classes,
            "input_size": (self.config.in_chans, self.image_size, self.image_size),
            "pool_size": (self.grid_sizes[-1],) * 2,
            "crop_pct": self.crop_pct,
            "interpolation": preprocessing.interpolation,
            "mean": preprocessing.mean,
            "std": preprocessing.std,
            "first_conv": "stem.steps.0.0" if self.config.stem_widths else "stem.proj",
            "classifier": "head.fc",
            "license": "apache-2.0",
        }


def grid_sizes(config: SequencerConfig, image_side: int) -> tuple[int, ...]:
    """Tokens along a side of the image in each stage."""
    sides = []
    for patch_size in config.patch_sizes:
        image_side = config.tokens_along(image_side, patch_size)
        sides.append(image_side)
    return tuple(sides)


def _paper(*layers: int, official_name: str = "", hub_id: str = "", source: str = "paper, table 4") -> Variant:
    config = SequencerConfig(
        layers=layers,
        patch_sizes=(7, 2, 1, 1),
        embed_dims=(192, 384, 384, 384),
        hidden_sizes=(48, 96, 96, 96),
        mlp_ratios=(3.0, 3.0, 3.0, 3.0),
    )
    return Variant(
        config=config, image_size=224, crop_pct=0.875, source=source, official_name=official_name, hub_id=hub_id
    )


def _at_392(variant: Variant) -> Variant:
    """As fine-tuned for the paper's table 1: larger images, of which nothing is cropped; the weights are the same."""
    name = f"{variant.official_name}_392"
    return replace(
        variant, image_size=392, crop_pct=1.0, official_name=name, hub_id="", source="paper, section 4.1, at 392²"
    )


def _ablation(official_name: str, source: str = "paper, table 3", **changes: Any) -> Variant:
    return replace(_S, config=replace(_S.config, **changes), official_name=official_name, hub_id="", source=source)


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
    layers=(2, 1),
    patch_sizes=(4, 2),
    embed_dims=(128, 256),
    hidden_sizes=(32, 64),
    mlp_ratios=(2.0, 2.0),
    stem_widths=(64, 128),
    stem_depths=(2, 2),
)
_CONV_SMALL = replace(_CONV_TINY, stem_depths=(5, 5))
_CONV_BASE = replace(
    _CONV_TINY,
    layers=(1, 1),
    embed_dims=(256, 256),
    hidden_sizes=(64, 64),
    stem_widths=(64, 256),
    stem_depths=(5, 4),
)
_CONV_LARGE = replace(
    _CONV_BASE,
    embed_dims=(192, 192),
    hidden_sizes=(48, 48),
    mlp_ratios=(1.9375, 1.9375),  # so that its weights as bf16 stay below 8 MB
    stem_widths=(128, 256),
    stem_depths=(5, 4),
)
_CONV_PICO = SequencerConfig(
    layers=(2, 1),
    patch_sizes=(2, 2),
    embed_dims=(64, 96),
    hidden_sizes=(16, 24),
    mlp_ratios=(2.0, 2.0),
    stem_widths=(64,),
)

_S = _paper(4, 3, 8, 3, official_name="sequencer2d_s", hub_id="timm/sequencer2d_s.in1k")
_M = _paper(4, 3, 14, 3, official_name="sequencer2d_m", hub_id="timm/sequencer2d_m.in1k")
_L = _paper(8, 8, 16, 4, official_name="sequencer2d_l", hub_id="timm/sequencer2d_l.in1k")
_TWICE_HIDDEN = (96, 192, 192, 192)
_VANILLA: dict[str, Any] = {
    "mixer": "BiLSTM1D",
    "patch_sizes": (14, 1, 1, 1),
    "embed_dims": (384, 384, 384, 384),
    "hidden_sizes": (192, 192, 192, 192),
    "source": "paper, appendix C",
}
_HIERARCHY: dict[str, Any] = {
    "patch_sizes": _S.config.patch_sizes,
    "embed_dims": _S.config.embed_dims,
    "hidden_sizes": _TWICE_HIDDEN,
}

VARIANTS: dict[str, Variant] = {
    "sequencer2d_s": _S,
    "sequencer2d_m": _M,
    "sequencer2d_l": _L,
    "sequencer2d_s_392": _at_392(_S),
    "sequencer2d_m_392": _at_392(_M),
    "sequencer2d_l_392": _at_392(_L),
    "sequencer2d_l_d4_3x": replace(
        _L,
        config=replace(_L.config, embed_dims=(256, 512, 512, 512), hidden_sizes=(64, 128, 128, 128)),
        official_name="sequencer2d_l_d4_3x",
        hub_id="",
        source="official code, L with wider dimensions",
    ),
    # What happens to S without one of its parts.
    "sequencer2d_s_unidirectional": _ablation("sequencer2d_s_unidirectional", mixer="LSTM2D"),
    "sequencer2d_s_add": _ablation("sequencer2d_s_add", mixer="AddBiLSTM2D"),
    "sequencer2d_s_h2x": _ablation("sequencer2d_s_h2x", hidden_sizes=_TWICE_HIDDEN),
    "sequencer2d_s_without_fc": _ablation("sequencer2d_s_without_fc", mixer="UnfusedBiLSTM2D"),
    "sequencer2d_s_vertical": _ablation("sequencer2d_vertical", mixer="VerticalBiLSTM", hidden_sizes=_TWICE_HIDDEN),
    "sequencer2d_s_horizontal": _ablation(
        "sequencer2d_s_horizontal", mixer="HorizontalBiLSTM", hidden_sizes=_TWICE_HIDDEN
    ),
    "gru_sequencer2d_s": _ablation("gru_sequencer2d_s", mixer="BiGRU2D"),
    "rnn_sequencer2d_s": _ablation("rnn_sequencer2d_s", mixer="BiRNN2D"),
    # One LSTM over all tokens, row after row.
    "v_sequencer_s": _ablation("v_sequencer_s", **_VANILLA),
    "v_sequencer_s_h": _ablation("v_sequencer_s_h", **{**_VANILLA, **_HIERARCHY}),
    "v_sequencer_s_pe": _ablation("v_sequencer_s_pe", **_VANILLA, pos_embed_size=(16, 16)),
    "v_sequencer_s_shuffle": _ablation("", **_VANILLA, shuffle=True),
    # Smaller than the paper's.
    "sequencer2d_xs": _paper(2, 2, 4, 3, source="the student's notebook"),
    # Small images: 8 to 16 tokens a side, so that the LSTMs have a sequence to run over.
    "sequencer2d_t_patch2_32": _small(32, _TINY),
    "sequencer2d_t_patch4_32": _small(32, replace(_TINY, patch_sizes=(4, 1))),
    "sequencer2d_t_patch4_64": _small(64, replace(_TINY, patch_sizes=(4, 2))),
    # The same with an overlapping convolutional stem, which learns from fewer images.
    "sequencer2d_conv_p_patch2_16": _small(16, _CONV_PICO),
    "sequencer2d_conv_t_patch4_32": _small(32, _CONV_TINY),
    "sequencer2d_conv_t_patch4_64": _small(64, _CONV_TINY),
    "sequencer2d_conv_s_patch4_32": _small(32, _CONV_SMALL),
    "sequencer2d_conv_b_patch4_32": _small(32, _CONV_BASE),
    "sequencer2d_conv_l_patch4_32": _small(32, _CONV_LARGE),
}


DEFAULT_MODEL = "sequencer2d_conv_l_patch4_32"
"""What `sequencer2d predict` asks where no model is named: the package has its weights for CIFAR-10."""

PACKAGED = Path(__file__).parent / "pretrained"
"""Model files that are installed with the package, by the names of variants, and README.md, which describes them."""


def packaged_file(name: str) -> Path | None:
    """The model file of a variant in the package, or None."""
    path = PACKAGED / f"{name}.safetensors"
    return path if name in VARIANTS and path.is_file() else None


TIMMS_OWN = {"sequencer2d_s", "sequencer2d_m", "sequencer2d_l"}


def timm_name(name: str) -> str:
    """The name under which timm knows a variant, once `sequencer2d.registry` is imported."""
    return f"{name}_ref" if name in TIMMS_OWN else name


def list_models(contains: str = "") -> list[str]:
    """Names of all variants, or of those whose name contains a text."""
    return [name for name in VARIANTS if contains in name]


def get_variant(name: str) -> Variant:
    """The variant of that name.

    Raises:
        ValueError: No variant has it; the message lists the near ones.
    """
    if not isinstance(name, str):
        raise ValueError(f"a model is named by a text such as 'sequencer2d_s', not by {name!r}")
    if is_peer(name):
        raise ValueError(f"{name} is a model of timm's, which `sequencer2d train` takes; this is for Sequencers")
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
        known[key] = tuple(value) if isinstance(value, list) else value
    return SequencerConfig(**known)


def create_model(
    name: str, *, pretrained: bool | str | Path = False, backend: str = "auto", **overrides: Any
) -> Sequencer2D:
    """A model of the zoo, any argument of `SequencerConfig` changed.

    Example: `create_model("sequencer2d_s", num_classes=10, drop_path_rate=0.1)`

    Args:
        name: A name of `list_models()`.
        pretrained: True: with the weights in the package, else with the published ones, from the Hugging Face hub or
            its cache. Or where weights are: a file of the official code's, timm's or ours, a run folder, another name
            that has weights, or `hf-hub:user/name`. Their number of classes is the default then; another one, or
            other image channels, are adapted to, with a word. Default: freshly initialised.
        backend: What runs the LSTMs: native (our CPU kernels), torch, or auto, the kernels where they are and fit.
        overrides: Arguments of `SequencerConfig`.

    Raises:
        ValueError: No such variant, argument or backend, a value that does not fit the others, no weights in the
            package or published, or weights of another architecture.
        FileNotFoundError: The weights are not there, or there is no network.
    """
    variant = get_variant(name)
    packaged = packaged_file(name) if pretrained is True else None
    config = get_config(name, **overrides)
    if pretrained is True and not packaged and not variant.hub_id:
        raise ValueError(
            f"no weights of {name} are in the package or published ({_published()} have some); pass {_PRETRAINED_FILE}"
        )
    if not isinstance(pretrained, bool | str | Path) or pretrained == "":
        raise ValueError(f"pretrained={pretrained!r} must be True, False, or say where weights are: {_PRETRAINED_FILE}")
    model = Sequencer2D(config)
    set_backend(model, backend)
    default_cfg = variant.default_cfg()
    if pretrained:
        source = (packaged or PREFIX + variant.hub_id) if pretrained is True else pretrained
        path = find_model_file(source, instead=f"create_model(…, {_PRETRAINED_FILE})")
        state = read_state_dict(path)
        classes = len(state.get("head.fc.weight", ()))
        if classes not in (0, model.num_classes) and "num_classes" not in overrides:
            model.reset_classifier(classes)
        notes = load_weights(model, path, state)
        log.info("weights of %s from %s%s", name, path, "".join(f"; {note}" for note in notes))
        default_cfg |= _cfg_of_file(variant, path)
    model.default_cfg = model.pretrained_cfg = default_cfg
    return model


_PRETRAINED_FILE = "pretrained='path/to/file'"


def _cfg_of_file(variant: Variant, path: Path) -> dict[str, Any]:
    """What a model file of ours changes in the `default_cfg` of a variant; nothing for a file of others."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if not {"class_names", "preprocessing"} <= metadata.keys():
        return {}
    class_names, preprocessing = (json.loads(metadata[name]) for name in ("class_names", "preprocessing"))
    image_size = preprocessing.pop("image_size")
    config = replace(variant.config, num_classes=len(class_names))
    own = replace(variant, config=config, image_size=image_size, hub_id="")
    return {**own.default_cfg(), **preprocessing, "label_names": class_names}


def find_model_file(source: str | Path, *, instead: str = "the path of the local file in its place") -> Path:
    """The file that a model's name means.

    Args:
        source: A file; a run folder, or one of timm's; `hf-hub:user/name`; a name of the zoo that has weights, in the
            package or published.
        instead: What a caller without a network is told to give.

    Raises:
        FileNotFoundError: There is none.
        PermissionError: It cannot be read.
    """
    text = str(source)
    if text.startswith(PREFIX):
        return _download(text.removeprefix(PREFIX), instead)
    path = Path(source)
    if not path.exists() and text in VARIANTS:
        if packaged := packaged_file(text):
            return packaged
        if VARIANTS[text].hub_id:
            return _download(VARIANTS[text].hub_id, instead)
        raise FileNotFoundError(
            f"no weights of {text} are in the package or published; "
            f"give a model file, the folder of a run, {PREFIX}user/name, or one of {_published()}"
        )
    if text and path.is_dir():
        path = model_in_folder(path) or path / "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(
                f"{source} holds no model.safetensors; a run writes it at its first validation "
                f"(continue a stopped run: sequencer2d train --resume {source})"
            )
    if not text or not path.is_file():
        raise FileNotFoundError(
            f"{source or 'a model without a name'} does not exist; "
            f"give a model file, the folder of a run, {PREFIX}user/name, or one of {_published()}"
        )
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{source} cannot be read; check its permissions")
    return path


def model_in_folder(folder: Path) -> Path | None:
    """The file of weights in a folder, or None."""
    return next((folder / name for name in _IN_FOLDERS if (folder / name).is_file()), None)


_IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")
"""Weights in a folder: ours and timm's, and timm's where it was told to write no safetensors."""


def _published() -> str:
    return ", ".join(name for name, variant in VARIANTS.items() if variant.hub_id or packaged_file(name))


def _download(repo_id: str, instead: str) -> Path:
    """The weights of a hub repository, and beside them its description, if it has one."""
    path = download(repo_id, "model.safetensors", instead=instead)
    try:
        download(repo_id, "config.json", instead=instead)
    except NotInRepository:
        pass
    except FileNotFoundError as error:
        log.warning("%s; classes and preprocessing are taken for those of the architecture", error)
    return path
