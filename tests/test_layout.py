"""Dependencies point one way, and the command line answers before anything heavy is imported."""

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sequencer2d

SRC = Path(sequencer2d.__file__).parent

TIERS: list[set[str]] = [
    {"native"},
    {"cores", "errors", "files", "hub", "layers", "preprocessing"},
    {"model"},
    {"adapters", "flops", "quantization"},
    {"peers"},
    {"zoo"},
    {"registry", "weights"},
    {"data"},
    {"inference", "provenance"},
    {"evaluation", "prediction", "visualize"},
    {"training"},
    {"benchmarking"},
    {"__main__", "cli", "tables", "terminal", "verbs"},
]
"""A module imports from its own tier and from those above it here; the longest name that fits counts."""


def modules() -> dict[str, Path]:
    """Every module, without `sequencer2d.` before its name; of a package its `__init__`."""
    paths = {".".join(path.relative_to(SRC).with_suffix("").parts): path for path in SRC.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items() if name != "__init__"}


def imports(path: Path, *, lazy: bool) -> set[str]:
    """Modules of ours that a file imports, with or without those inside functions."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner.removeprefix("sequencer2d.") in modules() else f"{node.module}"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif lazy or not isinstance(node, ast.FunctionDef):
            for child in ast.iter_child_nodes(node):
                yield from visit(child)

    found = visit(ast.parse(path.read_text(encoding="utf-8")))
    return {name.removeprefix("sequencer2d.") for name in found if name.startswith("sequencer2d.")}


def tier(name: str) -> int:
    fits = {part: i for i, tier in enumerate(TIERS) for part in tier if f"{name}.".startswith(f"{part}.")}
    assert fits, f"{name} is new: give it a place in TIERS"
    return fits[max(fits, key=len)]


@pytest.mark.parametrize("name", modules())
def test_imports_point_one_way(name: str) -> None:
    upwards = {other for other in imports(modules()[name], lazy=True) if tier(other) > tier(name)}
    assert not upwards


def test_no_import_is_circular() -> None:
    TopologicalSorter({name: imports(path, lazy=False) for name, path in modules().items()}).prepare()


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", ["sequencer2d", "sequencer2d.cli"])
def test_importing_the_package_imports_nothing_heavy(module: str) -> None:
    heavy = ["torch", "timm", "torchvision", "pytorch_lightning", "numpy", "matplotlib", "sklearn", "jsonargparse"]
    program = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    assert run("-c", program).strip() == "[]"


def test_help_answers_within_half_a_second() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        assert "train" in run("-m", "sequencer2d.cli", "--help")
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize("name", sequencer2d.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert callable(getattr(sequencer2d, name))


def test_what_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'sequencer2d' has no attribute 'trian'"):
        _ = sequencer2d.trian  # type: ignore[attr-defined]
