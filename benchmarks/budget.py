"""What a picture's token budget costs and gains: first token, peak of memory, accuracy, for 1, 5, 10 and 17 tiles.

    python -m benchmarks.budget BUNDLE [--data documents.jsonl] [--tiles 1 5 10 17] [--out curve.jsonl]

Time and memory are of `benchmarks.run` on a profile, with a picture that fills the budget. Accuracy, where --data is
given, is the bundle's own score on those documents cut into at most so many tiles: it shows what more tiles gain only
where the documents have detail that fewer lose, and a model was trained for as many. One JSON line for each number of
tiles; what the file already has of the same bundle, profile, settings, data, commit and machine is not measured
again. Exit code 0: measured, 1: the engine failed, 2: something given cannot be used. Not covered: several pictures in
a prompt.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.checked import At, ReportError, read_lines
from benchmarks.datasets import DataSet, read_dataset
from benchmarks.measure import Job
from benchmarks.quality import data_digest
from benchmarks.quality_report import Given, summarise
from benchmarks.records import BUDGET_SCHEMA, budget_point
from benchmarks.run import environment, measure_bundle
from benchmarks.systems import BundleSystem, Decoding
from device_harness.profiles import Profile, ProfileError, find_profile
from device_harness.record import commit
from export.documents import DataError
from runtimes.bundle import read_bundle
from runtimes.manifest import BundleError
from runtimes.preprocess import TILE_BUDGETS, ImageError
from runtimes.prompt import PromptEncoder
from runtimes.runner import EngineError, InputError


@dataclass(frozen=True)
class Documents:
    """Questions with right answers, and what names them: their digest, and each item's document by number."""

    data: DataSet
    digest: str
    numbers: tuple[int, ...]


def read_documents(path: Path, limit: int | None) -> Documents:
    """Raises DataError if the file cannot be used, or a question has no right answer."""
    data = read_dataset(path, limit=limit)
    for item in data.items:
        if not item.answers:
            raise DataError(f"{path}: item {item.name} has no answer, and accuracy wants one for each")
    digest, numbers = data_digest(data)
    return Documents(data, digest, tuple(numbers))


