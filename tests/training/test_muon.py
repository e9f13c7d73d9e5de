"""Muon against its definition by singular vectors, gate by gate, and against AdamW where it is AdamW."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sequencer2d.model import Sequencer2D
from sequencer2d.training.muon import Muon, muon_groups, orthogonalize
from sequencer2d.zoo import create_model


@pytest.fixture
def model() -> Sequencer2D:
    torch.manual_seed(0)
    return create_model("sequencer2d_conv_p_patch2_16", num_classes=3)


def singular(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix.float())


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 24), (3, 24, 8), (1, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_become_about_one_and_singular_vectors_stay(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices.to(dtype)).float()
    assert result.shape == matrices.shape
    values = singular(result)
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    between = u.mT @ result @ vh.mT
    off_diagonal = between - torch.diag_embed(between.diagonal(dim1=1, dim2=2))
    assert off_diagonal.abs().max() < (1e-4 if dtype == torch.float32 else 0.1)


def test_size_does_not_matter_and_nothing_stays_nothing() -> None:
    matrices = torch.randn(2, 4, 6)
    torch.testing.assert_close(orthogonalize(matrices * 1e3), orthogonalize(matrices), rtol=1e-3, atol=1e-4)
    assert orthogonalize(torch.zeros(1, 4, 4)).eq(0).all()


def test_every_parameter_is_in_one_group_and_only_matrices_are_decayed(model: Sequencer2D) -> None:
    groups = muon_groups(model, 0.05)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = found[id(parameter)]
        assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0), name
        recurrent = ".weight_ih" in name or ".weight_hh" in name
        assert group["maps"] == (0 if parameter.ndim < 2 or name == "head.fc.weight" else 4 if recurrent else 1), name


def test_a_position_embedding_is_no_matrix() -> None:
    model = create_model("sequencer2d_conv_p_patch2_16", pos_embed_size=(8, 8))
    groups = muon_groups(model, 0.05, model.no_weight_decay())
    (group,) = (g for g in groups if any(p is model.pos_embed.get_parameter("weight") for p in g["params"]))
    assert (group["weight_decay"], group["maps"]) == (0.0, 0)


@pytest.mark.parametrize("keep_norms", [True, False])
def test_convolutions_before_batch_norms_can_keep_their_norm(keep_norms: bool) -> None:
    """And nothing else does: not the strided ones between stages, which no batch norm follows."""
    torch.manual_seed(0)
    model = create_model("sequencer2d_conv_t_patch4_32", num_classes=3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    groups = muon_groups(model, 0.5, keep_norms=keep_norms)
    Muon(groups, 0.1, dtype=torch.float32).step()
    kept = []
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and name != "head.fc.weight":
            assert not torch.equal(parameter, before[name]), name
            if math.isclose(parameter.norm().item(), before[name].norm().item(), rel_tol=1e-5):
                kept.append(name)
    convolutions = [name for name, weight in before.items() if weight.ndim == 4 and name.startswith("stem.")]
    assert len(convolutions) > 1
    assert kept == (convolutions if keep_norms else [])
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert {decays[id(model.get_parameter(name))] for name in convolutions} == {0.0 if keep_norms else 0.5}


def test_a_convolution_with_a_bias_or_without_a_batch_norm_keeps_no_norm() -> None:
    layers = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False), nn.GroupNorm(1, 4)]
    model = Cells({str(i): layer for i, layer in enumerate([*layers, nn.BatchNorm2d(4)])} | {"head": nn.Identity()})
    assert not any(group["keep_norms"] for group in muon_groups(model, 0.1, keep_norms=True))


class Cells(nn.ModuleDict):
    """Some layers and a head."""

    def get_classifier(self) -> nn.Module:
        return self["head"]


@pytest.mark.parametrize(("cell", "gates"), [(nn.GRU, 3), (nn.RNN, 1)])
def test_other_cells_have_other_gates(cell: Callable[[int, int], nn.Module], gates: int) -> None:
    model = Cells({"cell": cell(4, 2), "head": nn.Linear(2, 2)})
    assert {group["maps"] for group in muon_groups(model, 0.1)} == {0, gates}


def test_the_gates_of_an_lstm_are_steps_of_their_own() -> None:
    torch.manual_seed(0)
    model = Cells({"lstm": nn.LSTM(6, 3), "mlp": nn.Linear(6, 3, bias=False), "head": nn.Identity()})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    Muon(muon_groups(model, 0.5), 0.1, momentum=0.9, dtype=torch.float32).step()
    for name, maps in (("lstm.weight_ih_l0", 4), ("lstm.weight_hh_l0", 4), ("mlp.weight", 1)):
        parameter = model.get_parameter(name)
        assert parameter.grad is not None
        for old, new, gradient in zip(*(x.chunk(maps) for x in (before[name], parameter, parameter.grad)), strict=True):
            update = (old * (1 - 0.1 * 0.5) - new) / 0.1
            expected = orthogonalize(gradient[None])[0] * 0.2 * math.sqrt(max(gradient.shape))
            torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)


def test_momentum_is_nesterov_s() -> None:
    weight = nn.Parameter(torch.zeros(2, 3))
    optimizer = Muon([{"params": [weight], "maps": 1}], 1.0, momentum=0.8, dtype=torch.float32)
    first, second = torch.randn(2, 3), torch.randn(2, 3)
    weight.grad = first
    optimizer.step()
    after_one = weight.detach().clone()
    weight.grad = second
    optimizer.step()
    average = 0.8 * 0.2 * first + 0.2 * second
    expected = orthogonalize((0.2 * second + 0.8 * average)[None])[0] * 0.2 * math.sqrt(3)
    torch.testing.assert_close(after_one - weight, expected, rtol=1e-4, atol=1e-5)


def test_what_is_no_matrix_is_stepped_by_adamw() -> None:
    parameters = [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2, 3))]
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    ours = Muon([{"params": parameters, "weight_decay": 0.1, "maps": 0}], 0.01, betas=(0.8, 0.9))
    theirs = torch.optim.AdamW(twins, 0.01, betas=(0.8, 0.9), weight_decay=0.1)
    for _ in range(3):
        for parameter, twin in zip(parameters, twins, strict=True):
            parameter.grad = torch.randn_like(parameter)
            twin.grad = parameter.grad.clone()
        ours.step()
        theirs.step()
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter, twin)


def test_parameters_without_gradient_are_left_alone(model: Sequencer2D) -> None:
    before = [parameter.detach().clone() for parameter in model.parameters()]
    Muon(muon_groups(model, 0.1), 0.1).step()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
