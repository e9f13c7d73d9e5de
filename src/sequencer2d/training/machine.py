"""The machine a run is on: its description, the arithmetic it is good at, and the allocator's settings."""

import ctypes
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

_HUGE = 2**31 - 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def tune_allocator() -> None:
    """Keeps freed memory in the process and backs large tensors with huge pages (Linux with glibc).

    A training step on the CPU allocates and frees gigabytes; without this, page faults cost as much as a kernel.
    PyTorch reads its switch at the first allocation, so call this before importing torch.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _HUGE)
        libc.mallopt(_M_TRIM_THRESHOLD, _HUGE)


def set_threads(processes: int) -> str:
    """Shares the cores among the processes of this machine, and says how many threads each one has.

    `torchrun` gives each a single thread. Where one process has the machine, OMP_NUM_THREADS or PyTorch decide.
    """
    import torch

    from sequencer2d.training.config import num_cores

    if processes > 1:
        torch.set_num_threads(max(1, num_cores() // processes))
    return f"{torch.get_num_threads()} of {num_cores()} cores" + (f" for each of {processes}" if processes > 1 else "")


def choose_precision(wish: str) -> tuple[Literal["fp32", "bf16", "fp16"], str]:
    """The precision to train in, and why.

    `auto` takes, on a GPU, bf16 or else fp16; on a CPU, bf16 if one LSTM and one linear layer are faster in it
    (without instructions for it they fail or crawl).

    Raises:
        ValueError: fp16 is asked for and there is no GPU.
    """
    import torch

    if torch.cuda.is_available():
        if wish != "auto":
            return wish, "as asked"  # type: ignore[return-value]
        fits = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "the GPU has it") if fits else ("fp16", "the GPU lacks bf16")
    if wish == "fp16":
        raise ValueError("precision=fp16 needs a GPU; take bf16, fp32 or auto")
    if wish != "auto":
        return wish, "as asked"  # type: ignore[return-value]
    try:
        ratio = _bf16_speedup()
    except RuntimeError as error:
        return "fp32", f"bf16 fails on this CPU: {str(error).splitlines()[0]}"
    if ratio > 1.1:
        return "bf16", f"{ratio:.1f}× as fast as fp32 on this CPU"
    return "fp32", f"bf16 is {ratio:.1f}× as fast on this CPU"


def _bf16_speedup() -> float:
    """Time of a small training step in fp32 over its time in bf16, medians of interleaved repetitions."""
    import torch

    lstm = torch.nn.LSTM(128, 32, batch_first=True, bidirectional=True)
    linear = torch.nn.Linear(64, 512)
    x = torch.zeros(512, 8, 128)

    def step(bf16: bool) -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = linear(lstm(x)[0]).sum()
        loss.backward()
        return time.perf_counter() - start

    times = [(step(False), step(True)) for _ in range(6)][1:]
    return statistics.median(fp32 for fp32, _ in times) / statistics.median(bf16 for _, bf16 in times)


def describe_machine() -> dict[str, Any]:
    """What a result depends on: versions, processor, threads, commit. Plain data for `environment.json`."""
    import torch

    packages = ("sequencer2d", "torch", "torchvision", "timm", "pytorch-lightning", "numpy", "pillow")
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: metadata.version(name) for name in packages},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that this file lies in, with a + where it has changes; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes.strip() else "")
