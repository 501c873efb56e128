"""A SmolVLM checkpoint in, a proven INT4 bundle for Core ML out.

    python -m export.ios --model MODEL --out BUNDLE [--lora ADAPTER] [--recipe int4] [--data documents.jsonl]

MODEL is a folder or a hub id (org/name, optionally @revision). Needs no Mac: the proof executes what was saved. The
bundle appears under --out when it is whole and its proof has passed, not before. Not covered: what Apple's
compiler and kernels make of it, which only Apple's hardware shows (make verify on a Mac).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from export.bundling import Exported, activation_bytes, calibrated, describe, finish, parser, run, start, write_config
from export.processor import write_processor_files
from export.spec import CheckpointError, ModelSpec
from export.targets import need_coremltools
from quantize.recipe import DEFAULT
from runtimes.bundle import stage_bundle
from runtimes.coreml import FOLDER, LEAST_MACOS
from runtimes.manifest import Engine, InstructionSet, MemoryEstimate
from runtimes.mil_package import SPECIFICATION
from runtimes.preprocess import TILE_BUDGETS

LEAST_SYSTEM = {"iOS": 18, "macOS": LEAST_MACOS}
CONTEXT = 2048  # 17 tiles of 81 tokens and 600 tokens of text; 402 MB of cache for the 2.2B
CHUNK = 128  # tokens of a prefill
NOTES = (
    "Apple's runtime has not run this bundle yet. The proof executes the saved programs on another machine.",
    (
        "For the GPU (MLComputeUnits.cpuAndGPU). Not for the Neural Engine: 4-bit blocks fall back to the CPU there, "
        "and the palettized form that it wants is known to lose 4-bit models of this size."
    ),
)


def export_ios(
    model: str,
    out: Path,
    recipe_name: str = DEFAULT,
    *,
    lora: str | None = None,
    context: int | None = None,
    chunk: int | None = None,
    target: str = "iOS18",
    tiles: int | None = None,
    version: int = 1,
    with_proof: bool = True,
    data: Path | None = None,
    limit: int | None = None,
    calibration: Path | None = None,
    work: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Writes the bundle of a checkpoint; arguments and errors that are not named here as in `export_android`.

    Args:
        context: the most tokens that prompt and answer may have together: the cache has this size from the start.
            None: 2048, or what the model has if that is less.
        chunk: tokens that a prefill takes at a time. None: 128, or the context if that is less.
        target: the oldest system, iOS18 (or later) or macOS15 (or later).
    """
    _check_target(target)
    need_coremltools()
    from export.coreml_packages import write_packages

    with stage_bundle(out) as stage:
        job = start(model, recipe_name, data, limit, calibration, lora)
        most = job.spec.text.max_positions
        context = min(CONTEXT, most) if context is None else context
        if not 2 <= context <= most:
            raise CheckpointError(f"context is {context}, want 2 to {most}, the model's positions")
        chunk = min(CHUNK, context) if chunk is None else chunk
        if not 2 <= chunk <= context:
            raise CheckpointError(f"chunk is {chunk}, want 2 to {context}, the context")
        write_processor_files(job.checkpoint.folder, job.spec, stage, tiles)
        job = calibrated(job, stage, out, work, progress)
        packages = stage / FOLDER
        packages.mkdir()
        used = write_packages(packages, job.spec, job.source, job.recipe, context, chunk, progress)
        write_config(job, stage, {})
        manifest = describe(
            job,
            stage,
            used,
            version,
            target="coreml",
            tools=("coremltools",),
            opsets={"coreml.specification": SPECIFICATION},
            engine=Engine("coreml", ", ".join(f"{name} {number}" for name, number in LEAST_SYSTEM.items())),
            instruction_set=InstructionSet((), saturates_without_vnni=False),
            context=context,
            memory=memory_estimates(job.spec, packages, context),
            notes=NOTES,
        )
        return finish(job, stage, out, manifest, with_proof, progress)


def _check_target(target: str) -> None:
    for name, least in LEAST_SYSTEM.items():
        number = target.removeprefix(name)
        if number != target and number.isdecimal():
            if int(number) >= least:
                return
            raise CheckpointError(
                f"target is {target}, want {name}{least} or later: states (the KV cache), packages of several "
                "functions and 4-bit weights with a scale a block came with it"
            )
    raise CheckpointError(f"target is {target!r}, want iOS18, macOS15 or a later number")


def memory_estimates(spec: ModelSpec, packages: Path, context: int) -> tuple[MemoryEstimate, ...]:
    """Memory to expect for each token budget: weights as they are stored, the whole cache and activations in fp16. An
    estimate by counting, not a measurement; what Core ML unpacks or copies is not in it."""
    text = spec.text
    weights = sum(f.stat().st_size for f in packages.rglob("*") if f.is_file())
    cache = 2 * text.layers * text.kv_heads * text.head_dim * 2 * context
    return tuple(
        MemoryEstimate(tiles, context, weights + cache + activation_bytes(spec, tiles, 2))
        for tiles in TILE_BUDGETS
        if tiles * spec.tokens_per_tile + 64 <= context
    )


def main() -> int:
    def export(args: argparse.Namespace, progress: Callable[[str], None]) -> Exported:
        return export_ios(
            args.model,
            args.out,
            args.recipe,
            lora=args.lora,
            context=args.context,
            chunk=args.chunk,
            target=args.target,
            tiles=args.tiles,
            version=args.version,
            with_proof=not args.no_proof,
            data=args.data,
            limit=args.limit,
            calibration=args.calibration,
            work=args.work,
            progress=progress,
        )

    command = parser("python -m export.ios", __doc__.splitlines()[0])
    command.add_argument("--context", type=int, help=f"tokens of prompt and answer together (default: {CONTEXT})")
    command.add_argument("--chunk", type=int, help=f"tokens of a prefill (default: {CHUNK})")
    command.add_argument(
        "--target",
        default="iOS18",
        help="the oldest system to run on, for a clear refusal of older ones (default: %(default)s)",
    )
    return run(command.parse_args(), export)


if __name__ == "__main__":
    raise SystemExit(main())
