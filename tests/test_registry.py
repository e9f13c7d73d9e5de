"""Our models by timm's name and in timm's ways: what timm's own model tests ask, in small, and more about features."""

import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.layers import resample_abs_pos_embed_nhwc
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from sequencer2d import registry
from sequencer2d.layers import resample_grid
from sequencer2d.model import Sequencer2D
from sequencer2d.zoo import VARIANTS, create_model, timm_name

SMALL: dict[str, Any] = {"layers": (1, 1, 1, 1), "embed_dims": (16, 24, 24, 24), "hidden_sizes": (4, 6, 6, 6)}


def small(**arguments: Any) -> Any:
    """S in miniature, by timm."""
    torch.manual_seed(0)
    return timm.create_model("sequencer2d_s_ref", **{**SMALL, **arguments}).eval()


IMAGE = torch.randn(2, 3, 56, 70)


def test_every_variant_is_registered_and_timms_own_stay_timms() -> None:
    names = set(timm.list_models(module="registry"))
    assert names == {timm_name(name) for name in VARIANTS}
    assert {"sequencer2d_s_ref", "gru_sequencer2d_s", "v_sequencer_s", "sequencer2d_conv_t_patch4_32"} <= names
    assert not isinstance(timm.create_model("sequencer2d_s"), Sequencer2D)
    assert isinstance(timm.create_model("sequencer2d_s_ref"), Sequencer2D)
    assert registry.default_cfgs["sequencer2d_s_ref"].default.hf_hub_id == "timm/sequencer2d_s.in1k"


def test_arguments_are_timms() -> None:
    model = small(num_classes=7, in_chans=1, drop_rate=0.1, drop_path_rate=0.2, img_size=56)
    assert model(IMAGE[:, :1]).shape == (2, 7)
    assert (model.num_classes, model.in_chans, model.num_features) == (7, 1, 24)
    assert model.default_cfg["input_size"] == (3, 224, 224)
    assert resolve_data_config(model=model)["crop_pct"] == 0.875


def test_models_of_our_own_zoo_tell_timm_their_preprocessing() -> None:
    config = resolve_data_config(model=create_model("sequencer2d_s_392", layers=(1, 1, 1, 1)))
    assert (config["input_size"], config["crop_pct"], config["interpolation"]) == ((3, 392, 392), 1.0, "bicubic")


def test_a_head_can_be_replaced_and_removed() -> None:
    model = small(num_classes=7)
    features = model.forward_features(IMAGE)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, 24)
    model.reset_classifier(3)
    assert model(IMAGE).shape == (2, 3)
    assert not model(IMAGE).any(), "a new classifier is zero, as at first"
    assert model.get_classifier().weight.shape == (3, 24)
    assert model.num_classes == model.config.num_classes == 3
    model.reset_classifier(0)
    assert torch.equal(model(IMAGE), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(IMAGE), features)
    assert small(num_classes=0, global_pool="")(IMAGE).shape == (2, 4, 5, 24)


