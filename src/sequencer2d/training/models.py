"""The model of a run: a Sequencer, or one of timm's in its place, and what of a run is not for those."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sequencer2d.errors import first_line
from sequencer2d.layers import set_backend
from sequencer2d.model import Sequencer2D
from sequencer2d.peers import PEER_PREFIX, Classifier, Peer, PeerConfig, is_peer
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.ranks import Ranks
from sequencer2d.zoo import create_model


def new_model(config: TrainConfig, num_classes: int, *, backend: str = "auto") -> Classifier:
    """The model that a resolved config names, with new weights.

    Raises:
        ValueError: There is no such model, or it has no such argument.
    """
    if not is_peer(config.model):
        if misplaced := {"name", "backend", "pretrained"} & set(config.model_args):
            name = min(misplaced)
            option = {"name": "--model", "backend": "--backend", "pretrained": "--weights"}[name]
            raise ValueError(f"model_args.{name} is no part of the architecture; give {option}")
        return create_model(config.model, backend=backend, **{"num_classes": num_classes, **config.model_args})
    assert config.image_size is not None
    name = config.model.removeprefix(PEER_PREFIX)
    peer = Peer(PeerConfig(name=name, num_classes=num_classes, image_size=config.image_size, args=config.model_args))
    if backend == "torch":
        set_backend(peer, backend)  # `native` is refused by `check_peer`
    return peer


def check_peer(model: Peer, config: TrainConfig, ranks: Ranks) -> None:
    """Raises ValueError if the config asks for what is made for Sequencers, or the model does not take the images."""
    assert config.image_size is not None
    name = config.model
    if config.backend == "native":
        raise ValueError(f"backend=native has kernels for Sequencers, none for {name}; leave it out")
    if config.compile:
        raise ValueError(f"compile is for the parts of a Sequencer, not for {name}; leave it out")
    if config.strategy == "fsdp":
        raise ValueError(f"strategy=fsdp divides the blocks of a Sequencer, not {name}; take --strategy ddp")
    if config.progressive.start_size is not None and model.fixed_size:
        raise ValueError(f"{name} takes images of one size; leave progressive.start_size out")
    norms = {type(module).__name__ for module in model.modules() if isinstance(module, _BatchNorm)}
    if ranks.world_size > 1 and norms - {nn.BatchNorm2d.__name__}:
        raise ValueError(f"{name} has batch norms that processes cannot share ({', '.join(norms)}); train it in one")
    side = config.image_size
    was_training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, 3, side, side))
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:  # timm's own of many kinds
        raise ValueError(
            f"{name} does not take images of {side} pixels ({first_line(error)}); give another --image-size"
        ) from error
    finally:
        model.train(was_training)
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, model.num_classes):
        raise ValueError(f"{name} is no classifier with these model_args; it gives something else than logits")


def prepare(model: Classifier, config: TrainConfig) -> None:
    """Puts a model's memory in the order that the device likes best, and turns checkpointing on if asked to."""
    # cuDNN's convolutions read and write this order fastest; peers are in it from the start.
    if torch.cuda.is_available() and isinstance(model, Sequencer2D):
        model.stem.to(memory_format=torch.channels_last)
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
