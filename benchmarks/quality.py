"""How well bundles answer the questions of a data set, beside the full-precision reference or a model of others.

    python -m benchmarks.quality BUNDLE [BUNDLE ...] --data FILE [--model MODEL] [--out FOLDER]
    python -m benchmarks.quality BUNDLE --data FILE --endpoint https://host/v1 --endpoint-model NAME --key-env VARIABLE

Data are the project's documents.jsonl, or DocVQA, TextVQA, ChartQA in the files that they are published as; each is
scored as its authors score it, and every system by the same code. With --model a bundle is paired with the reference:
what it lost on the same questions, and along the reference's answers the divergence of each token.

Every answer is written to --out at once, so that a run that was killed goes on where it was, and what the reference
said is used again for the next bundle. It keeps the reference's logits there, four bytes for each token of an answer
and entry of the vocabulary. Exit code 0: evaluated; 2: something given cannot be used; 130: interrupted.
Not covered: speed, sampling, answers in free text.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.datasets import DataSet, Item, read_dataset
from benchmarks.endpoint import Endpoint, EndpointError
from benchmarks.journal import Journal, JournalError, LogitFile, open_journal
from benchmarks.quality_report import Given, compare, report_text, summarise
from benchmarks.scores import ANNOTATORS, METRICS
from benchmarks.systems import Answer, BundleSystem, Decoding, ReferenceSystem, System
from export.documents import DataError
from export.prove import kl_divergence
from export.spec import CheckpointError
from runtimes.bundle import read_bundle
from runtimes.manifest import BundleError
from runtimes.preprocess import TILE_BUDGETS, ImageError
from runtimes.runner import EngineError, InputError

SCHEMA = 1
PROGRESS_S = 2.0
ERRORS = (
    BundleError,
    CheckpointError,
    DataError,
    EndpointError,
    EngineError,
    ImageError,
    InputError,
    JournalError,
)


def evaluate(
    data: DataSet,
    systems: Sequence[System],
    reference: System | None,
    decoding: Decoding,
    out: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Answers every item with every system, as far as `out` does not hold the answers yet.

    Args:
        data: the items.
        systems: what is evaluated.
        reference: what they are paired with; its answers have logits.
        decoding: that of all of them, for the report.
        out: where answers are kept.
        progress: is told how far it is.

    Returns:
        The report; the same data, systems and reference give the same one.

    Raises:
        DataError, ImageError, InputError, EngineError, EndpointError, JournalError: naming system and item.
    """
    keys, documents = item_keys(data.items)
    kept = _KeptReference(reference, data.items, keys, out, progress) if reference else None
    given = kept.given(keys) if kept else None
    rows = []
    for system in systems:
        found = _answers(system, kept, data.items, keys, out, progress)
        rows.append(
            {
                "name": system.name,
                "identity": system.identity,
                "cut": sum(one.cut for one in found),
                "scores": summarise(data, found, documents),
                "against_reference": compare(data, given, found, documents) if given else None,
            }
        )
    return {
        "schema": SCHEMA,
        "data": {
            "name": data.name,
            "metric": data.metric,
            "items": len(data.items),
            "documents": len(set(documents)),
            "digest": _data_digest(data, keys),
        },
        "decoding": asdict(decoding),
        "reference": {
            "name": reference.name,
            "identity": reference.identity,
            "cut": sum(one.cut for one in given),
            "scores": summarise(data, given, documents),
        }
        if reference and given
        else None,
        "systems": rows,
    }


def item_keys(items: Sequence[Item]) -> tuple[list[str], list[int]]:
    """Of each item: a digest of its question and its image's bytes, and the number of its document.

    Raises:
        DataError: for an image that cannot be read.
    """
    images: dict[Path, str] = {}
    numbers: dict[str, int] = {}
    keys, documents = [], []
    for i, item in enumerate(items):
        image = ""
        if item.image is not None:
            if item.image not in images:
                try:
                    images[item.image] = hashlib.sha256(item.image.read_bytes()).hexdigest()
                except OSError as exc:
                    raise DataError(f"{item.image}: cannot be read: {exc.strerror or exc}") from exc
            image = images[item.image]
        keys.append(_digest([image, item.question]))
        documents.append(numbers.setdefault(image or f"item {i}", len(numbers)))
    return keys, documents


