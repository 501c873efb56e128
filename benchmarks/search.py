"""A recipe for a model and its documents: the smallest bundle that loses no more than it may.

    python -m benchmarks.search MODEL --data search-documents.jsonl --max-size 900MB --max-loss 0.01 --out mine.toml

Each group of tensors is quantized alone, in each format that it may have, and what that costs on the documents is
measured: the mean KL divergence from full precision along the right answers. The loss of a whole recipe is predicted as
the sum over its groups. That is a model, not a law: the divergence is about quadratic in what disturbs the logits, so
that losses add up where the disturbances are small and have nothing to do with each other. Search by sensitivity rests
on it (Z. Dong et al., HAWQ-V2, NeurIPS 2020; Z. Yao et al., HAWQ-V3, ICML 2021). So nothing is
written on its word: recipes along the front of size and predicted loss are measured whole, with the rounding that an
export uses (by calibration, where documents for it are given), and prediction and measurement are reported together.

Not covered: what activations in 8 bits add (a bundle's proof measures it), groups that trade with each other, formats
with other block sizes. Documents must be others than those that a result is later reported on.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.front import Option, Point, convex_front, first_within_size, last_within_loss
from benchmarks.groups import Group, final_scheme, rest_bytes, rules, stored_bytes, tensor_groups
from benchmarks.journal import Journal, JournalError, open_journal
from benchmarks.search_report import Found, draw_front, front_record, megabytes, recipe_text, table
from benchmarks.subject import Subject
from export.checkpoint import resolve
from export.documents import DataError, read_data
from export.smolvlm import EMBED, matrices
from export.spec import CheckpointError, ModelSpec, tensor_shapes
from quantize.recipe import DEFAULT, Recipe, RecipeError, Scheme, load_recipe

LEAST_LIMIT = 1e-6  # of loss_kl: a recipe that loses nothing measurable still meets rounding noise
SIZE = re.compile(r"(\d+\.?\d*|\.\d+)(MB|%)?", re.ASCII)


class SearchError(ValueError):
    """A search that cannot give what was asked for; the message says what is possible."""


@dataclass(frozen=True)
class SizeLimit:
    """The size a bundle may have: megabytes (10**6), or a part of what it has with 8 bits everywhere."""

    amount: float
    relative: bool

    def of(self, largest: int) -> float:
        """In bytes."""
        return self.amount * (largest if self.relative else 1e6)


def size_limit(text: str) -> SizeLimit:
    """Reads "900", "900MB", "0.6" or "60%"; a bare number below 1 is a part. Raises ValueError."""
    match = SIZE.fullmatch(text.strip())
    if not match or not (amount := float(match[1])):
        raise ValueError(f"{text!r} is no size, want megabytes (900 or 900MB) or a part (0.6 or 60%)")
    if match[2] == "%":
        return SizeLimit(amount / 100, relative=True)
    return SizeLimit(amount, relative=match[2] is None and amount < 1)


def search(
    model: str,
    data: Path,
    *,
    max_size: SizeLimit,
    max_loss: float,
    work: Path,
    name: str = "searched",
    calibration: Path | None = None,
    limit: int | None = None,
    by_layer: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Found:
    """Finds the recipe. What was measured is kept in `work`, and not measured again.

    Args:
        model: a folder or a hub id.
        data: documents.jsonl that losses are measured on.
        max_loss: the most mean KL divergence, in nats a token.
        name: of the recipe.
        calibration: documents.jsonl by which the final recipes round.
        limit: use at most so many documents of `data`.
        by_layer: one group a layer, where a group for each part of a layer takes too long.

    Raises:
        CheckpointError, DataError, RecipeError, JournalError: bad input.
        SearchError: saying what is possible.
    """
    documents = read_data(data, limit)
    calibrating = read_data(calibration) if calibration else []
    with tempfile.TemporaryDirectory() as scratch:
        subject = Subject(resolve(model).folder, documents, calibrating, Path(scratch), progress)
        groups = tensor_groups(subject.spec, by_layer=by_layer)
        rest = rest_bytes(subject.spec, subject.processor_bytes)
        sizes = [{name: group_bytes(subject.spec, g, s) for name, s in g.formats.items()} for g in groups]
        most_bytes = max_size.of(rest + sum(max(one.values()) for one in sizes))
        least = rest + sum(min(one.values()) for one in sizes)
        if least > most_bytes:
            raise SearchError(
                f"no recipe is within {megabytes(most_bytes)}: with the fewest bits everywhere it is {megabytes(least)}"
            )
        header = subject.key()
        path = work / f"search-{hashlib.sha256(json.dumps(header).encode()).hexdigest()[:12]}.jsonl"
        with open_journal(path, header) as journal:
            options = measure_groups(subject, groups, sizes, journal, progress)
            front = convex_front(options, rest)
            first = first_within_size(front, most_bytes)
            assert first is not None  # the front ends with the smallest
            measured: dict[int, dict[str, Any]] = {}

            def measure(number: int) -> float:
                point = front[number]
                if number not in measured:
                    progress(f"measuring point {number + 1} of {len(front)} whole: {megabytes(point.size_bytes)}")
                    recipe = make_recipe(name, subject, groups, point)
                    measured[number] = _measure_whole(subject, recipe, journal, work)
                    progress(
                        f"point {number + 1}: KL predicted {point.loss:.2e}, measured {measured[number]['kl']:.2e}"
                    )
                return float(measured[number]["kl"])

            chosen = settle(front, first, max_loss, measure)
            for neighbour in (chosen - 1, chosen + 1):
                if 0 <= neighbour < len(front):
                    measure(neighbour)
        recipe = make_recipe(name, subject, groups, front[chosen], measured[chosen], len(documents))
    about = {
        "model": subject.identity,
        "data": header["data"],
        "documents": len(documents),
        "calibration": subject.calibration_digest,
        "max_loss": max_loss,
        "max_size_bytes": round(most_bytes),
    }
    return Found(about, recipe, tuple(groups), tuple(options), tuple(front), chosen, measured)


def measure_groups(
    subject: Subject,
    groups: Sequence[Group],
    sizes: Sequence[Mapping[str, int]],
    journal: Journal,
    progress: Callable[[str], None],
) -> list[tuple[Option, ...]]:
    """Every group in every format, each alone: measured where the journal has it not."""
    total, number = sum(len(group.formats) for group in groups), 0
    options = []
    for group, size in zip(groups, sizes, strict=True):
        row = []
        for label, scheme in group.formats.items():
            number += 1
            key = json.dumps([group.name, scheme.as_dict()])
            if key not in journal.rows:
                began = time.monotonic()
                journal.append({"item": key, **subject.alone(group, scheme)})
                seconds = time.monotonic() - began
                kl = journal.rows[key]["kl"]
                progress(f"{number} of {total}: {group.name} in {label}: KL {kl:.2e} ({seconds:.1f} s)")
            row.append(Option(label, size[label], journal.rows[key]["kl"]))
        options.append(tuple(row))
    return options


def settle(front: Sequence[Point], first: int, max_loss: float, measure: Callable[[int], float]) -> int:
    """The smallest point whose measured loss is within the limit, while that of the next smaller one is not.

    Measuring begins where the prediction says. By how far off it was there the next point is chosen, between the
    smallest known to hold and the largest known to fail; where that gets on slowly, the one in the middle.

    Args:
        first: the largest that may be chosen.
        measure: gives the loss of a point by number.

    Raises:
        SearchError: no point from `first` on holds; with what is possible.
    """
    holds, fails, scale, slow = first - 1, len(front), 1.0, False
    while (width := fails - holds) > 1:
        guess = (holds + fails) // 2 if slow else last_within_loss(front, max_loss, scale)
        at = min(max(first if guess is None else guess, holds + 1), fails - 1)
        loss = measure(at)
        if loss <= max_loss:
            holds = at
        else:
            fails = at
        scale = loss / front[at].loss if front[at].loss > 0 else 1.0
        slow = 2 * (fails - holds) > width
    if holds < first:  # then `first` was measured last
        smallest = last_within_loss(front, max_loss, scale)
        raise SearchError(
            f"no recipe of at most {megabytes(front[first].size_bytes)} loses at most {max_loss:g} (mean KL): the best "
            f"one of that size loses {measure(first):.3g}, measured whole (predicted {front[first].loss:.3g}); "
            + (
                f"within that loss, by predictions as far off, the least is {megabytes(front[smallest].size_bytes)}"
                if smallest is not None
                else f"by predictions as far off, the least loss of all is {front[0].loss * scale:.3g}, "
                f"with {megabytes(front[0].size_bytes)}"
            )
        )
    return holds


def group_bytes(spec: ModelSpec, group: Group, scheme: Scheme) -> int:
    """Bytes of a group's tensors; a tied embedding is stored twice, to be looked up and to be multiplied."""
    shapes = tensor_shapes(spec)
    times = {EMBED: 2} if spec.text.tied else {}
    return sum(times.get(tensor, 1) * stored_bytes(shapes[tensor], scheme) for tensor in group.tensors)


