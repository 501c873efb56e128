"""model.mlmodel of a Core ML package: an ML program as data, read without trust and without coremltools.

The file is one protobuf message, `Model`; field numbers below are those of Model.proto, FeatureTypes.proto and
MIL.proto (coremltools' mlmodel/format). Read is what a program for iOS 18 needs: functions of one block, tensors of
fixed shape, states. Other kinds of values, shapes, blocks and attributes are refused by name.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_BYTES = 1 << 24  # the 2.2B has 0.8 MB; every message becomes objects of many times its size
MAX_RANK, MAX_VALUES = 5, 1 << 31  # of a tensor
# MIL's DataType -> name; NumPy's type of those that a program may hold as immediate values
DATA_TYPES = {
    1: "bool",
    2: "string",
    10: "fp16",
    11: "fp32",
    21: "int8",
    22: "int16",
    23: "int32",
    25: "int4",
    31: "uint8",
    32: "uint16",
    33: "uint32",
    35: "uint4",
}
PACKED = {"fp16": "<f2", "int8": "i1", "uint8": "u1", "int16": "<i2", "uint16": "<u2"}  # immediate values as bytes
ARRAY_TYPES = {65568: "fp32", 131104: "int32", 65552: "fp16", 131080: "int8"}  # FeatureTypes' ArrayDataType
BLOB_FILE = "@model_path/weights/weight.bin"


class ProgramError(ValueError):
    """The program cannot be read, or is not what it declares; the message names file, function and operation."""


@dataclass(frozen=True)
class TensorType:
    """`dtype` as in MIL text: fp16, int32, ...; a scalar has shape ()."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Value:
    """A constant: an array in memory (or a text), or the offset of a blob in weight.bin."""

    type: TensorType
    array: npt.NDArray[Any] | str | None
    blob: int | None


@dataclass(frozen=True)
class Operation:
    """One operation. An input is a list of names of earlier values and of constants, of one but for `concat`."""

    kind: str
    name: str
    inputs: Mapping[str, tuple[str | Value, ...]]
    outputs: tuple[tuple[str, TensorType], ...]
    value: Value | None  # of a `const`


@dataclass(frozen=True)
class ProgramFunction:
    """A function: what it takes, keeps from call to call, does, and gives."""

    name: str
    opset: str
    inputs: Mapping[str, TensorType]
    states: Mapping[str, TensorType]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Described:
    """What the package tells an application about a function: types of inputs, outputs and states."""

    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    states: Mapping[str, TensorType]


@dataclass(frozen=True)
class MilModel:
    """model.mlmodel. `default` is the function that runs if none is named."""

    specification: int
    default: str
    functions: Mapping[str, ProgramFunction]
    described: Mapping[str, Described]


def read_model(path: Path) -> MilModel:
    """Reads a model.mlmodel.

    Raises:
        ProgramError: naming the file and what in it is broken or not supported.
    """
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ProgramError(f"{path}: {size:,} bytes, want at most {MAX_BYTES:,}")
        content = path.read_bytes()
    except OSError as exc:
        raise ProgramError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    try:
        return _model(Message(content))
    except ProgramError as exc:
        raise ProgramError(f"{path}: {exc}") from exc
    except (ValueError, LookupError, ArithmeticError, RecursionError, MemoryError) as exc:
        raise ProgramError(f"{path}: is no model, or a damaged one: {exc!r}") from exc


