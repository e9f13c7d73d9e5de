"""One step of training and one of validation, as a LightningModule."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from sequencer2d.data.loaders import Batch
from sequencer2d.data.mixing import BatchMixing, seed_generators
from sequencer2d.data.transforms import normalize
from sequencer2d.peers import Classifier, Peer
from sequencer2d.preprocessing import Preprocessing
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.distillation import Teacher
from sequencer2d.training.faults import TrainingError, keep_fault
from sequencer2d.training.finetune import scale_by_layer
from sequencer2d.training.machine import Precision, fuses_adamw
from sequencer2d.training.muon import Muon, muon_groups
from sequencer2d.training.progressive import resized, size_in
from sequencer2d.training.ranks import Ranks, count_batch
from sequencer2d.training.schedule import Clock, learning_rate
from sequencer2d.training.sharding import is_to_shard, whole_model, whole_tensor

log = logging.getLogger("sequencer2d")

LIGHTNING_PRECISION: dict[Precision, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
"""Lightning's names of our precisions."""
_PRECISION: dict[str, Precision] = {name: precision for precision, name in LIGHTNING_PRECISION.items()}


class SequencerTask(pl.LightningModule):
    """Trains `model` by a resolved config and validates its averaged weights where the config asks for them.

    All randomness of a step is seeded by (seed, step), so a continued run draws what the uninterrupted one would. Ranks
    draw the same augmentation for an image as one process would; dropout and stochastic depth differ with their number.

    Args:
        model: To train.
        config: Resolved.
        preprocessing: Of the images.
        batches_per_epoch: Length of the training loader.
        num_val: How many validation images there are, by which the time for them is estimated until it is measured.
        ranks: The processes that train together.
        faults: Folder for what led to a loss or gradient that is no number.
    """

    def __init__(
        self,
        model: Classifier,
        config: TrainConfig,
        preprocessing: Preprocessing,
        batches_per_epoch: int,
        teacher: Teacher | None = None,
        *,
        num_val: int = 0,
        ranks: Ranks = Ranks(),  # noqa: B008 - frozen
        faults: Path | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.preprocessing = preprocessing
        self.batches_per_epoch = batches_per_epoch
        self.teacher = teacher
        self.num_val = num_val
        self.ranks = ranks
        self.faults = faults
        self.sharded = is_to_shard(config, ranks)
        self.stride = model.stride if isinstance(model, Peer) else math.prod(model.config.patch_sizes)
        self.mixing = BatchMixing(config.augment, model.config.num_classes)
        ema_decay, ema_warmup = config.optim.ema_decay, config.optim.ema_warmup
        # `foreach` takes no mixture of divided weights and whole buffers
        self.ema = ModelEmaV3(model, ema_decay, use_warmup=ema_warmup, foreach=not self.sharded) if ema_decay else None
        if self.ema:
            self.ema.requires_grad_(False)
        self.total_epochs = config.epochs + config.optim.cooldown_epochs
        updates_per_epoch = math.ceil(batches_per_epoch / config.accumulate)
        self.clock = Clock(round(self.total_epochs * updates_per_epoch), config.max_minutes)
        self.val_accuracy = MulticlassAccuracy(model.config.num_classes, average="micro")
        self.val_loss = MeanMetric()
        self.skipped: dict[str, None] = {}
        """Unreadable images met so far, once each, as they appeared; other ranks' once they are shared."""
        self.nonfinite_updates = 0
        """Skipped so far."""
        self.batches: list[Batch] = []
        """Of the update that is under way."""
        self.seeds: list[tuple[int, ...]] = []
        """Of these batches."""
        self.buffers_before: list[Tensor] = []
        """What the model's buffers (statistics of batch norms) were before that update's first batch."""
        self.images_seen = 0
        self.epochs_done = 0.0
        self.validated = False
        """Whether the clock's reserve for the last validation is as one has taken."""
        self.timed_progress = 0.0
        """Of a run with a budget of time, at the last change of the weights."""

    @property
    def evaluated_model(self) -> Classifier:
        """The weights that count: the averaged ones where there are such."""
        return self.ema.module if self.ema else self.model  # type: ignore[return-value]

    @property
    def schedule_epoch(self) -> int:
        """Whole epochs done; where a budget of time ends the run sooner, as many as its schedule is through."""
        return math.floor(self.progress * self.total_epochs + 1e-6)

    @property
    def progress(self) -> float:
        """Fraction of the run that is done, by updates or by the clock at the last of them."""
        return max(min(self.global_step / self.clock.total_updates, 1.0), self.timed_progress)

    @property
    def images_per_s(self) -> float:
        """Training images per second of all ranks since the epoch began, loading included."""
        return self.images_seen / (time.monotonic() - self.epoch_started)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(_PRECISION[str(self.trainer.precision)])

    def make_optimizer(self, precision: Precision) -> torch.optim.Optimizer:
        """Norms and biases are not decayed. The learning rate is set before every update."""
        optim, undecayed = self.config.optim, self.model.no_weight_decay()
        if optim.optimizer == "muon":
            groups = muon_groups(self.model, optim.weight_decay, undecayed, keep_norms=optim.keep_norms)
            groups = scale_by_layer(groups, self.model, self.config.finetune.layer_decay)
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            return Muon(groups, optim.learning_rate or 0.0, momentum=optim.momentum, betas=optim.betas, dtype=dtype)
        groups = param_groups_weight_decay(self.model, optim.weight_decay, no_weight_decay_list=undecayed)
        groups = scale_by_layer(groups, self.model, self.config.finetune.layer_decay)
        fused = fuses_adamw(precision)
        return torch.optim.AdamW(groups, lr=optim.learning_rate or 0.0, betas=optim.betas, fused=fused)

    def configure_gradient_clipping(self, optimizer: Any, *arguments: Any, **options: Any) -> None:
        """Clips the norm over all parameters, and sees to gradients that are no numbers.

        (Lightning's own clipping refuses fused optimisers in mixed precision.)
        """
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        limit = self.config.optim.clip_grad_norm
        scaled = self.trainer.precision == "16-mixed"  # there the loss scaler skips such updates by itself
        if scaled and limit is None:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = whole_tensor(torch.nn.utils.get_total_norm(gradients))
        if not scaled and not torch.isfinite(norm):
            self.on_nonfinite(optimizer, norm.item())
        elif limit is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)

    def on_nonfinite(self, optimizer: torch.optim.Optimizer, gradient_norm: float) -> None:
        """Skips the update, or ends the run with a diagnosis. What led to it is kept in a file."""
        self.restore_buffers()
        rate = optimizer.param_groups[0]["lr"]
        loss = float(self.trainer.callback_metrics.get("train_loss", math.nan))
        where = f"update {self.global_step}: loss {loss:.4g}, norm of the gradient {gradient_norm:.4g}"
        if self.faults:
            facts = {
                "updates": self.global_step,
                "epoch": self.current_epoch,
                "rank": self.ranks.rank,
                "world_size": self.ranks.world_size,
                "learning_rate": rate,
                "gradient_norm": str(gradient_norm),
                "loss": str(loss),
                "precision": str(self.trainer.precision),
                "seeds": self.seeds,
                "schedule_epoch": self.schedule_epoch,
                "num_classes": self.model.config.num_classes,
                "batches_per_epoch": self.batches_per_epoch,
            }
            model = whole_model(self.model)
            where += f", kept in {keep_fault(self.faults, model=model, batches=self.batches, facts=facts)}"
        if self.nonfinite_updates >= self.config.skip_nonfinite:
            raise TrainingError(
                f"numbers ran out of range at {where}; lower --optim.learning-rate (now {rate:.2g}), set "
                "--optim.clip-grad-norm 1 or try --precision fp32 in another --run-dir, or let this run go on and skip "
                "some such updates by --skip-nonfinite 10"
            )
        self.nonfinite_updates += 1
        log.warning("skipped %s", where)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Leaves an optimiser nothing to do."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def keep_buffers(self) -> None:
        """Notes the statistics of batch norms, which every pass over a batch changes."""
        self.buffers_before = [buffer.clone() for buffer in self.model.buffers()]

    def restore_buffers(self) -> None:
        """Puts back what the batches of an update that is skipped have made of them: it may be NaN for ever."""
        for buffer, before in zip(self.model.buffers(), self.buffers_before, strict=True):
            buffer.copy_(before)

    def on_fit_start(self) -> None:
        if self.teacher:
            self.teacher.model.to(self.device)

    def on_train_start(self) -> None:
        self.clock.start()
        self.compare_clocks()
        self.on_train_epoch_start()  # Lightning leaves it out when a run continues inside an epoch

    def compare_clocks(self) -> None:
        """Each rank has a clock of its own; the fastest one counts. Once per update, since all wait for each other."""
        if self.config.max_minutes is not None:
            # Half of the time: by then what only the first batches take is a small part. Without gradients it is less.
            if not self.validated and self.images_seen and self.clock.elapsed_s > 30 * self.config.max_minutes:
                self.clock.reserve_s = self.num_val / self.images_per_s
            self.timed_progress = self.ranks.highest(self.clock.progress(self.global_step))

    def on_train_epoch_start(self) -> None:
        self.images_seen = 0
        self.epoch_started = time.monotonic()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.note_skipped(batch.skipped)
        num_images = self.ranks.total(len(batch.images))
        if not num_images:
            return zero_loss(self.model)  # the ranks exchange the gradients of this update's other batches all the same
        share = len(batch.images) * self.ranks.world_size / num_images  # the ranks' losses are then averaged
        count_batch(self.model, bool(len(batch.images)))
        if not len(batch.images):
            batch = blank(self.preprocessing, batch)
        seed, epoch = (self.config.seed, self.current_epoch, batch_idx), self.schedule_epoch
        if not self.batches:
            self.keep_buffers()
        self.batches.append(batch)
        self.seeds.append(seed)
        loss = self.loss(batch, seed, epoch)
        if share != 1:
            loss = loss * share
        if not torch.isfinite(loss):  # so that the gradients of all ranks tell it
            loss = loss * math.nan
        self.images_seen += num_images
        self.log("train_loss", loss.detach(), sync_dist=self.ranks.world_size > 1)
        return loss * (self.config.accumulate / self.steps_of_update(batch_idx))  # Lightning divides by `accumulate`

    def loss(self, batch: Batch, seed: tuple[int, ...], epoch: int) -> Tensor:
        """The mean loss of a batch's images, mixed and erased by the seed as in an epoch of the schedule."""
        seed_generators(*seed)
        images = normalize(batch.images, self.preprocessing)
        images = resized(images, size_in(epoch, self.config.progressive, self.preprocessing.image_size, self.stride))
        mix = epoch < self.total_epochs - self.config.augment.mixing_off_epochs
        images, targets = self.mixing(images, batch.labels, mix=mix)
        images = self.mixing.erase(images, [(*seed, index) for index in batch.indices.tolist()])
        seed_generators(*seed, self.ranks.rank)
        logits = self.model(images).float()
        loss = F.cross_entropy(logits, targets)
        return self.teacher.blend(loss, logits, images, self.preprocessing) if self.teacher else loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.compare_clocks()
        rate = learning_rate(self.progress * self.total_epochs, self.config.epochs, self.config.optim)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.log("learning_rate", rate)
        if not self.batches:  # not one image could be read: a gradient of 0 would still move the weights
            self.drop_gradients()

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Updates the weights and their average; before any callback saves a checkpoint of this step."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if scaler else 1.0
        super().optimizer_step(*arguments, **options)
        if scaler and scaler.get_scale() < scale:  # it tells by this alone that it has skipped the update
            self.restore_buffers()
        if self.ema:
            self.ema.update(self.model, self.global_step + 1 if self.config.optim.ema_warmup else None)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.ends_update(batch_idx):
            self.batches.clear()
            self.seeds.clear()
        self.epochs_done = self.current_epoch + (batch_idx + 1) / self.batches_per_epoch
        self.log("images_per_s", self.images_per_s)
        self.log_position()
        if self.progress >= 1:  # perhaps inside an epoch: a last validation comes after it
            self.trainer.should_stop = True

    def ends_update(self, batch_idx: int) -> bool:
        """Whether the weights change after this batch, rather than its gradients being kept for the next."""
        return (batch_idx + 1) % self.config.accumulate == 0 or batch_idx + 1 == self.batches_per_epoch

    def steps_of_update(self, batch_idx: int) -> int:
        """Batches whose mean gradient makes the update that this one is part of: fewer where an epoch ends early."""
        left_over = self.batches_per_epoch % self.config.accumulate
        return left_over if batch_idx >= self.batches_per_epoch - left_over else self.config.accumulate

    def on_validation_epoch_start(self) -> None:
        self.validation_started = time.monotonic()
        if self.sharded:
            own = int(self.trainer.num_val_batches[0])
            self.last_batch, self.missing_batches = own - 1, int(self.ranks.highest(own)) - own

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.note_skipped(batch.skipped)
        if len(batch.images):
            logits = self.evaluated_model(normalize(batch.images, self.preprocessing)).float()
            loss = F.cross_entropy(logits, batch.labels).nan_to_num(nan=math.inf)  # the mean would leave it out
            self.val_loss.update(loss, weight=len(logits))
            self.val_accuracy.update(logits, batch.labels)
        elif self.sharded:
            self.take_part(batch)
        if self.sharded and batch_idx == self.last_batch:  # the metrics are summed up before the end of the epoch
            for _ in range(self.missing_batches):
                self.take_part(batch)
        self.log("val_loss", self.val_loss, on_epoch=True)
        self.log("valid_acc", self.val_accuracy, on_epoch=True, prog_bar=True)

    def take_part(self, batch: Batch) -> None:
        """A pass over a blank image by a rank without images of its own: the others gather weights from it, too."""
        self.evaluated_model(normalize(blank(self.preprocessing, batch).images, self.preprocessing))

    def on_validation_epoch_end(self) -> None:
        self.clock.reserve_s = self.ranks.highest(time.monotonic() - self.validation_started)
        self.validated = True
        self.log_position()

    def put_together(self) -> None:
        """After the training: weights that the ranks have divided are whole on each again."""
        self.model = whole_model(self.model)
        if self.ema:
            self.ema.module = whole_model(self.evaluated_model)

    def log_position(self) -> None:
        """Where in the run a row of metrics stands."""
        self.log("epoch", self.epochs_done)
        self.log("elapsed_s", self.clock.elapsed_s)

    def note_skipped(self, messages: list[str]) -> None:
        """Remembers the images that could not be read, and tells of each once."""
        for message in messages:
            if message not in self.skipped:
                log.warning("skipped %s", message)
            self.skipped[message] = None

    def share_skipped(self) -> None:
        """Tells every rank of the images that others could not read."""
        for messages in self.ranks.gather(list(self.skipped)):
            self.note_skipped(messages)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.share_skipped()  # all ranks come here, after every validation and when they stop
        checkpoint["sequencer2d"] = {
            "config": self.config.to_dict(),
            "elapsed_s": self.clock.elapsed_s,
            "reserve_s": self.clock.reserve_s,
            "skipped": list(self.skipped),
            "nonfinite_updates": self.nonfinite_updates,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["sequencer2d"]
        self.clock.before_s = saved["elapsed_s"]
        self.clock.reserve_s = saved["reserve_s"]
        self.validated = saved["reserve_s"] > 0
        self.skipped.update(dict.fromkeys(saved["skipped"]))
        self.nonfinite_updates = saved["nonfinite_updates"]


def blank(preprocessing: Preprocessing, batch: Batch) -> Batch:
    """One black image for a rank that has none: it must take part in the exchange of gradients, with no weight."""
    side, zero = preprocessing.image_size, torch.zeros(1, dtype=torch.int64)
    return Batch(batch.images.new_zeros((1, side, side, 3)), zero, zero, batch.skipped)


def zero_loss(model: Classifier) -> Tensor:
    """A loss of 0 with a gradient of 0 for each weight that is trained, as an exchange of gradients expects it."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in parameters]
    return torch.stack([parameter.sum() for parameter in own]).sum() * 0