def _measure_whole(subject: Subject, recipe: Recipe, journal: Journal, work: Path) -> dict[str, Any]:
    """What a recipe loses, measured if the journal has it not."""
    schemes = {tensor: recipe.scheme(tensor).as_dict() for tensor in matrices(subject.spec)}
    digest = hashlib.sha256(json.dumps(schemes).encode()).hexdigest()
    key = json.dumps(["whole", digest, recipe.factors, subject.calibration_digest])
    if key not in journal.rows:
        journal.append({"item": key, **subject.whole(recipe, work)})
    return {field: value for field, value in journal.rows[key].items() if field != "item"}


# ---- what is written


def make_recipe(
    name: str,
    subject: Subject,
    groups: Sequence[Group],
    point: Point,
    measured: Mapping[str, Any] | None = None,
    documents: int = 0,
) -> Recipe:
    """The recipe of a point, its description and limits by what was measured."""
    spec, calibrated = subject.spec, subject.calibration is not None
    schemes = recipe_schemes(spec, groups, point, calibrated=calibrated)
    limits, description = load_recipe(DEFAULT).limits, "Being searched."
    if measured is not None:
        low, high = measured["kl_interval_95"]
        limits = replace(limits, loss_kl=rounded_up(max(2 * measured["kl"], LEAST_LIMIT)))
        description = (
            f"Found by search: about {megabytes(point.size_bytes)}. On {documents} documents KL {measured['kl']:.2e} "
            f"({low:.1e} to {high:.1e}; predicted {point.loss:.1e})"
        )
        if exact := measured["exact"]:
            ours, full = exact["recipe"], exact["full_precision"]
            low, high = ours["interval_95"]
            description += f", exact {ours['mean']:.1%} ({low:.1%} to {high:.1%}; full precision {full['mean']:.1%})"
        description += "."
    recipe = Recipe(name, description, rules(spec, schemes), limits, factors=calibrated)
    wrong = [tensor for tensor, scheme in schemes.items() if recipe.scheme(tensor) != scheme]
    if wrong:
        raise RecipeError(f"recipe {name}: its rules give {wrong[0]} another format than was chosen")
    return recipe


