"""For torch.hub: `torch.hub.load("path/to/this/repository", "sequencer2d_s", source="local", pretrained=True)`."""

import sys as _sys
from functools import partial as _partial
from pathlib import Path as _Path

dependencies = ["torch", "timm", "jaxtyping", "safetensors", "huggingface_hub"]

_sys.path.insert(0, str(_Path(__file__).parent / "src"))

from sequencer2d import create_model, list_models  # noqa: E402

for _name in list_models():
    globals()[_name] = _partial(create_model, _name)
del create_model, list_models
