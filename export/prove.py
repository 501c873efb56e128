"""The second phase of an export: proves a written bundle against the untouched Hugging Face model.

    python -m export.prove BUNDLE --model MODEL [--lora ADAPTER] [--data documents.jsonl]

Three errors, never mixed:
  export error       the bundle's fp32-compute twin against the reference with the same dequantized weights
  activation error   the shipped graphs (int8 compute, or fp16) against the twin
  quantization loss  the shipped graphs against the full-precision reference, on documents where there are any
The first must be rounding noise, the others stay under the recipe's limits; otherwise there is no bundle.
"""

import argparse
import gc
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from export.calibrate import calibrate_on, calibration_documents
from export.checkpoint import ADAPTER_FILES, Checkpoint, resolve
from export.documents import DataError, Document, read_data
from export.lora import adapter_digest, open_merged
from export.reference import Reference, reference_ids, reference_pixels, reference_processor
from export.spec import CheckpointError, ModelSpec, read_spec
from export.targets import open_target
from export.weights import WeightSource
from quantize.recipe import Limits, Recipe, RecipeError, load_recipe
from runtimes.bundle import Bundle, read_bundle, replace_manifest
from runtimes.manifest import BundleError, Proof
from runtimes.ort import cpu_features, saturates
from runtimes.preprocess import ImageError, ImageSettings, cut, load_image, normalize, preprocess, read_settings, to_rgb
from runtimes.prompt import ImagePart, Message, PromptEncoder
from runtimes.runner import EngineError, InputError, Runner
from runtimes.verify import Case, Outputs, Parity, compare, relative_error, replay, step_logits, write_cases

EXPORT_LIMIT = 1e-4  # relative L2 of features and logits, twin against reference
CASE_TOKENS = 8  # greedy tokens of a golden case
ANSWER_TOKENS = 32  # at most this many for a document
F32 = npt.NDArray[np.float32]


class ProofError(RuntimeError):
    """The bundle is not what its recipe promises; the message names what is over which limit."""


