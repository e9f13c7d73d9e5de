"""Finds the compiled kernels and picks the one for this processor. What the numbers mean stands in `kernels/abi.h`."""

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch  # first: the kernels share the OpenMP runtime that it brings
from torch import Tensor

PATH = Path(__file__).with_name("_kernels.so")
VARIABLE = "SEQUENCER2D_KERNEL"
"""Environment variable that names the kernel to use instead of the fastest: portable, avx2, avx512 or avx512_bf16."""

WEIGHT_GRADIENTS = ("avx512_bf16",)
"""Kernels that make the gradients of weights faster than libraries do."""

FP32_PROJECTIONS = ("avx512", "avx512_bf16")
"""Kernels that project fp32 tokens faster than libraries do, because they need not store them; in bf16 all do."""

CONVOLUTIONS = {torch.float32: ("avx2", "avx512", "avx512_bf16"), torch.bfloat16: ("avx512_bf16",)}
"""Kernels that have 3×3 convolutions of images of a type."""

POOLINGS = ("avx512", "avx512_bf16")
"""Kernels that have pooling."""

_ABI = 9
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


class Unavailable(RuntimeError):
    """The kernels are not there, or not the one asked for; the message says why and what to do."""


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "hidden", "channels")),
        *((name, ctypes.c_int32) for name in ("vertical", "horizontal", "type", "threads")),
    ]


class _ForwardTensors(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("packed", "x", "bias", "gates", "cells", "y")]


class _BackwardTensors(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("packed", "gates", "cells", "y", "grad_y", "grad_gates", "previous_hidden", "grad_bias")
    ]


class _NormProblem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "channels", "tokens_per_scale")),
        *((name, ctypes.c_int32) for name in ("residual_type", "type", "threads")),
        ("epsilon", ctypes.c_float),
    ]


class _NormForwardTensors(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p) for name in ("x", "branch", "scale", "weight", "bias", "sum", "normed", "statistics")
    ]


class _NormBackwardTensors(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("sum", "statistics", "weight", "scale", "grad_normed", "grad_sum"),
            *("grad_x", "grad_branch", "grad_weight", "grad_bias"),
        )
    ]


class _BatchNormProblem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("pixels", "channels")),
        *((name, ctypes.c_int32) for name in ("type", "threads")),
        ("epsilon", ctypes.c_float),
    ]


class _BatchNormForwardTensors(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "weight", "bias", "y", "statistics")]


class _BatchNormBackwardTensors(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("x", "weight", "bias", "statistics", "grad_y", "grad_x", "grad_weight", "grad_bias")
    ]


class _WeightGradient(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "outputs", "inputs", "groups", "own_inputs")),
        *((name, ctypes.c_int64) for name in ("grad_stride", "x_stride")),
        *((name, ctypes.c_void_p) for name in ("grad", "x", "own", "weight", "own_weight", "bias")),
        ("threads", ctypes.c_int32),
    ]


class _Convolution(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "inputs", "outputs")),
        *((name, ctypes.c_int32) for name in ("type", "threads")),
    ]


