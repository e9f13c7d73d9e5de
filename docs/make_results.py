"""Writes docs/results.md and its curves from the summaries of runs in docs/results/.

`python docs/make_results.py` writes the page anew; `python docs/make_results.py RUN_DIR …` takes up runs first.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from sequencer2d.visualize.curves import draw_curves

DOCS = Path(__file__).parent
MAX_ROWS = 200
HEAD = """# Results

Accuracy is chosen on validation images, which are split off the training images, and read on test images once.
Minutes are wall-clock of the training with its validations, without reading the data and the final evaluation.
This page is written by `python docs/make_results.py` from the run summaries in `docs/results/`.

| run | data | model | parameters | minutes | images/s | val top-1 | test top-1 | test images |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def take_up(run_dir: Path) -> None:
    """Keeps what the page needs of a finished run, its metrics thinned; nothing else, and no file names."""
    folder = DOCS / "results" / run_dir.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "environment.json"):
        shutil.copy(run_dir / name, folder / name)
    result = json.loads((run_dir / "result.json").read_text())
    result["num_skipped"] = len(result.pop("skipped"))
    result["evaluation"]["num_skipped"] = len(result["evaluation"].pop("skipped"))
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    keep = max(1, len(rows) // MAX_ROWS)
    thinned = [row for number, row in enumerate(rows) if "valid_acc" in row or number % keep == 0]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in thinned))


def draw(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """The curves of a run as files of their own; their names."""
    names = []
    for curve in draw_curves(rows):
        name = f"{curve.title.lower().replace(' ', '-')}.svg"
        svg = re.sub(r"var\(--\w+, (#\w+)\)", r"\1", curve.svg)
        svg = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="460" ', 1)
        svg = svg.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1)
        (folder / name).write_text(svg + "\n")
        names.append(name)
    return names


def describe(folder: Path) -> tuple[str, str]:
    """The row of the table, and the section, of a run."""
    result = json.loads((folder / "result.json").read_text())
    environment = json.loads((folder / "environment.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluation = result["evaluation"]
    test = f"**{evaluation['top1']:.2%}** | {evaluation['num_images']:,}" if evaluation["split"] == "test" else "– | –"
    speeds = sorted(row["images_per_s"] for row in rows if "images_per_s" in row)
    row = (
        f"| [{folder.name}](#{folder.name}) | {evaluation['data']} | {config['model']} | "
        f"{result['num_parameters'] / 1e6:.2f} M | {result['minutes']:.1f} | {speeds[len(speeds) // 2]:,.0f} | "
        f"{result['val_top1']:.2%} | {test} |\n"
    )
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    curves = "\n".join(f"![{name.removesuffix('.svg')}](results/{folder.name}/{name})" for name in draw(folder, rows))
    section = (
        f"\n## {folder.name}\n\n"
        f"- command: `{environment['command']}`\n"
        f"- commit: {environment['commit']}\n"
        f"- machine: {environment['gpu'] or environment['cpu']} ({environment['cpu_capability']}), "
        f"{environment['threads']} threads of {environment['cores']} cores; {versions}\n"
        f"- test loss {evaluation['loss']:.4f}, calibration error {evaluation['ece']:.4f}, "
        f"{result['updates']:,} updates, {result['num_skipped']} unreadable images\n\n{curves}\n"
    )
    return row, section


def main(run_dirs: list[str]) -> None:
    for run_dir in run_dirs:
        take_up(Path(run_dir))
    parts = [describe(folder) for folder in sorted((DOCS / "results").iterdir()) if folder.is_dir()]
    (DOCS / "results.md").write_text(HEAD + "".join(row for row, _ in parts) + "".join(text for _, text in parts))


if __name__ == "__main__":
    main(sys.argv[1:])
