"""What can go wrong in a training, told so that one knows what to do, and kept so that it can be looked into."""

import errno
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sequencer2d.data.loaders import Batch
from sequencer2d.files import write_atomic
from sequencer2d.training.config import TrainConfig


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do. Checkpoints up to here are whole."""


@contextmanager
def explained(config: TrainConfig, run_dir: Path) -> Iterator[None]:
    """Turns failures of the machine into a `TrainingError` that says what to do."""
    go_on = f"sequencer2d train --resume {run_dir}"
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(_out_of_memory(config, "the GPU's memory")) from error
    except MemoryError as error:
        raise TrainingError(_out_of_memory(config, "memory")) from error
    except RuntimeError as error:
        text = str(error)
        if "can't allocate memory" in text:
            raise TrainingError(_out_of_memory(config, "memory")) from error
        if re.search(r"DataLoader worker .*(exited unexpectedly|killed by signal)", text):
            raise TrainingError(
                f"a process that loads images died ({text.splitlines()[0]}); the system may have ended it for want of "
                f"memory: go on with fewer of them, {go_on} --num-workers {max(0, (config.num_workers or 0) // 2)}"
            ) from error
        raise
    except FileNotFoundError as error:
        what = str(error)
        if what.startswith("Caught "):  # in a process that loads images, with its traceback; the last line is the error
            what = what.strip().splitlines()[-1].removeprefix("FileNotFoundError: ")
        raise TrainingError(f"{what}; checkpoints so far are whole: bring it back, then {go_on}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "the disk is full"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            hint = "the run folder cannot be written to"
        elif error.errno in (errno.EIO, errno.ESTALE, errno.ENODEV):
            hint = "the disk fails"
        else:
            raise
        raise TrainingError(f"{hint} ({error}); checkpoints so far are whole: mend that, then {go_on}") from error


def _out_of_memory(config: TrainConfig, what: str) -> str:
    size = config.images_per_step
    if size == 1:
        return f"{what} is too small for this model even with one image; take a smaller --model or --image-size"
    same = (
        f" --accumulate {2 * config.accumulate}, which makes the same update,"
        if config.images_per_step % 2 == 0
        else ""
    )
    checkpointing = "" if config.grad_checkpointing else " or --grad-checkpointing true"
    return (
        f"{what} is too small for --batch-size {size}; "
        f"try --batch-size {size // 2}{same}{checkpointing} in another --run-dir"
    )


def keep_fault(folder: Path, *, model: torch.nn.Module, batches: list[Batch], facts: dict[str, Any]) -> Path:
    """Saves what led to an update with a number that is none: weights, batches, and the facts of the step.

    Args:
        folder: Where to; one file per update is written there.
        model: With the weights before the update.
        batches: The update's, as loaded.
        facts: Plain data; `updates`, `rank` and `world_size` name the file.
    """
    tensors = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    for number, batch in enumerate(batches):
        tensors[f"batch{number}.images"] = batch.images.contiguous()
        tensors[f"batch{number}.labels"] = batch.labels
        tensors[f"batch{number}.indices"] = batch.indices
    folder.mkdir(exist_ok=True)
    rank = f"-rank{facts['rank']}" if facts["world_size"] > 1 else ""
    path = folder / f"update-{facts['updates']:08d}{rank}.safetensors"
    write_atomic(path, save(tensors, metadata={"sequencer2d_fault": json.dumps(facts)}))
    return path


def load_fault(path: Path) -> tuple[dict[str, Tensor], list[Batch], dict[str, Any]]:
    """The model's state dict, the batches and the facts of a file of `keep_fault`.

    Raises:
        ValueError: It is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = (file.metadata() or {}).get("sequencer2d_fault")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error})") from error
    if facts is None:
        raise ValueError(f"{path} is no record of a fault in training")
    state = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    count = len(tensors) - len(state)
    batches = [
        Batch(*(tensors[f"batch{number}.{part}"] for part in ("images", "labels", "indices")), skipped=[])
        for number in range(count // 3)
    ]
    return state, batches, json.loads(facts)
