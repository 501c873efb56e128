"""Mutants of a small bundle's files, and the native runner's readers in one process under sanitizers to give them to.

    python -m tests.native_mutants --count 50000 [--seed 0]

gives as many to the readers and prints how often each outcome was seen, and every finding. Structure-aware changes are
made to the JSON tree, or to the tensors that a safetensors header tells of; the others to bytes. Whoever reads the
files finds right digests: the driver (native_fuzz.cpp) makes them so.
"""

import argparse
import copy
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.bundle import read_bundle, write_manifest
from runtimes.native.build import SANITIZE, SOURCES
from runtimes.ort import OrtRunner
from runtimes.preprocess import normalize, read_settings
from runtimes.tensorfile import write_tensors
from runtimes.verify import CASES_DATA, CASES_JSON, step_logits
from tests.fakes import make_bundle

DRIVER = Path(__file__).with_name("native_fuzz.cpp")
FILES = ("manifest.json", "config.json", "preprocessor_config.json", CASES_JSON, CASES_DATA, "report.json")
JSON, PLANTED = 64, 128  # the driver's numbers for a text alone, and for its planted faults
OPTIONS = {
    "ASAN_OPTIONS": "quarantine_size_mb=16:max_allocation_size_mb=256:hard_rss_limit_mb=1024",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
Mutant = Sequence[tuple[int, bytes]]  # (which of FILES, its content)


def make_small_bundle(folder: Path) -> Path:
    """The fake bundle with golden cases of its own making: one of text, one with two tiles. It passes --self-test."""
    bundle = make_bundle(folder)
    runner = OrtRunner(bundle)
    settings = runner.settings
    rng = np.random.default_rng(3)
    side, image = settings.tile_size, settings.image_id
    rows: list[dict[str, Any]] = []
    arrays: dict[str, Any] = {}
    for name, tiles in (("text", 0), ("pictures \N{GREEN APPLE}", 2)):
        u8 = rng.integers(0, 256, (tiles, side, side, 3), dtype=np.uint8)
        ids = [int(i) for i in rng.integers(0, 200, 9)] + [image] * (tiles * settings.seq_len) + [7]
        features = np.zeros((0, settings.seq_len, settings.hidden), np.float32)
        if tiles:
            features = runner.encode_image(normalize(u8, read_settings(folder / "preprocessor_config.json")))
        tokens: list[int] = []
        for _ in range(3):
            allowed = step_logits(runner, ids, features, [*tokens, 0])[-1].copy()
            allowed[image] = -np.inf
            tokens.append(int(np.argmax(allowed)))
        rows.append({"name": name, "ids": ids, "tokens": tokens, "images": 0, "grids": [], "longest_edge": side})
        arrays |= {f"{name}.tiles": u8, f"{name}.features": features}
        arrays[f"{name}.logits"] = step_logits(runner, ids, features, tokens)
    (folder / CASES_JSON).parent.mkdir()
    (folder / CASES_JSON).write_text(json.dumps({"cases": rows}, ensure_ascii=False), "utf-8")
    write_tensors(folder / CASES_DATA, arrays)
    manifest = write_manifest(folder, bundle.manifest)
    report = {
        "passed": True,
        "note": "\N{GREEN APPLE} é",
        "payload_digest": manifest.payload_digest,
        "verify_limits": {"features": 1e-5, "logits": 1e-5},
    }
    (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False), "utf-8")
    write_manifest(folder, manifest)
    read_bundle(folder)
    return folder


# ---- mutants

