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

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.blobfile import BlobError, read_blob
from runtimes.mil_ops import MOVES, OPERATIONS, OperationError, result_shape, update_region
from runtimes.mil_package import DEQUANTIZE, PackageFiles, input_name, input_value, read_package
from runtimes.milproto import Operation, ProgramError, ProgramFunction, TensorType, Value

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
State = dict[str, Floats]

LEAST_RESIDENT_BYTES = 2 << 30
CHUNK = 1 << 20  # weights that a thread dequantizes at a time
DTYPES = {"fp16": np.float32, "fp32": np.float32, "int32": np.int32, "bool": np.bool_}


@dataclass
class Magnitude:
    """What was seen of an operation's results over all calls: the largest |x|, and whether all were finite."""

    kind: str
    largest: float = 0.0
    finite: bool = True


def default_resident_bytes() -> int:
    """Dequantized weights that a package keeps between uses: a sixth of the machine's memory, at least 2 GiB."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return LEAST_RESIDENT_BYTES
    with suppress(OSError, ValueError):  # a container may have less; "max" is no number
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return max(LEAST_RESIDENT_BYTES, memory // 6)


def load_package(folder: Path, *, resident_bytes: int | None = None) -> "Package":
    """Reads and checks a package (see `read_package`) so that its functions can be called.

    Args:
        folder: an .mlpackage.
        resident_bytes: how much of its weights may stay in memory, dequantized; what is beyond is made again at
            each use. None: `default_resident_bytes`.

    Raises:
        ProgramError, BlobError: naming the file, the function and the operation.
    """
    return Package(read_package(folder), default_resident_bytes() if resident_bytes is None else resident_bytes)


class Package:
    """A package that was read; its functions share their weights.

    `unread` holds the offsets of the blobs that no call has used yet.
    """

    def __init__(self, files: PackageFiles, resident_bytes: int) -> None:
        self.folder, self.model = files.folder, files.model
        self._weights, self._blobs, self._room = files.weights, files.blobs, resident_bytes
        self._kept: dict[tuple[Any, ...], Array] = {}
        self.unread = set(files.blobs)

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
        if (value.blob, value.type) in self._kept:
            return self._kept[value.blob, value.type]
        self.unread.discard(value.blob)
        stored = read_blob(self._weights, self._blobs[value.blob], value.type.shape)
        return stored.astype(np.float32) if value.type.dtype == "fp16" else stored

    def vector(self, value: Value) -> Any:
        """The constant of an operation `const`; a blob is kept while there is room."""
        array = self.constant(value)
        if value.blob is not None:
            self._keep((value.blob, value.type), array)
        return array

    def matrix(self, op: Operation, half: bool) -> Floats:
        """scale * (data - offset), block by block; kept while there is room."""
        parts = [input_value(op, key) for key in ("data", "scale", "offset") if key in op.inputs]
        blobs = [part.blob for part in parts]
        key = (half, *blobs, parts[0].type)
        if key in self._kept:
            return self._kept[key]
        data, scale, offset = [*(self.constant(part) for part in parts), None][:3]
        out = _dequantize(data, scale, offset, half)
        if None not in blobs:
            self._keep(key, out)
        return out

    def _keep(self, key: tuple[Any, ...], array: Array) -> None:
        if key not in self._kept and self._room >= array.nbytes:
            self._room -= array.nbytes
            self._kept[key] = array


class MilFunction:
    """One function of a package, called like coremltools' MLModel.

    `watch`, if it is set to a dictionary, collects the magnitudes of every operation, by where it is.
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
        try:
            results = self._results(op, index, values, state)
        except (OperationError, BlobError, ValueError, LookupError, TypeError, ArithmeticError, MemoryError) as exc:
            raise ProgramError(f"{self._where(op)}: {exc}") from exc
        if len(results) != len(op.outputs):
            raise ProgramError(f"{self._where(op)}: gives {len(results)} values, declares {len(op.outputs)}")
        for (name, kind), result in zip(op.outputs, results, strict=True):
            values[name] = result if isinstance(result, str) else self._checked(op, kind, result)

    def _results(self, op: Operation, index: int, values: Mapping[str, Any], state: State) -> Sequence[Any]:
        if op.kind == "const":
            assert op.value is not None
            return [self.package.vector(op.value)]
        if op.kind == DEQUANTIZE:
            return [self.package.matrix(op, self.half)]
        if op.kind == "read_state":
            return [state[input_name(op, "input")]]
        inputs = {key: self._argument(key, bound, values) for key, bound in op.inputs.items()}
        shape = result_shape(op.kind, inputs)
        if shape is not None and shape != op.outputs[0][1].shape:  # seen before memory is taken for it
            raise OperationError(f"gives {list(shape)}, declares {op.outputs[0][1]}")
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # reported through `watch`
            if index in self._in_place:
                inputs["x"][update_region(inputs)] = inputs["update"]
                return [inputs["x"]]
            found = OPERATIONS[op.kind](inputs)
        return found if isinstance(found, tuple) else [found]

    def _checked(self, op: Operation, kind: TensorType, result: Any) -> Any:
        """A result, rounded where the mode asks for it. Raises ProgramError if the program declares another type."""
        found = np.asarray(result).dtype
        wanted = found if op.kind == "const" else DTYPES.get(kind.dtype)
        if np.shape(result) != kind.shape or found != wanted:
            raise ProgramError(f"{self._where(op)}: gives {found} {list(np.shape(result))}, declares {kind}")
        if op.kind in MOVES:
            return result
        if op.kind not in ("const", DEQUANTIZE):  # which are in fp16 already
            result = self._rounded(result, kind)
        if self.watch is not None and kind.dtype.startswith("fp"):
            if op.kind in ("const", DEQUANTIZE) and self._where(op) in self.watch:
                return result  # always the same
            seen = self.watch.setdefault(self._where(op), Magnitude(op.kind))
            peak = float(np.abs(result).max(initial=0))
            seen.finite = seen.finite and bool(np.isfinite(peak))
            seen.largest = max(seen.largest, peak)
        return result

    def _write_state(self, op: Operation, values: dict[str, Any], state: State) -> None:
        name, data = input_name(op, "input"), values[input_name(op, "data")]
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


