"""Convolutions and pooling of the stem are PyTorch's but for roundings, and stand aside where they do not fit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sequencer2d import create_model, set_backend
from sequencer2d.layers import Conv3x3, MaxPool2x2
from sequencer2d.native import available, stem
from sequencer2d.native.library import CONVOLUTIONS, POOLINGS, kernel

pytestmark = pytest.mark.skipif(not available(), reason="no kernels run here")


@pytest.fixture(autouse=True)
def small_batches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are for the kernel, too. Tests that name no kernel are of the one with bf16."""
    if "kernel_name" not in request.fixturenames and kernel().name not in POOLINGS:
        pytest.skip("no kernel for convolutions in bf16 and pooling runs here")
    monkeypatch.setattr(stem, "LEAST_PIXELS", 1)


def image(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """More above zero than below it, as after GELU."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(min=-0.2)
    return values.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def conv(inputs: int, outputs: int, backend: str = "native", **changes: Any) -> Conv3x3:
    torch.manual_seed(1)
    module = Conv3x3(inputs, outputs, **{"kernel_size": 3, "padding": 1, "bias": False, **changes})
    module.backend = backend
    return module


def grad_of(y: Tensor) -> Tensor:
    """What `run` takes as the gradient of its output."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)


def run(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of input and weights, in the image's type."""
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        y = module(x)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], grad_of(y))]


def is_ours(y: Tensor) -> bool:
    return type(y.grad_fn).__name__ in ("_ConvolutionBackward", "_MaxPoolBackward")


SHAPES = [
    ((2, 64, 4, 4), 64),
    ((1, 64, 5, 7), 128),  # tiles that reach beyond the image
    ((3, 128, 6, 3), 64),
    ((5, 64, 1, 2), 64),
    ((2, 192, 9, 8), 320),
    ((9, 64, 16, 16), 256),  # more tiles than are transformed at a time
]


def check_convolution(
    shape: tuple[int, ...], outputs: int, dtype: torch.dtype, times_usual: float, at_most: float
) -> None:
    """By its errors against doubles: they are of the size of PyTorch's."""
    x = image(*shape, dtype=dtype)
    ours, torchs = (run(conv(shape[1], outputs, backend), x) for backend in ("native", "torch"))
    assert is_ours(ours[0])
    assert not is_ours(torchs[0])
    exact = conv(shape[1], outputs, "torch").double()
    doubles = x.detach().double().requires_grad_()
    y = exact(doubles)
    truth = [y, *torch.autograd.grad(y, [doubles, *exact.parameters()], grad_of(ours[0]).double())]
    for mine, theirs, true in zip(ours, torchs, truth, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        error, usual = ((found.double() - true).norm() / true.norm() for found in (mine, theirs))
        assert error <= times_usual * usual
        assert error <= at_most


@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_convolution_is_nearly_as_exact_as_by_definition(shape: tuple[int, ...], outputs: int) -> None:
    check_convolution(shape, outputs, torch.bfloat16, 3, 0.006)


@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_fp32_convolution_is_nearly_as_exact_as_by_definition(
    kernel_name: str, shape: tuple[int, ...], outputs: int
) -> None:
    if kernel_name not in CONVOLUTIONS[torch.float32]:
        pytest.skip(f"{kernel_name} leaves convolutions to PyTorch")
    check_convolution(shape, outputs, torch.float32, 10, 3e-6)


@pytest.mark.parametrize("dtype", CONVOLUTIONS, ids=str)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    x, pool = image(9, 64, 18, 10, dtype=dtype), MaxPool2x2(2)
    results = []
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        try:
            results.append([*run(conv(64, 128), x), *run(pool, x)])
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_an_expanded_gradient_is_taken() -> None:
    """Of a sum, whose gradient is one value with strides of 0."""
    x = image(1, 64, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        (of_sum,) = torch.autograd.grad(conv(64, 64)(MaxPool2x2(2)(x)).sum(), x)
        (of_ones,) = torch.autograd.grad((conv(64, 64)(MaxPool2x2(2)(x)) * torch.ones(1, 64, 2, 2)).sum(), x)
    assert torch.equal(of_sum, of_ones)


def test_pooling_is_the_same_to_the_bit() -> None:
    """With equal values, infinities, and NaNs, of which the last wins."""
    x = (2 * image(3, 32, 6, 8)).round().detach()
    x[0, 0, 0, 0] = x[1, 3, 1, 1] = x[1, 4, 0, 0] = torch.nan
    x[1, 4, 0, 1], x[2, 5], x[2, 6, 1, 1] = 9, -torch.inf, torch.inf
    x.requires_grad_()
    ours, torchs = MaxPool2x2(2), MaxPool2x2(2)
    torchs.backend = "torch"
    (y, grad), (other, other_grad) = run(ours, x), run(torchs, x)
    assert is_ours(y)
    assert not is_ours(other)
    assert y.isnan().sum() == 3
    assert torch.equal(y.nan_to_num(1e9), other.nan_to_num(1e9))
    assert torch.equal(grad, other_grad)


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel_size": 1, "padding": 0}, {"stride": 2}, {"padding": 0}, {"dilation": 2}, {"groups": 2}, {"bias": True},
        {"padding_mode": "reflect"}, {"padding": "same"},
    ],
    ids=str,
)  # fmt: skip
def test_other_convolutions_are_pytorchs(changes: dict[str, Any]) -> None:
    module = conv(64, 64, **changes)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(image(2, 64, 8, 8))
        assert not is_ours(y)
        assert torch.equal(y, nn.Conv2d.forward(module, image(2, 64, 8, 8)))