HOSTILE: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    255,
    256,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    10**17,
    10**18 - 1,
    (1 << 63) - 1,
    1 << 63,
    -(1 << 63),
    10**40,
    0.5,
    -0.0,
    1e-320,
    1e308,
    5e-324,
    "",
    "x",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a/../b",
    "onnx",
    "a\0b",
    "\x1b[2J\x9b",
    "line\nline",
    "\N{GREEN APPLE}",
    "\U0010ffff",
    "x" * 5000,
    "0" * 64,
    "f" * 64,
    [],
    [[]],
    {},
    {"": None},
    [0, 0],
    [1, 2, 3],
    [10**18 - 1, 0],
    "manifest.json",
    "Manifest.JSON",
    "F32",
    "U8",
    "BF16",
    "payload",
    "evidence",
    "passed",
)
FRAGMENTS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b",",
    b"\\",
    b"\\u",
    b"\\ud800",
    b"\\udfff",
    b"\\u0000",
    b"1e999",
    b"-",
    b"0x1",
    b"NaN",
    b"Infinity",
    b"\xff",
    b"\xf0\x9f\x8d",
    b"\xed\xa0\x80",
    b"\xc0\x80",
    b"\xf4\x90\x80\x80",
    b"\0",
    b"\xef\xbb\xbf",
    b"\x1b[2J",
    b"9" * 400,
    b"[" * 70,
    b"[" * 100_000,
    b'{"a":' * 70,
    b"0." + b"0" * 2000 + b"1",
    b"e-400",
    b"\n",
)


