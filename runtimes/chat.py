"""Conversations with a bundle, whose cache and image features are kept from turn to turn.

    chat = open_chat(read_bundle(folder))
    for step in (reply := chat.ask("What is the total?", [load_image("receipt.png")])):
        print(step.text, end="")
    reply.answer()        # text, ids, logprobs, finish_reason, timings

Not covered: several conversations at once on one runner.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from runtimes.bundle import Bundle
from runtimes.generate import GREEDY, Sampling, TextStream, Token, generate
from runtimes.manifest import BundleError
from runtimes.preprocess import ImageSettings, Tiles, preprocess, read_settings
from runtimes.prompt import ImagePart, Message, PromptEncoder, VideoPart
from runtimes.runner import Cancelled, ContextError, Floats, InputError, Runner, open_runner
from runtimes.video import EDGE_TILES, Frames, VideoSettings, read_video_settings


@dataclass(frozen=True)
class Step:
    """A token of an answer as it comes; `text` is what it completes: whole characters, often none."""

    token: Token
    text: str


@dataclass(frozen=True)
class Timings:
    """Milliseconds: image to tiles, tiles to features, prompt to first token, the further tokens together."""

    preprocess_ms: float
    image_ms: float
    prefill_ms: float
    decode_ms: float

    @property
    def first_token_ms(self) -> float:
        """From the question to the first token."""
        return self.preprocess_ms + self.image_ms + self.prefill_ms


@dataclass(frozen=True)
class Answer:
    """A whole answer. `ids` and `logprobs` are of every sampled token, the stop token included."""

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str  # "stop" | "length" | "cancelled"
    prompt_tokens: int  # fed for this answer; those of earlier turns are in the cache
    image_tiles: int
    timings: Timings


@dataclass(frozen=True)
class EncodedImage:
    """An image's grid (0, 0: not split) and features f32 [N, seq_len, hidden], to be asked about repeatedly."""

    rows: int
    cols: int
    features: Floats


@dataclass(frozen=True)
class Turn:
    """What one side said: `role` is "user", "assistant" or "system"; texts and images, or videos, in order."""

    role: str
    parts: tuple[str | Image.Image | Tiles | EncodedImage | Frames, ...]


class Reply:
    """An answer in the making: iterate over its steps; `answer` runs the rest and sums up."""

    def __init__(
        self,
        steps: Generator[Step, None, Answer],
        cancel: Callable[[], None],
        prompt_tokens: int,
        image_tiles: int,
    ) -> None:
        self._steps, self._cancel = steps, cancel
        self._answer: Answer | None = None
        self.prompt_tokens, self.image_tiles = prompt_tokens, image_tiles  # fed for this answer

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        try:
            return next(self._steps)
        except StopIteration as end:
            self._answer = self._answer or end.value
            raise

    def answer(self) -> Answer:
        """The whole answer. Raises ValueError if the reply was closed before its end."""
        for _ in self:
            pass
        if self._answer is None:
            raise ValueError("the reply was closed, or failed, before its end")
        return self._answer

    def cancel(self) -> None:
        """From any thread, also before the first step: the answer ends within a token, as "cancelled"."""
        self._cancel()

    def close(self) -> None:
        """Ends the answer here; the conversation goes on from what was said so far."""
        self._steps.close()


