"""The files of a Core ML bundle: two packages and the embedding table, written or compared with what is there."""

import json
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from export.coreml_ops import MilOps, WeightFile, build_program, half, save_program
from export.smolvlm import EMBED, decoder, vision_tower
from export.spec import CheckpointError, ModelSpec
from export.weights import WeightSource, block_tensors
from quantize.recipe import Recipe, Scheme
from runtimes.coreml import DECODER, EMBEDDING, MASKED, VISION
from runtimes.mil_package import MODEL, WEIGHTS
from runtimes.tensorfile import stream_tensors

DESCRIBED = {
    "pixel_values": "One tile: (byte / 255 - mean) / std, [1, 3, S, S], RGB.",
    "image_features": "What stands in the places of the tile's image tokens, [1, tokens, hidden].",
    "inputs_embeds": "Embeddings of T tokens, image features in place of image tokens, [1, T, hidden].",
    "attention_mask": f"Added to scores, [1, 1, T, L]: 0 where row t may look at row l, else {MASKED:.0f}.",
    "position": "Rows of the cache that are filled: where this call's keys and values go.",
    "last_row": "The row whose logits are wanted: the number of tokens less one.",
    "logits": "Of the next token, [1, 1, vocab].",
    "key_cache": "Keys of all layers, [layers, heads, L, width]; a new state is zeros.",
    "value_cache": "Values of all layers, [layers, heads, L, width]; a new state is zeros.",
}


def write_packages(
    folder: Path,
    spec: ModelSpec,
    weights: WeightSource,
    recipe: Recipe,
    context: int,
    chunk: int,
    progress: Callable[[str], None],
) -> dict[str, Scheme]:
    """Quantizes and writes the packages and the embedding table into `folder`; returns how each matrix is stored.

    Args:
        context: rows of the KV cache, fixed when a package is made.
        chunk: tokens that the decoder's `prefill` takes at a time.
    """
    used: dict[str, Scheme] = {}
    for package in (VISION, DECODER):
        progress(f"writing {package}")
        (folder / package / WEIGHTS).parent.mkdir(parents=True)
        file = WeightFile(folder / package / WEIGHTS)
        try:
            model, stored = _program(package, spec, weights, recipe, context, chunk, file)
        finally:
            file.close()
        (folder / package / MODEL).write_bytes(model)
        (folder / package / "Manifest.json").write_bytes(_manifest(package))
        used |= stored
    progress(f"writing {EMBEDDING}")
    used[EMBED] = recipe.scheme(EMBED)
    _write_embedding(folder / EMBEDDING, weights, recipe)
    return used


def check_packages(
    folder: Path, spec: ModelSpec, weights: WeightSource, recipe: Recipe, context: int, chunk: int
) -> list[str]:
    """Makes everything again and names what in `folder` is different, byte for byte."""
    different = []
    for package in (VISION, DECODER):
        file = WeightFile(folder / package / WEIGHTS, check=True)
        try:
            model, _ = _program(package, spec, weights, recipe, context, chunk, file)
        finally:
            file.close()
        different += [f"{package}: weight.bin: {name}" for name in file.writer.different]
        if (folder / package / MODEL).read_bytes() != model:
            different.append(f"{package}: the program")
        if (folder / package / "Manifest.json").read_bytes() != _manifest(package):
            different.append(f"{package}: Manifest.json")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        again = Path(scratch) / EMBEDDING
        _write_embedding(again, weights, recipe)
        if again.read_bytes() != (folder / EMBEDDING).read_bytes():
            different.append(EMBEDDING)
    return different


def _program(
    package: str, spec: ModelSpec, weights: WeightSource, recipe: Recipe, context: int, chunk: int, file: WeightFile
) -> tuple[bytes, dict[str, Scheme]]:
    """(model.mlmodel, how each matrix is stored); the weights are in the file afterwards."""
    used: dict[str, Scheme] = {}

    def vision() -> object:
        ops = MilOps(weights, recipe, file)
        made = ops.vision_function(spec.vision, lambda pixels: vision_tower(ops, spec, pixels))
        used.update(ops.used)
        return made

    def text(rows: int) -> object:
        ops = MilOps(weights, recipe, file, rows=rows, context=context)
        made = ops.decoder_function(spec.text, lambda x: decoder(ops, spec, x))
        used.update(ops.used)
        return made

    if package == VISION:
        title = f"SmolVLM vision encoder, one tile of {spec.vision.image_size} pixels"
        program = build_program({"main": vision})
    else:
        title = f"SmolVLM decoder, context {context}: prefill takes {chunk} tokens, decode one"
        program = build_program({"prefill": lambda: text(chunk), "decode": lambda: text(1)})
    return save_program(program, file, DESCRIBED, title), used


def _manifest(package: str) -> bytes:
    """Manifest.json of a package (a ModelPackage of coremltools), with identifiers that do not change."""
    items = {}
    for name, path, what in (
        ("model.mlmodel", "com.apple.CoreML/model.mlmodel", "CoreML Model Specification"),
        ("weights", "com.apple.CoreML/weights", "CoreML Model Weights"),
    ):
        key = str(uuid.uuid5(uuid.NAMESPACE_URL, f"smolport:{package}/{path}")).upper()
        items[key] = {"author": "com.apple.CoreML", "description": what, "name": name, "path": path}
    content = {"fileFormatVersion": "1.0.0", "itemInfoEntries": items, "rootModelIdentifier": next(iter(items))}
    return (json.dumps(content, indent=4) + "\n").encode()


def _write_embedding(path: Path, weights: WeightSource, recipe: Recipe) -> None:
    """The embedding as a table of rows; FORMAT.md says how a row is read."""
    vocab, hidden = weights.shape(EMBED)
    scheme = recipe.scheme(EMBED)
    match scheme.format:
        case "float":
            step = max(1, (1 << 24) // hidden)
            starts = range(0, vocab, step)
            entries = {"weight": ("F16", (vocab, hidden))}
            stream_tensors(
                path, entries, lambda _: (half(weights.rows(EMBED, i, min(i + step, vocab)), EMBED) for i in starts)
            )
        case "block":
            if hidden * scheme.bits % 8:
                raise CheckpointError(f"{EMBED} is {hidden} wide, and rows of 4 bits want an even width")
            (q,) = block_tensors(weights, [EMBED], scheme)
            arrays: dict[str, Any] = {
                "q": q.packed.reshape(vocab, -1)[:, : hidden * scheme.bits // 8],
                "scales": q.scales,
                "zeros": q.zeros,
            }
            names = {np.dtype(np.uint8): "U8", np.dtype(np.float16): "F16"}
            entries = {name: (names[array.dtype], array.shape) for name, array in arrays.items()}
            stream_tensors(path, entries, lambda name: [arrays[name]])
        case other:
            raise CheckpointError(
                f"recipe {recipe.name}: {EMBED} is in format {other}, an embedding wants float or block"
            )
