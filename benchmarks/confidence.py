"""Learns from a bundle's own answers how probably one is wrong, and measures what that is worth before it is used.

    python -m benchmarks.confidence BUNDLE [--data CALIBRATION --test-data TEST] [--out FOLDER]

A bundle answers documents of the calibration split; a ridge logistic regression is fitted on its tokens' log-
probabilities (the features of router_client/confidence.py), and judged on the test split: calibration, risk by
coverage, and how many of the wrong answers an escalation budget of 10, 20 and 30 % catches. Without --data the
documents are the project's synthetic ones, made hard by blur, small print and noise; else data sets as
benchmarks.quality reads them.

What was learnt is written beside the bundle as BUNDLE.confidence.json, if it beats random escalation at every budget by
a 95 % interval that excludes zero. Every answer is kept in --out at once: a run that was killed goes on where it was.
Exit code 0: written; 1: no better than random, nothing written; 2: something given cannot be used; 130: interrupted.
Not covered: answers sampled at a temperature; what a larger model would answer (it is assumed to be right with
probability 1 or 0.9).
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from benchmarks.confidence_report import report_text
from benchmarks.datasets import read_dataset
from benchmarks.escalation import BUDGETS, at_thresholds, auroc, caught, ece, evaluate
from benchmarks.journal import JournalError
from benchmarks.judged import SPLITS, Judged, Source, drawn_sources, file_sources, judged
from benchmarks.logistic import Numbers, fit_chosen, log_loss
from demo.evaluate import wilson
from export.documents import DataError
from export.prove import ANSWER_TOKENS
from router_client.confidence import FEATURES, SCHEMA, features, load
from router_client.local import ContextTooLongError, Token
from runtimes.bundle import Bundle, read_bundle
from runtimes.chat import open_chat
from runtimes.local_leg import LocalLeg, confidence_file, template_digest
from runtimes.manifest import BundleError
from runtimes.preprocess import TILE_BUDGETS, ImageError
from runtimes.runner import EngineError, InputError, engine_name

COUNT = 2000  # drawn documents of each split
LEAST_ANSWERS, LEAST_OF_EACH = 200, 20  # to be fitted on: in all, right ones, wrong ones
ERRORS = (BundleError, DataError, EngineError, ImageError, InputError, JournalError, ContextTooLongError)


def learn(rows: Sequence[Judged], payload_digest: str, template_digest: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the file holds, figures of the fit), from answers of the calibration split.

    Answers with a hard signal are left out: such a one is escalated whatever is said of it here.

    Raises:
        DataError: if an answer is of another split, or there are too few.
    """
    if others := {row.split for row in rows} - {SPLITS[0]}:
        raise DataError(f"answers of split {', '.join(sorted(others))} are not fitted on, only those of {SPLITS[0]}")
    rows = [row for row in rows if not row.signal]
    wrong = _wrong(rows)
    if len(rows) < LEAST_ANSWERS or not LEAST_OF_EACH <= wrong.sum() <= len(rows) - LEAST_OF_EACH:
        raise DataError(
            f"{len(rows)} answers without a hard signal, {int(wrong.sum())} of them wrong; want {LEAST_ANSWERS} or "
            f"more, {LEAST_OF_EACH} or more of them right, and as many wrong"
        )
    try:
        model, left_out = fit_chosen(_table(rows), wrong, _documents(rows))
    except ValueError as exc:
        raise DataError(str(exc)) from exc
    terms = zip(FEATURES, model.mean, model.scale, model.weights, strict=True)
    content = {
        "schema": SCHEMA,
        "payload_digest": payload_digest,
        "template_digest": template_digest,
        "bias": model.bias,
        "features": [{"name": n, "mean": float(m), "scale": float(s), "weight": float(w)} for n, m, s, w in terms],
        "budgets": {str(b): float(np.quantile(left_out, 1 - b)) for b in BUDGETS},
        "fitted": {
            "answers": len(rows),
            "wrong": int(wrong.sum()),
            "penalty": model.penalty,
            "documents_digest": hashlib.sha256("".join(sorted({row.document for row in rows})).encode()).hexdigest(),
        },
    }
    figures = {"ece": ece(left_out, wrong), "auroc": auroc(left_out, wrong), "log_loss": log_loss(left_out, wrong)}
    return content, {"penalty": model.penalty, "left_out": figures}


