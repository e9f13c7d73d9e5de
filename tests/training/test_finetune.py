"""What is frozen stays, to the last digit; layers move at their own rates; the architecture follows the weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from runs import last_checkpoint, make_images, rows, tiny_run
from sequencer2d.model import Sequencer2D, SequencerConfig
from sequencer2d.preprocessing import Preprocessing
from sequencer2d.training.config import AugmentConfig, TrainConfig
from sequencer2d.training.finetune import follow_weights, freeze, scale_by_layer
from sequencer2d.training.finetune_config import FinetuneConfig
from sequencer2d.training.muon import Muon, muon_groups
from sequencer2d.training.run import train
from sequencer2d.training.task import SequencerTask
from sequencer2d.weights import ModelCard, load_model, save_model
from sequencer2d.zoo import create_model, get_config


def trained_names(model: nn.Module) -> set[str]:
    """The parts that have parameters with gradients, down to the stages."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {".".join(name.split(".")[: 2 if name.startswith("stages") else 1]) for name in names}


@pytest.mark.parametrize(
    ("what", "trained"),
    [
        ("none", {"stem", "pos_embed", "stages.0", "stages.1", "norm", "head"}),
        ("stem", {"stages.0", "stages.1", "norm", "head"}),
        ("stages.0", {"stages.1", "norm", "head"}),
        ("stages.1", {"norm", "head"}),
        ("backbone", {"head"}),
    ],
)
def test_freezing_takes_the_first_parts(what: str, trained: set[str], tiny_config: SequencerConfig) -> None:
    model = Sequencer2D(replace(tiny_config, pos_embed_size=(4, 4), drop_path_rate=0.1)).train()
    freeze(model, what)
    assert trained_names(model) == trained
    assert model.head.training
    assert model.stem.training == (what == "none")
    assert all(module.training == ("stages.1" in trained) for module in model.stages[1].modules())


def test_freezing_what_is_not_there_or_everything_is_an_error(tiny_config: SequencerConfig) -> None:
    with pytest.raises(ValueError, match=r"freeze=stages\.2: the model has the stages 0 to 1"):
        freeze(Sequencer2D(tiny_config), "stages.2")
    with pytest.raises(ValueError, match="freeze=backbone leaves nothing to train"):
        freeze(Sequencer2D(replace(tiny_config, num_classes=0)), "backbone")


@pytest.mark.parametrize("mixer", ["BiLSTM2D", "BiGRU2D"])
def test_rates_by_layer_are_those_of_timm(mixer: str, tiny_config: SequencerConfig) -> None:
    model = Sequencer2D(replace(tiny_config, pos_embed_size=(4, 4), mixer=mixer))
    undecayed = model.no_weight_decay()
    base = param_groups_weight_decay(model, 0.05, no_weight_decay_list=undecayed)
    theirs = param_groups_layer_decay(model, 0.05, no_weight_decay_list=undecayed, layer_decay=0.5)
    ours = scale_by_layer(base, model, 0.5)

    def by_parameter(groups: list[dict[str, Any]]) -> dict[int, tuple[float, float]]:
        return {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}

    assert by_parameter(ours) == by_parameter(theirs)
    scales = {name: by_parameter(ours)[id(parameter)][0] for name, parameter in model.named_parameters()}
    assert scales["head.fc.weight"] == 1
    assert scales["stages.1.blocks.1.norm1.weight"] == 0.5
    assert scales["stages.0.blocks.0.norm1.weight"] == scales["stem.proj.bias"] * 2 < 0.1
    assert len(scale_by_layer(base, model, 1.0)) == len(base)


