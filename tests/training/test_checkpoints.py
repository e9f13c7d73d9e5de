"""Checkpoints are whole or known not to be, and a run goes on from the last that is, wherever it was killed."""

import itertools
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs import Job
from runs import last_checkpoint, rows, tiny_run
from sequencer2d.data.loaders import Batch, TrainLoader
from sequencer2d.training.checkpoints import (
    CheckpointError,
    CheckpointFolder,
    find_checkpoints,
    go_back_to,
    is_whole,
    newest_checkpoint,
    updates_of,
)
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.faults import TrainingError
from sequencer2d.training.run import train


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    """With checkpoints of 9, 10 and 11 updates."""
    folder = CheckpointFolder(tmp_path, keep=3)
    for updates in (9, 10, 11):
        folder.save_checkpoint({"weights": torch.full((1000,), float(updates))}, folder.path(updates))
        folder.publish()
    return folder


def names(folder: CheckpointFolder) -> list[int]:
    return [updates_of(path) for path in find_checkpoints(folder.folder)]


def test_the_last_few_are_kept(folder: CheckpointFolder) -> None:
    assert names(folder) == [11, 10, 9]
    folder.keep = 2
    folder.save_checkpoint({}, folder.path(100))
    assert names(folder) == [11, 10, 9]
    folder.publish()
    assert names(folder) == [100, 11]
    newest = newest_checkpoint(folder.folder)
    assert newest
    assert folder.load_checkpoint(newest) == {}


@pytest.mark.parametrize("damage", ["one bit", "cut short", "empty", "longer"])
def test_a_damaged_newest_one_is_set_aside_with_a_word(
    folder: CheckpointFolder, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest, before, _ = find_checkpoints(folder.folder)
    content = bytearray(newest.read_bytes())
    if damage == "one bit":
        content[len(content) // 2] ^= 1
    newest.write_bytes({"one bit": content, "cut short": content[:-1], "empty": b"", "longer": content + b"0"}[damage])
    assert newest_checkpoint(folder.folder) == before
    assert f"{newest} is damaged" in caplog.text
    assert before.name in caplog.text
    assert newest.with_suffix(".damaged").exists()
    assert names(folder) == [10, 9]


def test_damaged_ones_alone_are_an_error_that_loses_nothing(folder: CheckpointFolder) -> None:
    for path in find_checkpoints(folder.folder):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-00000011.*all other checkpoints.*damaged"):
        newest_checkpoint(folder.folder)
    assert names(folder) == [11, 10, 9]


def test_none_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_going_back_sets_the_later_ones_aside(folder: CheckpointFolder) -> None:
    _, _, oldest = find_checkpoints(folder.folder)
    go_back_to(oldest)
    assert names(folder) == [9]
    assert len(list(folder.folder.glob("*.later"))) == 2


def test_a_name_tells_updates_and_checksum(folder: CheckpointFolder, tmp_path: Path) -> None:
    path = find_checkpoints(folder.folder)[0]
    assert is_whole(path)
    assert is_whole(path.rename(path.with_stem(path.stem.replace("11-", "12-"))))
    assert not is_whole(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt is not named as a checkpoint"):
        updates_of(tmp_path / "last.ckpt")


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """Everything that has a state is on, and a checkpoint is written after every update."""
    return {**tiny_run(tmp_path).to_dict(), "epochs": 6, "num_workers": 1, "checkpoint_minutes": 0}


def test_the_metrics_of_its_updates_are_on_disk_before_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `fsync`, which a loss of power needs."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    synced: dict[int, int] = {}
    seen: list[tuple[int, int]] = []
    fsync, publish = os.fsync, CheckpointFolder.publish

    def note_size(file: int) -> None:
        fsync(file)
        synced[os.fstat(file).st_ino] = os.fstat(file).st_size

    def note_rows(folder: CheckpointFolder) -> None:
        assert folder.pending
        assert synced[metrics.stat().st_ino] == metrics.stat().st_size
        publish(folder)
        seen.append((updates_of(find_checkpoints(folder.folder)[0]), 1 + rows(tmp_path / "run")[-1]["step"]))

    monkeypatch.setattr(os, "fsync", note_size)
    monkeypatch.setattr(CheckpointFolder, "publish", note_rows)
    train(replace(tiny_run(tmp_path), epochs=2, checkpoint_minutes=0))
    assert seen == [(updates, updates) for updates in range(1, 7)]


def test_a_checkpoint_that_was_made_is_written_whatever_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainLoader.__iter__

    def two_batches(loader: TrainLoader) -> Iterator[Batch]:
        yield from itertools.islice(original(loader), 2)
        raise RuntimeError("no more images")

    monkeypatch.setattr(TrainLoader, "__iter__", two_batches)
    with pytest.raises(RuntimeError, match="no more images"):
        train(replace(tiny_run(tmp_path), checkpoint_minutes=0))
    assert updates_of(last_checkpoint(tmp_path / "run")) == 1


def test_metrics_that_were_deleted_at_the_end_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny_run(tmp_path), epochs=2, keep_checkpoints=9)
    with monkeypatch.context() as patch:
        patch.delattr("sequencer2d.training.run._finish")
        with pytest.raises(NameError):
            train(config)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(TrainingError, match=r"metrics\.jsonl has no validation.*--resume CHECKPOINT"):
        train(config)
    earlier = find_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert train(TrainConfig(resume=str(earlier))).finished


@pytest.mark.slow
def test_killed_anywhere_a_run_ends_as_if_it_had_not_been(recipe: dict[str, Any], tmp_path: Path) -> None:
    """`kill -9` at random moments, in writing and validating too, until it is through."""
    statuses, errors = Job(tmp_path / "job", {**recipe, "run_dir": str(tmp_path / "whole")}).run()
    assert statuses == [0], errors
    generator = random.Random(0)
    run_dir = tmp_path / "run"
    kills = 0
    for _ in range(30):
        (process,) = Job(tmp_path / "job", recipe).start()
        begun = time.monotonic()
        before = find_checkpoints(run_dir / "checkpoints")[:1]
        while process.poll() is None and find_checkpoints(run_dir / "checkpoints")[:1] == before:
            time.sleep(0.01)
            assert time.monotonic() - begun < 120
        time.sleep(generator.uniform(0, 0.4))
        process.kill()
        errors = process.communicate()[1]
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
        kills += 1
    else:
        pytest.fail("it made no headway")
    assert kills >= 3
    weights, expected = (load_file(folder / "model.safetensors") for folder in (run_dir, tmp_path / "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    curves, whole = rows(run_dir), rows(tmp_path / "whole")
    assert curves == whole
    assert not list(run_dir.rglob(".step-*"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs POSIX signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_the_signals_of_job_schedulers_leave_a_checkpoint_and_say_resume_me(
    name: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe |= {"checkpoint_minutes": 10, "num_workers": 0}
    statuses, errors = Job(tmp_path / "job", recipe, kill=(3, getattr(signal, name))).run()
    assert statuses == [75]
    assert "continue with: sequencer2d train --resume" in errors
    assert [updates_of(path) for path in find_checkpoints(tmp_path / "run" / "checkpoints")] == [2]
