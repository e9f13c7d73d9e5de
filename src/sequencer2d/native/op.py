"""The operation `sequencer2d::bilstm2d`, as PyTorch's dispatcher, autograd, autocast and compilers know it.

Shapes: `B` batch, `H` rows, `W` columns, `C` channels, `D` hidden size, `R` directions in all: first those along
columns (down, up), then those along rows (right, left); `N = B·H·W` tokens. Gates are in PyTorch's order i, f, g, o.

The recurrence is the kernels', and so is the projection of the inputs, which then is neither stored nor rounded between
them. Only in fp32 without AVX-512 the projections of all directions are one matrix product of a library's.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sequencer2d.native.library import FP32_PROJECTIONS, Shape, kernel
from sequencer2d.native.matmul import linear, lstm_weight_gradients

KEPT = {torch.float32: torch.float32, torch.bfloat16: torch.float16}
"""What gates and cells are kept in for the gradient: of 16 bits, those that are most precise up to 1."""


def shape_of(x: Tensor, dtype: torch.dtype, directions: int, hidden: int, vertical: int) -> Shape:
    """Of a call with `[B, H, W, C]` tokens, computed in `dtype`."""
    B, H, W, C = x.shape
    channels = C if dtype == torch.bfloat16 or kernel().name in FP32_PROJECTIONS else 0
    return Shape(
        batch=B,
        height=H,
        width=W,
        hidden=hidden,
        vertical=vertical,
        horizontal=directions - vertical,
        channels=channels,
    )


def _checked_shape(x: Tensor, w_ih: Tensor, w_hh: Tensor, vertical: int, *others: Tensor) -> Shape:
    """Of a call whose tensors fit each other, as the kernels take them on trust.

    Raises:
        ValueError: They do not; of `others` only the dtype is looked at.
    """
    R, gates, D = w_hh.shape if w_hh.ndim == 3 else (0, 0, 0)
    if gates != 4 * D or x.ndim != 4 or w_ih.shape != (R * gates, x.shape[-1]):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, w_ih, w_hh))
        raise ValueError(f"x, w_ih and w_hh have shapes {shapes}; they must be [B, H, W, C], [R·4·D, C], [R, 4·D, D]")
    if not (0 <= vertical <= 2 and R > 0 and 0 <= R - vertical <= 2):
        raise ValueError(f"vertical={vertical} of {R} directions: each axis has at most 2")
    dtypes = {tensor.dtype for tensor in (x, w_ih, w_hh, *others)}
    if dtypes not in ({torch.float32}, {torch.bfloat16}):
        raise ValueError(f"tensors must all be fp32 or all bf16, not {', '.join(sorted(map(str, dtypes)))}")
    return shape_of(x, x.dtype, R, D, vertical)


def run_forward(
    x: Tensor, w_ih: Tensor | None, packed: Tensor, bias: Tensor, shape: Shape, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states `[B, H, W, R·D]`; gates `[N, R·4·D]` and cells `[N, R·D]` as `KEPT`, empty where they are not kept.

    `packed` are the weights as `Kernel.pack` leaves them for the forward pass; `w_ih` is used where the kernel
    does not project.
    """
    kept = KEPT[x.dtype]
    y = x.new_empty(*x.shape[:3], shape.directions * shape.hidden)
    if y.numel() == 0:
        return y, x.new_empty(0, dtype=kept), x.new_empty(0, dtype=kept)
    tokens = x.reshape(-1, x.shape[3])
    cells = y.new_empty(len(tokens), y.shape[3], dtype=kept) if keep else None
    if shape.channels:
        gates = y.new_empty(len(tokens), 4 * y.shape[3], dtype=kept) if keep else None
        kernel().forward(shape, packed, tokens.contiguous(), bias, gates, cells, y)
    else:
        assert w_ih is not None
        gates = linear(tokens, w_ih, bias)
        kernel().forward(shape, packed, None, None, gates, cells, y)
    if gates is None or cells is None:
        return y, x.new_empty(0, dtype=kept), x.new_empty(0, dtype=kept)
    return y, gates.view(kept), cells


