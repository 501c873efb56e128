"""Executes the ML program of a saved Core ML package on any machine: what the package means, without Core ML.

    package = load_package(folder / "Decoder.mlpackage")
    decode = package.function("decode", half=True)
    state = decode.make_state()
    decode.predict({"inputs_embeds": ..., "attention_mask": ..., "position": ...}, state)["logits"]

Two modes. Ideal: f32 between operations; only the package's own constants are rounded. Half: every fp16 result of
an operation is rounded to fp16, which emulates a device that computes inside an operation in f32. Each value's type
and shape is compared with what the program declares, each constant with its blob in weight.bin.

Not covered: what Apple's compiler makes of the program, where it runs it, how its kernels round inside an operation.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.blobfile import Blob, read_blob, read_blobs
from runtimes.mil_ops import MOVES, OPERATIONS, OperationError, update_region
from runtimes.milproto import MilModel, Operation, ProgramError, ProgramFunction, TensorType, Value, read_model

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
State = dict[str, Floats]

LEAST_RESIDENT_BYTES = 2 << 30
CHUNK = 1 << 20  # weights that a thread dequantizes at a time
DTYPES = {"fp16": np.float32, "fp32": np.float32, "int32": np.int32, "bool": np.bool_}
DEQUANTIZE = "constexpr_blockwise_shift_scale"


@dataclass
class Magnitude:
    """What was seen of an operation's results over all calls: the largest |x|, and whether all were finite."""

    kind: str
    largest: float = 0.0
    finite: bool = True


def default_resident_bytes() -> int:
    """Dequantized weights that a package keeps between uses: a quarter of the machine's memory, at least 2 GiB."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return LEAST_RESIDENT_BYTES
    return max(LEAST_RESIDENT_BYTES, memory // 4)


def load_package(folder: Path, *, resident_bytes: int | None = None) -> "Package":
    """Reads a package and checks that program, description and weight.bin fit together.

    Args:
        folder: an .mlpackage.
        resident_bytes: how much of its weights may stay in memory, dequantized; what is beyond is made again at
            each use. None: `default_resident_bytes`.

    Raises:
        ProgramError, BlobError: naming the file, the function and the operation.
    """
    model_path, weights = _locate(folder)
    model = read_model(model_path)
    blobs = read_blobs(weights) if weights.exists() else {}  # a program without weights has no file
    wanted: dict[int, tuple[str, TensorType]] = {}
    for function in model.functions.values():
        for where, value in _constants(function):
            if value.blob is not None:
                _check_blob(weights, blobs, value, f"{model_path}: {where}")
                wanted[value.blob] = (where, value.type)
    if unused := sorted(blobs.keys() - wanted.keys()):
        raise ProgramError(f"{weights}: no operation uses the blobs at bytes {unused[:5]} ({len(unused)} in all)")
    for name, function in model.functions.items():
        _check_description(model, name, str(model_path))
        _check_flow(function, f"{model_path}: function {name}")
    return Package(
        folder, model, weights, blobs, default_resident_bytes() if resident_bytes is None else resident_bytes
    )


class Package:
    """A package that was read; its functions share their weights.

    `unread` holds the offsets of the blobs that no call has used yet.
    """

    def __init__(
        self, folder: Path, model: MilModel, weights: Path, blobs: Mapping[int, Blob], resident_bytes: int
    ) -> None:
        self.folder, self.model = folder, model
        self._weights, self._blobs, self._room = weights, blobs, resident_bytes
        self._kept: dict[tuple[int, ...], Array] = {}
        self.unread = set(blobs)

    def function(self, name: str | None = None, *, half: bool = True) -> "MilFunction":
        """A function to be called; None is the default one.

        Args:
            half: round to fp16 after each operation; False is the ideal mode.

        Raises:
            ProgramError: if there is no such function.
        """
        name = name or self.model.default
        if name not in self.model.functions:
            raise ProgramError(f"{self.folder}: has no function {name}, but {sorted(self.model.functions)}")
        return MilFunction(self, self.model.functions[name], half)

    def forget(self) -> None:
        """Frees the weights that were kept in memory; a later call makes them again."""
        self._room += sum(array.nbytes for array in self._kept.values())
        self._kept.clear()

    def constant(self, value: Value) -> Any:
        """A constant's array (floats as f32) or text; a blob is read when it is asked for."""
        if value.blob is None:
            array = value.array
            return array.astype(np.float32) if value.type.dtype == "fp16" else array  # type: ignore[union-attr]
        if (value.blob,) in self._kept:
            return self._kept[(value.blob,)]
        self.unread.discard(value.blob)
        stored = read_blob(self._weights, self._blobs[value.blob], value.type.shape)
        return stored.astype(np.float32) if value.type.dtype == "fp16" else stored

    def vector(self, value: Value) -> Any:
        """The constant of an operation `const`; a blob is kept while there is room."""
        array = self.constant(value)
        if value.blob is not None:
            self._keep((value.blob,), array)
        return array

    def matrix(self, op: Operation, half: bool) -> Floats:
        """scale * (data - offset), block by block; kept while there is room."""
        data, scale = (_value(op, key) for key in ("data", "scale"))
        offset = _value(op, "offset") if "offset" in op.inputs else None
        key = (int(half), data.blob or -1, scale.blob or -1, -1 if offset is None else offset.blob or -1)
        if -1 not in key[1:3] and key in self._kept:
            return self._kept[key]
        zeros = None if offset is None else self.constant(offset)
        out = _dequantize(self.constant(data), self.constant(scale), zeros, half)
        if -1 not in key[1:3]:
            self._keep(key, out)
        return out

    def _keep(self, key: tuple[int, ...], array: Array) -> None:
        if key not in self._kept and self._room >= array.nbytes:
            self._room -= array.nbytes
            self._kept[key] = array


