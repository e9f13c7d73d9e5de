"""The report: self-contained, well-formed, escaped, the same bytes twice, and robust to whatever a run logged."""

import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sequencer2d.visualize import report
from sequencer2d.visualize.curves import draw_curves
from sequencer2d.visualize.report import write_report
from sequencer2d.visualize.samples import NUM_SAMPLES, Sample

HOSTILE = "<script>alert('x')</script>\"&"
VOID_TAGS = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Checks that tags balance while it gathers tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID_TAGS:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text += data


def metrics_of(num_epochs: int) -> list[dict[str, float]]:
    train = [
        {"step": step, "epoch": step / 10, "train_loss": 2 / (1 + step), "learning_rate": 1e-3}
        for step in range(0, 10 * num_epochs, 2)
    ]
    val = [{"step": 10 * e, "epoch": float(e), "val_loss": 1 / e, "valid_acc": 0.5} for e in range(1, num_epochs + 1)]
    return train + val


def evaluation_of(class_names: list[str], **changes: Any) -> dict[str, Any]:
    num_classes = len(class_names)
    confusion = 20 * np.eye(num_classes, dtype=int) + np.eye(num_classes, k=1, dtype=int)
    per_class = [
        {"name": name, "num_images": 21, "recall": 0.95 - i / 1000, "precision": 0.9}
        for i, name in enumerate(class_names)
    ]
    evaluation = {"split": "test", "num_images": 21 * num_classes, "top1": 0.9512, "top5": None, "loss": 0.2}
    evaluation |= {"ece": 0.03, "class_names": class_names, "confusion": confusion.tolist(), "per_class": per_class}
    return evaluation | changes


def sample_of(truth: str, prediction: str, size: int = 8) -> Sample:
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Sample(image=image, name=f"{truth}.png", label=truth, predictions=((prediction, 0.75), ("other", 0.25)))


def write(path: Path, **changes: Any) -> str:
    """Writes a small report with these `changes`, checks that it is well-formed, returns its HTML."""
    content: dict[str, Any] = {
        "title": "first-run",
        "summary": {"Data set": "digits"},
        "metrics": [],
        "evaluation": evaluation_of(["cat", "dog"]),
        "samples": [sample_of("cat", "cat"), sample_of("dog", "cat")],
        "skipped": ["broken.jpg"],
        "config": "epochs: 3",
        "environment": {"python": "3.11", "cpu": {"cores": 2}},
    }
    write_report(path, **(content | changes))
    html = path.read_text(encoding="utf-8")
    Page(html)
    return html


