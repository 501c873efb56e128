"""A bundle on a device: pushed, run by the native runner, its arrays pulled back and judged as the host's are.

    python -m device_harness.run BUNDLE --device adb:SERIAL [--profile pixel-8] [--out results.jsonl]

DEVICE is `local`, ssh://[user@]host[:port][/folder], or adb:SERIAL[/folder] (`python -m device_harness.list` names
them). Only files that differ are sent, by digests that the runner computes there. A run counts if its result is there
whole, with its digests and this run's nonce: an exit code proves nothing. Exit code 0: right, and within the profile's
limits; 1: wrong, over one, or the device failed (offline, killed, timed out, full disk); 2: the bundle, the runner or
the arguments cannot be used. A line in --out is a run that was right. Not covered: cutting images and turning a chat
into ids, which the device is given.
Not there yet: NPU back ends (QNN, XNNPACK), iOS devices, Core ML bundles.
"""

import argparse
import json
import platform
import re
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from device_harness.adb import ROOT as ADB_ROOT
from device_harness.adb import AdbDevice
from device_harness.device import CONTROL_S, Device, DeviceError, demand, one_line
from device_harness.local import LocalDevice
from device_harness.profiles import Profile, ProfileError, find_profile
from device_harness.record import NOT_COVERED, NOT_MEASURED, Job, Observed, make_record, table
from device_harness.result import MOST_PHASES, NAME, Result, fetch, judge, read_outputs, read_result
from device_harness.ssh import SshDevice
from device_harness.thermal import read_temperatures
from device_harness.transfer import (
    PROGRAM,
    Runner,
    bundle_files,
    end_run,
    inside,
    known_as,
    prepare,
    read_runner,
    remove_run,
    runner_words,
    send_bundle,
    send_runner,
)
from runtimes.bundle import Bundle, read_bundle
from runtimes.manifest import BundleError
from runtimes.memory import predict
from runtimes.preprocess import TILE_BUDGETS, read_settings
from runtimes.verify import Case, Parity, bundle_limits, read_cases

EXECUTIONS = ("native", "qemu-user")
BUILT = Path("build/native")  # where runtimes.native.build puts a runner: a folder for each kind of device
DEADLINE_S = 1800.0
LOCAL_ROOT = Path("build/device")


@dataclass(frozen=True)
class Setting:
    """How a run is made.

    options: of the engine's session.
    deadline_s: of the run itself; transfers have their own by their size.
    """

    job: Job
    options: Mapping[str, str]
    execution: str = "native"
    measure: bool = True
    deadline_s: float = DEADLINE_S


@dataclass(frozen=True)
class Outcome:
    """A run that completed: the verdict over its arrays, and the line for a report."""

    parity: Parity
    result: Result
    record: dict[str, Any]


