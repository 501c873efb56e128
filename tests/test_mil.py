"""The executor: packages that coremltools made, states, rounding, and every way in which a package can lie."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtimes.blobfile import BlobError, read_blobs
from runtimes.mil import Magnitude, Package, load_package
from runtimes.mil_package import DEQUANTIZE
from runtimes.milproto import ProgramError

coremltools = pytest.importorskip("coremltools")
from coremltools import proto  # noqa: E402
from coremltools.converters.mil.mil import Builder as mb  # noqa: E402, N813
from coremltools.converters.mil.mil import types  # noqa: E402

# coremltools leaves temporary folders to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")

IOS18 = coremltools.target.iOS18
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


def convert(program: Any, folder: Path) -> Path:
    """A package by coremltools' whole pipeline: passes, Apple's weight writer, Apple's package writer."""
    model = coremltools.convert(
        program,
        minimum_deployment_target=coremltools.target.iOS18,
        compute_precision=coremltools.precision.FLOAT16,
        skip_model_load=True,
    )
    model.save(str(folder))
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A package that coremltools made of a small net, its input and its value in NumPy."""
    random = np.random.default_rng(0)
    w, b = random.standard_normal((16, 24)).astype(np.float32), random.standard_normal(16).astype(np.float32)

    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 5, 24))], opset_version=IOS18)  # type: ignore[untyped-decorator]
    def program(x: Any) -> Any:
        y = mb.linear(x=x, weight=w, bias=b)
        y = mb.silu(x=y)
        y = mb.transpose(x=mb.reshape(x=y, shape=[5, 4, 4]), perm=[1, 0, 2])
        return mb.reduce_max(x=y, axes=[-1], keep_dims=True, name="out")

    x = random.standard_normal((1, 5, 24)).astype(np.float32)
    y = x @ w.T + b
    y = (y / (1 + np.exp(-y))).reshape(5, 4, 4).transpose(1, 0, 2).max(axis=-1, keepdims=True)
    return convert(program, tmp_path_factory.mktemp("theirs") / "Net.mlpackage"), x, y


def test_a_package_that_coremltools_made_computes_what_numpy_does(theirs: tuple[Path, Any, Any]) -> None:
    folder, x, y = theirs
    package = load_package(folder)
    for half, limit in ((False, 2e-3), (True, 4e-3)):  # its weights are in fp16 in both
        (found,) = package.function(half=half).predict({"x": x}).values()
        assert np.abs(found - y).max() < limit * np.abs(y).max()
    assert package.unread == set()


def test_a_state_that_coremltools_declared_is_carried(tmp_path: Path) -> None:
    @mb.program(  # type: ignore[untyped-decorator]  # coremltools has no types
        input_specs=[
            mb.TensorSpec(shape=(1, 3), dtype=types.fp16),
            mb.StateTensorSpec(shape=(2, 3), dtype=types.fp16),
        ],
        opset_version=IOS18,
    )
    def program(x: Any, memory: Any) -> Any:
        before = mb.read_state(input=memory)
        after = mb.slice_update(x=before, update=x, begin=[1, 0], end=[2, 3])
        kept = mb.coreml_update_state(state=memory, value=after)
        # what was read before the update must still be what it was
        return mb.concat(values=[mb.add(x=before, y=np.float16(0)), kept], axis=0, name="out")

    function = load_package(convert(program, tmp_path / "State.mlpackage")).function()
    assert function._in_place == frozenset()  # noqa: SLF001  # `before` is used after the update
    state = function.make_state()
    first = np.array([[1, 2, 3]], np.float32)
    (out,) = function.predict({"x": first}, state).values()
    assert out.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 2, 3]]
    (out,) = function.predict({"x": first * 2}, state).values()
    assert out.tolist() == [[0, 0, 0], [1, 2, 3], [0, 0, 0], [2, 4, 6]]
    (out,) = function.predict({"x": first}, function.make_state()).values()
    assert out.tolist()[1] == [0, 0, 0]


def decoder(bundle: Path) -> Path:
    return bundle / "coreml" / "Decoder.mlpackage"


def feed(package: Package, half: bool = True, rows: int = 5) -> Any:
    """Logits after a prefill of `rows` tokens and after two more, of the tiny bundle's decoder."""
    described = package.model.described["prefill"].inputs
    _, chunk, hidden = described["inputs_embeds"].shape
    context = described["attention_mask"].shape[-1]
    random = np.random.default_rng(0)
    embeds = random.standard_normal((1, chunk, hidden)).astype(np.float32)
    prefill, decode = package.function("prefill", half=half), package.function("decode", half=half)
    state, out = prefill.make_state(), []
    mask = np.where(np.arange(context) <= np.arange(context)[:, None], np.float32(0), np.float32(-30000))[None, None]
    one = np.array([0], np.int32)
    padded = np.where(np.arange(chunk)[:, None] < rows, embeds, np.float32(0))
    data = {"inputs_embeds": padded, "attention_mask": mask[:, :, :chunk], "position": one, "last_row": one + rows - 1}
    out.append(prefill.predict(data, state)["logits"][0, 0])
    for at in (rows, rows + 1):
        data = {
            "inputs_embeds": embeds[:, at : at + 1],
            "attention_mask": mask[:, :, at : at + 1],
            "position": one + at,
        }
        out.append(decode.predict(data, state)["logits"][0, 0])
    return np.stack(out)


