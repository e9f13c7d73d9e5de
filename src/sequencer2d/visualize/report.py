"""The report of a training run: one HTML file with everything in it, for reading without a network.

A section is a function that returns HTML, in the order of the page. Whatever comes from the user, class and file names
above all, passes through `escape`.
"""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sequencer2d.files import write_atomic
from sequencer2d.visualize.curves import Row, draw_curves, percent
from sequencer2d.visualize.page import data_uri, definitions, folded, page, scrollable, section, table
from sequencer2d.visualize.samples import Sample

MAX_TABLE_CLASSES = 20  # confusion as a table of numbers; a heat map above
MAX_HEAT_MAP_SIDE = 250  # pixels; with more classes, neighbours share one
MAX_PAIRS = 12
MAX_CLASS_ROWS = 40
MAX_SKIPPED = 50
MAX_THUMBNAIL_SIDE = 192  # pixels
HIT_RGB, MISS_RGB = (45, 125, 210), (226, 98, 20)  # both visible on white and on near-black
SPLIT_NAMES = {"test": "test", "val": "validation"}


def write_report(
    path: Path,
    *,
    title: str,
    summary: dict[str, str],
    metrics: Sequence[Row],
    evaluation: dict[str, Any],
    samples: Sequence[Sample],
    skipped: Sequence[str],
    config: str,
    environment: dict[str, Any],
) -> None:
    """Writes the report of a run to `path`, whole or not at all; equal input gives equal bytes.

    Args:
        path: usually `report.html` in the run folder; the folder is what the prediction command names.
        title: name of the run.
        summary: label → text of the headline, in order. The accuracy need not be in it: it comes from `evaluation`.
        metrics: rows of `metrics.jsonl`; see `curves.CHARTS` for the keys that are drawn. Any key may be missing.
        evaluation: of the final model: `split` ("test" or "val"), `num_images`, `top1`, `top5` (or None), `loss`,
            `ece`, `class_names`, `confusion` (rows are true classes, columns predictions) and `per_class`, a list of
            `name`, `num_images`, `recall`, `precision`. Shares lie in 0..1; None where there is no image.
        samples: the grid of images, in order; `samples.draw_samples` chooses them.
        skipped: files that could not be read.
        config: the resolved configuration as text.
        environment: versions and hardware.
    """
    sections = [
        headline_section(title, summary, evaluation),
        curves_section(metrics),
        confusion_section(evaluation),
        classes_section(evaluation["per_class"]),
        samples_section(samples),
        skipped_section(skipped),
        config_section(config),
        environment_section(environment),
        predict_section(path.parent),
    ]
    html = page(title, "\n".join(sections))
    write_atomic(path, html.encode(errors="backslashreplace"))  # a file name need not be valid Unicode


def headline_section(title: str, summary: Mapping[str, str], evaluation: Mapping[str, Any]) -> str:
    """The run's name, its accuracy and on which images, and the summary."""
    split = SPLIT_NAMES[evaluation["split"]]
    facts = {
        f"{split.capitalize()} images": f"{evaluation['num_images']:,}",
        "Top-5 accuracy": percent(evaluation["top5"]) if evaluation["top5"] is not None else "",
        "Loss": f"{evaluation['loss']:.3f}",
        "Calibration error": percent(evaluation["ece"]),
    }
    note = (
        ""
        if split == "test"
        else '<p class="note">No test set was evaluated: these are validation images, whose accuracy may flatter.</p>\n'
    )
    return f"""<header>
<p class="kicker">Training report</p>
<h1>{escape(title)}</h1>
<div class="headline">
<p class="accuracy"><strong>{percent(evaluation["top1"])}</strong> {split} top-1 accuracy</p>
{definitions({label: text for label, text in facts.items() if text})}
</div>
{note}{definitions(summary)}
</header>"""


def curves_section(metrics: Sequence[Row]) -> str:
    """The charts, each with its first, last and best values in words."""
    figures = []
    for curve in draw_curves(metrics):
        content = curve.svg or '<p class="empty">Nothing was logged.</p>'
        figures.append(
            f'<figure>\n<figcaption><h3>{curve.title}</h3><p class="note">{escape(curve.summary)}</p></figcaption>\n'
            f"{content}</figure>"
        )
    note = "Training loss is measured on augmented images, so it can lie above the validation loss."
    return section("Curves", f'<div class="charts">\n{"".join(figures)}\n</div>\n<p class="note">{note}</p>')


