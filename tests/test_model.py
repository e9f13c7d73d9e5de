"""Sequencer2D: published counts, timm's logits, the table of initialisations, and images of any size."""

import math
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.layers.drop import DropPath
from torch import nn
from torch.nn import functional as F

from sequencer2d.model import Sequencer2D, SequencerConfig
from sequencer2d.zoo import create_model

PAPER_MODELS = ["sequencer2d_s", "sequencer2d_m", "sequencer2d_l"]
CONV_STEM: dict[str, Any] = {"patch_sizes": (4, 2), "stem_widths": (4, 8)}


def with_random_head(model: Sequencer2D) -> Sequencer2D:
    """In evaluation mode, with a head that says something: a new one is zero and would hide every difference."""
    assert isinstance(model.head.fc, nn.Linear)
    nn.init.normal_(model.head.fc.weight)
    nn.init.normal_(model.head.fc.bias)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "millions"), [("sequencer2d_s", 27.65), ("sequencer2d_m", 38.31), ("sequencer2d_l", 54.30)]
)
def test_paper_models_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(name)
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert round(count / 1e6, 2) == millions
    assert count == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_logits_are_those_of_timm_with_the_same_weights(name: str) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(name).eval()
    head = theirs.get_submodule("head.fc")
    assert isinstance(head, nn.Linear)
    nn.init.normal_(head.weight, std=0.05)
    nn.init.normal_(head.bias)
    ours = create_model(name).eval()
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        expected = theirs(image)
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(image), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("sequencer2d_s", {}), ("sequencer2d_t_patch4_32", {"stem_widths": (64, 96)})],
    ids=["plain patches", "convolutional stem"],
)
def test_every_parameter_begins_as_the_table_says(name: str, overrides: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=10, **overrides)
    modules = dict(model.named_modules())
    for path, parameter in model.named_parameters():
        owner, _, kind = path.rpartition(".")
        module = modules[owner]
        if isinstance(module, nn.LSTM):
            assert_uniform(parameter, 1 / math.sqrt(module.hidden_size), path)
        elif owner == "head.fc" or (kind == "bias" and ".mlp_channels." not in path):
            assert not parameter.any(), path
        elif kind == "bias" and isinstance(module, nn.Linear):
            assert parameter.std().item() == pytest.approx(1e-6, rel=0.3), path
        elif isinstance(module, nn.Conv2d):
            fan_in = parameter[0].numel()
            assert parameter.std().item() == pytest.approx(1 / math.sqrt(fan_in), rel=0.05), path
            assert abs(parameter.mean().item()) < 5 / math.sqrt(fan_in * parameter.numel()), path
        elif isinstance(module, nn.Linear):
            assert_uniform(parameter, math.sqrt(6 / (module.in_features + module.out_features)), path)
        else:
            assert isinstance(module, nn.LayerNorm | nn.BatchNorm2d), path
            assert torch.equal(parameter, torch.full_like(parameter, kind == "weight")), path


def assert_uniform(values: torch.Tensor, bound: float, path: str) -> None:
    assert values.abs().max() <= bound, path
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=3 / math.sqrt(values.numel())), path


def test_init_weights_begins_every_parameter_anew(tiny_config: SequencerConfig) -> None:
    model = Sequencer2D(replace(tiny_config, **CONV_STEM))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 100.0)
    model.init_weights()
    left = [path for path, parameter in model.named_parameters() if parameter.abs().max() > 2]
    assert not left


