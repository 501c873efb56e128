"""A real adb daemon in a network namespace, with two versions of adb: what is lost midway is a failed run."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_harness.adb import AdbDevice
from device_harness.device import DeviceError, run_command
from device_harness.list import main as list_main
from device_harness.run import main
from device_harness.testbed import PORT, AdbBed, adb_bed, fetched, obstacle
from device_harness.transfer import read_runner
from runtimes.native.build import Built
from tests.fake_runner import make_runner
from tests.faults import alive, lose_in_a_push, lose_in_a_run, run_quickly, small_disk, when

pytestmark = pytest.mark.device


@pytest.fixture(scope="module", params=["own", "new"])
def bed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdbBed]:
    if reason := obstacle():
        pytest.skip(f"no fake Android device: {reason}")
    if not fetched():
        pytest.skip("no fake Android device: its packages are not there (python -m device_harness.testbed)")
    with adb_bed(tmp_path_factory.mktemp("adb"), request.param) as found:
        yield found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "it's a device"


@pytest.fixture
def device(bed: AdbBed, root: Path) -> AdbDevice:
    return AdbDevice(bed.serial, root=str(root), program=str(bed.client))


def test_a_bundle_is_pushed_once_run_and_judged(
    bed: AdbBed, root: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, out = make_runner(tmp_path / "runner"), tmp_path / "lines.jsonl"
    arguments = [str(tiny_bundle), "--device", f"adb:{bed.serial}{root}", "--adb", str(bed.client)]
    arguments += ["--runner", str(program), "--out", str(out), "--decode-at", "8", "--prefill-tokens", "16"]
    assert main(arguments) == 0, capsys.readouterr()
    assert main(arguments) == 0, capsys.readouterr()
    first, second = map(json.loads, out.read_text().splitlines())
    assert first["device"]["pushed"]["bundle"][-1] == "manifest.json"
    assert second["device"]["pushed"]["bundle"] == []
    if not list(Path("/sys/class/thermal").glob("thermal_zone*/temp")):
        assert first["device"]["temperatures"]["before"] == {
            "source": "thermalservice",
            "celsius": {"CPU0": 31.5, "SKIN": 29.2},
        }


def until_lost(bed: AdbBed) -> None:
    """Uses a device until it is seen to be gone."""
    while True:
        AdbDevice(bed.serial, program=str(bed.client)).shell("sleep 0.2", deadline_s=5)


def test_a_device_is_listed_with_its_state(bed: AdbBed, capsys: pytest.CaptureFixture[str]) -> None:
    assert list_main(["--adb", str(bed.client)]) == 0
    assert f"adb:{bed.serial}\tdevice" in capsys.readouterr().out
    bed.kill()
    try:
        with pytest.raises(DeviceError, match=r"offline|not found") as caught:
            until_lost(bed)
        assert caught.value.reason == "offline"
        assert list_main(["--adb", str(bed.client)]) == 0
        assert f"adb:{bed.serial}\tdevice" not in capsys.readouterr().out
    finally:
        bed.start()


def test_the_native_runner_runs_there(device: AdbDevice, native: Built, tiny_bundle: Path) -> None:
    assert run_quickly(tiny_bundle, device, read_runner(native.program)).parity.passed


def test_a_file_whose_folder_cannot_be_is_said(device: AdbDevice, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DeviceError, match="adb push to") as caught:
        device.push(tmp_path / "file", str(tmp_path / "file" / "below"), deadline_s=20)
    assert caught.value.reason == "failed"


def test_what_is_said_and_what_a_command_ends_with_come_apart(device: AdbDevice) -> None:
    said = device.shell("printf 'a\\nb'; echo c >&2; exit 9", deadline_s=20)
    assert (said.code, said.stdout, said.stderr) == (9, b"a\nb", ("c",))


def test_a_daemon_that_dies_in_a_run_is_a_failed_run_whatever_adb_returns(
    bed: AdbBed, device: AdbDevice, root: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    try:
        error, left = lose_in_a_run(tiny_bundle, device, root, bed.kill, tmp_path)
    finally:
        bed.start()
    assert error.reason == "offline", error
    assert "lost in phase verify" in str(error)
    assert run_quickly(tiny_bundle, device, read_runner(make_runner(tmp_path / "runner"))).parity.passed
    assert not alive(left)


def test_adb_itself_returns_0_for_a_command_that_was_cut(bed: AdbBed, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    try:
        with when(seen.exists, bed.kill):
            command = [str(bed.client), "-s", bed.serial, "shell", "-T", f"touch '{seen}'; exec sleep 60"]
            code, _, _ = run_command(command, 30)
    finally:
        bed.start()
    assert code == 0  # adb 29 and 34; 36 returns 255


def test_a_daemon_that_dies_in_a_push_leaves_no_whole_file(
    bed: AdbBed, device: AdbDevice, root: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    try:
        error = lose_in_a_push(tiny_bundle, device, root, bed.kill, tmp_path)
    finally:
        bed.start()
    assert error.reason == "offline", error
    assert [path.name for path in (root / "runner").iterdir()] == ["smolport-run"]
    shutil.rmtree(tmp_path / "large")
    assert run_quickly(tiny_bundle, device, read_runner(make_runner(tmp_path / "runner"))).parity.passed


def test_a_full_disk_is_named_and_has_room_again(bed: AdbBed, tiny_bundle: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", tiny_bundle) as folder:
        device = AdbDevice(bed.serial, root=f"{folder}/d", program=str(bed.client))
        with pytest.raises(DeviceError) as caught:
            run_quickly(tiny_bundle, device, read_runner(make_runner(tmp_path / "runner")))
        assert caught.value.reason == "full disk"
        assert not list((folder / "d" / "incoming").iterdir())


def test_the_daemon_is_heard_in_its_namespace_alone(bed: AdbBed) -> None:
    assert "device" in bed.adb("devices")
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", PORT)) != 0
