"""Core ML bundles: every member of the family and every recipe; the integers of ONNX; the cache; planted faults."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from export.android import export_android
from export.onnx_graphs import GRAPHS, twin_graph
from export.onnx_ops import stored_index
from export.prove import ProofError, prove
from export.spec import CheckpointError, read_spec
from export.weights import open_weights
from quantize.int4 import unpack
from quantize.recipe import SHIPPED, Scheme, load_recipe
from runtimes.blobfile import read_blob, read_blobs
from runtimes.bundle import Bundle, read_bundle, write_manifest
from runtimes.coreml import CoreMLRunner, Executed
from runtimes.manifest import BundleError
from runtimes.mil import load_package
from runtimes.mil_package import DEQUANTIZE
from runtimes.milproto import Value
from runtimes.ort import OrtRunner
from runtimes.runner import InputError, Runner
from runtimes.tensorfile import read_header, read_tensor
from runtimes.verify import relative_error, verify
from tests.checkpoints import make_checkpoint
from tests.conftest import LOOSE, ROOT
from tests.test_android import FAMILY

coremltools = pytest.importorskip("coremltools")
from coremltools.converters.mil.mil import Builder as mb  # noqa: E402, N813
from coremltools.converters.mil.mil import Function, types  # noqa: E402

import export.coreml_packages  # noqa: E402
from export.coreml_ops import MilOps, WeightFile, build_program, identifier, save_program  # noqa: E402
from export.ios import NOTES, export_ios  # noqa: E402

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
SMALL: dict[str, Any] = {"context": 256, "chunk": 16}


def ideal(bundle: Path | Bundle) -> CoreMLRunner:
    read = bundle if isinstance(bundle, Bundle) else read_bundle(bundle, allow_pending=True)
    return CoreMLRunner(read, load=Executed(half=False))


def logits_of(runner: Runner, ids: Sequence[int], pieces: Sequence[int], keep: int = 1) -> Any:
    """Logits after each piece of the tokens."""
    cache, at, rows = runner.new_cache(), 0, []
    for size in pieces:
        rows.append(runner.extend(cache, list(ids[at : at + size]), keep=keep))
        at += size
    return np.concatenate(rows)


# ---- what is exported


@pytest.mark.parametrize("name", [*FAMILY, "narrow heads"])
def test_a_member_of_the_family_exports_with_rounding_noise_only(name: str, tmp_path: Path) -> None:
    traits = FAMILY.get(name, {"hidden": 72, "heads": 3, "kv_heads": 3, "head_dim": 24})
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **traits)
    done = export_ios(str(checkpoint), tmp_path / "bundle", LOOSE, **SMALL)
    assert done.report is not None
    error = done.report["export_error"]
    assert error["features_error"] < 1e-5
    assert error["logits_error"] < 1e-5
    assert error["tokens_equal"] + error["ties"] == error["tokens"] == 32
    half = done.report["activation_error"]
    assert 1e-5 < half["features_error"] < 0.01
    assert 1e-5 < half["logits_error"] < 0.01
    rounding = done.report["constants_error"]
    # fp32 norms and biases lose something in fp16, bf16 ones next to nothing; neither is part of the export error
    lossy = traits.get("dtype") == "float32"
    assert (rounding["logits_error"] > 2e-5) == lossy


@pytest.mark.parametrize("recipe", SHIPPED)
def test_every_shipped_recipe_exports(recipe: str, tiny_checkpoint: Path, calibration: Path, tmp_path: Path) -> None:
    bundle = export_ios(
        str(tiny_checkpoint), tmp_path / "ios", recipe, **SMALL, with_proof=False, calibration=calibration
    ).bundle
    android = export_android(
        str(tiny_checkpoint), tmp_path / "android", recipe, with_proof=False, calibration=calibration
    ).bundle
    used = read_bundle(bundle, allow_pending=True).manifest.recipe.tensors
    assert used == read_bundle(android, allow_pending=True).manifest.recipe.tensors
    assert_same_integers(android, bundle)
    ids = np.random.default_rng(0).integers(50, 300, 40).tolist()
    runner = ideal(bundle)
    found = runner.extend(runner.new_cache(), ids)
    onnx = twin(android, tiny_checkpoint, recipe)
    wanted = onnx.extend(onnx.new_cache(), ids)
    assert relative_error(found, wanted) < (1e-3 if recipe == "fp32" else 1e-5)  # its matrices are fp16 in Core ML


def twin(android: Path, checkpoint: Path, recipe: str) -> OrtRunner:
    spec, bundle = read_spec(checkpoint), read_bundle(android, allow_pending=True)
    weights, rules = open_weights(checkpoint, spec), load_recipe(recipe)
    graphs = {g: twin_graph(g, android / "onnx", spec, weights, rules) for g in GRAPHS}
    return OrtRunner(bundle, graphs=graphs)


def onnx_tensor(path: Path, name: str) -> Any:
    stored = stored_index(path)[name]
    with path.with_name(path.name + "_data").open("rb") as file:
        raw = np.fromfile(file, np.uint8, stored.length, offset=stored.offset)
    return raw.view({1: np.float32, 2: np.uint8, 3: np.int8}[stored.dtype.value]).reshape(stored.shape)


def assert_same_integers(android: Path, ios: Path) -> None:
    """Every quantized tensor: integers byte for byte, scales and zero points value for value."""
    stored: dict[str, tuple[Any, ...]] = {}
    for package in ("VisionEncoder.mlpackage", "Decoder.mlpackage"):
        loaded = load_package(ios / "coreml" / package)
        weights, blobs = ios / "coreml" / package / WEIGHTS, read_blobs(ios / "coreml" / package / WEIGHTS)
        for function in loaded.model.functions.values():
            for op in function.operations:
                if op.kind == DEQUANTIZE:
                    values = {k: b for k, (b,) in op.inputs.items() if isinstance(b, Value)}
                    arrays = {k: read_blob(weights, blobs[v.blob or 0], v.type.shape) for k, v in values.items()}
                    stored[op.name] = (arrays["data"], arrays["scale"], arrays.get("offset"))
    used = read_bundle(android, allow_pending=True).manifest.recipe.tensors
    compared = set()
    for graph in (android / "onnx").glob("*.onnx"):
        if graph.name.startswith("embed_tokens"):
            continue
        for name in stored_index(graph):
            if not name.endswith(".q"):
                continue
            title = name.removesuffix(".q")
            data, scale, offset = stored[identifier(title)]
            n, k = data.shape
            q, scales = onnx_tensor(graph, name), onnx_tensor(graph, f"{title}.scales")
            if q.dtype == np.int8:  # one scale a channel, [K, N]
                assert data.dtype == np.int8
                assert np.array_equal(q.T, data)
                assert np.array_equal(scales, scale[:, 0].astype(np.float32))
                assert offset is None
            else:
                bits = used[title.split("+")[0]]["bits"]  # fused matrices share a scheme
                zeros = onnx_tensor(graph, f"{title}.zeros")
                assert np.array_equal(unpack(q.reshape(n, -1), bits)[:, :k], data)
                step = k // scale.shape[1]  # of Core ML's blocks; where 32 does not divide k, ONNX's repeated
                block = q.shape[2] * 8 // bits
                assert block % step == 0
                at = np.arange(scale.shape[1]) * step // block
                assert np.array_equal(scales[:, at], scale.astype(np.float32))
                assert np.array_equal(unpack(zeros, bits)[:, : scales.shape[1]][:, at], offset)
            compared.add(identifier(title))
    assert compared == set(stored)
    table = {
        name: read_tensor(ios / "coreml" / "embed_tokens.safetensors", info)
        for name, info in read_header(ios / "coreml" / "embed_tokens.safetensors").items()
    }
    (graph,) = (android / "onnx").glob("embed_tokens*.onnx")
    title = "model.text_model.embed_tokens.weight"
    if "q" in table:
        assert np.array_equal(onnx_tensor(graph, f"{title}.q"), table["q"])
        assert np.array_equal(onnx_tensor(graph, f"{title}.scales"), table["scales"].astype(np.float32))
        bits = 4 if table["q"].shape[1] < read_hidden(ios) else 8
        zeros = unpack(onnx_tensor(graph, f"{title}.zeros"), bits)
        assert np.array_equal(zeros[:, : table["zeros"].shape[1]], table["zeros"])
    else:
        assert np.array_equal(onnx_tensor(graph, title).astype(np.float16), table["weight"])


def read_hidden(bundle: Path) -> int:
    return read_bundle(bundle, allow_pending=True).manifest.text.hidden


def test_the_integers_are_those_of_the_onnx_bundle(
    tiny_bundle: Path, tiny_ios_bundle: Path, demo_bundle: Path, demo_ios_bundle: Path
) -> None:
    assert_same_integers(tiny_bundle, tiny_ios_bundle)
    assert_same_integers(demo_bundle, demo_ios_bundle)


def test_a_changed_integer_is_seen_by_that_comparison(tiny_bundle: Path, tiny_ios_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_ios_bundle, tmp_path / "ios")
    flip(folder / "coreml" / "Decoder.mlpackage")
    with pytest.raises(AssertionError):
        assert_same_integers(tiny_bundle, folder)


def test_the_same_inputs_give_the_same_bytes_in_another_process(
    tiny_checkpoint: Path, tiny_ios_bundle: Path, tmp_path: Path
) -> None:
    script = f"""
