"""A LoRA adapter merged into a checkpoint's weights as they are read: nothing holds the whole model.

    W' = W + scaling * B A        (E. Hu et al., arXiv:2106.09685; what PEFT's merge_and_unload computes)

in float32. Names, shapes and types of the adapter's tensors are checked against the model and adapter_config.json
before any is read, values when they are read. Not covered: whether the adapter was trained on this checkpoint or on
another one of the same sizes.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.adapter_config import CONFIG, CONVOLUTION, EMBEDDING, LINEAR, Adapted, Module, read_adapter_config
from export.spec import CheckpointError, ModelSpec, tensor_shapes
from export.weights import EMBEDDING as TABLE
from export.weights import F32, FLOATS, HEAD, Weights, WeightSource, listed, open_weights
from runtimes.tensorfile import TensorFileError, read_header

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIX = ".weight"
# Multiply-adds of a piece of a product. OpenBLAS starts threads above: inside the quantizer's own they double the time.
PIECE = 1 << 18
PIECE_ROWS = 8


@dataclass(frozen=True)
class Update:
    """Where an adapter's factors of one tensor are: names in its file."""

    b: str
    a: str
    scaling: float
    transposed: bool  # an embedding's: (B A)^T
    base: str | None  # the adapter's own copy of the tensor, in place of the checkpoint's


@dataclass(frozen=True)
class Factors:
    """W' = W + scaling * left right, for one tensor; left f32 [rows, rank], right f32 [rank, columns]."""

    left: F32
    right: F32
    scaling: np.float32


class Adapter:
    """An adapter's tensors by the name of the checkpoint's tensor that they change, read anew each time."""

    def __init__(self, path: Path, tensors: Weights, updates: dict[str, Update]) -> None:
        self.path, self._tensors, self._updates = path, tensors, updates

    @property
    def names(self) -> tuple[str, ...]:
        """The checkpoint's tensors that it changes."""
        return tuple(self._updates)

    def factors(self, name: str) -> Factors:
        """What is added to a tensor. Raises CheckpointError, naming file and tensor, if a value is not finite."""
        update = self._updates[name]
        a, b = self._tensors[update.a], self._tensors[update.b]
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)  # of a convolution too: B's kernel is 1 x 1
        left, right = (a.T, b.T) if update.transposed else (b, a)
        return Factors(left, right, np.float32(update.scaling))

    def base_rows(self, name: str, start: int, stop: int) -> F32 | None:
        """Rows of the adapter's own copy of a tensor that it changes; None if it has none."""
        base = self._updates[name].base
        return None if base is None else self._tensors.rows(base, start, stop)


