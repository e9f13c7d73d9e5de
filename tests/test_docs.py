"""The generated pages are what their commands make of what is committed."""

import importlib.util
import json
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import make_results
from sequencer2d.benchmarking.comparison import Measurement, records
from sequencer2d.benchmarking.processes import Answers, Entry
from sequencer2d.cli import DONE, main
from sequencer2d.layers import Mlp
from sequencer2d.weights import load_model
from sequencer2d.zoo import PACKAGED, VARIANTS, create_model
from study.plan import read_study
from study.tables import DEFAULT

DOCS = Path(__file__).parent.parent / "docs"
RUNS = sorted(path.parent.name for path in DOCS.glob("results/*/result.json"))


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_the_page_of_results_and_its_pictures_are_as_generated(tmp_path: Path) -> None:
    for path in (DOCS / "results").rglob("*"):
        if path.suffix in (".json", ".jsonl", ".yaml"):
            copy = tmp_path / path.relative_to(DOCS)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    make_results.main([], tmp_path)
    assert (tmp_path / "results.md").read_text() == (DOCS / "results.md").read_text()
    there, expected = ({path.relative_to(root) for path in root.rglob("results/**/*.svg")} for root in (DOCS, tmp_path))
    assert there == expected


def test_every_run_that_the_study_names_is_there() -> None:
    study = read_study(DOCS / "results" / "study.yaml")
    assert {name for table in study.tables for row in table.rows for name in row.runs} <= set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_names_commit_machine_and_command_and_no_path_of_a_machine(name: str) -> None:
    folder = DOCS / "results" / name
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["commit"]
    assert not environment["commit"].endswith("+"), "run it from a clean checkout"
    assert environment["cpu"]
    assert environment["command"].startswith("sequencer2d train")
    for text in (environment["command"], (folder / "config.yaml").read_text()):
        assert not re.search(r"(^|[\s='\"])/", text, re.MULTILINE), "a path of a machine"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix != ".svg")
    assert size < 40_000, "the page needs no more of a run"


@pytest.mark.parametrize("name", RUNS)
def test_rows_of_results_have_the_numbers_of_their_runs(name: str) -> None:
    tables = read_study(DOCS / "results" / "study.yaml").tables
    rows = [(row.runs, table.columns or DEFAULT) for table in tables for row in table.rows if name in row.runs]
    page = (DOCS / "results.md").read_text().splitlines()
    for names, columns in rows or [([name], DEFAULT)]:
        lines = [line for line in page if line.startswith("| [") and f"](#run-{names[0]})" in line]
        results = [json.loads((DOCS / "results" / run / "result.json").read_text()) for run in names]
        tests = [result["evaluation"]["top1"] for result in results if result["evaluation"]["split"] == "test"]
        for column, values in (("val", [result["val_top1"] for result in results]), ("test", tests)):
            if column in columns and values:
                spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
                cell = f"| {100 * statistics.fmean(values):.2f}{spread} %"
                assert any(cell in line for line in lines), (names, cell)


def test_the_page_of_models_is_as_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_models = load_script("make_models")
    (tmp_path / "models").mkdir()
    for name in ("models.md", "models/measured.json"):
        (tmp_path / name).write_bytes((DOCS / name).read_bytes())
    monkeypatch.setattr(make_models, "DOCS", tmp_path)
    make_models.main([])
    for name in ("models.md", "models/model.svg", "models/block.svg", "models/bilstm2d.svg"):
        assert (tmp_path / name).read_text() == (DOCS / name).read_text(), name
    assert (tmp_path / "models" / "attention.svg").exists()


@pytest.mark.skipif(not (DOCS / "speed.json").exists(), reason="docs/make_speed.py has not been run yet")
def test_the_page_of_speed_is_as_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_speed = load_script("make_speed")
    (tmp_path / "speed.json").write_bytes((DOCS / "speed.json").read_bytes())
    monkeypatch.setattr(make_speed, "DOCS", tmp_path)
    make_speed.main(["--page"])
    assert (tmp_path / "speed.md").read_text() == (DOCS / "speed.md").read_text()


def made_up(module: ModuleType, comparison: str, seconds: dict[str, float], step_mib: float = 100) -> None:
    """Saves records of contenders that take so long, all sides of a growth alike."""
    entries = [entry for entry in module.COMPARISONS[comparison].entries if entry[0] in seconds]
    found = [
        Measurement(
            entry=Entry(contender=name, workload=workload),
            answers=Answers(rounds=[[seconds[name]]] * 3, before_mib=50, peak_mib=50 + step_mib, output_error=0.01),
            group=0,
        )
        for name, workload in entries
    ]
    found.append(replace(found[0], answers=Answers(error="ValueError: no reason")))
    module.save(module.load() | {comparison: records(found)})


