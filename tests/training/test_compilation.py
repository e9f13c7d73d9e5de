"""Compiled, a model is the same to all but the clock."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from jobs import Job
from runs import assert_same, rows, stop_at, tiny_run
from sequencer2d.model import Sequencer2D, SequencerConfig
from sequencer2d.training import compilation, fitting, run
from sequencer2d.training.compilation import check_compiler, compile_regions
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.faults import TrainingError
from sequencer2d.training.run import train
from sequencer2d.zoo import create_model

# which torch hides from people, but not from those who make errors of warnings
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return replace(tiny_run(tmp_path), compile=True)


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules are traced as for the compiler, which itself is left out."""
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: original(self, backend="eager", **options))
    monkeypatch.setattr(run, "check_compiler", lambda device: None)


def compiled(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if module._compiled_call_impl is not None}


def test_all_but_the_recurrent_layers_are_compiled_in_place(tiny_config: SequencerConfig, traced_only: None) -> None:
    model = Sequencer2D(tiny_config)
    names = list(model.state_dict())
    assert compile_regions(model) == len(compiled(model)) == 15
    assert compiled(model) >= {"stem", "stages.1.blocks.1.mlp_channels", "norm", "head"}
    assert not any("rnn" in name or "drop_path" in name or "downsample" in name for name in compiled(model))
    assert list(model.state_dict()) == names
    assert not compiled(copy.deepcopy(model)), "averaged weights are a copy"
    with_rest = Sequencer2D(tiny_config)
    compile_regions(with_rest, stem=False)
    assert compiled(model) - compiled(with_rest) == {"stem"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sequencer2d_s", "sequencer2d_conv_t_patch4_32"])
def test_what_is_compiled_compiles_and_is_the_same(name: str) -> None:
    """By the real compiler, which has limits that tracing does not show: gradients, too, and a last, smaller batch."""
    plain, model = (create_model(name, num_classes=10, drop_path_rate=0.0).eval() for _ in range(2))
    model.load_state_dict(plain.state_dict())
    compile_regions(model)
    for count in (4, 3):
        images = torch.randn(count, 3, 56, 56)
        answers = [net(images) for net in (plain, model)]
        expected_gradients, gradients = (
            torch.autograd.grad(answer.sum(), list(net.parameters()))
            for answer, net in zip(answers, (plain, model), strict=True)
        )
        torch.testing.assert_close(answers[1], answers[0], atol=1e-4, rtol=1e-4)
        for got, expected in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_a_compiled_run_is_the_same_run_stopped_or_not(
    config: TrainConfig, traced_only: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With averaged weights, dropout, stochastic depth, smaller last batches, and checkpointed activations."""
    config = replace(config, grad_checkpointing=True)
    eager = train(replace(config, compile=False, run_dir=str(tmp_path / "eager")))
    calls: list[int] = []
    monkeypatch.setattr(fitting, "compile_regions", lambda *a, **o: calls.append(compile_regions(*a, **o)) or calls[-1])
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert not train(config).finished
    continued = train(config)
    assert len(calls) == 2
    for one, two in zip(rows(continued.run_dir), rows(eager.run_dir), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    weights, expected = (load_file(run.run_dir / "model.safetensors") for run in (continued, eager))
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_what_the_compiler_makes_is_close_to_eager(tiny_config: SequencerConfig) -> None:
    try:
        check_compiler(torch.device("cpu"))
    except TrainingError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    model = Sequencer2D(replace(tiny_config, drop_path_rate=0.5))
    nn.init.normal_(model.get_parameter("head.fc.weight"))
    fast = copy.deepcopy(model)
    compile_regions(fast)
    for count in (4, 3):
        images, gradients = torch.randn(count, 3, 16, 16), []
        for one in (model, fast):
            torch.manual_seed(count)
            loss = one(images).square().mean()
            gradients.append(torch.autograd.grad(loss, list(one.parameters())))
        for got, expected in zip(gradients[1], gradients[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_ranks_compile_what_each_of_them_computes_alone(tmp_path: Path) -> None:
    """The stem is left out; its batch norms exchange statistics."""
    try:
        check_compiler(torch.device("cpu"))
    except TrainingError as error:
        pytest.skip(str(error))
    recipe = {**tiny_run(tmp_path).to_dict(), "epochs": 1}
    recipe["model_args"]["drop_rate"] = 0.0  # compiled, it draws other numbers
    for name in ("eager", "compiled"):
        settings = {**recipe, "compile": name == "compiled", "run_dir": str(tmp_path / name)}
        statuses, errors = Job(tmp_path / f"job {name}", settings, ranks=2).run()
        assert statuses == [0, 0], errors
        assert ("compile: " in errors) == (name == "compiled")
    assert_same(tmp_path / "compiled", tmp_path / "eager")


def test_a_failing_compiler_is_an_error_before_anything_is_written(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("\nno compiler at all\nand much more")

    monkeypatch.setattr(compilation.torch, "compile", failing)
    with pytest.raises(TrainingError, match=r"--compile needs a C\+\+ .*: no compiler at all; .* --compile false"):
        train(config)
    assert not Path(config.run_dir or "").exists()


@pytest.mark.slow
def test_a_missing_compiler_is_noticed_whatever_was_compiled_before() -> None:
    program = (
        "import torch\n"
        "from sequencer2d.training.compilation import check_compiler\n"
        "from sequencer2d.training.faults import TrainingError\n"
        "try:\n"
        "    check_compiler(torch.device('cpu'))\n"
        "except TrainingError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "CXX": "/no/compiler"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert "/no/compiler" in done.stdout
