"""Ways of rounding compared: a checkpoint's decoder in 4, 3 and 2 bits by each, on the same documents.

    python -m benchmarks.methods --model demo/checkpoint --data DOCUMENTS [DOCUMENTS ...] --calibration DOCUMENTS

Weights alone differ (`benchmarks.forced`): the decoder's projections in blocks, everything else as it was. A row says
what is lost against the full-precision model, exact answers with a paired 95 % interval over documents, and the KL
divergence as a part of plain rounding's, with one too. One JSON line a row (--out), and a table. Not covered:
activations in 8 bits, and what a bundle computes (`benchmarks.quality`).
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.forced import Documents, Forced, Weighted
from benchmarks.scores import mean_interval, paired_summary
from export.calibrate import affordable_tokens, calibrate, calibration_prompts, identity
from export.checkpoint import resolve
from export.documents import DataError, Document, read_data
from export.processor import write_processor_files
from export.spec import CheckpointError, read_spec
from export.weights import WeightSource, open_weights
from quantize.int4 import F32, as_floats
from quantize.recipe import Limits, Recipe, Scheme

PROJECTIONS = "model.text_model.layers.*_proj.weight"
# name -> rounding, factors, zero points of their own
METHODS = {
    "plain, no zero points": ("nearest", False, False),
    "plain": ("nearest", False, True),
    "fitted, no zero points": ("fitted", False, False),
    "fitted": ("fitted", False, True),
    "factors, fitted": ("fitted", True, True),
    "GPTQ": ("gptq", False, True),
    "factors, GPTQ": ("gptq", True, True),
}
BASE = "plain"


def method_recipe(method: str, bits: int, block: int) -> Recipe:
    """The decoder's projections by one method; all else in floats."""
    rounding, factors, zero_points = METHODS[method]
    scheme = Scheme("block", bits, block, not zero_points, rounding=rounding)
    return Recipe(f"{method}, {bits} bits", "", ((PROJECTIONS, scheme),), Limits(1, 1, 1, 1), factors)


def quantized(source: WeightSource, recipe: Recipe) -> Weighted:
    """What is left of a source's weights after a recipe."""

    def changed(name: str) -> F32 | None:
        scheme = recipe.scheme(name)
        return None if scheme.format == "float" else as_floats(source.quantized(name, scheme))

    return Weighted(source, changed)


def summary(documents: Documents, found: Forced, plain: Forced | None) -> dict[str, Any]:
    """One row's figures; `plain` is what the KL divergence is compared with."""
    chosen, numbers = documents.answered, documents.numbers
    before, after = (x.exact[chosen].astype(float).tolist() for x in (documents.reference, found))
    paired = paired_summary(before, after, [numbers[i] for i in chosen])
    row: dict[str, Any] = {
        "documents": len(set(numbers)),
        "reference_exact": sum(before) / len(before),
        "exact": sum(after) / len(after),
        "lost": paired["lost"],
        "gained": paired["gained"],
        "loss": -paired["difference"],
        "loss_interval_95": [-end for end in reversed(paired["interval_95"])],
        "kl": found.kl_mean,
        "top1": float(found.same.mean()),
    }
    if plain is not None:
        row["kl_of_plain"] = found.kl_mean / plain.kl_mean
        row["kl_of_plain_interval_95"] = list(mean_interval(found.kl.tolist(), plain.kl.tolist(), numbers))
    return row


def data_sets(data: Sequence[Path], limit: int | None) -> dict[str, list[Document]]:
    """Documents by the name of their file or folder. Raises DataError for equal names, and for no answers at all."""
    sets: dict[str, list[Document]] = {}
    for path in data:
        name = path.parent.name if path.name == "documents.jsonl" else path.name
        if name in sets:
            raise DataError(f"{path}: another data set is called {name} too, and rows could not be told apart")
        sets[name] = read_data(path, limit)
        if not any(document.answers for document in sets[name]):
            raise DataError(f"{path}: none of its questions has an answer")
    return sets


