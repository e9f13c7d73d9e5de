"""Recurrent layers written out step by step, in PyTorch's order of gates: slow, plain, and what ours must equal."""

from typing import Any

import torch
from torch import Tensor, nn


def rnn_by_hand(rnn: nn.RNNBase, x: Tensor) -> Tensor:
    """One layer over `[N, T, C]`, of either direction or both: `[N, T, directions · D]`."""
    outputs = []
    for suffix in ("", "_reverse")[: 2 if rnn.bidirectional else 1]:
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        weights = [rnn.get_parameter(name + suffix) for name in names]
        tokens = list(x.unbind(1))
        steps = _steps(rnn, tokens[::-1] if suffix else tokens, *weights)
        outputs.append(torch.stack(steps[::-1] if suffix else steps, dim=1))
    return torch.cat(outputs, dim=-1)


def _steps(
    rnn: nn.RNNBase, tokens: list[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> list[Tensor]:
    h = c = tokens[0].new_zeros(len(tokens[0]), rnn.hidden_size)
    outputs = []
    for x in tokens:
        from_input, from_state = x @ w_ih.T + b_ih, h @ w_hh.T + b_hh
        if rnn.mode == "LSTM":
            i, f, g, o = (from_input + from_state).chunk(4, dim=-1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        elif rnn.mode == "GRU":
            (r, z, n), (r_h, z_h, n_h) = from_input.chunk(3, dim=-1), from_state.chunk(3, dim=-1)
            z = torch.sigmoid(z + z_h)
            h = (1 - z) * torch.tanh(n + torch.sigmoid(r + r_h) * n_h) + z * h
        else:
            h = torch.tanh(from_input + from_state)
        outputs.append(h)
    return outputs


class Frugal(torch.autograd.Function):
    """A layer of LSTMs that has in memory what its gradient needs and no more; its values mean nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rnn: nn.RNNBase) -> Tensor:
        width = rnn.hidden_size * (2 if rnn.bidirectional else 1)
        gates = torch.empty(*x.shape[:2], width * 4)
        output = torch.empty(*x.shape[:2], width)
        if x.requires_grad or torch.is_grad_enabled():
            ctx.save_for_backward(x, gates, torch.empty_like(output), output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError


class FrugalLSTM(nn.Module):
    """Stands in for an LSTM of PyTorch where memory is counted."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return Frugal.apply(x, self.rnn), None  # type: ignore[return-value]


class ByHand(nn.Module):
    """Stands in for a recurrent layer of PyTorch."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return rnn_by_hand(self.rnn, x), None


def replace_rnns(model: nn.Module, kind: type[ByHand] | type[FrugalLSTM]) -> None:
    """Puts a stand-in in the place of every recurrent layer."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.RNNBase):
            setattr(model, name, kind(child))
        else:
            replace_rnns(child, kind)
