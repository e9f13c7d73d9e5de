"""Runs as the page knows them: a small summary of each in `docs/results/<name>/`, taken up from a finished run."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sequencer2d.files import write_atomic
from sequencer2d.peers import is_peer
from study.costs import macs_per_image

MAX_ROWS = 50  # of metrics of the training, and as many of validations
LEFT_OUT = {"class_names", "confusion", "per_class", "skipped"}
"""Of an evaluation: what the page does not show, and what may name files."""

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The summary of a finished run; fractions lie in 0…1."""

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    """By `sequencer2d evaluate`, after the training."""

    @property
    def is_ours(self) -> bool:
        return not is_peer(self.config["model"])

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image, counted when the run was taken up: a variant may change later."""
        return self.result["macs"]

    @property
    def images_seen(self) -> int:
        """Training images of all updates together."""
        return self.result["updates"] * self.config["batch_size"] * self.config["accumulate"]

    @property
    def images_per_s(self) -> float:
        """Those over the training's seconds, validations included."""
        return self.images_seen / (60 * self.result["minutes"])

    @property
    def machine(self) -> str:
        """Processor, cores, versions and system, for people; the package's own version follows from the commit.

        Of virtual machines whose processors have the same name, the system's name tells which are equally fast.
        """
        machine = self.environment
        versions = [f"{name} {of}" for name, of in machine["packages"].items() if name != "sequencer2d"]
        return (
            f"{machine['gpu'] or machine['cpu']} ({machine['cpu_capability']}), {machine['threads']} of "
            f"{machine['cores']} cores; {', '.join(versions)}; {machine['platform']}"
        )

    def top1(self, split: str, *, flips: bool = False, precision: str = "fp32") -> float | None:
        """Accuracy of the saved weights at the image size of their training; None where it was not measured.

        On validation images it is the best of the training's validations, by which these weights were chosen.
        """
        if split == "val" and not flips and precision == "fp32":
            return self.result["val_top1"]
        return self._top1_by_size(split, flips=flips, precision=precision).get(self.config["image_size"])

    def top1_by_image_size(self, split: str) -> dict[int, float]:
        """Accuracy, without flips, at every image size where it was measured, in ascending order."""
        own = self.top1(split)
        found = {} if own is None else {self.config["image_size"]: own}
        return dict(sorted((found | self._top1_by_size(split, flips=False, precision="fp32")).items()))

    def _top1_by_size(self, split: str, *, flips: bool, precision: str) -> dict[int, float]:
        last = self.result["evaluation"]
        return {
            each.get("image_size") or self.config["image_size"]: each["top1"]
            for each in [*self.evaluations, last]  # what the run itself measured counts
            if each["split"] == split
            and each["data"] == last["data"]
            and each.get("flips", False) == flips
            and each.get("precision", "fp32") == precision
        }

    def validations(self) -> list[tuple[float, float]]:
        """Minutes of training and accuracy at the validations that were kept."""
        return [(row["elapsed_s"] / 60, row["valid_acc"]) for row in self.metrics if "valid_acc" in row]


def load_runs(results: Path) -> dict[str, Run]:
    """All summaries, by name."""
    folders = sorted(path.parent for path in results.glob("*/result.json"))
    return {folder.name: _load_run(folder) for folder in folders}


def _load_run(folder: Path) -> Run:
    return Run(
        name=folder.name,
        config=yaml.safe_load((folder / "config.yaml").read_text()),
        environment=_read_json(folder / "environment.json"),
        result=_read_json(folder / "result.json"),
        metrics=_read_lines(folder / "metrics.jsonl"),
        evaluations=[_read_json(path) for path in sorted((folder / "evaluations").glob("*.json"))],
    )


