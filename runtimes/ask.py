"""Asks a bundle a question, about images, a PDF, a video or nothing but the text, and prints the answer as it comes.

    python -m runtimes.ask BUNDLE --image FILE "What is the total?"
    python -m runtimes.ask BUNDLE --image FILE "What is the total?" --route prefer_on_device --router-config FILE.toml
    python -m runtimes.ask BUNDLE --pdf FILE --pages 1-3 "What is the total?"
    python -m runtimes.ask BUNDLE --video FILE --frames 16 "What happens?"

Before it loads the model it says what the images or the video take: tiles, tokens, context, memory.
The answer goes to stdout, everything else to stderr. Exit code 0: answered; 1: the engine failed, or nobody answered;
2: the bundle, an image, a video, a PDF, the question or the configuration cannot be used; 130: interrupted. Without
--route nothing but the bundle is asked and the router is not even loaded; with it a receipt says who answered, why and
at what cost, and what is asked about is images alone.
Not covered: more than one question; see runtimes.chat.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtimes.bundle import read_bundle
from runtimes.chat import Answer, Chat, read_front
from runtimes.generate import GREEDY, Sampling
from runtimes.manifest import BundleError, Manifest
from runtimes.pdf import read_pdf
from runtimes.plan import Plan, plan
from runtimes.preprocess import MAX_EDGE, TILE_BUDGETS, ImageError, load_image
from runtimes.runner import EngineError, InputError, open_runner
from runtimes.video import Frames, read_video

ROUTES = ("on_device_only", "prefer_on_device", "prefer_cloud", "cloud_only")


@dataclass(frozen=True)
class Asked:
    """An answer, and what gave it."""

    answer: Answer
    manifest: Manifest
    load_ms: float  # checking and loading the bundle


def ask(
    folder: Path,
    question: str,
    images: Sequence[Path] = (),
    *,
    pdf: Path | None = None,
    pages: str | None = None,
    video: Path | None = None,
    frames: int | None = None,
    tiles: int | None = None,
    sampling: Sampling = GREEDY,
    threads: int = 0,
    allow_pending: bool = False,
    on_plan: Callable[[Plan], None] = lambda _: None,
    on_text: Callable[[str], None] = lambda _: None,
) -> Asked:
    """Answers one question.

    Args:
        folder: a bundle.
        question: the text, which follows the images or the video.
        images: image files.
        pdf: a PDF, whose pages are further images.
        pages: of the PDF, such as "1-3,7"; None: all.
        video: a video file, in place of images.
        frames: at most this many of the video; None: as the bundle says.
        tiles: at most this many tiles an image (1, 5, 10 or 17); None: as the bundle says.
        sampling: how tokens are chosen.
        threads: of the engine; 0 lets it choose.
        allow_pending: use a bundle whose proof has not passed.
        on_plan: called with what the question takes, before the engine is loaded.
        on_text: called with each piece of the answer as it comes.

    Raises:
        BundleError, ImageError, InputError: if something given cannot be used.
        EngineError: if the engine fails.
    """
    if not question.strip():
        raise InputError("the question is empty")
    if threads < 0:
        raise InputError(f"threads is {threads}, want 0 or more")
    if video and (images or pdf):
        raise InputError("images and a video in one question: the model knows either")
    if pages is not None and not pdf:
        raise InputError("pages are given without a PDF")
    if frames is not None and not video:
        raise InputError("frames are given without a video")
    pictures = [load_image(path) for path in images]
    began = time.perf_counter()
    bundle = read_bundle(folder, allow_pending=allow_pending)
    front = read_front(bundle, tiles)
    load_s = time.perf_counter() - began
    clip: Frames | None = None
    drawn = read_pdf(pdf, min(front.images.longest_edge, MAX_EDGE), pages) if pdf else []
    if video:
        try:
            settings = front.video if frames is None else front.video.with_frames(frames)
        except ValueError as exc:
            raise InputError(str(exc)) from exc
        clip = read_video(video, settings)
    shown = [*pictures, *drawn]
    on_plan(
        plan(
            bundle,
            front,
            question,
            images=[image.size for image in shown],
            pages=len(drawn),
            video=clip.part if clip else None,
            new_tokens=sampling.max_new_tokens,
        )
    )
    began = time.perf_counter()
    runner = open_runner(bundle, threads=threads, vision=bool(shown or clip))
    load_ms = (load_s + time.perf_counter() - began) * 1000
    reply = Chat(runner, front.encoder, front.images, front.video).ask(question, [clip] if clip else shown, sampling)
    for step in reply:
        on_text(step.text)
    return Asked(reply.answer(), bundle.manifest, load_ms)


def summary(asked: Asked) -> dict[str, Any]:
    """What --json prints; times in milliseconds, log-probabilities natural."""
    answer, manifest = asked.answer, asked.manifest
    return {
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "tokens": len(answer.ids),
        "prompt_tokens": answer.prompt_tokens,
        "image_tiles": answer.image_tiles,
        "logprobs": {
            "sum": sum(answer.logprobs),
            "mean": sum(answer.logprobs) / len(answer.logprobs),
            "least": min(answer.logprobs),
        },
        "timings": {
            "load_ms": asked.load_ms,
            **asdict(answer.timings),
            "first_token_ms": answer.timings.first_token_ms,
        },
        "bundle": {
            "model": manifest.model.name,
            "version": manifest.version,
            "recipe": manifest.recipe.name,
            "payload_digest": manifest.payload_digest,
            "proof": manifest.proof.state,
        },
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    text = (__doc__ or "").partition("\n")[0]
    command = argparse.ArgumentParser(prog="python -m runtimes.ask", description=text)
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle")
    command.add_argument("question", metavar="QUESTION")
    command.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="may be repeated")
    command.add_argument("--pdf", type=Path, metavar="FILE", help="its pages are looked at, behind the images")
    command.add_argument("--pages", metavar="LIST", help="of the PDF, such as 1-3,7; all by default")
    command.add_argument("--video", type=Path, metavar="FILE", help="in place of images")
    command.add_argument("--frames", type=int, metavar="N", help="at most so many of the video")
    command.add_argument("--tiles", type=int, choices=TILE_BUDGETS, help="at most so many tiles an image")
    command.add_argument("--max-new-tokens", type=int, default=GREEDY.max_new_tokens, metavar="N")
    command.add_argument("--temperature", type=float, default=GREEDY.temperature, help="0, the default, is greedy")
    command.add_argument("--top-k", type=int, default=GREEDY.top_k, metavar="N", help="0, the default, is no limit")
    command.add_argument("--top-p", type=float, default=GREEDY.top_p, metavar="P")
    command.add_argument("--repetition-penalty", type=float, default=GREEDY.repetition_penalty, metavar="X")
    command.add_argument("--seed", type=int, default=GREEDY.seed)
    command.add_argument("--threads", type=int, default=0, metavar="N", help="0, the default, lets the engine choose")
    command.add_argument("--allow-pending", action="store_true", help="use a bundle whose proof has not passed")
    command.add_argument("--route", choices=ROUTES, metavar="MODE", help=f"who may answer: {', '.join(ROUTES)}")
    command.add_argument("--router-config", type=Path, metavar="FILE", help="TOML: what else may be asked, and caps")
    command.add_argument(
        "--confidence", type=Path, metavar="FILE", help="what benchmarks.confidence learnt (BUNDLE.confidence.json)"
    )
    command.add_argument("--consent", action="store_true", help="agree beforehand to what a route would send")
    command.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    return command


def routed(args: argparse.Namespace, sampling: Sampling, show: Callable[[str], None]) -> int:
    """The command with --route; returns its exit code."""
    from runtimes import route  # here: without a route no router is loaded

    def fail(message: str, code: int, **more: Any) -> int:
        message = " ".join(message.split())
        print(f"error: {message}", file=sys.stderr)
        if args.json:
            print(json.dumps({"error": message, **more}))
        return code

    try:
        for path in args.image:
            load_image(path)  # one that cannot be read is nobody's question
        router = route.open_router(
            args.bundle,
            args.route,
            route.beforehand if args.consent else route.at_terminal,
            config=args.router_config,
            confidence=args.confidence,
            tiles=args.tiles,
            sampling=sampling,
            threads=args.threads,
            allow_pending=args.allow_pending,
        )
        answer = route.ask_routed(router, args.question, args.image, sampling, show)
    except (route.ConfigError, route.LedgerError, ImageError) as exc:
        return fail(str(exc), 2)
    except route.RouterError as exc:
        if exc.partial:
            print()
        print(route.receipt_text(exc.receipt), file=sys.stderr)
        return fail(str(exc), 1, receipt=exc.receipt.as_json())
    print()
    print(route.receipt_text(answer.receipt), file=sys.stderr)
    if args.json:
        print(json.dumps({"answer": answer.text, "receipt": answer.receipt.as_json()}, ensure_ascii=False))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    command = parser()
    args = command.parse_args(arguments)
    if args.route is None and (args.router_config or args.confidence or args.consent):
        command.error("--router-config, --confidence and --consent belong to --route")
    if args.route is not None and (args.pdf or args.video):
        command.error("--route takes images, no --pdf and no --video")
    shown: list[str] = []

    def show(piece: str) -> None:
        shown.append(piece)
        print(piece, end="", flush=True)

    def announce(found: Plan) -> None:
        if found.media:
            print(found, file=sys.stderr, flush=True)

    try:
        sampling = Sampling(
            args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.seed
        )
        if args.route is not None:
            return routed(args, sampling, show)
        asked = ask(
            args.bundle,
            args.question,
            args.image,
            pdf=args.pdf,
            pages=args.pages,
            video=args.video,
            frames=args.frames,
            tiles=args.tiles,
            sampling=sampling,
            threads=args.threads,
            allow_pending=args.allow_pending,
            on_plan=announce,
            on_text=show,
        )
    except (BundleError, ImageError, InputError, EngineError) as exc:
        message = " ".join(str(exc).split())
        if shown:
            print()
        print(f"error: {message}", file=sys.stderr)
        if args.json:
            print(json.dumps({"error": message}))
        return 1 if isinstance(exc, EngineError) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print()
    answer, times = asked.answer, asked.answer.timings
    print(
        f"{len(answer.ids)} tokens ({answer.finish_reason}), {answer.image_tiles} tiles, {answer.prompt_tokens} prompt "
        f"tokens; loaded in {asked.load_ms / 1000:.2f} s, first token after {times.first_token_ms / 1000:.2f} s, "
        f"the rest in {times.decode_ms / 1000:.2f} s",
        file=sys.stderr,
    )
    if args.json:
        print(json.dumps(summary(asked), ensure_ascii=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
