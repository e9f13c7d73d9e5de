"""Cores that others have kept back are not counted."""

import os
import shutil
import subprocess
import sys

import pytest

from sequencer2d.cores import num_cores

COUNT = f"{sys.executable} -c 'from sequencer2d.cores import num_cores; print(num_cores())'"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinities here")
def test_the_affinity_counts() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert num_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    "quota",
    [
        "echo '100000 100000' > cpu.max",
        "mkdir cpu; echo 50000 > cpu/cpu.cfs_quota_us; echo 100000 > cpu/cpu.cfs_period_us",
    ],
)
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0 or not shutil.which("unshare"), reason="mounts need root and unshare"
)
def test_the_quota_of_a_container_counts(quota: str) -> None:
    script = f"mount -t tmpfs none /sys/fs/cgroup && cd /sys/fs/cgroup && {{ {quota}; }} && {COUNT}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=False)
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip("this machine does not allow mounts")
    assert done.stdout.strip() == "1", done.stderr
