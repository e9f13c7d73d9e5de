"""Pictures as SVG files of their own, light or dark as the reader's system is, on a ground of their own.

The ground makes them legible on a page that is dark while the system is light, or the other way round.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from sequencer2d.visualize.curves import NO_METADATA, Row, draw_curves

COLOURS = {  # light, dark; the first nine as in visualize/page.css
    "page": ("#ffffff", "#14181d"),
    "ink": ("#1a2129", "#e6e9ed"),
    "muted": ("#56606e", "#a2acb8"),
    "grid": ("#d9dee4", "#343c46"),
    "val": ("#1c62b0", "#7ab2f2"),
    "train": ("#b4520a", "#f0a067"),
    "ema": ("#7a3fb0", "#c39af0"),
    "right": ("#1a6b3c", "#6fcf97"),
    "wrong": ("#b3261e", "#ff8a80"),
    "teal": ("#00707a", "#5cc8d2"),
    "olive": ("#6b6100", "#cfc25a"),
}
LINES = ("val", "train", "right", "ema", "wrong", "teal", "olive", "muted")
"""Colours of lines, in order; more lines are dashed."""
FIGURE_SIZE = (7.5, 4.2)  # inches
WIDTH = 720  # pixels on the page
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A model; accuracies are shares."""

    label: str
    x: float
    y: float
    deviation: float | None = None
    """Standard deviation of `y`."""
    highlight: bool


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line through points of ascending x; accuracies are shares."""

    label: str
    points: Sequence[tuple[float, float]]
    highlight: bool


def draw_dots(
    dots: Sequence[Dot], *, x_label: str, y_label: str, x_text: Callable[[float], str], description: str
) -> str:
    """A labelled dot for each model, those to be highlighted in colour; x is logarithmic where it spans a factor of 4.

    Args:
        dots: At least one.
        x_label: What x is, with its unit.
        y_label: What y is.
        x_text: A number of the x axis for people.
        description: For those who cannot see the picture.
    """

    def draw(axes: Axes) -> None:
        _scale_x(axes, [dot.x for dot in dots], x_text)
        low = min(dot.y - (dot.deviation or 0) for dot in dots)
        high = max(dot.y + (dot.deviation or 0) for dot in dots)
        margin = 0.12 * (high - low) or 0.01
        axes.set_ylim(low - margin, min(high + margin, 1 + margin / 4))
        for dot in dots:
            colour = _light("val" if dot.highlight else "muted")
            axes.errorbar(dot.x, dot.y, yerr=dot.deviation or None, color=colour, elinewidth=1.2, capsize=0)
            size = 62 if dot.highlight else 38
            axes.scatter(dot.x, dot.y, s=size, color=colour, edgecolor=_light("page"), linewidth=1, zorder=3)
        _label_dots(axes, dots)

    return _picture(draw, x_label, y_label, description, right=0.25)


def draw_lines(
    curves: Sequence[Curve], *, x_label: str, y_label: str, description: str, from_zero: bool = False
) -> str:
    """A line for each model with its label at the end, those to be highlighted bold.

    Args:
        curves: At least one, each of at least one point.
        x_label: What x is, with its unit.
        y_label: What y is.
        description: For those who cannot see the picture.
        from_zero: Whether the x axis begins there.
    """
    longest = max(len(curve.label) for curve in curves)

    def draw(axes: Axes) -> None:
        for number, curve in enumerate(curves):
            x, y = np.array(curve.points).T
            look = {"linewidth": 2.4 if curve.highlight else 1.4, "linestyle": _dashes(number)}
            marker = {"marker": "o", "markersize": 4 if curve.highlight else 3} if len(x) <= 16 else {}
            axes.plot(x, y, color=_line_colour(number), zorder=3 if curve.highlight else 2, **look, **marker)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        low, high = axes.get_xlim()
        axes.set_xlim(0 if from_zero else low, high)
        axes.set_ylim(axes.get_ylim())
        _label_ends(axes, curves)

    return _picture(draw, x_label, y_label, description, right=0.35 + 0.083 * longest)


def draw_run(metrics: Sequence[Row]) -> dict[str, str]:
    """Loss, accuracy and learning rate of a run as files, by name."""
    return {
        curve.title.lower().replace(" ", "-"): _as_file(curve.svg, width=WIDTH // 2)
        for curve in draw_curves(metrics)
        if curve.svg
    }


def _picture(draw: Callable[[Axes], None], x_label: str, y_label: str, description: str, right: float) -> str:
    """What `draw` puts into axes that leave so many inches free at the right."""
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user's matplotlibrc says
        mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "sequencer2d", "font.size": 11})
        figure = Figure(figsize=FIGURE_SIZE, dpi=72)  # that of SVG: places are computed below
        FigureCanvasAgg(figure)  # which measures texts
        width, height = FIGURE_SIZE
        axes = figure.add_axes((0.7 / width, 0.62 / height, (width - 0.7 - right) / width, (height - 1.05) / height))
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.spines["bottom"].set_color(_light("grid"))
        axes.grid(axis="y", color=_light("grid"), linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelcolor=_light("muted"), labelsize=10)
        axes.locator_params(axis="y", nbins=6)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.set_xlabel(x_label, color=_light("muted"), loc="right")
        axes.set_title(y_label, color=_light("ink"), loc="left", fontsize=12, pad=12, x=-0.55 / (width - 0.7 - right))
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=NO_METADATA)
    svg = file.getvalue()
    opening, body = svg[svg.index("<svg") :].split(">", maxsplit=1)
    view_box = re.search(r'viewBox="[^"]*"', opening)
    assert view_box, "matplotlib's SVG has a viewBox"
    for name, (light, _) in COLOURS.items():
        body = body.replace(light, f"var(--{name}, {light})")
    title = escape(description)
    return _as_file(f'<svg {view_box[0]} role="img" aria-label="{title}">\n<title>{title}</title>{body}', WIDTH)


def _as_file(svg: str, width: int) -> str:
    """An `<svg>` element whose colours are variables as a file that says what they are."""
    light, dark = (
        "".join(f"--{name}:{pair[shade]};" for name, pair in COLOURS.items() if f"--{name}," in svg or name == "page")
        for shade in (0, 1)
    )
    opening, body = svg.split(">", maxsplit=1)
    view_box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', opening)
    assert view_box, "matplotlib's SVG has a viewBox"
    height = width * float(view_box[2]) / float(view_box[1])
    opening = opening.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    opening = opening.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1)
    ground = (
        f"<style>svg{{{light}background:var(--page)}}"
        f"text{{font-family:{FONT}!important;paint-order:stroke;stroke:var(--page);stroke-width:3px}}"
        f"@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
        '<rect width="100%" height="100%" style="fill:var(--page)"/>'
    )
    lines = [line.rstrip() for line in f'{opening} width="{width}" height="{height:.0f}">{ground}{body}'.splitlines()]
    return "\n".join(lines) + "\n"


def _scale_x(axes: Axes, values: Sequence[float], x_text: Callable[[float], str]) -> None:
    low, high = min(values), max(values)
    if high > 4 * low > 0:
        axes.set_xscale("log")
        axes.set_xlim(low / (high / low) ** 0.06, high * (high / low) ** 0.16)
        ticks = [factor * 10.0**power for power in range(-2, 13) for factor in (1, 2, 5)]
        axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low / 1.5 <= tick <= high * 1.5]))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        margin = high - low or high
        axes.set_xlim(max(0, low - 0.08 * margin), high + 0.2 * margin)
        axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: x_text(value)))


def _label_dots(axes: Axes, dots: Sequence[Dot]) -> None:
    """Each label near its dot, where it covers least of dots, other labels and the edge."""
    inside = axes.get_window_extent()
    inside = Bbox.from_extents(inside.x0, inside.y0, inside.x1 + 16, inside.y1)
    centres = {id(dot): tuple(map(float, axes.transData.transform((dot.x, dot.y)))) for dot in dots}
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in centres.values()]
    for dot in sorted(dots, key=lambda dot: (not dot.highlight, dot.x, dot.y)):
        colour, weight = ("val", "bold") if dot.highlight else ("ink", "normal")
        text = axes.annotate(dot.label, (dot.x, dot.y), (0, 0), textcoords="offset points", fontsize=10, weight=weight)
        text.set_color(_light(colour))
        size = text.get_window_extent()
        boxes = [_beside(centres[id(dot)], size, *place) for place in _AROUND]
        box = min(boxes, key=lambda box: _hidden(box, inside, taken))  # the first of equals
        x, y = centres[id(dot)]
        text.set_position((box.x0 - x, box.y0 - y + (size.y1 - size.y0) * 0.22))
        taken.append(box)
        nearest = (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))
        if np.hypot(nearest[0] - x, nearest[1] - y) > 12:
            ends = axes.transData.inverted().transform([(x, y), nearest])
            axes.plot(*ends.T, color=_light("muted"), linewidth=0.7, zorder=1)


_AROUND = [
    (distance * across, distance * up)
    for distance in (8, 17, 26, 36, 48, 62, 78)
    for across, up in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (0.8, -0.8), (-0.8, 0.8), (-0.8, -0.8))
]
"""Where a label may stand: points from its dot, the nearest first."""


def _beside(centre: Sequence[float], size: Bbox, across: float, up: float) -> Bbox:
    """A label's place, its nearest side so far from the centre of its dot."""
    x = centre[0] + across - size.width * (0.5 if across == 0 else float(across < 0))
    y = centre[1] + up - size.height * (0.5 if up == 0 else float(up < 0))
    return Bbox.from_bounds(x, y, size.width, size.height)


