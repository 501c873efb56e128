"""A report on runs of a bundle: report.html (one page with plots), report.md and report.json, from JSON lines.

    python -m benchmarks.report RUNS.jsonl ... [--baseline BASE.jsonl] [--quality QUALITY.json] [--budget CURVE.jsonl]

RUNS are of `benchmarks.run`. With --baseline each group of its runs is compared with those of RUNS that differ in the
bundle or the commit alone; runs of `benchmarks.paired` pair by pair, others by two independent sets of runs, and the
report says which. Exit code 0: made, 1: made, and something takes more than the base for sure (`--least-effect`), 2: a
file cannot be reported on, or the runs are not of one machine and setting. Not covered: measuring (see `make report`).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.checked import ReportError
from benchmarks.comparison import Comparison, compare_runs, obstacles
from benchmarks.figures import Inputs, groups, report_figures
from benchmarks.noise import LEAST_EFFECT
from benchmarks.records import Run, read_budget, read_kernels, read_losses, read_runs
from benchmarks.report_page import Text, markdown, page
from benchmarks.report_parts import TITLE, report_blocks

SIZES = Path(__file__).parent / "results" / "recipe_loss.jsonl"


def compare_with(base: Sequence[Run], new: Sequence[Run], least_effect: float) -> list[Comparison]:
    """Every group of the base with every group of the new runs that may be compared with it.

    Raises:
        ReportError: if a group of the base can be compared with none, with the reasons.
    """
    found = []
    ours = groups(new)
    for theirs in groups(base):
        mine = [group for group in ours if theirs[0].pair and group[0].pair and theirs[0].pair[0] == group[0].pair[0]]
        fitting = [group for group in mine or ours if not list(obstacles(theirs[0], group[0]))]
        found += [compare_runs(theirs, group, least_effect) for group in fitting or (mine or ours)[:1]]
    return found


def write_report(inputs: Inputs, out: Path) -> dict[str, Any]:
    """Writes report.md, report.html and report.json into a folder; returns the figures.

    Raises:
        ReportError: if they cannot be written.
    """
    figures = report_figures(inputs)
    blocks = report_blocks(inputs, figures)
    texts = {
        "report.json": json.dumps(figures, indent=1) + "\n",
        "report.md": markdown([*blocks, Text("The plots are in report.html.")]),
        "report.html": page(TITLE, blocks),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            half = out / f".{name}.partial"
            half.write_text(text, encoding="utf-8")
            half.replace(out / name)
    except OSError as exc:
        raise ReportError(f"{out}: cannot be written: {exc.strerror or exc}") from exc
    return figures


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").splitlines()[0])
    command.add_argument("runs", type=Path, nargs="+", metavar="RUNS", help="JSON lines of benchmarks.run")
    command.add_argument("--baseline", type=Path, metavar="FILE", help="JSON lines of the base")
    command.add_argument(
        "--least-effect", type=float, default=LEAST_EFFECT, metavar="PART", help="that matters (%(default)s)"
    )
    command.add_argument("--budget", type=Path, metavar="FILE", help="JSON lines of benchmarks.budget")
    command.add_argument("--quality", type=Path, metavar="FILE", help="JSON of benchmarks.quality, with a reference")
    command.add_argument(
        "--sizes", type=Path, default=SIZES, metavar="FILE", help="JSON lines with sizes of its bundles (recipe_loss)"
    )
    command.add_argument("--kernels", type=Path, metavar="FILE", help="JSON of pytest-benchmark")
    command.add_argument("--out", type=Path, default=Path("build/report"), help="folder of the report (%(default)s)")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    command = parser()
    args = command.parse_args(arguments)
    if not 0 <= args.least_effect < 10:
        command.error(f"--least-effect is {args.least_effect}, want a part such as 0.05")
    try:
        runs = [run for path in args.runs for run in read_runs(path)]
        inputs = Inputs(
            runs,
            compare_with(read_runs(args.baseline), runs, args.least_effect) if args.baseline else (),
            read_budget(args.budget) if args.budget else (),
            read_losses(args.quality, args.sizes) if args.quality else (),
            read_kernels(args.kernels) if args.kernels else (),
        )
        write_report(inputs, args.out)
    except ReportError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    print(f"report in {args.out / 'report.html'}, report.md and report.json")
    worse = [f"{row.name}: {row.ratio.ratio:.3f}" for one in inputs.comparisons for row in one.rows if row.regression]
    for text in worse:
        print(f"regression: {text}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
