"""Convolutions, pooling, norms and GELUs of the stem are PyTorch's but for roundings, and stand aside where they do not
fit."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sequencer2d import create_model, set_backend
from sequencer2d.layers import Conv3x3, Convolutions, MaxPool2x2
from sequencer2d.native import available, stem
from sequencer2d.native.library import CONVOLUTIONS, POOLINGS, kernel
from sequencer2d.training.ranks import SharedBatchNorm2d

pytestmark = pytest.mark.skipif(not available(), reason="no kernels run here")


@pytest.fixture(autouse=True)
def small_batches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are for the kernel, too. Tests that name no kernel are of the one with bf16."""
    if "kernel_name" not in request.fixturenames and kernel().name not in CONVOLUTIONS[torch.bfloat16]:
        pytest.skip("no kernel for convolutions in bf16 runs here")
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


def norm_gelu(
    channels: int, backend: str = "native", activation: nn.Module | None = None, **options: Any
) -> Convolutions:
    norm = nn.BatchNorm2d(channels, **options)
    if norm.affine:
        generator = torch.Generator().manual_seed(1)
        nn.init.normal_(norm.weight, 1, 0.5, generator=generator)
        nn.init.normal_(norm.bias, 0, 0.5, generator=generator)
    module = Convolutions(norm, activation or nn.GELU())
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
    return type(y.grad_fn).__name__ in ("_ConvolutionBackward", "_MaxPoolBackward", "_NormGeluBackward")


SHAPES = [
    ((2, 64, 4, 4), 64),
    ((1, 64, 5, 7), 128),  # tiles that reach beyond the image
    ((3, 128, 6, 3), 64),
    ((5, 64, 1, 2), 64),
    ((2, 192, 9, 8), 320),
    ((9, 64, 16, 16), 256),  # more tiles than are transformed at a time
]


def check(layer: Callable[[str], nn.Module], x: Tensor, times_usual: float, at_most: float) -> None:
    """By its errors against doubles: they are of the size of PyTorch's."""
    ours, torchs = (run(layer(backend), x) for backend in ("native", "torch"))
    assert is_ours(ours[0])
    assert not is_ours(torchs[0])
    exact = layer("torch").double()
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
    check(partial(conv, shape[1], outputs), image(*shape), 3, 0.006)


@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_fp32_convolution_is_nearly_as_exact_as_by_definition(
    kernel_name: str, shape: tuple[int, ...], outputs: int
) -> None:
    if kernel_name not in CONVOLUTIONS[torch.float32]:
        pytest.skip(f"{kernel_name} leaves convolutions to PyTorch")
    check(partial(conv, shape[1], outputs), image(*shape, dtype=torch.float32), 10, 3e-6)


NORMED = [
    (2, 64, 4, 4), (1, 5, 3, 7), (3, 33, 6, 3), (9, 1, 2, 1), (9, 128, 16, 16),
    (3, 33000, 1, 1),  # more channels than values that a thread takes at a time
]  # fmt: skip