def compare(
    model: str,
    data: list[Path],
    calibration: Path,
    bits: list[int],
    blocks: list[int],
    progress: Callable[[str], None],
    limit: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows for every format and method, each data set in turn. Raises CheckpointError, DataError."""
    read = data_sets(data, limit)
    folder = resolve(model).folder
    spec = read_spec(folder)
    weights = open_weights(folder, spec)
    with tempfile.TemporaryDirectory() as scratch:
        processor, work = Path(scratch) / "processor", Path(scratch) / "work"
        processor.mkdir()
        write_processor_files(folder, spec, processor, None)
        prompts, used = calibration_prompts(
            processor, read_data(calibration), affordable_tokens(spec), spec.text.max_positions
        )
        sets = {name: Documents(spec, weights, processor, documents, progress) for name, documents in read.items()}
        for block in blocks:
            for bit in bits:
                plain: dict[str, Forced] = {}
                for method in sorted(METHODS, key=lambda name: name != BASE):
                    progress(f"{bit} bits, blocks of {block}, {method}")
                    recipe = method_recipe(method, bit, block)
                    source: WeightSource = weights
                    if recipe.calibrated:
                        source = calibrate(identity(folder), spec, weights, recipe, prompts, work)
                    for name, documents in sets.items():
                        found = documents.measure(quantized(source, recipe), vision=recipe.factors)
                        plain.setdefault(name, found)
                        row = summary(documents, found, plain[name] if method != BASE else None)
                        head = {"data": name, "bits": bit, "block": block, "method": method}
                        yield head | row | {"calibration_tokens": used.tokens if recipe.calibrated else 0}


def kept(rows: Iterable[dict[str, Any]], out: Path | None) -> list[dict[str, Any]]:
    """All rows, each appended to a file as it comes. Raises DataError if the file cannot be written."""
    found = []
    try:
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") if out else nullcontext() as file:
            for row in rows:
                found.append(row)
                if file:
                    file.write(json.dumps(row) + "\n")
                    file.flush()
    except OSError as exc:
        raise DataError(f"{out}: cannot be written: {exc.strerror or exc}") from exc
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = [
        "data",
        "bits",
        "block",
        "method",
        "exact",
        "lost / gained",
        "loss, 95 % interval",
        "KL",
        "of plain",
        "top-1",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        low, high = row["loss_interval_95"]
        part = ""
        if "kl_of_plain" in row:
            a, b = row["kl_of_plain_interval_95"]
            part = f"{row['kl_of_plain']:.2f} ({a:.2f} to {b:.2f})"
        cells = [row["data"], row["bits"], row["block"], row["method"], f"{row['exact']:.2%}"]
        cells += [f"{row['lost']} / {row['gained']}", f"{row['loss']:.2%} ({low:.2%} to {high:.2%})"]
        cells += [f"{row['kl']:.2e}", part, f"{row['top1']:.2%}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def command(program: str, description: str, calibration: str) -> argparse.ArgumentParser:
    """What the command lines of comparisons share; `calibration` says what its documents are for."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description.splitlines()[0])
    parser.add_argument(
        "--model", default="demo/checkpoint", help="a checkpoint folder, or a hub id (default: %(default)s)"
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="documents.jsonl, or folders that hold it")
    parser.add_argument("--calibration", type=Path, required=True, help=calibration)
    parser.add_argument("--limit", type=int, help="use at most this many documents of each")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")
    return parser


def carry_out(rows: Callable[[Callable[[str], None]], Iterable[dict[str, Any]]], out: Path | None) -> int:
    """Makes the rows, given what is told of progress, keeps and prints them; the exit code."""
    began = time.monotonic()

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        found = kept(rows(progress), out)
    except (CheckpointError, DataError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    print(table(found))
    return 0


def main() -> int:
    parser = command("benchmarks.methods", __doc__, "documents to calibrate on")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], choices=[2, 3, 4], help="default: 4 3 2")
    parser.add_argument("--block", type=int, nargs="+", default=[32], help="default: 32")
    args = parser.parse_args()
    return carry_out(
        lambda progress: compare(args.model, args.data, args.calibration, args.bits, args.block, progress, args.limit),
        args.out,
    )


if __name__ == "__main__":
    raise SystemExit(main())
