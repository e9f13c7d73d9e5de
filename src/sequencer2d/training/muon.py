"""Muon (Jordan et al. 2024): momentum whose update is made orthogonal, for the matrices of a network.

It differs from timm's `Muon` (`timm/optim/muon.py`), whose learning-rate scale it has, in two points. The matrices of
a gate of an LSTM are maps of their own and are made orthogonal one by one, not as the stack in which PyTorch keeps
them; and all matrices of one shape go through the iteration together. A step of it costs a third (docs/LOG.md).
"""

import math
from collections import defaultdict
from collections.abc import Collection
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim.adamw import adamw

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def muon_groups(
    model: nn.Module, weight_decay: float, no_weight_decay: Collection[str] = (), *, keep_norms: bool = False
) -> list[dict[str, Any]]:
    """Parameter groups for `Muon`: AdamW's, and matrices by the number of maps that are stacked in them.

    AdamW takes biases, norms and the parameters named in `no_weight_decay`, which are not decayed, and the classifier,
    which the model's `get_classifier()` tells, as timm's do. With `keep_norms`, convolutions before batch norms keep
    their norm and are not decayed.
    """
    gates: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            count = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
            gates |= {id(weight): count for weight in module.parameters() if weight.ndim == 2}
    vectors = {id(model.get_parameter(name)) for name in no_weight_decay}
    vectors |= {id(parameter) for parameter in model.get_classifier().parameters()}  # type: ignore[operator]
    kept = _before_batch_norms(model) if keep_norms else set()
    groups: dict[tuple[float, int, bool], list[Tensor]] = defaultdict(list)
    for group in param_groups_weight_decay(model, weight_decay, no_weight_decay_list=no_weight_decay):
        for parameter in group["params"]:
            plain = parameter.ndim < 2 or id(parameter) in vectors
            keeps = id(parameter) in kept
            maps = 0 if plain else gates.get(id(parameter), 1)
            groups[0.0 if keeps else group["weight_decay"], maps, keeps].append(parameter)
    return [
        {"params": params, "weight_decay": decay, "maps": maps, "keep_norms": keeps}
        for (decay, maps, keeps), params in groups.items()
    ]


def _before_batch_norms(model: nn.Module) -> set[int]:
    """Weights of convolutions whose size does not matter, since a batch norm takes what they put out.

    Found by the order in which a model has its modules, which is that of its forward pass.
    """
    found: set[int] = set()
    before: nn.Module | None = None
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and isinstance(before, nn.Conv2d) and before.bias is None:
            found.add(id(before.weight))
        if module._parameters:
            before = module
    return found


class Muon(torch.optim.Optimizer):
    """Muon for groups of matrices, AdamW for the others, at one learning rate for both.

    A group's `maps` says how many matrices are stacked along the first axis of each of its parameters; kernels of
    convolutions are flattened to one; 0 means AdamW. An update has about the size of AdamW's (Moonlight, Liu et al.
    2025), so AdamW's learning rates and weight decay fit. With `keep_norms` each parameter keeps its norm, so that its
    updates do not become smaller relative to it as it grows (as the convolutions of Jordan 2024, `airbench94_muon.py`).

    Args:
        params: Groups with `params`, `maps` and `weight_decay`, as by `muon_groups`.
        lr: Learning rate.
        momentum: Of Muon's average of gradients, with Nesterov's step.
        betas: AdamW's.
        dtype: Of the orthogonalisation; bf16 is enough where the hardware has it.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.dtype = dtype
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": 0.0, "maps": 0, "keep_norms": False}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            (self._step_muon if group["maps"] else self._step_adamw)(parameters, group)
        return loss

    def _step_muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            direction = gradient.lerp(average, group["momentum"]).flatten(1)
            matrices = direction.unflatten(0, (group["maps"], -1))
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            by_shape[matrices.shape[1:]].append((parameter, matrices))
        for shape, pairs in by_shape.items():
            updates = orthogonalize(torch.cat([matrices for _, matrices in pairs]).to(self.dtype))
            size = 0.2 * math.sqrt(max(shape))
            for (parameter, _), update in zip(pairs, updates.split(group["maps"]), strict=True):
                norm = parameter.norm() if group.get("keep_norms") else None  # older checkpoints have no such key
                parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * size)
                if norm is not None:
                    parameter.mul_(norm / parameter.norm().clamp(min=1e-12))

    def _step_adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        if not parameters:
            return
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix of each, roughly: singular values come out between 0.7 and 1.2.

    By five Newton-Schulz iterations in the precision of the input; a matrix of zeros stays one.

    Args:
        matrices: `[N, rows, columns]`.
    """
    wide = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if wide is not matrices else x