from pathlib import Path
from export.ios import export_ios
for name, context in (("other", 128), ("again", 256)):  # what was built before must not matter
    out = Path({str(tmp_path)!r}) / name
    export_ios({str(tiny_checkpoint)!r}, out, {LOOSE!r}, context=context, chunk=16, with_proof=False)
"""
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, env=env)
    files = [p.relative_to(tiny_ios_bundle) for p in (tiny_ios_bundle / "coreml").rglob("*") if p.is_file()]
    assert len(files) == 7
    for path in files:
        assert (tiny_ios_bundle / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path
    digests = [
        read_bundle(b, allow_pending=True).manifest.payload_digest for b in (tiny_ios_bundle, tmp_path / "again")
    ]
    assert digests[0] == digests[1]


def test_coremltools_opens_the_packages(tiny_ios_bundle: Path) -> None:
    from coremltools.converters.mil.frontend.milproto.load import load as load_milproto

    for package, functions in (("VisionEncoder", {"main"}), ("Decoder", {"prefill", "decode"})):
        folder = tiny_ios_bundle / "coreml" / f"{package}.mlpackage"
        assert coremltools.libmodelpackage.ModelPackage.isValid(str(folder))
        spec = coremltools.utils.load_spec(str(folder))
        assert spec.specificationVersion == 9
        weights = str(folder / "Data" / "com.apple.CoreML" / "weights")
        program = load_milproto(spec, specification_version=9, file_weights_dir=weights)
        assert set(program.functions) == functions


def test_the_manifest_says_what_runs_it_and_what_was_not_shown(tiny_ios_bundle: Path) -> None:
    manifest = read_bundle(tiny_ios_bundle).manifest
    assert (manifest.target, manifest.engine.name, manifest.engine.least) == ("coreml", "coreml", "iOS 18, macOS 15")
    assert manifest.text.context == 256
    assert manifest.notes == NOTES
    assert any("Apple's runtime has not run this bundle" in note for note in manifest.notes)
    assert any("Neural Engine" in note for note in manifest.notes)
    assert {row.context for row in manifest.memory} == {256}


# ---- the demo checkpoint


def test_the_demo_bundle_is_proven_and_answers(demo_ios_bundle: Path, demo_checkpoint: Path) -> None:
    report = json.loads((demo_ios_bundle / "report.json").read_text())
    assert max(report["export_error"][part] for part in ("features_error", "logits_error")) < 1e-5
    assert max(report["activation_error"][part] for part in ("features_error", "logits_error")) < 5e-3
    assert report["quantization_loss"]["exact"]["all"]["bundle"] >= 0.9
    span = report["fp16_range"]
    assert 1 < span["largest"] < 1000
    assert span["largest"] == max(span["largest_by_kind"].values())
    assert span["operation"].startswith(("Decoder.mlpackage: function ", "VisionEncoder.mlpackage: function "))
    assert f"The largest value was {span['largest']:.4g}" in (demo_ios_bundle / "report.md").read_text()
    assert verify(read_bundle(demo_ios_bundle)).passed


def test_a_model_whose_activations_leave_fp16_is_no_bundle(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dtype="float32")
    path = checkpoint / "model.safetensors"
    tensors = {k: v.copy() for k, v in load_file(path).items()}
    tensors["model.text_model.layers.0.mlp.down_proj.weight"] *= 1e5
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ProofError, match=r"\.mlpackage: function .* is not finite"):
        export_ios(str(checkpoint), tmp_path / "bundle", LOOSE, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_ideal_mode_is_the_onnx_twin_to_rounding_noise(
    demo_bundle: Path, demo_ios_bundle: Path, demo_checkpoint: Path, tmp_path: Path
) -> None:
    fp16 = make_checkpoint(tmp_path / "fp16", dtype="float16")  # all of its constants are exact in Core ML
    android = export_android(str(fp16), tmp_path / "android", LOOSE, with_proof=False).bundle
    ios = export_ios(str(fp16), tmp_path / "ios", LOOSE, **SMALL, with_proof=False).bundle
    pairs = ((android, ios, fp16, LOOSE), (demo_bundle, demo_ios_bundle, demo_checkpoint, "int4"))
    for onnx_bundle, ios_bundle, checkpoint, recipe in pairs:
        ours, theirs = ideal(ios_bundle), twin(onnx_bundle, checkpoint, recipe)
        side, random = ours.settings.tile_size, np.random.default_rng(1)
        pixels = random.uniform(-1, 1, (2, 3, side, side)).astype(np.float32)
        features = theirs.encode_image(pixels)
        assert relative_error(ours.encode_image(pixels), features) < 1e-5
        image = [ours.settings.image_id] * ours.settings.seq_len
        ids = [1, 60, *image, *random.integers(50, 300, 30).tolist()]
        first, second = ours.new_cache(), theirs.new_cache()
        assert relative_error(ours.extend(first, ids, features[0]), theirs.extend(second, ids, features[0])) < 1e-5
        for token in (70, 71, 72):
            assert relative_error(ours.extend(first, [token]), theirs.extend(second, [token])) < 1e-5


# ---- the cache


def test_chunks_then_tokens_equal_one_long_prefill(
    tiny_checkpoint: Path, tiny_ios_bundle: Path, tmp_path: Path
) -> None:
    long = export_ios(str(tiny_checkpoint), tmp_path / "long", LOOSE, context=256, chunk=128, with_proof=False).bundle
    ids = np.random.default_rng(0).integers(50, 300, 128).tolist()
    whole = logits_of(ideal(long), ids, [128])
    short = ideal(tiny_ios_bundle)
    assert short.chunk == 16
    for pieces in ([128], [16] * 8, [37, 1, 1, 89], [127, 1], [1] * 128):
        assert relative_error(logits_of(short, ids, pieces)[-1:], whole) < 1e-5, pieces
    every = logits_of(ideal(long), ids, [128], keep=0)  # all rows, so one by one
    assert every.shape == (128, short.settings.vocab)
    assert relative_error(logits_of(short, ids, [16] * 8, keep=0), every) < 1e-5


def test_the_whole_cache_can_be_filled_and_no_more(
    tiny_checkpoint: Path, tiny_bundle: Path, tiny_ios_bundle: Path
) -> None:
    runner, reference = ideal(tiny_ios_bundle), twin(tiny_bundle, tiny_checkpoint, LOOSE)
    ids = np.random.default_rng(3).integers(50, 300, 256).tolist()
    for at in (250, 255, 256):  # the last chunk does not fit where the cache ends: its tokens go one by one
        cache, other = runner.new_cache(), reference.new_cache()
        found = runner.extend(cache, ids[:at])
        assert cache.length == at
        assert relative_error(found, reference.extend(other, ids[:at])) < 1e-5
        rest = ids[at:]
        if rest:
            assert relative_error(runner.extend(cache, rest), reference.extend(other, rest)) < 1e-5
        with pytest.raises(InputError, match="do not fit into the context of 256"):
            runner.extend(cache, [60])
        assert cache.length == 256


def test_what_padding_wrote_is_never_seen(tiny_ios_bundle: Path) -> None:
    runner = ideal(tiny_ios_bundle)
    ids = np.random.default_rng(4).integers(50, 300, 60).tolist()
    clean = logits_of(runner, ids, [60])
    cache = runner.new_cache()
    for state in cache.state.values():
        state[:] = 1e4  # what an earlier, longer conversation may have left
    assert np.array_equal(runner.extend(cache, ids), clean)


# ---- the range of fp16


def norm_package(folder: Path, weight: Any, eps: float) -> Any:
    """A package of one RMSNorm over [1, 1, C], loaded."""

    class One:
        def __getitem__(self, name: str) -> Any:
            return weight

        def shape(self, name: str) -> tuple[int, ...]:
            return tuple(weight.shape)

        def rows(self, name: str, start: int, stop: int) -> Any:
            return weight[start:stop]

        def quantized(self, name: str, scheme: Scheme) -> Any:
            raise NotImplementedError

        def input_range(self, name: str) -> tuple[float, float]:
            raise NotImplementedError

    (folder / WEIGHTS).parent.mkdir(parents=True)
    file = WeightFile(folder / WEIGHTS)

    def function() -> Any:
        ops = MilOps(One(), load_recipe("int4"), file)
        inputs = {"x": mb.placeholder(shape=(1, 1, len(weight)), dtype=types.fp16)}
        with Function(inputs, opset_version=coremltools.target.iOS18) as made:
            out = ops.rms_norm(made.inputs["x"], "weight", eps)
            out.name = "y"
            made.set_outputs([out])
        return made

    content = save_program(build_program({"main": function}), file, {"x": "", "y": ""}, "norm")
    file.close()
    (folder / MODEL).write_bytes(content)
    (folder / "Manifest.json").write_bytes(export.coreml_packages._manifest("norm"))  # noqa: SLF001
    return load_package(folder)


@pytest.mark.parametrize("size", [1e-6, 1e-4, 3e-3, 0.1, 1.0, 250.0, 3e4])
def test_the_norm_holds_from_the_smallest_to_the_largest_activations(size: float, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight, eps = random.uniform(0.5, 2, 256).astype(np.float16).astype(np.float32), 1e-5
    x = np.clip(random.standard_normal((1, 1, 256)), -2.1, 2.1).astype(np.float32) * np.float32(size)
    x[0, 0, 7] = 2.1 * size  # an outlier too
    x = x.astype(np.float16).astype(np.float32)
    wide = x.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean() + eps) * weight
    package = norm_package(tmp_path / "Norm.mlpackage", weight, eps)
    found = package.function(half=False).predict({"x": x})["y"]
    assert np.linalg.norm(found - wanted) < 3e-4 * np.linalg.norm(wanted)  # sqrt(eps) is rounded to fp16
    found = package.function(half=True).predict({"x": x})["y"]
    assert np.linalg.norm(found - wanted) < 3e-3 * np.linalg.norm(wanted)
    with np.errstate(over="ignore"):
        plain = (x.astype(np.float16) ** 2).mean(dtype=np.float32)
    assert np.isfinite(plain) == (size < 100)  # the square that this norm avoids


def test_a_model_with_large_activations_stays_finite_and_right(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    path = checkpoint / "model.safetensors"
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = load_torch(path)
    for name in ("model.text_model.embed_tokens.weight", "model.connector.modality_projection.proj.weight"):
        tensors[name] = tensors[name] * 4000  # the residual stream, before the first norm and in all layers
    save_torch(tensors, path, metadata={"format": "pt"})
    done = export_ios(str(checkpoint), tmp_path / "bundle", LOOSE, **SMALL)
    assert done.report is not None
    assert done.report["activation_error"]["logits_error"] < 0.02
    loader = Executed(half=True)
    runner = CoreMLRunner(read_bundle(done.bundle), load=loader)
    (package,) = (p for p in loader.packages.values() if p.folder.name == "Decoder.mlpackage")
    watched = package.function("prefill")
    watched.watch = {}
    runner._prefill = watched  # noqa: SLF001  # the same function, watched
    runner.extend(runner.new_cache(), list(range(50, 90)))
    peaks = {name: seen.largest for name, seen in watched.watch.items() if seen.kind == "add"}
    assert max(peaks.values()) > 1000
    assert all(seen.finite for seen in watched.watch.values())


# ---- planted faults


@pytest.fixture(scope="module")
def pending(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pending") / "bundle"
    return export_ios(str(tiny_checkpoint), out, LOOSE, **SMALL, with_proof=False).bundle


def prove_copy(pending: Path, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Proves `folder`, a changed copy of the pending bundle whose digests are made right again."""
    manifest = read_bundle(pending, allow_pending=True).manifest
    write_manifest(folder, replace(manifest, files=(), payload_digest=""))
    spec = read_spec(checkpoint)
    return prove(folder, checkpoint, spec, open_weights(checkpoint, spec), load_recipe(LOOSE), [])


