"""int8 inference: as good as its rounding allows, whatever the sizes and images; the original is left alone."""

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import LayerScale
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from sequencer2d import quantization
from sequencer2d.layers import MIXERS
from sequencer2d.model import Sequencer2D, SequencerConfig
from sequencer2d.native import available, library
from sequencer2d.preprocessing import Preprocessing
from sequencer2d.quantization import Range, quantize
from sequencer2d.weights import ModelCard, save_model

pytestmark = pytest.mark.skipif(not available(), reason="the package was installed without kernels")


def trained_like(config: SequencerConfig, seed: int = 0) -> Sequencer2D:
    """Weights of all sizes: norms that differ by channel, biases, a head that is not zero."""
    torch.manual_seed(seed)
    model = Sequencer2D(config).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.2, 3.0)
            nn.init.normal_(module.bias, std=0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.5 / module.in_features**0.5)
            nn.init.normal_(module.bias, std=0.2)
    return model


@pytest.fixture
def config() -> SequencerConfig:
    """Sizes that are multiples of nothing."""
    return SequencerConfig(
        layers=(2, 2),
        patch_sizes=(2, 2),
        embed_dims=(23, 41),
        hidden_sizes=(5, 11),
        mlp_ratios=(2.5, 3.0),
        num_classes=7,
    )


@torch.no_grad()
def similarity(quantized: nn.Module, model: nn.Module, images: Tensor) -> float:
    """Lowest cosine between the two models' logits for an image, beside what all images have in common."""
    ours, theirs = quantized(images), model(images)
    return F.cosine_similarity(ours, theirs, dim=-1).min().item()


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("stem_widths", [(), (9, 23)])
def test_logits_hardly_change(config: SequencerConfig, stem_widths: tuple[int, ...], pad: bool) -> None:
    config = replace(config, stem_widths=stem_widths, patch_sizes=(4 if stem_widths else 2, 2), pad=pad)
    model = trained_like(config)
    quantized = quantize(model, torch.randn(24, 3, 20, 20))
    for shape in ((3, 3, 20, 20), (1, 3, 20, 20), (2, 3, 33, 18)):
        assert similarity(quantized, model, torch.randn(shape)) > 0.99
    assert quantized(torch.randn(0, 3, 20, 20)).shape == (0, 7)


def test_top1_hardly_changes(config: SequencerConfig) -> None:
    model = trained_like(config)
    quantized = quantize(model, torch.randn(24, 3, 20, 20))
    images = torch.randn(200, 3, 20, 20)
    with torch.no_grad():
        ours, theirs = quantized(images), model(images)
    best = theirs.topk(2).values
    clear = best[:, 0] - best[:, 1] > 0.1 * theirs.std()
    assert clear.sum() > 100
    assert (ours.argmax(-1) == theirs.argmax(-1))[clear].all()


def test_a_linear_layer_is_within_its_rounding() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(20, 30), torch.randn(20)
    x = torch.randn(500, 30) * torch.logspace(-2, 2, 30) + torch.randn(30)
    seen = Range(30)
    seen.add(x)
    linear, scale, shift = quantization._linear(weight, bias, seen)
    levels = (x * scale + shift).double().round().clamp(0, 255)
    y = linear.scale.double() * (levels @ linear.weight.double().T) + linear.bias.double()
    by_level = (weight / scale).double()
    inputs = 0.5 * by_level.abs().sum(1)  # of every input half a level
    weights = 0.5 * linear.scale.double() * 255 * 30  # of every weight half of its own
    assert ((y - F.linear(x, weight, bias)).abs() <= inputs + weights).all()
    of_mean = (
        by_level.square().sum(1) / 12 / len(x)
    ).sqrt()  # which rounding leaves; that of the weights leaves nothing
    assert ((y - F.linear(x, weight, bias)).mean(0).abs() <= 4 * of_mean).all()


def test_constant_channels_and_a_block_of_zeros(config: SequencerConfig) -> None:
    model = trained_like(config)
    blocks = [block for stage in model.stages for block in stage.blocks]  # type: ignore[union-attr]
    with torch.no_grad():
        blocks[0].norm1.weight.zero_()  # all inputs of the LSTMs are constant
        blocks[1].norm2.weight[3:9] = 0
        blocks[2].mlp_channels.fc1.weight.zero_()
        blocks[3].mlp_channels.fc2.weight.zero_()
        for name in ("rnn_v", "rnn_h"):
            for parameter in getattr(blocks[3].rnn_tokens, name).parameters():
                parameter.zero_()  # hidden states are zero
    images = torch.randn(8, 3, 16, 16)
    assert similarity(quantize(model, images), model, images) > 0.99