def take_up(run_dir: Path, results: Path) -> list[str]:
    """Keeps of a finished run what the page needs, and nothing that names a folder of the machine.

    The run of a seed is named after the folder of its seeds, too; such a folder stands for the runs of all its seeds.

    Returns:
        The names of the runs.

    Raises:
        FileNotFoundError: It is no finished run.
        ValueError: The code that it ran is in no commit, or its model cannot be made.
    """
    if (run_dir / "seeds.json").exists():
        return [name for seed in sorted(run_dir.glob("seed-*")) for name in take_up(seed, results)]
    if not (run_dir / "result.json").exists():
        raise FileNotFoundError(f"{run_dir} is no finished run: it has no result.json")
    run_dir = run_dir.resolve()
    environment = _read_json(run_dir / "environment.json")
    if lacking := uncommitted(environment):
        raise ValueError(f"{run_dir} ran code of no commit ({lacking[0]}); train it again from a clean checkout")
    name = f"{run_dir.parent.name}-{run_dir.name}" if re.fullmatch(r"seed-\d+", run_dir.name) else run_dir.name
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    rows = _read_lines(run_dir / "metrics.jsonl")
    result = summarise_result(_read_json(run_dir / "result.json"), rows)
    try:
        result["macs"] = macs_per_image(config, result["evaluation"]["num_classes"])
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"the model of {name} cannot be made from its config.yaml: {error}") from error
    for step in (environment, *environment.get("continued", [])):
        step["command"] = shlex.join(_portable(word) for word in shlex.split(step["command"]))
    files = {
        "config.yaml": yaml.safe_dump(_portable(config), sort_keys=False),
        "environment.json": json.dumps(environment, indent=1) + "\n",
        "result.json": json.dumps(result, indent=1) + "\n",
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in thin(rows)),
    }
    for path in sorted((run_dir / "evaluations").glob("*.json")):
        files[f"evaluations/{path.name}"] = json.dumps(summarise_evaluation(_read_json(path)), indent=1) + "\n"
    for file, text in files.items():
        path = results / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    return [name]


def commits_of(environment: Mapping[str, Any]) -> list[str | None]:
    """Of the code that began a run and of that which continued it, in order."""
    return [step["commit"] for step in (environment, *environment.get("continued", []))]


def uncommitted(environment: Mapping[str, Any]) -> list[str | None]:
    """Those of `commits_of` that nobody can check out: none is known, or the checkout had changes."""
    return [commit for commit in commits_of(environment) if not commit or commit.endswith("+")]


def summarise_result(result: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page shows of `result.json`, and the epochs by the metrics before they are thinned."""
    kept = {key: result[key] for key in ("num_parameters", "updates", "minutes", "val_top1")}
    return {
        **kept,
        "epochs": max(row["epoch"] for row in rows if "epoch" in row),
        "num_skipped": len(result["skipped"]),
        "evaluation": summarise_evaluation(result["evaluation"]),
    }


def summarise_evaluation(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The numbers of an evaluation without its tables of classes."""
    kept = {key: value for key, value in evaluation.items() if key not in LEFT_OUT}
    return {**kept, "num_classes": len(evaluation["class_names"]), "num_skipped": len(evaluation["skipped"])}


def thin(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Validations and rows of the training, evenly spaced with the last of each, in six digits."""
    numbered = list(enumerate(rows))
    validations, others = (
        [(number, row) for number, row in numbered if ("valid_acc" in row) == wanted] for wanted in (True, False)
    )
    kept = sorted([*_evenly(validations), *_evenly(others)], key=lambda pair: pair[0])
    return [
        {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}
        for _, row in kept
    ]


def _evenly(items: Sequence[Item]) -> list[Item]:
    """At most `MAX_ROWS`, the last among them."""
    step = -(-len(items) // MAX_ROWS) or 1
    return list(items[::-1][::step][::-1])


def _portable(value: Any) -> Any:
    """Without folders of the machine, also inside dicts and lists.

    `/home/me/data/cifar10` is `./cifar10` then, and `/home/me/runs/a/seed-0` is `./runs/a/seed-0`.
    """
    if isinstance(value, dict):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_portable(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"^(--[\w.-]+=)?/(?:[^/]+/)*?(runs/.+|[^/]+)/?$", r"\1./\2", value)
    return value


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
