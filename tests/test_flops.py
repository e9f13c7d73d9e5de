"""Costs in closed form against counts of what is really computed and kept."""

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from reference import ByHand, FrugalLSTM, replace_rnns
from sequencer2d.flops import attention_costs, bilstm2d_costs, costs
from sequencer2d.layers import MIXERS, BiLSTM2D, set_backend
from sequencer2d.model import Sequencer2D, SequencerConfig
from sequencer2d.zoo import VARIANTS, get_config


@pytest.mark.parametrize(
    ("name", "millions", "giga"),
    [("sequencer2d_s", 27.65, 8.36), ("sequencer2d_m", 38.31, 11.08), ("sequencer2d_l", 54.30, 16.53)],
)
def test_the_papers_figures(name: str, millions: float, giga: float) -> None:
    cost = costs(get_config(name), 224)
    assert round(cost.parameters / 1e6, 2) == millions
    assert round(cost.macs / 1e9, 2) == giga


def config_for(mixer: str, **changes: Any) -> SequencerConfig:
    hidden = {"UnfusedBiLSTM2D": 4}.get(mixer, 8)
    return SequencerConfig(
        layers=(1, 2),
        patch_sizes=(4, 2),
        embed_dims=(16, 16),
        hidden_sizes=(hidden, hidden),
        mlp_ratios=(2.0, 3.0),
        num_classes=3,
        **{"mixer": mixer, **changes},
    )


def counted_macs(model: nn.Module, image: Tensor) -> int:
    """Matrix products and convolutions that PyTorch dispatches, and fvcore's share of the norms."""
    written_out = copy.deepcopy(model)
    replace_rnns(written_out, ByHand)
    norms = 0

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal norms
        norms += output.numel() * (5 if isinstance(module, nn.LayerNorm) else 2)

    for module in written_out.modules():
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            module.register_forward_hook(note)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        written_out(image)
    return counter.get_total_flops() // 2 + norms


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("size", [(16, 16), (19, 34)])
def test_macs_are_those_counted_over_a_written_out_loop(mixer: str, size: tuple[int, int]) -> None:
    model = Sequencer2D(config_for(mixer))
    assert costs(model.config, size).macs == counted_macs(model, torch.zeros(1, 3, *size))


STEMS = {
    "halvings only": {"stem_widths": (8, 16)},
    "with a projection": {"stem_widths": (8, 12)},
    "with residuals": {"stem_widths": (8, 12), "stem_depths": (2, 3)},
}


def test_macs_where_borders_are_cut_off() -> None:
    model = Sequencer2D(config_for("BiLSTM2D", pad=False)).eval()
    assert costs(model.config, (23, 34)).macs == counted_macs(model, torch.zeros(1, 3, 23, 34))
    assert costs(replace(model.config, pad=True), (23, 34)).macs > costs(model.config, (23, 34)).macs


@pytest.mark.parametrize("stem", STEMS.values(), ids=STEMS)
@pytest.mark.parametrize("size", [(16, 16), (19, 34)])
def test_macs_of_a_convolutional_stem(size: tuple[int, int], stem: dict[str, Any]) -> None:
    model = Sequencer2D(config_for("BiLSTM2D", **stem, in_chans=1)).eval()
    assert costs(model.config, size).macs == counted_macs(model, torch.zeros(1, 1, *size))


@pytest.mark.parametrize("size", [0, -224, (224, 0), (-1, 224)])
def test_what_is_no_size_is_named(size: Any) -> None:
    with pytest.raises(ValueError, match=r"image_size=.* must be a side in pixels, such as 224, or height and width"):
        costs(get_config("sequencer2d_s"), size)


def test_a_counter_that_skips_lstms_misses_two_fifths() -> None:
    model = Sequencer2D(get_config("sequencer2d_s")).eval()
    set_backend(model, "torch")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() / 2 < 0.6 * costs(model.config, 224).macs


def kept_values(module: nn.Module, x: Tensor) -> int:
    """Values that autograd keeps for the backward pass, each storage once, parameters and flags left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(t.untyped_storage().nbytes() // 4 for address, t in kept.items() if address not in own)


@pytest.mark.parametrize(
    "name", ["sequencer2d_s", "sequencer2d_conv_t_patch4_32", "sequencer2d_t_patch2_32", "v_sequencer_s_h"]
)
def test_training_activations_are_those_that_autograd_keeps_beside_a_frugal_lstm(name: str) -> None:
    variant = VARIANTS[name]
    config = replace(variant.config, layers=tuple(1 for _ in variant.config.layers))
    model, batch = Sequencer2D(config).train(), 2
    set_backend(model, "torch")
    replace_rnns(model, FrugalLSTM)
    measured = kept_values(model, torch.zeros(batch, 3, variant.image_size, variant.image_size))
    assert measured / batch == pytest.approx(costs(config, variant.image_size).training_activations, rel=0.05)


def peak_values(module: nn.Module, x: Tensor) -> int:
    """Most values that are allocated at once while a module runs, beside its parameters and input."""
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        module(x)
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # type: ignore
    return max(itertools.accumulate(sizes)) // 4


@pytest.mark.parametrize("name", ["sequencer2d_s", "sequencer2d_conv_t_patch4_32", "v_sequencer_s_h"])
def test_inference_activations_are_those_alive_at_once(name: str) -> None:
    variant = VARIANTS[name]
    config = replace(variant.config, layers=tuple(1 for _ in variant.config.layers))
    model = Sequencer2D(config).eval()
    set_backend(model, "torch")
    replace_rnns(model, FrugalLSTM)
    batch = 8  # beside which the weights that a convolution brings into its own order are few
    measured = peak_values(model, torch.zeros(batch, 3, variant.image_size, variant.image_size))
    assert measured / batch == pytest.approx(costs(config, variant.image_size).inference_activations, rel=0.1)


def test_activations_grow_with_the_area_and_macs_too() -> None:
    config = get_config("sequencer2d_s")
    small, large = costs(config, 224), costs(config, 896)
    for name in ("macs", "training_activations", "inference_activations"):
        assert getattr(large, name) == pytest.approx(16 * getattr(small, name), rel=1e-3)


@pytest.mark.parametrize("tokens", [16, 64])
def test_one_bilstm2d(tokens: int) -> None:
    layer = BiLSTM2D(24, 6)
    side = round(tokens**0.5)
    grid = torch.zeros(2, side, side, 24)
    cost = bilstm2d_costs(tokens, 24, 6)
    assert 2 * cost.macs == counted_macs(nn.Sequential(layer), grid)
    replace_rnns(layer, FrugalLSTM)
    assert kept_values(layer, grid.clone().requires_grad_()) / 2 == pytest.approx(cost.training_activations, rel=0.01)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, fused: bool) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.num_heads, self.fused = num_heads, fused

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * (C // self.num_heads) ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1) @ v
        return self.proj(y.transpose(1, 2).reshape(B, N, C))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tokens", [64, 400])
def test_self_attention(tokens: int, fused: bool) -> None:
    layer, x = Attention(32, 4, fused), torch.zeros(1, tokens, 32)
    cost = attention_costs(tokens, 32, 4, fused=fused)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        Attention(32, 4, fused=False)(x)
    assert cost.macs == counter.get_total_flops() // 2
    assert kept_values(layer, x.requires_grad_()) == pytest.approx(cost.training_activations, rel=0.1)
