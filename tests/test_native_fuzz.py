"""Mutants of a bundle given to the native runner under address and undefined-behaviour checks: refused, never obeyed.

Most go to its readers in one process (native_fuzz.cpp), some to the program itself. `python -m tests.native_mutants`
tries as many as one likes. Not covered: what ONNX Runtime makes of a hostile graph.
"""

import json
import math
import os
import random
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from runtimes.native.build import SOURCES, Built, build
from runtimes.native.packages import BuildError
from runtimes.verify import CASES_DATA, CASES_JSON
from tests.native_mutants import (
    FILES,
    JSON,
    OPTIONS,
    PLANTED,
    Mutant,
    build_driver,
    change_bytes,
    change_tensors,
    change_tree,
    contents,
    feed,
    join,
    kind,
    make_small_bundle,
    mutants,
    packed,
    sanitizing_compiler,
    spelled,
)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A compiler whose sanitizers run here."""
    found = sanitizing_compiler(tmp_path_factory.mktemp("probe"))
    if not found:
        pytest.skip("no C++ compiler with address and undefined-behaviour checks on this machine")
    return found


@pytest.fixture(scope="module")
def driver(compiler: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runner's readers, in a program that takes many mutants."""
    return build_driver(compiler, tmp_path_factory.mktemp("driver") / "driver")


@pytest.fixture(scope="module")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of 100 kB that passes --self-test; whoever writes into it puts it back."""
    return make_small_bundle(tmp_path_factory.mktemp("small") / "bundle")


@pytest.fixture(scope="module")
def sanitized(compiler: list[str], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The runner itself, under the same checks."""
    try:
        return build(out=tmp_path_factory.mktemp("sanitized"), compiler=compiler, sanitize=True)
    except BuildError as exc:
        pytest.skip(f"the native runner cannot be built here: {exc}")


def self_test(native: Built, bundle: Path) -> subprocess.CompletedProcess[str]:
    command = [str(native.program), str(bundle), "--self-test", "--threads", "1"]
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=os.environ | OPTIONS, timeout=60, check=False
    )


def test_every_mutant_is_taken_or_refused_by_a_message_and_none_ends_the_readers(
    driver: Path, small_bundle: Path
) -> None:
    base = contents(small_bundle)
    tried = list(mutants(base, 600, 0))
    outcomes, findings = feed(driver, small_bundle, tried)
    assert [str(finding) for finding in findings] == []
    assert all(outcome and ("taken" in outcome or len(outcome["error"]) > 10) for outcome in outcomes)
    assert max(outcome["ms"] for outcome in outcomes if outcome) < 5000
    kinds = {kind(outcome) for outcome in outcomes}
    assert len(kinds) > 40  # what is refused is refused in many places,
    manifest = FILES.index("manifest.json")  # and none of them by its digest, unless it is the digest that was changed
    by_digest = [m for m, o in zip(tried, outcomes, strict=True) if o and "content has changed" in o.get("error", "")]
    assert not [one for one in by_digest if manifest not in dict(one)]
    assert contents(small_bundle) == base


def bombs() -> dict[str, Mutant]:
    """Small files that would take much memory, or time."""
    cases, data = FILES.index(CASES_JSON), FILES.index(CASES_DATA)
    many = 5_000_000
    return {
        "values": [(cases, b'{"cases": [' + b"0," * many + b"0]}")],
        "lists": [(1, b'{"a": [' + b"[]," * many + b"[]]}")],
        "keys": [(5, b"{" + b",".join(b'"%d":0' % i for i in range(1_200_000)) + b"}")],
        "tensors": [(data, join(b'{"x":[' + b"0," * many + b"0]}", b""))],
        "a long header": [(data, join(b"{}" + b" " * (17 << 20), b""))],
        "a long file": [(cases, b"{" + b" " * (17 << 20) + b"}")],
        "a long string": [(2, b'{"x":"' + b"y" * (15 << 20) + b'"}')],
        "a long number": [(2, b'{"x":0.' + b"1" * (15 << 20) + b"}")],
        "an exponent": [(2, b'{"x":1e-' + b"9" * (15 << 20) + b"}")],
        "nested lists": [(3, b"[" * (15 << 20))],
        "escapes": [(3, b'{"x":"' + rb"\ud83c\udf4f" * (1 << 20) + b'"}')],
    }


