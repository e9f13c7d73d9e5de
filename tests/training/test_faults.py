"""What goes wrong is told so that one knows what to do; what was good before stays good."""

import errno
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.plugins import MixedPrecision

from runs import rows, tiny_run
from sequencer2d.data import loaders
from sequencer2d.data.loaders import Batch
from sequencer2d.model import Sequencer2D
from sequencer2d.training import callbacks
from sequencer2d.training.checkpoints import newest_checkpoint
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.faults import TrainingError, explained, load_fault
from sequencer2d.training.finetune_config import FinetuneConfig
from sequencer2d.training.run import replay_fault, train
from sequencer2d.training.task import SequencerTask
from sequencer2d.weights import load_model


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return replace(tiny_run(tmp_path), epochs=3, batch_size=6)


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, fault: Callable[[], Any]) -> None:
    """Makes the model's training call of this number, from 0, do something else first, or multiply its images."""
    original = Sequencer2D.forward
    calls = 0

    def forward(self: Sequencer2D, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += self.training
        factor = fault() if self.training and calls == call + 1 else None
        return original(self, x if factor is None else x * factor)

    monkeypatch.setattr(Sequencer2D, "forward", forward)


def whole(config: TrainConfig) -> int:
    """Updates of the last checkpoint, of which model and checkpoint are whole."""
    run_dir = Path(config.run_dir or "")
    path = newest_checkpoint(run_dir / "checkpoints")
    assert path
    load_model(run_dir)
    return torch.load(path, weights_only=True)["global_step"]


def _nan_in_training(self: Sequencer2D, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
    return self.head(x) * (math.nan if self.training else 1)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_numbers_out_of_range_stop_with_a_diagnosis_and_what_led_to_them(
    factor: float, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, 5, lambda: factor)
        with pytest.raises(
            TrainingError, match=r"at update 2: loss nan, norm of the gradient nan, kept in .*update-00000002.*lower"
        ):
            train(config)
    (path,) = (Path(config.run_dir or "") / "faults").iterdir()
    _, batches, facts = load_fault(path)
    assert [len(batch.images) for batch in batches] == [6, 6]
    assert facts["learning_rate"] > 0
    assert facts["seeds"] == [[0, 1, 0], [0, 1, 1]]
    assert whole(config) == 2
    assert train(config).finished


@pytest.mark.parametrize("frozen", ["none", "stem", "stages.0"])
def test_a_kept_fault_can_be_replayed(
    frozen: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same weights, images and random numbers: the same loss, which then was made infinite."""
    if frozen != "none":
        donor = str(train(replace(config, epochs=1, run_dir=str(tmp_path / "donor"))).run_dir)
        config = replace(config, weights=donor, finetune=FinetuneConfig(freeze=frozen))
    seen: list[float] = []
    original = torch.nn.functional.cross_entropy

    def cross_entropy(*arguments: Any, **options: Any) -> torch.Tensor:
        loss = original(*arguments, **options)
        seen.append(loss.item())
        return loss * (math.inf if len(seen) == 2 else 1)

    with monkeypatch.context() as patch:
        patch.setattr("sequencer2d.training.task.F.cross_entropy", cross_entropy)
        with pytest.raises(TrainingError):
            train(config)
    (path,) = (Path(config.run_dir or "") / "faults").iterdir()
    assert replay_fault(path) == seen[:2]


def test_so_many_updates_may_be_skipped(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, 5, lambda: math.nan)
        assert train(replace(config, skip_nonfinite=1)).finished
    for name, value in torch.load(
        newest_checkpoint(Path(config.run_dir or "") / "checkpoints") or "", weights_only=True
    )["state_dict"].items():
        assert value.isfinite().all(), name
    assert sum(row.get("train_loss", 0) is None for row in rows(Path(config.run_dir or ""))) == 1


def trainer_in_fp16(*, precision: str, plugins: list[Any], **options: Any) -> Trainer:
    """Lightning's, which refuses this on a CPU."""
    fp16 = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))
    return Trainer(plugins=[*plugins, fp16], **options)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("batch", [4, 5])
def test_a_skipped_update_changes_no_statistics(
    batch: int, precision: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both batches of the third update have been through the batch norms by then, and the average follows them."""
    after: list[list[torch.Tensor]] = []
    original = SequencerTask.optimizer_step

    def optimizer_step(self: SequencerTask, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        after.append([buffer.clone() for buffer in self.model.buffers()])
        assert all(buffer.isfinite().all() for buffer in self.evaluated_model.buffers())

    monkeypatch.setattr(SequencerTask, "optimizer_step", optimizer_step)
    if precision == "fp16":
        monkeypatch.setattr("sequencer2d.training.fitting.pl.Trainer", trainer_in_fp16)
    fail_at(monkeypatch, batch, lambda: math.nan)
    assert train(replace(config, skip_nonfinite=1, backend="torch")).finished
    changes = [not all(map(torch.equal, *pair)) for pair in itertools.pairwise(after)]
    assert changes == [number != 1 for number in range(len(changes))]
    assert len(changes) == 5


@pytest.mark.parametrize("unreadable", [(4, 5), (4,), (5,)])
def test_an_update_without_any_image_changes_nothing(
    unreadable: tuple[int, ...], config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third update; the momentum of those before, and the decay of weights, would go on. One batch is enough."""
    after: list[torch.Tensor] = []
    steps = itertools.count()
    training_step, optimizer_step = SequencerTask.training_step, SequencerTask.optimizer_step

    def with_some_unreadable(self: SequencerTask, batch: Batch, batch_idx: int) -> torch.Tensor:
        if next(steps) in unreadable:
            batch = Batch(batch.images[:0], batch.labels[:0], batch.indices[:0], skipped=[])
        return training_step(self, batch, batch_idx)

    def noting_weights(self: SequencerTask, *arguments: Any, **options: Any) -> None:
        optimizer_step(self, *arguments, **options)
        after.append(torch.nn.utils.parameters_to_vector(self.model.parameters()).clone())

    monkeypatch.setattr(SequencerTask, "training_step", with_some_unreadable)
    monkeypatch.setattr(SequencerTask, "optimizer_step", noting_weights)
    assert train(config).finished
    assert torch.equal(after[1], after[2]) == (len(unreadable) == 2)


def test_one_more_than_may_be_skipped_stops(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sequencer2D, "forward_head", _nan_in_training)
    with pytest.raises(TrainingError, match="at update 2"):
        train(replace(config, skip_nonfinite=2, optim=replace(config.optim, ema_decay=None)))
    assert len(list((Path(config.run_dir or "") / "faults").iterdir())) == 3


def test_a_vanished_data_folder_stops_and_the_run_goes_on_when_it_is_back(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "SMALL_IMAGE_SIZE", 0)  # nothing is kept in memory
    data = Path(config.data)
    with monkeypatch.context() as patch:
        fail_at(patch, 5, lambda: shutil.move(data, data.with_name("away")) and None)
        with pytest.raises(TrainingError, match=r"colours, the folder of the images, is gone.*--resume"):
            train(config)
    shutil.move(data.with_name("away"), data)
    assert whole(config) == 2
    assert train(config).finished


def test_a_dead_loader_worker_is_named(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill() -> None:
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)  # one: news of two may come too late
        time.sleep(10)  # ends with the news, which would else come in the middle of anything

    with monkeypatch.context() as patch:
        fail_at(patch, 27, kill)  # at the second epoch's first image of 27, so that either process has more to load
        with pytest.raises(TrainingError, match=r"process that loads images died .*--num-workers 1"):
            train(replace(config, batch_size=1, num_workers=2))
    assert whole(config) == 14


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] can't allocate memory: you tried to allocate 7 bytes"),
    ],
)
def test_too_little_memory_names_the_batch_size_to_try(
    error: Exception, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    fail_at(monkeypatch, 5, fail)
    with pytest.raises(TrainingError, match=r"--batch-size 3 --accumulate 4.*--grad-checkpointing"):
        train(config)
    assert whole(config) == 2


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "cannot be written"), (errno.EIO, "disk fails")],
)
def test_metrics_that_cannot_be_written_name_the_file(
    code: int, message: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = callbacks.json.dumps

    def dumps(row: Any, **options: Any) -> str:
        if "step" in row and row["step"] == 3:
            raise OSError(code, os.strerror(code))
        return original(row, **options)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.json, "dumps", dumps)
        with pytest.raises(TrainingError, match=rf"{message}.*metrics\.jsonl.*--resume"):
            train(config)
    assert whole(config) == 2
    assert train(config).finished


