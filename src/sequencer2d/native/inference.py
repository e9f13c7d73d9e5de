"""A whole block where nothing is trained: what its parts ask of themselves one by one is asked once.

At batch 1 these questions take longer than the kernels of a small grid. The arithmetic is that of `layer` and `block`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from sequencer2d.native import matmul, op, weights
from sequencer2d.native.block import DROP_PATHS, TYPES, as_floats, run_norm
from sequencer2d.native.choice import computing_dtype, is_plain, is_unobserved, ready
from sequencer2d.native.library import Shape, kernel

_OF_BLOCK = itemgetter("norm1", "rnn_tokens", "norm2", "mlp_channels", "drop_path")
_OF_MIXER = itemgetter("rnn_v", "rnn_h", "fc")
_OF_MLP = itemgetter("fc1", "act", "drop1", "norm", "fc2", "drop2")
_OF_LAYER = itemgetter("weight", "bias")
_OF_LSTM = tuple(itemgetter(*sum(weights.names(bidirectional), ())) for bidirectional in (False, True))


@dataclass(frozen=True)
class _Block:
    """Parameters in the order and precision that the kernels want."""

    channels: int
    norms: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
    lstms: weights.Packed
    fc: tuple[Tensor, Tensor]
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]


def infer_block(block: nn.Module, x: Tensor, mixes: Callable[..., Tensor]) -> Tensor | None:
    """What a `Sequencer2DBlock` makes of `[B, H, W, C]`; None where its parts must be asked, such as in training.

    Args:
        block: With modules of these names; of any kind, which is looked at here.
        x: Its input.
        mixes: The `forward` of mixers whose LSTMs and linear layer are computed here.
    """
    backend: str = block.backend  # type: ignore[assignment]
    if torch.is_grad_enabled() or not ready(backend) or not is_plain(x) or not x.is_contiguous() or not x.numel():
        return None
    try:
        norm1, mixer, norm2, mlp, drop_path = _OF_BLOCK(block._modules)
        rnn_v, rnn_h, fc = _OF_MIXER(mixer._modules)
        fc1, act, drop1, identity, fc2, drop2 = _OF_MLP(mlp._modules)
        bidirectional = rnn_v.bidirectional
        tensors = (
            *_OF_LSTM[bidirectional](rnn_v._parameters),
            *_OF_LSTM[bidirectional](rnn_h._parameters),
            *(tensor for layer in (norm1, norm2, fc, fc1, fc2) for tensor in _OF_LAYER(layer._parameters)),
        )
    except (KeyError, AttributeError):  # other parts, or parameters that are computed from others
        return None
    plain = (norm1, norm2, rnn_v, rnn_h, fc, mlp, fc1, act, drop1, identity, fc2, drop2)
    dtype = computing_dtype(x)
    parameter_dtypes = {tensor.dtype if tensor is not None else None for tensor in tensors}
    parameter_dtype = parameter_dtypes.pop()
    if not (
        tuple([type(part) for part in plain]) == _TYPES_OF_PLAIN
        and type(mixer).forward is mixes
        and mixer.backend == backend
        and rnn_v.num_layers == rnn_h.num_layers == 1
        and not (rnn_v.proj_size or rnn_h.proj_size)
        and rnn_v.batch_first
        and rnn_h.batch_first
        and rnn_h.bidirectional == bidirectional
        and act.approximate == "none"
        and type(drop_path) in DROP_PATHS
        and not (drop_path.training and type(drop_path) is DropPath)
        and not (drop1.training and drop1.p)
        and not (drop2.training and drop2.p)
        and not parameter_dtypes
        and (parameter_dtype, dtype) in TYPES
        and (x.dtype, dtype) in TYPES
        and (parameter_dtype == x.dtype or torch.is_autocast_enabled("cpu"))
        and is_plain(*tensors)
        and is_unobserved(mixer, drop_path, *plain)
    ):
        return None
    hidden_size, axis = rnn_v.hidden_size, 1 + bidirectional
    shape = op.shape_of(x, dtype, 2 * axis, hidden_size, axis)
    made = weights.kept(
        block, tensors, (kernel().name, dtype), lambda: _prepare(tensors, [rnn_v, rnn_h], [fc, fc1, fc2], dtype, shape)
    )
    if made is None or made.channels != x.shape[-1]:
        return None
    _, normed = run_norm(x, None, None, *made.norms[0], norm1.eps, dtype, None)
    lstms = made.lstms
    hidden, _, _ = op.run_forward(normed, lstms.w_ih, lstms.packed, lstms.bias, shape, keep=False)
    x, normed = run_norm(x, matmul.linear(hidden, *made.fc), None, *made.norms[1], norm2.eps, dtype, None)
    inner = matmul.linear(normed, *made.fc1)
    kernel().gelu(inner, inner)
    return x.add_(matmul.linear(inner, *made.fc2))


_TYPES_OF_PLAIN = (
    *(nn.LayerNorm, nn.LayerNorm, nn.LSTM, nn.LSTM, nn.Linear),
    *(Mlp, nn.Linear, nn.GELU, nn.Dropout, nn.Identity, nn.Linear, nn.Dropout),
)


def has_plain_parts(block: Any) -> bool:
    """Whether a `Sequencer2DBlock` of `BiLSTM2D` consists of what it was made of, and nobody looks into it."""
    mixer, mlp = block.rnn_tokens, block.mlp_channels
    parts = (block.norm1, block.norm2, mixer.rnn_v, mixer.rnn_h, mixer.fc, mlp)
    if tuple(map(type, parts)) != _TYPES_OF_PLAIN[:6]:
        return False
    inner = (mlp.fc1, mlp.act, mlp.drop1, mlp.norm, mlp.fc2, mlp.drop2)
    return (
        tuple(map(type, inner)) == _TYPES_OF_PLAIN[6:]
        and mlp.act.approximate == "none"
        and type(block.drop_path) in DROP_PATHS
        and all(map(_is_plain_lstm, (mixer.rnn_v, mixer.rnn_h)))
        and mixer.rnn_v.hidden_size == mixer.rnn_h.hidden_size
        and block.norm1.eps == block.norm2.eps
        and all(value is not None for norm in (block.norm1, block.norm2) for value in (norm.weight, norm.bias))
        and is_unobserved(block, mixer, block.drop_path, *parts, *inner)
    )


def _is_plain_lstm(rnn: nn.LSTM) -> bool:
    return rnn.bias and rnn.batch_first and rnn.bidirectional and rnn.num_layers == 1 and not rnn.proj_size


def _prepare(
    tensors: tuple[Tensor, ...], rnns: list[nn.LSTM], linears: list[Any], dtype: torch.dtype, shape: Shape
) -> _Block | None:
    """None where the sizes of the parts do not fit each other: whoever runs them will say so."""
    fc, fc1, fc2 = linears
    norm1, norm2 = tensors[-10:-8], tensors[-8:-6]
    C = fc.out_features
    hidden = {rnn.hidden_size for rnn in rnns}
    fits = (
        {tuple(tensor.shape) for tensor in (*norm1, *norm2)} == {(C,)}
        and {rnn.input_size for rnn in rnns} == {C}
        and len(hidden) == 1
        and fc.in_features == shape.directions * shape.hidden
        and fc1.in_features == fc2.out_features == C
        and fc1.out_features == fc2.in_features
    )
    if not fits:
        return None
    return _Block(
        C,
        ((as_floats(norm1[0]), as_floats(norm1[1])), (as_floats(norm2[0]), as_floats(norm2[1]))),
        weights.pack(rnns, dtype, kernel(), shape),
        *((matmul.reordered(layer.weight.to(dtype)), layer.bias.to(dtype)) for layer in linears),
    )
