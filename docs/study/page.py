"""The page in Markdown, and the pictures that it shows."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from study.pictures import Curve, Dot, draw_dots, draw_lines, draw_run
from study.plan import Line, Plot, Row, Study, lines_of, runs_of_no_table
from study.runs import Run, commits_of
from study.tables import mean_of, rounded_count, write_table

HEAD = """# Results

The weights of a run are those of its best validation, on images split off the training images; validation accuracy is
that best one, and so a little high. Test images decide nothing, and each number on them is read once. Several runs of
a row differ by their seed: *mean ± sample standard deviation*; *(of 2)* where only two were measured. Minutes are
wall-clock of the training with its validations, without reading the data and the final evaluation; images/s are the
images seen over these. MACs are the multiply-accumulates of one image at the final size of the training: by our
formulas for Sequencers, whose LSTMs counters skip, and by PyTorch's counter for others. *Flips* averages the answers
for an image and its mirror image (`sequencer2d evaluate RUN --flips`). Each label leads to the command of its run.

This page is written by `python docs/make_results.py` from the summaries of runs and `study.yaml` in `docs/results/`.
"""

COMMANDS = """\
Each gives its row at its commit (`git checkout COMMIT`, installed anew): recipes, nets and the weights in the package
have changed since. What was evaluated after the training: `sequencer2d evaluate RUN --split test`, with `--flips` or
`--image-size SIZE`."""

X_LABELS = {
    "parameters": "parameters",
    "macs": "multiply-accumulates of an image",
    "images": "training images seen",
}
Y_LABELS = {"val": "validation top-1", "test": "test top-1", "flips": "test top-1 with flips"}


@dataclass(frozen=True, kw_only=True)
class Page:
    """What is to be written into `docs/`."""

    text: str
    pictures: dict[str, str]
    """SVG by path below `docs/results/`."""


def make_page(study: Study, runs: dict[str, Run]) -> Page:
    """The whole page.

    Raises:
        ValueError: The study does not fit the runs.
    """
    parts, drawn, all_lines, titles = [HEAD, study.introduction], {}, [], dict[str, str]()
    for table in study.tables:
        lines = lines_of(table, runs)
        if not lines:
            continue
        all_lines += lines
        titles = {run.name: table.title for line in lines for run in line.runs} | titles  # the first one counts
        parts += [f"## {table.title}", table.introduction, write_table(lines, table.columns)]
        for plot in table.plots:
            caption = _caption(plot)
            if svg := draw(plot, lines, f"{table.title}: {caption}"):
                name = f"{_slug(table.title)}-{_slug(caption)}.svg"
                if name in drawn:
                    raise ValueError(f"two pictures would be {name}; give them in tables of other titles")
                drawn[name] = svg
                parts.append(f"![{caption}](results/{name})")
    others = [Line(row=Row(label=run.name, runs=[run.name]), runs=(run,)) for run in runs_of_no_table(study, runs)]
    if others:
        all_lines += others
        parts += ["## Other runs", write_table(others)]
    labels = _labels(all_lines)
    for name in dict.fromkeys(run.name for line in all_lines if line.row.curves for run in line.runs):
        curves = draw_run(runs[name].metrics)
        drawn |= {f"{name}/{curve}.svg": svg for curve, svg in curves.items()}
        parts.append(f"## Curves: {titles[name]}, {labels[name]}")
        parts.append("\n".join(f"![{curve}](results/{name}/{curve}.svg)" for curve in curves))
    parts.append(_commands(labels, runs))
    return Page(text="\n\n".join(part.strip() for part in parts if part) + "\n", pictures=drawn)


def draw(plot: Plot, lines: Sequence[Line], description: str) -> str | None:
    """The picture of a table as SVG; None where nothing of it has been measured."""
    chosen = [line for line in lines if plot.rows is None or line.row.label in plot.rows]
    y_label = Y_LABELS[plot.y]
    if plot.kind == "dots":
        return _draw_dots(plot, chosen, y_label, description)
    if plot.kind == "curves":
        points = [line.runs[0].validations() for line in chosen]
        x_label, y_label = _minutes(chosen), "validation top-1 during the training"
    else:
        points = [_mean_by_size(line.runs, plot.y) for line in chosen]
        x_label, y_label = "side of the image in pixels", f"{y_label} at other image sizes"
        points = [found if len(found) > 1 else [] for found in points]  # one size is no line
    curves = [
        Curve(label=_plain(line.row.label), points=found, highlight=line.highlight)
        for line, found in zip(chosen, points, strict=True)
        if found
    ]
    if not curves:
        return None
    from_zero = plot.kind == "curves"
    return draw_lines(curves, x_label=x_label, y_label=y_label, description=description, from_zero=from_zero)


def _draw_dots(plot: Plot, lines: Sequence[Line], y_label: str, description: str) -> str | None:
    dots = []
    for line in lines:
        x, y = mean_of(plot.x, line.runs), mean_of(plot.y, line.runs)
        if x and y:
            dots.append(Dot(label=_plain(line.row.label), x=x[0], y=y[0], deviation=y[1], highlight=line.highlight))
    if not dots:
        return None
    x_label = X_LABELS.get(plot.x) or _minutes(lines)
    x_text = "{:g}".format if plot.x == "minutes" else rounded_count
    return draw_dots(dots, x_label=x_label, y_label=y_label, x_text=x_text, description=description)


def _mean_by_size(runs: Sequence[Run], split: str) -> list[tuple[float, float]]:
    """Mean accuracy at the image sizes at which every run was evaluated."""
    found = [run.top1_by_image_size(split) for run in runs]
    sizes = [size for size in found[0] if all(size in each for each in found)]
    return [(float(size), fmean(each[size] for each in found)) for size in sizes]


def _minutes(lines: Sequence[Line]) -> str:
    cores = {run.environment["threads"] for line in lines for run in line.runs if not run.environment["gpu"]}
    where = f" on {cores.pop()} cores" if len(cores) == 1 else ""
    return f"minutes of training{where}, wall-clock"


def _caption(plot: Plot) -> str:
    if plot.kind == "curves":
        return "validation top-1 during the training"
    x_label = "image size" if plot.kind == "resolution" else X_LABELS.get(plot.x, plot.x)
    return f"{Y_LABELS[plot.y]} over {x_label}"


def _plain(label: str) -> str:
    """A label as pictures show it, which know no Markdown."""
    return label.replace("`", "")


def _labels(lines: Sequence[Line]) -> dict[str, str]:
    """What each run is called, by its first row; with its seed where the row has several."""
    labels: dict[str, str] = {}
    for line in lines:
        for run in line.runs:
            seed = f", seed {run.config['seed']}" if len(line.runs) > 1 else ""
            labels.setdefault(run.name, f"{line.row.label}{seed}")
    return labels


def _commands(labels: dict[str, str], runs: dict[str, Run]) -> str:
    """A line for each run, with the commit that it ran; the machine once."""
    machines = list(dict.fromkeys(runs[name].machine for name in labels))
    several = len(machines) > 1
    described = [
        f"Machine {number}: {machine}." if several else f"All on {machine}."
        for number, machine in enumerate(machines, start=1)
    ]
    commands = []
    for name, label in labels.items():
        run = runs[name]
        first, *others = dict.fromkeys((commit or "unknown")[:12] for commit in commits_of(run.environment))
        facts = [f"commit {first}" + "".join(f", continued at {other}" for other in others)]
        if several:
            facts.append(f"machine {machines.index(run.machine) + 1}")
        if run.result["num_skipped"]:
            facts.append(f"{run.result['num_skipped']} unreadable images")
        command = run.environment["command"]
        commands.append(f'- <a id="run-{name}"></a>{label}: `{command}` ({", ".join(facts)})')
    return "\n\n".join(["## Commands", COMMANDS, *described, "\n".join(commands)])


def _slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")