@pytest.mark.parametrize("dtype", stem.DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORMED)
def test_norm_and_gelu_are_as_exact_as_pytorchs(kernel_name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    times_usual, at_most = (1.5, 0.005) if dtype == torch.bfloat16 else (4, 3e-6)
    check(partial(norm_gelu, shape[1]), image(*shape, dtype=dtype), times_usual, at_most)


@pytest.mark.parametrize("dtype", stem.DTYPES, ids=str)
def test_a_norm_of_numbers_far_from_zero(kernel_name: str, dtype: torch.dtype) -> None:
    """Their variance is not lost in their squares."""
    x = (image(9, 64, 8, 8).detach() + 1000).to(dtype).requires_grad_()
    norm = norm_gelu(64)
    assert is_ours(norm(x))
    torch.testing.assert_close(norm[0].running_var, 0.9 + 0.1 * x.double().var((0, 2, 3)).float())


def test_running_statistics_follow(kernel_name: str) -> None:
    """Momentum and the unbiased variance."""
    norms = [norm_gelu(40, backend, momentum=0.3) for backend in ("native", "torch")]
    for seed in range(3):
        ours, torchs = (norm(image(2, 40, 3, 3, seed=seed, dtype=torch.float32)) for norm in norms)
        assert is_ours(ours)
        assert not is_ours(torchs)
    mine, theirs = (dict(norm.named_buffers()) for norm in norms)
    assert mine["0.num_batches_tracked"] == 3
    for name, buffer in theirs.items():
        torch.testing.assert_close(mine[name], buffer)


def test_frozen_parameters_of_a_norm_get_no_gradient() -> None:
    module, x = norm_gelu(16), image(2, 16, 4, 4)
    module.requires_grad_(False)
    y = module(x)
    assert is_ours(y)
    y.sum().backward()
    assert x.grad is not None
    assert module[0].weight.grad is None


@pytest.mark.parametrize("dtype", CONVOLUTIONS, ids=str)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    x, pool = image(9, 64, 18, 10, dtype=dtype), MaxPool2x2(2)
    results = []
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        try:
            results.append([*run(conv(64, 128), x), *run(pool, x), *run(norm_gelu(64), x)])
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_an_expanded_gradient_is_taken() -> None:
    """Of a sum, whose gradient is one value with strides of 0."""
    x = image(1, 64, 4, 4)
    for layer in (conv(64, 64), MaxPool2x2(2), norm_gelu(64)):
        y = in_autocast(layer, x)
        assert is_ours(y)
        (of_sum,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        (of_ones,) = torch.autograd.grad((y * torch.ones(y.shape)).sum(), x)
        assert torch.equal(of_sum, of_ones)


@pytest.mark.parametrize("dtype", stem.DTYPES, ids=str)
def test_pooling_is_the_same_to_the_bit(kernel_name: str, dtype: torch.dtype) -> None:
    """With equal values, infinities, and NaNs, of which the last wins."""
    if kernel_name not in POOLINGS:
        pytest.skip(f"{kernel_name} leaves pooling to PyTorch")
    x = (2 * image(3, 32, 6, 8, dtype=dtype)).round().detach()
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


def in_autocast(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


UNFIT: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "fp64": lambda layer, x: layer.double()(x.double()),
    "channels-first": lambda layer, x: in_autocast(layer, x.contiguous()),
    "no gradient in bf16": lambda layer, x: torch.no_grad()(in_autocast)(layer, x),
    "no batch": lambda layer, x: in_autocast(layer, x[0]),
    "other channels": lambda layer, x: in_autocast(
        conv(24, 64) if isinstance(layer, Conv3x3) else layer,
        x[:, :24].contiguous(memory_format=torch.channels_last),
    ),
}


@pytest.mark.parametrize("case", UNFIT)
@pytest.mark.parametrize("layer", [partial(conv, 64, 64), partial(MaxPool2x2, 2)], ids=["convolution", "pooling"])
def test_what_does_not_fit_is_pytorchs(layer: Callable[[], nn.Module], case: str) -> None:
    y = UNFIT[case](layer(), image(2, 64, 8, 8))
    assert not is_ours(y)
    assert y.isfinite().all()


UNFIT_NORMS: dict[str, Callable[[], Convolutions]] = {
    "in evaluation": lambda: norm_gelu(64).eval(),
    "cumulative average": lambda: norm_gelu(64, momentum=None),
    "no parameters": lambda: norm_gelu(64, affine=False),
    "no running statistics": lambda: norm_gelu(64, track_running_stats=False),
    "bf16 parameters": lambda: norm_gelu(64).bfloat16(),
    "other GELU": lambda: norm_gelu(64, activation=nn.GELU(approximate="tanh")),
    "other activation": lambda: norm_gelu(64, activation=nn.ReLU()),
}


@pytest.mark.parametrize("case", UNFIT_NORMS)
def test_other_norms_are_pytorchs(case: str) -> None:
    module, x = UNFIT_NORMS[case](), image(2, 64, 8, 8)
    assert not is_ours(module(x))
    y = module(x)
    for step in module:
        x = step(x)
    assert torch.equal(x, y)


def test_norms_that_ranks_share_are_pytorchs() -> None:
    x = image(2, 64, 8, 8)
    assert stem.norms("native", x, nn.BatchNorm2d(64), nn.GELU())
    assert not stem.norms("native", x, SharedBatchNorm2d(64), nn.GELU())


@pytest.mark.parametrize("part", [0, 1], ids=["norm", "GELU"])
def test_hooks_see_norm_and_gelu(part: int) -> None:
    seen, module = [], norm_gelu(64)
    hook = module[part].register_forward_hook(lambda *_: seen.append(1))
    module(image(2, 64, 8, 8))
    assert seen
    hook.remove()
    assert is_ours(module(image(2, 64, 8, 8)))


def test_one_pixel_has_no_variance() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_gelu(64)(image(1, 64, 1, 1))


def test_inference_in_fp32_is_what_training_computes(kernel_name: str) -> None:
    module, x = conv(64, 128), image(3, 64, 8, 8, dtype=torch.float32)
    trained = module(x)
    theirs = nn.Conv2d.forward(module, x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = module(x)
        assert torch.equal(y, trained)
        assert torch.equal(y, theirs) == (kernel_name not in CONVOLUTIONS[torch.float32])
    assert not is_ours(MaxPool2x2(2)(x.detach()))


def test_inference_in_bf16_is_pytorchs() -> None:
    module, x = conv(64, 128), image(3, 64, 8, 8)
    with torch.no_grad():
        assert torch.equal(in_autocast(module, x), in_autocast(partial(nn.Conv2d.forward, module), x))


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
    torch.manual_seed(1)  # with seeds 0 and 3 two pixels are so nearly equal that roundings choose between them
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
    for layer in (conv(64, 64), norm_gelu(64)):
        y = in_autocast(layer, x)
        (grad,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"no second derivatives; call sequencer2d\.set_backend"):
            grad.float().sum().backward()


def test_images_of_other_channels_are_pytorchs_error() -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="128 channels"):
        conv(64, 64)(image(2, 128, 8, 8, dtype=torch.float32))


def test_a_norm_may_be_the_last() -> None:
    x = image(2, 64, 8, 8)
    module = norm_gelu(64)
    assert torch.equal(module[:1](x), module[0](x))


def test_another_default_dtype_or_device_is_no_trouble() -> None:
    stem._weight_transform.cache_clear()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            found = stem._weight_transform()
    finally:
        torch.set_default_dtype(before)
        stem._weight_transform.cache_clear()
    assert torch.equal(found, stem._weight_transform())
