"""Sequencer2D: configuration, model and weight initialisation (Tatsunami & Taki, NeurIPS 2022, section 3.3).

Shapes: `B` batch, `H` rows, `W` columns, `C` channels. Feature maps are channels-last.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from timm.layers.weight_init import lecun_normal_
from torch import Tensor, nn

from sequencer2d.layers import LAYER_NORM_EPS, ConvPatchEmbed, Downsample2D, PatchEmbed, Sequencer2DBlock


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
    """Channels of an overlapping convolutional stem, one per halving; empty: plain patches as in the paper."""
    num_classes: int = 1000
    """Outputs of the head; 0 gives a model without one, which returns pooled features."""
    in_chans: int = 3
    """Channels of the image."""
    drop_rate: float = 0.0
    """Dropout before the head."""
    proj_drop_rate: float = 0.0
    """Dropout inside the MLPs."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block; it grows linearly from 0 at the first."""

    def __post_init__(self) -> None:
        stages = len(self.layers)
        for name in ("layers", "patch_sizes", "embed_dims", "hidden_sizes", "mlp_ratios"):
            values = getattr(self, name)
            if len(values) != stages or not stages:
                raise ValueError(f"{name} has {len(values)} entries, layers has {stages}; give one per stage")
            if min(values) <= 0:
                raise ValueError(f"{name}={values} must be positive")
        if self.num_classes < 0 or self.in_chans < 1:
            raise ValueError(f"num_classes={self.num_classes} must be ≥ 0 and in_chans={self.in_chans} ≥ 1")
        for name in ("drop_rate", "proj_drop_rate", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        if min(self.stem_widths, default=1) <= 0:
            raise ValueError(f"stem_widths={self.stem_widths} must be positive")
        if self.stem_widths and 2 ** len(self.stem_widths) != self.patch_sizes[0]:
            raise ValueError(
                f"stem_widths={self.stem_widths} halves {len(self.stem_widths)} times, "
                f"so patch_sizes[0] must be {2 ** len(self.stem_widths)}, not {self.patch_sizes[0]}"
            )
        if self.stem_widths and self.stem_widths[-1] != self.embed_dims[0]:
            raise ValueError(f"stem_widths={self.stem_widths} must end in embed_dims[0]={self.embed_dims[0]}")


class Stage(nn.Module):
    """Blocks at one resolution, after the downsampling that leads to it."""

    def __init__(self, downsample: nn.Module, blocks: list[Sequencer2DBlock]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w D"]:
        return self.blocks(self.downsample(x))


class Head(nn.Module):
    """Global average pooling, dropout and the classifier."""

    def __init__(self, num_features: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(num_features, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Float[Tensor, "B H W C"], pre_logits: bool = False) -> Float[Tensor, "B K"]:
        x = self.drop(x.mean(dim=(1, 2)))
        return x if pre_logits else self.fc(x)


class Sequencer2D(nn.Module):
    """Patch embedding, stages of Sequencer2D blocks, norm, average pooling and a linear classifier (figure 2a).

    Takes images `[B, in_chans, H, W]` of any size and returns logits `[B, num_classes]`. A size that the strides
    do not divide is padded with zeros below and to the right.

    Example: `Sequencer2D(SequencerConfig(layers=(2,), patch_sizes=(4,), embed_dims=(64,), hidden_sizes=(16,),
    mlp_ratios=(3.0,)))(torch.randn(1, 3, 32, 32)).shape == (1, 1000)`
    """

    def __init__(self, config: SequencerConfig) -> None:
        super().__init__()
        self.config = config
        self.num_features = config.embed_dims[-1]
        if config.stem_widths:
            self.stem = ConvPatchEmbed(config.in_chans, config.stem_widths)
        else:
            self.stem = PatchEmbed(config.in_chans, config.embed_dims[0], config.patch_sizes[0])
        self.stages = nn.Sequential(*self._stages(config))
        self.norm = nn.LayerNorm(self.num_features, eps=LAYER_NORM_EPS)
        self.head = Head(self.num_features, config.num_classes, config.drop_rate)
        self.init_weights()

    @staticmethod
    def _stages(config: SequencerConfig) -> Iterator[Stage]:
        drop_paths = iter(torch.linspace(0, config.drop_path_rate, sum(config.layers), device="cpu").tolist())
        previous_dim = config.embed_dims[0]
        for i, dim in enumerate(config.embed_dims):
            downsample = Downsample2D(previous_dim, dim, config.patch_sizes[i]) if i else nn.Identity()
            blocks = [
                Sequencer2DBlock(
                    dim,
                    config.hidden_sizes[i],
                    mlp_ratio=config.mlp_ratios[i],
                    drop=config.proj_drop_rate,
                    drop_path=next(drop_paths),
                )
                for _ in range(config.layers[i])
            ]
            yield Stage(downsample, blocks)
            previous_dim = dim

    def init_weights(self) -> None:
        """Initialises all parameters as the official code does (models/two_dim_sequencer.py).

        | parameter                     | weight                  | bias                |
        | ----------------------------- | ----------------------- | ------------------- |
        | convolutions                  | LeCun normal            | 0                   |
        | LSTMs                         | uniform ±1/√D           | uniform ±1/√D       |
        | linear layers                 | Xavier uniform          | 0                   |
        | linear layers of the MLPs     | Xavier uniform          | normal, std 1e-6    |
        | norms                         | 1                       | 0                   |
        | head                          | 0                       | 0                   |
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                lecun_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LSTM):
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

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"]:
        """Normalised feature map of the last stage, channels-last."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Float[Tensor, "B h w D"], pre_logits: bool = False) -> Float[Tensor, "B K"]:
        """Logits of a feature map, or the pooled features before the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        return self.forward_head(self.forward_features(x))
