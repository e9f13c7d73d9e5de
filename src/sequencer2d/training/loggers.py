"""Further records of a run's metrics, by Lightning's loggers; Weights & Biases and MLflow are imported if asked for."""

import importlib.util
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from sequencer2d.files import write_atomic

PROJECT = "sequencer2d"
"""Where Weights & Biases and MLflow put the runs, unless `WANDB_PROJECT` or `MLFLOW_EXPERIMENT_NAME` says otherwise."""
TRACKING_URI = os.environ.get("MLFLOW_TRACKING_URI")
"""As it was at first: MLflow sets it to what a run uses, which the next run of this process must not take over."""
_IDS = "loggers.json"


def check_loggers(names: Iterable[str]) -> None:
    """Raises ImportError if one of them needs a package that is not installed, saying how to get it."""
    for name in names:
        if name != "csv" and importlib.util.find_spec(name) is None:
            raise ImportError(f"--loggers {name} needs a package that is not installed: pip install {name}")


def make_loggers(names: Iterable[str], run_dir: Path, settings: dict[str, Any], *, continued: bool) -> list[Logger]:
    """The loggers of a run, in its first process. A run that goes on is the same run of W&B and MLflow, too.

    Both keep their files in the run folder unless their own environment variables (`WANDB_MODE`, `MLFLOW_TRACKING_URI`)
    name a server; Weights & Biases without a login wants `WANDB_MODE=offline`.

    Args:
        names: csv, wandb, mlflow.
        run_dir: Has the `metrics.jsonl` that a continued run starts from.
        settings: The resolved config, to be recorded with the metrics.
        continued: Whether the run goes on after a stop.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return []
    make = {"csv": _csv, "wandb": _wandb, "mlflow": _mlflow}
    ids = run_dir / _IDS
    known = json.loads(ids.read_text()) if continued and ids.exists() else {}
    loggers = []
    for name in dict.fromkeys(names):
        logger, run_id = make[name](run_dir, known.get(name))
        known |= {name: run_id} if run_id else {}
        logger.log_hyperparams(settings)
        loggers.append(logger)
    if known:
        write_atomic(ids, json.dumps(known))
    return loggers


def close_loggers(loggers: Iterable[Logger]) -> None:
    """Ends what Lightning leaves open: the next run of this process would write into this one's at W&B."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def _csv(run_dir: Path, run_id: str | None) -> tuple[Logger, None]:
    """`csv/metrics.csv`, made anew from `metrics.jsonl`: Lightning's would lose what it wrote before a stop."""
    for old in (run_dir / "csv").glob("*"):
        old.unlink()
    logger = CSVLogger(run_dir, name="", version="csv")
    file = run_dir / "metrics.jsonl"
    for line in file.read_text().splitlines() if file.exists() else ():
        row = json.loads(line)
        logger.log_metrics(row, row.pop("step"))
    return logger, None


def _wandb(run_dir: Path, run_id: str | None) -> tuple[Logger, str]:
    run_id = run_id or uuid.uuid4().hex[:8]
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    return WandbLogger(name=run_dir.name, save_dir=run_dir, project=project, id=run_id), run_id


def _mlflow(run_dir: Path, run_id: str | None) -> tuple[Logger, str]:
    logger = MLFlowLogger(
        experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
        run_name=run_dir.name,
        tracking_uri=TRACKING_URI or f"sqlite:///{run_dir.resolve() / 'mlflow.db'}",
        run_id=run_id,
    )
    assert logger.run_id is not None
    return logger, logger.run_id
