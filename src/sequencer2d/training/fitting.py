"""The training itself, by Lightning's trainer: from the beginning or a checkpoint, to the end or a wish to stop."""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments import LightningEnvironment
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy

from sequencer2d.data.augment import SMALL_IMAGE_SIZE
from sequencer2d.data.catalog import ImageSet
from sequencer2d.data.loaders import CachedImages, ImageLoader, TrainLoader, eval_loader
from sequencer2d.data.shards import ShardImages
from sequencer2d.data.transforms import EvalTransform, TrainTransform
from sequencer2d.inference import best_device
from sequencer2d.model import Sequencer2D
from sequencer2d.peers import Classifier
from sequencer2d.training.callbacks import (
    Checkpoints,
    JsonLinesLogger,
    StopRequested,
    TrainingProgress,
    keep_signals,
    stop_signals_to,
)
from sequencer2d.training.checkpoints import CheckpointFolder, updates_of
from sequencer2d.training.compilation import compile_regions
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.distillation import Teacher
from sequencer2d.training.early_stopping import StopWithoutImprovement
from sequencer2d.training.loggers import close_loggers, make_loggers
from sequencer2d.training.machine import Precision
from sequencer2d.training.models import prepare
from sequencer2d.training.open_run import OpenRun
from sequencer2d.training.ranks import Ranks, share_batch_norms
from sequencer2d.training.sharding import ShardedStrategy, is_to_shard, whole_model
from sequencer2d.training.task import LIGHTNING_PRECISION, SequencerTask

log = logging.getLogger("sequencer2d")


def fit(
    run: OpenRun, model: Classifier, teacher: Teacher | None, precision: Precision, checkpoint: Path | None
) -> tuple[SequencerTask, bool]:
    """Trains to the end, or until asked to stop, from the beginning or a checkpoint."""
    config, ranks = run.config, run.ranks
    val_images = run.images("val")
    train_loader, val_loader = _loaders(run, val_images)
    if ranks.world_size > 1:
        share_batch_norms(model)
    prepare(model, config)
    task = SequencerTask(
        model,
        config,
        config.preprocessing,
        len(train_loader),
        teacher,
        num_val=len(val_images),
        ranks=ranks,
        faults=run.run_dir / "faults",
    )
    if config.compile:
        assert isinstance(model, Sequencer2D)
        log.info("compile: %d modules, at the first batch", compile_regions(model, stem=ranks.world_size == 1))

    def save_best(task: SequencerTask, metrics: dict[str, float]) -> None:
        best = whole_model(task.evaluated_model)
        if not ranks.is_first:
            return
        run.save_weights(best, task, metrics, which="best", name="model.safetensors")

    metrics_file = JsonLinesLogger(run.run_dir / "metrics.jsonl")
    if ranks.is_first:
        metrics_file.forget_after(updates_of(checkpoint) if checkpoint else 0)
    if checkpoint:
        log.info("continuing %s after %d updates", run.run_dir, updates_of(checkpoint))
    folder = CheckpointFolder(run.run_dir / "checkpoints", config.keep_checkpoints)
    loggers = make_loggers(config.loggers, run.run_dir, config.to_dict(), continued=checkpoint is not None)
    tensorboard = TensorBoardLogger(run.run_dir, name="", version="tensorboard")
    patience = [StopWithoutImprovement(config.early_stopping)] if config.early_stopping else []
    checkpoints = Checkpoints(folder, metrics_file, minutes=config.checkpoint_minutes, ranks=ranks, save_best=save_best)
    with warnings.catch_warnings(), stop_signals_to(checkpoints.request):
        _ignore_lightning_advice()
        callbacks = [*([TrainingProgress()] if ranks.is_first else []), *patience, checkpoints]
        trainer = _trainer(run, task, precision, folder, callbacks, [metrics_file, tensorboard, *loggers])
        keep_signals(trainer)
        try:
            trainer.fit(
                task,
                train_loader,
                val_loader,
                ckpt_path=str(checkpoint) if checkpoint else None,
                weights_only=True,
            )
        except StopRequested:
            return task, True
        except SystemExit as error:  # Lightning's answer to the second Ctrl-C
            raise KeyboardInterrupt from error
        finally:
            close_loggers(loggers)
    task.put_together()
    return task, ranks.highest(int(checkpoints.requested)) == 1


def _trainer(
    run: OpenRun,
    task: SequencerTask,
    precision: Precision,
    folder: CheckpointFolder,
    callbacks: list[pl.Callback],
    loggers: list[Logger],
) -> pl.Trainer:
    """Lightning's, for this many updates; what it would print, keep or look for by itself is ours or off."""
    config, ranks = run.config, run.ranks
    return pl.Trainer(
        accelerator=best_device().type,
        devices=ranks.local_world_size,
        num_nodes=ranks.num_nodes,
        strategy=_strategy(config, ranks),
        use_distributed_sampler=False,
        inference_mode=not task.sharded,  # what is gathered in it could not be trained with
        precision=LIGHTNING_PRECISION[precision],
        max_epochs=-1,
        max_steps=task.clock.total_updates,
        accumulate_grad_batches=config.accumulate,
        num_sanity_val_steps=0,
        log_every_n_steps=min(config.log_every, task.batches_per_epoch),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=loggers,
        plugins=[folder, ranks.environment or LightningEnvironment()],  # which would else look for one itself
        callbacks=callbacks,
    )


def _loaders(run: OpenRun, val_images: ImageSet) -> tuple[TrainLoader, ImageLoader]:
    """Of training and validation images. Small ones are kept in memory once they were read."""
    config, ranks = run.config, run.ranks
    small = config.preprocessing.image_size <= SMALL_IMAGE_SIZE
    workers = -(-(config.num_workers or 0) // ranks.local_world_size)
    cache_bytes = 2**31 // (max(1, workers) * ranks.local_world_size)  # each process comes to have its own
    train_images, val_images = (
        CachedImages(images, cache_bytes) if small and not isinstance(images, ShardImages) else images
        for images in (run.images("train"), val_images)
    )
    share: dict[str, Any] = {"num_workers": workers, "rank": ranks.rank, "world_size": ranks.world_size}
    train_loader = TrainLoader(
        train_images,
        TrainTransform(config.augment, config.preprocessing),
        batch_size=config.images_per_step,
        seed=config.seed,
        **share,
    )
    val_batch = -(-config.images_per_step // ranks.world_size)
    val_loader = eval_loader(val_images, EvalTransform(config.preprocessing), batch_size=val_batch, **share)
    return train_loader, val_loader


def _strategy(config: TrainConfig, ranks: Ranks) -> Any:
    if ranks.world_size == 1:
        return "auto"
    if is_to_shard(config, ranks):
        return ShardedStrategy()
    return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)  # batch norms are equal on all ranks


def _ignore_lightning_advice() -> None:
    """Lightning's hints on choices that are made on purpose here."""
    for message in (
        "The '.*_dataloader' does not have many workers",
        "Found .* module\\(s\\) in eval mode",  # the averaged weights
        "GPU available but not used",  # Apple's, on which nobody has tried it
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
        "`broadcast_buffers` is deprecated",  # what replaces it is in the newest torch only
        "It is recommended to use `self.log\\(.*sync_dist=True",  # of clocks, which the first rank tells
        "The ``compute`` method of metric .* was called before",  # no validation image could be read
    ):
        warnings.filterwarnings("ignore", message)
