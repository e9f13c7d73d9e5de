"""Measures our speed and memory against other implementations on this CPU, and writes docs/performance.md.

`python docs/make_performance.py [--only NAME] [--rounds N] [--from-json]`: about 40 minutes on two idle cores. Each
comparison is saved when it is done. Words of ours belong into docs/performance_notes.md, with which the page ends.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sequencer2d.benchmarking.comparison import Measurement, Ratio, measure, records
from sequencer2d.benchmarking.contenders import CONTENDERS
from sequencer2d.benchmarking.processes import Entry
from sequencer2d.benchmarking.workload import Allocator, Workload
from sequencer2d.cores import num_cores
from sequencer2d.files import write_atomic
from sequencer2d.training.machine import describe_machine

DOCS = Path(__file__).parent
COMMAND = "python docs/make_performance.py"
ALLOCATORS: tuple[Allocator, ...] = ("tuned", "default")

TRAINERS = ("timm:fp32", "timm:bf16", "sequencer2d:fp32", "sequencer2d:bf16")
SAVERS = ("timm:bf16", "timm-compiled:bf16", "sequencer2d:bf16", "sequencer2d-checkpointing:bf16")
INFERRERS = (
    *("timm:fp32", "timm:bf16", "timm-compiled:bf16"),
    *("onnxruntime:fp32", "onnxruntime:int8", "openvino:fp32", "openvino:bf16"),
    *("sequencer2d:fp32", "sequencer2d:bf16", "sequencer2d:int8"),
)
GROWTH = ((224, 16), (448, 4), (896, 1))
"""Sides and batch sizes with the same number of pixels."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Contenders that take turns, under each allocator setting."""

    title: str
    entries: tuple[tuple[str, Workload], ...]
    rounds: int


def work(mode: Literal["train", "infer"], batch_size: int, side: int = 224, model: str = "sequencer2d_s") -> Workload:
    classes = 1000 if model == "sequencer2d_s" else 10
    return Workload(
        model=model, mode=mode, image_size=side, batch_size=batch_size, threads=num_cores(), num_classes=classes
    )


def all_of(contenders: Sequence[str], workload: Workload) -> tuple[tuple[str, Workload], ...]:
    return tuple((name, workload) for name in contenders if name in CONTENDERS)


def growing(mode: Literal["train", "infer"]) -> tuple[tuple[str, Workload], ...]:
    return tuple(("sequencer2d:bf16", work(mode, batch_size, side)) for side, batch_size in GROWTH)


COMPARISONS = {
    "train": Comparison(title="Training S, 224², batch 8", entries=all_of(TRAINERS, work("train", 8)), rounds=4),
    "memory": Comparison(
        title="Training S, 224², batch 8: compiled, and with checkpointing",
        entries=all_of(SAVERS, work("train", 8)),
        rounds=5,
    ),
    "train-32": Comparison(
        title="Training the net for 32 pixels, batch 128",
        entries=all_of(TRAINERS, work("train", 128, 32, "sequencer2d_t_patch2_32")),
        rounds=10,
    ),
    "infer": Comparison(title="Inference of S, 224², batch 8", entries=all_of(INFERRERS, work("infer", 8)), rounds=6),
    "latency": Comparison(
        title="Latency of S, 224², batch 1",
        entries=all_of(INFERRERS, work("infer", 1)),
        rounds=36,  # of a few steps each: the 99th percentile needs a hundred
    ),
    "growth-train": Comparison(
        title="Training S on as many pixels in fewer and larger images",
        entries=growing("train"),
        rounds=5,
    ),
    "growth-infer": Comparison(
        title="Inference of S on as many pixels in fewer and larger images",
        entries=growing("infer"),
        rounds=6,
    ),
}

