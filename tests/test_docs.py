"""The results page is what its command makes of the committed run summaries."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from sequencer2d.zoo import VARIANTS

DOCS = Path(__file__).parent.parent / "docs"


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, writing into a copy of the summaries."""
    module = load_script("make_results")
    for path in (DOCS / "results").rglob("*"):
        if path.suffix in (".json", ".jsonl", ".yaml"):
            copy = tmp_path / path.relative_to(DOCS)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(module, "DOCS", tmp_path)
    return module


def test_the_page_and_its_curves_are_as_generated(make_results: ModuleType, tmp_path: Path) -> None:
    make_results.main([])
    assert (tmp_path / "results.md").read_text() == (DOCS / "results.md").read_text()
    for curve in (DOCS / "results").rglob("*.svg"):
        assert (tmp_path / curve.relative_to(DOCS)).exists()


def test_results_name_commit_machine_and_command_and_no_path_of_a_machine() -> None:
    for folder in (path for path in (DOCS / "results").iterdir() if path.is_dir()):
        environment = json.loads((folder / "environment.json").read_text())
        assert environment["commit"]
        assert not environment["commit"].endswith("+"), "run it from a clean checkout"
        assert environment["cpu"]
        assert environment["command"].startswith("sequencer2d train")
        assert "/home" not in (folder / "config.yaml").read_text()


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


def test_every_variant_is_in_the_comparisons_with_the_official_code_and_timm() -> None:
    official = (DOCS / "official.md").read_text()
    for name, variant in VARIANTS.items():
        assert not variant.official_name or f"| `{name}` | `{variant.official_name}` |" in official
    assert "test_model_forward_fx" in (DOCS / "timm.md").read_text()
