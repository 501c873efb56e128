"""The protocol of the local leg, a question, and the signals that a local answer is not good enough.

The hard signals are certain: cut short, empty, repeating itself, not what the schema asks for. Not covered here: how
probable it is that an answer is wrong; see `Policy.max_p_wrong` and `Router(p_wrong=...)`.
"""

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger("router_client")
Picture = Path | bytes  # a file, or the bytes of one
LONGEST_PERIOD = 32  # tokens of a repeated piece
LEAST_REPEATED = 16  # tokens in all
TIMES = 4


@dataclass(frozen=True)
class Question:
    """What is asked. `schema` is a JSON schema; `valid` whatever else an answer must fulfil: to raise is to say no."""

    text: str = field(repr=False)
    images: tuple[Picture, ...] = field(default=(), repr=False)
    system: str = field(default="", repr=False)
    max_tokens: int = 256
    temperature: float = 0.0
    schema: Mapping[str, Any] | None = field(default=None, repr=False)
    valid: Callable[[str], bool] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Token:
    """A piece of a local answer; the last one has a `finish`: "stop" or "length".

    logprob: natural, of the token chosen; None where the engine does not tell.
    margin: the log-probability by which it won over the second.
    """

    text: str
    logprob: float | None = None
    margin: float | None = None
    finish: str = ""


class ContextTooLongError(ValueError):
    """The question does not fit the local model's context."""


class Local(Protocol):
    """What can answer on this device."""

    def available(self) -> str:
        """Why it cannot answer now, in words; "" if it can."""

    def stream(self, question: Question, stop: threading.Event) -> Iterator[Token]:
        """Answers; called in a thread of its own, and looks at `stop` between tokens.

        Raises:
            ContextTooLongError: if the question does not fit.
        """


def repeats(pieces: Sequence[str]) -> bool:
    """Whether an answer ends in one piece (of up to 32 tokens) said at least four times, and for 16 tokens."""
    for period in range(1, LONGEST_PERIOD + 1):
        needed = max(TIMES * period, LEAST_REPEATED)
        if len(pieces) < needed:
            continue
        tail = pieces[-needed:]
        if tail[period:] == tail[:-period] and "".join(tail[:period]).strip():
            return True
    return False


def hard_signal(question: Question, pieces: Sequence[str], finish: str) -> str:
    """The first reason not to trust a finished answer: "repetition", "truncated", "empty", "schema", or ""."""
    text = "".join(pieces)
    if repeats(pieces):
        return "repetition"
    if finish != "stop":
        return "truncated"
    if not text.strip():
        return "empty"
    return "" if fits(question, text) else "schema"


def fits(question: Question, text: str) -> bool:
    """Whether an answer is what the question's schema and check ask for."""
    if question.schema is not None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        if not matches(value, question.schema):
            return False
    try:
        return question.valid is None or bool(question.valid(text))
    except Exception as exc:  # noqa: BLE001 -- the caller's function; one that reads a number fails on a word
        log.info("the check of the answer raised: %s", type(exc).__name__)
        return False


def matches(value: Any, schema: object) -> bool:
    """Whether a value fulfils a JSON schema's type, enum, properties, required, items; no more is judged."""
    if not isinstance(schema, Mapping):
        return schema is not False  # true and false are schemas too
    kinds = schema.get("type")
    if kinds is not None and not any(_is(value, k) for k in (kinds if isinstance(kinds, list | tuple) else [kinds])):
        return False
    if "enum" in schema and value not in _entries(schema["enum"]):
        return False
    if isinstance(value, dict):
        named = schema.get("properties")
        named = named if isinstance(named, Mapping) else {}
        present = all(key in value for key in _entries(schema.get("required")))
        return present and all(matches(value[key], named[key]) for key in named if key in value)
    if isinstance(value, list) and "items" in schema:
        return all(matches(item, schema["items"]) for item in value)
    return True


def _entries(value: object) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _is(value: object, kind: object) -> bool:
    match kind:
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
    types: dict[str, type] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    return isinstance(kind, str) and kind in types and isinstance(value, types[kind])
