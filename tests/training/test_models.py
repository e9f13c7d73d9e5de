"""Models of timm's go through a run as ours do: trained, stopped and continued, evaluated, fine-tuned, replayed."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from runs import assert_same, make_images, stop_at, tiny_run
from sequencer2d.cli import main
from sequencer2d.evaluation import evaluate
from sequencer2d.peers import Peer, PeerConfig
from sequencer2d.prediction import predict
from sequencer2d.training.config import AugmentConfig, TrainConfig
from sequencer2d.training.faults import TrainingError
from sequencer2d.training.finetune_config import DistillConfig, FinetuneConfig, ProgressiveConfig
from sequencer2d.training.models import check_peer, new_model
from sequencer2d.training.ranks import Ranks
from sequencer2d.training.run import replay_fault, train
from sequencer2d.training.seeds import train_seeds
from sequencer2d.training.task import SequencerTask
from sequencer2d.weights import load_model

CONVOLUTIONAL: tuple[str, dict[str, Any]] = (
    "timm/resnet10t",
    {"small_stem": True, "stem_width": 4, "channels": [4, 4, 8, 8], "drop_path_rate": 0.2, "drop_rate": 0.1},
)
ATTENTION: tuple[str, dict[str, Any]] = (
    "timm/vit_tiny_patch16_224",
    {"conv_stem": [4, 8], "depth": 2, "num_heads": 2, "drop_path_rate": 0.2, "drop_rate": 0.1},
)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    name, args = ATTENTION
    return replace(tiny_run(tmp_path), model=name, model_args=args)


@pytest.mark.parametrize(
    ("peer", "optimizer"),
    [
        pytest.param(CONVOLUTIONAL, "muon", id="convolutions, muon"),
        pytest.param(ATTENTION, "adamw", id="attention, adamw"),
        pytest.param(CONVOLUTIONAL, "adamw", id="convolutions, adamw", marks=pytest.mark.slow),
        pytest.param(ATTENTION, "muon", id="attention, muon", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_continues_as_if_it_had_not_stopped(
    peer: tuple[str, dict[str, Any]],
    optimizer: Literal["adamw", "muon"],
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optim = replace(config.optim, optimizer=optimizer)
    config = replace(config, model=peer[0], model_args=peer[1], optim=optim, epochs=2)
    whole = train(replace(config, run_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert not train(config).finished
    result = train(config)
    assert result.finished
    assert_same(result.run_dir, whole.run_dir)
    model, card = load_model(result.run_dir)
    assert isinstance(card.config, PeerConfig)
    assert (card.architecture, card.config.args) == (peer[0], peer[1])
    assert card.preprocessing.image_size == 16, "as a Sequencer would have for such images"
    assert isinstance(model, Peer)
    assert evaluate(result.run_dir, precision="bf16").top1 == pytest.approx(evaluate(result.run_dir).top1, abs=0.3)
    (prediction, *_) = predict(result.run_dir, [result.run_dir / "samples"])
    assert {name for name, _ in prediction.classes} == {"blue", "green", "red"}


@pytest.mark.slow
def test_it_learns(config: TrainConfig) -> None:
    plain = AugmentConfig(mixup_alpha=0.0, cutmix_alpha=0.0, random_erasing=0.0)
    result = train(replace(config, epochs=20, accumulate=1, augment=plain))
    assert result.val_top1 is not None
    assert result.val_top1 > 0.8


def test_the_folder_of_a_run_has_no_slash_in_its_name(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    once = replace(config, run_dir=None, epochs=1)
    assert train_seeds(once, [0]).run_dir == Path("runs/colours-timm-vit_tiny_patch16_224-seeds")
    stop_at(monkeypatch, 1)
    assert train(once).run_dir == Path("runs/colours-timm-vit_tiny_patch16_224")
    assert train(once).run_dir == Path("runs/colours-timm-vit_tiny_patch16_224"), "found again, to go on"


def test_weights_are_fine_tuned_and_architecture_and_size_follow_them(config: TrainConfig, tmp_path: Path) -> None:
    first = train(replace(config, epochs=1)).run_dir
    other = make_images(tmp_path / "other", {"cyan": (40, 200, 200), "pink": (200, 40, 200)}, count=6, side=40)
    finetune = FinetuneConfig(freeze="backbone")
    follower = TrainConfig(
        weights=str(first), data=str(other), val_fraction=0.25, epochs=1, batch_size=4, precision="fp32",
        finetune=finetune, run_dir=str(tmp_path / "tuned"),
    )  # fmt: skip
    tuned = train(follower)
    before, after = (load_file(folder / "last.safetensors") for folder in (first, tuned.run_dir))
    changed = {name for name in after if before[name].shape != after[name].shape or (before[name] != after[name]).any()}
    assert changed == {"module.head.weight", "module.head.bias"}
    assert load_model(tuned.run_dir)[1].preprocessing.image_size == 16
    layered = replace(follower, finetune=FinetuneConfig(layer_decay=0.5), run_dir=str(tmp_path / "layered"))
    rates = {group["lr_scale"] for group in optimizer_groups(layered)}
    assert rates == {1.0, 0.5, 0.25, 0.125}
    taught = replace(
        follower, data=config.data, distill=DistillConfig(teacher=str(first)), run_dir=str(tmp_path / "taught")
    )
    assert train(taught).finished


def optimizer_groups(config: TrainConfig) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = []
    original = SequencerTask.make_optimizer

    def make_optimizer(self: SequencerTask, precision: Any) -> torch.optim.Optimizer:
        optimizer = original(self, precision)
        groups.extend(optimizer.param_groups)
        return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequencerTask, "make_optimizer", make_optimizer)
        train(config)
    return groups


def test_a_fault_is_replayed(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Peer.forward
    fail = True

    def forward(self: Peer, images: torch.Tensor) -> torch.Tensor:
        logits = original(self, images)
        return logits * math.nan if fail and torch.is_grad_enabled() else logits

    monkeypatch.setattr(Peer, "forward", forward)
    with pytest.raises(TrainingError, match="numbers ran out of range"):
        train(config)
    (fault,) = Path(str(config.run_dir), "faults").iterdir()
    fail = False
    assert all(math.isfinite(loss) for loss in replay_fault(fault))


def test_batch_size_and_checkpointing(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert train(replace(config, batch_size="auto", accumulate=1, epochs=1, grad_checkpointing=True)).finished
    assert "tried batch size 8" in caplog.text


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kernels of ours": ({"backend": "native"}, "backend=native has kernels for Sequencers, none for timm/"),
    "compiling": ({"compile": True}, "compile is for the parts of a Sequencer, not for timm/"),
    "dividing": ({"strategy": "fsdp"}, "strategy=fsdp divides the blocks of a Sequencer, not timm/"),
    "growing": ({"progressive": ProgressiveConfig(start_size=8, epochs=1)}, "takes images of one size; leave"),
    "stages": (
        {"finetune": FinetuneConfig(freeze="stages.1"), "weights": "x"},
        "freeze=stages.1 is for Sequencers; of timm/vit_tiny_patch16_224 freeze backbone, or none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_for_sequencers_is_refused_before_anything_is_written(
    case: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, message = REFUSED[case]
    monkeypatch.setattr("sequencer2d.training.open_run.load_weights_into", lambda *_: [])
    monkeypatch.setattr("sequencer2d.training.run.check_compiler", lambda _: None)
    with pytest.raises(ValueError, match=message):
        train(replace(config, **changes))
    assert not Path(str(config.run_dir)).exists()


def test_training_images_may_grow_where_the_model_takes_any_size(config: TrainConfig) -> None:
    name, args = CONVOLUTIONAL
    growing = ProgressiveConfig(start_size=8, epochs=1)
    assert train(replace(config, model=name, model_args=args, progressive=growing, epochs=2)).finished


def test_the_backend_reaches_the_model(config: TrainConfig) -> None:
    name, args = CONVOLUTIONAL
    resolved = replace(config, model=name, model_args=args, image_size=16)
    for backend in ("auto", "torch"):
        backends = {getattr(module, "backend", None) for module in new_model(resolved, 3, backend=backend).modules()}
        assert backends - {None} == {backend}


def test_a_model_that_does_not_take_the_images_is_told_of_at_once(config: TrainConfig) -> None:
    with pytest.raises(
        ValueError, match=r"timm/test_coatnet does not take images of 15 pixels \(.*another --image-size"
    ):
        train(replace(config, model="timm/test_coatnet", model_args={}, image_size=15))
    with pytest.raises(ValueError, match="another --image-size"):
        train(replace(config, model="timm/test_coatnet", model_args={}, image_size=15, batch_size="auto"))
    assert not Path(str(config.run_dir)).exists()


def test_processes_share_no_batch_norms_that_are_not_torchs(config: TrainConfig) -> None:
    resolved = replace(config, model="timm/test_efficientnet", image_size=32)
    peer = Peer(PeerConfig(name="test_efficientnet", num_classes=3, image_size=32))
    check_peer(peer, resolved, Ranks())
    with pytest.raises(ValueError, match=r"batch norms that processes cannot share \(BatchNormAct2d\)"):
        check_peer(peer, resolved, Ranks(world_size=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "timm/resnet81"], "timm has no model named 'resnet81': did you mean timm/resnet18"),
        (["--model", "timm/resnet18", "--model-args.depht", "3"], "cannot make resnet18 of the arguments {'depht': 3}"),
        (["--model-args.pretrained", "true"], "model_args.pretrained is no part of the architecture; give --weights"),
        (["--model-args.backend", "torch"], "model_args.backend is no part of the architecture; give --backend"),
        (["--model-args.name", "sequencer2d_s"], "model_args.name is no part of the architecture; give --model"),
        (["--model", "timm/resnet18", "--model-args.num_classes", "7"], "num_classes=7 is not for timm/resnet18"),
    ],
)
def test_wrong_names_and_arguments_are_one_line(
    arguments: list[str], message: str, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", config.data, "--run-dir", str(config.run_dir), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_options_of_the_command_line_reach_timm(config: TrainConfig, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ["--model", "timm/vit_tiny_patch16_224", "--model-args.conv_stem", "[4,8]", "--model-args.depth", "1"]
    arguments += ["--model-args.num_heads", "2", "--data", config.data, "--run-dir", str(run_dir), "--epochs", "1"]
    assert main(["train", *arguments]) == 0
    card = load_model(run_dir)[1]
    assert isinstance(card.config, PeerConfig)
    assert card.config.args == {"conv_stem": [4, 8], "depth": 1, "num_heads": 2}
    assert json.loads((run_dir / "result.json").read_text())["finished"]
    with pytest.raises(ValueError, match="int8 is for Sequencers; give --precision bf16"):
        evaluate(run_dir, precision="int8")
