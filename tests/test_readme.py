"""The README's commands run as they stand: ```bash``` blocks in one folder, in order, then the Python block."""

import re
import shlex
from pathlib import Path

import pytest

from sequencer2d.cli import DONE, main
from sequencer2d.training.recipes import list_recipes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TINY = "--epochs 1 --model-args.embed_dims [8,8] --model-args.hidden_sizes [2,2] --model-args.stem_widths [8]"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_commands_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) >= 4
    for program, *arguments in commands:
        assert program == "sequencer2d"
        quick = shlex.split(TINY) if arguments[0] == "train" else []  # the same command, a smaller model
        assert main([*arguments, *quick]) == DONE


def test_the_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python")) == 2
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "digits-from-python" / "model.safetensors").exists()


def test_set_up_commands_files_and_recipes_that_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
    for recipe in list_recipes():
        assert f"`{recipe}`" in README, recipe
    tree = re.findall(r"^  ([\w/]+(?:\.py)?)\s", README.split("src/sequencer2d/\n")[1].split("```")[0], re.MULTILINE)
    for name in tree:
        assert (ROOT / "src" / "sequencer2d" / name).exists(), name