class _Pooling(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "channels")),
        *((name, ctypes.c_int32) for name in ("type", "threads")),
    ]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of one call: `[B, H, W]` tokens, hidden units, and how many directions run along columns and along rows.

    `channels` of the tokens where the kernel projects them, 0 where it gets them projected.
    """

    batch: int
    height: int
    width: int
    hidden: int
    vertical: int
    horizontal: int
    channels: int = 0

    @property
    def directions(self) -> int:
        return self.vertical + self.horizontal


@dataclass(frozen=True)
class Kernel:
    """One instruction set's implementation. Tensors are contiguous, of one dtype, and as `kernels/abi.h` says."""

    name: str
    number: int
    library: Any

    def pack(self, shape: Shape, w_ih: Tensor | None, w_hh: Tensor, *, backward: bool) -> Tensor:
        """Weights `[R·4·D, C]` and `[R, 4·D, D]` in the order of the forward or the backward pass, as bytes.

        The input weights only where the kernel projects tokens: in the forward pass of a shape with `channels`.
        """
        problem = _problem(shape, w_hh.dtype)
        size = self.library.sequencer2d_packed_bytes(self.number, ctypes.byref(problem), backward)
        packed = torch.empty(size, dtype=torch.uint8, device="cpu")
        arguments = (ctypes.byref(problem), int(backward), *map(_pointer, (w_ih, w_hh, packed)))
        check_status(self.library.sequencer2d_pack(self.number, *arguments))
        return packed

    def forward(
        self,
        shape: Shape,
        packed: Tensor,
        x: Tensor | None,
        bias: Tensor | None,
        gates: Tensor | None,
        cells: Tensor | None,
        y: Tensor,
    ) -> None:
        """Fills `y` from `x` with `bias` or else from `gates`; with `cells` given also those, and activated gates."""
        problem = _problem(shape, y.dtype)
        tensors = _ForwardTensors(*map(_pointer, (packed, x, bias, gates, cells, y)))
        check_status(self.library.sequencer2d_forward(self.number, ctypes.byref(problem), ctypes.byref(tensors)))

    def backward(self, shape: Shape, *tensors: Tensor) -> None:
        """Fills the last three: gradient of the gates, previous hidden states, gradient of the bias (fp32)."""
        problem = _problem(shape, tensors[-2].dtype)
        pointers = _BackwardTensors(*map(_pointer, tensors))
        check_status(self.library.sequencer2d_backward(self.number, ctypes.byref(problem), ctypes.byref(pointers)))

    def norm_forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        scale: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        epsilon: float,
        sum: Tensor | None,
        normed: Tensor,
        statistics: Tensor | None,
    ) -> None:
        """Fills the last three; `scale`, `weight`, `bias` and `statistics` are fp32."""
        problem = _norm_problem(x, normed, epsilon)
        pointers = map(_pointer, (x, branch, scale, weight, bias, sum, normed, statistics))
        tensors = _NormForwardTensors(*pointers)
        check_status(self.library.sequencer2d_norm_forward(self.number, ctypes.byref(problem), ctypes.byref(tensors)))

    def norm_backward(
        self,
        sum: Tensor,
        statistics: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        grad_normed: Tensor,
        grad_sum: Tensor | None,
        grad_x: Tensor,
        grad_branch: Tensor | None,
        grad_weight: Tensor,
        grad_bias: Tensor,
    ) -> None:
        """Fills the last four; `statistics`, `weight`, `scale` and the last two are fp32."""
        problem = _norm_problem(sum, grad_normed, 0)
        pointers = map(_pointer, (sum, statistics, weight, scale, grad_normed, grad_sum))
        outputs = map(_pointer, (grad_x, grad_branch, grad_weight, grad_bias))
        tensors = _NormBackwardTensors(*pointers, *outputs)
        check_status(self.library.sequencer2d_norm_backward(self.number, ctypes.byref(problem), ctypes.byref(tensors)))

    def gelu(self, x: Tensor, y: Tensor, grad_y: Tensor | None = None, grad_x: Tensor | None = None) -> None:
        """Fills `y`, which may be `x`, and `grad_x` where there is a `grad_y`."""
        pointers = map(_pointer, (x, y, grad_y, grad_x))
        sizes = (_TYPES[x.dtype], torch.get_num_threads(), x.numel())
        check_status(self.library.sequencer2d_gelu(self.number, *sizes, *pointers))

    def batch_norm_forward(
        self, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, y: Tensor, statistics: Tensor
    ) -> None:
        """Fills the last two from `[B, C, H, W]`: GELU of the norm, and mean and variance, `[2, C]`.

        Images are of one type and channels-last; all else is fp32.
        """
        problem = _batch_norm_problem(x, epsilon)
        tensors = _BatchNormForwardTensors(*map(_pointer, (x, weight, bias, y, statistics)))
        arguments = (ctypes.byref(problem), ctypes.byref(tensors))
        check_status(self.library.sequencer2d_batch_norm_forward(self.number, *arguments))

    def batch_norm_backward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        epsilon: float,
        statistics: Tensor,
        grad_y: Tensor,
        grad_x: Tensor,
        grad_weight: Tensor,
        grad_bias: Tensor,
    ) -> None:
        """Fills the last three."""
        problem = _batch_norm_problem(x, epsilon)
        pointers = map(_pointer, (x, weight, bias, statistics, grad_y, grad_x, grad_weight, grad_bias))
        tensors = _BatchNormBackwardTensors(*pointers)
        arguments = (ctypes.byref(problem), ctypes.byref(tensors))
        check_status(self.library.sequencer2d_batch_norm_backward(self.number, *arguments))

    def weight_gradient(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        own: Tensor | None = None,
        own_weight: Tensor | None = None,
    ) -> None:
        """Fills `weight` and `bias` (fp32) from `[N, outputs]` and `[N, inputs]` in bf16, each row contiguous.

        With inputs of each direction's own, `[R, N, D]`, also `own_weight` `[R, outputs / R, D]`.
        Only of kernels named in `WEIGHT_GRADIENTS`.
        """
        groups, own_inputs = (1, 0) if own is None else (own.shape[0], own.shape[2])
        sizes = (*grad.shape, x.shape[1], groups, own_inputs, grad.stride(0), x.stride(0))
        pointers = map(_pointer, (grad, x, own, weight, own_weight, bias))
        tensors = _WeightGradient(*sizes, *pointers, torch.get_num_threads())
        check_status(self.library.sequencer2d_weight_gradient(self.number, ctypes.byref(tensors)))

    def convolve(self, weight: Tensor, x: Tensor, y: Tensor, *, backward: bool = False) -> None:
        """Fills `y` `[B, K, H, W]` from `x` `[B, C, H, W]` by `weight` `[K, C, 3, 3]`, contiguous and fp32.

        Backward, from the gradient of `y` that of `x`: K and C change places. Images are of one type and channels-last.
        Like the following, only of kernels named in `CONVOLUTIONS` for their type.
        """
        inputs, outputs = x.shape[1], y.shape[1]
        packed = torch.empty(16 * inputs * outputs, dtype=x.dtype, device="cpu")
        of_weight = _convolution(x, *((outputs, inputs) if backward else (inputs, outputs)))
        pointers = map(_pointer, (weight, packed))
        arguments = (ctypes.byref(of_weight), int(backward), *pointers)
        check_status(self.library.sequencer2d_pack_convolution(self.number, *arguments))
        problem = _convolution(x, inputs, outputs)
        arguments = (ctypes.byref(problem), *map(_pointer, (packed, x, y)))
        check_status(self.library.sequencer2d_convolve(self.number, *arguments))

    def convolution_gradient(self, x: Tensor, grad: Tensor, weight: Tensor) -> None:
        """Fills `weight` `[16, K, C]` (fp32) with the gradient of the transformed weights."""
        problem = _convolution(x, x.shape[1], grad.shape[1])
        pointers = map(_pointer, (x, grad, weight))
        check_status(self.library.sequencer2d_convolution_gradient(self.number, ctypes.byref(problem), *pointers))

    def pool(self, x: Tensor, y: Tensor, chosen: Tensor) -> None:
        """Fills `y` and `chosen` (uint8), both `[B, C, H/2, W/2]`, from `[B, C, H, W]`, all channels-last.

        Like the following, only of kernels named in `POOLINGS`.
        """
        pointers = map(_pointer, (x, y, chosen))
        check_status(self.library.sequencer2d_pool(self.number, ctypes.byref(_pooling(x)), *pointers))

    def pool_gradient(self, grad_y: Tensor, chosen: Tensor, grad_x: Tensor) -> None:
        """Fills `grad_x` from the gradient of `y` and what `pool` chose."""
        pointers = map(_pointer, (grad_y, chosen, grad_x))
        check_status(self.library.sequencer2d_pool_gradient(self.number, ctypes.byref(_pooling(grad_x)), *pointers))


