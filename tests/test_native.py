"""The native runner on this machine: built, compared with Python's to the bit, given planted faults, and fuzzed."""

import hashlib
import json
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.onnx_ops import stored_index
from runtimes.bundle import Bundle, read_bundle, write_manifest
from runtimes.generate import Sampling, generate
from runtimes.manifest import SIGNATURE
from runtimes.native.build import Built, build, source_sha256
from runtimes.native.packages import BuildError
from runtimes.ort import OrtRunner
from runtimes.preprocess import normalize, read_settings
from runtimes.tensorfile import read_header, read_tensor, write_tensors
from runtimes.verify import CASES_DATA, CASES_JSON, read_cases, step_logits, verify
from tests.fakes import make_bundle

DECODER = "onnx/decoder_model_merged_q4.onnx"


def run(native: Built, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(native.program), *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, check=False)


def result(native: Built, bundle: Path, out: Path, *arguments: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """result.json and the arrays of a run, after checking that it says what it wrote."""
    done = run(native, bundle, "--out", out, *arguments)
    assert done.returncode == 0, done.stderr
    text = (out / "result.json").read_bytes()
    assert (out / "result.json.sha256").read_text() == hashlib.sha256(text).hexdigest() + "\n"
    found: dict[str, Any] = json.loads(text)
    data = (out / "outputs.safetensors").read_bytes()
    assert found["outputs"] == {
        "path": "outputs.safetensors",
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    assert sorted(p.name for p in out.iterdir()) == ["outputs.safetensors", "result.json", "result.json.sha256"]
    path = out / "outputs.safetensors"
    return found, {name: read_tensor(path, info) for name, info in read_header(path).items()}


@pytest.mark.parametrize("threads", [1, 2])
def test_its_results_are_those_of_python_to_the_bit(
    native: Built, demo_bundle: Path, tmp_path: Path, threads: int
) -> None:
    found, arrays = result(native, demo_bundle, tmp_path / "out", "--nonce", "00ff", "--threads", threads)
    bundle = read_bundle(demo_bundle)
    runner = OrtRunner(bundle, threads=threads)
    images = read_settings(demo_bundle / "preprocessor_config.json")
    cases = read_cases(demo_bundle)
    assert [row["name"] for row in found["cases"]] == [case.name for case in cases]
    assert sum(row["tiles"] for row in found["cases"]) > 4
    for case, row in zip(cases, found["cases"], strict=True):
        features = np.zeros_like(case.features)
        if len(case.tiles):
            pixels = normalize(case.tiles, images)
            features = runner.encode_image(pixels)
            assert row["pixels_sha256"] == hashlib.sha256(pixels.tobytes()).hexdigest()
        else:
            assert row["pixels_sha256"] is None
        assert row["tiles"] == len(case.tiles)
        assert np.array_equal(arrays[f"{case.name}.features"], features)
        logits = step_logits(runner, case.ids, features, case.tokens)
        assert np.array_equal(arrays[f"{case.name}.logits"], logits)
    assert found["nonce"] == "00ff"
    assert found["threads"] == threads
    assert found["payload_digest"] == bundle.manifest.payload_digest
    assert found["runner"]["source_sha256"] == source_sha256()
    assert found["engine"]["api"] == 21
    assert found["complete"] is True
    assert set(found["phases"]) == {"verify", "load"}


def test_it_generates_what_python_generates_also_where_the_cases_say_otherwise(
    native: Built, demo_bundle: Path, tmp_path: Path
) -> None:
    def other(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["tokens"][2] = (row["tokens"][2] + 1) % 100  # it must go its own way from here on

    folder = changed(demo_bundle, tmp_path / "bundle", cases=other)
    found, _ = result(native, folder, tmp_path / "out")
    bundle = read_bundle(folder)
    runner = OrtRunner(bundle)
    endless = replace(runner.settings, eos_ids=())
    runner._settings = endless  # noqa: SLF001  # the cases go on beyond an end token
    for case, row in zip(read_cases(folder), found["cases"], strict=True):
        features = (
            runner.encode_image(normalize(case.tiles, read_settings(folder / "preprocessor_config.json")))
            if (len(case.tiles))
            else None
        )
        flat = None if features is None else features.reshape(-1, features.shape[-1])
        tokens = generate(runner, runner.new_cache(), case.ids, flat, Sampling(len(case.tokens)))
        assert row["tokens"] == [token.id for token in tokens], case.name


def test_its_self_test_says_what_verify_says(native: Built, demo_bundle: Path) -> None:
    done = run(native, demo_bundle, "--self-test")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    parity = verify(read_bundle(demo_bundle))
    assert parity.passed
    assert found == {
        "passed": True,
        "features_error": pytest.approx(parity.features_error, rel=1e-9),
        "logits_error": pytest.approx(parity.logits_error, rel=1e-9),
        "tokens": parity.tokens,
        "tokens_equal": parity.tokens_equal,
        "ties": parity.ties,
        "faults": [],
    }


def test_a_signed_bundle_is_a_bundle(native: Built, demo_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(demo_bundle, tmp_path / "bundle")
    (folder / SIGNATURE).write_bytes(bytes(64))
    done = run(native, folder, "--self-test")
    assert done.returncode == 0, done.stderr


# ---- planted faults


def changed(
    bundle: Path,
    out: Path,
    *,
    cases: Callable[[list[dict[str, Any]]], None] | None = None,
    arrays: Callable[[dict[str, Any]], None] | None = None,
    data: tuple[str, int] | None = None,
    report: bool = True,
) -> Path:
    """A copy with a fault, whose digests are made right again, the report's too where `report` says so.

    Args:
        data: the name of a decoder's tensor and the byte in it whose high nibble gets its highest bit flipped.
    """
    shutil.copytree(bundle, out)
    if cases:
        content = json.loads((out / CASES_JSON).read_text("utf-8"))
        cases(content["cases"])
        (out / CASES_JSON).write_text(json.dumps(content), "utf-8")
    if arrays:
        tensors = {name: read_tensor(out / CASES_DATA, info) for name, info in read_header(out / CASES_DATA).items()}
        arrays(tensors)
        (out / CASES_DATA).unlink()
        write_tensors(out / CASES_DATA, tensors)
    if data:
        name, at = data
        with (out / f"{DECODER}_data").open("r+b") as file:
            file.seek(stored_index(out / DECODER)[name].offset + at)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 0x80]))
    manifest = write_manifest(out, read_bundle(bundle).manifest)
    if report:
        content = json.loads((out / "report.json").read_text("utf-8"))
        (out / "report.json").write_text(json.dumps(content | {"payload_digest": manifest.payload_digest}), "utf-8")
        write_manifest(out, manifest)
    read_bundle(out)  # nothing but the fault is wrong
    return out


WEIGHT = "model.text_model.layers.1.mlp.down_proj.weight.q"
ZEROS = "model.text_model.layers.3.self_attn.o_proj.weight.zeros"


def test_a_flipped_nibble_with_digests_recomputed_is_another_payload_than_the_proven_one(
    native: Built, demo_bundle: Path, tmp_path: Path
) -> None:
    done = run(native, changed(demo_bundle, tmp_path / "b", data=(WEIGHT, 77), report=False), "--self-test")
    assert done.returncode == 2
    assert "report.json: is the proof of payload" in done.stderr


def test_a_flipped_zero_point_is_seen_in_what_is_computed_where_even_the_report_was_forged(
    native: Built, demo_bundle: Path, tmp_path: Path
) -> None:
    done = run(native, changed(demo_bundle, tmp_path / "b", data=(ZEROS, 0)), "--self-test")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert not found["passed"]
    assert any("relative error of logits" in fault for fault in found["faults"])


def another_question(rows: list[dict[str, Any]]) -> None:
    rows[0]["ids"][3:-3] = rows[0]["ids"][-4:2:-1]


def another_answer(rows: list[dict[str, Any]]) -> None:
    rows[1]["tokens"][1] += 1


def test_a_changed_case_is_a_fault(native: Built, demo_bundle: Path, tmp_path: Path) -> None:
    for i, (change, what) in enumerate(
        ((another_question, "relative error of logits"), (another_answer, "greedy token 1"))
    ):
        done = run(native, changed(demo_bundle, tmp_path / str(i), cases=change), "--self-test")
        assert done.returncode == 1, done.stderr
        faults = json.loads(done.stdout)["faults"]
        assert any(what in fault for fault in faults), faults


def test_a_wrong_tile_is_a_fault(native: Built, demo_bundle: Path, tmp_path: Path) -> None:
    def swap(tensors: dict[str, Any]) -> None:
        tensors["split.tiles"] = tensors["split.tiles"][[1, 0, 2]]

    done = run(native, changed(demo_bundle, tmp_path / "b", arrays=swap), "--self-test")
    assert done.returncode == 1, done.stderr
    faults = json.loads(done.stdout)["faults"]
    assert any("case split: relative error of image features" in fault for fault in faults)
    assert all("case split" in fault for fault in faults)


def truncate(folder: Path) -> None:
    path = folder / f"{DECODER}_data"
    path.write_bytes(path.read_bytes()[:-100])


def lengthen(folder: Path) -> None:
    with (folder / f"{DECODER}_data").open("ab") as file:
        file.write(b"more")


def change_a_byte(folder: Path) -> None:
    with (folder / f"{DECODER}_data").open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))


