"""What every export does, whichever its target: opens the checkpoint, fills in the manifest, proves, is a command."""

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from export.calibrate import calibrate_on, calibration_documents
from export.checkpoint import ADAPTER_FILES, Checkpoint, resolve
from export.documents import DataError, Document, read_data
from export.lora import adapter_digest, open_merged
from export.prove import ProofError, peak_rss_bytes, prove
from export.spec import CheckpointError, ModelSpec, read_spec
from export.weights import WeightSource
from quantize.recipe import DEFAULT, SHIPPED, Recipe, RecipeError, Scheme, load_recipe
from runtimes.bundle import write_manifest
from runtimes.manifest import (
    AdapterSource,
    BundleError,
    Calibration,
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
from runtimes.preprocess import TILE_BUDGETS, read_settings
from runtimes.runner import EngineError, InputError

ERRORS = (CheckpointError, RecipeError, DataError, BundleError, ProofError, InputError, EngineError)
TOOLS = ("smolport", "numpy", "safetensors", "tokenizers", "torch", "transformers")


@dataclass(frozen=True)
class Job:
    """What an export starts from: everything that can be wrong with it was checked."""

    checkpoint: Checkpoint
    spec: ModelSpec
    weights: WeightSource  # an adapter merged in, if there is one
    recipe: Recipe
    documents: Sequence[Document]
    adapter: AdapterSource | None
    calibrating: Sequence[Document]  # those that calibration may use; empty if the recipe needs none
    source: WeightSource  # what is written: `weights`, or what calibration made of them
    calibration: Calibration | None
    began: float  # time.monotonic()


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


def start(
    model: str, recipe_name: str, data: Path | None, limit: int | None, calibration: Path | None, lora: str | None
) -> Job:
    """Reads the recipe and the documents, finds the checkpoint and the adapter and opens them.

    Args:
        calibration: documents, which a recipe that is calibrated must have.

    Raises:
        CheckpointError, RecipeError, DataError: naming what is wrong.
    """
    began = time.monotonic()
    recipe = load_recipe(recipe_name)
    documents = read_data(data, limit) if data else []
    checkpoint = resolve(model)
    spec = read_spec(checkpoint.folder)
    adapter = resolve(lora, ADAPTER_FILES, "an adapter") if lora is not None else None
    weights = open_merged(checkpoint.folder, spec, adapter.folder if adapter else None)
    calibrating = calibration_documents(recipe, calibration)
    merged = AdapterSource(adapter.name, adapter.revision, adapter_digest(adapter.folder)) if adapter else None
    return Job(checkpoint, spec, weights, recipe, documents, merged, calibrating, weights, None, began)


def calibrated(job: Job, stage: Path, out: Path, work: Path | None, progress: Callable[[str], None]) -> Job:
    """The job with what calibration made of its weights, if its recipe is calibrated.

    Args:
        stage: holds the processor files of the bundle.
        work: where what is done is kept; None: beside the bundle.
    """
    if not job.recipe.calibrated:
        return job
    source, used = calibrate_on(
        job.calibrating,
        job.checkpoint.folder,
        job.spec,
        job.weights,
        job.recipe,
        work or out.with_name(out.name + ".calibration"),
        progress,
        adapter=job.adapter.sha256 if job.adapter else "",
        processor=stage,
    )
    return replace(job, source=source, calibration=used)


def finish(
    job: Job, stage: Path, out: Path, manifest: Manifest, with_proof: bool, progress: Callable[[str], None]
) -> Exported:
    """Writes the manifest of a staged bundle, and proves it if that is asked for."""
    manifest = write_manifest(stage, manifest)
    export_s, peak = time.monotonic() - job.began, peak_rss_bytes()
    report = None
    if with_proof:
        report = prove(
            stage, job.checkpoint.folder, job.spec, job.weights, job.recipe, job.documents, progress, source=job.source
        )
        manifest = write_manifest(stage, replace(manifest, proof=Proof("passed", "report.json")))
    size = sum(f.size for f in manifest.files if f.role == "payload")
    proof_s = time.monotonic() - job.began - export_s if with_proof else None
    return Exported(out, manifest.payload_digest, size, export_s, peak, proof_s, report)


def write_config(job: Job, out: Path, extra: Mapping[str, Any]) -> None:
    """config.json with the sizes that Hugging Face leaves to defaults written out, and `extra`."""
    config = json.loads((job.checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, config["text_config"], config["vision_config"]):
        for key in ("dtype", "torch_dtype", "_name_or_path"):
            part.pop(key, None)
    text, vision = job.spec.text, job.spec.vision
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
    config["image_token_id"] = job.spec.image_token_id
    config["scale_factor"] = job.spec.scale_factor
    (out / "config.json").write_text(json.dumps(config | extra, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def describe(
    job: Job,
    stage: Path,
    used: Mapping[str, Scheme],
    version: int,
    *,
    target: str,
    tools: Sequence[str],
    opsets: Mapping[str, int],
    engine: Engine,
    instruction_set: InstructionSet,
    context: int,
    memory: tuple[MemoryEstimate, ...] = (),
    notes: tuple[str, ...] = (),
) -> Manifest:
    """The manifest of a staged bundle, its proof pending.

    Args:
        used: how each matrix was stored.
        tools: packages besides TOOLS whose version matters.
        context: the most tokens that the bundle takes.
    """
    settings = read_settings(stage / "preprocessor_config.json")
    text = job.spec.text
    return Manifest(
        target=target,
        model=ModelSource(job.checkpoint.name, job.checkpoint.revision, job.checkpoint.license, job.spec.architecture),
        version=version,
        recipe=RecipeUsed(job.recipe.name, {name: scheme.as_dict() for name, scheme in sorted(used.items())}),
        tools={name: _version(name) for name in sorted([*TOOLS, *tools])},
        opsets=opsets,
        engine=engine,
        instruction_set=instruction_set,
        image=ImageLimits(settings.tile_size, settings.longest_edge, settings.max_tiles, job.spec.tokens_per_tile),
        text=TextLimits(
            context,
            text.vocab,
            text.hidden,
            text.layers,
            text.kv_heads,
            text.head_dim,
            job.spec.eos_ids,
            job.spec.image_token_id,
        ),
        memory=memory,
        calibration=job.calibration,
        notes=notes,
        adapter=job.adapter,
    )


def activation_bytes(spec: ModelSpec, tiles: int, size: int) -> int:
    """The larger of a tile's and a prompt's activations, by counting, in values of `size` bytes."""
    text, vision = spec.text, spec.vision
    tile = vision.patches * (vision.hidden * 6 + vision.ffn * 2) + vision.heads * vision.patches**2
    prompt = (tiles * spec.tokens_per_tile + 64) * (text.hidden * 4 + text.ffn * 3)
    return size * max(tile, prompt)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


# ---- the command


class Export(Protocol):
    """`export_android` or `export_ios`, for the arguments of the command."""

    def __call__(self, args: argparse.Namespace, progress: Callable[[str], None]) -> Exported: ...


def parser(prog: str, text: str) -> argparse.ArgumentParser:
    """The arguments that every export takes."""
    command = argparse.ArgumentParser(prog=prog, description=text)
    command.add_argument("--model", required=True, help="a checkpoint folder, or a hub id org/name[@revision]")
    command.add_argument("--lora", metavar="ADAPTER", help="a PEFT LoRA adapter to merge in: a folder or a hub id")
    command.add_argument("--out", type=Path, required=True, help="the bundle's folder; must not exist")
    command.add_argument(
        "--recipe", default=DEFAULT, help=f"{', '.join(SHIPPED)} or a .toml file (default: %(default)s)"
    )
    command.add_argument("--tiles", type=int, choices=sorted(TILE_BUDGETS), help="default token budget of the bundle")
    command.add_argument("--version", type=int, default=1, help="the bundle's version (default: %(default)s)")
    command.add_argument("--no-proof", action="store_true", help="leave the proof pending (python -m export.prove)")
    command.add_argument("--data", type=Path, help="documents.jsonl (image, question, answer) to measure the loss on")
    command.add_argument("--limit", type=int, help="use at most this many documents")
    command.add_argument("--calibration", type=Path, help="documents.jsonl by which a calibrated recipe rounds")
    command.add_argument("--work", type=Path, help="where calibration keeps what is done (default: beside the bundle)")
    command.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    return command


def run(args: argparse.Namespace, export: Export) -> int:
    """Runs an export and prints what it did; returns the exit code."""
    began = time.monotonic()

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        done = export(args, progress)
    except ERRORS as exc:
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
