"""The Kotlin port against the golden cases and, on what was drawn at random, against the runtime in Python.

Its sources are compiled here and asked in one JVM. Skipped, visibly, where Java, npm or a package registry is missing.
Not covered: Android, whose decoder, engine and activity are a sample that has not run (runtimes/kotlin/README.md).
"""

import hashlib
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from tokenizers import Tokenizer, pre_tokenizers

from runtimes import keys, memory, verify
from runtimes.bundle import file_digest, read_bundle
from runtimes.generate import Sampling, TextStream, log_softmax, scores
from runtimes.manifest import BundleError, parse_json, parse_manifest
from runtimes.preprocess import (
    ImageSettings,
    cut,
    grid_size,
    normalize,
    read_settings,
    resized_size,
    settings_from_config,
)
from runtimes.prompt import END, IMAGE, ImagePart, Message, PromptEncoder
from runtimes.runner import graph_paths
from runtimes.tensorfile import TensorFileError, read_header, write_tensors
from tests.kotlin_port import Port, PortError, bits, class_path, doubles, encoded, floats, same_bytes

pytestmark = pytest.mark.client


@pytest.fixture(scope="module")
def classes() -> str:
    """The class path of the compiled port."""
    return class_path()


@pytest.fixture(scope="module")
def port(classes: str) -> Iterator[Port]:
    """The port, running."""
    port = Port(classes)
    yield port
    port.close()


@pytest.fixture(scope="module")
def folder(demo_checkpoint: Path) -> Path:
    """The carried checkpoint, whose tokenizer has SmolVLM2's parts."""
    return demo_checkpoint


@pytest.fixture(scope="module")
def encoder(folder: Path) -> PromptEncoder:
    return PromptEncoder.from_folder(folder)


# ---- golden cases


