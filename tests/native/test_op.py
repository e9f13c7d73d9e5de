"""The kernels compute what nn.LSTM computes, outputs and every gradient, whatever the shape, layout and numbers."""

from collections.abc import Iterator
from functools import cache
from statistics import mean
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lstms import by_pytorch, in_double, make_lstms, outputs_and_gradients, relative_error
from sequencer2d.native import available, bilstm2d

pytestmark = pytest.mark.skipif(not available(), reason="the package was installed without kernels")

FP32, BF16 = 2e-6, 1e-2
Tensors = dict[str, Tensor]


@pytest.fixture(params=[1, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 5),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.integers(1, 20),
    hidden=st.one_of(st.integers(1, 20), st.integers(30, 70)),
    bidirectional=st.booleans(),
    axes=st.sampled_from(["vh", "v", "h"]),
    seed=st.integers(0, 1000),
)
def test_outputs_and_gradients_of_any_shape(
    kernel_name: str,
    batch: int,
    height: int,
    width: int,
    channels: int,
    hidden: int,
    bidirectional: bool,
    axes: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    rnns = make_lstms(channels, hidden, bidirectional, axes)
    x = torch.randn(batch, height, width, channels)
    grad_y = torch.randn(batch, height, width, hidden * len(axes) * (1 + bidirectional))
    truth = in_double(x, rnns, grad_y)
    for bf16, bound in ((False, FP32), (True, 5 * BF16)):  # a few values may all be rounded the same way
        ours = outputs_and_gradients(bilstm2d, x, rnns, grad_y, bf16=bf16)
        torchs = outputs_and_gradients(by_pytorch, x, rnns, grad_y, bf16=bf16)
        size = torch.cat([gradient.flatten() for name, gradient in truth.items() if name != "y"]).norm()
        for name, values in ours.items():
            assert values.shape == truth[name].shape
            assert values.dtype == torchs[name].dtype
            # A sum over a handful of tokens may cancel: what is left is small beside what went into it.
            norm = truth[name].norm() if name == "y" else torch.maximum(truth[name].norm(), size / 4)
            error, theirs = ((some[name].double() - truth[name]).norm() for some in (ours, torchs))
            assert error <= max(bound * norm, 3 * theirs), name


@pytest.mark.parametrize("axes", ["vh", "v", "h"])
@pytest.mark.parametrize(("height", "width"), [(3, 60), (60, 3)])
def test_long_grids_have_more_sequences_along_one_axis(kernel_name: str, axes: str, height: int, width: int) -> None:
    torch.manual_seed(0)
    rnns = make_lstms(4, 5, axes=axes)
    x, grad_y = torch.randn(1, height, width, 4), torch.randn(1, height, width, 10 * len(axes))
    truth = in_double(x, rnns, grad_y)
    for name, values in outputs_and_gradients(bilstm2d, x, rnns, grad_y).items():
        assert relative_error(values, truth[name]) <= FP32, name


SIZES = [(2, 12, 14, 96, 24), (1, 24, 24, 192, 48), (2, 12, 14, 384, 96), (4, 8, 8, 128, 32), (8, 4, 4, 256, 64)]
"""`B H W C D` as in the models."""


@cache
def layer_of_a_model(size: tuple[int, ...], seed: int, bf16: bool) -> tuple[tuple[Any, ...], Tensors, Tensors]:
    """Input, LSTMs and gradient of the output; what they give in fp64, and by PyTorch."""
    B, H, W, C, D = size
    torch.manual_seed(seed)
    layer = (torch.randn(B, H, W, C), make_lstms(C, D), torch.randn(B, H, W, 4 * D))
    return layer, in_double(*layer), outputs_and_gradients(by_pytorch, *layer, bf16=bf16)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_at_sizes_of_the_models_fp32_is_exact(kernel_name: str, size: tuple[int, ...]) -> None:
    layer, truth, _ = layer_of_a_model(size, 0, bf16=False)
    for name, values in outputs_and_gradients(bilstm2d, *layer).items():
        assert relative_error(values, truth[name]) <= FP32, name


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_at_sizes_of_the_models_bf16_is_no_less_exact_than_pytorch(kernel_name: str, size: tuple[int, ...]) -> None:
    """The error against fp64 over that of `nn.LSTM` under autocast, in the mean over seeds, is at most 1."""
    ratios: dict[str, list[float]] = {kind: [] for kind in ("y", "x", "weight_ih", "weight_hh", "bias")}
    for seed in range(4):
        layer, truth, torchs = layer_of_a_model(size, seed, bf16=True)
        ours = outputs_and_gradients(bilstm2d, *layer, bf16=True)
        for name, values in ours.items():
            assert relative_error(values, truth[name]) <= BF16, name
        for kind, some in ratios.items():
            error, theirs = (relative_error(joined(values, kind), joined(truth, kind)) for values in (ours, torchs))
            some.append(error / theirs)
    assert {kind: mean(some) for kind, some in ratios.items() if mean(some) > 1} == {}


def joined(tensors: dict[str, Tensor], kind: str) -> Tensor:
    """All directions' tensors of a kind, as one vector: a single bias is too few numbers to compare errors of."""
    return torch.cat([tensor.flatten() for name, tensor in tensors.items() if name == kind or f".{kind}" in name])


def test_weights_and_tokens_in_bf16_without_autocast(kernel_name: str) -> None:
    torch.manual_seed(0)
    rnn_v, rnn_h = (rnn.bfloat16() if rnn else None for rnn in make_lstms(8, 5))
    x = torch.randn(2, 3, 4, 8).bfloat16()
    y = bilstm2d(x, rnn_v, rnn_h).detach()
    assert y.dtype == torch.bfloat16
    assert relative_error(y, in_double(x, (rnn_v, rnn_h), torch.zeros(y.shape))["y"]) <= BF16


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_without_gradients_the_output_is_the_same(kernel_name: str, bf16: bool) -> None:
    rnn_v, rnn_h = make_lstms(8, 17)
    x = torch.randn(3, 5, 4, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        trained = bilstm2d(x, rnn_v, rnn_h)
        with torch.no_grad():
            assert torch.equal(bilstm2d(x, rnn_v, rnn_h), trained)
        with torch.inference_mode():
            assert torch.equal(bilstm2d(x, rnn_v, rnn_h), trained)
    assert trained.requires_grad


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 8, 3, 5).permute(0, 2, 3, 1),
        torch.randn(2, 3, 5, 16)[..., ::2],
        torch.randn(1, 3, 1, 8).expand(2, 3, 5, 8),
        torch.randn(4, 6, 5, 8)[::2, 1:4],
    ],
    ids=["permuted", "strided", "expanded", "sliced"],
)
def test_any_memory_layout_gives_the_same(kernel_name: str, x: Tensor) -> None:
    rnns = make_lstms(8, 3)
    grad_y = torch.randn(2, 12, 3, 5).permute(0, 2, 3, 1)
    theirs = outputs_and_gradients(bilstm2d, x.contiguous(), rnns, grad_y.contiguous())
    assert not x.is_contiguous()
    for name, values in outputs_and_gradients(bilstm2d, x, rnns, grad_y).items():
        torch.testing.assert_close(values, theirs[name])


