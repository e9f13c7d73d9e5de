"""Runs that are taken up, and the page of results that is made of them and a study."""

import json
import math
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

import make_results
from sequencer2d.flops import costs
from sequencer2d.training.config import TrainConfig
from sequencer2d.zoo import get_config
from study.costs import macs_per_image
from study.pictures import Curve, Dot, draw_dots, draw_lines, spread
from study.plan import differing, read_study
from study.runs import MAX_ROWS, load_runs, take_up, thin

OURS = "sequencer2d_conv_p_patch2_16"


def evaluation(top1: float, **fields: Any) -> dict[str, Any]:
    """As `sequencer2d evaluate --json` writes it."""
    numbers = {"num_images": 500, "top1": top1, "top5": None, "loss": 0.5, "ece": 0.04}
    tables = {"class_names": ["a", "b"], "confusion": [[9, 1], [2, 8]], "per_class": [{}, {}]}
    return {"data": "cats", "split": "test", **numbers, **tables, "skipped": ["/home/me/cats/1.jpg: bad"], **fields}


def finished_run(
    run_dir: Path,
    top1: float,
    *,
    seed: int = 0,
    model: str = OURS,
    model_args: dict[str, Any] | None = None,
    commit: str = "a" * 40,
    evaluations: dict[str, dict[str, Any]] | None = None,
    **result: Any,
) -> Path:
    """A run folder as `sequencer2d train` leaves it, of a training that never was."""
    (run_dir / "evaluations").mkdir(parents=True)
    config = TrainConfig(
        model=model, model_args=model_args or {}, data="/home/me/cats", image_size=16, run_dir=str(run_dir), seed=seed
    )
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    environment = {
        "command": f"sequencer2d train --data=/home/me/cats --run-dir {run_dir}",
        "commit": commit,
        "cpu": "a processor",
        "cpu_capability": "AVX512",
        "platform": "Linux-6.1",
        "cores": 4,
        "threads": 2,
        "gpu": None,
        "packages": {"sequencer2d": "0.1.0", "torch": "2.9"},
    }
    (run_dir / "environment.json").write_text(json.dumps(environment))
    rows: list[dict[str, Any]] = []
    for epoch in range(1, 101):
        when = {"epoch": float(epoch), "elapsed_s": 6.0 * epoch}
        training = {"train_loss": 1 / epoch, "learning_rate": 1e-3, **when}
        rows += [{"step": 20 * epoch + k, "images_per_s": 90.0 + k, **training} for k in (5, 10, 15)]
        rows.append({"step": 20 * epoch + 19, "valid_acc": epoch / 200, **when})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = {
        "run_dir": str(run_dir),
        "finished": True,
        "num_parameters": 1_234_567,
        "updates": 2000,
        "minutes": 10.0,
        "val_top1": top1 + 0.01,
        "evaluation": evaluation(top1),
        "skipped": ["/home/me/cats/1.jpg: bad"],
    }
    (run_dir / "result.json").write_text(json.dumps({**whole, **result}))
    for name, content in (evaluations or {}).items():
        (run_dir / "evaluations" / f"{name}.json").write_text(json.dumps(content))
    return run_dir


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """An empty `docs/` with a study of no tables."""
    (tmp_path / "docs" / "results").mkdir(parents=True)
    write_study(tmp_path / "docs")
    return tmp_path / "docs"


def write_study(docs: Path, *tables: dict[str, Any]) -> None:
    (docs / "results" / "study.yaml").write_text(yaml.safe_dump({"tables": list(tables)}))


def table(title: str = "All", **fields: Any) -> dict[str, Any]:
    return {"title": title, **fields}


def row_of(docs: Path, label: str) -> list[str]:
    """The cells of the row with that label."""
    lines = (docs / "results.md").read_text().splitlines()
    return next([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith(f"| [{label}]"))


def heading(docs: Path) -> list[str]:
    line = next(line for line in (docs / "results.md").read_text().splitlines() if line.startswith("|  |"))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_a_run_is_taken_up_small_and_without_folders_of_the_machine(tmp_path: Path, docs: Path) -> None:
    flips = evaluation(0.82, flips=True, image_size=None, precision="fp32")
    run_dir = finished_run(tmp_path / "runs" / "cats", 0.8, evaluations={"flips": flips})
    assert take_up(run_dir, docs / "results") == ["cats"]
    folder = docs / "results" / "cats"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.relative_to(folder).as_posix() for path in files} == {
        "config.yaml", "environment.json", "metrics.jsonl", "result.json", "evaluations/flips.json",
    }  # fmt: skip
    for path in files:
        for word in ("/home", str(tmp_path), "confusion", "per_class"):
            assert word not in path.read_text(), path
    run = load_runs(docs / "results")["cats"]
    assert run.environment["command"] == "sequencer2d train --data=./cats --run-dir ./runs/cats"
    assert run.config["data"] == "./cats"
    assert run.images_per_s == run.images_seen / 600 > 0
    assert run.result["epochs"] == 100
    assert run.result["num_skipped"] == run.result["evaluation"]["num_skipped"] == 1
    assert run.validations()[-1] == (10.0, 0.5)


