"""The kernels around the LSTMs compute what PyTorch's layers compute, and stand aside where those are looked into."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from sequencer2d import create_model, native, set_backend
from sequencer2d.layers import Sequencer2DBlock
from sequencer2d.native import available, matmul
from sequencer2d.native.library import WEIGHT_GRADIENTS, kernel

pytestmark = pytest.mark.skipif(not available(), reason="the package was installed without kernels")

FP32, BF16 = 2e-6, 1e-2


def gradients(run: Callable[[], tuple[Tensor, ...]], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, and the gradients of all inputs for fixed gradients of the outputs."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        outputs = run()
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, inputs, fixed_gradients(outputs)))


def fixed_gradients(outputs: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in outputs]


def assert_close(ours: list[Tensor], truth: list[Tensor], bound: float, sizes: list[Tensor] | None = None) -> None:
    """Within a bound that is relative to `sizes`, else to the truth."""
    assert len(ours) == len(truth)
    for i, (a, b, size) in enumerate(zip(ours, truth, sizes or truth, strict=True)):
        assert a.shape == b.shape == size.shape
        assert (a.double() - b.double()).norm() <= bound * size.double().norm() + 1e-6 * math.sqrt(b.numel()), i


sizes = {
    "batch": st.integers(1, 4),
    "height": st.integers(1, 7),
    "width": st.integers(1, 7),
    "channels": st.integers(1, 50),
    "seed": st.integers(0, 1000),
}
any_size = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@any_size
@given(**sizes, with_branch=st.booleans(), drop=st.booleans())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_residual_sum_and_norm_of_any_shape(
    kernel_name: str,
    dtype: torch.dtype,
    batch: int,
    height: int,
    width: int,
    channels: int,
    seed: int,
    with_branch: bool,
    drop: bool,
) -> None:
    torch.manual_seed(seed)
    norm = nn.LayerNorm(channels, eps=1e-2)  # a token may be all the same
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    drop_path = DropPath(0.5) if drop else nn.Identity()
    shape = (batch, height, width, channels)
    x = (3 * torch.randn(shape)).requires_grad_()
    branch = torch.randn(shape).to(dtype).requires_grad_() if with_branch else None
    inputs = [x, norm.weight, norm.bias, *([] if branch is None else [branch])]

    def ours() -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        total, normed = native.residual_norm(x, branch, drop_path, norm, "native")
        assert normed.dtype == dtype
        return total + 0, normed

    double = copy.deepcopy(norm).double()
    x64 = x.detach().double().requires_grad_()
    branch64 = None if branch is None else branch.detach().double().requires_grad_()

    def by_pytorch() -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        if branch is None or branch64 is None:
            return x64 + 0, double(x64)
        scale = drop_path(branch.detach().new_ones(batch, 1, 1, 1))  # the same images are dropped
        total = x64 + branch64 * scale
        return total, double(total)

    truth = gradients(
        by_pytorch, [x64, double.weight, double.bias, *([] if branch64 is None else [branch64])], torch.float32
    )
    bound = FP32 * 5 if dtype == torch.float32 else 2 * BF16
    assert_close(gradients(ours, inputs, dtype), truth, bound)


@any_size
@given(**sizes, hidden=st.integers(1, 40))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mlp_of_any_shape(
    kernel_name: str,
    dtype: torch.dtype,
    batch: int,
    height: int,
    width: int,
    channels: int,
    hidden: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    module = Mlp(channels, hidden)
    x = (2 * torch.randn(batch, height, width, channels)).requires_grad_()
    double, x64 = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    truth = gradients(lambda: (double(x64),), [x64, *double.parameters()], torch.float32)
    ours = gradients(lambda: (native.mlp(module, x, "native"),), [x, *module.parameters()], dtype)
    theirs = gradients(lambda: (module(x),), [x, *module.parameters()], dtype)
    for mine, their, right in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == their.dtype
        error, torchs = ((some.double() - right).norm() for some in (mine, their))
        bound = 5 * FP32 if dtype == torch.float32 else 3 * BF16
        assert error <= max(bound * right.norm(), 3 * torchs) + 1e-7
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        inference = native.mlp(module, x, "native")
    assert (inference - ours[0]).norm() <= (5 * FP32 if dtype == torch.float32 else BF16) * ours[0].norm() + 1e-7


def test_gelu_of_every_size_of_number(kernel_name: str) -> None:
    edges = [0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, math.inf, -math.inf]
    for dtype, bound in ((torch.float32, 3e-7), (torch.bfloat16, 8e-3)):
        x = torch.cat([torch.linspace(-12, 12, 9999), torch.tensor(edges)]).to(dtype)
        y, slope, ones = torch.empty_like(x), torch.empty_like(x), torch.ones_like(x)
        kernel().gelu(x, y, ones, slope)
        truth = torch.nn.functional.gelu(x.double())
        finite = truth.isfinite()
        error = (y.double() - truth)[finite].abs()
        assert (error <= bound * truth[finite].abs().clamp(min=1e-3 if dtype == torch.bfloat16 else 1)).all()
        assert y[-2] == math.inf
        assert y[-1].abs() < 1e-14  # the limit is 0; PyTorch has NaN
        slopes = torch.ops.aten.gelu_backward(ones.double(), x.double())
        error = (slope.double() - slopes)[finite].abs()
        assert error.max() <= 4 * bound
        nan = torch.full((5,), math.nan, dtype=dtype)
        kernel().gelu(nan, nan)
        assert nan.isnan().all()


def test_sums_do_not_depend_on_the_number_of_threads(kernel_name: str) -> None:
    torch.manual_seed(0)
    module = Sequencer2DBlock(48, 12)
    x = torch.randn(3, 16, 16, 48)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        module.zero_grad()
        module(x).square().sum().backward()
        return [norm.weight.grad for norm in (module.norm1, module.norm2) if norm.weight.grad is not None]

    try:
        assert all(torch.equal(a, b) for a, b in zip(run(1), run(3), strict=True))
    finally:
        torch.set_num_threads(1)


@any_size
@given(**sizes, outputs=st.integers(1, 40))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_linear_layer_of_any_shape(
    kernel_name: str, dtype: torch.dtype, batch: int, height: int, width: int, channels: int, outputs: int, seed: int
) -> None:
    torch.manual_seed(seed)
    module = nn.Linear(channels, outputs)
    x = (2 * torch.randn(batch, height, width, channels)).requires_grad_()
    double, x64 = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    truth = gradients(lambda: (double(x64),), [x64, *double.parameters()], torch.float32)
    ours = gradients(lambda: (native.linear(module, x, "native"),), [x, *module.parameters()], dtype)
    terms = (x64, *fixed_gradients(truth[:1]), double.weight, double.bias)
    x2, grad2, weight2, bias2 = (values.detach().square() for values in terms)
    squares = [nn.functional.linear(x2, weight2, bias2), grad2 @ weight2]
    squares += [grad2.flatten(0, -2).T @ x2.flatten(0, -2), grad2.flatten(0, -2).sum(0)]
    sizes = [square.sqrt() for square in squares]  # of what is summed: a sum may come to nearly nothing
    assert_close(ours, truth, FP32 if dtype == torch.float32 else BF16, sizes)
    assert [gradient.dtype for gradient in ours[1:]] == [torch.float32] * 3


def test_gradients_of_weights_take_any_layout() -> None:
    """Such as the gradient of a sum, which is one value expanded."""
    x, one = torch.randn(300, 40).bfloat16(), torch.ones(1).bfloat16()
    for grad, tokens in ((one.expand(300, 960), x), (torch.randn(960, 300).bfloat16().t(), x.t().contiguous().t())):
        weight, bias = matmul.weight_gradient(grad, tokens, torch.float32)
        truth = grad.double().t() @ tokens.double()
        assert bias is not None
        assert (weight.double() - truth).norm() <= 1e-2 * truth.norm()
        assert (bias.double() - grad.double().sum(0)).norm() <= 1e-2 * grad.double().sum(0).norm()


def test_a_linear_layer_in_training_is_ours() -> None:
    """Not only where nothing is trained."""
    y = native.linear(nn.Linear(4, 4), torch.randn(1, 2, 2, 4), "native")
    assert type(y.grad_fn).__name__ == "_LinearBackward"


def test_a_model_is_the_same_on_both_backends() -> None:
    torch.manual_seed(0)
    model = create_model("sequencer2d_conv_t_patch4_32", num_classes=5, drop_path_rate=0.3).train()
    nn.init.normal_(model.head.get_parameter("fc.weight"))
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 5

    def run(backend: str) -> Tensor:
        set_backend(model, backend)
        model.zero_grad()
        torch.manual_seed(7)  # drop path
        nn.functional.cross_entropy(model(images), labels).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    ours, theirs = run("native"), run("torch")
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("training", [True, False])
def test_every_hook_in_a_block_is_called(training: bool) -> None:
    model_block = Sequencer2DBlock(16, 4).train(training)
    parts = [module for module in model_block.modules() if module is not model_block]
    called: list[int] = []
    for i, module in enumerate(parts):
        module.register_forward_hook(lambda *_, i=i: called.append(i))
    with torch.set_grad_enabled(training):
        model_block(torch.randn(1, 4, 4, 16))
    expected = [i for i, module in enumerate(parts) for _ in range(1 + (module is model_block.drop_path))]
    assert sorted(called) == expected


@pytest.mark.parametrize("part", range(14))
def test_one_hook_in_a_block_is_called(part: int) -> None:
    """One alone, as what sees another one would see none of the rest."""
    model_block = Sequencer2DBlock(16, 4).eval()
    called: list[int] = []
    [*model_block.modules()][1 + part].register_forward_hook(lambda *_: called.append(part))
    with torch.no_grad():
        model_block(torch.randn(1, 4, 4, 16))
    assert set(called) == {part}


def test_layers_in_the_place_of_ours_are_used() -> None:
    class Negative(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return -super().forward(input)

    x = torch.randn(1, 2, 2, 8)
    module = Mlp(8, 8)
    plain = native.mlp(module, x, "auto")
    module.fc2.__class__ = Negative  # type: ignore
    assert torch.allclose(native.mlp(module, x, "auto"), -plain, atol=1e-6)
    fc = nn.Linear(8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = native.linear(fc, x, "auto")
        fc.__class__ = Negative
        assert torch.equal(native.linear(fc, x, "auto"), -before)
    norm = nn.GroupNorm(1, 2)
    assert torch.equal(native.residual_norm(x, None, nn.Identity(), norm, "auto")[1], norm(x))


@pytest.mark.parametrize("training", [False, True])
def test_another_module_in_the_place_of_drop_path_is_called(training: bool) -> None:
    block = Sequencer2DBlock(16, 4).train(training)
    scale = LayerScale(16)
    nn.init.uniform_(scale.gamma, 0.1, 2)
    block.drop_path = scale  # type: ignore[assignment]
    x = torch.randn(3, 4, 4, 16)
    outputs, slopes = {}, {}
    for backend in ("auto", "torch"):
        set_backend(block, backend)
        outputs[backend] = block(x)
        (slopes[backend],) = torch.autograd.grad(outputs[backend].square().sum(), scale.gamma)
    torch.testing.assert_close(outputs["auto"], outputs["torch"])
    torch.testing.assert_close(slopes["auto"], slopes["torch"])


@pytest.mark.parametrize("training", [False, True])
def test_global_hooks_see_every_part(training: bool) -> None:
    block, seen = Sequencer2DBlock(16, 4).train(training), set()
    handle = register_module_forward_hook(lambda module, *_: seen.add(type(module)) and None)
    try:
        block(torch.randn(1, 4, 4, 16))
    finally:
        handle.remove()
    assert seen >= {nn.LayerNorm, nn.LSTM, nn.Linear, Mlp, nn.GELU}


def test_dropout_is_pytorchs() -> None:
    module = Mlp(8, 8, drop=0.5).train()
    x = torch.randn(1, 2, 2, 8)
    torch.manual_seed(0)
    ours = native.mlp(module, x, "auto")
    torch.manual_seed(0)
    assert torch.equal(ours, module(x))


def test_frozen_parts_get_no_gradient_and_cost_none() -> None:
    fc = nn.Linear(8, 8)
    fc.weight.requires_grad_(False)
    native.linear(fc, torch.randn(1, 2, 2, 8), "native").sum().backward()
    assert fc.weight.grad is None
    assert fc.bias.grad is not None
    module = Mlp(8, 8)
    module.fc1.requires_grad_(False)
    x = torch.randn(1, 2, 2, 8)
    native.mlp(module, x, "native").sum().backward()
    assert module.fc1.weight.grad is None
    assert module.fc2.weight.grad is not None


def test_casts_follow_the_weights() -> None:
    fc, x = nn.Linear(64, 64), torch.randn(2, 64)
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: fc.weight.mul_(2),
        lambda: fc.weight.data.mul_(2),
        lambda: fc.load_state_dict(nn.Linear(64, 64).state_dict()),
    ]
    for change in changes:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            change()
            assert torch.allclose(native.linear(fc, x, "auto"), fc(x), rtol=2e-2, atol=2e-2)


def test_second_derivatives_are_an_error_not_a_wrong_number() -> None:
    module, x = Mlp(4, 4), torch.randn(1, 1, 1, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(native.mlp(module, x, "native").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.sum().backward()


def test_the_hidden_activations_are_not_kept() -> None:
    kept: list[int] = []
    module, x = Mlp(16, 48), torch.randn(1, 8, 8, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore
        native.mlp(module, x, "native")
    assert sum(size == 64 * 48 for size in kept) == 1


@pytest.mark.parametrize("tokens", [1, 2, 255, 256, 257, 500, 5000])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 3), (96, 24), (100, 65), (193, 70), (384, 96)])
def test_gradients_of_weights_are_sums_over_the_tokens(tokens: int, outputs: int, inputs: int) -> None:
    if kernel().name not in WEIGHT_GRADIENTS:
        pytest.skip(f"kernel {kernel().name} leaves them to PyTorch")
    torch.manual_seed(tokens)
    wide, x = torch.randn(tokens, outputs + 5).bfloat16(), torch.randn(tokens, inputs).bfloat16()
    grad = wide[:, 3 : 3 + outputs]  # a part of longer rows
    weight, bias = torch.full((outputs, inputs), math.nan), torch.full((outputs,), math.nan)
    kernel().weight_gradient(grad, x, weight, bias)
    truth = grad.double().t() @ x.double()
    assert (weight.double() - truth).norm() <= 1e-6 * truth.norm() + 1e-6
    assert (bias.double() - grad.double().sum(0)).abs().max() <= 1e-4
    for threads in (2, 3, 16):
        again, of_bias = torch.empty_like(weight), torch.empty_like(bias)
        torch.set_num_threads(threads)
        try:
            kernel().weight_gradient(grad, x, again, of_bias)
        finally:
            torch.set_num_threads(1)
        assert torch.equal(weight, again)
        assert torch.equal(bias, of_bias)


@pytest.mark.parametrize("tokens", [1, 257, 5000])
@pytest.mark.parametrize(
    ("directions", "hidden", "inputs"), [(1, 1, 1), (2, 5, 20), (4, 24, 96), (3, 16, 33), (4, 33, 65)]
)
def test_gradients_of_an_lstm_layer_are_those_of_its_directions(
    tokens: int, directions: int, hidden: int, inputs: int
) -> None:
    if kernel().name not in WEIGHT_GRADIENTS:
        pytest.skip(f"kernel {kernel().name} leaves them to PyTorch")
    torch.manual_seed(tokens)
    grad = torch.randn(tokens, directions * 4 * hidden).bfloat16()
    x, states = torch.randn(tokens, inputs).bfloat16(), torch.randn(directions, tokens, hidden).bfloat16()
    w_ih = torch.full((grad.shape[1], inputs), math.nan)
    w_hh = torch.full((directions, 4 * hidden, hidden), math.nan)
    kernel().weight_gradient(grad, x, w_ih, None, states, w_hh)
    of_direction = grad.double().view(tokens, directions, 4 * hidden).movedim(1, 0)
    for ours, truth in ((w_ih, grad.double().t() @ x.double()), (w_hh, of_direction.mT @ states.double())):
        assert (ours.double() - truth).norm() <= 1e-6 * truth.norm() + 1e-6
    for threads in (2, 3, 16):
        of_inputs, of_states = torch.empty_like(w_ih), torch.empty_like(w_hh)
        torch.set_num_threads(threads)
        try:
            kernel().weight_gradient(grad, x, of_inputs, None, states, of_states)
        finally:
            torch.set_num_threads(1)
        assert torch.equal(w_ih, of_inputs)
        assert torch.equal(w_hh, of_states)


@pytest.mark.parametrize("trains", [True, False])
def test_norms_whose_parameters_are_strided(trains: bool) -> None:
    """As pruning by `weight[::2]` leaves them. (PyTorch 2.14 has another gradient for its strided batch norms.)"""
    torch.manual_seed(0)
    model = create_model("sequencer2d_conv_p_patch2_16", num_classes=3).train(trains)
    nn.init.normal_(model.get_parameter("head.fc.weight"))
    strided = copy.deepcopy(model)
    for plain, other in zip(model.modules(), strided.modules(), strict=True):
        if isinstance(plain, nn.LayerNorm | nn.BatchNorm2d) and isinstance(other, nn.LayerNorm | nn.BatchNorm2d):
            for name in ("weight", "bias"):
                values = torch.randn(2 * len(plain.weight))
                setattr(plain, name, nn.Parameter(values[::2].clone()))
                setattr(other, name, nn.Parameter(values[::2]))
    images = torch.randn(3, 3, 16, 16)
    if trains:
        found, expected = (
            torch.autograd.grad(net(images).square().sum(), list(net.parameters())) for net in (strided, model)
        )
        assert all(map(torch.equal, found, expected))
    else:
        with torch.no_grad():
            for _ in range(2):  # then by what was kept
                torch.testing.assert_close(strided(images), model(images), rtol=1e-4, atol=1e-4)


def test_a_norm_of_another_size_is_pytorchs_error() -> None:
    norm = nn.LayerNorm(32)
    norm.weight.data = norm.weight.data[:16]
    with pytest.raises(RuntimeError, match="16"):
        native.residual_norm(torch.randn(1, 2, 2, 32), None, nn.Identity(), norm, "native")


def test_a_second_derivative_of_a_whole_model_says_what_to_do() -> None:
    model = create_model("sequencer2d_conv_p_patch2_16", num_classes=3)
    nn.init.normal_(model.get_parameter("head.fc.weight"))
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives; call sequencer2d\.set_backend\(model, 'torch'\)"):
        grad.square().sum().backward()