@pytest.mark.parametrize("shape", [(0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8)])
def test_no_tokens_give_no_output_and_gradients_of_zero(kernel_name: str, shape: tuple[int, ...]) -> None:
    ours = outputs_and_gradients(bilstm2d, torch.zeros(shape), make_lstms(8, 3), torch.zeros(*shape[:3], 12))
    assert ours.pop("y").shape == (*shape[:3], 12)
    assert ours.pop("x").shape == shape
    assert all(not gradient.any() for gradient in ours.values())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [1e4, -1e4, 1e-6])
def test_large_and_small_numbers_are_no_trouble(kernel_name: str, size: float, bf16: bool) -> None:
    torch.manual_seed(0)
    rnns = make_lstms(8, 19, scale=3.0)
    x, grad_y = size * torch.rand(3, 7, 5, 8), torch.randn(3, 7, 5, 76)
    truth = in_double(x, rnns, grad_y)
    ours = outputs_and_gradients(bilstm2d, x, rnns, grad_y, bf16=bf16)
    torchs = outputs_and_gradients(by_pytorch, x, rnns, grad_y, bf16=bf16)
    for name, values in ours.items():
        assert values.isfinite().all(), name
        allowed = max(BF16 if bf16 else FP32, 3 * relative_error(torchs[name], truth[name]))
        assert relative_error(values, truth[name]) <= allowed, name


