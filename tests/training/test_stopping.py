"""Runs that are stopped and go on: by a signal, a launcher or an option, as if they had not stopped."""

import json
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning.loops.fit_loop import _FitLoop
from safetensors.torch import load_file

from runs import assert_same, last_checkpoint, make_images, rows, stop_at
from sequencer2d.evaluation import evaluate
from sequencer2d.training import machine, run
from sequencer2d.training.callbacks import Checkpoints, StopRequested
from sequencer2d.training.config import OptimConfig, TrainConfig
from sequencer2d.training.finetune_config import DistillConfig, FinetuneConfig, ProgressiveConfig
from sequencer2d.training.run import train
from sequencer2d.training.task import SequencerTask


@pytest.mark.parametrize(
    ("batch", "optimizer"), [(0, "adamw"), (4, "adamw"), (5, "adamw"), (7, "adamw"), (17, "adamw"), (7, "muon")]
)
def test_a_stopped_run_continues_as_if_it_had_not_stopped(
    batch: int,
    optimizer: Literal["adamw", "muon"],
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(config, optim=replace(config.optim, optimizer=optimizer))
    whole = train(replace(config, run_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        stop_at(patch, batch)
        stopped = train(config)
    assert not stopped.finished
    assert not (stopped.run_dir / "result.json").exists()
    continued = train(config)
    assert continued.finished
    assert continued.run_dir == stopped.run_dir
    assert rows(continued.run_dir) == rows(whole.run_dir)
    weights, expected = (load_file(run.run_dir / "model.safetensors") for run in (continued, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    last, expected_last = (
        torch.load(last_checkpoint(run.run_dir), weights_only=True)["state_dict"] for run in (continued, whole)
    )
    assert all(torch.equal(last[name], expected_last[name]) for name in expected_last)


@pytest.mark.parametrize(
    ("batch", "optimizer"), [(2, "adamw"), (7, "adamw"), (13, "adamw"), pytest.param(7, "muon", marks=pytest.mark.slow)]
)
def test_so_does_one_with_all_that_fine_tuning_has(
    batch: int,
    optimizer: Literal["adamw", "muon"],
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    donor = str(train(replace(config, epochs=1, run_dir=str(tmp_path / "donor"))).run_dir)
    tuned = replace(
        config,
        weights=donor,
        optim=replace(config.optim, optimizer=optimizer),
        augment=replace(config.augment, mixing_off_epochs=2),
        finetune=FinetuneConfig(freeze="stem", layer_decay=0.5),
        distill=DistillConfig(teacher=donor),
        progressive=ProgressiveConfig(start_size=8, epochs=3),
        early_stopping=4,
        split_seed=3,
        loggers=("csv",),
    )
    test_a_stopped_run_continues_as_if_it_had_not_stopped(batch, optimizer, tuned, tmp_path, monkeypatch)
    tables = [(tmp_path / name / "csv" / "metrics.csv").read_text().splitlines() for name in ("run", "whole")]
    assert len(tables[0]) == len(tables[1]) == len(rows(tmp_path / "run")) + 1


def test_it_does_so_without_the_weights_that_it_began_with(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = train(replace(config, epochs=1, run_dir=str(tmp_path / "donor"))).run_dir
    tuned = replace(config, weights=str(donor), finetune=FinetuneConfig(freeze="stem"))
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        stopped = train(tuned)
    donor.rename(tmp_path / "elsewhere")
    assert train(TrainConfig(resume=str(stopped.run_dir)), {"resume"}).finished
    (tmp_path / "elsewhere").rename(donor)
    train(replace(tuned, run_dir=str(tmp_path / "whole")))
    assert rows(stopped.run_dir) == rows(tmp_path / "whole")


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(("owner", "name"), [(SequencerTask, "configure_optimizers"), (_FitLoop, "setup_data")])
def test_asked_to_stop_before_the_first_update_a_run_stops_and_can_go_on(
    owner: type, name: str, begun: bool, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the second moment Lightning has its own handler of SIGTERM in place, if one lets it."""
    original = getattr(owner, name)
    before = signal.getsignal(signal.SIGTERM)

    def struck(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    updates = 0
    if begun:
        with monkeypatch.context() as patch:
            stop_at(patch, 3)
            updates = train(config).updates
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, struck)
        stopped = train(config)
    assert not stopped.finished
    assert stopped.updates == updates
    assert signal.getsignal(signal.SIGTERM) is before
    assert train(config).finished


@pytest.mark.parametrize("place", ["choose_precision", "evaluate_images", "write_report"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_while_nothing_is_trained_a_run_stops_at_once_and_can_go_on(
    number: int, place: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(run, place)
    before = signal.getsignal(number)

    def struck(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), number)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(run, place, struck)
        if number == signal.SIGTERM and place != "choose_precision":
            assert not train(config).finished
        else:
            with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else StopRequested):
                train(config)
    assert signal.getsignal(number) is before
    assert not Path(config.run_dir or "", "result.json").exists()
    assert train(config).finished


def test_a_second_ctrl_c_interrupts_a_training(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    original = SequencerTask.training_step

    def struck(self: SequencerTask, *arguments: Any) -> Any:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(SequencerTask, "training_step", struck)
    with pytest.raises(KeyboardInterrupt):
        train(config)


def test_asked_to_stop_in_the_last_validation_a_run_is_evaluated_when_it_goes_on(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(replace(config, run_dir=f"{config.run_dir}-whole"))
    save, saved = Checkpoints.save, []

    def struck(self: Checkpoints, trainer: Any) -> None:
        saved.append(trainer.global_step)
        if trainer.global_step == whole.updates:
            os.kill(os.getpid(), signal.SIGTERM)
        save(self, trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", struck)
        stopped = train(config)
    assert saved[-1] == stopped.updates == whole.updates
    assert not stopped.finished
    result = train(config)
    assert result.finished
    assert result.evaluation == whole.evaluation
    assert_same(result.run_dir, whole.run_dir)


def test_resume_takes_a_folder_or_a_checkpoint_and_the_run_s_own_config(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        run_dir = train(config).run_dir
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        assert not train(TrainConfig(resume=str(run_dir))).finished
    assert train(TrainConfig(resume=str(last_checkpoint(run_dir)))).finished
    assert len(json.loads((run_dir / "environment.json").read_text())["continued"]) == 2


def test_started_again_by_the_launcher_a_run_goes_on_from_where_it_was(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And not from the checkpoint that it was first resumed from, which is no more among those that are kept."""
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        run_dir = train(config).run_dir
    first = last_checkpoint(run_dir)
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        updates = train(TrainConfig(resume=str(first))).updates
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with caplog.at_level(logging.INFO):
        assert train(TrainConfig(resume=str(first))).finished
    assert f"continuing {run_dir} after {updates} updates" in caplog.messages
    assert not list(run_dir.glob("checkpoints/*.later"))


def test_a_run_that_goes_on_keeps_its_config_and_precision(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, precision="auto")
    with monkeypatch.context() as patch:
        patch.setattr(machine, "_bf16_speedup", lambda: 2.0)
        stop_at(patch, 3)
        run_dir = train(config).run_dir
    with pytest.raises(ValueError, match=r"leave out epochs, optim, or begin another run"):
        train(TrainConfig(resume=str(run_dir), epochs=50, optim=OptimConfig(ema_decay=0.5)))
    with monkeypatch.context() as patch:
        patch.setattr(machine, "_bf16_speedup", lambda: 0.5)
        stop_at(patch, 3)
        assert not train(TrainConfig(resume=str(run_dir), log_every=7, batch_size="auto")).finished
        saved = yaml.safe_load((run_dir / "config.yaml").read_text())
        assert (saved["precision"], saved["log_every"]) == ("bf16", 7)
        assert train(replace(config, log_every=7)).finished


def test_names_are_found_and_stopped_runs_are_found_again(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = replace(config, run_dir=None, epochs=1)
    first = train(config)
    assert first.run_dir == Path("runs/colours-sequencer2d_conv_p_patch2_16")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        second = train(config)
    assert second.run_dir == Path("runs/colours-sequencer2d_conv_p_patch2_16-2")
    other = train(replace(config, seed=1))
    assert other.run_dir == Path("runs/colours-sequencer2d_conv_p_patch2_16-3")
    again = train(config)
    assert again.finished
    assert again.run_dir == second.run_dir


def test_a_run_goes_on_only_with_the_images_it_began_with(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        run_dir = train(config).run_dir
    new = Path(config.data) / "red" / "new.png"
    Image.new("RGB", (16, 16)).save(new)
    (Path(config.data) / "blue" / "00.png").unlink()
    with pytest.raises(ValueError, match="1 are new and 1 are gone"):
        train(config)
    with pytest.raises(ValueError, match="1 are new and 1 are gone"):
        evaluate(run_dir, split="val")
    make_images(Path(config.data) / "more", {"pink": (200, 40, 200)})
    (Path(config.data) / "more" / "pink").rename(Path(config.data) / "pink")
    (Path(config.data) / "more").rmdir()
    with pytest.raises(ValueError, match="the model does not know pink"):
        evaluate(run_dir, data=config.data)


def test_a_resumed_run_stays_in_its_folder(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        run_dir = train(config).run_dir
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    for resume in (run_dir, last_checkpoint(run_dir)):
        with pytest.raises(
            ValueError, match=r"--resume goes on in .*run; leave --run-dir .*other out, or begin another"
        ):
            train(TrainConfig(resume=str(resume), run_dir=str(tmp_path / "other")))
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert train(TrainConfig(resume=str(run_dir), run_dir=str(run_dir))).finished
    with pytest.raises(ValueError, match=r"holds a finished run; begin another from its weights: --weights "):
        train(TrainConfig(resume=str(run_dir)))


def test_a_run_that_goes_on_may_skip_what_is_no_number(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step that the error names."""
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        run_dir = train(config).run_dir
    assert train(TrainConfig(resume=str(run_dir), skip_nonfinite=10)).finished
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["skip_nonfinite"] == 10