Found = dict[str, list[dict[str, Any]]]
"""Records by comparison."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A number that we want of a comparison."""

    what: str
    comparison: str
    ours: str
    theirs: tuple[str, ...]
    """The fastest of them counts."""
    kind: Literal["speed", "time", "memory"] = "speed"
    """Speed is to be at least as much, of time and memory at most as much may be needed."""
    bound: float
    aim: float | None = None
    sides: tuple[int, int] | None = None
    """Sides of our images and of theirs, where these differ."""

    def measured(self, group: Sequence[Measurement]) -> Ratio | None:
        """Of contenders that took turns; None where one is missing."""
        ours = self._find(group, self.ours, 0)
        theirs = [found for name in self.theirs if (found := self._find(group, name, 1))]
        if not ours or not theirs:
            return None
        best = min(theirs, key=lambda found: found.seconds or 0)
        if self.kind == "memory":
            if not ours.step_mib or not best.step_mib:
                return None
            return Ratio(median=ours.step_mib / best.step_mib, low=0, high=0)
        ratio = ours.time_ratio(best)
        return ratio.inverse if ratio and self.kind == "speed" else ratio

    def _find(self, group: Sequence[Measurement], name: str, which: int) -> Measurement | None:
        for found in group:
            side = self.sides[which] if self.sides else found.entry.workload.image_size
            if found.entry.contender == name and found.entry.workload.image_size == side and not found.error:
                return found
        return None

    def verdict(self, ratio: Ratio) -> str:
        """Of the median as it is printed."""
        value = round(ratio.median, 2)
        if self.kind == "speed":
            reached, aimed = value >= self.bound, self.aim is not None and value >= self.aim
        else:
            reached, aimed = value <= self.bound, self.aim is not None and value <= self.aim
        return "aim reached" if aimed else "reached" if reached else "**missed**"


OURS_FP32, OURS_BF16, OURS_INT8 = "sequencer2d:fp32", "sequencer2d:bf16", "sequencer2d:int8"
CHECKPOINTED = "sequencer2d-checkpointing:bf16"
TIMM_FP32, TIMM_BF16 = ("timm:fp32",), ("timm:bf16",)
TARGETS = [
    *(
        Target(what=what, comparison=comparison, ours=OURS_BF16, theirs=theirs, bound=bound, aim=aim)
        for what, comparison, theirs, bound, aim in (
            ("training S, bf16, against timm fp32", "train", TIMM_FP32, 2.8, 4.0),
            ("training S, bf16, against timm bf16", "train", TIMM_BF16, 1.25, 1.6),
            ("training the net for 32 pixels, bf16, against timm fp32", "train-32", TIMM_FP32, 2.5, 3.5),
            ("training the net for 32 pixels, bf16, against timm bf16", "train-32", TIMM_BF16, 1.6, 2.3),
            ("inference of S, batch 8, bf16, against timm fp32", "infer", TIMM_FP32, 2.9, 3.6),
            ("inference of S, batch 8, bf16, against OpenVINO bf16", "infer", ("openvino:bf16",), 1.0, 1.25),
        )
    ),
    Target(
        what="inference of S, batch 8, int8, against timm fp32",
        comparison="infer",
        ours=OURS_INT8,
        theirs=TIMM_FP32,
        bound=3.5,
        aim=6.0,
    ),
    Target(
        what="training S, fp32, against timm fp32",
        comparison="train",
        ours=OURS_FP32,
        theirs=TIMM_FP32,
        bound=1.1,
        aim=1.6,
    ),
    Target(
        what="inference of S, batch 8, fp32, against timm fp32",
        comparison="infer",
        ours=OURS_FP32,
        theirs=TIMM_FP32,
        bound=1.3,
        aim=1.8,
    ),
    *(
        Target(
            what=f"latency of S, {ours.partition(':')[2]}, against the best of ONNX Runtime and OpenVINO",
            comparison="latency",
            ours=ours,
            theirs=theirs,
            kind="time",
            bound=1.0,
            aim=0.75,
        )
        for ours, theirs in (
            (OURS_FP32, ("onnxruntime:fp32", "openvino:fp32")),
            (OURS_BF16, ("openvino:bf16",)),
            (OURS_INT8, ("onnxruntime:int8",)),
        )
    ),
    *(
        Target(
            what=f"memory of training S, {ours.partition(':')[2]}, against timm",
            comparison="train",
            ours=ours,
            theirs=theirs,
            kind="memory",
            bound=0.75,
        )
        for ours, theirs in ((OURS_FP32, TIMM_FP32), (OURS_BF16, TIMM_BF16))
    ),
    Target(
        what="the same with checkpointing, bf16",
        comparison="memory",
        ours=CHECKPOINTED,
        theirs=TIMM_BF16,
        kind="memory",
        bound=0.35,
    ),
    Target(
        what="time with checkpointing, bf16, against ours without",
        comparison="memory",
        ours=CHECKPOINTED,
        theirs=(OURS_BF16,),
        kind="time",
        bound=1.3,
    ),
    *(
        Target(
            what=f"{kind} per pixel in {name}, 896² against 224²",
            comparison=comparison,
            ours=OURS_BF16,
            theirs=(OURS_BF16,),
            kind=kind,
            bound=1.15,
            aim=1.0,
            sides=(896, 224),
        )
        for name, comparison in (("training", "growth-train"), ("inference", "growth-infer"))
        for kind in ("time", "memory")
    ),
]


