"""Packed weights are kept between calls, and never after they have changed."""

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lstms import by_pytorch
from sequencer2d.layers import BiLSTM2D
from sequencer2d.native import available, bilstm2d, linear, weights

pytestmark = pytest.mark.skipif(not available(), reason="the package was installed without kernels")

X = torch.randn(2, 3, 4, 8)


def check(layer: BiLSTM2D) -> None:
    """What comes out without gradients belongs to the weights as they are."""
    assert isinstance(layer.rnn_v, nn.LSTM)
    assert isinstance(layer.rnn_h, nn.LSTM)
    with torch.no_grad():
        x = X.to(next(layer.parameters()).dtype)
        expected = by_pytorch(x, layer.rnn_v, layer.rnn_h)
        tolerance = 1e-6 if x.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(bilstm2d(x, layer.rnn_v, layer.rnn_h), expected, rtol=0, atol=tolerance)


def optimizer_step(layer: BiLSTM2D) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(X).square().sum().backward()
    optimizer.step()


def fused_optimizer_step(layer: BiLSTM2D) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    layer(X).square().sum().backward()
    optimizer.step()


def load(layer: BiLSTM2D) -> None:
    layer.load_state_dict(BiLSTM2D(8, 3).state_dict())


def load_by_assignment(layer: BiLSTM2D) -> None:
    layer.load_state_dict(BiLSTM2D(8, 3).state_dict(), assign=True)


def swap_with_an_average(layer: BiLSTM2D) -> None:
    """As pytorch-lightning's WeightAveraging does: through .data, which counts no version."""
    for parameter in layer.parameters():
        versions = parameter._version
        parameter.data.copy_(torch.randn_like(parameter))
        assert parameter._version == versions


def replace_a_parameter_by_nearly_the_same(layer: BiLSTM2D) -> None:
    changed = layer.get_parameter("rnn_v.weight_ih_l0").detach().clone()
    changed[3, 5] += 1
    layer.rnn_v.weight_ih_l0 = nn.Parameter(changed)


def add_to_one_element(layer: BiLSTM2D) -> None:
    with torch.no_grad():
        layer.get_parameter("rnn_h.weight_ih_l0")[3, 5] += 1


def there_and_back(layer: BiLSTM2D) -> None:
    layer.bfloat16()
    check(layer)
    layer.float()


def replace_the_lstm(layer: BiLSTM2D) -> None:
    layer.rnn_h = nn.LSTM(8, 3, batch_first=True, bidirectional=True)


def replace_a_parameter(layer: BiLSTM2D) -> None:
    layer.rnn_v.weight_hh_l0_reverse = nn.Parameter(torch.randn(12, 3))


@pytest.mark.parametrize(
    "change",
    [
        optimizer_step,
        fused_optimizer_step,
        load,
        load_by_assignment,
        swap_with_an_average,
        there_and_back,
        replace_the_lstm,
        replace_a_parameter,
        replace_a_parameter_by_nearly_the_same,
        add_to_one_element,
    ],
    ids=lambda change: change.__name__,
)
def test_a_change_is_seen(change: Callable[[BiLSTM2D], None]) -> None:
    layer = BiLSTM2D(8, 3)
    for _ in range(3):
        check(layer)
        change(layer)
        check(layer)


def test_a_parameter_that_shrinks_in_its_place_is_seen() -> None:
    layer, x = nn.Linear(64, 64), torch.randn(2, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        linear(layer, x, "auto")
        layer.weight.data = layer.weight.data[:16]
        layer.bias.data = layer.bias.data[:16]
        assert linear(layer, x, "auto").shape == (2, 16)


def test_few_values_are_compared() -> None:
    """So that the tests of single elements test the versions and addresses."""
    assert weights._sample(torch.arange(1000)).numel() < 100


def test_each_way_to_call_has_its_weights() -> None:
    layer = BiLSTM2D(8, 3)
    with torch.no_grad():
        exact = layer(X)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                rough = layer(X)
                with torch.enable_grad():
                    assert torch.equal(layer(X), rough)
            assert torch.equal(layer(X), exact)
    with torch.inference_mode():
        torch.testing.assert_close(layer(X), exact)
        check(BiLSTM2D(8, 3))  # its parameters have no version


def test_without_a_change_nothing_is_packed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = BiLSTM2D(8, 3), []
    pack = weights.pack
    monkeypatch.setattr(weights, "pack", lambda *arguments: calls.append(1) or pack(*arguments))
    for _ in range(3):
        check(layer)
    assert len(calls) == 1


def test_copies_and_pickles_know_nothing_of_it() -> None:
    layer = BiLSTM2D(8, 3)
    before = (len(pickle.dumps(layer)), layer.state_dict().keys())
    check(layer)
    assert (len(pickle.dumps(layer)), layer.state_dict().keys()) == before
    other = copy.deepcopy(layer)
    load(other)
    check(other)
    check(layer)


def test_nothing_is_left_of_a_layer_that_is_gone() -> None:
    gc.collect()
    before = len(weights._cache)
    layer = BiLSTM2D(8, 3)
    check(layer)
    assert len(weights._cache) == before + 1
    del layer
    gc.collect()
    assert len(weights._cache) == before
