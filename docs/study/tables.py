"""A table of the page in Markdown."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from study.plan import Line
from study.runs import Run


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of figures."""

    heading: str
    value: Callable[[Run], float | None]
    """Of one run; None where there is none."""
    text: Callable[[float], str]
    """The mean over the runs of a row, for people."""
    spread: bool = False
    """Whether the standard deviation over the runs stands beside it; for shares."""


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def short_count(count: float) -> str:
    """Three digits and a unit, such as 1.80 M."""
    value, unit = _with_unit(count)
    if not unit:
        return f"{count:.0f}"
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def rounded_count(count: float) -> str:
    """As short as can be, such as 1.8 M, for an axis."""
    value, unit = _with_unit(count)
    return f"{value:g} {unit}".rstrip()


def _with_unit(count: float) -> tuple[float, str]:
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return count / factor, unit
    return count, ""


def _share(heading: str, value: Callable[[Run], float | None]) -> Column:
    return Column(heading=heading, value=value, text=percent, spread=True)


def _at_size(run: Run, size: int) -> float | None:
    return run.top1_by_image_size("test").get(size)


SIZES = (24, 28, 32, 40, 48, 56, 64, 80, 96, 128)
"""Of images in pixels: `test_24` and so on are columns."""

COLUMNS: dict[str, Column] = {
    "parameters": Column(heading="parameters", value=lambda run: run.result["num_parameters"], text=short_count),
    "macs": Column(heading="MACs", value=lambda run: run.macs, text=short_count),
    "images": Column(heading="images seen", value=lambda run: run.images_seen, text=short_count),
    "epochs": Column(heading="epochs", value=lambda run: run.result["epochs"], text="{:.1f}".format),
    "minutes": Column(heading="minutes", value=lambda run: run.result["minutes"], text="{:.1f}".format),
    "images_per_s": Column(heading="images/s", value=lambda run: run.images_per_s, text="{:,.0f}".format),
    "val": _share("val top-1", lambda run: run.top1("val")),
    "test": _share("test top-1", lambda run: run.top1("test")),
    "flips": _share("test top-1, flips", lambda run: run.top1("test", flips=True)),
    "val_flips": _share("val top-1, flips", lambda run: run.top1("val", flips=True)),
    "bf16": _share("test top-1, bf16", lambda run: run.top1("test", precision="bf16")),
    "int8": _share("test top-1, int8", lambda run: run.top1("test", precision="int8")),
    **{f"test_{size}": _share(f"test at {size}²", partial(_at_size, size=size)) for size in SIZES},
    "test_loss": Column(heading="test loss", value=lambda run: _of_test(run, "loss"), text="{:.4f}".format),
    "test_ece": Column(heading="calibration error", value=lambda run: _of_test(run, "ece"), text="{:.4f}".format),
    "updates": Column(heading="updates", value=lambda run: run.result["updates"], text="{:,.0f}".format),
}
DEFAULT = ("parameters", "macs", "images", "epochs", "minutes", "images_per_s", "val", "test", "flips")


def _of_test(run: Run, key: str) -> float | None:
    evaluation = run.result["evaluation"]
    return evaluation[key] if evaluation["split"] == "test" else None


def mean_of(column: str, runs: Sequence[Run]) -> tuple[float, float | None, int] | None:
    """Mean, sample standard deviation (None for one value) and number of the values that the runs have, if any."""
    values = [value for run in runs if (value := COLUMNS[column].value(run)) is not None]
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


def write_table(lines: Sequence[Line], columns: Sequence[str] | None = None) -> str:
    """The table, and below it what its test images are.

    Args:
        lines: At least one.
        columns: Names of `COLUMNS`.

    Raises:
        ValueError: There is no such column.
    """
    unknown = set(columns or ()) - set(COLUMNS)
    if unknown:
        raise ValueError(f"no column is named {', '.join(sorted(unknown))}: there are {', '.join(COLUMNS)}")
    shown = [name for name in columns or DEFAULT if any(mean_of(name, line.runs) for line in lines)]
    seeds = any(len(line.runs) > 1 for line in lines)
    headings = ["", *(["runs"] if seeds else []), *(COLUMNS[name].heading for name in shown)]
    text = [f"| {' | '.join(headings)} |", f"| --- |{' ---: |' * (len(headings) - 1)}"]
    for line in lines:
        label = f"[{line.row.label}](#run-{line.runs[0].name})" + (f", {line.row.note}" if line.row.note else "")
        cells = [label, *([str(len(line.runs))] if seeds else []), *(_cell(name, line.runs) for name in shown)]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, "", _test_images(lines)])


def _cell(name: str, runs: Sequence[Run]) -> str:
    found = mean_of(name, runs)
    if found is None:
        return "–"
    mean, deviation, count = found
    column = COLUMNS[name]
    if not column.spread or deviation is None:
        text = column.text(mean)
    else:
        text = f"{100 * mean:.2f} ± {100 * deviation:.2f} %"
    return text if count == len(runs) else f"{text} (of {count})"


def _test_images(lines: Sequence[Line]) -> str:
    evaluations = [run.result["evaluation"] for line in lines for run in line.runs]
    what = {
        f"{evaluation['num_images']:,} images of {evaluation['data']}"
        for evaluation in evaluations
        if evaluation["split"] == "test"
    }
    return f"Test: {'; '.join(sorted(what))}." if what else "No test images."