def _hidden(box: Bbox, inside: Bbox, taken: Sequence[Bbox]) -> float:
    """How much of a label lies over others or outside, in square points."""
    overlaps = (Bbox.intersection(box, other) for other in taken)
    kept = Bbox.intersection(box, inside)
    outside = box.width * box.height - (kept.width * kept.height if kept else 0)
    return round(outside + sum(other.width * other.height for other in overlaps if other), 3)


def _label_ends(axes: Axes, curves: Sequence[Curve]) -> None:
    """The labels in a column at the right, each as high as its line ends, or as near as they find room."""
    line_height = 13  # points
    right = axes.get_window_extent().x1 + 12
    ends = [axes.transData.transform(curve.points[-1]) for curve in curves]
    bounds = (line_height / 2, 72 * FIGURE_SIZE[1] - line_height / 2)
    heights = spread([float(y) for _, y in ends], gap=line_height, bounds=bounds)
    for number, (curve, (x, y), height) in enumerate(zip(curves, ends, heights, strict=True)):
        colour = _line_colour(number)
        line = axes.transData.inverted().transform([(x, y), (right - 4, height)])
        axes.plot(*line.T, color=colour, linewidth=0.7, linestyle=":", clip_on=False, scalex=False, scaley=False)
        place_x, place_y = axes.transAxes.inverted().transform((right, height))
        weight = "bold" if curve.highlight else "normal"
        text = axes.text(place_x, place_y, curve.label, transform=axes.transAxes, va="center", fontsize=10)
        text.set(color=colour, weight=weight)


