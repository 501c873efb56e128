"""A SmolVLM checkpoint in, a proven INT4 bundle for ONNX Runtime out.

    python -m export.android --model MODEL --out BUNDLE [--recipe int4] [--data documents.jsonl]

MODEL is a folder or a hub id (org/name, optionally @revision). The bundle appears under --out when it is
whole and its proof has passed, not before. Not covered: whether a given phone runs it fast enough.
"""

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from export.checkpoint import Checkpoint, resolve
from export.onnx_graphs import graph_dtypes, graph_file, write_graphs
from export.onnx_ops import LEAST_ENGINE, OPSETS
from export.processor import write_processor_files
from export.prove import DataError, ProofError, peak_rss_bytes, prove, read_data
from export.spec import CheckpointError, ModelSpec, read_spec
from export.weights import open_weights
from quantize.recipe import DEFAULT, SHIPPED, Recipe, RecipeError, Scheme, load_recipe
from runtimes.bundle import stage_bundle, write_manifest
from runtimes.manifest import (
    BundleError,
    Engine,
    ImageLimits,
    InstructionSet,
    Manifest,
    MemoryEstimate,
    ModelSource,
    Proof,
    RecipeUsed,
    TextLimits,
)
from runtimes.ort import cpu_features
from runtimes.preprocess import TILE_BUDGETS, read_settings
from runtimes.runner import EngineError, InputError

TOOLS = ("smolport", "numpy", "onnx-ir", "onnxruntime", "safetensors", "tokenizers", "torch", "transformers")


@dataclass(frozen=True)
class Exported:
    """What an export did; times in seconds, memory as the process's peak so far."""

    bundle: Path
    payload_digest: str
    payload_bytes: int
    export_s: float
    export_peak_rss_bytes: int
    proof_s: float | None
    report: dict[str, Any] | None