def test_an_outlier_channel_does_not_spoil_the_others(config: SequencerConfig) -> None:
    model = trained_like(config)
    for stage in model.stages:
        for block in stage.blocks:  # type: ignore[union-attr]
            with torch.no_grad():
                block.norm1.weight[2] *= 300
                block.norm2.weight[2] *= 300
                for name in ("weight_ih_l0", "weight_ih_l0_reverse"):
                    getattr(block.rnn_tokens.rnn_v, name)[:, 2] /= 300
                    getattr(block.rnn_tokens.rnn_h, name)[:, 2] /= 300
                block.mlp_channels.fc1.weight[:, 2] /= 300
    images = torch.randn(8, 3, 16, 16)
    assert similarity(quantize(model, images), model, images) > 0.99


def test_images_unlike_those_measured_give_numbers(config: SequencerConfig) -> None:
    model = trained_like(config)
    grey = torch.full((2, 3, 16, 16), 0.3)
    for quantized in (quantize(model, grey), quantize(model, torch.randn(4, 3, 16, 16))):
        for images in (grey, torch.zeros(1, 3, 16, 16), torch.randn(2, 3, 16, 16), 1e4 * torch.randn(2, 3, 16, 16)):
            assert quantized(images).isfinite().all()
    assert similarity(quantize(model, grey), model, grey) > 0.99


def test_an_image_that_holds_no_number_is_not_answered_with_one(config: SequencerConfig) -> None:
    quantized = quantize(trained_like(config), torch.randn(4, 3, 16, 16))
    images = torch.randn(2, 3, 16, 16)
    images[1, 0, 3, 4] = torch.nan
    logits = quantized(images)
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


