"""BiLSTM2D computes its equations, on columns and rows, and no layer loses a border."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sequencer2d.layers import BiLSTM2D, ConvPatchEmbed, Downsample2D, PatchEmbed, Sequencer2DBlock, pad_to_multiple


def lstm_by_hand(tokens: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor) -> Tensor:
    """One direction of an LSTM over tokens [T, C], one step after the other; gates in PyTorch's order."""
    hidden_size = weight_hh.shape[1]
    h = c = torch.zeros(hidden_size, dtype=tokens.dtype)
    outputs = []
    for x in tokens:
        i, f, g, o = (weight_ih @ x + bias_ih + weight_hh @ h + bias_hh).split(hidden_size)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs)


def bilstm_by_hand(lstm: nn.LSTM, tokens: Tensor) -> Tensor:
    weights = [getattr(lstm, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    reverse = [getattr(lstm, f"{name}_l0_reverse") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    backward = lstm_by_hand(tokens.flip(0), *reverse).flip(0)
    return torch.cat([lstm_by_hand(tokens, *weights), backward], dim=-1)


def test_bilstm2d_equals_the_equations() -> None:
    """Equations 3 to 6 of the paper, in float64, on a grid whose sides differ."""
    torch.manual_seed(0)
    layer = BiLSTM2D(input_size=3, hidden_size=2).double()
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    expected = torch.empty_like(x)
    for b in range(2):
        vertical = torch.stack([bilstm_by_hand(layer.rnn_v, x[b, :, w]) for w in range(5)], dim=1)
        horizontal = torch.stack([bilstm_by_hand(layer.rnn_h, x[b, h]) for h in range(4)], dim=0)
        expected[b] = torch.cat([vertical, horizontal], dim=-1) @ layer.fc.weight.T + layer.fc.bias
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_transposing_the_image_swaps_the_two_lstms() -> None:
    torch.manual_seed(0)
    layer, swapped = BiLSTM2D(6, 4).double(), BiLSTM2D(6, 4).double()
    vertical, horizontal = layer.fc.weight.chunk(2, dim=1)
    swapped.rnn_v.load_state_dict(layer.rnn_h.state_dict())
    swapped.rnn_h.load_state_dict(layer.rnn_v.state_dict())
    swapped.fc.load_state_dict({"weight": torch.cat([horizontal, vertical], dim=1), "bias": layer.fc.bias})
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(swapped(x.transpose(1, 2)), layer(x).transpose(1, 2), rtol=0, atol=1e-12)


def test_a_token_sees_its_row_and_its_column_and_nothing_else() -> None:
    layer = BiLSTM2D(3, 2)
    x = torch.randn(1, 5, 6, 3, requires_grad=True)
    layer(x)[0, 2, 4].sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(-1) > 0
    cross = torch.zeros(5, 6, dtype=torch.bool)
    cross[2, :] = cross[:, 4] = True
    assert torch.equal(seen, cross)


def test_block_is_two_residual_branches() -> None:
    """Without its last linear layers each branch is silent, and the block the identity."""
    block = Sequencer2DBlock(8, 2)
    for linear in (block.rnn_tokens.fc, block.mlp_channels.fc2):
        assert isinstance(linear, nn.Linear)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    x = torch.randn(2, 3, 4, 8)
    assert torch.equal(block(x), x)


@settings(deadline=None, max_examples=50)
@given(height=st.integers(1, 20), width=st.integers(1, 20), multiple=st.integers(1, 8))
def test_padding_is_the_least_that_divides_and_lies_below_and_to_the_right(
    height: int, width: int, multiple: int
) -> None:
    x = torch.rand(1, 2, height, width) + 1
    padded = pad_to_multiple(x, multiple)
    for before, after in zip((height, width), padded.shape[-2:], strict=True):
        assert after % multiple == 0
        assert before <= after < before + multiple
    assert torch.equal(padded[..., :height, :width], x)
    assert padded.count_nonzero() == x.numel()


@pytest.mark.parametrize(
    "layer",
    [PatchEmbed(3, 4, patch_size=4), ConvPatchEmbed(3, (4, 4)).eval()],
    ids=["plain", "convolutional"],
)
def test_patch_embedding_of_any_size_is_that_of_the_padded_image(layer: nn.Module) -> None:
    image = torch.randn(2, 3, 9, 14)
    tokens = layer(image)
    assert tokens.shape == (2, 3, 4, 4)
    assert torch.equal(tokens, layer(F.pad(image, (0, 2, 0, 3))))


def test_downsampling_of_an_odd_grid_is_that_of_the_padded_grid() -> None:
    layer = Downsample2D(3, 4, patch_size=2)
    x = torch.randn(2, 5, 3, 3)
    assert layer(x).shape == (2, 3, 2, 4)
    assert torch.equal(layer(x), layer(F.pad(x, (0, 0, 0, 1, 0, 1))))


def test_convolutional_stem_halves_once_per_width() -> None:
    assert ConvPatchEmbed(1, (2, 4, 8))(torch.randn(1, 1, 32, 48)).shape == (1, 4, 6, 8)
