"""The folder of a run: which one, for whom alone, and from where a run in it goes on."""

import itertools
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from sequencer2d.files import remove_unfinished
from sequencer2d.training.checkpoints import CheckpointError, go_back_to, is_whole, newest_checkpoint, updates_of
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.ranks import Ranks
from sequencer2d.training.recipes import config_from_yaml

MAY_CHANGE = {
    "run_dir", "resume", "num_workers", "log_every", "data_root", "loggers", "checkpoint_minutes", "keep_checkpoints",
    "strategy", "skip_nonfinite",
}  # fmt: skip
"""Fields that a continued run may have otherwise than the stopped one."""


def default_stem(data_name: str, model_name: str) -> str:
    """Where runs lie that are given no folder, before a number."""
    return f"runs/{data_name}-{model_name.replace('/', '-')}"


def choose_run_dir(config: TrainConfig, data_name: str) -> Path:
    """The folder asked for, a stopped run of the same config to continue, or a new name."""
    if config.run_dir is not None:
        run_dir = Path(config.run_dir)
        if run_dir.exists() and not run_dir.is_dir():
            raise ValueError(f"run_dir={run_dir} is a file; give a folder")
        if (run_dir / "config.yaml").exists() and not (run_dir / "result.json").exists():
            changed = changed_fields(load_run_config(run_dir), config)
            if config.resume == "never" or changed:
                why = f"of another config ({', '.join(changed)})" if changed else "and --resume is never"
                raise ValueError(f"{run_dir} holds an unfinished run {why}; give another --run-dir")
        return run_dir
    stem = default_stem(data_name, config.model)
    for run_dir in map(Path, numbered(stem)):
        if not run_dir.exists():
            return run_dir
        stopped = (run_dir / "config.yaml").exists() and not (run_dir / "result.json").exists()
        if config.resume == "auto" and stopped and not changed_fields(load_run_config(run_dir), config):
            with suppress(BlockingIOError), locked(run_dir, Ranks()):
                return run_dir
    raise AssertionError("names do not end")


def numbered(stem: str) -> Iterator[str]:
    """stem, stem-2, stem-3, …"""
    return itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))


@contextmanager
def locked(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Keeps other trainings out of a run folder. The system ends the lock with the process, however that dies."""
    lock = FileLock(run_dir / ".lock", blocking=False)

    def acquire() -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise BlockingIOError(
                f"{run_dir}: another process is training in it; wait for it, or give another --run-dir"
            ) from error
        remove_unfinished(run_dir)
        remove_unfinished(run_dir / "checkpoints")

    ranks.of_first(acquire)
    try:
        yield
    finally:
        lock.release()


def checkpoint_of(run_dir: Path, asked_for: Path | None) -> Path | None:
    """The checkpoint to go on from: the one that was asked for, or the newest that is whole."""
    if asked_for is None or asked_for.is_dir():
        return newest_checkpoint(run_dir / "checkpoints")
    updates_of(asked_for)
    if not is_whole(asked_for):
        raise CheckpointError(
            f"{asked_for} is damaged (its checksum is another); --resume {run_dir} takes the last whole one"
        )
    go_back_to(asked_for)
    return asked_for


def resume_path(resume: str) -> Path | None:
    """The folder or checkpoint given to --resume, if any was.

    Once the launcher has started the processes again, it is the run of that checkpoint, which has gone on from there.
    """
    if resume in ("auto", "never"):
        return None
    path, restarts = Path(resume), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return path.absolute().parent.parent if path.suffix == ".ckpt" and restarts else path


def run_of(path: Path) -> Path:
    """The run folder of a folder or checkpoint given to --resume."""
    run_dir = path.absolute().parent.parent if path.is_file() else path
    if not (run_dir / "config.yaml").is_file():
        raise FileNotFoundError(f"{path} is no run to resume: {run_dir / 'config.yaml'} is missing")
    return run_dir


def of_same_run(saved: TrainConfig, wish: TrainConfig, given: Collection[str] | None = None) -> TrainConfig:
    """The run's own config, with the fields of a wish that may change.

    Args:
        saved: The run's.
        wish: What it is to go on with.
        given: The fields that were asked for. Default: those that are not as by default.

    Raises:
        ValueError: Something else was asked for, too.
    """
    before, after, default = saved.to_dict(), wish.to_dict(), TrainConfig().to_dict()
    if given is None:
        given = [name for name in after if after[name] != default[name]]
    changes = {name for name in given if after[name] not in (before[name], "auto")} - {"resume", "run_dir"}
    if changes - MAY_CHANGE:
        raise ValueError(
            f"a run is resumed with its own config; leave out {', '.join(sorted(changes - MAY_CHANGE))}, "
            "or begin another run with --weights"
        )
    return replace(saved, **{name: getattr(wish, name) for name in changes})


def load_run_config(run_dir: Path) -> TrainConfig:
    return config_from_yaml(run_dir / "config.yaml")


def changed_fields(saved: TrainConfig, now: TrainConfig) -> list[str]:
    before, after = saved.to_dict(), now.to_dict()
    may_change = MAY_CHANGE | ({"precision"} if now.precision == "auto" else set())
    return [name for name in before if name not in may_change and before[name] != after[name]]
