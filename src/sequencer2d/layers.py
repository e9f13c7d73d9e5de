"""The layers of Sequencer2D (Tatsunami & Taki, NeurIPS 2022, section 3), from the inside out.

Shapes: `B` batch, `H` rows, `W` columns, `C` channels, `D` hidden size per direction.
Feature maps are channels-last, `[B, H, W, C]`; images are `[B, C, H, W]`. Parameter names are timm's.
"""

import torch
from jaxtyping import Float
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

LAYER_NORM_EPS = 1e-6  # the official code's; PyTorch's default is 1e-5


class BiLSTM2D(nn.Module):
    """Mixes tokens with two bidirectional LSTMs: one over every column, one over every row (eqs. 3-6).

    Their outputs are concatenated, `2·D` vertical and `2·D` horizontal channels, and fused by one linear layer.

    Example: `BiLSTM2D(192, 48)(torch.randn(2, 32, 32, 192)).shape == (2, 32, 32, 192)`
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.rnn_v = nn.LSTM(input_size, hidden_size, batch_first=True, bidirectional=True)
        self.rnn_h = nn.LSTM(input_size, hidden_size, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(4 * hidden_size, input_size)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        B, H, W, C = x.shape
        columns, _ = self.rnn_v(x.transpose(1, 2).reshape(B * W, H, C))
        rows, _ = self.rnn_h(x.reshape(B * H, W, C))
        vertical = columns.reshape(B, W, H, -1).transpose(1, 2)
        horizontal = rows.reshape(B, H, W, -1)
        return self.fc(torch.cat([vertical, horizontal], dim=-1))


class Sequencer2DBlock(nn.Module):
    """A Transformer block with the BiLSTM2D in the place of self-attention (figure 2b)."""

    def __init__(
        self, dim: int, hidden_size: int, mlp_ratio: float = 3.0, drop: float = 0.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.rnn_tokens = BiLSTM2D(dim, hidden_size)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp_channels = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        x = x + self.drop_path(self.rnn_tokens(self.norm1(x)))
        x = x + self.drop_path(self.mlp_channels(self.norm2(x)))
        return x


class PatchEmbed(nn.Module):
    """Cuts the image into patches and projects each to a token (figure 2a)."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"]:
        return self.proj(pad_to_multiple(image, self.proj.stride[0])).permute(0, 2, 3, 1)


class ConvPatchEmbed(nn.Module):
    """Overlapping patches for small images: 3×3 convolutions, each followed by a halving, instead of one cut.

    Every step is convolution, batch norm, GELU and 2×2 max pooling; the patch size is thus `2 ** len(widths)`.
    After the convolutional tokenizers of Xiao et al. 2021 and Hassani et al. 2021 (CCT).
    """

    def __init__(self, in_chans: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.patch_size = 2 ** len(widths)
        self.steps = nn.Sequential()
        for before, after in zip((in_chans, *widths), widths, strict=False):
            conv = nn.Conv2d(before, after, kernel_size=3, padding=1, bias=False)
            self.steps.append(nn.Sequential(conv, nn.BatchNorm2d(after), nn.GELU(), nn.MaxPool2d(2)))

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"]:
        return self.steps(pad_to_multiple(image, self.patch_size)).permute(0, 2, 3, 1)


class Downsample2D(nn.Module):
    """Merges `patch_size × patch_size` tokens into one between two stages."""

    def __init__(self, input_dim: int, output_dim: int, patch_size: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(input_dim, output_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w D"]:
        x = x.permute(0, 3, 1, 2)
        return self.down(pad_to_multiple(x, self.down.stride[0])).permute(0, 2, 3, 1)


def pad_to_multiple(x: Float[Tensor, "B C H W"], multiple: int) -> Float[Tensor, "B C h w"]:
    """Pads with zeros below and to the right, so that a strided convolution loses no border pixels.

    The official code and timm's crop up to `multiple - 1` rows and columns silently.
    """
    H, W = x.shape[-2:]
    if H % multiple or W % multiple:
        x = F.pad(x, (0, -W % multiple, 0, -H % multiple))
    return x