def measure_point(
    folder: Path,
    profile: Profile,
    job: Job,
    runs: int,
    documents: Documents | None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """One point of the curve, of `job.tiles` tiles.

    Raises:
        BundleError, InputError, EngineError, ImageError: as `measure_bundle` and `BundleSystem`.
    """
    records = measure_bundle(folder, profile, job, runs, lambda text: progress(f"{job.tiles} tiles: {text}"))
    first = records[0]
    tiles, tokens = first["first_token_of"]["tiles"], first["first_token_of"]["tokens"]
    peaks = [r["phases"]["first_token"]["peak_rss_mib"] for r in records]
    return {
        "schema": BUDGET_SCHEMA,
        **{name: first[name] for name in ("measured", "commit", "bundle", "profile", "simulated", "limit_enforced")},
        "environment": first["environment"],
        "job": {name: value for name, value in first["job"].items() if name != "bundle"},
        "runs": runs,
        "tiles": job.tiles,
        "tiles_made": tiles,
        "image_tokens": tiles * PromptEncoder.from_folder(folder).seq_len,
        "prompt_tokens": tokens,
        "samples_ms": [sample for r in records for sample in r["phases"]["first_token"]["samples_ms"]],
        "peak_rss_mib": max((peak for peak in peaks if peak is not None), default=None),
        "data_digest": documents.digest if documents else None,
        "accuracy": _accuracy(folder, job, documents, progress) if documents else None,
    }


def _accuracy(folder: Path, job: Job, documents: Documents, progress: Callable[[str], None]) -> dict[str, Any]:
    bundle = read_bundle(folder, allow_pending=job.allow_pending)
    system = BundleSystem(bundle, Decoding(tiles=job.tiles), threads=job.threads)
    given = []
    for i, item in enumerate(documents.data.items):
        if i % 100 == 0:
            progress(f"{job.tiles} tiles: document {i} of {len(documents.data.items)}")
        answer = system.answer(item)
        given.append(Given(answer.text, answer.cut))
    score = summarise(documents.data, given, documents.numbers)["all"]
    return {
        "data": documents.data.name,
        "metric": documents.data.metric,
        **{name: score[name] for name in ("items", "documents", "mean", "interval_95", "interval")},
    }


def measure_curve(
    folder: Path,
    profile: Profile,
    job: Job,
    runs: int,
    tiles: Sequence[int],
    out: Path | None = None,
    documents: Documents | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """A point for each number of tiles; written to `out` as it is measured, taken from there if this commit's is known.

    Raises:
        ReportError: if `out` holds something else, or cannot be written.
        BundleError, InputError, EngineError, ImageError: as `measure_point`.
    """
    kept = _kept(out)
    digest = read_bundle(folder, allow_pending=job.allow_pending).manifest.payload_digest
    points = []
    for count in tiles:
        wanted = replace(job, tiles=count)
        name = _name(digest, profile.name, wanted, runs, documents.digest if documents else None)
        known = next((row for row in kept if _name_of(row) == name), None)
        if known is not None:
            progress(f"{count} tiles: known")
            points.append(known)
            continue
        points.append(measure_point(folder, profile, wanted, runs, documents, progress))
        kept.append(points[-1])
        if out is not None:
            _write(out, kept)
    return points


def _name(digest: str, profile: str, job: Job, runs: int, data: str | None) -> tuple[object, ...]:
    numbers = job.tiles, job.threads, job.warmup, job.repeats
    here = commit(), environment()["processor"]
    return digest, profile, *numbers, sorted(job.options.items()), runs, data, *here


def _name_of(row: dict[str, Any]) -> tuple[object, ...]:
    at = At(row, "the line")
    job = at["job"]
    numbers = (job[name].whole() for name in ("tiles", "threads", "warmup", "repeats"))
    options = sorted((name, one.text()) for name, one in job["options"].fields().items())
    data = at.optional("data_digest")
    digest, profile = at["bundle"]["payload_digest"].text(), at["profile"]["name"].text()
    there = at["commit"].text(), at["environment"]["processor"].text()
    return digest, profile, *numbers, options, at["runs"].whole(), data.text() if data else None, *there


def _kept(out: Path | None) -> list[dict[str, Any]]:
    """The points in a file, checked."""
    if out is None or not out.exists():
        return []
    rows = []
    for line in read_lines(out):
        budget_point(line)
        rows.append(line.value)
    return rows


def _write(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    half = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        half.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        half.replace(out)
    except OSError as exc:
        raise ReportError(f"{out}: cannot be written: {exc.strerror or exc}") from exc


def table(points: Sequence[dict[str, Any]]) -> str:
    """The points as Markdown."""
    lines = ["| tiles | image tokens | first token, ms | peak, MiB | accuracy |", "|---|---|---|---|---|"]
    for point in points:
        peak, score = point["peak_rss_mib"], point["accuracy"]
        cells = [str(point["tiles"]), str(point["image_tokens"]), f"{median(point['samples_ms']):,.1f}"]
        cells += ["-" if peak is None else f"{peak:,.0f}", f"{score['mean']:.1%}" if score else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.budget", description=(__doc__ or "").splitlines()[0])
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle")
    command.add_argument("--data", type=Path, metavar="FILE", help="documents with answers, for accuracy")
    command.add_argument("--limit", type=int, metavar="N", help="use at most so many of them")
    command.add_argument(
        "--tiles", type=int, nargs="+", choices=TILE_BUDGETS, default=list(TILE_BUDGETS), help="default: all of them"
    )
    command.add_argument("--profile", default="x86-laptop", help="a shipped one, or FILE.toml:NAME (%(default)s)")
    command.add_argument("--runs", type=int, default=3, metavar="N", help="processes (%(default)s)")
    command.add_argument("--repeats", type=int, default=Job.repeats, metavar="N", help="within a run (%(default)s)")
    command.add_argument("--threads", type=int, metavar="N", help="default: one for each core of the profile")
    command.add_argument("--allow-pending", action="store_true", help="use a bundle whose proof has not passed")
    command.add_argument("--out", type=Path, metavar="FILE", help="keep the JSON lines in this file")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parser().parse_args(arguments)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        for name in ("runs", "repeats"):
            if getattr(args, name) < 1:
                raise InputError(f"--{name} is {getattr(args, name)}, want 1 or more")
        profile = find_profile(args.profile)
        threads = min(profile.cores, os.cpu_count() or 1) if args.threads is None else args.threads
        job = Job(
            bundle=str(args.bundle.resolve()),
            prefill_tokens=1,  # the first token is what counts here
            decode_at=0,
            decode_tokens=1,
            threads=threads,
            options=dict(profile.options),
            repeats=args.repeats,
            allow_pending=args.allow_pending,
        )
        documents = read_documents(args.data, args.limit) if args.data else None
        points = measure_curve(args.bundle, profile, job, args.runs, args.tiles, args.out, documents, say)
    except (ProfileError, BundleError, DataError, ImageError, InputError, EngineError, ReportError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1 if isinstance(exc, EngineError) else 2
    print(table(points))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
