"""The machine a run is on: set up for training and put back afterwards, its arithmetic, its description."""

import ctypes
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sequencer2d.errors import first_line

if TYPE_CHECKING:
    from sequencer2d.training.config import TrainConfig
    from sequencer2d.training.ranks import Ranks

Precision = Literal["fp32", "bf16", "fp16"]

_HUGE = 2**31 - 1
_OLD_LIMIT = 2**25
"""The highest threshold for mmap that glibc took before 2.35."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def tune_allocator() -> bool:
    """Keeps freed memory in the process (Linux with glibc), for as long as it lives.

    A training step on the CPU allocates and frees gigabytes; without this, page faults cost as much as a kernel.
    PyTorch's switch for huge pages, THP_MEM_ALLOC_ENABLE=1, is not set: it aligns tensors to 2 MiB, and glibc
    (2.36 was tried) often does not find such memory again, so that a process grows to several times what it needs.

    Returns:
        Whether the C library keeps freed memory.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    kept = libc.mallopt(_M_MMAP_THRESHOLD, _HUGE) or libc.mallopt(_M_MMAP_THRESHOLD, _OLD_LIMIT)
    return bool(kept and libc.mallopt(_M_TRIM_THRESHOLD, _HUGE))


@contextmanager
def settled(config: "TrainConfig", ranks: "Ranks") -> Iterator[tuple[str, ...]]:
    """Sets this process up for training: threads, denormals, allocator, TF32, determinism. A line tells of each.

    Afterwards all is as before but for the allocator, which stays. Call it before tensors are computed with: threads
    take over whether denormals are flushed when they start.
    """
    import torch

    with ExitStack() as undo:
        lines = [set_threads(ranks, undo), _flush_denormals(undo), _allocator()]
        if torch.cuda.is_available():
            undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("high")
            lines += ["TF32: matrix products in fp32 round their factors to 10 bits", "stem: channels-last"]
        if config.deterministic:
            _deterministic(undo)
            lines.append("deterministic: operations that give other digits when repeated are errors")
        yield tuple(lines)


def set_threads(ranks: "Ranks", undo: ExitStack) -> str:
    """Shares the cores among the processes that may use them, and says how many threads each one has.

    `torchrun` gives each a single thread. Where one process has the machine, OMP_NUM_THREADS or PyTorch decide; but
    PyTorch does not know of a container's quota of time, beyond which threads only wait for each other.
    """
    import torch

    before, cores, processes = torch.get_num_threads(), ranks.machine_cores, ranks.local_world_size
    threads = before if "OMP_NUM_THREADS" in os.environ else min(before, cores)
    if processes > 1:
        threads = ranks.own_cores
    if threads != before:
        undo.callback(torch.set_num_threads, before)
        torch.set_num_threads(threads)
    each = f" for each of {processes}" if processes > 1 else ""
    return f"threads: {threads} of {cores} cores{each}"


def _flush_denormals(undo: ExitStack) -> str:
    """Numbers below 1e-38 count as 0: on a CPU they take a hundred times as long as others."""
    import torch

    undo.callback(torch.set_flush_denormal, flushes_denormals())
    if not torch.set_flush_denormal(True):
        return "denormals: kept, this CPU cannot flush them"
    if not flushes_denormals(count=2**18 * torch.get_num_threads()):
        return "denormals: flushed to 0, but not in the threads that PyTorch had started before"
    return "denormals: flushed to 0"


def flushes_denormals(count: int = 1) -> bool:
    """Whether sums of so many denormals are 0: a few are computed in this thread, very many in all of PyTorch's."""
    import torch

    denormals = torch.full((count,), 700_000, dtype=torch.int32).view(torch.float32)  # 1e-39
    return not (denormals + denormals).view(torch.int32).any()


def _allocator() -> str:
    return f"allocator: freed memory {'is kept' if tune_allocator() else 'goes back to the system'}"


def _deterministic(undo: ExitStack) -> None:
    import torch

    cudnn = torch.backends.cudnn
    undo.callback(
        torch.use_deterministic_algorithms,
        torch.are_deterministic_algorithms_enabled(),
        warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    undo.callback(setattr, cudnn, "deterministic", cudnn.deterministic)
    undo.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
    if "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        undo.callback(os.environ.pop, "CUBLAS_WORKSPACE_CONFIG", None)
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what cuBLAS and cuDNN's LSTMs ask for
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False


def choose_precision(wish: str) -> tuple[Precision, str]:
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
        return "fp32", f"bf16 fails on this CPU: {first_line(error)}"
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


def describe_optimizer(name: str, precision: Precision) -> str:
    """Which kernels update the weights, for people."""
    if name == "muon":
        return "optimizer: Muon, matrices of one shape together"
    return f"optimizer: AdamW, {'fused' if fuses_adamw(precision) else 'not fused: fp16 gradients are clipped first'}"


def fuses_adamw(precision: Precision) -> bool:
    """Whether AdamW is one kernel; fused, it would unscale fp16 gradients only after the clipping."""
    return precision != "fp16"


def describe_machine() -> dict[str, Any]:
    """What a result depends on: versions, processor, threads, commit. Plain data for `environment.json`."""
    import torch

    packages = ("sequencer2d", "torch", "torchvision", "timm", "pytorch-lightning", "numpy", "pillow")
    program = Path(sys.argv[0]).name
    return {
        "command": shlex.join(["sequencer2d" if program == "__main__.py" else program, *sys.argv[1:]]),
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


def continued(first: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Of a run that goes on: the machine of now, the command and commit that began it, and those that came after."""
    step = {key: now[key] for key in ("command", "commit")}
    begun = {key: first[key] for key in step}
    return now | begun | {"continued": [*first.get("continued", []), step]}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that this file lies in, with a + where it has changes; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:  # an environment may lie in the checkout of something else
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes.strip() else "")
