"""How much memory a bundle will take in ONNX Runtime, from its manifest and sizes alone.

What is resident, found by comparing the kernel's counts (VmRSS by kind, VmHWM) with the tensors of bundles:

* A matrix is packed at load and its file's pages are given back; its scales are kept three times, in the packed matrix,
  as sums of blocks, and as pages of the file. While it is packed it is there twice; the tower, inside a Scan, gives
  no page back before all of it is packed. Both graphs load side by side, as fast by the byte.
* Embeddings are read from the file: each row touches a window of READ_AROUND bytes.
* The cache has room for more than the tokens that there are (`runtimes.ort.room`).
* Activations are those of one tile, and of CHUNK tokens of a prompt; the arena that holds them rounds up (ARENA).
* The tower and its arena stay, unless the image has RELEASE_TILES tiles or more; a further image loads it again,
  beside the decoder.
* The tiles of a picture are there in fp32, while they are made twice.

Not covered: Core ML, and what the app around it takes (`base` is this package in Python).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from runtimes.manifest import BundleError, Manifest

CHUNK = 128  # tokens of a prompt that run at once: more are no faster and hold more memory
RELEASE_TILES = 5  # so many let go of the tower: their tokens need the memory, loading again takes half a tile's time
READ_AROUND = 1 << 16
ARENA = 1.3  # fitted
SESSION = 10 << 20  # fitted: what a graph takes besides its tensors
PIXELS = 2  # a picture's tiles, and a copy while they are made
BASE = 71 << 20  # a Python process with this package, benchmarks, NumPy and ONNX Runtime loaded
VISION, TEXT = "model.vision_model.", "model.text_model.layers."
EMBED, HEAD, CONNECTOR = "model.text_model.embed_tokens.weight", "lm_head.weight", "model.connector."


def room(tokens: int, context: int) -> int:
    """Tokens that a cache has room for when it must hold `tokens`."""
    return min(context, tokens + max(64, tokens // 8))


@dataclass(frozen=True)
class Footprint:
    """The most bytes resident in each phase; `image` is 0 without one."""

    load: int
    image: int
    prompt: int

    @property
    def peak(self) -> int:
        """The most bytes of all phases."""
        return max(self.load, self.image, self.prompt)


def predict(
    manifest: Manifest,
    config: Mapping[str, Any],
    files: Mapping[str, int],
    *,
    tiles: int,
    tokens: int,
    most_tokens: int = 0,
    again: bool = False,
    base: int = BASE,
) -> Footprint:
    """Peak memory of a process that loads a bundle, looks at one image and holds a conversation.

    Args:
        config: the bundle's config.json.
        files: bytes of each file in the bundle by its path; external data counts, graphs do not.
        tiles: of the image; 0: no image, and no vision tower is loaded.
        tokens: in the cache at the end, the image's among them.
        most_tokens: in the cache of a text alone that runs while the tower is loaded; 0: none does.
        again: whether there is a further image, in a conversation of its own.
        base: bytes of the process before it loads anything.

    Raises:
        BundleError: if the target is not ONNX, or config.json lacks a size.
    """
    if manifest.target != "onnx":
        raise BundleError(f"memory is predicted for target onnx, the bundle's is {manifest.target}")
    text, vision, kv = _sizes(config, "text_config"), _sizes(config, "vision_config"), manifest.text
    kv_token = 8 * kv.layers * kv.kv_heads * kv.head_dim

    def data(graph: str) -> int:
        return data_bytes(files, graph)

    shapes = matrix_shapes(manifest, config)
    scales = {True: 0, False: 0}  # in the tower, and in the decoder
    largest = 0
    for name, scheme in manifest.recipe.tensors.items():
        if (count := prod(shapes[name])) and name != EMBED:
            seeing = name.startswith((VISION, CONNECTOR))
            if scheme["scheme"] == "block":
                rows, width = shapes[name]
                scales[seeing] += 4 * rows * -(-width // scheme["block"])
            largest = largest if seeing else max(largest, count * scheme["bits"] // 8)
    if EMBED in shapes and HEAD not in shapes:  # tied: the head is the embedding, stored for the decoder too
        rows, width = shapes[EMBED]
        scheme = manifest.recipe.tensors[EMBED]
        scales[False] += 4 * rows * -(-width // scheme["block"]) if scheme["scheme"] == "block" else 0
        largest = max(largest, rows * width * scheme["bits"] // 8)
    decoder = data("decoder_model_merged") + 2 * scales[False]
    tower = data("vision_encoder") + 2 * scales[True] if tiles else 0
    base += SESSION * (3 if tiles else 2)
    load = base + largest + max(decoder + tower, 2 * tower + min(decoder, tower))

    patches, side = (vision["image_size"] // vision["patch_size"]) ** 2, vision["image_size"]
    seen = ARENA * 4 * patches * (6 * vision["hidden_size"] + 2 * vision["intermediate_size"]) if tiles else 0
    pixels = PIXELS * 4 * tiles * 3 * side**2
    image = base + decoder + tower + seen + pixels if tiles else 0

    def work(count: int) -> float:
        scores = text["num_attention_heads"] * count
        chunk = 4 * min(CHUNK, count) * (6 * text["hidden_size"] + 3 * text["intermediate_size"] + scores)
        words = max(1, count - tiles * manifest.image.tokens_per_tile)
        return ARENA * (chunk + 4 * kv.vocab) + min(data("embed_tokens"), words * READ_AROUND)

    def prompt(count: int, with_tower: bool) -> float:
        return base + decoder + kv_token * room(count, kv.context) + work(count) + with_tower * (tower + seen)

    both = prompt(tokens, 0 < tiles < RELEASE_TILES)
    if most_tokens and tiles:
        both = max(both, prompt(most_tokens, True))
    if again and tiles >= RELEASE_TILES:
        image = max(image, base + decoder + 2 * tower + pixels + work(max(tokens, most_tokens)))
    return Footprint(int(load), int(image), int(both))


def data_bytes(files: Mapping[str, int], graph: str) -> int:
    """Bytes of a graph's external data, in however many files; `files`: sizes by path in the bundle."""
    name = re.compile(rf"onnx/{re.escape(graph)}(_[a-z0-9]+)?\.onnx_data(_[0-9]+)?")
    return sum(size for path, size in files.items() if name.fullmatch(path))


