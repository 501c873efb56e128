"""One process that loads a bundle and times its phases; `benchmarks.run` starts it, confined.

    echo '{"bundle": "build/demo-android"}' | python -m benchmarks.measure

Phases, each with every sample in milliseconds, its CPU seconds and its own peak of resident memory (VmHWM, reset
before each; null where the kernel cannot): verify (digests), load, image (a tile), prefill (text alone), decode (each
further token), first token (a picture's file to the first token, as a user waits). Not covered: accuracy.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.limits import bundle_work, limits_ms, measure_machine
from runtimes.bundle import Bundle, read_bundle
from runtimes.chat import Chat
from runtimes.generate import Sampling
from runtimes.manifest import BundleError
from runtimes.ort import OrtRunner
from runtimes.preprocess import TILE_BUDGETS, read_settings
from runtimes.prompt import PromptEncoder
from runtimes.runner import EngineError, InputError, Runner, open_runner

PROC = Path("/proc/self")
END = "end"  # said as a phase after the last: what comes then is not the bundle's


@dataclass(frozen=True)
class Job:
    """What to measure.

    tiles: of the picture that the first token is about, at most; 0: no picture, no vision tower.
    prefill_tokens: of a text prompt.
    decode_at: tokens in the cache when further ones are timed.
    decode_tokens: how many are timed.
    threads: of the engine; 0: its choice.
    options: session settings.
    warmup, repeats: of image, prefill and first token.
    """

    bundle: str
    tiles: int = 1
    prefill_tokens: int = 128
    decode_at: int = 128
    decode_tokens: int = 16
    threads: int = 0
    options: dict[str, str] = field(default_factory=dict)
    warmup: int = 1
    repeats: int = 3
    allow_pending: bool = False
    seed: int = 0


@dataclass
class Phase:
    """Samples of one phase, ms; CPU seconds and the peak of resident memory, MiB, over all of it."""

    samples_ms: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    peak_rss_mib: float | None = None


def status_mib(key: str, proc: Path = PROC) -> float | None:
    """Memory of a process by the kernel, MiB; None where it does not say. VmRSS: resident now, VmHWM: at most."""
    try:
        lines = (proc / "status").read_text("ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return None


@contextmanager
def phase(name: str, phases: dict[str, Phase], on_phase: Callable[[str], None]) -> Iterator[Phase]:
    """Opens a phase: its CPU time and peak are those of what runs inside."""
    on_phase(name)
    found = phases.setdefault(name, Phase())
    with contextlib.suppress(OSError):
        (PROC / "clear_refs").write_text("5", "ascii")  # resets VmHWM
    cpu = time.process_time()
    yield found
    found.cpu_s += time.process_time() - cpu
    found.peak_rss_mib = status_mib("VmHWM")


@contextmanager
def timed(samples: list[float]) -> Iterator[None]:
    """Appends what the inside takes, ms."""
    began = time.perf_counter()
    yield
    samples.append((time.perf_counter() - began) * 1000)


def noise_image(tiles: int, tile_size: int, rng: np.random.Generator) -> bytes:
    """A PNG that becomes the most tiles that the budget allows: time does not depend on what is on it."""
    side = TILE_BUDGETS[tiles] * tile_size
    small = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((side, side), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def open_bundle(bundle: Bundle, job: Job) -> Runner:
    """The runner of the bundle's target, vision tower loaded where a picture is asked for."""
    if bundle.manifest.target == "onnx":
        return OrtRunner(bundle, threads=job.threads, vision=job.tiles > 0, config=job.options)
    return open_runner(bundle, threads=job.threads, vision=job.tiles > 0)


