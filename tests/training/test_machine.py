"""The machine is set up for training, says so once, and is put back afterwards."""

import logging
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import tiny_run
from sequencer2d.training import machine, ranks
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.machine import continued, describe_machine, flushes_denormals, set_threads, settled
from sequencer2d.training.ranks import Ranks
from sequencer2d.training.run import train
from sequencer2d.training.task import SequencerTask


def state() -> dict[str, Any]:
    """All that `settled` may change but for the allocator."""
    return {
        "threads": torch.get_num_threads(),
        "flushes": flushes_denormals(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "tf32": torch.get_float32_matmul_precision(),
    }


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch says that there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_everything_is_set_and_put_back_even_after_an_error(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(ranks, "num_cores", lambda: 6)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = state()
    config = TrainConfig(deterministic=True)
    inside: list[dict[str, Any]] = []

    def fail() -> None:
        with settled(config, Ranks(world_size=2, local_world_size=2, sharing=2)):
            inside.append(state())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [
        {
            "threads": 3,
            "flushes": True,
            "deterministic": True,
            "cudnn.deterministic": True,
            "cudnn.benchmark": False,
            "cublas": ":4096:8",
            "tf32": "high",
        }
    ]
    assert state() == before
    with settled(replace(config, deterministic=False), Ranks()):
        assert state() == {**before, "flushes": True, "tf32": "high"}


def test_a_workspace_that_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with settled(TrainConfig(deterministic=True), Ranks()):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_without_a_gpu_products_in_fp32_are_exact() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with settled(TrainConfig(), Ranks()) as lines:
        assert torch.get_float32_matmul_precision() == "highest"
    assert not any("TF32" in line for line in lines)


@pytest.mark.parametrize(
    ("before", "cores", "processes", "sharing", "asked_for", "threads"),
    [
        (4, 2, 1, 1, False, 2),  # a quota that PyTorch does not know of
        (1, 2, 1, 1, False, 1),
        (4, 2, 1, 1, True, 4),  # OMP_NUM_THREADS is the user's word
        (1, 8, 2, 2, True, 4),  # but torchrun sets it, too
        (1, 2, 3, 3, True, 1),
        (1, 4, 2, 1, True, 4),  # each process is bound to four of the machine's cores
    ],
)
def test_threads_follow_the_cores(
    before: int,
    cores: int,
    processes: int,
    sharing: int,
    asked_for: bool,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if asked_for:
        monkeypatch.setenv("OMP_NUM_THREADS", str(before))
    else:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(ranks, "num_cores", lambda: cores)
    at_first = torch.get_num_threads()
    try:
        torch.set_num_threads(before)
        with ExitStack() as undo:
            line = set_threads(Ranks(world_size=processes, local_world_size=processes, sharing=sharing), undo)
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(at_first)
    assert line == f"threads: {threads} of {cores * processes // sharing} cores" + (
        f" for each of {processes}" if processes > 1 else ""
    )


def output_of(program: str) -> str:
    """What a program prints in a process of two threads, without settings of the allocator from outside."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    environment.pop("THP_MEM_ALLOC_ENABLE", None)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


SETTLE = """
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.machine import settled
from sequencer2d.training.ranks import Ranks
with settled(TrainConfig(), Ranks()) as lines:
    print(*lines, sep="\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_lines_tell_what_took_effect() -> None:
    first = output_of(SETTLE)
    assert "denormals: flushed to 0\n" in first
    assert "allocator: freed memory is kept\n" in first
    late = output_of("import torch; torch.ones(2**24).exp()" + SETTLE)
    assert "denormals: flushed to 0, but not in the threads that PyTorch had started before\n" in late


TRAIN = """
import tempfile
from sequencer2d.training.machine import tune_allocator
tune_allocator()  # before PyTorch is there, when all of it can take effect
from sequencer2d.benchmarking.memory import peak_mib, used_mib
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.run import train
from sequencer2d.training.task import SequencerTask

def training_step(*arguments):
    peaks.append(peak_mib())
    return step(*arguments)

peaks, step = [], SequencerTask.training_step
SequencerTask.training_step = training_step
with tempfile.TemporaryDirectory() as folder:
    net = {"model": "sequencer2d_conv_t_patch4_32", "image_size": 32, "precision": "fp32"}
    config = TrainConfig(data="digits", batch_size=128, epochs=3, run_dir=f"{folder}/run", **net)
    before = used_mib()
    train(config)
print(*(peak - before for peak in peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_a_training_finds_its_memory_again() -> None:
    """The tensors of a step fit into what the last one has freed: huge pages make of its memory twice as much."""
    at_start, first, *_, last = (float(word) for word in output_of(TRAIN).splitlines()[-1].split())
    assert at_start < first
    assert last < 1.7 * first


def test_a_training_settles_the_machine_and_says_each_setting_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    original = SequencerTask.training_step

    def training_step(self: SequencerTask, *arguments: Any) -> Any:
        seen.append(state())
        return original(self, *arguments)

    monkeypatch.setattr(SequencerTask, "training_step", training_step)
    before = state()
    with caplog.at_level(logging.INFO):
        train(replace(tiny_run(tmp_path), epochs=1, deterministic=True))
    assert state() == before
    assert all(during["flushes"] and during["deterministic"] for during in seen)
    for setting in ("threads", "denormals", "allocator", "precision fp32", "optimizer", "deterministic"):
        assert [message.startswith(f"{setting}:") for message in caplog.messages].count(True) == 1, setting
    assert "optimizer: AdamW, fused" in caplog.messages


@pytest.mark.parametrize("program", ["/usr/bin/sequencer2d", "/usr/lib/python3/sequencer2d/__main__.py"])
def test_the_command_is_told_without_the_folder_of_its_program(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [program, "train", "--data", "my cats"])
    assert describe_machine()["command"] == "sequencer2d train --data 'my cats'"


def test_a_continued_run_keeps_the_command_that_began_it() -> None:
    steps = [{"command": f"sequencer2d train {what}", "commit": what, "threads": k} for k, what in enumerate("abc")]
    begun = continued(continued(steps[0], steps[1]), steps[2])
    assert (begun["command"], begun["commit"], begun["threads"]) == ("sequencer2d train a", "a", 2)
    assert [step["commit"] for step in begun["continued"]] == ["b", "c"]


def test_the_commit_is_of_our_checkout_not_of_one_around_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in (["init"], ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True, capture_output=True)
    installed = tmp_path / ".venv" / "machine.py"
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr(machine, "__file__", str(installed))
    assert describe_machine()["commit"] is None
    subprocess.run(["git", "-C", tmp_path, "add", installed], check=True)
    assert len(describe_machine()["commit"]) == 41  # a change is a +