def confusion_section(evaluation: Mapping[str, Any]) -> str:
    """The confusion matrix, as numbers for few classes and as a heat map for many, and the most confused pairs."""
    names: list[str] = evaluation["class_names"]
    confusion = np.array(evaluation["confusion"], dtype=int).reshape(len(names), len(names))
    matrix = confusion_table if len(names) <= MAX_TABLE_CLASSES else confusion_heat_map
    content = f'<div class="side-by-side">\n{matrix(names, confusion)}\n{confused_pairs(names, confusion)}\n</div>'
    return section("Confusion", content)


def confusion_table(names: Sequence[str], confusion: np.ndarray) -> str:
    """Counts, tinted by their share of the true class."""
    head = "".join(f'<th scope="col"><span title="{escape(name)}">{escape(name)}</span></th>' for name in names)
    rows = ""
    for i, (name, counts, shares) in enumerate(zip(names, confusion, shares_of_rows(confusion), strict=True)):
        cells = "".join(
            f'<td class="{"hit" if i == j else "miss"}" style="--share:{share:.3f}">{count}</td>'
            if count
            else '<td class="none">0</td>'
            for j, (count, share) in enumerate(zip(counts, shares, strict=True))
        )
        rows += f'<tr><th scope="row"><span title="{escape(name)}">{escape(name)}</span></th>{cells}</tr>\n'
    caption = "Images by true class (rows) and predicted class (columns). Right ones on the diagonal."
    return scrollable(
        f'<table class="confusion">\n<caption>{caption}</caption>\n'
        f'<thead><tr><td class="corner">true ↓ predicted →</td>{head}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody>\n</table>",
        label="Confusion matrix",
    )


