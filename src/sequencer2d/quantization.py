"""int8 inference on the CPU: the linear layers of the blocks in bytes, recurrence and patches in bf16, norms in fp32.

Shapes: `B` batch, `H` rows, `W` columns, `C` channels, `D` hidden size per direction, `N = B·H·W` tokens, `K` inputs
and `M` outputs of a linear layer.

Every input channel of a linear layer has a range of its own, measured on images; it becomes 0 … 255. The step of a
channel is multiplied into the weights, then every output's weights become -127 … 127. None of this costs time: the maps
to bytes are part of the norms, or stand between two layers anyway.
"""

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sequencer2d.layers import BiLSTM2D, Downsample2D, PatchEmbed, Sequencer2DBlock, divisible
from sequencer2d.model import Sequencer2D, Stage
from sequencer2d.native import library, weights
from sequencer2d.native.inference import has_plain_parts
from sequencer2d.native.int8 import VNNI, Affine, Int8Linear, Packed, finish, project

log = logging.getLogger(__name__)

CLIP = 8.0
"""Ranges end so many standard deviations from the mean at most: a rare outlier shall not coarsen all the others."""


@torch.inference_mode(False)  # tensors of which have no version, by which a change is seen
def quantize(model: Sequencer2D, images: Float[Tensor, "N C H W"], *, batch_size: int = 16) -> Sequencer2D:
    """A copy of a model for inference on the CPU, whose linear layers compute in int8.

    It takes images of any number and size, and has no gradients. `model` stays as it is, and shares nothing with it.
    Model files hold the original; quantise it again after loading.

    Example: `quantize(model, calibration_images)(images).argmax(-1)`

    Args:
        model: What to quantise: a Sequencer2D of `BiLSTM2D`.
        images: What it will see, normalised as for the model, to measure ranges on: some dozens do, none of the test.
        batch_size: How many of them go through the model at a time.

    Raises:
        ValueError: The model has another mixer or other parts in a block, there are no images, they or the weights hold
            what is no number, or the CPU kernels are not there.
    """
    for name, block in _blocks(model):
        if type(block.rnn_tokens) is not BiLSTM2D:
            mixer = type(block.rnn_tokens).__name__
            raise ValueError(f"int8 is for BiLSTM2D; {name}.rnn_tokens is {mixer}, so use bf16 or fp32")
        if not has_plain_parts(block):
            raise ValueError(f"int8 is for blocks as they are made; {name} has other parts or hooks; use bf16 or fp32")
    if not len(images):
        raise ValueError("there are no images to measure ranges on; give some dozens of training or validation images")
    try:
        kernel = library.kernel()
    except library.Unavailable as error:
        raise ValueError(f"int8 needs the CPU kernels: {error}") from error
    if kernel.name not in VNNI:
        log.warning(
            "int8 runs in the kernel %s, without instructions for it (VNNI): bf16 or fp32 may be faster", kernel.name
        )
    quantized = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    quantized.set_grad_checkpointing(False)
    ranges = _measure(quantized, images, batch_size)
    has_bf16 = kernel.name in VNNI
    if has_bf16 and isinstance(quantized.stem, PatchEmbed):
        quantized.stem = BFloat16Patches(quantized.stem.proj, images=True, pad=model.config.pad)  # type: ignore[assignment]
    for stage in quantized.stages:
        assert isinstance(stage, Stage)
        if has_bf16 and isinstance(stage.downsample, Downsample2D):
            stage.downsample = BFloat16Patches(stage.downsample.down, images=False, pad=model.config.pad)
        stage.blocks = Int8Blocks([Int8Block(block, ranges[block]) for block in stage.blocks])  # type: ignore[index]
    return quantized


def _blocks(model: Sequencer2D) -> Iterator[tuple[str, Sequencer2DBlock]]:
    for name, module in model.named_modules():
        if isinstance(module, Int8Blocks):
            raise ValueError(f"{name} is int8 already; quantise the original")
        if isinstance(module, Sequencer2DBlock):
            yield name, module


