"""Makes timm know our models: `import sequencer2d.registry`, then `timm.create_model("gru_sequencer2d_s")`.

Every variant is registered under its name; the three that timm has itself (S, M, L) get the ending `_ref`, since ours
differ: a linear drop path, no cropping, checkpointing, features of all four stages.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from sequencer2d.adapters import resample_positions, to_ours
from sequencer2d.model import Sequencer2D
from sequencer2d.zoo import VARIANTS, get_config, timm_name


def _create(name: str, **arguments: Any) -> Sequencer2D:
    return Sequencer2D(get_config(name, **arguments))


def _filter(state: dict[str, Tensor], model: Sequencer2D) -> dict[str, Tensor]:
    state = to_ours(state)
    resample_positions(state, model)
    return state


def _entrypoint(name: str) -> Callable[..., Any]:
    def create(pretrained: bool = False, **arguments: Any) -> Any:
        arguments.pop("img_size", None)  # any size works
        stages = tuple(range(len(VARIANTS[name].config.layers)))
        return build_model_with_cfg(
            partial(_create, name),
            timm_name(name),
            pretrained,
            pretrained_filter_fn=_filter,
            feature_cfg={"out_indices": stages, "feature_cls": "getter"},
            **arguments,
        )

    create.__name__ = create.__qualname__ = timm_name(name)
    create.__doc__ = f"{name} of sequencer2d ({VARIANTS[name].source})."
    return create


default_cfgs = generate_default_cfgs(
    {timm_name(name) + (".in1k" if variant.hub_id else ""): variant.default_cfg() for name, variant in VARIANTS.items()}
)

for _name in VARIANTS:
    register_model(_entrypoint(_name))
