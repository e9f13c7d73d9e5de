"""What `results/study.yaml` says: the tables and pictures of the page, in order."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from sequencer2d.training.run_folder import MAY_CHANGE
from study.runs import Run


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table."""

    label: str
    runs: list[str]
    """Names of runs that differ by their seed alone; those that are not there yet are left out."""
    note: str = ""
    """Stands behind the label."""
    highlight: bool | None = None
    """Whether pictures show it in colour. Default: Sequencers."""
    curves: bool = False
    """Whether the page shows loss, accuracy and learning rate of these runs."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A picture of a table's rows."""

    kind: Literal["dots", "curves", "resolution"]
    """A dot for each row; validations over minutes, of the first run of each row; accuracy over image sizes."""
    x: Literal["minutes", "parameters", "macs", "images"] = "minutes"
    """Of dots."""
    y: Literal["val", "test", "flips"] = "test"
    """Which accuracy, of dots; of resolution, on which split."""
    rows: list[str] | None = None
    """Labels of some rows. Default: all."""

    def __post_init__(self) -> None:
        if self.kind == "resolution" and self.y == "flips":
            raise ValueError("a plot of kind resolution has y: val or y: test")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A section of the page."""

    title: str
    rows: list[Row]
    introduction: str = ""
    """Markdown."""
    columns: list[str] | None = None
    """Names of `tables.COLUMNS`. Default: `tables.DEFAULT`. Columns without any value are left out."""
    plots: tuple[Plot, ...] = ()

    def __post_init__(self) -> None:
        labels = [row.label for row in self.rows]
        unknown = {label for plot in self.plots for label in plot.rows or ()} - set(labels)
        if unknown or len(set(labels)) < len(labels):
            what = f"plots name no row of it: {', '.join(sorted(unknown))}" if unknown else "two rows have one label"
            raise ValueError(f"table {self.title!r}: {what}")


@dataclass(frozen=True, kw_only=True)
class Study:
    """All tables."""

    tables: tuple[Table, ...] = ()
    introduction: str = ""
    """Markdown."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row with those of its runs that are there, at least one."""

    row: Row
    runs: tuple[Run, ...]

    @property
    def highlight(self) -> bool:
        return self.runs[0].is_ours if self.row.highlight is None else self.row.highlight


def read_study(path: Path) -> Study:
    """Reads `study.yaml`.

    Raises:
        ValueError: It is no YAML, or has a key or value that a study does not have.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study, "study")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return parser.instantiate(parser.parse_object({"study": values})).study
    except Exception as error:
        raise ValueError(f"{path} is no study: {error}") from error


def lines_of(table: Table, runs: dict[str, Run]) -> list[Line]:
    """The rows of a table of which there are runs.

    Raises:
        ValueError: Runs of one row differ by more than their seed.
    """
    lines = []
    for row in table.rows:
        found = tuple(runs[name] for name in row.runs if name in runs)
        changed = {key for run in found for key in _changes(found[0], run)}
        if changed:
            names = ", ".join(sorted(changed))
            raise ValueError(f"runs of {row.label!r} in {table.title!r} differ by more than their seed: by {names}")
        if found:
            lines.append(Line(row=row, runs=found))
    return lines


def _changes(first: Run, other: Run) -> set[str]:
    """Fields by which a run is another training; those that only one of the two knows are of another version."""
    return differing(first.config, other.config) - MAY_CHANGE - {"seed", "split_seed"}


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    """Dotted names of fields that both have, with different values."""
    found: set[str] = set()
    for key in one.keys() & other.keys():
        if isinstance(one[key], dict) and isinstance(other[key], dict) and key != "model_args":
            found |= {f"{key}.{name}" for name in differing(one[key], other[key])}
        elif one[key] != other[key]:
            found.add(key)
    return found


def runs_of_no_table(study: Study, runs: dict[str, Run]) -> list[Run]:
    """The runs that the study does not name."""
    named = {name for table in study.tables for row in table.rows for name in row.runs}
    return [run for name, run in runs.items() if name not in named]
