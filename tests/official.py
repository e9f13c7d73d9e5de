"""The official command lines, and a plain loop after timm's `train.py` that does what they say.

The official code is of timm 0.5.4. What today's timm does otherwise is written out; the rest is timm's own.
"""

import ast
import re
import shlex
from argparse import Namespace
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV2, ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from sequencer2d.data.loaders import Batch
from sequencer2d.data.mixing import seed_generators
from sequencer2d.model import Sequencer2D

COMMANDS = {
    "imagenet": "8 /path/to/imagenet --model sequencer2d_s -b 256 -j 8 --opt adamw --epochs 300 --sched cosine "
    "--native-amp --img-size 224 --drop-path 0.1 --lr 2e-3 --weight-decay 0.05 --remode pixel --reprob 0.25 "
    "--aa rand-m9-mstd0.5-inc1 --smoothing 0.1 --mixup 0.8 --cutmix 1.0 --warmup-lr 1e-6 --warmup-epochs 20",
    "imagenet-392": "8 /path/to/imagenet --model sequencer2d_l --pretrained -b 64 -j 8 --opt adamw --epochs 30 "
    "--sched cosine --native-amp --input-size 3 392 392 --img-size 392 --crop-pct 1.0 --drop-path 0.4 --lr 5e-5 "
    "--weight-decay 1e-8 --remode pixel --reprob 0.25 --aa rand-m9-mstd0.5-inc1 --smoothing 0.1 --mixup 0.8 "
    "--cutmix 1.0 --warmup-epochs 0 --cooldown-epochs 0",
    "transfer": "4 /path/to/cifar10 --model sequencer2d_s -b 128 -j 4 --num-classes 10 --dataset torch/cifar10 "
    "--pretrained --opt adamw --epochs 200 --sched cosine --native-amp --img-size 224 --clip-grad 1 --drop-path 0.1 "
    "--lr 0.0001 --weight-decay 1e-4 --remode pixel --aa rand-m9-mstd0.5-inc1 --smoothing 0.1 --mixup 0.8 "
    "--cutmix 1.0 --warmup-lr 1e-6 --warmup-epochs 5",
}
"""After `./distributed_train.sh`, whose first argument is the number of processes, in the official README."""

DEFAULTS: dict[str, Any] = {
    "clip_grad": None, "clip_mode": "norm", "cooldown_epochs": 10, "crop_pct": 0.875, "cutmix": 0.0, "hflip": 0.5,
    "min_lr": 1e-6, "mixup": 0.0, "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "model_ema": False,
    "model_ema_decay": 0.9998, "model_ema_warmup": False, "momentum": 0.9, "opt_betas": (0.9, 0.999), "opt_eps": 1e-8,
    "ratio": (3 / 4, 4 / 3), "reprob": 0.0, "scale": (0.08, 1.0), "train_interpolation": "random", "warmup_lr": 1e-4,
}  # fmt: skip
"""Of the official `train.py`, its model and its AdamW. A newer timm has the warm-up of the average."""


def flags(command: str) -> dict[str, str]:
    """Flags as they are written, each with its values."""
    _, *parts = re.split(r"\s(?=--?[a-z])", command)
    return {flag: " ".join(values) for flag, *values in map(shlex.split, parts)}


def official(command: str, **changes: Any) -> Namespace:
    """What `train.py` makes of a command line."""
    values: dict[str, Any] = {"num_processes": int(command.split()[0])}
    for flag, text in flags(command).items():
        name = "batch_size" if flag == "-b" else flag.lstrip("-").replace("-", "_")
        is_number = re.fullmatch(r"[\d.]+(e-\d+)?", text)
        values[name] = ast.literal_eval(text) if is_number else text or True
    return Namespace(**{**DEFAULTS, **values, **changes})


@dataclass
class Trace:
    """What happened, update by update, and batch by batch where targets are concerned."""

    rates: list[float] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    averages: list[dict[str, Tensor]] = field(default_factory=list)


def create_optimizer(args: Namespace, model: nn.Module) -> torch.optim.Optimizer:
    return create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay, momentum=args.momentum)


def create_scheduler(args: Namespace, optimizer: torch.optim.Optimizer) -> tuple[Scheduler, int]:
    """The scheduler, and the number of epochs with those of the cool-down."""
    scheduler, num_epochs = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        min_lr=args.min_lr,
        warmup_lr=args.warmup_lr,
        warmup_epochs=args.warmup_epochs,
        cooldown_epochs=args.cooldown_epochs,
    )
    assert scheduler is not None
    return scheduler, num_epochs


def mixup_options(args: Namespace, num_classes: int) -> dict[str, Any]:
    return {
        "mixup_alpha": args.mixup,
        "cutmix_alpha": args.cutmix,
        "prob": args.mixup_prob,
        "switch_prob": args.mixup_switch_prob,
        "mode": "batch",
        "label_smoothing": args.smoothing,
        "num_classes": num_classes,
    }


def train_as_timm(model: Sequencer2D, args: Namespace, batches: list[Batch]) -> Trace:
    """timm's `train.py`, the gradients of its processes being averaged as DistributedDataParallel does."""
    trace = Trace()
    mean, std = (255 * torch.tensor(m).view(3, 1, 1) for m in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    mixup = Mixup(**mixup_options(args, model.config.num_classes))
    erase = RandomErasing(args.reprob, mode=args.remode, device="cpu")
    loss_function = SoftTargetCrossEntropy()
    optimizer = create_optimizer(args, model)
    scheduler, num_epochs = create_scheduler(args, optimizer)
    average = None
    if args.model_ema and args.model_ema_warmup:
        average = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=True)
    elif args.model_ema:
        average = ModelEmaV2(model, decay=args.model_ema_decay)
    for epoch in range(num_epochs):
        model.train()
        for first in range(0, len(batches), args.num_processes):
            optimizer.zero_grad()
            of_update = batches[first : first + args.num_processes]
            for index, batch in enumerate(of_update, first):
                seed = (0, epoch, index)  # randomness is shared: as our task with seed 0 draws
                seed_generators(*seed)
                images = batch.images.permute(0, 3, 1, 2).float().contiguous().sub_(mean).div_(std)
                images, targets = mixup(images, batch.labels)
                for image, number in zip(images, batch.indices.tolist(), strict=True):
                    seed_generators(*seed, number)
                    erase(image)
                seed_generators(*seed, 0)
                loss = loss_function(model(images), targets)
                (loss / len(of_update)).backward()
                trace.targets.append(targets)
            if args.clip_grad is not None:
                dispatch_clip_grad(model.parameters(), value=args.clip_grad, mode=args.clip_mode)
            trace.rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if isinstance(average, ModelEmaV3):
                average.update(model, step=len(trace.rates))
            elif average:
                average.update(model)
            trace.weights.append(deepcopy(dict(model.state_dict())))
            if average:
                trace.averages.append(deepcopy(dict(average.module.state_dict())))
        scheduler.step(epoch + 1)
    return trace
