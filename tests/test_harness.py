"""A bundle on a device: what is pushed, what is believed, what a fault becomes."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from benchmarks.records import read_runs
from benchmarks.report import main as report
from device_harness.adb import Listed, parse_devices
from device_harness.device import MOST_ANSWER, Device, DeviceError, Said, one_line, pull, run_command
from device_harness.list import main as list_main
from device_harness.local import LocalDevice
from device_harness.no_vsock import MACHINES
from device_harness.profiles import Profile, find_profile
from device_harness.record import Job, over
from device_harness.result import PhaseFound
from device_harness.run import Outcome, Setting, append_line, main, open_device, run_on_device
from device_harness.ssh import parse_address
from device_harness.thermal import parse_thermalservice, parse_zones
from device_harness.transfer import elf_machine, parse_digests, read_runner
from runtimes.bundle import read_bundle
from runtimes.manifest import BundleError
from runtimes.native.build import Built
from runtimes.verify import verify
from tests.fake_runner import ROOT, make_runner
from tests.runs import run_line, write_lines

QUICK = Setting(Job(), {}, measure=False, deadline_s=60)


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return LocalDevice(tmp_path / "a device")


@pytest.fixture
def attempt(tiny_bundle: Path, device: Device, tmp_path: Path) -> Callable[..., Outcome]:
    """Runs the tiny bundle with a runner that has a fault."""

    def run(fault: str = "", setting: Setting = QUICK, profile: Profile | None = None, **settings: Any) -> Outcome:
        runner = read_runner(make_runner(tmp_path / "runner", fault, **settings))
        return run_on_device(read_bundle(tiny_bundle), device, runner, setting, profile)

    return run


def pushed(outcome: Outcome) -> list[str]:
    found: list[str] = outcome.record["device"]["pushed"]["bundle"]
    return found


def decoder_data(bundle: Path) -> Path:
    """The file of the decoder's weights."""
    (path,) = (bundle / "onnx").glob("decoder_model_merged*_data")
    return path


def test_a_run_is_right_and_leaves_nothing_but_the_bundle(attempt: Callable[..., Outcome], device: Device) -> None:
    outcome = attempt()
    assert outcome.parity.passed
    assert outcome.parity.cases > 0
    root = Path(device.root)
    assert not list((root / "runs").iterdir())
    assert not list((root / "incoming").iterdir())
    read_bundle(root / "bundle")


def test_only_what_differs_is_pushed_and_the_manifest_last(
    attempt: Callable[..., Outcome], tiny_bundle: Path, device: Device
) -> None:
    first = pushed(attempt())
    files = {p.relative_to(tiny_bundle).as_posix() for p in tiny_bundle.rglob("*") if p.is_file()}
    assert set(first) == files
    assert first[-1] == "manifest.json"
    assert pushed(attempt()) == []
    there = Path(device.root) / "bundle"
    weights = decoder_data(there)
    before = weights.stat()
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 0x10  # a nibble, and the time of the change is taken back
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    (there / "extra file").touch()
    (there / "config.json").unlink()
    assert pushed(attempt()) == ["config.json", weights.relative_to(there).as_posix(), "manifest.json"]
    read_bundle(there)


class Between(LocalDevice):
    """A device on which something happens once, before the runner starts."""

    def __init__(self, root: Path, happens: Callable[[Path], None]) -> None:
        super().__init__(root)
        self._happens = happens

    def shell(
        self,
        script: str,
        *,
        deadline_s: float,
        sink: BinaryIO | None = None,
        most_bytes: int = MOST_ANSWER,
        on_line: Callable[[str], None] | None = None,
    ) -> Said:
        if "--nonce" in script:
            self._happens(Path(self.root))
        return super().shell(script, deadline_s=deadline_s, sink=sink, most_bytes=most_bytes, on_line=on_line)


def spoil(root: Path) -> None:
    """Flips a nibble of what was pushed; the scales, so that a runner that does not look computes something else."""
    path = decoder_data(root / "bundle")
    data = bytearray(path.read_bytes())
    data[-2] ^= 0x40
    path.write_bytes(data)