def in_autocast(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


UNFIT: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "fp64": lambda layer, x: layer.double()(x.double()),
    "channels-first": lambda layer, x: in_autocast(layer, x.contiguous()),
    "no gradient": lambda layer, x: torch.no_grad()(in_autocast)(layer, x),
    "no batch": lambda layer, x: in_autocast(layer, x[0]),
    "other channels": lambda layer, x: in_autocast(
        conv(24, 64) if isinstance(layer, Conv3x3) else layer,
        x[:, :24].contiguous(memory_format=torch.channels_last),
    ),
}


@pytest.mark.parametrize("case", UNFIT)
@pytest.mark.parametrize("layer", ["convolution", "pooling"])
def test_what_does_not_fit_is_pytorchs(layer: str, case: str) -> None:
    made = conv(64, 64) if layer == "convolution" else MaxPool2x2(2)
    y = UNFIT[case](made, image(2, 64, 8, 8))
    assert not is_ours(y)
    assert y.isfinite().all()


def test_fp32_is_pooled_by_pytorch() -> None:
    assert not is_ours(MaxPool2x2(2)(image(2, 64, 8, 8, dtype=torch.float32)))


def test_each_kernel_convolves_what_it_multiplies(kernel_name: str) -> None:
    """Bf16 only with instructions for it."""
    for dtype, kernels in CONVOLUTIONS.items():
        y = conv(64, 64).to(dtype)(image(2, 64, 8, 8, dtype=dtype))
        assert is_ours(y) == (kernel_name in kernels)


def test_an_odd_side_is_pooled_by_pytorch() -> None:
    x = image(1, 16, 5, 4)
    y = in_autocast(MaxPool2x2(2), x)
    assert not is_ours(y)
    assert torch.equal(y, nn.functional.max_pool2d(x, 2))


def test_few_pixels_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all images together."""
    monkeypatch.setattr(stem, "LEAST_PIXELS", 2 * 8 * 8)
    assert is_ours(in_autocast(conv(64, 64), image(2, 64, 8, 8)))
    assert not is_ours(in_autocast(conv(64, 64), image(1, 64, 9, 14)))


def test_bf16_weights_are_taken_without_autocast() -> None:
    x = image(2, 64, 8, 8)
    y = conv(64, 64).bfloat16()(x)
    assert is_ours(y)


def test_a_stem_trains_alike_on_both_backends() -> None:
    torch.manual_seed(0)
    model = create_model("sequencer2d_conv_t_patch4_32", num_classes=5).train()
    nn.init.normal_(model.head.get_parameter("fc.weight"))
    images, labels = torch.randn(40, 3, 32, 32), torch.arange(40) % 5
    names = [name for name, _ in model.named_parameters() if name.startswith("stem.")]

    def gradients(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        set_backend(model, backend)
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images).float(), labels)
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    truth = gradients("torch", torch.float32)
    ours, torchs = (gradients(backend, torch.bfloat16) for backend in ("native", "torch"))
    in_fp32 = gradients("native", torch.float32)
    for name in names:
        error, usual = ((found[name] - truth[name]).norm() for found in (ours, torchs))
        assert error <= 1.5 * usual + 1e-6, name
        assert (in_fp32[name] - truth[name]).norm() <= 1e-4 * truth[name].norm() + 1e-6, name


def test_there_is_no_second_derivative() -> None:
    x = image(1, 64, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(64, 64)(x)
    (grad,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.float().sum().backward()