class Message:
    """The fields of a protobuf message: varints as integers, everything else as bytes.

    Raises:
        ProgramError: if the bytes are no message.
    """

    def __init__(self, content: bytes | memoryview) -> None:
        self._fields: dict[int, list[Any]] = {}
        view, at = memoryview(content), 0
        while at < len(view):
            key, at = _varint(view, at)
            value: Any
            match key & 7:
                case 0:
                    value, at = _varint(view, at)
                case 1:
                    value, at = view[at : at + 8], at + 8
                case 2:
                    length, at = _varint(view, at)
                    value, at = view[at : at + length], at + length
                case 5:
                    value, at = view[at : at + 4], at + 4
                case kind:
                    raise ProgramError(f"a protobuf field of wire type {kind}")
            if at > len(view):
                raise ProgramError("a protobuf message is truncated")
            self._fields.setdefault(key >> 3, []).append(value)

    def integer(self, number: int) -> int:
        """A varint, 0 if it is absent."""
        value = self._fields.get(number, [0])[-1]
        if not isinstance(value, int):
            raise ProgramError(f"protobuf field {number} is bytes, want an integer")
        return value

    def text(self, number: int) -> str:
        """A string, empty if it is absent."""
        return str(self._bytes(self._fields.get(number, [b""])[-1]), "utf-8")

    def texts(self, number: int) -> list[str]:
        """A repeated string."""
        return [str(self._bytes(value), "utf-8") for value in self._fields.get(number, [])]

    def data(self, number: int) -> bytes:
        """Bytes, empty if they are absent."""
        return bytes(self._bytes(self._fields.get(number, [b""])[-1]))

    def message(self, number: int) -> "Message | None":
        """A nested message."""
        found = self._fields.get(number)
        return Message(self._bytes(found[-1])) if found else None

    def messages(self, number: int) -> Iterator["Message"]:
        """A repeated message."""
        return (Message(self._bytes(value)) for value in self._fields.get(number, []))

    def map(self, number: int) -> dict[str, "Message"]:
        """A map from strings to messages."""
        return {entry.text(1): entry.message(2) or Message(b"") for entry in self.messages(number)}

    def integers(self, number: int) -> list[int]:
        """Repeated varints, packed or not, as signed 64-bit numbers."""
        found: list[int] = []
        for value in self._fields.get(number, []):
            if isinstance(value, int):
                found.append(value)
                continue
            at = 0
            while at < len(value):
                one, at = _varint(value, at)
                found.append(one)
        return [v - (1 << 64) if v >> 63 else v for v in found]

    def floats(self, number: int) -> npt.NDArray[np.float32]:
        """Repeated floats, packed or not."""
        return np.frombuffer(b"".join(bytes(self._bytes(v)) for v in self._fields.get(number, [])), dtype="<f4")

    def has(self, *numbers: int) -> bool:
        """Whether any of the fields is set."""
        return not self._fields.keys().isdisjoint(numbers)

    def only(self, *numbers: int) -> int:
        """The number of the one field that is set of several (a oneof)."""
        found = [number for number in self._fields if number in numbers]
        if len(found) != 1:
            raise ProgramError(f"fields {sorted(self._fields)} of a protobuf message, want one of {list(numbers)}")
        return found[0]

    @staticmethod
    def _bytes(value: Any) -> memoryview | bytes:
        if isinstance(value, int):
            raise ProgramError("a protobuf field is an integer, want bytes")
        return value  # type: ignore[no-any-return]  # fields hold integers and bytes


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(view) or shift > 63:
            raise ProgramError("a protobuf number is cut off or too long")
        byte = view[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _model(model: Message) -> MilModel:
    specification, description = model.integer(1), model.message(2) or Message(b"")
    program = model.message(502)
    if program is None:
        raise ProgramError("holds no ML program")
    functions = {name: _function(name, f) for name, f in program.map(2).items()}
    if not functions:
        raise ProgramError("its program has no function")
    several = {f.text(1): _described(f, 2, 3, 6) for f in description.messages(20)}
    default = description.text(21) or "main"
    described = several or {"main": _described(description, 1, 10, 13)}
    if described.keys() != functions.keys() or default not in functions:
        raise ProgramError(f"describes {sorted(described)} (default {default}), its program has {sorted(functions)}")
    return MilModel(specification, default, functions, described)


def _described(message: Message, inputs: int, outputs: int, states: int) -> Described:
    def features(number: int) -> dict[str, TensorType]:
        found = {}
        for feature in message.messages(number):
            kind, name = feature.message(3) or Message(b""), feature.text(1)
            array = kind.message(5)
            if number == states:
                array = (kind.message(8) or Message(b"")).message(1)
            if array is None:
                raise ProgramError(f"feature {name} is no array")
            dtype = array.integer(2)
            if dtype not in ARRAY_TYPES:
                raise ProgramError(f"feature {name} has data type {dtype}, want one of {sorted(ARRAY_TYPES)}")
            if array.has(21, 31, 41, 51, 61) or kind.has(1000):
                raise ProgramError(f"feature {name} is optional, of flexible shape or has a default")
            found[name] = _tensor(ARRAY_TYPES[dtype], array.integers(1), f"feature {name}")
        return found

    return Described(features(inputs), features(outputs), features(states))


def _function(name: str, function: Message) -> ProgramFunction:
    opset, blocks = function.text(2), function.map(3)
    if opset not in blocks:
        raise ProgramError(f"function {name}: has no block for its opset {opset!r}")
    block = blocks[opset]
    inputs, states = {}, {}
    for item in function.messages(1):
        kind = item.message(2) or Message(b"")
        state = kind.message(5)
        if state is not None:
            states[item.text(1)] = _type(state.message(1) or Message(b""), f"function {name}")
        else:
            inputs[item.text(1)] = _type(kind, f"function {name}")
    operations = tuple(_operation(op, f"function {name}") for op in block.messages(3))
    return ProgramFunction(name, opset, inputs, states, operations, tuple(block.texts(2)))


def _operation(op: Message, where: str) -> Operation:
    kind = op.text(1)
    attributes = op.map(5)
    title = _value(attributes["name"], where) if "name" in attributes else None
    name = title.array if title is not None and isinstance(title.array, str) else "?"
    where = f"{where}: {kind} {name}"
    if any(True for _ in op.messages(4)):
        raise ProgramError(f"{where}: has blocks of its own, which are not supported")
    if unknown := sorted(set(attributes) - {"name", "val"}):
        raise ProgramError(f"{where}: has unknown attributes {', '.join(unknown)}")
    inputs: dict[str, tuple[str | Value, ...]] = {}
    for key, argument in op.map(2).items():
        bindings: list[str | Value] = []
        for binding in argument.messages(1):
            value = binding.message(2)
            bindings.append(binding.text(1) if value is None else _value(value, where))
        inputs[key] = tuple(bindings)
    outputs = tuple((o.text(1), _type(o.message(2) or Message(b""), where)) for o in op.messages(3))
    constant = _value(attributes["val"], where) if "val" in attributes else None
    return Operation(kind, name, inputs, outputs, constant)


def _type(kind: Message, where: str) -> TensorType:
    tensor = kind.message(1)
    if tensor is None:
        raise ProgramError(f"{where}: a value that is no tensor")
    dtype = tensor.integer(1)
    if dtype not in DATA_TYPES:
        raise ProgramError(f"{where}: data type {dtype}, want one of {sorted(DATA_TYPES)}")
    shape = []
    for dimension in tensor.messages(3):
        fixed = dimension.message(1)
        if fixed is None:
            raise ProgramError(f"{where}: a tensor whose shape is not fixed")
        shape.append(fixed.integer(1))
    if len(shape) != tensor.integer(2):
        raise ProgramError(f"{where}: a tensor of rank {tensor.integer(2)} with dimensions {shape}")
    return _tensor(DATA_TYPES[dtype], shape, where)


def _tensor(dtype: str, shape: list[int], where: str) -> TensorType:
    if len(shape) > MAX_RANK or any(d < 1 for d in shape) or math.prod(shape) > MAX_VALUES:
        raise ProgramError(f"{where}: a tensor of {shape!s:.80}, want at most {MAX_RANK} sizes from 1, {MAX_VALUES:,}")
    return TensorType(dtype, tuple(shape))


def _value(value: Message, where: str) -> Value:
    kind = _type(value.message(2) or Message(b""), where)
    if value.only(3, 5) == 5:
        blob = value.message(5) or Message(b"")
        if blob.text(1) != BLOB_FILE:
            raise ProgramError(f"{where}: a value in {blob.text(1)!r}, want {BLOB_FILE}")
        return Value(kind, None, blob.integer(2))
    tensor = (value.message(3) or Message(b"")).message(1)
    if tensor is None:
        raise ProgramError(f"{where}: a value that is no tensor")
    which = tensor.only(1, 2, 3, 4, 7)
    inner = tensor.message(which) or Message(b"")
    if which == 4:
        texts = inner.texts(1)
        if kind.dtype != "string" or kind.shape or len(texts) != 1:
            raise ProgramError(f"{where}: {len(texts)} texts for a {kind}, want one")
        return Value(kind, texts[0], None)
    stored = {1: "fp32", 2: "int32", 3: "bool"}.get(which)
    if stored is None and kind.dtype in PACKED:
        array: npt.NDArray[Any] = np.frombuffer(inner.data(1), dtype=PACKED[kind.dtype])
    elif stored == kind.dtype:
        numbers = inner.floats(1) if which == 1 else inner.integers(1)
        array = np.array(numbers, dtype={"fp32": np.float32, "int32": np.int32, "bool": np.bool_}[stored])
    else:
        raise ProgramError(f"{where}: a {kind} stored as {stored or 'bytes'}")
    if array.size != math.prod(kind.shape):
        raise ProgramError(f"{where}: {array.size} values for a {kind}")
    return Value(kind, array.reshape(kind.shape), None)