def test_the_original_stays_as_it_is(config: SequencerConfig) -> None:
    model = trained_like(config).train()
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(4, 3, 16, 16)
    quantized = quantize(model, images)
    expected = quantized(images)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in (*model.modules(), *quantized.modules()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(quantized(images), expected)
    assert torch.equal(copy.deepcopy(quantized)(images), expected)


def test_inputs_and_maps_of_stages_are_not_written_over(config: SequencerConfig) -> None:
    quantized = quantize(trained_like(config), torch.randn(4, 3, 16, 16))
    x = torch.randn(2, 5, 6, 23)
    before = x.clone()
    y = quantized.stages[0].blocks(x)  # type: ignore[union-attr, operator]
    assert torch.equal(x, before)
    assert not torch.equal(y, x)
    permuted = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(quantized.stages[0].blocks(permuted), y)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("mixer", [name for name in MIXERS if name != "BiLSTM2D"])
def test_other_mixers_are_refused_by_name(mixer: str) -> None:
    config = SequencerConfig(
        layers=(1,), patch_sizes=(2,), embed_dims=(8,), hidden_sizes=(2 if mixer == "UnfusedBiLSTM2D" else 4,),
        mlp_ratios=(1.0,), mixer=mixer,
    )  # fmt: skip
    with pytest.raises(ValueError, match=rf"stages\.0\.blocks\.0\.rnn_tokens is {mixer}, so use bf16"):
        quantize(Sequencer2D(config), torch.randn(1, 3, 8, 8))


OTHER_PARTS: dict[str, Callable[[Any], Any]] = {
    "activation": lambda block: setattr(block.mlp_channels, "act", nn.ReLU()),
    "approximate GELU": lambda block: setattr(block.mlp_channels, "act", nn.GELU(approximate="tanh")),
    "layer scale": lambda block: setattr(block, "drop_path", LayerScale(23)),
    "linear layer": lambda block: parametrizations.weight_norm(block.rnn_tokens.fc),
    "norm": lambda block: setattr(block, "norm2", nn.Identity()),
    "another epsilon": lambda block: setattr(block.norm2, "eps", 1e-3),
    "norm without bias": lambda block: setattr(block.norm1, "bias", None),
    "LSTM without biases": lambda block: setattr(
        block.rnn_tokens, "rnn_v", nn.LSTM(23, 5, bias=False, batch_first=True, bidirectional=True)
    ),
    "one direction": lambda block: setattr(block.rnn_tokens, "rnn_h", nn.LSTM(23, 10, batch_first=True)),
    "hook": lambda block: block.mlp_channels.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("part", OTHER_PARTS)
def test_other_parts_of_a_block_are_refused_by_name(part: str, config: SequencerConfig) -> None:
    model = trained_like(config)
    OTHER_PARTS[part](model.get_submodule("stages.0.blocks.1"))
    with pytest.raises(ValueError, match=r"stages\.0\.blocks\.1 has other parts or hooks; use bf16"):
        quantize(model, torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize("inference", [False, True])
def test_it_follows_its_state_dict(inference: bool, config: SequencerConfig) -> None:
    images = torch.randn(4, 3, 16, 16)
    with torch.inference_mode(inference):
        one, other = (quantize(trained_like(config, seed), images) for seed in (1, 2))
    for _ in range(2):
        expected = other(images)
        assert not torch.equal(one(images), expected)
        one.load_state_dict(other.state_dict())
        assert torch.equal(one(images), expected)
        assert torch.equal(copy.deepcopy(one)(images), expected)
        other = quantize(trained_like(config, 3), images)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_it_is_not_traced_since_a_trace_would_hold_no_block(config: SequencerConfig) -> None:
    images = torch.randn(2, 3, 16, 16)
    with pytest.raises(RuntimeError, match="an int8 model cannot be traced"):
        torch.jit.trace(quantize(trained_like(config), images), images)


def test_a_model_with_checkpointing_is_taken(config: SequencerConfig) -> None:
    model, images = trained_like(config), torch.randn(2, 3, 16, 16)
    expected = quantize(model, images)(images)
    model.set_grad_checkpointing()
    assert torch.equal(quantize(model, images)(images), expected)


def test_what_cannot_be_is_said(config: SequencerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = trained_like(config), torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match="no images to measure ranges on"):
        quantize(model, images[:0])
    with pytest.raises(ValueError, match="what is no finite number"):
        quantize(model, images * torch.nan)
    quantized = quantize(model, images)
    with pytest.raises(ValueError, match=r"stages\.0\.blocks is int8 already"):
        quantize(quantized, images)
    with pytest.raises(RuntimeError, match="int8 has no gradients"):
        quantized(images.requires_grad_())
    with pytest.raises(ValueError, match="int8 is for the CPU, and the images are on meta"):
        quantized.stages[0].blocks(torch.zeros(1, 2, 2, 23, device="meta"))  # type: ignore[union-attr, operator]

    def missing() -> None:
        raise library.Unavailable("no compiler")

    monkeypatch.setattr(library, "kernel", missing)
    with pytest.raises(ValueError, match="int8 needs the CPU kernels: no compiler"):
        quantize(model, images)


def test_it_says_where_it_is_slow(
    config: SequencerConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(library.VARIABLE, "portable")
    library.kernel.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "sequencer2d"):
            quantize(trained_like(config), torch.randn(2, 3, 16, 16))
        assert "kernel portable, without instructions for it" in caplog.text
    finally:
        monkeypatch.undo()
        library.kernel.cache_clear()


def test_another_kernel_later_is_no_trouble(config: SequencerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(4, 3, 16, 16)
    quantized = quantize(trained_like(config), images)
    expected = quantized(images)
    for name in library.kernels():
        monkeypatch.setenv(library.VARIABLE, name)
        library.kernel.cache_clear()
        torch.testing.assert_close(quantized(images), expected, rtol=0.02, atol=0.05)
    monkeypatch.undo()
    library.kernel.cache_clear()


def test_a_quantised_model_is_no_model_file(config: SequencerConfig, tmp_path: Path) -> None:
    quantized = quantize(trained_like(config), torch.randn(4, 3, 16, 16))
    card = ModelCard(
        architecture="", config=config, class_names=tuple("abcdefg"), preprocessing=Preprocessing(image_size=16)
    )
    with pytest.raises(ValueError, match="save the model that it was made from"):
        save_model(quantized, card, tmp_path / "model.safetensors")
    assert not [*tmp_path.iterdir()]
