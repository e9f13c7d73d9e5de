"""Where the time of a step goes on this CPU, beside what its arithmetic alone would take; writes docs/profile.md.

`python docs/make_profile.py [--page FILE]`: S and two nets for 32 pixels, and convolutions one by one, three or four
minutes on two idle cores, with the allocator that `train` sets.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import profile, record_function

from sequencer2d.files import write_atomic
from sequencer2d.flops import costs
from sequencer2d.layers import Conv3x3, Convolutions, MaxPool2x2
from sequencer2d.native import library
from sequencer2d.training.machine import describe_machine, tune_allocator
from sequencer2d.zoo import create_model, get_config

tune_allocator()

STEPS = 5
S, SMALL, STEM = ("sequencer2d_s", 224), ("sequencer2d_t_patch2_32", 32), ("sequencer2d_conv_b_patch4_32", 32)
WORK = (
    (S, "train", "bf16", 8),
    (S, "train", "fp32", 8),
    (SMALL, "train", "bf16", 128),
    (STEM, "train", "bf16", 256),
    (STEM, "train", "fp32", 256),
    (S, "infer", "bf16", 8),
    (S, "infer", "fp32", 8),
    (S, "infer", "bf16", 1),
    (S, "infer", "fp32", 1),
)
LAYERS = ((64, 64, 16), (64, 128, 16), (128, 128, 16), (128, 128, 8), (256, 256, 8))
"""Channels in and out, and side of the image, of the convolutions that are measured one by one, batch 256."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise", "kernel weight_gradient"),
    "recurrence": ("kernel forward", "kernel backward"),
    "norms, residual sums": ("kernel norm_forward", "kernel norm_backward", "aten::add", "aten::add_"),
    "GELU": ("kernel gelu",),
    "stem's norms, GELUs, pooling": (
        *("kernel batch_norm_forward", "kernel batch_norm_backward", "kernel pool", "kernel pool_gradient"),
        *("aten::native_batch_norm", "aten::native_batch_norm_backward"),
    ),
    "convolutions": (
        *("aten::mkldnn_convolution", "aten::convolution_backward", "aten::_slow_conv2d_forward"),
        *("kernel convolve", "kernel convolution_gradient"),
    ),
    "copies, casts": ("aten::copy_", "aten::cat", "aten::sum"),
    "optimiser": ("aten::_fused_adamw_",),
}


def name_kernels() -> None:
    """Lets the profiler see the calls of our kernels."""
    of_stem = ("convolve", "convolution_gradient", "pool", "pool_gradient", "batch_norm_forward", "batch_norm_backward")
    for name in ("forward", "backward", "norm_forward", "norm_backward", "gelu", "weight_gradient", *of_stem):
        setattr(library.Kernel, name, _recorded(getattr(library.Kernel, name), f"kernel {name}"))


def _recorded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        with record_function(name):
            return function(*arguments, **options)

    return run


def make_step(model: str, side: int, mode: str, precision: str, batch_size: int) -> Callable[[], object]:
    """As `sequencer2d benchmark` has it."""
    dtype = DTYPES[precision]
    net = create_model(model)
    images, labels = torch.randn(batch_size, 3, side, side), torch.randint(1000, (batch_size,))
    if mode == "infer":
        net.eval().requires_grad_(False).to(dtype)
        images = images.to(dtype)
        return lambda: net(images)
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def train() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = torch.nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()

    return train


def peak(precision: str) -> float:
    """Multiply-accumulates per second of one large matrix product."""
    side = 2048
    x, w = torch.randn(side, side, dtype=DTYPES[precision]), torch.randn(side, side, dtype=DTYPES[precision])
    return side**3 / median_seconds(lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""), 10)


