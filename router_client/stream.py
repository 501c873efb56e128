"""A server-sent answer, decoded byte by byte: lines, events, then the answer that the events spell.

The rules are those of the HTML standard's event streams, and OpenAI's chat completion chunks as providers really send
them: usage on any chunk, errors inside a 200, no space behind `data:`. A stream that ends without a finish reason is a
failure, whatever it ended with. Not covered: several choices (the first counts), tool calls.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from router_client.errors import AttemptFailed, Fault, scrub

MAX_LINE_BYTES = 2**20
MAX_EVENT_BYTES = 2**22
MAX_ANSWER_BYTES = 2**23  # of a whole response
MAX_TOKENS = 10**9  # more than this in a usage is no usage
BOM = b"\xef\xbb\xbf"
REASONING = ("reasoning", "reasoning_content", "reasoning_text")


class Lines:
    """Splits bytes at \\n, \\r\\n and \\r, wherever the pieces are cut; a line is given out as soon as it ends."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._after_cr = False
        self._first = True

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Each line that ends in `data`, without its end.

        Raises:
            AttemptFailed: for a line of more than MAX_LINE_BYTES.
        """
        for piece in data.splitlines(keepends=True):  # bytes split at exactly \n, \r\n and \r
            if self._after_cr and piece == b"\n":
                self._after_cr = False
                continue
            self._after_cr = piece.endswith(b"\r")
            self._line += piece.rstrip(b"\r\n")
            if len(self._line) > MAX_LINE_BYTES:
                raise AttemptFailed(bad_stream(f"a line of more than {MAX_LINE_BYTES} bytes"))
            if piece[-1] in b"\r\n":
                line, self._line = bytes(self._line), bytearray()
                if self._first:
                    line, self._first = line.removeprefix(BOM), False
                yield line


class Events:
    """(event, data) of each event; comments and unknown fields are dropped, and so is what no empty line ends."""

    def __init__(self) -> None:
        self._lines = Lines()
        self._event = ""
        self._data: list[str] = []
        self._size = 0

    def feed(self, data: bytes) -> Iterator[tuple[str, str]]:
        """The events that end in `data`.

        Raises:
            AttemptFailed: for a line or an event that is too long.
        """
        for line in self._lines.feed(data):
            if not line:
                if self._data:
                    yield self._event, "\n".join(self._data)
                self._event, self._data, self._size = "", [], 0
                continue
            name, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if name == b"data":
                self._size += len(value) + 1
                if self._size > MAX_EVENT_BYTES:
                    raise AttemptFailed(bad_stream(f"an event of more than {MAX_EVENT_BYTES} bytes"))
                self._data.append(value.decode("utf-8", "replace"))
            elif name == b"event":
                self._event = value.decode("utf-8", "replace")


@dataclass(frozen=True)
class Usage:
    """Tokens that a provider says it counted."""

    prompt_tokens: int
    completion_tokens: int


@dataclass
class Chat:
    """The answer so far; `feed` it bytes, then `finish` it."""

    token: str = field(default="", repr=False)  # kept out of what is quoted from the server
    model: str = ""
    finish_reason: str = ""
    usage: Usage | None = None
    text: str = ""
    reasoning: str = ""
    done: bool = False
    _events: Events = field(default_factory=Events, repr=False)
    _half: str = field(default="", repr=False)  # the first half of a character that was cut in two
    _size: int = field(default=0, repr=False)

    def feed(self, data: bytes) -> Iterator[str]:
        """The pieces of text that end in `data`; "" stands for a piece of reasoning.

        Raises:
            AttemptFailed: for an error in the stream, or what is no stream of chat chunks.
        """
        self._size += len(data)
        if self._size > MAX_ANSWER_BYTES:
            raise AttemptFailed(bad_stream(f"more than {MAX_ANSWER_BYTES} bytes"))
        for event, text in self._events.feed(data):
            if self.done:
                return
            if text.strip() == "[DONE]":
                self.done = True
                return
            value = self._object(text, event)
            if (piece := self._take(value, "delta")) is not None:
                yield piece

    def whole(self, body: bytes) -> str:
        """Takes an answer that came in one piece, from a server that does not stream.

        Raises:
            AttemptFailed: for an error, or what is no chat completion.
        """
        piece = self._take(self._object(body.decode("utf-8", "replace"), ""), "message")
        return piece or ""

    def finish(self) -> None:
        """To be called at the end of the stream.

        Raises:
            AttemptFailed: if the answer did not end, or there is none.
        """
        if not self.finish_reason:
            raise AttemptFailed(Fault("truncated", "offer", "no finish reason", maybe_billed=True, counts=True))
        if not self.text.strip() and self.reasoning.strip() and self.finish_reason == "stop":
            self.text = self.reasoning  # some providers file the whole answer there
        if not self.text.strip():
            raise AttemptFailed(Fault("empty", "offer", f"finish reason {self.finish_reason}", True, counts=True))

    def _object(self, text: str, event: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        error = value.get("error") if isinstance(value, dict) else None
        if event == "error" or error:
            if isinstance(error, dict):
                error = error.get("message") or error.get("code")
            if not isinstance(error, str):
                error = value.get("message") if isinstance(value, dict) else text
            raise AttemptFailed(Fault("in_band_error", "offer", scrub(str(error), self.token), True, counts=True))
        if not isinstance(value, dict):
            raise AttemptFailed(bad_stream("data that is no JSON object"))
        return value

    def _take(self, value: dict[str, Any], key: str) -> str | None:
        if isinstance(value.get("model"), str) and not self.model:
            self.model = scrub(value["model"], self.token)
        self.usage = usage_of(value.get("usage")) or self.usage
        choices = value.get("choices")
        choices = choices if isinstance(choices, list) else []
        choice = next((c for c in choices if isinstance(c, dict) and c.get("index", 0) == 0), None)
        if choice is None:
            return None
        if isinstance(choice.get("finish_reason"), str):
            self.finish_reason = scrub(choice["finish_reason"], self.token) or self.finish_reason
        delta = choice.get(key)
        delta = delta if isinstance(delta, dict) else {}
        piece = self._characters(delta.get("content"))
        thought = next((delta[k] for k in REASONING if isinstance(delta.get(k), str) and delta[k]), "")
        self.reasoning += thought.encode("utf-8", "replace").decode("utf-8")
        self.text += piece
        return piece if piece or thought else None

    def _characters(self, content: object) -> str:
        """Text without lone surrogates; a pair that was cut between two chunks is joined."""
        if not isinstance(content, str):
            return ""
        text = self._half + content
        self._half = text[-1] if text and "\ud800" <= text[-1] <= "\udbff" else ""
        text = text[: len(text) - len(self._half)]
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def usage_of(value: object) -> Usage | None:
    """Token counts, or None where they are absent or impossible."""
    if not isinstance(value, dict):
        return None
    counts = [value.get(key) for key in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (n if type(n) is int and 0 <= n <= MAX_TOKENS else None for n in counts)
    return None if prompt is None or completion is None else Usage(prompt, completion)


def bad_stream(detail: str) -> Fault:
    """What was received is not what a chat endpoint sends."""
    return Fault("bad_stream", "offer", detail, maybe_billed=True, counts=True)
