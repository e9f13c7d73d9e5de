"""Sequencer2D: configuration, model and weight initialisation (Tatsunami & Taki, NeurIPS 2022, section 3.3).

Shapes: `B` batch, `H` rows, `W` columns, `C` channels. Feature maps are channels-last.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin

import torch
from jaxtyping import Float
from timm.layers import ClassifierHead, lecun_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from sequencer2d.layers import (
    LAYER_NORM_EPS,
    MIXERS,
    ConvPatchEmbed,
    Downsample2D,
    PatchEmbed,
    PositionEmbedding,
    Sequencer2DBlock,
    ShuffleTokens,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SequencerConfig:
    """The architecture: everything that shapes the parameters. One entry per stage in each tuple."""

    layers: tuple[int, ...]
    """Blocks per stage."""
    patch_sizes: tuple[int, ...]
    """Stride of the patch embedding, then of the downsampling before each later stage (1: no halving)."""
    embed_dims: tuple[int, ...]
    """Channels of each stage."""
    hidden_sizes: tuple[int, ...]
    """Hidden units of an LSTM per direction in each stage."""
    mlp_ratios: tuple[float, ...]
    """Width of the MLP relative to the stage's channels."""
    stem_widths: tuple[int, ...] = ()
    """Channels of an overlapping convolutional stem, one per halving; empty: plain patches as in the paper. One more
    convolution leads from the last of them to `embed_dims[0]` where these differ."""
    stem_depths: tuple[int, ...] = ()
    """Convolutions at each of these widths, all but the first with a residual sum; empty: one."""
    pad: bool = True
    """Pad what the patch sizes do not divide; off: cut it off, as the official code and timm do."""
    mixer: str = "BiLSTM2D"
    """What mixes the tokens: a name of `layers.MIXERS`."""
    shuffle: bool = False
    """Permute the tokens at random in training."""
    pos_embed_size: tuple[int, ...] = ()
    """Rows and columns of a learned position embedding, resampled for other grids; empty: none, as in the paper."""
    num_classes: int = 1000
    """Outputs of the head; 0 gives a model without one, which returns pooled features."""
    in_chans: int = 3
    """Channels of the image."""
    global_pool: Literal["avg", ""] = "avg"
    """Average over all tokens; empty: the map of features, without a head."""
    drop_rate: float = 0.0
    """Dropout before the head."""
    proj_drop_rate: float = 0.0
    """Dropout inside the MLPs."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block; it grows linearly from 0 at the first."""
    drop_path_decay: bool = True
    """Off: the full rate in every block, as timm's Sequencer has it."""
    init: Literal["official", "torch"] = "official"
    """Initial weights: the official code's, or PyTorch's defaults in every layer, the head among them."""

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _plain(field.name, field.type, getattr(self, field.name)))
        stages = len(self.layers)
        for name in ("layers", "patch_sizes", "embed_dims", "hidden_sizes", "mlp_ratios"):
            values = getattr(self, name)
            if len(values) != stages or not stages:
                raise ValueError(f"{name} has {len(values)} entries, layers has {stages}; give one per stage")
            if not all(0 < value < math.inf for value in values):
                raise ValueError(f"{name}={values} must be positive")
        if self.num_classes < 0 or self.in_chans < 1:
            raise ValueError(f"num_classes={self.num_classes} must be ≥ 0 and in_chans={self.in_chans} ≥ 1")
        for name in ("drop_rate", "proj_drop_rate", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        if self.mixer not in MIXERS:
            raise ValueError(f"mixer={self.mixer!r} is unknown; there are {', '.join(MIXERS)}")
        if self.init not in ("official", "torch"):
            raise ValueError(f"init={self.init!r} must be 'official' or 'torch'")
        if self.global_pool not in ("avg", ""):
            raise ValueError(f"global_pool={self.global_pool!r} must be 'avg' or ''")
        if not self.global_pool and self.num_classes:
            raise ValueError("global_pool='' gives a map of features, which has no classes: num_classes=0, or 'avg'")
        if self.pos_embed_size and (len(self.pos_embed_size) != 2 or min(self.pos_embed_size) < 1):
            raise ValueError(f"pos_embed_size={self.pos_embed_size} must be two positive numbers, or none")
        if min(self.stem_widths, default=1) <= 0:
            raise ValueError(f"stem_widths={self.stem_widths} must be positive")
        if self.stem_depths and (len(self.stem_depths) != len(self.stem_widths) or min(self.stem_depths) < 1):
            raise ValueError(f"stem_depths={self.stem_depths} must be as many numbers ≥ 1 as stem_widths, or none")
        if self.stem_widths and 2 ** len(self.stem_widths) != self.patch_sizes[0]:
            raise ValueError(
                f"stem_widths={self.stem_widths} halves {len(self.stem_widths)} times, "
                f"so patch_sizes[0] must be {2 ** len(self.stem_widths)}, not {self.patch_sizes[0]}"
            )

    @property
    def all_stem_depths(self) -> tuple[int, ...]:
        """`stem_depths`, written out."""
        return self.stem_depths or (1,) * len(self.stem_widths)

    def tokens_along(self, side: int, patch_size: int) -> int:
        """Patches along a side of so many pixels or tokens."""
        return -(-side // patch_size) if self.pad else side // patch_size


def _plain(name: str, kind: Any, value: Any) -> Any:
    """A value of a field in Python's own type: numbers of numpy become int and float, lists tuples.

    Raises:
        ValueError: It is of another kind than the field.
    """
    if get_origin(kind) is tuple:
        if not isinstance(value, Iterable) or isinstance(value, str | dict):
            raise ValueError(f"{name}={value!r} must be a list of numbers, such as {name}=[2, 2]")
        return tuple(_plain(f"{name}[{i}]", get_args(kind)[0], number) for i, number in enumerate(value))
    if kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if kind is float and isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    if kind not in (int, float) and isinstance(value, bool if kind is bool else str):
        return value
    wanted = {int: "a whole number", float: "a number", bool: "True or False"}.get(kind, "a text")
    raise ValueError(f"{name}={value!r} must be {wanted}")


class Stage(nn.Module):
    """Blocks at one resolution, after the downsampling that leads to it."""

    def __init__(self, downsample: nn.Module, blocks: list[Sequencer2DBlock]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, h, w, D]`."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x, skip_last=True)  # its gradient comes at once
        return self.blocks(x)


class Sequencer2D(nn.Module):
    """Patch embedding, stages of Sequencer2D blocks, norm, average pooling and a linear classifier (figure 2a).

    Takes images `[B, in_chans, H, W]` of any size and returns logits `[B, num_classes]`. A size that the strides
    do not divide is padded with zeros below and to the right, unless `pad` is off.

    Example: `Sequencer2D(SequencerConfig(layers=(2,), patch_sizes=(4,), embed_dims=(64,), hidden_sizes=(16,),
    mlp_ratios=(3.0,)))(torch.randn(1, 3, 32, 32)).shape == (1, 1000)`
    """

    __jit_unused_properties__ = ("num_classes", "in_chans")  # TorchScript cannot read a dataclass

    default_cfg: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    """What timm wants to know beside the weights; `zoo.create_model` and timm's set them."""

    def __init__(self, config: SequencerConfig) -> None:
        super().__init__()
        self.config = config
        self.default_cfg = self.pretrained_cfg = {}
        self.num_features = self.head_hidden_size = config.embed_dims[-1]
        self.output_fmt = "NHWC"  # of forward_features, as timm says it
        self.feature_dim = -1
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(
                zip(config.embed_dims, itertools.accumulate(config.patch_sizes, lambda a, b: a * b), strict=True)
            )
        ]
        if config.stem_widths:
            self.stem = ConvPatchEmbed(
                config.in_chans, config.stem_widths, config.all_stem_depths, config.embed_dims[0], config.pad
            )
        else:
            self.stem = PatchEmbed(config.in_chans, config.embed_dims[0], config.patch_sizes[0], config.pad)
        height_width = config.pos_embed_size
        self.pos_embed = PositionEmbedding(height_width, config.embed_dims[0]) if height_width else nn.Identity()  # type: ignore[arg-type]
        self.shuffle = ShuffleTokens() if config.shuffle else nn.Identity()
        self.stages = nn.Sequential(*self._stages(config))
        self.norm = nn.LayerNorm(self.num_features, eps=LAYER_NORM_EPS)
        self.head = ClassifierHead(
            self.num_features, config.num_classes, config.global_pool, config.drop_rate, input_fmt=self.output_fmt
        )
        self.init_weights()

    @staticmethod
    def _stages(config: SequencerConfig) -> Iterator[Stage]:
        first = 0.0 if config.drop_path_decay else config.drop_path_rate
        drop_paths = iter(torch.linspace(first, config.drop_path_rate, sum(config.layers), device="cpu").tolist())
        previous_dim = config.embed_dims[0]
        for i, dim in enumerate(config.embed_dims):
            downsample = Downsample2D(previous_dim, dim, config.patch_sizes[i], config.pad) if i else nn.Identity()
            blocks = [
                Sequencer2DBlock(
                    dim,
                    config.hidden_sizes[i],
                    mlp_ratio=config.mlp_ratios[i],
                    drop=config.proj_drop_rate,
                    drop_path=next(drop_paths),
                    mixer=MIXERS[config.mixer],
                )
                for _ in range(config.layers[i])
            ]
            yield Stage(downsample, blocks)
            previous_dim = dim

    def init_weights(self) -> None:
        """Initialises all parameters as the official code does (models/two_dim_sequencer.py), or `config.init`.

        | parameter                     | weight                  | bias                |
        | ----------------------------- | ----------------------- | ------------------- |
        | convolutions                  | LeCun normal            | 0                   |
        | LSTMs, GRUs, RNNs             | uniform ±1/√D           | uniform ±1/√D       |
        | linear layers                 | Xavier uniform          | 0                   |
        | linear layers of the MLPs     | Xavier uniform          | normal, std 1e-6    |
        | norms                         | 1                       | 0                   |
        | head                          | 0                       | 0                   |
        | position embedding            | normal, std 0.02        |                     |

        With `init="torch"` only the position embedding, for which PyTorch has no default, is set here.
        """
        for name, module in self.named_modules():
            if isinstance(module, PositionEmbedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif self.config.init == "torch":
                continue
            elif isinstance(module, nn.Conv2d):
                lecun_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RNNBase):
                bound = 1 / math.sqrt(module.hidden_size)
                for parameter in module.parameters():
                    nn.init.uniform_(parameter, -bound, bound)
            elif isinstance(module, nn.Linear) and name.startswith("head"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.normal_(module.bias, std=1e-6 if "mlp" in name else 0.0)
            elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
                module.reset_parameters()

    @property
    def num_classes(self) -> int:
        """Outputs of the head; 0: there is none."""
        return self.config.num_classes

    @property
    def in_chans(self) -> int:
        """Channels of the image."""
        return self.config.in_chans

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised feature map of the last stage, channels-last: `[B, C, H, W]` to `[B, h, w, D]`."""
        return self.norm(self.stages(self.shuffle(self.pos_embed(self.stem(x)))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `[B, num_classes]` of a feature map `[B, h, w, D]`, or the pooled features before the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` to logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))

    # What timm asks of its models (timm/models/_features.py, timm/optim/_param_groups.py; docs/models.md).

    def forward_intermediates(
        self,
        x: Float[Tensor, "B C H W"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Feature maps after the stages, and the final one.

        Args:
            x: Images.
            indices: Stages to return: which (from the end where negative), the last how many, or all.
            norm: Apply the final norm to the last stage's.
            stop_early: Leave out the stages after the last one that is returned.
            output_fmt: Of the maps: NCHW or NHWC.
            intermediates_only: Return the maps without the final one.

        Returns:
            The final feature map as of `forward_features`, and a list of maps; or the list alone.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r} must be NCHW or NHWC")
        take, last = _take(len(self.stages), indices)
        stages = list(self.stages)[: last + 1 if stop_early else None]
        whole = len(self.config.layers)  # some may have been cut off
        maps = []
        x = self.shuffle(self.pos_embed(self.stem(x)))
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take:
                y = self.norm(x) if norm and i == whole - 1 else x
                maps.append(y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y)
        if intermediates_only:
            return maps
        return self.norm(x) if len(stages) == whole else x, maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cuts off what the feature maps asked for do not need; returns the stages that they come from.

        Norm and head are of the last stage, and go with it in any case.
        """
        take, last = _take(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.head.in_features = self.config.embed_dims[last]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Literal["avg", ""] | None = None) -> None:
        """A new head, initialised as the first one, for other classes; 0 for none: pooled features come out."""
        pool = self.config.global_pool if global_pool is None else global_pool
        self.config = replace(self.config, num_classes=num_classes, global_pool=pool)
        self.head.reset(num_classes, pool)
        first = next(self.parameters())  # a head without classes has none, by which timm would know device and type
        self.head.to(device=first.device, dtype=first.dtype)
        if self.config.init == "official":
            for parameter in self.head.fc.parameters():
                nn.init.zeros_(parameter)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names from the input to the output, for layer-wise learning rates."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)"
        return {
            "stem": r"^stem|^pos_embed",
            "blocks": [(blocks, None), (r"^stages\.(\d+)\.downsample", (0,)), (r"^norm", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        """Parameters that are never decayed, besides biases and norms."""
        return {"pos_embed.weight"} if self.config.pos_embed_size else set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks in training and compute the rest again; the last of a stage keeps all."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable


def _take(count: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """The stages that are asked for, and the last of them."""
    return feature_take_indices(count, indices if isinstance(indices, int | None) else list(indices))
