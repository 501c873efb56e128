"""The proof catches what it is there for: each planted fault below must stop the bundle."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SmolVLMForConditionalGeneration

import export.onnx_graphs
import export.onnx_ops
import export.spec
import runtimes.preprocess
import runtimes.verify
from export.android import export_android
from export.dequantized import write_dequantized
from export.documents import DataError, read_data
from export.onnx_ops import stored_index
from export.prove import ProofError, paired_exact, prove
from export.reference import Reference
from export.spec import read_spec
from export.weights import open_weights
from quantize.recipe import load_recipe
from runtimes.bundle import read_bundle, write_manifest
from runtimes.verify import read_cases, verify
from tests.conftest import LOOSE

DECODER = "onnx/decoder_model_merged_q4.onnx"


@pytest.fixture(scope="module")
def pending(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pending")
    return export_android(str(tiny_checkpoint), folder / "bundle", LOOSE, with_proof=False).bundle


def prove_copy(pending: Path, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Proves `folder`, a changed copy of the pending bundle whose digests are made right again."""
    manifest = read_bundle(pending, allow_pending=True).manifest
    write_manifest(folder, replace(manifest, files=(), payload_digest=""))
    spec = read_spec(checkpoint)
    return prove(folder, checkpoint, spec, open_weights(checkpoint, spec), load_recipe(LOOSE), [])


def flip(path: Path, offset: int, bits: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ bits]))


def test_a_flipped_nibble_is_named(pending: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pending, tmp_path / "bundle")
    name = "model.text_model.layers.1.mlp.down_proj.weight.q"
    flip(folder / f"{DECODER}_data", stored_index(folder / DECODER)[name].offset + 77, 0x80)
    with pytest.raises(ProofError, match=f"tensor {name}".replace(".", r"\.")):
        prove_copy(pending, tiny_checkpoint, folder)


def test_the_twin_alone_sees_a_flipped_nibble(
    pending: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.onnx_graphs, "check_graphs", lambda *_: [])
    folder = shutil.copytree(pending, tmp_path / "bundle")
    name = "model.text_model.layers.1.mlp.down_proj.weight.q"
    flip(folder / f"{DECODER}_data", stored_index(folder / DECODER)[name].offset + 77, 0x80)
    with pytest.raises(ProofError, match=r"export error: case .* relative error of logits"):
        prove_copy(pending, tiny_checkpoint, folder)


def test_a_swapped_scale_is_named(pending: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pending, tmp_path / "bundle")
    name = "model.text_model.layers.0.self_attn.o_proj.weight.scales"
    stored = stored_index(folder / DECODER)[name]
    data = bytearray((folder / f"{DECODER}_data").read_bytes())
    at = stored.offset
    data[at : at + 4], data[at + 4 : at + 8] = data[at + 4 : at + 8], data[at : at + 4]
    (folder / f"{DECODER}_data").write_bytes(data)
    with pytest.raises(ProofError, match=f"tensor {name}".replace(".", r"\.")):
        prove_copy(pending, tiny_checkpoint, folder)


