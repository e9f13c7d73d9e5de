"""Several processes train as one does: the same batches, updates and metrics, and none outlives another."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric.plugins.environments import SLURMEnvironment
from torch import nn

from jobs import Job
from runs import assert_same, rows
from sequencer2d.data.catalog import FileImages, load_data
from sequencer2d.data.loaders import ShuffledBatches
from sequencer2d.data.shards import write_shards
from sequencer2d.training import ranks as ranks_module
from sequencer2d.training.ranks import Ranks, _sharing


def test_two_ranks_train_as_one(recipe: dict[str, Any], tmp_path: Path) -> None:
    statuses, errors = Job(tmp_path / "two", recipe, ranks=2).run()
    assert statuses == [0, 0], errors
    assert "each of 2" in errors
    assert errors.count("epoch 3:") == 1
    statuses, errors = Job(tmp_path / "one", {**recipe, "run_dir": str(tmp_path / "alone")}).run()
    assert statuses == [0], errors
    assert_same(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_one(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A signal to one of the ranks stops all, after the same update."""
    job = Job(tmp_path / "two", recipe, ranks=2, kill=(5, signal.SIGTERM), victim=1)
    statuses, errors = job.run()
    assert statuses == [75, 75], errors
    statuses, errors = Job(tmp_path / "one", recipe).run()
    assert statuses == [0], errors
    assert "continuing" in errors
    Job(tmp_path / "whole", {**recipe, "run_dir": str(tmp_path / "whole run")}).run()
    assert_same(tmp_path / "run", tmp_path / "whole run")


@pytest.mark.slow
def test_a_signal_before_the_first_update_stops_all_ranks(recipe: dict[str, Any], tmp_path: Path) -> None:
    job = Job(tmp_path / "two", recipe, ranks=2, kill=(-1, signal.SIGTERM), victim=1)
    statuses, errors = job.run()
    assert statuses == [75, 75], errors
    assert "stopped after 0 updates; continue with" in errors
    assert job.run()[0] == [0, 0]