def test_every_layer_norm_has_the_official_epsilon() -> None:
    norms = [module for module in create_model("sequencer2d_xs").modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * (2 + 2 + 4 + 3) + 1
    assert {norm.eps for norm in norms} == {1e-6}


def test_layers_may_begin_as_pytorch_makes_them(tiny_config: SequencerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny_config, **CONV_STEM, init="torch")
    torch.manual_seed(0)
    model = Sequencer2D(config)
    with_positions = Sequencer2D(replace(config, pos_embed_size=(4, 4)))
    monkeypatch.setattr(Sequencer2D, "init_weights", lambda self: None)
    torch.manual_seed(0)
    torch.testing.assert_close(model.state_dict(), Sequencer2D(config).state_dict(), rtol=0, atol=0)
    assert model.get_parameter("head.fc.weight").any()
    model.reset_classifier(7)
    assert model.get_parameter("head.fc.weight").any()
    assert with_positions.get_parameter("pos_embed.weight").std().item() == pytest.approx(0.02, rel=0.3)


def stochastic_depths(model: Sequencer2D) -> list[float]:
    return [
        block.drop_path.drop_prob if isinstance(block.drop_path, DropPath) else 0.0
        for stage in model.stages
        for block in stage.blocks  # type: ignore[union-attr]
    ]


def test_stochastic_depth_grows_linearly_over_all_blocks(tiny_config: SequencerConfig) -> None:
    model = Sequencer2D(replace(tiny_config, layers=(2, 3), drop_path_rate=0.2))
    assert stochastic_depths(model) == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_stochastic_depth_may_be_the_same_in_all_blocks(tiny_config: SequencerConfig) -> None:
    model = Sequencer2D(replace(tiny_config, drop_path_rate=0.2, drop_path_decay=False))
    assert stochastic_depths(model) == pytest.approx([0.2] * 4)


def test_stochastic_depth_of_a_single_block_is_zero(tiny_config: SequencerConfig) -> None:
    one_block = {name: getattr(tiny_config, name)[:1] for name in ("layers", "patch_sizes", "embed_dims")}
    one_block |= {"hidden_sizes": (2,), "mlp_ratios": (2.0,), "layers": (1,)}
    model = Sequencer2D(replace(tiny_config, **one_block, drop_path_rate=0.5))
    assert not [module for module in model.modules() if isinstance(module, DropPath)]


def test_drop_rate_reaches_the_head_and_only_in_training(tiny_config: SequencerConfig) -> None:
    model = Sequencer2D(replace(tiny_config, drop_rate=0.5))
    features = torch.ones(64, 2, 2, 16)
    dropped = (model.forward_head(features, pre_logits=True) == 0).float().mean().item()
    assert dropped == pytest.approx(0.5, abs=0.1)
    assert torch.equal(model.eval().forward_head(features, pre_logits=True), torch.ones(64, 16))


def test_proj_drop_rate_reaches_every_mlp_and_nothing_else(tiny_config: SequencerConfig) -> None:
    model = Sequencer2D(replace(tiny_config, proj_drop_rate=0.3))
    rates = {path: module.p for path, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert {path for path, rate in rates.items() if rate == 0.3} == {path for path in rates if "mlp" in path}
    assert len(rates) == 4 * 2 + 1


def test_an_image_that_the_stem_does_not_divide_counts_as_padded() -> None:
    """224 pixels and 7×7 patches would crop 225×230 to 224×224."""
    torch.manual_seed(0)
    model = with_random_head(create_model("sequencer2d_xs", num_classes=5))
    image = torch.randn(1, 3, 225, 230)
    with torch.inference_mode():
        assert torch.equal(model(image), model(F.pad(image, (0, 1, 0, 6))))
        assert not torch.allclose(model(image), model(image[..., :224, :224]), atol=1e-3)


@pytest.mark.parametrize("overrides", [{}, CONV_STEM], ids=["plain patches", "convolutional stem"])
@pytest.mark.parametrize("size", [(16, 16), (17, 19), (15, 13), (3, 2), (1, 1)])
def test_every_border_pixel_counts(
    size: tuple[int, int], overrides: dict[str, Any], tiny_config: SequencerConfig
) -> None:
    torch.manual_seed(0)
    model = with_random_head(Sequencer2D(replace(tiny_config, **overrides)))
    image = torch.rand(1, 3, *size, requires_grad=True)
    model(image).square().sum().backward()
    assert image.grad is not None
    for across in (2, 3):
        assert (image.grad.abs().sum(dim=(0, 1, across)) > 0).all()


def test_a_batch_is_its_images_one_by_one(tiny_config: SequencerConfig) -> None:
    torch.manual_seed(0)
    model = with_random_head(Sequencer2D(replace(tiny_config, **CONV_STEM))).double()
    images = torch.randn(4, 3, 16, 20, dtype=torch.float64)
    logits = model(images)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(model(images[order]), logits[order], rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.cat([model(image[None]) for image in images]), logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("in_chans", [1, 4])
@pytest.mark.parametrize("num_classes", [1, 7])
def test_any_number_of_channels_and_classes(in_chans: int, num_classes: int, tiny_config: SequencerConfig) -> None:
    model = Sequencer2D(replace(tiny_config, in_chans=in_chans, num_classes=num_classes))
    assert model(torch.randn(2, in_chans, 16, 16)).shape == (2, num_classes)


def test_without_classes_the_model_returns_the_pooled_features(tiny_config: SequencerConfig) -> None:
    model = Sequencer2D(replace(tiny_config, num_classes=0)).eval()
    image = torch.randn(2, 3, 16, 16)
    pooled = model.forward_features(image).mean(dim=(1, 2))
    assert pooled.shape == (2, model.num_features)
    assert torch.equal(model(image), pooled)
    assert not any(path.startswith("head") for path in model.state_dict())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", ()),
        ("layers", (2, 0)),
        ("patch_sizes", (2,)),
        ("patch_sizes", (2, -1)),
        ("embed_dims", (8, 16, 32)),
        ("hidden_sizes", (0, 4)),
        ("mlp_ratios", (2.0,)),
        ("mlp_ratios", (2.0, 0.0)),
        ("mlp_ratios", (2.0, math.nan)),
        ("mlp_ratios", (2.0, math.inf)),
        ("num_classes", -1),
        ("in_chans", 0),
        ("drop_rate", 1.0),
        ("proj_drop_rate", -0.1),
        ("drop_path_rate", math.nan),
        ("stem_widths", (4, 8)),
        ("stem_widths", (0,)),
        ("stem_depths", (1,)),
        ("mixer", "Attention"),
        ("global_pool", ""),
        ("pos_embed_size", (4,)),
        ("pos_embed_size", (4, 0)),
    ],
)
def test_an_impossible_architecture_is_an_error_that_names_the_field(
    field: str, value: Any, tiny_config: SequencerConfig
) -> None:
    with pytest.raises(ValueError, match=field):
        replace(tiny_config, **{field: value})


ROUGH = {"float64": (torch.float64, 1e-5), "bfloat16": (torch.bfloat16, 0.05), "float16": (torch.float16, 0.01)}
"""Data types, and how far in relation logits may be from those in single precision."""


@pytest.mark.parametrize("name", ROUGH)
def test_a_model_of_another_data_type(name: str, tiny_config: SequencerConfig) -> None:
    kind, tolerance = ROUGH[name]
    model, image = with_random_head(Sequencer2D(tiny_config)), torch.randn(4, 3, 17, 22)
    exact = model(image).detach()
    logits = model.to(kind)(image.to(kind))
    assert logits.dtype == kind
    assert (logits.detach().float() - exact).norm() < tolerance * exact.norm()
    F.cross_entropy(logits.float(), torch.arange(4)).backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.dtype == kind, path
        assert parameter.grad.isfinite().all(), path


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("overrides", [{}, CONV_STEM], ids=["plain patches", "convolutional stem"])
def test_autocast_gives_nearly_the_same_and_gradients_in_single_precision(
    name: str, overrides: dict[str, Any], tiny_config: SequencerConfig
) -> None:
    kind, tolerance = ROUGH[name]
    model = with_random_head(Sequencer2D(replace(tiny_config, **overrides)))
    image, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    exact = model(image)
    F.cross_entropy(exact, labels).backward()
    before = {path: parameter.grad for path, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", kind):
        logits = model(image)
    assert logits.dtype == kind
    assert (logits - exact).norm() < tolerance * exact.norm()
    F.cross_entropy(logits.float(), labels).backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.dtype == torch.float32, path
    after = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    gradient = torch.cat([grad.flatten() for grad in before.values() if grad is not None])
    assert (after - gradient).norm() < 3 * tolerance * gradient.norm()


def test_a_new_head_has_the_dtype_of_the_model(tiny_config: SequencerConfig) -> None:
    model = Sequencer2D(replace(tiny_config, num_classes=0)).double()
    model.reset_classifier(3)
    assert model(torch.randn(1, 3, 16, 16, dtype=torch.float64)).dtype == torch.float64
    model.reset_classifier(0, "")
    with pytest.raises(ValueError, match=r"num_classes=0, or 'avg'"):
        model.reset_classifier(3)
