"""What happens around the steps: progress on screen, rows of metrics, checkpoints, a clean stop."""

import io
import json
import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from sequencer2d.files import write_atomic
from sequencer2d.training.task import SequencerTask, TrainingError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written so that a crash leaves the old file or the new one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomic(Path(path), buffer.getvalue())


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
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The resolved config is saved by itself."""

    def forget_after(self, step: int) -> None:
        """Drops the rows of steps that a continued run takes again."""
        if self.path.exists():
            rows = [line for line in self.path.read_text().splitlines() if json.loads(line)["step"] <= step]
            write_atomic(self.path, "".join(f"{row}\n" for row in rows))


def _json_number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


class KeepBest(pl.Callback):
    """After every validation: a checkpoint to go on from, and the model file if it is the best so far."""

    def __init__(self, checkpoint: Path, save_best: Callable[[SequencerTask, dict[str, float]], None]) -> None:
        self.checkpoint = checkpoint
        self.save_best = save_best
        self.best = -1.0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, SequencerTask)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if "valid_acc" not in metrics:
            raise TrainingError("not one validation image could be read; see the skipped ones above")
        if metrics["valid_acc"] > self.best:
            self.best = metrics["valid_acc"]
            self.save_best(pl_module, {**metrics, "updates": trainer.global_step})
        trainer.save_checkpoint(self.checkpoint)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


class StopRequested(Exception):
    """Training was asked to stop and left a checkpoint to go on from."""


class StopOnSignal(pl.Callback):
    """Ctrl-C or SIGTERM: finish the update, write a checkpoint, stop. A second Ctrl-C stops at once."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.requested = False
        self.saved = False
        self.previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Only now: Lightning's own handler of SIGTERM, set before, would leave at once without a checkpoint.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self.request)

    def request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.requested and pl_module.ends_update(batch_idx):  # gradients are in no checkpoint
            trainer.save_checkpoint(self.checkpoint)
            self.saved = True

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.saved:  # only now are the metrics of the last step written
            raise StopRequested

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous.clear()


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

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.bar.stop()