def measure_all(names: Sequence[str], rounds: int | None) -> None:
    """Measures comparisons and saves what each allocator setting gave at once, in the place of what was there of it."""
    commit = describe_machine()["commit"]  # before what is saved changes the checkout
    for name in names:
        comparison = COMPARISONS[name]
        for allocator in ALLOCATORS:
            entries = [
                Entry(contender=contender, workload=workload, allocator=allocator)
                for contender, workload in comparison.entries
            ]
            new = records(measure(entries, rounds or comparison.rounds))
            for record in new:
                record["environment"] |= {"command": COMMAND, "commit": commit}
            found = load()
            others = [record for record in found.get(name, []) if record["allocator"] != allocator]
            save(found | {name: sorted([*others, *new], key=lambda record: ALLOCATORS.index(record["allocator"]))})


def save(found: Found) -> None:
    """A line of JSON for each record, in the order of the comparisons."""
    lines = [
        json.dumps({"comparison": name} | record, ensure_ascii=False) + "\n"
        for name in COMPARISONS
        for record in found.get(name, [])
    ]
    write_atomic(DOCS / "performance.jsonl", "".join(lines))


def load() -> Found:
    """What was saved."""
    path = DOCS / "performance.jsonl"
    found: Found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        record = json.loads(line)
        found.setdefault(record.pop("comparison"), []).append(record)
    return found


def of(found: Found, comparison: str, allocator: str) -> list[Measurement]:
    """The contenders that took turns under an allocator setting."""
    return [Measurement.from_dict(record) for record in found.get(comparison, []) if record["allocator"] == allocator]