def edit(package: Path, change: Callable[[Any], None]) -> None:
    """Changes the decode function's block."""
    model = coremltools.proto.Model_pb2.Model()
    model.ParseFromString((package / MODEL).read_bytes())
    change(model.mlProgram.functions["decode"].block_specializations["CoreML8"])
    (package / MODEL).write_bytes(model.SerializeToString(deterministic=True))


def flip(package: Path) -> None:
    """Turns the highest bit of an int4 weight."""
    blob = next(b for b in read_blobs(package / WEIGHTS).values() if b.type == "uint4" and b.values > 4000)
    content = bytearray((package / WEIGHTS).read_bytes())
    content[blob.offset + 7] ^= 0x80
    (package / WEIGHTS).write_bytes(content)


def another_layers_scale(package: Path) -> None:
    def change(block: Any) -> None:
        used = {op.outputs[0].name: op for op in block.operations if op.type == DEQUANTIZE}
        titles = [f"text_model_layers_{i}_mlp_up_proj_weight" for i in (0, 1)]
        one, other = (used[t].inputs["scale"].arguments[0].value.blobFileValue for t in titles)
        one.offset = other.offset

    edit(package, change)


def dropped_write_state(package: Path) -> None:
    edit(package, lambda block: block.operations.remove(next(o for o in block.operations if o.type == "write_state")))


