"""The operation is one of PyTorch's: checked, compiled, exported, counted; tracing gets PyTorch's own LSTMs."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sequencer2d import create_model, set_backend
from sequencer2d.flops import bilstm2d_costs, costs
from sequencer2d.layers import BiLSTM2D
from sequencer2d.native import available

pytestmark = pytest.mark.skipif(not available(), reason="the package was installed without kernels")

X = torch.randn(2, 3, 4, 8)


def arguments(dtype: torch.dtype, grad: bool, vertical: int) -> tuple[Tensor | int | bool, ...]:
    R = {0: 2, 1: 2, 2: 4}[vertical]
    shapes = ((2, 3, 4, 8), (R * 12, 8), (R, 12, 3), (R * 12,))
    return *(torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes), vertical, grad


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the check's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vertical", [0, 1, 2])
def test_the_operations_pass_the_checks_of_pytorch(dtype: torch.dtype, vertical: int) -> None:
    for grad in (True, False):
        torch.library.opcheck(torch.ops.sequencer2d.bilstm2d, arguments(dtype, grad, vertical))
    inputs = arguments(dtype, True, vertical)
    kept = torch.ops.sequencer2d.bilstm2d(*inputs)
    x, w_ih, w_hh = (value.detach() for value in inputs[:3] if isinstance(value, Tensor))
    backward = (torch.randn_like(kept[0]), x, w_ih, w_hh, *(tensor.detach() for tensor in kept), vertical)
    torch.library.opcheck(torch.ops.sequencer2d.bilstm2d_backward, backward)


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, w_ih, w_hh, bias, *_ = (value for value in arguments(torch.float32, False, 2) if isinstance(value, Tensor))
    operation = torch.ops.sequencer2d.bilstm2d
    with pytest.raises(ValueError, match=r"all be fp32 or all bf16, not torch.bfloat16, torch.float32"):
        operation(x, w_ih, w_hh.bfloat16(), bias, 2, False)
    with pytest.raises(ValueError, match=r"all be fp32 or all bf16, not torch.float64"):
        operation(x.double(), w_ih.double(), w_hh.double(), bias.double(), 2, False)
    with pytest.raises(ValueError, match=r"have shapes \(2, 3, 4, 8\), \(48, 8\), \(4, 12, 2\)"):
        operation(x, w_ih, w_hh[..., :2], bias, 2, False)
    with pytest.raises(ValueError, match="vertical=4 of 4 directions: each axis has at most 2"):
        operation(x, w_ih, w_hh, bias, 4, False)
    y, gates, cells = operation(x, w_ih, w_hh, bias, 2, False)
    with pytest.raises(ValueError, match="not those that bilstm2d kept"):
        torch.ops.sequencer2d.bilstm2d_backward(y, x, w_ih, w_hh, y, gates, cells, 2)


def test_autocast_reaches_the_operation_itself() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.ops.sequencer2d.bilstm2d(*arguments(torch.float32, False, 2))[0]
    assert y.dtype == torch.bfloat16


COMPILED = """
import torch
from sequencer2d.layers import BiLSTM2D

torch._dynamo.config.allow_rnn = allow_rnn
layer = BiLSTM2D(8, 3)
compiled = torch.compile(layer, backend="aot_eager", fullgraph=allow_rnn)
for shape in ((2, 3, 4, 8), (1, 5, 2, 8)):
    ours, theirs = (torch.ones(shape, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(compiled(ours), layer(theirs))
    compiled(ours).square().sum().backward()
    layer(theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
with torch.autocast("cpu", torch.bfloat16):
    assert torch.equal(compiled(ours), layer(ours))
print("as it should be")
"""


@pytest.mark.slow
@pytest.mark.parametrize("allow_rnn", [False, True])
def test_compiled_it_is_the_same(allow_rnn: bool) -> None:
    """PyTorch's compiler steps around every nn.LSTM, and so around ours, unless it is told not to.

    In a process of its own: the compiler would look into the checks of the test suite.
    """
    program = f"allow_rnn = {allow_rnn}\n{COMPILED}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "as it should be\n", done.stderr


EXPORTED = """
import torch
from sequencer2d import set_backend
from sequencer2d.layers import BiLSTM2D

X = torch.randn(2, 3, 4, 8)
layer = BiLSTM2D(8, 3).eval()
batch, height, width = (torch.export.Dim(name, min=1, max=64) for name in ("batch", "height", "width"))
program = torch.export.export(layer, (X,), dynamic_shapes=({0: batch},))
assert "sequencer2d." not in str(program.graph)
torch.testing.assert_close(program.module()(X[:1]), layer(X[:1]))
set_backend(layer, "native")
program = torch.export.export(layer, (X,), dynamic_shapes=({0: batch, 1: height, 2: width},))
assert "sequencer2d.bilstm2d" in str(program.graph)
x = torch.randn(1, 7, 5, 8)
torch.testing.assert_close(program.module()(x), layer(x))
print("as it should be")
"""


def test_exports_hold_the_operation_only_where_it_was_asked_for() -> None:
    """In a process of its own: PyTorch remembers an exported nn.LSTM, and later exports with other rules then fail."""
    done = subprocess.run([sys.executable, "-c", EXPORTED], capture_output=True, text=True, check=False)
    assert done.stdout == "as it should be\n", done.stderr


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_a_trace_holds_nothing_of_ours(backend: str) -> None:
    layer = BiLSTM2D(8, 3).eval()
    set_backend(layer, backend)
    traced: Any = torch.jit.trace(layer, X)
    assert "sequencer2d::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(X), layer(X))


def test_transforms_of_functions_run_in_pytorch() -> None:
    layer = BiLSTM2D(8, 3)
    gradient = torch.func.grad(lambda x: layer(x).square().sum())(X)
    x = X.clone().requires_grad_()
    layer(x).square().sum().backward()
    torch.testing.assert_close(gradient, x.grad)


def test_counters_see_every_multiplication() -> None:
    layer = BiLSTM2D(8, 3)
    with FlopCounterMode(display=False) as counter:
        layer(X)
    assert counter.get_total_flops() / 2 == bilstm2d_costs(2 * 3 * 4, 8, 3).macs
    model = create_model("sequencer2d_s", layers=(1, 1, 1, 1), num_classes=0).eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() / 2 == pytest.approx(
        costs(model.config, 224).macs, rel=0.01
    )  # a counter leaves norms out
