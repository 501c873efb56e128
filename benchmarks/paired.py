"""Is this checkout slower than another commit? Runs of both in turn on this machine, compared pair by pair.

    python -m benchmarks.paired --base REF [--pairs 20] [--out FOLDER]

The base is checked out into a temporary folder, exports its own bundle of the demo checkpoint (or of --model) and
measures it with its own `benchmarks.run`; so does this checkout, with the files as they are now. Runs alternate
A B B A: a machine that gets slower meanwhile does so for both. Both use this Python with the packages that it has.
base.jsonl and new.jsonl in FOLDER are what `benchmarks.report --baseline` reads. Exit code 0: nothing takes more for
sure, 1: something does, 2: it could not be measured. Not covered: a change of dependencies, other machines.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.checked import ReportError, read_lines
from benchmarks.comparison import Comparison, compare_runs
from benchmarks.noise import LEAST_EFFECT, LEAST_RUNS
from benchmarks.records import read_runs
from benchmarks.report_page import markdown
from benchmarks.report_parts import comparison_blocks, comparison_verdict
from runtimes.preprocess import TILE_BUDGETS

HERE = Path(__file__).resolve().parent.parent
MODEL = "demo/checkpoint"  # of each checkout its own


class PairedError(RuntimeError):
    """What kept two versions from being measured."""


@dataclass(frozen=True)
class Side:
    """A version: its checkout, its bundle, and the file of its runs."""

    name: str
    folder: Path
    bundle: Path
    lines: Path


def command_in(folder: Path, arguments: Sequence[str], *, allowed: tuple[int, ...] = (0,)) -> str:
    """Runs `python -m ...` on the packages of a checkout; what it wrote to stdout.

    Raises:
        PairedError: if its exit code is none of those allowed, with what it said.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)  # noqa: S603  # our own modules
    if done.returncode not in allowed:
        raise PairedError(
            f"python -m {arguments[0]} in {folder} failed ({done.returncode}): {done.stderr[-1500:].strip()}"
        )
    return done.stdout


def git(*arguments: str) -> str:
    """What git says about this checkout. Raises PairedError with its message."""
    try:
        done = subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True, check=True)  # noqa: S603, S607  # fixed words, a ref
    except OSError as exc:
        raise PairedError(f"git cannot be run: {exc.strerror or exc}") from exc
    except subprocess.CalledProcessError as exc:
        raise PairedError(f"git {arguments[0]}: {exc.stderr.strip()}") from exc
    return done.stdout.strip()


@contextmanager
def checkout(ref: str, folder: Path) -> Iterator[Path]:
    """A commit's files in a new folder, gone at the end.

    Raises:
        PairedError: if there is no such commit here, or it has no benchmark.
    """
    if ref.startswith("-"):
        raise PairedError(f"{ref!r} is no commit")
    commit = git("rev-parse", "--verify", f"{ref}^{{commit}}")
    git("worktree", "add", "--detach", str(folder), commit)
    try:
        if not (folder / "benchmarks" / "run.py").exists():
            raise PairedError(f"commit {commit[:12]} has no benchmarks/run.py: there is nothing to compare with")
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def export_bundle(folder: Path, model: str, recipe: str, out: Path) -> Path:
    """A checkout's own bundle of a model, unproven. Raises PairedError."""
    command_in(folder, ["export.android", "--model", model, "--out", str(out), "--recipe", recipe, "--no-proof"])
    return out


def run_side(side: Side, options: Sequence[str], comparison: str, number: int | None) -> None:
    """One run; its line goes to the side's file under the number of its pair, or nowhere without one.

    Raises:
        PairedError, ReportError: if there is no line afterwards.
    """
    with tempfile.TemporaryDirectory(prefix="paired-") as scratch:
        lines = Path(scratch) / "run.jsonl"
        arguments = [
            "benchmarks.run",
            str(side.bundle),
            "--runs",
            "1",
            "--allow-pending",
            "--out",
            str(lines),
            *options,
        ]
        command_in(side.folder, arguments, allowed=(0, 1))  # 1: over a limit of the profile, or failed: then no line
        if not lines.exists():
            command_in(side.folder, arguments)
        (line,) = read_lines(lines)
    if number is not None:
        with side.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line.value | {"pair": {"comparison": comparison, "number": number}}) + "\n")


