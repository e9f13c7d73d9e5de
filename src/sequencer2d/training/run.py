"""A run from config to report: data, model, training, final evaluation, and the folder that holds it all."""

import itertools
import json
import logging
import warnings
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from lightning_fabric.plugins.environments import LightningEnvironment
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy

from sequencer2d.data.augment import SMALL_IMAGE_SIZE
from sequencer2d.data.catalog import FileImages, ImageData, ImageSet, is_same_data, load_data, split_names
from sequencer2d.data.loaders import CachedImages, TrainLoader, eval_loader
from sequencer2d.data.shards import ShardImages
from sequencer2d.data.transforms import EvalTransform, TrainTransform
from sequencer2d.data.verdicts import known_bad
from sequencer2d.evaluation import Evaluation, check_split, evaluate_images, get_split, learnt_images
from sequencer2d.files import write_atomic
from sequencer2d.inference import best_device
from sequencer2d.layers import set_backend
from sequencer2d.model import Sequencer2D
from sequencer2d.peers import Classifier, Peer
from sequencer2d.training.callbacks import (
    Checkpoints,
    JsonLinesLogger,
    StopRequested,
    TrainingProgress,
    keep_signals,
    stop_at_once,
    stop_signals_to,
)
from sequencer2d.training.checkpoints import (
    CheckpointFolder,
    find_checkpoints,
    updates_of,
)
from sequencer2d.training.compilation import check_compiler, compile_regions
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.distillation import Teacher, load_teacher
from sequencer2d.training.early_stopping import StopWithoutImprovement
from sequencer2d.training.faults import TrainingError, explained, load_fault
from sequencer2d.training.finetune import freeze
from sequencer2d.training.loggers import check_loggers, close_loggers, make_loggers
from sequencer2d.training.machine import (
    Precision,
    choose_precision,
    continued,
    describe_machine,
    describe_optimizer,
    settled,
)
from sequencer2d.training.models import check_peer, new_model, prepare
from sequencer2d.training.ranks import Ranks, join_ranks, share_batch_norms
from sequencer2d.training.resolving import resolve_for
from sequencer2d.training.run_folder import (
    changed_fields,
    checkpoint_of,
    choose_run_dir,
    load_run_config,
    locked,
    of_same_run,
    resume_path,
    run_of,
)
from sequencer2d.training.sharding import ShardedStrategy, is_to_shard, whole_model
from sequencer2d.training.task import LIGHTNING_PRECISION, SequencerTask
from sequencer2d.visualize.report import write_report
from sequencer2d.visualize.samples import draw_samples, write_samples
from sequencer2d.weights import ModelCard, load_model, load_weights_into, save_model, training_of
from sequencer2d.zoo import find_model_file

