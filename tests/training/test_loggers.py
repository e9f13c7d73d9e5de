"""Further loggers get the metrics of the run, are imported only when asked for, and go on where they were."""

import csv
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import Logger

from runs import rows, stop_at, tiny_run
from sequencer2d.cli import WRONG_INPUT, main
from sequencer2d.training import loggers
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.loggers import check_loggers
from sequencer2d.training.run import train


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return replace(tiny_run(tmp_path), epochs=2)


def test_csv_has_the_rows_of_metrics_jsonl(config: TrainConfig) -> None:
    run_dir = train(replace(config, loggers=("csv",))).run_dir
    with (run_dir / "csv" / "metrics.csv").open() as file:
        table = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    written = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert table == [{name: pytest.approx(value) for name, value in row.items()} for row in written]
    assert "hidden_sizes" in (run_dir / "csv" / "hparams.yaml").read_text()


def test_csv_of_a_continued_run_is_whole(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        train(replace(config, loggers=("csv",)))
    run_dir = train(replace(config, loggers=("csv",))).run_dir
    with (run_dir / "csv" / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [row["step"] for row in rows(run_dir)]


class Recorder(Logger):
    """Stands in for a logger whose package is not installed."""

    made: list["Recorder"] = []  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.settings: dict[str, Any] = {}
        self.metrics: list[dict[str, float]] = []
        self.run_id = options.get("run_id") or "new"
        self.finished = False
        Recorder.made.append(self)

    name = version = "recorder"  # type: ignore[assignment]

    @property
    def experiment(self) -> "Recorder":
        return self

    def finish(self) -> None:
        self.finished = True

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append(metrics)

    def log_hyperparams(self, params: dict[str, Any]) -> None:  # type: ignore[override]
        self.settings = params


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setattr(loggers, "WandbLogger", Recorder)
    monkeypatch.setattr(loggers, "MLFlowLogger", Recorder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(loggers, "TRACKING_URI", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///of/the/run/before.db")
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return Recorder


def test_others_get_the_settings_and_all_metrics(config: TrainConfig, recorder: type[Recorder]) -> None:
    run_dir = train(replace(config, loggers=("wandb", "mlflow"))).run_dir
    wandb, mlflow = recorder.made
    assert (wandb.options["project"], wandb.options["name"], wandb.options["save_dir"]) == (
        "sequencer2d", "run", run_dir,
    )  # fmt: skip
    assert (mlflow.options["experiment_name"], mlflow.options["run_name"]) == ("sequencer2d", "run")
    assert mlflow.options["tracking_uri"] == f"sqlite:///{run_dir}/mlflow.db"
    assert wandb.finished  # or the next run of this process would be written into it
    for logger in recorder.made:
        assert logger.settings["optim"]["learning_rate"] == 1e-2
        assert len(logger.metrics) == len(rows(run_dir))


def test_a_continued_run_goes_on_in_the_same_run_of_theirs(
    config: TrainConfig, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, loggers=("wandb", "mlflow"))
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        train(config)
    train(config)
    first, first_mlflow, second, second_mlflow = recorder.made
    assert first.options["id"] == second.options["id"]
    assert (first_mlflow.options["run_id"], second_mlflow.options["run_id"]) == (None, "new")


def test_a_package_that_is_not_there_is_one_line_before_anything_is_written(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"--loggers mlflow needs .*: pip install mlflow"):
        train(replace(config, loggers=("csv", "mlflow")))
    assert not Path(config.run_dir or "").exists()
    check_loggers(["csv"])
    assert main(["train", "--loggers", "[wandb]", "--run-dir", str(tmp_path / "x")]) == WRONG_INPUT
    message = "sequencer2d: --loggers wandb needs a package that is not installed: pip install wandb\n"
    assert capsys.readouterr().err == message


def test_nothing_is_imported_that_was_not_asked_for() -> None:
    program = (
        "import sys, sequencer2d.training.run, sequencer2d.training.seeds\n"
        "print([name for name in ('wandb', 'mlflow') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert answer.strip() == "[]"
