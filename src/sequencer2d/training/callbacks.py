"""What happens around the steps: progress on screen, rows of metrics, checkpoints, a clean stop."""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from sequencer2d.data.loaders import STOP_SIGNALS
from sequencer2d.files import write_atomic
from sequencer2d.training.checkpoints import CheckpointFolder
from sequencer2d.training.faults import TrainingError
from sequencer2d.training.ranks import Ranks
from sequencer2d.training.task import SequencerTask


class JsonLinesLogger(Logger):
    """Appends a row of metrics per call to `metrics.jsonl`, in the order of the steps."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> int:
        return 0

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, **{name: _json_number(value) for name, value in metrics.items()}}
        with self._file() as file:
            file.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """Has the rows so far on the disk itself, where they outlast a loss of power."""
        with self._file() as file:
            os.fsync(file.fileno())

    @contextmanager
    def _file(self) -> Iterator[TextIO]:
        try:
            with self.path.open("a") as file:
                yield file
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The resolved config is saved by itself."""

    def forget_after(self, updates: int) -> None:
        """Drops the rows of updates that a continued run makes again, and what a crash left of the last row."""
        if self.path.exists():
            rows = [row for row in self.path.read_text(errors="replace").splitlines() if _step_of(row) < updates]
            write_atomic(self.path, "".join(f"{row}\n" for row in rows))


def _step_of(row: str) -> float:
    try:
        return json.loads(row)["step"]
    except ValueError:
        return math.inf


def _json_number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


class StopRequested(BaseException):
    """A run was asked to stop, and can go on. Like `KeyboardInterrupt`, it is no error that a part could make good."""


class Checkpoints(pl.Callback):
    """Keeps the best model file, writes checkpoints to go on from, and stops cleanly when asked to.

    Checkpoints are written after every validation, every so many minutes in between, and on Ctrl-C, SIGTERM or SIGUSR1
    (Slurm's, ahead of the end of the job), as soon as the update is finished. A second Ctrl-C stops at once. Asked to
    before the first update, training stops without one. What `metrics.jsonl` has of the updates up to a checkpoint is
    on disk before it.

    Args:
        folder: Of the checkpoints.
        metrics: The rows that belong to them.
        minutes: Between two of them.
        ranks: All of them write and stop at the same update.
        save_best: Called after a validation that is the best so far, with its metrics.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        metrics: JsonLinesLogger,
        *,
        minutes: float,
        ranks: Ranks,
        save_best: Callable[[SequencerTask, dict[str, float]], None],
    ) -> None:
        self.folder = folder
        self.metrics = metrics
        self.minutes = minutes
        self.ranks = ranks
        self.save_best = save_best
        self.best = -1.0
        self.requested = False
        self.stopping = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.last_save = time.monotonic()
        self.stopping = self.ranks.highest(int(self.requested)) == 1

    def request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not pl_module.ends_update(batch_idx):  # gradients are in no checkpoint
            return
        due = time.monotonic() - self.last_save >= 60 * self.minutes
        wish = self.ranks.highest(2 if self.requested else 1 if due else 0)
        self.stopping = wish == 2
        ends_epoch = batch_idx + 1 == pl_module.batches_per_epoch
        if wish and not ends_epoch:  # at the end, validation comes first: a continued run would not repeat it
            self.save(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.publish()  # only now are the metrics of the last step written
        if self.stopping:
            raise StopRequested

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, SequencerTask)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if math.isnan(metrics["val_loss"]):
            raise TrainingError("not one validation image could be read; see the skipped ones above")
        if metrics["valid_acc"] > self.best:
            self.best = metrics["valid_acc"]
            self.save_best(pl_module, metrics)
        self.save(trainer)
        self.publish()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        with suppress(OSError):  # the error that ends the run is the one to tell
            self.publish()

    def save(self, trainer: pl.Trainer) -> None:
        """Makes a checkpoint, which is written by `publish`."""
        trainer.save_checkpoint(self.folder.path(trainer.global_step))
        self.last_save = time.monotonic()

    def publish(self) -> None:
        if self.folder.pending:
            self.metrics.sync()
            self.folder.publish()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """What a stop signal does to a run that is set up, or evaluated at its end: no update is to be finished."""
    raise KeyboardInterrupt if number == signal.SIGINT else StopRequested


@contextmanager
def stop_signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Has the stop signals handled so meanwhile; only the main thread may, and others leave them as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def keep_signals(trainer: pl.Trainer) -> None:
    """Keeps Lightning from handling SIGTERM: it would end the training at once, without a checkpoint or a word.

    Lightning has no option for it; this is its own method that takes the signals over.
    """
    connector = trainer._signal_connector
    assert callable(connector.register_signal_handlers)
    connector.register_signal_handlers = lambda: None


class TrainingProgress(pl.Callback):
    """One bar over the whole run, with the time that is left; without a terminal, one line per validation."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        ]
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.accuracy = ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar.start()
        self.row = self.bar.add_task("training", total=1.0, numbers="")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        metrics = trainer.callback_metrics
        if "train_loss" in metrics:
            numbers = f"loss {metrics['train_loss']:.3f} {self.accuracy}{pl_module.images_per_s:,.0f} images/s"
            self.bar.update(
                self.row,
                completed=pl_module.clock.progress(trainer.global_step),
                description=f"epoch {trainer.current_epoch + 1}",
                numbers=numbers,
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        metrics = trainer.callback_metrics
        if trainer.sanity_checking or "valid_acc" not in metrics:
            return
        self.accuracy = f"val {metrics['valid_acc']:.1%} "
        if not self.console.is_terminal:
            self.console.print(
                f"epoch {trainer.current_epoch + 1}: train_loss {metrics.get('train_loss', math.nan):.4f} "
                f"val_loss {metrics['val_loss']:.4f} valid_acc {metrics['valid_acc']:.4f} "
                f"{metrics['images_per_s']:,.0f} images/s, {pl_module.clock.elapsed_s:,.0f} s",
                soft_wrap=True,
                highlight=False,
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.bar.stop()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.bar.stop()
