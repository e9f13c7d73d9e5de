"""Peers: models of timm's, made anew and trained by our pipeline, to compare Sequencers with.

A peer is named `timm/NAME`, and its arguments are those of `timm.create_model`, and two of ours. What others do with
small images is part of a fair comparison, and timm has no argument for it:

- `small_stem=True`, for ResNets: a 3×3 convolution of stride 1 first, and no max pooling, as is usual on CIFAR
  (He et al. 2016, section 4.2). timm's arguments change the kernel of the first convolution, never its stride.
- `conv_stem=(32, 128)`, for vision transformers: our `ConvPatchEmbed` in the place of plain patches, so that attention
  and LSTMs see the same tokens; here patches of 4 pixels with 128 channels, which are then the `embed_dim` unless that
  is given, too. `conv_stem_depths=(1, 2)` are convolutions at each width, one by default.
"""

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import lecun_normal_
from timm.models import ResNet, VisionTransformer, group_parameters
from torch import Tensor, nn

from sequencer2d.adapters import ModelFileError, State
from sequencer2d.errors import first_line
from sequencer2d.layers import Conv3x3, ConvPatchEmbed, channels_last
from sequencer2d.model import Sequencer2D, SequencerConfig

PEER_PREFIX = "timm/"

_NOT_FOR_PEERS = {
    "num_classes": "the data give it",
    "in_chans": "images are read as RGB",
    "img_size": "it is --image-size",
    **dict.fromkeys(
        ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
        "peers begin with new weights",
    ),
    **dict.fromkeys(
        ("scriptable", "exportable", "no_jit", "device", "dtype", "features_only"), "it is not for training"
    ),
}
"""Arguments of timm's that are refused, and why. A model file holds arguments, and reading it must load no other."""


def is_peer(name: str) -> bool:
    """Whether a name is that of a model of timm's, such as `timm/resnet18`."""
    return name.startswith(PEER_PREFIX)


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerConfig:
    """A model of timm's: its name, and everything that shapes its parameters."""

    name: str
    """As timm has it, without a tag of pretrained weights."""
    num_classes: int
    image_size: int
    """Side of the square that the model sees, in pixels; some are made for one size."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of `timm.create_model`, `small_stem`, `conv_stem` and `conv_stem_depths`: plain data."""

    def __post_init__(self) -> None:
        _check_name(self.name)
        if self.num_classes < 1 or self.image_size < 1:
            raise ValueError(f"num_classes={self.num_classes} and image_size={self.image_size} must be at least 1")
        for name, reason in _NOT_FOR_PEERS.items():
            if name in self.args:
                raise ValueError(f"model_args.{name}={self.args[name]!r} is not for timm/{self.name}: {reason}")
        try:
            object.__setattr__(self, "args", json.loads(json.dumps(self.args)))
        except TypeError as error:
            raise ValueError(f"the arguments of timm/{self.name} must be plain data: {error}") from error


def _check_name(name: str) -> None:
    """Raises ValueError unless timm has a model of that name, and it is not one of ours that we registered there."""
    if not timm.is_model(name) or "." in name:
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        hint = (
            f"did you mean {' or '.join(PEER_PREFIX + other for other in near)}?" if near else "see timm.list_models()"
        )
        raise ValueError(f"timm has no model named {name!r}: {hint}")
    if timm.models.model_entrypoint(name).__module__.startswith("sequencer2d."):
        raise ValueError(f"{PEER_PREFIX}{name} is ours: leave {PEER_PREFIX} out (all: sequencer2d models)")


def usual_input(name: str) -> tuple[int, float]:
    """Side of the image in pixels and part of it that evaluation keeps, as timm has them for `timm/NAME`.

    Raises:
        ValueError: timm has no such model; the message lists the near ones.
    """
    name = name.removeprefix(PEER_PREFIX)
    _check_name(name)
    described = timm.get_pretrained_cfg(name)
    return (described.input_size[-1], described.crop_pct) if described else (224, 0.875)