def page(found: Found) -> str:
    """All of it in Markdown."""
    lines = [
        "# Speed and memory against others on a CPU",
        "",
        f"By `{COMMAND}`, which anyone can run; `sequencer2d benchmark` compares on other work.",
        "Every contender has a process of its own with the same weights, the same random images, the same number of",
        "threads and denormals flushed; in each round every one has its turn, in changing order, while the others",
        "wait. Training is forward, cross entropy, backward and fused AdamW. What each one computes is compared with",
        "our layers in fp32 with PyTorch's LSTMs: *error* is the relative distance of the logits, or of the first",
        "layer's gradient. Ratios are medians over the rounds of the ratio within a round; between the brackets lie",
        "half of the rounds.",
        "",
        "*Tuned* and *default* are settings of the memory allocator, the same for all contenders that are compared:",
        "tuned keeps freed memory, as `sequencer2d train` does; at the commits of this page it asked for huge pages",
        "besides. *MiB* is what the steps need at their most beyond libraries, weights and images; *peak* includes",
        "these. OpenVINO and ONNX Runtime allocate some of it before the first step.",
        "",
        "## Targets",
        "",
        "| what | at least | aim | tuned | default |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [target_row(target, found) for target in TARGETS]
    lines += ["", "Of time and memory, the target is *at most*.", "", "![Speeds](performance.svg)"]
    for name, comparison in COMPARISONS.items():
        for allocator in ALLOCATORS:
            chosen = [record for record in found.get(name, []) if record["allocator"] == allocator]
            if chosen:
                lines += ["", f"## {comparison.title}: {allocator} allocator", "", *comparison_table(chosen)]
    lines += ["", *(f"{line}  " for line in stamps(found))]
    notes = DOCS / "performance_notes.md"
    return "\n".join(lines).rstrip() + "\n" + (f"\n{notes.read_text()}" if notes.exists() else "")


def target_row(target: Target, found: Found) -> str:
    at_least = f"{target.bound:g}×" if target.kind == "speed" else f"≤ {target.bound:g}×"
    cells = [target.what, at_least, f"{target.aim:g}×" if target.aim else "–"]
    for allocator in ALLOCATORS:
        ratio = target.measured(of(found, target.comparison, allocator))
        cells.append("not measured" if ratio is None else f"{shown(ratio)} {target.verdict(ratio)}")
    return f"| {' | '.join(cells)} |"


def shown(ratio: Ratio) -> str:
    between = f" ({ratio.low:.2f}–{ratio.high:.2f})" if ratio.high else ""
    return f"{ratio.median:.2f}×{between}"


def comparison_table(chosen: Sequence[dict[str, Any]]) -> list[str]:
    measurements = [Measurement.from_dict(record) for record in chosen]
    growth = len({each.entry.workload for each in measurements}) > 1
    lines = [
        f"| contender |{' images |' if growth else ''} ms a step | p50, p90, p99 | images/s "
        f"| × {measurements[0].entry.contender} | MiB | peak | error | how |",
        "| --- |" + " --- |" * (9 if growth else 8),
    ]
    failed = []
    for record, each in zip(chosen, measurements, strict=True):
        if each.error is not None:
            failed.append(f"{each.entry.contender} failed: {each.error}")
            continue
        workload, ratio = each.entry.workload, each.time_ratio(measurements[0])
        percentiles = [each.percentile_ms(percent) for percent in (50, 90, 99)]
        cells = [
            each.entry.contender,
            *([f"{workload.batch_size} of {workload.image_size}²"] if growth else []),
            f"{1000 * (each.seconds or 0):,.1f}",
            ", ".join("–" if value is None else f"{value:,.1f}" for value in percentiles),
            f"{each.images_per_s:,.1f}",
            "–" if ratio is None else shown(ratio.inverse),
            *("–" if value is None else f"{value:,.0f}" for value in (each.step_mib, each.answers.peak_mib)),
            f"{record['output_error']:.1g}",
            record["how"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rounds = {len(each.answers.rounds) for each in measurements if not each.error}
    lines += ["", f"{max(rounds, default=0)} rounds, {chosen[0]['threads']} threads."]
    return [*lines, *(f"{line}." for line in failed)]


def stamps(found: Found) -> list[str]:
    """Commit, machine and versions; one line where all comparisons were made alike."""
    lines = []
    for chosen in found.values():
        environment = chosen[0]["environment"]
        versions = dict(environment["packages"])
        for record in chosen:
            versions |= {name: version for name, version in record["versions"].items() if version}
        wanted = ("torch", "timm", "onnxruntime", "openvino")
        lines.append(
            f"Commit {environment['commit']}, {environment['cpu']} ({environment['cpu_capability']}), "
            f"{environment['cores']} cores, huge pages {environment['huge_pages']}, "
            + ", ".join(f"{name} {versions[name]}" for name in wanted if name in versions)
            + "."
        )
    return list(dict.fromkeys(lines))


def draw(found: Found, path: Path) -> None:
    """Bars of the speed of each contender relative to the first one of its comparison."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    names = [name for name in COMPARISONS if name in found and not name.startswith("growth")]
    if not names:
        return
    heights = [len({record["contender"] for record in found[name]}) for name in names]
    with plt.rc_context({"svg.hashsalt": "sequencer2d", "svg.fonttype": "none", "font.size": 9}):
        figure, panels = plt.subplots(
            len(names),
            squeeze=False,
            figsize=(8, 0.32 * sum(heights) + 0.8 * len(names)),
            height_ratios=heights,
            layout="constrained",
        )
        for name, axes in zip(names, panels[:, 0], strict=True):
            contenders = list(dict.fromkeys(record["contender"] for record in found[name]))
            for allocator, color, shift in (("tuned", "#0072b2", -0.2), ("default", "#a6c8e0", 0.2)):
                group = of(found, name, allocator)
                bars = [
                    (contenders.index(each.entry.contender) + shift, ratio.inverse)
                    for each in group
                    if (ratio := each.time_ratio(group[0]))
                ]
                if bars:
                    axes.barh(
                        [place for place, _ in bars],
                        [ratio.median for _, ratio in bars],
                        height=0.38,
                        color=color,
                        label=allocator,
                        xerr=[
                            [max(0.0, ratio.median - ratio.low) for _, ratio in bars],
                            [max(0.0, ratio.high - ratio.median) for _, ratio in bars],
                        ],
                    )
            axes.set(title=COMPARISONS[name].title, xlabel=f"times as fast as {contenders[0]}")
            axes.set_yticks(range(len(contenders)), contenders)
            axes.invert_yaxis()
            axes.axvline(1, color="#44546a", linewidth=0.8)
            axes.legend(frameon=False, loc="upper right")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure, and write the page of what was measured")
    parser.add_argument("--only", choices=COMPARISONS, action="append", help="only this comparison; more than once")
    parser.add_argument("--rounds", type=int, help="of every comparison; default: as many as each needs")
    parser.add_argument("--from-json", action="store_true", help="write the page and the plot again, measure nothing")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if not options.from_json:
        measure_all(options.only or list(COMPARISONS), options.rounds)
    found = load()
    write_atomic(DOCS / "performance.md", page(found))
    draw(found, DOCS / "performance.svg")


if __name__ == "__main__":
    main()
