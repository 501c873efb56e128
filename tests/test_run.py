"""A run on a profile: what is measured, what is kept to, what is refused."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measure import Job, read_job
from benchmarks.run import main, measure_bundle, over, table
from device_harness.confine import confined
from device_harness.profiles import Profile, find_profile
from runtimes.manifest import BundleError
from runtimes.runner import EngineError, InputError

PHASES = {"verify", "load", "image", "prefill", "decode", "first_token"}


@pytest.fixture(scope="session")
def laptop() -> Profile:
    return find_profile("x86-laptop")


def job(bundle: Path, **changes: Any) -> Job:
    quick = Job(str(bundle), tiles=5, prefill_tokens=16, decode_at=8, decode_tokens=4, threads=1, repeats=2)
    return replace(quick, **changes)


def test_a_run_keeps_every_sample_of_every_phase(tiny_bundle: Path, laptop: Profile) -> None:
    (record,) = measure_bundle(tiny_bundle, laptop, job(tiny_bundle), 1)
    samples = {name: phase["samples_ms"] for name, phase in record["phases"].items()}
    assert samples.keys() == PHASES
    assert {name: len(s) for name, s in samples.items()} == {
        "verify": 1,
        "load": 1,
        "image": 2,
        "prefill": 2,
        "decode": 4,
        "first_token": 2,
    }
    assert all(ms > 0 for s in samples.values() for ms in s)
    assert record["medians_ms"]["first_token"] > record["medians_ms"]["image"]
    assert record["first_token_of"]["tiles"] == 5
    assert [name for _, name in record["phase_starts"]] == list(record["phases"])
    assert record["simulated"] is True
    assert record["execution"] == "native"
    assert record["environment"]["cores"] == os.cpu_count()
    with confined(1, 64) as inside:
        assert record["limit_enforced"] == inside.memory_enforced
    peaks = [phase["peak_rss_mib"] for phase in record["phases"].values()]
    if None not in peaks:
        assert record["peak_rss_mib"] == max(peaks) > max(mib for _, mib in record["memory_over_time"]) * 0.9
    json.dumps(record)
    assert "| first_token | 4 |" in table([record, record])


def test_a_bundle_that_takes_more_than_the_profile_has_is_killed_and_named(
    tiny_bundle: Path, laptop: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.run.expect", lambda *_: None)  # which would have refused it
    small = replace(laptop, memory_mib=16)
    with confined(1, 16) as inside:
        enforced = inside.memory_enforced
    if enforced:
        with pytest.raises(EngineError, match="took more than the 16 MiB that the profile has"):
            measure_bundle(tiny_bundle, small, job(tiny_bundle), 1)
    else:
        (record,) = measure_bundle(tiny_bundle, small, job(tiny_bundle), 1)
        assert not record["limit_enforced"]
        assert any(line.startswith("memory: ") for line in record["over"])


def test_what_is_over_a_limit_is_said(laptop: Profile) -> None:
    medians = {"load": 1.0, "first_token": 1.0, "decode": 1.0}
    assert over(laptop, medians, 100) == []
    late = over(laptop, medians | {"decode": laptop.limits.token_ms + 1}, laptop.memory_mib + 1)
    assert [line.partition(":")[0] for line in late] == ["token_ms", "memory"]


def test_a_run_over_the_limits_fails_and_is_written_all_the_same(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(find_profile.__code__.co_filename).with_name("profiles.toml").read_text()
    start, end = text.index("[x86-laptop]"), len(text)
    own, out = tmp_path / "own.toml", tmp_path / "runs.jsonl"
    own.write_text(text[start:end].replace("load_ms = 3000", "load_ms = 1"))
    quick = ["--runs", "2", "--repeats", "1", "--tiles", "0", "--prefill-tokens", "8", "--decode-tokens", "2"]
    arguments = [str(tiny_bundle), "--profile", str(own), *quick, "--decode-at", "0", "--out", str(out)]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert "over the profile's limits: load_ms" in printed.err
    assert "Laptop, x86-64, 2 cores, simulated on" in printed.out
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 2
    assert "image" not in records[0]["phases"]


def test_what_cannot_be_measured_is_refused_before_anything_runs(
    tiny_bundle: Path, tiny_ios_bundle: Path, laptop: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BundleError, match="is for coreml, profile x86-laptop takes onnx"):
        measure_bundle(tiny_ios_bundle, laptop, job(tiny_ios_bundle), 1)
    with pytest.raises(InputError, match=r"1000000 tokens are asked for, the bundle's context is \d+"):
        measure_bundle(tiny_bundle, laptop, job(tiny_bundle, prefill_tokens=1_000_000), 1)
    with pytest.raises(InputError, match="want an object of"):
        read_job('{"bundle": "x", "colour": 1}')
    with pytest.raises(InputError, match="is not JSON"):
        read_job("{")
    for arguments, message in (
        ([str(tmp_path / "none")], "none"),
        ([str(tiny_bundle), "--profile", "pixel-9"], "profile 'pixel-9' is unknown"),
        ([str(tiny_bundle), "--runs", "0"], "--runs is 0, want 1 or more"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
