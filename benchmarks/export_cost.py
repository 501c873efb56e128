"""What an export costs at full size: time and peak memory of weights to graphs, on random checkpoints.

    python -m benchmarks.export_cost --size 2.2b [--target android] [--runs 3] [--proof] [--out FILE.jsonl]

Each run is a process of its own; its peak is the kernel's ru_maxrss. The bundle then answers a question with the engine
that runs it here. One JSON line a run, and a table of medians. Not covered: accuracy (the weights are random), devices.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.random_checkpoint import SIZES
from runtimes.ort import cpu_features, saturates

RANDOM = Path(__file__).parent / "int4-random.toml"


def timed(arguments: list[str]) -> dict[str, Any]:
    """Runs `python -m ...`; its wall time, CPU time and peak memory, and the JSON of its last line.

    Raises:
        RuntimeError: if it fails, with what it said.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=out, stderr=err)  # noqa: S603  # our own modules
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise RuntimeError(f"python -m {' '.join(arguments)} failed: {err.read()[-2000:]}")
        last = out.read().strip().splitlines()[-1]
    return {
        "wall_s": round(time.monotonic() - began, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_mib": round(usage.ru_maxrss / 1024, 1),
        "result": json.loads(last),
    }


def measure(
    checkpoint: Path, size: str, recipe: str, *, target: str = "android", answer_tokens: int = 4, proof: bool = False
) -> dict[str, Any]:
    """One export of a checkpoint, one answer from the bundle (0 tokens: none), one proof where asked for."""
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix="export-cost-") as scratch:
        bundle = Path(scratch) / "bundle"
        where = ["--model", str(checkpoint)]
        export = timed([f"export.{target}", *where, "--out", str(bundle), "--recipe", recipe, "--no-proof", "--json"])
        row = {
            "size": size,
            "target": target,
            "recipe": Path(recipe).stem,
            "payload_bytes": export["result"]["payload_bytes"],
            "graphs_s": round(export["result"]["export_s"], 2),  # inside the process, without starting Python
            "export": {k: export[k] for k in ("wall_s", "cpu_s", "peak_rss_mib")},
        }
        if answer_tokens:
            question = [
                str(bundle),
                "--allow-pending",
                "--max-new-tokens",
                str(answer_tokens),
                "--json",
                "Say something.",
            ]
            answer = timed(["runtimes.ask", *question])
            row["answer_tokens"] = answer["result"]["tokens"]
            row["answer"] = {k: answer[k] for k in ("wall_s", "cpu_s", "peak_rss_mib")}
        if proof:
            done = timed(["export.prove", str(bundle), *where, "--recipe", recipe, "--json"])
            row["proof"] = {k: done[k] for k in ("wall_s", "cpu_s", "peak_rss_mib")}
            report = done["result"]["report"]
            for error in ("export_error", "activation_error"):
                row[error] = {k: report[error][k] for k in ("features_error", "logits_error", "tokens_equal", "tokens")}
    row["machine"] = {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "vnni": not saturates(cpu_features(), platform.machine()),
        "python": platform.python_version(),
    }
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, one line a size and target: medians, and the highest peaks."""
    head = ["size", "target", "runs", "payload MB", "weights to graphs, s", "peak, MiB"]
    head += ["first answer, peak MiB", "proof, s", "proof, peak MiB"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for size, target in dict.fromkeys((row["size"], row["target"]) for row in rows):
        runs = [row for row in rows if (row["size"], row["target"]) == (size, target)]
        proofs = [row["proof"] for row in runs if "proof" in row]
        answers = [row["answer"] for row in runs if "answer" in row]
        cells = [
            size,
            target,
            str(len(runs)),
            f"{runs[0]['payload_bytes'] / 1e6:.0f}",
            f"{statistics.median(row['graphs_s'] for row in runs):.1f}",
            f"{max(row['export']['peak_rss_mib'] for row in runs):.0f}",
            f"{max(a['peak_rss_mib'] for a in answers):.0f}" if answers else "-",
            f"{statistics.median(p['wall_s'] for p in proofs):.0f}" if proofs else "-",
            f"{max(p['peak_rss_mib'] for p in proofs):.0f}" if proofs else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), action="append", help="may be repeated (default: all)")
    parser.add_argument("--target", choices=("android", "ios"), default="android", help="default: %(default)s")
    parser.add_argument("--answer-tokens", type=int, default=4, help="0: ask nothing (default: %(default)s)")
    parser.add_argument("--recipe", default=str(RANDOM), help="default: the rules of int4, without limits on the loss")
    parser.add_argument("--runs", type=int, default=3, help="exports of each size (default: %(default)s)")
    parser.add_argument("--proof", action="store_true", help="prove the bundle of the last run too")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("build/random"), help="kept here (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")
    args = parser.parse_args()
    rows = []
    for size in args.size or sorted(SIZES):
        checkpoint = args.checkpoints / size
        if not checkpoint.exists():
            print(f"making a random {size} checkpoint in {checkpoint}", file=sys.stderr, flush=True)
            command = ["benchmarks.random_checkpoint", "--size", size, "--out", str(checkpoint)]
            subprocess.run([sys.executable, "-m", *command], check=True)  # noqa: S603  # our own module
        for run in range(args.runs):
            rows.append(
                measure(
                    checkpoint,
                    size,
                    args.recipe,
                    target=args.target,
                    answer_tokens=args.answer_tokens,
                    proof=args.proof and run == args.runs - 1,
                )
            )
            line = json.dumps(rows[-1])
            print(line, flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with args.out.open("a", encoding="utf-8") as out:
                    out.write(line + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
