"""A Core ML bundle of full size against the fp32 twin of the ONNX bundle, by executing its saved programs.

    python -m benchmarks.coreml_full_size --size 2.2b [--out FILE.jsonl]

On a random checkpoint: one tile through the vision encoder, a prompt of one chunk, then tokens one by one through the
states; in both modes of the executor. One JSON line: errors, the largest magnitudes, sizes, what the export cost. Other
times are those of the executor on this machine and say nothing of a device. Not covered: accuracy (the weights are
random).
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.export_cost import RANDOM
from benchmarks.random_checkpoint import SIZES
from export.android import export_android
from export.ios import export_ios
from export.onnx_graphs import GRAPHS, twin_graph
from export.prove import EXPORT_LIMIT, case_inputs, peak_rss_bytes
from export.spec import read_spec
from export.targets import HALF_LIMIT, fp16_range
from export.weights import open_weights
from quantize.recipe import load_recipe
from runtimes.bundle import read_bundle
from runtimes.coreml import CoreMLRunner, Executed, prefill_chunk
from runtimes.ort import OrtRunner
from runtimes.preprocess import preprocess, read_settings
from runtimes.runner import Floats, Runner
from runtimes.verify import relative_error

EXPORT_S, EXPORT_PEAK_BYTES = 90, 2_600_000_000  # of an export, on two cores
LIMITS = {"ideal": EXPORT_LIMIT, "half": HALF_LIMIT}  # relative L2 against the twin


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def outputs(runner: Runner, pixels: Floats, ids: list[int], steps: int) -> dict[str, Any]:
    """features [L, hidden] of a tile, logits [vocab] after the prompt, logits [steps, vocab] along given tokens."""
    times = {}
    began = time.monotonic()
    features = runner.encode_image(pixels)
    times["tile_s"] = time.monotonic() - began
    cache = runner.new_cache()
    began = time.monotonic()
    prompt = runner.extend(cache, ids, features[0])[-1]
    times["prompt_s"] = time.monotonic() - began
    began = time.monotonic()
    decoded = [runner.extend(cache, [50 + step])[-1] for step in range(steps)]
    times["token_s"] = (time.monotonic() - began) / steps
    return {"features": features, "prompt": prompt, "decoded": np.stack(decoded), "times": times}


def measure(checkpoint: Path, size: str, recipe_name: str, steps: int) -> dict[str, Any]:
    """Exports both bundles of a checkpoint and compares them."""
    spec, recipe = read_spec(checkpoint), load_recipe(recipe_name)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix="coreml-full-size-") as scratch:
        onnx_folder, ios_folder = Path(scratch) / "onnx", Path(scratch) / "coreml"
        # first, so that the peak is its own
        done = export_ios(str(checkpoint), ios_folder, recipe_name, with_proof=False, progress=say)
        export_android(str(checkpoint), onnx_folder, recipe_name, with_proof=False, progress=say)
        ios = read_bundle(ios_folder, allow_pending=True)
        settings = read_settings(ios_folder / "preprocessor_config.json")
        picture = case_inputs(settings)[1][2][0]
        pixels = preprocess(picture, settings).pixels[-1:]
        chunk = prefill_chunk(ios)
        image = [spec.image_token_id] * spec.tokens_per_tile
        ids = [60, *image, *(100 + i for i in range(chunk - len(image) - 1))]
        say("fp32 twin in ONNX Runtime")
        onnx = read_bundle(onnx_folder, allow_pending=True)
        graphs = {g: twin_graph(g, onnx_folder / "onnx", spec, open_weights(checkpoint, spec), recipe) for g in GRAPHS}
        twin_runner = OrtRunner(onnx, graphs=graphs)
        twin = outputs(twin_runner, pixels, ids, steps)
        del twin_runner
        gc.collect()
        row: dict[str, Any] = {
            "size": size,
            "recipe": recipe.name,
            "chunk": chunk,
            "context": ios.manifest.text.context,
            "export": {
                "s": round(done.export_s, 1),
                "peak_rss_bytes": done.export_peak_rss_bytes,
                "payload_bytes": done.payload_bytes,
            },
            "file_bytes": {f.path: f.size for f in ios.manifest.files if f.path.startswith("coreml/")},
        }
        for mode in LIMITS:
            say(f"executor, {mode} mode")
            loader = Executed(half=mode == "half", watch=True)
            found = outputs(CoreMLRunner(ios, load=loader), pixels, ids, steps)
            row[mode] = {part: relative_error(found[part], twin[part]) for part in ("features", "prompt", "decoded")}
            row[mode]["times"] = {key: round(value, 1) for key, value in found["times"].items()}
            row[mode] |= {"range": fp16_range(loader), "unread": loader.unread()}
            row[mode]["not_finite"] = [where for where, seen in loader.magnitudes.items() if not seen.finite]
            loader.forget()
            del found
        row["peak_rss_bytes"] = peak_rss_bytes()
    cheap = done.export_s <= EXPORT_S and done.export_peak_rss_bytes <= EXPORT_PEAK_BYTES
    row["passed"] = cheap and all(
        row[mode][part] <= limit and not row[mode]["not_finite"] and not row[mode]["unread"]
        for mode, limit in LIMITS.items()
        for part in ("features", "prompt", "decoded")
    )
    return row


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coreml_full_size", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="2.2b", help="default: %(default)s")
    parser.add_argument("--recipe", default=str(RANDOM), help="default: the rules of int4, without limits on the loss")
    parser.add_argument("--steps", type=int, default=3, help="tokens after the prompt (default: %(default)s)")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("build/random"), help="kept here (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="append the JSON line to this file too")
    args = parser.parse_args()
    checkpoint = args.checkpoints / args.size
    if not checkpoint.exists():
        say(f"making a random {args.size} checkpoint in {checkpoint}")
        command = ["benchmarks.random_checkpoint", "--size", args.size, "--out", str(checkpoint)]
        subprocess.run([sys.executable, "-m", *command], check=True)  # noqa: S603  # our own module
    row = measure(checkpoint, args.size, args.recipe, args.steps)
    print(json.dumps(row), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
    print(
        "passed"
        if row["passed"]
        else f"FAILED: an error above {LIMITS}, a value infinite or unread, or an export too dear"
    )
    return 0 if row["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
