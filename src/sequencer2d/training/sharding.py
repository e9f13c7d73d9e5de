"""`--strategy fsdp`: each rank keeps a part of the weights, their average, gradients and optimiser state.

PyTorch's `fully_shard` (FSDP2) gathers the weights of a block for its forward and its backward pass only. So all ranks
must make the same passes, in validation too. What is saved is whole: checkpoints are those of one process.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sequencer2d.layers import Sequencer2DBlock
from sequencer2d.model import Sequencer2D
from sequencer2d.peers import Classifier
from sequencer2d.training.config import TrainConfig
from sequencer2d.training.ranks import Ranks


def is_to_shard(config: TrainConfig, ranks: Ranks) -> bool:
    """Whether the ranks divide the weights. A single one has them all.

    Raises:
        ValueError: The config or the installed PyTorch does not allow it.
    """
    if config.strategy != "fsdp" or ranks.world_size == 1:
        return False
    if config.optim.optimizer == "muon":
        raise ValueError(
            "strategy=fsdp has rows of each matrix on each process, and optim.optimizer=muon needs whole matrices; "
            "take --strategy ddp or --optim.optimizer adamw"
        )
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ValueError(
            f"strategy=fsdp needs a newer PyTorch than {torch.__version__}; update it or take --strategy ddp"
        )
    return True


class ShardedStrategy(DDPStrategy):
    """Lightning's data parallelism with `fully_shard` in the place of its wrapper around the model.

    (Lightning's `FSDPStrategy` refuses CPUs. Its `ModelParallelStrategy` refuses fp16, unpickles the checkpoint that a
    run goes on from, and numbers the optimiser's state otherwise than the optimisers of all other strategies.)
    """

    def configure_ddp(self) -> None:
        """Divides every Sequencer of the module. A checkpoint's weights are in it by then."""
        assert self.lightning_module is not None
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        for module in list(self.lightning_module.modules()):
            if isinstance(module, Sequencer2D):
                shard(module, mesh)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._of_first(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        saved: dict[str, Any] = super().optimizer_state(optimizer)
        return {**saved, "state": {number: self._of_first(state) for number, state in saved["state"].items()}}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank takes its part of a whole state, whoever saved it."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {name: _part(value, parameters[number]) for name, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def _of_first(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict with whole tensors on the first rank, which writes it; empty on the others."""
        state = {name: whole_tensor(value) for name, value in state.items()}  # in which all take part
        return state if self.is_global_zero else {}


def shard(model: Sequencer2D, mesh: DeviceMesh) -> None:
    """Divides each parameter of a model along its first axis; block by block, and then what is outside of them."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            # cuDNN's flat buffer would be filled once and take the place of what is gathered for each pass.
            module.flatten_parameters = _leave_apart
    for module in [*(block for block in model.modules() if isinstance(block, Sequencer2DBlock)), model]:
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no mean


def _leave_apart() -> None:
    """In the place of `flatten_parameters`."""


def whole_tensor(value: Any) -> Any:
    """A divided tensor put together on the CPU, for which all ranks must call this; anything else as it is."""
    return value.full_tensor().detach().cpu() if isinstance(value, DTensor) else value


def whole_model(model: Classifier) -> Classifier:
    """A divided model put together on the CPU of each rank, for which all must call this; any other as it is."""
    if not isinstance(model, FSDPModule):
        return model
    assert isinstance(model, Sequencer2D)
    with torch.device("meta"):
        whole = Sequencer2D(model.config)
    state = {name: whole_tensor(value).cpu() for name, value in model.state_dict().items()}
    whole.load_state_dict(state, assign=True)
    return whole.train(model.training)


def _part(value: Any, parameter: Tensor) -> Any:
    """This rank's part of a value of the optimiser for a parameter, if it has its shape."""
    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