def places(tree: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a JSON tree but its root."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield (*where, key)
        yield from places(value, (*where, key))


def change_tree(rng: random.Random, tree: Any) -> Any:
    """A copy with one value changed, moved, removed, renamed, repeated or buried."""
    tree = copy.deepcopy(tree)
    ways = list(places(tree))
    *way, last = rng.choice(ways)
    parent = tree
    for key in way:
        parent = parent[key]
    other = tree
    for key in rng.choice(ways):
        other = other[key]
    match rng.randrange(8):
        case 0:
            del parent[last]
        case 1 | 2 | 3:
            parent[last] = rng.choice(HOSTILE)
        case 4:
            parent[last] = copy.deepcopy(other)
        case 5:
            for _ in range(rng.choice((1, 2, 10, 63, 64, 65))):
                parent[last] = [parent[last]] if rng.random() < 0.5 else {"x": parent[last]}
        case 6 if isinstance(parent, dict):
            parent[rng.choice(("", "x", "__metadata__", *parent))] = parent.pop(last)
        case 6:
            parent[last : last + 1] = [parent[last]] * rng.choice((2, 3, 500))
        case _ if isinstance(parent[last], int | float):
            parent[last] += rng.choice((-1, 1, 1 << 16, 1 << 31, 0.5))
        case _:
            parent[last] = str(parent[last]) + rng.choice(("", " ", "x", "/", "\0", "\x1b[2J"))
    return tree


def spelled(rng: random.Random, tree: Any) -> bytes:
    """JSON text: plain, with escapes, with blanks, or with a key repeated."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.3, indent=rng.choice((None, None, 0, 1)))
    if rng.random() < 0.05 and text.startswith("{") and isinstance(tree, dict) and tree:
        text = "{" + json.dumps(rng.choice(list(tree))) + ": 1, " + text[1:]
    return text.encode("utf-8", "surrogatepass")


def change_bytes(rng: random.Random, data: bytes, first: int = 4096) -> bytes:
    """One to four changes, most of them within the `first` bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(min(len(out), first if rng.random() < 0.9 else len(out)) + 1)
        match rng.randrange(7):
            case 0:
                out[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                out[at:at] = rng.choice(FRAGMENTS)
            case 2:
                del out[at : at + rng.choice((1, 2, 8, 100))]
            case 3:
                del out[at:]
            case 4:
                start = rng.randrange(len(out) + 1)
                out[at:at] = out[start : start + rng.choice((1, 8, 100))]
            case 5 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case _:
                fragment = rng.choice(FRAGMENTS)
                out[at : at + len(fragment)] = fragment
    return bytes(out)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file; `length`: what it says of its header, where that is not true."""
    return struct.pack("<Q", (len(header) if length is None else length) % (1 << 64)) + header + data


def change_tensors(rng: random.Random, content: bytes, only: str = "", how: int | None = None) -> bytes:
    """Another shape or dtype for one tensor, its neighbours moved so that every offset is right again.

    Args:
        only: for a tensor whose name ends so.
        how: the kind of change, in place of a random one.
    """
    header, data = split(content)
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    entry = rng.choice([entry for name, entry in tensors.items() if name.endswith(only)])
    shape = list(entry["shape"])
    match rng.randrange(5) if how is None else how:
        case 0:
            rng.shuffle(shape)
        case 1:
            shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 3, 7, 100))
        case 2:  # no bytes, whatever else it says
            shape = [rng.choice((1 << 40, 1 << 47, 1 << 50, 10**18 - 1)), 0, *shape[2:]]
        case 3:
            shape = shape[:-1] if rng.random() < 0.5 else [*shape, rng.choice((1, 1, 2))]
        case _:
            entry["dtype"] = rng.choice(("F32", "U8", "I64", "F16", "I32", "BF16"))
    entry["shape"] = shape
    width = {"F32": 4, "U8": 1, "I64": 8, "F16": 2, "I32": 4}
    end = 0
    for row in sorted(tensors.values(), key=lambda row: tuple(row["data_offsets"])):
        size = width.get(row["dtype"], 2)
        for dim in row["shape"]:
            size *= dim
        if size > 1 << 22:
            size = 0  # the header lies
        row["data_offsets"] = [end, end := end + size]
    return join(spelled(rng, header), (data * 8)[:end].ljust(end, b"\1"))


SIZES = {"vocab": "vocab_size", "hidden": "hidden_size", "layers": "num_hidden_layers"}
SIZES |= {"kv_heads": "num_key_value_heads", "head_dim": "head_dim"}


def change_sizes(rng: random.Random, base: Mapping[str, bytes]) -> Mutant:
    """One size of the model, changed in all files that state it, and perhaps tensors that lie about it."""
    manifest, config = json.loads(base["manifest.json"]), json.loads(base["config.json"])
    value = rng.choice((0, 1, 2, 3, 7, 64, 4096, 1 << 12, 1 << 16, 1 << 16, 1 << 24, (1 << 24) + 1, 1 << 40))
    match rng.choice((*SIZES, "tile_size", "tokens_per_tile", "context", "image_token_id")):
        case "tile_size":
            manifest["image"]["tile_size"] = config["vision_config"]["image_size"] = value
        case "tokens_per_tile":
            manifest["image"]["tokens_per_tile"] = value
        case "context":
            manifest["text"]["context"] = value
        case "image_token_id":
            manifest["text"]["image_token_id"] = config["image_token_id"] = value
        case size:
            manifest["text"][size] = config["text_config"][SIZES[size]] = value
    out = [(0, json.dumps(manifest).encode()), (1, json.dumps(config).encode())]
    if rng.random() < 0.7:
        out.append((FILES.index(CASES_DATA), change_tensors(rng, base[CASES_DATA], rng.choice(("", ".tiles")), 2)))
    return out


def mutant(rng: random.Random, base: Mapping[str, bytes]) -> Mutant:
    """One mutant of the files of a bundle."""
    kind = rng.random()
    if kind < 0.15:
        return change_sizes(rng, base)
    which = rng.randrange(len(FILES))
    content = base[FILES[which]]
    if FILES[which] == CASES_DATA:
        header, data = split(content)
        if kind < 0.5:
            return [(which, change_tensors(rng, content))]
        if kind < 0.7:
            return [(which, join(spelled(rng, change_tree(rng, header)), data))]
        text = json.dumps(header, ensure_ascii=False).encode()
        if kind < 0.85:
            return [(which, join(change_bytes(rng, text), data))]
        length = rng.choice((0, 1, -1, len(text) - 1, len(text) + 1, 1 << 31, 1 << 63, len(data), rng.getrandbits(64)))
        return [(which, join(text, data, length) if kind < 0.92 else change_bytes(rng, content))]
    if kind < 0.6:
        tree = json.loads(content)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if any(True for _ in places(tree)):
                tree = change_tree(rng, tree)
        return [(which, spelled(rng, tree))]
    return [(which, change_bytes(rng, content))]


def mutants(base: Mapping[str, bytes], count: int, seed: int) -> Iterator[Mutant]:
    """As many as asked for, each by a random state of its own: number i is the same whatever `count` is."""
    for i in range(count):
        yield mutant(random.Random(f"{seed}.{i}"), base)


def contents(bundle: Path) -> dict[str, bytes]:
    """The files that are changed, as they are."""
    return {path: (bundle / path).read_bytes() for path in FILES}


# ---- the driver


@dataclass(frozen=True)
class Finding:
    """A mutant that ended the readers' process; `said`: the end of its stderr; `code`: its exit code or -signal."""

    mutant: Mutant
    code: int
    said: str

    def __str__(self) -> str:
        what = re.search(r"(?:ERROR: \w+: |runtime error: |hard rss limit).*", self.said)
        files = ", ".join(FILES[which] if which < len(FILES) else str(which) for which, _ in self.mutant)
        return f"{files}: code {self.code}: {what.group() if what else self.said[-300:]}"


def sanitizing_compiler(folder: Path) -> list[str] | None:
    """A compiler whose sanitizers run here; None without one."""
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    for command in filter(shutil.which, ("g++", "clang++", "clang++-14")):
        made = subprocess.run([command, *SANITIZE, probe, "-o", folder / "probe"], capture_output=True, check=False)
        if (
            made.returncode == 0
            and subprocess.run([folder / "probe"], capture_output=True, check=False).returncode == 0
        ):
            return [command]
    return None


def build_driver(compiler: Sequence[str], out: Path, sources: Path = SOURCES) -> Path:
    """Compiles the driver with the runner's headers in `sources`."""
    flags = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Wshadow", *SANITIZE, f"-I{sources}"]
    done = subprocess.run([*compiler, *flags, str(DRIVER), "-o", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def packed(one: Mutant) -> bytes:
    """A mutant as the driver reads it."""
    return struct.pack("<I", len(one)) + b"".join(
        struct.pack("<BI", which, len(content)) + content for which, content in one
    )


def feed(
    driver: Path, bundle: Path, all_of: Sequence[Mutant], most: int = 20
) -> tuple[list[dict[str, Any] | None], list[Finding]]:
    """The driver's outcome of each mutant, and those that ended it: it is started again behind each, `most` times.

    An outcome is None where there is a finding, or none was reached any more.
    """
    outcomes: list[dict[str, Any] | None] = []
    findings: list[Finding] = []
    pristine = contents(bundle)
    while len(outcomes) < len(all_of) and len(findings) < most:
        done = subprocess.run(
            [driver, bundle],
            input=b"".join(map(packed, all_of[len(outcomes) :])),
            capture_output=True,
            env=os.environ | OPTIONS,
            timeout=600,
            check=False,
        )
        outcomes += [json.loads(line) for line in done.stdout.splitlines()]
        if done.returncode:
            for path, content in pristine.items():  # it had no time to put them back
                (bundle / path).write_bytes(content)
            said = done.stderr.decode("utf-8", "replace")
            assert len(outcomes) < len(all_of), f"the driver failed at its end: {said}"
            findings.append(Finding(all_of[len(outcomes)], done.returncode, said))
            outcomes.append(None)
    return outcomes + [None] * (len(all_of) - len(outcomes)), findings


def kind(outcome: Mapping[str, Any] | None) -> str:
    """Of an outcome, without names and numbers: what the statistics count."""
    if outcome is None:
        return "a finding"
    if "error" not in outcome:
        return next(iter(outcome))
    found = re.search(r" (is|are|has|have|holds|lists|leaves?|does|needs) .*", str(outcome["error"]), re.DOTALL)
    text = re.sub(r"(?<=proof of payload).*|(?<=it is a).*", "", found.group() if found else str(outcome["error"]))
    return re.sub(r"[^ a-zA-Z:]+", "_", text)[:40]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.native_mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compiler = sanitizing_compiler(folder)
        if not compiler:
            print("error: no compiler with sanitizers on this machine", file=sys.stderr)
            return 2
        driver = build_driver(compiler, folder / "driver")
        bundle = make_small_bundle(folder / "bundle")
        base, began = contents(bundle), time.monotonic()
        seen: Counter[str] = Counter()
        found: list[Finding] = []
        slowest = 0.0
        for start in range(0, args.count, 1000):
            piece = [
                mutant(random.Random(f"{args.seed}.{i}"), base) for i in range(start, min(start + 1000, args.count))
            ]
            outcomes, findings = feed(driver, bundle, piece)
            seen.update(map(kind, outcomes))
            found += findings
            slowest = max([slowest, *(float(o["ms"]) for o in outcomes if o)])
        for text, times in seen.most_common(60):
            print(f"{times:7} {text}")
        print(
            f"{args.count} mutants, {time.monotonic() - began:.0f} s, the slowest {slowest:.0f} ms, "
            f"{len(found)} findings"
        )
        for finding in found:
            print(finding)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
