"""A run ends when validation has not become better for long enough, and says so; its count survives a stop."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runs import last_checkpoint, rows, stop_at, tiny_run
from sequencer2d.training import run as runs_module
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.run import train
from sequencer2d.training.task import SequencerTask


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return replace(tiny_run(tmp_path), epochs=9, early_stopping=2)


def script_accuracies(monkeypatch: pytest.MonkeyPatch, accuracies: list[float]) -> None:
    """Makes the validation after epoch i, counted from 0, end with these numbers."""

    def on_validation_epoch_end(self: SequencerTask) -> None:
        self.log("valid_acc", torch.tensor(accuracies[self.current_epoch]))
        self.log_position()

    original = SequencerTask.validation_step

    def validation_step(self: SequencerTask, *arguments: object) -> None:
        log, self.log = self.log, lambda name, *rest, **options: None  # type: ignore[method-assign]
        original(self, *arguments)  # type: ignore[arg-type]
        self.log = log  # type: ignore[method-assign]
        self.log("val_loss", 1.0, on_epoch=True)

    monkeypatch.setattr(SequencerTask, "validation_step", validation_step)
    monkeypatch.setattr(SequencerTask, "on_validation_epoch_end", on_validation_epoch_end)


RISE_AND_FALL = [0.1, 0.5, 0.4, 0.6, 0.6, 0.5, 0.9, 0.9, 0.9]


def epochs_of(run_dir: Path) -> int:
    return sum("valid_acc" in row for row in rows(run_dir))


def test_it_waits_for_so_many_validations_in_a_row(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script_accuracies(monkeypatch, RISE_AND_FALL)
    with caplog.at_level(logging.INFO):
        result = train(config)
    assert result.finished
    assert epochs_of(result.run_dir) == 6
    assert result.val_top1 == pytest.approx(0.6)
    assert "stopped after epoch 6: 2 validations without a better one" in caplog.messages
    callbacks = torch.load(last_checkpoint(result.run_dir), weights_only=True)["callbacks"]
    (state,) = (state for name, state in callbacks.items() if "StopWithoutImprovement" in name)
    assert state["wait_count"] == 2


def test_without_it_all_epochs_are_trained(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    script_accuracies(monkeypatch, RISE_AND_FALL)
    assert epochs_of(train(replace(config, early_stopping=None)).run_dir) == 9


def test_the_count_survives_a_stop(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    script_accuracies(monkeypatch, RISE_AND_FALL)
    with monkeypatch.context() as patch:
        stop_at(patch, 5 * 5 + 1)  # in the sixth epoch, after one validation that was not better
        assert not train(config).finished
    assert epochs_of(train(config).run_dir) == 6


def test_a_run_that_ended_so_is_not_trained_on(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    script_accuracies(monkeypatch, RISE_AND_FALL)
    with monkeypatch.context() as patch:
        patch.setattr(runs_module, "write_report", lambda *arguments, **options: raise_("no report"))
        with pytest.raises(OSError, match="no report"):
            train(config)
    result = train(config)
    assert result.finished
    assert epochs_of(result.run_dir) == 6
    assert json.loads((result.run_dir / "result.json").read_text())["updates"] == result.updates


def raise_(message: str) -> None:
    raise OSError(message)


def test_patience_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="early_stopping=0 must be at least 1"):
        TrainConfig(early_stopping=0)
