"""Training curves: the rows of `metrics.jsonl` drawn with matplotlib as SVG for the inside of an HTML page.

Colours are CSS variables (`--train`, `--val`, …) with those of a light page as fallback, and text takes the page's
font: the page decides on light and dark.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FIGURE_SIZE = (4.6, 2.9)  # inches, small enough for the text to stay legible on a phone
MAX_POINTS = 500  # per line; more are averaged in groups, so that a long run's report stays small
COLOURS = {"train": "#b4520a", "val": "#1c62b0", "ema": "#7a3fb0", "muted": "#56606e", "grid": "#d9dee4"}
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # same input, same bytes

Row = Mapping[str, float | int | None]  # of `metrics.jsonl`


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One metric of a chart."""

    key: str
    """Its name in `metrics.jsonl`."""
    label: str
    colour: str
    """A name from `COLOURS`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Metrics that share an axis."""

    title: str
    lines: tuple[Line, ...]
    is_share: bool = False
    """Whether the values are shares, to be written in percent; the highest is the best."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A chart with the numbers of one run."""

    title: str
    summary: str
    """First, last and best values in words; empty where nothing was logged."""
    svg: str
    """An `<svg>` element; empty where nothing was logged."""


CHARTS = (
    Chart(
        title="Loss",
        lines=(
            Line(key="train_loss", label="training", colour="train"),
            Line(key="val_loss", label="validation", colour="val"),
        ),
    ),
    Chart(
        title="Accuracy",
        lines=(
            Line(key="valid_acc", label="validation", colour="val"),
            Line(key="valid_acc_ema", label="averaged weights", colour="ema"),
        ),
        is_share=True,
    ),
    Chart(title="Learning rate", lines=(Line(key="learning_rate", label="learning rate", colour="train"),)),
)


def draw_curves(metrics: Sequence[Row]) -> Iterator[Curve]:
    """Draws every chart of `CHARTS` over epochs, or over steps where no epoch was logged.

    Rows may lack any key and hold NaN. Where a resumed run repeats a step, the later row counts.
    """
    x_name = "epoch" if any("epoch" in row for row in metrics) else "step"
    for chart in CHARTS:
        points = {line: finite_points(metrics, x_name, line.key) for line in chart.lines}
        points = {line: xy for line, xy in points.items() if len(xy)}
        if points:
            summary = "; ".join(summarise(line, xy[:, 1], chart.is_share) for line, xy in points.items())
            svg = draw_chart(chart, points, x_name, f"{chart.title} over {x_name}s. {summary}")
            yield Curve(title=chart.title, summary=summary, svg=svg)
        else:
            yield Curve(title=chart.title, summary="", svg="")


def finite_points(metrics: Sequence[Row], x_name: str, key: str) -> np.ndarray:
    """`[N, 2]`: the finite values of one metric and where they were logged, in ascending order."""
    pairs = [(row.get(x_name), row.get(key)) for row in metrics]
    xy = np.array(pairs, dtype=float).reshape(-1, 2)  # a missing value, None, becomes NaN
    last_of_each_x = dict(xy[np.isfinite(xy).all(axis=1)].tolist())
    return np.array(sorted(last_of_each_x.items())).reshape(-1, 2)


def summarise(line: Line, values: np.ndarray, is_share: bool) -> str:
    """For example `validation 31.2 % → 91.0 %, best 91.3 %`."""
    texts = [percent(value) if is_share else f"{value:.3g}" for value in (values[0], values[-1], values.max())]
    if len(values) == 1:
        return f"{line.label} {texts[0]}"
    return f"{line.label} {texts[0]} → {texts[1]}" + (f", best {texts[2]}" if is_share else "")


def percent(value: float, decimals: int = 1) -> str:
    """A share in 0..1 as text; `n/a` where there is none (NaN)."""
    return f"{100 * value:.{decimals}f} %" if np.isfinite(value) else "n/a"


def draw_chart(chart: Chart, points: Mapping[Line, np.ndarray], x_name: str, description: str) -> str:
    """The chart as an `<svg>` element."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": chart.title, "font.size": 11})
        figure = Figure(figsize=FIGURE_SIZE, layout="constrained")
        axes = figure.add_subplot()
        for line, xy in points.items():
            groups = np.array_split(xy, min(len(xy), MAX_POINTS))
            x, y = np.array([group.mean(axis=0) for group in groups]).T
            marker = "o" if len(x) <= 30 else None
            look = {"color": COLOURS[line.colour], "linewidth": 1.6, "marker": marker, "markersize": 3}
            axes.plot(x, y, label=line.label, clip_on=False, **look)
        style(axes, x_name, chart.is_share)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=NO_METADATA)
    return for_html(file.getvalue(), prefix=re.sub(r"\W", "-", chart.title.lower()), description=description)


def style(axes: Axes, x_name: str, is_share: bool) -> None:
    """Only what helps to read values: horizontal grid lines, a base line, quiet labels, the legend on top."""
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["grid"])
    axes.grid(axis="y", color=COLOURS["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=COLOURS["muted"], labelsize=10)
    axes.locator_params(axis="y", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %" if is_share else f"{value:g}")
    axes.set_xlim(left=0)
    axes.set_xlabel(x_name, color=COLOURS["muted"], loc="right")
    legend_options = {"frameon": False, "ncols": 2, "borderaxespad": 0, "borderpad": 0.2, "handlelength": 1.2}
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), labelcolor=COLOURS["muted"], **legend_options)


def for_html(svg: str, prefix: str, description: str) -> str:
    """Matplotlib's SVG file as an element: named for screen readers, its ids unique, its colours the page's."""
    opening, body = svg[svg.index("<svg") :].split(">", maxsplit=1)
    view_box = re.search(r'viewBox="[^"]*"', opening)
    assert view_box, "matplotlib's SVG has a viewBox"
    body = re.sub(r'( id="| href="#|:href="#|url\(#)', rf"\g<1>{prefix}-", body)
    for name, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{name}, {colour})")
    title = escape(description)
    return f'<svg {view_box[0]} role="img" aria-label="{title}">\n<title>{title}</title>{body}'