def test_metrics_are_thinned_evenly_and_keep_the_last_rows() -> None:
    rows = [{"step": i, "valid_acc": 1 / 3} if i % 3 else {"step": i, "train_loss": 1.0} for i in range(1000)]
    kept = thin(rows)
    for validations in (True, False):
        steps = [row["step"] for row in kept if ("valid_acc" in row) == validations]
        assert MAX_ROWS / 2 < len(steps) <= MAX_ROWS
        assert steps[-1] in (998, 999)
        assert steps == sorted(steps)
    assert next(row["valid_acc"] for row in kept if "valid_acc" in row) == 0.333333
    assert thin(rows[:5]) == [row | ({"valid_acc": 0.333333} if "valid_acc" in row else {}) for row in rows[:5]]


def test_runs_that_are_unfinished_or_of_no_commit_are_not_taken_up(tmp_path: Path, docs: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"begun is no finished run: it has no result\.json"):
        make_results.main([str(tmp_path / "begun")], docs)
    changed = finished_run(tmp_path / "changed", 0.8, commit="a" * 40 + "+")
    with pytest.raises(ValueError, match="changed ran code of no commit"):
        make_results.main([str(changed)], docs)
    assert not load_runs(docs / "results")


def test_seeds_are_a_row_of_mean_and_sample_deviation(tmp_path: Path, docs: Path) -> None:
    for seed, top1 in enumerate((0.8, 0.82, 0.84)):
        flips = {"flips": evaluation(top1 + 0.01, flips=True)} if seed else {}
        finished_run(tmp_path / "cats" / f"seed-{seed}", top1, seed=seed, evaluations=flips)
    (tmp_path / "cats" / "seeds.json").write_text("{}")
    names = [f"cats-seed-{seed}" for seed in range(3)]
    write_study(docs, table(rows=[{"label": "Ours", "runs": names}]))
    make_results.main([str(tmp_path / "cats")], docs)
    assert list(load_runs(docs / "results")) == names
    row = dict(zip(heading(docs), row_of(docs, "Ours"), strict=True))
    assert row["runs"] == "3"
    assert row["test top-1"] == "82.00 ± 2.00 %"
    assert row["val top-1"] == "83.00 ± 2.00 %"
    assert row["test top-1, flips"] == "84.00 ± 1.41 % (of 2)"
    assert row["parameters"] == "1.23 M"
    assert row["images seen"] == "256 k"  # 2,000 updates of 128
    assert row["epochs"] == "100.0"
    macs = costs(get_config(OURS, num_classes=2), 16).macs
    assert row["MACs"] == f"{macs / 1e6:.2f} M"


def test_a_row_of_runs_that_are_no_seeds_of_one_another_is_an_error(tmp_path: Path, docs: Path) -> None:
    runs = [finished_run(tmp_path / "a", 0.8), finished_run(tmp_path / "b", 0.8, model="sequencer2d_t_patch2_32")]
    write_study(docs, table(rows=[{"label": "Ours", "runs": ["a", "b"]}]))
    with pytest.raises(ValueError, match="runs of 'Ours' in 'All' differ by more than their seed: by model"):
        make_results.main([str(run) for run in runs], docs)


def test_a_field_that_older_runs_did_not_know_is_no_difference_but_one_inside_a_section_is() -> None:
    old = {"model": "a", "optim": {"momentum": 0.9}, "model_args": {"x": 1}, "seed": 0}
    new = {"model": "a", "optim": {"momentum": 0.9, "schedule": "linear"}, "model_args": {"x": 1}, "seed": 0}
    assert differing(old, new) == set()
    other = new | {"optim": {"momentum": 0.8}, "model_args": {}}
    assert differing(old, other) == {"optim.momentum", "model_args"}


