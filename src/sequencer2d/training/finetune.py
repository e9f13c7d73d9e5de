"""Fine-tuning: weights that stay, a learning rate for each layer, and the architecture of what is started from."""

import logging
from collections import defaultdict
from dataclasses import asdict, replace
from typing import Any

from timm.models import group_parameters
from torch import Tensor, nn

from sequencer2d.model import Sequencer2D
from sequencer2d.peers import Classifier, Peer, PeerConfig
from sequencer2d.training.config import TrainConfig
from sequencer2d.weights import ModelCard, load_model
from sequencer2d.zoo import get_config

log = logging.getLogger("sequencer2d")


def freeze(model: Classifier, what: str) -> None:
    """Takes the first parts of a model out of training: no gradients, and evaluation mode.

    Thus their batch norms keep their statistics, and they drop nothing. Nothing before them needs a gradient, so none
    is computed, and their activations are not kept.

    Args:
        model: Changed in place.
        what: As `FinetuneConfig.freeze`.

    Raises:
        ValueError: The model has no such stage, or nothing is left to train.
    """
    if isinstance(model, Peer):
        _freeze_peer(model, what)
    else:
        for module in _parts(model, what):
            module.requires_grad_(False)
            module.eval()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"finetune.freeze={what} leaves nothing to train; freeze less")
    if what != "none":
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        log.info("%s frozen: %s parameters are trained", what, f"{trained:,}")


def _freeze_peer(model: Peer, what: str) -> None:
    if what == "backbone":
        model.freeze_backbone()
    elif what != "none":
        raise ValueError(
            f"finetune.freeze={what} is for Sequencers; of timm/{model.config.name} freeze backbone, or none"
        )


def _parts(model: Sequencer2D, what: str) -> list[nn.Module]:
    stem: list[nn.Module] = [model.stem, model.pos_embed, model.shuffle]
    match what.partition("."):
        case ("none", _, _):
            return []
        case ("stem", _, _):
            return stem
        case ("backbone", _, _):
            return [*stem, model.stages, model.norm]
        case (_, _, last):
            if int(last) >= len(model.stages):
                raise ValueError(f"finetune.freeze={what}: the model has the stages 0 to {len(model.stages) - 1}")
            return [*stem, *list(model.stages)[: int(last) + 1]]


def scale_by_layer(groups: list[dict[str, Any]], model: Classifier, layer_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of any optimiser, divided by layer: `lr_scale` is what the learning rate is multiplied with.

    It is 1 for the head and falls by `layer_decay` with every block towards the stem, as in timm's
    `param_groups_layer_decay`, which makes groups of its own and so cannot take Muon's.
    """
    if layer_decay == 1:
        return [{**group, "lr_scale": 1.0} for group in groups]
    layer_of: Any = group_parameters(model, model.group_matcher(), reverse=True)
    last = max(layer_of.values())
    scale_of = {id(parameter): layer_decay ** (last - layer_of[name]) for name, parameter in model.named_parameters()}
    divided = []
    for group in groups:
        by_scale: dict[float, list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            by_scale[scale_of[id(parameter)]].append(parameter)
        divided += [{**group, "params": parameters, "lr_scale": scale} for scale, parameters in by_scale.items()]
    return divided


def follow_weights(config: TrainConfig) -> TrainConfig:
    """The config with architecture, image size and crop of the model that it starts from, where it names none itself.

    Raises:
        FileNotFoundError, ModelFileError: As `load_model`.
    """
    if config.model != "auto" or config.weights is None:
        return config
    card: ModelCard = load_model(config.weights)[1]
    if isinstance(card.config, PeerConfig):
        changed = card.config.args
    else:
        own, usual = asdict(card.config), asdict(get_config(card.architecture))
        changed = {name: own[name] for name in own if own[name] != usual[name] and name != "num_classes"}
    followed = replace(
        config,
        model=card.architecture,
        model_args={**changed, **config.model_args},
        image_size=config.image_size or card.preprocessing.image_size,
        crop_pct=config.crop_pct or card.preprocessing.crop_pct,
    )
    log.info("model %s at %d pixels, as in %s", followed.model, followed.image_size, config.weights)
    return followed