def spread(places: Sequence[float], gap: float, bounds: tuple[float, float]) -> list[float]:
    """Places moved apart to at least `gap` within the bounds, in the same order and as little as neighbours allow."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    groups: list[list[int]] = []
    for index in order:
        groups.append([index])
        while len(groups) > 1:
            below, above = groups[-2:]
            needed = gap * (len(below) + len(above)) / 2
            if _middle(places, above) - _middle(places, below) >= needed:
                break
            groups[-2:] = [below + above]
    moved = dict.fromkeys(range(len(places)), 0.0)
    for group in groups:
        middle = _middle(places, group)
        moved |= {index: middle + gap * (rank - (len(group) - 1) / 2) for rank, index in enumerate(group)}
    low, high = bounds
    for rank, index in enumerate(order):
        moved[index] = min(max(moved[index], low + gap * rank), high - gap * (len(order) - 1 - rank))
    return list(moved.values())


def _middle(places: Sequence[float], group: Sequence[int]) -> float:
    return sum(places[index] for index in group) / len(group)


def _line_colour(number: int) -> str:
    return _light(LINES[number % len(LINES)])


def _dashes(number: int) -> str:
    return "-" if number < len(LINES) else "--"


def _light(name: str) -> str:
    """A colour as it is drawn; the file has its variable instead."""
    return COLOURS[name][0]