def test_rows_without_runs_are_left_out_and_runs_without_row_come_last(tmp_path: Path, docs: Path) -> None:
    missing = {"label": "Not yet", "runs": ["nothing"]}
    write_study(docs, table(rows=[{"label": "Ours", "runs": ["a"]}, missing]), table("None of it", rows=[missing]))
    make_results.main([str(finished_run(tmp_path / name, 0.8)) for name in "ab"], docs)
    page = (docs / "results.md").read_text()
    assert "Not yet" not in page
    assert "None of it" not in page
    assert page.index("[Ours](#run-a)") < page.index("## Other runs") < page.index("[b](#run-b)")
    for name in "ab":
        assert page.count(f'<a id="run-{name}"></a>') == 1
    assert f"`sequencer2d train --data=./cats --run-dir ./b` (commit {'a' * 12}, 1 unreadable images)" in page
    assert page.count("a processor (AVX512), 2 of 4 cores; torch 2.9") == 1


def test_a_continued_run_names_the_command_that_began_it_and_every_commit(tmp_path: Path, docs: Path) -> None:
    path = finished_run(tmp_path / "a", 0.8) / "environment.json"
    begun = json.loads(path.read_text())
    steps = [{"command": f"sequencer2d train --resume {tmp_path}/a", "commit": commit * 40} for commit in "abb"]
    path.write_text(json.dumps({**begun, "continued": steps}))
    make_results.main([str(path.parent)], docs)
    page = (docs / "results.md").read_text()
    assert f"--run-dir ./a` (commit {'a' * 12}, continued at {'b' * 12}, 1 unreadable" in page
    assert str(tmp_path) not in (docs / "results" / "a" / "environment.json").read_text()
    path.write_text(json.dumps({**begun, "continued": [{**steps[0], "commit": "b+"}]}))
    with pytest.raises(ValueError, match="code of no commit"):
        take_up(path.parent, docs / "results")


def test_several_machines_are_named_once_and_told_apart(tmp_path: Path, docs: Path) -> None:
    runs = [finished_run(tmp_path / name, 0.8) for name in "abcd"]
    path = runs[1] / "environment.json"
    path.write_text(path.read_text().replace("AVX512", "AVX2"))
    path = runs[2] / "environment.json"
    path.write_text(path.read_text().replace("Linux-6.1", "Linux-6.2"))
    make_results.main([str(run) for run in runs], docs)
    page = (docs / "results.md").read_text()
    for number, (capability, system) in enumerate((("AVX512", 1), ("AVX2", 1), ("AVX512", 2)), start=1):
        machine = f"a processor ({capability}), 2 of 4 cores; torch 2.9; Linux-6.{system}"
        assert page.count(f"Machine {number}: {machine}.") == 1
    for name, number in zip("abcd", (1, 2, 3, 1), strict=True):
        assert f"./{name}` (commit {'a' * 12}, machine {number}, 1 unreadable images)" in page


def test_columns_are_those_asked_for_that_have_values(tmp_path: Path, docs: Path) -> None:
    row = {"label": "Ours", "runs": ["a"]}
    write_study(docs, table(rows=[row], columns=["test", "int8", "bf16", "test_24", "test_28", "minutes"]))
    half = {"half": evaluation(0.79, precision="bf16"), "larger": evaluation(0.7, image_size=24)}
    make_results.main([str(finished_run(tmp_path / "a", 0.8, evaluations=half))], docs)
    assert heading(docs) == ["", "test top-1", "test top-1, bf16", "test at 24²", "minutes"]
    assert row_of(docs, "Ours")[1:] == ["80.00 %", "79.00 %", "70.00 %", "10.0"]
    write_study(docs, table(rows=[row], columns=["tset"]))
    with pytest.raises(ValueError, match="no column is named tset: there are parameters, macs"):
        make_results.main([], docs)


def test_evaluations_count_only_for_what_they_measured(tmp_path: Path, docs: Path) -> None:
    evaluations = {
        "larger": evaluation(0.7, image_size=24),
        "other": evaluation(0.1, data="dogs", flips=True),
        "own": evaluation(0.3, image_size=16, flips=False),
        "flips": evaluation(0.81, image_size=16, flips=True),
        "flips-larger": evaluation(0.2, image_size=24, flips=True),
        "val": evaluation(0.4, image_size=12, split="val"),
        "int8": evaluation(0.5, precision="int8"),
    }
    take_up(finished_run(tmp_path / "a", 0.8, evaluations=evaluations), docs / "results")
    run = load_runs(docs / "results")["a"]
    assert run.top1("test") == 0.8  # as the run measured it, once
    assert run.top1("test", flips=True) == 0.81
    assert run.top1("test", precision="int8") == 0.5
    assert run.top1("val") == pytest.approx(0.81)
    assert run.top1("val", flips=True) is None
    assert run.top1_by_image_size("test") == {16: 0.8, 24: 0.7}
    assert run.top1_by_image_size("val") == {12: 0.4, 16: pytest.approx(0.81)}


