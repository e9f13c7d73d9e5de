"""Measures what each setting of the machine does to a training step's time and memory on this CPU: docs/speed.md.

`python docs/make_speed.py [--rounds N]`: each setting changed alone, in a process of its own, all processes in turn.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROUNDS = 10
WARMUP = 5
"""Steps before any is timed: the first ones take new memory."""
TOGETHER = 3
"""So many settings at a time are compared with the unchanged one: a process of the larger net takes 4 GiB."""
NETS: dict[str, dict[str, Any]] = {
    "sequencer2d_s": {"side": 224, "batch_size": 8, "num_classes": 1000},
    "sequencer2d_conv_l_patch4_32": {"side": 32, "batch_size": 512, "num_classes": 10},
}
UNCHANGED = "nothing"
SETTINGS = {
    "one thread": "`OMP_NUM_THREADS=1`",
    "denormals kept": "`torch.set_flush_denormal(False)`",
    "memory given back": "without `mallopt`",
    "huge pages": "`THP_MEM_ALLOC_ENABLE=1`",
    "both": "memory given back, and huge pages",
    "AdamW not fused": "`fused=False`",
    "fp32": "`--precision fp32`",
    "deterministic": "`--deterministic true`",
    "compiled": "`--compile true`",
}
"""What is changed, and how."""


def work(net: str, setting: str) -> None:
    """A process of one setting: for each line that it reads a step, and a line of its seconds and the peak in MiB."""
    if setting in ("huge pages", "both"):
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # read at the first large allocation
    import torch

    from sequencer2d.benchmarking.memory import peak_mib
    from sequencer2d.data.loaders import Batch
    from sequencer2d.preprocessing import Preprocessing
    from sequencer2d.training import machine
    from sequencer2d.training.compilation import compile_regions
    from sequencer2d.training.config import TrainConfig, resolve
    from sequencer2d.training.ranks import Ranks
    from sequencer2d.training.task import SequencerTask
    from sequencer2d.zoo import create_model

    if setting in ("memory given back", "both"):
        machine.tune_allocator = lambda: False
    shape = NETS[net]
    side, batch_size, classes = shape["side"], shape["batch_size"], shape["num_classes"]
    asked = TrainConfig(data="photos", batch_size=batch_size, deterministic=setting == "deterministic")
    config = resolve(asked, model=net, image_size=side, crop_pct=1.0)
    with machine.settled(config, Ranks()):
        if setting == "denormals kept":
            torch.set_flush_denormal(False)
        torch.manual_seed(0)
        model = create_model(net, num_classes=classes, drop_path_rate=0.1).train()
        task = SequencerTask(model, config, Preprocessing(image_size=side), 100)
        if setting == "compiled":
            compile_regions(model)
        optimizer = task.make_optimizer("fp16" if setting == "AdamW not fused" else "bf16")
        for group in optimizer.param_groups:
            group["lr"] = 1e-4
        images = torch.randint(256, (batch_size, side, side, 3), dtype=torch.uint8)
        batch = Batch(images, torch.arange(batch_size) % classes, torch.arange(batch_size), skipped=[])
        bf16 = torch.autocast("cpu", torch.bfloat16, enabled=setting != "fp32")
        steps = 0

        def step() -> float:
            nonlocal steps
            start = time.perf_counter()
            with bf16:
                loss = task.loss(batch, (0, steps), 0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            return time.perf_counter() - start

        for _ in range(WARMUP):
            step()
        print("ready", flush=True)
        for _ in sys.stdin:
            print(step(), peak_mib(), flush=True)


def measure(net: str, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds and memory of steps under each setting, and of the unchanged one in the same minutes."""
    found = {}
    for first in range(0, len(SETTINGS), TOGETHER):
        changed = list(SETTINGS)[first : first + TOGETHER]
        steps = measure_in_turn(net, [UNCHANGED, *changed], rounds)
        found |= {name: {"changed": steps[name], "unchanged": steps[UNCHANGED]} for name in changed}
        print(net, steps, flush=True)
    return found


