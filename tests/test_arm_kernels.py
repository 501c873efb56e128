"""Zero points on ARM: what the comparison takes away is what it says, and the shipped default has them."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks.arm_kernels import VARIANTS, Expected, judge, recipe_text, remove_zero_points, table
from benchmarks.disagreement import Answering
from export.android import export_android
from export.documents import Document
from quantize.recipe import load_recipe
from runtimes.bundle import read_bundle
from runtimes.runner import graph_paths
from runtimes.tensorfile import write_tensors
from tests.conftest import ROOT


def products(folder: Path) -> list[onnx.NodeProto]:
    """A bundle's 4-bit products."""
    models = [
        onnx.load(str(p), load_external_data=False)
        for p in graph_paths(read_bundle(folder, allow_pending=True)).values()
    ]
    nodes = [node for model in models for node in model.graph.node if node.op_type == "MatMulNBits"]
    return [n for n in nodes if {a.name: a.i for a in n.attribute}["bits"] == 4]


@pytest.mark.parametrize("recipe", ["int4", "int4-quick", "int4-all"])
def test_every_shipped_recipe_has_explicit_zero_points(recipe: str) -> None:
    """Without them ARM's kernels with dotprod round activations once more (benchmarks/results/arm_kernels.jsonl)."""
    blocks = [rule for _, rule in load_recipe(recipe).rules if rule.format == "block" and rule.bits == 4]
    assert blocks
    assert not [rule for rule in blocks if rule.symmetric]


def test_the_default_bundle_has_explicit_zero_points(demo_bundle: Path) -> None:
    found = products(demo_bundle)
    assert len(found) > 20
    assert all(len(node.input) == 4 and node.input[3] for node in found)


@pytest.fixture(scope="module")
def symmetric(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny checkpoint whose zero points are all in the middle."""
    folder = tmp_path_factory.mktemp("symmetric")
    recipe = folder / "recipe.toml"
    recipe.write_text(recipe_text("symmetric-32"), "utf-8")
    return export_android(str(tiny_checkpoint), folder / "bundle", str(recipe), with_proof=False).bundle


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_is_a_recipe(tmp_path: Path, variant: str) -> None:
    path = tmp_path / "it.toml"
    path.write_text(recipe_text(variant), "utf-8")
    _, rule = load_recipe(str(path)).rules[0]
    assert (rule.bits, rule.symmetric) == (4, variant != "int4")


def test_zero_points_in_the_middle_are_taken_away_and_nothing_else(symmetric: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(symmetric, tmp_path / "bundle")
    path = next((folder / "onnx").glob("decoder*.onnx"))
    before, with_zeros = onnx.load(str(path), load_external_data=False), products(folder)
    assert remove_zero_points(path) == len(with_zeros) > 0
    after = onnx.load(str(path), load_external_data=False)
    gone = {n.input[3] for n in with_zeros}
    assert {i.name for i in before.graph.initializer} - {i.name for i in after.graph.initializer} == gone
    for old, new in zip(before.graph.node, after.graph.node, strict=True):
        assert [i for i in old.input if i not in gone] == list(new.input)


def test_zero_points_that_mean_something_are_not_taken_away(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    path = next((folder / "onnx").glob("decoder*.onnx"))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="want 8 alone"):
        remove_zero_points(path)
    assert path.read_bytes() == before


def test_a_run_is_judged_by_what_the_twin_said(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    encoder = Answering(bundle)
    end = bundle.manifest.text.eos_ids[0]
    words = [t for t in range(3, 200) if t not in bundle.manifest.text.eos_ids and encoder.text([t]).isalnum()]
    first, second = words[0], next(w for w in words if encoder.text([w]) != encoder.text([words[0]]))
    logits = np.random.default_rng(3).normal(size=(4, bundle.manifest.text.vocab)).astype(np.float32)
    document = Document(None, "?", (encoder.text([first]),), "read")
    wanted = [Expected(document, (first, end, end, end), logits)] * 2
    changed = logits.copy()
    changed[:2] *= 1.01  # the twin's answer and its end; what lies beyond is not compared
    changed[2:] = 0
    write_tensors(tmp_path / "outputs.safetensors", {"a.logits": logits, "b.logits": changed})
    said = {"cases": [{"name": "a", "tokens": [first, end, end, end]}, {"name": "b", "tokens": [second, end, 0, 0]}]}
    row = judge(bundle, wanted, tmp_path, said)
    assert (row["exact"], row["twin_exact"], row["lost"], row["gained"]) == (0.5, 1.0, 1, 0)
    assert row["answers_equal"] == 0.5
    assert row["logits_error"] == {"median": pytest.approx(0.005, rel=1e-3), "worst": pytest.approx(0.01, rel=1e-3)}
    assert row["kl_mean"] > 0


def test_what_was_measured_says_what_the_readme_says() -> None:
    """Explicit zero points cost no accuracy on any kernel; without them those of dotprod lose some."""
    lines = (ROOT / "benchmarks" / "results" / "arm_kernels.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    errors = {(r["variant"], r["cpu"], bool(r["session"])): r["logits_error"]["median"] for r in rows}
    assert {r["execution"] for r in rows if r["cpu"] != "host"} == {"qemu-user"}
    assert not [key for r in rows for key in r if "ms" in key.split("_") or "memory" in key]
    for cpu in ("max", "cortex-a76"):
        assert errors["int4", cpu, False] < 1.05 * errors["int4", "host", False]
        for block in ("32", "128"):
            with_zeros, without = (
                errors[f"symmetric-{block}", cpu, False],
                errors[f"symmetric-{block}-no-zeros", cpu, False],
            )
            assert without > 1.15 * with_zeros
            assert errors[f"symmetric-{block}-no-zeros", cpu, True] < 1.05 * with_zeros or cpu == "max"
    assert table(rows).count("\n") == len(rows) + 1