def measure(job: Job, on_phase: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """All phases of a job.

    Raises:
        BundleError, InputError: if the bundle or the sizes cannot be used.
        EngineError: if the engine fails.
    """
    phases: dict[str, Phase] = {}
    rng = np.random.default_rng(job.seed)
    start_rss = status_mib("VmRSS")
    with phase("verify", phases, on_phase) as found, timed(found.samples_ms):
        bundle = read_bundle(Path(job.bundle), allow_pending=job.allow_pending)
    with phase("load", phases, on_phase) as found, timed(found.samples_ms):
        runner = open_bundle(bundle, job)
    settings = runner.settings
    wanted = max(job.prefill_tokens, job.decode_at + job.decode_tokens)
    if wanted > settings.context:
        raise InputError(f"{wanted} tokens are asked for, the bundle's context is {settings.context}")
    plain = np.array([i for i in range(settings.vocab) if i != settings.image_id and i not in settings.eos_ids])

    def text(count: int) -> list[int]:
        return [int(i) for i in rng.choice(plain, count)]

    if job.tiles:
        side = settings.tile_size
        with phase("image", phases, on_phase) as found:
            for i in range(job.warmup + job.repeats):
                tile = rng.uniform(-1, 1, (1, 3, side, side)).astype(np.float32)
                with timed(found.samples_ms if i >= job.warmup else []):
                    runner.encode_image(tile)
    with phase("prefill", phases, on_phase) as found:
        for i in range(job.warmup + job.repeats):
            ids, cache = text(job.prefill_tokens), runner.new_cache()
            with timed(found.samples_ms if i >= job.warmup else []):
                runner.extend(cache, ids)
        del cache
    with phase("decode", phases, on_phase) as found:
        cache = runner.new_cache()
        if job.decode_at:
            runner.extend(cache, text(job.decode_at))
        for i, token in enumerate(text(job.warmup + job.decode_tokens)):
            with timed(found.samples_ms if i >= job.warmup else []):
                runner.extend(cache, [token])
        del cache
    tokens = tiles = 0
    with phase("first_token", phases, on_phase) as found:
        images = read_settings(bundle.path("preprocessor_config.json"))
        encoder = PromptEncoder.from_folder(bundle.folder)
        picture = noise_image(job.tiles, images.tile_size, rng) if job.tiles else b""
        for i in range(job.warmup + job.repeats):
            chat = Chat(runner, encoder, images.with_budget(job.tiles) if job.tiles else images)
            with timed(found.samples_ms if i >= job.warmup else []):
                shown = [Image.open(io.BytesIO(picture)).convert("RGB")] if job.tiles else []
                reply = chat.ask("What does it say?", shown, Sampling(1))
                next(reply)
            answer = reply.answer()
            tokens, tiles = answer.prompt_tokens, answer.image_tiles
    del runner, chat, reply, answer
    on_phase(END)
    return {
        "job": asdict(job),
        "payload_digest": bundle.manifest.payload_digest,
        "recipe": bundle.manifest.recipe.name,
        "target": bundle.manifest.target,
        "first_token_of": {"tiles": tiles, "tokens": tokens},
        "start_rss_mib": start_rss,
        "phases": {name: asdict(found) for name, found in phases.items()},
        "physical": _physical(bundle, job, tiles, tokens) if bundle.manifest.target == "onnx" else None,
    }


def _physical(bundle: Bundle, job: Job, tiles: int, tokens: int) -> dict[str, Any]:
    """The machine's peaks, and what they allow at best (`benchmarks.limits`), ms by phase."""
    files = {entry.path: entry.size for entry in bundle.manifest.files}
    work = bundle_work(bundle.manifest, bundle.json("config.json"), files)
    machine = measure_machine(job.threads or len(os.sched_getaffinity(0)))
    middle = job.decode_at + job.decode_tokens // 2
    limits = limits_ms(work, machine, prefill=job.prefill_tokens, decode_at=middle, tiles=tiles, tokens=tokens)
    return {"machine": asdict(machine), "limits_ms": limits}


def read_job(text: str) -> Job:
    """A job from JSON. Raises InputError for another form."""
    try:
        given = json.loads(text)
    except ValueError as exc:
        raise InputError(f"the job is not JSON: {exc}") from exc
    known = {f.name for f in fields(Job)}
    if not isinstance(given, dict) or "bundle" not in given or given.keys() - known:
        raise InputError(f"the job is {str(given)[:200]}, want an object of {', '.join(sorted(known))}")
    return Job(**given)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure", description=__doc__.splitlines()[0])
    parser.parse_args()

    def on_phase(name: str) -> None:
        print(f"phase {name}", file=sys.stderr, flush=True)

    try:
        found = measure(read_job(sys.stdin.readline()), on_phase)
    except (BundleError, InputError, EngineError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1 if isinstance(exc, EngineError) else 2
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
