"""Compares every variant with the official code and writes docs/official.md.

`python docs/compare_official.py path/to/sequencer` (a checkout of the official repository). Its model classes are built
with the arguments of its own variants, one block per stage, random weights; ours get these weights by `to_ours`.
"""

import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from sequencer2d.adapters import to_official, to_ours
from sequencer2d.model import Sequencer2D
from sequencer2d.zoo import VARIANTS, get_config

PAGE = Path(__file__).parent / "official.md"


def import_official(checkout: Path) -> dict[str, Any]:
    """The official entry points, which return the class and its arguments instead of calling timm 0.5's builder."""
    import timm.layers
    import timm.models

    def build(kind: type, variant: str, pretrained: bool, **arguments: Any) -> tuple[type, dict[str, Any]]:
        return kind, {
            name: value for name, value in arguments.items() if not name.startswith(("default", "pretrained"))
        }

    modules: dict[str, dict[str, Any]] = {
        "timm.models.layers": {
            name: getattr(timm.layers, name)
            for name in ("DropPath", "Mlp", "PatchEmbed", "lecun_normal_", "trunc_normal_")
        },
        "timm.models.helpers": {"build_model_with_cfg": build, "named_apply": timm.models.named_apply},
        "timm.models.registry": {"register_model": lambda function: function},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module
    sys.path.insert(0, str(checkout))
    import models  # type: ignore[import-not-found] - the official repository's

    return vars(models)


def main(checkout: Path) -> None:
    official = import_official(checkout)
    commit = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    rows = []
    for name, variant in VARIANTS.items():
        if not variant.official_name and not variant.config.shuffle:
            continue
        kind, arguments = official[variant.official_name or "v_sequencer_s"](pretrained=False)
        whole = sum(parameter.numel() for parameter in kind(**arguments).parameters())
        ours_whole = sum(parameter.numel() for parameter in Sequencer2D(variant.config).parameters())
        torch.manual_seed(0)
        shuffle = {"shuffle": True} if variant.config.shuffle else {}
        theirs = kind(**{**arguments, "layers": [1, 1, 1, 1], "num_classes": 10, **shuffle}).eval()
        nn.init.normal_(theirs.head.weight, std=0.05)
        ours = Sequencer2D(replace(get_config(name), layers=(1, 1, 1, 1), num_classes=10)).eval()
        ours.load_state_dict(to_ours(theirs.state_dict()))
        back = to_official(ours.state_dict())
        assert all(torch.equal(back[key], tensor) for key, tensor in theirs.state_dict().items())
        assert set(back) == set(theirs.state_dict())
        image = torch.randn(1, 3, variant.image_size, variant.image_size)
        with torch.inference_mode():
            expected = theirs(image)
            difference = (ours(image) - expected).abs().max().item()
        rows.append(
            f"| `{name}` | `{variant.official_name or 'v_sequencer_s, shuffle=True'}` | {ours_whole:,} | {whole:,} "
            f"| {difference:.0g} | {expected.std():.2f} |"
        )
        print(rows[-1])
    PAGE.write_text(
        f"""# Against the official code

Written by `python docs/compare_official.py path/to/sequencer`{f", at its commit {commit[:12]}" if commit else ""}, with
timm {timm.__version__} and torch {torch.__version__}. Parameters are those of the whole models; logits are compared
with the same random weights and one block per stage, converted from the official names to ours and back without loss.

| ours | official | parameters | official | largest difference of logits | their spread |
| --- | --- | --- | --- | --- | --- |
"""
        + "\n".join(rows)
        + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
