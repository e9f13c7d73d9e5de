"""The linear layers of a block in bytes, on the kernels of `kernels/int8.h`.

Shapes: `N` tokens, `C` channels of the block, `K` inputs and `M` outputs of a layer.
"""

import ctypes
from collections.abc import Callable

import torch
from jaxtyping import BFloat16, Float, Int8
from torch import Tensor, nn

from sequencer2d.native.library import Kernel, check_status, kernel

VNNI = ("avx512_bf16",)
"""Kernels that multiply bytes with the instructions made for it."""


class _Affine(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("scale", "shift")]


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
    ]


class _Project(ctypes.Structure):
    _fields_ = [
        ("tokens", ctypes.c_int64),
        ("threads", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("x", ctypes.c_void_p),
        ("norm", _Affine),
        ("linear", _Linear),
        ("gates", ctypes.c_void_p),
    ]


class _Finish(ctypes.Structure):
    _fields_ = [
        ("tokens", ctypes.c_int64),
        ("threads", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("hidden", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("states", _Affine),
        ("fc", _Linear),
        ("norm", _Affine),
        ("fc1", _Linear),
        ("active", _Affine),
        ("fc2", _Linear),
    ]


class Packed:
    """Weights in a kernel's order: made at the first call, and anew where they or the kernel have become others."""

    def __init__(self) -> None:
        self._kept: tuple[str, Tensor, tuple[int, int | None], Tensor] | None = None

    def __getstate__(self) -> dict[str, None]:
        """Copies and pickles begin anew."""
        return {"_kept": None}

    def of(self, weight: Tensor, by: Kernel, make: Callable[[], Tensor]) -> Tensor:
        """Whoever calls holds it until the kernel is done: other threads may put another in its place."""
        version = (weight.data_ptr(), None if weight.is_inference() else weight._version)
        kept = self._kept
        if kept is None or kept[0] != by.name or kept[1] is not weight or kept[2] != version:
            kept = self._kept = (by.name, weight, version, make())
        return kept[3]


class Affine(nn.Module):
    """How values become bytes, channel by channel: `round(scale · x + shift)`, within 0 and 255."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Float[Tensor, "K"], shift: Float[Tensor, "K"]) -> None:
        super().__init__()
        self.register_buffer("scale", scale.float().contiguous())
        self.register_buffer("shift", shift.float().contiguous())

    def pointers(self) -> _Affine:
        """For the kernels; valid as long as this is."""
        return _Affine(self.scale.data_ptr(), self.shift.data_ptr())


class Int8Linear(nn.Module):
    """`y = scale · (weight @ bytes) + bias`: what scale and zero of the bytes are is part of scale and bias."""

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, weight: Int8[Tensor, "M K"], scale: Float[Tensor, "M"], bias: Float[Tensor, "M"]) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("scale", scale.float().contiguous())
        self.register_buffer("bias", bias.float().contiguous())
        self._packed = Packed()

    def packed(self, by: Kernel) -> Int8[Tensor, "P"]:
        """The weights in the order of a kernel."""
        return self._packed.of(self.weight, by, lambda: pack(self.weight, by))

    def pointers(self, packed: Int8[Tensor, "P"]) -> _Linear:
        """For the kernels; valid as long as this and its `packed` weights are."""
        M, K = self.weight.shape
        return _Linear(packed.data_ptr(), self.scale.data_ptr(), self.bias.data_ptr(), K, M)


def pack(weight: Int8[Tensor, "M K"], by: Kernel) -> Int8[Tensor, "P"]:
    """Weights in the order in which a kernel's product reads them."""
    M, K = weight.shape
    packed_bytes = by.library.sequencer2d_packed_int8_bytes
    packed_bytes.restype = ctypes.c_int64
    sizes = (ctypes.c_int(by.number), ctypes.c_int64(K), ctypes.c_int64(M))
    packed = torch.empty(packed_bytes(*sizes), dtype=torch.int8, device="cpu")
    pointers = (ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(packed.data_ptr()))
    check_status(by.library.sequencer2d_pack_int8(*sizes, *pointers))
    return packed


def project(
    x: Float[Tensor, "N C"], norm: Affine, linear: Int8Linear, eps: float, gates: BFloat16[Tensor, "N M"]
) -> None:
    """`gates = linear(layer_norm(x))`; `norm` is the affine map of the norm, on to bytes.

    All tensors are contiguous and on the CPU; `x` is fp32.
    """
    now = kernel()
    weights = linear.packed(now)
    arguments = _Project(
        tokens=x.shape[0],
        threads=torch.get_num_threads(),
        eps=eps,
        x=x.data_ptr(),
        norm=norm.pointers(),
        linear=linear.pointers(weights),
        gates=gates.data_ptr(),
    )
    check_status(now.library.sequencer2d_int8_project(now.number, ctypes.byref(arguments)))


def finish(
    hidden: BFloat16[Tensor, "N K"],
    x: Float[Tensor, "N C"],
    states: Affine,
    fc: Int8Linear,
    norm: Affine,
    fc1: Int8Linear,
    active: Affine,
    fc2: Int8Linear,
    eps: float,
) -> None:
    """`x += fc(hidden)`, then `x += fc2(gelu(fc1(layer_norm(x))))`, in place.

    `states`, `norm` and `active` turn into bytes what the three linear layers take. All tensors are contiguous and on
    the CPU; `x` is fp32.
    """
    now = kernel()
    weights = [layer.packed(now) for layer in (fc, fc1, fc2)]
    arguments = _Finish(
        tokens=x.shape[0],
        threads=torch.get_num_threads(),
        eps=eps,
        hidden=hidden.data_ptr(),
        x=x.data_ptr(),
        states=states.pointers(),
        fc=fc.pointers(weights[0]),
        norm=norm.pointers(),
        fc1=fc1.pointers(weights[1]),
        active=active.pointers(),
        fc2=fc2.pointers(weights[2]),
    )
    check_status(now.library.sequencer2d_int8_finish(now.number, ctypes.byref(arguments)))