def run_on_device(
    bundle: Bundle,
    device: Device,
    runner: Runner,
    setting: Setting,
    profile: Profile | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Push, run, pull, judge.

    Raises:
        BundleError: if the bundle has no golden cases, or is for another runner.
        DeviceError: if the device did not do all of it; nothing is left here, and nothing on it that looks whole.
    """
    _check_fit(bundle, setting, profile)
    cases = read_cases(bundle.folder)
    found = prepare(device)
    if runner.architecture not in (None, found) and not runner.emulator:
        raise DeviceError(
            "refused", f"{device.name}: is {found}, the runner is for {runner.architecture} (--emulator would run it)"
        )
    pushed = {"runner": send_runner(device, runner, say)}
    pushed["bundle"] = send_bundle(device, runner, bundle_files(bundle), say)
    memory = _memory_mib(device)
    before = read_temperatures(device)
    nonce = secrets.token_hex(16)
    starts = _run(device, runner, setting, nonce, say)
    after = read_temperatures(device)
    say("pull")
    with tempfile.TemporaryDirectory(prefix="smolport-") as folder:
        result, parity = _bring(device, bundle, cases, nonce, setting, Path(folder))
    remove_run(device, nonce)
    seen = Observed(device.name, isinstance(device, LocalDevice), memory, pushed, before, after, starts)
    return Outcome(parity, result, make_record(bundle.manifest, profile, setting.job, result, parity, seen))


def _check_fit(bundle: Bundle, setting: Setting, profile: Profile | None) -> None:
    """Raises BundleError for what cannot run, before anything is sent."""
    manifest, job = bundle.manifest, setting.job
    if manifest.target != "onnx":
        raise BundleError(
            f"{bundle.folder}: is for {manifest.target}; the native runner takes onnx, iOS is not there yet"
        )
    if profile is not None and profile.target != manifest.target:
        raise BundleError(f"{bundle.folder}: is for {manifest.target}, profile {profile.name} takes {profile.target}")
    most = max(job.prefill_tokens, job.decode_at + job.decode_tokens + 1) if setting.measure else 0
    if most > manifest.text.context:
        raise BundleError(f"{most:,} tokens are to be measured, the bundle's context is {manifest.text.context:,}")
    if profile is None:
        return
    files = {entry.path: entry.size for entry in manifest.files}
    config, tiles = bundle.json("config.json"), min(job.tiles, 1)
    least = predict(manifest, config, files, tiles=tiles, tokens=max(most, 1), base=0).peak / 2**20
    if least > profile.memory_mib:
        raise BundleError(
            f"{bundle.folder}: takes about {least:,.0f} MiB, profile {profile.name} gives an app {profile.memory_mib:,}"
        )


def _memory_mib(device: Device) -> int | None:
    said = device.shell("grep -m 1 MemTotal: /proc/meminfo; true", deadline_s=CONTROL_S)
    match = re.match(rb"MemTotal:\s+(\d{1,12}) kB", said.stdout)
    return int(match.group(1)) // 1024 if match else None


def _run(
    device: Device, runner: Runner, setting: Setting, nonce: str, say: Callable[[str], None]
) -> list[tuple[float, str]]:
    """Runs the runner to its end; when its phases began, s.

    Raises:
        DeviceError: if it failed or was lost. What it left running is then ended, where the device still answers.
    """
    job, folder = setting.job, f"{device.root}/runs/{nonce}"
    arguments = [f"{device.root}/bundle", "--out", f"{folder}/out", "--nonce", nonce, "--execution", setting.execution]
    arguments += ["--threads", str(job.threads)] if job.threads else []
    for key, value in setting.options.items():
        arguments += ["--session", f"{key}={value}"]
    if setting.measure and setting.execution == "native":
        arguments += ["--measure", "--tiles", str(job.tiles), "--prefill", str(job.prefill_tokens)]
        arguments += ["--decode-at", str(job.decode_at), "--decode-tokens", str(job.decode_tokens)]
        arguments += ["--repeats", str(job.repeats)]
    began = time.monotonic()
    starts: list[tuple[float, str]] = []

    def heard(line: str) -> None:
        name = line.removeprefix("phase ").strip()
        if line.startswith("phase ") and NAME.fullmatch(name) and len(starts) < MOST_PHASES:
            starts.append((round(time.monotonic() - began, 3), name))
            say(f"run: {name}")

    inner = f"echo $$ > {quote(folder)}/pid && exec {runner_words(device, runner, arguments)}"
    script = f"mkdir {inside(device, 'runs', nonce)} && exec sh -c {quote(inner)}"
    try:
        said = device.shell(script, deadline_s=setting.deadline_s, on_line=heard)
    except BaseException as exc:
        with suppress(DeviceError):
            end_run(device, nonce)
        if isinstance(exc, DeviceError):
            raise DeviceError(exc.reason, f"{device.name}: the run was lost{_at(starts)}: {exc}") from exc
        raise
    if said.code == 2:
        raise DeviceError("refused", f"{device.name}: the runner refused: {said.last}")
    demand(said, f"{device.name}: the run{_at(starts)}")
    return starts


def _at(starts: Sequence[tuple[float, str]]) -> str:
    return f" in phase {starts[-1][1]}" if starts else " before its first phase"


def _bring(
    device: Device, bundle: Bundle, cases: Sequence[Case], nonce: str, setting: Setting, into: Path
) -> tuple[Result, Parity]:
    """Fetches the result of a run, checks it, judges its arrays."""
    fetch(device, f"{device.root}/runs/{nonce}/out", into, cases)
    manifest = bundle.manifest
    result = read_result(
        into, nonce=nonce, payload_digest=manifest.payload_digest, execution=setting.execution, cases=cases
    )
    settings = read_settings(bundle.path("preprocessor_config.json"))
    arrays = read_outputs(into / "outputs.safetensors", cases)
    limits = bundle_limits(bundle)
    return result, judge(result, arrays, cases, settings, limits, manifest.text.image_token_id)


def open_device(name: str, *, adb: str = "adb", ssh: str = "ssh", ssh_config: Path | None = None) -> Device:
    """The device by that name.

    Raises:
        ValueError: if it names none.
        DeviceError: if it cannot be reached.
    """
    kind, colon, rest = name.partition(":")
    match kind:
        case "local" if not colon:
            return LocalDevice(LOCAL_ROOT)
        case "local":
            return LocalDevice(Path(rest))
        case "ssh":
            return SshDevice(name, config=ssh_config, program=ssh)
        case "adb":
            serial, slash, folder = rest.partition("/")
            return AdbDevice(serial, root=f"/{folder}".rstrip("/") if slash else ADB_ROOT, program=adb)
    raise ValueError(f"--device is {name!r}, want local, ssh://[user@]host[:port][/folder] or adb:SERIAL")


def find_runner(device: Device) -> Path:
    """The runner that was built here for the device. Raises ValueError where there is none."""
    said = demand(device.shell("uname -m", deadline_s=CONTROL_S), f"{device.name}: uname")
    machine = known_as(one_line(said.stdout.decode("utf-8", "replace"), 40))
    system = "android" if isinstance(device, AdbDevice) else "linux"
    names = {"aarch64": [f"{system}-arm64"]}.get(machine, [])
    if system == "linux" and machine == known_as(platform.machine()):
        names = ["host", *names]
    programs = [BUILT / name / PROGRAM for name in names]
    for program in programs:
        if program.is_file():
            return program
    target = f" TARGET={names[0]}" if names and names[0] != "host" else ""
    where = " or ".join(map(str, programs)) or f"none for {system} on {machine}"
    raise ValueError(f"no runner for {device.name}: {where}; make native{target} makes one, --runner names one")


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a line to a file of JSON lines, whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        size = file.tell()
        try:
            file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            file.flush()
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def parser() -> argparse.ArgumentParser:
    """The command line."""
    doc = (__doc__ or "").splitlines()
    command = argparse.ArgumentParser(
        prog="python -m device_harness.run",
        description=doc[0],
        epilog=doc[-1],
    )
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle")
    command.add_argument("--device", default="local", help="local, ssh://[user@]host[:port][/folder] or adb:SERIAL")
    command.add_argument("--profile", help="a shipped one, or FILE.toml:NAME; none: nothing is limited")
    command.add_argument("--runner", type=Path, metavar="FILE", help=f"smolport-run for the device ({BUILT}/...)")
    command.add_argument("--threads", type=int, metavar="N", help="default: one for each core of the profile")
    command.add_argument("--tiles", type=int, choices=[0, *TILE_BUDGETS], help="to time; 0: none (the profile's, or 1)")
    command.add_argument("--prefill-tokens", type=int, default=Job.prefill_tokens, metavar="N", help="%(default)s")
    command.add_argument(
        "--decode-at", type=int, default=Job.decode_at, metavar="N", help="cached tokens (%(default)s)"
    )
    command.add_argument("--decode-tokens", type=int, default=Job.decode_tokens, metavar="N", help="%(default)s")
    command.add_argument("--repeats", type=int, default=Job.repeats, metavar="N", help="%(default)s")
    command.add_argument("--no-measure", action="store_true", help="judge the arrays alone")
    command.add_argument("--deadline", type=float, default=DEADLINE_S, metavar="S", help="of the run (%(default)g s)")
    command.add_argument(
        "--emulator", default="", metavar="WORDS", help="on the device, runs the runner: qemu-aarch64 -L FOLDER"
    )
    command.add_argument("--execution", choices=EXECUTIONS, help="native, unless there is an --emulator")
    command.add_argument("--adb", default="adb", metavar="FILE", help="the adb client (%(default)s)")
    command.add_argument("--ssh-config", type=Path, metavar="FILE", help="in place of ~/.ssh/config")
    command.add_argument("--out", type=Path, metavar="FILE", help="append the JSON line to this file")
    command.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    return command


def read_setting(args: argparse.Namespace, profile: Profile | None) -> Setting:
    """The setting of a command line. Raises ValueError for a number that is none of its kind."""
    least = {"prefill_tokens": 1, "decode_at": 0, "decode_tokens": 1, "repeats": 1, "threads": 0}
    for name, smallest in least.items():
        if (value := getattr(args, name)) is not None and value < smallest:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, want {smallest} or more")
    if not 0 < args.deadline <= 86400:
        raise ValueError(f"--deadline is {args.deadline:g}, want seconds up to a day")
    if args.emulator and args.execution == "native":
        raise ValueError("--execution is native, and an --emulator is none")
    job = Job(
        tiles=args.tiles if args.tiles is not None else profile.tiles if profile else Job.tiles,
        prefill_tokens=args.prefill_tokens,
        decode_at=args.decode_at,
        decode_tokens=args.decode_tokens,
        repeats=args.repeats,
        threads=args.threads if args.threads is not None else profile.cores if profile else Job.threads,
    )
    return Setting(
        job=job,
        options=dict(profile.options) if profile else {},
        execution=args.execution or ("qemu-user" if args.emulator else "native"),
        measure=not args.no_measure,
        deadline_s=args.deadline,
    )


def _run_command(args: argparse.Namespace, say: Callable[[str], None]) -> Outcome:
    profile = find_profile(args.profile) if args.profile else None
    setting = read_setting(args, profile)
    bundle = read_bundle(args.bundle)
    _check_fit(bundle, setting, profile)
    with closing(open_device(args.device, adb=args.adb, ssh_config=args.ssh_config)) as device:
        runner = read_runner(args.runner or find_runner(device), shlex.split(args.emulator))
        return run_on_device(bundle, device, runner, setting, profile, say)


def _print(outcome: Outcome) -> None:
    result, parity, record = outcome.result, outcome.parity, outcome.record
    machine = result.machine
    about = [machine.architecture, machine.model, f"{machine.cores or '?'} cores", machine.system]
    print(f"{record['device']['name']}: {', '.join(filter(None, about))}; {' '.join(machine.cpu_features)}")
    print(f"ONNX Runtime {result.engine_version}, runner {result.runner_version}, execution {result.execution}")
    for fault in parity.faults:
        print(f"FAULT {fault}")
    print(
        f"{'passed' if parity.passed else 'FAILED'}: {parity.cases} cases, worst relative error of features "
        f"{parity.features_error:.2e}, of logits {parity.logits_error:.2e}, {parity.tokens_equal} of {parity.tokens} "
        f"greedy tokens equal ({parity.ties} ties)"
    )
    print(f"not covered: {NOT_COVERED}")
    if result.phases:
        print(f"not measured: {NOT_MEASURED}\n\n{table(result.phases)}\n")
    else:
        print("emulated: no time and no memory is stated")
    for when in ("before", "after"):
        found = record["device"]["temperatures"][when]
        texts = [f"{name} {celsius:g}" for name, celsius in list(found["celsius"].items())[:12]]
        print(f"°C {when}: {', '.join(texts) or 'no sensor can be read'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parser().parse_args(arguments)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        outcome = _run_command(args, say)
        if args.out and outcome.parity.passed:
            append_line(args.out, outcome.record)
    except (ProfileError, BundleError, DeviceError, ValueError, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        if args.json:
            reason = exc.reason if isinstance(exc, DeviceError) else "unusable"
            print(json.dumps({"passed": False, "reason": reason, "error": str(exc)}))
        return 1 if isinstance(exc, DeviceError) else 2
    _print(outcome)
    for line in outcome.record["over"]:
        print(f"over the profile's limits: {line}", file=sys.stderr)
    if args.json:
        print(json.dumps({"passed": outcome.parity.passed, **_finite(outcome.record)}))
    return 0 if outcome.parity.passed and not outcome.record["over"] else 1


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose errors JSON can hold: null where an array had NaN or another shape."""
    parity = {k: None if v == float("inf") else v for k, v in record["parity"].items()}
    return record | {"parity": parity}


if __name__ == "__main__":
    raise SystemExit(main())
