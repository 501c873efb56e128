"""What a question will take, from its media's sizes alone: tiles, tokens, the part of the context, memory.

Not covered: memory of Core ML; how long it takes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtimes.bundle import Bundle
from runtimes.chat import Front
from runtimes.manifest import BundleError
from runtimes.memory import predict, room
from runtimes.preprocess import TILE_BUDGETS, ImageSettings, tile_grid
from runtimes.prompt import ImagePart, Message, VideoPart
from runtimes.runner import ContextError, InputError

MIB = 1 << 20
Size = tuple[int, int]  # width and height of an image


@dataclass(frozen=True)
class Plan:
    """A question that fits into the context."""

    media: str  # what was given, in words; empty for a text alone
    tiles: int
    image_tokens: int
    prompt_tokens: int  # the image tokens among them
    new_tokens: int  # of the answer at most
    context: int
    cache_bytes: int | None  # keys and values of prompt and answer; None, as the next: not known for this target
    peak_bytes: int | None  # of the process

    def __str__(self) -> str:
        used = self.prompt_tokens / self.context
        lines = (
            f"{self.media}: {self.tiles} tile{'s' * (self.tiles != 1)}, {self.image_tokens:,} image tokens; "
            f"prompt of {self.prompt_tokens:,} tokens, {used:.0%} of the context of {self.context:,}, "
            f"answer of at most {self.new_tokens:,}"
        )
        if self.cache_bytes is not None:
            lines += f"; memory: cache {self.cache_bytes / MIB:,.1f} MiB"
        if self.peak_bytes is not None:
            lines += f", about {self.peak_bytes / MIB:,.0f} MiB in all"
        return lines


def plan(
    bundle: Bundle,
    front: Front,
    question: str,
    *,
    images: Sequence[Size] = (),
    pages: int = 0,
    video: VideoPart | None = None,
    new_tokens: int = 0,
) -> Plan:
    """What a question takes.

    Args:
        bundle: to be asked.
        front: of the bundle.
        question: the text behind the images or the video.
        images: their sizes, pages of a PDF last.
        pages: how many of the images are pages.
        video: in place of images.
        new_tokens: of the answer at most.

    Raises:
        ContextError: if the prompt is beyond the context, with what would fit.
        InputError: if it cannot be encoded.
    """

    def tokens(settings: ImageSettings, count: int, frames: int) -> int:
        parts = [ImagePart(*tile_grid(*size, settings)) for size in images[:count]]
        videos = [VideoPart(video.seconds, video.at[:frames])] if video else []
        try:
            return len(front.encoder.encode([Message("user", (*parts, *videos, question))]))
        except ValueError as exc:
            raise InputError(str(exc)) from exc

    frames = video.tiles if video else 0
    prompt, context = tokens(front.images, len(images), frames), bundle.manifest.text.context
    tiles = frames + sum(ImagePart(*tile_grid(*size, front.images)).tiles for size in images)
    if prompt > context:
        named = f" for {_media(len(images) - pages, pages, video)} of {tiles} tiles" if tiles else ""
        advice = []
        if video and (fits := _most(frames, lambda n: tokens(front.images, 0, n) <= context)):
            advice.append(f"--frames {fits}")
        for budget in sorted(TILE_BUDGETS, reverse=True) if images else ():
            fewer = front.images.with_budget(budget)
            if fewer.longest_edge < front.images.longest_edge and tokens(fewer, len(images), 0) <= context:
                advice.append(f"--tiles {budget}")
                break
        others = len(images) - pages
        if pages > 1 and (fits := _most(pages, lambda n: tokens(front.images, others + n, 0) <= context)):
            advice.append(f"{fits} of the pages (--pages)")
        would = f"; {' or '.join(advice)} would fit" if advice else ""
        raise ContextError(f"the context of {context:,} has no room for a prompt of {prompt:,} tokens{named}{would}")
    total = min(context, prompt + new_tokens)
    cache = peak = None
    if bundle.manifest.target == "onnx":
        text = bundle.manifest.text
        cache = 8 * text.layers * text.kv_heads * text.head_dim * room(total, context)
        files = {entry.path: entry.size for entry in bundle.manifest.files}
        try:
            peak = predict(bundle.manifest, bundle.json("config.json"), files, tiles=tiles, tokens=total).peak
        except BundleError:
            peak = None  # a config.json that lacks sizes which only a prediction needs
    return Plan(
        _media(len(images) - pages, pages, video),
        tiles,
        tiles * front.encoder.seq_len,
        prompt,
        min(new_tokens, context - prompt + 1),  # the last one is not fed
        context,
        cache,
        peak,
    )


def _most(count: int, fits: Callable[[int], bool]) -> int:
    """The most, from 1 to below `count`, that fits; 0 if none does."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _media(images: int, pages: int, video: VideoPart | None) -> str:
    def count(number: int, thing: str) -> list[str]:
        return [f"{number} {thing}{'s' * (number > 1)}"] if number else []

    named = count(images, "image") + count(pages, "page")
    if video:
        named += [f"{video.tiles} frame{'s' * (video.tiles > 1)} of a video of {video.seconds} s"]
    return ", ".join(named)
