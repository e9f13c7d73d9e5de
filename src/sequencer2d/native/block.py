"""What stands around the LSTMs in a block, in few passes over the tokens: residual sum with layer norm, and the MLP.

Shapes: `N` tokens `[B, H, W]`, `C` channels. What leaves a norm is in autocast's precision, whatever that of the
residual stream, so no casts are left. For eager execution on the CPU; everybody else gets PyTorch's own layers,
and compilers fuse those themselves.
"""

from typing import Any

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from sequencer2d.native import matmul, weights
from sequencer2d.native.choice import computing_dtype, is_plain, is_unobserved, ready
from sequencer2d.native.library import kernel
from sequencer2d.native.op import once_differentiable

DROP_PATHS = (nn.Identity, DropPath)
"""What the kernels know to do in the place of `drop_path`."""


def residual_norm(
    x: Tensor, branch: Tensor | None, drop_path: nn.Module, norm: nn.Module, backend: str
) -> tuple[Tensor, Tensor]:
    """`x + drop_path(branch)`, or `x` where there is no branch, and its layer norm.

    Args:
        x: The residual stream `[B, H, W, C]`.
        branch: What is added to it, of the same shape.
        drop_path: timm's `DropPath`, or an identity; draws the random numbers that it would.
        norm: A `LayerNorm` over the channels.
        backend: As of the model; `torch` calls the modules as they are.
    """
    tensors = [x] if branch is None else [x, branch]
    dtype = computing_dtype(x)
    if not (
        ready(backend)
        and is_unobserved(norm, drop_path)
        and type(norm) is nn.LayerNorm
        and (bias := norm.bias) is not None
        and is_plain(*tensors, weight := norm.weight, bias)
        and norm.normalized_shape == weight.shape == bias.shape == x.shape[-1:]
        and (x.dtype, dtype) in TYPES
        and all(tensor.is_contiguous() and tensor.shape == x.shape for tensor in tensors)
        and (branch is None or (branch.dtype == dtype and type(drop_path) in DROP_PATHS))
        and x.numel() > 0
    ):
        x = x if branch is None else x + drop_path(branch)
        return x, norm(x)
    scale = None
    if branch is not None and drop_path.training and not isinstance(drop_path, nn.Identity):
        scale = drop_path(branch.new_ones(len(branch), 1, 1, 1)).float()
    if torch.is_grad_enabled():
        return _ResidualNorm.apply(x, branch, scale, weight, bias, norm.eps, dtype)  # type: ignore[return-value]
    return run_norm(x, branch, scale, as_floats(weight), as_floats(bias), norm.eps, dtype, None)


def mlp(module: Any, x: Tensor, backend: str) -> Tensor:
    """timm's `Mlp` of `[B, H, W, C]`, whose hidden activations are not kept for the gradient but computed again."""
    parameters = _plain_parameters(module, x) if ready(backend) and type(module) is Mlp else None
    dtype = computing_dtype(x)
    if parameters is None or dtype not in (torch.float32, torch.bfloat16):
        return module(x)
    w1, b1, w2, b2 = parameters
    if (w1.dtype, w2.dtype) != (b1.dtype, b2.dtype) or not {w1.dtype, w2.dtype} <= {dtype, torch.float32}:
        return module(x)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *parameters)):
        return _Mlp.apply(x.to(dtype), *parameters)  # type: ignore[return-value]
    hidden = matmul.linear(x.detach().to(dtype), *weights.ready(module.fc1, w1, b1, dtype))
    kernel().gelu(hidden, hidden)
    return matmul.linear(hidden, *weights.ready(module.fc2, w2, b2, dtype))