class MilFunction:
    """One function of a package, called like coremltools' MLModel.

    `watch`, if it is set to a dictionary, collects the magnitudes of every operation by its name.
    """

    def __init__(self, package: Package, function: ProgramFunction, half: bool) -> None:
        self.package, self.function, self.half = package, function, half
        self.watch: dict[str, Magnitude] | None = None
        self._in_place = _in_place_updates(function)
        self._last_use = _last_uses(function)

    def make_state(self) -> State:
        """New states: zeros."""
        return {name: np.zeros(kind.shape, dtype=np.float32) for name, kind in self.function.states.items()}

    def predict(self, data: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        """Runs the function.

        Args:
            data: an array for each input; fp16 and fp32 ones as any float type.
            state: from `make_state` of any function of this package; changed by the call.

        Returns:
            The outputs, floats as f32.

        Raises:
            ProgramError: if an input is missing or of another shape, or a value is not what the program declares.
        """
        values = self._inputs(data, state)
        state = state or {}
        for index, op in enumerate(self.function.operations):
            if op.kind == "write_state":
                self._write_state(op, values, state)
            else:
                self._run(op, index, values, state)
            for name in self._last_use.get(index, ()):
                values.pop(name, None)
        return {name: values[name] for name in self.function.outputs}

    def _inputs(self, data: Mapping[str, Array], state: State | None) -> dict[str, Any]:
        where = f"{self.package.folder.name}: function {self.function.name}"
        if data.keys() != self.function.inputs.keys():
            raise ProgramError(f"{where}: got inputs {sorted(data)}, want {sorted(self.function.inputs)}")
        values: dict[str, Any] = {}
        for name, kind in self.function.inputs.items():
            found = np.asarray(data[name])
            if found.shape != kind.shape or found.dtype.kind != ("f" if kind.dtype.startswith("fp") else "i"):
                raise ProgramError(f"{where}: input {name} is {found.dtype} {list(found.shape)}, want {kind}")
            values[name] = self._rounded(found.astype(DTYPES[kind.dtype]), kind)
        for name, kind in self.function.states.items():
            if state is None or name not in state or state[name].shape != kind.shape:
                raise ProgramError(f"{where}: needs a state {name} of {kind}, from make_state()")
        return values

    def _run(self, op: Operation, index: int, values: dict[str, Any], state: State) -> None:
        if op.kind == "const":
            assert op.value is not None
            results: Sequence[Any] = [self.package.vector(op.value)]
        elif op.kind == DEQUANTIZE:
            results = [self.package.matrix(op, self.half)]
        elif op.kind == "read_state":
            results = [state[_name(op, "input")]]
        else:
            inputs = {key: self._argument(key, bound, values) for key, bound in op.inputs.items()}
            try:
                with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # reported through `watch`
                    if index in self._in_place:
                        inputs["x"][update_region(inputs)] = inputs["update"]
                        results = [inputs["x"]]
                    else:
                        found = OPERATIONS[op.kind](inputs)
                        results = found if isinstance(found, tuple) else [found]
            except (OperationError, ValueError, KeyError, IndexError) as exc:
                raise ProgramError(f"{self._where(op)}: {exc}") from exc
        self._keep(op, results, values)

    def _keep(self, op: Operation, results: Sequence[Any], values: dict[str, Any]) -> None:
        if len(results) != len(op.outputs):
            raise ProgramError(f"{self._where(op)}: gives {len(results)} values, declares {len(op.outputs)}")
        for (name, kind), result in zip(op.outputs, results, strict=True):
            values[name] = result if isinstance(result, str) else self._checked(op, kind, result)

    def _checked(self, op: Operation, kind: TensorType, result: Any) -> Any:
        """A result, rounded where the mode asks for it. Raises ProgramError if the program declares another type."""
        found = np.asarray(result).dtype
        if np.shape(result) != kind.shape or found != DTYPES.get(kind.dtype, found):
            raise ProgramError(f"{self._where(op)}: gives {found} {list(np.shape(result))}, declares {kind}")
        if op.kind in MOVES:
            return result
        if op.kind not in ("const", DEQUANTIZE):  # which are in fp16 already
            result = self._rounded(result, kind)
        if self.watch is not None and kind.dtype.startswith("fp"):
            seen = self.watch.setdefault(op.name, Magnitude(op.kind))
            peak = float(np.abs(result).max(initial=0))
            seen.finite = seen.finite and bool(np.isfinite(peak))
            seen.largest = max(seen.largest, peak)
        return result

    def _write_state(self, op: Operation, values: dict[str, Any], state: State) -> None:
        name, data = _name(op, "input"), values[_name(op, "data")]
        if data.shape != state[name].shape:
            raise ProgramError(f"{self._where(op)}: writes {list(data.shape)} to a state of {list(state[name].shape)}")
        if data is not state[name]:
            state[name] = np.array(data)

    def _argument(self, key: str, bound: Sequence[str | Value], values: Mapping[str, Any]) -> Any:
        found = [values[b] if isinstance(b, str) else self.package.constant(b) for b in bound]
        return found if key == "values" else found[0]

    def _rounded(self, result: Any, kind: TensorType) -> Any:
        if not self.half or kind.dtype != "fp16":
            return result
        with np.errstate(over="ignore"):  # beyond 65504 is infinity, as on a device
            return np.asarray(result).astype(np.float16).astype(np.float32)

    def _where(self, op: Operation) -> str:
        return f"{self.package.folder.name}: function {self.function.name}: {op.kind} {op.name}"


def _locate(folder: Path) -> tuple[Path, Path]:
    """(model.mlmodel, weight.bin) by Manifest.json."""
    path = folder / "Manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        items, root = manifest["itemInfoEntries"], manifest["rootModelIdentifier"]
        places = {key: item["path"] for key, item in items.items()}
        model = places[root]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ProgramError(f"{path}: cannot be read as a package's manifest: {exc!r}") from exc
    for place in places.values():
        parts = place.split("/") if isinstance(place, str) else [".."]
        if any(part in ("", ".", "..") for part in parts):
            raise ProgramError(f"{path}: names {place!r}, want a path in the package")
    weights = next((p for p in places.values() if p.endswith("/weights")), "com.apple.CoreML/weights")
    return folder / "Data" / model, folder / "Data" / weights / "weight.bin"


def _constants(function: ProgramFunction) -> Iterator[tuple[str, Value]]:
    """Every constant of a function, with the operation that holds it."""
    for op in function.operations:
        where = f"function {function.name}: {op.kind} {op.name}"
        if op.value is not None:
            yield where, op.value
        for bound in op.inputs.values():
            yield from ((where, b) for b in bound if isinstance(b, Value))


def _check_blob(weights: Path, blobs: Mapping[int, Blob], value: Value, where: str) -> None:
    assert value.blob is not None
    if value.blob not in blobs:
        raise ProgramError(f"{where}: its value is at byte {value.blob} of {weights}, where no blob is")
    blob = blobs[value.blob]
    if blob.type != value.type.dtype or blob.values != math.prod(value.type.shape):
        raise ProgramError(f"{where}: wants {value.type}, its blob holds {blob.values} values of {blob.type}")


def _check_description(model: MilModel, name: str, where: str) -> None:
    """What the package tells applications must be what the program takes and gives."""
    function, described = model.functions[name], model.described[name]
    types = {out: kind for op in function.operations for out, kind in op.outputs}
    outputs = {out: types.get(out) for out in function.outputs}
    for what, found, wanted in (
        ("inputs", described.inputs, function.inputs),
        ("states", described.states, function.states),
        ("outputs", described.outputs, outputs),
    ):
        if dict(found) != dict(wanted):
            listed = [{k: str(v) for k, v in part.items()} for part in (found, wanted)]
            raise ProgramError(f"{where}: function {name}: describes {what} {listed[0]}, its program has {listed[1]}")


def _check_flow(function: ProgramFunction, where: str) -> None:
    """Every operation is known, and takes what an earlier one gave."""
    known = {*function.inputs, *function.states}
    for op in function.operations:
        here = f"{where}: {op.kind} {op.name}"
        if op.kind not in OPERATIONS and op.kind not in ("const", "read_state", "write_state", DEQUANTIZE):
            raise ProgramError(f"{here}: an operation that is not supported")
        if (op.kind == "const") != (op.value is not None):
            raise ProgramError(f"{here}: a constant without a value, or a value that is no constant")
        for key, bound in op.inputs.items():
            for name in (b for b in bound if isinstance(b, str)):
                if name not in known:
                    raise ProgramError(f"{here}: its input {key} is {name}, which nothing before it gives")
            if not bound or (len(bound) > 1 and key != "values"):
                raise ProgramError(f"{here}: {len(bound)} values for input {key}")
        if op.kind in ("read_state", "write_state") and _name(op, "input") not in function.states:
            raise ProgramError(f"{here}: its input is no state")
        if op.kind == DEQUANTIZE:
            _check_blocks(op, here)
        for name, _ in op.outputs:
            if name in known:
                raise ProgramError(f"{here}: gives {name}, which exists already")
            known.add(name)
    if missing := [name for name in function.outputs if name not in known]:
        raise ProgramError(f"{where}: its outputs {missing} are given by no operation")


def _check_blocks(op: Operation, where: str) -> None:
    """Scales that divide the data, offsets like scales, a result like the data."""
    data, scale = _value(op, "data").type, _value(op, "scale").type
    offset = _value(op, "offset").type if "offset" in op.inputs else TensorType(data.dtype, scale.shape)
    fits = len(data.shape) == len(scale.shape) == 2 and all(
        s and not d % s for d, s in zip(data.shape, scale.shape, strict=True)
    )
    if not fits or offset != TensorType(data.dtype, scale.shape) or scale.dtype != "fp16":
        raise ProgramError(f"{where}: data {data} with scale {scale} and offset {offset}")
    if [kind for _, kind in op.outputs] != [TensorType("fp16", data.shape)]:
        raise ProgramError(f"{where}: declares another result than fp16 {list(data.shape)}")


def _name(op: Operation, key: str) -> str:
    (bound,) = op.inputs[key]
    if not isinstance(bound, str):
        raise ProgramError(f"{op.kind} {op.name}: its input {key} is a constant")
    return bound


def _value(op: Operation, key: str) -> Value:
    (bound,) = op.inputs[key]
    if not isinstance(bound, Value):
        raise ProgramError(f"{op.kind} {op.name}: its input {key} is no constant")
    return bound


def _in_place_updates(function: ProgramFunction) -> frozenset[int]:
    """The slice_updates that may change a state where it lies, because nobody can tell.

    That is so if x was read from the state after its last write, the very next operation writes the result to
    that state, x is used by nothing later, and whatever else was read from the state is only cut into copies.
    """
    source: dict[str, str] = {}  # value -> the state that it was read from, while that is still its content
    uses: dict[str, list[tuple[int, str]]] = {}
    for index, op in enumerate(function.operations):
        for bound in op.inputs.values():
            for name in (b for b in bound if isinstance(b, str)):
                uses.setdefault(name, []).append((index, op.kind))
    reads = {op.outputs[0][0]: _name(op, "input") for op in function.operations if op.kind == "read_state"}
    exposed = {
        state
        for value, state in reads.items()
        if value in function.outputs or {kind for _, kind in uses.get(value, [])} - {"slice_update", "slice_by_size"}
    }
    found = set()
    for index, op in enumerate(function.operations):
        if op.kind == "read_state":
            source[op.outputs[0][0]] = _name(op, "input")
        elif op.kind == "write_state":
            written = _name(op, "input")
            source = {value: state for value, state in source.items() if state != written}
        elif op.kind == "slice_update" and isinstance(op.inputs["x"][0], str):
            x = op.inputs["x"][0]
            state = source.get(x)
            following = function.operations[index + 1 : index + 2]
            written_back = any(
                f.kind == "write_state" and _name(f, "input") == state and _name(f, "data") == op.outputs[0][0]
                for f in following
            )
            alone = max(i for i, _ in uses[x]) == index and op.outputs[0][0] not in function.outputs
            later = [i for i, _ in uses.get(op.outputs[0][0], []) if i != index + 1]
            if state is not None and state not in exposed and written_back and alone and not later:
                found.add(index)
    return frozenset(found)


def _last_uses(function: ProgramFunction) -> dict[int, list[str]]:
    """Operation -> the values that nothing needs after it, so that memory does not grow with the program."""
    last: dict[str, int] = {}
    for index, op in enumerate(function.operations):
        for name, _ in op.outputs:
            last[name] = index
        for bound in op.inputs.values():
            for name in (b for b in bound if isinstance(b, str)):
                last[name] = index
    for name in (*function.outputs, *function.states):
        last.pop(name, None)
    out: dict[int, list[str]] = {}
    for name, index in last.items():
        out.setdefault(index, []).append(name)
    return out


def _dequantize(data: Array, scale: Floats, offset: Array | None, half: bool) -> Floats:
    """f32 [N, K] from integers [N, K], scales and offsets [N or 1 or a divisor, K / width]."""
    n, k = data.shape
    rows, blocks = scale.shape
    scale = np.repeat(scale, n // rows, axis=0)
    zeros = None if offset is None else np.repeat(offset, n // rows, axis=0).astype(np.float32)
    out = np.empty((n, blocks, k // blocks), dtype=np.float32)
    parts = data.reshape(out.shape)

    def work(start: int) -> None:
        here = slice(start, start + step)
        out[here] = parts[here]
        if zeros is not None:
            out[here] -= zeros[here, :, None]
        out[here] *= scale[here, :, None]
        if half:
            out[here] = out[here].astype(np.float16)

    step = max(1, CHUNK // k)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(work, range(0, n, step)):
            pass
    return out.reshape(n, k)