def wrong_select_shape(package: Path) -> None:
    def change(block: Any) -> None:
        chosen = next(op for op in block.operations if op.type == "slice_by_size")
        chosen.outputs[0].type.tensorType.dimensions[0].constant.size = 3

    edit(package, change)


def truncated_weights(package: Path) -> None:
    (package / WEIGHTS).write_bytes((package / WEIGHTS).read_bytes()[:-100])


def stale_read(package: Path) -> None:
    """Layer 1 looks at its keys as they were before this call wrote them."""

    def change(block: Any) -> None:
        cuts = [
            op
            for op in block.operations
            if op.type == "slice_by_size" and "coreml_update" in op.inputs["x"].arguments[0].name
        ]
        cuts[2].inputs["x"].arguments[0].name = cuts[0].inputs["x"].arguments[0].name

    edit(package, change)


NAMED: dict[Callable[[Path], None], str] = {
    flip: r"Decoder\.mlpackage: weight\.bin: model\.text_model\.layers\.\d+\..*\.q",
    another_layers_scale: r"Decoder\.mlpackage: the program",
    dropped_write_state: r"Decoder\.mlpackage: the program",
    stale_read: r"Decoder\.mlpackage: the program",
    wrong_select_shape: r"Decoder\.mlpackage: the program",
    truncated_weights: r"Decoder\.mlpackage: weight\.bin: \w+",
}
FAULTS: dict[Callable[[Path], None], str] = {
    stale_read: "export error: case .* relative error of logits",
    flip: "export error: case .* relative error of logits",
    another_layers_scale: "export error: case .* relative error of logits",
    dropped_write_state: "export error: case .* relative error of logits",
    wrong_select_shape: "declares fp32",
    truncated_weights: "truncated",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_by_the_comparison_of_bytes(
    fault: Callable[[Path], None], pending: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(pending, tmp_path / "bundle")
    fault(folder / "coreml" / "Decoder.mlpackage")
    with pytest.raises(ProofError, match=NAMED[fault]):
        prove_copy(pending, tiny_checkpoint, folder)


@pytest.mark.parametrize("fault", FAULTS)
def test_executing_what_was_saved_alone_sees_a_planted_fault(
    fault: Callable[[Path], None],
    pending: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export.coreml_packages, "check_packages", lambda *_: [])
    folder = shutil.copytree(pending, tmp_path / "bundle")
    fault(folder / "coreml" / "Decoder.mlpackage")
    with pytest.raises((ProofError, BundleError, RuntimeError), match=FAULTS[fault]):
        prove_copy(pending, tiny_checkpoint, folder)


def test_without_a_fault_the_copy_is_proven(pending: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    prove_copy(pending, tiny_checkpoint, shutil.copytree(pending, tmp_path / "bundle"))


def test_a_pending_bundle_is_refused_until_it_is_proven(tiny_checkpoint: Path, pending: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pending, tmp_path / "bundle")
    with pytest.raises(BundleError, match="proof is pending"):
        read_bundle(folder)
    command = [sys.executable, "-m", "export.prove", str(folder), "--model", str(tiny_checkpoint), "--recipe", LOOSE]
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["ok"] is True
    assert verify(read_bundle(folder)).passed


# ---- bad input


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("iOS17", "target is iOS17, want iOS18 or later: states"),
        ("macOS14", "target is macOS14, want macOS15 or later: states"),
        ("tvOS18", "target is 'tvOS18', want iOS18, macOS15"),
        ("iOS", "target is 'iOS'"),
        ("18", "target is '18'"),
    ],
)
def test_an_older_or_unknown_system_is_refused_with_the_reason(
    target: str, message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        export_ios(str(tiny_checkpoint), tmp_path / "bundle", LOOSE, target=target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["iOS18", "iOS26", "macOS15", "macOS26"])
def test_a_newer_system_is_accepted(target: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    export_ios(str(tiny_checkpoint), tmp_path / "bundle", LOOSE, target=target, **SMALL, with_proof=False)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"context": 1}, "context is 1, want 2 to 1024"),
        ({"context": 1025}, "context is 1025, want 2 to 1024, the model's positions"),
        ({"context": 64, "chunk": 65}, "chunk is 65, want 2 to 64"),
        ({"chunk": 1}, "chunk is 1, want 2 to 1024"),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    sizes: dict[str, Any], message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        export_ios(str(tiny_checkpoint), tmp_path / "bundle", LOOSE, **sizes)
    assert list(tmp_path.iterdir()) == []


def test_a_context_without_room_for_the_golden_cases_is_an_error(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="do not fit into the context of 24"):
        export_ios(str(tiny_checkpoint), tmp_path / "bundle", LOOSE, context=24)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_and_untouched(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(BundleError, match="exists already"):
        export_ios(str(tiny_checkpoint), tmp_path / "out", LOOSE)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.text_model.layers.1.mlp.down_proj.weight", np.nan, "want finite numbers"),
        ("model.text_model.layers.1.post_attention_layernorm.weight", 1e5, "1e+05, beyond fp16's 65504"),
        ("model.vision_model.encoder.layers.0.mlp.fc1.bias", -7e4, "7e+04, beyond fp16's 65504"),
        ("model.text_model.layers.1.mlp.down_proj.weight", 1e8, "a block needs the scale"),
        ("model.vision_model.encoder.layers.1.mlp.fc2.weight", 1e8, "a channel needs the scale"),
    ],
)
def test_a_weight_that_core_ml_cannot_hold_is_named_and_nothing_is_left(
    name: str, value: float, message: str, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dtype="float32")
    path = checkpoint / "model.safetensors"
    tensors = {k: v.copy() for k, v in load_file(path).items()}
    tensors[name].reshape(-1)[3] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as refused:
        export_ios(str(checkpoint), tmp_path / "bundle", LOOSE)
    assert name in str(refused.value)
    assert message in str(refused.value)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_an_epsilon_that_fp16_cannot_hold_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    config["vision_config"]["layer_norm_eps"] = 1e-9
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layer_norm1 is 1e-09, which fp16 holds as 0: too small"):
        export_ios(str(checkpoint), tmp_path / "bundle", LOOSE)