def test_no_file_takes_more_memory_than_a_phone_has_to_spare(driver: Path, small_bundle: Path) -> None:
    all_of = bombs()
    outcomes, findings = feed(driver, small_bundle, list(all_of.values()))
    assert [str(finding) for finding in findings] == []
    said = {name: str(outcome and outcome.get("error")) for name, outcome in zip(all_of, outcomes, strict=True)}
    assert all("has more than 1048576 values" in said[name] for name in ("values", "lists", "keys", "tensors"))
    assert "header of more than 16 MiB" in said["a long header"]
    assert "larger than 16 MiB" in said["a long file"]
    assert max(outcome["ms"] for outcome in outcomes if outcome) < 15_000


def test_a_text_is_taken_as_json_only_where_python_takes_it_and_means_the_same(
    driver: Path, small_bundle: Path
) -> None:
    def strict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key is repeated")
        return dict(pairs)

    base = contents(small_bundle)
    texts = []
    for i in range(400):
        rng = random.Random(i)
        content = base[rng.choice(("config.json", "report.json", CASES_JSON))]
        tree = json.loads(content)
        texts.append(change_bytes(rng, content) if i % 2 else spelled(rng, change_tree(rng, tree)))
    outcomes, findings = feed(driver, small_bundle, [[(JSON, text)] for text in texts])
    assert [str(finding) for finding in findings] == []
    taken = 0
    for text, outcome in zip(texts, outcomes, strict=True):
        assert outcome is not None
        if "json" not in outcome:
            continue
        taken += 1
        wanted = json.loads(text.decode("utf-8"), object_pairs_hook=strict, parse_constant=lambda _: 1 / 0)
        assert same(outcome["json"], wanted), text
    assert 100 < taken < 350


def same(found: Any, wanted: Any) -> bool:
    """Equal, but for an integer beyond 18 digits, which becomes a float; a whole float is written without its point."""
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict) and list(found) == list(wanted) and all(same(found[k], wanted[k]) for k in wanted)
        )
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(same, found, wanted))
    if isinstance(wanted, int) and not isinstance(wanted, bool) and len(str(wanted)) > 18:
        return isinstance(found, int | float) and math.isclose(found, float(wanted))
    if isinstance(wanted, float):
        return type(found) in (int, float) and found == wanted
    return type(found) is type(wanted) and bool(found == wanted)


# ---- the program itself


def test_the_program_ends_every_mutant_with_a_code_and_a_line_of_its_own(
    driver: Path, sanitized: Built, small_bundle: Path, tmp_path: Path
) -> None:
    done = self_test(sanitized, small_bundle)
    assert (done.returncode, json.loads(done.stdout)["passed"]) == (0, True), done.stderr
    codes = []
    for i, one in enumerate(mutants(contents(small_bundle), 40, 1)):
        folder = shutil.copytree(small_bundle, tmp_path / str(i))
        laid = subprocess.run([driver, folder, "--leave"], input=packed(one), capture_output=True, check=True)
        done = self_test(sanitized, folder)
        ends = done.stderr.splitlines()[-1:] or [""]
        refused = ends[0].startswith("error: ") and len(ends[0]) > len("error: x")
        judged = done.stdout.startswith('{"passed": ')
        assert done.returncode in (0, 1, 2), done.stderr
        assert refused if done.returncode == 2 else judged or refused, done.stderr
        assert "Sanitizer" not in done.stderr
        assert "runtime error" not in done.stderr
        if "error" in json.loads(laid.stdout):  # what the readers refuse the program refuses, and as a bad bundle
            assert done.returncode == 2
        codes.append(done.returncode)
        shutil.rmtree(folder)
    assert codes.count(2) > 10
    assert len(set(codes)) > 1


