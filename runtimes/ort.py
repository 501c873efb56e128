"""Runs a bundle's three graphs with ONNX Runtime on the CPU.

    pixels -> vision_encoder -> features ---.
    ids -> embed_tokens -> embeddings -> image rows replaced -> decoder_model_merged <-> cache -> logits

The cache stays in ONNX Runtime's own values. A decoder that says so in its metadata (IN_PLACE) writes new keys
and values into one buffer; any other returns the whole cache with each call, which costs a copy.
Not covered: other execution providers, batches of conversations.
"""

import platform
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as native

from runtimes.bundle import Bundle
from runtimes.manifest import BundleError
from runtimes.memory import CHUNK, RELEASE_TILES, room
from runtimes.runner import (
    BundleSettings,
    Cache,
    Cancelled,
    EngineError,
    Floats,
    check_pixels,
    check_tokens,
    graph_paths,
    read_bundle_settings,
)

IN_PLACE = ("smolport.kv_cache", "in_place")  # metadata: past may be longer than the mask says, and be present
ENGINE_ERRORS = (
    native.EPFail,
    native.EngineError,
    native.Fail,
    native.InvalidArgument,
    native.InvalidGraph,
    native.InvalidProtobuf,
    native.NoModel,
    native.NoSuchFile,
    native.NotFound,
    native.NotImplemented,
    native.RuntimeException,
    RuntimeError,  # what a run over bound values raises in place of the others
)


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The first CPU's flags (x86) or Features (ARM) as Linux names them; empty where they cannot be read."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = (line.partition(":")[2] for line in lines if line.partition(":")[0].strip() in ("flags", "Features"))
    return frozenset(next(found, "").split())


def saturates(features: frozenset[str], machine: str) -> bool:
    """Whether products of u8 and s8 are summed in 16 bits: on x86 that is not known to have VNNI.

    Args:
        features: of `cpu_features`.
        machine: of `platform.machine`.
    """
    x86 = machine.lower() in ("x86_64", "amd64", "i686", "i386")
    return x86 and not features & {"avx512_vnni", "avx_vnni"}


class OrtCache:
    """Keys and values of the tokens so far, in the order of the decoder's past inputs."""

    def __init__(self, tensors: list[onnxruntime.OrtValue]) -> None:
        self.length = 0
        self.tensors = tensors  # each f32 [1, G, >= length, D]
        self.binding: Any = None  # of these tensors, once a run has made it


