"""A SmolVLM checkpoint in, a proven INT4 bundle for ONNX Runtime out.

    python -m export.android --model MODEL --out BUNDLE [--lora ADAPTER] [--recipe int4] [--data documents.jsonl]

MODEL is a folder or a hub id (org/name, optionally @revision). The bundle appears under --out when it is
whole and its proof has passed, not before. Not covered: whether a given phone runs it fast enough.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from export.bundling import Exported, calibrated, describe, finish, parser, run, start, write_config
from export.onnx_graphs import graph_dtypes, write_graphs
from export.onnx_ops import LEAST_ENGINE, OPSETS, SHARD_BYTES
from export.processor import write_processor_files
from quantize.recipe import DEFAULT
from runtimes.bundle import stage_bundle
from runtimes.manifest import Engine, InstructionSet, Manifest, MemoryEstimate
from runtimes.memory import predict
from runtimes.ort import cpu_features
from runtimes.preprocess import TILE_BUDGETS


def export_android(
    model: str,
    out: Path,
    recipe_name: str = DEFAULT,
    *,
    lora: str | None = None,
    tiles: int | None = None,
    version: int = 1,
    with_proof: bool = True,
    data: Path | None = None,
    limit: int | None = None,
    calibration: Path | None = None,
    work: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Writes the bundle of a checkpoint.

    Args:
        model: a folder or a hub id.
        out: the bundle's folder; must not exist.
        recipe_name: a shipped recipe, or the path of a .toml file.
        lora: a LoRA adapter that is merged into the weights: a folder or a hub id.
        tiles: the token budget that becomes the bundle's default; None keeps the checkpoint's.
        version: the bundle's version, which only grows for one model and recipe.
        with_proof: False leaves the bundle with `proof: pending`, for `python -m export.prove`.
        data: documents.jsonl on which the quantization loss is measured.
        limit: use at most this many of them.
        calibration: documents.jsonl by which a calibrated recipe chooses its integers.
        work: where calibration keeps what is done, and takes it up again; None: beside the bundle.
        shard_bytes: every file of external data is smaller.

    Raises:
        CheckpointError, RecipeError, DataError: bad input. BundleError: `out` exists or cannot be written.
        ProofError: the bundle computes something else than its model, or lost more than its recipe allows.
        In every case nothing is left under `out`.
    """
    with stage_bundle(out) as stage:
        job = start(model, recipe_name, data, limit, calibration, lora)
        write_processor_files(job.checkpoint.folder, job.spec, stage, tiles)
        job = calibrated(job, stage, out, work, progress)
        graphs = stage / "onnx"
        graphs.mkdir()
        written = write_graphs(graphs, job.spec, job.source, job.recipe, progress, shard_bytes)
        used = written.used
        loading = {
            "dtype": graph_dtypes(job.spec, job.recipe),
            "use_external_data_format": written.data_files,
        }
        write_config(job, stage, {"transformers.js_config": loading})
        manifest = describe(
            job,
            stage,
            used,
            version,
            target="onnx",
            tools=("onnx-ir", "onnxruntime"),
            opsets={domain or "ai.onnx": number for domain, number in OPSETS.items()},
            engine=Engine("onnxruntime", LEAST_ENGINE),
            instruction_set=InstructionSet(
                tuple(sorted(cpu_features())),
                any(s.format == "column" and not s.reduced_range for s in used.values()),
            ),
            context=job.spec.text.max_positions,
        )
        manifest = replace(manifest, memory=memory_estimates(manifest, stage))
        return finish(job, stage, out, manifest, with_proof, progress)


def memory_estimates(manifest: Manifest, stage: Path) -> tuple[MemoryEstimate, ...]:
    """Memory to expect for each token budget and context (`runtimes.memory`), without the process around it."""
    config = json.loads((stage / "config.json").read_text(encoding="utf-8"))
    files = {path.relative_to(stage).as_posix(): path.stat().st_size for path in stage.rglob("*") if path.is_file()}
    rows = []
    for tiles in TILE_BUDGETS:
        for context in (1024, 2048, 4096, 8192):
            if tiles * manifest.image.tokens_per_tile + 64 > context or context > manifest.text.context:
                continue
            found = predict(manifest, config, files, tiles=tiles, tokens=context, base=0)
            rows.append(MemoryEstimate(tiles, context, found.peak))
    return tuple(rows)


def main() -> int:
    def export(args: argparse.Namespace, progress: Callable[[str], None]) -> Exported:
        return export_android(
            args.model,
            args.out,
            args.recipe,
            lora=args.lora,
            tiles=args.tiles,
            version=args.version,
            with_proof=not args.no_proof,
            data=args.data,
            limit=args.limit,
            calibration=args.calibration,
            work=args.work,
            progress=progress,
        )

    return run(parser("python -m export.android", __doc__.splitlines()[0]).parse_args(), export)


if __name__ == "__main__":
    raise SystemExit(main())