def _table(rows: Sequence[Judged]) -> Numbers:
    """The features [N, K] of answers."""
    found = []
    for row in rows:
        values = features(row.logprobs, row.margins)
        if values is None:
            raise DataError(f"an answer about document {row.document[:12]} has no log-probabilities")
        found.append([values[name] for name in FEATURES])
    return np.array(found)


def _wrong(rows: Sequence[Judged]) -> Numbers:
    return np.array([float(row.wrong) for row in rows])


def _documents(rows: Sequence[Judged]) -> npt.NDArray[np.int64]:
    """The number of each answer's document, from 0."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(row.document, len(numbers)) for row in rows], dtype=np.int64)


def judge(rows: Sequence[Judged], fitted_on: Sequence[Judged], file: Path, *digests: str) -> dict[str, Any]:
    """What the file's p_wrong is worth on answers of the test split, by the code that a device runs.

    Raises:
        DataError: if an answer is of another split, or about a document that was fitted on.
    """
    if others := {row.split for row in rows} - {SPLITS[1]}:
        raise DataError(f"answers of split {', '.join(sorted(others))} do not judge, only those of {SPLITS[1]}")
    if shared := {row.document for row in rows} & {row.document for row in fitted_on}:
        raise DataError(f"{len(shared)} documents of the test split were fitted on")
    confidence = load(file, *digests)
    rows = [row for row in rows if not row.signal]
    wrong = _wrong(rows)
    said = [confidence([Token("", *pair) for pair in zip(row.logprobs, row.margins, strict=True)]) for row in rows]
    p_wrong = np.array([np.nan if p is None else p for p in said])
    if np.isnan(p_wrong).any():
        raise DataError("an answer of the test split has no log-probabilities")
    kinds = sorted({row.kind for row in rows})
    by_kind = {kind: np.array([row.kind == kind for row in rows]) for kind in kinds}
    rankings = {
        "mean logprob": -np.array([np.mean(row.logprobs) for row in rows]),
        "sum of logprobs": -np.array([sum(row.logprobs) for row in rows]),
        "least logprob": -np.array([min(row.logprobs) for row in rows]),
        "least margin": -np.array([min(row.margins) for row in rows]),
    }
    return evaluate(p_wrong, wrong, _documents(rows)) | {
        "at_thresholds": at_thresholds(p_wrong, wrong, sorted(confidence.budgets.items())),
        "by_kind": {
            kind: {"answers": int(of.sum()), "said": float(p_wrong[of].mean()), "wrong": float(wrong[of].mean())}
            for kind, of in by_kind.items()
        },
        "other_rankings": {
            name: {"auroc": auroc(by, wrong), "caught": {str(b): caught(by, wrong, b) for b in BUDGETS}}
            for name, by in rankings.items()
        },
    }


def confidence(
    bundle: Bundle,
    calibration: Sequence[Source],
    test: Sequence[Source],
    out: Path,
    file: Path,
    *,
    tiles: int | None = None,
    threads: int = 0,
    max_tokens: int = ANSWER_TOKENS,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Answers, learns, judges; writes `file` if that passed. Returns the report.

    Raises:
        any of ERRORS: if something cannot be used.
    """
    leg = LocalLeg(lambda: open_chat(bundle, tiles=tiles, threads=threads))
    manifest = bundle.manifest
    digests = (manifest.payload_digest, template_digest(leg.loaded()))
    named = {"model": manifest.model.name, "target": manifest.target, "recipe": manifest.recipe.name}
    engine = engine_name(bundle) + (f" {onnxruntime.__version__}" if manifest.target == "onnx" else "")
    identity = named | {
        "payload_digest": digests[0],
        "template_digest": digests[1],
        "engine": engine,
        "max_tokens": max_tokens,
    }
    rows = [judged(leg, identity, sources, out, max_tokens, progress) for sources in (calibration, test)]
    content, fit = learn(rows[0], *digests)
    half = file.with_name(f".{file.name}.partial")
    try:
        half.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        try:
            judgement = judge(rows[1], rows[0], half, *digests)
            if judgement["passed"]:
                half.replace(file)
        finally:
            half.unlink(missing_ok=True)
    except OSError as exc:
        raise JournalError(f"{file}: cannot be written: {exc.strerror or exc}") from exc
    return {
        "schema": SCHEMA,
        "bundle": named | {"payload_digest": digests[0]},
        "template_digest": digests[1],
        "engine": engine,
        "max_tokens": max_tokens,
        "data": {split: _counts(found) for split, found in zip(SPLITS, rows, strict=True)},
        "fit": fit | {"bias": content["bias"], "features": content["features"]},
        "test": judgement,
    }


