"""Who competes: for each name, how a step is made of a workload and of the weights that all contenders share.

To add one, write a function that returns a `Running`, and give it a row in `CONTENDERS`.
"""

import difflib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sequencer2d.benchmarking.workload import Mode, Workload

if TYPE_CHECKING:
    from torch import Tensor, nn

MODEL_SEED, IMAGE_SEED = 0, 1
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.05


@dataclass(frozen=True, kw_only=True)
class Running:
    """A contender at work."""

    step: Callable[[], Any]
    """Makes one step and returns what it computed: in `infer` logits, in `train` the gradient of the first layer."""
    detail: str = ""
    """What only the running contender knows, such as which kernel it uses."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One implementation at one precision."""

    build: Callable[[Workload, dict[str, Any]], Running]
    """Takes the weights as a state dict; raises whatever it likes where it cannot do this work."""
    how: str
    """What it does, for people."""
    packages: tuple[str, ...] = ()
    """Whose versions a result depends on, besides PyTorch's and timm's."""
    modes: tuple[Mode, ...] = field(default=("train", "infer"))


def reference(workload: Workload) -> "tuple[dict[str, Any], Tensor]":
    """The weights for all, and what a right step computes of them: our layers in fp32, the LSTMs in PyTorch."""
    import torch

    torch.manual_seed(MODEL_SEED)
    net = _ours_net(workload, "torch")
    torch.nn.init.normal_(net.head.fc.weight, std=net.num_features**-0.5)  # at 0, neither logits nor gradients are
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return state, _torch_step(net, workload, "fp32")().clone()


def _torch_step(net: "nn.Module", workload: Workload, precision: str, *, compiled: bool = False) -> "Callable[[], Any]":
    """A step in PyTorch, the same for ours and timm's.

    bf16 is autocast in training; in inference weights and images are cast once, which is faster for both.
    """
    import torch

    images, labels = _batch(workload)
    forward = torch.compile(net, dynamic=False) if compiled else net
    if workload.mode == "infer":
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        net.eval().requires_grad_(False).to(dtype)
        images = images.to(dtype)

        def infer() -> "Tensor":
            with torch.inference_mode():
                return forward(images)

        return infer

    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    first = next(net.parameters())

    def train() -> "Tensor":
        optimizer.zero_grad()
        with autocast:
            loss = torch.nn.functional.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        assert first.grad is not None
        return first.grad

    return train


def _batch(workload: Workload) -> "tuple[Tensor, Tensor]":
    """Random images `[B, 3, H, W]` and labels `[B]`, always the same."""
    import torch

    generator = torch.Generator().manual_seed(IMAGE_SEED)
    side = workload.image_size
    images = torch.randn(workload.batch_size, 3, side, side, generator=generator)
    return images, torch.randint(workload.num_classes, (workload.batch_size,), generator=generator)


def _ours_net(workload: Workload, backend: str) -> Any:
    from sequencer2d.zoo import create_model

    return create_model(workload.model, num_classes=workload.num_classes, backend=backend)


def _timms_net(workload: Workload, state: dict[str, Any]) -> "nn.Module":
    """timm's own implementation of the same architecture.

    Raises:
        ValueError: It lacks what this variant has.
    """
    from timm.models.sequencer import Sequencer2d

    from sequencer2d.zoo import get_config

    config = get_config(workload.model)
    for name, plain in (("mixer", "BiLSTM2D"), ("stem_widths", ()), ("shuffle", False), ("pos_embed_size", ())):
        if getattr(config, name) != plain:
            raise ValueError(f"timm's Sequencer2d has no {name}={getattr(config, name)!r}, as {workload.model} has")
    net = Sequencer2d(
        num_classes=workload.num_classes,
        layers=config.layers,
        patch_sizes=config.patch_sizes,
        embed_dims=config.embed_dims,
        hidden_sizes=config.hidden_sizes,
        mlp_ratios=config.mlp_ratios,
    )
    net.load_state_dict(state)
    return net


