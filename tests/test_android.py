"""Export: every member of the family, every recipe, the same bytes again, nothing half-done."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from export.android import export_android
from export.prove import ProofError
from export.spec import CheckpointError
from quantize.recipe import SHIPPED
from runtimes.bundle import read_bundle
from runtimes.manifest import BundleError
from runtimes.ort import OrtRunner
from runtimes.verify import verify
from tests.checkpoints import make_checkpoint
from tests.conftest import LOOSE, ROOT

FAMILY: dict[str, dict[str, Any]] = {
    "mha, tied, fp32, sharded": {"kv_heads": 4, "tied": True, "dtype": "float32", "max_shard_size": 100_000},
    "v1 idefics3, factor 3": {"architecture": "idefics3", "scale_factor": 3, "image_size": 84},
    "grid 25, erf gelu": {"image_size": 100, "patch_size": 4, "scale_factor": 5, "vision_act": "gelu"},
    "grid 41": {"image_size": 164, "patch_size": 4, "scale_factor": 41, "vision_layers": 1},
    "odd widths": {"hidden": 72, "heads": 3, "kv_heads": 1, "head_dim": 32, "ffn": 100, "vocab": 347},
}


@pytest.mark.parametrize("name", FAMILY)
def test_a_member_of_the_family_exports_with_rounding_noise_only(name: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **FAMILY[name])
    done = export_android(str(checkpoint), tmp_path / "bundle", LOOSE)
    assert done.report is not None
    error = done.report["export_error"]
    assert error["features_error"] < 1e-5
    assert error["logits_error"] < 1e-5
    assert error["tokens"] == 32
    assert error["tokens_equal"] + error["ties"] == 32


@pytest.mark.parametrize("recipe", SHIPPED)
def test_every_shipped_recipe_exports(recipe: str, tiny_checkpoint: Path, calibration: Path, tmp_path: Path) -> None:
    done = export_android(str(tiny_checkpoint), tmp_path / "bundle", recipe, with_proof=False, calibration=calibration)
    bundle = read_bundle(done.bundle, allow_pending=True)
    used = bundle.manifest.recipe.tensors
    bits = {
        part: used[name]["bits"]
        for part, name in {
            "decoder": "model.text_model.layers.0.mlp.up_proj.weight",
            "head": "lm_head.weight",
            "embedding": "model.text_model.embed_tokens.weight",
            "vision": "model.vision_model.encoder.layers.1.mlp.fc2.weight",
        }.items()
    }
    want = {
        "fp32": (32, 32, 32, 32),
        "int8": (8, 8, 8, 8),
        "int4": (4, 8, 8, 8),
        "int4-quick": (4, 8, 8, 8),
        "int4-all": (4, 4, 4, 4),
    }[recipe]
    assert tuple(bits.values()) == want
    suffix = {"fp32": "", "int8": "_quantized", "int4": "_q4"}.get(recipe, "_q4")
    assert (done.bundle / "onnx" / f"decoder_model_merged{suffix}.onnx").exists()
    runner = OrtRunner(bundle)
    assert np.isfinite(runner.extend(runner.new_cache(), [1, 60, 61])).all()


def test_the_same_inputs_give_the_same_payload(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    again = export_android(str(tiny_checkpoint), tmp_path / "again", LOOSE, with_proof=False)
    assert again.payload_digest == read_bundle(tiny_bundle).manifest.payload_digest


def test_a_tile_alone_and_the_same_tile_in_a_batch_are_equal_bit_for_bit(tiny_bundle: Path) -> None:
    import onnxruntime

    bundle = read_bundle(tiny_bundle)
    session = onnxruntime.InferenceSession(str(bundle.path("onnx/vision_encoder_quantized.onnx")))
    side = bundle.manifest.image.tile_size
    pixels = np.random.default_rng(0).standard_normal((1, 3, 3, side, side)).astype(np.float32)
    pixels[0, 2] *= 20  # a neighbour with another range
    mask = np.ones((1, 3, side, side), dtype=np.bool_)

    def features(chosen: list[int]) -> Any:
        feeds = {"pixel_values": pixels[:, chosen], "pixel_attention_mask": mask[:, chosen]}
        return session.run(["image_features"], feeds)[0]

    together = features([0, 1, 2])
    for i in range(3):
        assert np.array_equal(together[i], features([i])[0])
    mask[0, 1] = False  # padding, which the reference drops
    assert np.array_equal(features([0, 1, 2]), together[[0, 2]])


def test_a_conversation_in_pieces_equals_one_long_prompt(tiny_bundle: Path) -> None:
    runner = OrtRunner(read_bundle(tiny_bundle))
    ids = np.random.default_rng(0).integers(50, 300, 40).tolist()
    whole = runner.extend(runner.new_cache(), ids, keep=0)
    cache = runner.new_cache()
    pieces = [runner.extend(cache, ids[a:b], keep=0) for a, b in ((0, 7), (7, 8), (8, 30), (30, 31), (31, 40))]
    assert np.abs(np.concatenate(pieces) - whole).max() < 1e-4 * np.abs(whole).max()


def test_an_existing_folder_is_refused_and_untouched(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(BundleError, match="exists already"):
        export_android(str(tiny_checkpoint), tmp_path / "out", LOOSE)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_bundle_over_its_limits_is_never_finished(tiny_checkpoint: Path, tmp_path: Path) -> None:
    strict = tmp_path / "strict.toml"
    strict.write_text(Path(LOOSE).read_text().replace("activation_logits = 0.2", "activation_logits = 1e-7"))
    with pytest.raises(ProofError, match=r"activation error: case .*relative error of logits"):
        export_android(str(tiny_checkpoint), tmp_path / "bundle", str(strict))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["strict.toml"]


def test_a_pending_bundle_is_refused_until_it_is_proven(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export_android(str(tiny_checkpoint), tmp_path / "bundle", LOOSE, with_proof=False).bundle
    with pytest.raises(BundleError, match="proof is pending"):
        read_bundle(bundle)
    before = read_bundle(bundle, allow_pending=True).manifest.payload_digest
    command = [sys.executable, "-m", "export.prove", str(bundle), "--model", str(tiny_checkpoint)]
    done = subprocess.run(
        [*command, "--recipe", LOOSE, "--json"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["ok"] is True
    proven = read_bundle(bundle)
    assert proven.manifest.payload_digest == before
    assert verify(proven).passed


def test_a_head_width_that_the_engine_cannot_rotate_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", hidden=72, heads=3, kv_heads=3, head_dim=24)
    with pytest.raises(CheckpointError, match="head width is 24"):
        export_android(str(checkpoint), tmp_path / "bundle", LOOSE)
    assert not (tmp_path / "bundle").exists()


def test_nan_in_a_weight_is_an_error_that_names_it_and_leaves_nothing(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dtype="float32")
    path = checkpoint / "model.safetensors"
    tensors = {k: v.copy() for k, v in load_file(path).items()}
    name = "model.text_model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5] = np.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        export_android(str(checkpoint), tmp_path / "bundle", LOOSE)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("tiles", [1, 5, 10, 17])
def test_the_token_budget_is_the_bundles_default(tiles: int, tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = export_android(str(tiny_checkpoint), tmp_path / "bundle", LOOSE, tiles=tiles, with_proof=False)
    image = read_bundle(done.bundle, allow_pending=True).manifest.image
    config = json.loads((done.bundle / "preprocessor_config.json").read_text())
    assert image.max_tiles == tiles
    assert config["size"]["longest_edge"] == image.longest_edge == {1: 1, 5: 2, 10: 3, 17: 4}[tiles] * image.tile_size


def test_the_command_fails_with_one_clear_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "export.android", "--model", str(tmp_path), "--out", str(tmp_path / "b"), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "config.json" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["ok"] is False
    assert not (tmp_path / "b").exists()
