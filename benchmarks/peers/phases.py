"""The phases that every engine is timed in, by the same clock: load, prefill, decode, vision tower, first token.

An engine is a module with an `open_engine` and `serve` as its main(); it reads a job as one line of JSON and prints
what was measured as another. It runs in an environment of its own, so this file needs nothing but the standard
library. Not covered: accuracy.
"""

import argparse
import contextlib
import json
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

PROC = Path("/proc/self")
QUESTION = "What does it say?"
VISION, FIRST_TOKEN = "vision", "first_token"
TOKENS = re.compile(r"(prefill|decode)(\d+)")  # the phases of text: prefill512, decode1024


@dataclass(frozen=True)
class Job:
    """What one process measures.

    model: what the engine opens.
    phases: of `text_phases` and VISION, FIRST_TOKEN.
    context: the most tokens that a cache will hold.
    vocab: ids are drawn below it.
    tile_size: pixels a side of a tile; a picture has 4 x 3 of them and the whole, made one tile.
    repeats: of prefill, vision and first token, after one that is not counted.
    decode_tokens: further tokens that are timed, after one that is not.
    """

    model: str
    phases: tuple[str, ...]
    context: int
    vocab: int
    tile_size: int
    threads: int = 2
    repeats: int = 2
    decode_tokens: int = 32
    options: dict[str, str] = field(default_factory=dict)
    seed: int = 0

    @property
    def vision(self) -> bool:
        """Whether the vision tower is needed."""
        return VISION in self.phases or FIRST_TOKEN in self.phases


@dataclass(frozen=True)
class Picture:
    """RGB, a byte a value, row by row."""

    rgb: bytes
    width: int
    height: int


class Engine(Protocol):
    """One model, loaded. An engine without pictures raises NotImplementedError for them."""

    def reset(self) -> None:
        """Empties the cache."""

    def feed(self, ids: Sequence[int]) -> None:
        """Adds tokens to the cache and computes the logits after the last of them."""

    def tile(self, picture: Picture) -> Callable[[], None]:
        """What runs the vision tower on one tile of the picture, with all before it done."""

    def ask(self, picture: Picture, question: str) -> int:
        """From a picture and a question to the first token, over an empty cache; the number of tokens fed."""


def text_phase(name: str) -> tuple[str, int] | None:
    """("prefill", tokens) or ("decode", tokens before); None for another phase. Raises ValueError for no phase."""
    if found := TOKENS.fullmatch(name):
        if found[1] == "prefill" and not int(found[2]):
            raise ValueError(f"phase {name}: nothing to prefill")
        return found[1], int(found[2])
    if name not in (VISION, FIRST_TOKEN):
        raise ValueError(f"phase {name!r} is unknown, want {VISION}, {FIRST_TOKEN}, prefillN or decodeN")
    return None


def status_mib(key: str) -> float | None:
    """Memory of this process by the kernel, MiB; None where it does not say."""
    with contextlib.suppress(OSError):
        for line in (PROC / "status").read_text("ascii", errors="replace").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) / 1024
    return None


def measure(open_engine: Callable[[Job], Engine], job: Job) -> dict[str, Any]:
    """Every sample of a job's phases, ms, the load's first; the peak of resident memory of the whole process, MiB."""
    draw = random.Random(job.seed)
    samples: dict[str, list[float]] = {}

    def text(count: int) -> list[int]:
        return [draw.randrange(job.vocab // 4, job.vocab // 2) for _ in range(count)]  # special ids are at the ends

    def timed(name: str, work: Callable[[], object], *, counts: bool = True) -> object:
        began = time.perf_counter()
        found = work()
        if counts:
            samples.setdefault(name, []).append((time.perf_counter() - began) * 1000)
        return found

    engine: Engine = timed("load", lambda: open_engine(job))  # type: ignore[assignment]  # what the work returned
    tokens = 0
    for name in job.phases:
        match text_phase(name):
            case "prefill", count:
                for i in range(1 + job.repeats):
                    ids = text(count if i else min(count, 64))  # the first wakes everything up
                    engine.reset()
                    timed(name, lambda ids=ids: engine.feed(ids), counts=i > 0)  # type: ignore[misc]
            case "decode", before:
                engine.reset()
                if before:
                    engine.feed(text(before))
                for i, token in enumerate(text(1 + job.decode_tokens)):
                    timed(name, lambda token=token: engine.feed([token]), counts=i > 0)  # type: ignore[misc]
            case _:
                side = job.tile_size
                picture = Picture(draw.randbytes(4 * side * 3 * side * 3), 4 * side, 3 * side)
                if name == VISION:
                    run = engine.tile(picture)
                    for i in range(1 + job.repeats):
                        timed(name, run, counts=i > 0)
                else:
                    for _ in range(max(1, job.repeats // 2)):
                        tokens = timed(name, lambda picture=picture: engine.ask(picture, QUESTION))  # type: ignore[misc,assignment]
    return {
        "job": asdict(job),
        "samples_ms": samples,
        "first_token_tokens": tokens,
        "peak_rss_mib": status_mib("VmHWM"),
    }


def read_job(text: str) -> Job:
    """A job from JSON. Raises ValueError for another form."""
    given = json.loads(text)
    known = {f.name for f in fields(Job)}
    if not isinstance(given, dict) or given.keys() - known or "phases" not in given:
        raise ValueError(f"the job is {str(given)[:200]}, want an object of {', '.join(sorted(known))}")
    return Job(**given | {"phases": tuple(given["phases"])})


def serve(module: str, summary: str, open_engine: Callable[[Job], Engine]) -> int:
    """The main() of an engine: one job from stdin, one line of results to stdout."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.peers.{module}", description=summary)
    parser.parse_args()
    print(json.dumps(measure(open_engine, read_job(sys.stdin.readline()))))
    return 0
