"""Which implementation runs the LSTMs: the kernels, or PyTorch."""

import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack  # type: ignore[import-not-found]
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from sequencer2d.native.library import Unavailable, has_threads, kernel, kernels

log = logging.getLogger(__name__)

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # PyTorch 2.6 has not got it

CHOICES = ("auto", "native", "torch")


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of the LSTMs, on this machine."""

    name: str
    """What `create_model(..., backend=…)` calls it."""
    available: bool
    kernel: str | None
    """The instruction set in use; PyTorch does not say."""
    detail: str
    """What else it could use, or why it is not available and what to do."""


def backends() -> tuple[Backend, ...]:
    """The implementations of the LSTMs: which are there, what they use, and why one is not there.

    Example: `[backend.name for backend in backends() if backend.available]`
    """
    torchs = Backend(name="torch", available=True, kernel=None, detail=f"PyTorch {torch.__version__}, any device")
    try:
        threads = "PyTorch's threads" if has_threads() else "one thread, as PyTorch's OpenMP runtime was not found"
        detail = f"CPU, fp32 and bf16, {threads}; runs here: {', '.join(kernels())}"
        return torchs, Backend(name="native", available=True, kernel=kernel().name, detail=detail)
    except Unavailable as error:
        return torchs, Backend(name="native", available=False, kernel=None, detail=str(error))


def check_backend(name: str) -> None:
    """Checks a choice before it is made.

    Raises:
        ValueError: There is no such backend, or it cannot run here; the message says why and what to do.
    """
    if name not in CHOICES:
        raise ValueError(f"backend={name!r} is unknown; there are {', '.join(CHOICES)}")
    reason = _missing()
    if name == "native" and reason:
        raise ValueError(f"backend='native' is not available: {reason}")


def serves(backend: str, x: Tensor | Proxy, *rnns: nn.Module) -> bool:
    """Whether the kernels run these LSTMs on this input; else it is for PyTorch. Says once which it is.

    Tracing always gets PyTorch's LSTMs, and so does exporting unless `native` is asked for: what comes out of them must
    run without this package.

    Raises:
        Unavailable: `native` is asked for, and there are no kernels.
    """
    if backend == "torch" or not isinstance(x, Tensor) or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return False
    if torch.compiler.is_compiling():
        if _is_exporting() and backend != "native":
            return False
        return not _missing() and not _unfit(x, rnns)
    reason = _missing()
    if reason and backend == "native":
        raise Unavailable(f"backend='native' is not available: {reason}")
    reason = reason or _unfit(x, rnns)
    _say(reason)
    return not reason


def ready(backend: str) -> bool:
    """Whether kernels that no compiler, tracer or transform knows may run: in eager execution, where they are there."""
    if backend == "torch" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not _is_transformed() and not _has_any_global_hook() and not _missing()


def computing_dtype(x: Tensor) -> torch.dtype:
    """What is computed in: autocast's precision, which leaves doubles alone, else that of the input."""
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return x.dtype


def is_plain(*tensors: Tensor | Proxy) -> bool:
    """Tensors of which pointers may be taken, and nobody who wants to see the operations, such as a counter."""
    if _get_current_dispatch_mode() is not None:
        return False
    for tensor in tensors:  # noqa: SIM110 - all(…) takes as long as a small kernel
        if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_cpu:
            return False
    return True


def is_unobserved(*modules: nn.Module) -> bool:
    """Whether nobody has hooks on these modules, or a `forward` of theirs, that would be passed by."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return False
        if "forward" in module.__dict__:
            return False
    return True


def _is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, for which the kernels have no rules."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def _missing() -> str:
    """Why there are no kernels at all; empty where there are."""
    try:
        kernel()
    except Unavailable as error:
        return str(error)
    return ""


def _unfit(x: Tensor, rnns: tuple[nn.Module, ...]) -> str:
    """Why the kernels do not fit this call; empty where they do."""
    if x.device.type != "cpu":
        return f"tensors are on {x.device.type}"
    if not torch.compiler.is_compiling() and _is_transformed():
        return "torch.func and forward-mode derivatives have no rule for the kernels"
    # A counter of operations has such hooks, too, and sees those of the kernels.
    observed = not torch.compiler.is_compiling() and _has_any_global_hook() and _get_current_dispatch_mode() is None
    for rnn in rnns:
        if type(rnn) is not nn.LSTM or rnn.num_layers != 1 or rnn.proj_size or not (rnn.bias and rnn.batch_first):
            return f"the cell is {type(rnn).__name__}, not a plain nn.LSTM of one layer"
        if not is_unobserved(rnn) or observed:
            return "hooks look into nn.LSTM"
        if rnn.input_size != x.shape[-1] or rnn.hidden_size != rnns[0].hidden_size:
            return "the sizes of the layers and the tokens differ"
    dtypes = {x.dtype, *(rnn.weight_hh_l0.dtype for rnn in rnns if isinstance(rnn, nn.LSTM))}
    if torch.is_autocast_enabled("cpu") and torch.float64 not in dtypes:
        dtypes = {torch.get_autocast_dtype("cpu")}
    if dtypes not in ({torch.float32}, {torch.bfloat16}):
        return f"tensors are {', '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}"
    return ""


@cache
def _say(reason: str) -> None:
    log.info("LSTMs run in %s", f"PyTorch: {reason}" if reason else f"the CPU kernel {kernel().name}")
