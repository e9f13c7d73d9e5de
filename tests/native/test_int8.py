"""The int8 kernels compute what their formulas say, in exact integers between roundings, at any size."""

import copy
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sequencer2d.native import available, int8, library
from sequencer2d.native.int8 import Affine, Int8Linear, Packed, finish, project

pytestmark = pytest.mark.skipif(not available(), reason="the package was installed without kernels")

EPS = 1e-6


def make_affine(channels: int, size: float) -> Affine:
    """Brings values of about `size` to most of the 256 levels."""
    return Affine(30 / size * (0.5 + torch.rand(channels)), 128 + 20 * torch.randn(channels))


def make_linear(inputs: int, outputs: int) -> Int8Linear:
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    scale = (0.5 + torch.rand(outputs)) / (5000 * inputs**0.5)
    return Int8Linear(weight, scale, torch.randn(outputs) - 128 * scale * weight.float().sum(1))


def to_bytes(x: Tensor, affine: Affine) -> Tensor:
    """Not yet rounded."""
    return (x * affine.scale.double() + affine.shift.double()).clamp(0, 255)


def apply(linear: Int8Linear, levels: Tensor) -> Tensor:
    return linear.scale.double() * (levels @ linear.weight.double().T) + linear.bias.double()


def undecided(levels: Tensor) -> Tensor:
    """1 where a level is within 0.01 of the middle of two and may be rounded to either, else 0."""
    return ((levels - levels.floor() - 0.5).abs() < 0.01).double()