def test_a_nibble_flipped_after_the_push_is_refused_by_the_runner(tiny_bundle: Path, tmp_path: Path) -> None:
    runner = read_runner(make_runner(tmp_path / "runner"))
    with pytest.raises(DeviceError, match=r"failed|refused.*content has changed") as caught:
        run_on_device(read_bundle(tiny_bundle), Between(tmp_path / "d", spoil), runner, QUICK)
    assert "content has changed" in str(caught.value)


def test_the_native_runner_measures_each_phase_and_refuses_a_flipped_nibble(
    native: Built, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle, runner = read_bundle(tiny_bundle), read_runner(native.program)
    setting = Setting(Job(tiles=1, prefill_tokens=16, decode_at=8, decode_tokens=4, repeats=2), {}, deadline_s=60)
    device = LocalDevice(tmp_path / "d")
    outcome = run_on_device(bundle, device, runner, setting)
    assert outcome.parity.passed
    assert outcome.parity.logits_error == pytest.approx(verify(bundle).logits_error, rel=1e-6)
    phases = outcome.result.phases
    assert {name: len(phase.samples_ms) for name, phase in phases.items()} == {
        "verify": 1,
        "load": 1,
        "image": 2,
        "prefill": 2,
        "decode": 4,
    }
    assert all(phase.peak_rss_mib is None or phase.peak_rss_mib > 1 for phase in phases.values())
    assert outcome.record["device"]["pushed"]["runner"] == ["smolport-run", "libonnxruntime.so.1"]
    again = run_on_device(bundle, device, runner, setting)
    assert again.record["device"]["pushed"] == {"runner": ["smolport-run"], "bundle": []}
    with pytest.raises(DeviceError, match=decoder_data(tiny_bundle).name) as caught:
        run_on_device(bundle, Between(tmp_path / "d", spoil), runner, setting)
    assert caught.value.reason == "refused"


def test_weights_changed_under_a_runner_that_does_not_look_are_seen_in_the_arrays(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    def scale(root: Path) -> None:
        path = decoder_data(root / "bundle")
        data = np.frombuffer(path.read_bytes(), np.uint8).copy()
        data[len(data) // 4 : len(data) // 2] ^= 0x88
        path.write_bytes(data.tobytes())

    runner = read_runner(make_runner(tmp_path / "runner", "unchecked"))
    outcome = run_on_device(read_bundle(tiny_bundle), Between(tmp_path / "d", scale), runner, QUICK)
    assert not outcome.parity.passed
    assert any("relative error of logits" in str(fault) for fault in outcome.parity.faults)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("nan", "relative error of logits is inf"),
        ("wrong features", "relative error of image features is 0.5"),
        ("pixels", "pixels is different from the reference"),
        ("tokens", "by its own logits"),
    ],
)
def test_wrong_arrays_are_faults(fault: str, says: str, attempt: Callable[..., Outcome]) -> None:
    outcome = attempt(fault)
    assert not outcome.parity.passed
    assert any(says in str(one) for one in outcome.parity.faults), outcome.parity.faults


@pytest.mark.parametrize(
    ("fault", "reason", "says"),
    [
        ("no result", "failed", "left no result.json.sha256"),
        ("refuses", "refused", "it cannot be used"),
        ("killed", "killed", "in phase verify ended with 137"),
        ("full", "full disk", "No space left"),
        ("chatter", "bad result", "sent more than"),
        ("digest", "bad result", "result.json.sha256 says"),
        ("flips", "bad result", "result.json has SHA-256"),
        ("truncated", "bad result", "outputs: size is"),
        ("truncated and said", "bad result", "is truncated"),
        ("huge", "bad result", "sent more than"),
        ("huge and said", "bad result", "sent more than"),
        ("shape", "bad result", "want F32"),
        ("extra array", "bad result", "not asked for: ../../etc/passwd"),
        ("path", "bad result", "is no path, size and sha256"),
    ],
)
def test_a_run_that_is_not_whole_is_no_run(fault: str, reason: str, says: str, attempt: Callable[..., Outcome]) -> None:
    with pytest.raises(DeviceError, match=says) as caught:
        attempt(fault)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nonce", "0" * 32),
        ("nonce", None),
        ("schema", 2),
        ("complete", False),
        ("payload_digest", "0" * 64),
        ("execution", "qemu-user"),
        ("threads", -1),
        ("threads", True),
        ("outputs", {"path": "../x", "size": 1, "sha256": ""}),
        ("engine", []),
        ("cases", []),
        ("cases", [3]),
        ("phases", {"load": {"samples_ms": [-1], "cpu_s": 0, "peak_rss_mib": None}}),
        ("phases", {"load": {"samples_ms": [], "cpu_s": 0, "peak_rss_mib": None}}),
        ("phases", {"load": {"samples_ms": [1e300], "cpu_s": 0, "peak_rss_mib": None}}),
        ("phases", {"\x1b[2J": {}}),
        ("machine", {"architecture": "x", "cpu_features": [1]}),
    ],
)
def test_a_field_of_a_result_that_is_not_as_agreed_is_named(
    field: str, value: Any, attempt: Callable[..., Outcome]
) -> None:
    with pytest.raises(DeviceError, match=field) as caught:
        attempt(changed={field: value})
    assert caught.value.reason == "bad result"
    assert str(caught.value).isprintable()