def _ours(
    workload: Workload, state: dict[str, Any], *, precision: str, backend: str = "auto", checkpointing: bool = False
) -> Running:
    from sequencer2d.native import backends

    net = _ours_net(workload, backend)
    net.load_state_dict(state)
    net.set_grad_checkpointing(checkpointing)
    native = next(each for each in backends() if each.name == "native")
    in_kernel = backend != "torch" and native.available
    where = f"CPU kernel {native.kernel}" if in_kernel else "PyTorch"
    missing = "" if in_kernel or backend == "torch" else f", as there is no kernel: {native.detail}"
    return Running(step=_torch_step(net, workload, precision), detail=f"blocks in {where}{missing}")


def _ours_int8(workload: Workload, state: dict[str, Any]) -> Running:
    import torch

    from sequencer2d.native import backends
    from sequencer2d.quantization import quantize

    net = _ours_net(workload, "auto")
    net.load_state_dict(state)
    images, _ = _batch(workload)
    net = quantize(net.eval(), images)

    def infer() -> "Tensor":
        with torch.inference_mode():
            return net(images)

    native = next(each for each in backends() if each.name == "native")
    return Running(step=infer, detail=f"calibrated on the batch that is measured; CPU kernel {native.kernel}")


def _timm(workload: Workload, state: dict[str, Any], *, precision: str, compiled: bool = False) -> Running:
    return Running(step=_torch_step(_timms_net(workload, state), workload, precision, compiled=compiled))


def _onnxruntime(workload: Workload, state: dict[str, Any], *, precision: str) -> Running:
    import onnx
    import onnxruntime
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic

    images, _ = _batch(workload)
    net = _timms_net(workload, state).eval()
    with tempfile.TemporaryDirectory() as folder:
        file, quantized = Path(folder, "net.onnx"), Path(folder, "int8.onnx")
        torch.onnx.export(net, (images,), str(file), dynamo=False, opset_version=17)  # quantisable, unlike dynamo's
        if precision == "int8":
            graph = onnx.load(file)
            del graph.graph.value_info[:]  # its shapes are what the quantisation stumbles over
            onnx.save(graph, file)
            quantize_dynamic(file, quantized, weight_type=QuantType.QInt8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = workload.threads, 1
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        session = onnxruntime.InferenceSession(
            str(quantized if precision == "int8" else file), options, providers=["CPUExecutionProvider"]
        )
    inputs = {session.get_inputs()[0].name: images.numpy()}
    return Running(step=lambda: torch.from_numpy(session.run(None, inputs)[0]))


def _openvino(workload: Workload, state: dict[str, Any], *, precision: str) -> Running:
    import openvino
    import torch

    images, _ = _batch(workload)
    net = _timms_net(workload, state).eval()
    # By way of ONNX, or converted for one shape, the LSTMs take half as long again.
    graph = openvino.convert_model(net, example_input=images)
    graph.reshape(list(images.shape))
    settings = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        "INFERENCE_NUM_THREADS": workload.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "CPU_DENORMALS_OPTIMIZATION": True,
    }
    compiled = openvino.Core().compile_model(graph, "CPU", settings)
    request, array = compiled.create_infer_request(), images.numpy()

    def step() -> "Tensor":
        return torch.from_numpy(request.infer({0: array})[0])

    in_use = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return Running(step=step, detail=f"computes in {in_use}")


_ORT, _OPENVINO = ("onnx", "onnxruntime"), ("openvino",)
_BF16 = "bf16 (autocast in training, cast once for inference)"

