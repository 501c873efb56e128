"""Faults that happen to a real device while something is under way, for the tests of its transports."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from device_harness.device import Device, DeviceError
from device_harness.record import Job
from device_harness.run import Outcome, Setting, run_on_device
from device_harness.transfer import Runner, read_runner
from runtimes.bundle import read_bundle
from tests.fake_runner import make_runner

QUICK = Setting(Job(), {}, measure=False, deadline_s=60)
SPARSE = 400 << 20  # bytes that take a while to send


def run_quickly(bundle: Path, device: Device, runner: Runner) -> Outcome:
    """One run without measuring."""
    return run_on_device(read_bundle(bundle), device, runner, QUICK)


@contextmanager
def when(happened: Callable[[], bool], act: Callable[[], object]) -> Iterator[None]:
    """Does something from another thread as soon as something has happened; it must happen inside."""
    done = threading.Event()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            if happened():
                act()
                done.set()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert done.is_set(), "what was waited for did not happen"


def lose_in_a_run(
    bundle: Path, device: Device, root: Path, cut: Callable[[], object], folder: Path
) -> tuple[DeviceError, int]:
    """Cuts the connection while the runner runs; the error, and the number of the process that it left."""
    seen = folder / "seen"
    runner = read_runner(make_runner(folder / "sleeping", "sleeps", seen=str(seen)))
    with when(seen.exists, cut), pytest.raises(DeviceError) as caught:
        run_quickly(bundle, device, runner)
    (pid,) = (root / "runs").glob("*/pid")
    return caught.value, int(pid.read_text())


def lose_in_a_push(bundle: Path, device: Device, root: Path, cut: Callable[[], object], folder: Path) -> DeviceError:
    """Cuts the connection while a large file is under way."""
    runner = make_runner(folder / "large", "library missing")
    with (runner.parent / "libfake.so.1").open("wb") as file:
        file.truncate(SPARSE)

    def under_way() -> bool:
        sizes = [path.stat().st_size for path in (root / "incoming").glob("0")]
        return any(1 << 20 < size < SPARSE for size in sizes)

    with when(under_way, cut), pytest.raises(DeviceError) as caught:
        run_quickly(bundle, device, read_runner(runner))
    return caught.value


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and is not waited for does not."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


@contextmanager
def small_disk(folder: Path, bundle: Path) -> Iterator[Path]:
    """A file system that half of a bundle fits into."""
    size = sum(path.stat().st_size for path in bundle.rglob("*")) // 2
    if os.geteuid() != 0:
        pytest.skip("a full disk takes root: a small file system is mounted")
    folder.mkdir()
    assert os.system(f"mount -t tmpfs -o size={size} none '{folder}'") == 0
    try:
        yield folder
    finally:
        os.system(f"umount -l '{folder}'")
