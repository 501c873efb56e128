"""Bundles: whole or absent, never overwritten, and no file in one changes unseen."""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from runtimes.bundle import Bundle, read_bundle, replace_manifest, stage_bundle, write_manifest
from runtimes.manifest import MANIFEST, AdapterSource, BundleError, FileEntry, Proof, parse_manifest, payload_digest
from tests.fakes import byte_tokenizer, fake_manifest

FILES = {
    "config.json": b"{}",
    "onnx/decoder_model_merged_q4.onnx": b"graph" * 100,
    "onnx/decoder_model_merged_q4.onnx_data": bytes(range(256)) * 64,
    "tokenizer.json": b"{}",
    "cases/cases.safetensors": b"golden" * 50,
    "report.json": b'{"passed": true}',
}
TEMPLATE = fake_manifest(byte_tokenizer())


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def make(out: Path, *, proven: bool = True) -> Bundle:
    proof = Proof("passed", "report.json") if proven else Proof("pending", None)
    with stage_bundle(out) as folder:
        write_files(folder, FILES if proven else {n: c for n, c in FILES.items() if not n.startswith(("cases", "rep"))})
        write_manifest(folder, replace(TEMPLATE, proof=proof))
    return read_bundle(out, allow_pending=True)


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "bundle").folder


def test_what_was_written_reads_back_with_sizes_digests_and_roles(folder: Path) -> None:
    bundle = read_bundle(folder)
    assert {f.path: f.size for f in bundle.manifest.files} == {n: len(c) for n, c in FILES.items()}
    evidence = [f.path for f in bundle.manifest.files if f.role == "evidence"]
    assert evidence == ["cases/cases.safetensors", "report.json"]
    assert replace(bundle.manifest, files=(), payload_digest="", proof=TEMPLATE.proof) == TEMPLATE
    assert bundle.path("onnx/decoder_model_merged_q4.onnx").read_bytes() == FILES["onnx/decoder_model_merged_q4.onnx"]
    assert bundle.json("report.json") == {"passed": True}
    with pytest.raises(BundleError, match=r"does not list onnx/vision_encoder\.onnx"):
        bundle.path("onnx/vision_encoder.onnx")


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a").folder, make(tmp_path / "b").folder
    assert (a / MANIFEST).read_bytes() == (b / MANIFEST).read_bytes()


def test_the_payload_digest_is_that_of_the_documented_lines_and_ignores_evidence() -> None:
    files = [
        FileEntry("b", 2, "1" * 64, "payload"),
        FileEntry("a", 1, "0" * 64, "payload"),
        FileEntry("r", 3, "2" * 64, "evidence"),
    ]
    by_hand = subprocess.run(
        ["sha256sum"], input=f"a\t1\t{'0' * 64}\nb\t2\t{'1' * 64}\n", capture_output=True, text=True, check=True
    )
    assert payload_digest(files) == by_hand.stdout.split()[0]
    assert payload_digest(files[:2]) == payload_digest(files)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_flipped_bit_in_any_file_is_found_and_the_file_named(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    # in the manifest: a hex digit of the digest of a file, and not a letter of a key
    at = content.index(b'"sha256": "') + 12 if name == MANIFEST else len(content) // 2
    content[at] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=re.escape(name)):
        read_bundle(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("change", "message"), [(-1, "truncated"), (1, "too long")])
def test_a_file_of_another_size_is_found_even_without_digests(
    folder: Path, name: str, change: int, message: str
) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] if change < 0 else content + b"\0")
    with pytest.raises(BundleError, match=f"{re.escape(name)}: {message}"):
        read_bundle(folder, check_digests=False)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"{re.escape(name)}: missing"):
        read_bundle(folder)


@pytest.mark.parametrize("name", ["extra.bin", "onnx/extra.onnx", ".hidden", "cases/more.safetensors"])
def test_a_file_that_the_manifest_does_not_list_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    with pytest.raises(BundleError, match=f"{re.escape(name)}: extra"):
        read_bundle(folder)