def _plain_parameters(module: Mlp, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Weights and biases of an MLP that computes what the kernels do, and into which nobody looks; else None.

    Every module and parameter is looked up once: `nn.Module` takes longer over it than all checks together.
    """
    parts = (module.fc1, module.act, module.drop1, module.norm, module.fc2, module.drop2)
    fc1, act, drop1, norm, fc2, drop2 = parts
    if not (
        is_unobserved(module, *parts)
        and type(fc1) is nn.Linear
        and type(fc2) is nn.Linear
        and type(act) is nn.GELU
        and act.approximate == "none"
        and type(norm) is nn.Identity
        and type(drop1) is type(drop2) is nn.Dropout
        and not (drop1.training and drop1.p)
        and not (drop2.training and drop2.p)
    ):
        return None
    w1, b1, w2, b2 = fc1.weight, fc1.bias, fc2.weight, fc2.bias
    return (w1, b1, w2, b2) if b1 is not None and b2 is not None and is_plain(x, w1, b1, w2, b2) else None


def linear(module: nn.Module, x: Tensor, backend: str) -> Tensor:
    """A linear layer; where nothing is trained, its weights in autocast's precision are kept between calls."""
    dtype = computing_dtype(x)
    if not (
        ready(backend)
        and type(module) is nn.Linear
        and (bias := module.bias) is not None
        and is_unobserved(module)
        and is_plain(x, weight := module.weight, bias)
        and weight.dtype == bias.dtype
        and (weight.dtype, dtype) in TYPES
    ):
        return module(x)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return _Linear.apply(x.to(dtype), weight, bias)  # type: ignore[return-value]
    return matmul.linear(x.detach().to(dtype), *weights.ready(module, weight, bias, dtype))


TYPES = {
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
}
"""What is stored, and what is computed in."""


def as_floats(parameter: Tensor) -> Tensor:
    """A norm's weight or bias as the kernels take it: fp32, number by number."""
    return parameter.float().contiguous()


def run_norm(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    dtype: torch.dtype,
    statistics: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sum and norm; fills `statistics`, one row per token, where they are given."""
    total = None if branch is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=dtype)
    kernel().norm_forward(x, branch, scale, weight, bias, epsilon, total, normed, statistics)
    return x if total is None else total, normed


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        scale: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        epsilon: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        trains = any(ctx.needs_input_grad)
        statistics = x.new_empty(x.numel() // x.shape[-1], 2, dtype=torch.float32) if trains else None
        parameters = (as_floats(weight), as_floats(bias))
        total, normed = run_norm(x, branch, scale, *parameters, epsilon, dtype, statistics)
        if trains:
            ctx.save_for_backward(total, statistics, parameters[0], scale)
            ctx.dtypes, ctx.has_branch = (dtype, weight.dtype), branch is not None
            ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad_sum: Tensor | None, grad_normed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        total, statistics, weight, scale = ctx.saved_tensors
        dtype, parameter_dtype = ctx.dtypes
        if grad_normed is None:
            grad_normed = torch.zeros_like(total, dtype=dtype)
        grad_x = torch.empty_like(total)
        grad_branch = torch.empty_like(total, dtype=dtype) if ctx.has_branch else None
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(weight)
        grad_sum = None if grad_sum is None else grad_sum.contiguous()
        inputs = (total, statistics, weight, scale, grad_normed.contiguous(), grad_sum)
        kernel().norm_backward(*inputs, grad_x, grad_branch, grad_weight, grad_bias)
        return grad_x, grad_branch, None, grad_weight.to(parameter_dtype), grad_bias.to(parameter_dtype), None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        ctx.parameter_dtype = weight.dtype
        return matmul.linear(x, cast, bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        of_parameters = _parameter_gradients(grad, x, ctx.parameter_dtype, *ctx.needs_input_grad[1:])
        return matmul.linear(grad, weight.t()).reshape(x.shape) if ctx.needs_input_grad[0] else None, *of_parameters


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
    ) -> Tensor:
        cast1, cast2 = w1.to(x.dtype), w2.to(x.dtype)
        before = matmul.linear(x, cast1, b1.to(x.dtype))
        hidden = torch.empty_like(before)
        kernel().gelu(before, hidden)
        ctx.save_for_backward(x, cast1, cast2, before)
        ctx.parameter_dtypes = (w1.dtype, w2.dtype)
        return matmul.linear(hidden, cast2, b2.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w1, w2, before = ctx.saved_tensors
        wants_x, wants_w1, wants_b1, wants_w2, wants_b2 = ctx.needs_input_grad
        grad = grad.reshape(-1, grad.shape[-1])
        grad_hidden = matmul.linear(grad, w2.t())
        hidden, grad_before = torch.empty_like(grad_hidden), torch.empty_like(grad_hidden)
        kernel().gelu(before, hidden, grad_hidden, grad_before)
        dtype1, dtype2 = ctx.parameter_dtypes
        of_first = _parameter_gradients(grad_before, x, dtype1, wants_w1, wants_b1)
        of_second = _parameter_gradients(grad, hidden, dtype2, wants_w2, wants_b2)
        grad_x = matmul.linear(grad_before, w1.t()).reshape(x.shape) if wants_x else None
        return grad_x, *of_first, *of_second


def _parameter_gradients(
    grad: Tensor, x: Tensor, dtype: torch.dtype, wants_weight: bool, wants_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a linear layer's weight and bias as far as they are wanted, of the parameters' dtype."""
    if not (wants_weight or wants_bias):
        return None, None
    of_weight, of_bias = matmul.weight_gradient(grad, x.reshape(-1, x.shape[-1]), dtype, bias=wants_bias)
    return of_weight if wants_weight else None, of_bias