def test_pictures_are_drawn_alike_twice_and_those_no_longer_shown_are_removed(tmp_path: Path, docs: Path) -> None:
    sizes = {"larger": evaluation(0.7, image_size=24)}
    runs = [
        finished_run(tmp_path / "ours", 0.8, evaluations=sizes),
        finished_run(tmp_path / "peer", 0.7, model="timm/resnet18", num_parameters=11_000_000),
    ]
    rows = [{"label": "Ours", "runs": ["ours"], "curves": True}, {"label": "`timm`, ResNet-18", "runs": ["peer"]}]
    dots = [{"kind": "dots", "x": x} for x in ("minutes", "parameters", "macs", "images")]
    plots = [*dots, {"kind": "dots", "y": "val"}, {"kind": "dots", "y": "flips"}, {"kind": "curves"}]
    write_study(docs, table(rows=rows, plots=[*plots, {"kind": "resolution"}]))
    make_results.main([str(run) for run in runs], docs)
    drawn = {path.relative_to(docs): path.read_bytes() for path in docs.rglob("*.svg")}
    page = (docs / "results.md").read_text()
    assert set(drawn) == set(map(Path, docs_images(page)))
    assert len(drawn) == 7 + 3  # none of flips, which nobody measured; three of the run with curves
    make_results.main([], docs)
    assert drawn == {path.relative_to(docs): path.read_bytes() for path in docs.rglob("*.svg")}
    texts = {path.stem.removeprefix("all-"): svg.decode() for path, svg in drawn.items()}
    assert "minutes of training on 2 cores, wall-clock" in texts["test-top-1-over-minutes"]
    assert "timm, ResNet-18" in texts["validation-top-1-during-the-training"]
    assert "timm, ResNet-18" in texts["test-top-1-over-minutes"]
    assert "ResNet-18" not in texts["test-top-1-over-image-size"]
    write_study(docs, table(rows=[row | {"curves": False} for row in rows]))
    make_results.main([], docs)
    assert not list(docs.rglob("*.svg"))


def docs_images(page: str) -> list[str]:
    return [part.partition(")")[0] for part in page.split("](")[1:] if part.partition(")")[0].endswith(".svg")]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("tables: [{title: a, rows: [{label: b, runs: [c], curvs: true}]}]", "curvs"),
        ("tables: [{title: a, rows: [], plots: [{kind: pie}]}]", "pie"),
        ("tables: [{title: a, rows: [], plots: [{kind: resolution, y: flips}]}]", "y: val or y: test"),
        ("tables: [{title: a, rows: [{label: b, runs: [c]}], plots: [{kind: dots, rows: [d]}]}]", "no row of it: d"),
        ("tables: [{title: a, rows: [{label: b, runs: [c]}, {label: b, runs: [d]}]}]", "two rows have one label"),
        ("tables: [", "is no study"),
    ],
)
def test_what_a_study_does_not_have_is_an_error(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ValueError, match=match) as caught:
        read_study(tmp_path / "study.yaml")
    assert str(tmp_path / "study.yaml") in str(caught.value)


def test_two_pictures_of_one_name_are_an_error(tmp_path: Path, docs: Path) -> None:
    write_study(docs, table(rows=[{"label": "Ours", "runs": ["a"]}], plots=[{"kind": "dots"}] * 2))
    with pytest.raises(ValueError, match="two pictures would be all-test-top-1-over-minutes"):
        make_results.main([str(finished_run(tmp_path / "a", 0.8))], docs)


def test_macs_of_a_peer_are_those_of_its_convolutions_and_matrices() -> None:
    depth, dim, tokens, patch = 2, 16, 64, 4
    vit = {"patch_size": patch, "depth": depth, "embed_dim": dim, "num_heads": 2, "global_pool": "avg"}
    config = {"model": "timm/vit_tiny_patch16_224", "model_args": vit, "image_size": 32}
    config["model_args"]["class_token"] = False
    block = tokens * 4 * dim**2 + 2 * tokens**2 * dim + 2 * tokens * dim * 4 * dim
    assert macs_per_image(config, 10) == tokens * dim * 3 * patch**2 + depth * block + dim * 10


