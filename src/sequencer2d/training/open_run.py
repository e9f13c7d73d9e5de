"""A run that is under way: its config, data and folder, the model that it begins with, and the files that it writes."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml

from sequencer2d.data.catalog import ImageData, ImageSet, split_names
from sequencer2d.evaluation import get_split
from sequencer2d.files import write_atomic
from sequencer2d.peers import Classifier, Peer
from sequencer2d.provenance import warn_of_other_split
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.finetune import freeze
from sequencer2d.training.machine import continued, describe_machine
from sequencer2d.training.models import check_peer, new_model
from sequencer2d.training.ranks import Ranks
from sequencer2d.training.task import SequencerTask
from sequencer2d.weights import ModelCard, load_weights_into, save_model

log = logging.getLogger("sequencer2d")


@dataclass(frozen=True, kw_only=True)
class OpenRun:
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
        weights = None if begun else self.config.weights
        if weights:
            notes = load_weights_into(model, weights, self.data.class_names, self.data.class_ids)
            log.info("weights from %s%s", weights, "".join(f"; {note}" for note in notes))
        freeze(model, self.config.finetune.freeze)
        if weights:
            config = self.config
            warn_of_other_split(
                weights, self.data, source=config.data, seed=config.seed_of_split, fraction=config.val_fraction
            )
        return model

    def write_description(self) -> None:
        """Config, split, what is left out and the machine, into the folder; what it has of the machine goes on."""
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
        """What a model file of the run says of it; `results` is how it did."""
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
