"""The loop over any runner: how tokens are chosen, stop tokens, text as it comes. Conversations: chat.py.

Not covered: several conversations at once on one runner, beam search.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtimes.runner import Cache, Floats, InputError, Runner

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
    """A sampled token; `logprob` and `margin` are by the raw logits.

    margin: logprob less that of the best other token that could have been chosen; below 0 where sampling chose a
        lesser one.
    ms: from its predecessor (or the start).
    """

    id: int
    logprob: float
    margin: float
    ms: float
    top: tuple[tuple[int, float], ...] = ()  # the most likely ids with their log-probabilities, where asked for


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
    top: int = 0,
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
        top: how many of the most likely tokens each token brings along, whatever was chosen.

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
        odds = log_softmax(logits)
        best = tuple((int(i), float(odds[i])) for i in np.argsort(-odds, kind="stable")[:top]) if top else ()
        logprob = float(odds[token])
        odds[[token, runner.settings.image_id]] = -np.inf
        yield Token(token, logprob, logprob - float(odds.max()), (now - began) * 1000, best)
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


class StopText:
    """Text in, text out, up to the first of some strings: what may be the beginning of one waits for the rest.

    Args:
        stops: none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that is certain to be before any stop string; "" once one was seen."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = next((n for n in range(self._longest(text), 0, -1) if self._begins(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, at the end of the text."""
        text, self._held = self._held, ""
        return text

    def _longest(self, text: str) -> int:
        return min(len(text), max((len(stop) - 1 for stop in self._stops), default=0))

    def _begins(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)