class Chat:
    """A conversation. Each turn feeds only what is new: earlier turns and images are in the cache.

    The tokens fed are those of the whole conversation encoded at once, with each answer's tokens as they
    were sampled; an answer that did not end by itself is ended with the family's end token.

    Args:
        runner: used by one conversation at a time.
        encoder: the bundle's tokenizer.
        settings: how images become tiles (`ImageSettings.with_budget` limits their number).
        video: how videos become frames; None: as the published checkpoints.
        system: what the conversation opens with; "": nothing.
    """

    def __init__(
        self,
        runner: Runner,
        encoder: PromptEncoder,
        settings: ImageSettings,
        video: VideoSettings | None = None,
        system: str = "",
    ) -> None:
        self.runner, self.encoder, self.settings, self.system = runner, encoder, settings, system
        self.video = video or VideoSettings(settings, EDGE_TILES * settings.tile_size)
        self.ids: list[int] = []  # every token of the conversation but a stop token at the end
        self._cache = runner.new_cache()  # holds the first `length` of them
        self._lock = threading.Lock()
        self._busy = False

    def encode(self, image: Image.Image) -> EncodedImage:
        """The features of an image, for several questions or conversations. Raises Cancelled."""
        tiles = preprocess(image, self.settings)
        return EncodedImage(tiles.rows, tiles.cols, self.runner.encode_image(tiles.pixels))

    def ask(
        self,
        text: str,
        images: Sequence[Image.Image | Tiles | EncodedImage | Frames] = (),
        sampling: Sampling = GREEDY,
    ) -> Reply:
        """Puts a question, after its images or its video, and answers it step by step as the reply is iterated over.

        A reply that is cancelled before its first token leaves the conversation as it was.

        Raises:
            InputError: at once, before anything is run, for an empty question or a prompt beyond the context.
        """
        if not text.strip():
            raise InputError("the question is empty")
        if not text.isascii() and any(0xD800 <= ord(c) <= 0xDFFF for c in text):
            raise InputError("the question holds bytes that are no UTF-8 text")
        return self.say([Turn("user", (*images, text))], sampling)

    def say(self, turns: Sequence[Turn], sampling: Sampling = GREEDY, *, top: int = 0) -> Reply:
        """Adds turns, of which the last is to be answered, and answers as `ask` does.

        Args:
            turns: at least one; those of the assistant are taken as its own answers.
            sampling: how tokens are chosen.
            top: how many of the most likely tokens each token of the answer brings along.

        Raises:
            InputError: at once, before anything is run, for turns that cannot be encoded, or mix images and videos.
            ContextError: likewise, for a prompt beyond the context.
        """
        began = time.perf_counter()
        prepared: list[EncodedImage | Tiles | Frames] = []
        messages = []
        for turn in turns:
            parts: list[str | ImagePart | VideoPart] = []
            for part in turn.parts:
                if isinstance(part, str):
                    parts.append(part)
                    continue
                image = preprocess(part, self.settings) if isinstance(part, Image.Image) else part
                prepared.append(image)
                parts.append(image.part if isinstance(image, Frames) else ImagePart(image.rows, image.cols))
            messages.append(Message(turn.role, tuple(parts)))
        if len({isinstance(image, Frames) for image in prepared}) > 1:
            raise InputError("images and a video in one conversation: the model knows either")
        ids = self._next_ids(messages)
        used, context = len(self.ids), self.runner.settings.context
        if used + len(ids) > context:
            already = f"{used:,} tokens of conversation and " if used else ""
            raise ContextError(f"the context of {context:,} has no room for {already}a prompt of {len(ids):,} tokens")
        stopped = threading.Event()

        def cancel() -> None:
            stopped.set()  # before the lock: an answer that is not at work yet will see it
            self.cancel()

        preprocess_ms = (time.perf_counter() - began) * 1000
        steps = self._answer(used, ids, prepared, sampling, top, preprocess_ms, stopped)
        tiles = sum(len(i.features if isinstance(i, EncodedImage) else i.pixels) for i in prepared)
        return Reply(steps, cancel, len(ids), tiles)

    def cancel(self) -> None:
        """From any thread: the answer in the making ends within a token, as "cancelled"."""
        with self._lock:
            if self._busy:
                self.runner.cancel()

    def _next_ids(self, messages: Sequence[Message]) -> list[int]:
        """The tokens that these turns add to the conversation, the opening of the reply included."""
        try:
            if not self.ids:
                opening = [Message("system", (self.system,))] if self.system else []
                return self.encoder.encode([*opening, *messages])
            # Encoded after an answer's end token, so that what follows that token is split as in a whole chat.
            ids = self.encoder.encode([Message("assistant", ("",)), *messages], start=False)
        except ValueError as exc:
            raise InputError(str(exc)) from exc
        return ids[ids.index(self.encoder.end_id) :]

    def _answer(
        self,
        used: int,
        ids: list[int],
        images: Sequence[EncodedImage | Tiles | Frames],
        sampling: Sampling,
        top: int,
        preprocess_ms: float,
        stopped: threading.Event,
    ) -> Generator[Step, None, Answer]:
        stops = self.runner.settings.eos_ids
        stream = TextStream(self.encoder.decode)
        tokens: list[Token] = []
        text, begun, reason, tiles, image_ms = "", False, "length", 0, 0.0
        with self._lock:
            if self._busy or len(self.ids) != used:
                raise InputError("the conversation is at another answer already: one question at a time")
            self._busy = True
            self.runner.resume()
            if stopped.is_set():
                self.runner.cancel()
        try:
            began = time.perf_counter()
            rows = [i.features if isinstance(i, EncodedImage) else self.runner.encode_image(i.pixels) for i in images]
            tiles, image_ms = sum(len(r) for r in rows), (time.perf_counter() - began) * 1000
            features = np.concatenate([r.reshape(-1, r.shape[-1]) for r in rows]) if rows else None
            unfed = self.ids[self._cache.length :] + ids
            for token in generate(self.runner, self._cache, unfed, features, sampling, self.ids, top):
                if not tokens:
                    self.ids += ids
                tokens.append(token)
                piece = ""
                if token.id in stops:
                    reason = "stop"
                else:
                    self.ids.append(token.id)
                    piece = stream.push(token.id)
                if piece and not begun:  # "Assistant:" is followed by a space, which belongs to the format
                    piece, begun = piece.removeprefix(" "), True
                text += piece
                yield Step(token, piece)
        except Cancelled:
            reason = "cancelled"
        finally:
            with self._lock:
                self._busy = False
        times = [t.ms for t in tokens]
        timings = Timings(preprocess_ms, image_ms, sum(times[:1]), sum(times[1:]))
        found, logprobs = tuple(t.id for t in tokens), tuple(t.logprob for t in tokens)
        return Answer(text, found, logprobs, reason, len(ids), tiles, timings)