def test_a_model_that_cannot_be_made_names_its_run(tmp_path: Path, docs: Path) -> None:
    run_dir = finished_run(tmp_path / "a", 0.8, model="timm/resnet1")
    with pytest.raises(ValueError, match=r"the model of a cannot be made from its config\.yaml: .*resnet1"):
        make_results.main([str(run_dir)], docs)


def test_a_summary_keeps_its_costs_when_a_variant_changes_or_goes(tmp_path: Path, docs: Path) -> None:
    make_results.main([str(finished_run(tmp_path / "a", 0.8))], docs)
    page = (docs / "results.md").read_text()
    path = docs / "results" / "a" / "config.yaml"
    path.write_text(path.read_text().replace(OURS, "sequencer2d_gone"))
    make_results.main([], docs)
    assert (docs / "results.md").read_text() == page


def texts_of(svg: str) -> dict[str, tuple[float, float]]:
    """The texts of a picture and where they stand."""
    found = {}
    for text in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
        place = text.get("transform", "").partition("translate(")[2].partition(")")[0].split()
        x, y = place or (text.get("x"), text.get("y"))
        found["".join(text.itertext()).strip()] = (float(x or 0), float(y or 0))
    return found


def test_labels_of_dots_in_one_place_stand_apart() -> None:
    dots = [Dot(label=f"model {i}", x=1e6, y=0.8, highlight=i == 0) for i in range(8)]
    dots.append(Dot(label="far", x=2e7, y=0.9, deviation=0.01, highlight=False))
    svg = draw_dots(dots, x_label="parameters", y_label="test top-1", x_text="{:g}".format, description="a < b")
    places = texts_of(svg)
    labels = [places[dot.label] for dot in dots]
    for i, (x, y) in enumerate(labels):
        for other_x, other_y in labels[:i]:
            assert abs(x - other_x) > 40 or abs(y - other_y) > 8
    assert places["far"][0] > places["model 0"][0]
    assert "<title>a &lt; b</title>" in svg


def test_pictures_are_light_or_dark_as_the_reader_has_it() -> None:
    curve = Curve(label="Ours", points=[(1, 0.2), (2, 0.4)], highlight=True)
    svg = draw_lines([curve], x_label="minutes", y_label="accuracy", description="")
    style = svg.partition("<style>")[2].partition("</style>")[0]
    light, dark = style.split("@media(prefers-color-scheme:dark)")
    assert "--page:#ffffff" in light
    assert "--page:#14181d" in dark
    used = {part.partition(",")[0] for part in svg.split("var(--")[1:] if "," in part.partition(")")[0]}
    assert {"val", "muted", "grid", "ink"} <= used
    for name in used:
        assert f"--{name}:" in light
        assert f"--{name}:" in dark


def test_labels_at_the_ends_of_lines_stand_apart_and_in_order() -> None:
    ends = [0.5, 0.501, 0.502, 0.9]
    curves = [Curve(label=f"{end}", points=[(1, 0.1), (2, end)], highlight=False) for end in ends]
    svg = draw_lines(curves, x_label="minutes", y_label="accuracy", description="", from_zero=True)
    heights = [texts_of(svg)[curve.label][1] for curve in curves]
    assert all(lower - higher > 12 for lower, higher in pairwise(heights))


def test_labels_of_many_lines_that_end_high_stay_within_the_picture() -> None:
    curves = [Curve(label=f"net {i}", points=[(1, 0.1), (2, 0.9)], highlight=False) for i in range(12)]
    svg = draw_lines(curves, x_label="minutes", y_label="accuracy", description="", from_zero=True)
    heights = [texts_of(svg)[curve.label][1] for curve in curves]
    assert min(heights) > 6


@pytest.mark.parametrize("places", [[], [3.0], [5.0, 5.0, 5.0], [9.0, 1.0, 1.5, 9.5, 2.5]])
def test_spread_moves_apart_keeps_order_and_middle(places: list[float]) -> None:
    moved = spread(places, gap=2, bounds=(-math.inf, math.inf))
    order = sorted(range(len(places)), key=lambda i: places[i])
    assert all(moved[b] - moved[a] >= 2 - 1e-9 for a, b in pairwise(order))
    assert math.isclose(sum(moved), sum(places))
    assert spread([1.0, 5.0], gap=2, bounds=(0, 6)) == [1.0, 5.0]


def test_spread_stays_within_its_bounds() -> None:
    assert spread([9.0, 9.5, 1.0, 9.8], gap=2, bounds=(0, 10)) == [6.0, 8.0, 1.0, 10.0]
    assert spread([0.5, 0.0, 3.0], gap=2, bounds=(0, 10)) == [2.0, 0.0, 4.0]