def check(classes: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["java", "-cp", classes, "smolport.CheckKt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", ["tiny_bundle", "demo_bundle", "tiny_ios_bundle"])
def test_every_golden_case_is_equal(port: Port, name: str, request: pytest.FixtureRequest) -> None:
    bundle: Path = request.getfixturevalue(name)
    answer = port.ask("check", bundle=str(bundle))
    assert answer["difference"] is None
    cases = verify.read_cases(bundle)
    assert {len(case.images) for case in cases} >= {0, 1, 2}
    assert [line for line in answer["lines"] if line.startswith("case ")] == [
        f"case {c.name}: {len(c.images)} images, {len(c.tiles)} tiles and {len(c.ids)} ids equal" for c in cases
    ]


def test_the_program_says_what_is_equal_and_exits_by_the_verdict(
    classes: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    done = check(classes, tiny_bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1 + len(verify.read_cases(tiny_bundle))
    wrong = altered(tiny_bundle, tmp_path, {"cases/cases.json": lambda text: text.replace('"Compare', '"compare')})
    done = check(classes, wrong)
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: case two-turns: (id \d+ of the prompt is \d+|prompt has \d+ ids), want \d+\n", done.stderr
    )
    for arguments in (
        [],
        [tiny_bundle, tiny_bundle],
        ["--key"],
        ["--min-version", "2", tiny_bundle],
        [tmp_path / "none"],
    ):
        done = check(classes, *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
    assert check(classes, "--help").stdout.startswith("usage: check")


# ---- planted faults


def altered(bundle: Path, out: Path, edits: dict[str, Callable[[str], str]], name: str = "bundle") -> Path:
    """A copy of a bundle with text files changed, and a manifest that fits them again."""
    copy = out / name
    shutil.copytree(bundle, copy)
    for path, edit in edits.items():
        text = (copy / path).read_text("utf-8")
        changed = edit(text)
        assert changed != text, "the edit changes nothing"
        (copy / path).write_text(changed, "utf-8")
    fit_manifest(copy)
    return copy


def fit_manifest(copy: Path) -> None:
    """Sizes and digests in a manifest by what lies there now; the report is of that payload."""
    path = copy / "manifest.json"
    content = json.loads(path.read_text("utf-8"))
    for entry in content["files"]:
        entry["size"] = (copy / entry["path"]).stat().st_size
        entry["sha256"] = file_digest(copy / entry["path"])
    lines = sorted(f"{f['path']}\t{f['size']}\t{f['sha256']}\n" for f in content["files"] if f["role"] == "payload")
    content["payload_digest"] = hashlib.sha256("".join(lines).encode()).hexdigest()
    path.write_text(json.dumps(content), "utf-8")


def refused(port: Port, bundle: Path, complaint: str, **fields: object) -> None:
    """Asserts that the port refuses a bundle for that reason."""
    with pytest.raises(PortError, match=complaint):
        port.ask("check", bundle=str(bundle), **fields)


def test_a_changed_byte_of_any_file_is_refused_by_its_name(port: Port, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    for entry in read_bundle(tiny_bundle).manifest.files:
        path = copy / entry.path
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        refused(port, copy, rf"{entry.path}: content has changed: SHA-256")
        path.write_bytes(data[:-1])
        refused(port, copy, rf"{entry.path}: truncated: {entry.size - 1} bytes, manifest.json says {entry.size}")
        path.write_bytes(data + b"\n")
        refused(port, copy, rf"{entry.path}: too long")
        path.write_bytes(data)
    assert port.ask("check", bundle=str(copy))["difference"] is None


def test_a_missing_extra_or_linked_file_is_refused(port: Port, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    (copy / "config.json").rename(tmp_path / "config.json")
    refused(port, copy, r"config\.json: missing, but listed")
    (copy / "config.json").symlink_to(tmp_path / "config.json")
    refused(port, copy, r"config\.json: a symbolic link")
    (copy / "config.json").unlink()
    shutil.copy(tmp_path / "config.json", copy / "config.json")
    (copy / "onnx" / "more.bin").write_bytes(b"")
    refused(port, copy, r"onnx/more\.bin: extra, not listed")
    (copy / "onnx" / "more.bin").unlink()
    (copy / "report.md").unlink()
    refused(port, copy, r"report\.md: missing")
    for path in [*(copy / "cases").iterdir(), copy / "report.json", copy / "required_operators.config"]:
        path.unlink()
    refused(port, copy, "its evidence was left out")
    refused(port, tmp_path / "nothing", "no folder that can be read")
    refused(port, tmp_path, r"manifest\.json: is missing")


def test_only_the_pinned_key_and_a_version_that_is_new_enough_pass(
    port: Port, tiny_bundle: Path, tmp_path: Path
) -> None:
    pytest.importorskip("nacl")
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    mine, other = tmp_path / "mine", tmp_path / "other"
    key, foreign = str(keys.new_key(mine)), str(keys.new_key(other))
    refused(port, copy, r"is not signed", key=key)
    manifest = (copy / "manifest.json").read_bytes()
    (copy / "manifest.json.sig").write_bytes(keys.sign(manifest, mine))
    lines = port.ask("check", bundle=str(copy), key=key)["lines"]
    version = json.loads(manifest)["version"]
    assert lines[0] == f"signature: by the given key, version {version}"
    assert port.ask("check", bundle=str(copy))["difference"] is None
    refused(port, copy, "another key signed it, or it was changed since", key=foreign)
    refused(port, copy, f"version is {version}, want {version + 1} or later", key=key, least=version + 1)
    (copy / "manifest.json").write_bytes(manifest + b" ")
    refused(port, copy, "another key signed it, or it was changed since", key=key)
    (copy / "manifest.json").write_bytes(manifest)
    for bad in (b"\0" * 64, b"\xff" * 64):
        (copy / "manifest.json.sig").write_bytes(bad)
        refused(port, copy, "another key signed it, or it was changed since", key=key)
    for bad in (b"", b"\0" * 63, b"\0" * 65):
        (copy / "manifest.json.sig").write_bytes(bad)
        refused(port, copy, f"has {len(bad)} bytes, want 64", key=key)
    (copy / "manifest.json.sig").unlink()
    refused(port, copy, "is not signed", key=key)
    refused(port, copy, "is no Ed25519 public key in PEM", key=str(mine))
    refused(port, copy, "cannot be read", key=str(tmp_path / "none"))


MANIFEST_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (lambda m: m.update(schema=9, min_reader=9), "needs a reader of schema 9, this one knows"),
    "min reader": (lambda m: m.update(min_reader=0), "min_reader is 0, want 1 to"),
    "missing": (lambda m: m.pop("text"), "text is missing"),
    "type": (lambda m: m["text"].update(vocab="many"), r"text\.vocab is a string, want an integer"),
    "true": (lambda m: m["text"].update(vocab=True), r"text\.vocab is true or false, want an integer"),
    "real": (lambda m: m["image"].update(tile_size=60.0), r"tile_size is a number, want an integer"),
    "zero": (lambda m: m["image"].update(tile_size=0), r"image\.tile_size is 0, want 1 to"),
    "huge": (lambda m: m["text"].update(hidden=1 << 40), r"text\.hidden is 1099511627776, want 1 to"),
    "token": (lambda m: m["text"].update(image_token_id=m["text"]["vocab"]), r"image_token_id is \d+, want 0 to"),
    "target": (lambda m: m.update(target="tflite"), "target is tflite, want onnx or coreml"),
    "state": (lambda m: m["proof"].update(state="sure"), "state is sure, want pending or passed"),
    "pending": (lambda m: m["proof"].update(state="pending"), "proof is pending"),
    "report": (lambda m: m["proof"].update(report="else.json"), "report is else.json, want a file"),
    "digest": (lambda m: m.update(payload_digest="0" * 64), "payload_digest is 0+, want [0-9a-f]{64} by the files"),
    "up": (lambda m: m["files"][0].update(path="../x"), r"files\[0\]\.path is \.\./x, want one below the bundle"),
    "absolute": (lambda m: m["files"][0].update(path="/etc/passwd"), r"path is /etc/passwd"),
    "backslash": (lambda m: m["files"][0].update(path="a\\b"), r"path is a\\b, want"),
    "drive": (lambda m: m["files"][0].update(path="C:x"), "path is C:x, want"),
    "dot": (lambda m: m["files"][0].update(path="a/./b"), "path is a/./b, want"),
    "control": (lambda m: m["files"][0].update(path="a\n\x1b[31mb"), r"path is a\?\?\[31mb, want"),
    "direction": (lambda m: m["files"][0].update(path="a\u202eb"), r"path is a\?b, want"),
    "manifest": (lambda m: m["files"][0].update(path="MANIFEST.json"), "path is MANIFEST.json, want"),
    "signature": (lambda m: m["files"][0].update(path="manifest.json.SIG"), "path is manifest.json.SIG, want"),
    "twice": (lambda m: m["files"].append(m["files"][0] | {"path": m["files"][0]["path"].upper()}), "lists .* twice"),
    "composed": (
        lambda m: m["files"].extend([m["files"][0] | {"path": "é"}, m["files"][0] | {"path": "e\u0301"}]),
        "lists .* twice",
    ),
    "folder": (
        lambda m: m["files"].append(m["files"][0] | {"path": "config.json/x"}),
        "config.json is a file, and a f",
    ),
    "spelling": (lambda m: m["files"].append(m["files"][0] | {"path": "Onnx/x"}), "a folder that is spelled"),
    "hex": (lambda m: m["files"][0].update(sha256="A" * 64), "sha256 is A+, want 64 hex digits"),
    "size": (lambda m: m["files"][0].update(size=-1), r"files\[0\]\.size is -1, want 0 to"),
    "role": (lambda m: m["files"][0].update(role="both"), "role is both, want payload or evidence"),
}


@pytest.mark.parametrize("fault", MANIFEST_FAULTS)
def test_a_wrong_manifest_is_refused_by_its_field(port: Port, tiny_bundle: Path, tmp_path: Path, fault: str) -> None:
    edit, complaint = MANIFEST_FAULTS[fault]
    content = json.loads((tiny_bundle / "manifest.json").read_text("utf-8"))
    edit(content)
    (tmp_path / "manifest.json").write_text(json.dumps(content), "utf-8")
    refused(port, tmp_path, complaint)
    if fault not in ("pending", "huge", "target"):  # Python parses those, and refuses them later
        with pytest.raises(BundleError):
            parse_manifest(content, "manifest.json")


def test_a_manifest_with_a_repeated_key_is_refused(port: Port, tiny_bundle: Path, tmp_path: Path) -> None:
    text = (tiny_bundle / "manifest.json").read_text("utf-8")
    (tmp_path / "manifest.json").write_text('{"version": 9,' + text.lstrip()[1:], "utf-8")
    refused(port, tmp_path, r"manifest\.json: is not JSON: an object repeats the key version")


def test_keys_that_came_later_are_ignored_and_those_that_were_not_yet_are_not_missed(
    port: Port, tiny_bundle: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    content = json.loads((copy / "manifest.json").read_text("utf-8"))
    (copy / "manifest.json").write_text(json.dumps(content | {"schema": 77, "more": {"x": [1, 2]}}), "utf-8")
    assert port.ask("check", bundle=str(copy))["difference"] is None
    del content["notes"], content["adapter"], content["calibration"]
    (copy / "manifest.json").write_text(json.dumps(content | {"schema": 1}), "utf-8")
    assert port.ask("check", bundle=str(copy))["difference"] is None


CASE_FAULTS: dict[str, tuple[Callable[[list[dict[str, Any]]], object], str]] = {
    "id": (
        lambda c: c[1]["ids"].__setitem__(4, c[1]["ids"][4] ^ 1),
        r"case one-tile: id 4 of the prompt is \d+, want \d+",
    ),
    "short": (lambda c: c[0]["ids"].pop(), r"case text: prompt has \d+ ids, want \d+"),
    "grid": (lambda c: c[1].update(grids=[[0, 1]]), "an image of 0 rows and 1 columns"),
    "edge": (
        lambda c: c[2].update(longest_edge=c[1]["longest_edge"]),
        "case split: tile grid of image 0 is 0 x 0, want",
    ),
    "role": (lambda c: c[0]["turns"][0].update(role="root"), "role is root, want one of"),
    "no image": (lambda c: c[0]["turns"][0]["parts"].append(None), "is an image without a grid"),
    "no part": (lambda c: c[1]["turns"][0]["parts"].pop(0), "more grids than images"),
    "vocab": (lambda c: c[0]["tokens"].__setitem__(0, 1 << 30), "is 1073741824, want 0 to"),
    "none": (lambda c: c.clear(), "holds no case"),
    "name": (lambda c: c[0].update(name="other"), "has no tensor other.tiles"),
}


@pytest.mark.parametrize("fault", CASE_FAULTS)
def test_a_changed_case_is_a_difference(port: Port, tiny_bundle: Path, tmp_path: Path, fault: str) -> None:
    edit, complaint = CASE_FAULTS[fault]

    def change(text: str) -> str:
        content = json.loads(text)
        edit(content["cases"])
        return json.dumps(content)

    copy = altered(tiny_bundle, tmp_path, {"cases/cases.json": change})
    try:
        found = port.ask("check", bundle=str(copy))["difference"]
    except PortError as exc:
        found = str(exc)
    assert re.search(complaint, found or ""), found


def test_a_changed_pixel_is_a_difference(port: Port, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    path = copy / verify.CASES_DATA
    info = read_header(path)["split.tiles"]
    side = info.shape[1]
    data = bytearray(path.read_bytes())
    at = ((1 * side + 3) * side + 5) * 3 + 2
    data[info.offset + at] ^= 1
    path.write_bytes(data)
    fit_manifest(copy)
    found = port.ask("check", bundle=str(copy))["difference"]
    value = data[info.offset + at]
    assert found == f"case split: pixel at tile 1, row 3, column 5, channel 2 is {value ^ 1}, want {value}"


def test_a_report_of_another_payload_is_refused(port: Port, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = altered(tiny_bundle, tmp_path, {"generation_config.json": lambda text: text + "\n"})
    refused(port, copy, r"report\.json: is the proof of payload [0-9a-f]{64}, this one is")


# ---- safetensors and JSON


def header(content: object) -> bytes:
    text = (content if isinstance(content, str) else json.dumps(content)).encode()
    return len(text).to_bytes(8, "little") + text


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


TENSOR_FAULTS: dict[str, bytes] = {
    "empty": b"",
    "length": (1 << 63).to_bytes(8, "little") + b"{}",
    "beyond": (99).to_bytes(8, "little") + b"{}",
    "truncated": header({"a": entry()}) + b"123",
    "owned by none": header({"a": entry()}) + b"12345",
    "hole": header({"a": entry(), "b": entry(offsets=(5, 9))}) + b"123456789",
    "overlap": header({"a": entry(), "b": entry(offsets=(3, 7))}) + b"1234567",
    "dtype": header({"a": entry(dtype="F4")}) + b"1234",
    "shape": header({"a": entry(shape=(5,))}) + b"1234",
    "negative": header({"a": entry(shape=(-4,))}) + b"1234",
    "product": header({"a": entry(shape=(1 << 62, 8))}) + b"1234",
    "dimensions": header({"a": entry(shape=(1, 1, 1, 1, 1, 1, 1, 1, 4))}) + b"1234",
    "offsets": header({"a": entry(offsets=(4, 0))}) + b"1234",
    "three": header({"a": entry(offsets=(0, 2, 4))}) + b"1234",
    "real": header({"a": entry(shape=(4.0,))}) + b"1234",
    "more": header({"a": entry() | {"x": 1}}) + b"1234",
    "less": header({"a": {"dtype": "U8", "shape": [4]}}) + b"1234",
    "twice": header('{"a": %s, "a": %s}' % ((json.dumps(entry()),) * 2)) + b"1234",
    "list": header([]),
    "no json": header("{"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_a_file_that_lies_about_its_tensors_is_refused(port: Port, tmp_path: Path, fault: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(TENSOR_FAULTS[fault])
    with pytest.raises(TensorFileError):
        read_header(path)
    with pytest.raises(PortError, match=r"a\.safetensors"):
        port.ask("tensors", file=str(path))


def test_a_file_cut_anywhere_is_refused(port: Port, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 4), np.uint8)})
    data = path.read_bytes()
    want = [[name, i.dtype, list(i.shape), i.offset, i.size_bytes] for name, i in read_header(path).items()]
    assert sorted(port.ask("tensors", file=str(path))) == sorted(want)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(PortError):
            port.ask("tensors", file=str(path))


def tree(value: object) -> object:
    """A JSON value as the test server writes it."""
    match value:
        case float():
            return {"double": bits(value)}
        case list():
            return [tree(v) for v in value]
        case dict():
            return {"members": [[k, tree(v)] for k, v in value.items()]}
    return value


json_texts = st.text(st.characters(codec="utf-8"), max_size=8)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | json_texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(json_texts, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300)
@given(
    content=st.dictionaries(json_texts, json_values, max_size=4), plain=st.booleans(), indent=st.sampled_from([None, 1])
)
def test_any_json_is_read_as_python_reads_it(
    port: Port, content: dict[str, Any], plain: bool, indent: int | None
) -> None:
    text = json.dumps(content, ensure_ascii=plain, indent=indent).encode()
    assert port.ask("json", text=encoded(text)) == tree(parse_json(text, "text"))


@settings(max_examples=500)
@given(data=st.data())
def test_json_that_python_refuses_is_refused(port: Port, data: st.DataObject) -> None:
    """Drawn from pieces of JSON, most of which is none. The port refuses more: halves of characters, long integers."""
    pieces = [
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        '"a"',
        '"b"',
        '"',
        "\\u00e9",
        "\\ud83e",
        "1",
        "-",
        "0",
        ".5",
        "e9",
        "true",
        "null",
        "NaN",
        " ",
        "\t",
        "\x01",
    ]
    text = '{"a":' + "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=8))) + "}"
    try:
        wanted = tree(parse_json(text.encode(), "text"))
    except BundleError:
        with pytest.raises(PortError, match=r"text\.json"):
            port.ask("json", text=encoded(text.encode()))
        return
    try:
        found = port.ask("json", text=encoded(text.encode()))
    except PortError as exc:
        if re.search(r"half of a surrogate pair|beyond 64 bits", str(exc)):
            return
        raise
    assert found == wanted


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"1", b'{"a":1,"a":2}', b'{"a":' + b"[" * 100_000, b'{"a":1}x', b'{"a":01}', b'{"a":1e999}',
        b'{"a":"\xff"}', b'{"a":"\xed\xa0\x80"}', b'\xef\xbb\xbf{}', b'{"a":"\\ud800"}', b'{"a":"\\udc00\\ud800"}',
        b'{"a":' + b"1" * 5000 + b"}", b'{"a":[' + b"0," * (1 << 20) + b"0]}",
    ],
)  # fmt: skip
def test_hostile_json_is_refused(port: Port, text: bytes) -> None:
    with pytest.raises(PortError, match=r"text\.json"):
        port.ask("json", text=encoded(text))


# ---- pictures


def picture(width: int, height: int, seed: int, channels: int = 3) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Noise with edges as hard as there are: overshoots are clipped."""
    random = np.random.default_rng(seed)
    noise = random.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return np.where(random.random((height, width, 1)) < 0.5, noise, (noise > 127) * np.uint8(255)).astype(np.uint8)


def assert_cut(port: Port, rgb: np.ndarray[Any, np.dtype[np.uint8]], settings: ImageSettings) -> None:
    tiles, rows, cols = cut(Image.fromarray(rgb), settings)
    answer = port.ask(
        "cut",
        width=rgb.shape[1],
        height=rgb.shape[0],
        rgb=encoded(rgb),
        tile=settings.tile_size,
        longest_edge=settings.longest_edge,
        split=settings.split,
        resize=settings.resize,
    )
    assert (answer["rows"], answer["cols"], answer["count"]) == (rows, cols, len(tiles))
    same_bytes(answer, np.stack([np.asarray(t) for t in tiles]))


sides = st.one_of(st.integers(1, 9), st.integers(1, 260))


@settings(max_examples=400)
@given(
    width=sides,
    height=sides,
    tile=st.sampled_from([7, 16, 60, 96]),
    budget=st.integers(1, 4),
    odd=st.integers(0, 1),
    split=st.booleans(),
    resize=st.booleans(),
    seed=st.integers(0, 1 << 32),
)
def test_pixels_are_equal_for_any_size(
    port: Port, width: int, height: int, tile: int, budget: int, odd: int, split: bool, resize: bool, seed: int
) -> None:
    assert_cut(port, picture(width, height, seed), ImageSettings(tile, tile * budget + odd, split, resize))


@pytest.mark.parametrize(
    ("size", "tile", "edge"),
    [
        ((1, 1), 384, 1536), ((1, 1), 512, 2048), ((1, 3000), 384, 1536), ((3000, 1), 384, 1536), ((7, 4099), 96, 384),
        ((640, 480), 384, 1536), ((1001, 333), 512, 1024), ((1, 1), 512, 5000), ((9, 2), 512, 16384),
        ((2, 9), 500, 4097), ((5000, 40), 384, 4096),
    ],
)  # fmt: skip
def test_pixels_are_equal_at_published_sizes_extreme_shapes_and_the_cap(
    port: Port, size: tuple[int, int], tile: int, edge: int
) -> None:
    assert_cut(port, picture(*size, seed=tile + edge), ImageSettings(tile, edge))


@settings(max_examples=300)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    to=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    seed=st.integers(0, 1 << 32),
)
def test_any_resize_is_pillows_in_its_order_of_passes(
    port: Port, size: tuple[int, int], to: tuple[int, int], seed: int
) -> None:
    rgb = picture(*size, seed=seed)
    answer = port.ask("resize", width=size[0], height=size[1], rgb=encoded(rgb), to=to)
    same_bytes(answer, np.asarray(Image.fromarray(rgb).resize(to, Image.Resampling.LANCZOS)))


def test_resizing_begins_with_the_columns_exactly_where_pillow_does(port: Port) -> None:
    """Around twice as many rows lost as columns, on pictures whose two orders differ."""
    for columns_lost in (-3, 0, 1, 2, 7):
        for rows_lost in range(2 * columns_lost - 2, 2 * columns_lost + 3):
            rgb = picture(40, 40, seed=100 * columns_lost + rows_lost + 1000)
            to = (40 - columns_lost, 40 - rows_lost)
            answer = port.ask("resize", width=40, height=40, rgb=encoded(rgb), to=to)
            same_bytes(answer, np.asarray(Image.fromarray(rgb).resize(to, Image.Resampling.LANCZOS)))


def test_sizes_are_equal_for_thousands_of_pictures(port: Port) -> None:
    random = np.random.default_rng(5)
    wanted, asked = [], []
    for _ in range(5000):
        width, height = (int(2 ** random.uniform(0, 14)) for _ in range(2))
        tile = int(random.choice([16, 60, 96, 384, 512]))
        edge = int(random.choice([tile, 2 * tile, 3 * tile, 4 * tile, int(random.integers(1, 16385))]))
        w, h = resized_size(width, height, edge)
        asked.append([width, height, edge, tile])
        wanted.append([w, h, *grid_size(w, h, tile)])
    assert port.ask("sizes", sizes=asked) == wanted


@pytest.mark.parametrize("size", [(1, 1), (5, 3)])
@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_turned_by_exif_as_pillow_turns_them(port: Port, size: tuple[int, int], orientation: int) -> None:
    rgb = picture(*size, seed=orientation)
    image = Image.fromarray(rgb)
    image.getexif()[0x0112] = orientation
    turned = ImageOps.exif_transpose(image)
    answer = port.ask("upright", width=size[0], height=size[1], rgb=encoded(rgb), orientation=orientation)
    assert (answer["width"], answer["height"]) == turned.size
    same_bytes(answer, np.asarray(turned))


def test_every_byte_with_every_transparency_is_composited_on_white_as_pillow_does(port: Port) -> None:
    alpha, value = np.mgrid[0:256, 0:256].astype(np.uint8)
    rgba = np.stack([value, 255 - value, value ^ 85, alpha], axis=-1)
    white = Image.new("RGBA", (256, 256), (255, 255, 255, 255))
    wanted = np.asarray(Image.alpha_composite(white, Image.fromarray(rgba)).convert("RGB"))
    same_bytes(port.ask("on white", width=256, height=256, rgba=encoded(rgba)), wanted)


def test_normalized_tiles_are_equal_bit_for_bit(port: Port, folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
    content |= {"image_mean": [0.5, 0.485, 0.4], "image_std": [0.5, 0.229, 0.3], "rescale_factor": 0.00392156862745098}
    side = content["max_image_size"]["longest_edge"]
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(content))
    tiles = np.stack([picture(side, side, seed=s) for s in (1, 2)])
    found = floats(port.ask("normalize", settings=str(path), tiles=encoded(tiles)))
    wanted = normalize(tiles, read_settings(path))
    assert np.array_equal(found.view(np.uint32), wanted.reshape(-1).view(np.uint32))


SETTING_FAULTS: list[tuple[str, object]] = [
    ("size", {"longest_edge": 0}), ("size", {"longest_edge": 1 << 20}), ("size", None),
    ("size", {"longest_edge": True}), ("max_image_size", {"height": 5}), ("do_resize", "yes"), ("do_rescale", False),
    ("do_normalize", False),
    ("do_convert_rgb", False), ("image_mean", [0.5]), ("image_mean", "x"), ("image_std", [0.5, 0.5, 0]),
    ("image_std", [0.5, 0.5, -1]), ("resample", 2), ("resample", "1"), ("rescale_factor", 0), ("rescale_factor", 2),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), SETTING_FAULTS)
def test_settings_that_the_port_does_not_know_are_refused_by_name(
    port: Port, folder: Path, field: str, value: object
) -> None:
    content = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
    ours = settings_from_config(content, "preprocessor_config.json")
    assert port.ask("settings", json=encoded(json.dumps(content).encode())) == [
        ours.tile_size, ours.longest_edge, ours.split, ours.resize, bits(ours.rescale_factor), doubles(ours.mean),
        doubles(ours.std),
    ]  # fmt: skip
    with pytest.raises(PortError, match=rf"preprocessor_config\.json: .*{field}"):
        port.ask("settings", json=encoded(json.dumps(content | {field: value}).encode()))


# ---- tokenizer and prompt

# What tokenizers get wrong, beside anything else.
LETTERS = "aE \n\t12.<|_>é🧾'\u0301\u00a0\u2028ß中ก\u0661½Ⅷ\ufeff\u202e"
any_text = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.text(LETTERS, max_size=40),
    st.lists(
        st.sampled_from(["it's", "we'LL", "'ve", " '", "  ", "\n\n", " total", "12", END, "<row_1_col_1>", "<|"])
    ).map("".join),
)


def test_code_points_are_of_the_classes_that_the_library_has(port: Port) -> None:
    """All 1,112,064 of them. If this fails after an update of `tokenizers`, write Unicode.kt's tables anew."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)

    def kind(c: str) -> str:
        if len(level.pre_tokenize_str("a" + c)) == 1:
            name = "l"
        elif len(level.pre_tokenize_str("1" + c)) == 1:
            name = "n"
        else:
            name = "o" if len(level.pre_tokenize_str("!" + c)) == 1 else "s"
        return name.upper() if len(digits.pre_tokenize_str("a" + c + "a")) > 1 else name

    codes = (code for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    wanted = "".join(map(kind, map(chr, codes)))
    found = port.ask("classes")
    assert len(found) == len(wanted)
    assert [i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b][:9] == []


@pytest.mark.parametrize("plain", [False, True])
def test_tokens_are_equal_for_thousands_of_texts(port: Port, folder: Path, plain: bool) -> None:
    path = str(folder / "tokenizer.json")
    library = Tokenizer.from_file(path)
    library.encode_special_tokens = plain
    compared = 0

    @settings(max_examples=80)
    @given(texts=st.lists(any_text, min_size=20, max_size=40))
    def compare(texts: list[str]) -> None:
        nonlocal compared
        texts = [t for t in texts if not plain or "<" not in t]  # the port's plain is of whole special tokens alone
        compared += len(texts)
        found = port.ask("tokens", tokenizer=path, texts=texts, plain=plain)
        assert found == [list(library.encode(t, add_special_tokens=False).ids) for t in texts]
        assert port.ask("decode", tokenizer=path, ids=found) == [library.decode(ids) for ids in found]

    compare()
    assert compared >= 1000


def test_a_long_word_takes_no_quadratic_time_and_gives_the_same_tokens(port: Port, folder: Path) -> None:
    path = str(folder / "tokenizer.json")
    texts = ["the" * 40_000, "é" * 50_000, " " * 50_000, "a1" * 20_000, "'s" * 20_000]
    library = Tokenizer.from_file(path)
    assert port.ask("tokens", tokenizer=path, texts=texts, plain=False) == [library.encode(t).ids for t in texts]


def test_pairs_are_joined_in_the_librarys_order_where_many_overlap(port: Port, folder: Path, tmp_path: Path) -> None:
    """A vocabulary of words of up to four of three letters, merges in any order: pairs stand in each other's way."""
    random = np.random.default_rng(3)
    words = [w for n in range(1, 5) for w in map("".join, itertools.product("abc", repeat=n))]
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["added_tokens"] = []
    content["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    pairs = [[w[:i], w[i:]] for w in words for i in range(1, len(w))]
    texts = ["".join(random.choice(list("abc"), 40)) for _ in range(500)]
    for turn in range(4):
        content["model"]["merges"] = [pairs[i] for i in random.permutation(len(pairs))]
        path = tmp_path / f"{turn}.json"
        path.write_text(json.dumps(content), "utf-8")
        library = Tokenizer.from_file(str(path))
        found = port.ask("tokens", tokenizer=str(path), texts=texts, plain=False)
        assert found == [library.encode(t).ids for t in texts]


@settings(max_examples=200)
@given(data=st.data())
def test_any_ids_become_the_same_text(port: Port, folder: Path, data: st.DataObject) -> None:
    """Bytes that are no UTF-8 among them, token by token too."""
    path = str(folder / "tokenizer.json")
    library = Tokenizer.from_file(path)
    count = library.get_vocab_size()
    letters = [i for i in range(count) if len(library.id_to_token(i) or "") == 1]
    ids = data.draw(st.lists(st.one_of(st.sampled_from(letters), st.integers(0, count + 3)), max_size=12))
    assert port.ask("decode", tokenizer=path, ids=[ids]) == [library.decode(ids)]
    stream = TextStream(library.decode)
    assert port.ask("stream", tokenizer=path, ids=ids) == [stream.push(i) for i in ids]


grids = st.sampled_from([(0, 0), (1, 2), (2, 1), (3, 4), (1, 1), (6, 6), (7, 2)])
turns_of = st.lists(
    st.tuples(
        st.sampled_from(["user", "assistant", "system"]),
        st.lists(st.one_of(any_text, any_text, grids), min_size=1, max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def first_smolvlm(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer without tokens for the places of tiles, as the first generation has none."""
    first = tmp_path_factory.mktemp("first")
    for name in ("tokenizer.json", "processor_config.json"):
        text = (folder / name).read_text("utf-8").replace("<global-img>", "<unused-global>")
        (first / name).write_text(text.replace("<row_", "<unused_row_"), "utf-8")
    return first


@pytest.mark.parametrize("generation", ["folder", "first_smolvlm"])
def test_prompts_are_equal_for_any_conversation(port: Port, generation: str, request: pytest.FixtureRequest) -> None:
    where: Path = request.getfixturevalue(generation)
    encoder = PromptEncoder.from_folder(where)

    @settings(max_examples=250)
    @given(turns=turns_of, reply=st.booleans(), start=st.booleans())
    def compare(turns: list[tuple[str, tuple[str | tuple[int, int], ...]]], reply: bool, start: bool) -> None:
        messages = [Message(r, tuple(p if isinstance(p, str) else ImagePart(*p) for p in parts)) for r, parts in turns]
        found = port.ask(
            "prompt",
            folder=str(where),
            per_tile=encoder.seq_len,
            turns=[{"role": role, "parts": parts} for role, parts in turns],
            reply=reply,
            start=start,
        )
        assert found == encoder.encode(messages, reply=reply, start=start)

    compare()


@pytest.mark.parametrize(
    ("turns", "complaint"),
    [
        ([], "a chat without messages"),
        ([{"role": "user", "parts": []}], "a user message without content"),
        ([{"role": "User", "parts": ["Hi"]}], "role is User, want one of user, assistant, system"),
        ([{"role": "user", "parts": [f"What is {IMAGE}?"]}], f"spells the token {IMAGE}; give the image as a part"),
        ([{"role": "user", "parts": [IMAGE[:3], IMAGE[3:]]}], f"spells the token {IMAGE}"),
        ([{"role": "user", "parts": [{"units": [65, 0xD83E]}]}], "cannot be encoded as UTF-8"),
        ([{"role": "user", "parts": [{"units": [0xDDFE, 65]}]}], "cannot be encoded as UTF-8"),
        ([{"role": "user", "parts": [[0, 1]]}], "0 rows and 1 columns"),
        ([{"role": "user", "parts": [[-1, -1]]}], "-1 rows and -1 columns"),
    ],
)
def test_a_wrong_chat_is_refused(port: Port, folder: Path, turns: list[object], complaint: str) -> None:
    with pytest.raises(PortError, match=complaint):
        port.ask("prompt", folder=str(folder), per_tile=16, turns=turns, reply=True, start=True)


def test_a_tokenizer_that_makes_special_tokens_of_texts_is_caught(port: Port, folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    for token in content["added_tokens"]:
        token["special"] = token["content"] != END
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 9999, "content": f"x{END}", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    turns = [{"role": "user", "parts": ["Please x" + END]}]
    found = port.ask("prompt", folder=str(tmp_path), per_tile=16, turns=turns, reply=True, start=True)
    library = PromptEncoder(Tokenizer.from_file(str(tmp_path / "tokenizer.json")), 16)
    assert found.count(library.end_id) == 1


TOKENIZER_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "normalizer": (lambda t: t.update(normalizer={"type": "NFC"}), "has a normalizer, want none"),
    "pre-tokenizer": (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer.type is Whitespace"),
    "one step": (lambda t: t["pre_tokenizer"]["pretokenizers"].pop(), "has 1 pre-tokenizers"),
    "order": (lambda t: t["pre_tokenizer"]["pretokenizers"].reverse(), "type is ByteLevel, want Digits"),
    "digits": (lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(individual_digits=False), "digits is f"),
    "prefix": (lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "prefix_space is true"),
    "no regex": (lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(use_regex=False), "use_regex is false"),
    "decoder": (lambda t: t.update(decoder={"type": "Metaspace"}), "decoder.type is Metaspace"),
    "model": (lambda t: t["model"].update(type="Unigram"), "model.type is Unigram, want BPE"),
    "dropout": (lambda t: t["model"].update(dropout=0.1), "dropout is given"),
    "suffix": (lambda t: t["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix is given"),
    "fallback": (lambda t: t["model"].update(byte_fallback=True), "byte_fallback is true"),
    "ignore": (lambda t: t["model"].update(ignore_merges=True), "ignore_merges is true"),
    "unknown": (lambda t: t["model"].update(unk_token="<none>"), "unk_token is <none>, want a token"),
    "merge": (lambda t: t["model"]["merges"].append(["q", "€"]), "€ is not in the vocabulary"),
    "merged": (lambda t: t["model"]["merges"].append(["q", "q"]), "qq is not in the vocabulary"),
    "twice": (lambda t: t["model"]["merges"].append(t["model"]["merges"][0]), "is there twice"),
    "parts": (lambda t: t["model"]["merges"].append("q"), "has 1 parts, want 2"),
    "id": (lambda t: t["model"]["vocab"].update(new=3), "gives an id twice"),
    "id size": (lambda t: t["model"]["vocab"].update(new=1 << 40), "is 1099511627776, want 0 to"),
    "strip": (lambda t: t["added_tokens"][3].update(lstrip=True), "lstrip is true, want false"),
    "word": (lambda t: t["added_tokens"][3].update(single_word=True), "single_word is true"),
    "added id": (lambda t: t["added_tokens"][3].update(id=1), "the vocabulary says 3"),
    "added twice": (lambda t: t["added_tokens"].append(t["added_tokens"][3] | {"content": "<new>"}), "another token's"),
    "empty": (lambda t: t["added_tokens"][3].update(content=""), "content is empty"),
}  # fmt: skip


@pytest.mark.parametrize("fault", TOKENIZER_FAULTS)
def test_a_tokenizer_of_another_kind_is_refused_by_name(port: Port, folder: Path, fault: str) -> None:
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    edit, complaint = TOKENIZER_FAULTS[fault]
    edit(content)
    with pytest.raises(PortError, match=complaint):
        port.ask("tokenizer", json=encoded(json.dumps(content).encode()))


def test_merges_of_the_old_form_and_a_vocabulary_with_holes_give_the_same_tokens(
    port: Port, folder: Path, tmp_path: Path
) -> None:
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    model = content["model"]
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    for letter in "\u00c3\u0120!":  # "Ã", "Ġ" (a space) and "!": bytes without a token
        model["merges"] = [m for m in model["merges"] if letter not in m]
        model["vocab"] = {t: i for t, i in model["vocab"].items() if letter not in t}
    texts = ["Was ist das? é! it's", "  a b", "!"]
    for unknown in (None, "?"):
        path = tmp_path / f"{unknown is None}.json"
        model["unk_token"] = unknown
        path.write_text(json.dumps(content), "utf-8")
        library = Tokenizer.from_file(str(path))
        found = port.ask("tokens", tokenizer=str(path), texts=texts, plain=False)
        assert found == [library.encode(t).ids for t in texts]


def test_added_tokens_that_are_normalized_come_after_the_others(port: Port, folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    last = max(content["model"]["vocab"].values()) + 1
    base = content["added_tokens"][0]
    for i, (token, normalized) in enumerate(
        [("abq", False), ("aq", False), ("caq", True), ("IBAN", True), ("x<", True)]
    ):
        content["added_tokens"].append(
            base | {"id": last + i, "content": token, "special": False, "normalized": normalized}
        )
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), "utf-8")
    texts = ["caqc abqaq IBAN", "xIBANaq", "x<image>", "x<imag", "aaq caqcaq", "caqabqcaq"]
    library = Tokenizer.from_file(str(path))
    assert port.ask("tokens", tokenizer=str(path), texts=texts, plain=False) == [library.encode(t).ids for t in texts]


# ---- sampling


logits_of = st.tuples(st.integers(2, 60), st.integers(0, 1 << 32), st.sampled_from([0.3, 3.0, 30.0]), st.booleans())


def drawn(size: int, seed: int, spread: float, coarse: bool) -> Any:
    values = np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)
    return np.round(values) if coarse else values  # coarse: many are equal, -0 among them


@settings(max_examples=400)
@given(
    drawing=logits_of,
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 1.9]),
    top_k=st.integers(0, 70),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.99, 1.0]),
    penalty=st.sampled_from([1.0, 1.2, 0.8, 3.0]),
    seen=st.lists(st.integers(0, 1), max_size=6),
    random=st.floats(0, 1, exclude_max=True),
)
def test_scores_and_choices_are_equal(
    port: Port,
    drawing: Any,
    temperature: float,
    top_k: int,
    top_p: float,
    penalty: float,
    seen: list[int],
    random: float,
) -> None:
    logits = drawn(*drawing)
    fields = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": penalty}
    asked = fields | {"logits": encoded(logits), "seen": seen}
    wanted = scores(logits, seen, Sampling(**fields))  # type: ignore[arg-type]  # by name
    found = floats(port.ask("scores", **asked))
    assert np.array_equal(found, wanted)
    image = len(logits) - 1
    if not np.isfinite(np.delete(wanted, image)).any():
        return  # only the image's token is left
    wanted[image] = -np.inf
    token = port.ask("choose", **asked, image_id=image, random=random)
    if temperature == 0:
        assert token == int(np.argmax(wanted))
    else:
        total = np.cumsum(np.exp(log_softmax(wanted)))
        assert np.isfinite(wanted[token])
        assert token == min(int(np.searchsorted(total, random * total[-1], side="right")), int(np.argmax(total)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("top_k", -1), ("top_p", 0), ("top_p", 1.5), ("repetition_penalty", 0)],
)
def test_sampling_out_of_range_is_refused_by_name(port: Port, field: str, value: float) -> None:
    fields = {"temperature": 0, "top_k": 0, "top_p": 1, "repetition_penalty": 1} | {field: value}
    with pytest.raises(PortError, match=field):
        port.ask("scores", logits=encoded(np.zeros(3, np.float32)), seen=[], **fields)


def test_logits_that_are_no_numbers_are_refused(port: Port) -> None:
    fields = {"temperature": 0, "top_k": 0, "top_p": 1, "repetition_penalty": 1, "seen": [], "image_id": 0, "random": 0}
    for bad in (np.nan, np.inf):
        with pytest.raises(PortError, match="NaN or infinity"):
            port.ask("choose", logits=encoded(np.array([1, bad], np.float32)), **fields)


# ---- feeding the decoder


def test_chunks_and_room_are_those_of_the_runner(port: Port) -> None:
    lengths = [*range(300), 1377]
    size = memory.CHUNK
    wanted = [[[start, min(start + size, n)] for start in range(0, n, size)] for n in lengths]
    assert port.ask("chunks", tokens=lengths) == wanted
    pairs = [(t, c) for c in (100, 1024, 8192) for t in range(1, c + 1, 37)]
    assert port.ask("room", of=pairs) == [memory.room(t, c) for t, c in pairs]


def test_features_take_the_places_of_image_tokens(port: Port) -> None:
    random = np.random.default_rng(0)
    ids = [5, 7, 7, 1, 7]
    embeds, features = (random.normal(size=(n, 4)).astype(np.float32) for n in (5, 3))
    asked = {"embeds": encoded(embeds), "ids": ids, "image_id": 7}
    wanted = embeds.copy()
    wanted[np.array(ids) == 7] = features
    found = floats(port.ask("place", features=encoded(features), **asked))
    assert np.array_equal(found, wanted.reshape(-1))
    with pytest.raises(PortError, match="have 8 numbers, want 4 for each of 3 image tokens"):
        port.ask("place", features=encoded(features[:2]), **asked)


def test_a_cache_moves_into_a_roomier_one(port: Port) -> None:
    old = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
    wanted = np.zeros((2, 10, 3), np.float32)
    wanted[:, :5] = old[:, :5]
    found = port.ask("move", **{"from": encoded(old)}, room=wanted.size, heads=2, width=3, length=5)
    assert np.array_equal(floats(found), wanted.reshape(-1))
    with pytest.raises(PortError, match="a cache of 7 tokens does not fit"):
        port.ask("move", **{"from": encoded(old)}, room=wanted.size, heads=2, width=3, length=7)


@pytest.mark.parametrize(
    ("ids", "past", "complaint"),
    [
        ([], 0, "no tokens"),
        ([1] * 5, 96, "5 tokens after the 96 so far"),
        ([-1], 0, "ids from -1"),
        ([50], 0, "to 50, want 0 to 49"),
    ],
)
def test_tokens_that_cannot_run_are_refused(port: Port, ids: list[int], past: int, complaint: str) -> None:
    assert port.ask("fits", ids=[1] * 4, past=96, context=100, vocab=50)
    with pytest.raises(PortError, match=complaint):
        port.ask("fits", ids=ids, past=past, context=100, vocab=50)


def test_graphs_are_found_by_their_dtype(port: Port, tiny_bundle: Path) -> None:
    for name, path in graph_paths(read_bundle(tiny_bundle)).items():
        assert port.ask("graph", bundle=str(tiny_bundle), name=name) == str(path)


# ---- the judgement of an engine's outputs


@pytest.mark.parametrize(("noise", "other"), [(0, 0), (1e-3, 0), (0.02, 0), (0.2, 0), (2, 0), (0, 1), (0, -1)])
def test_outputs_are_judged_as_verify_judges_them(port: Port, tiny_bundle: Path, noise: float, other: int) -> None:
    """`other`: the place, by its logit, of the token that comes out as the first one: the second best, or the last."""
    bundle = read_bundle(tiny_bundle)
    limits = verify.bundle_limits(bundle)
    for index, case in enumerate(verify.read_cases(tiny_bundle)):
        random = np.random.default_rng(index)
        features, logits = (
            (a + noise * a.std() * random.normal(size=a.shape) if a.size else a).astype(np.float32)
            for a in (case.features, case.logits)
        )
        chosen = np.argsort(-case.logits[0])[other]
        logits[0, chosen] = max(logits[0, chosen], logits[0].max() + (other != 0))
        out = verify.Outputs(True, case.grids, case.ids, features, logits)
        wanted = verify.compare([(case, out)], **limits)
        assert other != -1 or any("greedy token 0" in str(fault) for fault in wanted.faults)
        asked = {"bundle": str(tiny_bundle), "case": index, "logits": encoded(logits)}
        found = port.ask("verdict", features=encoded(features), **asked)
        near = [np.int64(found[key]).view(np.float64) for key in ("features", "logits")]
        assert near == pytest.approx([wanted.features_error, wanted.logits_error], rel=1e-9)
        assert bool(found["faults"]) == bool(wanted.faults)
        if wanted.logits_error <= limits["logits_limit"]:
            assert (found["equal"], found["ties"], len(found["faults"])) == (
                wanted.tokens_equal, wanted.ties, len(wanted.faults)
            )  # fmt: skip
        logits[0, 0] = np.nan
        found = port.ask("verdict", features=encoded(features), **(asked | {"logits": encoded(logits)}))
        assert found["faults"]