class Range:
    """Of every input channel of a linear layer, over all tokens seen."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.low, self.high = torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf)
        self.total, self.squares = (torch.zeros(channels, dtype=torch.float64) for _ in range(2))

    def add(self, x: Float[Tensor, "... K"]) -> None:
        """Takes in tokens."""
        x = x.detach().reshape(-1, x.shape[-1])
        self.count += len(x)
        self.low, self.high = torch.minimum(self.low, x.amin(0)), torch.maximum(self.high, x.amax(0))
        self.total += x.sum(0)
        self.squares += x.square().sum(0)

    @property
    def mean(self) -> Float[Tensor, "K"]:
        return self.total / self.count

    def limits(self) -> tuple[Float[Tensor, "K"], Float[Tensor, "K"]]:
        """Lowest value and step of a channel's 256 levels.

        A channel that hardly varies gets a hundredth of the average width at least: other images may vary more.
        """
        reach = CLIP * (self.squares / self.count - self.mean.square()).clamp(min=0).sqrt()
        low, high = torch.maximum(self.low, self.mean - reach), torch.minimum(self.high, self.mean + reach)
        width = (high - low).clamp(min=0)
        wide = torch.maximum(width, (0.01 * width.mean()).clamp(min=1e-6))
        return low - (wide - width) / 2, wide / 255


@dataclass
class BlockRanges:
    """Of the inputs of a block's linear layers."""

    project: Range
    fc: Range
    fc1: Range
    fc2: Range


@torch.no_grad()
def _measure(model: Sequencer2D, images: Tensor, batch_size: int) -> dict[Sequencer2DBlock, BlockRanges]:
    """Runs the model in fp32 and looks at what the linear layers get."""
    found: dict[Sequencer2DBlock, BlockRanges] = {}
    hooks = []
    for _, block in _blocks(model):
        mixer, mlp = block.rnn_tokens, block.mlp_channels
        assert isinstance(mixer, BiLSTM2D)
        widths = (mixer.rnn_v.input_size, mixer.fc.in_features, mlp.fc1.in_features, mlp.fc2.in_features)
        ranges = found[block] = BlockRanges(*map(Range, widths))  # type: ignore[arg-type]
        places = (mixer, mixer.fc, mlp.fc1, mlp.fc2)
        for module, into in zip(places, (ranges.project, ranges.fc, ranges.fc1, ranges.fc2), strict=True):
            hooks.append(module.register_forward_pre_hook(lambda _, inputs, into=into: into.add(inputs[0])))  # type: ignore[misc]
    for batch in images.split(batch_size):
        if not model(batch.cpu().float()).isfinite().all():
            raise ValueError("the model answers some of the images with what is no finite number; look at both")
    for hook in hooks:
        hook.remove()
    return found


def _linear(
    weight: Float[Tensor, "M K"], bias: Float[Tensor, "M"] | None, seen: Range
) -> tuple[Int8Linear, Float[Tensor, "K"], Float[Tensor, "K"]]:
    """A layer in int8; scale and shift of its inputs on their way to bytes.

    The bias is what makes the mean over the images seen exact.
    """
    low, step = seen.limits()
    by_level = weight.double() * step
    scale = (by_level.abs().amax(1) / 127).clamp(min=1e-30)
    levels = (by_level / scale[:, None]).round()
    mean_level = ((seen.mean - low) / step).clamp(0, 255)
    corrected = (0 if bias is None else bias.double()) + weight.double() @ seen.mean - scale * (levels @ mean_level)
    return Int8Linear(levels.to(torch.int8), scale.float(), corrected.float()), 1 / step, -low / step


