"""The conductor: turns, ratios, records; contenders that fail, and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sequencer2d.benchmarking import comparison, processes
from sequencer2d.benchmarking.comparison import Measurement, benchmark, measure, records
from sequencer2d.benchmarking.processes import Answers, Entry
from sequencer2d.benchmarking.workload import Workload

TINY = Workload(model="sequencer2d_t_patch2_32", mode="infer", image_size=8, batch_size=2, threads=1, num_classes=5)
OURS, TIMMS = (Entry(contender=name, workload=TINY) for name in ("sequencer2d-torch:fp32", "timm:fp32"))


def measurement(rounds: list[list[float]], entry: Entry = OURS, **answers: object) -> Measurement:
    return Measurement(entry=entry, answers=Answers(rounds=rounds, **answers), group=0)  # type: ignore[arg-type]


def test_ours_and_timm_take_turns_and_one_that_fails_is_told(caplog: pytest.LogCaptureFixture) -> None:
    conv = replace(TINY, model="sequencer2d_conv_p_patch2_16", image_size=16)
    found = measure([TIMMS, OURS, Entry(contender="timm:bf16", workload=conv)], 2)
    assert [each.entry for each in found[:2]] == [TIMMS, OURS]
    for each in found[:2]:
        assert each.error is None
        assert len(each.answers.rounds) == 2
        assert each.seconds
        assert each.step_mib is None or each.step_mib >= 0
        assert each.answers.idle_share < 0.5
    first, second, failed = records(found)
    assert first["speedup"] == [1, 1, 1]
    assert second["reference"] == "timm:fp32"
    assert second["output_error"] < 1e-3
    assert second["how"] == "ours with PyTorch's LSTMs, fp32; blocks in PyTorch"
    assert first["environment"]["packages"]["torch"]
    again = Measurement.from_dict(json.loads(json.dumps(second))).to_dict()
    assert again["images_per_s"] == pytest.approx(second["images_per_s"], rel=0.01)
    assert failed["error"].startswith("ValueError: timm's Sequencer2d has no stem_widths")
    assert f"timm:bf16 (tuned allocator) failed: {failed['error']}" in caplog.text
    assert failed["seconds"] is failed["speedup"] is failed["images_per_s"] is failed["p50_ms"] is None


def test_ratios_are_of_the_same_round_and_percentiles_of_all_steps() -> None:
    ours = measurement([[1.0, 3.0, 2.0], [4.0], [1.0]])
    theirs = measurement([[4.0], [8.0], [8.0]])
    assert ours.seconds == 2
    assert ours.images_per_s == 1
    ratio = ours.time_ratio(theirs)
    assert ratio is not None
    assert (ratio.low, ratio.median, ratio.high) == (0.3125, 0.5, 0.5)
    assert (ratio.inverse.low, ratio.inverse.median, ratio.inverse.high) == (2, 2, 3.2)
    assert ours.percentile_ms(50) == 2000
    assert ours.percentile_ms(90) is None
    many = measurement([[i / 1000 for i in range(101)]])
    assert (many.percentile_ms(50), many.percentile_ms(90), many.percentile_ms(99)) == (50, 90, 99)


def test_the_order_changes_from_round_to_round(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    class Process:
        def __init__(self, entry: Entry) -> None:
            self.entry, self.answers = entry, Answers()

        def start_up(self) -> None:
            order.append("ready")

        def turn(self) -> None:
            order.append(self.entry.contender[0])

        def end(self) -> None:
            order.append("end")

    monkeypatch.setattr(processes, "_Process", Process)
    entries = [Entry(contender=name, workload=TINY) for name in ("timm:fp32", "onnxruntime:fp32", "sequencer2d:fp32")]
    processes.take_turns(entries, 3)
    assert "".join(order) == "readyreadyready" + "tos" + "ost" + "sto" + "endendend"


def test_groups_share_the_reference_and_allocators_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    def take_turns(entries: list[Entry], rounds: int) -> list[Answers]:
        groups.append([f"{entry.contender} {entry.allocator}" for entry in entries])
        return [Answers(rounds=[[1.0]] * rounds) for _ in entries]

    groups: list[list[str]] = []
    monkeypatch.setattr(comparison, "take_turns", take_turns)
    found = benchmark(
        "sequencer2d_t_patch2_32", mode="train", against="timm", allocator="both", checkpointing=True, rounds=1
    )
    names = ["timm:fp32", "timm:bf16", "sequencer2d:fp32", "sequencer2d:bf16"]
    rest = ["timm:fp32", "sequencer2d-checkpointing:fp32", "sequencer2d-checkpointing:bf16"]
    assert groups == [[f"{name} {kind}" for name in part] for kind in ("tuned", "default") for part in (names, rest)]
    assert [each.group for each in found] == [0] * 4 + [1] * 3 + [2] * 4 + [3] * 3
    assert found[0].entry.workload.image_size == 32


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; sys.exit('Illegal instruction, sort of')", "ended with status 1: Illegal instruction, sort of"),
        ("import os; os.kill(os.getpid(), 9)", "ended with status -9: killed, as the system does when memory runs out"),
        (
            'print(\'{"error": "ModuleNotFoundError: No module named openvino"}\')',
            r"pip install 'sequencer2d\[export\]'",
        ),
    ],
)
def test_how_a_process_ended_is_told(
    program: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c \"$PROGRAM\"\n")
    interpreter.chmod(0o755)
    monkeypatch.setenv("PROGRAM", program)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    [answers] = processes.take_turns([Entry(contender="openvino:fp32", workload=TINY)], 1)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(answers.error)


@pytest.mark.parametrize("kind", ["tuned", "default"])
def test_the_environment_gives_every_process_its_threads_and_no_other_allocator(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("OMP_NUM_THREADS", *processes.ALLOCATOR_VARIABLES)
    found = "' '.join(f'{name}={os.environ[name]}' for name in names if name in os.environ)"
    program = f"import json, os; names = {names}; print(json.dumps({{'error': {found}}}))"
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c \"{program}\"\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    for name in processes.ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "1")
    entry = Entry(contender="timm:fp32", workload=replace(TINY, threads=3), allocator=kind)  # type: ignore[arg-type]
    [answers] = processes.take_turns([entry], 1)
    assert answers.error == "OMP_NUM_THREADS=3"


def test_an_interruption_ends_all_processes_at_once() -> None:
    program = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in a background job
        "from sequencer2d.benchmarking import processes\n"
        "start_up = processes._Process.start_up\n"
        "def tell(self):\n"
        "    print(self._process.pid, flush=True)\n"
        "    start_up(self)\n"
        "processes._Process.start_up = tell\n"
        "from sequencer2d.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["benchmark", "--model", "sequencer2d_t_patch2_32", "--threads", "1", "--rounds", "100000"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        workers = [int(process.stdout.readline())]  # the first one is starting up
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said.endswith("sequencer2d: interrupted\n")
    assert "Traceback" not in said
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


def test_a_worker_ends_with_its_conductor_whatever_it_is_doing() -> None:
    conductor, ours = os.pipe()
    large = replace(TINY, image_size=256)
    job = {"contender": "timm:fp32", "allocator": "tuned", "workload": large.to_dict()}
    command = [sys.executable, "-m", "sequencer2d.benchmarking.worker", json.dumps(job)]
    with subprocess.Popen(command, stdin=conductor) as worker:
        os.close(conductor)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(timeout=1)
        os.close(ours)
        assert worker.wait(timeout=60) == 1