def measure_in_turn(net: str, settings: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of the seconds of a step, and the most memory a process had, in MiB.

    While one process makes its step, the others wait and take no time.
    """
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    workers: dict[str, subprocess.Popen[str]] = {}
    try:
        for setting in settings:
            workers[setting] = subprocess.Popen(
                [sys.executable, __file__, "--work", net, setting],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**environment, **({"OMP_NUM_THREADS": "1"} if setting == "one thread" else {})},
            )
        for worker in workers.values():
            answer(worker)
        times: dict[str, list[float]] = {setting: [] for setting in settings}
        peaks: dict[str, float] = {}
        for _ in range(rounds):
            for setting, worker in workers.items():
                assert worker.stdin is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
                seconds, peak = answer(worker).split()
                times[setting].append(float(seconds))
                peaks[setting] = float(peak)
        return {name: {"seconds": statistics.median(times[name]), "peak_mib": peaks[name]} for name in settings}
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()


def answer(worker: "subprocess.Popen[str]") -> str:
    assert worker.stdout is not None
    line = worker.stdout.readline().strip()
    if not line:
        raise RuntimeError(f"{worker.args} ended")
    return line


def page(found: dict[str, Any]) -> str:
    environment, nets = found["environment"], found["steps"]
    lines = [
        "# Speed of a training step on a CPU",
        "",
        "What `sequencer2d train` sets up on a machine, and says when it starts: seconds of a whole step (augmentation",
        "of the batch, forward, backward, update; bf16) with one thing changed, and how many times as long that is. By",
        f"`{environment['command']}`: each setting in a process of its own, {TOGETHER} of them and the unchanged",
        f"one in turn after {WARMUP} steps, medians of {found['rounds']} rounds, {environment['threads']} threads.",
        "*GiB* is the most memory that the process had, and in brackets the unchanged one's.",
        "",
        "| changed | how | " + " | ".join(f"{net}, {_shape(net)} | × | GiB" for net in nets) + " |",
        "| --- | --- |" + " --- | --- | --- |" * len(nets),
    ]
    for setting, how in SETTINGS.items():
        cells = []
        for steps in nets.values():
            changed, unchanged = steps[setting]["changed"], steps[setting]["unchanged"]
            gib, before = changed["peak_mib"] / 1024, unchanged["peak_mib"] / 1024
            times = changed["seconds"] / unchanged["seconds"]
            cells.append(f"{changed['seconds']:.3f} | {times:.2f} | {gib:.1f} ({before:.1f})")
        lines.append(f"| {setting} | {how} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Huge pages are PyTorch's: it aligns large tensors to 2 MiB, and glibc (2.36 here) often does not find such",
        "memory again once it is free. A step in a loop, as here, shows little of it; in a training, where smaller",
        "things lie between, memory grows to five times as much and steps are slower ([LOG.md](LOG.md)).",
        "",
        "Denormals come late in a training, when weights and averages shrink; these nets are new. Compiled are norms,",
        "MLPs, stem and head, in which kernels of ours then do not run; the first step of such a run takes a minute",
        "and is not in these figures. On a GPU, matrix products are rounded to TF32 and the stem is channels-last",
        "besides; that could not be measured here.",
        "",
        f"Commit {environment['commit']}, {environment['cpu']}, {environment['cores']} cores, "
        f"torch {environment['packages']['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def _shape(net: str) -> str:
    return f"{NETS[net]['side']}², batch {NETS[net]['batch_size']}"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Measure settings, or with --page write the page of what was measured")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args(arguments)
    if not options.page:
        from sequencer2d.training.machine import describe_machine

        steps = {net: measure(net, options.rounds) for net in NETS}
        environment = {**describe_machine(), "command": "python docs/make_speed.py"}
        found = {"steps": steps, "rounds": options.rounds, "environment": environment}
        (DOCS / "speed.json").write_text(json.dumps(found, indent=1) + "\n")
    (DOCS / "speed.md").write_text(page(json.loads((DOCS / "speed.json").read_text())))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        main(sys.argv[1:])
