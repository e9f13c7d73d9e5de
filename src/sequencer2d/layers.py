"""The layers of Sequencer2D (Tatsunami & Taki, NeurIPS 2022, section 3), from the inside out.

Shapes: `B` batch, `H` rows, `W` columns, `C` channels, `D` hidden size per direction.
Feature maps are channels-last, `[B, H, W, C]`; images are `[B, C, H, W]`. Parameter names are timm's.
So that `torch.jit.script` reads them too, forward passes have their shapes in words and take no modules as arguments.
"""

import torch
from timm.layers import DropPath, Mlp
from timm.models import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from sequencer2d import native

LAYER_NORM_EPS = 1e-6  # the official code's; PyTorch's default is 1e-5


class BiLSTM2D(nn.Module):
    """Mixes tokens with two bidirectional LSTMs: one over every column, one over every row (eqs. 3-6).

    Their outputs are concatenated, `2·D` vertical and `2·D` horizontal channels, and fused by one linear layer.

    Example: `BiLSTM2D(192, 48)(torch.randn(2, 32, 32, 192)).shape == (2, 32, 32, 192)`
    """

    cell: type[nn.LSTM] | type[nn.GRU] | type[nn.RNN] = nn.LSTM
    bidirectional = True
    backend = "auto"

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.rnn_v = self.cell(input_size, hidden_size, batch_first=True, bidirectional=self.bidirectional)
        self.rnn_h = self.cell(input_size, hidden_size, batch_first=True, bidirectional=self.bidirectional)
        self.fc = nn.Linear(2 * output_size(self.rnn_v), input_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles what follows an `and`
            if native.serves(self.backend, x, self.rnn_v, self.rnn_h):
                return native.linear(self.fc, native.bilstm2d(x, self.rnn_v, self.rnn_h), self.backend)
        vertical, _ = self.rnn_v(columns(x))
        horizontal, _ = self.rnn_h(rows(x))
        return self.fc(torch.cat([from_columns(vertical, x), from_rows(horizontal, x)], dim=-1))


def columns(x: Tensor) -> Tensor:
    """Every column as a sequence from top to bottom: `[B, H, W, C]` to `[B·W, H, C]`."""
    return rows(x.transpose(1, 2))


def rows(x: Tensor) -> Tensor:
    """Every row as a sequence from left to right: `[B, H, W, C]` to `[B·H, W, C]`."""
    B, H, W, C = x.shape
    return x.reshape(B * H, W, C)


def from_columns(y: Tensor, x: Tensor) -> Tensor:
    """What a recurrent layer puts out for the columns of `x`, in their places: `[B·W, H, D]` to `[B, H, W, D]`."""
    return from_rows(y, x.transpose(1, 2)).transpose(1, 2)


def from_rows(y: Tensor, x: Tensor) -> Tensor:
    """What a recurrent layer puts out for the rows of `x`, in their places: `[B·H, W, D]` to `[B, H, W, D]`."""
    B, H, W, _ = x.shape
    return y.reshape(B, H, W, y.shape[-1])


def output_size(rnn: nn.RNNBase) -> int:
    """Channels that a recurrent layer puts out, both directions together."""
    return rnn.hidden_size * (2 if rnn.bidirectional else 1)


# The ablations of the paper (tables 3 and 6; the official code's models/layers.py): each changes one thing.


class LSTM2D(BiLSTM2D):
    """One direction only: down and to the right."""

    bidirectional = False


class BiGRU2D(BiLSTM2D):
    """GRUs instead of LSTMs."""

    cell = nn.GRU


class BiRNN2D(BiLSTM2D):
    """Plain RNNs (tanh) instead of LSTMs."""

    cell = nn.RNN


class AddBiLSTM2D(BiLSTM2D):
    """Adds the vertical and the horizontal output instead of concatenating them."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.fc = nn.Linear(output_size(self.rnn_v), input_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles what follows an `and`
            if native.serves(self.backend, x, self.rnn_v, self.rnn_h):
                vertical, horizontal = native.bilstm2d(x, self.rnn_v, self.rnn_h).chunk(2, dim=-1)
                return native.linear(self.fc, vertical + horizontal, self.backend)
        vertical, _ = self.rnn_v(columns(x))
        horizontal, _ = self.rnn_h(rows(x))
        return self.fc(from_columns(vertical, x) + from_rows(horizontal, x))


class UnfusedBiLSTM2D(BiLSTM2D):
    """Without the linear layer: the concatenated outputs are the result, so `4·D` must be `C`."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.fc = nn.Identity()
        check_width(2 * output_size(self.rnn_v), input_size)


class VerticalBiLSTM(nn.Module):
    """Columns only, without a linear layer, so `2·D` must be `C`."""

    backend = "auto"

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.rnn_v = nn.LSTM(input_size, hidden_size, batch_first=True, bidirectional=True)
        check_width(output_size(self.rnn_v), input_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles what follows an `and`
            if native.serves(self.backend, x, self.rnn_v):
                return native.bilstm2d(x, self.rnn_v, None)
        y, _ = self.rnn_v(columns(x))
        return from_columns(y, x)


class HorizontalBiLSTM(nn.Module):
    """Rows only, without a linear layer, so `2·D` must be `C`."""

    backend = "auto"

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.rnn_h = nn.LSTM(input_size, hidden_size, batch_first=True, bidirectional=True)
        check_width(output_size(self.rnn_h), input_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles what follows an `and`
            if native.serves(self.backend, x, self.rnn_h):
                return native.bilstm2d(x, None, self.rnn_h)
        y, _ = self.rnn_h(rows(x))
        return from_rows(y, x)


class BiLSTM1D(nn.Module):
    """All tokens as one sequence, row after row, so `2·D` must be `C`: the Vanilla Sequencer's (appendix C)."""

    backend = "auto"

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(input_size, hidden_size, batch_first=True, bidirectional=True)
        check_width(output_size(self.rnn), input_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles what follows an `and`
            if native.serves(self.backend, x, self.rnn):
                return native.bilstm2d(x.flatten(1, 2).unsqueeze(1), None, self.rnn).reshape(x.shape)
        y, _ = self.rnn(x.flatten(1, 2))
        return y.reshape(x.shape)


def check_width(width: int, input_size: int) -> None:
    if width != input_size:
        raise ValueError(f"without a linear layer the LSTMs put out {width} channels where the block has {input_size}")


MIXERS: dict[str, type[nn.Module]] = {
    mixer.__name__: mixer
    for mixer in (
        BiLSTM2D,
        LSTM2D,
        BiGRU2D,
        BiRNN2D,
        AddBiLSTM2D,
        UnfusedBiLSTM2D,
        VerticalBiLSTM,
        HorizontalBiLSTM,
        BiLSTM1D,
    )
}
"""What may stand in a block in the place of self-attention, by the name that `SequencerConfig.mixer` gives."""


def set_backend(model: nn.Module, backend: str) -> None:
    """Chooses what runs the blocks of a model: our CPU kernels, PyTorch, or (auto) the kernels where they are and fit.

    Parameters and state dict are the same for all; the choice is saved with neither.

    Raises:
        ValueError: There is no such backend, or it cannot run here; the message says why and what to do.
    """
    native.check_backend(backend)
    for module in model.modules():
        if isinstance(module, _WITH_KERNELS):
            module.backend = backend


class Sequencer2DBlock(nn.Module):
    """A Transformer block with the BiLSTM2D, or another mixer, in the place of self-attention (figure 2b)."""

    backend = "auto"

    def __init__(
        self,
        dim: int,
        hidden_size: int,
        mlp_ratio: float = 3.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        mixer: type[nn.Module] = BiLSTM2D,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.rnn_tokens = mixer(dim, hidden_size)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp_channels = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        if not torch.jit.is_scripting():
            inferred = native.infer_block(self, x, BiLSTM2D.forward)
            if inferred is not None:
                return inferred
            x, normed = native.residual_norm(x, None, self.drop_path, self.norm1, self.backend)
            x, normed = native.residual_norm(x, self.rnn_tokens(normed), self.drop_path, self.norm2, self.backend)
            return x + self.drop_path(native.mlp(self.mlp_channels, normed, self.backend))
        x = x + self.drop_path(self.rnn_tokens(self.norm1(x)))
        x = x + self.drop_path(self.mlp_channels(self.norm2(x)))
        return x


class PositionEmbedding(nn.Module):
    """A learned vector for every place of a grid, added to the tokens; resampled for another grid.

    The official code's `absolute_pos_embed` (models/vanilla_sequencer.py), there for one size only.
    """

    def __init__(self, grid_size: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, *grid_size, dim))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        return x + resample_grid(self.weight, x.shape[1], x.shape[2])


class ShuffleTokens(nn.Module):
    """Permutes the tokens of a batch at random in training: the paper's test that order matters (appendix C)."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        if not self.training:
            return x
        tokens = x.flatten(1, 2)
        return tokens[:, torch.randperm(tokens.shape[1], device=x.device)].reshape(x.shape)


class PatchEmbed(nn.Module):
    """Cuts the image into patches and projects each to a token (figure 2a)."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int, pad: bool = True) -> None:
        super().__init__()
        self.pad = pad
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, h, w, D]`."""
        tokens = self.proj(channels_last(divisible(image, self.proj.stride[0], self.pad)))
        return tokens.permute(0, 2, 3, 1).contiguous()


class ConvPatchEmbed(nn.Module):
    """Overlapping patches for small images: 3×3 convolutions and halvings instead of one cut.

    Every step is a convolution, 2×2 max pooling, batch norm and GELU, so that the norm and GELU see a quarter of the
    values; then come convolutions that are added to their input, each with norm and GELU. The patch size is thus
    `2 ** len(widths)`. Where the last width is not `embed_dim`, one more convolution leads there, on the small grid.
    After the convolutional tokenizers of Xiao et al. 2021 and Hassani et al. 2021 (CCT), the order after the ResNets
    for CIFAR-10 of Jordan 2024 (`airbench94.py`).

    Args:
        in_chans: Channels of the image.
        widths: Channels after each halving.
        depths: Convolutions at each of these widths, the first with its halving.
        embed_dim: Channels of a token.
        pad: Whether images of other sizes are padded, or cut as in `PatchEmbed`.
    """

    def __init__(
        self, in_chans: int, widths: tuple[int, ...], depths: tuple[int, ...], embed_dim: int, pad: bool = True
    ) -> None:
        super().__init__()
        self.pad = pad
        self.patch_size = 2 ** len(widths)
        self.steps = nn.Sequential()
        for before, after, depth in zip((in_chans, *widths), widths, depths, strict=False):
            convolution, *others = _convolution(before, after)
            residuals = [ResidualConvolution(after) for _ in range(depth - 1)]
            self.steps.append(Convolutions(convolution, MaxPool2x2(2), *others, *residuals))
        lacking = widths[-1] != embed_dim
        self.proj = Convolutions(*_convolution(widths[-1], embed_dim)) if lacking else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, h, w, D]`."""
        tokens = self.proj(self.steps(channels_last(divisible(image, self.patch_size, self.pad))))
        return tokens.permute(0, 2, 3, 1).contiguous()


class ResidualConvolution(nn.Module):
    """A convolution with its norm and GELU, added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = Convolutions(*_convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, H, W]`."""
        return x + self.body(x)


def _convolution(before: int, after: int) -> list[nn.Module]:
    return [Conv3x3(before, after, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(after), nn.GELU()]


class Convolutions(nn.Sequential):
    """`nn.Sequential` where each batch norm is one kernel of ours with the GELU after it if it is trained on a CPU."""

    backend = "auto"

    def forward(self, input: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, K, h, w]`."""
        if not torch.jit.is_scripting():
            modules = list(self)
            while modules:
                module = modules.pop(0)
                if (
                    isinstance(module, nn.BatchNorm2d)
                    and modules
                    and native.norms(self.backend, input, module, modules[0])
                ):
                    input = native.norm_gelu(input, module)
                    del modules[0]
                else:
                    input = module(input)
            return input
        for module in self:
            input = module(input)
        return input


class Conv3x3(nn.Conv2d):
    """`nn.Conv2d` by a kernel of ours on a CPU, in bf16 only where it is trained."""

    backend = "auto"

    def forward(self, input: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, K, H, W]`."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles what follows an `and`
            if native.convolves(self.backend, input, self):
                return native.convolution(input, self.weight)
        return self._conv_forward(input, self.weight, self.bias)


class MaxPool2x2(nn.MaxPool2d):
    """`nn.MaxPool2d` by a kernel of ours where gradients go through it on a CPU."""

    backend = "auto"

    def forward(self, input: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, H/2, W/2]`."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles what follows an `and`
            if native.pools(self.backend, input, self):
                return native.max_pool(input)
        return F.max_pool2d(input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)


_WITH_KERNELS = (
    BiLSTM2D, VerticalBiLSTM, HorizontalBiLSTM, BiLSTM1D, Sequencer2DBlock, Convolutions, Conv3x3, MaxPool2x2,
)  # fmt: skip
"""Layers that have a backend."""


class Downsample2D(nn.Module):
    """Merges `patch_size × patch_size` tokens into one between two stages."""

    def __init__(self, input_dim: int, output_dim: int, patch_size: int, pad: bool = True) -> None:
        super().__init__()
        self.pad = pad
        self.down = nn.Conv2d(input_dim, output_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, h, w, D]`."""
        x = x.permute(0, 3, 1, 2)
        return self.down(divisible(x, self.down.stride[0], self.pad)).permute(0, 2, 3, 1)


@register_notrace_function
def channels_last(image: Tensor) -> Tensor:
    """The same `[B, C, H, W]` with the channels of a pixel side by side in memory, and so all feature maps after it.

    Else every layer norm copies its input: a tenth of a training step of S on a CPU, a fifth with a convolutional stem.
    """
    image = image.contiguous(memory_format=torch.channels_last)
    if image.shape[1] == 1:  # it lies both ways, and counts as the other one until its strides say this one
        return image[:, 0].unsqueeze(-1).permute(0, 3, 1, 2)
    return image


@register_notrace_function
def resample_grid(grid: Tensor, height: int, width: int) -> Tensor:
    """A grid of vectors at another resolution, `[1, H, W, C]` to `[1, h, w, C]` (bicubic, as timm resamples
    position embeddings)."""
    if grid.shape[1] == height and grid.shape[2] == width:
        return grid
    floats = grid.permute(0, 3, 1, 2).float()  # the CPU has no kernel for half precision
    resized = F.interpolate(floats, [height, width], mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).to(grid.dtype)


@register_notrace_function
def divisible(x: Tensor, multiple: int, pad: bool) -> Tensor:
    """`[B, C, H, W]` with sides that are multiples: padded with zeros below and to the right, so that a strided
    convolution loses no border pixels, or cut, as the official code's and timm's strided convolutions do silently.
    """
    H, W = x.shape[-2:]
    if not pad:
        return x[..., : H - H % multiple, : W - W % multiple]
    if H % multiple or W % multiple:
        x = F.pad(x, [0, -W % multiple, 0, -H % multiple])
    return x