def _in_place_updates(function: ProgramFunction) -> frozenset[int]:
    """The slice_updates that may change a state where it lies, because nobody can tell.

    That is so if x was read from the state after its last write, the very next operation writes the result to that
    state, and nothing later uses x or whatever else was read from the state before: such values lie in the same
    memory. What is read only becomes slice_updates and copies (slice_by_size), never a view.
    """
    uses: dict[str, list[tuple[int, str]]] = {}
    reads: dict[str, tuple[int, str]] = {}  # value -> where it was read, and the state
    writes: list[tuple[int, str]] = []
    for index, op in enumerate(function.operations):
        if op.kind == "read_state":
            reads[op.outputs[0][0]] = (index, input_name(op, "input"))
        elif op.kind == "write_state":
            writes.append((index, input_name(op, "input")))
        for bound in op.inputs.values():
            for name in (b for b in bound if isinstance(b, str)):
                uses.setdefault(name, []).append((index, op.kind))

    def last_use(name: str) -> int:
        end = len(function.operations)
        return end if name in function.outputs else max((i for i, _ in uses.get(name, [])), default=-1)

    exposed = {
        state
        for value, (_, state) in reads.items()
        if value in function.outputs or {kind for _, kind in uses.get(value, [])} - {"slice_update", "slice_by_size"}
    }
    found = set()
    for index, op in enumerate(function.operations[:-1]):
        x = op.inputs.get("x", ("",))[0]
        if op.kind != "slice_update" or not isinstance(x, str) or x not in reads:
            continue
        at, state = reads[x]
        result, following = op.outputs[0][0], function.operations[index + 1]
        current = not any(at < i < index for i, written in writes if written == state)
        kept = (
            following.kind == "write_state"
            and (input_name(following, "input"), input_name(following, "data")) == (state, result)
            and last_use(result) == index + 1
        )
        unseen = all(last_use(v) <= index for v, (i, s) in reads.items() if s == state and i < index)
        if current and kept and unseen and state not in exposed:
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