log = logging.getLogger("sequencer2d")


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where a run lies and how it went; also `result.json` of its folder once it is finished."""

    run_dir: Path
    finished: bool
    """False if it was asked to stop; train with the same options again to continue."""
    num_parameters: int
    updates: int
    minutes: float
    """Wall-clock of the training, validation included, data loading and final evaluation not."""
    val_top1: float | None = None
    """Best accuracy on the validation images, by which the saved weights were chosen."""
    evaluation: Evaluation | None = None
    """Of the saved weights, on test images if there are such, else on the validation images."""
    skipped: tuple[str, ...] = ()
    """One message for each image that could not be read."""


@stop_signals_to(stop_at_once)  # but `_fit` finishes an update first
def train(config: TrainConfig, given: Collection[str] | None = None) -> TrainResult:
    """Trains by a config and leaves a run folder: config, split, metrics, checkpoints, model file and report.

    Started in several processes by `torchrun` or Slurm, all train together; the first one writes.

    Args:
        config: What to train; to resume a run, what to change of its own config.
        given: The fields of that change. Default: those that are not as by default.

    Raises:
        ValueError, FileNotFoundError: The config, the data or the starting weights are unusable; nothing was written.
        BlockingIOError: Another process is training in the run folder.
        CheckpointError: No checkpoint of the run is whole.
        TrainingError: Training broke off, by numbers out of range, for want of memory or disk, or because a process
            died, or it could not begin for want of memory or a compiler; the message says what to do.
        OSError: The run folder cannot be written to.
        StopRequested: SIGTERM or SIGUSR1 came while the run was set up.
    """
    ranks = join_ranks()
    resumed_from = resume_path(config.resume)
    if resumed_from:
        run_dir = run_of(resumed_from)
        if config.run_dir and Path(config.run_dir).resolve() != run_dir.resolve():
            raise ValueError(
                f"--resume goes on in {run_dir}; leave --run-dir {config.run_dir} out, or begin another run from the "
                f"weights: --weights {run_dir}"
            )
        config = of_same_run(load_run_config(run_dir), config, given)
    check_loggers(config.loggers)
    is_to_shard(config, ranks)  # or says why not, before anything is written
    with settled(config, ranks) as settings:
        return _train(config, ranks, settings, resumed_from)


def _train(config: TrainConfig, ranks: Ranks, settings: tuple[str, ...], resumed_from: Path | None) -> TrainResult:
    data = ranks.first_then_others(lambda: _load_data(config))
    if len(data.train) < 2:
        raise ValueError(f"{data.name} has {len(data.train)} training images; at least 2 are needed")
    if config.compile:
        check_compiler(best_device())
    config = ranks.of_first(lambda: resolve_for(config, data, ranks))
    run_dir = ranks.of_first(lambda: run_of(resumed_from) if resumed_from else choose_run_dir(config, data.name))
    if (run_dir / "result.json").exists():
        another = f"begin another from its weights: --weights {run_dir}" if resumed_from else "give another --run-dir"
        raise ValueError(f"{run_dir} holds a finished run; {another}")
    begun = bool(find_checkpoints(run_dir / "checkpoints"))
    if begun:
        check_split(run_dir, data)
    left_out = ranks.of_first(lambda: _left_out(run_dir, data, resumed=begun))
    run = _Run(config=config, run_dir=run_dir, data=data, left_out=left_out, ranks=ranks)
    num_val = len(run.images("val"))
    if len(run.images("train")) < 2 or not num_val:
        raise ValueError(f"{data.name} has too few readable images; `sequencer2d check` names the others")
    if num_val < ranks.world_size:
        raise ValueError(f"{data.name} has fewer validation images than there are processes, {ranks.world_size}")
    model = run.create_model(begun=begun)
    teacher = load_teacher(config.distill, data.class_names, data.class_ids)
    for line in settings:
        log.info("%s", line)
    precision: Precision = ranks.of_first(lambda: _precision(config, run_dir))
    run = replace(run, config=replace(config, precision=precision))
    log.info("%s", describe_optimizer(config.optim.optimizer, precision))
    with locked(run_dir, ranks), explained(config, run_dir):
        checkpoint = ranks.of_first(lambda: checkpoint_of(run_dir, resumed_from))
        if ranks.is_first:
            run.write_description()
        task, stopped = _fit(run, model, teacher, precision, checkpoint)
        result = _result(run, model, task, finished=not stopped)
        if stopped:
            return result
        try:
            return ranks.of_first(lambda: _finish(run, task, result))
        except StopRequested:  # when it goes on, the best weights are evaluated
            return replace(result, finished=False)


def replay_fault(path: str | Path) -> list[float]:
    """Computes the losses of an update that was kept in a run's `faults/` again, one for each of its batches.

    Weights, images and random numbers are those of then, for a debugger to look into.

    Raises:
        ValueError: The file is no record of a fault, or the run had a teacher, whose part is not kept.
    """
    path = Path(path)
    state, batches, facts = load_fault(path)
    config = load_run_config(path.parent.parent)
    if config.distill.teacher:
        raise ValueError(f"{path} cannot be replayed: the run had a teacher, {config.distill.teacher}")
    model = new_model(config, facts["num_classes"], backend="torch" if config.backend == "torch" else "auto")
    model.load_state_dict(state)
    freeze(model.train(), config.finetune.freeze)
    ranks = Ranks(rank=facts["rank"])
    task = SequencerTask(model, config, config.preprocessing, facts["batches_per_epoch"], ranks=ranks)
    losses = []
    for batch, seed in zip(batches, facts["seeds"], strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=facts["precision"] == "bf16-mixed"):
            losses.append(task.loss(batch, tuple(seed), facts["schedule_epoch"]).item())
    return losses


def _result(run: "_Run", model: Classifier, task: SequencerTask, *, finished: bool) -> TrainResult:
    return TrainResult(
        run_dir=run.run_dir,
        finished=finished,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        updates=task.global_step,
        minutes=task.clock.elapsed_s / 60,
    )


def finished_run(config: TrainConfig) -> dict[str, Any] | None:
    """What `result.json` of `config.run_dir` says, if that run is finished; else None.

    Raises:
        ValueError: It was trained by another config.
    """
    assert config.run_dir is not None
    run_dir = Path(config.run_dir)
    if not (run_dir / "result.json").exists():
        return None
    changed = changed_fields(load_run_config(run_dir), resolve_for(config, _load_data(config), Ranks()))
    if changed:
        raise ValueError(f"{run_dir} holds a finished run of another config ({', '.join(changed)})")
    return json.loads((run_dir / "result.json").read_text())


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What the phases of a run share."""

    config: TrainConfig
    run_dir: Path
    data: ImageData
    """As loaded and split."""
    left_out: dict[str, str]
    """Names of its images that are not used, each with the reason."""
    ranks: Ranks

    def images(self, split: str) -> ImageSet:
        """The images of a split that are used."""
        images = get_split(self.data, split)
        if not self.left_out:
            return images
        return images.subset([i for i in range(len(images)) if images.name(i) not in self.left_out])

    def create_model(self, *, begun: bool) -> Classifier:
        """A new model with the weights to start from; a run that goes on has its own, in its checkpoint."""
        pl.seed_everything(self.config.seed, verbose=False)  # the same weights on every rank
        model = new_model(self.config, len(self.data.class_names), backend=self.config.backend)
        if isinstance(model, Peer):
            check_peer(model, self.config, self.ranks)
        elif model.config.num_classes != len(self.data.class_names):
            raise ValueError(
                f"model_args.num_classes={model.config.num_classes}, but {self.data.name} has "
                f"{len(self.data.class_names)} classes; leave it out"
            )
        elif model.config.in_chans != 3:
            raise ValueError(f"model_args.in_chans={model.config.in_chans}, but images are read as RGB; leave it out")
        if self.config.weights and not begun:
            names = (self.data.class_names, self.data.class_ids)
            notes = load_weights_into(model, self.config.weights, *names)
            log.info("weights from %s%s", self.config.weights, "".join(f"; {note}" for note in notes))
        freeze(model, self.config.finetune.freeze)
        if self.config.weights and not begun:
            self.warn_of_other_split(find_model_file(self.config.weights))
        return model

    def warn_of_other_split(self, weights: Path) -> None:
        """Says so where the weights to start from were trained on images that validate them now."""
        before = training_of(weights)
        if self.data.val_source == "given" or not is_same_data(self.config.data, before.get("data", "")):
            return
        seed, fraction = before.get("split_seed", before.get("seed")), before.get("val_fraction")
        learnt = learnt_images(weights.parent)
        if learnt is None:
            overlaps = (seed, fraction) != (self.config.seed_of_split, self.config.val_fraction)
        else:
            overlaps = not learnt.isdisjoint(split_names(self.data)["val"])
        if overlaps:
            log.warning(
                "%s was trained on images that are for validation now, so that accuracy on these says too much; of the "
                "same images --split-seed %s --val-fraction %s makes its own split",
                *(self.config.weights, seed, fraction),
            )

    def write_description(self) -> None:
        (self.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_atomic(self.run_dir / "config.yaml", yaml.safe_dump(self.config.to_dict(), sort_keys=False))
        write_atomic(self.run_dir / "split.json", json.dumps(split_names(self.data)))
        if self.left_out:
            write_atomic(self.run_dir / "left_out.json", json.dumps(self.left_out, indent=2))
        else:
            (self.run_dir / "left_out.json").unlink(missing_ok=True)
        environment, path = describe_machine(), self.run_dir / "environment.json"
        if path.exists():
            environment = continued(json.loads(path.read_text()), environment)
        write_atomic(path, json.dumps(environment, indent=2))

    def card(self, model: Classifier, results: dict[str, Any]) -> ModelCard:
        origin = {name: getattr(self.config, name) for name in ("data", "data_root", "val_fraction", "seed")}
        origin["split_seed"] = self.config.seed_of_split
        return ModelCard(
            architecture=self.config.model,
            config=model.config,
            class_names=self.data.class_names,
            preprocessing=self.config.preprocessing,
            training={**origin, **results},
        )

    def save_weights(
        self, model: Classifier, task: SequencerTask, validation: dict[str, float], *, which: str, name: str
    ) -> None:
        """Writes a model file of the run, with how it did in the validation that belongs to it."""
        results = {
            "which": which,
            "val_top1": validation["valid_acc"],
            "epochs": round(validation["epoch"], 3),
            "updates": task.global_step,
            "minutes": task.clock.elapsed_s / 60,
        }
        save_model(model, self.card(model, results), self.run_dir / name)


def _load_data(config: TrainConfig) -> ImageData:
    return load_data(config.data, root=config.data_root, val_fraction=config.val_fraction, seed=config.seed_of_split)


def _left_out(run_dir: Path, data: ImageData, *, resumed: bool) -> dict[str, str]:
    """Images that `sequencer2d check` found unreadable; a run that goes on leaves out what it began without."""
    file = run_dir / "left_out.json"
    if resumed:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    roots = {images.root for images in (data.train, data.val, data.test) if isinstance(images, FileImages)}
    bad = {name: reason for root in roots for name, reason in known_bad(root).items()}
    names = itertools.chain.from_iterable(split_names(data).values()) if bad else ()
    left_out = {name: bad[name] for name in names if name in bad}
    if left_out:
        log.info("%d images are left out that `sequencer2d check` found unreadable: %s", len(left_out), file)
    return left_out


def _precision(config: TrainConfig, run_dir: Path) -> Precision:
    """The precision to train in; a run that goes on has the one that it began with, however a probe may turn out."""
    begun = (run_dir / "config.yaml").exists() and load_run_config(run_dir).precision
    wish = begun or config.precision
    precision, reason = choose_precision(wish)
    log.info("precision %s: %s", precision, "as the run began" if begun == precision else reason)
    return precision


def _fit(
    run: _Run, model: Classifier, teacher: Teacher | None, precision: Precision, checkpoint: Path | None
) -> tuple[SequencerTask, bool]:
    """Trains to the end, or until asked to stop, from the beginning or a checkpoint."""
    config, ranks = run.config, run.ranks
    small = config.preprocessing.image_size <= SMALL_IMAGE_SIZE
    workers = -(-(config.num_workers or 0) // ranks.local_world_size)
    cache_bytes = 2**31 // (max(1, workers) * ranks.local_world_size)  # each process comes to have its own
    train_images, val_images = (
        CachedImages(images, cache_bytes) if small and not isinstance(images, ShardImages) else images
        for images in (run.images("train"), run.images("val"))
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
    patience = [StopWithoutImprovement(config.early_stopping)] if config.early_stopping else []
    checkpoints = Checkpoints(folder, metrics_file, minutes=config.checkpoint_minutes, ranks=ranks, save_best=save_best)
    with warnings.catch_warnings(), stop_signals_to(checkpoints.request):
        _ignore_lightning_advice()
        trainer = pl.Trainer(
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
            log_every_n_steps=min(config.log_every, len(train_loader)),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=[metrics_file, TensorBoardLogger(run.run_dir, name="", version="tensorboard"), *loggers],
            plugins=[folder, ranks.environment or LightningEnvironment()],  # which would else look for one itself
            callbacks=[
                *([TrainingProgress()] if ranks.is_first else []),
                *patience,
                checkpoints,
            ],
        )
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


def _finish(run: _Run, task: SequencerTask, result: TrainResult) -> TrainResult:
    """Evaluates the best weights once, and writes model file, samples, report and result."""
    path = run.run_dir / "model.safetensors"
    model, card = load_model(path)
    metrics = run.run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    validations = [row for row in rows if "valid_acc" in row]
    if not validations:
        raise TrainingError(
            f"{metrics} has no validation: it was damaged or deleted after the last one; go back to a checkpoint of "
            f"{run.run_dir / 'checkpoints'} that is ahead of it: sequencer2d train --resume CHECKPOINT"
        )
    run.save_weights(task.evaluated_model, task, validations[-1], which="last", name="last.safetensors")
    split = "test" if run.data.test else "val"
    images = run.images(split)
    names = {"data": run.data.name, "split": split, "class_names": card.class_names}
    if isinstance(model, Sequencer2D) or run.config.backend == "torch":
        set_backend(model, run.config.backend)
    model.to(best_device())
    evaluation, answers = evaluate_images(
        model,
        run.config.preprocessing,
        images,
        **names,
        batch_size=min(128, -(-run.config.images_per_step // run.ranks.world_size)),  # what fitted in the training
        num_workers=run.config.num_workers or 0,
    )
    skipped = tuple(dict.fromkeys([*task.skipped, *evaluation.skipped]))
    scores = {f"{split}_top1": evaluation.top1, f"{split}_loss": evaluation.loss}
    save_model(model, replace(card, training={**card.training, **scores}), path)
    result = replace(result, val_top1=card.training["val_top1"], evaluation=evaluation, skipped=skipped)
    samples = draw_samples(images, answers, card.class_names, run.config.seed)
    write_samples(run.run_dir / "samples", samples)
    environment = json.loads((run.run_dir / "environment.json").read_text())
    write_report(
        run.run_dir / "report.html",
        title=run.run_dir.name,
        summary=_summary(run, result, environment),
        metrics=[{name: value for name, value in row.items() if value is not None} for row in rows],
        evaluation=evaluation.to_dict(),
        samples=samples,
        skipped=skipped,
        config=yaml.safe_dump(run.config.to_dict(), sort_keys=False),
        environment=environment,
    )
    write_atomic(
        run.run_dir / "result.json",
        json.dumps({**asdict(result), "run_dir": str(result.run_dir)}, indent=2),
    )
    return result


def _summary(run: _Run, result: TrainResult, environment: dict[str, Any]) -> dict[str, str]:
    return {
        "Best validation accuracy": f"{result.val_top1:.2%}",
        "Data": f"{run.data.name}, {len(run.images('train')):,} training images, {len(run.data.class_names)} classes",
        "Model": f"{run.config.model}, {run.config.preprocessing.image_size} pixels",
        "Parameters": f"{result.num_parameters / 1e6:.2f} M",
        "Training": f"{result.minutes:.1f} minutes, {result.updates:,} updates",
        "Machine": f"{environment['gpu'] or environment['cpu']}, {environment['threads']} threads",
    }