CONTENDERS: dict[str, Contender] = {
    "sequencer2d:fp32": Contender(build=partial(_ours, precision="fp32"), how="ours, fp32"),
    "sequencer2d:bf16": Contender(build=partial(_ours, precision="bf16"), how=f"ours, {_BF16}"),
    "sequencer2d:int8": Contender(
        build=_ours_int8, how="ours, linear layers of the blocks in int8, recurrence in bf16", modes=("infer",)
    ),
    "sequencer2d-torch:fp32": Contender(
        build=partial(_ours, precision="fp32", backend="torch"), how="ours with PyTorch's LSTMs, fp32"
    ),
    "sequencer2d-torch:bf16": Contender(
        build=partial(_ours, precision="bf16", backend="torch"), how=f"ours with PyTorch's LSTMs, {_BF16}"
    ),
    "sequencer2d-checkpointing:fp32": Contender(
        build=partial(_ours, precision="fp32", checkpointing=True),
        how="ours, fp32, activations inside blocks computed again",
        modes=("train",),
    ),
    "sequencer2d-checkpointing:bf16": Contender(
        build=partial(_ours, precision="bf16", checkpointing=True),
        how="ours, bf16 autocast, activations inside blocks computed again",
        modes=("train",),
    ),
    "timm:fp32": Contender(build=partial(_timm, precision="fp32"), how="timm's net, fp32"),
    "timm:bf16": Contender(build=partial(_timm, precision="bf16"), how=f"timm's net, {_BF16}"),
    "timm-compiled:fp32": Contender(
        build=partial(_timm, precision="fp32", compiled=True), how="timm's net in torch.compile, fp32"
    ),
    "timm-compiled:bf16": Contender(
        build=partial(_timm, precision="bf16", compiled=True), how=f"timm's net in torch.compile, {_BF16}"
    ),
    "onnxruntime:fp32": Contender(
        build=partial(_onnxruntime, precision="fp32"),
        how="timm's net in ONNX Runtime, fp32",
        packages=_ORT,
        modes=("infer",),
    ),
    "onnxruntime:int8": Contender(
        build=partial(_onnxruntime, precision="int8"),
        how="timm's net in ONNX Runtime, int8 by dynamic quantisation",
        packages=_ORT,
        modes=("infer",),
    ),
    "openvino:fp32": Contender(
        build=partial(_openvino, precision="fp32"),
        how="timm's net in OpenVINO, fp32",
        packages=_OPENVINO,
        modes=("infer",),
    ),
    "openvino:bf16": Contender(
        build=partial(_openvino, precision="bf16"),
        how="timm's net in OpenVINO, INFERENCE_PRECISION_HINT=bf16",
        packages=_OPENVINO,
        modes=("infer",),
    ),
}
"""By `WHO:PRECISION`."""

TOLERANCE = {
    ("infer", "fp32"): 1e-3,
    ("infer", "bf16"): 0.05,
    ("infer", "int8"): 0.15,
    ("train", "fp32"): 1e-3,
    ("train", "bf16"): 0.15,
}
"""By mode and precision: how far, relative to its norm, what a step computes may be from the reference's."""


def tolerance(name: str, mode: Mode) -> float:
    """Of a contender, see `TOLERANCE`."""
    return TOLERANCE[mode, name.partition(":")[2]]


def find_contenders(text: str, mode: Mode) -> list[str]:
    """Names of contenders from text such as `timm,openvino:bf16`; without a precision, all of it in this mode.

    Raises:
        ValueError: There is no such contender, or it cannot do this; the message says which there are.
    """
    found = []
    for name in (part.strip() for part in text.split(",")):
        known = [full for full in CONTENDERS if name in (full, full.partition(":")[0])]
        able = [full for full in known if mode in CONTENDERS[full].modes]
        if known and not able:
            raise ValueError(f"{name} cannot {mode}; {_there_are(mode)}")
        if not known:
            near = difflib.get_close_matches(name, [*CONTENDERS, *{full.partition(":")[0] for full in CONTENDERS}], n=1)
            hint = f"did you mean {near[0]}?" if near else _there_are(mode)
            raise ValueError(f"no contender {name!r}: {hint}")
        found += able
    return list(dict.fromkeys(found))


def _there_are(mode: Mode) -> str:
    return f"there are {', '.join(name for name, contender in CONTENDERS.items() if mode in contender.modes)}"
