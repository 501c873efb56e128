"""The loop over any runner: sampling, stop tokens, text as it comes, conversations whose cache is kept.

    chat = open_chat(read_bundle(folder))
    for step in (reply := chat.ask("What is the total?", [load_image("receipt.png")])):
        print(step.text, end="")
    reply.answer()        # text, ids, logprobs, finish_reason, timings

Not covered: several conversations at once on one runner, beam search.
"""

import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from runtimes.bundle import Bundle, BundleError
from runtimes.preprocess import ImageSettings, Pixels, preprocess, read_settings
from runtimes.prompt import ImagePart, Message, PromptEncoder
from runtimes.runner import Cache, Cancelled, Floats, InputError, Runner, open_runner

REPLACEMENT = "\ufffd"  # what a decoder makes of bytes that are no character, or not one yet


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The formulae are those of transformers' logits processors, in its order.

    Raises:
        InputError: for a value out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy, the best token each time
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0"),
            "seed": (self.seed >= 0, "0 or more"),
        }
        for name, (fits, wanted) in ranges.items():
            if not fits:
                raise InputError(f"{name} is {getattr(self, name)}, want {wanted}")


GREEDY = Sampling()


@dataclass(frozen=True)
class Token:
    """A sampled token; `logprob` is by the raw logits; `ms` is the time from its predecessor (or the start)."""

    id: int
    logprob: float
    ms: float


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


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Natural logarithms of the probabilities; float64 [..., vocab]."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def scores(logits: Floats, seen: Sequence[int], sampling: Sampling) -> Floats:
    """Logits [vocab] after repetition penalty, temperature, top-k and top-p; what is ruled out is -inf.

    Args:
        logits: as the model gives them; not changed.
        seen: every token of the conversation so far, as transformers' penalty counts the prompt too.
        sampling: with temperature 0, only the penalty applies.
    """
    out = logits.astype(np.float32)
    if sampling.repetition_penalty != 1 and len(seen):
        repeated = np.unique(np.asarray(seen))
        penalty = np.float32(sampling.repetition_penalty)
        out[repeated] = np.where(out[repeated] < 0, out[repeated] * penalty, out[repeated] / penalty)
    if sampling.temperature == 0:
        return out
    out /= np.float32(sampling.temperature)
    if 0 < sampling.top_k < out.size:
        out[out < np.partition(out, -sampling.top_k)[-sampling.top_k]] = -np.inf
    if sampling.top_p < 1:
        order = np.argsort(out, kind="stable")  # the least likely first
        below = np.cumsum(np.exp(log_softmax(out[order]))) <= 1 - sampling.top_p
        below[-1] = False
        out[order[below]] = -np.inf
    return out


def generate(
    runner: Runner,
    cache: Cache,
    ids: Sequence[int],
    features: Floats | None = None,
    sampling: Sampling = GREEDY,
    seen: Sequence[int] = (),
) -> Iterator[Token]:
    """Feeds `ids`, then samples until a stop token, `max_new_tokens` or the end of the context.

    The last token is yielded without being fed, so that the cache holds all tokens but that one. The image
    token is never chosen: in an answer it stands for nothing.

    Args:
        runner: any.
        cache: from `runner.new_cache()`, empty or with the conversation so far.
        ids: the tokens to begin with.
        features: f32 [M, hidden], a row for each image token in `ids`.
        sampling: how.
        seen: the tokens in the cache, for the repetition penalty.

    Raises:
        InputError: if `ids` cannot be run.
        EngineError: if the engine fails.
        Cancelled: when the runner is cancelled.
    """
    random = np.random.default_rng(sampling.seed)
    history = [*seen, *ids]
    began = time.perf_counter()
    logits = runner.extend(cache, ids, features)[-1]
    for left in reversed(range(sampling.max_new_tokens)):
        chances = scores(logits, history, sampling)
        chances[runner.settings.image_id] = -np.inf
        token = int(np.argmax(chances)) if sampling.temperature == 0 else _draw(chances, random)
        now = time.perf_counter()
        yield Token(token, float(log_softmax(logits)[token]), (now - began) * 1000)
        if not left or token in runner.settings.eos_ids or cache.length >= runner.settings.context:
            return
        began = time.perf_counter()
        history.append(token)
        logits = runner.extend(cache, [token])[-1]


def _draw(chances: Floats, random: np.random.Generator) -> int:
    total = np.cumsum(np.exp(log_softmax(chances)))
    return min(int(np.searchsorted(total, random.random() * total[-1], side="right")), int(np.argmax(total)))