class OrtRunner:
    """A `Runner` over a bundle whose target is ONNX.

    Args:
        bundle: as read by `read_bundle`.
        threads: for one operation; 0: ONNX Runtime's choice, the physical cores.
        vision: load the vision tower now; otherwise the first image does.
        config: further session settings, such as {"mlas.disable_kleidiai": "1"}.
        graphs: files in place of the bundle's own, or models as bytes whose data lies in the bundle's onnx folder.

    Raises:
        BundleError: if ONNX Runtime is too old for the bundle, refuses a graph, or a graph's inputs are not
            those that the manifest's sizes ask for.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int = 0,
        vision: bool = False,
        config: Mapping[str, str] | None = None,
        graphs: Mapping[str, Path | bytes] | None = None,
    ) -> None:
        _check_engine(bundle)
        self._settings = read_bundle_settings(bundle)
        self._graphs: dict[str, Path | bytes] = {**graph_paths(bundle), **(graphs or {})}
        self._data_folder = bundle.folder / "onnx"
        self._threads = threads
        self._config = dict(config or {})
        if bundle.manifest.instruction_set.saturates_without_vnni and saturates(cpu_features(), platform.machine()):
            self._config.setdefault("session.x64quantprecision", "1")  # u8 x u8 kernels: slower, but exact
        self._lock = threading.Lock()
        self._cancelled = False
        self._running: onnxruntime.RunOptions | None = None
        with ThreadPoolExecutor() as pool:  # each graph is packed by one thread
            opened = [
                pool.submit(self._open, graph) for graph in ("decoder_model_merged", "vision_encoder")[: 1 + vision]
            ]
            self._embed = self._open("embed_tokens")
            self._decoder, *rest = [future.result() for future in opened]
        self._vision = rest[0] if rest else None
        self._past = [i.name for i in self._decoder.get_inputs() if i.name.startswith("past_key_values.")]
        self._present = [name.replace("past_key_values.", "present.") for name in self._past]
        self._in_place = self._decoder.get_modelmeta().custom_metadata_map.get(IN_PLACE[0]) == IN_PLACE[1]

    @property
    def settings(self) -> BundleSettings:
        return self._settings

    def encode_image(self, pixels: Floats) -> Floats:
        """Tiles f32 [N, 3, S, S] -> features f32 [N, seq_len, hidden], one tile a run."""
        check_pixels(pixels, self.settings)
        self._vision = self._vision or self._open("vision_encoder")
        side, shape = self.settings.tile_size, (self.settings.seq_len, self.settings.hidden)
        mask = np.ones((1, 1, side, side), dtype=np.bool_)
        features = np.empty((len(pixels), *shape), dtype=np.float32)
        for i, tile in enumerate(pixels):
            feeds = {"pixel_values": np.ascontiguousarray(tile[None, None]), "pixel_attention_mask": mask}
            with self._run("vision_encoder") as options:
                (found,) = self._vision.run(["image_features"], feeds, options)
            if found.size != shape[0] * shape[1] or not np.isfinite(found).all():
                raise EngineError(f"vision_encoder: features of tile {i} are {list(found.shape)}, want finite {shape}")
            features[i] = found.reshape(shape)
        if len(pixels) >= RELEASE_TILES:
            self._vision = None
        return features

    def new_cache(self) -> OrtCache:
        """An empty cache."""
        return OrtCache([self._buffer(0) for _ in self._past])

    def extend(self, cache: Cache, ids: Sequence[int], features: Floats | None = None, keep: int = 1) -> Floats:
        """See `Runner.extend`."""
        if not isinstance(cache, OrtCache):
            raise TypeError(f"cache is {type(cache).__name__}, want one from new_cache()")
        check_tokens(ids, features, cache.length, keep, self.settings)
        embeds = self._embeddings(ids, features)  # [1, T, hidden]
        past, total = cache.length, cache.length + len(ids)
        if not self._in_place:
            rows = self._decode(embeds, cache, past, keep)
            cache.length = total
            return rows
        if cache.tensors[0].shape()[2] < total:
            held = room(total, self.settings.context)
            cache.binding = None  # which holds the tensors
            for i in reversed(range(len(cache.tensors))):  # one after the other: old and new are never both whole
                cache.tensors[i] = self._buffer(held, cache.tensors[i].numpy()[:, :, :past])
        first = len(ids) - (keep or len(ids))  # the first row kept
        kept: list[Floats] = []
        for start in range(0, len(ids), CHUNK):
            stop = min(start + CHUNK, len(ids))
            wanted = max(0, stop - max(start, first))
            rows = self._decode(embeds[:, start:stop], cache, past + start, wanted or 1)
            if wanted:
                kept.append(rows)
        cache.length = total
        return kept[0] if len(kept) == 1 else np.concatenate(kept)

    def _decode(self, embeds: Floats, cache: OrtCache, past: int, keep: int) -> Floats:
        """One run over embeddings [1, T, hidden] after `past` tokens: the last `keep` rows (0: all) of logits."""
        total, wanted = past + embeds.shape[1], (1, keep or embeds.shape[1], self.settings.vocab)
        binding = cache.binding or self._bound(cache)
        feeds = {
            "inputs_embeds": np.ascontiguousarray(embeds),
            "attention_mask": np.ones((1, total), dtype=np.int64),
            "num_logits_to_keep": np.array(keep, dtype=np.int64),
        }
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        logits = np.empty(wanted, dtype=np.float32)
        if self._in_place:
            binding.bind_output("logits", "cpu", 0, np.float32, wanted, logits.ctypes.data)
        else:
            binding.bind_output("logits", "cpu")
        with self._run("decoder_model_merged") as options:
            self._decoder.run_with_iobinding(binding, options)
        if not self._in_place:
            *present, found = binding.get_outputs()  # in the order of binding
            logits = found.numpy()
            if logits.shape != wanted:
                raise EngineError(f"decoder: logits are {list(logits.shape)}, want {list(wanted)}")
        if not np.isfinite(logits).all():
            raise EngineError(f"decoder: logits after {total} tokens hold NaN or infinity")
        if not self._in_place:
            cache.tensors = present
        return logits[0]  # type: ignore[no-any-return]  # ONNX Runtime's results are untyped

    def _bound(self, cache: OrtCache) -> Any:
        """A binding of the cache's tensors; one in place is kept: binding takes a layer's time."""
        binding = self._decoder.io_binding()
        for past, present, tensor in zip(self._past, self._present, cache.tensors, strict=True):
            binding.bind_ortvalue_input(past, tensor)
            if self._in_place:
                binding.bind_ortvalue_output(present, tensor)
            else:
                binding.bind_output(present, "cpu")
        if self._in_place:
            cache.binding = binding
        return binding

    def cancel(self) -> None:
        """From any thread: the running call, and every later one until `resume`, raises Cancelled."""
        with self._lock:
            self._cancelled = True
            if self._running is not None:
                self._running.terminate = True

    def resume(self) -> None:
        """Forgets a `cancel`."""
        with self._lock:
            self._cancelled = False

    def _embeddings(self, ids: Sequence[int], features: Floats | None) -> Floats:
        tokens = np.array([ids], dtype=np.int64)
        with self._run("embed_tokens") as options:
            (embeds,) = self._embed.run(["inputs_embeds"], {"input_ids": tokens}, options)
        if features is not None:
            embeds[tokens == self.settings.image_id] = features
        return embeds  # type: ignore[no-any-return]  # ONNX Runtime's results are untyped

    def _buffer(self, tokens: int, start: Floats | None = None) -> onnxruntime.OrtValue:
        """f32 [1, G, tokens, D] that begins with `start` [1, G, n, D]; the rest is not set."""
        array = np.empty((1, self.settings.kv_heads, tokens, self.settings.head_dim), dtype=np.float32)
        if start is not None:
            array[:, :, : start.shape[2]] = start
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)

    @contextmanager
    def _run(self, graph: str) -> Iterator[onnxruntime.RunOptions]:
        """Options for one run that `cancel` can end; maps ONNX Runtime's errors."""
        options = onnxruntime.RunOptions()
        with self._lock:
            if self._cancelled:
                raise Cancelled
            self._running = options
        try:
            yield options
        except ENGINE_ERRORS as exc:
            if options.terminate:
                raise Cancelled from exc
            raise EngineError(f"{graph}: ONNX Runtime failed: {exc}") from exc
        finally:
            with self._lock:
                self._running = None

    def _open(self, graph: str) -> onnxruntime.InferenceSession:
        source = self._graphs[graph]
        where = f"{source if isinstance(source, Path) else graph}"
        options = onnxruntime.SessionOptions()
        # looking up embeddings is no work, and threads that wait for it would take the decoder's cores
        options.intra_op_num_threads = 1 if graph == "embed_tokens" else self._threads
        options.log_severity_level = 3  # errors: what matters is raised
        options.enable_mem_pattern = False  # a pattern would be kept for every length that ever ran
        for key, value in self._config.items():
            options.add_session_config_entry(key, value)
        if isinstance(source, bytes):
            key = "session.model_external_initializers_file_folder_path"
            options.add_session_config_entry(key, str(self._data_folder))
        try:
            model = source if isinstance(source, bytes) else str(source)  # a path, so that it finds its data
            session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except ENGINE_ERRORS as exc:
            raise BundleError(f"{where}: ONNX Runtime {onnxruntime.__version__} refuses it: {exc}") from exc
        _check_graph(graph, session, self.settings, where)
        return session