def slack(linear: Int8Linear, levels: Tensor) -> Tensor:
    """What an output may differ by where undecided levels were rounded the other way."""
    return linear.scale.double() * (undecided(levels) @ linear.weight.double().abs().T)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.one_of(st.integers(0, 20), st.integers(90, 200)),
    channels=st.integers(1, 70),
    outputs=st.integers(1, 130),
    seed=st.integers(0, 1000),
)
def test_norm_and_product_of_any_size(kernel_name: str, tokens: int, channels: int, outputs: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(tokens, channels) * 3 + 1
    norm, linear = make_affine(channels, 1.0), make_linear(channels, outputs)
    guard = torch.full((tokens + 2, outputs), 7.0, dtype=torch.bfloat16)
    project(x, norm, linear, EPS, guard[1:-1])
    levels = to_bytes(F.layer_norm(x.double(), (channels,), eps=EPS), norm)
    expected = apply(linear, levels.round())
    # beside bf16's rounding, levels of 0.5 may fall to either side
    error = (guard[1:-1].double() - expected).abs() - slack(linear, levels)
    assert (error <= 0.005 * expected.abs() + 1e-3).all()
    assert (guard[[0, -1]] == 7).all(), "memory beside the output was written"


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.one_of(st.integers(0, 20), st.integers(90, 200)),
    channels=st.integers(2, 70),
    mixed=st.integers(1, 70),
    wide=st.integers(1, 130),
    seed=st.integers(0, 1000),
)
def test_the_rest_of_a_block_of_any_size(
    kernel_name: str, tokens: int, channels: int, mixed: int, wide: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x, hidden = torch.randn(tokens, channels), torch.randn(tokens, mixed).bfloat16()
    states, norm, active = make_affine(mixed, 1.0), make_affine(channels, 1.0), make_affine(wide, 2.0)
    fc, fc1, fc2 = make_linear(mixed, channels), make_linear(channels, wide), make_linear(wide, channels)
    ours = x.clone()
    finish(hidden, ours, states, fc, norm, fc1, active, fc2, EPS)
    y = x.double() + apply(fc, to_bytes(hidden.double(), states).round())
    inner = apply(fc1, to_bytes(F.layer_norm(y, (channels,), eps=EPS), norm).round())
    levels = to_bytes(F.gelu(inner), active)
    # Two channels have one norm in all tokens, whose levels may be undecided all together.
    assume(not levels.numel() or undecided(levels).mean() < 0.2)
    y = y + apply(fc2, levels.round())
    # Three roundings on top of each other: a level of 0.5 that falls to the other side moves all that follows.
    assert (ours - y).norm() <= 0.02 * (y - x).norm() + 1e-6


def test_gelu_is_exact_to_far_less_than_a_level(kernel_name: str) -> None:
    values = torch.cat([torch.linspace(-12, 12, 2001), torch.tensor([1e6, -1e6, torch.inf])])
    wide = len(values)
    fc = Int8Linear(torch.zeros(1, 1, dtype=torch.int8), torch.zeros(1), torch.zeros(1))
    fc1 = Int8Linear(torch.zeros(wide, 1, dtype=torch.int8), torch.zeros(wide), values)
    active = Affine(torch.full((wide,), 255 / 0.5), 255 * torch.ones(wide) / 2 - F.gelu(values).clamp(-1, 20) * 510)
    norm = Affine(torch.ones(1), torch.zeros(1))
    for place in range(0, wide, 97):
        weight = torch.zeros(1, wide, dtype=torch.int8)
        weight[0, place] = 1
        x = torch.zeros(1, 1)
        fc2 = Int8Linear(weight, torch.ones(1), torch.zeros(1))
        finish(torch.zeros(1, 1).bfloat16(), x, norm, fc, norm, fc1, active, fc2, EPS)
        if values[place].abs() <= 12:
            assert abs(x.item() - 127.5) <= 1  # 1/510 of a unit each


def test_largest_levels_and_weights_do_not_overflow(kernel_name: str) -> None:
    channels = 1152
    x = torch.randn(3, channels)
    norm = Affine(torch.zeros(channels), torch.full((channels,), 1e9))
    linear = Int8Linear(torch.full((5, channels), -127, dtype=torch.int8), torch.ones(5), torch.zeros(5))
    gates = torch.empty(3, 5, dtype=torch.bfloat16)
    project(x, norm, linear, EPS, gates)
    assert torch.equal(gates, torch.full_like(gates, -127.0 * 255 * channels))


def test_what_is_no_number_stays_in_its_token(kernel_name: str) -> None:
    torch.manual_seed(0)
    x, hidden = torch.randn(5, 17), torch.randn(5, 9).bfloat16()
    parts = (
        *(make_affine(9, 1.0), make_linear(9, 17), make_affine(17, 1.0), make_linear(17, 33)),
        *(make_affine(33, 2.0), make_linear(33, 17)),
    )
    expected = x.clone()
    finish(hidden, expected, *parts, EPS)
    x[2, 3], hidden[1, 4] = torch.nan, torch.inf
    finish(hidden, x, *parts, EPS)
    assert x[2, 3].isnan()
    assert torch.equal(x[[0, 3, 4]], expected[[0, 3, 4]])
    assert x[1].isfinite().all()


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_change_nothing(kernel_name: str, threads: int) -> None:
    torch.manual_seed(0)
    x, norm, linear = torch.randn(500, 33), make_affine(33, 1.0), make_linear(33, 70)
    one, many = (torch.empty(500, 70, dtype=torch.bfloat16) for _ in range(2))
    project(x, norm, linear, EPS, one)
    torch.set_num_threads(threads)
    project(x, norm, linear, EPS, many)
    torch.set_num_threads(1)
    assert torch.equal(one, many)


def test_weights_live_as_long_as_a_kernel_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread that calls for the first time, too, may put its own in their place meanwhile."""
    by, linear, alive = copy.copy(library.kernel()), make_linear(32, 16), []
    real = by.library.sequencer2d_int8_project

    def watched(number: int, arguments: Any) -> int:
        assert linear._packed._kept is not None
        weights = weakref.ref(linear._packed._kept[3])
        linear._packed = Packed()
        gc.collect()
        alive.append(weights() is not None)
        return real(number, arguments)

    names = ("sequencer2d_packed_int8_bytes", "sequencer2d_pack_int8")
    functions = {name: getattr(by.library, name) for name in names}
    object.__setattr__(by, "library", SimpleNamespace(**functions, sequencer2d_int8_project=watched))
    monkeypatch.setattr(int8, "kernel", lambda: by)
    project(torch.randn(8, 32), make_affine(32, 1.0), linear, EPS, torch.empty(8, 16, dtype=torch.bfloat16))
    assert alive == [True]


def test_weights_are_packed_once_and_anew_after_a_change() -> None:
    linear, x, norm = make_linear(32, 16), torch.randn(8, 32), make_affine(32, 1.0)

    def gates() -> Tensor:
        out = torch.empty(8, 16, dtype=torch.bfloat16)
        project(x, norm, linear, EPS, out)
        return out

    before = gates()
    kept = linear._packed._kept
    assert torch.equal(gates(), before)
    assert linear._packed._kept is kept
    other = make_linear(32, 16)
    linear.load_state_dict(other.state_dict())
    after = gates()
    assert not torch.equal(after, before)
    again = copy.deepcopy(linear)
    linear = other
    assert torch.equal(gates(), after)
    linear = again
    assert torch.equal(gates(), after)
    for _ in range(2):  # a copy of what has changed since it was called
        linear = make_linear(32, 16)
        for _ in range(2):
            gates()
            linear.load_state_dict(other.state_dict())
            linear = copy.deepcopy(linear)
            assert torch.equal(gates(), after)
            linear.load_state_dict(make_linear(32, 16).state_dict())
