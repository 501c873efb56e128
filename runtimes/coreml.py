"""Runs a bundle whose target is Core ML: with Core ML itself on macOS, by executing its saved programs anywhere.

    pixels -> VisionEncoder -> features ---.
    ids -> embedding table -> embeddings -> image rows replaced -> Decoder: prefill (a chunk), decode (one token)
                                                                      |  states: the KV cache, of fixed length
                                                                   logits of one row

What is fed and how it is cut is the same on both; only the models behind it differ. Apple's runtime has not run
this yet: the mapping is tested against the executor, which stands in for it call by call.
Not covered: batches of conversations, the Neural Engine.
"""

import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtimes.blobfile import BlobError
from runtimes.bundle import Bundle
from runtimes.manifest import BundleError
from runtimes.mil import Magnitude, MilFunction, Package, load_package
from runtimes.mil_package import MODEL, WEIGHTS
from runtimes.milproto import Described, ProgramError, TensorType, read_model
from runtimes.runner import (
    BundleSettings,
    Cache,
    Cancelled,
    EngineError,
    Floats,
    check_pixels,
    check_tokens,
    read_bundle_settings,
)
from runtimes.tensorfile import TensorFileError, read_header, read_tensor

FOLDER = "coreml"
VISION, DECODER, EMBEDDING = "VisionEncoder.mlpackage", "Decoder.mlpackage", "embed_tokens.safetensors"
EMBED = "model.text_model.embed_tokens.weight"
LEAST_MACOS = 15
BLOCKS = (16, 32, 64, 128, 256)  # that a recipe may have
MASKED = -30000.0  # added to a score that must not count; finite, so that a row of nothing else is no NaN
Array = npt.NDArray[Any]


class Model(Protocol):
    """One function of a package, as coremltools' MLModel offers it."""

    def predict(self, data: Mapping[str, Array], state: Any = None) -> Mapping[str, Array]: ...
    def make_state(self) -> Any: ...


# (an .mlpackage, a function's name or None) -> the model
Loader = Callable[[Path, str | None], Model]


class Executed:
    """A loader of models that execute the saved program (runtimes/mil.py), each package read once.

    Args:
        half: round to fp16 after each operation, as a device does; False: f32 throughout.
        resident_bytes: of each package, as in `load_package`.
        watch: collect the magnitudes of every operation's results.
    """

    def __init__(self, *, half: bool = True, resident_bytes: int | None = None, watch: bool = False) -> None:
        self._half, self._resident_bytes, self._watch = half, resident_bytes, watch
        self.packages: dict[Path, Package] = {}
        self.magnitudes: dict[str, Magnitude] = {}  # "package, function: operation" -> what was seen of it

    def __call__(self, folder: Path, function: str | None) -> MilFunction:
        if folder not in self.packages:
            self.packages[folder] = load_package(folder, resident_bytes=self._resident_bytes)
        model = self.packages[folder].function(function, half=self._half)
        if self._watch:
            model.watch = self.magnitudes
        return model

    def forget(self) -> None:
        """Frees what the packages keep in memory."""
        for package in self.packages.values():
            package.forget()

    def unread(self) -> list[str]:
        """The blobs of the packages loaded that no call has read yet."""
        return [f"{p.folder.name}: weight.bin: byte {at}" for p in self.packages.values() for at in sorted(p.unread)]


def native() -> Loader:
    """Models that Core ML runs on the CPU and the GPU.

    Raises:
        BundleError: if this is not macOS, or coremltools is missing.
    """
    if platform.system() != "Darwin":
        raise BundleError("Core ML runs on macOS only; elsewhere the saved programs are executed (runtimes/mil.py)")
    version = platform.mac_ver()[0]
    if int(version.partition(".")[0] or 0) < LEAST_MACOS:
        raise BundleError(f"this is macOS {version}; states and 4-bit blocks need macOS {LEAST_MACOS} or later")
    try:
        import coremltools
    except ImportError as exc:
        raise BundleError("running Core ML from Python needs coremltools: pip install '.[ios]'") from exc

    def load(folder: Path, function: str | None) -> Model:
        units = coremltools.ComputeUnit.CPU_AND_GPU
        try:
            model = coremltools.models.MLModel(str(folder), compute_units=units, function_name=function)
        except Exception as exc:  # coremltools raises plain Exceptions
            raise BundleError(f"{folder}: Core ML refuses it: {exc}") from exc
        if model.__proxy__ is None:  # it keeps the reason to itself until the model is used
            raise BundleError(f"{folder}: Core ML refuses it: {getattr(model, '_framework_error', 'no reason given')}")
        return _Native(model)

    return load


