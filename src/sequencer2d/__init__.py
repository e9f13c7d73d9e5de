"""sequencer2d: deep LSTMs for image classification (Tatsunami & Taki, NeurIPS 2022).

The names below are the public API. They are imported when first used, so that the command line answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sequencer2d.evaluation import evaluate
    from sequencer2d.layers import set_backend
    from sequencer2d.native import backends
    from sequencer2d.prediction import predict
    from sequencer2d.quantization import quantize
    from sequencer2d.training.config import TrainConfig
    from sequencer2d.training.run import train
    from sequencer2d.training.seeds import train_seeds
    from sequencer2d.weights import from_pretrained, load_model, push_to_hub, save_model
    from sequencer2d.zoo import create_model, list_models

_HOME = {
    "TrainConfig": "sequencer2d.training.config",
    "backends": "sequencer2d.native",
    "create_model": "sequencer2d.zoo",
    "evaluate": "sequencer2d.evaluation",
    "from_pretrained": "sequencer2d.weights",
    "list_models": "sequencer2d.zoo",
    "load_model": "sequencer2d.weights",
    "predict": "sequencer2d.prediction",
    "push_to_hub": "sequencer2d.weights",
    "quantize": "sequencer2d.quantization",
    "save_model": "sequencer2d.weights",
    "set_backend": "sequencer2d.layers",
    "train": "sequencer2d.training.run",
    "train_seeds": "sequencer2d.training.seeds",
}

__all__ = [
    "TrainConfig",
    "backends",
    "create_model",
    "evaluate",
    "from_pretrained",
    "list_models",
    "load_model",
    "predict",
    "push_to_hub",
    "quantize",
    "save_model",
    "set_backend",
    "train",
    "train_seeds",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