@pytest.mark.slow
def test_slurm_starts_them_and_stops_them_ahead_of_time(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A signal to one of the tasks stops both."""
    for kill, statuses in ((5, signal.SIGUSR1), [75, 75]), (None, [0, 0]):
        found, errors = Job(tmp_path / "two", recipe, ranks=2, launcher="slurm", kill=kill).run()
        assert found == statuses, errors
    Job(tmp_path / "one", {**recipe, "run_dir": str(tmp_path / "alone")}).run()
    assert_same(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_job_down_and_torchrun_brings_it_back(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["checkpoint_minutes"] = 0
    job = Job(tmp_path / "two", recipe, kill=(5, signal.SIGKILL), victim=1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run([*torchrun, *job.command], env=job.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "continuing" in done.stderr
    Job(tmp_path / "one", {**recipe, "run_dir": str(tmp_path / "alone")}).run()
    assert_same(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces need root and ip"
)
def test_two_hosts_with_addresses_of_their_own_train_together(recipe: dict[str, Any], tmp_path: Path) -> None:
    job = Job(tmp_path / "two", recipe)
    hosts = ["seq2d-a", "seq2d-b"]
    pair = f"ip link add {hosts[0]} netns {hosts[0]} type veth peer name {hosts[1]} netns {hosts[1]}"
    try:
        for host in hosts:
            if subprocess.run(["ip", "netns", "add", host], capture_output=True, check=False).returncode:
                pytest.skip("this machine does not allow network namespaces")
        subprocess.run(pair.split(), check=True)
        for number, host in enumerate(hosts, 1):
            for command in (f"addr add 10.77.0.{number}/24 dev {host}", f"link set {host} up", "link set lo up"):
                subprocess.run(["ip", "-n", host, *command.split()], check=True)
        processes = [
            subprocess.Popen(
                [
                    *("ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"),
                    *(f"--node-rank={number}", "--nproc-per-node=1", "--master-addr=10.77.0.1", "--master-port=29577"),
                    *job.command,
                ],
                env={**job.environment, "GLOO_SOCKET_IFNAME": host},
                stderr=subprocess.PIPE,
                text=True,
            )
            for number, host in enumerate(hosts)
        ]
        errors = [process.communicate(timeout=240)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], errors
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True, check=False)
    Job(tmp_path / "one", {**recipe, "run_dir": str(tmp_path / "alone")}).run()
    assert_same(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
def test_a_rank_without_a_readable_image_does_not_keep_the_others_waiting(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """In batches of two the second rank has none at all."""
    for path in sorted(Path(recipe["data"]).rglob("*.png"))[::2]:
        path.write_bytes(b"no image")
    recipe |= {"batch_size": 3, "epochs": 1, "accumulate": 1}
    statuses, errors = Job(tmp_path / "two", recipe, ranks=2).run()
    assert statuses == [0, 0], errors
    skipped = json.loads((tmp_path / "run" / "result.json").read_text())["skipped"]
    assert len(skipped) == 18
    assert errors.count("skipped") == 18  # by whichever rank they were met


@pytest.mark.slow
def test_blank_images_of_idle_ranks_change_nothing(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Of batches of two, which mixing keeps together, the second rank never has an image."""
    recipe |= {"batch_size": 2, "epochs": 1}
    for name, ranks in (("two", 2), ("one", 1)):
        job = Job(tmp_path / name, {**recipe, "run_dir": str(tmp_path / f"run of {name}")}, ranks=ranks)
        statuses, errors = job.run()
        assert set(statuses) == {0}, errors
    assert_same(tmp_path / "run of two", tmp_path / "run of one")


@pytest.mark.slow
def test_an_update_that_ends_with_an_unreadable_batch_is_the_same_on_all_ranks(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """The first is of two batches and lacks the second; another, of one batch, has no image at all."""
    images = load_data(recipe["data"], val_fraction=0.25).train
    assert isinstance(images, FileImages)
    batches = list(ShuffledBatches(len(images), recipe["batch_size"], 0))
    assert len(batches) == 3
    for index, _ in batches[1] + batches[2]:
        (images.root / images.name(index)).write_bytes(b"no image")
    recipe |= {"epochs": 1, "optim": {**recipe["optim"], "warmup_epochs": 0}}
    for name, ranks in (("two", 2), ("one", 1)):
        job = Job(tmp_path / name, {**recipe, "run_dir": str(tmp_path / f"run of {name}")}, ranks=ranks)
        statuses, errors = job.run()
        assert set(statuses) == {0}, errors
    assert_same(tmp_path / "run of two", tmp_path / "run of one")


@pytest.mark.slow
def test_two_ranks_stream_shards(recipe: dict[str, Any], tmp_path: Path) -> None:
    """27 training images in batches of seven, of which one rank has four and the other three."""
    data = load_data(recipe["data"], val_fraction=0.25)
    write_shards(data, tmp_path / "shards", images_per_shard=4)
    recipe |= {"data": str(tmp_path / "shards"), "num_workers": 2}
    whole = Job(tmp_path / "whole", {**recipe, "run_dir": str(tmp_path / "whole run")}, ranks=2)
    statuses, errors = whole.run()
    assert statuses == [0, 0], errors
    assert [(len(epoch), set(epoch.values())) for epoch in whole.seen()] == [(21, {1})] * 3

    stopped = Job(tmp_path / "two", recipe, ranks=2, kill=(4, signal.SIGTERM), victim=1)
    statuses, errors = stopped.run()
    assert statuses == [75, 75], errors
    assert [len(epoch) for epoch in stopped.seen()] == [21, 14]
    shutil.copytree(tmp_path / "run", tmp_path / "run of one")
    statuses, errors = stopped.run()
    assert statuses == [0, 0], errors
    assert "continuing" in errors
    assert "divided anew" not in errors
    assert stopped.seen() == whole.seen()
    assert_same(tmp_path / "run", tmp_path / "whole run")

    one = Job(tmp_path / "one", {**recipe, "run_dir": str(tmp_path / "run of one")})
    statuses, errors = one.run()
    assert statuses == [0], errors
    assert "an epoch with 2 processes, going on with 1: shards are divided anew" in " ".join(errors.split())
    assert [(len(epoch), set(epoch.values())) for epoch in one.seen()[1:]] == [(7, {1}), (21, {1})]
    steps = [[row["step"] for row in rows(tmp_path / name)] for name in ("run of one", "whole run")]
    assert steps[0] == steps[1]


@pytest.mark.slow
def test_wrong_input_ends_all_ranks_with_one_line(recipe: dict[str, Any], tmp_path: Path) -> None:
    statuses, errors = Job(tmp_path / "two", {**recipe, "data": str(tmp_path / "nowhere")}, ranks=2).run()
    assert statuses == [2, 2], errors
    assert "Traceback" not in errors
    assert "nowhere" in errors


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [2, 7, 8, 12])
def test_the_shares_of_a_batch_are_the_batch_with_its_pairs(batch_size: int, world_size: int) -> None:
    """Mixing pairs the first image with the last and so on; each pair is on one rank, at mirrored places."""

    def batches(rank: int, world_size: int) -> list[list[int]]:
        sampler = ShuffledBatches(30, batch_size, 0, rank=rank, world_size=world_size)
        return [[index for index, _ in batch] for batch in sampler]

    def pairs(batch: list[int]) -> set[tuple[int, int]]:
        return {(batch[i], batch[len(batch) // 2 * 2 - 1 - i]) for i in range(len(batch) // 2 * 2)}

    shares = [batches(rank, world_size) for rank in range(world_size)]
    for number, batch in enumerate(batches(0, 1)):
        parts = [share[number] for share in shares]
        assert sorted(index for part in parts for index in part) == sorted(batch)
        assert set.union(*(pairs(part) for part in parts)) == pairs(batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= 3


def test_a_single_process_needs_no_group() -> None:
    ranks = Ranks()
    assert ranks.is_first
    assert ranks.of_first(lambda: 3) == ranks.first_then_others(lambda: 3) == ranks.total(3) == ranks.highest(3) == 3


@pytest.mark.parametrize(
    ("others", "sharing", "machine_cores", "own_cores"),
    [
        ([(0, {0, 1}), (0, {0, 1})], 3, 2, 1),  # as torchrun starts them
        ([(0, {2, 3}), (0, {4, 5})], 1, 6, 2),  # as srun binds them
        ([(1, {0, 1}), (1, {0, 1})], 1, 6, 2),  # elsewhere
    ],
)
def test_cores_are_divided_among_the_processes_that_may_use_them(
    others: list[tuple[int, set[int]]],
    sharing: int,
    machine_cores: int,
    own_cores: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.setattr(ranks_module, "num_cores", lambda: 2)
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, *others])
    ranks = Ranks(world_size=3, local_world_size=3)
    assert _sharing(ranks, node=0) == sharing
    ranks = replace(ranks, sharing=sharing)
    assert (ranks.machine_cores, ranks.own_cores) == (machine_cores, own_cores)


def test_slurm_says_how_many_cores_a_task_has_that_is_not_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "num_cores", lambda: 64)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    ranks = Ranks(world_size=2, local_world_size=2, sharing=2)
    assert ranks.own_cores == 32
    ranks = replace(ranks, environment=SLURMEnvironment(auto_requeue=False))
    assert (ranks.machine_cores, ranks.own_cores) == (8, 4)


_NORMS = """
import sys, torch
from torch import distributed, nn
from sequencer2d.training.ranks import count_batch, share_batch_norms
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/meeting", rank=rank, world_size=2)
norm = nn.Sequential(nn.BatchNorm2d(3)).train()
norm.load_state_dict(torch.load(f"{sys.argv[2]}/state.pt", weights_only=True))
share_batch_norms(norm)
images = torch.load(f"{sys.argv[2]}/x.pt", weights_only=True)
first, counted = int(sys.argv[3]), int(sys.argv[3]) < 4
x = (images[[slice(0, first), slice(first, 4)][rank]] if counted or rank == 0 else torch.zeros(1, 3, 4, 5))
x.requires_grad_()
count_batch(norm, counted or rank == 0)
(norm(x).square().mul(torch.arange(1.0, 6)).sum() * (counted or rank == 0)).backward()
gradients = norm[0].weight.grad.clone()
distributed.all_reduce(gradients)
torch.save([x.grad, gradients, norm.state_dict()], f"{sys.argv[2]}/{rank}.pt")
distributed.destroy_process_group()  # else gloo's threads may still run when the other has gone
"""


@pytest.mark.parametrize("of_first", [1, 4])
def test_batch_norms_use_the_statistics_of_all_ranks(of_first: int, tmp_path: Path) -> None:
    """Of four images the first rank has one or all; then the blank image of the other has no part in them."""
    layer = nn.BatchNorm2d(3)
    norm = nn.Sequential(layer).train()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = torch.randn(4, 3, 4, 5, requires_grad=True)
    torch.save(norm.state_dict(), tmp_path / "state.pt")
    torch.save(x.detach(), tmp_path / "x.pt")
    processes = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", _NORMS, str(rank), str(tmp_path), str(of_first)])
        for rank in range(2)
    ]
    assert [process.wait(60) for process in processes] == [0, 0]
    norm(x).square().mul(torch.arange(1.0, 6)).sum().backward()
    (first, gradients, state), (second, _, other) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)
    )
    torch.testing.assert_close(torch.cat([first, second])[:4], x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, layer.weight.grad, rtol=1e-4, atol=1e-5)
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)
        assert torch.equal(state[name], other[name])