class _Native:
    """A coremltools MLModel whose errors, plain Exceptions, are EngineErrors."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def predict(self, data: Mapping[str, Array], state: Any = None) -> Mapping[str, Array]:
        try:
            found: Mapping[str, Array] = self._model.predict(dict(data), *([] if state is None else [state]))
        except Exception as exc:
            raise EngineError(f"Core ML failed: {exc}") from exc
        return found

    def make_state(self) -> Any:
        try:
            return self._model.make_state()
        except Exception as exc:
            raise EngineError(f"Core ML made no state: {exc}") from exc


def engine_name() -> str:
    """What `default_loader` runs a bundle with, to be shown beside every result."""
    return "the saved programs, emulated" if isinstance(default_loader(), Executed) else "Core ML"


def default_loader() -> Loader:
    """Core ML on macOS where coremltools is installed; otherwise `Executed`, rounding as a device does."""
    try:
        return native()
    except BundleError:  # it is for those that ask for Core ML
        return Executed()


class EmbeddingTable:
    """embed_tokens.safetensors, in memory as it is stored.

    Args:
        path: the file.
        vocab, hidden: its rows and their width.
        used: the format that the manifest gives for it.

    Raises:
        BundleError: if the file holds something else.
    """

    def __init__(self, path: Path, vocab: int, hidden: int, used: Mapping[str, Any]) -> None:
        self._hidden: int = hidden
        self._bits, self._block = (used.get(key, 0) for key in ("bits", "block"))
        if used.get("scheme") == "float":
            wanted = {"weight": ("F16", (vocab, hidden))}
        elif used.get("scheme") != "block" or self._bits not in (4, 8) or self._block not in BLOCKS:
            raise BundleError(f"{path}: manifest.json gives {EMBED} the format {used}, want float or block")
        else:
            blocks = -(-hidden // self._block)
            integers = ("U8", (vocab, hidden * self._bits // 8))
            wanted = {"q": integers, "scales": ("F16", (vocab, blocks)), "zeros": ("U8", (vocab, blocks))}
        try:
            header = read_header(path)
            if (found := {name: (t.dtype, t.shape) for name, t in header.items()}) != wanted:
                raise BundleError(f"{path}: holds {found}, want {wanted}")
            self._tensors = {name: read_tensor(path, info) for name, info in header.items()}
        except TensorFileError as exc:
            raise BundleError(str(exc)) from exc

    def rows(self, ids: Sequence[int]) -> Floats:
        """f32 [T, hidden]."""
        taken = {name: tensor[list(ids)] for name, tensor in self._tensors.items()}
        if "weight" in taken:
            return taken["weight"].astype(np.float32)
        q = taken["q"]
        if self._bits == 4:  # two in a byte, the low nibble first
            q = np.stack([q & 15, q >> 4], axis=-1).reshape(len(q), -1)
        zeros, scales = (
            np.repeat(taken[name].astype(np.float32), self._block, axis=1)[:, : self._hidden]
            for name in ("zeros", "scales")
        )
        return np.asarray((q - zeros) * scales)


class CoreMLCache:
    """The states of one conversation; `length` rows of them are in use.

    `spoiled` after a call that computed infinity or NaN: rows that are masked hold some of it, and nothing times
    infinity is NaN.
    """

    def __init__(self, state: Any) -> None:
        self.length, self.state, self.spoiled = 0, state, False


class NotFiniteError(EngineError):
    """A model gave infinity or NaN."""


class CoreMLRunner:
    """A `Runner` over a bundle whose target is Core ML.

    Args:
        bundle: as read by `read_bundle`.
        load: what runs the packages; None: `default_loader`.
        vision: load the vision tower now; otherwise the first image does.

    Raises:
        BundleError: if a package is broken, or takes other tensors than the manifest's sizes ask for.
    """

    def __init__(self, bundle: Bundle, *, load: Loader | None = None, vision: bool = False) -> None:
        manifest = bundle.manifest
        if (manifest.target, manifest.engine.name) != ("coreml", "coreml"):
            where = f"{bundle.folder / 'manifest.json'}: target {manifest.target} on {manifest.engine.name}"
            raise BundleError(f"{where}, want coreml on coreml")
        self._settings = read_bundle_settings(bundle)
        self._load = load or default_loader()
        self._packages = _package_paths(bundle)
        self.chunk = prefill_chunk(bundle)
        used = manifest.recipe.tensors.get(EMBED, {})
        table = bundle.path(f"{FOLDER}/{EMBEDDING}")
        self._table = EmbeddingTable(table, self._settings.vocab, self._settings.hidden, used)
        self._prefill = self._model(DECODER, "prefill")
        self._decode = self._model(DECODER, "decode")
        self._vision = self._model(VISION, None) if vision else None
        self._cancelled = threading.Event()

    @property
    def settings(self) -> BundleSettings:
        return self._settings

    def encode_image(self, pixels: Floats) -> Floats:
        """Tiles f32 [N, 3, S, S] -> features f32 [N, seq_len, hidden], one tile a call."""
        check_pixels(pixels, self.settings)
        self._vision = self._vision or self._model(VISION, None)
        shape = (1, self.settings.seq_len, self.settings.hidden)
        features = [
            self._predict(self._vision, "image_features", shape, {"pixel_values": tile[None]}) for tile in pixels
        ]
        return np.concatenate(features)

    def new_cache(self) -> CoreMLCache:
        """An empty cache."""
        return CoreMLCache(self._prefill.make_state())

    def extend(self, cache: Cache, ids: Sequence[int], features: Floats | None = None, keep: int = 1) -> Floats:
        """See `Runner.extend`. Tokens go through in chunks; every row but a call's last has no logits, so that
        those asked for beyond one are fed one by one."""
        if not isinstance(cache, CoreMLCache):
            raise TypeError(f"cache is {type(cache).__name__}, want one from new_cache()")
        check_tokens(ids, features, cache.length, keep, self.settings)
        if cache.spoiled:
            raise EngineError("an earlier call left infinity or NaN in this cache: begin a new one")
        embeds = self._table.rows(ids)  # [T, hidden]
        if features is not None:
            embeds[np.asarray(ids) == self.settings.image_id] = features
        first = len(ids) - (keep or len(ids))  # the first row whose logits are asked for
        at, rows = 0, []
        while at < len(ids):
            position = cache.length + at
            take = min(self.chunk, first + 1 - at) if at <= first else 1
            if position + self.chunk > self.settings.context:
                take = 1  # a chunk writes all of its rows, and the cache has no room for them
            try:
                logits = self._step(embeds[at : at + take], position, cache.state)
            except NotFiniteError:
                cache.spoiled = True
                raise
            at += take
            if at > first:
                rows.append(logits)
        cache.length += len(ids)
        return np.stack(rows)

    def cancel(self) -> None:
        """From any thread: the running call, and every later one until `resume`, raises Cancelled."""
        self._cancelled.set()

    def resume(self) -> None:
        """Forgets a `cancel`."""
        self._cancelled.clear()

    def _step(self, embeds: Floats, position: int, state: Any) -> Floats:
        """Feeds [t, hidden], t = 1 or at most a chunk, which is padded; logits [vocab] of the last of them."""
        t = len(embeds)
        size = 1 if t == 1 else self.chunk
        rows = np.zeros((1, size, self.settings.hidden), dtype=np.float32)
        rows[0, :t] = embeds
        # Row r may look at all rows up to its own. What padding writes lies beyond, is never looked at, and is
        # overwritten by the tokens that come there.
        seen = np.arange(self.settings.context) <= position + np.arange(size)[:, None]  # [size, L]
        data: dict[str, Array] = {
            "inputs_embeds": rows,
            "attention_mask": np.where(seen, np.float32(0), np.float32(MASKED))[None, None],
            "position": np.array([position], dtype=np.int32),
        }
        model = self._decode
        if size > 1:
            model, data["last_row"] = self._prefill, np.array([t - 1], dtype=np.int32)
        logits: Floats = self._predict(model, "logits", (1, 1, self.settings.vocab), data, state)[0, 0]
        return logits

    def _predict(
        self, model: Model, output: str, shape: tuple[int, ...], data: Mapping[str, Array], state: Any = None
    ) -> Floats:
        if self._cancelled.is_set():
            raise Cancelled
        try:
            found = model.predict(data, state) if state is not None else model.predict(data)
            result = np.asarray(found[output], dtype=np.float32)
        except (ProgramError, BlobError, RuntimeError, ValueError, KeyError) as exc:
            raise EngineError(f"{output}: the engine failed: {exc}") from exc
        if result.shape != shape:
            raise EngineError(f"{output}: the engine gives {list(result.shape)}, want {list(shape)}")
        if not np.isfinite(result).all():
            raise NotFiniteError(f"{output}: the engine gives infinity or NaN: a value beyond fp16's range on the way")
        return result

    def _model(self, package: str, function: str | None) -> Model:
        try:
            return self._load(self._packages[package], function)
        except (ProgramError, BlobError, RuntimeError) as exc:
            raise BundleError(f"{self._packages[package]}: cannot be loaded: {exc}") from exc


def _package_paths(bundle: Bundle) -> dict[str, Path]:
    """The folders of the packages, whose three files each the manifest must list. Raises BundleError."""
    paths = {name: bundle.folder / FOLDER / name for name in (VISION, DECODER)}
    for name in paths:
        for file in ("Manifest.json", MODEL, WEIGHTS):
            bundle.path(f"{FOLDER}/{name}/{file}")
    return paths


def prefill_chunk(bundle: Bundle) -> int:
    """The tokens that a prefill takes, after comparing what the packages say they take with the manifest's sizes.

    Raises:
        BundleError: naming the package and what it takes.
    """
    packages, sizes = _package_paths(bundle), read_bundle_settings(bundle)
    described = {}
    for name, folder in packages.items():
        try:
            described[name] = read_model(folder / MODEL).described
        except ProgramError as exc:
            raise BundleError(str(exc)) from exc
    prefill = described[DECODER].get("prefill")
    embeds = prefill.inputs.get("inputs_embeds") if prefill else None
    chunk = embeds.shape[1] if embeds and len(embeds.shape) == 3 else 0
    if not 2 <= chunk <= sizes.context:
        raise BundleError(
            f"{packages[DECODER]}: prefill takes {embeds}, want [1, T, {sizes.hidden}], T from 2 to {sizes.context}"
        )
    side, cache = sizes.tile_size, (sizes.layers, sizes.kv_heads, sizes.context, sizes.head_dim)

    def half(*shape: int) -> TensorType:
        return TensorType("fp16", shape)

    def decoder(rows: int) -> Described:
        inputs = {
            "inputs_embeds": half(1, rows, sizes.hidden),
            "attention_mask": half(1, 1, rows, sizes.context),
            "position": TensorType("int32", (1,)),
        }
        if rows > 1:
            inputs["last_row"] = TensorType("int32", (1,))
        states = {"key_cache": half(*cache), "value_cache": half(*cache)}
        return Described(inputs, {"logits": half(1, 1, sizes.vocab)}, states)

    features = {"image_features": half(1, sizes.seq_len, sizes.hidden)}
    wanted = {
        VISION: {"main": Described({"pixel_values": half(1, 3, side, side)}, features, {})},
        DECODER: {"prefill": decoder(chunk), "decode": decoder(1)},
    }
    for name, functions in wanted.items():
        if described[name] != functions:
            raise BundleError(f"{packages[name]}: takes or gives {described[name]}, want {functions}")
    return chunk
