"""What a run's config leaves open, by the data and the machine: model, image size, crop and batch size."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from sequencer2d.data.augment import SMALL_IMAGE_SIZE
from sequencer2d.data.catalog import ImageData
from sequencer2d.data.images import ImageError
from sequencer2d.peers import Peer, is_peer, usual_input
from sequencer2d.training.batch_size import SMALLEST, find_batch_size
from sequencer2d.training.config import TrainConfig, resolve
from sequencer2d.training.distillation import load_teacher
from sequencer2d.training.finetune import follow_weights, freeze
from sequencer2d.training.finetune_config import ProgressiveConfig
from sequencer2d.training.machine import choose_precision
from sequencer2d.training.models import check_peer, new_model, prepare
from sequencer2d.training.ranks import Ranks
from sequencer2d.training.run_folder import changed_fields, default_stem, load_run_config, numbered
from sequencer2d.training.task import SequencerTask
from sequencer2d.zoo import get_variant

_MODEL_BY_SIDE: list[tuple[float, str]] = [
    (20, "sequencer2d_conv_p_patch2_16"),
    (48, "sequencer2d_conv_t_patch4_32"),
    (SMALL_IMAGE_SIZE, "sequencer2d_conv_t_patch4_64"),
    (float("inf"), "sequencer2d_s"),
]


def resolve_for(config: TrainConfig, data: ImageData, ranks: Ranks) -> TrainConfig:
    """Fills in what a config leaves open.

    Raises:
        ValueError: There is no such model, or no image tells the size that a model is needed for.
    """
    config = follow_weights(config)
    name = config.model if config.model != "auto" else _default_model(data)
    if is_peer(name):
        usual_size, usual_crop = _usual_input(name, data)
    else:
        usual_size, usual_crop = get_variant(name).image_size, get_variant(name).crop_pct
    image_size = config.image_size or usual_size
    small = image_size <= SMALL_IMAGE_SIZE
    crop_pct = config.crop_pct or (1.0 if small else usual_crop)

    def resolved(batch_size: int) -> TrainConfig:
        numbered = replace(config, batch_size=batch_size)
        return resolve(numbered, model=name, image_size=image_size, crop_pct=crop_pct, cores=ranks.machine_cores)

    if config.batch_size != "auto":
        return resolved(config.batch_size)
    for saved in _configs_of_begun_runs(config, data.name, name):
        begun = resolved(saved.images_per_step)
        if not changed_fields(saved, begun):
            return begun
    return resolved(_find_batch_size(resolved(SMALLEST), data, ranks.world_size))


def _configs_of_begun_runs(config: TrainConfig, data_name: str, model_name: str) -> Iterator[TrainConfig]:
    """Of the runs that a config may be meant to continue, which have found their batch size."""
    folders = [config.run_dir] if config.run_dir else numbered(default_stem(data_name, model_name))
    for run_dir in map(Path, folders):
        if (run_dir / "config.yaml").exists():
            yield load_run_config(run_dir)
        elif not run_dir.exists():
            return


def _find_batch_size(config: TrainConfig, data: ImageData, num_processes: int) -> int:
    """For all processes together, by trying in this one."""
    classes = len(data.class_names)
    model = new_model(config, classes, backend=config.backend)
    if isinstance(model, Peer):
        check_peer(model, config, Ranks())
    freeze(model, config.finetune.freeze)
    prepare(model, config)
    teacher = load_teacher(config.distill, data.class_names, data.class_ids)
    if teacher and torch.cuda.is_available():
        teacher.model.cuda()
    at_full_size = replace(config, progressive=ProgressiveConfig())
    task = SequencerTask(model, at_full_size, config.preprocessing, 1, teacher)
    precision, _ = choose_precision(config.precision)
    found = find_batch_size(task, precision, num_images=len(data.train) // num_processes)
    return found.batch_size * num_processes


def _default_model(data: ImageData) -> str:
    """The variant for the size of the first readable image."""
    for index in range(min(len(data.train), 100)):
        try:
            side = max(data.train.image(index).size)
        except ImageError:
            continue
        return next(name for limit, name in _MODEL_BY_SIDE if side <= limit)
    raise ValueError(f"none of the first 100 training images of {data.name} can be read; check the folder")


def _usual_input(name: str, data: ImageData) -> tuple[int, float]:
    """Image size and crop for a peer: for small images those that a Sequencer would have, else timm's."""
    own = usual_input(name)
    ours = get_variant(_default_model(data))
    return (ours.image_size, ours.crop_pct) if ours.image_size <= SMALL_IMAGE_SIZE else own
