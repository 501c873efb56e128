"""What every engine offers: images to features, tokens to logits, on the same arrays everywhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtimes.bundle import Bundle
from runtimes.manifest import BundleError

Floats = npt.NDArray[np.float32]

GRAPHS = ("embed_tokens", "vision_encoder", "decoder_model_merged")
# transformers.js finds a graph's file by its dtype: onnx/<graph><suffix>.onnx
DTYPE_SUFFIXES = {
    "fp32": "",
    "fp16": "_fp16",
    "int8": "_int8",
    "uint8": "_uint8",
    "q8": "_quantized",
    "q4": "_q4",
    "q4f16": "_q4f16",
}


class Cancelled(Exception):
    """The call was stopped by `cancel`; the cache is as it was before the call."""


class InputError(ValueError):
    """What was given cannot be run: wrong shapes, unknown tokens, a prompt beyond the context."""


class ContextError(InputError):
    """More tokens than the context holds."""


class EngineError(RuntimeError):
    """The engine failed, or computed what no model computes (NaN)."""


@dataclass(frozen=True)
class BundleSettings:
    """The sizes that a runner and the loop over it need."""

    vocab: int
    hidden: int
    layers: int
    kv_heads: int
    head_dim: int
    context: int  # the most tokens that a cache may hold
    tile_size: int  # pixels a side
    seq_len: int  # image tokens a tile
    image_id: int  # the token that stands for one row of image features
    eos_ids: tuple[int, ...]


class Cache(Protocol):
    """The attention state of one conversation; made by a runner and only of use to it."""

    @property
    def length(self) -> int:
        """Tokens in it."""


class Runner(Protocol):
    """One model, loaded. Calls come from one thread at a time; `cancel` may come from any."""

    @property
    def settings(self) -> BundleSettings: ...

    def encode_image(self, pixels: Floats) -> Floats:
        """Tiles f32 [N, 3, S, S] -> features f32 [N, seq_len, hidden]; no tile influences another.

        Raises:
            InputError: for another shape or type, or for NaN or infinity.
            Cancelled: within a tile of `cancel`.
        """

    def new_cache(self) -> Cache:
        """An empty cache."""

    def extend(self, cache: Cache, ids: Sequence[int], features: Floats | None = None, keep: int = 1) -> Floats:
        """Feeds tokens and returns the logits f32 [keep, vocab] after each of the last `keep` of them.

        Args:
            cache: grows by the tokens; unchanged when an error is raised.
            ids: at least one.
            features: f32 [M, hidden], a row for each of the M image tokens in `ids`, in order. An image token
                fed alone and without features is an ordinary token, as it is to the reference that sampled it.
            keep: 1 or more; 0 for all.

        Raises:
            InputError: if the arguments do not fit, or the tokens do not fit into the context.
            EngineError: if the engine fails, or the logits hold NaN or infinity.
            Cancelled: within a token of `cancel`.
        """

    def cancel(self) -> None:
        """From any thread: the running call, and every later one until `resume`, raises Cancelled."""

    def resume(self) -> None:
        """Forgets a `cancel`; whoever starts new work calls it."""


def read_bundle_settings(bundle: Bundle) -> BundleSettings:
    """The manifest's sizes, after checking that config.json and generation_config.json say the same.

    Raises:
        BundleError: naming the file and the field that disagrees.
    """
    text, image = bundle.manifest.text, bundle.manifest.image
    config, generation = bundle.json("config.json"), bundle.json("generation_config.json")
    eos = generation.get("eos_token_id")
    stated = {
        "vocab": ("config.json", _get(config, "text_config", "vocab_size"), text.vocab),
        "hidden": ("config.json", _get(config, "text_config", "hidden_size"), text.hidden),
        "layers": ("config.json", _get(config, "text_config", "num_hidden_layers"), text.layers),
        "kv_heads": ("config.json", _get(config, "text_config", "num_key_value_heads"), text.kv_heads),
        "head_dim": ("config.json", _get(config, "text_config", "head_dim"), text.head_dim),
        "image_token_id": ("config.json", config.get("image_token_id"), text.image_token_id),
        "tile_size": ("config.json", _get(config, "vision_config", "image_size"), image.tile_size),
        "eos_ids": ("generation_config.json", sorted(eos if isinstance(eos, list) else [eos]), sorted(text.eos_ids)),
    }
    for name, (file, found, wanted) in stated.items():
        if found != wanted:
            raise BundleError(f"{bundle.folder / file}: {name} is {found}, manifest.json says {wanted}")
    return BundleSettings(
        vocab=text.vocab,
        hidden=text.hidden,
        layers=text.layers,
        kv_heads=text.kv_heads,
        head_dim=text.head_dim,
        context=text.context,
        tile_size=image.tile_size,
        seq_len=image.tokens_per_tile,
        image_id=text.image_token_id,
        eos_ids=text.eos_ids,
    )


def graph_paths(bundle: Bundle) -> dict[str, Path]:
    """The file of each graph, by the dtypes in config.json (`transformers.js_config.dtype`).

    Raises:
        BundleError: for a dtype that is missing or unknown, or a file that the manifest does not list.
    """
    where = f"{bundle.folder / 'config.json'}: transformers.js_config.dtype"
    dtypes = _get(bundle.json("config.json"), "transformers.js_config", "dtype")
    paths = {}
    for graph in GRAPHS:
        dtype = dtypes.get(graph) if isinstance(dtypes, dict) else dtypes
        if not isinstance(dtype, str) or dtype not in DTYPE_SUFFIXES:
            raise BundleError(f"{where} of {graph} is {dtype!r}, want one of {', '.join(DTYPE_SUFFIXES)}")
        paths[graph] = bundle.path(f"onnx/{graph}{DTYPE_SUFFIXES[dtype]}.onnx")
    return paths


def open_runner(bundle: Bundle, *, threads: int = 0, vision: bool = False) -> Runner:
    """The runner for the bundle's target.

    Args:
        bundle: as read by `read_bundle`.
        threads: 0 lets the engine choose; Core ML and the executor of its programs always do.
        vision: load the vision tower now; otherwise the first image does.

    Raises:
        BundleError: if no engine here runs it.
    """
    match bundle.manifest.target:
        case "onnx":
            from runtimes.ort import OrtRunner  # here: an engine is loaded only when a bundle needs it

            return OrtRunner(bundle, threads=threads, vision=vision)
        case "coreml":
            from runtimes.coreml import CoreMLRunner

            return CoreMLRunner(bundle, vision=vision)
        case target:
            raise BundleError(f"{bundle.folder / 'manifest.json'}: target is {target!r}, want onnx or coreml")


def engine_name(bundle: Bundle) -> str:
    """What `open_runner` runs the bundle with, to be shown beside every result."""
    if bundle.manifest.target == "coreml":
        from runtimes.coreml import engine_name as name

        return name()
    return "ONNX Runtime"


def check_pixels(pixels: Floats, settings: BundleSettings) -> None:
    """Raises InputError unless `pixels` is f32 [N, 3, S, S], N >= 1, finite."""
    side = settings.tile_size
    if pixels.dtype != np.float32 or pixels.ndim != 4 or pixels.shape[1:] != (3, side, side) or not len(pixels):
        raise InputError(f"pixels are {pixels.dtype} {list(pixels.shape)}, want float32 [tiles, 3, {side}, {side}]")
    if not np.isfinite(pixels).all():
        raise InputError("pixels hold NaN or infinity")


def check_tokens(ids: Sequence[int], features: Floats | None, past: int, keep: int, settings: BundleSettings) -> None:
    """Raises InputError unless `extend` can run with these arguments on a cache of length `past`."""
    if not ids:
        raise InputError("no tokens to run")
    if past + len(ids) > settings.context:
        already = f" after the {past:,} of the conversation so far" if past else ""
        raise ContextError(f"{len(ids):,} tokens{already} do not fit into the context of {settings.context:,}")
    if min(ids) < 0 or max(ids) >= settings.vocab:
        raise InputError(f"token ids from {min(ids)} to {max(ids)}, want 0 to {settings.vocab - 1}")
    if not 0 <= keep <= len(ids):
        raise InputError(f"logits of the last {keep} of {len(ids)} tokens asked for")
    if features is None and len(ids) == 1:
        return
    images = sum(i == settings.image_id for i in ids)
    shape = (0, settings.hidden) if features is None else features.shape
    if shape != (images, settings.hidden):
        raise InputError(f"image features are {list(shape)}, want {[images, settings.hidden]}: one row an image token")
    if features is not None and (features.dtype != np.float32 or not np.isfinite(features).all()):
        raise InputError("image features are not finite float32 numbers")


def _get(config: Mapping[str, Any], part: str, key: str) -> Any:
    inner = config.get(part)
    return inner.get(key) if isinstance(inner, dict) else None
