"""A bundle's answers to labelled questions as the router sees them: text, hard signal, log-probabilities; in a journal.

Questions are those of the synthetic hard documents, or of a data set. Not covered: answers sampled at a temperature.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.datasets import DataSet, Item
from benchmarks.hard_documents import VERSION, make_hard_document
from benchmarks.journal import open_journal
from benchmarks.scores import score
from export.documents import DataError
from router_client.local import Question, hard_signal
from runtimes.local_leg import LocalLeg

SCHEMA = 1
SPLITS = ("calibration", "test")
FIRST = 1000  # the first number of a drawn document: calibrated recipes have chosen their integers by the ones before
RIGHT = 0.5  # a score from here on is a right answer
PROGRESS_S = 2.0


@dataclass(frozen=True)
class Source:
    """A question that is asked when its answer is not kept yet; `key` fixes picture, question, answers and metric."""

    key: str
    split: str
    read: Callable[[], "Asked"]


@dataclass(frozen=True)
class Asked:
    """A question on a picture (or on none), the right answers, the kind of its difficulty."""

    image: bytes | None
    question: str
    answers: tuple[str, ...]
    metric: str
    kind: str


@dataclass(frozen=True)
class Judged:
    """An answer: of which split and document, whether it is wrong, its hard signal, its tokens' figures."""

    split: str
    document: str
    kind: str
    wrong: bool
    signal: str
    logprobs: tuple[float, ...]
    margins: tuple[float, ...]


def drawn_sources(split: str, count: int) -> list[Source]:
    """Hard documents of a split."""

    def read(index: int) -> Asked:
        one = make_hard_document(split, index)
        return Asked(one.png, one.question, (one.answer,), "exact", one.hardship)

    return [Source(f"drawn/{VERSION}/{split}/{i}", split, partial(read, i)) for i in range(FIRST, FIRST + count)]


def file_sources(data: DataSet, split: str) -> list[Source]:
    """The items of a data set, each about a picture of its own. Raises DataError."""
    sources = []
    for item in data.items:
        if not item.answers:
            raise DataError(f"item {item.name} has no answer: nothing can be learnt from it")
        image = _read(item)
        label = [data.metric, hashlib.sha256(image or b"").hexdigest(), item.question, list(item.answers)]
        key = hashlib.sha256(json.dumps([split, *label]).encode()).hexdigest()
        sources.append(Source(key, split, partial(_asked, data.metric, item)))
    return sources


def _asked(metric: str, item: Item) -> Asked:
    return Asked(_read(item), item.question, item.answers, metric, item.task)


def _read(item: Item) -> bytes | None:
    try:
        return None if item.image is None else item.image.read_bytes()
    except OSError as exc:
        raise DataError(f"{item.image}: cannot be read: {exc.strerror or exc}") from exc


def judged(
    leg: LocalLeg,
    identity: dict[str, Any],
    sources: Sequence[Source],
    out: Path,
    max_tokens: int,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Judged]:
    """The local leg's answers, as the router would see them; those that `out` holds are not asked for again.

    Raises:
        DataError, ImageError, InputError, EngineError, ContextTooLongError, JournalError: if one cannot be had.
    """
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    with open_journal(out / f"confidence-{name}.jsonl", {"schema": SCHEMA, "system": identity}) as journal:
        for source in _told(sources, journal.rows.__contains__, progress):
            asked = source.read()
            question = Question(asked.question, (asked.image,) if asked.image else (), max_tokens=max_tokens)
            tokens = list(leg.stream(question, threading.Event()))
            text = "".join(token.text for token in tokens)
            row: dict[str, Any] = {
                "item": source.key,
                "document": hashlib.sha256(asked.image or asked.question.encode()).hexdigest(),
                "kind": asked.kind,
                "text": text,
                "wrong": score(asked.metric, text.strip(), asked.answers) < RIGHT,
                "signal": hard_signal(question, [token.text for token in tokens], tokens[-1].finish),
                "logprobs": [t.logprob for t in tokens if t.logprob is not None],
                "margins": [t.margin for t in tokens if t.margin is not None],
            }
            journal.append(row)
        found = []
        for source in sources:
            row = journal.rows[source.key]
            figures = tuple(row["logprobs"]), tuple(row["margins"])
            found.append(
                Judged(source.split, row["document"], row["kind"], bool(row["wrong"]), row["signal"], *figures)
            )
    return found


def _told(sources: Sequence[Source], known: Callable[[str], bool], progress: Callable[[str], None]) -> Iterator[Source]:
    """The sources that are not known yet; tells from time to time how far it is."""
    missing = [source for source in sources if not known(source.key)]
    began = last = time.monotonic()
    for done, source in enumerate(missing):
        if (now := time.monotonic()) - last > PROGRESS_S:
            rate = done / (now - began)
            progress(f"{source.split}: {len(sources) - len(missing) + done} of {len(sources)}, {rate:.1f} a second")
            last = now
        if not known(source.key):  # the same question on the same picture may come twice
            yield source