def test_an_earlier_runs_result_is_none_of_this_run(
    attempt: Callable[..., Outcome], tiny_bundle: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "earlier"

    class Keeps(LocalDevice):
        def shell(self, script: str, **how: Any) -> Said:
            if script.startswith("rm -rf") and "runs" in script:
                shutil.copytree(next((Path(self.root) / "runs").iterdir()) / "out", kept)
            return super().shell(script, **how)

    runner = read_runner(make_runner(tmp_path / "runner"))
    run_on_device(read_bundle(tiny_bundle), Keeps(tmp_path / "other"), runner, QUICK)
    assert (kept / "result.json.sha256").is_file()
    with pytest.raises(DeviceError, match="nonce is") as caught:
        attempt("stale", earlier=str(kept))
    assert caught.value.reason == "bad result"


def test_what_a_run_did_not_end_in_time_is_ended(
    attempt: Callable[..., Outcome], device: Device, tmp_path: Path
) -> None:
    setting = Setting(Job(), {}, measure=False, deadline_s=3)
    with pytest.raises(DeviceError, match="lost in phase verify") as caught:
        attempt("sleeps", setting, seen=str(tmp_path / "seen"))
    assert caught.value.reason == "timed out"
    (pid,) = (Path(device.root) / "runs").glob("*/pid")
    until = time.monotonic() + 10
    while Path(f"/proc/{int(pid.read_text())}/cmdline").is_file() and time.monotonic() < until:
        if not Path(f"/proc/{int(pid.read_text())}/cmdline").read_bytes():
            break  # dead, and not waited for yet
        time.sleep(0.05)
    assert time.monotonic() < until
    attempt()


class Cuts(LocalDevice):
    """A device whose connection ends in the middle of a file."""

    def __init__(self, root: Path, name: str, whole: bool) -> None:
        super().__init__(root)
        self._cut, self._whole = name, whole

    def push(self, file: Path, path: str, *, deadline_s: float) -> None:
        if file.name != self._cut:
            super().push(file, path, deadline_s=deadline_s)
            return
        Path(path).write_bytes(file.read_bytes()[:1000])
        if not self._whole:
            raise DeviceError("offline", "the cable was pulled")


@pytest.mark.parametrize("quietly", [False, True], ids=["said", "silent"])
def test_a_cut_push_leaves_nothing_that_looks_whole(
    quietly: bool, tiny_bundle: Path, tmp_path: Path, attempt: Callable[..., Outcome], device: Device
) -> None:
    runner = read_runner(make_runner(tmp_path / "runner"))
    cutting = Cuts(Path(device.root), decoder_data(tiny_bundle).name, quietly)
    with pytest.raises(DeviceError, match="did not arrive whole" if quietly else "cable"):
        run_on_device(read_bundle(tiny_bundle), cutting, runner, QUICK)
    there = Path(device.root) / "bundle"
    assert not (there / "manifest.json").exists()
    with pytest.raises(BundleError):
        read_bundle(there)
    assert attempt().parity.passed


def test_libraries_are_sent_where_the_program_does_not_run_without(
    tiny_bundle: Path, tmp_path: Path, device: Device
) -> None:
    program = make_runner(tmp_path / "runner", "library missing")
    (tmp_path / "libfake.so.1.32.0").write_bytes(b"a library")
    (tmp_path / "runner" / "libfake.so.1").symlink_to(tmp_path / "libfake.so.1.32.0")
    bundle, runner = read_bundle(tiny_bundle), read_runner(program)
    assert run_on_device(bundle, device, runner, QUICK).record["device"]["pushed"]["runner"] == [
        "smolport-run",
        "libfake.so.1",
    ]
    assert (Path(device.root) / "runner" / "libfake.so.1").read_bytes() == b"a library"
    again = run_on_device(bundle, device, runner, QUICK)
    assert again.record["device"]["pushed"]["runner"] == ["smolport-run"]


def test_a_folder_that_is_not_the_harnesss_is_left_alone(
    attempt: Callable[..., Outcome], device: Device, tmp_path: Path
) -> None:
    mine = Path(device.root) / "runs" / "mine"
    mine.mkdir(parents=True)
    with pytest.raises(DeviceError, match="holds files that are not the harness's") as caught:
        attempt()
    assert caught.value.reason == "refused"
    assert [p.name for p in Path(device.root).rglob("*")] == ["runs", "mine"]


def test_a_runner_for_another_cpu_is_refused_unless_an_emulator_runs_it(
    tiny_bundle: Path, device: Device, tmp_path: Path
) -> None:
    program = tmp_path / "foreign"
    number = 183 if os.uname().machine == "x86_64" else 62
    program.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(11) + number.to_bytes(2, "little") + bytes(44))
    assert elf_machine(program) in ("aarch64", "x86_64")
    with pytest.raises(DeviceError, match=r"the runner is for (aarch64|x86_64)") as caught:
        run_on_device(read_bundle(tiny_bundle), device, read_runner(program), QUICK)
    assert caught.value.reason == "refused"


