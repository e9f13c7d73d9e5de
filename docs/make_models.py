"""Writes the tables and figures of docs/models.md from the code.

`python docs/make_models.py` replaces what stands between its marks; `--measure` measures the memory of a BiLSTM2D and
of self-attention anew (a minute) and keeps the figures in docs/models/measured.json.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from sequencer2d.flops import attention_costs, bilstm2d_costs, costs
from sequencer2d.layers import BiLSTM2D
from sequencer2d.zoo import VARIANTS, create_model, grid_sizes, timm_name

DOCS = Path(__file__).parent
SIDES = (16, 32, 64, 128)
DIM, HIDDEN, HEADS = 384, 96, 12


def variants_table() -> str:
    lines = [
        "| name | in timm | official name | parameters | image | MACs | tokens | blocks | channels | hidden | mixer |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, variant in VARIANTS.items():
        config = variant.config
        cost = costs(config, variant.image_size)
        extras = [text for text, on in (("shuffled", config.shuffle), ("positions", config.pos_embed_size)) if on]
        row = (
            f"`{name}`",
            f"`{timm_name(name)}`",
            f"`{variant.official_name}`" if variant.official_name else "–",
            f"{cost.parameters / 1e6:.2f} M",
            f"{variant.image_size}²",
            f"{cost.macs / 1e9:.2f} G",
            " ".join(f"{side}²" for side in grid_sizes(config, variant.image_size)),
            *("-".join(map(str, values)) for values in (config.layers, config.embed_dims, config.hidden_sizes)),
            ", ".join([config.mixer, *extras]),
        )
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


class Attention(nn.Module):
    """Multi-head self-attention as in ViT; fused: PyTorch's kernel that keeps no matrix of weights."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.proj, self.fused = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), fused

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * (C // HEADS) ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1) @ v
        return self.proj(y.transpose(1, 2).reshape(B, N, C))


def kept_mib(layer: nn.Module, x: Tensor) -> float:
    """MiB that autograd keeps for the backward pass, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own) / 2**20


def measure() -> dict[str, Any]:
    """Kept memory in fp32, one image, by grid; the plain attention only where it fits. And of S with checkpointing."""
    rows: dict[str, Any] = {"torch": torch.__version__}
    model = create_model("sequencer2d_s").train()
    for key, enable in (("whole", False), ("checkpointed", True)):
        model.set_grad_checkpointing(enable)
        rows[key] = kept_mib(model, torch.zeros(1, 3, 224, 224))
    for side in SIDES:
        tokens = side**2
        grid = torch.zeros(1, side, side, DIM, requires_grad=True)
        sequence = torch.zeros(1, tokens, DIM, requires_grad=True)
        rows[str(side)] = {
            "bilstm2d": kept_mib(BiLSTM2D(DIM, HIDDEN), grid),
            "attention": kept_mib(Attention(fused=False), sequence) if side <= 64 else None,
            "fused": kept_mib(Attention(fused=True), sequence),
        }
    return rows


def attention_table(measured: dict[str, Any]) -> str:
    lines = [
        "| tokens | image | MACs: BiLSTM2D | attention | kept MiB: BiLSTM2D | attention | attention, fused |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for side in SIDES:
        tokens = side**2
        lstm = bilstm2d_costs(tokens, DIM, HIDDEN)
        plain, fused = (attention_costs(tokens, DIM, HEADS, fused=fused) for fused in (False, True))
        seen = measured[str(side)]
        cells = [
            f"{cost.training_activations * 4 / 2**20:.1f} ({'–' if seen[key] is None else f'{seen[key]:.1f}'})"
            for cost, key in ((lstm, "bilstm2d"), (plain, "attention"), (fused, "fused"))
        ]
        macs = [f"{cost.macs / 1e9:.3f} G" for cost in (lstm, plain)]
        lines.append(f"| {side}² | {side * 14}² | {' | '.join([*macs, *cells])} |")
    return "\n".join(lines)


def draw_attention(path: Path) -> None:
    sides = [8, 12, 16, 24, 32, 48, 64, 96, 128]
    pixels = [side * 14 for side in sides]
    lstm = [bilstm2d_costs(side**2, DIM, HIDDEN) for side in sides]
    plain, fused = ([attention_costs(side**2, DIM, HEADS, fused=on) for side in sides] for on in (False, True))
    style = {"svg.hashsalt": "sequencer2d", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
        left.plot(pixels, [cost.macs / 1e9 for cost in lstm], label="BiLSTM2D", color="#0072b2")
        left.plot(pixels, [cost.macs / 1e9 for cost in plain], label="self-attention", color="#d55e00")
        left.set_title("multiply-accumulates, G")
        for rows, label, color, dashes in (
            (lstm, "BiLSTM2D", "#0072b2", "-"),
            (plain, "self-attention", "#d55e00", "-"),
            (fused, "self-attention, fused", "#d55e00", ":"),
        ):
            mib = [cost.training_activations * 4 / 2**20 for cost in rows]
            right.plot(pixels, mib, dashes, label=label, color=color)
        right.set_title("kept for the backward pass, MiB in fp32")
        for axes in (left, right):
            axes.set(xscale="log", yscale="log", xlabel="side of the image in pixels, stride 14")
            axes.set_xticks([112, 224, 448, 896, 1792], ["112", "224", "448", "896", "1792"])
            axes.minorticks_off()
            axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def box(x: float, y: float, width: float, text: str, kind: str = "plain", height: float = 28) -> str:
    fill = {"plain": "#eef2f6", "lstm": "#cfe3f3", "linear": "#f6e3cf", "norm": "#ffffff"}[kind]
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}" stroke="#44546a"/>'
        f'<text x="{x + width / 2}" y="{y + height / 2 + 4}" text-anchor="middle">{text}</text>'
    )


def arrow(*points: tuple[float, float]) -> str:
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="#44546a" marker-end="url(#tip)"/>'


def svg(width: int, height: int, *parts: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12" fill="#1b2430">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#44546a"/></marker></defs>'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>' + "".join(parts) + "</svg>\n"
    )


def draw_model() -> str:
    """Figure 2a: patches, stages with downsampling between them, and the head; S's numbers."""
    config = VARIANTS["sequencer2d_s"].config
    grids = grid_sizes(config, 224)
    parts = [box(10, 60, 70, "image"), '<text x="45" y="110" text-anchor="middle">224² × 3</text>']
    x = 105.0
    parts += [arrow((80, 74), (103, 74)), box(x, 60, 90, "7×7 patches", "linear")]
    x += 90
    for i, (layers, dim, grid) in enumerate(zip(config.layers, config.embed_dims, grids, strict=True)):
        parts.append(arrow((x, 74), (x + 23, 74)))
        x += 25
        if i:
            patch = config.patch_sizes[i]
            parts += [box(x, 60, 52, f"{patch}×{patch}", "linear"), arrow((x + 52, 74), (x + 73, 74))]
            x += 75
        parts += [box(x, 46, 92, f"{layers} blocks", "lstm", 56)]
        parts.append(f'<text x="{x + 46}" y="122" text-anchor="middle">{grid}² × {dim}</text>')
        x += 92
    parts += [arrow((x, 74), (x + 23, 74)), box(x + 25, 60, 110, "norm, mean", "norm")]
    parts += [arrow((x + 135, 74), (x + 158, 74)), box(x + 160, 60, 70, "linear", "linear")]
    return svg(int(x + 245), 150, *parts)


def draw_block() -> str:
    """Figure 2b: two residual branches."""
    parts, x = [], 70.0
    parts += ['<text x="10" y="64">x</text>', arrow((22, 60), (68, 60))]
    for name in (("norm", "BiLSTM2D", "lstm"), ("norm", "MLP", "linear")):
        start = x - 22
        parts += [
            box(x, 46, 60, name[0], "norm"),
            arrow((x + 60, 60), (x + 83, 60)),
            box(x + 85, 46, 100, name[1], name[2]),
        ]
        parts += [
            arrow((x + 185, 60), (x + 213, 60)),
            f'<circle cx="{x + 224}" cy="60" r="10" fill="#fff" stroke="#44546a"/>',
        ]
        parts += [f'<text x="{x + 224}" y="64" text-anchor="middle">+</text>']
        parts += [arrow((start, 60), (start, 18), (x + 224, 18), (x + 224, 48)), arrow((x + 234, 60), (x + 278, 60))]
        x += 280
    return svg(int(x + 10), 92, *parts)


def draw_bilstm2d() -> str:
    """Figure 1: two LSTMs over columns and rows, concatenated and fused."""
    parts = ['<text x="10" y="84">[H, W, C]</text>', arrow((70, 80), (98, 80), (98, 40), (128, 40))]
    parts += [arrow((98, 80), (98, 120), (128, 120))]
    for y, name, way in ((26, "columns", "↓↑"), (106, "rows", "→←")):
        parts += [box(130, y, 170, f"bidirectional LSTM over {name} {way}".replace("bidirectional ", ""), "lstm")]
        parts += [arrow((300, y + 14), (345, y + 14), (345, 68 if y < 60 else 92))]
        parts.append(f'<text x="322" y="{y + (8 if y < 60 else 30)}" text-anchor="middle">2D</text>')
    parts += [
        box(310, 68, 70, "concat", "norm", 24),
        arrow((380, 80), (418, 80)),
        '<text x="399" y="74" text-anchor="middle">4D</text>',
    ]
    parts += [
        box(420, 66, 110, "linear 4D → C", "linear"),
        arrow((530, 80), (568, 80)),
        '<text x="574" y="84">[H, W, C]</text>',
    ]
    return svg(640, 160, *parts)


def put(page: str, mark: str, text: str) -> str:
    """Replaces what stands between `<!-- mark -->` and `<!-- /mark -->`."""
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    assert pattern.search(page), mark
    return pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page)


def main(arguments: list[str]) -> None:
    folder = DOCS / "models"
    folder.mkdir(exist_ok=True)
    measured = folder / "measured.json"
    if "--measure" in arguments:
        measured.write_text(json.dumps(measure(), indent=1) + "\n")
    for name, text in (("model", draw_model()), ("block", draw_block()), ("bilstm2d", draw_bilstm2d())):
        (folder / f"{name}.svg").write_text(text)
    draw_attention(folder / "attention.svg")
    path = DOCS / "models.md"
    page = put(path.read_text(), "variants", variants_table())
    seen = json.loads(measured.read_text())
    page = put(
        page,
        "checkpointing",
        "`model.set_grad_checkpointing()` keeps only the inputs of blocks in training: "
        f"{seen['checkpointed']:.0f} instead of {seen['whole']:.0f} MiB for an image of 224² in S,\n"
        f"measured with torch {seen['torch']} on a CPU.",
    )
    page = put(page, "attention", attention_table(seen))
    path.write_text(page)


if __name__ == "__main__":
    main(sys.argv[1:])
