"""The convolutional stem where it is trained: 3×3 convolutions, pooling, batch norm with GELU; others get PyTorch's.

Convolutions in fp32 are the kernel's in inference, too.

Convolutions by Winograd's algorithm F(2×2, 3×3) (Lavin & Gray 2016, arXiv 1509.09308), which takes 4 multiplications
where the definition has 9. Its transforms are rounded to the images' type, so results differ from PyTorch's by
roundings.

Shapes: images `[B, C, H, W]`, channels-last in memory, of `C` channels in and `K` out.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sequencer2d.native.choice import computing_dtype, is_plain, is_unobserved, ready
from sequencer2d.native.library import CONVOLUTIONS, POOLINGS, kernel
from sequencer2d.native.op import once_differentiable

DTYPES = (torch.float32, torch.bfloat16)
"""Of images that are pooled and normed by the kernel."""

CHANNELS = 64
"""Channels of a convolution are a multiple of it for the kernel."""

LEAST_PIXELS = 1024
"""Of a batch: for fewer, transforming the weights takes longer than multiplying less saves."""


def convolves(backend: str, x: Tensor, module: nn.Conv2d) -> bool:
    """Whether the kernel convolves these images by `module`; else it is for PyTorch."""
    return (
        _fits(backend, x, module.weight)
        and (computing_dtype(x) == torch.float32 or _trains(x, module.weight))
        and kernel().name in CONVOLUTIONS.get(computing_dtype(x), ())
        and module.weight.shape[1:] == (x.shape[1], 3, 3)
        and module.stride == module.padding == module.dilation == (1, 1)
        and module.groups == 1
        and module.bias is None
        and module.padding_mode == "zeros"
        and x.shape[1] % CHANNELS == len(module.weight) % CHANNELS == 0
        and x.shape[0] * x.shape[2] * x.shape[3] >= LEAST_PIXELS
    )


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """`[B, C, H, W]` by weights `[K, C, 3, 3]`, with a pixel of zeros around: `[B, K, H, W]`."""
    return _Convolution.apply(x.to(computing_dtype(x)), weight)  # type: ignore[return-value]


def pools(backend: str, x: Tensor, module: nn.MaxPool2d) -> bool:
    """Whether the kernel pools these images as `module` says; else it is for PyTorch."""
    return (
        _fits(backend, x)
        and _trains(x)
        and kernel().name in POOLINGS
        and x.dtype in DTYPES
        and (module.kernel_size, module.stride, module.padding, module.dilation) == (2, 2, 0, 1)
        and x.shape[1] % 16 == x.shape[2] % 2 == x.shape[3] % 2 == 0
    )


def max_pool(x: Tensor) -> Tensor:
    """The largest of 2×2 pixels: `[B, C, H, W]` to `[B, C, H/2, W/2]`."""
    return _MaxPool.apply(x)  # type: ignore[return-value]


def norms(backend: str, x: Tensor, norm: nn.Module, activation: nn.Module) -> bool:
    """Whether the kernel takes `activation(norm(x))` at once, batch norm and GELU; else they are for PyTorch."""
    return (
        type(norm) is nn.BatchNorm2d
        and type(activation) is nn.GELU
        and norm.affine
        and _fits(backend, x, norm.weight, norm.bias)
        and _trains(x, norm.weight, norm.bias)
        and x.dtype in DTYPES
        and norm.weight.shape == norm.bias.shape == (x.shape[1],)
        and x.shape[1] == norm.num_features < x.numel()
        and norm.weight.dtype == norm.bias.dtype == torch.float32
        and norm.training
        and norm.track_running_stats
        and norm.momentum is not None
        and activation.approximate == "none"
        and is_unobserved(norm, activation)
    )


def norm_gelu(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """GELU of the batch norm of `[B, C, H, W]`, of the same shape; the norm's running statistics follow."""
    statistics = torch.empty(2, norm.num_features, dtype=torch.float32, device="cpu")
    y = _NormGelu.apply(x, norm.weight, norm.bias, norm.eps, statistics)
    assert norm.num_batches_tracked is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    mean, variance = statistics
    pixels = x.numel() // norm.num_features
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance * (pixels / (pixels - 1)), norm.momentum)
    return y  # type: ignore[return-value]


def _fits(backend: str, x: Tensor, *parameters: Tensor) -> bool:
    """Whether kernels may run, on images that lie as they take them."""
    return (
        ready(backend)
        and is_plain(x, *parameters)
        and x.dim() == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _trains(*tensors: Tensor) -> bool:
    """Whether a gradient of any of these is wanted."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        y = _image(x, x.shape[0], len(weight), *x.shape[2:])
        kernel().convolve(weight.float().contiguous(), x, y)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _image(x, *x.shape)
            kernel().convolve(weight.float().contiguous(), grad, grad_x, backward=True)
        if ctx.needs_input_grad[1]:
            transformed = torch.empty(16, *weight.shape[:2], dtype=torch.float32, device="cpu")
            kernel().convolution_gradient(x, grad, transformed)
            taps = (_weight_transform().t() @ transformed.flatten(1)).view(3, 3, *weight.shape[:2])
            grad_weight = taps.permute(2, 3, 0, 1).to(weight.dtype).contiguous()
        return grad_x, grad_weight


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        B, C, H, W = x.shape
        y = _image(x, B, C, H // 2, W // 2)
        chosen = torch.empty_like(y, dtype=torch.uint8)
        kernel().pool(x, y, chosen)
        ctx.save_for_backward(chosen)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (chosen,) = ctx.saved_tensors
        B, C, H, W = chosen.shape
        grad_x = _image(grad, B, C, 2 * H, 2 * W)
        kernel().pool_gradient(grad.contiguous(memory_format=torch.channels_last), chosen, grad_x)
        return grad_x


class _NormGelu(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, statistics: Tensor
    ) -> Tensor:
        y = _image(x, *x.shape)
        weight, bias = weight.contiguous(), bias.contiguous()
        kernel().batch_norm_forward(x, weight, bias, epsilon, y, statistics)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.epsilon = epsilon
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, statistics = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grads = _image(x, *x.shape), torch.empty_like(weight), torch.empty_like(bias)
        kernel().batch_norm_backward(x, weight, bias, ctx.epsilon, statistics, grad, *grads)
        return *grads, None, None


def _image(like: Tensor, *size: int) -> Tensor:
    """An empty `[B, C, H, W]` of the same dtype, channels-last."""
    return torch.empty(size, dtype=like.dtype, device="cpu", memory_format=torch.channels_last)


@cache
def _weight_transform() -> Tensor:
    """`[16, 9]`: from 3×3 weights to the 4×4 of the algorithm, G ⊗ G."""
    rows = [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]
    G = torch.tensor(rows, dtype=torch.float32, device="cpu")
    return torch.kron(G, G)
