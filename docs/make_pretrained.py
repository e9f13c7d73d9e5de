"""Puts the weights of a finished run into the package: `python docs/make_pretrained.py RUN_DIR VARIANT`.

Narrows the run's MLPs to the variant's where they are wider, rounds to bfloat16, evaluates what is left on the run's
validation images, and writes `src/sequencer2d/pretrained/VARIANT.safetensors` and its section of the README.md there.
Test images are not read.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from sequencer2d.data.catalog import DATA_NAMES
from sequencer2d.evaluation import evaluate
from sequencer2d.files import write_atomic
from sequencer2d.layers import Mlp
from sequencer2d.model import Sequencer2D
from sequencer2d.weights import ModelCard, load_model, save_model
from sequencer2d.zoo import get_config
from study.runs import uncommitted

FOLDER = Path(__file__).parent.parent / "src" / "sequencer2d" / "pretrained"
MAX_BYTES = 8_000_000
LICENSE = "Apache-2.0"
PLACES = ("--run-dir", "--data-root")
"""Options whose values are folders of the machine that trained."""


def package(run_dir: Path, name: str) -> Path:
    """Writes the file of a variant and its section; returns the file.

    Raises:
        FileNotFoundError, ModelFileError: The run is not finished.
        ValueError: It is of another architecture, was made by uncommitted code, or its weights are too large.
    """
    whole, card = load_model(run_dir)
    if not isinstance(whole, Sequencer2D):
        raise ValueError(f"the run trained {card.architecture}; the package has weights of variants of ours")
    if not (run_dir / "result.json").exists():
        raise FileNotFoundError(f"{run_dir} has no result.json: continue the run with sequencer2d train --resume")
    result = json.loads((run_dir / "result.json").read_text())
    environment = json.loads((run_dir / "environment.json").read_text())
    if lacking := uncommitted(environment):
        raise ValueError(f"{run_dir} was trained by code that is not committed: {lacking[0]}; train again")
    model = narrowed(whole, get_config(name).mlp_ratios)
    card = replace(card, config=model.config)
    check_architecture(model, card.architecture, name)
    top1, num_val = rounded_accuracy(run_dir, model, card)
    trained = {key: value for key, value in card.training.items() if key != "data_root"}
    if trained["data"] not in DATA_NAMES:  # a path; and not the catalogue's images, whatever its last part is
        del trained["data"]
    card = replace(
        card,
        architecture=name,
        training=trained
        | {
            "trained_on": result["evaluation"]["data"],
            "num_val": num_val,
            "num_test": result["evaluation"]["num_images"] if "test_top1" in trained else None,
            "rounded_to": "bfloat16",
            **({"narrowed": "MLPs, by the hidden units with the smallest weights"} if model is not whole else {}),
            "rounded_val_top1": top1,
            "command": portable(environment["command"]),
            "commit": environment["commit"],
            **begun_from(run_dir, environment["commit"]),
            "license": LICENSE,
        },
    )
    path = FOLDER / f"{name}.safetensors"
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        save_model(model, card, Path(folder, path.name), dtype=torch.bfloat16)
        if Path(folder, path.name).stat().st_size > MAX_BYTES:
            raise ValueError(f"the weights of {name} are above {MAX_BYTES / 1e6:.0f} MB; publish them on the hub")
        Path(folder, path.name).replace(path)
    write_section(path)
    return path


def narrowed(model: Sequencer2D, mlp_ratios: Sequence[float]) -> Sequencer2D:
    """The model, its MLPs as narrow as these ratios where they are wider: hidden units with the largest weights stay.

    A unit counts by the norm of its weights from the tokens, times that of its weights to them. Nothing is trained.
    """
    ratios = tuple(map(min, model.config.mlp_ratios, mlp_ratios))
    if len(ratios) < len(model.config.mlp_ratios) or ratios == model.config.mlp_ratios:
        return model
    narrow = Sequencer2D(replace(model.config, mlp_ratios=ratios))
    state = model.state_dict()
    for name, module in narrow.named_modules():
        if isinstance(module, Mlp):
            first, bias, second = (state[f"{name}.{key}"] for key in ("fc1.weight", "fc1.bias", "fc2.weight"))
            units = (first.norm(dim=1) * second.norm(dim=0)).topk(module.fc1.out_features).indices.sort().values
            state |= {
                f"{name}.fc1.weight": first[units],
                f"{name}.fc1.bias": bias[units],
                f"{name}.fc2.weight": second[:, units],
            }
    narrow.load_state_dict(state)
    return narrow


def check_architecture(model: Sequencer2D, architecture: str, name: str) -> None:
    """Raises ValueError unless the weights fit the variant, whatever its classes."""
    with torch.device("meta"):
        variant = Sequencer2D(get_config(name, num_classes=model.config.num_classes))
    shapes, wanted = ({key: of.shape for key, of in net.state_dict().items()} for net in (model, variant))
    if shapes != wanted:
        raise ValueError(f"the run trained a {architecture} that is not as {name} is; name the variant that it is")


def rounded_accuracy(run_dir: Path, model: Sequencer2D, card: ModelCard) -> tuple[float, int]:
    """Of the rounded weights, on the images that the run kept for validation; and the number of these."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, card, Path(folder, "model.safetensors"), dtype=torch.bfloat16)
        shutil.copy(run_dir / "split.json", folder)  # by which evaluation makes sure that the images are the same
        found = evaluate(folder, split="val")
    return found.top1, found.num_images


