"""The parameters of `nn.LSTM`s, brought together for one call; kept between calls where nothing is trained.

Shapes: `R` directions in all, `C` channels, `D` hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sequencer2d.native.library import Kernel, Shape

_NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
_SAMPLES = 32  # values of each parameter that are compared, or a few more


def parameters(rnn: nn.LSTM) -> list[tuple[Tensor, ...]]:
    """Input weights, recurrent weights and both biases of each direction.

    By attribute, as `nn.LSTM` reads them: what stands there need not be registered as a parameter.
    """
    suffixes = ("", "_reverse")[: 1 + rnn.bidirectional]
    return [tuple(getattr(rnn, name + suffix) for name in _NAMES) for suffix in suffixes]


def gather(rnns: Sequence[nn.LSTM], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Input weights `[R·4·D, C]`, recurrent weights `[R, 4·D, D]`, sum of both biases `[R·4·D]`; differentiable."""
    w_ih, w_hh, b_ih, b_hh = zip(*(group for rnn in rnns for group in parameters(rnn)), strict=True)
    bias = torch.cat(b_ih) + torch.cat(b_hh)
    return torch.cat(w_ih).to(dtype), torch.stack(w_hh).to(dtype), bias.to(dtype)


@dataclass(frozen=True)
class Packed:
    """Weights ready for the forward pass: cast, joined, and the recurrent ones in the kernel's order."""

    w_ih: Tensor
    packed: Tensor
    bias: Tensor


@dataclass(frozen=True)
class _Entry:
    key: tuple[object, ...]
    samples: Tensor
    storages: list[Tensor]  # kept alive, so that no other weights can come to lie at the same addresses
    weights: Packed


_cache: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()


def packed(rnns: Sequence[nn.LSTM], dtype: torch.dtype, kernel: Kernel, shape: Shape) -> Packed:
    """The weights of a layer for a call without gradients, from the last call where they are still the same.

    They are if all parameters lie where they did, have the same version, and the same values at some places: writing
    through `.data`, as some averages of weights do, leaves no trace in the version. Kept beside the module, not in it:
    neither copies nor state dicts nor pickles see it.
    """
    tensors = [tensor for rnn in rnns for group in parameters(rnn) for tensor in group]
    if any(tensor.is_inference() for tensor in tensors):  # these have no version
        return _pack(rnns, dtype, kernel, shape)
    places = tuple((tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors)
    key = (kernel.name, dtype, *rnns[1:], *places)
    samples = torch.cat([_sample(tensor) for tensor in tensors])
    entry = _cache.get(rnns[0])
    if entry is None or entry.key != key or not torch.equal(entry.samples, samples):
        storages = [tensor.detach() for tensor in tensors]
        entry = _Entry(key, samples, storages, _pack(rnns, dtype, kernel, shape))
        _cache[rnns[0]] = entry
    return entry.weights


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)]


def _pack(rnns: Sequence[nn.LSTM], dtype: torch.dtype, kernel: Kernel, shape: Shape) -> Packed:
    with torch.no_grad():
        w_ih, w_hh, bias = gather(rnns, dtype)
        return Packed(w_ih, kernel.pack(shape, w_hh, backward=False), bias)
