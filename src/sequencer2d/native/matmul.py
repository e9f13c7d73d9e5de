"""Matrix products by oneDNN, where PyTorch would leave them to another library.

In fp32 `F.linear` goes to MKL, which on AMD's processors reaches four fifths of what oneDNN does; in bf16 both are
oneDNN's, but `F.linear` asks for a less suitable primitive where matrices are narrow (docs/LOG.md has the table).
The operation is the one that PyTorch's compiler puts in the place of `F.linear`.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F


@cache
def _has_onednn(dtype: torch.dtype) -> bool:
    operations = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(operations, "_linear_pointwise")):
        return False
    if dtype == torch.bfloat16 and not operations._is_mkldnn_bf16_supported():
        return False
    try:
        operations._linear_pointwise(torch.ones(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype), None, "none", [], "")
    except RuntimeError:  # other arguments in this version, or built without it
        return False
    return True


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` without gradients, of contiguous `x` and any layout of `weight`, all of one dtype on the CPU."""
    if torch.backends.mkldnn.enabled and x.numel() and _has_onednn(x.dtype):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
