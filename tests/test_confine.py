"""A confined process has the cores and the memory that it is given, or the result says that it has not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from device_harness.confine import Confinement, confined

# waits to be admitted, then takes so many MiB and says where it may run
CHILD = """
import os, sys
sys.stdin.readline()
held = bytearray(int(sys.argv[1]) << 20)
for i in range(0, len(held), 4096):
    held[i] = 1
print(sorted(os.sched_getaffinity(0)))
"""


def run(confinement: Confinement, mib: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(mib)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        confinement.admit(process.pid)
        out, _ = process.communicate("go\n")
    return subprocess.CompletedProcess(command, process.returncode, out)


def test_a_process_runs_on_so_many_cores_and_within_its_memory() -> None:
    with confined(1, 256) as inside:
        done = run(inside, 100)
        assert done.returncode == 0
        assert done.stdout.strip() == str([inside.cpus[0]])
        assert not inside.killed()
        peak = inside.peak_mib()
    assert inside.memory_enforced == (peak is not None)
    assert peak is None or 100 < peak < 256
    assert not any(group.exists() for group in inside.groups)


def test_a_process_that_takes_more_is_killed_where_the_limit_is_enforced() -> None:
    with confined(1, 128) as inside:
        done = run(inside, 400)
        assert inside.killed() == inside.memory_enforced == (done.returncode == -9)


def test_more_cores_than_there_are_is_not_hidden() -> None:
    there = len(os.sched_getaffinity(0))
    with confined(there + 3, 512) as inside:
        assert (inside.cores, len(inside.cpus)) == (there + 3, there)


def test_without_control_groups_only_affinity_holds_and_the_result_says_so(tmp_path: Path) -> None:
    with confined(1, 64, proc=tmp_path) as inside:
        assert (inside.memory_enforced, inside.cores_enforced, inside.groups) == (False, False, ())
        done = run(inside, 100)
        assert (done.returncode, done.stdout.strip()) == (0, str([inside.cpus[0]]))
        assert inside.peak_mib() is None
        assert not inside.killed()


@pytest.mark.parametrize("version", [1, 2])
def test_what_is_written_is_what_the_kernel_of_each_version_wants(version: int, tmp_path: Path) -> None:
    """Plain files in place of the kernel's."""
    mount, proc = tmp_path / "mount", tmp_path / "proc"
    parent = mount / "app"
    parent.mkdir(parents=True)
    proc.mkdir()
    (parent / "cpuset.mems").write_text("0-1\n")
    (parent / "cgroup.controllers").write_text("cpuset cpu io memory pids" if version == 2 else "")
    mounts = {
        1: f"31 1 0:1 / {mount} rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuset,memory",
        2: f"31 1 0:1 / {mount} rw - cgroup2 cgroup2 rw",
    }
    (proc / "mountinfo").write_text("22 1 0:3 / /proc rw - proc proc rw\n" + mounts[version])
    (proc / "cgroup").write_text("5:name=systemd:/\n" + {1: "4:cpu,cpuset,memory:/app\n", 2: "0::/app\n"}[version])
    first = min(os.sched_getaffinity(0))
    wanted = {
        1: {
            "memory.limit_in_bytes": str(64 * 2**20),
            "memory.memsw.limit_in_bytes": str(64 * 2**20),
            "cpuset.mems": "0-1",
            "cpuset.cpus": str(first),
            "cpu.cfs_period_us": "100000",
            "cpu.cfs_quota_us": "100000",
        },
        2: {
            "memory.max": str(64 * 2**20),
            "memory.swap.max": "0",
            "cpuset.cpus": str(first),
            "cpu.max": "100000 100000",
        },
    }[version]
    with confined(1, 64, proc=proc) as inside:
        (group,) = inside.groups
        assert group.parent == parent
        assert {file.name: file.read_text() for file in group.iterdir()} == wanted
        assert (inside.memory_enforced, inside.cores_enforced) == (True, True)
        if version == 2:
            assert (parent / "cgroup.subtree_control").read_text() == "+cpu +cpuset +memory"
        (group / "memory.events").write_text("low 0\noom_kill 1\n")
        (group / ("memory.peak" if version == 2 else "memory.max_usage_in_bytes")).write_text("1048576\n")
        assert inside.killed()
        assert inside.peak_mib() == 1
        for file in group.iterdir():
            file.unlink()
