"""Writes docs/results.md and its pictures from the summaries of runs in docs/results/ and from results/study.yaml.

`python docs/make_results.py` writes the page anew; with RUN_DIR … it takes up these finished runs first, with
what `sequencer2d evaluate RUN_DIR … --json RUN_DIR/evaluations/NAME.json` has written into them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from sequencer2d.files import write_atomic
from study.page import make_page
from study.plan import read_study
from study.runs import load_runs, take_up

DOCS = Path(__file__).parent


def main(run_dirs: Sequence[str], docs: Path = DOCS) -> None:
    """Takes up runs and writes the page; pictures that it no longer shows are removed."""
    results = docs / "results"
    for run_dir in run_dirs:
        take_up(Path(run_dir), results)
    page = make_page(read_study(results / "study.yaml"), load_runs(results))
    for name, svg in page.pictures.items():
        write_atomic(results / name, svg)
    write_atomic(docs / "results.md", page.text)
    for path in results.rglob("*.svg"):
        if path.relative_to(results).as_posix() not in page.pictures:
            path.unlink()


if __name__ == "__main__":
    main(sys.argv[1:])