class Peer(nn.Module):
    """A model of timm's for images `[B, 3, H, W]`, with what our training asks of a model.

    Images and kernels lie channels-last in memory: never slower here, and a ResNet-18 in bf16 trains 1.2 times as fast.
    Their 3×3 convolutions are trained by the kernel that trains ours.
    Where there is no GPU, attention is plain matrix products: PyTorch's fused one makes a ViT of 65 tokens train at 0.6
    of the speed in bf16. Files of its weights are timm's: it drops the `module.` before each name.

    Raises:
        ValueError: timm has no such argument, a value does not fit, or the stem is for other models.
    """

    def __init__(self, config: PeerConfig) -> None:
        super().__init__()
        self.config = config
        self.module: Any
        self.module, takes_size = _create(config)
        self.to(memory_format=torch.channels_last)
        for module in self.modules():
            if type(module) is nn.Conv2d and module.kernel_size == (3, 3):
                module.__class__ = Conv3x3
        if not torch.cuda.is_available():
            for module in self.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = False  # type: ignore[assignment]
        self.fixed_size = takes_size and not config.args.get("dynamic_img_size", False)
        """Whether it takes images of one size only."""

    def check_size(self, image_size: int) -> None:
        """Raises ValueError, saying what to do, unless it takes square images of this side."""
        name = f"timm/{self.config.name}"
        if self.fixed_size and image_size != self.config.image_size:
            raise ValueError(
                f"image_size={image_size}: {name} was trained for {self.config.image_size} pixels and takes no others; "
                "a vision transformer that does is trained with --model-args.dynamic_img_size true"
            )
        patches = getattr(self.module, "patch_embed", None)
        pads = isinstance(patches, ConvPatchEmbed) or getattr(patches, "dynamic_img_pad", False)
        if image_size % self.stride and not pads:
            raise ValueError(f"image_size={image_size} is no multiple of {self.stride}, which {name} needs")

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier."""
        return self.config.num_classes

    @property
    def stride(self) -> int:
        """Pixels that the side of a smaller image must be a multiple of."""
        return self.module.patch_embed.feat_ratio() if isinstance(self.module, VisionTransformer) else 1

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, num_classes]`."""
        return self.module(channels_last(images))

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or the list of them."""
        found = self.module.get_classifier()
        return nn.ModuleList(found) if isinstance(found, tuple | list) else found

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm never decays, besides biases and norms."""
        names = self.module.no_weight_decay() if hasattr(self.module, "no_weight_decay") else ()
        return {f"module.{name}" for name in names} & dict(self.named_parameters()).keys()

    def group_matcher(self) -> Callable[[str], int]:
        """Number of the layer of a parameter, from the input to the output.

        Raises:
            ValueError: timm does not tell the order of this model's layers.
        """
        if not hasattr(self.module, "group_matcher"):
            raise ValueError(
                f"timm does not tell the order of the layers of {self.config.name}: no --finetune.layer-decay"
            )
        layer_of: Any = group_parameters(self.module, self.module.group_matcher(), reverse=True)
        return lambda name: layer_of[name.removeprefix("module.")]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Raises ValueError where timm has none for this model."""
        try:
            self.module.set_grad_checkpointing(enable)
        except (AttributeError, AssertionError, TypeError) as error:
            raise ValueError(
                f"timm has no checkpointing for {self.config.name}; leave --grad-checkpointing out"
            ) from error

    def freeze_backbone(self) -> None:
        """Takes all but the classifier out of training: no gradients, and evaluation mode."""
        head = self.get_classifier()
        trained = set(head.parameters())
        for parameter in self.parameters():
            parameter.requires_grad_(parameter in trained)
        for module in self.module.modules():
            if not trained & set(module.parameters()):
                module.eval()


Classifier = Sequencer2D | Peer
"""What is trained, saved, evaluated and predicted with."""


def build_model(config: SequencerConfig | PeerConfig) -> Classifier:
    """The model that a config describes, with new weights.

    Raises:
        ValueError: As `Peer`.
    """
    return Sequencer2D(config) if isinstance(config, SequencerConfig) else Peer(config)


def _create(config: PeerConfig) -> tuple[nn.Module, bool]:
    """timm's model, and whether it was made for the image size."""
    args = dict(config.args)
    small_stem = args.pop("small_stem", False)
    widths, depths = args.pop("conv_stem", None), args.pop("conv_stem_depths", None)
    if not isinstance(small_stem, bool):
        raise ValueError(f"small_stem={small_stem!r} must be true or false")
    if widths is not None and not _are_numbers(widths):
        raise ValueError(f"conv_stem={widths!r} must be a list of widths, such as [32, 128]")
    if depths is not None and not (_are_numbers(depths) and widths and len(depths) == len(widths)):
        raise ValueError(f"conv_stem_depths={depths!r} must be a list with a number for each of conv_stem={widths}")
    if widths is not None:
        args = {
            "embed_dim": widths[-1],
            **args,
            "patch_size": 2 ** len(widths),
            "embed_layer": partial(ConvStem, widths, depths or [1] * len(widths)),
        }
    try:
        model, takes_size = _create_for_size(config, args)
    except Exception as error:  # timm's own of many kinds
        raise ValueError(
            f"timm cannot make {config.name} of the arguments {config.args}: {first_line(error)}"
        ) from error
    if widths is not None and not isinstance(model, VisionTransformer):
        raise ValueError(f"conv_stem={widths} is for timm's vision transformers, not for {config.name}")
    if small_stem:
        _give_small_stem(model, config.name)
    return model, takes_size


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(number, int) and number > 0 for number in value)


