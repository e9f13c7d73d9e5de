"""Which backend runs is said, can be chosen, and changes neither weights nor results."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from sequencer2d import backends, create_model, set_backend
from sequencer2d.layers import MIXERS, BiLSTM2D
from sequencer2d.native import available, choice, library, residual_norm, serves

X = torch.randn(2, 3, 4, 8)
needs_kernels = pytest.mark.skipif(not available(), reason="the package was installed without kernels")


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if the package had been installed without a compiler."""
    monkeypatch.setattr(library, "PATH", tmp_path / "_kernels.so")
    for cached in (library.kernels, library.kernel, choice._say):
        cached.cache_clear()
    monkeypatch.setattr(library, "kernels", library.kernels.__wrapped__)
    monkeypatch.setattr(library, "kernel", library.kernel.__wrapped__)
    monkeypatch.setattr(choice, "kernels", library.kernels)
    monkeypatch.setattr(choice, "kernel", library.kernel)


@needs_kernels
def test_backends_tell_what_runs_here(kernel_name: str) -> None:
    torchs, native = backends()
    assert torchs.available
    assert torchs.name == "torch"
    assert native.available
    assert native.kernel == kernel_name
    assert "portable" in native.detail


@pytest.mark.usefixtures("without_kernels")
def test_without_kernels_everything_runs_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    native = backends()[1]
    assert not native.available
    assert "install g++ or clang and reinstall sequencer2d" in native.detail
    with caplog.at_level(logging.INFO, "sequencer2d"):
        layer = BiLSTM2D(8, 3)
        layer(X)
        layer(X)
    assert [message for message in caplog.messages if "installed without its CPU kernels" in message] == caplog.messages
    assert len(caplog.messages) == 1
    with pytest.raises(ValueError, match=r"'native' is not available: .* reinstall sequencer2d"):
        set_backend(layer, "native")
    layer.backend = "native"  # a model that comes from a machine with kernels
    with pytest.raises(library.Unavailable, match="use backend='torch'"):
        layer(X)


@needs_kernels
def test_an_unknown_kernel_is_an_error_that_names_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIABLE, "sse9")
    library.kernel.cache_clear()
    try:
        assert "SEQUENCER2D_KERNEL=sse9: the kernels that run on this processor are portable" in backends()[1].detail
        with pytest.raises(ValueError, match="'native' is not available: SEQUENCER2D_KERNEL=sse9"):
            create_model("sequencer2d_s", backend="native")
    finally:
        library.kernel.cache_clear()


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match="backend='cuda' is unknown; there are auto, native, torch"):
        create_model("sequencer2d_s", backend="cuda")


@needs_kernels
@pytest.mark.parametrize("name", MIXERS)
def test_backends_agree_and_share_their_weights(name: str) -> None:
    hidden = {"UnfusedBiLSTM2D": 2, "VerticalBiLSTM": 4, "HorizontalBiLSTM": 4, "BiLSTM1D": 4}.get(name, 3)
    layer = MIXERS[name](8, hidden)
    outputs, gradients, states = {}, {}, {}
    for backend in ("auto", "native", "torch"):
        set_backend(layer, backend)
        x = X.clone().requires_grad_()
        outputs[backend] = layer(x)
        outputs[backend].square().sum().backward()
        gradients[backend] = x.grad
        states[backend] = layer.state_dict().keys()
    assert outputs["auto"].equal(outputs["native"])
    torch.testing.assert_close(outputs["native"], outputs["torch"])
    torch.testing.assert_close(gradients["native"], gradients["torch"])
    assert states["native"] == states["torch"]
    other = {"BiGRU2D", "BiRNN2D"}
    rnns = [module for module in layer.modules() if isinstance(module, nn.RNNBase)]
    assert serves("auto", X, *rnns) == (name not in other)


@needs_kernels
def test_what_the_kernels_cannot_do_is_for_pytorch() -> None:
    layer = BiLSTM2D(8, 3)
    rnns = (layer.rnn_v, layer.rnn_h)
    assert serves("auto", X, *rnns)
    assert not serves("torch", X, *rnns)
    assert not serves("native", X.double(), *rnns)
    assert not serves("auto", X.half(), *rnns)
    assert not serves("auto", X.bfloat16(), *rnns)  # the weights are fp32
    assert not serves("auto", X.to("meta"), *rnns)
    assert not serves("auto", X, nn.LSTM(8, 3, num_layers=2, batch_first=True), layer.rnn_h)
    assert not serves("auto", X, nn.LSTM(8, 3, bias=False, batch_first=True), layer.rnn_h)
    with torch.autocast("cpu", torch.float16):
        assert not serves("auto", X, *rnns)
    with torch.autocast("cpu", torch.bfloat16):
        assert serves("auto", X, *rnns)
    handle = layer.rnn_v.register_forward_hook(lambda *_: None)
    assert not serves("auto", X, *rnns)
    handle.remove()
    assert serves("auto", X, *rnns)


@needs_kernels
@pytest.mark.parametrize("bf16", [False, True])
def test_sizes_that_do_not_fit_are_pytorchs_error(bf16: bool) -> None:
    layer = BiLSTM2D(8, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = layer(X)
        for channels in (4, 12):
            with pytest.raises((RuntimeError, ValueError), match=r"input.size"):
                layer(torch.randn(1, 3, 4, channels))
        assert torch.equal(layer(X), expected)


@needs_kernels
def test_lstms_of_unlike_sizes_run_in_pytorch() -> None:
    layer = BiLSTM2D(8, 3)
    layer.rnn_h = nn.LSTM(8, 5, batch_first=True, bidirectional=True)
    layer.fc = nn.Linear(16, 8)
    assert not serves("auto", X, layer.rnn_v, layer.rnn_h)
    assert layer(X).shape == X.shape


def test_train_takes_every_backend() -> None:
    from sequencer2d.training.config import TrainConfig

    assert TrainConfig(backend="native").backend == "native"


@needs_kernels
def test_doubles_stay_doubles_under_autocast() -> None:
    """As autocast leaves them."""
    torch.manual_seed(0)
    model = create_model("sequencer2d_conv_t_patch4_32", num_classes=3).double().eval()
    nn.init.normal_(model.get_parameter("head.fc.weight"))
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)  # enough for the kernel of convolutions

    def results() -> list[torch.Tensor]:
        logits = model(images)
        return [logits, *torch.autograd.grad(logits.sum(), list(model.parameters()))]

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, results(), expected))


@needs_kernels
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # PyTorch's own rules for these derivatives
def test_forward_mode_derivatives_are_pytorchs() -> None:
    """Without gradients for the backward mode, too, where a tangent would be lost without a word."""
    torch.manual_seed(0)
    norm, x, tangent = nn.LayerNorm(64), torch.randn(1, 4, 4, 64), torch.randn(1, 4, 4, 64)
    with torch.no_grad(), forward_ad.dual_level():
        _, y = residual_norm(forward_ad.make_dual(x, tangent), None, nn.Identity(), norm, "auto")
        found = forward_ad.unpack_dual(y).tangent
    assert found is not None
    step = 1e-2
    with torch.no_grad():
        expected = (norm(x + step * tangent) - norm(x - step * tangent)) / (2 * step)
    assert (found - expected).norm() < 1e-2 * expected.norm()