def confusion_heat_map(names: Sequence[str], confusion: np.ndarray) -> str:
    """Shares of the true class as a picture: blue on the diagonal, orange elsewhere."""
    shares = shares_of_rows(confusion)
    starts = np.arange(0, len(names), -(-len(names) // MAX_HEAT_MAP_SIDE))
    shares = np.maximum.reduceat(np.maximum.reduceat(shares, starts, axis=0), starts, axis=1)
    pixels = np.empty((*shares.shape, 4), dtype=np.uint8)
    pixels[..., :3] = np.where(np.eye(len(shares), dtype=bool)[..., None], HIT_RGB, MISS_RGB)
    pixels[..., 3] = np.where(shares > 0, 75 + 180 * np.sqrt(shares), 0)  # a single image stays visible
    note = (
        f"{len(names)} true classes from top to bottom, predicted classes from left to right, in the data set's order. "
        "The model is perfect if only the blue diagonal shows; orange points are confusions, stronger with their share."
    )
    image = data_uri(Image.fromarray(pixels), "PNG")
    alt = f"Heat map of the confusion matrix of {len(names)} classes; the most frequent confusions are in the table"
    return (
        f'<figure class="heat-map"><img src="{image}" alt="{alt}"><figcaption class="note">{note}</figcaption></figure>'
    )


def confused_pairs(names: Sequence[str], confusion: np.ndarray) -> str:
    """The most frequent confusions, as a table."""
    errors = confusion * ~np.eye(len(names), dtype=bool)
    order = np.argsort(-errors, axis=None, kind="stable")[:MAX_PAIRS]
    pairs = [divmod(int(flat), len(names)) for flat in order if errors.flat[flat]]
    if not pairs:
        return '<p class="empty">No image was confused.</p>'
    shares = shares_of_rows(confusion)
    rows = [(f"{names[i]} → {names[j]}", int(errors[i, j]), float(shares[i, j])) for i, j in pairs]
    total = np.count_nonzero(errors)
    caption = f"The {len(rows)} most frequent of {total:,} confusions" if len(rows) < total else "All confusions"
    return table(caption, ("True → predicted", "Images", "Of the class"), rows)


def shares_of_rows(confusion: np.ndarray) -> np.ndarray:
    """Every count as a share of its true class; 0 for a class without images."""
    return confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)


def classes_section(per_class: Sequence[Mapping[str, Any]]) -> str:
    """Recall and precision of each class, worst recall first, classes without images last."""
    worst_first = sorted(per_class, key=lambda row: 2.0 if row["recall"] is None else row["recall"])
    shown = worst_first[:MAX_CLASS_ROWS]
    rows = [(row["name"], row["num_images"], _share(row["recall"]), _share(row["precision"])) for row in shown]
    which = f"The {len(shown)} worst of {len(per_class)} classes" if len(shown) < len(per_class) else "Worst first"
    caption = f"{which}. Recall: how much of the class was found; precision: how often that answer was right."
    return section("Classes", table(caption, ("Class", "Images", "Recall", "Precision"), rows))


def _share(share: float | None) -> float:
    return math.nan if share is None else share


def samples_section(samples: Sequence[Sample]) -> str:
    """A grid of images with their predictions."""
    if not samples:
        return section("Sample predictions", '<p class="empty">No samples were kept.</p>')
    items = "\n".join(sample_item(sample) for sample in samples)
    right = sum(sample.is_right for sample in samples)
    note = (
        f"{len(samples) - right} wrong and {right} right, chosen to show both: not the proportion of the whole. "
        "Above is the true class, below it the three most probable ones."
    )
    return section("Sample predictions", f'<p class="note">{note}</p>\n<ul class="samples">\n{items}\n</ul>')


def sample_item(sample: Sample) -> str:
    """One image, its true class and its three most probable classes."""
    verdict, mark = ("right", "✓") if sample.is_right else ("wrong", "✗")
    predictions = "".join(
        f"<li{' class=true' if name == sample.label else ''}>"
        f'<span class="name" title="{escape(name)}">{escape(name)}</span> '
        f'<span class="number">{percent(probability, 0)}</span></li>'
        for name, probability in sample.predictions[:3]
    )
    name, label = escape(sample.name), escape(sample.label)
    return f"""<li class="sample {verdict}">
<img src="{thumbnail(sample.image)}" alt="{name}, true class {label}" loading="lazy">
<p class="verdict"><span class="name" title="{label}">{label}</span>
<span class="mark" role="img" aria-label="{verdict}">{mark}</span></p>
<ol>{predictions}</ol>
<p class="file note" title="{name}">{name}</p>
</li>"""


def skipped_section(skipped: Sequence[str]) -> str:
    """The files that could not be read; no section if there are none."""
    if not skipped:
        return ""
    items = "".join(f"<li><code>{escape(name)}</code></li>" for name in skipped[:MAX_SKIPPED])
    rest = len(skipped) - MAX_SKIPPED
    more = f'<p class="note">and {rest:,} more</p>' if rest > 0 else ""
    num_files = "One file" if len(skipped) == 1 else f"{len(skipped):,} files"
    return section("Skipped files", f"<p>{num_files} could not be read and took no part.</p>\n<ul>{items}</ul>{more}")


def config_section(config: str) -> str:
    """All settings, whether given or derived."""
    return section("Configuration", folded("All settings, as resolved", f"<pre><code>{escape(config)}</code></pre>"))


def environment_section(environment: Mapping[str, Any]) -> str:
    """Versions and hardware; nested values as JSON."""
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
        for name, value in environment.items()
    }
    return section("Environment", folded("What it ran on", definitions(texts)))


def predict_section(run: Path) -> str:
    """The command that uses the model."""
    command = f"sequencer2d predict {shlex.quote(str(run))} IMAGE_OR_FOLDER"
    return section("Use the model", f"<pre><code>{escape(command)}</code></pre>")


def thumbnail(image: np.ndarray) -> str:
    """The image as a data URI: small ones exact, large ones reduced and as JPEG."""
    picture = Image.fromarray(image)
    picture.thumbnail((MAX_THUMBNAIL_SIDE, MAX_THUMBNAIL_SIDE))
    return data_uri(picture, "PNG" if max(image.shape) <= 64 else "JPEG")