def test_updates_of_the_cache_happen_in_place_and_mean_the_same(tiny_ios_bundle: Path) -> None:
    package = load_package(decoder(tiny_ios_bundle))
    function = package.function("decode")
    updates = {i for i, op in enumerate(function.function.operations) if op.kind == "slice_update"}
    assert function._in_place == updates  # noqa: SLF001
    fast = feed(package)
    slow = load_package(decoder(tiny_ios_bundle), resident_bytes=0)
    make = slow.function

    def copying(name: str | None = None, *, half: bool = True) -> Any:
        made = make(name, half=half)
        made._in_place = frozenset()  # noqa: SLF001
        return made

    slow.function = copying  # type: ignore[method-assign]
    assert np.array_equal(fast, feed(slow))


def test_weights_that_were_forgotten_are_made_again(tiny_ios_bundle: Path) -> None:
    package = load_package(decoder(tiny_ios_bundle))
    before, room = feed(package), package._room  # noqa: SLF001
    package.forget()
    assert package._room > room  # noqa: SLF001
    assert np.array_equal(feed(package), before)
    assert package._room == room  # noqa: SLF001


def test_half_mode_rounds_and_ideal_mode_does_not(tiny_ios_bundle: Path) -> None:
    package = load_package(decoder(tiny_ios_bundle))
    half, ideal = feed(package), feed(package, half=False)
    assert np.array_equal(half, half.astype(np.float16).astype(np.float32))
    assert not np.array_equal(ideal, ideal.astype(np.float16).astype(np.float32))
    assert 1e-5 < np.linalg.norm(half - ideal) / np.linalg.norm(ideal) < 0.02


def test_magnitudes_and_infinities_are_reported(tiny_ios_bundle: Path) -> None:
    package = load_package(tiny_ios_bundle / "coreml" / "VisionEncoder.mlpackage")
    function = package.function()
    function.watch = dict[str, Magnitude]()
    (shape,) = (kind.shape for kind in function.function.inputs.values())
    function.predict({"pixel_values": np.ones(shape, np.float32)})
    assert all(seen.finite and 0 <= seen.largest < 1000 for seen in function.watch.values())
    assert {seen.kind for seen in function.watch.values()} >= {"linear", "conv", "layer_norm", "gelu", "add"}
    function.predict({"pixel_values": np.full(shape, 6e4, np.float32)})
    assert any(not seen.finite for seen in function.watch.values())


# ---- mutations


