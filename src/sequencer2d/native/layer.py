"""What the model calls: all LSTMs of a mixer over a feature map, in one operation."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sequencer2d.native import op, weights
from sequencer2d.native.choice import computing_dtype, is_plain
from sequencer2d.native.library import kernel


def bilstm2d(
    x: Float[Tensor, "B H W C"], rnn_v: nn.RNNBase | None, rnn_h: nn.RNNBase | None
) -> Float[Tensor, "B H W D"]:
    """Runs one LSTM over every column and another over every row, each in one direction or both.

    Under autocast to bf16, and for bf16 tensors with bf16 weights, the arithmetic is bf16 with sums and cells in fp32.

    Example: `bilstm2d(torch.randn(2, 8, 8, 192), layer.rnn_v, layer.rnn_h).shape == (2, 8, 8, 192)`

    Args:
        x: Tokens of any memory layout, on the CPU, fp32 or bf16; `serves` says whether they are for these kernels.
        rnn_v: The columns' LSTM of one layer with biases, or None.
        rnn_h: The rows' LSTM, or None; of the same hidden size.

    Returns:
        Hidden states `[B, H, W, R·D]`: down, up, right, left, as far as they exist.

    Raises:
        TypeError: A layer is no LSTM.
        Unavailable: There are no kernels here.
    """
    rnns = [rnn for rnn in (rnn_v, rnn_h) if isinstance(rnn, nn.LSTM)]
    if len(rnns) != (rnn_v is not None) + (rnn_h is not None) or not rnns:
        raise TypeError(f"the kernels are for nn.LSTM, not {type(rnn_v).__name__} and {type(rnn_h).__name__}")
    dtype = computing_dtype(x)
    vertical = 0 if rnn_v is None else 1 + rnn_v.bidirectional
    parameters = [tensor for rnn in rnns for group in weights.parameters(rnn) for tensor in group]
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *parameters))
    if trains or torch.compiler.is_compiling() or not is_plain(x, *parameters):
        w_ih, w_hh, bias = weights.gather(rnns, dtype)
        return torch.ops.sequencer2d.bilstm2d(x.to(dtype), w_ih, w_hh, bias, vertical, trains)[0]
    directions = sum(1 + rnn.bidirectional for rnn in rnns)
    shape = op.shape_of(x, dtype, directions, rnns[0].hidden_size, vertical)
    ready = weights.packed(rnns, parameters, dtype, kernel(), shape)
    return op.run_forward(x.detach().to(dtype), ready.w_ih, ready.packed, ready.bias, shape, keep=False)[0]