def _counts(rows: Sequence[Judged]) -> dict[str, Any]:
    """How many answers, and of which kinds how many were wrong."""

    def count(chosen: Sequence[Judged]) -> dict[str, Any]:
        wrong = sum(row.wrong for row in chosen)
        return {"answers": len(chosen), "wrong": wrong, "interval_95": list(wilson(wrong, len(chosen)))}

    kinds = sorted({row.kind for row in rows})
    return count(rows) | {
        "hard_signals": sum(bool(row.signal) for row in rows),
        "by_kind": {kind: count([row for row in rows if row.kind == kind]) for kind in kinds},
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    text = (__doc__ or "").partition("\n")[0]
    command = argparse.ArgumentParser(prog="python -m benchmarks.confidence", description=text)
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle")
    command.add_argument("--data", type=Path, metavar="FILE", help="labelled documents to fit on (default: drawn ones)")
    command.add_argument("--test-data", type=Path, metavar="FILE", help="others, to judge on; belongs to --data")
    command.add_argument("--count", type=int, default=COUNT, metavar="N", help="drawn documents a split (%(default)s)")
    command.add_argument("--file", type=Path, help="where to write what was learnt (BUNDLE.confidence.json)")
    command.add_argument("--tiles", type=int, choices=TILE_BUDGETS, help="at most so many tiles an image")
    command.add_argument("--threads", type=int, default=0, metavar="N", help="0, the default, lets the engine choose")
    command.add_argument("--max-new-tokens", type=int, default=ANSWER_TOKENS, metavar="N", help="default: %(default)s")
    command.add_argument("--allow-pending", action="store_true", help="use a bundle whose proof has not passed")
    command.add_argument(
        "--out", type=Path, default=Path("build/confidence"), help="folder of answers and the report (%(default)s)"
    )
    command.add_argument("--json", action="store_true", help="the report as the last line of stdout too")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    command = parser()
    args = command.parse_args(arguments)
    if (args.data is None) != (args.test_data is None):
        command.error("--data and --test-data belong together: what is fitted on does not judge")
    if args.threads < 0 or args.count < 1 or args.max_new_tokens < 1:
        command.error(
            f"--threads {args.threads}, --count {args.count}, --max-new-tokens {args.max_new_tokens}: too few"
        )
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    file = args.file or confidence_file(args.bundle)
    try:
        bundle = read_bundle(args.bundle, allow_pending=args.allow_pending)
        if args.data is None:
            sources = [drawn_sources(split, args.count) for split in SPLITS]
        else:
            paths = zip((args.data, args.test_data), SPLITS, strict=True)
            sources = [file_sources(read_dataset(path), split) for path, split in paths]
        report = confidence(
            bundle,
            sources[0],
            sources[1],
            args.out,
            file,
            tiles=args.tiles,
            threads=args.threads,
            max_tokens=args.max_new_tokens,
            progress=say,
        )
    except ERRORS as exc:
        message = " ".join(str(exc).split())
        print(f"error: {message}", file=sys.stderr)
        if args.json:
            print(json.dumps({"error": message}))
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; what was answered is kept in {args.out}", file=sys.stderr)
        return 130
    text, passed = report_text(report), report["test"]["passed"]
    place = args.out / f"confidence-{report['bundle']['payload_digest'][:12]}.json"
    place.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    place.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    print(f"report in {place.with_suffix('.md')} and {place}", file=sys.stderr)
    print(f"written: {file}" if passed else "no better than random: nothing was written", file=sys.stderr)
    if args.json:
        print(json.dumps(report))
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
