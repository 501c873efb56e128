"""The runner over Core ML packages: what it feeds, call by call; and Core ML itself, played by the executor."""

import json
import platform
import shutil
import sys
import threading
import types
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.ask import ask
from runtimes.bundle import read_bundle, write_manifest
from runtimes.coreml import (
    MASKED,
    CoreMLRunner,
    EmbeddingTable,
    Executed,
    Model,
    default_loader,
    native,
)
from runtimes.manifest import BundleError
from runtimes.ort import OrtRunner
from runtimes.runner import Cancelled, EngineError, InputError, open_runner
from runtimes.tensorfile import write_tensors
from runtimes.verify import main as verify_main
from runtimes.verify import verify

HIDDEN, CONTEXT, CHUNK = 64, 256, 16


class Recorder:
    """A loader whose models write down what they are given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._executed = Executed(half=False)

    def __call__(self, folder: Path, function: str | None) -> Model:
        inner, calls, name = self._executed(folder, function), self.calls, function or folder.stem

        class Recording:
            def predict(self, data: Mapping[str, Any], state: Any = None) -> Mapping[str, Any]:
                calls.append((name, {key: np.array(value) for key, value in data.items()}))
                return inner.predict(data, state)

            def make_state(self) -> Any:
                return inner.make_state()

        return Recording()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def runner(tiny_ios_bundle: Path, recorder: Recorder) -> CoreMLRunner:
    return CoreMLRunner(read_bundle(tiny_ios_bundle), load=recorder)


def test_tokens_are_cut_into_chunks_and_the_last_one_is_padded(runner: CoreMLRunner, recorder: Recorder) -> None:
    ids = list(range(50, 87))
    cache = runner.new_cache()
    runner.extend(cache, ids)
    runner.extend(cache, [90])
    assert [name for name, _ in recorder.calls] == ["prefill", "prefill", "prefill", "decode"]
    for number, (name, data) in enumerate(recorder.calls):
        size = CHUNK if name == "prefill" else 1
        position = [0, 16, 32, 37][number]
        assert data["inputs_embeds"].shape == (1, size, HIDDEN)
        assert data["position"].tolist() == [position]
        assert data["position"].dtype == np.int32
        mask = data["attention_mask"]
        assert mask.shape == (1, 1, size, CONTEXT)
        for row in range(size):
            assert set(mask[0, 0, row, : position + row + 1].tolist()) == {0}
            assert set(mask[0, 0, row, position + row + 1 :].tolist()) == {MASKED}
    assert [int(data["last_row"][0]) for name, data in recorder.calls if name == "prefill"] == [15, 15, 4]
    last = recorder.calls[2][1]["inputs_embeds"][0]
    assert np.abs(last[:5]).max() > 0
    assert np.abs(last[5:]).max() == 0
    assert "last_row" not in recorder.calls[3][1]


def test_rows_of_image_features_stand_in_for_image_tokens(
    runner: CoreMLRunner, recorder: Recorder, tiny_bundle: Path
) -> None:
    image, length = runner.settings.image_id, runner.settings.seq_len
    features = np.random.default_rng(0).standard_normal((length, HIDDEN)).astype(np.float32)
    ids = [50, *[image] * length, 51]
    runner.extend(runner.new_cache(), ids, features)
    fed = np.concatenate([data["inputs_embeds"][0] for _, data in recorder.calls])[: len(ids)]
    assert np.array_equal(fed[1:-1], features)
    onnx = OrtRunner(read_bundle(tiny_bundle))
    wanted = onnx._embeddings([50, 51], None)[0]  # noqa: SLF001  # the same table, read by ONNX Runtime
    assert np.array_equal(fed[[0, -1]], wanted)


def test_logits_of_several_rows_come_one_by_one(runner: CoreMLRunner, recorder: Recorder) -> None:
    ids = list(range(50, 70))
    rows = runner.extend(runner.new_cache(), ids, keep=3)
    assert [name for name, _ in recorder.calls] == ["prefill", "prefill", "decode", "decode"]
    assert [int(d["last_row"][0]) for n, d in recorder.calls if n == "prefill"] == [15, 1]
    every = runner.extend(runner.new_cache(), ids, keep=0)
    assert every.shape == (20, runner.settings.vocab)
    assert np.abs(rows - every[-3:]).max() < 1e-5 * np.abs(rows).max()


def test_tiles_are_encoded_one_by_one(runner: CoreMLRunner, recorder: Recorder) -> None:
    side = runner.settings.tile_size
    pixels = np.random.default_rng(0).uniform(-1, 1, (3, 3, side, side)).astype(np.float32)
    features = runner.encode_image(pixels)
    assert features.shape == (3, runner.settings.seq_len, HIDDEN)
    assert [(name, data["pixel_values"].shape) for name, data in recorder.calls] == [
        ("VisionEncoder", (1, 3, side, side))
    ] * 3
    assert np.array_equal(runner.encode_image(pixels[1:2])[0], features[1])


def test_a_call_that_fails_leaves_the_cache_as_it_was(runner: CoreMLRunner, recorder: Recorder) -> None:
    cache, ids = runner.new_cache(), list(range(50, 90))
    before = runner.extend(runner.new_cache(), ids)
    runner.extend(cache, ids[:5])
    runner.cancel()
    with pytest.raises(Cancelled):
        runner.extend(cache, ids[5:])
    assert cache.length == 5
    runner.resume()
    prefill = runner._prefill.predict  # noqa: SLF001

    def breaks(data: Mapping[str, Any], state: Any = None) -> Mapping[str, Any]:
        if int(data["position"][0]) > 10:
            raise RuntimeError("the device was lost")
        return prefill(data, state)

    runner._prefill.predict = breaks  # type: ignore[method-assign]  # noqa: SLF001
    with pytest.raises(EngineError, match="the device was lost"):
        runner.extend(cache, ids[5:])
    assert cache.length == 5
    runner._prefill.predict = prefill  # type: ignore[method-assign]  # noqa: SLF001
    after = runner.extend(cache, ids[5:])
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()


def test_cancel_from_another_thread_ends_a_long_prompt(runner: CoreMLRunner, recorder: Recorder) -> None:
    prefill = runner._prefill.predict  # noqa: SLF001

    def slow(data: Mapping[str, Any], state: Any = None) -> Mapping[str, Any]:
        thread = threading.Thread(target=runner.cancel)
        thread.start()
        thread.join()
        return prefill(data, state)

    runner._prefill.predict = slow  # type: ignore[method-assign]  # noqa: SLF001
    with pytest.raises(Cancelled):
        runner.extend(runner.new_cache(), list(range(50, 150)))
    assert len(recorder.calls) == 1


def test_results_that_no_model_gives_are_engine_errors(runner: CoreMLRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = runner.settings.vocab
    for found, message in (
        ({"logits": np.full((1, 1, vocab), np.nan)}, "infinity or NaN"),
        ({"logits": np.zeros((1, 2, vocab))}, r"gives \[1, 2, "),
        ({}, "logits"),
    ):
        monkeypatch.setattr(runner._decode, "predict", lambda _, __, found=found: found)  # noqa: SLF001
        with pytest.raises(EngineError, match=message):
            runner.extend(runner.new_cache(), [50])


def test_a_cache_with_infinities_is_not_used_again(runner: CoreMLRunner) -> None:
    """A masked row still counts as 0 times its value, and 0 times infinity is NaN."""
    cache = runner.new_cache()
    runner.extend(cache, [50, 51])
    cache.state["value_cache"][:, :, 9] = np.inf
    with pytest.raises(EngineError, match="infinity or NaN"):
        runner.extend(cache, [52])
    with pytest.raises(EngineError, match="begin a new one"):
        runner.extend(cache, [52])
    assert np.isfinite(runner.extend(runner.new_cache(), [52])).all()


def test_arguments_are_checked_as_by_every_runner(runner: CoreMLRunner) -> None:
    with pytest.raises(InputError, match="no tokens"):
        runner.extend(runner.new_cache(), [])
    with pytest.raises(InputError, match="want float32"):
        runner.encode_image(np.zeros((1, 3, 5, 5), np.float32))
    with pytest.raises(TypeError, match="new_cache"):
        runner.extend(None, [50])  # type: ignore[arg-type]


# ---- Core ML itself


class FakeCoreML(types.ModuleType):
    """coremltools as it is on macOS, as far as the runner uses it; the executor stands in for the system."""

    def __init__(self) -> None:
        super().__init__("coremltools")
        self.loaded: list[tuple[str, str, str | None]] = []
        self.proxy: object | None = object()
        self.failure: Exception | None = None
        executed = Executed()
        outer = self

        class MLModel:
            def __init__(self, model: str, *, compute_units: str, function_name: str | None = None) -> None:
                outer.loaded.append((Path(model).name, compute_units, function_name))
                self._inner = executed(Path(model), function_name)
                self.__proxy__ = outer.proxy  # coremltools' own name
                self._framework_error = "no such operation"

            def make_state(self) -> Any:
                if outer.failure:
                    raise outer.failure
                return self._inner.make_state()

            def predict(self, data: dict[str, Any], state: Any = None) -> dict[str, Any]:
                assert isinstance(data, dict)
                if outer.failure:
                    raise outer.failure
                assert all(value.dtype in (np.float32, np.int32) for value in data.values())
                return {name: value.astype(np.float16) for name, value in self._inner.predict(data, state).items()}

        self.models = types.SimpleNamespace(MLModel=MLModel)
        self.ComputeUnit = types.SimpleNamespace(CPU_AND_GPU="cpu and gpu")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCoreML:
    """A Mac with coremltools."""
    made = FakeCoreML()
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.setitem(sys.modules, "coremltools", made)
    return made


def test_a_package_that_core_ml_refuses_is_named_with_the_reason(
    tiny_ios_bundle: Path, fake: FakeCoreML, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.proxy = None
    with pytest.raises(BundleError, match=r"Decoder\.mlpackage: Core ML refuses it: no such operation"):
        open_runner(read_bundle(tiny_ios_bundle))
    monkeypatch.setattr(sys, "argv", ["verify", str(tiny_ios_bundle)])
    assert verify_main() == 1
    assert "error: " in capsys.readouterr().err


def test_what_core_ml_raises_is_an_engine_error(tiny_ios_bundle: Path, fake: FakeCoreML) -> None:
    runner = open_runner(read_bundle(tiny_ios_bundle))
    cache = runner.new_cache()
    fake.failure = Exception("out of memory")  # coremltools raises plain Exceptions
    with pytest.raises(EngineError, match="Core ML failed: out of memory"):
        runner.extend(cache, [50])
    with pytest.raises(EngineError, match="Core ML made no state: out of memory"):
        runner.new_cache()
    fake.failure = None
    assert runner.extend(cache, [50]).shape == (1, runner.settings.vocab)


def test_an_older_macos_is_told_which_it_needs(fake: FakeCoreML, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "mac_ver", lambda: ("14.6.1", ("", "", ""), "arm64"))
    with pytest.raises(BundleError, match=r"this is macOS 14\.6\.1; .* need macOS 15"):
        native()
    assert isinstance(default_loader(), Executed)


def test_on_macos_core_ml_runs_the_same_bundle(
    tiny_ios_bundle: Path, fake: FakeCoreML, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(read_bundle(tiny_ios_bundle)).passed
    assert fake.loaded == [
        ("Decoder.mlpackage", "cpu and gpu", "prefill"),
        ("Decoder.mlpackage", "cpu and gpu", "decode"),
        ("VisionEncoder.mlpackage", "cpu and gpu", None),
    ]
    monkeypatch.setattr(sys, "argv", ["verify", str(tiny_ios_bundle)])
    assert verify_main() == 0
    assert "by Core ML" in capsys.readouterr().out


def test_elsewhere_the_saved_programs_are_executed_and_it_says_so(
    tiny_ios_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    with pytest.raises(BundleError, match="Core ML runs on macOS only"):
        native()
    assert isinstance(default_loader(), Executed)
    monkeypatch.setattr(sys, "argv", ["verify", str(tiny_ios_bundle), "--json"])
    assert verify_main() == 0
    out = capsys.readouterr().out.splitlines()
    assert "emulated" in out[0]
    assert "emulated" in json.loads(out[-1])["engine"]


def test_without_coremltools_macos_executes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(BundleError, match=r"pip install .*\[ios\]"):
        native()
    assert isinstance(default_loader(), Executed)


def test_a_question_is_answered(tiny_ios_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    answer = ask(tiny_ios_bundle, "What?", [tmp_path / "red.png"]).answer
    assert answer.ids
    assert isinstance(open_runner(read_bundle(tiny_ios_bundle), vision=True), CoreMLRunner)


# ---- the embedding table


@pytest.mark.parametrize(("bits", "hidden", "block"), [(8, 64, 32), (4, 64, 32), (8, 72, 32), (4, 36, 16)])
def test_a_row_of_the_table_is_what_its_integers_stand_for(bits: int, hidden: int, block: int, tmp_path: Path) -> None:
    random, blocks = np.random.default_rng(0), -(-hidden // block)
    integers = random.integers(0, 2**bits, (9, hidden)).astype(np.uint8)
    scales = random.uniform(0.01, 1, (9, blocks)).astype(np.float16)
    zeros = random.integers(0, 2**bits, (9, blocks)).astype(np.uint8)
    q = integers if bits == 8 else integers[:, 0::2] | (integers[:, 1::2] << 4)
    write_tensors(tmp_path / "table", {"q": q, "scales": scales, "zeros": zeros})
    used = {"scheme": "block", "bits": bits, "block": block}
    rows = EmbeddingTable(tmp_path / "table", 9, hidden, used).rows([3, 0, 3])
    for row, at in zip(rows, (3, 0, 3), strict=True):
        for column in range(hidden):
            scale, zero = float(scales[at, column // block]), int(zeros[at, column // block])
            assert row[column] == np.float32(scale) * np.float32(int(integers[at, column]) - zero)
    with pytest.raises(BundleError, match="holds"):
        EmbeddingTable(tmp_path / "table", 10, hidden, used)
    with pytest.raises(BundleError, match="holds"):
        EmbeddingTable(tmp_path / "table", 9, hidden, {"scheme": "float", "bits": 32})
    with pytest.raises(BundleError, match="is missing"):
        EmbeddingTable(tmp_path / "none", 9, hidden, used)


@pytest.mark.parametrize(
    "used",
    [
        {},
        {"scheme": "column", "bits": 8},
        {"scheme": "block", "bits": 3, "block": 32},
        {"scheme": "block", "bits": 8, "block": 0},
        {"scheme": "block", "bits": 8, "block": 33},
        {"scheme": "block", "bits": 8, "block": "32"},
        {"scheme": "block", "bits": 8, "block": None},
    ],
)
def test_a_format_that_no_table_has_is_refused(used: dict[str, Any], tmp_path: Path) -> None:
    write_tensors(tmp_path / "table", {"q": np.zeros((9, 64), np.uint8)})
    with pytest.raises(BundleError, match=r"manifest\.json gives model\.text_model\.embed_tokens\.weight the format"):
        EmbeddingTable(tmp_path / "table", 9, 64, used)


def test_a_table_of_floats(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float16)
    write_tensors(tmp_path / "table", {"weight": weight})
    rows = EmbeddingTable(tmp_path / "table", 5, 8, {"scheme": "float", "bits": 32}).rows([4])
    assert rows.dtype == np.float32
    assert np.array_equal(rows[0], weight[4].astype(np.float32))


# ---- bundles that do not fit


def changed(bundle: Path, folder: Path, **fields: Any) -> Path:
    """A copy whose manifest says something else."""
    shutil.copytree(bundle, folder)
    manifest = read_bundle(bundle).manifest
    write_manifest(folder, replace(manifest, **fields, files=(), payload_digest=""))
    return folder


def test_packages_of_another_size_than_the_manifest_says_are_refused(tiny_ios_bundle: Path, tmp_path: Path) -> None:
    text = read_bundle(tiny_ios_bundle).manifest.text
    folder = changed(tiny_ios_bundle, tmp_path / "bundle", text=replace(text, context=300))
    with pytest.raises(BundleError, match=r"Decoder\.mlpackage: takes or gives"):
        open_runner(read_bundle(folder))


def test_a_bundle_of_another_target_or_engine_is_refused(
    tiny_bundle: Path, tiny_ios_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="target onnx on onnxruntime, want coreml on coreml"):
        CoreMLRunner(read_bundle(tiny_bundle))
    with pytest.raises(BundleError, match="want onnx on onnxruntime"):
        OrtRunner(read_bundle(tiny_ios_bundle))
    folder = changed(tiny_ios_bundle, tmp_path / "bundle", target="tflite")
    with pytest.raises(BundleError, match="target is 'tflite', want onnx or coreml"):
        open_runner(read_bundle(folder))


@pytest.mark.parametrize("file", ["Manifest.json", "Data/com.apple.CoreML/model.mlmodel"])
def test_a_damaged_package_is_refused_by_name(file: str, tiny_ios_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_ios_bundle, tmp_path / "bundle")
    (folder / "coreml" / "Decoder.mlpackage" / file).write_bytes(b"\xff\xff nothing")
    manifest = read_bundle(tiny_ios_bundle).manifest
    write_manifest(folder, replace(manifest, files=(), payload_digest=""))
    with pytest.raises(BundleError, match=file.rsplit("/", 1)[-1]):
        open_runner(read_bundle(folder))


def test_a_package_without_its_weights_is_refused(tiny_ios_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_ios_bundle, tmp_path / "bundle")
    shutil.rmtree(folder / "coreml" / "VisionEncoder.mlpackage" / "Data" / "com.apple.CoreML" / "weights")
    manifest = read_bundle(tiny_ios_bundle).manifest
    write_manifest(folder, replace(manifest, files=(), payload_digest=""))
    with pytest.raises(BundleError, match=r"does not list .*weight\.bin"):
        open_runner(read_bundle(folder))
