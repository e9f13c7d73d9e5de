"""Multiply-accumulates of a run's model: by our formulas for Sequencers, by PyTorch's counter for timm's models.

Both count convolutions, matrix products and attention; ours also counts LSTMs, which the counter skips, and norms.
"""

import json
from functools import cache
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sequencer2d.flops import costs
from sequencer2d.zoo import get_config

PEER = "timm/"
"""How the names of models begin that are not ours."""


def macs_per_image(config: dict[str, Any], num_classes: int) -> int:
    """Of the forward pass of the model that a run's `config.yaml` names, at the image size of its training.

    Raises:
        ValueError: A Sequencer has no such name or argument.
        RuntimeError, TypeError: timm says so of its models.
    """
    return _macs(config["model"], json.dumps(config["model_args"], sort_keys=True), num_classes, config["image_size"])


@cache  # seeds share a model
def _macs(name: str, arguments: str, num_classes: int, image_size: int) -> int:
    model_args = {"num_classes": num_classes, **json.loads(arguments)}
    if not name.startswith(PEER):
        return costs(get_config(name, **model_args), image_size).macs
    with torch.device("meta"), torch.no_grad():
        model = make_peer(name.removeprefix(PEER), model_args, image_size).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2  # a multiply-accumulate counts as two


def make_peer(name: str, model_args: dict[str, Any], image_size: int) -> nn.Module:
    """A model of timm's, told the size of its images where it must know."""
    settings = timm.get_pretrained_cfg(name)
    if settings is not None and settings.fixed_input_size:
        model_args = {"img_size": image_size, **model_args}
    return timm.create_model(name, pretrained=False, **model_args)
