"""What the verbs found, as tables on the screen."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from sequencer2d.terminal import printable

if TYPE_CHECKING:
    from sequencer2d.benchmarking.comparison import Measurement, Ratio
    from sequencer2d.data.check import Report
    from sequencer2d.evaluation import Evaluation


def print_evaluation(result: "Evaluation") -> None:
    """A table of the classes, and the figures of the whole."""
    console = Console()
    title = Text(printable(f"{result.data}, {result.split}"))
    table = Table("class", "images", "recall", "precision", title=title)
    for row in result.per_class:
        table.add_row(
            Text(printable(row["name"])), f"{row['num_images']:,}", _percent(row["recall"]), _percent(row["precision"])
        )
    console.print(table)
    console.print(
        f"top-1 {result.top1:.2%}, top-5 {_percent(result.top5)}, loss {result.loss:.4f}, "
        f"calibration error {result.ece:.4f}, {result.num_images:,} images of {result.image_size}²"
        f"{' and their mirror images' if result.flips else ''}, {result.precision}"
    )
    for message in result.skipped:
        print(f"skipped: {printable(message)}", file=sys.stderr)


def print_report(report: "Report", examples: int = 3) -> None:
    """What is in the folder, and every kind of finding with its first examples."""
    from sequencer2d.data.check import KINDS

    def commonest(counts: dict[str, int]) -> str:
        more = f" and {len(counts) - examples} more" if len(counts) > examples else ""
        return ", ".join(f"{name} ({count:,})" for name, count in list(counts.items())[:examples]) + more

    console = Console()
    for split, of_class in report.class_counts.items():
        few, many = min(of_class.values()), max(of_class.values())
        each = f"{few:,}" if few == many else f"{few:,} to {many:,}"
        print(f"{split}: {sum(of_class.values()):,} images, {len(of_class):,} classes of {each}")
    print(f"formats {commonest(report.formats)}; modes {commonest(report.modes)}; sizes {commonest(report.sizes)}")
    if report.other_files:
        print(printable(f"{len(report.other_files):,} other files: {', '.join(report.other_files[:examples])}"))
    table = Table("finding", Column("number", justify="right"), "what it means, and the first of them", box=None)
    for kind, (wrong, meaning) in KINDS.items():
        found = [finding for finding in report.findings if finding.kind == kind]
        if not found:
            continue
        lines = [
            ": ".join(filter(None, [", ".join(finding.files[:examples]), finding.reason]))
            for finding in found[:examples]
        ]
        text = Text("\n".join([meaning, *(f"  {printable(line)}" for line in lines)]))
        table.add_row(Text(kind, style="bold red" if wrong else ""), f"{len(found):,}", text)
    if report.findings:
        console.print(table)
    known = f", {report.num_cached:,} of them known from an earlier check" if report.num_cached else ""
    verdict = "something is wrong" if report.wrong else "nothing is wrong"
    print(f"{report.num_images:,} images checked{known}: {verdict}")


def print_measurements(found: "Sequence[Measurement]") -> None:
    """A table for each group of contenders that took turns."""
    console = Console()
    for number in dict.fromkeys(measurement.group for measurement in found):
        group = [measurement for measurement in found if measurement.group == number]
        reference = group[0]
        headings = ["ms/step", "images/s", f"× {reference.entry.contender}", "half lie in", "MiB", "peak"]
        if reference.entry.workload.mode == "infer":
            headings[1:1] = ["p90", "p99"]
        numbers = (Column(heading, justify="right") for heading in headings)
        title = f"{reference.entry.workload}, {reference.entry.allocator} allocator"
        table = Table("contender", *numbers, box=None, title=title, padding=(0, 1, 0, 0))
        for measurement in group:
            table.add_row(measurement.entry.contender, *_cells(measurement, reference))
        console.print(table)
        for measurement in group:
            if measurement.error is not None:
                print(f"failed: {measurement.entry.contender}: {printable(measurement.error)}")
    print("MiB: what steps need beyond libraries, weights and images; peak: with these")


def _cells(measurement: "Measurement", reference: "Measurement") -> list[str]:
    """What stands in the columns of numbers."""

    def rounded(value: float | None, digits: int = 1) -> str:
        return "–" if value is None else f"{value:,.{digits}f}"

    if measurement.seconds is None:
        return ["failed"]
    tails = [rounded(measurement.percentile_ms(percent)) for percent in (90, 99)]
    ratio = measurement.time_ratio(reference)
    speedup = ["–", ""] if ratio is None else _speedup(ratio)
    return [
        rounded(1000 * measurement.seconds),
        *(tails if measurement.entry.workload.mode == "infer" else []),
        rounded(measurement.images_per_s),
        *speedup,
        rounded(measurement.step_mib, 0),
        rounded(measurement.answers.peak_mib, 0),
    ]


def _speedup(ratio: "Ratio") -> list[str]:
    inverse = ratio.inverse
    return [f"{inverse.median:.2f}", f"({inverse.low:.2f}–{inverse.high:.2f})"]


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{fraction:.2%}"