def recipe_schemes(spec: ModelSpec, groups: Sequence[Group], point: Point, *, calibrated: bool) -> dict[str, Scheme]:
    """The scheme of every matrix at a point, with the final roundings."""
    chosen = {
        tensor: final_scheme(tensor, group.formats[label], calibrated=calibrated)
        for group, label in zip(groups, point.formats, strict=True)
        for tensor in group.tensors
    }
    return {tensor: chosen[tensor] for tensor in matrices(spec)}


def rounded_up(value: float) -> float:
    """To two digits, upwards."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.1e}")


def write_new(path: Path, text: str) -> None:
    """Writes a file beside its place, to the disk, then puts it there. Raises SearchError if there is one already."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        refuse_existing(path)
        partial.rename(path)
    except OSError as exc:
        raise SearchError(f"{path}: cannot be written: {exc.strerror or exc}") from exc
    finally:
        partial.unlink(missing_ok=True)


def refuse_existing(path: Path) -> None:
    """Raises SearchError if there is something at `path`."""
    if path.exists():
        raise SearchError(f"{path}: exists already, and nothing is overwritten")


# ---- the command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    text = (__doc__ or "").partition("\n")[0]
    command = argparse.ArgumentParser(prog="python -m benchmarks.search", description=text)
    command.add_argument("model", metavar="MODEL", help="a checkpoint folder or a hub id")
    command.add_argument("--data", type=Path, required=True, help="documents.jsonl that losses are measured on")
    command.add_argument("--calibration", type=Path, help="documents.jsonl by which the recipes round (others!)")
    command.add_argument(
        "--max-size",
        required=True,
        metavar="MB|PART",
        help="of the bundle: 900 or 900MB; below 1, or in %%, a part of its size with 8 bits everywhere",
    )
    command.add_argument("--max-loss", type=float, required=True, metavar="KL", help="mean KL, nats a token")
    command.add_argument("--out", type=Path, required=True, metavar="RECIPE.toml", help="the recipe; must not exist")
    command.add_argument("--work", type=Path, help="folder of what is measured; a killed run goes on (default: by OUT)")
    command.add_argument("--limit", type=int, metavar="N", help="use at most this many documents")
    command.add_argument("--groups", choices=("part", "layer"), default="part", help="what gets a format of its own")
    command.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the front; its JSON goes beside")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    command = parser()
    args = command.parse_args(arguments)
    if args.out.suffix != ".toml":
        command.error(f"--out is {args.out}, want a name that ends in .toml")
    if args.plot is not None and args.plot.suffix != ".svg":
        command.error(f"--plot is {args.plot}, want a name that ends in .svg")
    if not 0 < args.max_loss < math.inf:
        command.error(f"--max-loss is {args.max_loss}, want a number above 0")
    if args.limit is not None and args.limit < 1:
        command.error(f"--limit is {args.limit}, want 1 or more")
    try:
        most = size_limit(args.max_size)
    except ValueError as exc:
        command.error(f"--max-size: {exc}")
    work = args.work or args.out.with_name(args.out.stem + ".search")
    record = (args.plot or args.out).with_suffix(".json")
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        for path in (args.out, record, *([args.plot] if args.plot else [])):
            refuse_existing(path)
        found = search(
            args.model,
            args.data,
            max_size=most,
            max_loss=args.max_loss,
            work=work,
            name=args.out.stem,
            calibration=args.calibration,
            limit=args.limit,
            by_layer=args.groups == "layer",
            progress=say,
        )
        write_new(record, json.dumps(front_record(found), indent=1) + "\n")
        if args.plot:
            with tempfile.TemporaryDirectory() as scratch:
                draw_front(found, Path(scratch) / "front.svg")
                write_new(args.plot, (Path(scratch) / "front.svg").read_text(encoding="utf-8"))
        write_new(args.out, recipe_text(found.recipe))
    except (CheckpointError, DataError, JournalError, RecipeError, SearchError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is kept in {work}", file=sys.stderr)
        return 130
    print(table(found))
    print(f"recipe in {args.out}, front in {record}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
