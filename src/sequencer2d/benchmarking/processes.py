"""Processes of contenders, and their turns: one makes steps while the others wait and take no time."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sequencer2d.benchmarking.contenders import CONTENDERS
from sequencer2d.benchmarking.workload import Allocator, Workload

log = logging.getLogger("sequencer2d")

TURN_SECONDS = 0.3
"""Short steps are repeated for so long in each turn."""
PAUSE_SECONDS = 0.02
"""Between turns, in which threads of the last one stop spinning."""
ALLOCATOR_VARIABLES = ("THP_MEM_ALLOC_ENABLE", "GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_")
"""Of the environment, which would make `default` another than the system's."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One contender with its work."""

    contender: str
    workload: Workload
    allocator: Allocator = "tuned"

    def __str__(self) -> str:
        return f"{self.contender} ({self.allocator} allocator)"


@dataclass(kw_only=True)
class Answers:
    """What came from a contender's process."""

    rounds: list[list[float]] = field(default_factory=list)
    """Seconds of the steps of each of its turns."""
    error: str | None = None
    """Why there is nothing more."""
    detail: str = ""
    before_mib: float | None = None
    """Memory before the first step: libraries, weights, images."""
    peak_mib: float | None = None
    """At its most, after the first step."""
    output_error: float | None = None
    """Distance from what our layers compute in fp32 with PyTorch's LSTMs, relative to its norm."""
    idle_share: float = 0.0
    """Cores that it kept busy while others had their turn, at its worst."""


def take_turns(entries: Sequence[Entry], rounds: int) -> list[Answers]:
    """Starts all contenders, then gives each one a turn in every round, each time beginning with another one.

    One that fails is told in its answers and in the log, and the others go on. All processes are gone afterwards.
    """
    processes: list[_Process] = []
    try:
        log.info("%d processes start, one after the other: %s", len(entries), "; ".join(map(str, entries)))
        for entry in entries:
            processes.append(_Process(entry))
            processes[-1].start_up()  # one after the other: several at once would wait for each other's threads
        for number in range(rounds):
            first = number % len(processes)
            for process in processes[first:] + processes[:first]:
                process.turn()
            log.info("round %d of %d", number + 1, rounds)
        return [process.answers for process in processes]
    finally:
        for process in processes:
            process.end()


class _Process:
    """A contender's process, in a session of its own: Ctrl-C at a terminal is for us, who then end all of them."""

    def __init__(self, entry: Entry) -> None:
        self.entry, self.answers = entry, Answers()
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, as `end` closes it
        job = {"contender": entry.contender, "allocator": entry.allocator, "workload": entry.workload.to_dict()}
        environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_VARIABLES}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sequencer2d.benchmarking.worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**environment, "OMP_NUM_THREADS": str(entry.workload.threads)},
            start_new_session=True,
        )

    def start_up(self) -> None:
        """Waits until it is ready."""
        if answer := self._answer():
            self.answers.detail = answer["detail"]
            self.answers.before_mib, self.answers.output_error = answer["before_mib"], answer["output_error"]

    def turn(self) -> None:
        """Lets it make its steps and waits for them."""
        if self.answers.error is not None:
            return
        time.sleep(PAUSE_SECONDS)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, as its missing answer tells
            self._process.stdin.write(f"{TURN_SECONDS}\n")
            self._process.stdin.flush()
        if answer := self._answer():
            self.answers.rounds.append(answer["seconds"])
            self.answers.peak_mib = answer["peak_mib"]
            self.answers.idle_share = max(self.answers.idle_share, answer["idle_share"])

    def _answer(self) -> dict[str, Any] | None:
        """Its next one, or None where it has failed."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._fail(f"its process ended with status {status}{self._last_words()}")
        elif "error" in (answer := json.loads(line)):
            self._fail(answer["error"])
        else:
            return answer
        return None

    def _fail(self, reason: str) -> None:
        missing = [name for name in CONTENDERS[self.entry.contender].packages if name in reason]
        if reason.startswith(("ModuleNotFoundError", "ImportError")) and missing:
            reason += "; it comes with pip install 'sequencer2d[export]'"
        self.answers.error = reason
        log.warning("%s failed: %s", self.entry, reason)
        self.end()  # its memory is for the others

    def _last_words(self) -> str:
        if self._process.returncode == -9:  # SIGKILL, which Windows has not
            return ": killed, as the system does when memory runs out"
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr if line.strip()]
        return f": {lines[-1]}" if lines else ""

    def end(self) -> None:
        """Ends it and whatever it has started, such as compilers."""
        with suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:  # Windows
                self._process.kill()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with suppress(OSError):  # a broken pipe, which has other names on other systems
                    stream.close()
        self._process.wait()
