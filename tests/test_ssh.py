"""A device behind a real sshd on loopback: what is lost midway is a failed run, and says why."""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from device_harness.device import DeviceError
from device_harness.run import main, run_on_device
from device_harness.ssh import SshDevice
from device_harness.testbed import SshBed, find_sshd, ssh_bed
from device_harness.transfer import read_runner
from runtimes.bundle import read_bundle
from runtimes.native.build import FOLDER, PROGRAM, Built
from runtimes.native.packages import emulator
from tests.fake_runner import make_runner
from tests.faults import QUICK, alive, lose_in_a_push, lose_in_a_run, run_quickly, small_disk


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshBed]:
    for program in ("ssh", "ssh-keygen"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    if (sshd := find_sshd()) is None:
        pytest.skip("no sshd is installed, nor in build/testbed: make test-devices")
    folder = tmp_path_factory.mktemp("ssh")
    folder.chmod(0o700)
    with ssh_bed(folder, sshd) as found:
        try:
            SshDevice(found.address, config=found.config).close()
        except DeviceError:
            if "account is locked" in (found.config.parent / "sshd.log").read_text():
                pytest.skip("sshd lets nobody in whose password is locked, as this user's is")
            raise
        yield found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "it's a device"


@pytest.fixture
def device(bed: SshBed, root: Path) -> Iterator[SshDevice]:
    with closing(SshDevice(f"{bed.address}{root}", config=bed.config)) as found:
        yield found


def test_a_bundle_is_pushed_once_run_and_judged(
    bed: SshBed, root: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, out = make_runner(tmp_path / "runner"), tmp_path / "lines.jsonl"
    arguments = [str(tiny_bundle), "--device", f"{bed.address}{root}", "--ssh-config", str(bed.config)]
    arguments += ["--runner", str(program), "--out", str(out), "--decode-at", "8", "--prefill-tokens", "16"]
    assert main(arguments) == 0, capsys.readouterr()
    assert main(arguments) == 0, capsys.readouterr()
    first, second = map(json.loads, out.read_text().splitlines())
    assert first["device"]["pushed"]["bundle"][-1] == "manifest.json"
    assert second["device"]["pushed"]["bundle"] == []
    assert not first["simulated"]
    assert first["phases"]["decode"]["samples_ms"]


def test_the_native_runner_runs_there(device: SshDevice, native: Built, tiny_bundle: Path) -> None:
    outcome = run_quickly(tiny_bundle, device, read_runner(native.program))
    assert outcome.parity.passed
    assert outcome.record["execution"] == "native"


@pytest.mark.device
def test_an_arm64_runner_runs_there_under_emulation(device: SshDevice, tiny_bundle: Path) -> None:
    cache = FOLDER / "cache"
    program, sysroot = FOLDER / "linux-arm64" / PROGRAM, cache / "cross" / "usr" / "aarch64-linux-gnu"
    qemu = emulator(cache)
    if qemu is None or not program.is_file():
        pytest.skip(
            "no runner for ARM64 or no qemu 10: python -m runtimes.native.build --target linux-arm64 --emulator"
        )
    words = [str(qemu.absolute()), "-cpu", "max", "-L", str(sysroot.absolute())]
    runner = read_runner(program, words)
    with pytest.raises(DeviceError, match="the runner is for aarch64"):
        run_on_device(read_bundle(tiny_bundle), device, read_runner(program), QUICK)
    outcome = run_on_device(read_bundle(tiny_bundle), device, runner, replace(QUICK, execution="qemu-user"))
    assert outcome.parity.passed
    assert outcome.result.machine.architecture == "aarch64"
    assert "i8mm" in outcome.result.machine.cpu_features
    assert (outcome.record["phases"], outcome.record["peak_rss_mib"]) == ({}, None)


def test_a_connection_that_is_cut_in_a_run_is_a_failed_run_and_the_next_one_ends_what_it_left(
    bed: SshBed, device: SshDevice, root: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    def cut() -> None:
        bed.kill_sessions()

    error, left = lose_in_a_run(tiny_bundle, device, root, cut, tmp_path)
    assert error.reason == "offline", error
    assert "lost in phase verify" in str(error)
    with closing(SshDevice(device.name, config=bed.config)) as again:
        assert run_quickly(tiny_bundle, again, read_runner(make_runner(tmp_path / "runner"))).parity.passed
    assert not alive(left)


def test_a_connection_that_is_cut_in_a_push_leaves_no_whole_file(
    bed: SshBed, device: SshDevice, root: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    error = lose_in_a_push(tiny_bundle, device, root, bed.kill_sessions, tmp_path)
    assert error.reason == "offline", error
    assert [path.name for path in (root / "runner").iterdir()] == ["smolport-run"]
    assert not list((root / "bundle").iterdir())
    with closing(SshDevice(device.name, config=bed.config)) as again:
        assert run_quickly(tiny_bundle, again, read_runner(make_runner(tmp_path / "runner"))).parity.passed


def test_a_full_disk_is_named_and_has_room_again(bed: SshBed, tiny_bundle: Path, tmp_path: Path) -> None:
    sshd, keys = find_sshd(), tmp_path / "keys"
    assert sshd is not None
    keys.mkdir(0o700)
    # a server of its own: one that is in a mount namespace sees what was mounted before it started
    with small_disk(tmp_path / "small", tiny_bundle) as folder, ssh_bed(keys, sshd) as own:
        with (
            closing(SshDevice(f"{own.address}{folder}/d", config=own.config)) as device,
            pytest.raises(DeviceError, match="No space left") as caught,
        ):
            run_quickly(tiny_bundle, device, read_runner(make_runner(tmp_path / "runner")))
        assert caught.value.reason == "full disk"
        assert not list((folder / "d" / "incoming").iterdir())


def test_a_host_that_is_not_there_or_another_one_is_offline(bed: SshBed, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="refused") as caught:
        SshDevice("ssh://127.0.0.1:1", config=bed.config)
    assert caught.value.reason == "offline"
    other = tmp_path / "config"
    stranger = tmp_path / "known"
    key = bed.config.parent / "user.pub"
    host = (bed.config.parent / "known").read_text().split()[0]
    stranger.write_text(f"{host} {' '.join(key.read_text().split()[:2])}\n")
    other.write_text(bed.config.read_text().replace(str(bed.config.parent / "known"), str(stranger)))
    with pytest.raises(DeviceError, match=r"(?i)host key verification failed|identification has changed"):
        SshDevice(bed.address, config=other)


def test_a_folder_that_cannot_be_made_is_said(bed: SshBed, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        closing(SshDevice(f"{bed.address}{tmp_path}/file/d", config=bed.config)) as device,
        pytest.raises(DeviceError, match=r"making .*Not a directory") as caught,
    ):
        run_quickly(tiny_bundle, device, read_runner(make_runner(tmp_path / "runner")))
    assert caught.value.reason == "failed"