@pytest.fixture
def mutable(tiny_ios_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(decoder(tiny_ios_bundle), tmp_path / "Decoder.mlpackage")


def edit(package: Path, change: Callable[[Any, Any], None]) -> None:
    """Changes the decode function's block of a package: change(model, block)."""
    model = proto.Model_pb2.Model()
    model.ParseFromString((package / MODEL).read_bytes())
    change(model, model.mlProgram.functions["decode"].block_specializations["CoreML8"])
    (package / MODEL).write_bytes(model.SerializeToString(deterministic=True))


def weights_of(block: Any, index: int) -> Any:
    return [op for op in block.operations if op.type == DEQUANTIZE][index]


def blob_of(operation: Any, key: str) -> Any:
    return operation.inputs[key].arguments[0].value.blobFileValue


def test_a_flipped_bit_of_an_integer_changes_the_logits(tiny_ios_bundle: Path, mutable: Path) -> None:
    before = feed(load_package(mutable), half=False)
    blob = next(b for b in read_blobs(mutable / WEIGHTS).values() if b.type == "uint4" and b.values > 4000)
    content = bytearray((mutable / WEIGHTS).read_bytes())
    content[blob.offset + 7] ^= 0x80
    (mutable / WEIGHTS).write_bytes(content)
    after = feed(load_package(mutable), half=False)
    assert np.linalg.norm(after - before) > 1e-4 * np.linalg.norm(before)


def another_layers_scale(_: Any, block: Any) -> None:
    one, other = (blob_of(weights_of(block, i), "scale") for i in (0, 5))  # q, k, v of layers 0 and 1
    one.offset = other.offset


def dropped_write(_: Any, block: Any) -> None:
    block.operations.remove(next(op for op in block.operations if op.type == "write_state"))


def test_another_layers_scale_changes_the_logits(mutable: Path) -> None:
    before = feed(load_package(mutable), half=False)
    edit(mutable, another_layers_scale)
    # prefill still uses it, so that every blob has its reader: only the numbers tell
    after = feed(load_package(mutable), half=False)
    assert np.array_equal(after[0], before[0])
    assert np.linalg.norm(after[1:] - before[1:]) > 1e-2 * np.linalg.norm(before[1:])


def test_a_dropped_write_state_is_seen_in_the_tokens_that_follow(mutable: Path) -> None:
    before = feed(load_package(mutable), half=False)
    edit(mutable, dropped_write)
    after = feed(load_package(mutable), half=False)
    assert np.linalg.norm(after[1:] - before[1:]) > 1e-3 * np.linalg.norm(before[1:])


def test_a_stale_read_of_the_cache_is_not_hidden_by_updates_in_place(mutable: Path) -> None:
    before = feed(load_package(mutable), half=False)
    edit(mutable, stale_read)
    package = load_package(mutable)
    after = feed(package, half=False)
    assert np.linalg.norm(after[1:] - before[1:]) > 1e-3 * np.linalg.norm(before[1:])


def operation(block: Any, kind: str) -> Any:
    return next(op for op in block.operations if op.type == kind)


def wrong_shape(_: Any, block: Any) -> None:
    """A select (slice_by_size) that declares another shape than it gives: the silent fault of flexible masks."""
    operation(block, "slice_by_size").outputs[0].type.tensorType.dimensions[0].constant.size = 3


def wrong_type(_: Any, block: Any) -> None:
    for op in block.operations:
        if op.type == "add" and op.outputs[0].type.tensorType.dataType == proto.MIL_pb2.DataType.FLOAT16:
            op.outputs[0].type.tensorType.dataType = proto.MIL_pb2.DataType.FLOAT32


def float_of_an_integer(_: Any, block: Any) -> None:
    operation(block, "add").outputs[0].type.tensorType.dataType = proto.MIL_pb2.DataType.FLOAT16


def no_cast(_: Any, block: Any) -> None:
    for op in [op for op in block.operations if op.type == "cast"]:
        for other in block.operations:
            for argument in other.inputs.values():
                for binding in argument.arguments:
                    if binding.name == op.outputs[0].name:
                        binding.name = op.inputs["x"].arguments[0].name
        block.operations.remove(op)


def cast_to_another_type(_: Any, block: Any) -> None:
    operation(block, "cast").outputs[0].type.tensorType.dataType = proto.MIL_pb2.DataType.FLOAT32


def constant_of_another_type(_: Any, block: Any) -> None:
    chosen = next(
        op for op in block.operations if op.type == "const" and op.outputs[0].name == "text_model_norm_weight"
    )
    chosen.outputs[0].type.tensorType.dataType = proto.MIL_pb2.DataType.FLOAT32


def state_of_another_type(_: Any, block: Any) -> None:
    operation(block, "read_state").outputs[0].type.tensorType.dataType = proto.MIL_pb2.DataType.FLOAT32


def missing_input(_: Any, block: Any) -> None:
    del operation(block, "slice_update").inputs["begin"]


def unknown_input(_: Any, block: Any) -> None:
    operation(block, "silu").inputs["alpha"].CopyFrom(operation(block, "silu").inputs["x"])


def state_as_a_value(_: Any, block: Any) -> None:
    operation(block, "silu").inputs["x"].arguments[0].name = "key_cache"


def older_specification(model: Any, _: Any) -> None:
    model.specificationVersion = 8


def flexible_input(model: Any, _: Any) -> None:
    model.description.functions[0].input[0].type.multiArrayType.shapeRange.sizeRanges.add(lowerBound=1, upperBound=9)


def absurd_shape(_: Any, block: Any) -> None:
    for dimension in operation(block, "linear").outputs[0].type.tensorType.dimensions:
        dimension.constant.size = 1 << 40


def stale_read(_: Any, block: Any) -> None:
    cuts = [op for op in block.operations if op.type == "slice_by_size"]
    cuts = [op for op in cuts if "coreml_update" in op.inputs["x"].arguments[0].name]
    cuts[2].inputs["x"].arguments[0].name = cuts[0].inputs["x"].arguments[0].name


def unknown_operation(_: Any, block: Any) -> None:
    operation(block, "silu").type = "swish"


def from_nowhere(_: Any, block: Any) -> None:
    operation(block, "silu").inputs["x"].arguments[0].name = "nothing"


def twice(_: Any, block: Any) -> None:
    operation(block, "silu").outputs[0].name = "position"


def no_state(_: Any, block: Any) -> None:
    operation(block, "read_state").inputs["input"].arguments[0].name = "position"


def no_output(_: Any, block: Any) -> None:
    block.outputs[0] = "lost"


def described_otherwise(model: Any, _: Any) -> None:
    model.description.functions[0].input[0].type.multiArrayType.shape[1] += 1


def no_blob(_: Any, block: Any) -> None:
    blob_of(weights_of(block, 0), "data").offset += 64


def blob_of_another_type(_: Any, block: Any) -> None:
    blob_of(weights_of(block, 0), "data").offset = blob_of(weights_of(block, 0), "scale").offset


def scales_that_do_not_divide(_: Any, block: Any) -> None:
    weights = weights_of(block, 0)
    for key, other in (("scale", weights_of(block, 3)), ("offset", weights_of(block, 3))):
        weights.inputs[key].CopyFrom(other.inputs[key])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong_type, r"add add_\d+: takes fp16 .* declares fp32"),
        (float_of_an_integer, r"add add_0: takes int32 \[1\], int32 \[1\], declares fp16"),
        (no_cast, r"mul mul_\d+: takes fp16 .*, fp32 .*, declares fp16"),
        (cast_to_another_type, "cast cast_0: casts to fp16, declares fp32"),
        (constant_of_another_type, "const text_model_norm_weight: declares"),
        (state_of_another_type, r"read_state read_state_0: fp32 .* for a state of fp16"),
        (missing_input, "slice_update_0: lacks its input begin"),
        (unknown_input, "silu silu_0: has an unknown input alpha"),
        (state_as_a_value, "its input x is key_cache, which nothing before it gives"),
        (older_specification, "specification 8, want 9"),
        (flexible_input, "feature inputs_embeds is optional, of flexible shape"),
        (absurd_shape, "want at most 5 sizes"),
        (unknown_operation, "swish silu_0: an operation that is not supported"),
        (from_nowhere, "its input x is nothing, which nothing before it gives"),
        (twice, "gives position, which exists already"),
        (no_state, "its input is no state"),
        (no_output, "lost"),
        (described_otherwise, "describes inputs"),
        (no_blob, "where no blob is"),
        (blob_of_another_type, "its blob holds"),
        (scales_that_do_not_divide, "with scale"),
        (wrong_shape, r"slice_by_size slice_by_size_0: gives float32 \[1, 16\], declares fp32 \[3, 16\]"),
    ],
)
def test_a_program_that_lies_is_caught(change: Callable[[Any, Any], None], message: str, mutable: Path) -> None:
    edit(mutable, change)
    with pytest.raises(ProgramError, match=message) as refused:
        feed(load_package(mutable))
    assert "Decoder.mlpackage" in str(refused.value)


