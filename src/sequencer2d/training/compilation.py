"""`torch.compile` for the parts of a model that compile: all but the recurrent layers."""

import time

import torch
from torch import nn

from sequencer2d.layers import Sequencer2DBlock
from sequencer2d.model import Sequencer2D, Stage
from sequencer2d.training.faults import TrainingError


def check_compiler(device: torch.device) -> None:
    """Compiles a small function, so that a missing compiler is noticed before the training.

    Raises:
        TrainingError: That fails; the message has the reason.
    """
    unlikely = 1_000 + time.time_ns() % 1_000_000  # a size whose code is in no cache of an earlier run
    try:
        torch.compile(_small, dynamic=False)(torch.ones(unlikely, device=device))
    except Exception as error:  # of many kinds: no compiler, no Triton, no headers, no room for the cache
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        needs = "Triton" if device.type == "cuda" else "a C++ compiler (g++, or the one that CXX names)"
        raise TrainingError(f"--compile needs {needs}: {reason}; install it, or train with --compile false") from error


def _small(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


def compile_regions(model: Sequencer2D, *, stem: bool = True) -> int:
    """Compiles norms, MLPs, stem and head in place, and returns how many modules that are.

    Recurrent layers cannot be compiled; stochastic depth is left out, so that it draws what it draws without this.
    Downsampling between stages is a convolution alone, on which the compiler of torch 2.14 fails; it is left out, too.
    Names of parameters stay the same, and copies (averaged weights) are not compiled.

    Args:
        model: To train.
        stem: Compile the stem, too; not where its batch norms exchange statistics with other processes.
    """
    regions: list[nn.Module] = [model.norm, model.head, *([model.stem] if stem else [])]
    for stage in model.stages:
        assert isinstance(stage, Stage)
        for block in stage.blocks:
            assert isinstance(block, Sequencer2DBlock)
            regions += [block.norm1, block.norm2, block.mlp_channels]
    regions = [region for region in regions if not isinstance(region, nn.Identity)]
    for region in regions:
        region.compile(dynamic=True)  # the last batch of an epoch is smaller
    return len(regions)
