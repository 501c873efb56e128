"""Made-up lines as `benchmarks.run` and `benchmarks.budget` write them."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PHASES_MS = {"verify": 5.0, "load": 20.0, "image": 1.3, "prefill": 8.0, "decode": 0.3, "first_token": 30.0}
DIGEST = "ab" * 32


def run_line(
    seed: int = 0, slower: float = 1.0, noise: float = 0.1, samples: int = 5, **changes: Any
) -> dict[str, Any]:
    """A run whose samples scatter by `noise`, all phases `slower` times as long; for changes see `changed`."""
    rng = np.random.default_rng(seed)
    phases = {
        name: {
            "samples_ms": (ms * slower * np.exp(rng.normal(0, noise, samples))).tolist(),
            "cpu_s": 0.1,
            "peak_rss_mib": 80.0 + i,
        }
        for i, (name, ms) in enumerate(PHASES_MS.items())
    }
    line = {
        "schema": 1,
        "measured": "2026-01-02T03:04:05+00:00",
        "commit": "c0ffee" * 6,
        "bundle": {"model": "tiny", "target": "onnx", "recipe": "int4", "payload_digest": DIGEST},
        "profile": {
            "name": "x86-laptop",
            "cores": 2,
            "memory_mib": 4096,
            "limits": {"load_ms": 3000, "first_token_ms": 20000, "token_ms": 100},
        },
        "execution": "native",
        "simulated": True,
        "limit_enforced": False,
        "cores_enforced": True,
        "cpus": 2,
        "environment": environment(),
        "peak_counted_mib": None,
        "over": [],
        "job": {
            "bundle": "somewhere",
            "tiles": 5,
            "prefill_tokens": 128,
            "decode_at": 128,
            "decode_tokens": 16,
            "threads": 2,
            "options": {},
            "warmup": 1,
            "repeats": 3,
            "allow_pending": False,
            "seed": 0,
        },
        "first_token_of": {"tiles": 5, "tokens": 112},
        "phases": phases,
        "memory_over_time": [[i / 50, 10.0 + 3 * i] for i in range(25)],
        "phase_starts": [[0.1 + i / 20, name] for i, name in enumerate(phases)],
    }
    return changed(line, changes)


def environment() -> dict[str, Any]:
    """Of a machine that there is not."""
    return {
        "machine": "x86_64",
        "system": "Linux 6.1",
        "cores": 2,
        "processor": "A processor",
        "instruction_set": ["avx2"],
        "saturates": True,
        "python": "3.11.1",
        "onnxruntime": "1.32.0",
        "numpy": "2.4.0",
    }


def paired_lines(pairs: int, slower: float = 1.0, noise: float = 0.1, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Runs of a base and of a version that takes `slower` times as long, in pairs that share the machine's luck."""
    rng = np.random.default_rng(seed)
    base, new = [], []
    for number in range(pairs):
        luck = float(np.exp(rng.normal(0, noise)))
        pair = {"comparison": "one", "number": number}
        base.append(run_line(seed * 1000 + 2 * number, luck, noise) | {"pair": pair, "commit": "base"})
        new.append(run_line(seed * 1000 + 2 * number + 1, luck * slower, noise) | {"pair": pair})
    return base, new


def budget_line(tiles: int, **changes: Any) -> dict[str, Any]:
    """A point of a token-budget curve."""
    run = run_line(tiles)
    line = {name: run[name] for name in ("schema", "measured", "commit", "bundle", "profile", "simulated", "job")}
    line |= {"environment": environment(), "runs": 1, "tiles": tiles, "tiles_made": tiles, "image_tokens": 16 * tiles}
    line |= {"prompt_tokens": 20 + 19 * tiles, "samples_ms": [6.0 * tiles, 7.0 * tiles], "peak_rss_mib": 80.0 + tiles}
    score = {"data": "documents", "metric": "exact", "items": 50, "mean": 0.9, "interval_95": [0.8, 0.95]}
    return changed(line | {"data_digest": None, "accuracy": score}, changes)


def changed(line: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with fields changed; `a__b` is field b of a."""
    line = copy.deepcopy(line)
    for name, value in changes.items():
        *way, last = name.split("__")
        at = line
        for step in way:
            at = at[step]
        at[last] = value
    return line


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    """Lines of JSON in a file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
