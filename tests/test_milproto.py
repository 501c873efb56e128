"""model.mlmodel: the same program as coremltools' own parser reads; and files that lie."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.milproto import Message, Operation, ProgramError, TensorType, Value, read_model

pytest.importorskip("coremltools")
from coremltools import proto

KINDS = proto.MIL_pb2.DataType.Name


@pytest.fixture(scope="module")
def model_file(tiny_ios_bundle: Path) -> Path:
    return tiny_ios_bundle / "coreml" / "Decoder.mlpackage" / "Data" / "com.apple.CoreML" / "model.mlmodel"


@pytest.fixture(scope="module")
def theirs(model_file: Path) -> Any:
    model = proto.Model_pb2.Model()
    model.ParseFromString(model_file.read_bytes())
    return model


def type_of(kind: Any) -> TensorType:
    names = {"FLOAT16": "fp16", "FLOAT32": "fp32"}
    name = KINDS(kind.tensorType.dataType)
    shape = tuple(d.constant.size for d in kind.tensorType.dimensions)
    return TensorType(names.get(name, name.lower()), shape)


def assert_value(ours: Value, wanted: Any) -> None:
    assert ours.type == type_of(wanted.type)
    if wanted.HasField("blobFileValue"):
        assert ours.blob == wanted.blobFileValue.offset
        return
    tensor = wanted.immediateValue.tensor
    match tensor.WhichOneof("value"):
        case "strings":
            assert ours.array == tensor.strings.values[0]
        case "bytes":
            assert ours.type.dtype == "fp16"
            assert isinstance(ours.array, np.ndarray)
            assert np.array_equal(ours.array, np.frombuffer(tensor.bytes.values, np.float16).reshape(ours.type.shape))
        case which:
            assert isinstance(ours.array, np.ndarray)
            assert ours.array.reshape(-1).tolist() == list(getattr(tensor, which).values)


def assert_operation(ours: Operation, wanted: Any) -> None:
    assert ours.kind == wanted.type
    assert ours.name == wanted.attributes["name"].immediateValue.tensor.strings.values[0]
    assert [(name, kind) for name, kind in ours.outputs] == [(o.name, type_of(o.type)) for o in wanted.outputs]
    assert ours.inputs.keys() == wanted.inputs.keys()
    for key, bound in ours.inputs.items():
        for one, other in zip(bound, wanted.inputs[key].arguments, strict=True):
            if isinstance(one, str):
                assert one == other.name
            else:
                assert_value(one, other.value)
    assert (ours.value is None) == ("val" not in wanted.attributes)
    if ours.value is not None:
        assert_value(ours.value, wanted.attributes["val"])


def test_the_program_is_what_coremltools_reads(model_file: Path, theirs: Any) -> None:
    ours = read_model(model_file)
    assert (ours.specification, ours.default) == (theirs.specificationVersion, theirs.description.defaultFunctionName)
    assert ours.functions.keys() == theirs.mlProgram.functions.keys() == {"prefill", "decode"}
    for name, function in ours.functions.items():
        wanted = theirs.mlProgram.functions[name]
        block = wanted.block_specializations[wanted.opset]
        assert function.opset == wanted.opset == "CoreML8"
        assert function.outputs == tuple(block.outputs)
        inputs = {i.name: i.type for i in wanted.inputs}
        states = {n: k.stateType.wrappedType for n, k in inputs.items() if k.HasField("stateType")}
        assert function.states == {n: type_of(k) for n, k in states.items()}
        assert function.inputs == {n: type_of(k) for n, k in inputs.items() if n not in states}
        for one, other in zip(function.operations, block.operations, strict=True):
            assert_operation(one, other)


def test_the_description_is_what_coremltools_reads(model_file: Path, theirs: Any) -> None:
    ours = read_model(model_file).described
    for wanted in theirs.description.functions:
        described = ours[wanted.name]
        shapes = {f.name: tuple(f.type.multiArrayType.shape) for f in wanted.input}
        assert {n: k.shape for n, k in described.inputs.items()} == shapes
        assert {n: k.shape for n, k in described.states.items()} == {
            f.name: tuple(f.type.stateType.arrayType.shape) for f in wanted.state
        }
        assert all(feature.shortDescription for part in (wanted.input, wanted.output, wanted.state) for feature in part)


def changed(theirs: Any, path: Path, change: Callable[[Any], None]) -> Path:
    copy = proto.Model_pb2.Model()
    copy.CopyFrom(theirs)
    change(copy)
    path.write_bytes(copy.SerializeToString())
    return path


def block(model: Any) -> Any:
    return model.mlProgram.functions["decode"].block_specializations["CoreML8"]


def first(model: Any, kind: str) -> Any:
    return next(op for op in block(model).operations if op.type == kind)


def flexible(model: Any) -> None:
    first(model, "linear").outputs[0].type.tensorType.dimensions[1].unknown.variadic = False


def unknown_type(model: Any) -> None:
    first(model, "linear").outputs[0].type.tensorType.dataType = proto.MIL_pb2.DataType.FLOAT8E5M2


def wrong_rank(model: Any) -> None:
    first(model, "linear").outputs[0].type.tensorType.rank = 7


def nested(model: Any) -> None:
    first(model, "linear").blocks.add()


def other_file(model: Any) -> None:
    data = first(model, "constexpr_blockwise_shift_scale").inputs["data"].arguments[0].value
    data.blobFileValue.fileName = "@model_path/../../etc/passwd"


def other_opset(model: Any) -> None:
    model.mlProgram.functions["decode"].opset = "CoreML7"


def no_function(model: Any) -> None:
    model.mlProgram.functions.clear()


def undescribed(model: Any) -> None:
    del model.description.functions[1]


def no_program(model: Any) -> None:
    model.ClearField("mlProgram")


def too_few(model: Any) -> None:
    operation = next(op for op in block(model).operations if op.type == "const" and "shape" in op.outputs[0].name)
    del operation.attributes["val"].immediateValue.tensor.ints.values[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flexible, "shape is not fixed"),
        (unknown_type, "data type 41"),
        (wrong_rank, "rank 7"),
        (nested, "blocks of its own"),
        (other_file, "passwd"),
        (other_opset, "no block for its opset 'CoreML7'"),
        (no_function, "has no function"),
        (undescribed, "describes"),
        (no_program, "no ML program"),
        (too_few, "values for a int32"),
    ],
)
def test_a_program_that_lies_is_refused_by_name(
    change: Callable[[Any], None], message: str, theirs: Any, tmp_path: Path
) -> None:
    path = changed(theirs, tmp_path / "model.mlmodel", change)
    with pytest.raises(ProgramError, match=message) as refused:
        read_model(path)
    assert str(path) in str(refused.value)


@given(st.integers(0, 1 << 20), st.integers(1, 255), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_damage_is_an_error_or_another_program_but_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, model_file: Path, at: int, bits: int, cut: int
) -> None:
    content = bytearray(model_file.read_bytes())
    content[at % len(content)] ^= bits
    path = tmp_path_factory.mktemp("damaged") / "model.mlmodel"
    path.write_bytes(content[: len(content) - cut])
    try:
        read_model(path)
    except ProgramError as exc:
        assert str(path) in str(exc)  # noqa: PT017  # it need not be raised


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x0f", b"\x0b", b"\x08" + b"\x80" * 20])
def test_bytes_that_are_no_message_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.mlmodel").write_bytes(content)
    with pytest.raises(ProgramError):
        read_model(tmp_path / "model.mlmodel")
    with pytest.raises(ProgramError, match="cannot be read"):
        read_model(tmp_path / "missing")


def test_fields_of_a_wrong_kind_are_refused() -> None:
    with pytest.raises(ProgramError, match="is an integer"):
        Message(b"\x08\x01").text(1)
    with pytest.raises(ProgramError, match="is bytes"):
        Message(b"\x0a\x00").integer(1)
    assert Message(b"\x0a\x03\x01\xac\x02").integers(1) == [1, 300]
