"""The token-budget curve: a line for each number of tiles, kept from run to run."""

import json
from pathlib import Path

import pytest

from benchmarks.budget import main, measure_curve, read_documents, table
from benchmarks.checked import ReportError
from benchmarks.measure import Job
from benchmarks.records import read_budget
from device_harness.profiles import find_profile
from export.documents import DataError
from tests.runs import write_lines


def test_more_tiles_are_more_tokens_and_what_is_known_is_kept(
    tiny_bundle: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "curve.jsonl"
    data = ["--data", str(calibration), "--limit", "3"]
    command = [str(tiny_bundle), "--runs", "1", "--repeats", "2", "--out", str(out), *data, "--tiles"]
    assert main([*command, "1"]) == 0
    first = out.read_text()
    assert main([*command, "1", "5"]) == 0
    assert "1 tiles: known" in capsys.readouterr().err
    assert out.read_text().startswith(first)
    one, five = read_budget(out)
    assert (one.tiles, five.tiles) == (1, 5)
    assert five.image_tokens == 5 * one.image_tokens > 0
    assert five.prompt_tokens > one.prompt_tokens
    assert len(one.samples_ms) == 2
    assert one.accuracy is not None
    assert one.accuracy.items == 3
    assert not list(tmp_path.glob(".*"))


def test_other_settings_are_measured_anew_and_a_curve_without_documents_has_no_accuracy(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, profile = tmp_path / "curve.jsonl", find_profile("x86-laptop")
    told: list[str] = []

    def curve(repeats: int) -> int:
        job = Job(str(tiny_bundle), prefill_tokens=1, decode_at=0, decode_tokens=1, threads=1, repeats=repeats)
        told.clear()
        points = measure_curve(tiny_bundle, profile, job, 1, [1], out, progress=told.append)
        assert points[0]["accuracy"] is None
        assert table(points).splitlines()[-1].endswith("| - |")
        return len(out.read_text().splitlines())

    assert curve(1) == 1
    assert curve(2) == 2
    assert curve(1) == 2
    assert told == ["1 tiles: known"]
    monkeypatch.setattr("benchmarks.budget.commit", lambda: "another")
    assert curve(1) == 3


def test_a_file_of_something_else_is_left_alone(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "notes.jsonl"
    out.write_text('{"schema": 1}\n')
    assert main([str(tiny_bundle), "--tiles", "1", "--out", str(out)]) == 2
    assert "notes.jsonl: line 1: bundle is missing" in capsys.readouterr().err
    assert out.read_text() == '{"schema": 1}\n'


def test_what_cannot_be_measured_is_refused(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([str(tmp_path / "none")], "none"),
        ([str(tiny_bundle), "--runs", "0"], "--runs is 0, want 1 or more"),
        ([str(tiny_bundle), "--profile", "x"], "profile 'x' is unknown"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_documents_without_answers_have_no_accuracy(tmp_path: Path) -> None:
    row = {"image": None, "question": "What?"}
    path = write_lines(tmp_path / "documents.jsonl", [row])
    with pytest.raises(DataError, match="has no answer"):
        read_documents(path, None)
    path.write_text(json.dumps(row | {"answer": "x"}) + "\n")
    assert read_documents(path, None).numbers == (0,)


def test_a_point_from_a_file_is_checked_before_anything_runs(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "curve.jsonl"
    out.write_text("{\n")
    with pytest.raises(ReportError, match="is not JSON"):
        measure_curve(tiny_bundle, find_profile("x86-laptop"), Job(str(tiny_bundle)), 1, [1], out)