@pytest.mark.parametrize("name", ["config.json", MANIFEST, "onnx", "new"])
def test_a_symbolic_link_is_refused_even_to_the_right_content(folder: Path, tmp_path: Path, name: str) -> None:
    if (folder / name).exists():
        shutil.move(folder / name, tmp_path / "moved")
    (folder / name).symlink_to(tmp_path / "moved")
    with pytest.raises(BundleError, match=f"{re.escape(name)}: a symbolic link"):
        read_bundle(folder)


def test_a_fifo_is_refused_and_not_read(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(BundleError, match=r"config\.json: not a regular file"):
        read_bundle(folder)


BAD_PATHS = ["../config.json", "/etc/passwd", "onnx/../config.json", "./config.json", "a//b", "a\\b", "c:x", "", "a\tb"]


@pytest.mark.parametrize("path", [*BAD_PATHS, MANIFEST])
def test_a_path_that_leaves_the_bundle_or_is_no_plain_path_is_refused(folder: Path, path: str) -> None:
    edit(folder, lambda m: m["files"][0].update(path=path))
    with pytest.raises(BundleError, match="a file's path is"):
        read_bundle(folder)


def test_a_file_listed_twice_or_differing_only_in_case_is_refused(folder: Path) -> None:
    edit(folder, lambda m: m["files"].append(m["files"][0] | {"path": m["files"][0]["path"].upper()}))
    with pytest.raises(BundleError, match="each file listed once"):
        read_bundle(folder)


def test_a_lying_size_is_found(folder: Path) -> None:
    def lie(manifest: dict[str, Any]) -> None:
        manifest["files"][0]["size"] += 1
        manifest["payload_digest"] = payload_digest(FileEntry(**f) for f in manifest["files"])

    edit(folder, lie)
    with pytest.raises(BundleError, match="truncated"):
        read_bundle(folder)


def test_a_payload_digest_that_is_not_that_of_the_files_is_refused(folder: Path) -> None:
    edit(folder, lambda m: m.update(payload_digest="0" * 64))
    with pytest.raises(BundleError, match="payload_digest is '0000"):
        read_bundle(folder)


def test_a_pending_proof_needs_the_flag(tmp_path: Path) -> None:
    folder = make(tmp_path / "bundle", proven=False).folder
    assert read_bundle(folder, allow_pending=True).manifest.proof.state == "pending"
    with pytest.raises(BundleError, match="proof is pending"):
        read_bundle(folder)


def json_manifest() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps(asdict(replace(TEMPLATE, payload_digest=payload_digest(())))))
    return content


def manifest_keys() -> list[tuple[str, ...]]:
    """Every key that a manifest must have, those of its parts included."""
    content = json_manifest()
    parts = {k: v for k, v in content.items() if isinstance(v, dict) and k not in ("tools", "opsets")}
    return [(key,) for key in content] + [(key, inner) for key, part in parts.items() for inner in part]


@pytest.mark.parametrize("keys", manifest_keys(), ids=".".join)
def test_a_missing_key_and_a_wrong_type_are_named(keys: tuple[str, ...]) -> None:
    for wrong in (1.5, [None], {"x": 1.5}, "absent"):
        content = json_manifest()
        parent = content
        for key in keys[:-1]:
            parent = parent[key]
        if wrong == "absent":
            del parent[keys[-1]]
        else:
            parent[keys[-1]] = wrong
        with pytest.raises(BundleError, match=rf"m\.json: .*{keys[-1]}.* (is|want)"):
            parse_manifest(content, "m.json")


@pytest.mark.parametrize(
    ("part", "key", "wrong"),
    [
        ("text", "context", 0),
        ("text", "layers", True),
        ("text", "image_token_id", 10**9),
        ("text", "eos_ids", [-1]),
        ("image", "tokens_per_tile", -4),
        ("proof", "state", "maybe"),
        ("proof", "report", "nowhere.json"),
        ("recipe", "tensors", {"embed": {"bits": 4}}),
    ],
)
def test_an_impossible_value_is_named(part: str, key: str, wrong: object) -> None:
    content = json_manifest()
    content[part][key] = wrong
    with pytest.raises(BundleError, match=rf"m\.json: .*({part}|{key})"):
        parse_manifest(content, "m.json")