@torch.library.custom_op("sequencer2d::bilstm2d", mutates_args=(), device_types="cpu")
def bilstm2d(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor, vertical: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """All LSTMs of a layer.

    Args:
        x: Tokens `[B, H, W, C]`, fp32 or bf16.
        w_ih: Input weights of all directions `[R·4·D, C]`.
        w_hh: Recurrent weights `[R, 4·D, D]`.
        bias: Sum of both biases `[R·4·D]`.
        vertical: How many of the directions run along columns.
        keep: Keep what the gradient needs.

    Returns:
        Hidden states `[B, H, W, R·D]`; gates and cells for the backward pass, empty where they are not kept.
    """
    shape = _checked_shape(x, w_ih, w_hh, vertical, bias)
    packed = kernel().pack(shape, w_ih.contiguous(), w_hh.contiguous(), backward=False)
    return run_forward(x, w_ih, packed, bias, shape, keep)


@bilstm2d.register_fake
def _(x: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor, vertical: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, H, W, _ = x.shape
    R, D = w_hh.shape[0], w_hh.shape[2]
    y = x.new_empty(B, H, W, R * D)
    sizes = ((B * H * W, R * 4 * D), (B * H * W, R * D)) if keep else (0, 0)
    gates, cells = (x.new_empty(size, dtype=KEPT[x.dtype]) for size in sizes)
    return y, gates, cells


@torch.library.custom_op("sequencer2d::bilstm2d_backward", mutates_args=(), device_types="cpu")
def bilstm2d_backward(
    grad_y: Tensor, x: Tensor, w_ih: Tensor, w_hh: Tensor, y: Tensor, gates: Tensor, cells: Tensor, vertical: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `x`, `w_ih`, `w_hh` and `bias`, from that of `y` and what `bilstm2d` kept."""
    shape = _checked_shape(x, w_ih, w_hh, vertical, grad_y, y)
    if y.numel() == 0:
        return x.new_zeros(x.shape), torch.zeros_like(w_ih), torch.zeros_like(w_hh), w_ih.new_zeros(w_ih.shape[0])
    fit = gates.shape == (y.numel() // y.shape[3], w_ih.shape[0]) and cells.numel() == y.numel()
    if not fit or {gates.dtype, cells.dtype} != {KEPT[x.dtype]} or grad_y.shape != y.shape:
        raise ValueError("gates and cells are not those that bilstm2d kept for this output (keep=True)")
    packed = kernel().pack(shape, None, w_hh.contiguous(), backward=True)
    grad_gates = torch.empty_like(gates, dtype=x.dtype)
    previous = y.new_empty(shape.directions, gates.shape[0], shape.hidden)  # hidden states that each step started from
    grad_bias = x.new_empty(w_ih.shape[0], dtype=torch.float32)
    kernel().backward(shape, packed, gates, cells, y, grad_y.contiguous(), grad_gates, previous, grad_bias)
    grad_w_ih, grad_w_hh = lstm_weight_gradients(grad_gates, x.reshape(-1, x.shape[3]), previous)
    return linear(grad_gates, w_ih.t()).reshape(x.shape), grad_w_ih, grad_w_hh, grad_bias.to(w_ih.dtype)


@bilstm2d_backward.register_fake
def _(
    grad_y: Tensor, x: Tensor, w_ih: Tensor, w_hh: Tensor, y: Tensor, gates: Tensor, cells: Tensor, vertical: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape)
    return grad_x, w_ih.new_empty(w_ih.shape), w_hh.new_empty(w_hh.shape), w_ih.new_empty(w_ih.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, w_ih, w_hh, _, vertical, keep = inputs
    y, gates, cells = output
    ctx.mark_non_differentiable(gates, cells)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w_ih, w_hh, y, gates, cells)
    ctx.vertical, ctx.keep = vertical, keep


def _backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return None, None, None, None, None, None
    if not ctx.keep:
        raise RuntimeError("sequencer2d::bilstm2d was called with keep=False, so it has no gradient; pass keep=True")
    x, w_ih, w_hh, y, gates, cells = ctx.saved_tensors
    gradients = torch.ops.sequencer2d.bilstm2d_backward(grad_y, x, w_ih, w_hh, y, gates, cells, ctx.vertical)
    return *gradients, None, None


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError("the CPU kernels have no second derivatives; call sequencer2d.set_backend(model, 'torch') first")


class _Once(torch.autograd.Function):
    """Hands gradients on, which have none of their own."""

    @staticmethod
    def forward(ctx: Any, gradients: Any, *of: Tensor | None) -> Any:  # type: ignore[override]
        return gradients

    backward = staticmethod(_no_double_backward)  # type: ignore[assignment]


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As PyTorch's, for the `backward` of a function of kernels, with an error that says what to do."""

    @wraps(backward)
    def checked(ctx: Any, *gradients: Tensor | None) -> Any:
        with torch.no_grad():
            results = backward(ctx, *gradients)
        return _Once.apply(results, *gradients) if torch.is_grad_enabled() else results

    return checked


bilstm2d.register_autograd(_backward, setup_context=_setup_context)
bilstm2d_backward.register_autograd(_no_double_backward)
bilstm2d.register_autocast("cpu", torch.bfloat16)


@register_flop_formula(torch.ops.sequencer2d.bilstm2d)
def _forward_flops(x: Any, w_ih: Any, w_hh: Any, *_: Any, **__: Any) -> int:
    B, H, W, C = x
    R, gates, D = w_hh
    return 2 * B * H * W * R * gates * (C + D)


@register_flop_formula(torch.ops.sequencer2d.bilstm2d_backward)
def _backward_flops(grad_y: Any, x: Any, w_ih: Any, w_hh: Any, *_: Any, **__: Any) -> int:
    return 2 * _forward_flops(x, w_ih, w_hh)
