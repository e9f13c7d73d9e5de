"""A batch size is found by trying, what was tried is said, and a run keeps what it found."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import Job
from runs import stop_at, tiny_run
from sequencer2d.training import resolving
from sequencer2d.training.batch_size import Found, fastest, largest
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.faults import TrainingError
from sequencer2d.training.recipes import config_from_yaml
from sequencer2d.training.run import train
from sequencer2d.training.seeds import train_seeds


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return replace(tiny_run(tmp_path), batch_size="auto", epochs=1)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Searches end at once, each with one image more than the one before."""
    made: list[int] = []

    def find(*arguments: Any, **options: Any) -> Found:
        made.append(6 + len(made))
        return Found(batch_size=made[-1], trials=(), reason="")

    monkeypatch.setattr(resolving, "find_batch_size", find)
    return made


def memory_for(images: int, error: Exception | None = None) -> Callable[[int], float]:
    def seconds(batch_size: int) -> float:
        if batch_size > images:
            raise error or torch.OutOfMemoryError("CUDA out of memory")
        return 0.1

    return seconds


@pytest.mark.parametrize(("images", "batch_size"), [(100, 64), (64, 64), (9, 8), (7, 4), (1, 1), (10_000, 1024)])
def test_the_largest_power_of_two_that_fits(images: int, batch_size: int) -> None:
    found = largest(memory_for(images), limit=2047)
    assert found.batch_size == batch_size
    tried = {trial.batch_size: trial.images_per_s for trial in found.trials}
    assert tried[batch_size] == pytest.approx(batch_size / 0.1)
    assert [size for size, rate in tried.items() if rate is None] == [size for size in tried if size > images]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you …")])
def test_a_cpu_runs_out_of_memory_in_its_own_words(error: Exception) -> None:
    assert largest(memory_for(20, error), limit=100).batch_size == 16


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        largest(memory_for(20, RuntimeError("shapes differ")), limit=100)


def test_no_image_fits() -> None:
    with pytest.raises(TrainingError, match=r"one image; take a smaller --model"):
        largest(memory_for(0), limit=100)


def drifting(overhead: float, drift: float = 1.0) -> Callable[[int], float]:
    """A machine with a fixed cost per step that gets slower from call to call."""
    slowness = 1.0

    def seconds(batch_size: int) -> float:
        nonlocal slowness
        slowness *= drift
        return (overhead + batch_size) * slowness

    return seconds


@pytest.mark.parametrize(
    ("overhead", "batch_size"),
    [(0.0, 8), (0.5, 8), (2.0, 32), (10.0, 128), (1e6, 256)],  # (n + o) / (n + o / 2) < 1.05: n > 9.5 o; the limit
)
@pytest.mark.parametrize("drift", [1.0, 1.02])
def test_the_smallest_that_is_fast(overhead: float, batch_size: int, drift: float) -> None:
    found = fastest(drifting(overhead, drift), limit=300)
    assert found.batch_size == (batch_size if drift == 1 else min(found.batch_size, batch_size))
    assert found.batch_size >= batch_size / 2
    assert {trial.batch_size for trial in found.trials} >= {8, batch_size}


def test_a_cpu_stops_ahead_of_the_end_of_its_memory() -> None:
    found = fastest(drifting(1e6), limit=300, room=iter([True, True, False]).__next__)
    assert (found.batch_size, found.reason) == (32, "twice as many may not fit into the memory")
    found = fastest(memory_for(40), limit=300)
    assert (found.batch_size, found.trials[-1].images_per_s) == (32, None)
    assert fastest(memory_for(5), limit=300).batch_size == 4


def test_a_run_tries_real_steps_and_says_what_it_tried(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        result = train(replace(config, grad_checkpointing=True))
    assert config_from_yaml(result.run_dir / "config.yaml").batch_size == 8
    (tried,) = (message for message in caplog.messages if message.startswith("tried"))
    assert tried.startswith("tried batch size 8: ")
    assert tried.endswith(" images/s")
    assert "batch size 8: with more, an epoch would have fewer than 20 updates" in caplog.messages


@pytest.mark.parametrize("named", [True, False])
def test_the_learning_rate_follows_and_a_continued_run_keeps_the_size(
    named: bool, config: TrainConfig, searches: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = replace(config, optim=replace(config.optim, learning_rate=None), epochs=2)
    config = config if named else replace(config, run_dir=None)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        stopped = train(config)
    assert not stopped.finished
    saved = config_from_yaml(stopped.run_dir / "config.yaml")
    assert saved.batch_size == 6
    assert saved.optim.learning_rate == pytest.approx(2e-3 * (6 * 2 / 2048) ** 0.5)
    continued = train(config)
    assert (continued.finished, continued.run_dir) == (True, stopped.run_dir)
    assert searches == [6]
    if not named:
        assert train(replace(config, seed=1)).run_dir != stopped.run_dir
        assert searches == [6, 7]


def test_seeds_have_one_size(config: TrainConfig, searches: list[int]) -> None:
    for seeds in ([0, 1], [0, 1, 2]):
        result = train_seeds(config, seeds)
    sizes = [config_from_yaml(result.run_dir / f"seed-{seed}" / "config.yaml").batch_size for seed in (0, 1, 2)]
    assert sizes == [6, 6, 6]
    assert searches == [6]


@pytest.mark.slow
def test_the_first_of_two_ranks_decides_for_both(config: TrainConfig, tmp_path: Path) -> None:
    statuses, errors = Job(tmp_path / "two", {**config.to_dict(), "resume": "auto"}, ranks=2).run()
    assert statuses == [0, 0], errors
    assert errors.count("tried batch size 8") == 1
    assert config_from_yaml(tmp_path / "run" / "config.yaml").batch_size == 16
