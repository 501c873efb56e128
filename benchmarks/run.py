"""What a bundle takes on a device's profile: latency by phase and memory, measured here within the profile's limits.

    python -m benchmarks.run BUNDLE --profile pixel-8 [--runs 3] [--out runs.jsonl]

Each run is a process of its own, kept to the profile's cores and memory by control groups (`device_harness.confine`);
one JSON line a run holds every sample. A profile makes this machine smaller, never faster or slower: results say
`simulated`, and are no device's. Exit code 0: within the profile's limits, 1: over one, or the engine failed, 2: the
bundle, the profile or the sizes cannot be used. Not covered: accuracy (`benchmarks.quality`), energy, heat.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.measure import END, Job, status_mib
from device_harness.confine import Confinement, confined
from device_harness.profiles import Profile, ProfileError, find_profile
from device_harness.record import FLAGS, commit
from runtimes.bundle import Bundle, read_bundle
from runtimes.manifest import BundleError, Manifest
from runtimes.memory import predict
from runtimes.ort import cpu_features, saturates
from runtimes.preprocess import TILE_BUDGETS
from runtimes.runner import EngineError, InputError, engine_name

SCHEMA = 1
EVERY_S = 0.02  # between looks at a process's memory
AROUND_TILE, AROUND_QUESTION = (
    6,
    24,
)  # tokens of a prompt beside a tile's own (row and column marks), and of the question
BOUNDS = {
    "load_ms": "load",
    "first_token_ms": "first_token",
    "token_ms": "decode",
}  # limit -> phase whose median it bounds


def environment() -> dict[str, Any]:
    """The machine and what runs on it."""
    features = cpu_features()
    return {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": os.cpu_count(),
        "processor": _processor(),
        "instruction_set": [flag for flag in FLAGS if flag in features],
        "saturates": saturates(features, platform.machine()),
        "python": platform.python_version(),
        "onnxruntime": metadata.version("onnxruntime"),
        "numpy": metadata.version("numpy"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


class Watched:
    """A process's memory over time, and when each of its phases began, s from its start."""

    def __init__(self, process: subprocess.Popen[str], on_phase: Callable[[str], None]) -> None:
        self.memory: list[tuple[float, float]] = []
        self.phases: list[tuple[float, str]] = []
        self.said: list[str] = []
        self._began, self._process, self._on_phase = time.monotonic(), process, on_phase
        self._ended = False
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._look, self._listen)]
        for thread in self._threads:
            thread.start()

    def _look(self) -> None:
        proc = Path("/proc") / str(self._process.pid)
        while not self._ended and self._process.poll() is None:
            if (mib := status_mib("VmRSS", proc)) is not None:
                self.memory.append((round(time.monotonic() - self._began, 3), round(mib, 1)))
            time.sleep(EVERY_S)

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.startswith("phase "):
                name = line.removeprefix("phase ").strip()
                if name == END:
                    self._ended = True
                    continue
                self.phases.append((round(time.monotonic() - self._began, 3), name))
                self._on_phase(name)
            else:
                self.said.append(line)

    def join(self) -> None:
        """Waits for the end of the process and of what it says."""
        for thread in self._threads:
            thread.join()


