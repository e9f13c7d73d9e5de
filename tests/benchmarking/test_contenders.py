"""Contenders compute the same thing, or say that they do not."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sequencer2d.benchmarking import contenders
from sequencer2d.benchmarking.contenders import CONTENDERS, TOLERANCE, Running, find_contenders, reference, tolerance
from sequencer2d.benchmarking.worker import serve
from sequencer2d.benchmarking.workload import Mode, Workload

TINY = Workload(model="sequencer2d_t_patch2_32", mode="infer", image_size=8, batch_size=2, threads=1, num_classes=5)


PAIRS = [
    pytest.param(name, mode, marks=pytest.mark.slow if "compiled" in name else ())  # for half a minute
    for name, contender in CONTENDERS.items()
    for mode in contender.modes
]


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """A worker flushes them for good; here it shares its process with other tests."""
    yield
    torch.set_flush_denormal(False)


@pytest.mark.filterwarnings("ignore")  # of converters, about themselves
@pytest.mark.parametrize(("name", "mode"), PAIRS)
def test_each_computes_what_ours_does(name: str, mode: Mode) -> None:
    for package in CONTENDERS[name].packages:
        pytest.importorskip(package, reason="comes with sequencer2d[export]")
    error = error_of(name, replace(TINY, mode=mode))
    assert error <= tolerance(name, mode)
    assert error > 0 or name.endswith("fp32")  # else the precision is another than it says


def error_of(name: str, workload: Workload) -> float:
    state, expected = reference(workload)
    found = CONTENDERS[name].build(workload, state).step().float()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_the_reference_is_sensitive_to_every_weight_and_repeats_itself(mode: Mode) -> None:
    workload = replace(TINY, mode=mode)
    state, expected = reference(workload)
    assert torch.equal(reference(workload)[1], expected)
    assert expected.norm() > 0
    for name, weights in state.items():
        changed = {**state, name: weights + 0.1 * torch.randn_like(weights)}
        found = CONTENDERS["timm:fp32"].build(workload, changed).step()
        assert relative(found, expected) > TOLERANCE[mode, "fp32"], name


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_weights_are_updated_with_cleared_gradients() -> None:
    workload = replace(TINY, mode="train")
    state, _ = reference(workload)
    running = CONTENDERS["timm:fp32"].build(workload, state)
    first, second, third = (running.step().clone() for _ in range(3))
    assert not torch.equal(first, second)
    assert relative(second, first) < 0.5  # a second gradient on top of the first would be twice as long
    assert relative(third, second) < 0.5


def test_one_that_computes_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CONTENDERS["timm:fp32"]
    wrong = replace(right, build=lambda workload, _: Running(step=lambda: torch.zeros(workload.batch_size, 5)))
    monkeypatch.setitem(CONTENDERS, "timm:fp32", wrong)
    with pytest.raises(ValueError, match=r"computes something else: relative error of the logits 1, allowed is 0\.001"):
        list(serve("timm:fp32", TINY, []))


def test_what_timm_has_not_is_told() -> None:
    workload = replace(TINY, model="sequencer2d_conv_p_patch2_16")
    with pytest.raises(ValueError, match=r"timm's Sequencer2d has no stem_widths=\(64,\)"):
        contenders._timms_net(workload, {})


def test_a_worker_repeats_short_steps_and_tells_seconds_memory_and_idleness() -> None:
    ready, turn = serve("sequencer2d-torch:fp32", TINY, ["0.3\n"])
    assert ready["output_error"] == 0
    assert ready["detail"] == "blocks in PyTorch"
    assert ready["before_mib"] > 50
    assert len(turn["seconds"]) > 1
    assert all(seconds > 0 for seconds in turn["seconds"])
    assert turn["peak_mib"] > 50


def test_names_are_found_with_and_without_precision() -> None:
    assert find_contenders("timm", "train") == ["timm:fp32", "timm:bf16"]
    assert find_contenders("openvino:bf16, timm,timm:bf16", "infer") == ["openvino:bf16", "timm:fp32", "timm:bf16"]
    assert find_contenders("sequencer2d", "infer") == [f"sequencer2d:{p}" for p in ("fp32", "bf16", "int8")]


@pytest.mark.parametrize(
    ("text", "mode", "hint"),
    [
        ("tim", "infer", "no contender 'tim': did you mean timm?"),
        ("timm:fp8", "infer", "did you mean timm:"),
        ("", "infer", "no contender '': there are sequencer2d:fp32"),
        ("openvino", "train", "openvino cannot train; there are sequencer2d:fp32"),
        ("sequencer2d-checkpointing:bf16", "infer", "cannot infer"),
    ],
)
def test_other_names_are_told(text: str, mode: Mode, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        find_contenders(text, mode)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"threads": -1}, "threads=-1"),
        ({"model": "resnet"}, "no model is named 'resnet'"),
    ],
)
def test_a_workload_that_cannot_be_is_told(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Workload(**{**TINY.to_dict(), **changes})  # type: ignore[arg-type]
