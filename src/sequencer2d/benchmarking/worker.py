"""The process of one contender: it builds, warms up, and makes steps whenever it is its turn.

Reads a line with seconds for each turn and answers it with a line of JSON. What libraries print goes to standard error.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any

from sequencer2d.benchmarking.memory import forget_peak, peak_mib, used_mib
from sequencer2d.benchmarking.workload import Workload

WARMUP = 2
"""Steps after the first one, which compiles and allocates, before any is timed."""


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.loads(sys.argv[1])
    if job["allocator"] == "tuned":
        from sequencer2d.training.machine import tune_allocator

        tune_allocator()
    try:
        for answer in serve(job["contender"], Workload(**job["workload"]), _lines_or_end()):
            print(json.dumps(answer), file=answers)
    except Exception as error:  # of any kind: contenders are foreign code, and the others go on
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        print(json.dumps({"error": f"{type(error).__name__}: {reason}".rstrip(": ")}), file=answers)
        raise


def _lines_or_end() -> Iterable[str]:
    """Lines of standard input. When it ends, the conductor has gone, and this process ends, whatever it is doing."""
    lines: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    return iter(lines.get, "")


def serve(name: str, workload: Workload, turns: Iterable[str]) -> Iterable[dict[str, Any]]:
    """First what the contender is and how right it is; then for each turn its seconds, and the memory so far."""
    import torch

    from sequencer2d.benchmarking.contenders import CONTENDERS, reference, tolerance

    torch.set_num_threads(workload.threads)
    torch.set_flush_denormal(True)  # threads that start later take it over
    state, expected = reference(workload)
    running = CONTENDERS[name].build(workload, state)
    del state
    forget_peak()
    before = used_mib()
    error = float((running.step().float() - expected).norm() / expected.norm())
    allowed = tolerance(name, workload.mode)
    if not error <= allowed:
        what = "gradient" if workload.mode == "train" else "logits"
        raise ValueError(f"computes something else: relative error of the {what} {error:.2g}, allowed is {allowed}")
    forget_peak()
    seconds = min(_seconds(running.step) for _ in range(WARMUP))
    yield {"detail": running.detail, "before_mib": before, "output_error": error}
    idle = -time.process_time(), -time.perf_counter()
    for turn in turns:
        waited = idle[0] + time.process_time(), idle[1] + time.perf_counter()
        count = max(1, round(float(turn) / seconds))
        if count > 1:
            running.step()  # what others left in the caches is not this contender's matter
        steps = [_seconds(running.step) for _ in range(count)]
        seconds = min(steps)
        yield {"seconds": steps, "idle_share": waited[0] / waited[1], "peak_mib": peak_mib()}
        idle = -time.process_time(), -time.perf_counter()


def _seconds(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