def test_rates_by_layer_reach_muon_s_updates_too() -> None:
    torch.manual_seed(0)
    model = create_model("sequencer2d_conv_p_patch2_16", num_classes=3)
    groups = scale_by_layer(muon_groups(model, 0.0), model, 0.1)
    assert {group["maps"] for group in groups} == {0, 1, 4}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for group in groups:
        group["lr"] = 1e-2 * group["lr_scale"]
    optimizer = Muon(groups, 0.0, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    moved = {name: (parameter - before[name]).norm().item() for name, parameter in model.named_parameters()}
    last = model.config.layers[0] - 1
    first, later = (moved[f"stages.0.blocks.{i}.rnn_tokens.rnn_v.weight_ih_l0"] for i in (0, last))
    assert last >= 1
    assert first == pytest.approx(later * 0.1**last, rel=0.2)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Fine-tunes a model whose batch norms' statistics are far from those of the images."""
    config = tiny_run(tmp_path)
    torch.manual_seed(1)
    model = create_model("sequencer2d_conv_p_patch2_16", num_classes=5, **config.model_args)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.fill_(0.5)
    card = ModelCard(
        architecture="sequencer2d_conv_p_patch2_16",
        config=model.config,
        class_names=tuple("abcde"),
        preprocessing=Preprocessing(image_size=16),
    )
    save_model(model, card, tmp_path / "donor.safetensors")
    return replace(config, epochs=2, weights=str(tmp_path / "donor.safetensors"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("what", ["none", "stages.0", "backbone"])
def test_a_run_moves_what_it_may_and_nothing_else(
    what: str, optimizer: Literal["adamw", "muon"], config: TrainConfig
) -> None:
    optim = replace(config.optim, optimizer=optimizer)
    result = train(replace(config, finetune=FinetuneConfig(freeze=what), optim=optim))
    before = load_model(str(config.weights))[0].state_dict()
    checkpoint = torch.load(last_checkpoint(result.run_dir), weights_only=True)
    averaged = load_model(result.run_dir / "last.safetensors")[0].state_dict()
    current = {name.removeprefix("model."): tensor for name, tensor in checkpoint["state_dict"].items()}
    frozen = {"none": (), "stages.0": ("stem", "stages.0"), "backbone": ("stem", "stages", "norm")}[what]
    for name, tensor in before.items():
        if name.startswith("head") or name.endswith("num_batches_tracked"):
            continue
        for after in (averaged[name], current[name]):
            assert torch.equal(after, tensor) == name.startswith(frozen or "-"), name
    in_optimizer = sum(len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"])
    model = create_model("sequencer2d_conv_p_patch2_16", num_classes=3, **config.model_args)
    freeze(model, what)
    assert in_optimizer == sum(parameter.requires_grad for parameter in model.parameters())


def test_a_run_sets_the_rate_of_every_layer(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[set[float]] = []
    original = SequencerTask.on_before_optimizer_step

    def observed(self: SequencerTask, optimizer: torch.optim.Optimizer) -> None:
        original(self, optimizer)
        rates.append({group["lr"] for group in optimizer.param_groups})

    monkeypatch.setattr(SequencerTask, "on_before_optimizer_step", observed)
    result = train(replace(config, finetune=FinetuneConfig(layer_decay=0.5)))
    logged = [row["learning_rate"] for row in rows(result.run_dir) if "learning_rate" in row]
    assert [max(found) for found in rates] == pytest.approx(logged)
    assert all(max(found) / min(found) == pytest.approx(8) for found in rates)  # stem, two blocks, norm and head


def test_architecture_and_size_follow_the_weights(tmp_path: Path, tiny_config: SequencerConfig) -> None:
    args: dict[str, Any] = {"layers": (1, 2), "embed_dims": (8, 8), "hidden_sizes": (2, 2), "stem_widths": (8,)}
    model = create_model("sequencer2d_conv_p_patch2_16", num_classes=2, **args)
    card = ModelCard(
        architecture="sequencer2d_conv_p_patch2_16",
        config=model.config,
        class_names=("a", "b"),
        preprocessing=Preprocessing(image_size=24, crop_pct=0.9),
    )
    save_model(model, card, tmp_path / "donor.safetensors")
    config = TrainConfig(weights=str(tmp_path / "donor.safetensors"), model_args={"drop_path_rate": 0.2})
    followed = follow_weights(config)
    assert (followed.model, followed.image_size, followed.crop_pct) == (card.architecture, 24, 0.9)
    assert followed.model_args == {**args, "drop_path_rate": 0.2}
    assert replace(get_config(followed.model, **followed.model_args), num_classes=2, drop_path_rate=0) == model.config
    assert follow_weights(replace(config, image_size=32)).image_size == 32
    assert follow_weights(replace(config, model="sequencer2d_s")).model == "sequencer2d_s"
    assert follow_weights(TrainConfig()) == TrainConfig()


def test_a_run_s_weights_are_enough_to_start_from(config: TrainConfig, tmp_path: Path) -> None:
    larger = make_images(tmp_path / "larger", {"cyan": (40, 200, 200), "pink": (200, 40, 200)}, count=6, side=40)
    plain = replace(config, model="auto", model_args={}, epochs=1, data=str(larger), augment=AugmentConfig())
    model, card = load_model(train(plain).run_dir)
    assert card.preprocessing.image_size == 16
    assert card.class_names == ("cyan", "pink")
    assert isinstance(model.config, SequencerConfig)
    assert model.config.embed_dims == (8, 8)


@pytest.mark.parametrize("what", ["head", "stages", "stages.x", "1", ""])
def test_wrong_parts_are_named(what: str) -> None:
    with pytest.raises(ValueError, match=rf"freeze='{what}' must be none, stem, stages\.N or backbone"):
        FinetuneConfig(freeze=what)


@pytest.mark.parametrize("layer_decay", [0.0, -1.0, 1.5, float("nan")])
def test_wrong_decays_are_named(layer_decay: float) -> None:
    with pytest.raises(ValueError, match=r"finetune\.layer_decay"):
        FinetuneConfig(layer_decay=layer_decay)


def test_random_weights_are_not_frozen() -> None:
    with pytest.raises(ValueError, match=r"freeze=stem needs weights .* --weights"):
        TrainConfig(finetune=FinetuneConfig(freeze="stem"))


def test_a_stage_too_many_is_named_before_anything_is_written(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="the model has the stages 0 to 1"):
        train(replace(config, finetune=FinetuneConfig(freeze="stages.7")))
    assert not Path(config.run_dir or "").exists()
