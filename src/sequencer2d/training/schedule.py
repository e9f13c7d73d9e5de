"""The learning rate of a run: warm-up, cosine (paper, appendix; timm's `CosineLRScheduler`) or line, cool-down."""

import math
import time

from sequencer2d.training.config import OptimConfig


def learning_rate(epoch: float, epochs: float, optim: OptimConfig) -> float:
    """The learning rate at a point of the run, in epochs; fractions of an epoch count.

    As in timm the warm-up is part of the span of the fall, not put before it.

    Args:
        epoch: Epochs done, 0 … `epochs + optim.cooldown_epochs`; of a schedule per epoch the whole ones count.
        epochs: Span of the fall.
        optim: Resolved, that is without `None`.
    """
    peak, low, warmup = optim.learning_rate, optim.min_learning_rate, optim.warmup_epochs
    assert peak is not None
    assert warmup is not None
    if optim.schedule_per_epoch:
        epoch = math.floor(epoch + 1e-6)  # a fraction of the run times its epochs is off by some 1e-13
    if epoch < warmup:
        return optim.warmup_learning_rate + (peak - optim.warmup_learning_rate) * epoch / warmup
    if epoch < epochs:
        done = epoch / epochs
        return low + (peak - low) * (1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
    return low


class Clock:
    """How much of a run is done: by updates, or by wall-clock where a budget is given and runs out sooner.

    Time that passed before a stop counts too: it is saved and restored with the checkpoint.
    """

    def __init__(self, total_updates: int, max_minutes: float | None) -> None:
        self.total_updates = total_updates
        self.max_seconds = None if max_minutes is None else max_minutes * 60
        self.before_s = 0.0
        self.reserve_s = 0.0
        """Kept free of updates at the end, for the last validation."""
        self.started = time.monotonic()

    def start(self) -> None:
        self.started = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return self.before_s + time.monotonic() - self.started

    def progress(self, updates: int) -> float:
        """Fraction of the run that is done, 0 … 1."""
        done = updates / self.total_updates
        if self.max_seconds is not None:
            done = max(done, self.elapsed_s / max(1e-9, self.max_seconds - self.reserve_s))
        return min(done, 1.0)
