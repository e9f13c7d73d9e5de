"""Multiply-accumulates of a run's model: by our formulas for Sequencers, by PyTorch's counter for timm's models.

Both count convolutions, matrix products and attention; ours also counts LSTMs, which the counter skips, and norms.
"""

import json
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from sequencer2d.flops import costs
from sequencer2d.peers import PEER_PREFIX, Peer, PeerConfig, is_peer
from sequencer2d.zoo import get_config


def macs_per_image(config: dict[str, Any], num_classes: int) -> int:
    """Of the forward pass of the model that a run's `config.yaml` names, at the image size of its training.

    Raises:
        ValueError: A Sequencer has no such name or argument.
        RuntimeError, TypeError: timm says so of its models.
    """
    return _macs(config["model"], json.dumps(config["model_args"], sort_keys=True), num_classes, config["image_size"])


@cache  # seeds share a model
def _macs(name: str, arguments: str, num_classes: int, image_size: int) -> int:
    if not is_peer(name):
        return costs(get_config(name, **{"num_classes": num_classes, **json.loads(arguments)}), image_size).macs
    config = PeerConfig(
        name=name.removeprefix(PEER_PREFIX), num_classes=num_classes, image_size=image_size, args=json.loads(arguments)
    )
    with torch.device("meta"), torch.no_grad():
        model = Peer(config).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2  # a multiply-accumulate counts as two