def prove(
    folder: Path,
    checkpoint: Path,
    spec: ModelSpec,
    weights: WeightSource,
    recipe: Recipe,
    documents: Sequence[Document],
    progress: Callable[[str], None] = lambda _: None,
    *,
    source: WeightSource | None = None,
) -> dict[str, Any]:
    """Proves the pending bundle in `folder`; writes cases/, report.json, report.md and the target's own there.

    Args:
        weights: the full-precision model.
        source: what the bundle was made of, where that is not `weights` but what calibration made of them.

    Returns:
        The report, as written to report.json.

    Raises:
        ProofError: if any error is over its limit; nothing is written then.
        BundleError, CheckpointError, DataError: bad input.
    """
    began = time.monotonic()
    bundle = read_bundle(folder, allow_pending=True)
    encoder = PromptEncoder.from_folder(folder)
    settings = read_settings(folder / "preprocessor_config.json")

    target = open_target(bundle, spec, source or weights, recipe)
    progress("weights and graphs, byte for byte")
    if different := target.different():
        raise ProofError("the payload is not what the recipe makes of the checkpoint: " + "; ".join(different[:10]))
    evidence = target.evidence()
    progress("reference with dequantized weights: golden cases")
    dequantized = Reference(checkpoint, spec, target.stored())
    cases = [
        reference_case(name, turns, images, checkpoint, dequantized, folder, settings, edge)
        for name, turns, images, edge in case_inputs(settings)
    ]
    del dequantized
    gc.collect()  # its modules' hooks hold it in a circle, and with it gigabytes
    rounding = None
    if target.unrounded is not None:
        progress("reference before its constants were rounded to fp16")
        rounding = constants_error(Reference(checkpoint, spec, target.unrounded()), cases, settings)
        gc.collect()
    progress("fp32-compute twin on the golden cases")
    twin = target.twin()
    twin_outputs = [out for _, out in replay(twin, encoder, settings, cases)]
    del twin
    export_error = compare(
        zip(cases, twin_outputs, strict=True), features_limit=EXPORT_LIMIT, logits_limit=EXPORT_LIMIT
    )
    progress("shipped graphs on the golden cases")
    shipped = target.shipped()
    try:
        outputs = [out for _, out in replay(shipped, encoder, settings, cases)]
    except EngineError as exc:
        raise ProofError("\n  ".join([f"the proof failed: {exc}", *target.faults()[:20]])) from exc
    activation_error = compare(
        zip((_as_case(c, t) for c, t in zip(cases, twin_outputs, strict=True)), outputs, strict=True),
        features_limit=target.features_limit,
        logits_limit=target.logits_limit,
    )
    features_limit, logits_limit = target.features_limit + EXPORT_LIMIT, target.logits_limit + EXPORT_LIMIT
    replayed = compare(zip(cases, outputs, strict=True), features_limit=features_limit, logits_limit=logits_limit)
    # Another processor has other kernels: it may differ more than this one does, but not without end.
    verify_limits = {"features": features_limit, "logits": logits_limit}
    if target.elsewhere is not None:
        for part, error in (("features", replayed.features_error), ("logits", replayed.logits_error)):
            verify_limits[part] = min(verify_limits[part], target.elsewhere * error + EXPORT_LIMIT)
    progress("full-precision reference")
    full = Reference(checkpoint, spec, weights)
    loss = quantization_loss(full, shipped, encoder, settings, checkpoint, folder, cases, documents, progress)
    faults = [f"export error: {fault}" for fault in export_error.faults]
    faults += [f"activation error: {fault}" for fault in activation_error.faults]
    faults += [f"shipped graphs against the reference: {fault}" for fault in replayed.faults]
    faults += target.faults()
    faults += loss_faults(loss, recipe.limits)
    machine = platform.machine()
    report = {
        "schema": 1,
        "model": asdict(bundle.manifest.model),
        "adapter": asdict(bundle.manifest.adapter) if bundle.manifest.adapter else None,
        "recipe": {"name": recipe.name, "limits": asdict(recipe.limits)},
        "payload_digest": bundle.manifest.payload_digest,
        "export_error": _summary(export_error) | {"limit": EXPORT_LIMIT},
        "activation_error": _summary(activation_error)
        | {"limits": {"features": target.features_limit, "logits": target.logits_limit}},
        "quantization_loss": loss,
        "verify_limits": verify_limits,
        "machine": {"architecture": machine, "u8s8_saturates": saturates(cpu_features(), machine)},
        "seconds": round(time.monotonic() - began, 1),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    report |= target.extra()
    if rounding is not None:
        report["constants_error"] = rounding
    if faults:
        message = "\n  ".join(["the proof failed:", *faults[:20]])
        own = bundle.manifest.target == "onnx" and not activation_error.passed
        if export_error.passed and (own or loss_faults(loss, recipe.limits)):
            message += (
                f"\nThese limits are recipe {recipe.name}'s; in a copy of its file (RECIPE=mine.toml) they are yours."
            )
        raise ProofError(message)
    write_cases(folder, cases)
    (folder / "report.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(report_text(report), encoding="utf-8")
    for name, text in evidence.items():
        (folder / name).write_text(text, encoding="utf-8")
    return report


def constants_error(unrounded: Reference, cases: Sequence[Case], settings: ImageSettings) -> dict[str, float]:
    """What rounding norms, biases and other constants alone changed: the golden cases' features and first logits
    against a reference whose constants were not rounded, worst relative L2."""
    features = logits = 0.0
    for case in cases:
        pixels = normalize(case.tiles, settings) if len(case.tiles) else None
        made = unrounded.generate(case.ids, pixels, 1, stop=False)
        features = max(features, relative_error(case.features, made.features))
        logits = max(logits, relative_error(case.logits[:1], made.logits))
    return {"features_error": features, "logits_error": logits}


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def case_inputs(
    settings: ImageSettings,
) -> list[tuple[str, tuple[tuple[str, tuple[str | None, ...]], ...], list[Image.Image], int]]:
    """(name, turns, images, longest edge) of the golden cases that every bundle carries."""
    side = settings.tile_size
    wide, tall = drawn_picture(side * 5 // 2, side * 5 // 4, 1), drawn_picture(side // 2, side, 2)
    ask: tuple[str, tuple[str | None, ...]] = ("user", (None, "What is in this picture?"))
    return [
        ("text", (("user", ("Name three things that a label can say.",)),), [], side),
        ("one-tile", (ask,), [tall], side),
        ("split", (ask,), [wide], 2 * side if settings.split else side),
        (
            "two-turns",
            (
                ("user", (None, None, "Compare the two.")),
                ("assistant", ("They differ in colour.",)),
                ("user", ("Which one is larger?",)),
            ),
            [tall, wide],
            side,
        ),
    ]


def drawn_picture(width: int, height: int, seed: int) -> Image.Image:
    """A picture with gradients, edges and grain, the same everywhere: integer arithmetic only."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    planes = [(x * (3 + c) + y * (5 - c) * seed) % 256 for c in range(3)]
    inside = (x - width // 3) ** 2 + (y - height // 2) ** 2 < (min(width, height) // 4) ** 2
    planes[seed % 3] = np.where(inside, 230, planes[seed % 3])
    bars = (x // max(1, width // 24)) % 2 == 0
    planes[(seed + 1) % 3] = np.where(bars & (y > height * 3 // 4), 20, planes[(seed + 1) % 3])
    grain = (x * 7919 + y * 104729 + seed * 31) % 23
    return Image.fromarray(np.stack([np.clip(p + grain, 0, 255) for p in planes], -1).astype(np.uint8))


def reference_case(
    name: str,
    turns: tuple[tuple[str, tuple[str | None, ...]], ...],
    images: Sequence[Image.Image],
    checkpoint: Path,
    reference: Reference,
    folder: Path,
    settings: ImageSettings,
    longest_edge: int,
) -> Case:
    """A golden case from Hugging Face's own processor, tokenizer and model."""
    config = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    processor = reference_processor(config | {"size": {"longest_edge": longest_edge}}, reference.spec.architecture)
    prepared = [reference_pixels(processor, image) for image in images]
    grids = tuple((rows, cols) for _, rows, cols in prepared)
    ids = reference_ids(checkpoint, turns, grids, reference.spec.tokens_per_tile)
    pixels = np.concatenate([p for p, _, _ in prepared]) if prepared else None
    made = reference.generate(ids, pixels, CASE_TOKENS, stop=False)
    case_settings = ImageSettings(**{**asdict(settings), "longest_edge": longest_edge})
    side = settings.tile_size
    tiles = [np.asarray(tile) for image in images for tile in cut(to_rgb(image), case_settings)[0]]
    return Case(
        name=name,
        turns=turns,
        longest_edge=longest_edge,
        grids=grids,
        ids=tuple(ids),
        tokens=made.tokens,
        images=tuple(np.asarray(image) for image in images),
        tiles=np.stack(tiles) if tiles else np.zeros((0, side, side, 3), dtype=np.uint8),
        features=made.features,
        logits=made.logits,
    )


def _as_case(case: Case, twin: Outputs) -> Case:
    """The case with the twin's outputs as what is wanted."""
    tokens = tuple(int(t) for t in twin.logits.argmax(axis=1))
    return Case(**{**case.__dict__, "features": twin.features, "logits": twin.logits, "tokens": tokens})


def _summary(parity: Parity) -> dict[str, Any]:
    summary = asdict(parity)
    summary["faults"] = [str(f) for f in parity.faults]
    return summary


def quantization_loss(
    full: Reference,
    shipped: Runner,
    encoder: PromptEncoder,
    settings: ImageSettings,
    checkpoint: Path,
    folder: Path,
    cases: Sequence[Case],
    documents: Sequence[Document],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """The shipped graphs against the full-precision reference, paired: along the reference's own greedy
    answer (KL, top-1) and by answers generated freely (exact match where there are labels).

    Without documents the golden cases' prompts are used and only KL and top-1 are known.
    """
    config = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    divergences: list[float] = []
    agreed = 0
    pairs: list[tuple[str, bool, bool, bool]] = []  # task, reference right, bundle right, same answer

    def follow(ids: Sequence[int], pixels: F32 | None, features: F32, most: int) -> tuple[tuple[int, ...], bool]:
        """The reference's greedy answer, and whether the bundle's best tokens along it are all the same."""
        nonlocal agreed
        made = full.generate(ids, pixels, most)
        rows = step_logits(shipped, ids, features, made.tokens)
        divergences.extend(kl_divergence(made.logits, rows))
        same = made.logits.argmax(axis=1) == rows.argmax(axis=1)
        agreed += int(same.sum())
        return made.tokens, bool(same.all())

    if not documents:
        for case in cases:
            edge = ImageSettings(**{**asdict(settings), "longest_edge": case.longest_edge})
            tiles = [preprocess(Image.fromarray(image), edge).pixels for image in case.images]
            pixels = np.concatenate(tiles) if tiles else None
            features = shipped.encode_image(pixels) if pixels is not None else case.features
            follow(case.ids, pixels, features, CASE_TOKENS)
    processor = reference_processor(config, full.spec.architecture)
    last = time.monotonic()
    for number, document in enumerate(documents):
        if time.monotonic() - last > 2:
            progress(f"document {number} of {len(documents)}")
            last = time.monotonic()
        try:
            images = [load_image(document.image)] if document.image else []
        except ImageError as exc:
            raise DataError(str(exc)) from exc
        prepared = [reference_pixels(processor, image) for image in images]
        grids = tuple((rows, cols) for _, rows, cols in prepared)
        parts: tuple[str | None, ...] = (*(None for _ in images), document.question)
        ids = reference_ids(checkpoint, (("user", parts),), grids, full.spec.tokens_per_tile)
        tiles_here = [preprocess(image, settings) for image in images]
        pixels = tiles_here[0].pixels if tiles_here else None
        wanted = prepared[0][0] if prepared else None
        own = encoder.encode([Message("user", (*(ImagePart(t.rows, t.cols) for t in tiles_here), document.question))])
        if own != ids or (pixels is not None and wanted is not None and not np.array_equal(pixels, wanted)):
            raise ProofError(f"{document.image}: pixels or prompt differ between the runtime and Hugging Face")
        features = shipped.encode_image(pixels) if pixels is not None else np.zeros((0, 1, 1), np.float32)
        tokens, same = follow(ids, wanted, features, ANSWER_TOKENS)
        answered = tokens if same else greedy(shipped, ids, features, ANSWER_TOKENS)
        before, after = (encoder.decode(t).strip() for t in (tokens, answered))
        right = set(document.answers)
        pairs.append((document.task, before in right, after in right, before == after))
    loss: dict[str, Any] = {
        "documents": len(documents),
        "tokens": len(divergences),
        "kl_mean": float(np.mean(divergences)),
        "kl_p99": float(np.quantile(divergences, 0.99)),
        "top1_agreement": agreed / len(divergences),
    }
    if documents:
        loss["answers_equal"] = sum(p[3] for p in pairs) / len(pairs)
    if any(d.answers for d in documents):
        loss["exact"] = {"all": paired_exact([p[1:3] for p in pairs])}
        for task in sorted({p[0] for p in pairs} - {"all"}):
            loss["exact"][task] = paired_exact([p[1:3] for p in pairs if p[0] == task])
    return loss


def greedy(runner: Runner, ids: Sequence[int], features: F32, most: int) -> tuple[int, ...]:
    """The runner's own greedy answer, its end token included."""
    cache = runner.new_cache()
    flat = features.reshape(-1, features.shape[-1]) if len(features) else None
    tokens = [int(runner.extend(cache, list(ids), flat)[-1].argmax())]
    while len(tokens) < most and tokens[-1] not in runner.settings.eos_ids:
        tokens.append(int(runner.extend(cache, tokens[-1:])[-1].argmax()))
    return tuple(tokens)


def kl_divergence(reference: F32, found: F32) -> list[float]:
    """KL(reference || found) in nats of each row's softmax; both f32 [n, vocab]."""

    def log_softmax(x: F32) -> npt.NDArray[np.float64]:
        y = x.astype(np.float64) - x.max(axis=1, keepdims=True)
        return np.asarray(y - np.log(np.exp(y).sum(axis=1, keepdims=True)))

    p, q = log_softmax(reference), log_softmax(found)
    return [float(v) for v in (np.exp(p) * (p - q)).sum(axis=1)]


def paired_exact(pairs: Sequence[tuple[bool, bool]], resamples: int = 2000) -> dict[str, Any]:
    """Exact match of reference and bundle on the same documents; the loss with a 95 % bootstrap interval."""
    table = np.array(pairs, dtype=np.float64)  # [n, 2]
    difference = table[:, 0] - table[:, 1]
    drawn = np.random.default_rng(0).integers(0, len(table), (resamples, len(table)))
    low, high = np.quantile(difference[drawn].mean(axis=1), [0.025, 0.975])
    return {
        "documents": len(pairs),
        "reference": float(table[:, 0].mean()),
        "bundle": float(table[:, 1].mean()),
        "lost": int((difference > 0).sum()),
        "gained": int((difference < 0).sum()),
        "loss": float(difference.mean()),
        "loss_interval_95": [float(low), float(high)],
    }


def loss_faults(loss: dict[str, Any], limits: Limits) -> list[str]:
    """What of the quantization loss is over the recipe's limits."""
    faults = []
    if not loss["kl_mean"] <= limits.loss_kl:
        faults.append(f"quantization loss: mean KL is {loss['kl_mean']:.3g}, want <= {limits.loss_kl:g}")
    # A few documents more or less are chance: over the limit is a loss whose whole interval is.
    if "exact" in loss and not loss["exact"]["all"]["loss_interval_95"][0] <= limits.loss_exact:
        lost = loss["exact"]["all"]["loss"]
        faults.append(f"quantization loss: exact answers lost are {lost:.2%}, want <= {limits.loss_exact:.2%}")
    return faults


def report_text(report: dict[str, Any]) -> str:
    """report.md: the same figures as report.json, to be read."""
    export, activation, loss = report["export_error"], report["activation_error"], report["quantization_loss"]
    with_adapter = f" with the adapter {report['adapter']['name']}" if report["adapter"] else ""
    lines = [
        f"# Proof of {report['model']['name']}{with_adapter}, recipe {report['recipe']['name']}",
        "",
        f"Payload `{report['payload_digest']}`.",
        "",
        "| error | image features | logits | limit | greedy tokens equal |",
        "|---|---|---|---|---|",
    ]
    limits = report["recipe"]["limits"]
    activation_limit = " / ".join(f"{activation['limits'][part]:g}" for part in ("features", "logits"))
    for title, error, limit in (
        ("export (fp32-compute twin against the reference with the same weights)", export, f"{export['limit']:g}"),
        ("activation (shipped graphs against the twin)", activation, activation_limit),
    ):
        equal = f"{error['tokens_equal']} of {error['tokens']} ({error['ties']} ties)"
        lines.append(f"| {title} | {error['features_error']:.2e} | {error['logits_error']:.2e} | {limit} | {equal} |")
    if rounding := report.get("constants_error"):
        lines.append(
            "| constants (norms, biases, positions rounded to fp16; part of no other line) | "
            f"{rounding['features_error']:.2e} | {rounding['logits_error']:.2e} | | |"
        )
    sentence = (
        f"Quantization loss against the full-precision reference over {loss['tokens']} tokens: mean KL "
        f"{loss['kl_mean']:.2e} (limit {limits['loss_kl']:g}), 99th percentile {loss['kl_p99']:.2e}, top-1 agreement "
        f"{loss['top1_agreement']:.2%}."
    )
    lines += ["", sentence, ""]
    if span := report.get("fp16_range"):
        lines.append(
            f"The largest value was {span['largest']:.4g}, in {span['operation']}; fp16 ends at {span['limit']}."
        )
        lines.append("")
    if "exact" in loss:
        lines += [
            "| task | documents | reference exact | bundle exact | lost / gained | loss, 95 % interval |",
            "|---|---|---|---|---|---|",
        ]
        for task, row in loss["exact"].items():
            low, high = row["loss_interval_95"]
            lines.append(
                f"| {task} | {row['documents']} | {row['reference']:.1%} | {row['bundle']:.1%} | {row['lost']} / "
                f"{row['gained']} | {row['loss']:.2%} ({low:.2%} to {high:.2%}) |"
            )
        lines.append("")
    lines.append(f"Proven in {report['seconds']:.0f} s with a peak of {report['peak_rss_bytes'] / 2**20:.0f} MiB.")
    return "\n".join(lines) + "\n"


def prove_bundle(
    bundle: Bundle,
    model: str,
    recipe: Recipe,
    documents: Sequence[Document],
    progress: Callable[[str], None],
    lora: str | None = None,
    calibration: Path | None = None,
    work: Path | None = None,
) -> dict[str, Any]:
    """Ends the pending proof of a bundle; arguments as for the export that left it so. Errors as in `prove`."""
    checkpoint = resolve(model)
    adapter = resolve(lora, ADAPTER_FILES, "an adapter") if lora is not None else None
    if bundle.manifest.proof.state != "pending":
        raise BundleError(f"{bundle.folder}: its proof has passed already")
    if bundle.manifest.recipe.name != recipe.name:
        raise RecipeError(f"{bundle.folder}: was made with recipe {bundle.manifest.recipe.name}, not {recipe.name}")
    spec = read_spec(checkpoint.folder)
    weights = open_merged(checkpoint.folder, spec, adapter.folder if adapter else None)
    _check_adapter(bundle, adapter)
    source: WeightSource = weights
    if recipe.calibrated:
        source, used = calibrate_on(
            calibration_documents(recipe, calibration),
            checkpoint.folder,
            spec,
            weights,
            recipe,
            work or bundle.folder.with_name(bundle.folder.name + ".calibration"),
            progress,
            adapter=bundle.manifest.adapter.sha256 if bundle.manifest.adapter else "",
            processor=bundle.folder,
        )
        if used != bundle.manifest.calibration:
            raise BundleError(
                f"{bundle.folder}: was calibrated on {bundle.manifest.calibration}, {calibration} gives {used}"
            )
    with tempfile.TemporaryDirectory(dir=bundle.folder.parent, prefix=".proof-") as scratch:
        view = Path(scratch)
        for entry in bundle.manifest.files:  # the proof writes beside links to the payload, not into the bundle
            (view / entry.path).parent.mkdir(parents=True, exist_ok=True)
            (view / entry.path).hardlink_to(bundle.folder / entry.path)
        (view / "manifest.json").hardlink_to(bundle.folder / "manifest.json")
        report = prove(view, checkpoint.folder, spec, weights, recipe, documents, progress, source=source)
        for entry in bundle.manifest.files:
            (view / entry.path).unlink()
        (view / "manifest.json").unlink()
        for path in sorted((p for p in view.rglob("*") if p.is_dir()), reverse=True):  # innermost first
            if not any(path.iterdir()):
                path.rmdir()
        replace_manifest(bundle, Proof("passed", "report.json"), view)
    return report


def _check_adapter(bundle: Bundle, adapter: Checkpoint | None) -> None:
    """Raises BundleError unless the adapter is the one that the bundle was made with."""
    made = bundle.manifest.adapter
    if made is None:
        if adapter is not None:
            raise BundleError(f"{bundle.folder}: was made without an adapter, not with {adapter.name}")
    elif adapter is None:
        raise BundleError(f"{bundle.folder}: was made with the adapter {made.name}: give it too (--lora)")
    elif (digest := adapter_digest(adapter.folder)) != made.sha256:
        raise BundleError(
            f"{bundle.folder}: was made with the adapter {made.name} of sha256 {made.sha256}, "
            f"{adapter.folder} has {digest}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m export.prove", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a bundle whose proof is pending")
    parser.add_argument("--model", required=True, help="the checkpoint that it was made from")
    parser.add_argument("--lora", metavar="ADAPTER", help="the adapter that was merged in, if there was one")
    parser.add_argument("--recipe", help="the recipe file, if it is not a shipped one")
    parser.add_argument("--data", type=Path, help="documents.jsonl (image, question, answer) to measure the loss on")
    parser.add_argument("--calibration", type=Path, help="the documents that it was calibrated on, if it was")
    parser.add_argument("--work", type=Path, help="where its calibration was kept (default: beside the bundle)")
    parser.add_argument("--limit", type=int, help="use at most this many documents")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    args = parser.parse_args()
    began = time.monotonic()
    try:
        bundle = read_bundle(args.bundle, allow_pending=True)
        report = prove_bundle(
            bundle,
            args.model,
            load_recipe(args.recipe or bundle.manifest.recipe.name),
            read_data(args.data, args.limit) if args.data else [],
            lambda text: print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True),
            args.lora,
            args.calibration,
            args.work,
        )
    except (BundleError, CheckpointError, RecipeError, DataError, ProofError, InputError, EngineError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        if args.json:
            print(json.dumps({"ok": False, "error": str(exc)}))
        return 2
    print(report_text(report))
    if args.json:
        print(json.dumps({"ok": True, "report": report}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