def test_the_page_of_performance_tells_reached_missed_unmeasured_and_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load_script("make_performance")
    monkeypatch.setattr(module, "DOCS", tmp_path)
    (tmp_path / "performance_notes.md").write_text("## Why\n\nBecause.\n")
    made_up(module, "train", {"timm:fp32": 3, "timm:bf16": 1.6, "sequencer2d:bf16": 1})
    made_up(module, "infer", {"timm:fp32": 1, "sequencer2d:bf16": 0.25, "sequencer2d:fp32": 1})
    made_up(module, "latency", {"onnxruntime:fp32": 1, "openvino:fp32": 0.5, "sequencer2d:fp32": 0.4})
    made_up(module, "growth-train", {"sequencer2d:bf16": 1})
    module.main(["--from-json"])
    page = (tmp_path / "performance.md").read_text()
    for row in (
        "| training S, bf16, against timm fp32 | 2.8× | 4× | 3.00× (3.00–3.00) reached | not measured |",
        "| training S, bf16, against timm bf16 | 1.25× | 1.6× | 1.60× (1.60–1.60) aim reached | not measured |",
        "| training S, fp32, against timm fp32 | 1.1× | 1.6× | not measured | not measured |",
        "| inference of S, batch 8, fp32, against timm fp32 | 1.3× | 1.8× | 1.00× (1.00–1.00) **missed** |",
        "against the best of ONNX Runtime and OpenVINO | ≤ 1× | 0.75× | 0.80× (0.80–0.80) reached | not measured |",
        "| memory of training S, bf16, against timm | ≤ 0.75× | – | 1.00× **missed** | not measured |",
        "| memory per pixel in training, 896² against 224² | ≤ 1.15× | 1× | 1.00× aim reached | not measured |",
        "timm:fp32 failed: ValueError: no reason.",
    ):
        assert row in page, row
    assert page.endswith("## Why\n\nBecause.\n")
    assert "Training S, 224², batch 8" in (tmp_path / "performance.svg").read_text()


@pytest.mark.skipif(not (DOCS / "performance.jsonl").exists(), reason="docs/make_performance.py has not been run yet")
def test_the_page_of_performance_is_as_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_script("make_performance")
    for name in ("performance.jsonl", "performance_notes.md"):
        if (DOCS / name).exists():
            (tmp_path / name).write_bytes((DOCS / name).read_bytes())
    monkeypatch.setattr(module, "DOCS", tmp_path)
    module.main(["--from-json"])
    assert (tmp_path / "performance.md").read_text() == (DOCS / "performance.md").read_text()
    assert (DOCS / "performance.svg").exists()
    for group in module.load().values():
        for record in group:
            assert not record["environment"]["commit"].endswith("+"), "measure in a clean checkout"


def test_the_card_of_the_packaged_weights_is_as_generated(tmp_path: Path) -> None:
    make_pretrained = load_script("make_pretrained")
    for path in PACKAGED.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    page = (PACKAGED / "README.md").read_text()
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert [f"## {path.stem}" for path in paths] == re.findall("^## .*", page, flags=re.MULTILINE)
    for path in paths:  # in place of what stands there
        make_pretrained.write_section(path)
    assert (tmp_path / "README.md").read_text() == page
    (tmp_path / "README.md").write_text(page.partition("## ")[0])
    for path in reversed(paths):  # and anew, in the order of names
        make_pretrained.write_section(path)
    assert (tmp_path / "README.md").read_text() == page


def test_the_command_of_packaged_weights_names_no_folder_of_a_machine() -> None:
    portable = load_script("make_pretrained").portable
    assert portable("/opt/bin/sequencer2d train --config digits --run-dir /tmp/x --seed 3") == (
        "sequencer2d train --config digits --seed 3"
    )
    assert portable("__main__.py train --run-dir=/tmp/x --data /tmp/cifar10 --data-root /data") == (
        "sequencer2d train --data path/to/cifar10"
    )
    assert portable("sequencer2d train --data=/tmp/cifar10") == "sequencer2d train --data=path/to/cifar10"


