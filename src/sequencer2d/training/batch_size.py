"""Finding a batch size by trying: the largest that fits into a GPU's memory, the smallest at which a CPU is fast."""

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sequencer2d.data.loaders import Batch
from sequencer2d.inference import best_device
from sequencer2d.training.faults import TrainingError
from sequencer2d.training.machine import Precision
from sequencer2d.training.task import SequencerTask

log = logging.getLogger("sequencer2d")

SMALLEST = 8
"""The first size that is tried, on a CPU the smallest that is taken where memory allows it."""
UPDATES_PER_EPOCH = 20
"""The size is kept so small that an epoch has so many steps: fewer would learn little."""
GAIN = 1.05
"""On a CPU a batch of twice the size must give so many times as many images per second."""
GPU_PART = 0.9
"""Of a GPU's memory that may be used."""
ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a batch size gave."""

    batch_size: int
    images_per_s: float | None
    """None: it did not fit into the memory."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A batch size, and how it was found."""

    batch_size: int
    trials: tuple[Trial, ...]
    reason: str


def find_batch_size(task: SequencerTask, precision: Precision, *, num_images: int) -> Found:
    """Tries batches of 8, 16, 32, … in whole steps: forward, backward and update, on random images.

    On a GPU the largest that fits into 90 % of its memory is taken; on a CPU the smallest after which twice the size
    gives less than 5 % more images per second. Out of memory while trying ends the search. The weights of the task are
    trained on nonsense afterwards: throw it away.

    Args:
        task: With a config that has a batch size, whichever.
        precision: Of the arithmetic.
        num_images: Of one epoch and process, which set a limit.

    Raises:
        TrainingError: Not even the smallest size fits.
    """
    device = best_device()
    limit = max(SMALLEST, num_images // UPDATES_PER_EPOCH)
    stepper = _Stepper(task.to(device).train(), precision, device)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(GPU_PART)
        try:
            found = largest(stepper, limit)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    else:
        found = fastest(stepper, limit, room=_memory_is_enough_for_twice)
    for trial in found.trials:
        what = f"{trial.images_per_s:,.0f} images/s" if trial.images_per_s else "does not fit into the memory"
        log.info("tried batch size %d: %s", trial.batch_size, what)
    log.info("batch size %d: %s", found.batch_size, found.reason)
    return found


def largest(seconds: Callable[[int], float], limit: int) -> Found:
    """The largest power of two, from 8 up to the limit, for which `seconds(batch_size)` does not run out of memory.

    Below 8 it halves until one fits.

    Raises:
        TrainingError: One image is too much.
    """
    trials = [_try(seconds, SMALLEST)]
    while trials[-1].images_per_s is None:
        if trials[-1].batch_size == 1:
            raise TrainingError("the memory is too small for one image; take a smaller --model or --image-size")
        trials.append(_try(seconds, trials[-1].batch_size // 2))
    if len(trials) > 1:
        return _found(trials[-1].batch_size, trials, _FITS)
    while 2 * trials[-1].batch_size <= limit:
        trials.append(_try(seconds, 2 * trials[-1].batch_size))
        if trials[-1].images_per_s is None:
            return _found(trials[-2].batch_size, trials, _FITS)
    return _found(trials[-1].batch_size, trials, _LIMIT)


def fastest(
    seconds: Callable[[int], float], limit: int, *, room: Callable[[], bool] = lambda: True, rounds: int = ROUNDS
) -> Found:
    """The smallest power of two, from 8 up to the limit, after which images per second rise by less than 5 %.

    A size and its double are timed in turn, since the speed of a machine drifts.

    Args:
        seconds: Time of a step with a batch of that size.
        limit: Of the size.
        room: Whether the memory may hold a batch of twice the size of the largest one so far.
        rounds: Steps of each size, besides one to warm up.

    Raises:
        TrainingError: One image is too much.
    """
    start = largest(seconds, SMALLEST)
    if start.batch_size < SMALLEST:
        return start
    size, trials = SMALLEST, list(start.trials)
    while True:
        if 2 * size > limit:
            return _found(size, trials, _LIMIT)
        if not room():
            return _found(size, trials, "twice as many may not fit into the memory")
        trials.append(_try(seconds, 2 * size))
        if trials[-1].images_per_s is None:
            return _found(size, trials, _FITS)
        pairs = [(size / seconds(size), 2 * size / seconds(2 * size)) for _ in range(rounds)]
        gain = statistics.median(twice / once for once, twice in pairs)
        for number, trial in enumerate(trials[-2:]):
            rate = statistics.median(pair[number] for pair in pairs)
            trials[number - 2] = replace(trial, images_per_s=rate)
        if gain < GAIN:
            return _found(size, trials, f"twice as many are {gain:.2f}× as fast per image")
        size *= 2


_FITS = "the largest power of two that fits into the memory"
_LIMIT = f"with more, an epoch would have fewer than {UPDATES_PER_EPOCH} updates"


def _found(batch_size: int, trials: Sequence[Trial], reason: str) -> Found:
    return Found(batch_size=batch_size, trials=tuple(trials), reason=reason)


def _try(seconds: Callable[[int], float], batch_size: int) -> Trial:
    """Two steps, of which the first one is to warm up and does not count."""
    rate = None
    try:
        seconds(batch_size)
        rate = batch_size / seconds(batch_size)
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
    if rate is None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Trial(batch_size=batch_size, images_per_s=rate)


class _Stepper:
    """Steps of a task with batches of any size; a call is one step and returns its seconds."""

    def __init__(self, task: SequencerTask, precision: Precision, device: torch.device) -> None:
        self.task = task
        self.device = device
        self.optimizer = task.make_optimizer(precision)
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        self.autocast = torch.autocast(device.type, dtype, enabled=precision != "fp32")

    def __call__(self, batch_size: int) -> float:
        self.optimizer.zero_grad()
        side = self.task.preprocessing.image_size
        images = torch.randint(256, (batch_size, side, side, 3), dtype=torch.uint8, device=self.device)
        labels = torch.arange(batch_size, device=self.device) % self.task.model.config.num_classes
        batch = Batch(images, labels, torch.arange(batch_size), skipped=[])
        self._wait()
        start = time.perf_counter()
        with self.autocast:
            loss = self.task.loss(batch, (self.task.config.seed,), 0)
        loss.backward()
        self.optimizer.step()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _memory_is_enough_for_twice() -> bool:
    """Whether as much memory is free again as this process has had at its most; True where the system does not tell."""
    needed, free = _kib(Path("/proc/self/status"), "VmHWM:"), _kib(Path("/proc/meminfo"), "MemAvailable:")
    for limit, used in _CONTROL_GROUPS:
        with suppress(OSError, ValueError):
            free = min(free, (int(Path(limit).read_text()) - int(Path(used).read_text())) / 1024)
    return needed <= free


_CONTROL_GROUPS = [
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
]
"""Of a container: version 2 and 1."""


def _kib(file: Path, name: str) -> float:
    """A number of one of the system's tables; none needed and infinitely many free where there is no such table."""
    with suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith(name):
                return float(line.split()[1])
    return 0.0 if name == "VmHWM:" else float("inf")