def test_features_of_all_four_stages_at_any_resolution() -> None:
    extractor = small(features_only=True)
    assert extractor.feature_info.channels() == [16, 24, 24, 24]
    assert extractor.feature_info.reduction() == [7, 14, 14, 14]
    for height, width in ((56, 70), (63, 21), (100, 45)):
        maps = extractor(torch.randn(1, 3, height, width))
        assert [tuple(y.shape) for y in maps] == [
            (1, 16, -(-height // 7), -(-width // 7)),
            *[(1, 24, -(-height // 14), -(-width // 14))] * 3,
        ]


@pytest.mark.parametrize(
    ("out_indices", "stages"), [((0, 3), (0, 3)), ((1,), (1,)), ((-1,), (3,)), ((0, 1, 2), (0, 1, 2))]
)
def test_features_can_be_chosen(out_indices: tuple[int, ...], stages: tuple[int, ...]) -> None:
    whole = small()
    _, maps = whole.forward_intermediates(IMAGE)
    chosen = small(features_only=True, out_indices=out_indices)
    chosen.model.load_state_dict({k: v for k, v in whole.state_dict().items() if k in chosen.model.state_dict()})
    for given, stage in zip(chosen(IMAGE), stages, strict=True):
        assert torch.equal(given, maps[stage])


def test_features_carry_gradients_for_a_detector() -> None:
    extractor = small(features_only=True).train()
    torch.stack([y.square().mean() for y in extractor(IMAGE)]).sum().backward()
    assert all(
        parameter.grad is not None for name, parameter in extractor.named_parameters() if "norm." not in name[:12]
    )


@pytest.mark.parametrize("output_fmt", ["NCHW", "NHWC"])
def test_intermediates(output_fmt: str) -> None:
    model = small()
    final, maps = model.forward_intermediates(IMAGE, output_fmt=output_fmt)
    assert torch.equal(final, model.forward_features(IMAGE))
    assert [tuple(y.shape) for y in maps][-1] == ((2, 24, 4, 5) if output_fmt == "NCHW" else (2, 4, 5, 24))
    (last,) = model.forward_intermediates(IMAGE, indices=1, norm=True, intermediates_only=True, output_fmt="NHWC")
    assert torch.equal(last, final)
    early, maps = model.forward_intermediates(IMAGE, indices=[0, 1], stop_early=True, output_fmt="NHWC")
    assert torch.equal(early, maps[-1])
    expected = model.forward_intermediates(IMAGE, indices=[1], norm=True, intermediates_only=True)
    model.prune_intermediate_layers([1])
    pruned, maps = model.forward_intermediates(IMAGE, indices=[1], norm=True)
    assert torch.equal(maps[0], expected[0])
    assert torch.equal(pruned.permute(0, 3, 1, 2), expected[0])
    with pytest.raises(ValueError, match="output_fmt='NLC'"):
        model.forward_intermediates(IMAGE, output_fmt="NLC")


def test_checkpointing_changes_nothing_but_memory() -> None:
    """Measured by what the forward pass keeps for the backward pass."""
    model = small(layers=(3, 3, 3, 3)).train()
    nn.init.normal_(model.head.fc.weight)

    def run() -> tuple[Tensor, list[Tensor], int]:
        kept: dict[int, int] = {}
        model.zero_grad()

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(IMAGE)
        logits.square().sum().backward()
        return logits.detach(), [parameter.grad.clone() for parameter in model.parameters()], sum(kept.values())

    logits, gradients, kept = run()
    model.set_grad_checkpointing()
    logits_2, gradients_2, kept_2 = run()
    assert torch.equal(logits, logits_2)
    torch.testing.assert_close(gradients_2, gradients, rtol=1e-5, atol=1e-6)
    assert kept_2 < 0.5 * kept  # the last block of three keeps all
    model.set_grad_checkpointing(False)
    assert run()[2] == kept


def test_layers_are_ordered_for_layer_decay() -> None:
    model = small(num_classes=7)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    names = dict(model.named_parameters())
    assert len(scales) == len(names)
    path = ["stem.proj.weight", *(f"stages.{i}.blocks.0.rnn_tokens.fc.weight" for i in range(4)), "head.fc.weight"]
    values = [scales[id(names[name])] for name in path]
    assert values == sorted(values)
    assert values[0] < values[-1] == 1.0
    assert scales[id(names["stages.1.downsample.down.weight"])] == values[2]
    coarse = model.group_matcher(coarse=True)
    assert set(timm.models.group_modules(model, coarse)) == set(range(6))


def test_what_is_never_decayed() -> None:
    model = create_model("v_sequencer_s_pe")
    assert model.no_weight_decay() == {"pos_embed.weight"}
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    kept, decayed = (group["params"] for group in groups)
    assert any(parameter is model.pos_embed.get_parameter("weight") for parameter in kept)
    assert all(parameter.ndim > 1 for parameter in decayed)


def test_a_position_embedding_is_resampled_as_timm_does() -> None:
    grid = torch.randn(1, 16, 16, 8)
    torch.testing.assert_close(resample_grid(grid, 10, 20), resample_abs_pos_embed_nhwc(grid, [10, 20]))


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:Converting a tensor:torch.jit.TracerWarning")
def test_it_can_be_traced() -> None:
    model = small(num_classes=7)
    nn.init.normal_(model.head.fc.weight)
    traced: Any = torch.jit.trace(model, IMAGE)
    torch.testing.assert_close(traced(IMAGE[:1]), model(IMAGE[:1]))


@pytest.mark.filterwarnings("ignore:The tensor attributes? .*_flat_weights:UserWarning")  # PyTorch's own, of nn.LSTM
def test_plain_rnns_too_can_be_exported_for_any_batch() -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("rnn_sequencer2d_s", num_classes=7, **SMALL).eval()
    nn.init.normal_(model.head.fc.weight)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (IMAGE,), dynamic_shapes=({0: batch},))
    for image in (IMAGE, torch.randn(5, 3, 56, 70)):
        torch.testing.assert_close(program.module()(image), model(image))


@pytest.mark.filterwarnings("ignore:The tensor attributes? .*_flat_weights:UserWarning")
@pytest.mark.filterwarnings("ignore:_check_is_size will be removed:FutureWarning")  # PyTorch's own, in its helper
@pytest.mark.parametrize(
    ("name", "patch"),
    [
        ("sequencer2d_s_ref", "register_lstm_while_loop_decomposition"),
        pytest.param("sequencer2d_s_add", "register_lstm_while_loop_decomposition", marks=pytest.mark.slow),
        pytest.param("gru_sequencer2d_s", "register_gru_while_loop_decomposition", marks=pytest.mark.slow),
    ],
)
def test_it_can_be_exported_for_any_batch_and_any_multiple_of_the_stride(name: str, patch: str) -> None:
    patches = pytest.importorskip("torch.export._patches", reason="this torch unrolls recurrent layers in export")
    two_stages = {"patch_sizes": (7, 2), "mlp_ratios": (3.0, 3.0)}
    two_stages |= {key: value[:2] for key, value in SMALL.items()}
    model: Any = timm.create_model(name, num_classes=7, **two_stages).eval()
    nn.init.normal_(model.head.fc.weight)
    batch, height, width = (torch.export.Dim(name, max=64) for name in ("batch", "height", "width"))
    with torch.no_grad(), getattr(patches, patch)():
        sizes = {0: batch, 2: 14 * height, 3: 14 * width}
        program = torch.export.export(model, (IMAGE,), dynamic_shapes=(sizes,))
    assert not [node for node in program.graph.nodes if "while" in str(node.target)], "the LSTMs stay whole"
    for size in ((56, 70), (28, 28), (140, 42)):
        image = torch.randn(3, 3, *size)
        torch.testing.assert_close(program.module()(image), model(image))


SCRIPT = """
import io
import sys
import warnings

import timm
import torch

import sequencer2d.registry
from sequencer2d.zoo import VARIANTS, timm_name

warnings.simplefilter("ignore", FutureWarning)  # PyTorch has deprecated it
for name, variant in VARIANTS.items():
    if timm_name(name) not in sys.argv[1:]:
        continue
    widths = {
        field: tuple(width // 8 for width in getattr(variant.config, field))
        for field in ("embed_dims", "hidden_sizes", "stem_widths")
    }
    layers = tuple(1 for _ in variant.config.layers)
    model = timm.create_model(timm_name(name), **widths, layers=layers, num_classes=7, drop_path_rate=0.1).eval()
    torch.nn.init.normal_(model.head.fc.weight)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    for size in ((32, 48), (33, 18)):
        image = torch.randn(2, 3, *size)
        torch.testing.assert_close(scripted(image), model(image), msg=f"{name} at {size}")
    model.set_grad_checkpointing()
    torch.jit.script(model.train())(image).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), name
    print(timm_name(name))
"""

QUICK = ["sequencer2d_s_ref", "v_sequencer_s_pe", "sequencer2d_conv_t_patch4_32"]


@pytest.mark.parametrize(
    "names",
    [QUICK, pytest.param([timm_name(name) for name in VARIANTS], marks=pytest.mark.slow)],
    ids=["three", "all"],
)
def test_scripted_it_gives_the_same(names: list[str]) -> None:
    """In a process of its own: TorchScript reads the source, which the checks of the test suite wrap."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == set(names), done.stderr


FX = """
import timm
import torch
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import sequencer2d.registry

model = timm.create_model("sequencer2d_s_ref", layers=(1, 2), patch_sizes=(7, 2), embed_dims=(16, 24),
                          hidden_sizes=(4, 6), mlp_ratios=(3.0, 3.0)).eval()
tracer = {
    "leaf_modules": timm.models.get_notrace_modules(),
    "autowrap_functions": timm.models.get_notrace_functions(),
}
nodes, _ = get_graph_node_names(model, tracer_kwargs=tracer)
assert "stages.0.blocks.0.rnn_tokens.fc" in nodes
wanted = {"stages.1.blocks.0.add_1": "mid", "norm": "last"}
extractor = create_feature_extractor(model, wanted, tracer_kwargs=tracer)
for size in ((56, 70), (30, 44)):
    image = torch.randn(2, 3, *size)
    features = extractor(image)
    torch.testing.assert_close(features["last"], model.forward_features(image))
    assert features["mid"].shape == features["last"].shape
print("as it should be")
"""


def test_fx_extracts_features_by_node() -> None:
    """In a process of its own: a symbolic trace calls with proxies, which the checks of the test suite refuse."""
    done = subprocess.run([sys.executable, "-c", FX], capture_output=True, text=True, check=False)
    assert done.stdout == "as it should be\n", done.stderr


def test_pruning_takes_norm_and_head_of_stages_that_are_gone() -> None:
    model = small(num_classes=7)
    expected = model.forward_intermediates(IMAGE, indices=[0], intermediates_only=True)[0]
    model.prune_intermediate_layers([0], prune_head=False)
    assert torch.equal(model(IMAGE), expected.permute(0, 2, 3, 1))
    dim = model.config.embed_dims[0]
    assert (model.num_features, model.head_hidden_size, model.num_classes) == (dim, dim, 0)
    model.reset_classifier(3, "avg")
    assert model(IMAGE).shape == (2, 3)
    whole = small(num_classes=7)
    whole.prune_intermediate_layers([3], prune_head=False)
    assert whole(IMAGE).shape == (2, 7)