def test_what_a_loader_process_misses_is_told_without_its_traceback(config: TrainConfig, tmp_path: Path) -> None:
    text = (
        "Caught FileNotFoundError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\n"
    )
    with pytest.raises(TrainingError, match=r"^the folder is gone; checkpoints so far"), explained(config, tmp_path):
        raise FileNotFoundError(text + "FileNotFoundError: the folder is gone\n")


def test_other_errors_stay_what_they_are(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), explained(config, tmp_path):
        raise RuntimeError("shapes differ")
    with pytest.raises(ConnectionError), explained(config, tmp_path):
        raise ConnectionError("no route")


def test_a_file_that_is_no_fault_is_refused(config: TrainConfig) -> None:
    result = train(replace(config, epochs=1))
    with pytest.raises(ValueError, match=r"model\.safetensors is no record of a fault"):
        replay_fault(result.run_dir / "model.safetensors")
    with pytest.raises(ValueError, match=r"config\.yaml is no whole safetensors file"):
        replay_fault(result.run_dir / "config.yaml")
    assert json.loads((result.run_dir / "result.json").read_text())["finished"]


def test_a_folder_in_which_another_process_trains_is_refused(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def again() -> None:
        with pytest.raises(BlockingIOError, match="another process is training in it"):
            train(config)

    fail_at(monkeypatch, 1, again)
    assert train(config).finished
