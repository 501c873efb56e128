"""The JSON line of a run on a device, in the form that `benchmarks.report` takes, and what of it is over a profile."""

import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from device_harness.profiles import Profile
from device_harness.result import PhaseFound, Result
from device_harness.thermal import Temperatures
from runtimes.manifest import Manifest
from runtimes.verify import Parity

SCHEMA = 1
FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "asimddp",
    "i8mm",
    "sve",
)  # that kernels are chosen by
BOUNDS = {"load_ms": "load", "token_ms": "decode"}  # limit -> phase whose median it bounds
NOT_COVERED = "cutting images into tiles and turning a chat into token ids: the device is given both"
NOT_MEASURED = "first_token_ms: the runner times its parts, image and prefill, not their sum"


@dataclass(frozen=True)
class Job:
    """What the runner measures: of an image of `tiles`, a prompt, and further tokens with `decode_at` in the cache."""

    tiles: int = 1
    prefill_tokens: int = 128
    decode_at: int = 128
    decode_tokens: int = 16
    repeats: int = 3
    threads: int = 0  # 0: the engine's choice


@dataclass(frozen=True)
class Observed:
    """What the harness itself saw of a run.

    local: the device is this machine, and a profile is then simulated.
    memory_mib: of the device, or None.
    """

    device: str
    local: bool
    memory_mib: int | None
    pushed: Mapping[str, Sequence[str]]
    before: Temperatures
    after: Temperatures
    phase_starts: Sequence[tuple[float, str]]


def commit(folder: Path = Path(__file__).parent) -> str:
    """The commit of this checkout, with "+" after it where files differ from it; "" outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603  # fixed words
        except (OSError, subprocess.CalledProcessError):
            return ""

    found = git("rev-parse", "HEAD")
    return found and found + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def over(profile: Profile, context: int, phases: Mapping[str, PhaseFound]) -> list[str]:
    """The profile's limits that a run is over, in words."""
    found = []
    for limit, name in BOUNDS.items():
        bound = getattr(profile.limits, limit)
        if name in phases and (median := statistics.median(phases[name].samples_ms)) > bound:
            found.append(f"{limit}: {median:,.1f}, at most {bound:,}")
    if (peak := peak_mib(phases)) is not None and peak > profile.memory_mib:
        found.append(f"memory: {peak:,.0f} MiB, at most {profile.memory_mib:,}")
    if context < profile.context:
        found.append(f"context: the bundle has {context:,} tokens, at least {profile.context:,}")
    return found


def peak_mib(phases: Mapping[str, PhaseFound]) -> float | None:
    """The highest of the phases, MiB."""
    return max((p.peak_rss_mib for p in phases.values() if p.peak_rss_mib is not None), default=None)


def make_record(
    manifest: Manifest, profile: Profile | None, job: Job, result: Result, parity: Parity, seen: Observed
) -> dict[str, Any]:
    """The line. An emulated run has no phases in it, so no time and no memory."""
    machine, features = result.machine, result.machine.cpu_features
    x86 = machine.architecture in ("x86_64", "i686")
    cores = machine.cores or 1
    where: dict[str, Any] = {"name": "none", "cores": cores, "memory_mib": seen.memory_mib or 1}
    if profile is not None:
        where = {"name": profile.name, "cores": profile.cores, "memory_mib": profile.memory_mib}
        where["limits"] = asdict(profile.limits)
    return {
        "schema": SCHEMA,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "bundle": {
            "model": manifest.model.name,
            "target": manifest.target,
            "recipe": manifest.recipe.name,
            "payload_digest": manifest.payload_digest,
        },
        "profile": where,
        "execution": result.execution,
        "simulated": seen.local and profile is not None,
        "limit_enforced": False,
        "cores_enforced": False,
        "cpus": min(result.threads or cores, cores),
        "environment": {
            "machine": machine.architecture,
            "system": machine.system,
            "cores": machine.cores,
            "processor": machine.model,
            "instruction_set": [flag for flag in FLAGS if flag in features],
            "saturates": x86 and not set(features) & {"avx512_vnni", "avx_vnni"},
            "python": "",
            "onnxruntime": result.engine_version,
            "numpy": "",
        },
        "device": {
            "name": seen.device,
            "memory_mib": seen.memory_mib,
            "cpu_features": list(features),
            "temperatures": {"before": asdict(seen.before), "after": asdict(seen.after)},
            "pushed": {folder: list(names) for folder, names in seen.pushed.items()},
        },
        "runner": {"version": result.runner_version, "source_sha256": result.runner_source},
        "parity": {"passed": parity.passed, **asdict(parity)},
        "not_covered": [NOT_COVERED, NOT_MEASURED],
        "job": {
            **asdict(job),
            "threads": result.threads,
            "options": dict(result.session),
            "warmup": 1,
            "allow_pending": False,
            "seed": 0,
        },
        "first_token_of": None,
        "medians_ms": {name: statistics.median(phase.samples_ms) for name, phase in result.phases.items()},
        "peak_rss_mib": peak_mib(result.phases),
        "peak_counted_mib": None,
        "over": over(profile, manifest.text.context, result.phases) if profile is not None else [],
        "phases": {name: asdict(phase) for name, phase in result.phases.items()},
        "physical": None,
        "memory_over_time": [],
        "phase_starts": [list(start) for start in seen.phase_starts] if result.phases else [],
    }


def table(phases: Mapping[str, PhaseFound]) -> str:
    """A run's samples by phase, as Markdown."""
    lines = [
        "| phase | samples | median, ms | 10 % to 90 %, ms | CPU, s | peak, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, phase in phases.items():
        samples = sorted(phase.samples_ms)
        low, high = samples[len(samples) // 10], samples[-1 - len(samples) // 10]
        peak = "-" if phase.peak_rss_mib is None else f"{phase.peak_rss_mib:,.0f}"
        cells = [name, len(samples), f"{statistics.median(samples):,.2f}", f"{low:,.2f} to {high:,.2f}"]
        lines.append(f"| {' | '.join(map(str, [*cells, f'{phase.cpu_s:.2f}', peak]))} |")
    return "\n".join(lines)
