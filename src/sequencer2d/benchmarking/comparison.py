"""`benchmark`: contenders on one workload, and the records and ratios that come of it."""

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from sequencer2d.benchmarking.contenders import CONTENDERS, find_contenders
from sequencer2d.benchmarking.processes import Answers, Entry, take_turns
from sequencer2d.benchmarking.workload import Allocator, Mode, Workload
from sequencer2d.cores import num_cores
from sequencer2d.training.machine import describe_machine
from sequencer2d.zoo import get_variant

TOGETHER: dict[Mode, int] = {"train": 4, "infer": 10}
"""Contenders that are in memory at a time; a training process of S at 224², batch 8, takes 2 to 4 GiB."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as long one contender takes as another, of the rounds that both made."""

    median: float
    low: float
    high: float
    """The quartiles: half of the rounds lie between."""

    @property
    def inverse(self) -> "Ratio":
        """How many times as fast."""
        return Ratio(median=1 / self.median, low=1 / self.high, high=1 / self.low)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was found out about a contender in the company of others."""

    entry: Entry
    answers: Answers
    group: int
    """Those of one group took turns with each other; only their times may be compared."""

    @property
    def error(self) -> str | None:
        """Why there is no result."""
        return self.answers.error

    @property
    def seconds(self) -> float | None:
        """Of a step: the median over the rounds of each round's median."""
        return statistics.median(self.round_seconds) if self.error is None else None

    @property
    def round_seconds(self) -> list[float]:
        """The median step of each round."""
        return [statistics.median(steps) for steps in self.answers.rounds]

    @property
    def images_per_s(self) -> float | None:
        """At that median."""
        return self.entry.workload.batch_size / self.seconds if self.seconds else None

    @property
    def step_mib(self) -> float | None:
        """Memory that the steps need at their most, beyond what was there before the first one."""
        before, peak = self.answers.before_mib, self.answers.peak_mib
        return None if before is None or peak is None else peak - before

    def percentile_ms(self, percent: int) -> float | None:
        """Of the seconds of all single steps, in ms; None where they are too few to have it."""
        steps = list(chain.from_iterable(self.answers.rounds))
        if self.error is not None or len(steps) * (100 - percent) < 100:
            return None
        return 1000 * statistics.quantiles(steps, n=100, method="inclusive")[percent - 1]

    def time_ratio(self, reference: "Measurement") -> Ratio | None:
        """Its time over that of another contender of its group; None where one of them failed."""
        if self.error is not None or reference.error is not None:
            return None
        ratios = [ours / theirs for ours, theirs in zip(self.round_seconds, reference.round_seconds, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return Ratio(median=statistics.median(ratios), low=low, high=high)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        contender = CONTENDERS[self.entry.contender]
        return {
            "contender": self.entry.contender,
            "how": "; ".join(filter(None, [contender.how, self.answers.detail])),
            "allocator": self.entry.allocator,
            **self.entry.workload.to_dict(),
            "group": self.group,
            "error": self.error,
            "seconds": self.seconds,
            "images_per_s": self.images_per_s,
            **{f"p{percent}_ms": self.percentile_ms(percent) for percent in (50, 90, 99)},
            "before_mib": self.answers.before_mib,
            "peak_mib": self.answers.peak_mib,
            "step_mib": self.step_mib,
            "output_error": self.answers.output_error,
            "idle_share": self.answers.idle_share,
            "rounds": [[round(seconds, 6) for seconds in steps] for steps in self.answers.rounds],
            "versions": {name: _version(name) for name in contender.packages},
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Measurement":
        """What `to_dict` made, less the contender's words."""
        fields = ("model", "mode", "image_size", "batch_size", "threads", "num_classes")
        entry = Entry(
            contender=record["contender"],
            workload=Workload(**{name: record[name] for name in fields}),
            allocator=record["allocator"],
        )
        answers = ("rounds", "error", "before_mib", "peak_mib", "output_error", "idle_share")
        return cls(entry=entry, answers=Answers(**{name: record[name] for name in answers}), group=record["group"])


def benchmark(
    model: str = "sequencer2d_s",
    *,
    mode: Mode = "infer",
    image_size: int | None = None,
    batch_size: int = 8,
    num_classes: int = 1000,
    against: str = "timm",
    precision: str = "fp32,bf16",
    allocator: Literal["tuned", "default", "both"] = "tuned",
    checkpointing: bool = False,
    threads: int | None = None,
    rounds: int = 7,
) -> list[Measurement]:
    """Compares our implementation of a model with others on this CPU.

    Every contender has a process of its own with the same weights and images, and what it computes is checked. In every
    round each makes a step, or short ones for 0.3 s, while the others wait.

    Args:
        model: Name of the zoo.
        mode: train: forward, cross entropy, backward, fused AdamW; or infer.
        image_size: Side in pixels; default: the variant's.
        batch_size: Images in a step.
        num_classes: Outputs of the head.
        against: Others of timm, timm-compiled, onnxruntime, openvino and sequencer2d-torch, such as timm,openvino:bf16;
            without a precision, all that there are. The first one is what all are compared with.
        precision: Of ours, such as fp32,bf16.
        allocator: With freed memory kept in the process (tuned), as the system does it (default), or
            both in turn; for all contenders.
        checkpointing: Have ours in training also with activations computed again.
        threads: Of each contender; default: one per core.
        rounds: How often each has its turn.

    Returns:
        One measurement per contender, allocator and group: those who do not fit into memory together (`TOGETHER`) are
        compared in groups that all have the reference, which is the first of each group.

    Raises:
        ValueError: No such model, contender or value.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    side = get_variant(model).image_size if image_size is None else image_size
    workload = Workload(
        model=model,
        mode=mode,
        image_size=side,
        batch_size=batch_size,
        threads=num_cores() if threads is None else threads,
        num_classes=num_classes,
    )
    ours = _ours(precision, mode, checkpointing)
    reference, *others = dict.fromkeys([*find_contenders(against, mode), *ours])
    allocators: tuple[Allocator, ...] = ("tuned", "default") if allocator == "both" else (allocator,)
    size = TOGETHER[mode] - 1
    chunks = [others[first : first + size] for first in range(0, len(others), size)] or [[]]
    found: list[Measurement] = []
    for kind in allocators:
        for chunk in chunks:
            entries = [Entry(contender=name, workload=workload, allocator=kind) for name in (reference, *chunk)]
            found += measure(entries, rounds, group=len({each.group for each in found}))
    return found


def measure(entries: Sequence[Entry], rounds: int, *, group: int = 0) -> list[Measurement]:
    """One group of contenders, of whatever workloads, that take turns."""
    answers = take_turns(entries, rounds)
    return [Measurement(entry=entry, answers=each, group=group) for entry, each in zip(entries, answers, strict=True)]


def records(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """A record each, with the ratio to the first of its group and the stamp of the machine."""
    environment = describe_benchmark()
    found = []
    for measurement in measurements:
        reference = next(other for other in measurements if other.group == measurement.group)
        ratio = measurement.time_ratio(reference)
        speedup = None if ratio is None else ratio.inverse
        found.append(
            {
                **measurement.to_dict(),
                "reference": reference.entry.contender,
                "speedup": speedup and [speedup.low, speedup.median, speedup.high],
                "environment": environment,
            }
        )
    return found


def describe_benchmark() -> dict[str, Any]:
    """The machine of a benchmark; how many threads each contender had is in its own record."""
    stamp = describe_machine()
    del stamp["threads"]
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    stamp["huge_pages"] = pages.read_text().strip() if pages.is_file() else None
    stamp["preloaded"] = os.environ.get("LD_PRELOAD")  # another allocator, perhaps
    return stamp


def _ours(precision: str, mode: Mode, checkpointing: bool) -> list[str]:
    who = ["sequencer2d", *(["sequencer2d-checkpointing"] if checkpointing else [])]
    names = ",".join(f"{each}:{part.strip()}" for each in who for part in precision.split(","))
    return find_contenders(names, mode)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