def wrong_theta(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = export.spec.rope_tables
    monkeypatch.setattr(export.onnx_ops, "rope_tables", lambda text: tables(replace(text, rope_theta=10500.0)))


def shifted_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = export.spec.position_ids

    def shifted(grid: int) -> Any:
        wrong = np.asarray(ids(grid)).copy()
        wrong[[2, 3]] = wrong[[3, 2]]
        return wrong

    monkeypatch.setattr(export.onnx_ops, "position_ids", shifted)


def gate_and_up_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = export.onnx_ops.OnnxOps.silu_gate
    monkeypatch.setattr(export.onnx_ops.OnnxOps, "silu_gate", lambda self, a, b: gate(self, b, a))


def wrong_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = export.onnx_ops.OnnxOps.rms_norm
    monkeypatch.setattr(export.onnx_ops.OnnxOps, "rms_norm", lambda self, x, w, eps: norm(self, x, w, 1e-2))


@pytest.mark.parametrize(
    ("fault", "symptom"),
    [
        (wrong_theta, "relative error of logits"),
        (shifted_positions, "relative error of image features"),
        (gate_and_up_swapped, "relative error of logits"),
        (wrong_epsilon, "relative error of logits"),
    ],
)
def test_a_fault_of_the_exporter_is_an_export_error(
    fault: Any, symptom: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(ProofError, match=f"export error: case .*{symptom}"):
        export_android(str(tiny_checkpoint), tmp_path / "bundle", LOOSE)
    assert not (tmp_path / "bundle").exists()


def test_an_off_by_one_tile_order_is_caught(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = runtimes.preprocess.cut

    def rotated(image: Any, settings: Any) -> Any:
        tiles, rows, cols = cut(image, settings)
        return tiles[1:] + tiles[:1], rows, cols

    monkeypatch.setattr(runtimes.preprocess, "cut", rotated)
    with pytest.raises(ProofError, match="pixels is different from the reference"):
        export_android(str(tiny_checkpoint), tmp_path / "bundle", LOOSE)


def test_verify_sees_a_case_of_another_model(tiny_bundle: Path, tmp_path: Path) -> None:
    """The cases themselves can fail: other features, other tokens, another prompt."""
    cases = read_cases(tiny_bundle)
    bundle = read_bundle(tiny_bundle)
    assert verify(bundle).passed
    case = next(c for c in cases if c.name == "split")
    assert len(case.tiles) == 3
    for changed in (
        replace(case, features=case.features * np.float32(1.3)),
        replace(case, logits=case.logits[:, ::-1].copy()),
        replace(case, ids=case.ids[:-1]),
        replace(case, grids=((2, 1),)),
    ):
        folder = shutil.copytree(tiny_bundle, tmp_path / "copy")
        shutil.rmtree(folder / "cases")
        runtimes.verify.write_cases(folder, [changed])
        write_manifest(folder, replace(bundle.manifest, files=(), payload_digest=""))
        assert not verify(read_bundle(folder)).passed
        shutil.rmtree(folder)


def test_activations_with_outliers_that_cost_answers_are_over_the_limit_or_evened_out(
    demo_checkpoint: Path, calibration: Path, tmp_path: Path
) -> None:
    """Two channels after each norm of the vision tower 64 times as large, the columns that read them as much smaller:
    the same function, but one scale a tensor no longer does for its activations. Calibration finds the factors."""
    checkpoint = shutil.copytree(demo_checkpoint, tmp_path / "checkpoint")
    weights = {name: t.float() for name, t in load_file(checkpoint / "model.safetensors").items()}
    for i in range(read_spec(checkpoint).vision.layers):
        at = f"model.vision_model.encoder.layers.{i}"
        readers = {"layer_norm1": [f"self_attn.{p}_proj" for p in "qkv"], "layer_norm2": ["mlp.fc1"]}
        for norm, matrices in readers.items():
            for channel in (7 + i, 100 + i):
                for part in ("weight", "bias"):
                    weights[f"{at}.{norm}.{part}"][channel] *= 64
                for matrix in matrices:
                    weights[f"{at}.{matrix}.weight"][:, channel] /= 64
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProofError, match=r"activation error: case .* relative error of image features") as refused:
        export_android(str(checkpoint), tmp_path / "bundle", "int4-quick")
    assert "export error" not in str(refused.value)
    assert "RECIPE=mine.toml" in str(refused.value)
    evened = export_android(str(checkpoint), tmp_path / "bundle", "int4", calibration=calibration)
    assert evened.report is not None
    assert evened.report["activation_error"]["features_error"] < 0.05


def test_a_replay_elsewhere_may_differ_twice_as_much_as_the_proof_did(tiny_bundle: Path) -> None:
    report = json.loads((tiny_bundle / "report.json").read_text())
    parity = verify(read_bundle(tiny_bundle))
    limits = report["verify_limits"]
    assert limits["logits"] == pytest.approx(2 * parity.logits_error + 1e-4, rel=0.2)
    assert limits["features"] <= report["recipe"]["limits"]["activation_features"] + 1e-4


def test_the_reference_equals_from_pretrained_bit_for_bit(tiny_checkpoint: Path) -> None:
    spec = read_spec(tiny_checkpoint)
    reference = Reference(tiny_checkpoint, spec, open_weights(tiny_checkpoint, spec), resident_bytes=10_000)
    model = SmolVLMForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    side, count = spec.vision.image_size, spec.tokens_per_tile
    pixels = np.random.default_rng(0).standard_normal((2, 3, side, side)).astype(np.float32)
    ids = [1, 70, *[spec.image_token_id] * (2 * count), 71, 72]
    made = reference.generate(ids, pixels, 6, stop=False)
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([ids]), pixel_values=torch.from_numpy(pixels)[None])
        tokens = model.generate(
            input_ids=torch.tensor([ids]),
            pixel_values=torch.from_numpy(pixels)[None],
            max_new_tokens=6,
            do_sample=False,
        )[0, len(ids) :].tolist()
    assert np.array_equal(made.prompt_logits, out.logits[0].numpy())
    assert made.features.shape == (2, count, spec.text.hidden)
    assert list(made.tokens[: len(tokens)]) == tokens


def test_a_dequantized_checkpoint_is_what_the_twin_computes(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    for _ in write_dequantized(tiny_checkpoint, load_recipe(LOOSE), tmp_path / "dequantized"):
        pass
    model = SmolVLMForConditionalGeneration.from_pretrained(tmp_path / "dequantized", dtype=torch.float32).eval()
    case = next(c for c in read_cases(tiny_bundle) if c.name == "text")
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([list(case.ids)])).logits[0, -1].numpy()
    assert np.abs(logits - case.logits[0]).max() < 1e-5 * np.abs(case.logits[0]).max()
    original = SmolVLMForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        full = original(input_ids=torch.tensor([list(case.ids)])).logits[0, -1].numpy()
    assert np.abs(logits - full).max() > 1e-3 * np.abs(full).max()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "line 1: is list"),
        ('{"image": 3, "question": "a"}', "image is 3"),
        ('{"image": null, "question": " "}', "question is ' '"),
        ('{"image": "no.png", "question": "a"}', "no.png does not exist"),
        ('{"image": null, "question": "a", "answer": [1]}', r"answer is \[1\]"),
        ("", "holds no document"),
    ],
)
def test_a_bad_line_of_documents_is_named(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "documents.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        read_data(tmp_path)


def test_users_own_documents_without_labels_give_kl_and_top1(
    pending: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    rows = [{"image": None, "question": f"Question {i}?"} for i in range(3)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = export_android(str(tiny_checkpoint), tmp_path / "bundle", LOOSE, data=tmp_path / "mine.jsonl")
    assert done.report is not None
    loss = done.report["quantization_loss"]
    assert loss["documents"] == 3
    assert loss["kl_mean"] > 0
    assert 0 <= loss["top1_agreement"] <= 1
    assert "exact" not in loss


def test_a_paired_loss_counts_what_was_lost_and_gained() -> None:
    row = paired_exact([(True, False)] * 10 + [(False, True)] * 4 + [(True, True)] * 86)
    assert (row["lost"], row["gained"]) == (10, 4)
    assert row["loss"] == pytest.approx(0.06)
    low, high = row["loss_interval_95"]
    assert low < 0.06 < high