def _check_engine(bundle: Bundle) -> None:
    engine = bundle.manifest.engine
    where = bundle.folder / "manifest.json"
    if (bundle.manifest.target, engine.name) != ("onnx", "onnxruntime"):
        raise BundleError(f"{where}: target {bundle.manifest.target} on {engine.name}, want onnx on onnxruntime")

    def number(version: str) -> list[int]:
        return [int(part) if part.isdigit() else 0 for part in version.split(".")[:3]]

    if number(onnxruntime.__version__) < number(engine.least):
        raise BundleError(f"{where}: needs ONNX Runtime {engine.least} or later, this is {onnxruntime.__version__}")


def _check_graph(graph: str, session: onnxruntime.InferenceSession, sizes: BundleSettings, where: str) -> None:
    """Raises BundleError unless the graph takes and gives the tensors that `sizes` ask for."""
    side, cache = sizes.tile_size, (None, sizes.kv_heads, None, sizes.head_dim)  # None: any length
    tensors: dict[str, tuple[str, Sequence[int | None]]]
    if graph == "embed_tokens":
        tensors, outputs = {"input_ids": ("int64", (None, None))}, {"inputs_embeds"}
    elif graph == "vision_encoder":
        tensors = {
            "pixel_values": ("float", (None, None, 3, side, side)),
            "pixel_attention_mask": ("bool", (None, None, side, side)),
        }
        outputs = {"image_features"}
    else:
        pairs = [f"{i}.{part}" for i in range(sizes.layers) for part in ("key", "value")]
        tensors = {
            "inputs_embeds": ("float", (None, None, sizes.hidden)),
            "attention_mask": ("int64", (None, None)),
            "num_logits_to_keep": ("int64", ()),
            **{f"past_key_values.{pair}": ("float", cache) for pair in pairs},
        }
        outputs = {"logits", *(f"present.{pair}" for pair in pairs)}
    found = {i.name: i for i in session.get_inputs()}
    if found.keys() != tensors.keys():
        raise BundleError(f"{where}: its inputs differ from those wanted in {sorted(found.keys() ^ tensors.keys())}")
    for name, (kind, shape) in tensors.items():
        given: Sequence[Any] = found[name].shape
        fits = len(given) == len(shape) and all(
            w is None or g == w or not isinstance(g, int) for g, w in zip(given, shape, strict=True)
        )
        if found[name].type != f"tensor({kind})" or not fits:
            raise BundleError(f"{where}: input {name} is {found[name].type} {given}, want tensor({kind}) {list(shape)}")
    if missing := outputs - {o.name for o in session.get_outputs()}:
        raise BundleError(f"{where}: has no output {min(missing)}")
