"""The processes that train together: started by `torchrun` or Slurm, one for each GPU or share of a CPU's cores."""

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning_fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from torch import Tensor, distributed, nn

from sequencer2d.cores import num_cores

Value = TypeVar("Value")

PATIENCE = timedelta(hours=2)
"""How long ranks wait for each other: the first may evaluate or download alone. A rank that died is noticed at once."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Which of the processes this one is. By default the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""
    local_world_size: int = 1
    sharing: int = 1
    """How many of these may use the same cores, itself included: `srun` can bind each to cores of its own."""
    environment: ClusterEnvironment | None = None
    """Lightning's view of the launcher."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        """Machines, of which each runs as many of the processes."""
        return self.world_size // self.local_world_size

    @property
    def machine_cores(self) -> int:
        """Cores of all these processes on this machine together."""
        cores = num_cores() * self.local_world_size // self.sharing
        if isinstance(self.environment, SLURMEnvironment) and "SLURM_CPUS_PER_TASK" in os.environ:
            cores = min(cores, int(os.environ["SLURM_CPUS_PER_TASK"]) * self.local_world_size)
        return cores

    @property
    def own_cores(self) -> int:
        """This process's part of them."""
        return max(1, self.machine_cores // self.local_world_size)

    def of_first(self, function: Callable[[], Value]) -> Value:
        """What `function` returns on the first rank, for all; what it raises there, all raise."""
        if self.world_size == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer[0] = function()
            except BaseException as error:  # a request to stop, too
                answer[1] = error
        distributed.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def first_then_others(self, function: Callable[[], Value]) -> Value:
        """Calls `function` on all ranks, on the first one before the others: it downloads what they then find."""
        results: list[Value] = []
        self.of_first(lambda: results.append(function()))
        return results[0] if results else function()

    def highest(self, value: float) -> float:
        """The highest value over the ranks."""
        if self.world_size == 1:
            return value
        together = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(together, distributed.ReduceOp.MAX)
        return together.item()

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order. They are plain data."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def total(self, value: int) -> int:
        """The sum over the ranks."""
        if self.world_size == 1:
            return value
        together = torch.tensor(value)
        distributed.all_reduce(together)
        return int(together)


def is_first_process() -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one."""
    environment = _launcher()
    return environment is None or environment.global_rank() == 0


def join_ranks() -> Ranks:
    """Meets the other processes of this job, if it has more than one.

    Raises:
        ValueError: The machines of the job run unequal numbers of processes.
    """
    environment = _launcher()
    if environment is None or environment.world_size() == 1:
        return Ranks()
    ranks = Ranks(
        rank=environment.global_rank(),
        world_size=environment.world_size(),
        local_rank=environment.local_rank(),
        local_world_size=_local_world_size(environment),
        environment=environment,
    )
    if ranks.world_size % ranks.local_world_size:
        raise ValueError(
            f"{ranks.world_size} processes, {ranks.local_world_size} of them on this machine: "
            "start the same number on each"
        )
    if not distributed.is_initialized():
        os.environ.setdefault("MASTER_ADDR", environment.main_address)  # read by torch
        os.environ.setdefault("MASTER_PORT", str(environment.main_port))
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(ranks.local_rank)
            backend = "cpu:gloo,cuda:nccl"
        store = _store(ranks)
        distributed.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=PATIENCE
        )
        atexit.register(distributed.destroy_process_group)
    return replace(ranks, sharing=_sharing(ranks, environment.node_rank()))


def _sharing(ranks: Ranks, node: int) -> int:
    """Processes of this machine that may run on one of this one's cores."""
    if not hasattr(os, "sched_getaffinity"):
        return ranks.local_world_size
    cores = os.sched_getaffinity(0)
    return sum(node == other and not cores.isdisjoint(theirs) for other, theirs in ranks.gather((node, cores)))


def _store(ranks: Ranks) -> distributed.Store:
    """Where the ranks meet. `torchrun` keeps it when it starts them again, with the addresses of those that died."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = distributed.TCPStore(host, port, ranks.world_size, ranks.is_first and not served, timeout=PATIENCE)
    return distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def _launcher() -> ClusterEnvironment | None:
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # of `srun`; in an `sbatch` script there is one process
        return SLURMEnvironment(auto_requeue=False)  # a run that was stopped says so by its exit status
    return None


def _local_world_size(environment: ClusterEnvironment) -> int:
    if isinstance(environment, TorchElasticEnvironment):
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return environment.world_size() // int(os.environ.get("SLURM_NNODES", 1))


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with the statistics of all ranks' batches; `nn.SyncBatchNorm` needs a GPU."""

    counted = True
    """Whether this rank's batch counts: a blank image that it has for want of others does not."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        x = input.float()
        count = x.new_tensor([x.shape[0] * x.shape[2] * x.shape[3]])
        own = torch.cat([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), count])
        sums = _SumOverRanks.apply(own if self.counted else own * 0)
        channels, total = x.shape[1], sums[-1]
        mean = sums[:channels] / total
        variance = (sums[channels:-1] / total - mean.square()).clamp(min=0)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * total / (total - 1).clamp(min=1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(input.dtype)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        distributed.all_reduce(total)
        return total


def share_batch_norms(model: nn.Module) -> None:
    """Makes every batch norm of a model one over all ranks' batches. Parameters and their names stay the same."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SharedBatchNorm2d


def count_batch(model: nn.Module, counted: bool) -> None:
    """Says whether this rank's next batch counts in a model's shared batch norms; on one rank at least it must."""
    for module in model.modules():
        if isinstance(module, SharedBatchNorm2d):
            module.counted = counted