def test_a_truncated_weight_file_is_caught(mutable: Path) -> None:
    content = (mutable / WEIGHTS).read_bytes()
    for length in (0, 70, len(content) // 2, len(content) - 1):
        (mutable / WEIGHTS).write_bytes(content[:length])
        with pytest.raises(BlobError, match="truncated"):
            load_package(mutable)


def test_a_blob_that_nothing_uses_is_caught(mutable: Path) -> None:
    def unused(model: Any, _: Any) -> None:
        for name in ("prefill", "decode"):
            block = model.mlProgram.functions[name].block_specializations["CoreML8"]
            another_layers_scale(model, block)

    edit(mutable, unused)
    with pytest.raises(ProgramError, match="no operation uses the blobs"):
        load_package(mutable)


def test_blobs_that_no_call_has_read_are_known(tiny_ios_bundle: Path) -> None:
    package = load_package(decoder(tiny_ios_bundle))
    assert len(package.unread) == len(read_blobs(decoder(tiny_ios_bundle) / WEIGHTS))
    feed(package)
    assert package.unread == set()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("rootModelIdentifier"),
        lambda m: m.update(rootModelIdentifier="none"),
        lambda m: m.update(itemInfoEntries=[]),
        lambda m: [item.update(path="../model.mlmodel") for item in m["itemInfoEntries"].values()],
        lambda m: [item.update(path=3) for item in m["itemInfoEntries"].values()],
        lambda m: [item.update(path="com.apple.CoreML/other.mlmodel") for item in m["itemInfoEntries"].values()],
        lambda m: [item.update(path="com.apple.CoreML/\0") for item in m["itemInfoEntries"].values()],
    ],
)
def test_a_broken_manifest_is_refused_by_name(change: Callable[[Any], None], mutable: Path) -> None:
    manifest = json.loads((mutable / "Manifest.json").read_text())
    change(manifest)
    (mutable / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ProgramError, match=r"Manifest\.json"):
        load_package(mutable)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_changed_program_runs_or_is_refused_but_never_crashes(
    tiny_ios_bundle: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Inputs and results removed, exchanged with others, replaced by texts and by huge or negative numbers."""
    package = shutil.copytree(decoder(tiny_ios_bundle), tmp_path_factory.mktemp("changed") / "Decoder.mlpackage")
    strange = data.draw(st.sampled_from(["remove", "rename", "number", "drop", "shape"]))

    def change(_: Any, block: Any) -> None:
        kinds = sorted({op.type for op in block.operations})
        kind = data.draw(st.sampled_from([k for k in kinds if (k == "const") == (strange == "number")]))
        chosen = data.draw(st.sampled_from([op for op in block.operations if op.type == kind][:8]))
        keys = sorted(chosen.inputs)
        match strange:
            case "remove":
                del chosen.inputs[data.draw(st.sampled_from(keys))]
            case "rename":
                names = [op.outputs[0].name for op in block.operations[:200] if op.outputs]
                binding = chosen.inputs[data.draw(st.sampled_from(keys))].arguments[0]
                binding.name = data.draw(st.sampled_from(names))
            case "number":
                tensor = chosen.attributes["val"].immediateValue.tensor
                if tensor.ints.values:
                    tensor.ints.values[0] = data.draw(st.sampled_from([-(2**31), -1, 0, 7, 2**31 - 1]))
                elif tensor.strings.values:
                    tensor.strings.values[0] = data.draw(st.sampled_from(["", "fp64", "x" * 99]))
            case "drop":
                block.operations.remove(chosen)
            case "shape":
                if chosen.outputs and chosen.outputs[0].type.tensorType.dimensions:
                    size = data.draw(st.sampled_from([0, 1, 3, 2**31 - 1, 2**63]))
                    chosen.outputs[0].type.tensorType.dimensions[0].constant.size = size

    edit(package, change)
    with contextlib.suppress(ProgramError, BlobError):
        feed(load_package(package))
    shutil.rmtree(package)


def test_inputs_that_a_function_does_not_take_are_refused(tiny_ios_bundle: Path) -> None:
    package = load_package(decoder(tiny_ios_bundle))
    function = package.function("decode")
    data = {
        name: np.zeros(kind.shape, np.int32 if kind.dtype == "int32" else np.float32)
        for name, kind in function.function.inputs.items()
    }
    state = function.make_state()
    function.predict(data, state)
    for wrong, message in (
        ({k: v for k, v in data.items() if k != "position"}, "got inputs"),
        (data | {"position": np.zeros(2, np.int32)}, "input position is int32"),
        (data | {"position": np.zeros(1, np.float32)}, "input position is float32"),
        (data | {"inputs_embeds": np.zeros((1, 2, 64), np.float32)}, "input inputs_embeds"),
    ):
        with pytest.raises(ProgramError, match=message):
            function.predict(wrong, state)
    with pytest.raises(ProgramError, match="needs a state"):
        function.predict(data)
    # beyond the cache, where Core ML would not clamp either
    with pytest.raises(ProgramError, match="rows"):
        function.predict(data | {"position": np.array([256], np.int32)}, state)
    with pytest.raises(ProgramError, match="no function missing"):
        package.function("missing")
