"""One step of training and one of validation, as a LightningModule."""

import logging
import math
import time
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from sequencer2d.data.loaders import Batch, seed_generators
from sequencer2d.data.mixing import BatchMixing
from sequencer2d.data.transforms import normalize
from sequencer2d.model import Sequencer2D
from sequencer2d.preprocessing import Preprocessing
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.distillation import Teacher
from sequencer2d.training.finetune import scale_by_layer
from sequencer2d.training.muon import Muon, muon_groups
from sequencer2d.training.progressive import resized, size_in
from sequencer2d.training.schedule import Clock, learning_rate

log = logging.getLogger("sequencer2d")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do. Checkpoints up to here are whole."""


class SequencerTask(pl.LightningModule):
    """Trains `model` by a resolved config and validates its averaged weights where the config asks for them.

    All randomness of a step is seeded by (seed, step), so a continued run draws what the uninterrupted one would.
    """

    def __init__(
        self,
        model: Sequencer2D,
        config: TrainConfig,
        preprocessing: Preprocessing,
        batches_per_epoch: int,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.preprocessing = preprocessing
        self.batches_per_epoch = batches_per_epoch
        self.teacher = teacher
        self.stride = math.prod(model.config.patch_sizes)
        self.mixing = BatchMixing(config.augment, model.config.num_classes)
        self.ema = ModelEmaV3(model, config.optim.ema_decay, use_warmup=True) if config.optim.ema_decay else None
        if self.ema:
            self.ema.requires_grad_(False)
        self.total_epochs = config.epochs + config.optim.cooldown_epochs
        updates_per_epoch = math.ceil(batches_per_epoch / config.accumulate)
        self.clock = Clock(round(self.total_epochs * updates_per_epoch), config.max_minutes)
        self.val_accuracy = MulticlassAccuracy(model.config.num_classes, average="micro")
        self.val_loss = MeanMetric()
        self.skipped: dict[str, None] = {}
        """Unreadable images met so far, once each, in the order of their appearance."""
        self.epochs_done = 0.0

    @property
    def evaluated_model(self) -> Sequencer2D:
        """The weights that count: the averaged ones where there are such."""
        return self.ema.module if self.ema else self.model  # type: ignore[return-value]

    @property
    def schedule_epoch(self) -> int:
        """Whole epochs done; where a budget of time ends the run sooner, as many as its schedule is through."""
        return math.floor(self.clock.progress(self.global_step) * self.total_epochs + 1e-6)

    @property
    def images_per_s(self) -> float:
        """Training images per second since the epoch began, loading included."""
        return self.images_seen / (time.monotonic() - self.epoch_started)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Norms and biases are not decayed. The learning rate is set before every update."""
        optim, undecayed = self.config.optim, self.model.no_weight_decay()
        if optim.optimizer == "muon":
            groups = muon_groups(self.model, optim.weight_decay, undecayed)
            groups = scale_by_layer(groups, self.model, self.config.finetune.layer_decay)
            dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else torch.float32
            return Muon(groups, optim.learning_rate or 0.0, momentum=optim.momentum, betas=optim.betas, dtype=dtype)
        groups = param_groups_weight_decay(self.model, optim.weight_decay, no_weight_decay_list=undecayed)
        groups = scale_by_layer(groups, self.model, self.config.finetune.layer_decay)
        fused = self.trainer.precision != "16-mixed"  # fused, it unscales fp16 gradients only after the clipping
        return torch.optim.AdamW(groups, lr=optim.learning_rate or 0.0, betas=optim.betas, fused=fused)

    def configure_gradient_clipping(self, optimizer: Any, *arguments: Any, **options: Any) -> None:
        """Clips the norm over all parameters. (Lightning's own refuses fused optimisers in mixed precision.)"""
        if self.config.optim.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad_norm)

    def on_fit_start(self) -> None:
        if self.teacher:
            self.teacher.model.to(self.device)

    def on_train_start(self) -> None:
        self.clock.start()
        self.on_train_epoch_start()  # Lightning leaves it out when a run continues inside an epoch

    def on_train_epoch_start(self) -> None:
        self.images_seen = 0
        self.epoch_started = time.monotonic()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        step_seed = np.random.SeedSequence([self.config.seed, self.current_epoch, batch_idx])
        seed_generators(int(step_seed.generate_state(1)[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        self.note_skipped(batch)
        if not len(batch.images):
            return None
        epoch = self.schedule_epoch
        images = normalize(batch.images, self.preprocessing)
        images = resized(images, size_in(epoch, self.config.progressive, self.preprocessing.image_size, self.stride))
        mix = epoch < self.total_epochs - self.config.augment.mixing_off_epochs
        images, targets = self.mixing(images, batch.labels, mix=mix)
        logits = self.model(images).float()
        loss = F.cross_entropy(logits, targets)
        if self.teacher:
            loss = self.teacher.blend(loss, logits, images, self.preprocessing)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss.item()} at update {self.global_step}; "
                f"lower --optim.learning-rate (now {self.optimizers().param_groups[-1]['lr']:.2g}), "  # type: ignore
                "set --optim.clip-grad-norm 1, or try --precision fp32"
            )
        self.images_seen += len(images)
        self.log("train_loss", loss.detach())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        progress = self.clock.progress(self.global_step)
        rate = learning_rate(progress * self.total_epochs, self.config.epochs, self.config.optim)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.log("learning_rate", rate)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Updates the weights and their average; before any callback saves a checkpoint of this step."""
        super().optimizer_step(*arguments, **options)
        if self.ema:
            self.ema.update(self.model, self.global_step + 1)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.epochs_done = self.current_epoch + (batch_idx + 1) / self.batches_per_epoch
        self.log("images_per_s", self.images_per_s)
        self.log_position()
        if self.config.max_minutes is not None and self.clock.progress(self.global_step) >= 1:
            self.trainer.should_stop = True

    def ends_update(self, batch_idx: int) -> bool:
        """Whether the weights change after this batch, rather than its gradients being kept for the next."""
        return (batch_idx + 1) % self.config.accumulate == 0 or batch_idx + 1 == self.batches_per_epoch

    def on_validation_epoch_start(self) -> None:
        self.validation_started = time.monotonic()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.note_skipped(batch)
        if not len(batch.images):
            return
        logits = self.evaluated_model(normalize(batch.images, self.preprocessing)).float()
        self.val_loss.update(F.cross_entropy(logits, batch.labels), weight=len(logits))
        self.val_accuracy.update(logits, batch.labels)
        self.log("val_loss", self.val_loss, on_epoch=True)
        self.log("valid_acc", self.val_accuracy, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self.clock.reserve_s = time.monotonic() - self.validation_started
        self.log_position()

    def log_position(self) -> None:
        """Where in the run a row of metrics stands."""
        self.log("epoch", self.epochs_done)
        self.log("elapsed_s", self.clock.elapsed_s)

    def note_skipped(self, batch: Batch) -> None:
        """Remembers the images that could not be read, and tells of each once."""
        for message in batch.skipped:
            if message not in self.skipped:
                log.warning("skipped %s", message)
            self.skipped[message] = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sequencer2d"] = {
            "config": self.config.to_dict(),
            "elapsed_s": self.clock.elapsed_s,
            "reserve_s": self.clock.reserve_s,
            "skipped": list(self.skipped),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["sequencer2d"]
        self.clock.before_s = saved["elapsed_s"]
        self.clock.reserve_s = saved["reserve_s"]
        self.skipped.update(dict.fromkeys(saved["skipped"]))
