"""The native runner gives what Python's runtime gives, and its self-test sees what is wrong in a bundle."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.bundle import read_bundle, write_manifest
from runtimes.manifest import MANIFEST
from runtimes.native.build import build
from runtimes.native.packages import BuildError, header_folder
from runtimes.ort import OrtRunner
from runtimes.preprocess import normalize, read_settings
from runtimes.tensorfile import read_header, read_tensor
from runtimes.verify import read_cases, step_logits
from tests.conftest import ROOT

CACHE = ROOT / "build" / "native" / "cache"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runner, compiled for this machine."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    try:
        header_folder(CACHE)
    except BuildError as exc:
        pytest.skip(f"ONNX Runtime's C header cannot be fetched: {str(exc)[:200]}")
    return build("host", tmp_path_factory.mktemp("native"), cache=CACHE).program


def run(program: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *words], capture_output=True, text=True, check=False, timeout=120)


def test_a_run_gives_the_bits_of_the_python_runtime(program: Path, demo_bundle: Path, tmp_path: Path) -> None:
    done = run(program, demo_bundle, "--out", tmp_path / "out", "--nonce", "c0ffee", "--threads", "2")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "result.json").read_bytes()
    result = json.loads(text)
    assert (tmp_path / "out" / "result.json.sha256").read_text() == hashlib.sha256(text).hexdigest() + "\n"
    outputs = tmp_path / "out" / "outputs.safetensors"
    assert result["outputs"]["sha256"] == hashlib.sha256(outputs.read_bytes()).hexdigest()
    bundle = read_bundle(demo_bundle)
    assert (result["complete"], result["nonce"], result["execution"]) == (True, "c0ffee", "native")
    assert result["payload_digest"] == bundle.manifest.payload_digest
    header, runner = read_header(outputs), OrtRunner(bundle, threads=2)
    settings = read_settings(demo_bundle / "preprocessor_config.json")
    cases = read_cases(demo_bundle)
    assert [c["name"] for c in result["cases"]] == [c.name for c in cases]
    for case, said in zip(cases, result["cases"], strict=True):
        features = np.zeros_like(case.features)
        if len(case.tiles):
            pixels = normalize(case.tiles, settings)
            assert said["pixels_sha256"] == hashlib.sha256(pixels.tobytes()).hexdigest()
            features = runner.encode_image(pixels)
            assert np.array_equal(read_tensor(outputs, header[f"{case.name}.features"]), features)
        logits = step_logits(runner, case.ids, features, case.tokens)
        assert np.array_equal(read_tensor(outputs, header[f"{case.name}.logits"]), logits)
        assert said["tokens"][0] == int(np.argmax(logits[0]))
        assert len(said["tokens"]) == len(case.tokens)


def test_measured_phases_have_samples_and_an_emulated_run_has_none(
    program: Path, demo_bundle: Path, tmp_path: Path
) -> None:
    sizes = ["--tiles", "1", "--prefill", "32", "--decode-at", "16", "--decode-tokens", "4", "--repeats", "2"]
    for execution in ("native", "qemu-user"):
        out = tmp_path / execution
        done = run(program, demo_bundle, "--out", out, "--measure", "--execution", execution, *sizes)
        assert done.returncode == 0, done.stderr
        phases = json.loads((out / "result.json").read_text())["phases"]
        if execution == "native":
            assert {n: len(p["samples_ms"]) for n, p in phases.items()}.items() >= {"image": 2, "prefill": 2}.items()
            assert all(ms > 0 for p in phases.values() for ms in p["samples_ms"])
        else:
            assert phases == {}


def test_a_result_is_never_overwritten(program: Path, demo_bundle: Path, tmp_path: Path) -> None:
    assert run(program, demo_bundle, "--out", tmp_path / "out").returncode == 0
    before = (tmp_path / "out" / "result.json").read_bytes()
    assert run(program, demo_bundle, "--out", tmp_path / "out").returncode == 2
    assert (tmp_path / "out" / "result.json").read_bytes() == before


def test_the_self_test_passes(program: Path, demo_bundle: Path) -> None:
    done = run(program, demo_bundle, "--self-test")
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["passed"] is True
    assert verdict["tokens"] == sum(len(c.tokens) for c in read_cases(demo_bundle))


def flip(name: str, at: float, count: int = 2048) -> Callable[[Path], None]:
    """Changes bytes of a file from a part of it on. A tenth of a matrix of the tower is still within the limits."""

    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        start = int(len(content) * at)
        for i in range(start, min(start + count, len(content))):
            content[i] ^= 0x77
        (folder / name).write_bytes(content)

    return change


def other_tokens(folder: Path) -> None:
    path = folder / "cases" / "cases.json"
    content: dict[str, Any] = json.loads(path.read_text())
    content["cases"][0]["tokens"] = content["cases"][0]["tokens"][::-1]
    content["cases"][1]["tokens"][-1] += 1
    path.write_text(json.dumps(content))


DAMAGE = {
    "weights of the decoder": flip("onnx/decoder_model_merged_q4.onnx_data", 0.3),
    "weights of the tower": flip("onnx/vision_encoder_quantized.onnx_data", 0.5, 40_000),
    "tokens of the cases": other_tokens,
}


@pytest.mark.parametrize("what", DAMAGE)
def test_the_self_test_sees_a_change_that_digests_were_made_to_fit(
    program: Path, demo_bundle: Path, tmp_path: Path, what: str
) -> None:
    folder = shutil.copytree(demo_bundle, tmp_path / "bundle")
    manifest = read_bundle(folder).manifest
    DAMAGE[what](folder)
    write_manifest(folder, manifest)
    done = run(program, folder, "--self-test")
    assert done.returncode == 1, done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["passed"] is False
    assert verdict["faults"]


def truncate(folder: Path) -> None:
    path = folder / "onnx" / "decoder_model_merged_q4.onnx_data"
    path.write_bytes(path.read_bytes()[:-1])


def change(folder: Path) -> None:
    flip("config.json", 0.0)(folder)


def extra(folder: Path) -> None:
    (folder / "more.txt").write_text("x")


def link(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to(folder.parent / "config.json")


def pending(folder: Path) -> None:
    manifest = read_bundle(folder).manifest
    write_manifest(folder, replace(manifest, proof=replace(manifest.proof, state="pending")))


def outside(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"path": "config.json"', '"path": "../config.json"'))


@pytest.mark.parametrize("damage", [truncate, change, extra, link, pending, outside])
def test_what_is_no_bundle_is_refused_before_it_runs(
    program: Path, demo_bundle: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(demo_bundle, tmp_path / "bundle")
    damage(folder)
    done = run(program, folder, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert not (tmp_path / "out" / "result.json").exists()
