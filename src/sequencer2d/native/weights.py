"""Parameters as the kernels want them; kept between calls where nothing is trained.

Shapes: `R` directions in all, `C` channels, `D` hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sequencer2d.native import matmul
from sequencer2d.native.library import Kernel, Shape

T = TypeVar("T")
_NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
_SAMPLES = 4  # values of each parameter that are compared, or a few more; each may be far from the others in memory


def parameters(rnn: nn.LSTM) -> list[tuple[Tensor, ...]]:
    """Input weights, recurrent weights and both biases of each direction.

    By attribute, as `nn.LSTM` reads them: what stands there need not be registered as a parameter.
    """
    return [tuple(getattr(rnn, name) for name in direction) for direction in names(rnn.bidirectional)]


def names(bidirectional: bool) -> list[tuple[str, ...]]:
    """Of these parameters."""
    return [tuple(name + suffix for name in _NAMES) for suffix in ("", "_reverse")[: 1 + bidirectional]]


def gather(rnns: Sequence[nn.LSTM], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Input weights `[R·4·D, C]`, recurrent weights `[R, 4·D, D]`, sum of both biases `[R·4·D]`; differentiable."""
    w_ih, w_hh, b_ih, b_hh = zip(*(group for rnn in rnns for group in parameters(rnn)), strict=True)
    bias = torch.cat(b_ih) + torch.cat(b_hh)
    joined_ih = torch.cat([weight.to(dtype) for weight in w_ih])  # cast first: the gradients then need no copy more
    return joined_ih, torch.stack([weight.to(dtype) for weight in w_hh]), bias.to(dtype)


@dataclass(frozen=True)
class Packed:
    """Weights ready for the forward pass: cast, joined, and those that the kernel reads in its order."""

    w_ih: Tensor | None
    packed: Tensor
    bias: Tensor


def packed(
    rnns: Sequence[nn.LSTM], tensors: Sequence[Tensor], dtype: torch.dtype, kernel: Kernel, shape: Shape
) -> Packed:
    """The weights of a layer for a call without gradients; `tensors` are all `parameters` of its LSTMs."""
    key = (kernel.name, dtype)
    return kept(rnns[0], tensors, key, lambda: pack(rnns, dtype, kernel, shape))


def ready(linear: nn.Module, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer as `matmul.linear` likes them best, for a call without gradients."""
    return kept(linear, [weight, bias], (dtype,), lambda: (matmul.reordered(weight.to(dtype)), bias.to(dtype)))


@dataclass(frozen=True)
class _Entry:
    key: tuple[object, ...]
    views: list[Tensor]  # of some values; they keep the memory alive, so that no other weights can come to lie there
    samples: Tensor
    made: Any


_cache: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()


def kept(module: nn.Module, tensors: Sequence[Tensor], key: tuple[object, ...], make: Callable[[], T]) -> T:
    """What was made from the parameters of a module at the last call, where they are still the same.

    They are if all parameters lie where they did, have the same shape and version, and the same values at some places:
    writing through `.data`, as some averages of weights do, leaves no trace in the version. Kept beside the module, not
    in it: neither copies nor state dicts nor pickles see it.
    """
    # lists, as these lines run 18 times for each parameter of an image, and generators take half as long again
    if any([tensor.is_inference() for tensor in tensors]):  # noqa: C419 - these have no version
        with torch.no_grad():
            return make()
    key = (
        *key,
        *[(tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors],
    )
    entry = _cache.get(module)
    if entry is None or entry.key != key or not torch.equal(entry.samples, torch.cat(entry.views)):
        with torch.no_grad():
            views = [_sample(tensor) for tensor in tensors]
            entry = _Entry(key, views, torch.cat(views), make())
        _cache[module] = entry
    return entry.made


def _sample(tensor: Tensor) -> Tensor:
    """A view of some values, which are those of the tensor as long as it lies where it does."""
    values = tensor.detach()
    if values.dim() > 1:
        values = values.view(-1) if values.is_contiguous() else values.select(-1, 0)
    return values[:: max(1, len(values) // _SAMPLES)]


def pack(rnns: Sequence[nn.LSTM], dtype: torch.dtype, kernel: Kernel, shape: Shape) -> Packed:
    w_ih, w_hh, bias = gather(rnns, dtype)
    packed = kernel.pack(shape, w_ih, w_hh, backward=False)
    return Packed(None if shape.channels else matmul.reordered(w_ih), packed, bias)