def link(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "elsewhere.json")
    (folder / "config.json").symlink_to(folder.parent / "elsewhere.json")


def manifest(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text("utf-8"))
        for key, value in changes.items():
            content[key] = value(content[key])
        (folder / "manifest.json").write_text(json.dumps(content), "utf-8")

    return change


def without_evidence(folder: Path) -> None:
    shutil.rmtree(folder / "cases")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a truncated file": (truncate, "onnx_data: is truncated"),
    "a file that is too long": (lengthen, "onnx_data: is too long"),
    "a changed byte": (change_a_byte, "onnx_data: content has changed"),
    "a link": (link, "config.json: is a link"),
    "a missing file": (lambda folder: (folder / "config.json").unlink(), "config.json: is missing"),
    "an extra file": (lambda folder: (folder / "x").touch(), "x: extra"),
    "evidence not pulled": (without_evidence, "was not pulled"),
    "a pending proof": (manifest(proof=lambda p: p | {"state": "pending"}), "proof.state is pending"),
    "a newer schema": (manifest(schema=lambda _: 9, min_reader=lambda _: 9), "needs a reader of schema 9"),
    "a path that leaves": (
        manifest(files=lambda f: [f[0] | {"path": "../x"}, *f[1:]]),
        "want one below the bundle",
    ),
    "a forged digest": (manifest(payload_digest=lambda _: "0" * 64), "payload_digest is 0000"),
    "another target": (manifest(target=lambda _: "coreml"), "target coreml"),
    "a newer engine": (manifest(engine=lambda e: e | {"least": "99.0.0"}), "needs ONNX Runtime 99.0.0"),
    "another size": (manifest(text=lambda t: t | {"vocab": t["vocab"] + 1}), "vocab_size is"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bundle_that_cannot_be_used_is_refused_with_two_and_the_reason(
    native: Built, tiny_bundle: Path, tmp_path: Path, name: str
) -> None:
    spoil, reason = REFUSED[name]
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    spoil(folder)
    for arguments in (["--self-test"], ["--out", tmp_path / "out"]):
        done = run(native, folder, *arguments)
        assert done.returncode == 2, done.stderr
        assert reason in done.stderr
        assert done.stdout == ""
    assert not list(tmp_path.glob("out/*"))


def test_a_graph_that_is_another_than_the_manifest_says_is_refused(native: Built, tmp_path: Path) -> None:
    bundle: Bundle = make_bundle(tmp_path / "growing", in_place=False)
    (tmp_path / "growing" / "cases").mkdir()
    done = run(native, bundle.folder, "--self-test")
    assert done.returncode == 2
    assert "does not list cases/cases.json" in done.stderr


# ---- arguments and results


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "want a BUNDLE"),
        (["BUNDLE"], "want a BUNDLE"),
        (["--self-test"], "want a BUNDLE"),
        (["BUNDLE", "--self-test", "--out", "x"], "want a BUNDLE"),
        (["BUNDLE", "--self-test", "--threads", "-1"], "--threads is -1"),
        (["BUNDLE", "--self-test", "--threads"], "--threads wants a value"),
        (["BUNDLE", "--self-test", "--session", "key"], "want KEY=VALUE"),
        (["BUNDLE", "--self-test", "--fast"], "unknown argument --fast"),
        (["BUNDLE", "--out", "x", "--execution", "phone"], "--execution is phone"),
        (["BUNDLE", "--out", "x", "--nonce", "xyz"], "--nonce is xyz"),
        (["nowhere", "--self-test"], "nowhere: is no folder"),
        (["BUNDLE", "--out", "nowhere/x"], "nowhere/x: cannot be made"),
    ],
)
def test_a_wrong_argument_is_refused_with_two(
    native: Built, tiny_bundle: Path, arguments: list[str], reason: str
) -> None:
    done = run(native, *(str(tiny_bundle) if a == "BUNDLE" else a for a in arguments))
    assert done.returncode == 2
    assert reason in done.stderr


