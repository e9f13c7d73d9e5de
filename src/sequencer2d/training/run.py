"""A run from config to report: data, model, training, final evaluation, and the folder that holds it all."""

import itertools
import json
import logging
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from sequencer2d.data.catalog import FileImages, ImageData, load_data, split_names
from sequencer2d.data.verdicts import known_bad
from sequencer2d.evaluation import Evaluation, evaluate_images
from sequencer2d.files import write_atomic
from sequencer2d.inference import best_device
from sequencer2d.layers import set_backend
from sequencer2d.model import Sequencer2D
from sequencer2d.peers import Classifier
from sequencer2d.provenance import check_split
from sequencer2d.training.callbacks import StopRequested, stop_at_once, stop_signals_to
from sequencer2d.training.checkpoints import find_checkpoints
from sequencer2d.training.compilation import check_compiler
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.distillation import load_teacher
from sequencer2d.training.faults import TrainingError, explained, load_fault
from sequencer2d.training.finetune import freeze
from sequencer2d.training.fitting import fit
from sequencer2d.training.loggers import check_loggers
from sequencer2d.training.machine import Precision, choose_precision, describe_optimizer, settled
from sequencer2d.training.models import new_model
from sequencer2d.training.open_run import OpenRun
from sequencer2d.training.ranks import Ranks, join_ranks
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
from sequencer2d.training.sharding import is_to_shard
from sequencer2d.training.task import SequencerTask
from sequencer2d.visualize.report import write_report
from sequencer2d.visualize.samples import draw_samples, write_samples
from sequencer2d.weights import load_model, save_model

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


@stop_signals_to(stop_at_once)  # but `fit` finishes an update first
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
    run = OpenRun(config=config, run_dir=run_dir, data=data, left_out=left_out, ranks=ranks)
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
        task, stopped = fit(run, model, teacher, precision, checkpoint)
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


def _result(run: OpenRun, model: Classifier, task: SequencerTask, *, finished: bool) -> TrainResult:
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


def _finish(run: OpenRun, task: SequencerTask, result: TrainResult) -> TrainResult:
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


def _summary(run: OpenRun, result: TrainResult, environment: dict[str, Any]) -> dict[str, str]:
    return {
        "Best validation accuracy": f"{result.val_top1:.2%}",
        "Data": f"{run.data.name}, {len(run.images('train')):,} training images, {len(run.data.class_names)} classes",
        "Model": f"{run.config.model}, {run.config.preprocessing.image_size} pixels",
        "Parameters": f"{result.num_parameters / 1e6:.2f} M",
        "Training": f"{result.minutes:.1f} minutes, {result.updates:,} updates",
        "Machine": f"{environment['gpu'] or environment['cpu']}, {environment['threads']} threads",
    }