def run_pairs(
    base: Side, new: Side, options: Sequence[str], pairs: int, progress: Callable[[str], None] = lambda _: None
) -> None:
    """A pair to warm up, then `pairs` more, the base first in every other one. Raises PairedError, ReportError."""
    began = datetime.now(UTC).isoformat()
    comparison = hashlib.sha256(f"{began} {new.folder} {base.folder}".encode()).hexdigest()[:12]
    for number in range(-1, pairs):
        progress(f"pair {number + 1} of {pairs}" if number >= 0 else "warming up")
        for side in (base, new) if number % 2 == 0 else (new, base):
            run_side(side, options, comparison, number if number >= 0 else None)


def compare_commits(
    ref: str,
    out: Path,
    options: Sequence[str],
    *,
    pairs: int,
    model: str = MODEL,
    recipe: str = "int4-quick",
    least_effect: float = LEAST_EFFECT,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """This checkout against a commit.

    Args:
        ref: the commit.
        out: folder for base.jsonl and new.jsonl, which are made anew.
        options: further ones of `benchmarks.run`, for both.
        pairs: how many.
        model: a folder below each checkout, an absolute path, or a hub id.
        recipe: of both exports.
        least_effect: that matters.
        progress: is told how far it is.

    Raises:
        PairedError, ReportError: naming what failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = out.resolve() / "base.jsonl", out.resolve() / "new.jsonl"
    for path in lines:
        path.unlink(missing_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="smolport-base-") as scratch,
        checkout(ref, Path(scratch) / "base") as folder,
    ):
        sides = []
        for name, where, file in zip(("base", "new"), (folder, HERE), lines, strict=True):
            progress(f"{name}: exporting {model} with {recipe}")
            sides.append(Side(name, where, export_bundle(where, model, recipe, Path(scratch) / f"{name}-bundle"), file))
        run_pairs(sides[0], sides[1], options, pairs, progress)
    return compare_runs(read_runs(lines[0]), read_runs(lines[1]), least_effect)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.paired", description=(__doc__ or "").splitlines()[0])
    command.add_argument("--base", required=True, metavar="REF", help="the commit to compare with")
    command.add_argument("--pairs", type=int, default=20, metavar="N", help=f"{LEAST_RUNS} or more (%(default)s)")
    command.add_argument("--model", default=MODEL, help="what both export (%(default)s, of each commit its own)")
    command.add_argument("--recipe", default="int4-quick", help="of both exports (%(default)s)")
    command.add_argument("--profile", default="x86-laptop", help="as of benchmarks.run (%(default)s)")
    command.add_argument("--tiles", type=int, default=5, choices=[0, *TILE_BUDGETS], help="of a picture (%(default)s)")
    command.add_argument(
        "--least-effect", type=float, default=LEAST_EFFECT, metavar="PART", help="that matters (%(default)s)"
    )
    command.add_argument("--out", type=Path, default=Path("build/report"), help="folder of the runs (%(default)s)")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    command = parser()
    args = command.parse_args(arguments)
    if args.pairs < LEAST_RUNS:
        command.error(f"--pairs is {args.pairs}, want {LEAST_RUNS} or more: fewer cannot be judged")
    if not 0 <= args.least_effect < 10:
        command.error(f"--least-effect is {args.least_effect}, want a part such as 0.05")
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        options = ["--profile", args.profile, "--tiles", str(args.tiles), "--repeats", "10", "--decode-tokens", "48"]
        own = args.model == MODEL or not Path(args.model).exists()
        found = compare_commits(
            args.base,
            args.out,
            options,
            pairs=args.pairs,
            model=args.model if own else str(Path(args.model).resolve()),
            recipe=args.recipe,
            least_effect=args.least_effect,
            progress=say,
        )
    except (PairedError, ReportError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    print(markdown([comparison_verdict(found), *comparison_blocks(found, "comparison")]))
    return 1 if found.regression else 0


if __name__ == "__main__":
    raise SystemExit(main())