def matrix_shapes(manifest: Manifest, config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Rows and width of the matrices that the manifest names; (0, 0) for the connector, and for what is unknown.

    Raises:
        BundleError: if config.json lacks a size.
    """
    text, vision = _sizes(config, "text_config"), _sizes(config, "vision_config")
    vocab, width = manifest.text.vocab, manifest.text.head_dim
    return {name: _shape(name, text, vision, vocab, width) for name in manifest.recipe.tensors}


def _sizes(config: Mapping[str, Any], part: str) -> dict[str, int]:
    """The sizes of one part of config.json that a prediction needs."""
    names = {
        "text_config": ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
        "vision_config": ("hidden_size", "intermediate_size", "image_size", "patch_size"),
    }[part]
    found = config.get(part)
    sizes = {name: found.get(name) if isinstance(found, dict) else None for name in names}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise BundleError(f"config.json: {part}.{name} is {size!r}, want a positive number")
    return sizes  # type: ignore[return-value]  # checked


def _shape(name: str, text: Mapping[str, int], vision: Mapping[str, int], vocab: int, head_dim: int) -> tuple[int, int]:
    """Rows and width of a matrix by its name; (0, 0) for one that is small or unknown."""
    tower = name.startswith(VISION)
    sizes = vision if tower else text
    hidden, ffn = sizes["hidden_size"], sizes["intermediate_size"]
    heads = hidden if tower else text["num_attention_heads"] * head_dim
    groups = hidden if tower else text["num_key_value_heads"] * head_dim
    match name.split(".")[-2]:
        case "embed_tokens" | "lm_head":
            return vocab, hidden
        case "q_proj":
            return heads, hidden
        case "k_proj" | "v_proj":
            return groups, hidden
        case "o_proj" | "out_proj":
            return hidden, heads
        case "gate_proj" | "up_proj" | "fc1":
            return ffn, hidden
        case "down_proj" | "fc2":
            return hidden, ffn
    return 0, 0