def data_digest(data: DataSet) -> tuple[str, list[int]]:
    """A digest of all questions, pictures, answers and the metric; and `item_keys`' numbers. Raises DataError."""
    keys, documents = item_keys(data.items)
    return _data_digest(data, keys), documents


def _data_digest(data: DataSet, keys: Sequence[str]) -> str:
    labels = [[key, item.task, list(item.answers)] for key, item in zip(keys, data.items, strict=True)]
    return _digest([data.metric, labels])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _KeptReference:
    """The reference's answer to each item, made where it is not kept yet, with its logits in a file."""

    def __init__(
        self, system: System, items: Sequence[Item], keys: Sequence[str], out: Path, progress: Callable[[str], None]
    ) -> None:
        self.key = _digest(system.identity)
        path = out / f"reference-{self.key[:12]}.jsonl"
        self._logits = LogitFile(path.with_suffix(".logits"))
        with open_journal(path, {"schema": SCHEMA, "system": system.identity}) as journal:
            for i in _missing(keys, lambda key: self._whole(journal.rows.get(key)), system.name, progress):
                with _named(system, items[i]):
                    journal.append({"item": keys[i], **self._row(system.answer(items[i]))})
            self._rows = journal.rows

    def given(self, keys: Sequence[str]) -> list[Given]:
        """What it said to the items with these keys."""
        return [Given(self._rows[key]["text"], self._rows[key]["cut"]) for key in keys]

    def answer(self, key: str) -> Answer:
        """What it said to one item, with logits if it has any."""
        row = self._rows[key]
        if "place" not in row:
            return Answer(row["text"], row["cut"])
        logits = self._logits.read(row["place"], len(row["tokens"]), row["vocab"])
        return Answer(row["text"], row["cut"], tuple(row["tokens"]), logits, row["prompt"])

    def _row(self, answer: Answer) -> dict[str, Any]:
        row: dict[str, Any] = {"text": answer.text, "cut": answer.cut}
        if answer.tokens is None or answer.logits is None:
            return row
        place, vocab = self._logits.append(answer.logits), answer.logits.shape[1]
        return row | {"tokens": list(answer.tokens), "prompt": answer.prompt, "place": place, "vocab": vocab}

    def _whole(self, row: dict[str, Any] | None) -> bool:
        if row is None or "place" not in row:
            return row is not None
        return self._logits.holds(row["place"], len(row["tokens"]), row["vocab"])


def _answers(
    system: System,
    kept: _KeptReference | None,
    items: Sequence[Item],
    keys: Sequence[str],
    out: Path,
    progress: Callable[[str], None],
) -> list[Given]:
    """A system's answer to each item, and beside a reference its divergence along the reference's answer."""
    key, header = _digest(system.identity), {"schema": SCHEMA, "system": system.identity}
    with ExitStack() as stack:
        said = stack.enter_context(open_journal(out / f"answers-{key[:12]}.jsonl", header))
        along: Journal | None = None
        if kept:
            path = out / f"along-{key[:12]}-{kept.key[:12]}.jsonl"
            along = stack.enter_context(open_journal(path, header | {"reference": kept.key}))
        known = lambda key: key in said.rows and (along is None or key in along.rows)  # noqa: E731  # one line
        for i in _missing(keys, known, system.name, progress):
            with _named(system, items[i]):
                if kept and along is not None and keys[i] not in along.rows:
                    along.append({"item": keys[i], **_divergence(system, items[i], kept.answer(keys[i]))})
                if keys[i] not in said.rows:
                    answer = system.answer(items[i])
                    said.append({"item": keys[i], "text": answer.text, "cut": answer.cut, "tokens": answer.tokens})
    given = []
    for key in keys:
        one, row = said.rows[key], along.rows[key] if along is not None else {}
        followed = (tuple(row["kl"]), tuple(row["agreed"])) if row.get("kl") else (None, None)
        given.append(Given(one["text"], one["cut"], *followed))
    return given


