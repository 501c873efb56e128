"""A bundle beside llama.cpp, onnxruntime-genai and OpenVINO on the same checkpoint, in turn, round by round.

    python -m benchmarks.peers.run --checkpoint FOLDER --bundle BUNDLE [--peers llama genai openvino] [--rounds 5]

Each peer gets an environment and a conversion of its own under --work, both kept. In each round every system runs in
turn, in processes of its own: one for text, one for pictures, so that each has its peak of memory. Files are read
before, so that loading is from memory. One JSON line a system and round holds every sample; ratios are of the same
round. Exit code 1: a system failed, and the others were measured; 2: the arguments cannot be used. Not covered:
accuracy, and the vision tower of onnxruntime-genai and OpenVINO.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.peers.checkpoint import read_sizes
from benchmarks.peers.environments import (
    PeerError,
    checkpoint_digest,
    ensure_converted,
    ensure_environment,
    pins,
    run,
)
from benchmarks.peers.phases import FIRST_TOKEN, VISION, Job, text_phase
from benchmarks.run import environment
from device_harness.record import commit
from runtimes.bundle import read_bundle
from runtimes.manifest import BundleError

SCHEMA = 1
OURS = "ours"
PHASES = ("prefill128", "prefill512", "decode0", "decode1024", VISION, FIRST_TOKEN)
PICTURE_TILES = 13  # 4 x 3 and the whole
ROOM = 128  # tokens of a prompt that are no picture's


@dataclass(frozen=True)
class System:
    """What is measured under one name.

    peer: names the environment, the converter and the engine.
    convert: options of the converter.
    options: of the engine.
    vision: whether it has the vision tower.
    """

    name: str
    peer: str
    convert: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    vision: bool = False


SYSTEMS = {
    system.name: system
    for system in (
        System("llama", "llama", options={"mmproj": "mmproj-f16.gguf"}, vision=True),
        System("llama-q8", "llama", options={"mmproj": "mmproj-q8_0.gguf"}, vision=True),
        System("genai", "genai"),
        System("genai-128", "genai", ("block_size=128", "prune_lm_head=true", "fuse_mlp_gate_up=true")),
        System("openvino", "openvino"),
    )
}


@dataclass(frozen=True)
class Ready:
    """A system that can run: the Python that runs its engine, what the engine opens, and what to record of it."""

    system: System
    python: Path
    model: Path
    versions: Mapping[str, str]


def prepare(system: System, checkpoint: Path, work: Path) -> Ready:
    """Environment and conversion of a peer. Raises PeerError if one cannot be made."""
    python = ensure_environment(system.peer, work)
    model = ensure_converted(system.peer, python, checkpoint, system.convert, work)
    return Ready(system, python, model, pins(system.peer))


def jobs(ready: Ready, checkpoint: Path, phases: Sequence[str], settings: Mapping[str, int]) -> dict[str, Job]:
    """The processes of a round, {"text", "picture"}; those without a phase that the system has are left out."""
    text, vision = read_sizes(checkpoint)
    counted = [found for name in phases if (found := text_phase(name))]
    after = 1 + settings["decode_tokens"]
    most = max((count + (after if kind == "decode" else 0) for kind, count in counted), default=0)
    tile_tokens = (vision.tile_size // vision.patch_size // vision.scale_factor) ** 2
    common: dict[str, Any] = {
        "model": str(ready.model),
        "vocab": text.vocab,
        "tile_size": vision.tile_size,
        "options": dict(ready.system.options),
        **settings,
    }
    made: dict[str, Job] = {}
    if of_text := tuple(name for name in phases if text_phase(name)):
        made["text"] = Job(phases=of_text, context=most, **common)
    pictured = tuple(name for name in phases if not text_phase(name))
    if pictured and ready.system.vision:
        made["picture"] = Job(phases=pictured, context=PICTURE_TILES * tile_tokens + ROOM, **common)
    return made


def measure_once(ready: Ready, job: Job) -> dict[str, Any]:
    """One process over a job. Raises PeerError if it fails."""
    for path in sorted(p for p in ready.model.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            while file.read(1 << 24):  # into the page cache
                pass
    module = OURS if ready.system.name == OURS else f"{ready.system.peer}_engine"
    command: list[str | Path] = [ready.python, "-m", f"benchmarks.peers.{module}"]
    out = run(command, f"{ready.system.name}: {' '.join(job.phases)}", json.dumps(asdict(job)) + "\n")
    try:
        found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    except (IndexError, ValueError) as exc:
        raise PeerError(f"{ready.system.name}: printed no result: {out[-300:]!r}") from exc
    return found


def measure_round(
    number: int,
    systems: Sequence[Ready],
    jobs_of: Callable[[Ready], dict[str, Job]],
    once: Callable[[Ready, Job], dict[str, Any]] = measure_once,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """Every system in turn; yields a record of each, with "error" in the place of what could not be measured."""
    for ready in systems:
        progress(f"round {number}: {ready.system.name}")
        record: dict[str, Any] = {"round": number, "system": ready.system.name, "versions": dict(ready.versions)}
        try:
            record["runs"] = {name: once(ready, job) for name, job in jobs_of(ready).items()}
        except PeerError as exc:
            record["error"] = str(exc)
        yield record


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """What a round says of a system, by the name of its row in the table."""
    found: dict[str, float] = {}
    for kind, done in record.get("runs", {}).items():
        for name, samples in done["samples_ms"].items():
            ms = statistics.median(samples)
            match None if name == "load" else text_phase(name):
                case "prefill", count:
                    found[f"prefill of {count}, tok/s"] = count / ms * 1000
                case "decode", before:
                    found[f"decode after {before:,}, tok/s"] = 1000 / ms
                case _ if name == VISION:
                    found["vision tower, ms a tile"] = ms
                case _ if name == FIRST_TOKEN:
                    found[f"first token on {PICTURE_TILES} tiles, s"] = ms / 1000
                case _:
                    found[f"load, {kind}, s"] = ms / 1000
        if done["peak_rss_mib"] is not None:
            found[f"peak of memory, {kind}, MiB"] = done["peak_rss_mib"]
    return found


def ratio(row: str, ours: float, theirs: float) -> float:
    """How many times as fast as the peer we are; of memory: how many times as much we take."""
    return ours / theirs if row.endswith(("tok/s", "MiB")) else theirs / ours


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Medians over the rounds, as Markdown; beside a peer's the median, least and most of the ratios of each round."""
    rounds: dict[str, dict[int, dict[str, float]]] = {}
    for record in records:
        if "error" not in record:
            rounds.setdefault(record["system"], {})[record["round"]] = figures(record)
    rows = list(dict.fromkeys(row for of in rounds.values() for one in of.values() for row in one))
    lines = ["| | " + " | ".join(rounds) + " |", "|---" * (1 + len(rounds)) + "|"]
    for row in rows:
        cells = [row]
        for name, of in rounds.items():
            values = [one[row] for one in of.values() if row in one]
            if not values:
                cells.append("-")
                continue
            cell = _number(statistics.median(values))
            ours = {n: one[row] for n, one in rounds.get(OURS, {}).items() if row in one}
            ratios = [ratio(row, ours[n], one[row]) for n, one in of.items() if row in one and n in ours]
            if name != OURS and ratios:
                cell += f" ({statistics.median(ratios):.2f}; {min(ratios):.2f} to {max(ratios):.2f})"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.run", description=(__doc__ or "").splitlines()[0]
    )
    command.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint")
    command.add_argument("--bundle", type=Path, help="made of it, for Android; without: the peers alone")
    command.add_argument(
        "--peers", nargs="*", choices=SYSTEMS, default=["llama", "genai", "openvino"], help="none: ours alone"
    )
    command.add_argument("--phases", nargs="+", default=PHASES, metavar="PHASE", help=f"({' '.join(PHASES)})")
    command.add_argument("--rounds", type=int, default=5, metavar="N", help="%(default)s")
    command.add_argument("--threads", type=int, default=Job.threads, metavar="N", help="%(default)s")
    command.add_argument("--repeats", type=int, default=Job.repeats, metavar="N", help="within a round (%(default)s)")
    command.add_argument("--decode-tokens", type=int, default=Job.decode_tokens, metavar="N", help="%(default)s")
    command.add_argument(
        "--work", type=Path, default=Path("build/peers"), help="environments, conversions (%(default)s)"
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="append the JSON lines to this file")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parser().parse_args(arguments)
    began = time.monotonic()

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    systems: list[Ready] = []
    failed: list[str] = []
    about: dict[str, Any] = {"schema": SCHEMA, "commit": commit(), "environment": environment()}
    try:
        for name in ("rounds", "threads", "repeats", "decode_tokens"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, want 1 or more")
        for name in args.phases:
            text_phase(name)
        about["checkpoint"] = {"name": args.checkpoint.resolve().name, "digest": checkpoint_digest(args.checkpoint)}
        if args.bundle:
            manifest = read_bundle(args.bundle, allow_pending=True).manifest
            about["bundle"] = {"recipe": manifest.recipe.name, "payload_digest": manifest.payload_digest}
            ours = System(OURS, OURS, vision=True)
            engine = {"onnxruntime": about["environment"]["onnxruntime"]}
            systems.append(Ready(ours, Path(sys.executable), args.bundle.resolve(), engine))
    except (ValueError, PeerError, BundleError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    for name in dict.fromkeys(args.peers):
        progress(f"{name}: environment and conversion")
        try:
            systems.append(prepare(SYSTEMS[name], args.checkpoint, args.work.resolve()))
        except PeerError as exc:
            failed.append(str(exc))
            print(f"error: {exc}", file=sys.stderr)
    settings = {"threads": args.threads, "repeats": args.repeats, "decode_tokens": args.decode_tokens}
    records: list[dict[str, Any]] = []
    for number in range(1, args.rounds + 1):
        found = measure_round(
            number, systems, lambda ready: jobs(ready, args.checkpoint, args.phases, settings), measure_once, progress
        )
        for record in found:
            records.append(about | {"measured": datetime.now(UTC).isoformat(timespec="seconds")} | record)
            if "error" in record:
                failed.append(record["error"])
                print(f"error: {record['error']}", file=sys.stderr)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(records[-1]) + "\n")
    print(table(records))
    for line in failed:
        print(f"not measured: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
