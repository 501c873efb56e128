"""One request under way, what it hands out, and the clock it goes by."""

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from router_client.errors import RouterError
from router_client.local import Question
from router_client.receipt import Receipt


class Clock(Protocol):
    """Time, which tests replace."""

    def now(self) -> float:
        """Seconds since 1970."""

    def monotonic(self) -> float:
        """Seconds that only go on."""

    def sleep(self, seconds: float) -> None:
        """Waits."""


class SystemClock:
    """The machine's."""

    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)
    sleep = staticmethod(time.sleep)


@dataclass(frozen=True)
class Answer:
    """A text and where it comes from."""

    text: str
    receipt: Receipt


@dataclass(frozen=True)
class Delta:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class Reset:
    """What was handed out is void; another answer begins. Only with stream_failure="restart"."""


@dataclass(frozen=True)
class Done:
    """The end of a stream."""

    answer: Answer


Event = Delta | Reset | Done


@dataclass
class Run:
    """One request under way.

    deadline: on the clock's monotonic scale; what a person takes to consent is added to it.
    holdback: pieces held back before the first is handed out; None: nothing is handed out before the end.
    local_text, local_finish: of a local answer that ended, kept in case nothing better comes.
    detail: words for the error, if it becomes one.
    """

    question: Question
    receipt: Receipt
    clock: Clock
    deadline: float
    holdback: int | None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    pieces: list[str] = field(default_factory=list)
    released: int = 0
    local_text: str | None = None
    local_finish: str = ""
    detail: str = ""

    def left_s(self, share_s: float = 0.0) -> float:
        """Seconds to the deadline, less a share that is kept for later."""
        return self.deadline - share_s - self.clock.monotonic()

    def hand_out(self, piece: str) -> Iterator[Delta]:
        """Takes a piece; gives out what is no longer held back."""
        self.pieces.append(piece)
        if self.holdback is not None and (self.released or len(self.pieces) > self.holdback):
            yield from self.flush()

    def flush(self) -> Iterator[Delta]:
        """Gives out all that was taken."""
        if self.holdback is not None and (text := "".join(self.pieces[self.released :])):
            yield Delta(text)
            self.released = len(self.pieces)

    def restart(self) -> Iterator[Reset]:
        """Forgets what was taken, and says so if any of it was handed out."""
        if self.released:
            self.receipt.restarted = True
            yield Reset()
        self.pieces, self.released = [], 0

    def done(self, source: str) -> Done:
        """The end, with an answer."""
        self.receipt.source = source
        if source == "local":
            self.receipt.finish_reason = self.local_finish
        return Done(Answer("".join(self.pieces), self.receipt))

    def error(self, code: str) -> RouterError:
        """The end, without one."""
        return RouterError(code or "no_answer", self.detail, self.receipt, "".join(self.pieces[: self.released]))