def test_tiny_numbers_keep_their_relative_precision(kernel_name: str) -> None:
    """Where nothing saturates, tanh is its argument: a formula that subtracts from 1 would leave no digit of it."""
    rnn_v, rnn_h = make_lstms(8, 5, scale=1e-4)
    x = 1e-3 * torch.randn(2, 3, 4, 8)
    truth = in_double(x, (rnn_v, rnn_h), torch.zeros(2, 3, 4, 20))["y"]
    assert truth.abs().max() < 1e-3
    with torch.no_grad():
        assert relative_error(bilstm2d(x, rnn_v, rnn_h), truth) <= FP32


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_what_is_no_number_spreads_as_in_pytorch(kernel_name: str, bf16: bool) -> None:
    rnn_v, rnn_h = make_lstms(8, 19)
    x = torch.randn(2, 5, 6, 8)
    x[1, 2, 3, 4] = torch.nan
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert torch.equal(bilstm2d(x, rnn_v, rnn_h).isnan(), by_pytorch(x, rnn_v, rnn_h).isnan())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_threads_change_no_digit_that_matters(kernel_name: str, threads: int, bf16: bool) -> None:
    torch.manual_seed(0)
    rnns = make_lstms(8, 19)
    x, grad_y = torch.randn(5, 9, 7, 8), torch.randn(5, 9, 7, 76)
    truth = in_double(x, rnns, grad_y)
    ours = outputs_and_gradients(bilstm2d, x, rnns, grad_y, bf16=bf16)
    again = outputs_and_gradients(bilstm2d, x, rnns, grad_y, bf16=bf16)
    for name, values in ours.items():
        assert relative_error(values, truth[name]) <= (BF16 if bf16 else FP32), name
        assert torch.equal(values, again[name]), name


def test_the_kernels_use_threads_of_pytorch() -> None:
    from sequencer2d.native.library import has_threads

    assert has_threads()


def test_the_gradient_can_be_taken_twice_but_not_of_itself(kernel_name: str) -> None:
    rnn_v, rnn_h = make_lstms(8, 3)
    x = torch.randn(2, 3, 4, 8, requires_grad=True)
    loss = bilstm2d(x, rnn_v, rnn_h).square().sum()
    first, again = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives; call sequencer2d.set_backend\(model, 'torch'\)"):
        gradient.sum().backward()


def test_another_default_device_is_no_trouble(kernel_name: str) -> None:
    rnns = make_lstms(8, 3)
    x, grad_y = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 12)
    expected = outputs_and_gradients(bilstm2d, x, rnns, grad_y)
    with torch.device("meta"):
        elsewhere = outputs_and_gradients(bilstm2d, x, rnns, grad_y)
    assert all(torch.equal(values, expected[name]) for name, values in elsewhere.items())


def test_other_cells_are_refused() -> None:
    with pytest.raises(TypeError, match=r"nn\.LSTM, not GRU and NoneType"):
        bilstm2d(torch.zeros(1, 2, 2, 3), torch.nn.GRU(3, 2), None)
