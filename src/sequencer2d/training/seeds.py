"""One config with several seeds: mean and standard deviation, which a claim needs."""

import json
import logging
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sequencer2d.files import write_atomic
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.recipes import config_from_yaml
from sequencer2d.training.run import finished_run, train
from sequencer2d.training.run_folder import default_stem

log = logging.getLogger("sequencer2d")

SCORES = ("val_top1", "test_top1")


@dataclass(frozen=True, kw_only=True)
class SeedRun:
    """How the run of one seed ended."""

    seed: int
    val_top1: float
    """Best on validation images."""
    test_top1: float | None
    """Of the weights chosen by that; None where the data have no test images."""
    minutes: float


@dataclass(frozen=True, kw_only=True)
class SeedsResult:
    """The runs of all seeds; also `seeds.json` of their folder, and `table.md` for people."""

    run_dir: Path
    runs: tuple[SeedRun, ...]
    """Of the seeds that are finished."""
    finished: bool
    """False if a run was asked to stop; train with the same options again to continue."""

    def mean_and_std(self, score: str) -> tuple[float, float | None] | None:
        """Mean and sample standard deviation of one of `SCORES`; None for the deviation of one run, or no scores."""
        values = [getattr(run, score) for run in self.runs]
        if not values or None in values:
            return None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        summary = {score: self.mean_and_std(score) for score in SCORES}
        return {
            "runs": [asdict(run) for run in self.runs],
            "mean": {score: found[0] for score, found in summary.items() if found},
            "std": {score: found[1] for score, found in summary.items() if found},
            "finished": self.finished,
        }

    def rows(self) -> list[tuple[str, ...]]:
        """The table: a row for each seed, and mean ± standard deviation."""
        rows = [
            (str(run.seed), *(_percent(getattr(run, score)) for score in SCORES), f"{run.minutes:.1f}")
            for run in self.runs
        ]
        summary = (_mean_and_std(self.mean_and_std(score)) for score in SCORES)
        return [*rows, ("mean ± std", *summary, f"{sum(run.minutes for run in self.runs):.1f}")]


HEADINGS = ("seed", "validation top-1", "test top-1", "minutes")


def train_seeds(config: TrainConfig, seeds: Sequence[int]) -> SeedsResult:
    """Trains once with each seed, into `<run_dir>/seed-N`, and sums up.

    All runs have the same validation images, split off by `config.split_seed` or else `config.seed`: their scores
    differ by initial weights, order and augmentation, and can be compared image by image.

    A run that was stopped is continued; one that is finished is not repeated.

    Args:
        config: Its `seed` is replaced by each of `seeds`; without a `run_dir`: runs/<data>-<model>-seeds.
        seeds: In the order of training.

    Raises:
        ValueError: No seeds or one of them twice, or the folder holds a run of another config.
        Exception: As `train`.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {list(seeds)} must be one or more, each of them once")
    if config.resume not in ("auto", "never"):
        raise ValueError(f"resume={config.resume} names one run; with seeds, give their --run-dir to go on")
    stem = re.sub(r"\W+", "-", Path(config.data).name).strip("-")
    run_dir = Path(config.run_dir or f"{default_stem(stem, config.model)}-seeds")
    if (run_dir / "config.yaml").exists():
        raise ValueError(f"{run_dir} holds a single run; give another --run-dir")
    split_seed = config.seed_of_split
    result = SeedsResult(run_dir=run_dir, runs=(), finished=False)
    for seed in seeds:
        of_seed = replace(config, seed=seed, split_seed=split_seed, run_dir=str(run_dir / f"seed-{seed}"))
        ended = finished_run(of_seed)
        if ended is None:
            log.info("seed %d, %d of %d", seed, len(result.runs) + 1, len(seeds))
            if not train(of_seed).finished:
                return result
            ended = finished_run(of_seed)
            assert ended is not None
        trained = config_from_yaml(run_dir / f"seed-{seed}" / "config.yaml")  # what is automatic is found once, for all
        config = replace(config, batch_size=trained.batch_size, precision=trained.precision)
        runs = (*result.runs, _seed_run(seed, ended))
        result = SeedsResult(run_dir=run_dir, runs=runs, finished=len(runs) == len(seeds))
        write_atomic(run_dir / "seeds.json", json.dumps(result.to_dict(), indent=2))
        write_atomic(run_dir / "table.md", _markdown(result))
    return result


def _seed_run(seed: int, ended: dict[str, Any]) -> SeedRun:
    evaluation = ended["evaluation"]
    test_top1 = evaluation["top1"] if evaluation["split"] == "test" else None
    return SeedRun(seed=seed, val_top1=ended["val_top1"], test_top1=test_top1, minutes=ended["minutes"])


def _markdown(result: SeedsResult) -> str:
    rule = tuple("---:" for _ in HEADINGS)
    return "".join(f"| {' | '.join(row)} |\n" for row in (HEADINGS, rule, *result.rows()))


def _mean_and_std(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return "–"
    mean, std = found
    return _percent(mean) if std is None else f"{100 * mean:.2f} ± {100 * std:.2f} %"


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.2f} %"