def _divergence(system: System, item: Item, reference: Answer) -> dict[str, Any]:
    """The fields `kl` and `agreed` of `Given`, as JSON."""
    logits = system.along(item, reference)
    if logits is None or reference.logits is None:
        return {"kl": None}
    agreed = logits.argmax(axis=1) == reference.logits.argmax(axis=1)
    return {"kl": kl_divergence(reference.logits, logits), "agreed": agreed.tolist()}


def _missing(
    keys: Sequence[str], known: Callable[[str], bool], name: str, progress: Callable[[str], None]
) -> Iterator[int]:
    """The numbers of the items that are to be answered; tells from time to time how far that is."""
    missing = [i for i, key in enumerate(keys) if not known(key)]
    if not missing:
        progress(f"{name}: all {len(keys)} answers are there")
        return
    began = last = time.monotonic()
    for done, i in enumerate(missing):
        if (now := time.monotonic()) - last > PROGRESS_S:
            rate = done / (now - began)
            progress(f"{name}: {len(keys) - len(missing) + done} of {len(keys)}, {rate:.1f} a second")
            last = now
        if not known(keys[i]):  # the same question on the same picture may come twice
            yield i
    rate = len(missing) / (time.monotonic() - began)
    progress(f"{name}: {len(keys)} of {len(keys)}, {rate:.1f} a second")


@contextmanager
def _named(system: System, item: Item) -> Iterator[None]:
    """Puts system and item before the message of what is raised."""
    try:
        yield
    except (EndpointError, EngineError, ImageError, InputError) as exc:
        raise type(exc)(f"{system.name}, item {item.name}: {exc}") from exc


def write_report(report: dict[str, Any], out: Path) -> Path:
    """Writes the report as JSON and as Markdown under the name of what was compared; returns the Markdown's path.

    Raises:
        JournalError: if it cannot be written.
    """
    rows = [report["reference"], *report["systems"]] if report["reference"] else report["systems"]
    name = _digest([report["data"]["digest"], [row["identity"] for row in rows]])[:12]
    texts = {".json": json.dumps(report, indent=1, ensure_ascii=False) + "\n", ".md": report_text(report)}
    for suffix, text in texts.items():
        path = out / f"report-{name}{suffix}"
        try:
            half = path.with_name(f".{path.name}.partial")
            half.write_text(text, encoding="utf-8", errors="replace")
            half.replace(path)
        except OSError as exc:
            raise JournalError(f"{path}: cannot be written: {exc.strerror or exc}") from exc
    return out / f"report-{name}.md"


def open_systems(
    args: argparse.Namespace, key: str | None, stack: ExitStack
) -> tuple[list[System], ReferenceSystem | None, Decoding]:
    """The systems that a command line names, to be closed with `stack`, and what they are paired with.

    Raises:
        BundleError, CheckpointError, EndpointError, InputError: if one cannot be used.
    """
    decoding = Decoding(args.max_new_tokens, args.instruction, args.tiles)
    bundles = [
        BundleSystem(read_bundle(folder, allow_pending=args.allow_pending), decoding, threads=args.threads)
        for folder in args.bundles
    ]
    reference = None
    if args.model is not None:
        if any(one.settings != bundles[0].settings for one in bundles):
            raise InputError("the bundles cut images in different ways: give --tiles, or evaluate one at a time")
        reference = ReferenceSystem(args.model, decoding, bundles[0].settings if bundles else None, args.lora)
        for one in bundles:
            if one.adapter_digest != reference.adapter_digest:
                raise InputError(
                    f"{one.name} has the adapter {one.adapter_digest or 'none'}, the reference "
                    f"{reference.adapter_digest or 'none'}: give the bundle's own with --lora"
                )
    systems: list[System] = [*bundles]
    if args.endpoint is not None:
        endpoint = Endpoint(args.endpoint, args.endpoint_model, decoding, key, timeout_s=args.timeout)
        systems.append(stack.enter_context(closing(endpoint)))
    return systems, reference, decoding