class Merged(WeightSource):
    """A `WeightSource`: a checkpoint's weights with an adapter merged in. Any number of threads may read."""

    def __init__(self, weights: WeightSource, adapter: Adapter) -> None:
        self._weights, self._adapter = weights, adapter
        self._changed = frozenset(adapter.names)
        self._last: tuple[str, Factors] | None = None  # of the tensor read last: it is read some rows at a time

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, nothing of it read."""
        return self._weights.shape(name)

    def rows(self, name: str, start: int, stop: int) -> F32:
        """Rows [start, stop) of a tensor's first dimension.

        Raises:
            CheckpointError: naming file and tensor, if they cannot be read or hold NaN or infinity, before the merge
                or after it.
        """
        if name not in self._changed:
            return self._weights.rows(name, start, stop)
        factors = self._factors(name)
        values = self._adapter.base_rows(name, start, stop)
        if values is None:
            values = self._weights.rows(name, start, stop)
        flat = values.reshape(stop - start, factors.right.shape[1])  # a view: the rows are a new array
        with np.errstate(over="ignore", invalid="ignore"):  # refused below
            add_product(flat, factors.left[start:stop], factors.right, factors.scaling)
        if not np.isfinite(flat).all():
            raise CheckpointError(f"{self._adapter.path}: makes {name} NaN or infinite, want finite numbers")
        return values

    def _factors(self, name: str) -> Factors:
        last = self._last
        if last is None or last[0] != name:
            last = self._last = (name, self._adapter.factors(name))
        return last[1]


def add_product(into: F32, left: F32, right: F32, scaling: np.float32) -> None:
    """into += scaling * left right, in pieces that one thread multiplies; [n, r] times [r, K]."""
    rank, width = right.shape
    columns = min(width, max(1, PIECE // (rank * PIECE_ROWS)))
    rows = max(1, PIECE // (rank * columns))
    for top in range(0, len(into), rows):
        for start in range(0, width, columns):
            piece = left[top : top + rows] @ right[:, start : start + columns]
            piece *= scaling
            into[top : top + rows, start : start + columns] += piece


def open_merged(checkpoint: Path, spec: ModelSpec, adapter: Path | None) -> Weights | Merged:
    """A checkpoint's weights, with the adapter in the folder `adapter` merged in if there is one.

    Raises:
        CheckpointError: as `open_weights` and `open_adapter`.
    """
    weights = open_weights(checkpoint, spec)
    return weights if adapter is None else Merged(weights, open_adapter(adapter, spec))


def open_adapter(folder: Path, spec: ModelSpec) -> Adapter:
    """Opens adapter_config.json and adapter_model.safetensors of a PEFT LoRA adapter for a model.

    Raises:
        CheckpointError: naming file and field or tensor, for whatever is missing, unexpected or not supported.
    """
    path = folder / TENSORS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(f"{folder}: has adapter_model.bin, which must be converted to {TENSORS} first")
    shapes = tensor_shapes(spec)
    adapted = read_adapter_config(folder, modules(spec))
    if spec.text.tied:
        for name in (entry.module.name for entry in adapted):
            if name + SUFFIX in (HEAD, TABLE):
                raise CheckpointError(
                    f"{folder / CONFIG}: target_modules names {name}, but config.json ties head and embedding: an "
                    "adapter on one of them makes them two; untie the checkpoint first (tie_word_embeddings)"
                )
    try:
        places = read_header(path)
    except TensorFileError as exc:
        raise CheckpointError(str(exc)) from exc
    updates: dict[str, Update] = {}
    wanted: dict[str, tuple[int, ...]] = {}
    for entry in adapted:
        name = entry.module.name + SUFFIX
        updates[name], needed = _update(entry, shapes[name], frozenset(places))
        wanted |= needed
    missing = [name for name in wanted if name not in places]
    if missing:
        raise CheckpointError(f"{path}: lacks {listed(missing)}, which {CONFIG} asks for")
    extra = [name for name in places if name not in wanted]
    if extra:
        raise CheckpointError(f"{path}: holds {listed(extra)}, which {CONFIG} does not ask for in this model")
    for name, shape in wanted.items():
        if places[name].shape != shape:
            raise CheckpointError(
                f"{path}: {name} is {list(places[name].shape)}, want {list(shape)} by the model and {CONFIG}"
            )
        if places[name].dtype not in FLOATS:
            raise CheckpointError(f"{path}: {name} is of dtype {places[name].dtype}, want one of {', '.join(FLOATS)}")
    return Adapter(path, Weights({name: (path, places[name]) for name in wanted}), updates)


def modules(spec: ModelSpec) -> list[Module]:
    """The modules of a model that PEFT can put a LoRA adapter on. A tied head is one too: it is refused by name."""
    found = []
    for name, shape in tensor_shapes(spec).items():
        if len(shape) > 1:
            plain = CONVOLUTION if len(shape) == 4 else LINEAR
            table = name == TABLE or name.endswith(".position_embedding" + SUFFIX)
            found.append(Module(name.removesuffix(SUFFIX), EMBEDDING if table else plain))
    if spec.text.tied:
        found.append(Module(HEAD.removesuffix(SUFFIX), LINEAR))
    return found


def adapter_digest(folder: Path) -> str:
    """SHA-256 over the bytes of adapter_config.json, then those of adapter_model.safetensors."""
    sha = hashlib.sha256()
    for name in (CONFIG, TENSORS):
        try:
            with (folder / name).open("rb") as file:
                while block := file.read(1 << 20):
                    sha.update(block)
        except OSError as exc:
            raise CheckpointError(f"{folder / name}: cannot be read: {exc.strerror or exc}") from exc
    return sha.hexdigest()


def _update(entry: Adapted, shape: tuple[int, ...], held: frozenset[str]) -> tuple[Update, dict[str, tuple[int, ...]]]:
    """Where the factors of a tensor of `shape` are, and the shapes that they must have, as PEFT saves them."""
    at, rank = PREFIX + entry.module.name, entry.rank
    if entry.module.kind == EMBEDDING:
        a, b = f"{at}.lora_embedding_A", f"{at}.lora_embedding_B"
        shapes: dict[str, tuple[int, ...]] = {a: (rank, shape[0]), b: (shape[1], rank)}
    else:
        a, b = f"{at}.lora_A.weight", f"{at}.lora_B.weight"
        kernel = (1, 1) if entry.module.kind == CONVOLUTION else ()
        shapes = {a: (rank, *shape[1:]), b: (shape[0], rank, *kernel)}
    # PEFT saves the embedding and the head themselves beside an adapter on them, and loads them again.
    base: str | None = f"{at}.base_layer.weight"
    if base in held and entry.module.name + SUFFIX in (TABLE, HEAD):
        shapes[base] = shape
    else:
        base = None
    return Update(b, a, entry.scaling, entry.module.kind == EMBEDDING, base), shapes
