"""Confines a process to the cores and the memory of a profile, by Linux control groups of version 1 or 2.

Where they cannot be used (no rights, no Linux) cores are kept by affinity, memory is not kept at all, and the result
says so. The memory limit counts what the kernel counts: anonymous pages, and pages of mapped files until it needs them
back. Not covered: slower cores, a slower memory, a GPU.

Sources: the kernel's admin-guide/cgroup-v1 (memory.rst, cpusets.rst) and admin-guide/cgroup-v2.rst.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PERIOD_US = 100_000  # of a CPU quota: the kernel's default
PROC = Path("/proc/self")


@dataclass(frozen=True)
class Confinement:
    """What a process is really kept to.

    cpus: where it may run; fewer than asked for where the machine has fewer.
    cores_enforced: whether it cannot leave them ("affinity" alone it could).
    memory_enforced: whether it is killed for taking more than memory_mib.
    """

    cores: int
    memory_mib: int
    cpus: tuple[int, ...]
    cores_enforced: bool
    memory_enforced: bool
    groups: tuple[Path, ...]

    def admit(self, pid: int) -> None:
        """Moves a process in, before it does anything: what it holds already is not counted.

        Raises:
            OSError: if it is gone.
        """
        for group in self.groups:
            (group / "cgroup.procs").write_text(str(pid), "ascii")
        if hasattr(os, "sched_setaffinity") and self.cpus:
            os.sched_setaffinity(pid, self.cpus)

    def killed(self) -> bool:
        """Whether a process was killed for the memory that it took."""
        for group in self.groups:
            for file, key in (("memory.events", "oom_kill"), ("memory.oom_control", "oom_kill")):
                fields = dict(line.split(maxsplit=1) for line in _read(group / file).splitlines() if " " in line)
                if int(fields.get(key, "0")):
                    return True
        return False

    def peak_mib(self) -> float | None:
        """The most that the kernel counted, mapped files too; None where it does not count."""
        for group in self.groups:
            for file in ("memory.peak", "memory.max_usage_in_bytes"):
                if text := _read(group / file).strip():
                    return int(text) / 2**20
        return None


@contextmanager
def confined(cores: int, memory_mib: int, *, proc: Path = PROC) -> Iterator[Confinement]:
    """Control groups for one process and its children; removed at the end, with whoever is still inside killed.

    Args:
        cores: CPU cores that it may use at a time; all of the machine's where it has fewer.
        memory_mib: the most memory that it may take.
        proc: where the kernel says which groups this process is in.
    """
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    cpus = tuple(available[:cores])
    groups, cores_enforced, memory_enforced = [], False, False
    try:
        for version, parent, controllers in _parents(proc):
            group = parent / f"smolport-{os.getpid()}-{time.monotonic_ns()}"
            if version == 2 and not _write(parent / "cgroup.subtree_control", f"+{' +'.join(sorted(controllers))}"):
                continue
            try:
                group.mkdir()
            except OSError:
                continue
            groups.append(group)
            if "memory" in controllers:
                memory_enforced = _limit_memory(group, version, memory_mib * 2**20)
            if "cpuset" in controllers:
                cores_enforced = _limit_cpus(group, version, parent, cpus)
            if "cpu" in controllers:
                _limit_share(group, version, len(cpus))
        yield Confinement(cores, memory_mib, cpus, cores_enforced, memory_enforced, tuple(groups))
    finally:
        for group in groups:
            _remove(group)


def _parents(proc: Path) -> Iterator[tuple[int, Path, set[str]]]:
    """(version, folder, controllers) of each group that this process is in and whose children may be limited."""
    wanted = {"memory", "cpuset", "cpu"}
    own = {}  # controllers -> path of this process's group below the hierarchy's root
    for line in _read(proc / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path
    for line in _read(proc / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        root, mount = before.split()[3:5]
        kind, _, options = [*after.split(maxsplit=2), "", ""][:3]
        if kind == "cgroup":
            for controllers, path in own.items():
                named = set(controllers.split(","))
                if named & wanted and named <= set(options.split(",")):
                    yield 1, _below(Path(mount), root, path), named & wanted
        elif kind == "cgroup2" and "" in own:
            parent = _below(Path(mount), root, own[""])
            if there := wanted & set(_read(parent / "cgroup.controllers").split()):
                yield 2, parent, there


def _below(mount: Path, root: str, path: str) -> Path:
    """The folder of a group; the mount's own where the path leads out of it, as in some containers."""
    relative = os.path.relpath(path, root)
    folder = mount / relative
    return folder if not relative.startswith("..") and folder.is_dir() else mount


def _limit_memory(group: Path, version: int, size_bytes: int) -> bool:
    limit, swap = {
        1: ("memory.limit_in_bytes", ("memory.memsw.limit_in_bytes", str(size_bytes))),
        2: ("memory.max", ("memory.swap.max", "0")),
    }[version]
    done = _write(group / limit, str(size_bytes))
    _write(group / swap[0], swap[1])  # absent where swap is not counted
    return done


def _limit_cpus(group: Path, version: int, parent: Path, cpus: tuple[int, ...]) -> bool:
    if version == 1:  # a new group of version 1 has no memory nodes, and nothing can run in it
        _write(group / "cpuset.mems", _read(parent / "cpuset.mems").strip())
    return _write(group / "cpuset.cpus", ",".join(map(str, cpus)))


def _limit_share(group: Path, version: int, cores: int) -> None:
    if version == 1:
        _write(group / "cpu.cfs_period_us", str(PERIOD_US))
        _write(group / "cpu.cfs_quota_us", str(cores * PERIOD_US))
    else:
        _write(group / "cpu.max", f"{cores * PERIOD_US} {PERIOD_US}")


def _remove(group: Path) -> None:
    for pid in _read(group / "cgroup.procs").split():
        try:
            os.kill(int(pid), 9)
        except ProcessLookupError:
            continue
    for _ in range(100):
        try:
            group.rmdir()  # fails while the kernel still counts a process that ended
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)
        else:
            return


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def _write(path: Path, text: str) -> bool:
    try:
        path.write_text(text, "ascii")
    except OSError:
        return False
    return True
