"""One model, one answer at a time, a bounded number of requests that wait: what a server does between the wire and
the runner. See serve.py for the wire, completions.py for requests.

A request takes a place before its body is read and gives it back when its answer is made or given up, so that the
memory of all requests together is bounded. All work on the model is done by one thread; what it has to say goes to
the event loop as events.

Not covered: several models, several answers at once.
"""

import asyncio
import math
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.chat import Chat, Reply, Turn
from runtimes.completions import (
    IMAGE_FORMATS,
    ApiError,
    ChatRequest,
    Limits,
    Picture,
    Usage,
    Video,
    from_input_error,
    token_entry,
)
from runtimes.generate import StopText
from runtimes.pdf import PdfLimits, read_pdf
from runtimes.preprocess import MAX_EDGE, ImageError, Tiles, decode_image, preprocess
from runtimes.runner import Cancelled, ContextError, EngineError, InputError
from runtimes.video import Frames, VideoLimits, read_video

MOST_WAIT_S = 120  # that a Retry-After asks for


@dataclass(frozen=True)
class Began:
    """The prompt can be run, and is."""


@dataclass(frozen=True)
class Piece:
    """What a token, or a few, added to the answer; `entries` as `token_entry` gives them, where asked for."""

    text: str
    entries: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Ended:
    """The answer is whole."""

    finish_reason: str  # "stop" | "length"
    usage: Usage
    tiles: int
    first_token_s: float


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no more of it."""

    error: ApiError


Event = Began | Piece | Ended | Failed


class Job:
    """A request with a place, from the moment that it comes; made by `Service.enter`."""

    def __init__(self, service: "Service", loop: asyncio.AbstractEventLoop) -> None:
        self.events: asyncio.Queue[Event] = asyncio.Queue()  # ends with Ended or Failed, unless the job is stopped
        self.entered = time.perf_counter()
        self.began = self.entered  # the work, and what it took
        self.seconds = 0.0
        self._service, self._loop = service, loop
        self._future: Future[None] | None = None
        self._reply: Reply | None = None
        self._stopped, self._late = threading.Event(), False

    @property
    def running(self) -> bool:
        """Whether the model works on it."""
        return self._future is not None and self._future.running()

    def start(self, request: ChatRequest) -> None:
        """Puts the request behind those that wait."""
        self._future = self._service.submit(self, request)

    def stop(self) -> None:
        """Gives the answer up, within a token; the place is free when the model is. Any number of times."""
        self._stopped.set()
        if self._future is None or self._future.cancel():
            self._service.leave(self)
        elif self._reply:
            self._reply.cancel()

    def expire(self) -> None:
        """Gives the answer up because it takes too long."""
        self._late = True
        self.stop()

    def fail(self, error: ApiError) -> None:
        """Stops a job that waits, with an error."""
        self.events.put_nowait(Failed(error))
        self.stop()

    def emit(self, event: Event) -> None:
        """From the thread that works."""
        self._loop.call_soon_threadsafe(self.events.put_nowait, event)

    def work(self, request: ChatRequest, limits: Limits, chat: Chat) -> None:
        """Answers the request, in a conversation of its own; in the thread that works."""
        self.began = time.perf_counter()
        try:
            reply = chat.say(_turns(request, limits, chat, self._check), request.sampling, top=request.top)
            self._reply = reply
            if self._stopped.is_set():  # maybe before `_reply` was there to be cancelled
                reply.cancel()
            else:
                self.emit(Began())
            self._answer(request, chat, reply)
        except Cancelled:
            self._given_up()
        except (InputError, ImageError) as exc:
            self.emit(Failed(from_input_error(exc)))
        except EngineError as exc:
            self.emit(Failed(ApiError(500, f"the model failed: {exc}", "engine_failed")))
        except MemoryError:
            self.emit(Failed(ApiError(500, "there is not enough memory for this request", "out_of_memory")))
        finally:
            self.seconds = time.perf_counter() - self.began

    def _check(self) -> None:
        if self._stopped.is_set():
            raise Cancelled

    def _given_up(self) -> None:
        """Says so, if it was not the client that gave the answer up."""
        if self._late:
            message = f"the answer took longer than {self._service.time_limit_s:g} s"
            self.emit(Failed(ApiError(504, message, "time_limit")))

    def _answer(self, request: ChatRequest, chat: Chat, reply: Reply) -> None:
        stop = StopText(request.stops)
        taken = shown = sampled = 0  # characters that went into `stop` and came out; tokens
        first_s = 0.0
        waiting: list[tuple[int, dict[str, Any]]] = []  # where its text begins, and the entry
        for step in reply:
            first_s = first_s or time.perf_counter() - self.entered
            sampled += 1
            text = stop.push(step.text)
            if request.logprobs and step.token.id not in chat.runner.settings.eos_ids:
                waiting.append((taken, token_entry(chat.encoder, step.token)))
            taken, shown = taken + len(step.text), shown + len(text)
            entries: tuple[dict[str, Any], ...] = ()
            if stop.stopped or shown == taken:
                entries = tuple(entry for at, entry in waiting if at < shown or not stop.stopped)
                waiting = []
            if text or entries:
                self.emit(Piece(text, entries))
            if stop.stopped or self._stopped.is_set():
                break
        ended = stop.stopped
        reply.close()
        if not ended and (self._stopped.is_set() or reply.answer().finish_reason == "cancelled"):
            self._given_up()
            return
        if rest := stop.rest():
            self.emit(Piece(rest, tuple(entry for _, entry in waiting)))
        reason = "stop" if ended else reply.answer().finish_reason
        seq_len = chat.runner.settings.seq_len
        usage = Usage(reply.prompt_tokens, sampled, reply.image_tiles * seq_len)
        self.emit(Ended(reason, usage, reply.image_tiles, first_s))


class Service:
    """Takes requests for a model.

    Args:
        chat: of `open_chat`; its runner, encoder and settings are used, and by nobody else.
        names: that the model goes by.
        fingerprint: tells one bundle from another.
        limits: of a request.
        queue: how many requests may wait.
        time_limit_s: for an answer, from the moment that the model begins with it.
        log: called with a line, which holds nothing of a request or an answer.
    """

    def __init__(
        self,
        chat: Chat,
        names: tuple[str, ...],
        fingerprint: str,
        limits: Limits,
        *,
        queue: int = 4,
        time_limit_s: float = 300,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.names, self.fingerprint, self.limits, self.time_limit_s = names, fingerprint, limits, time_limit_s
        self.context, self.log = chat.runner.settings.context, log
        self._chat, self._places = chat, queue + 1
        self._jobs: set[Job] = set()
        self._usual_s = 5.0  # what an answer takes, by the last ones
        self._closing = False
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    @property
    def closing(self) -> bool:
        """Whether no more requests are taken."""
        return self._closing

    @property
    def taken(self) -> int:
        """Requests that have a place, the one at work among them."""
        return len(self._jobs)

    def enter(self) -> Job:
        """A place, to be given back by `stop` whatever happens.

        Raises:
            ApiError: 429 if there is none, 503 if the server ends; both say when to come again.
        """
        if self._closing:
            raise _ending()
        if len(self._jobs) >= self._places:
            wait_s = min(MOST_WAIT_S, max(1, math.ceil(self._usual_s)))
            message = f"{len(self._jobs)} requests are at work or wait, as many as are taken"
            raise ApiError(429, message, "queue_full", None, wait_s)
        job = Job(self, asyncio.get_running_loop())
        self._jobs.add(job)
        return job

    def leave(self, job: Job) -> None:
        """Gives a place back; in the event loop."""
        self._jobs.discard(job)

    def submit(self, job: Job, request: ChatRequest) -> "Future[None]":
        """Has the request answered when its turn comes. Raises ApiError if the server ends."""
        if self._closing:
            raise _ending()
        loop = asyncio.get_running_loop()
        return self._worker.submit(self._work, job, request, loop)

    def close(self) -> None:
        """Takes no more requests and refuses those that wait; the one at work goes on until it is stopped."""
        self._closing = True
        for job in list(self._jobs):
            if not job.running:
                job.fail(_ending())

    def join(self) -> None:
        """Waits for the thread; nothing of the service is used afterwards."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _work(self, job: Job, request: ChatRequest, loop: asyncio.AbstractEventLoop) -> None:
        handle: list[asyncio.TimerHandle] = []

        def on_time() -> None:
            handle.append(loop.call_later(self.time_limit_s, job.expire))

        def done() -> None:
            for timer in handle:
                timer.cancel()
            self._usual_s += (job.seconds - self._usual_s) / 4
            self.leave(job)

        loop.call_soon_threadsafe(on_time)
        chat = self._chat
        try:
            job.work(request, self.limits, Chat(chat.runner, chat.encoder, chat.settings, chat.video))
        except Exception as exc:  # noqa: BLE001  # whatever it is, the client is told and the next request answered
            self.log(internal(exc))
            job.emit(Failed(ApiError(500, "an error of the server", "internal_error")))
        finally:
            loop.call_soon_threadsafe(done)