def run_once(job: Job, inside: Confinement, on_phase: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """One process over the job.

    Raises:
        InputError: if the bundle or the sizes cannot be used.
        EngineError: if it failed, or took more memory than it may.
    """
    command = [sys.executable, "-m", "benchmarks.measure"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, cwd=Path(__file__).parent.parent, **pipes) as process:  # type: ignore[call-overload]  # noqa: S603  # our own module
        inside.admit(process.pid)
        watched = Watched(process, on_phase)
        process.stdin.write(json.dumps(asdict(job)) + "\n")
        process.stdin.close()
        out = process.stdout.read()
    watched.join()
    at = f" in phase {watched.phases[-1][1]}" if watched.phases else ""
    if inside.killed():
        raise EngineError(f"the bundle took more than the {inside.memory_mib:,} MiB that the profile has{at}: killed")
    said = "".join(watched.said).strip().removeprefix("error: ")
    if process.returncode == 2:
        raise InputError(said)
    if process.returncode:
        raise EngineError(f"the run failed{at} ({process.returncode}): {said[-1000:] or 'it said nothing'}")
    found = json.loads(out)
    assert isinstance(found, dict)
    return found | {"memory_over_time": watched.memory, "phase_starts": watched.phases}


def measure_bundle(
    folder: Path, profile: Profile, job: Job, runs: int, progress: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """One record a run.

    Raises:
        BundleError: if the bundle cannot be used, or is not the profile's.
        InputError, EngineError: as `run_once`.
    """
    bundle = read_bundle(folder, allow_pending=job.allow_pending)
    manifest = bundle.manifest
    if manifest.target != profile.target:
        raise BundleError(f"{folder}: is for {manifest.target}, profile {profile.name} takes {profile.target}")
    expected = expect(bundle, job)
    if expected is not None and expected > profile.memory_mib:
        raise InputError(
            f"{folder}: about {expected:,.0f} MiB at {job.tiles} tiles, profile {profile.name} gives an app "
            f"{profile.memory_mib:,} MiB; fewer tiles or tokens, or a smaller recipe, take less"
        )
    records = []
    for run in range(runs):
        with confined(profile.cores, profile.memory_mib) as inside:
            found = run_once(job, inside, lambda name, run=run: progress(f"run {run + 1} of {runs}: {name}"))  # type: ignore[misc]
            counted = inside.peak_mib()
        medians = {name: statistics.median(phase["samples_ms"]) for name, phase in found["phases"].items()}
        peaks = [p["peak_rss_mib"] for p in found["phases"].values() if p["peak_rss_mib"] is not None]
        records.append(
            {
                "schema": SCHEMA,
                "measured": datetime.now(UTC).isoformat(timespec="seconds"),
                "commit": commit(),
                "bundle": _named(manifest),
                "profile": {
                    "name": profile.name,
                    "cores": profile.cores,
                    "memory_mib": profile.memory_mib,
                    "limits": asdict(profile.limits),
                },
                "execution": "native" if engine_name(bundle) in ("ONNX Runtime", "Core ML") else "executor",
                "simulated": True,
                "limit_enforced": inside.memory_enforced,
                "cores_enforced": inside.cores_enforced,
                "cpus": len(inside.cpus),
                "environment": environment(),
                "medians_ms": medians,
                "peak_rss_mib": max(peaks, default=None),
                "predicted_peak_mib": expected,
                "peak_counted_mib": counted,
                "over": over(profile, medians, max(peaks, default=None)),
                **found,
            }
        )
    return records


def expect(bundle: Bundle, job: Job) -> float | None:
    """The peak to expect of a job, MiB (`runtimes.memory`); None for a target that it does not cover."""
    manifest = bundle.manifest
    if manifest.target != "onnx":
        return None
    alone = max(job.prefill_tokens, job.decode_at + job.warmup + job.decode_tokens)
    shown = job.tiles * (manifest.image.tokens_per_tile + AROUND_TILE) + AROUND_QUESTION
    files = {entry.path: entry.size for entry in manifest.files}
    found = predict(
        manifest,
        bundle.json("config.json"),
        files,
        tiles=job.tiles,
        tokens=shown if job.tiles else alone,
        most_tokens=alone,
        again=job.warmup + job.repeats > 1,
    )
    return round(found.peak / 2**20, 1)


def _named(manifest: Manifest) -> dict[str, Any]:
    return {
        "model": manifest.model.name,
        "target": manifest.target,
        "recipe": manifest.recipe.name,
        "payload_digest": manifest.payload_digest,
    }


def over(profile: Profile, medians: dict[str, float], peak_mib: float | None) -> list[str]:
    """The profile's limits that a run is over, in words."""
    found = []
    for limit, phase in BOUNDS.items():
        bound = getattr(profile.limits, limit)
        if medians[phase] > bound:
            found.append(f"{limit}: {medians[phase]:,.1f}, at most {bound:,}")
    if peak_mib is not None and peak_mib > profile.memory_mib:
        found.append(f"memory: {peak_mib:,.0f} MiB, at most {profile.memory_mib:,}")
    return found


def table(records: Sequence[dict[str, Any]]) -> str:
    """All runs' samples by phase, as Markdown: median, spread, and the highest peak."""
    lines = [
        "| phase | samples | median, ms | 10 % to 90 %, ms | limit, ms | CPU, s a run | peak, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in records[0]["phases"]:
        phases = [record["phases"][name] for record in records]
        samples = sorted(sample for phase in phases for sample in phase["samples_ms"])
        low, high = samples[len(samples) // 10], samples[-1 - len(samples) // 10]
        peaks = [phase["peak_rss_mib"] for phase in phases if phase["peak_rss_mib"] is not None]
        cpu = statistics.median(phase["cpu_s"] for phase in phases)
        cells = [name, len(samples), f"{statistics.median(samples):,.2f}", f"{low:,.2f} to {high:,.2f}"]
        least = [
            r["physical"]["limits_ms"][name] for r in records if name in (r["physical"] or {}).get("limits_ms", {})
        ]
        cells += [f"{statistics.median(least):,.2f}" if least else "-", f"{cpu:.2f}"]
        cells.append(f"{max(peaks):,.0f}" if peaks else "-")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").splitlines()[0])
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle")
    command.add_argument("--profile", default="x86-laptop", help="a shipped one, or FILE.toml:NAME (%(default)s)")
    command.add_argument(
        "--tiles", type=int, choices=[0, *TILE_BUDGETS], help="of a picture, at most; 0: none (the profile's)"
    )
    command.add_argument("--prefill-tokens", type=int, default=Job.prefill_tokens, metavar="N", help="%(default)s")
    command.add_argument(
        "--decode-at", type=int, default=Job.decode_at, metavar="N", help="cached tokens (%(default)s)"
    )
    command.add_argument("--decode-tokens", type=int, default=Job.decode_tokens, metavar="N", help="%(default)s")
    command.add_argument("--repeats", type=int, default=Job.repeats, metavar="N", help="within a run (%(default)s)")
    command.add_argument("--runs", type=int, default=3, metavar="N", help="processes (%(default)s)")
    command.add_argument("--threads", type=int, metavar="N", help="default: one for each core of the profile")
    command.add_argument("--allow-pending", action="store_true", help="use a bundle whose proof has not passed")
    command.add_argument("--out", type=Path, metavar="FILE", help="append the JSON lines to this file")
    command.add_argument("--json", action="store_true", help="the JSON lines on stdout too")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parser().parse_args(arguments)
    began = time.monotonic()

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        for name in ("prefill_tokens", "decode_tokens", "repeats", "runs"):
            if getattr(args, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}, want 1 or more")
        profile = find_profile(args.profile)
        threads = min(profile.cores, os.cpu_count() or 1) if args.threads is None else args.threads
        job = Job(
            bundle=str(args.bundle.resolve()),
            tiles=profile.tiles if args.tiles is None else args.tiles,
            prefill_tokens=args.prefill_tokens,
            decode_at=args.decode_at,
            decode_tokens=args.decode_tokens,
            threads=threads,
            options=dict(profile.options),
            repeats=args.repeats,
            allow_pending=args.allow_pending,
        )
        records = measure_bundle(args.bundle, profile, job, args.runs, progress)
    except (ProfileError, BundleError, InputError, EngineError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1 if isinstance(exc, EngineError) else 2
    lines = [json.dumps(record) + "\n" for record in records]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a", encoding="utf-8") as file:
            file.writelines(lines)
    first = records[0]
    kept = "enforced" if first["limit_enforced"] else "NOT enforced"
    print(
        f"{profile.title}, simulated on {first['environment']['processor'] or first['environment']['machine']}: "
        f"{first['cpus']} of {profile.cores} cores, {profile.memory_mib:,} MiB ({kept})\n"
    )
    print(table(records))
    if args.json:
        print("".join(lines), end="")
    exceeded = list(dict.fromkeys(line for record in records for line in record["over"]))
    for line in exceeded:
        print(f"over the profile's limits: {line}", file=sys.stderr)
    return 1 if exceeded else 0


if __name__ == "__main__":
    raise SystemExit(main())