@dataclass(frozen=True)
class Front:
    """What makes a bundle's tokens and tiles; no engine."""

    encoder: PromptEncoder
    images: ImageSettings
    video: VideoSettings


def read_front(bundle: Bundle, tiles: int | None = None) -> Front:
    """Reads the files of a bundle that come before its graphs. Arguments and errors as `open_chat`."""
    path = bundle.path("preprocessor_config.json")
    try:
        encoder = PromptEncoder.from_folder(bundle.folder)
        images, video = read_settings(path), read_video_settings(path)
    except ValueError as exc:
        raise BundleError(str(exc)) from exc
    sizes = bundle.manifest
    for file, name, found, wanted in (
        ("tokenizer.json", "the image token", encoder.image_id, sizes.text.image_token_id),
        ("processor_config.json", "image_seq_len", encoder.seq_len, sizes.image.tokens_per_tile),
        ("preprocessor_config.json", "max_image_size.longest_edge", images.tile_size, sizes.image.tile_size),
    ):
        if found != wanted:
            raise BundleError(f"{bundle.folder / file}: {name} is {found}, manifest.json says {wanted}")
    if tiles is not None:
        try:
            images = images.with_budget(tiles)
        except ValueError as exc:
            raise InputError(str(exc)) from exc
    return Front(encoder, images, video)


def open_chat(bundle: Bundle, *, tiles: int | None = None, threads: int = 0, vision: bool = False) -> Chat:
    """A conversation with a bundle.

    Args:
        bundle: as read by `read_bundle`.
        tiles: at most this many an image (1, 5, 10 or 17); None: as the bundle says.
        threads: 0 lets the engine choose.
        vision: load the vision tower now; otherwise the first image does.

    Raises:
        BundleError: naming the file that is wrong, or disagrees with another.
        InputError: for another number of tiles.
    """
    front = read_front(bundle, tiles)
    return Chat(open_runner(bundle, threads=threads, vision=vision), front.encoder, front.images, front.video)