def test_no_name_in_a_bundle_writes_on_the_terminal(native: Built, small_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small_bundle, tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    manifest["proof"]["state"] = "a\x1b[2J\x9b\x7f\nerror: none\r\N{GREEN APPLE}"
    (folder / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False), "utf-8")
    done = subprocess.run([native.program, folder, "--self-test"], capture_output=True, check=False)
    assert done.returncode == 2
    text = done.stderr.decode("utf-8")
    assert "proof.state is a?[2J?? error: none?\N{GREEN APPLE}, want passed" in text
    assert "".join(text.split("\n")).isprintable()


def test_a_signed_bundle_is_taken(native: Built, small_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small_bundle, tmp_path / "bundle")
    (folder / "manifest.json.sig").write_bytes(bytes(64))
    done = subprocess.run([native.program, folder, "--self-test"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- the harness sees what it is there for


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (0, "heap-buffer-overflow"),
        (1, "signed integer overflow"),
        (3, "hard rss limit exhausted"),
        (4, "terminate called after throwing"),
    ],
)
def test_a_planted_fault_is_a_finding_and_the_next_mutant_is_still_tried(
    driver: Path, small_bundle: Path, fault: int, said: str
) -> None:
    good = [(FILES.index("report.json"), contents(small_bundle)["report.json"])]
    outcomes, findings = feed(driver, small_bundle, [good, [(PLANTED + fault, b"x" * 64)], good])
    assert [outcome is not None and outcome.get("taken") for outcome in outcomes] == [True, False, True]
    (finding,) = findings
    assert finding.code != 0
    assert said in finding.said


REMOVED = {  # a check of the readers, and what takes its place
    "files.h": ("found.dtype != dtype || found.shape != shape", "found.dtype != dtype"),
    "json.h": ('if (depth > 64) fail("it is nested too deeply");', ""),
    "bundle.h": (
        "images % settings_.seq_len || images / settings_.seq_len != c.tiles",
        "images != c.tiles * settings_.seq_len",
    ),
}


def test_the_mutants_find_checks_that_were_taken_out_of_the_readers(
    compiler: list[str], small_bundle: Path, tmp_path: Path
) -> None:
    sources = shutil.copytree(SOURCES, tmp_path / "sources")
    for name, (check, instead) in REMOVED.items():
        text = (sources / name).read_text("utf-8")
        assert text.count(check) == 1, name
        (sources / name).write_text(text.replace(check, instead), "utf-8")
    weak = build_driver(compiler, tmp_path / "driver", sources)
    base, rng = contents(small_bundle), random.Random(5)
    tried = list(mutants(base, 600, 0))
    # tiles and tokens of a tile whose product is beyond 63 bits, which needs both
    tiles = (change_tensors(rng, base[CASES_DATA], ".tiles", 2) for _ in range(100))
    manifest = json.loads(base["manifest.json"])
    manifest["image"]["tokens_per_tile"] = 1 << 16
    lie = (FILES.index("manifest.json"), json.dumps(manifest).encode())
    tried += [[lie, (FILES.index(CASES_DATA), data)] for data in tiles if str(1 << 50).encode() in data][:5]
    _, findings = feed(weak, small_bundle, [*tried, bombs()["nested lists"]], most=100)
    said = " ".join(map(str, findings))
    for what in ("heap-buffer-overflow", "stack-overflow", "signed integer overflow"):
        assert what in said, said


def test_a_mutants_pack_is_what_the_driver_reads() -> None:
    assert packed([(5, b"ab")]) == struct.pack("<IBI", 1, 5, 2) + b"ab"