def median_seconds(step: Callable[[], object], count: int) -> float:
    for _ in range(2):
        step()
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(net: tuple[str, int], mode: str, precision: str, batch_size: int) -> list[str]:
    """A row of the table."""
    model, side = net
    step = make_step(model, side, mode, precision, batch_size)
    total = median_seconds(step, STEPS * max(1, 8 // batch_size)) * 1e3
    with profile() as found:
        for _ in range(STEPS):
            step()
    own = {event.key: event.self_cpu_time_total / 1e3 / STEPS for event in found.key_averages()}
    parts = {kind: sum(own.get(name, 0.0) for name in names) for kind, names in KINDS.items()}
    macs = costs(get_config(model), side).macs * batch_size * (3 if mode == "train" else 1)
    limit = macs / peak(precision) * 1e3
    cells = [f"{parts[kind]:,.0f}" for kind in KINDS]
    rest = total - sum(parts.values())
    return [
        f"{mode} {model} at {side}², {precision}, batch {batch_size}",
        f"{total:,.0f}",
        f"{limit:,.0f}",
        *cells,
        f"{rest:,.0f}",
    ]


def measure_layer(layer: Any, channels: int, side: int, precision: str, rounds: int = 9) -> list[str]:
    """A layer's forward and backward pass by our kernel and by PyTorch's, in turn, and the median of the ratios."""
    shape = (256, channels, side, side)
    x = torch.randn(shape, dtype=DTYPES[precision]).contiguous(memory_format=torch.channels_last).requires_grad_()
    wanted = [x, *layer.parameters()]
    seconds: dict[str, list[list[float]]] = {"native": [], "torch": []}
    for _ in range(rounds + 1):
        for backend, found in seconds.items():
            layer.backend = backend
            times = [time.perf_counter()]
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                y = layer(x)
            times.append(time.perf_counter())
            torch.autograd.grad(y, wanted, torch.ones_like(y))
            times.append(time.perf_counter())
            found.append([times[1] - times[0], times[2] - times[1]])
    cells = []
    for way in range(2):
        ours, torchs = ([each[way] * 1e3 for each in seconds[backend][1:]] for backend in ("native", "torch"))
        ratio = statistics.median(there / here for here, there in zip(ours, torchs, strict=True))
        cells += [f"{statistics.median(ours):.1f}", f"{statistics.median(torchs):.1f}", f"{ratio:.2f}×"]
    return cells


def measure_layers(precision: str) -> list[str]:
    """The table of single layers."""
    rows = []
    for inputs, outputs, side in LAYERS:
        layer = Conv3x3(inputs, outputs, kernel_size=3, padding=1, bias=False)
        name = f"3×3 convolution, {inputs} to {outputs} channels, {side}²"
        rows.append([name, *measure_layer(layer, inputs, side, precision)])
    for channels, side in ((64, 32), (256, 16)):
        name = f"2×2 max pooling, {channels} channels, {side}²"
        rows.append([name, *measure_layer(MaxPool2x2(2), channels, side, precision)])
    for channels, side in ((64, 16), (128, 16), (256, 8)):
        layer = Convolutions(nn.BatchNorm2d(channels), nn.GELU())
        rows.append(
            [f"batch norm and GELU, {channels} channels, {side}²", *measure_layer(layer, channels, side, precision)]
        )
    return [
        f"## The layers of the convolutional stem, {precision}",
        "",
        "Trained, batch 256, milliseconds: medians of nine rounds after one to warm up, in each of which our kernel",
        "and PyTorch's take turns; the ratio is the median over the rounds.",
        "",
        "| | forward, ours | PyTorch's | | backward, ours | PyTorch's | |",
        f"| {' | '.join(['---'] * 7)} |",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def measure_inference(rounds: int = 9) -> list[str]:
    """The table of whole nets in fp32, whose convolutions alone are our kernel's and PyTorch's in turn."""
    rows = []
    for model in ("sequencer2d_conv_t_patch4_32", "sequencer2d_conv_l_patch4_32"):
        net = create_model(model).eval().requires_grad_(False)
        layers = [module for module in net.modules() if isinstance(module, Conv3x3)]
        for batch_size in (8, 32, 128):
            images = torch.randn(batch_size, 3, 32, 32)
            seconds: dict[str, list[float]] = {"auto": [], "torch": []}
            for _ in range(rounds + 1):
                for backend, found in seconds.items():
                    for layer in layers:
                        layer.backend = backend
                    start = time.perf_counter()
                    for _ in range(128 // batch_size):
                        net(images)
                    found.append(128 / (time.perf_counter() - start))
            ours, torchs = (found[1:] for found in seconds.values())
            ratio = statistics.median(here / there for here, there in zip(ours, torchs, strict=True))
            cells = f"{statistics.median(ours):,.0f} | {statistics.median(torchs):,.0f} | {ratio:.2f}×"
            rows.append(f"| {model}, batch {batch_size} | {cells} |")
    return [
        "## Inference in fp32 with a convolutional stem",
        "",
        "Images a second at 32²: medians of nine rounds after one to warm up, in each of which the convolutions are",
        "our kernel's and PyTorch's in turn, all else being equal; the ratio is the median over the rounds.",
        "",
        "| | ours | PyTorch's | |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=Path(__file__).with_name("profile.md"))
    page = parser.parse_args().page
    torch.set_flush_denormal(True)
    name_kernels()
    rows = [measure(*work) for work in WORK]
    head = ["", "step", "arithmetic limit", *KINDS, "rest"]
    machine = describe_machine()
    lines = [
        "# Where the time of a step goes",
        "",
        "By `python docs/make_profile.py`, in milliseconds: the median of the step, and PyTorch's profiler.",
        "The *arithmetic limit* is all multiply-accumulates at the rate of one 2048³ product in that precision.",
        "Our convolutions do four ninths of theirs (Winograd's algorithm), so a step may stay below it.",
        "The rest is Python, autograd, and what the profiler and the clock see differently;",
        "it is below 0 where the machine was slower under the profiler.",
        "",
        f"| {' | '.join(head)} |",
        f"| {' | '.join(['---'] * len(head))} |",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        *measure_layers("bf16"),
        *measure_layers("fp32"),
        *measure_inference(),
        f"Commit {machine['commit']}, {machine['cpu']} ({machine['cpu_capability']}), {machine['threads']} threads, "
        f"torch {machine['packages']['torch']}.",
    ]
    write_atomic(page, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
