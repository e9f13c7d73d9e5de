"""What is measured: one step of one kind of work, the same for every contender."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from sequencer2d.zoo import get_variant

Mode = Literal["train", "infer"]
Allocator = Literal["tuned", "default"]
"""Tuned: freed memory stays in the process (`machine.tune_allocator`)."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A step: in `train` forward, cross entropy, backward, AdamW; in `infer` images to logits."""

    model: str
    """A name of the zoo."""
    mode: Mode
    image_size: int
    """Side in pixels."""
    batch_size: int
    threads: int
    num_classes: int = 1000

    def __post_init__(self) -> None:
        get_variant(self.model)
        for name in ("image_size", "batch_size", "threads", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def __str__(self) -> str:
        return f"{self.mode} {self.model}, {self.image_size}², batch {self.batch_size}, {self.threads} threads"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `Workload(**…)` is the way back."""
        return asdict(self)
