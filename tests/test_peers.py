"""Models of timm's in our place: made as asked, with small stems, saved as plain data, with no other weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import sequencer2d.registry  # noqa: F401 - our variants are known to timm then
from runs import make_images
from sequencer2d.adapters import ModelFileError
from sequencer2d.evaluation import evaluate
from sequencer2d.layers import Conv3x3, ConvPatchEmbed
from sequencer2d.model import Sequencer2D
from sequencer2d.peers import ConvStem, Peer, PeerConfig, usual_input
from sequencer2d.preprocessing import Preprocessing
from sequencer2d.training.muon import muon_groups
from sequencer2d.weights import ModelCard, load_model, load_weights_into, push_to_hub, save_model
from sequencer2d.zoo import create_model

CLASSES = ("blue", "green", "red")
SMALL_VIT: dict[str, Any] = {"patch_size": 4, "depth": 2, "embed_dim": 16, "num_heads": 2}
GROWING_WITH_STEM = {"conv_stem": [8, 16], "depth": 1, "embed_dim": 16, "num_heads": 2, "dynamic_img_size": True}


def config(name: str, image_size: int = 32, **args: Any) -> PeerConfig:
    return PeerConfig(name=name, num_classes=3, image_size=image_size, args=args)


def card(peer: Peer) -> ModelCard:
    return ModelCard(
        architecture=f"timm/{peer.config.name}",
        config=peer.config,
        class_names=CLASSES,
        preprocessing=Preprocessing(image_size=peer.config.image_size),
    )


@pytest.fixture
def vit() -> Peer:
    torch.manual_seed(0)
    return Peer(config("vit_tiny_patch16_224", **SMALL_VIT))


@pytest.fixture
def saved(vit: Peer, tmp_path: Path) -> Path:
    save_model(vit, card(vit), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_it_computes_what_timm_computes(name: str) -> None:
    torch.manual_seed(0)
    peer = Peer(config(name, drop_path_rate=0.1)).eval()
    torch.manual_seed(0)
    size: dict[str, Any] = {"img_size": 32} if peer.fixed_size else {}
    theirs = timm.create_model(name, num_classes=3, drop_path_rate=0.1, **size).eval()
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(peer(image), theirs(image), rtol=1e-4, atol=1e-5)
    assert peer.fixed_size == (name == "test_vit")


def test_convolutions_are_trained_by_our_kernel() -> None:
    peer = Peer(config("test_resnet"))
    kernels = [module for module in peer.modules() if isinstance(module, nn.Conv2d)]
    assert {type(kernel) for kernel in kernels if kernel.kernel_size == (3, 3)} == {Conv3x3}
    assert {type(kernel) for kernel in kernels if kernel.kernel_size == (1, 1)} == {nn.Conv2d}


def test_convolutions_lie_channels_last() -> None:
    peer = Peer(config("test_resnet"))
    kernels = [module.weight for module in peer.modules() if isinstance(module, nn.Conv2d)]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    seen: list[torch.Tensor] = []
    peer.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    peer(torch.randn(2, 3, 32, 32))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has fast fused attention")
def test_attention_on_the_cpu_is_not_fused(vit: Peer) -> None:
    layers = [module for module in vit.modules() if hasattr(module, "fused_attn")]
    assert len(layers) == 2
    assert not any(layer.fused_attn for layer in layers)


@pytest.mark.parametrize("name", ["resnet10t", "resnet18"])
def test_a_small_stem_keeps_the_resolution(name: str) -> None:
    usual, small = (Peer(config(name, small_stem=stem)).module for stem in (False, True))
    grids = []
    for model in (usual, small):
        model.layer1.register_forward_pre_hook(lambda _, inputs: grids.append(tuple(inputs[0].shape[-2:])))
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert grids == [(8, 8), (32, 32)]
    kernel = small.get_parameter("conv1.weight" if name == "resnet18" else "conv1.0.weight")
    assert kernel.shape[-2:] == (3, 3)
    fan_out = kernel[:, 0].numel()
    assert kernel.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    ("name", "args", "size", "message"),
    [
        ("vit_tiny_patch16_224", SMALL_VIT, 40, r"image_size=40: timm/vit_tiny_patch16_224 .* for 32 pixels .*dynamic"),
        ("vit_tiny_patch16_224", SMALL_VIT | {"dynamic_img_size": True}, 42, "image_size=42 is no multiple of 4"),
        ("vit_tiny_patch16_224", SMALL_VIT | {"dynamic_img_size": True}, 40, None),
        ("vit_tiny_patch16_224", SMALL_VIT | {"dynamic_img_size": True, "dynamic_img_pad": True}, 42, None),
        ("vit_tiny_patch16_224", GROWING_WITH_STEM, 42, None),
        ("vit_tiny_patch16_224", SMALL_VIT, 32, None),
        ("test_resnet", {}, 41, None),
    ],
)
def test_evaluation_at_another_size_says_what_a_model_takes(
    name: str, args: dict[str, Any], size: int, message: str | None, tmp_path: Path
) -> None:
    peer = Peer(config(name, **args))
    save_model(peer, card(peer), tmp_path / "model.safetensors")
    options: dict[str, Any] = {"data": str(make_images(tmp_path / "colours")), "image_size": size}
    if message is None:
        assert evaluate(tmp_path / "model.safetensors", **options).image_size == size
    else:
        with pytest.raises(ValueError, match=message):
            evaluate(tmp_path / "model.safetensors", **options)


def test_our_stem_stands_before_their_blocks() -> None:
    torch.manual_seed(0)
    args = {"conv_stem": [8, 12], "conv_stem_depths": [1, 2], "embed_dim": 16}
    peer = Peer(config("vit_tiny_patch16_224", **args, depth=2, num_heads=2))
    stem = peer.module.patch_embed
    assert isinstance(stem, ConvStem)
    assert peer.module.pos_embed.shape == (1, 8 * 8 + 1, 16)
    ours = create_model("sequencer2d_t_patch4_32", stem_widths=(8, 12), stem_depths=(1, 2)).stem
    kernels = [[m.weight for m in module.modules() if isinstance(m, nn.Conv2d)] for module in (stem, ours)]
    assert len(kernels[0]) == 4
    for theirs, own in zip(*kernels, strict=True):
        fan_in = own[0].numel()
        assert theirs.std().item() == pytest.approx(fan_in**-0.5, rel=0.1)
    image = torch.randn(2, 3, 32, 32)
    reference = ConvPatchEmbed(3, (8, 12), (1, 2), 16)
    reference.load_state_dict(stem.state_dict())
    assert torch.equal(stem(image), reference(image).flatten(1, 2))
    grown = Peer(config("vit_tiny_patch16_224", 40, conv_stem=[8, 16], depth=1, num_heads=2, dynamic_img_size=True))
    assert not grown.fixed_size
    assert grown.stride == 4
    assert grown(torch.randn(1, 3, 32, 32)).shape == (1, 3)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "an unknown name": ("resnet81", {}, "no model named 'resnet81': did you mean timm/resnet18"),
    "a far name": ("xyzzy", {}, r"'xyzzy': see timm\.list_models"),
    "a tag of weights": ("resnet18.a1_in1k", {}, "did you mean timm/resnet18"),
    "the hub": ("hf-hub:timm/resnet18", {}, "no model named 'hf-hub:timm/resnet18'"),
    "ours": ("gru_sequencer2d_s", {}, "timm/gru_sequencer2d_s is ours: leave timm/ out"),
    "weights": (
        "test_resnet",
        {"pretrained": True},
        "pretrained=True is not for timm/test_resnet: peers begin with new",
    ),
    "a file": ("test_resnet", {"checkpoint_path": "evil.pth"}, "checkpoint_path='evil.pth' is not for"),
    "a file by configuration": (
        "test_resnet",
        {"pretrained_cfg": {"file": "evil.pth"}},
        "pretrained_cfg=.* is not for",
    ),
    "classes": ("test_resnet", {"num_classes": 10}, "num_classes=10 is not for timm/test_resnet: the data give it"),
    "a size": ("test_vit", {"img_size": 64}, "img_size=64 is not for timm/test_vit: it is --image-size"),
    "an unknown argument": ("test_resnet", {"depht": 3}, "cannot make test_resnet of the arguments .*'depht'"),
    "no plain data": ("test_resnet", {"act_layer": nn.ReLU}, "must be plain data"),
    "heads that do not divide": ("test_vit", {"embed_dim": 10, "num_heads": 3}, "cannot make test_vit"),
    "a small stem elsewhere": (
        "test_vit",
        {"small_stem": True},
        "small_stem is for timm's ResNets, not for test_vit",
    ),
    "a stem elsewhere": ("test_resnet", {"conv_stem": [8, 16]}, "cannot make test_resnet"),
    "a stem of other depths": (
        "test_vit",
        {"conv_stem": [8, 16], "conv_stem_depths": [2]},
        r"conv_stem_depths=\[2\] must be a list with a number for each of conv_stem=\[8, 16\]",
    ),
    "a stem that is none": (
        "test_vit",
        {"conv_stem": 16},
        r"conv_stem=16 must be a list of widths, such as \[32, 128\]",
    ),
    "a small stem that is none": ("test_resnet", {"small_stem": "yes"}, "small_stem='yes' must be true or false"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case: str) -> None:
    name, args, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        Peer(config(name, **args))


def test_a_file_gives_back_what_was_saved(saved: Path, vit: Peer) -> None:
    loaded, loaded_card = load_model(saved)
    assert isinstance(loaded, Peer)
    assert not loaded.training
    assert loaded_card == card(vit)
    torch.testing.assert_close(loaded.state_dict(), vit.state_dict(), rtol=0, atol=0)
    with safe_open(saved, framework="pt") as file:
        assert json.loads(file.metadata()["config"]) == {
            "name": "vit_tiny_patch16_224", "num_classes": 3, "image_size": 32, "args": SMALL_VIT,
        }  # fmt: skip


def test_timm_reads_the_file(saved: Path, vit: Peer) -> None:
    image = torch.randn(1, 3, 32, 32)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, checkpoint_path=saved, **SMALL_VIT)
    torch.testing.assert_close(theirs.eval()(image), vit.eval()(image))


def test_a_file_cannot_have_another_one_loaded(vit: Peer, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    described = card(vit).to_metadata()
    described["config"] = json.dumps({**json.loads(described["config"]), "args": {"checkpoint_path": "evil.pth"}})
    save_file({"x": torch.zeros(1)}, path, described)
    with pytest.raises(ModelFileError, match=r"checkpoint_path='evil\.pth' is not for"):
        load_model(path)


def test_arguments_are_the_same_after_a_file(vit: Peer) -> None:
    tuples = config("test_vit", conv_stem=(8, 16), embed_dim=16, num_heads=2)
    assert tuples == config("test_vit", conv_stem=[8, 16], embed_dim=16, num_heads=2)


def test_weights_start_another_training(saved: Path, vit: Peer) -> None:
    same = Peer(vit.config)
    assert load_weights_into(same, saved, CLASSES) == []
    torch.testing.assert_close(same.state_dict(), vit.state_dict(), rtol=0, atol=0)
    other = Peer(replace(vit.config, num_classes=2, image_size=48))
    head = other.module.head.weight.detach().clone()
    notes = load_weights_into(other, saved, ("cat", "dog"))
    assert notes == ["resampled from 32 to 48 pixels", "classifier of 3 other classes begun anew"]
    assert torch.equal(other.module.head.weight, head)
    assert torch.equal(other.module.blocks[0].attn.qkv.weight, vit.module.blocks[0].attn.qkv.weight)
    assert torch.equal(other.module.pos_embed[:, 0], vit.module.pos_embed[:, 0])
    assert other(torch.randn(1, 3, 48, 48)).shape == (1, 2)


def test_weights_of_another_model_are_refused(saved: Path, vit: Peer) -> None:
    for model in (Peer(config("test_vit")), create_model("sequencer2d_t_patch4_32", num_classes=3)):
        with pytest.raises(ModelFileError, match=r"is a timm/vit_tiny_patch16_224: .*train the same --model"):
            load_weights_into(model, saved, CLASSES)
    deeper = Peer(replace(vit.config, args={**vit.config.args, "depth": 3}))
    with pytest.raises(ModelFileError, match=r"blocks\.2\.attn.*give the same arguments"):
        load_weights_into(deeper, saved, CLASSES)


def test_what_is_for_sequencers_says_so(saved: Path) -> None:
    with pytest.raises(ValueError, match="timm/resnet18 is a model of timm's, which `sequencer2d train` takes"):
        create_model("timm/resnet18")
    with pytest.raises(ValueError, match=r"is a timm/vit_tiny_patch16_224: timm puts its models on the hub"):
        push_to_hub(saved, "user/name")
    with pytest.raises(ValueError, match="another architecture"):
        save_model(Peer(config("test_resnet")), load_model(saved)[1], saved)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "sequencer2d_s"])
def test_muon_leaves_the_classifier_and_what_is_not_decayed_to_adamw(name: str) -> None:
    peer = Peer(config(name))
    groups = muon_groups(peer, 0.05, peer.no_weight_decay())
    maps = {id(parameter): group["maps"] for group in groups for parameter in group["params"]}
    assert maps.keys() == {id(parameter) for parameter in peer.parameters()}
    adamw = {path for path, parameter in peer.named_parameters() if not maps[id(parameter)] and parameter.ndim > 1}
    classifier = {"test_resnet": "fc", "test_convnext": "head.fc", "sequencer2d_s": "head.fc"}.get(name, "head")
    positions = {"module.pos_embed", "module.cls_token", "module.reg_token"} & dict(peer.named_parameters()).keys()
    assert adamw == {f"module.{classifier}.weight"} | positions
    recurrent = {maps[id(parameter)] for path, parameter in peer.named_parameters() if ".weight_hh" in path}
    assert recurrent == ({4} if name == "sequencer2d_s" else set())


def test_layers_are_numbered_from_the_input(vit: Peer) -> None:
    layer_of = vit.group_matcher()
    order = [layer_of(f"module.{name}") for name in ("patch_embed.proj.weight", "blocks.0.norm1.weight", "head.weight")]
    assert order == sorted(set(order))


def test_what_is_frozen_is_all_but_the_classifier() -> None:
    peer = Peer(config("test_convnext"))
    peer.freeze_backbone()
    trained = {name for name, parameter in peer.named_parameters() if parameter.requires_grad}
    assert trained == {"module.head.fc.weight", "module.head.fc.bias"}
    assert not peer.module.stem.training
    assert not peer.module.stages[0].training
    assert peer.module.head.fc.training


def test_models_without_checkpointing_say_so() -> None:
    peer = Peer(config("test_resnet"))
    peer.set_grad_checkpointing()
    assert peer.module.grad_checkpointing
    with pytest.raises(ValueError, match="timm has no checkpointing for sequencer2d_s"):
        Peer(config("sequencer2d_s")).set_grad_checkpointing()


def test_the_usual_input_is_timms() -> None:
    assert usual_input("timm/resnet18") == (224, 0.95)
    with pytest.raises(ValueError, match="no model named 'resnet81'"):
        usual_input("timm/resnet81")


def test_a_sequencer_is_no_peer() -> None:
    assert not isinstance(create_model("sequencer2d_t_patch4_32"), Peer)
    assert not isinstance(Peer(config("sequencer2d_s")), Sequencer2D)