def test_tells_the_result_and_how_to_use_the_model(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    run.mkdir()
    text = Page(write(run / "report.html")).text
    for expected in ("95.1 % test top-1 accuracy", "digits", "broken.jpg", "epochs: 3", '{"cores": 2}', "cat → dog"):
        assert expected in text
    assert f"sequencer2d predict '{run}' " in text


def test_says_so_where_the_accuracy_is_of_validation_images(tmp_path: Path) -> None:
    text = Page(write(tmp_path / "report.html", evaluation=evaluation_of(["cat", "dog"], split="val"))).text
    assert "validation top-1 accuracy" in text
    assert "test top-1 accuracy" not in text
    assert "No test set was evaluated" in text


@pytest.mark.parametrize("num_classes", [2, 21])
def test_needs_nothing_from_outside(tmp_path: Path, num_classes: int) -> None:
    evaluation = evaluation_of([f"class {i}" for i in range(num_classes)])
    html = write(tmp_path / "report.html", evaluation=evaluation, metrics=metrics_of(3))
    page = Page(html)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert links
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert not {"script", "link", "iframe", "object"} & page.tags.keys()
    assert "@import" not in html
    assert "url(" not in html.replace("url(#", "")
    assert "default-src 'none'" in html


def test_ids_are_unique_and_references_resolve(tmp_path: Path) -> None:
    page = Page(write(tmp_path / "report.html", metrics=metrics_of(3)))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    uses = {value[5:-1] for name, value in page.attributes if name == "clip-path"}
    assert uses
    assert uses <= set(ids)


@pytest.mark.parametrize("num_classes", [2, 21])
def test_escapes_everything_that_the_user_named(tmp_path: Path, num_classes: int) -> None:
    names = [f"{HOSTILE} {i}" for i in range(num_classes)]
    html = write(
        tmp_path / "report.html",
        title=HOSTILE,
        summary={HOSTILE: HOSTILE},
        evaluation=evaluation_of(names),
        samples=[sample_of(names[0], names[1])],
        skipped=[HOSTILE],
        config=HOSTILE,
        environment={HOSTILE: HOSTILE, "nested": [HOSTILE]},
    )
    assert "<script" not in html
    page = Page(html)
    assert page.text.count(HOSTILE) > num_classes
    assert ("alt", f"{names[0]}.png, true class {names[0]}") in page.attributes


def test_file_names_need_not_be_unicode(tmp_path: Path) -> None:
    assert r"bad\udcff.jpg" in write(tmp_path / "report.html", skipped=["bad\udcff.jpg"])


NAN_ROW = {"step": 1, "epoch": 1.0, "train_loss": math.nan, "val_loss": math.inf, "valid_acc": math.nan}


@pytest.mark.parametrize(
    ("metrics", "num_empty"),
    [
        ([], 3),
        ([{}], 3),
        ([NAN_ROW], 3),
        ([{"step": 1, "epoch": None, "learning_rate": None}], 3),
        ([{"step": 4, "train_loss": 2.0}], 2),
        ([{"step": 4, "epoch": 1.0, "train_loss": 2.0, "learning_rate": 0.0}], 1),
        ([*metrics_of(2), NAN_ROW, {"train_loss": 1.0}, {"step": 9}], 0),
    ],
)
def test_draws_whatever_was_logged(tmp_path: Path, metrics: list[dict[str, float]], num_empty: int) -> None:
    html = write(tmp_path / "report.html", metrics=metrics)
    assert html.count("Nothing was logged") == num_empty
    assert Page(html).tags["svg"] == 3 - num_empty


def test_curves_say_first_last_and_best() -> None:
    rows = [{"epoch": epoch, "valid_acc": accuracy} for epoch, accuracy in enumerate((0.1, 0.9, 0.8))]
    accuracy = list(draw_curves(rows))[1]
    assert accuracy.summary == "validation 10.0 % → 80.0 %, best 90.0 %"
    assert 'aria-label="Accuracy over epochs' in accuracy.svg


def test_a_resumed_run_counts_its_later_rows() -> None:
    rows = [{"step": 1, "train_loss": 5.0}, {"step": 2, "train_loss": 4.0}, {"step": 1, "train_loss": 3.0}]
    assert next(iter(draw_curves(rows))).summary == "training 3 → 4"


def test_long_runs_stay_small() -> None:
    rows = [{"step": step, "train_loss": math.sin(step)} for step in range(20_000)]
    assert len(next(iter(draw_curves(rows))).svg) < 60_000


def test_one_class_without_images_or_samples(tmp_path: Path) -> None:
    nan = math.nan
    per_class = [{"name": "cat", "num_images": 0, "recall": None, "precision": None}]
    changes = {"confusion": [[0]], "per_class": per_class, "num_images": 0, "top1": nan, "loss": nan, "ece": nan}
    html = write(tmp_path / "report.html", evaluation=evaluation_of(["cat"], **changes), samples=[], skipped=[])
    assert "No image was confused" in html
    assert "No samples were kept" in html
    assert "Skipped files" not in html


def test_many_classes_stay_small_and_the_worst_lead(tmp_path: Path) -> None:
    names = [f"n{i:08d}" for i in range(200)]
    samples = [sample_of(names[i], names[i % 40], size=224) for i in range(NUM_SAMPLES)]
    html = write(tmp_path / "report.html", evaluation=evaluation_of(names), samples=samples, skipped=["x.jpg"] * 10_000)
    assert len(html) < 1_500_000
    text = Page(html).text
    assert "The 40 worst of 200 classes" in text
    assert text.index("n00000199", text.index("40 worst")) < text.index("n00000198", text.index("40 worst"))


def test_classes_without_images_come_last(tmp_path: Path) -> None:
    per_class = [
        {"name": name, "num_images": num_images, "recall": recall, "precision": 0.5}
        for name, num_images, recall in (("empty", 0, None), ("good", 9, 0.9), ("bad", 9, 0.1))
    ]
    text = Page(write(tmp_path / "report.html", evaluation=evaluation_of(["cat", "dog"], per_class=per_class))).text
    table = text[text.index("Worst first") :]
    assert table.index("bad") < table.index("good") < table.index("empty0n/a")


def test_confusion_has_true_classes_in_rows(tmp_path: Path) -> None:
    evaluation = evaluation_of(["cat", "dog"], confusion=[[7, 3], [0, 10]])
    text = Page(write(tmp_path / "report.html", evaluation=evaluation)).text
    assert "cat → dog330.0 %" in text
    assert "dog → cat" not in text


@pytest.mark.parametrize(("num_right", "num_wrong"), [(12, 12), (21, 3), (5, 19), (0, 24), (24, 0)])
def test_samples_mix_right_and_wrong(tmp_path: Path, num_right: int, num_wrong: int) -> None:
    samples = [sample_of("cat", "dog")] * num_wrong + [sample_of("cat", "cat")] * num_right
    html = write(tmp_path / "report.html", samples=samples)
    assert re.findall(r'class="sample (\w+)"', html) == ["wrong"] * num_wrong + ["right"] * num_right
    assert f"{num_wrong} wrong and {num_right} right" in html


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write(tmp_path / "report.html", metrics=metrics_of(3)) for _ in range(2))
    assert first == second


def test_a_failure_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    old = write(path)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError, match="No space"):
        write(path, title="second-run")
    assert path.read_text(encoding="utf-8") == old
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_style_sheet_is_legible_in_both_modes() -> None:
    """Text against its background, contrast of at least 4.5 (WCAG AA)."""
    css = Path(report.__file__).with_name("page.css").read_text(encoding="utf-8")
    light, dark = css.split("prefers-color-scheme: dark", maxsplit=1)
    for mode in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#\w{6});", mode))
        for name in ("ink", "muted", "train", "val", "ema", "right", "wrong"):
            assert contrast(colours[name], colours["page"]) >= 4.5, name
        assert contrast(colours["muted"], colours["raised"]) >= 4.5


def contrast(first: str, second: str) -> float:
    """The contrast ratio of WCAG 2."""

    def luminance(colour: str) -> float:
        channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
