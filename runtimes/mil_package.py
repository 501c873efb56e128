"""Reads a Core ML package and checks that manifest, program, description and weight.bin fit together.

Not covered: shapes of results, which the executor (mil.py) compares when it computes them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from runtimes.blobfile import Blob, read_blobs
from runtimes.manifest import BundleError, load_json
from runtimes.mil_ops import SIGNATURES
from runtimes.milproto import MilModel, Operation, ProgramError, ProgramFunction, TensorType, Value, read_model

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
SPECIFICATION, OPSET = 9, "CoreML8"  # of iOS 18
DEQUANTIZE = "constexpr_blockwise_shift_scale"
# operations that the executor carries out itself: (inputs that they need, that they may have)
OWN = {
    "const": ("", ""),
    "read_state": ("input", ""),
    "write_state": ("input data", ""),
    DEQUANTIZE: ("data scale", "offset"),
}


@dataclass(frozen=True)
class PackageFiles:
    """A package as it lies on the disk."""

    folder: Path
    model: MilModel
    weights: Path
    blobs: Mapping[int, Blob]


def read_package(folder: Path) -> PackageFiles:
    """Reads a package; its constants stay on the disk.

    Args:
        folder: an .mlpackage.

    Raises:
        ProgramError, BlobError: naming the file, the function and the operation.
    """
    _check_manifest(folder / "Manifest.json")
    model_path, weights = folder / MODEL, folder / WEIGHTS
    model = read_model(model_path)
    if model.specification != SPECIFICATION:
        raise ProgramError(f"{model_path}: specification {model.specification}, want {SPECIFICATION}")
    blobs = read_blobs(weights) if weights.exists() else {}  # a program without weights has no file
    wanted = set()
    for function in model.functions.values():
        for where, value in _constants(function):
            if value.blob is not None:
                _check_blob(weights, blobs, value, f"{model_path}: {where}")
                wanted.add(value.blob)
    if unused := sorted(blobs.keys() - wanted):
        raise ProgramError(f"{weights}: no operation uses the blobs at bytes {unused[:5]} ({len(unused)} in all)")
    for name, function in model.functions.items():
        _check_description(model, name, str(model_path))
        _check_flow(function, f"{model_path}: function {name}")
    return PackageFiles(folder, model, weights, blobs)


def input_name(op: Operation, key: str) -> str:
    """The value that an input takes. Raises ProgramError if it takes a constant, or is not there."""
    bound = op.inputs.get(key, ())
    if len(bound) != 1 or not isinstance(bound[0], str):
        raise ProgramError(f"{op.kind} {op.name}: its input {key} is missing or a constant")
    return bound[0]


def input_value(op: Operation, key: str) -> Value:
    """The constant that an input takes. Raises ProgramError if it takes another value, or is not there."""
    bound = op.inputs.get(key, ())
    if len(bound) != 1 or not isinstance(bound[0], Value):
        raise ProgramError(f"{op.kind} {op.name}: its input {key} is missing or no constant")
    return bound[0]


def _check_manifest(path: Path) -> None:
    """Manifest.json must name the two files where every package of this kind has them."""
    try:
        manifest = load_json(path)
        places = {key: item["path"] for key, item in manifest["itemInfoEntries"].items()}
        model = places[manifest["rootModelIdentifier"]]
    except (BundleError, KeyError, TypeError, AttributeError) as exc:
        raise ProgramError(f"{path}: cannot be read as a package's manifest: {exc!r}") from exc
    weights = WEIGHTS.removeprefix("Data/").removesuffix("/weight.bin")
    for place in places.values():
        if place not in (model, weights) or model != MODEL.removeprefix("Data/"):
            raise ProgramError(f"{path}: names {place!r:.80}, want {MODEL} as its model and {weights} beside it")


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
    """Every operation is known, takes what an earlier one gave, in one float type, and gives something new."""
    if function.opset != OPSET:
        raise ProgramError(f"{where}: opset {function.opset}, want {OPSET}")
    types: dict[str, TensorType] = dict(function.inputs)
    texts: dict[str, str] = {}
    for op in function.operations:
        here = f"{where}: {op.kind} {op.name}"
        _check_inputs(op, types, function.states, here)
        if op.kind in ("read_state", "write_state"):
            state = function.states[input_name(op, "input")]
            found = types[input_name(op, "data")] if op.kind == "write_state" else _only_output(op, here)
            if found != state:
                raise ProgramError(f"{here}: {found} for a state of {state}")
        elif op.kind == DEQUANTIZE:
            _check_blocks(op, here)
        elif op.kind == "const":
            if op.value is None or op.value.type != _only_output(op, here):
                raise ProgramError(f"{here}: declares {op.outputs}, its value is {op.value and op.value.type}")
            if isinstance(op.value.array, str):
                texts[op.outputs[0][0]] = op.value.array
        elif op.kind == "cast":
            wanted = texts.get(input_name(op, "dtype"))
            if _only_output(op, here).dtype != wanted:
                raise ProgramError(f"{here}: casts to {wanted}, declares {op.outputs[0][1]}")
        else:
            _check_float_types(op, types, here)
        for name, kind in op.outputs:
            if name in types or name in function.states:
                raise ProgramError(f"{here}: gives {name}, which exists already")
            types[name] = kind
    if missing := [name for name in function.outputs if name not in types]:
        raise ProgramError(f"{where}: its outputs {missing} are given by no operation")


def _check_inputs(op: Operation, types: Mapping[str, TensorType], states: Mapping[str, TensorType], where: str) -> None:
    signature = OWN.get(op.kind) or SIGNATURES.get(op.kind)
    if signature is None:
        raise ProgramError(f"{where}: an operation that is not supported")
    needed, possible = (set(names.split()) for names in signature)
    if missing := needed - op.inputs.keys():
        raise ProgramError(f"{where}: lacks its input {', '.join(sorted(missing))}")
    if unknown := op.inputs.keys() - needed - possible:
        raise ProgramError(f"{where}: has an unknown input {', '.join(sorted(unknown))}")
    if (op.kind == "const") != (op.value is not None) or (not op.outputs and op.kind != "write_state"):
        raise ProgramError(f"{where}: a constant without a value, a value that is no constant, or no result")
    for key, bound in op.inputs.items():
        if not bound or (len(bound) > 1 and key != "values"):
            raise ProgramError(f"{where}: {len(bound)} values for input {key}")
        for name in (b for b in bound if isinstance(b, str)):
            if key == "input" and op.kind in ("read_state", "write_state"):
                if name not in states:
                    raise ProgramError(f"{where}: its input is no state")
            elif name not in types:
                raise ProgramError(f"{where}: its input {key} is {name}, which nothing before it gives")


def _check_float_types(op: Operation, types: Mapping[str, TensorType], where: str) -> None:
    """All floats that an operation takes and gives are of one type, as Core ML wants; no integer becomes a float."""
    bound = [b for key in sorted(op.inputs) for b in op.inputs[key]]  # a file has them in any order
    taken = [types[b] if isinstance(b, str) else b.type for b in bound]
    given = [kind for _, kind in op.outputs]
    floats = {kind.dtype for kind in [*taken, *given] if kind.dtype.startswith("fp")}
    first = types[x[0]] if (x := op.inputs.get("x", ())) and isinstance(x[0], str) else None
    changed = first is not None and any(kind.dtype != first.dtype for kind in given)
    if len(floats) > 1 or changed:
        raise ProgramError(f"{where}: takes {', '.join(map(str, taken))}, declares {', '.join(map(str, given))}")


def _only_output(op: Operation, where: str) -> TensorType:
    if len(op.outputs) != 1:
        raise ProgramError(f"{where}: gives {len(op.outputs)} values, want one")
    return op.outputs[0][1]


def _check_blocks(op: Operation, where: str) -> None:
    """Scales that divide the data, offsets like scales, a result like the data."""
    data, scale = input_value(op, "data").type, input_value(op, "scale").type
    offset = input_value(op, "offset").type if "offset" in op.inputs else TensorType(data.dtype, scale.shape)
    fits = len(data.shape) == len(scale.shape) == 2 and all(
        s and d and not d % s for d, s in zip(data.shape, scale.shape, strict=True)
    )
    if not fits or offset != TensorType(data.dtype, scale.shape) or scale.dtype != "fp16":
        raise ProgramError(f"{where}: data {data} with scale {scale} and offset {offset}")
    if [kind for _, kind in op.outputs] != [TensorType("fp16", data.shape)]:
        raise ProgramError(f"{where}: declares another result than fp16 {list(data.shape)}")