def test_a_proof_with_a_model_of_fewer_positions_is_refused(pending: Path, tmp_path: Path) -> None:
    shorter = make_checkpoint(tmp_path / "shorter", max_positions=128)
    with pytest.raises(BundleError, match=r"text\.context is 256, the model has 128 positions"):
        prove_copy(pending, shorter, shutil.copytree(pending, tmp_path / "bundle"))


def test_both_functions_of_the_decoder_share_every_weight(tiny_ios_bundle: Path) -> None:
    functions = load_package(tiny_ios_bundle / "coreml" / "Decoder.mlpackage").model.functions

    def blobs(name: str) -> dict[tuple[str, str], int]:
        found = {}
        for op in functions[name].operations:
            values = {key: bound[0] for key, bound in op.inputs.items()} | {"val": op.value}
            for key, value in values.items():
                if isinstance(value, Value) and value.blob is not None:
                    found[op.name, key] = value.blob
        return found

    assert blobs("prefill") == blobs("decode")
    assert len(blobs("decode")) > 30


def test_without_coremltools_the_remedy_is_named(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    for module in ("export.coreml_ops", "export.coreml_packages"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr(export, "coreml_packages")
    with pytest.raises(CheckpointError, match=r"need coremltools: pip install"):
        export_ios(str(tiny_checkpoint), tmp_path / "bundle", LOOSE)
    assert list(tmp_path.iterdir()) == []


def test_an_embedding_in_columns_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    rules = 'match = "*embed_tokens.weight"\nformat = "column"\nreduced_range = false\n\n[[rule]]\n'
    recipe.write_text(Path(LOOSE).read_text().replace("[[rule]]\n", f"[[rule]]\n{rules}", 1))
    with pytest.raises(CheckpointError, match="is in format column, an embedding wants float or block"):
        export_ios(str(tiny_checkpoint), tmp_path / "bundle", str(recipe))


def test_the_command_fails_with_one_clear_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "export.ios", "--model", str(tmp_path), "--out", str(tmp_path / "b"), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert "config.json" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["ok"] is False
    assert not (tmp_path / "b").exists()


@pytest.mark.full_size
def test_the_2b_exports_and_executes_as_its_onnx_twin(tmp_path: Path) -> None:
    from benchmarks.coreml_full_size import main

    sys.argv = ["coreml_full_size", "--out", str(tmp_path / "row.jsonl")]
    assert main() == 0