def test_packaged_weights_tell_from_which_they_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pretrained = load_script("make_pretrained")
    monkeypatch.setattr(make_pretrained, "FOLDER", tmp_path)

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=me", "-c", "user.email=me@localhost"]
        run = subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return run.stdout

    name = "sequencer2d_conv_p_patch2_16"
    file = tmp_path / f"{name}.safetensors"
    file.write_bytes((PACKAGED / file.name).read_bytes())
    git("init", "--quiet")
    git("add", file.name)
    git("commit", "--quiet", "--message", "weights")
    commit = git("rev-parse", "HEAD").strip()
    file.unlink()  # what is there now does not matter
    (tmp_path / "config.yaml").write_text(f"weights: {name}\n")
    _, card = load_model(PACKAGED / file.name)
    assert make_pretrained.begun_from(tmp_path, commit) == {
        "begun_from_command": card.training["command"],
        "begun_from_commit": card.training["commit"],
    }
    with pytest.raises(ValueError, match=f"the weights {name} are not in the package of 1234567"):
        make_pretrained.begun_from(tmp_path, "1234567")
    (tmp_path / "config.yaml").write_text("weights: null\n")
    assert make_pretrained.begun_from(tmp_path, commit) == {}


@pytest.mark.slow
def test_a_run_becomes_packaged_weights_by_its_validation_images_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, name = tmp_path / "run", "sequencer2d_conv_p_patch2_16"
    assert main(["train", "--config", "digits", "--epochs", "1", "--run-dir", str(run_dir)]) == DONE
    make_pretrained = load_script("make_pretrained")
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "README.md").write_text("# Weights\n\n## another\n\nText.\n")
    monkeypatch.setattr(make_pretrained, "FOLDER", tmp_path / "pretrained")
    environment = json.loads((run_dir / "environment.json").read_text())
    environment["commit"] = "1234567+"
    (run_dir / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(ValueError, match="code that is not committed"):
        make_pretrained.package(run_dir, name)
    environment["commit"] = "1234567"
    (run_dir / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(ValueError, match="not as sequencer2d_conv_t_patch4_32 is"):
        make_pretrained.package(run_dir, "sequencer2d_conv_t_patch4_32")
    seen = []
    evaluate = make_pretrained.evaluate
    monkeypatch.setattr(
        make_pretrained, "evaluate", lambda *args, split: seen.append(split) or evaluate(*args, split=split)
    )
    path = make_pretrained.package(run_dir, name)
    assert seen == ["val"]
    _, card = load_model(path)
    assert card.training["commit"] == "1234567"
    assert card.training["test_top1"] == json.loads((run_dir / "result.json").read_text())["evaluation"]["top1"]
    page = (tmp_path / "pretrained" / "README.md").read_text()
    assert page.startswith("# Weights\n\n## another\n\nText.\n\n## sequencer2d_conv_p_patch2_16\n")
    assert f"{card.training['rounded_val_top1']:.2%} of 143 images" in page
    assert sorted(file.name for file in (tmp_path / "pretrained").iterdir()) == ["README.md", path.name]
    monkeypatch.setattr(make_pretrained, "MAX_BYTES", 400_000)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="above 0 MB; publish them on the hub"):
        make_pretrained.package(run_dir, name)
    assert path.read_bytes() == before
    assert sorted(file.name for file in (tmp_path / "pretrained").iterdir()) == ["README.md", path.name]


def test_narrowed_weights_are_without_the_hidden_units_that_do_nothing() -> None:
    make_pretrained = load_script("make_pretrained")
    model = create_model("sequencer2d_conv_p_patch2_16").eval()
    for module in model.modules():
        if isinstance(module, Mlp):
            weight = module.fc2.weight.data
            weight[:, torch.randperm(weight.shape[1])[: weight.shape[1] // 4]] = 0
    narrow = make_pretrained.narrowed(model, (1.5, 2.5)).eval()
    assert narrow.config.mlp_ratios == (1.5, 2.0)  # nothing is widened
    images = torch.randn(4, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(narrow.forward_features(images), model.forward_features(images))
    assert make_pretrained.narrowed(model, (2.0, 2.0)) is model
    make_pretrained.check_architecture(model, "one", "sequencer2d_conv_p_patch2_16")
    with pytest.raises(ValueError, match="a other that is not as sequencer2d_conv_p_patch2_16 is"):
        make_pretrained.check_architecture(narrow, "other", "sequencer2d_conv_p_patch2_16")


def test_every_variant_is_in_the_comparisons_with_the_official_code_and_timm() -> None:
    official = (DOCS / "official.md").read_text()
    for name, variant in VARIANTS.items():
        assert not variant.official_name or f"| `{name}` | `{variant.official_name}` |" in official
    assert "test_model_forward_fx" in (DOCS / "timm.md").read_text()