def begun_from(run_dir: Path, commit: str) -> dict[str, str]:
    """How the weights were trained from which the run began, by the card in the package of its commit; nothing if anew.

    Raises:
        ValueError: They are not from the package, or the commit is not in this checkout.
    """
    name = yaml.safe_load((run_dir / "config.yaml").read_text())["weights"]
    if name is None:
        return {}
    found = subprocess.run(["git", "show", f"{commit}:./{name}.safetensors"], cwd=FOLDER, capture_output=True)
    if found.returncode:
        raise ValueError(f"the weights {name} are not in the package of {commit}: {found.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.safetensors")
        path.write_bytes(found.stdout)
        _, card = load_model(path)
    return {"begun_from_command": card.training["command"], "begun_from_commit": card.training["commit"]}


def portable(command: str) -> str:
    """The command of a run without its program's path and the folders of its machine.

    Example: `portable("/usr/bin/sequencer2d train --run-dir /tmp/x --seed 1") == "sequencer2d train --seed 1"`
    """
    _, *words = shlex.split(command)
    kept = []
    words_left = iter(words)
    for word in words_left:
        if word in PLACES:
            next(words_left, None)
        elif not word.startswith(tuple(f"{option}=" for option in PLACES)):
            kept.append(re.sub(r"^(--[^=]+=)?/.*?([^/]+)/*$", r"\1path/to/\2", word))
    return shlex.join(["sequencer2d", *kept])


def section(path: Path) -> str:
    """What the README says of a packaged file, from its card."""
    model, card = load_model(path)
    trained: dict[str, Any] = card.training
    parameters = sum(parameter.numel() for parameter in model.parameters())
    before = "before narrowing and rounding" if "narrowed" in trained else "before rounding"
    test = "none"
    if trained["num_test"]:
        test = f"{trained['test_top1']:.2%} of {trained['num_test']:,} images, read once, {before}"
    names = ", ".join(card.class_names[:20]) + (", …" if len(card.class_names) > 20 else "")
    rows = {
        "classes": f"{len(card.class_names)}: {names}",
        "images": f"{card.preprocessing.image_size}² pixels, RGB",
        "parameters": f"{parameters / 1e6:.2f} M, {path.stat().st_size / 1e6:.2f} MB",
        "data": DATA.get(trained["trained_on"], trained["trained_on"]),
        "command": f"`{trained['command']}`",
        "commit": trained["commit"],
        **(
            {"begun from": f"weights by `{trained['begun_from_command']}` at commit {trained['begun_from_commit']}"}
            if "begun_from_command" in trained
            else {}
        ),
        "validation accuracy": f"{trained['rounded_val_top1']:.2%} of {trained['num_val']:,} images, by which training "
        f"chose its weights; {trained['val_top1']:.2%} {before}",
        "test accuracy": test,
        **({"narrowed": trained["narrowed"]} if "narrowed" in trained else {}),
        "limits": LIMITS.get(trained["trained_on"], "as of any classifier: images unlike its data are guessed at"),
        "license": trained["license"],
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"## {path.stem}\n\n| | |\n| --- | --- |\n{table}"


DATA = {
    "cifar10": "cifar10, its images as JPEGs of quality 75; on the official ones the weights were not measured",
}
LIMITS = {
    "digits": "single digits of 8×8 grey levels (scikit-learn), light on dark, that fill the image; others guessed at",
    "cifar10": "small photographs with one object in the middle; larger ones are shrunk to 32², others guessed at",
}


def write_section(path: Path) -> None:
    """Puts the section of a packaged file into the README beside it, in place of an older one."""
    page = path.with_name("README.md")
    head, *sections = re.split(r"^(?=## )", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    by_name = {text.partition("\n")[0]: text.rstrip() + "\n" for text in [*sections, section(path)]}
    write_atomic(page, "\n".join([head.rstrip() + "\n", *(by_name[name] for name in sorted(by_name))]))


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise SystemExit("usage: python docs/make_pretrained.py RUN_DIR VARIANT")
    path = package(Path(arguments[0]), arguments[1])
    print(section(path), end="")
    print(f"\n{path}")


if __name__ == "__main__":
    main(sys.argv[1:])