def _create_for_size(config: PeerConfig, args: dict[str, Any]) -> tuple[nn.Module, bool]:
    """Some models of timm's are made for an image size, and only those know the argument."""
    create = partial(timm.create_model, config.name, num_classes=config.num_classes, **args)
    try:
        return create(img_size=config.image_size), True
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise
        return create(), False


def _give_small_stem(model: nn.Module, name: str) -> None:
    if not isinstance(model, ResNet):
        raise ValueError(f"small_stem is for timm's ResNets, not for {name}")
    if isinstance(model.conv1, nn.Conv2d):
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm does
    else:  # three convolutions of 3×3, the first of which has a stride
        model.conv1[0].stride = (1, 1)  # type: ignore[index]
    model.maxpool = nn.Identity()


class ConvStem(ConvPatchEmbed):
    """Our convolutional stem as timm's vision transformers want their patch embedding.

    Args:
        widths: Channels after each halving.
        depths: Convolutions at each of them.
        img_size: Side of the image in pixels.
        patch_size: 2 to the power of the number of widths.
        in_chans: Channels of the image.
        embed_dim: Channels of a token.
        output_fmt: NHWC: tokens keep their grid.
    """

    def __init__(
        self,
        widths: list[int],
        depths: list[int],
        *,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        output_fmt: str = "",
        **_: Any,
    ) -> None:
        super().__init__(in_chans, tuple(widths), tuple(depths), embed_dim)
        self.keeps_grid = output_fmt == "NHWC"
        self.set_input_size((img_size, img_size))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                lecun_normal_(module.weight)

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Of the images to come; the patches stay."""
        if img_size is not None:
            self.img_size = img_size
            self.grid_size = (-(-img_size[0] // self.patch_size), -(-img_size[1] // self.patch_size))
            self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self) -> int:
        """Pixels along a side of a patch."""
        return self.patch_size

    def forward(self, image: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, h·w, D]`, or to `[B, h, w, D]` where the grid is kept."""
        tokens = super().forward(image)
        return tokens if self.keeps_grid else tokens.flatten(1, 2)


def fit_peer(donor: Peer, model: Peer, *, same_classes: bool) -> tuple[State, list[str]]:
    """Weights of a peer fitted to another of the same name; and what was changed, in words.

    A position embedding is resampled, in the donor, by timm. With `same_classes` off, the classifier begins anew.

    Raises:
        ModelFileError: A parameter is missing, surplus, or of another shape.
    """
    notes = []
    before, after = donor.config.image_size, model.config.image_size
    if before != after and hasattr(donor.module, "set_input_size"):
        donor.module.set_input_size(img_size=(after, after))
        notes.append(f"resampled from {before} to {after} pixels")
    state, own = donor.state_dict(), model.state_dict()
    if not same_classes:
        head = set(donor.get_classifier().parameters())
        for name in [name for name, parameter in donor.named_parameters() if parameter in head]:
            del state[name], own[name]
        notes.append(f"classifier of {donor.num_classes} other classes begun anew")
    different = [
        name for name in sorted(own.keys() | state.keys())
        if name not in own or name not in state or own[name].shape != state[name].shape
    ]  # fmt: skip
    if different:
        raise ModelFileError(f"{different[0].removeprefix('module.')} is another; give the same arguments")
    return state, notes
