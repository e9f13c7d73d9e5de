"""Every mixer computes its equations and has their symmetries, and no layer loses a border."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from reference import rnn_by_hand
from sequencer2d.layers import (
    MIXERS,
    AddBiLSTM2D,
    BiLSTM2D,
    ConvPatchEmbed,
    Downsample2D,
    HorizontalBiLSTM,
    PatchEmbed,
    PositionEmbedding,
    ResidualConvolution,
    Sequencer2DBlock,
    ShuffleTokens,
    VerticalBiLSTM,
    channels_last,
    divisible,
)

UNFUSED = {"UnfusedBiLSTM2D": 4, "VerticalBiLSTM": 2, "HorizontalBiLSTM": 2, "BiLSTM1D": 2}
"""How many hidden sizes make the channels of the mixers that have no linear layer."""


def make_mixer(name: str, seed: int = 0, channels: int = 8, hidden_size: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return MIXERS[name](channels, channels // UNFUSED[name] if name in UNFUSED else hidden_size).double()


def mix_by_hand(mixer: nn.Module, x: Tensor) -> Tensor:
    """What a mixer does to a feature map `[B, H, W, C]`, from the equations (paper, 3 to 6), place by place."""
    H, W = x.shape[1:3]
    parts: dict[str, Any] = dict(mixer.named_children())
    if "rnn" in parts:
        return rnn_by_hand(parts["rnn"], torch.stack([x[:, i // W, i % W] for i in range(H * W)], dim=1)).reshape(
            x.shape
        )
    outputs = []
    if "rnn_v" in parts:
        outputs.append(torch.stack([rnn_by_hand(parts["rnn_v"], x[:, :, w]) for w in range(W)], dim=2))
    if "rnn_h" in parts:
        outputs.append(torch.stack([rnn_by_hand(parts["rnn_h"], x[:, h]) for h in range(H)], dim=1))
    y = outputs[0] + outputs[1] if isinstance(mixer, AddBiLSTM2D) else torch.cat(outputs, dim=-1)
    fc = parts.get("fc")
    return y @ fc.weight.T + fc.bias if isinstance(fc, nn.Linear) else y


SHAPES = {"batch": st.integers(1, 3), "height": st.integers(1, 6), "width": st.integers(1, 6)}


@pytest.mark.parametrize("name", MIXERS)
@settings(deadline=None, max_examples=15)
@given(**SHAPES, channels=st.sampled_from([4, 8, 12]), hidden_size=st.integers(1, 5))
def test_every_mixer_equals_its_equations(
    name: str, batch: int, height: int, width: int, channels: int, hidden_size: int
) -> None:
    mixer = make_mixer(name, channels=channels, hidden_size=hidden_size)
    x = torch.randn(batch, height, width, channels, dtype=torch.float64)
    assert mixer(x).shape == x.shape
    torch.testing.assert_close(mixer(x), mix_by_hand(mixer, x), rtol=0, atol=1e-12)


def swapped_axes(mixer: nn.Module) -> nn.Module:
    """The same mixer with the vertical and the horizontal weights exchanged."""
    if isinstance(mixer, VerticalBiLSTM | HorizontalBiLSTM):
        other = make_mixer("HorizontalBiLSTM" if isinstance(mixer, VerticalBiLSTM) else "VerticalBiLSTM")
    else:
        other = make_mixer(type(mixer).__name__)
    state = {}
    for key, tensor in mixer.state_dict().items():
        key = {"rnn_v": "rnn_h", "rnn_h": "rnn_v"}.get(key[:5], key[:5]) + key[5:]
        if key == "fc.weight" and not isinstance(mixer, AddBiLSTM2D):
            tensor = torch.cat(tensor.chunk(2, dim=1)[::-1], dim=1)
        state[key] = tensor
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("name", [name for name in MIXERS if name not in ("BiLSTM1D", "UnfusedBiLSTM2D")])
@settings(deadline=None, max_examples=10)
@given(**SHAPES)
def test_transposing_the_image_swaps_vertical_and_horizontal(name: str, batch: int, height: int, width: int) -> None:
    mixer, x = make_mixer(name), torch.randn(batch, height, width, 8, dtype=torch.float64)
    expected = mixer(x).transpose(1, 2)
    torch.testing.assert_close(swapped_axes(mixer)(x.transpose(1, 2)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["BiLSTM2D", "BiGRU2D", "BiRNN2D"])
@settings(deadline=None, max_examples=10)
@given(**SHAPES)
def test_flipping_the_image_swaps_the_directions(name: str, batch: int, height: int, width: int) -> None:
    """Left and right exchanged in the weights of the horizontal layer, the image mirrored: the output is mirrored."""
    mixer, mirrored = make_mixer(name), make_mixer(name, seed=1)
    x = torch.randn(batch, height, width, 8, dtype=torch.float64)
    state = mixer.state_dict()
    exchanged = dict(state)
    for key in [key for key in state if key.startswith("rnn_h")]:
        partner = key.removesuffix("_reverse") if key.endswith("_reverse") else f"{key}_reverse"
        exchanged[key] = state[partner]
    down, up, right, left = state["fc.weight"].chunk(4, dim=1)
    fc = torch.cat([down, up, left, right], dim=1)
    mirrored.load_state_dict({**exchanged, "fc.weight": fc})
    torch.testing.assert_close(mirrored(x.flip(2)), mixer(x).flip(2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MIXERS)
def test_order_and_company_in_a_batch_do_not_matter(name: str) -> None:
    mixer, x = make_mixer(name), torch.randn(4, 3, 5, 8, dtype=torch.float64)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(mixer(x[order]), mixer(x)[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([mixer(image[None]) for image in x]), mixer(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_are_deterministic_and_take_any_memory_layout(name: str) -> None:
    mixer, x = make_mixer(name), torch.randn(2, 8, 3, 5, dtype=torch.float64).permute(0, 2, 3, 1)
    assert not x.is_contiguous()
    assert torch.equal(mixer(x), mixer(x))
    assert torch.equal(mixer(x), mixer(x.contiguous()))


@pytest.mark.parametrize("name", MIXERS)
def test_precision_is_that_of_the_weights_or_of_autocast(name: str) -> None:
    mixer, x = make_mixer(name).float(), torch.randn(2, 3, 5, 8)
    exact = mixer(x)
    assert exact.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        rough = mixer(x)
    error = (rough.float() - exact).norm() / exact.norm()
    assert error < 0.03
    assert (mixer.double()(x.double()) - exact).abs().max() < 1e-5


def test_every_mixer_has_the_cell_of_its_name() -> None:
    cells = {
        name: {type(module) for module in make_mixer(name).modules() if isinstance(module, nn.RNNBase)}
        for name in MIXERS
    }
    assert cells.pop("BiGRU2D") == {nn.GRU}
    assert cells.pop("BiRNN2D") == {nn.RNN}
    assert all(cell == {nn.LSTM} for cell in cells.values())


def test_a_position_embedding_is_resampled_in_half_precision_too() -> None:
    layer = PositionEmbedding((4, 4), 3).bfloat16()
    nn.init.constant_(layer.weight, 2.0)
    assert layer(torch.zeros(1, 6, 3, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", UNFUSED)
def test_without_a_linear_layer_the_widths_must_agree(name: str) -> None:
    with pytest.raises(ValueError, match=r"put out (20|10) channels where the block has 8"):
        MIXERS[name](8, 5)


def test_shuffling_permutes_the_tokens_in_training_only() -> None:
    layer, x = ShuffleTokens(), torch.arange(24.0).reshape(1, 3, 4, 2).expand(2, -1, -1, -1)
    shuffled = layer(x)
    assert not torch.equal(shuffled, x)
    assert torch.equal(shuffled[0], shuffled[1])
    assert torch.equal(shuffled.flatten(1, 2).sort(dim=1).values, x.flatten(1, 2))
    assert layer.eval()(x) is x


def test_a_position_embedding_is_added_and_fits_any_grid() -> None:
    layer = PositionEmbedding((4, 4), 3)
    nn.init.constant_(layer.weight, 2.0)
    x = torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(layer(x), x + 2)
    nn.init.normal_(layer.weight)
    torch.testing.assert_close(layer(torch.zeros(1, 4, 4, 3)), layer.weight.data)


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
    padded = divisible(x, multiple, pad=True)
    for before, after in zip((height, width), padded.shape[-2:], strict=True):
        assert after % multiple == 0
        assert before <= after < before + multiple
    assert torch.equal(padded[..., :height, :width], x)
    assert padded.count_nonzero() == x.numel()


@pytest.mark.parametrize(
    "layer",
    [PatchEmbed(3, 4, patch_size=4), ConvPatchEmbed(3, (4, 4), (1, 1), 4).eval()],
    ids=["plain", "convolutional"],
)
def test_patch_embedding_of_any_size_is_that_of_the_padded_image(layer: nn.Module) -> None:
    image = torch.randn(2, 3, 9, 14)
    tokens = layer(image)
    assert tokens.shape == (2, 3, 4, 4)
    assert torch.equal(tokens, layer(F.pad(image, (0, 2, 0, 3))))


@pytest.mark.parametrize(
    "layer",
    [PatchEmbed(3, 4, 4, pad=False), ConvPatchEmbed(3, (4, 4), (1, 1), 4, pad=False).eval()],
    ids=["plain", "convolutional"],
)
def test_without_padding_the_border_is_cut_off_as_the_official_code_does(layer: nn.Module) -> None:
    image = torch.randn(2, 3, 9, 14)
    assert torch.equal(layer(image), layer(image[:, :, :8, :12]))
    grid = torch.randn(2, 5, 3, 3)
    down = Downsample2D(3, 4, patch_size=2, pad=False)
    assert torch.equal(down(grid), down(grid[:, :4, :2]))


def test_downsampling_of_an_odd_grid_is_that_of_the_padded_grid() -> None:
    layer = Downsample2D(3, 4, patch_size=2)
    x = torch.randn(2, 5, 3, 3)
    assert layer(x).shape == (2, 3, 2, 4)
    assert torch.equal(layer(x), layer(F.pad(x, (0, 0, 0, 1, 0, 1))))


@pytest.mark.parametrize(
    ("embed_dim", "depths", "convolutions"), [(8, (1, 1, 1), 3), (6, (1, 1, 1), 4), (8, (1, 3, 2), 6)]
)
def test_convolutional_stem_halves_once_per_width_and_ends_at_the_width_of_the_first_stage(
    embed_dim: int, depths: tuple[int, ...], convolutions: int
) -> None:
    stem = ConvPatchEmbed(1, (2, 4, 8), depths, embed_dim)
    assert stem(torch.randn(1, 1, 32, 48)).shape == (1, 4, 6, embed_dim)
    assert sum(isinstance(module, nn.Conv2d) for module in stem.modules()) == convolutions


def test_convolutions_beyond_the_first_of_a_step_are_added_to_their_input() -> None:
    layer = ResidualConvolution(3)
    nn.init.zeros_(layer.body.get_parameter("1.weight"))  # of its norm
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize(
    "stem",
    [
        PatchEmbed(3, 8, 2),
        ConvPatchEmbed(3, (4, 8), (1, 1), 8),
        ConvPatchEmbed(3, (4, 6), (1, 2), 8),
        PatchEmbed(1, 8, 3),
    ],
)
def test_the_stem_lays_the_channels_of_a_token_side_by_side(stem):
    channels = next(stem.parameters()).shape[1]
    tokens = stem(torch.randn(2, channels, 16, 16))
    assert tokens.is_contiguous()
    assert Downsample2D(8, 12, 2)(tokens).is_contiguous()


@pytest.mark.parametrize("channels", [1, 3])
def test_feature_maps_behind_any_image_are_channels_last(channels: int) -> None:
    """Of one channel, too, whose layout PyTorch takes for the other one."""
    image = torch.randn(2, channels, 8, 8)
    laid = channels_last(image)
    assert torch.equal(laid, image)
    assert nn.Conv2d(channels, 4, 3)(laid).is_contiguous(memory_format=torch.channels_last)
