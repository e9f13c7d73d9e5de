"""Matrix products by oneDNN, where PyTorch would leave them to another library.

In fp32 `F.linear` goes to MKL, which on AMD's processors reaches four fifths of what oneDNN does; in bf16 both are
oneDNN's, but `F.linear` asks for a less suitable primitive where matrices are narrow (docs/LOG.md has the table).
The operation is the one that PyTorch's compiler puts in the place of `F.linear`.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from sequencer2d.native.library import WEIGHT_GRADIENTS, kernel


@cache
def _has_onednn(dtype: torch.dtype) -> bool:
    operations = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(operations, "_linear_pointwise")):
        return False
    if dtype == torch.bfloat16 and not operations._is_mkldnn_bf16_supported():
        return False
    one = torch.ones(1, 1, dtype=dtype)
    try:
        operations._linear_pointwise(one, operations._reorder_linear_weight(one), None, "none", [], "")
    except RuntimeError:  # other arguments in this version, or built without it
        return False
    return True


def reordered(weight: Tensor) -> Tensor:
    """A weight `[outputs, inputs]` as oneDNN would bring it into order at every call of `linear`; opaque to others."""
    if torch.backends.mkldnn.enabled and _has_onednn(weight.dtype):
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` without gradients, all of one dtype on the CPU; `weight` as it is, transposed, or `reordered`."""
    if weight.is_mkldnn or (torch.backends.mkldnn.enabled and x.numel() and _has_onednn(x.dtype)):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype, *, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    """Gradients of a linear layer's weight and bias, from its output's `[N, outputs]` and its input `[N, inputs]`.

    In bf16 by our kernel where that is faster, on few threads; its sums are fp32, and stay so where `dtype` is.
    """
    outputs, inputs = grad.shape[1], x.shape[1]
    if not (inputs <= (576 if outputs <= 192 else 384) and _is_ours(grad, x)):
        return (grad.t() @ x).to(dtype), grad.sum(0).to(dtype) if bias else None
    weight = x.new_empty(outputs, inputs, dtype=torch.float32)
    of_bias = x.new_empty(outputs, dtype=torch.float32) if bias else None
    kernel().weight_gradient(_with_rows(grad), _with_rows(x), weight, of_bias)
    return weight.to(dtype), None if of_bias is None else of_bias.to(dtype)


def lstm_weight_gradients(grad: Tensor, x: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weights `[R·4·D, C]` and `[R, 4·D, D]`: of the inputs, and of the hidden states of each direction.

    From the gates' gradient `[N, R·4·D]`, tokens `[N, C]`, and hidden states that steps started from, `[R, N, D]`.
    """
    R, _, D = previous.shape
    if not _is_ours(grad, x):
        by_direction = zip(grad.chunk(R, dim=1), previous, strict=True)
        return grad.t() @ x, torch.stack([of_gates.t() @ hidden for of_gates, hidden in by_direction])
    w_ih = x.new_empty(grad.shape[1], x.shape[1], dtype=torch.float32)
    w_hh = x.new_empty(R, grad.shape[1] // R, D, dtype=torch.float32)
    kernel().weight_gradient(_with_rows(grad), _with_rows(x), w_ih, None, previous, w_hh)
    return w_ih.to(x.dtype), w_hh.to(x.dtype)


def _with_rows(matrix: Tensor) -> Tensor:
    """The same with the values of a row side by side, as kernels take them; a sum's gradient is one value expanded."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _is_ours(grad: Tensor, x: Tensor) -> bool:
    """Whether our kernel makes gradients of weights of this dtype, and has a part of them for every thread."""
    tokens, outputs = grad.shape
    # As weight_gradient.h parts the work: tokens by 2048 into at most 8 parts, outputs by 96.
    enough = outputs * max(1, min(8, tokens // 2048)) >= 96 * torch.get_num_threads()
    return enough and x.dtype == torch.bfloat16 and kernel().name in WEIGHT_GRADIENTS