def internal(exc: Exception) -> str:
    """A line about an error that nobody foresaw: its type and place, not its words, which may be a request's."""
    frame = traceback.extract_tb(exc.__traceback__)[-1]
    return f"error: {type(exc).__name__} in {Path(frame.filename).name}:{frame.lineno}"


def _ending() -> ApiError:
    return ApiError(503, "the server is ending", "shutting_down", None, 10)


def _turns(request: ChatRequest, limits: Limits, chat: Chat, check: Callable[[], None]) -> list[Turn]:
    """Decoded and cut; what cannot fit into the context is refused before that.

    Args:
        check: called now and then; what it raises ends the work.

    Raises:
        ContextError, ImageError: as they say.
    """
    parts = [part for message in request.messages for part in message.parts]
    sizes = chat.runner.settings
    least = sum(len(part) // chat.encoder.longest if isinstance(part, str) else sizes.seq_len for part in parts)
    if least > sizes.context:
        raise ContextError(f"the context of {sizes.context:,} has no room for a prompt of {least:,} tokens or more")
    low = chat.settings.with_budget(1)
    pages = limits.images - sum(isinstance(part, Picture) for part in parts)  # that are left for PDFs
    turns = []
    for message in request.messages:
        found: list[str | Tiles | Frames] = []
        for part in message.parts:
            check()
            if isinstance(part, str):
                found.append(part)
            elif isinstance(part, Picture):
                image = decode_image(part.data, limits.pixels, IMAGE_FORMATS)
                found.append(preprocess(image, low if part.low else chat.settings))
            elif isinstance(part, Video):
                most = VideoLimits(limits.body_bytes, seconds=limits.video_seconds)
                found.append(read_video(part.data, chat.video, most, check))
            else:
                edge = min(chat.settings.longest_edge, MAX_EDGE)
                drawn = read_pdf(part.data, edge, None, PdfLimits(limits.body_bytes, pages), check)
                pages -= len(drawn)
                found += [preprocess(page, chat.settings) for page in drawn]
        turns.append(Turn(message.role, tuple(found)))
    return turns
