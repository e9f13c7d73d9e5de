"""Processes that divide the weights among them train as one does, and what they save is whole."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs import Job
from runs import assert_close, assert_same, last_checkpoint
from sequencer2d.training.config import OptimConfig, TrainConfig
from sequencer2d.training.ranks import Ranks
from sequencer2d.training.run import replay_fault, train
from sequencer2d.training.sharding import is_to_shard


@pytest.fixture
def divided(recipe: dict[str, Any]) -> dict[str, Any]:
    return {**recipe, "strategy": "fsdp"}


@pytest.mark.slow
def test_two_ranks_that_divide_the_weights_train_as_one(divided: dict[str, Any], tmp_path: Path) -> None:
    """Of the nine validation images, the first rank has two batches and the second one."""
    statuses, errors = Job(tmp_path / "two", divided, ranks=2).run()
    assert statuses == [0, 0], errors
    assert "Warning" not in errors
    statuses, errors = Job(tmp_path / "one", {**divided, "run_dir": str(tmp_path / "alone")}).run()
    assert statuses == [0], errors
    assert_same(tmp_path / "run", tmp_path / "alone")
    saved, expected = (torch.load(last_checkpoint(tmp_path / name), weights_only=True) for name in ("run", "alone"))
    assert_close(saved["state_dict"], expected["state_dict"])
    states, wholes = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (saved, expected))
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert_close(*({number: state[name] for number, state in optimizer.items()} for optimizer in (states, wholes)))


@pytest.mark.slow
def test_a_run_goes_on_with_divided_weights_and_without(divided: dict[str, Any], tmp_path: Path) -> None:
    stop = (1, signal.SIGTERM)
    parts: list[tuple[str, int, Any]] = [("fsdp", 2, stop), ("fsdp", 1, stop), ("fsdp", 2, stop), ("ddp", 2, None)]
    for number, (strategy, ranks, kill) in enumerate(parts):
        job = Job(tmp_path / f"part {number}", {**divided, "strategy": strategy}, ranks=ranks, kill=kill)
        statuses, errors = job.run()
        assert statuses == [75 if kill else 0] * ranks, errors
        assert ("continuing" in errors) == (number > 0)
    Job(tmp_path / "whole", {**divided, "run_dir": str(tmp_path / "whole run")}).run()
    assert_same(tmp_path / "run", tmp_path / "whole run")


@pytest.mark.slow
def test_frozen_stages_and_computing_again_and_a_teacher(divided: dict[str, Any], tmp_path: Path) -> None:
    statuses, errors = Job(tmp_path / "teacher", {**divided, "epochs": 1}).run()
    assert statuses == [0], errors
    teacher = tmp_path / "run" / "model.safetensors"
    divided |= {
        "weights": str(teacher),
        "finetune": {"freeze": "stages.0", "layer_decay": 0.8},
        "distill": {"teacher": str(teacher)},
        "grad_checkpointing": True,
        "optim": {**divided["optim"], "ema_decay": None},
        "epochs": 2,
    }
    for name, ranks in (("two", 2), ("one", 1)):
        statuses, errors = Job(
            tmp_path / name, {**divided, "run_dir": str(tmp_path / f"run of {name}")}, ranks=ranks
        ).run()
        assert set(statuses) == {0}, errors
    assert_same(tmp_path / "run of two", tmp_path / "run of one")
    before, after = load_file(teacher), load_file(tmp_path / "run of two" / "model.safetensors")
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith(("stem.", "stages.0."))} <= kept != set(before)


@pytest.mark.slow
def test_a_rank_without_a_readable_image_takes_part(divided: dict[str, Any], tmp_path: Path) -> None:
    for path in sorted(Path(divided["data"]).rglob("*.png"))[::2]:
        path.write_bytes(b"no image")
    statuses, errors = Job(tmp_path / "two", {**divided, "batch_size": 3, "epochs": 1}, ranks=2).run()
    assert statuses == [0, 0], errors
    assert "skipped" in errors


@pytest.mark.slow
def test_numbers_out_of_range_are_kept_whole(divided: dict[str, Any], tmp_path: Path) -> None:
    divided["optim"] = {"learning_rate": 1e30, "warmup_epochs": 0}
    statuses, errors = Job(tmp_path / "two", {**divided, "skip_nonfinite": 1}, ranks=2).run()
    assert statuses == [1, 1], errors
    assert "skipped update" in errors
    assert "out of range" in errors
    fault = next((tmp_path / "run" / "faults").iterdir())
    assert not all(torch.isfinite(torch.tensor(replay_fault(fault))))


def test_one_process_has_nothing_to_divide() -> None:
    assert not is_to_shard(TrainConfig(strategy="fsdp", optim=OptimConfig(optimizer="muon")), Ranks())
    assert not is_to_shard(TrainConfig(), Ranks(world_size=2))
    assert is_to_shard(TrainConfig(strategy="fsdp"), Ranks(world_size=2))


def test_muon_needs_whole_matrices() -> None:
    config = TrainConfig(strategy="fsdp", optim=OptimConfig(optimizer="muon"))
    with pytest.raises(ValueError, match=r"optim\.optimizer=muon needs whole matrices; take --strategy ddp"):
        is_to_shard(config, Ranks(world_size=2))


def test_what_cannot_be_divided_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sequencer2d.training.run.join_ranks", lambda: Ranks(world_size=2))
    with pytest.raises(ValueError, match="strategy=fsdp"):
        train(TrainConfig(strategy="fsdp", optim=OptimConfig(optimizer="muon"), run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


_PARTS = """
import sys, torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from sequencer2d.model import Sequencer2D, SequencerConfig
from sequencer2d.training.sharding import shard, whole_model
distributed.init_process_group(
    "gloo", init_method=f"file://{sys.argv[2]}/meeting", rank=int(sys.argv[1]), world_size=2
)
torch.manual_seed(0)
model = Sequencer2D(SequencerConfig(
    layers=(1, 1), patch_sizes=(2, 2), embed_dims=(8, 16), hidden_sizes=(2, 4), mlp_ratios=(2.0, 2.0), stem_widths=(8,),
    num_classes=4,
))
before = {name: value.clone() for name, value in model.state_dict().items()}
shard(model, init_device_mesh("cpu", (2,)))
for parameter in model.parameters():
    assert parameter.to_local().numel() == parameter.numel() // 2 or parameter.shape[0] % 2, parameter.shape
flatten_parameters, nn.RNNBase.flatten_parameters = nn.RNNBase.flatten_parameters, None  # on GPUs it moves weights
for _ in range(2):
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
nn.RNNBase.flatten_parameters = flatten_parameters
model.eval()
random = torch.get_rng_state()
whole = whole_model(model)
assert torch.equal(random, torch.get_rng_state())
assert type(whole) is Sequencer2D and not whole.training
for name, parameter in whole.named_parameters():
    assert torch.equal(parameter, before[name])
with torch.no_grad():
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(whole(x), model(x))
distributed.destroy_process_group()
"""


def test_each_rank_keeps_a_half(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", _PARTS, str(rank), str(tmp_path)]) for rank in range(2)
    ]
    assert [process.wait(60) for process in processes] == [0, 0]