def test_unknown_keys_are_allowed_and_a_newer_least_reader_is_not() -> None:
    content = json_manifest() | {"schema": 7, "colour": "blue"}
    assert parse_manifest(content, "m.json").schema == 7
    with pytest.raises(BundleError, match="needs a reader of schema 4"):
        parse_manifest(content | {"min_reader": 4, "files": "in a way not known yet"}, "m.json")
    second = {key: value for key, value in content.items() if key != "adapter"} | {"schema": 2}
    assert parse_manifest(second, "m.json").adapter is None  # adapter came with schema 3
    with pytest.raises(BundleError, match="adapter is missing"):
        parse_manifest(second | {"schema": 3}, "m.json")
    first = {key: value for key, value in second.items() if key != "notes"} | {"schema": 1}
    assert parse_manifest(first, "m.json").notes == ()  # notes came with schema 2
    with pytest.raises(BundleError, match="notes is missing"):
        parse_manifest(first | {"schema": 2}, "m.json")
    with pytest.raises(BundleError, match="min_reader"):
        parse_manifest(content | {"schema": 1, "min_reader": 0}, "m.json")


def test_a_manifest_names_the_adapter_that_was_merged_in() -> None:
    adapter = {"name": "org/adapter", "revision": "0" * 40, "sha256": "ab" * 32}
    assert parse_manifest(json_manifest() | {"adapter": adapter}, "m.json").adapter == AdapterSource(**adapter)
    assert parse_manifest(json_manifest(), "m.json").min_reader == 1  # a reader that knows no adapter runs the bundle
    with pytest.raises(BundleError, match=r"adapter\.sha256 is 'abc', want 64 hex digits"):
        parse_manifest(json_manifest() | {"adapter": adapter | {"sha256": "abc"}}, "m.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as JSON"),
        ("[]", "holds a list"),
        ('{"schema": 1, "schema": 1}', "repeats a key"),
        ('{"schema": NaN}', "NaN"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"schema": ' + "9" * 5000 + "}", "cannot be read as JSON"),
    ],
    ids=["empty", "list", "repeated", "nan", "deep", "huge"],
)
def test_what_is_no_manifest_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=message):
        read_bundle(folder)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a folder"):
        read_bundle(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"manifest\.json: missing"):
        read_bundle(tmp_path)


# ---- the proof phase


def test_a_proof_adds_evidence_and_leaves_the_payload_alone(tmp_path: Path) -> None:
    bundle = make(tmp_path / "bundle", proven=False)
    edit(bundle.folder, lambda m: m.update(colour="blue"))
    write_files(tmp_path / "proof", {"cases/cases.json": b"[]", "report.json": b"{}"})
    proven = replace_manifest(bundle, Proof("passed", "report.json"), tmp_path / "proof")
    assert proven == read_bundle(bundle.folder)
    assert proven.manifest.payload_digest == bundle.manifest.payload_digest
    assert {f.path for f in proven.manifest.files} - {f.path for f in bundle.manifest.files} == {
        "cases/cases.json",
        "report.json",
    }
    assert json.loads((bundle.folder / MANIFEST).read_text())["colour"] == "blue"
    with pytest.raises(BundleError, match="not pending"):
        replace_manifest(proven, Proof("passed", "report.json"))


def test_a_proof_of_a_bundle_that_has_changed_meanwhile_is_refused_and_adds_nothing(tmp_path: Path) -> None:
    bundle = make(tmp_path / "bundle", proven=False)
    write_files(tmp_path / "proof", {"report.json": b"{}"})
    before = (bundle.folder / MANIFEST).read_bytes()
    (bundle.folder / "config.json").write_bytes(b"[]")
    with pytest.raises(BundleError, match=r"config\.json: content has changed"):
        replace_manifest(bundle, Proof("passed", "report.json"), tmp_path / "proof")
    assert not (bundle.folder / "report.json").exists()
    assert (bundle.folder / MANIFEST).read_bytes() == before


