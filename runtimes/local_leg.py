"""A bundle as what answers on this device in router_client: its two-method `Local`, on any of the engines here.

    leg = LocalLeg(lambda: open_chat(read_bundle(folder)))
    router = Router(local=leg, policy=Policy("prefer_on_device"), ...)

Nothing here imports it but what wants a route. Each question is a conversation of its own. Not covered: turns; a
schema, which the model is not held to (the router judges what it said).
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from router_client.local import ContextTooLongError, Question, Token
from runtimes.chat import Chat, Reply
from runtimes.generate import GREEDY, Sampling
from runtimes.manifest import BundleError
from runtimes.preprocess import decode_image, load_image
from runtimes.prompt import ImagePart, Message, chat_string
from runtimes.runner import ContextError, EngineError, InputError

POLL_S = 0.02  # between looks at whether an answer is still wanted


class LocalLeg:
    """Answers with a bundle, which is loaded when it is first needed. Threads that ask at once wait for each other.

    Args:
        load: opens the bundle.
        sampling: how tokens are chosen, but for what a question says of its own: length and temperature.
    """

    def __init__(self, load: Callable[[], Chat], sampling: Sampling = GREEDY) -> None:
        self._load, self._sampling = load, sampling
        self._loaded: Chat | None = None
        self._loading, self._turns = threading.Lock(), threading.Lock()

    def available(self) -> str:
        """Why the bundle cannot be run, in words; "" if it can. The first call loads it."""
        try:
            self.loaded()
        except (BundleError, EngineError, InputError) as exc:
            return " ".join(str(exc).split())
        return ""

    def loaded(self) -> Chat:
        """The bundle, opened once. Raises what `load` raises."""
        with self._loading:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded

    def stream(self, question: Question, stop: threading.Event) -> Iterator[Token]:
        """Answers; ends within a token, a prompt's chunk or an image's tile of `stop`.

        Raises:
            ContextTooLongError: if the question does not fit.
            BundleError, ImageError, InputError, EngineError: if it cannot be answered.
        """
        sampling = replace(self._sampling, max_new_tokens=question.max_tokens, temperature=question.temperature)
        pictures = [decode_image(p) if isinstance(p, bytes) else load_image(p) for p in question.images]
        loaded = self.loaded()
        stops = loaded.runner.settings.eos_ids
        with self._turn(stop) as wanted:
            if not wanted:
                return
            chat = Chat(loaded.runner, loaded.encoder, loaded.settings, system=question.system)
            try:
                reply = chat.ask(question.text, pictures, sampling)
            except ContextError as exc:
                raise ContextTooLongError(str(exc)) from exc
            ended = False
            with _cancelled_by(stop, reply):
                for step in reply:
                    ended = step.token.id in stops
                    yield Token(step.text, step.token.logprob, step.token.margin, "stop" if ended else "")
                    if stop.is_set():
                        reply.close()
                        return
            if not ended and reply.answer().finish_reason == "length":
                yield Token("", finish="length")

    @contextmanager
    def _turn(self, stop: threading.Event) -> Iterator[bool]:
        """Waits until no other answer is under way; False if this one is no longer wanted."""
        while not self._turns.acquire(timeout=POLL_S):
            if stop.is_set():
                yield False
                return
        try:
            yield not stop.is_set()
        finally:
            self._turns.release()


@contextmanager
def _cancelled_by(stop: threading.Event, reply: Reply) -> Iterator[None]:
    """Ends what the engine is at once `stop` is set: an image or a prompt can take seconds."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(POLL_S):
            if stop.is_set():
                reply.cancel()
                return

    watcher = threading.Thread(target=watch, daemon=True, name="local leg")
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def confidence_file(folder: Path) -> Path:
    """Where what was learnt of a bundle's confidence lies: beside it, so that none of its digests changes."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.confidence.json")


def template_digest(chat: Chat) -> str:
    """SHA-256 of what else than the payload makes a question's tokens: the chat format, how pictures become tiles."""
    parts = (ImagePart(0, 0), ImagePart(1, 2), "{question}")
    text = chat_string([Message("system", ("{system}",)), Message("user", parts)], 1)
    content = json.dumps({"chat": text, "images": asdict(chat.settings)}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
