"""Trainings in processes of their own, which can be killed, limited and counted as ranks."""

import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

_SCRIPT = """
import os, signal, sys
from pathlib import Path
from sequencer2d.cli import main
from sequencer2d.training.task import SequencerTask

rank, batch, number, done = os.environ.get("RANK", "0"), int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
seen, original, set_up = 0, SequencerTask.training_step, SequencerTask.configure_optimizers

def strike(now):
    if rank == os.environ.get("VICTIM", rank) and now == batch and not done.exists():
        done.touch()
        os.kill(os.getpid(), number)

def configure_optimizers(self):
    strike(-1)
    return set_up(self)

def training_step(self, *arguments):
    global seen
    strike(seen)
    seen += 1
    with open(f"{done}-seen-{rank}", "a") as file:
        print(self.current_epoch, *arguments[0].indices.tolist(), file=file)
    return original(self, *arguments)

SequencerTask.training_step, SequencerTask.configure_optimizers = training_step, configure_optimizers
sys.exit(main(sys.argv[4:]))
"""


class Job:
    """`sequencer2d train` with a recipe, in as many processes as there are ranks.

    Args:
        folder: For the recipe and the script.
        recipe: Keys of a recipe.
        ranks: Processes; they find each other as the launcher's do.
        launcher: `torchrun` or `slurm`, of which the environment is made.
        kill: The batch (counted by each process from 0; -1: before there is one) in which the victim gets the signal,
            once, and the signal.
        victim: Its rank.
    """

    def __init__(
        self,
        folder: Path,
        recipe: dict[str, Any],
        *,
        ranks: int = 1,
        launcher: str = "torchrun",
        kill: tuple[int, signal.Signals] | None = None,
        victim: int = 0,
    ) -> None:
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "job.py").write_text(_SCRIPT)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (folder / "killed").unlink(missing_ok=True)
        batch, number = kill or (-2, signal.SIGTERM)
        self.command = [
            *(str(folder / "job.py"), str(batch), str(int(number)), str(folder / "killed")),
            *("train", "--config", str(folder / "recipe.yaml")),
        ]
        self.environment = {**os.environ, "VICTIM": str(victim), "OMP_NUM_THREADS": "1"}
        self.ranks = ranks
        self.of_rank = {"torchrun": self.by_torchrun, "slurm": self.by_slurm}[launcher]
        self.folder = folder

    def start(self) -> "list[subprocess.Popen[str]]":
        port = free_port()
        return [
            subprocess.Popen(
                [sys.executable, *self.command],
                env={**self.environment, **(self.of_rank(rank, port) if self.ranks > 1 else {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(self.ranks)
        ]

    def seen(self) -> list[Counter[int]]:
        """How often all ranks together have trained on each image, by its index, in each epoch."""
        files = sorted(self.folder.glob("killed-seen-*"))
        rows = [tuple(map(int, line.split())) for file in files for line in file.read_text().splitlines()]
        counts = [Counter[int]() for _ in range(1 + max(epoch for epoch, *_ in rows))]
        for epoch, *indices in rows:
            counts[epoch].update(indices)
        return counts

    def by_slurm(self, rank: int, port: int) -> dict[str, str]:
        """What `srun` tells a task."""
        return {
            "SLURM_JOB_ID": str(port),
            "SLURM_JOB_NAME": "training",
            "SLURM_NTASKS": str(self.ranks),
            "SLURM_NTASKS_PER_NODE": str(self.ranks),
            "SLURM_STEP_NUM_TASKS": str(self.ranks),
            "SLURM_NNODES": "1",
            "SLURM_NODELIST": "127.0.0.1",
            "SLURM_NODEID": "0",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "MASTER_PORT": str(port),
        }

    def by_torchrun(self, rank: int, port: int) -> dict[str, str]:
        """What `torchrun` tells a process."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_WORLD_SIZE": str(self.ranks),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
        }

    def run(self) -> tuple[list[int], str]:
        """Waits for the end; exit statuses by rank, and what was written to standard error."""
        processes = self.start()
        try:
            errors = [process.communicate(timeout=240)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [process.returncode for process in processes], "".join(errors)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