@pytest.mark.parametrize("name", ["onnx/more.onnx", "config.json"])
def test_a_proof_cannot_add_payload(tmp_path: Path, name: str) -> None:
    bundle = make(tmp_path / "bundle", proven=False)
    write_files(tmp_path / "proof", {name: b""})
    with pytest.raises(BundleError, match="cases and reports only"):
        replace_manifest(bundle, Proof("passed", None), tmp_path / "proof")


def test_a_proof_that_names_no_report_of_its_own_leaves_the_pending_bundle(tmp_path: Path) -> None:
    bundle = make(tmp_path / "bundle", proven=False)
    write_files(tmp_path / "proof", {"report.json": b"{}"})
    with pytest.raises(BundleError, match=r"proof\.report is 'elsewhere\.json'"):
        replace_manifest(bundle, Proof("passed", "elsewhere.json"), tmp_path / "proof")
    assert read_bundle(bundle.folder, allow_pending=True) == bundle
    assert not (bundle.folder / "report.json").exists()


# ---- whole or absent

KILLED = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from runtimes.bundle import stage_bundle, write_manifest
from runtimes.manifest import parse_manifest
manifest = parse_manifest(json.loads(sys.argv[3]), "the test")
print("ready", flush=True)
with stage_bundle(Path(sys.argv[2])) as folder:
    for i in range(5):
        (folder / f"file-{i}").write_bytes(bytes(1000))
        time.sleep(0.002)
    write_manifest(folder, manifest)
