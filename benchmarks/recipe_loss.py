"""What each recipe costs in answers: exports and proves one checkpoint with every recipe, on the same documents.

    python -m benchmarks.recipe_loss --model demo/checkpoint --data DOCUMENTS --calibration DOCUMENTS [--recipe int4]

One JSON line a recipe, taken from the bundle's own report, and a table. A recipe that is over its own limits
gives no bundle and no line. Not covered: speed and memory.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from export.android import export_android
from export.documents import DataError
from export.prove import ProofError
from export.spec import CheckpointError
from quantize.recipe import SHIPPED, RecipeError
from runtimes.manifest import BundleError
from runtimes.runner import EngineError, InputError


def measure(model: str, recipe: str, data: Path, limit: int | None, calibration: Path | None) -> dict[str, Any]:
    """The size and the three errors of one recipe. Raises what `export_android` raises."""
    with tempfile.TemporaryDirectory(prefix="recipe-loss-") as scratch:
        done = export_android(model, Path(scratch) / "bundle", recipe, data=data, limit=limit, calibration=calibration)
    report = done.report
    assert report is not None
    errors = ("features_error", "logits_error", "tokens_equal", "tokens", "ties")
    return {
        "model": report["model"]["name"],
        "recipe": report["recipe"]["name"],
        "payload_digest": done.payload_digest,
        "payload_bytes": done.payload_bytes,
        "export_error": {key: report["export_error"][key] for key in errors},
        "activation_error": {key: report["activation_error"][key] for key in errors},
        "quantization_loss": report["quantization_loss"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    tasks = sorted(rows[0]["quantization_loss"].get("exact", {}))
    head = ["recipe", "MB", *tasks, "lost / gained", "KL", "top-1", "export error", "activation error"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        loss, exact = row["quantization_loss"], row["quantization_loss"].get("exact", {})
        cells = [row["recipe"], f"{row['payload_bytes'] / 1e6:.2f}"]
        cells += [f"{exact[task]['bundle']:.1%}" for task in tasks]
        cells.append(f"{exact['all']['lost']} / {exact['all']['gained']}" if exact else "")
        cells += [f"{loss['kl_mean']:.1e}", f"{loss['top1_agreement']:.2%}"]
        for error in (row["export_error"], row["activation_error"]):
            cells.append(f"{error['features_error']:.1e}, {error['logits_error']:.1e}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe_loss", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="demo/checkpoint", help="a checkpoint folder, or a hub id (default: %(default)s)"
    )
    parser.add_argument("--data", type=Path, required=True, help="documents.jsonl, or the folder that holds it")
    parser.add_argument("--calibration", type=Path, help="documents by which calibrated recipes round")
    parser.add_argument("--limit", type=int, help="use at most this many documents")
    parser.add_argument("--recipe", action="append", help="may be repeated (default: every shipped one)")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")
    args = parser.parse_args()
    rows, failed = [], False
    for recipe in args.recipe or SHIPPED:
        print(f"exporting and proving recipe {recipe}", file=sys.stderr, flush=True)
        try:
            rows.append(measure(args.model, recipe, args.data, args.limit, args.calibration))
        except ProofError as exc:
            print(f"{recipe}: {exc}", file=sys.stderr)
            failed = True
            continue
        except (BundleError, CheckpointError, DataError, RecipeError, InputError, EngineError) as exc:
            print(f"error: {exc}", file=sys.stderr)
            return 2
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(rows[-1]) + "\n")
    if rows:
        print(table(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
