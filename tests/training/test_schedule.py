"""The learning rate is timm's at every update, and the clock counts updates or minutes, whichever are further."""

import itertools
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.scheduler.cosine_lr import CosineLRScheduler

from sequencer2d.training import schedule
from sequencer2d.training.config import OptimConfig
from sequencer2d.training.schedule import Clock, learning_rate


@pytest.mark.parametrize("warmup_epochs", [0, 2, 2.5])
@pytest.mark.parametrize("updates_per_epoch", [1, 7])
def test_every_update_has_the_learning_rate_of_timm(warmup_epochs: float, updates_per_epoch: int) -> None:
    epochs, cooldown_epochs = 10, 3
    optim = OptimConfig(
        learning_rate=0.1,
        min_learning_rate=1e-3,
        warmup_learning_rate=1e-4,
        warmup_epochs=warmup_epochs,
        cooldown_epochs=cooldown_epochs,
    )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=epochs * updates_per_epoch,
        lr_min=1e-3,
        warmup_t=warmup_epochs * updates_per_epoch,  # type: ignore[arg-type] - fractions do as well
        warmup_lr_init=1e-4,
        cycle_limit=1,
        t_in_epochs=False,
    )
    clock = Clock((epochs + cooldown_epochs) * updates_per_epoch, max_minutes=None)
    for update in range(clock.total_updates):
        scheduler.step_update(update)
        epoch = clock.progress(update) * (epochs + cooldown_epochs)
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate(epoch, epochs, optim) == pytest.approx(expected, rel=1e-9), f"at update {update}"


def test_a_line_falls_evenly_from_the_peak_to_the_minimum() -> None:
    optim = OptimConfig(learning_rate=1.0, min_learning_rate=0.2, warmup_epochs=0, schedule="linear")
    assert [learning_rate(epoch, 8, optim) for epoch in (0, 2, 4, 8, 9)] == pytest.approx([1.0, 0.8, 0.6, 0.2, 0.2])


@settings(deadline=None)
@given(
    schedule=st.sampled_from(["cosine", "linear"]),
    epochs=st.integers(1, 300),
    warmup_share=st.floats(0, 1),
    cooldown_epochs=st.floats(0, 30),
    peak=st.floats(1e-5, 1),
)
def test_the_rate_rises_to_the_peak_then_falls_to_the_minimum_and_stays(
    schedule: Literal["cosine", "linear"], epochs: int, warmup_share: float, cooldown_epochs: float, peak: float
) -> None:
    warmup_epochs = warmup_share * epochs
    optim = OptimConfig(
        schedule=schedule, learning_rate=peak, warmup_epochs=warmup_epochs, cooldown_epochs=cooldown_epochs
    )
    grid = [i / 50 for i in range(51)]
    warmup = [learning_rate(t * warmup_share * epochs, epochs, optim) for t in grid[:-1]]
    after = [learning_rate(epochs * (warmup_share + t * (1 - warmup_share)), epochs, optim) for t in grid]
    cooldown = [learning_rate(epochs + t * cooldown_epochs, epochs, optim) for t in grid]
    assert all(a <= b for a, b in itertools.pairwise(warmup))
    assert all(a >= b for a, b in itertools.pairwise(after))
    assert max(warmup + after) <= peak * (1 + 1e-9)
    assert set(cooldown) == {optim.min_learning_rate}


class Time:
    """A clock on the wall that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(schedule.time, "monotonic", lambda: self.now)


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


def test_without_a_budget_progress_is_the_share_of_updates(time: Time) -> None:
    clock = Clock(200, max_minutes=None)
    time.now += 1e6
    assert [clock.progress(updates) for updates in (0, 50, 200, 300)] == [0, 0.25, 1, 1]


def test_with_a_budget_progress_is_whichever_is_further(time: Time) -> None:
    clock = Clock(200, max_minutes=10)
    time.now += 60
    assert clock.progress(0) == pytest.approx(0.1)
    assert clock.progress(100) == 0.5
    time.now += 1e6
    assert clock.progress(100) == 1


def test_time_before_a_stop_counts_and_time_between_does_not(time: Time) -> None:
    clock = Clock(200, max_minutes=10)
    clock.before_s = 120
    time.now += 5000
    clock.start()
    time.now += 180
    assert clock.elapsed_s == pytest.approx(300)
    assert clock.progress(0) == pytest.approx(0.5)


def test_the_reserve_for_the_last_validation_is_kept_free_of_updates(time: Time) -> None:
    clock = Clock(200, max_minutes=10)
    clock.reserve_s = 100
    time.now += 250
    assert clock.progress(0) == pytest.approx(0.5)
    clock.reserve_s = 700
    assert clock.progress(0) == 1