"""


def start(code: str, *arguments: Path | str) -> subprocess.Popen[str]:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", code, str(root), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_killed_at_any_moment_there_is_no_bundle_or_a_whole_one_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    outcomes = set()
    for at in [0.0, 0.004, 0.01, *(random.Random(3).uniform(0, 0.03) for _ in range(2)), None]:
        out = tmp_path / f"bundle-{at}"
        process = start(KILLED, out, json.dumps(json_manifest()))
        if at is None:
            process.wait()
        else:
            time.sleep(at)
        end(process)
        outcomes.add(out.exists())
        if out.exists():
            assert len(read_bundle(out, allow_pending=True).manifest.files) == 5
        else:
            make(out)
        assert sorted(p.name for p in tmp_path.iterdir()) == [out.name]
        shutil.rmtree(out)
    assert outcomes == {False, True}  # killed at once and not at all are among them


PROOF_KILLED = """
import itertools, os, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import runtimes.bundle as b
from runtimes.manifest import Proof
pending, evidence = Path(sys.argv[2]), Path(sys.argv[3])
left = 0
def dying(call):
    def inner(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
        return call(*args, **kwargs)
    return inner
print("ready", flush=True)
for step in itertools.count():
    folder = pending.with_name(f"at-{step}")
    shutil.copytree(pending, folder)
    if not (child := os.fork()):
        left = step
        shutil.copyfile, os.fsync = dying(shutil.copyfile), dying(os.fsync)
        Path.replace, Path.unlink, Path.write_text = map(dying, (Path.replace, Path.unlink, Path.write_text))
        b.replace_manifest(b.read_bundle(folder, allow_pending=True), Proof("passed", "report.json"), evidence)
        os._exit(0)
    if not os.waitpid(child, 0)[1]:
        break
"""


def test_a_proof_killed_at_any_step_leaves_the_pending_or_the_proven_bundle(tmp_path: Path) -> None:
    evidence = {"cases/a": b"a", "cases/b": b"b", "report.json": b"{}"}
    write_files(tmp_path / "proof", evidence)
    make(tmp_path / "pending", proven=False)
    process = start(PROOF_KILLED, tmp_path / "pending", tmp_path / "proof")
    assert process.wait() == 0
    end(process)
    states = []
    for step in range(len(list(tmp_path.glob("at-*")))):
        bundle = read_bundle(tmp_path / f"at-{step}", allow_pending=True)
        states.append(bundle.manifest.proof.state)
        if states[-1] == "pending":
            bundle = replace_manifest(bundle, Proof("passed", "report.json"), tmp_path / "proof")
        assert bundle == read_bundle(bundle.folder)
        assert {f.path for f in bundle.manifest.files if f.role == "evidence"} == set(evidence)
    assert len(states) > 10
    assert states == sorted(states, reverse=True)  # pending up to one step, passed from it on
    assert states[0] == "pending"


def test_the_staged_folder_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    with stage_bundle(tmp_path / "bundle") as first:
        with stage_bundle(tmp_path / "bundle") as second:
            assert first.exists()
            assert first != second
            write_files(second, {"who": b"second"})
        assert (tmp_path / "bundle/who").read_bytes() == b"second"
        with pytest.raises(BundleError, match="exists already"), stage_bundle(tmp_path / "bundle"):
            raise AssertionError("the body ran")
        (first / "who").write_bytes(b"first")
        (tmp_path / "bundle").rename(tmp_path / "elsewhere")
    assert (tmp_path / "bundle/who").read_bytes() == b"first"


def test_other_folders_are_not_taken_for_left_overs(tmp_path: Path) -> None:
    kept = [".bundle.partial-mine", ".other.partial-01234567", "bundle.partial-01234567"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".bundle.partial-0123abcd").mkdir()
    make(tmp_path / "bundle")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, "bundle"])


@pytest.mark.parametrize("kind", ["bundle", "file", "empty folder", "dangling link"])
def test_an_existing_target_is_refused_before_any_work_and_is_untouched(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "bundle"
    match kind:
        case "bundle":
            make(out)
        case "file":
            out.write_bytes(b"precious")
        case "empty folder":
            out.mkdir()
        case _:
            out.symlink_to(tmp_path / "nowhere")
    before = out.lstat()
    with pytest.raises(BundleError, match="exists already"), stage_bundle(out):
        raise AssertionError("the body ran")
    assert out.lstat() == before
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_target_that_appears_meanwhile_is_refused_at_the_rename(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "bundle"
    precious = out if kind == "file" else out / "precious"
    with pytest.raises(BundleError, match="exists already"), stage_bundle(out) as folder:
        write_files(folder, FILES | {os.path.relpath(precious, folder): b"precious"})
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    assert precious.read_bytes() == b"precious"


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), stage_bundle(tmp_path / "bundle") as folder:
        write_files(folder, FILES | {"config.json/inside": b""})
    assert list(tmp_path.iterdir()) == []


def test_parents_of_the_target_are_made(tmp_path: Path) -> None:
    make(tmp_path / "build/deep/bundle")
    read_bundle(tmp_path / "build/deep/bundle")


@pytest.mark.parametrize("out", ["/proc/bundle", "/dev/null/bundle"])
def test_a_place_that_cannot_be_written_is_named(out: str) -> None:
    with pytest.raises(BundleError, match=f"{out}: cannot be written"), stage_bundle(Path(out)):
        raise AssertionError("the body ran")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_write_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(BundleError, match="cannot be written: Permission denied"), stage_bundle(tmp_path / "b"):
            raise AssertionError("the body ran")
    finally:
        tmp_path.chmod(0o700)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_named_and_nothing_is_left_on_it(small_disk: Path) -> None:
    with (
        pytest.raises(BundleError, match=f"{small_disk}/bundle: no space left"),
        stage_bundle(small_disk / "bundle") as f,
    ):
        write_files(f, FILES | {"onnx/more": bytes(100_000)})
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_during_a_proof_leaves_the_pending_bundle(small_disk: Path, tmp_path: Path) -> None:
    bundle = make(small_disk / "bundle", proven=False)
    write_files(tmp_path / "proof", {"report.json": b"{}", "cases/0": bytes(60_000)})
    with pytest.raises(BundleError, match="no space left"):
        replace_manifest(bundle, Proof("passed", "report.json"), tmp_path / "proof")
    assert read_bundle(bundle.folder, allow_pending=True) == bundle
    assert not (bundle.folder / "report.json").exists()


def test_a_disk_that_is_full_at_the_last_flush_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match="no space left"):
        make(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