def _convolution(x: Tensor, inputs: int, outputs: int) -> _Convolution:
    batch, _, height, width = x.shape
    return _Convolution(batch, height, width, inputs, outputs, _TYPES[x.dtype], torch.get_num_threads())


def _pooling(x: Tensor) -> _Pooling:
    batch, channels, height, width = x.shape
    return _Pooling(batch, height, width, channels, _TYPES[x.dtype], torch.get_num_threads())


def _problem(shape: Shape, dtype: torch.dtype) -> _Problem:
    sizes = (shape.batch, shape.height, shape.width, shape.hidden, shape.channels, shape.vertical, shape.horizontal)
    return _Problem(*sizes, _TYPES[dtype], torch.get_num_threads())


def _norm_problem(x: Tensor, normed: Tensor, epsilon: float) -> _NormProblem:
    channels = x.shape[-1]
    tokens = x.numel() // channels
    sizes = (tokens, channels, max(1, tokens // len(x)))
    return _NormProblem(*sizes, _TYPES[x.dtype], _TYPES[normed.dtype], torch.get_num_threads(), epsilon)


def _batch_norm_problem(x: Tensor, epsilon: float) -> _BatchNormProblem:
    channels = x.shape[1]
    return _BatchNormProblem(x.numel() // channels, channels, _TYPES[x.dtype], torch.get_num_threads(), epsilon)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def check_status(status: int) -> None:
    if status == 1:
        raise MemoryError("no memory for the working space of a kernel; make the batch smaller")
    assert status == 0, status


@cache
def kernels() -> dict[str, Kernel]:
    """The kernels that this processor can run, the fastest last.

    Raises:
        Unavailable: The package was installed without kernels, or they do not load.
    """
    if not PATH.exists():
        raise Unavailable(
            "sequencer2d was installed without its CPU kernels, because there was no C++ compiler or "
            "SEQUENCER2D_NO_NATIVE was set; install g++ or clang and reinstall sequencer2d, or use backend='torch'"
        )
    _expose_openmp()
    try:
        library = ctypes.CDLL(str(PATH))
    except OSError as error:
        raise Unavailable(f"{PATH} does not load ({error}); reinstall sequencer2d, or use backend='torch'") from error
    if library.sequencer2d_abi() != _ABI:
        raise Unavailable(f"{PATH} is of another version of sequencer2d; reinstall it, or use backend='torch'")
    library.sequencer2d_kernel_name.restype = ctypes.c_char_p
    library.sequencer2d_packed_bytes.restype = ctypes.c_int64
    integer, address = ctypes.c_int, ctypes.c_void_p
    library.sequencer2d_gelu.argtypes = [integer, integer, integer, ctypes.c_int64, *4 * [address]]
    library.sequencer2d_pack.argtypes = [integer, address, integer, *3 * [address]]
    library.sequencer2d_pack_convolution.argtypes = [integer, address, integer, *2 * [address]]
    for name in ("convolve", "convolution_gradient", "pool", "pool_gradient"):
        getattr(library, f"sequencer2d_{name}").argtypes = [integer, *4 * [address]]
    found, number = {}, 0
    while name := library.sequencer2d_kernel_name(number):
        if library.sequencer2d_kernel_runs_here(number):
            found[name.decode()] = Kernel(name.decode(), number, library)
        number += 1
    return found


def _expose_openmp() -> None:
    """Makes the runtime that torch has loaded visible, where torch has not done so itself."""
    program = ctypes.CDLL(None)
    if not hasattr(program, "GOMP_parallel"):
        folder = Path(torch.__file__).parent
        for path in sorted((*folder.glob("lib/lib*omp*.so*"), *folder.parent.glob("torch.libs/lib*omp*.so*"))):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


@cache
def kernel() -> Kernel:
    """The kernel that runs: the fastest, or the one that the environment variable names. Decided once.

    Raises:
        Unavailable: There are no kernels, or not that one.
    """
    found = kernels()
    name = os.environ.get(VARIABLE) or [*found][-1]
    if name not in found:
        raise Unavailable(f"{VARIABLE}={name}: the kernels that run on this processor are {', '.join(found)}")
    return found[name]


def available() -> bool:
    """Whether the kernels can run on this machine."""
    try:
        kernel()
    except Unavailable:
        return False
    return True


def has_threads() -> bool:
    """Whether the kernels have found torch's OpenMP runtime; else they run on one thread."""
    return bool(kernel().library.sequencer2d_has_threads())