def with_metric(data: DataSet, metric: str) -> DataSet:
    """The same questions scored in another way. Raises DataError where their answers are not enough for it."""
    for item in data.items:
        if metric == "vqa" and item.answers and len(item.answers) != ANNOTATORS:
            raise DataError(
                f"item {item.name} has {len(item.answers)} answers, metric vqa wants those of {ANNOTATORS} people"
            )
    return replace(data, metric=metric)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    text = (__doc__ or "").partition("\n")[0]
    command = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=text)
    command.add_argument("bundles", type=Path, nargs="*", metavar="BUNDLE", help="folders of bundles")
    command.add_argument("--data", type=Path, required=True, help="the file of a data set, or documents.jsonl")
    command.add_argument("--images", type=Path, help="folder of its images, if it is not where the data set has it")
    command.add_argument("--metric", choices=METRICS, help="default: the data set's own")
    command.add_argument("--limit", type=int, help="use at most this many questions")
    command.add_argument("--model", help="the full-precision reference: a checkpoint folder or a hub id")
    command.add_argument("--lora", help="the adapter that is merged into the reference: a folder or a hub id")
    command.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible endpoint, such as https://host/v1")
    command.add_argument("--endpoint-model", metavar="NAME", help="the model to ask there")
    command.add_argument("--key-env", metavar="VARIABLE", help="environment variable that holds the endpoint's key")
    command.add_argument(
        "--timeout", type=float, default=120, metavar="SECONDS", help="for a reply of the endpoint (%(default)s)"
    )
    command.add_argument(
        "--max-new-tokens", type=int, default=Decoding.max_new_tokens, metavar="N", help="default: %(default)s"
    )
    command.add_argument("--instruction", default="", metavar="TEXT", help="a line that follows each question")
    command.add_argument("--tiles", type=int, choices=TILE_BUDGETS, help="at most so many tiles an image")
    command.add_argument("--threads", type=int, default=0, metavar="N", help="0, the default, lets the engine choose")
    command.add_argument("--allow-pending", action="store_true", help="use a bundle whose proof has not passed")
    command.add_argument(
        "--out", type=Path, default=Path("build/quality"), help="folder of answers and reports (%(default)s)"
    )
    command.add_argument("--json", action="store_true", help="the report as the last line of stdout too")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    command = parser()
    args = command.parse_args(arguments)
    if not args.bundles and args.model is None and args.endpoint is None:
        command.error("nothing to evaluate: give a BUNDLE, --model or --endpoint")
    if (args.endpoint is None) != (args.endpoint_model is None):
        command.error("--endpoint and --endpoint-model belong together")
    if args.threads < 0:
        command.error(f"--threads is {args.threads}, want 0 or more")
    if not 0 < args.timeout < math.inf:
        command.error(f"--timeout is {args.timeout}, want seconds above 0")
    key = None
    if args.key_env is not None and not (key := os.environ.get(args.key_env)):
        command.error(f"the environment variable {args.key_env}, which --key-env names, is not set")
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        data = read_dataset(args.data, args.images, args.limit)
        data = with_metric(data, args.metric) if args.metric else data
        with ExitStack() as stack:
            systems, reference, decoding = open_systems(args, key, stack)
            report = evaluate(data, systems, reference, decoding, args.out, say)
        path = write_report(report, args.out)
    except ERRORS as exc:
        message = " ".join(str(exc).split())
        print(f"error: {message}", file=sys.stderr)
        if args.json:
            print(json.dumps({"error": message}))
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; what was answered is kept in {args.out}", file=sys.stderr)
        return 130
    print(report_text(report))
    print(f"report in {path} and {path.with_suffix('.json')}", file=sys.stderr)
    if args.json:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