def export_android(
    model: str,
    out: Path,
    recipe_name: str = DEFAULT,
    *,
    tiles: int | None = None,
    version: int = 1,
    with_proof: bool = True,
    data: Path | None = None,
    limit: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Writes the bundle of a checkpoint.

    Args:
        model: a folder or a hub id.
        out: the bundle's folder; must not exist.
        recipe_name: a shipped recipe, or the path of a .toml file.
        tiles: the token budget that becomes the bundle's default; None keeps the checkpoint's.
        version: the bundle's version, which only grows for one model and recipe.
        with_proof: False leaves the bundle with `proof: pending`, for `python -m export.prove`.
        data: documents.jsonl on which the quantization loss is measured.
        limit: use at most this many of them.

    Raises:
        CheckpointError, RecipeError, DataError: bad input. BundleError: `out` exists or cannot be written.
        ProofError: the bundle computes something else than its model, or lost more than its recipe allows.
        In every case nothing is left under `out`.
    """
    began = time.monotonic()
    recipe = load_recipe(recipe_name)
    documents = read_data(data, limit) if data else []
    with stage_bundle(out) as stage:
        checkpoint = resolve(model)
        spec = read_spec(checkpoint.folder)
        weights = open_weights(checkpoint.folder, spec)
        write_processor_files(checkpoint.folder, spec, stage, tiles)
        (stage / "onnx").mkdir()
        used = write_graphs(stage / "onnx", spec, weights, recipe, progress)
        write_config(checkpoint.folder, spec, recipe, stage)
        manifest = write_manifest(stage, describe(checkpoint, spec, recipe, used, stage, version))
        export_s, peak = time.monotonic() - began, peak_rss_bytes()
        report = None
        if with_proof:
            report = prove(stage, checkpoint.folder, spec, weights, recipe, documents, progress)
            manifest = write_manifest(stage, replace(manifest, proof=Proof("passed", "report.json")))
        size = sum(f.size for f in manifest.files if f.role == "payload")
        proof_s = time.monotonic() - began - export_s if with_proof else None
    return Exported(out, manifest.payload_digest, size, export_s, peak, proof_s, report)


def write_config(folder: Path, spec: ModelSpec, recipe: Recipe, out: Path) -> None:
    """config.json as transformers.js needs it: sizes that Hugging Face leaves to defaults written out, and
    which file has which dtype."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, config["text_config"], config["vision_config"]):
        for key in ("dtype", "torch_dtype", "_name_or_path"):
            part.pop(key, None)
    text, vision = spec.text, spec.vision
    config["text_config"] |= {
        "hidden_size": text.hidden,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "head_dim": text.head_dim,
        "intermediate_size": text.ffn,
        "vocab_size": text.vocab,
        "max_position_embeddings": text.max_positions,
        "rope_theta": text.rope_theta,
        "rms_norm_eps": text.norm_eps,
    }
    config["vision_config"] |= {
        "hidden_size": vision.hidden,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "intermediate_size": vision.ffn,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
    }
    config["image_token_id"] = spec.image_token_id
    config["scale_factor"] = spec.scale_factor
    external = {graph_file(g, d).removesuffix(".onnx"): 1 for g, d in graph_dtypes(spec, recipe).items()}
    config["transformers.js_config"] = {
        "dtype": graph_dtypes(spec, recipe),
        "use_external_data_format": {f"{name}.onnx": chunks for name, chunks in external.items()},
    }
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def describe(
    checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe, used: dict[str, Scheme], stage: Path, version: int
) -> Manifest:
    """The manifest of a staged bundle, its proof pending."""
    settings = read_settings(stage / "preprocessor_config.json")
    text = spec.text
    tools = {}
    for name in TOOLS:
        try:
            tools[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            tools[name] = "not installed as a package"
    return Manifest(
        target="onnx",
        model=ModelSource(checkpoint.name, checkpoint.revision, checkpoint.license, spec.architecture),
        version=version,
        recipe=RecipeUsed(recipe.name, {name: scheme.as_dict() for name, scheme in sorted(used.items())}),
        tools=tools,
        opsets={domain or "ai.onnx": number for domain, number in OPSETS.items()},
        engine=Engine("onnxruntime", LEAST_ENGINE),
        instruction_set=InstructionSet(
            tuple(sorted(cpu_features())),
            any(s.format == "column" and not s.reduced_range for s in used.values()),
        ),
        image=ImageLimits(settings.tile_size, settings.longest_edge, settings.max_tiles, spec.tokens_per_tile),
        text=TextLimits(
            text.max_positions,
            text.vocab,
            text.hidden,
            text.layers,
            text.kv_heads,
            text.head_dim,
            spec.eos_ids,
            spec.image_token_id,
        ),
        memory=memory_estimates(spec, stage / "onnx"),
    )


def memory_estimates(spec: ModelSpec, graphs: Path) -> tuple[MemoryEstimate, ...]:
    """Memory to expect for each token budget and context: weights, KV cache with the headroom it grows by, and
    the larger of a tile's and a prompt's activations. An estimate by counting, not a measurement."""
    text, vision = spec.text, spec.vision
    weights = sum(f.stat().st_size for f in graphs.iterdir())
    kv_token = 2 * text.layers * text.kv_heads * text.head_dim * 4
    tile = 4 * vision.patches * (vision.hidden * 6 + vision.ffn * 2) + 4 * vision.heads * vision.patches**2
    rows = []
    for tiles in TILE_BUDGETS:
        image = tiles * spec.tokens_per_tile
        for context in (1024, 2048, 4096, 8192):
            if image + 64 > context or context > text.max_positions:
                continue
            prompt = 4 * (image + 64) * (text.hidden * 4 + text.ffn * 3)
            rows.append(MemoryEstimate(tiles, context, weights + kv_token * context * 5 // 4 + max(tile, prompt)))
    return tuple(rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that exporting and proving share."""
    parser.add_argument("--data", type=Path, help="documents.jsonl (image, question, answer) to measure the loss on")
    parser.add_argument("--limit", type=int, help="use at most this many documents")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m export.android", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint folder, or a hub id org/name[@revision]")
    parser.add_argument("--out", type=Path, required=True, help="the bundle's folder; must not exist")
    parser.add_argument(
        "--recipe", default=DEFAULT, help=f"{', '.join(SHIPPED)} or a .toml file (default: %(default)s)"
    )
    parser.add_argument("--tiles", type=int, choices=sorted(TILE_BUDGETS), help="default token budget of the bundle")
    parser.add_argument("--version", type=int, default=1, help="the bundle's version (default: %(default)s)")
    parser.add_argument("--no-proof", action="store_true", help="leave the proof pending (python -m export.prove)")
    add_arguments(parser)
    args = parser.parse_args()
    began = time.monotonic()
    try:
        done = export_android(
            args.model,
            args.out,
            args.recipe,
            tiles=args.tiles,
            version=args.version,
            with_proof=not args.no_proof,
            data=args.data,
            limit=args.limit,
            progress=lambda text: print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True),
        )
    except (CheckpointError, RecipeError, DataError, BundleError, ProofError, InputError, EngineError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        if args.json:
            print(json.dumps({"ok": False, "error": str(exc)}))
        return 2
    print(
        f"{done.bundle}: {done.payload_bytes / 1e6:.1f} MB of payload, exported in {done.export_s:.1f} s "
        f"(peak {done.export_peak_rss_bytes / 2**20:.0f} MiB)"
        + (f", proven in {done.proof_s:.1f} s" if done.proof_s is not None else ", proof pending")
    )
    if args.json:
        summary = {"ok": True, "bundle": str(done.bundle), "payload_digest": done.payload_digest}
        summary |= {"payload_bytes": done.payload_bytes, "export_s": done.export_s, "proof_s": done.proof_s}
        print(json.dumps(summary | {"export_peak_rss_bytes": done.export_peak_rss_bytes, "report": done.report}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