def test_an_emulated_run_states_no_time_and_no_memory(
    tiny_bundle: Path, device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, out = make_runner(tmp_path / "runner"), tmp_path / "lines.jsonl"
    arguments = [str(tiny_bundle), "--device", f"local:{device.root}", "--runner", str(program)]
    assert main([*arguments, "--emulator", "env A=b", "--out", str(out)]) == 0
    assert "emulated: no time and no memory is stated" in capsys.readouterr().out
    (record,) = map(json.loads, out.read_text().splitlines())
    assert record["execution"] == "qemu-user"
    assert (record["phases"], record["medians_ms"], record["peak_rss_mib"]) == ({}, {}, None)
    assert main([*arguments, "--emulator", "env A=b", "--execution", "native"]) == 2
    program = make_runner(tmp_path / "runner", "times")
    assert main([*arguments, "--execution", "qemu-user"]) == 1
    assert "an emulated run states times" in capsys.readouterr().err


def test_the_command_measures_within_a_profile_and_a_report_takes_its_line(
    tiny_bundle: Path, device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, out = make_runner(tmp_path / "runner"), tmp_path / "lines.jsonl"
    limits = "\n[p.limits]\nload_ms = 1\nfirst_token_ms = 1\ntoken_ms = 1000\n"
    head = '[p]\ntitle = "P"\nkind = "laptop"\ntarget = "onnx"\ncores = 2\nmemory_mib = 4096\nengine = "onnxruntime"\n'
    sources = '\n[p.sources]\ncores = "a"\nmemory_mib = "b"\nlimits = "c"\n'
    own = tmp_path / "own.toml"
    options = '\n[p.options]\n"mlas.disable_kleidiai" = "1"\n'
    own.write_text(head + "tiles = 1\ncontext = 64\n" + limits + sources + options)
    arguments = [str(tiny_bundle), "--device", f"local:{device.root}", "--runner", str(program), "--out", str(out)]
    arguments += ["--decode-at", "8", "--prefill-tokens", "16"]
    assert main([*arguments, "--profile", str(own), "--json"]) == 1
    printed = capsys.readouterr()
    assert "over the profile's limits: load_ms: 1.5, at most 1" in printed.err
    assert "not covered: cutting images into tiles and turning a chat into token ids" in printed.out
    assert "first_token_ms" in printed.out
    assert "\x1b" not in printed.out
    told = json.loads(printed.out.splitlines()[-1])
    assert told["passed"]
    assert told["job"]["options"] == {"mlas.disable_kleidiai": "1"}
    assert main(arguments) == 0
    assert len(out.read_text().splitlines()) == 2
    first, second = read_runs(out)
    assert first.setting.profile == "p"
    assert first.setting.simulated
    assert second.setting.profile == "none"
    assert not second.setting.simulated
    assert first.phases["decode"].samples_ms == (1.5, 1.0, 2.5)
    assert [name for _, name in first.starts][:2] == ["verify", "load"]
    assert report([str(out), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "on profile p: over load" in text
    assert "ONNX Runtime 1.32.0" in text
    assert "Python ," not in text


def test_an_emulated_run_is_in_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = write_lines(tmp_path / "lines.jsonl", [run_line(execution="qemu-user")])
    assert report([str(lines), "--out", str(tmp_path / "report")]) == 2
    assert "line 1: execution is 'qemu-user', want a run that has times" in capsys.readouterr().err


def test_nothing_is_written_for_a_run_that_failed(
    tiny_bundle: Path, device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lines.jsonl"
    arguments = [str(tiny_bundle), "--device", f"local:{device.root}", "--out", str(out), "--json", "--no-measure"]
    for fault in ("killed", "nan"):
        assert main([*arguments, "--runner", str(make_runner(tmp_path / "runner", fault))]) == 1
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert told["passed"] is False
    assert not out.exists()


def test_what_cannot_be_used_is_refused_before_anything_is_pushed(
    tiny_bundle: Path, tiny_ios_bundle: Path, device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = str(make_runner(tmp_path / "runner"))
    local = ["--device", f"local:{device.root}", "--runner", program]
    for arguments, message in (
        ([str(tmp_path / "none"), *local], "not a folder"),
        ([str(tiny_ios_bundle), *local], "iOS is not there yet"),
        ([str(tiny_bundle), *local, "--profile", "iphone-15-pro"], "profile iphone-15-pro takes coreml"),
        ([str(tiny_bundle), *local, "--decode-at", "1000000"], "tokens are to be measured"),
        ([str(tiny_bundle), *local, "--repeats", "0"], "--repeats is 0"),
        ([str(tiny_bundle), "--device", "usb"], "want local, ssh://"),
        ([str(tiny_bundle), "--device", "adb:-s"], "is no serial number"),
        ([str(tiny_bundle), "--device", "ssh://-oProxyCommand=x"], "is no address"),
        ([str(tiny_bundle), "--device", "local", "--runner", str(tmp_path / "no")], "the runner is missing"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not Path(device.root).exists()


def test_a_device_that_floods_or_hangs_is_given_up() -> None:
    with pytest.raises(DeviceError, match="sent more than 1,000 bytes"):
        run_command(["sh", "-c", "yes"], 10, most_bytes=1000)
    began = time.monotonic()
    with pytest.raises(DeviceError, match="not done after") as caught:
        run_command(["sh", "-c", "sleep 60 & sleep 60"], 0.3)
    assert caught.value.reason == "timed out"
    assert time.monotonic() - began < 5
    with pytest.raises(DeviceError, match="cannot be run"):
        run_command(["no such program"], 1)


def test_a_command_that_ends_without_its_word_did_not_end(device: Device) -> None:
    with pytest.raises(DeviceError, match="the connection ended before") as caught:
        device.shell("kill -9 $$", deadline_s=5)
    assert caught.value.reason == "offline"
    assert device.shell("exit 7", deadline_s=5).code == 7
    assert device.shell("printf abc; echo no end >&2; printf x >&2", deadline_s=5) == Said(0, b"abc", ("no end", "x"))


def test_a_pulled_file_comes_whole_or_not_at_all(device: Device, tmp_path: Path) -> None:
    there, here = tmp_path / "it's there", tmp_path / "here"
    there.write_bytes(bytes(range(256)) * 4096)
    pull(device, str(there), here, most_bytes=1 << 20)
    assert here.read_bytes() == there.read_bytes()
    here.unlink()
    with pytest.raises(DeviceError, match="sent more than"):
        pull(device, str(there), here, most_bytes=1000)
    with pytest.raises(DeviceError, match="No such file"):
        pull(device, str(tmp_path / "none"), here, most_bytes=1000)
    assert not here.exists()


@pytest.mark.parametrize("text", [b"", b"[]", b'{"files": [1]}', b'{"files": [{"path": "a"}]}', b"[" * 100_000])
def test_digests_of_another_form_are_refused(text: bytes) -> None:
    with pytest.raises(DeviceError) as caught:
        parse_digests(text, "digests")
    assert caught.value.reason == "bad result"


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("ssh://pi", ("pi", None, None, "")),
        ("ssh://me@pi.local:2222/srv/a b/", ("pi.local", "me", 2222, "/srv/a b")),
        ("ssh://[::1]:22/", ("::1", None, 22, "")),
    ],
)
def test_an_address_is_read(address: str, wanted: tuple[Any, ...]) -> None:
    assert parse_address(address) == wanted


@pytest.mark.parametrize(
    "address", ["ssh://", "ssh:pi", "http://pi", "ssh://-x", "ssh://a:b@pi", "ssh://pi:x", "ssh://-l@pi", "ssh://pi?x"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="want ssh://"):
        parse_address(address)


def test_the_output_of_adb_devices_is_read() -> None:
    text = (
        "* daemon started successfully\nList of devices attached\n"
        "0A1B2C                 device usb:1-1 product:shiba model:Pixel_8 device:shiba transport_id:1\n"
        "127.0.0.1:6555         offline transport_id:4\n"
        "192.168.0.7:5555       no permissions (user in plugdev group); see [http://x] usb:1-2\n\n"
    )
    assert parse_devices(text) == [
        Listed("0A1B2C", "device", "shiba", "Pixel_8"),
        Listed("127.0.0.1:6555", "offline", "", ""),
        Listed("192.168.0.7:5555", "no permissions (user in plugdev group); see [http://x]", "", ""),
    ]


def test_temperatures_are_read_from_the_kernel_or_from_android() -> None:
    assert parse_zones("cpu-0-0 41000\ncpu-0-0 42500\nodd -274000\n x\nbattery 3o\n") == {
        "cpu-0-0": 41.0,
        "cpu-0-0 #2": 42.5,
    }
    text = """IsStatusOverride: false
Cached temperatures:
	Temperature{mValue=30.0, mType=0, mName=CPU0, mStatus=0}
HAL Ready: true
Current temperatures from HAL:
	Temperature{mValue=36.5, mType=0, mName=CPU0, mStatus=0}
	Temperature{mValue=NaN, mType=3, mName=SKIN, mStatus=0}
Current cooling devices from HAL:
	CoolingDevice{mValue=0, mType=2, mName=thermal-cpufreq-0}
"""
    assert parse_thermalservice(text) == {"CPU0": 36.5}
    assert parse_thermalservice(text.partition("Current temp")[0]) == {"CPU0": 30.0}
    assert parse_thermalservice("") == {}


def test_limits_of_a_profile_are_said_in_words() -> None:
    phases = {"load": PhaseFound((6000.0,), 1, 5000.0), "decode": PhaseFound((10.0, 200.0, 300.0), 1, None)}
    assert over(find_profile("pixel-8"), 1024, phases) == [
        "load_ms: 6,000.0, at most 5,000",
        "token_ms: 200.0, at most 150",
        "memory: 5,000 MiB, at most 4,096",
        "context: the bundle has 1,024 tokens, at least 2,048",
    ]


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    append_line(path, {"a": 1})
    append_line(path, {"b": 2})
    with pytest.raises(ValueError, match="JSON"):
        append_line(path, {"c": float("nan")})
    assert path.read_text() == '{"a": 1}\n{"b": 2}\n'


def test_what_a_device_says_cannot_write_on_a_terminal() -> None:
    assert one_line("a\x1b[2J\nb\u202ec") == "a [2J b c"


def test_a_device_is_known_by_its_name(tmp_path: Path) -> None:
    assert open_device(f"local:{tmp_path}").root == str(tmp_path)


def test_a_machine_without_adb_still_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert list_main(["--adb", "no such program"]) == 0
    printed = capsys.readouterr().out
    assert "no such program is not installed, so no Android device is listed" in printed
    assert printed.startswith("local\tthis machine")


def test_a_fake_device_can_open_no_vsock_socket() -> None:
    if not hasattr(socket, "AF_VSOCK") or platform.machine() not in MACHINES:
        pytest.skip(f"no filter for {platform.system()} on {platform.machine()}")
    script = "import socket; socket.socket(); socket.socket(socket.AF_VSOCK)"
    command = [sys.executable, "-m", "device_harness.no_vsock", sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "OSError: [Errno 97]" in done.stderr
    assert "line 1" in done.stderr