def test_measured_phases_have_every_sample_and_emulated_runs_have_none(
    native: Built, tiny_bundle: Path, tmp_path: Path
) -> None:
    sizes = ["--measure", "--tiles", 2, "--prefill", 8, "--decode-at", 8, "--decode-tokens", 5, "--repeats", 2]
    found, _ = result(native, tiny_bundle, tmp_path / "native", *sizes)
    counts = {name: len(phase["samples_ms"]) for name, phase in found["phases"].items()}
    assert counts == {"verify": 1, "load": 1, "image": 4, "prefill": 2, "decode": 5}
    for phase in found["phases"].values():
        assert min(phase["samples_ms"]) > 0
        assert phase["cpu_s"] >= 0
        assert phase["peak_rss_mib"] is None or 1 < phase["peak_rss_mib"] < 1000
    emulated, _ = result(native, tiny_bundle, tmp_path / "emulated", *sizes, "--execution", "qemu-user")
    assert emulated["execution"] == "qemu-user"
    assert emulated["phases"] == {}


def test_a_result_is_never_overwritten(native: Built, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result(native, tiny_bundle, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    done = run(native, tiny_bundle, "--out", out)
    assert done.returncode == 2
    assert "exists already" in done.stderr
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_session_settings_reach_the_engine(native: Built, tiny_bundle: Path, tmp_path: Path) -> None:
    found, _ = result(native, tiny_bundle, tmp_path / "out", "--session", "mlas.disable_kleidiai=1")
    assert found["session"]["mlas.disable_kleidiai"] == "1"
    done = run(native, tiny_bundle, "--self-test", "--session", f"{'k' * 3000}=1")
    assert done.returncode == 2
    assert "--session" in done.stderr


def test_digests_lists_every_file_below(native: Built, tiny_bundle: Path, tmp_path: Path) -> None:
    found = json.loads(run(native, "--digests", tiny_bundle).stdout)["files"]
    wanted = [
        {
            "path": path.relative_to(tiny_bundle).as_posix(),
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in tiny_bundle.rglob("*")
        if path.is_file()
    ]
    assert found == sorted(wanted, key=lambda entry: str(entry["path"]))
    assert run(native, "--digests", tmp_path / "nowhere").returncode == 2


@pytest.mark.parametrize("size", [0, 1, 55, 56, 63, 64, 65, 119, 120, (1 << 20) + 1])
def test_its_digest_is_sha256_at_every_edge_of_a_block(native: Built, tmp_path: Path, size: int) -> None:
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    found = json.loads(run(native, "--digests", tmp_path).stdout)["files"]
    assert found == [{"path": "file", "size": size, "sha256": hashlib.sha256(content).hexdigest()}]


def test_its_version_names_the_engine(native: Built) -> None:
    import onnxruntime

    found = json.loads(run(native, "--version").stdout)
    assert found["onnxruntime"] == onnxruntime.__version__
    assert (found["api"], found["source_sha256"]) == (21, source_sha256())


def test_what_a_build_lacks_is_named(tmp_path: Path) -> None:
    header = tmp_path / "onnxruntime_c_api.h"
    with pytest.raises(BuildError, match=r"onnxruntime_c_api\.h: cannot be read"):
        build(out=tmp_path / "out", headers=tmp_path, compiler=["g++"])
    header.write_text("#define ORT_API_VERSION 20\n")
    with pytest.raises(BuildError, match="API level is 20, want 21"):
        build(out=tmp_path / "out", headers=tmp_path, compiler=["g++"])
    header.write_text("#define ORT_API_VERSION 21\n")
    with pytest.raises(BuildError, match=r"nowhere\.so: is no file"):
        build(out=tmp_path / "out", headers=tmp_path, library=tmp_path / "nowhere.so", compiler=["g++"])
    with pytest.raises(BuildError, match="no-such-compiler cannot be started"):
        build(out=tmp_path / "out", headers=tmp_path, library=header, compiler=["no-such-compiler"])
    assert not (tmp_path / "out" / "smolport-run").exists()