class Int8Block(nn.Module):
    """A `Sequencer2DBlock` whose linear layers are int8."""

    w_hh: Tensor

    def __init__(self, block: Sequencer2DBlock, ranges: BlockRanges) -> None:
        super().__init__()
        mixer, mlp = block.rnn_tokens, block.mlp_channels
        assert isinstance(mixer, BiLSTM2D)
        w_ih, w_hh, bias = weights.gather([mixer.rnn_v, mixer.rnn_h], torch.float32)  # type: ignore[list-item]
        self.eps = block.norm1.eps
        self.hidden_size = w_hh.shape[2]
        self.project, *to_bytes = _linear(w_ih, bias, ranges.project)
        self.norm1 = _after(block.norm1, *to_bytes)
        self.register_buffer("w_hh", w_hh.bfloat16())
        self.fc, *to_bytes = _linear(mixer.fc.weight, mixer.fc.bias, ranges.fc)
        self.states = Affine(*to_bytes)
        self.fc1, *to_bytes = _linear(mlp.fc1.weight, mlp.fc1.bias, ranges.fc1)
        self.norm2 = _after(block.norm2, *to_bytes)
        self.fc2, *to_bytes = _linear(mlp.fc2.weight, mlp.fc2.bias, ranges.fc2)
        self.active = Affine(*to_bytes)
        self._packed = Packed()  # recurrent weights

    def run(self, x: Float[Tensor, "B H W C"], gates: Tensor, hidden: Tensor) -> None:
        """The block, in place of its input; `gates` `[N, 16·D]` and `hidden` `[N, 4·D]` are memory for it."""
        B, H, W, C = x.shape
        tokens = x.view(-1, C)
        kernel = library.kernel()
        shape = library.Shape(batch=B, height=H, width=W, hidden=self.hidden_size, vertical=2, horizontal=2)
        w_hh = self._packed.of(self.w_hh, kernel, lambda: kernel.pack(shape, None, self.w_hh, backward=False))
        project(tokens, self.norm1, self.project, self.eps, gates)
        kernel.forward(shape, w_hh, None, None, gates, None, hidden)
        finish(hidden, tokens, self.states, self.fc, self.norm2, self.fc1, self.active, self.fc2, self.eps)


def _after(norm: nn.LayerNorm, scale: Tensor, shift: Tensor) -> Affine:
    """The affine map of a norm, and then the one to bytes."""
    return Affine(norm.weight * scale, norm.bias * scale + shift)


class Int8Blocks(nn.Module):
    """The blocks of a stage, which share their memory."""

    def __init__(self, blocks: list[Int8Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`, fp32.

        Raises:
            ValueError: The tensor is not on the CPU.
            RuntimeError: A gradient is asked for, or a trace, which would not see what the kernels do.
        """
        if torch.jit.is_tracing():
            raise RuntimeError("an int8 model cannot be traced, nor exported by a trace; take the original model")
        if x.device.type != "cpu":
            raise ValueError(f"int8 is for the CPU, and the images are on {x.device.type}; move model and images there")
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("int8 has no gradients; use the original model for them, or torch.no_grad()")
        x = x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        if not x.numel():
            return x
        tokens, hidden = x.numel() // x.shape[3], max(block.hidden_size for block in self.blocks)  # type: ignore[type-var]
        gates, states = (x.new_empty(tokens, n * hidden, dtype=torch.bfloat16) for n in (16, 4))
        for block in self.blocks:
            block.run(x, gates, states)  # type: ignore[operator]
        return x


class BFloat16Patches(nn.Module):
    """A `PatchEmbed` (of images) or `Downsample2D` (of tokens) as one matrix product in bf16.

    That is faster than a convolution, and leaves the tokens as the blocks want them.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, *, images: bool, pad: bool) -> None:
        super().__init__()
        assert conv.bias is not None
        self.images, self.pad = images, pad
        self.patch_size = conv.stride[0]
        self.register_buffer("weight", conv.weight.permute(0, 2, 3, 1).flatten(1).bfloat16())
        self.register_buffer("bias", conv.bias.bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` or `[B, H, W, C]` to `[B, h, w, M]`."""
        p = self.patch_size
        x = divisible(x if self.images else x.permute(0, 3, 1, 2), p, self.pad).permute(0, 2, 3, 1)
        B, H, W, C = x.shape
        patches = x.bfloat16().reshape(B, H // p, p, W // p, p, C).transpose(2, 3)
        return F.linear(patches.reshape(B, H // p, W // p, p * p * C), self.weight, self.bias)
