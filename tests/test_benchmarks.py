"""The benchmarks run on the tiny checkpoint, and their tables say what the runs said."""

import json
import sys
from pathlib import Path

import pytest

import benchmarks.recipe_loss
from benchmarks.disagreement import compare_bundles
from benchmarks.export_cost import measure as export_cost
from benchmarks.export_cost import table, timed
from benchmarks.recipe_loss import measure as recipe_loss
from export.documents import read_data
from runtimes.bundle import read_bundle
from tests.checkpoints import make_checkpoint
from tests.conftest import LOOSE


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    rows = [{"image": None, "question": f"Question {i}?", "answer": "no", "task": "text"} for i in range(2)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path / "documents.jsonl"


def test_an_export_is_timed_answered_and_proven(tiny_checkpoint: Path) -> None:
    row = export_cost(tiny_checkpoint, "tiny", LOOSE, proof=True)
    assert row["payload_bytes"] > 0
    assert row["answer_tokens"] == 4
    for part in ("export", "answer", "proof"):
        assert row[part]["wall_s"] > 0
        assert row[part]["peak_rss_mib"] > 10
    assert 0 < row["graphs_s"] <= row["export"]["wall_s"]
    assert row["export_error"]["logits_error"] < 1e-5
    cells = [cell.strip() for cell in table([row, row]).splitlines()[-1].split("|")]
    assert cells[1:4] == ["tiny", "android", "2"]
    assert cells[5] == f"{row['graphs_s']:.1f}"
    assert cells[9] == f"{row['proof']['peak_rss_mib']:.0f}"


def test_an_export_to_core_ml_is_timed(tiny_checkpoint: Path) -> None:
    pytest.importorskip("coremltools")
    row = export_cost(tiny_checkpoint, "tiny", LOOSE, target="ios", answer_tokens=0)
    assert row["target"] == "ios"
    assert 0 < row["graphs_s"] <= row["export"]["wall_s"]
    assert "answer" not in row
    assert table([row]).splitlines()[-1].endswith("| - | - | - |")


def test_bundles_that_differ_are_counted_and_every_difference_is_told(
    tiny_bundle: Path, tiny_ios_bundle: Path, documents: Path, tmp_path: Path
) -> None:
    row = compare_bundles(read_bundle(tiny_bundle), read_bundle(tiny_ios_bundle), read_data(documents))
    assert row["documents"] == 2
    assert [bundle["target"] for bundle in row["bundles"]] == ["onnx", "coreml"]
    assert row["bundles"][1]["engine"] == "the saved programs, emulated"
    assert row["kl_mean"] > 0
    assert row["differ"] == len(row["differences"])
    low, high = row["interval_95"]
    assert low <= row["rate"] <= high
    # a bundle of other weights answers something else, and the tokens where they part are told
    from export.ios import export_ios

    other = export_ios(str(make_checkpoint(tmp_path / "other", seed=1)), tmp_path / "bundle", LOOSE, with_proof=False)
    row = compare_bundles(read_bundle(tiny_bundle), read_bundle(other.bundle, allow_pending=True), read_data(documents))
    assert row["differ"] == 2
    for difference in row["differences"]:
        assert difference["answers"][0] != difference["answers"][1]
        assert difference["gaps"][0] > 0 > difference["gaps"][1]


def test_a_run_that_fails_is_an_error_with_what_it_said() -> None:
    with pytest.raises(RuntimeError, match="--size"):
        timed(["benchmarks.random_checkpoint", "--size", "9b", "--out", "nowhere"])


def test_a_recipe_is_measured_on_documents(tiny_checkpoint: Path, documents: Path) -> None:
    row = recipe_loss(str(tiny_checkpoint), LOOSE, documents, None, None)
    assert row["quantization_loss"]["documents"] == 2
    assert row["quantization_loss"]["exact"]["text"]["bundle"] == 0
    assert row["activation_error"]["logits_error"] > row["export_error"]["logits_error"]


def test_a_recipe_over_its_limits_has_no_line_and_fails_the_command(
    tiny_checkpoint: Path,
    documents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    strict = tmp_path / "strict.toml"
    strict.write_text(Path(LOOSE).read_text().replace("loss_kl = 10.0", "loss_kl = 1e-9"))
    out = tmp_path / "results" / "loss.jsonl"
    command = ["recipe_loss", "--model", str(tiny_checkpoint), "--data", str(documents), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--recipe", str(strict), "--recipe", LOOSE])
    assert benchmarks.recipe_loss.main() == 1
    said = capsys.readouterr()
    assert "mean KL" in said.err
    assert [json.loads(line)["recipe"] for line in out.read_text().splitlines()] == ["int4-random"]
    assert said.out.splitlines()[-1].startswith("| int4-random |")
