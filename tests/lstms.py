"""LSTMs over feature maps: by PyTorch, in any precision, as what the CPU kernels must equal."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


def make_lstms(
    channels: int, hidden: int, bidirectional: bool = True, axes: str = "vh", scale: float = 1.0
) -> tuple[nn.LSTM | None, nn.LSTM | None]:
    """The columns' and the rows' LSTM, as far as `axes` names them."""
    vertical, horizontal = (
        nn.LSTM(channels, hidden, batch_first=True, bidirectional=bidirectional) if axis in axes else None
        for axis in "vh"
    )
    for rnn in (vertical, horizontal):
        for parameter in rnn.parameters() if rnn else ():
            parameter.data *= scale
    return vertical, horizontal


def by_pytorch(x: Tensor, rnn_v: nn.LSTM | None, rnn_h: nn.LSTM | None) -> Tensor:
    """What `native.bilstm2d` computes."""
    outputs = [over_rows(rnn_v, x.transpose(1, 2)).transpose(1, 2)] if rnn_v else []
    return torch.cat([*outputs, over_rows(rnn_h, x)] if rnn_h else outputs, dim=-1)


def over_rows(rnn: nn.LSTM, x: Tensor) -> Tensor:
    """An LSTM over every row of `[B, H, W, C]`."""
    return rnn(x.flatten(0, 1))[0].unflatten(0, x.shape[:2])


def outputs_and_gradients(
    function: Callable[..., Tensor],
    x: Tensor,
    rnns: tuple[nn.LSTM | None, nn.LSTM | None],
    grad_y: Tensor,
    *,
    bf16: bool = False,
) -> dict[str, Tensor]:
    """Output, gradient of the input and of every parameter, by name."""
    named = {
        f"{axis}.{name}": p for axis, rnn in zip("vh", rnns, strict=True) if rnn for name, p in rnn.named_parameters()
    }
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = function(x, *rnns)
    gradients = torch.autograd.grad(y, [x, *named.values()], grad_y.to(y.dtype))
    return {"y": y.detach(), "x": gradients[0], **dict(zip(named, gradients[1:], strict=True))}


def in_double(x: Tensor, rnns: tuple[nn.LSTM | None, nn.LSTM | None], grad_y: Tensor) -> dict[str, Tensor]:
    """The same in fp64: the truth."""
    rnn_v, rnn_h = (copy.deepcopy(rnn).double() if rnn else None for rnn in rnns)
    return outputs_and_gradients(by_pytorch, x.double(), (rnn_v, rnn_h), grad_y.double())


def relative_error(values: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; the difference itself where the truth is zero."""
    difference = (values.double() - truth).norm()
    return float(difference / truth.norm() if truth.norm() > 0 else difference)