class TextStream:
    """Tokens in, whole characters out: what is not a character yet waits for the tokens that end it.

    All pieces together are `decode` of all tokens, also where their bytes are no UTF-8, but for an
    unfinished character at the end.

    Args:
        decode: the tokenizer's, of which each token must be bytes on their own (byte-level BPE).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # since the last place where the text so far was whole
        self._sent = 0  # characters of them that were given out

    def push(self, token: int) -> str:
        """The characters that are certain with this token."""
        self._ids.append(token)
        text = self._decode(self._ids)
        # Bytes that may begin a character decode to one replacement at the end; all before it stays as it is.
        whole = not text.endswith(REPLACEMENT)
        piece = text[self._sent : None if whole else -1]
        self._sent += len(piece)
        if whole:
            self._ids, self._sent = [], 0
        return piece


@dataclass(frozen=True)
class EncodedImage:
    """An image's grid (0, 0: not split) and features f32 [N, seq_len, hidden], to be asked about repeatedly."""

    rows: int
    cols: int
    features: Floats


class Reply:
    """An answer in the making: iterate over its steps; `answer` runs the rest and sums up."""

    def __init__(self, steps: Generator[Step, None, Answer]) -> None:
        self._steps = steps
        self._answer: Answer | None = None

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
    """

    def __init__(self, runner: Runner, encoder: PromptEncoder, settings: ImageSettings) -> None:
        self.runner, self.encoder, self.settings = runner, encoder, settings
        self.ids: list[int] = []  # every token of the conversation but a stop token at the end
        self._cache = runner.new_cache()  # holds the first `length` of them
        self._lock = threading.Lock()
        self._busy = False

    def encode(self, image: Image.Image) -> EncodedImage:
        """The features of an image, for several questions or conversations. Raises Cancelled."""
        tiles = preprocess(image, self.settings)
        return EncodedImage(tiles.rows, tiles.cols, self.runner.encode_image(tiles.pixels))

    def ask(self, text: str, images: Sequence[Image.Image | EncodedImage] = (), sampling: Sampling = GREEDY) -> Reply:
        """Puts a question, after its images, and answers it step by step as the reply is iterated over.

        A reply that is cancelled before its first token leaves the conversation as it was.

        Raises:
            InputError: at once, before anything is run, for an empty question or a prompt beyond the context.
        """
        if not text.strip():
            raise InputError("the question is empty")
        if not text.isascii() and any(0xD800 <= ord(c) <= 0xDFFF for c in text):
            raise InputError("the question holds bytes that are no UTF-8 text")
        began = time.perf_counter()
        prepared: list[EncodedImage | tuple[ImagePart, Pixels]] = []
        for image in images:
            if isinstance(image, EncodedImage):
                prepared.append(image)
            else:
                tiles = preprocess(image, self.settings)
                prepared.append((ImagePart(tiles.rows, tiles.cols), tiles.pixels))
        parts = [ImagePart(p.rows, p.cols) if isinstance(p, EncodedImage) else p[0] for p in prepared]
        ids = self._next_ids(Message("user", (*parts, text)))
        used, context = len(self.ids), self.runner.settings.context
        if used + len(ids) > context:
            already = f"{used:,} tokens of conversation and " if used else ""
            raise InputError(f"the context of {context:,} has no room for {already}a prompt of {len(ids):,} tokens")
        return Reply(self._answer(used, ids, prepared, sampling, (time.perf_counter() - began) * 1000))

    def cancel(self) -> None:
        """From any thread: the answer in the making ends within a token, as "cancelled"."""
        with self._lock:
            if self._busy:
                self.runner.cancel()

    def _next_ids(self, message: Message) -> list[int]:
        """The tokens that this turn adds to the conversation, the opening of the reply included."""
        try:
            if not self.ids:
                return self.encoder.encode([message])
            # Encoded after an answer's end token, so that what follows that token is split as in a whole chat.
            ids = self.encoder.encode([Message("assistant", ("",)), message], start=False)
        except ValueError as exc:
            raise InputError(str(exc)) from exc
        return ids[ids.index(self.encoder.end_id) :]

    def _answer(
        self,
        used: int,
        ids: list[int],
        images: Sequence[EncodedImage | tuple[ImagePart, Pixels]],
        sampling: Sampling,
        preprocess_ms: float,
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
        try:
            began = time.perf_counter()
            rows = [i.features if isinstance(i, EncodedImage) else self.runner.encode_image(i[1]) for i in images]
            tiles, image_ms = sum(len(r) for r in rows), (time.perf_counter() - began) * 1000
            features = np.concatenate([r.reshape(-1, r.shape[-1]) for r in rows]) if rows else None
            unfed = self.ids[self._cache.length :] + ids
            for token in generate(self.runner, self._cache, unfed, features, sampling, self.ids):
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
    try:
        encoder = PromptEncoder.from_folder(bundle.folder)
        images = read_settings(bundle.path("preprocessor_config.json"))
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
    return Chat(open_runner(bundle, threads=threads, vision=vision), encoder, images)
