"""A checkpoint's weights as a lazy mapping: a tensor is in memory while it is used.

Names and shapes are checked against the spec before any data is read; values when they are read.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from export.spec import CheckpointError, ModelSpec, read_json, tensor_shapes
from quantize.int4 import ColumnTensor, QTensor, quantize_blocks, quantize_columns
from quantize.recipe import Scheme
from runtimes.tensorfile import TensorFileError, TensorInfo, read_header, read_tensor

F32 = npt.NDArray[np.float32]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.text_model.embed_tokens.weight"
FLOATS = ("F64", "F32", "F16", "BF16")
# Buffers that old checkpoints carry and no model reads.
HARMLESS = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids)$")
SLAB = 1 << 20  # values checked or compared at a time


class WeightSource(Protocol):
    """Tensors by Hugging Face name, in float32, as a whole or some rows at a time: shapes and rows are enough."""

    def shape(self, name: str) -> tuple[int, ...]: ...
    def rows(self, name: str, start: int, stop: int) -> F32: ...

    def __getitem__(self, name: str) -> F32:
        return self.rows(name, 0, self.shape(name)[0])

    def quantized(self, name: str, scheme: Scheme) -> QTensor | ColumnTensor:
        """A matrix in the scheme's format, weight by weight: without activations.

        Raises:
            CheckpointError: naming the tensor, if it has no fp16 scale, or if the scheme cannot do without activations.
        """
        rows, shape = partial(self.rows, name), matrix_shape(self, name)
        with naming(name):
            if scheme.format == "column":
                return quantize_columns(rows, shape, reduced_range=scheme.reduced_range)
            if scheme.rounding == "gptq":
                raise ValueError("its rounding is gptq, which needs calibration documents")
            fit = scheme.rounding == "fitted"
            return quantize_blocks(
                rows, shape, bits=scheme.bits, block=scheme.block, symmetric=scheme.symmetric, fit=fit
            )

    def input_range(self, name: str) -> tuple[float, float]:
        """The smallest and largest input of a matrix. Raises CheckpointError where calibration has not seen it."""
        raise CheckpointError(f"{name}: its activations are static, which needs calibration documents")


class Weights(WeightSource, Mapping[str, F32]):
    """Tensor name -> its values in float32, read anew each time; any number of threads may read."""

    def __init__(self, places: Mapping[str, tuple[Path, TensorInfo]]) -> None:
        self._places = dict(places)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name."""
        return tuple(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, nothing of it read."""
        return self._places[name][1].shape

    def rows(self, name: str, start: int, stop: int) -> F32:
        """Rows [start, stop) of a tensor's first dimension.

        Raises:
            CheckpointError: naming the tensor, if they cannot be read, or hold NaN or infinity.
        """
        path, info = self._places[name]
        try:
            found = read_tensor(path, info, slice(start, stop))
        except TensorFileError as exc:
            raise CheckpointError(f"{exc} ({name})") from exc
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinity, which is refused below
            values: F32 = np.ascontiguousarray(found, dtype=np.float32)
        flat = values.reshape(-1)
        for begin in range(0, flat.size, SLAB):
            finite = np.isfinite(flat[begin : begin + SLAB])
            if not finite.all():
                where = begin + int(np.argmin(finite))
                index = [int(i) for i in np.unravel_index(where, values.shape)]
                index[0] += start
                raise CheckpointError(f"{path}: {name}{index} is {flat[where]}, want finite numbers")
        return values

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def open_weights(folder: Path, spec: ModelSpec) -> Weights:
    """Opens model.safetensors, or the shards of model.safetensors.index.json where there is no single file.

    Raises:
        CheckpointError: naming file and tensor, if a file is missing, truncated or lies, or if names, shapes
            or dtypes are not those of the spec.
    """
    places = _locate(folder)
    wanted = tensor_shapes(spec)
    head = places.pop(HEAD, None) if spec.text.tied else None
    if head and EMBEDDING not in places:  # a tied checkpoint may keep the matrix under either name
        places[EMBEDDING], head = head, None
    missing = [name for name in wanted if name not in places]
    if missing:
        hint = ""
        if missing == [HEAD]:
            hint = "; if the head is the embedding, config.json must say so with its own tie_word_embeddings"
        raise CheckpointError(f"{folder}: lacks {listed(missing)}{hint}")
    extra = [name for name in places if name not in wanted]
    if extra:
        raise CheckpointError(f"{places[extra[0]][0]}: holds {listed(extra)}, which the model in config.json has not")
    checked = {name: places[name] for name in wanted}
    if head:
        checked[HEAD], wanted[HEAD] = head, wanted[EMBEDDING]
    for name, (path, info) in checked.items():
        if info.shape != wanted[name]:
            raise CheckpointError(f"{path}: {name} is {list(info.shape)}, want {list(wanted[name])} by config.json")
        if info.dtype not in FLOATS:
            raise CheckpointError(f"{path}: {name} is of dtype {info.dtype}, want one of {', '.join(FLOATS)}")
    weights = Weights(checked)
    if head:
        if not _equal(weights, HEAD, EMBEDDING):
            # transformers 5 then leaves them untied, transformers 4 ties them: two models in one checkpoint.
            raise CheckpointError(
                f"{head[0]}: {HEAD} differs from {EMBEDDING}, but config.json ties them; "
                "set its tie_word_embeddings to false to keep both"
            )
        del checked[HEAD]
    return Weights(checked)


def block_tensors(weights: WeightSource, names: Sequence[str], scheme: Scheme) -> list[QTensor]:
    """Matrices by a scheme of format "block". Raises CheckpointError as `WeightSource.quantized`."""
    return [cast(QTensor, weights.quantized(name, scheme)) for name in names]


def column_tensors(weights: WeightSource, names: Sequence[str], scheme: Scheme) -> list[ColumnTensor]:
    """Matrices by a scheme of format "column". Raises CheckpointError as `WeightSource.quantized`."""
    return [cast(ColumnTensor, weights.quantized(name, scheme)) for name in names]


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Turns a ValueError of the quantizer into a CheckpointError that names the tensor."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as exc:
        raise CheckpointError(f"{name}: {exc}") from exc


def matrix_shape(weights: WeightSource, name: str) -> tuple[int, int]:
    """(outputs, inputs) of a matrix."""
    n, k = weights.shape(name)
    return n, k


def _locate(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Tensor name -> file and place; buffers that no model reads are left out."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists():
        return {n: (single, info) for n, info in _header(single).items() if not HARMLESS.search(n)}
    if not index.exists():
        legacy = next(iter(sorted(folder.glob("*.bin"))), None)
        hint = f"; {legacy.name} must be converted to safetensors first" if legacy else ""
        raise CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing, empty or no object")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and re.fullmatch(r"[^/\\:\x00]+\.safetensors", shard)
        if not plain or shard.startswith("."):
            raise CheckpointError(
                f"{index}: puts {name} in {shard!r:.120}, want the name of a .safetensors file beside it"
            )
    places: dict[str, tuple[Path, TensorInfo]] = {}
    for shard in sorted(set(weight_map.values())):
        path = folder / shard
        if not path.exists():
            raise CheckpointError(f"{path}: is missing, but {INDEX} names it")
        header = _header(path)
        for name, info in header.items():
            if HARMLESS.search(name):
                continue
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{path}: holds {name}, which {INDEX} puts in {weight_map.get(name, 'no shard')}")
            places[name] = (path, info)
        lacking = [n for n, s in weight_map.items() if s == shard and n not in header]
        if lacking:
            raise CheckpointError(f"{path}: lacks {listed(lacking)}, which {INDEX} puts there")
    return places


def _header(path: Path) -> dict[str, TensorInfo]:
    try:
        return read_header(path)
    except TensorFileError as exc:
        raise CheckpointError(str(exc)) from exc


def _equal(weights: Weights, a: str, b: str) -> bool:
    rows, columns = weights.shape(a)
    step = math.ceil(SLAB / columns)
    return all(
        np.array_equal(weights.rows(a, i, min(i + step, rows)), weights.rows(b, i, min(i + step, rows)))
        for i in range(0, rows, step)
    )


def listed(names: list[str]) -> str:
    """Some names for an error: the first three, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"{name:.120}" for name in names[:3]) + more
