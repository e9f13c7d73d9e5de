"""A block at once computes what its parts compute, and stands aside where it cannot."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from sequencer2d import create_model, set_backend
from sequencer2d.layers import LSTM2D, MIXERS, BiLSTM2D, Sequencer2DBlock
from sequencer2d.native import available, infer_block

pytestmark = pytest.mark.skipif(not available(), reason="the package was installed without kernels")


def make_block(mixer: type[nn.Module] = BiLSTM2D, **arguments: Any) -> Sequencer2DBlock:
    torch.manual_seed(0)
    block = Sequencer2DBlock(20, 5, mixer=mixer, **arguments).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def infer(block: Sequencer2DBlock, x: Tensor) -> Tensor | None:
    with torch.no_grad():
        return infer_block(block, x, BiLSTM2D.forward)


def by_pytorch(block: Sequencer2DBlock, x: Tensor) -> Tensor:
    set_backend(block, "torch")
    try:
        with torch.no_grad():
            return block(x)
    finally:
        set_backend(block, "auto")


@pytest.mark.parametrize("mixer", [BiLSTM2D, LSTM2D])
@pytest.mark.parametrize(
    ("stored", "weights", "autocast", "bound"),
    [
        (torch.float32, torch.float32, False, 2e-6),
        (torch.float32, torch.float32, True, 1e-2),
        (torch.bfloat16, torch.float32, True, 1e-2),
        (torch.bfloat16, torch.bfloat16, False, 1e-2),
    ],
    ids=["fp32", "autocast", "autocast of bf16 tokens", "bf16"],
)
def test_a_block_at_once_is_its_parts(
    kernel_name: str,
    mixer: type[nn.Module],
    stored: torch.dtype,
    weights: torch.dtype,
    autocast: bool,
    bound: float,
) -> None:
    block, x = make_block(mixer), torch.randn(2, 6, 5, 20).to(stored)
    truth = by_pytorch(block.double(), x.double())
    block.to(weights)
    before = x.clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, called = infer(block, x), block.requires_grad_(False)(x)
    assert y is not None
    assert y.dtype == stored
    assert torch.equal(x, before)
    assert torch.equal(y, called) or autocast or stored == torch.bfloat16  # sums in place round as others do
    assert (y.double() - truth).norm() <= bound * truth.norm()


def hook(block: Any) -> None:
    block.mlp_channels.drop1.register_forward_hook(lambda *_: None)


class Negative(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return -super().forward(input)


def negate(block: Any) -> None:
    block.mlp_channels.fc1.__class__ = type(
        "Negative", (nn.Linear,), {"forward": lambda self, x: -nn.Linear.forward(self, x)}
    )


def patched(block: Any) -> None:
    forward = block.rnn_tokens.fc.forward
    block.rnn_tokens.fc.forward = lambda x: 2 * forward(x)


def another_dropout(block: Any) -> None:
    block.mlp_channels.drop2 = nn.Tanh()


def tanh_gelu(block: Any) -> None:
    block.mlp_channels.act = nn.GELU(approximate="tanh")


def normalised(block: Any) -> None:
    nn.utils.parametrizations.weight_norm(block.rnn_tokens.fc)


def pruned(block: Any) -> None:
    weight = block.rnn_tokens.rnn_v._parameters.pop("weight_hh_l0")
    block.rnn_tokens.rnn_v.weight_hh_l0 = weight.detach() / 2


def without_bias(block: Any) -> None:
    block.mlp_channels.fc2.bias = None


def dropout_alone(block: Any) -> None:
    block.mlp_channels.drop1.train().p = 0.5


def drop_path(block: Any) -> None:
    block.drop_path = DropPath(0.5).train()


def another_backend(block: Any) -> None:
    block.rnn_tokens.backend = "torch"


@pytest.mark.parametrize(
    "change",
    [
        hook,
        negate,
        patched,
        another_dropout,
        tanh_gelu,
        normalised,
        pruned,
        without_bias,
        dropout_alone,
        drop_path,
        another_backend,
    ],
    ids=lambda change: change.__name__,
)
def test_it_stands_aside_where_a_part_is_another(change: Callable[[Any], None]) -> None:
    block, x = make_block(), torch.randn(2, 3, 4, 20)
    plain = infer(block, x)
    assert plain is not None
    change(block)
    assert infer(block, x) is None
    torch.manual_seed(1)
    with torch.no_grad():
        changed = block(x)
    torch.manual_seed(1)
    if change is not pruned:  # nn.LSTM itself does not take it
        torch.testing.assert_close(changed, by_pytorch(block, x), rtol=1e-4, atol=1e-5)


def test_it_stands_aside_for_gradients_other_mixers_and_layouts() -> None:
    x = torch.randn(2, 4, 4, 20)
    assert infer_block(make_block(), x, BiLSTM2D.forward) is None
    with torch.no_grad():
        assert infer_block(make_block(MIXERS["BiGRU2D"]), x, BiLSTM2D.forward) is None
        assert infer_block(make_block(MIXERS["AddBiLSTM2D"]), x, BiLSTM2D.forward) is None
        assert infer_block(make_block(), x.transpose(1, 2), BiLSTM2D.forward) is None
        assert infer_block(make_block(), x[:0], BiLSTM2D.forward) is None
        assert infer_block(make_block(), torch.randn(2, 4, 4, 20).double(), BiLSTM2D.forward) is None
        with pytest.raises(RuntimeError):
            make_block()(torch.randn(2, 4, 4, 19))


def test_it_follows_the_weights() -> None:
    block, x = make_block(), torch.randn(2, 3, 4, 20)
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: block.norm1.weight.mul_(2),
        lambda: block.rnn_tokens.rnn_h.weight_hh_l0.data.mul_(2),  # type: ignore[union-attr, operator]
        lambda: block.mlp_channels.fc2.weight.data.mul_(2),
        lambda: block.load_state_dict(make_block().state_dict()),
        lambda: setattr(block.norm2, "eps", 1.0),
    ]
    for change in changes:
        with torch.no_grad():
            change()
        ours = infer(block, x)
        assert ours is not None
        torch.testing.assert_close(ours, by_pytorch(block, x), rtol=1e-4, atol=1e-5)


def test_every_block_of_a_model_is_inferred_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[bool] = []

    def seen(*arguments: Any) -> Tensor | None:
        y = infer_block(*arguments)
        answers.append(y is not None)
        return y

    monkeypatch.setattr("sequencer2d.native.infer_block", seen)
    model = create_model("sequencer2d_conv_t_patch4_32").eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert answers == [True] * 3
