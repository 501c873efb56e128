"""Calibration: the architecture in PyTorch is the reference's, factors change nothing, a stopped run goes on, memory of
what was asked for is exact, and what is wrong is refused."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

import export.calibrate
from benchmarks.forced import Documents, Weighted
from export.android import export_android
from export.calibrate import (
    Calibrated,
    Moments,
    Rounding,
    affordable_tokens,
    calibrate,
    calibrate_on,
    calibration_documents,
    calibration_prompts,
    changed_outputs,
    choose_factors,
    damping,
    identity,
    second_moments,
)
from export.documents import DataError, Document, read_data
from export.folds import Folded, folds
from export.processor import write_processor_files
from export.reference import Reference
from export.smolvlm import EMBED
from export.spec import CheckpointError, ModelSpec, read_spec
from export.torch_ops import Prompts, TorchOps, run_decoder, run_vision
from export.weights import Weights, open_weights
from quantize.gptq import quantize_gptq
from quantize.int4 import F32, as_floats, dequantize, quantize_blocks
from quantize.recipe import Recipe, RecipeError, load_recipe, parse_recipe
from runtimes.bundle import read_bundle
from runtimes.prompt import PromptEncoder
from tests.checkpoints import make_checkpoint
from tests.conftest import LOOSE

FC1 = "model.vision_model.encoder.layers.0.mlp.fc1.weight"


class Case:
    """A checkpoint, its processor files and prompts."""

    def __init__(self, checkpoint: Path, documents: Sequence[Document], scratch: Path) -> None:
        self.checkpoint, self.spec = checkpoint, read_spec(checkpoint)
        self.weights = open_weights(checkpoint, self.spec)
        self.processor = scratch / "processor"
        self.processor.mkdir()
        write_processor_files(checkpoint, self.spec, self.processor, None)
        self.prompts, self.used = calibration_prompts(self.processor, documents, 16384, self.spec.text.max_positions)


@pytest.fixture
def tiny(tiny_checkpoint: Path, calibration: Path, tmp_path: Path) -> Case:
    return Case(tiny_checkpoint, read_data(calibration, 6), tmp_path)


@pytest.fixture
def demo(demo_checkpoint: Path, calibration: Path, tmp_path: Path) -> Case:
    return Case(demo_checkpoint, read_data(calibration), tmp_path)


def logits(weights: Any, spec: ModelSpec, prompts: Prompts) -> F32:
    tensors = Weighted(weights)
    features = run_vision(TorchOps(spec, tensors, prompts))
    return run_decoder(TorchOps(spec, tensors, prompts), features)


@pytest.mark.parametrize("traits", [{}, {"tied": True}, {"architecture": "idefics3"}])
def test_the_architecture_in_pytorch_is_the_reference_to_rounding_noise(
    traits: dict[str, Any], calibration: Path, tmp_path: Path
) -> None:
    case = Case(make_checkpoint(tmp_path / "checkpoint", **traits), read_data(calibration, 3), tmp_path)
    found = logits(case.weights, case.spec, case.prompts)
    reference = Reference(case.checkpoint, case.spec, case.weights)
    row = tile = 0
    for ids, answer, count in zip(case.prompts.ids, case.prompts.answer, case.prompts.counts, strict=True):
        pixels = case.prompts.pixels(case.prompts.tiles[tile : tile + count])
        tile += count
        wanted = reference.generate(ids, pixels, 1).prompt_logits[answer - 1 : -1]
        assert np.linalg.norm(found[row : row + len(wanted)] - wanted) < 1e-5 * np.linalg.norm(wanted)
        row += len(wanted)
    assert row == len(found)


@pytest.mark.parametrize("traits", [{}, {"tied": True}, {"kv_heads": 2}])
def test_folded_factors_leave_the_model_bit_for_bit_as_it_was(
    traits: dict[str, Any], calibration: Path, tmp_path: Path
) -> None:
    """Powers of two move exponents alone. Sums are of the same numbers in the same order."""
    case = Case(make_checkpoint(tmp_path / "checkpoint", **traits), read_data(calibration, 3), tmp_path)
    rng = np.random.default_rng(0)
    factors = []
    for fold in folds(case.spec):
        channels = case.weights.shape(fold.writers[0])[0]
        factors.append((fold, np.exp2(rng.integers(-4, 5, channels)).astype(np.float32)))
    assert len(factors) == 3 * case.spec.vision.layers + 4 * case.spec.text.layers + (not case.spec.text.tied)
    folded = Folded(case.weights, factors)
    changed = [name for name in case.weights.names if not np.array_equal(folded[name], case.weights[name])]
    assert len(changed) > 10 * case.spec.text.layers
    before, after = (logits(w, case.spec, case.prompts) for w in (case.weights, folded))
    assert np.array_equal(after, before)


def recipe(
    rounding: str = "gptq", *, bits: int = 4, factors: bool = False, match: str = "*layers.*_proj.weight"
) -> Recipe:
    rule = {"match": match, "format": "block", "bits": bits, "block": 32, "symmetric": False, "rounding": rounding}
    limits = {"activation_features": 1, "activation_logits": 1, "loss_kl": 1, "loss_exact": 1}
    data = {"name": "test", "description": "", "factors": factors, "rule": [rule], "limits": limits}
    return parse_recipe(data, "test")


def test_calibrated_four_bits_have_at_most_half_the_kl_of_plain_rounding(demo: Case, tmp_path: Path) -> None:
    from demo.documents import write_documents

    for _ in write_documents("search", 180, "mixed", tmp_path / "search"):
        pass
    documents = Documents(demo.spec, demo.weights, demo.processor, read_data(tmp_path / "search"))
    match = "model.text_model.layers.*_proj.weight"
    kl = {}
    for rounding in ("nearest", "gptq"):
        rules = recipe(rounding, match=match)
        source = calibrate("demo", demo.spec, demo.weights, rules, demo.prompts, tmp_path / "work")

        def changed(name: str, source: Calibrated = source, rules: Recipe = rules) -> F32 | None:
            scheme = rules.scheme(name)
            return None if scheme.format == "float" else as_floats(source.quantized(name, scheme))

        kl[rounding] = documents.measure(Weighted(source, changed), vision=False).kl_mean
    assert kl["gptq"] < 0.5 * kl["nearest"]


@pytest.mark.parametrize("stops", [1, 2, 4])
def test_a_stopped_run_goes_on_and_ends_with_the_same_integers(
    stops: int, tiny: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = recipe(factors=True)
    whole = calibrate("tiny", tiny.spec, tiny.weights, rules, tiny.prompts, tmp_path / "whole")
    places: list[str] = []

    class Stopped(Exception):
        pass

    def stopping(text: str) -> None:
        places.append(text)
        if len(places) in (stops, 2 * stops):
            raise Stopped

    work = tmp_path / "work"
    for _ in range(2):
        with pytest.raises(Stopped):
            calibrate("tiny", tiny.spec, tiny.weights, rules, tiny.prompts, work, stopping)
    made: list[int] = []

    def counted(weights: F32, *rest: Any, **formats: Any) -> Any:
        made.append(weights.size)
        return quantize_gptq(weights, *rest, **formats)

    monkeypatch.setattr(export.calibrate, "quantize_gptq", counted)
    found = calibrate("tiny", tiny.spec, tiny.weights, rules, tiny.prompts, work, places.append)
    for name in tiny.weights.names:
        scheme = rules.scheme(name)
        if scheme.format == "block":
            a, b = whole.quantized(name, scheme), found.quantized(name, scheme)
            assert np.array_equal(a.packed, b.packed), name  # type: ignore[union-attr]
        assert np.array_equal(whole[name], found[name])
    made.clear()
    calibrate("tiny", tiny.spec, tiny.weights, rules, tiny.prompts, work)
    assert not made  # nothing is done twice
    assert not list(work.glob("*/*.state"))


def test_other_documents_weights_or_rules_are_other_results(tiny: Case, tmp_path: Path) -> None:
    work = tmp_path / "work"
    for name, rules, prompts in (
        ("a", recipe(), tiny.prompts),
        ("b", recipe(), tiny.prompts),
        ("a", recipe(bits=8), tiny.prompts),
        ("a", recipe(), tiny.prompts.chosen([0, 1])),
    ):
        calibrate(name, tiny.spec, tiny.weights, rules, prompts, work)
    assert len(list(work.iterdir())) == 4
    changed = shutil.copytree(tiny.checkpoint, tmp_path / "copy")
    assert identity(changed) == identity(tiny.checkpoint)
    assert identity(changed) != identity(changed, "adapter")
    content = bytearray((changed / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (changed / "model.safetensors").write_bytes(content)
    assert identity(changed) != identity(tiny.checkpoint)


def test_static_ranges_are_those_that_were_seen_and_serve_the_graph(
    tiny: Case, tiny_checkpoint: Path, calibration: Path, tmp_path: Path
) -> None:
    text = Path(LOOSE).read_text().replace("reduced_range = false", 'reduced_range = false\nactivations = "static"')
    (tmp_path / "static.toml").write_text(text)
    rules = load_recipe(str(tmp_path / "static.toml"))
    assert rules.calibrated
    with pytest.raises(CheckpointError, match="its activations are static, which needs calibration documents"):
        tiny.weights.input_range(FC1)
    done = export_android(
        str(tiny_checkpoint), tmp_path / "bundle", str(tmp_path / "static.toml"), calibration=calibration
    )
    assert done.report is not None  # proven: the graph with static ranges is close to its twin
    assert read_bundle(done.bundle).manifest.recipe.tensors[FC1]["activations"] == "static"
    source = calibrate("tiny", tiny.spec, tiny.weights, rules, tiny.prompts, tmp_path / "work")
    low, high = source.input_range(FC1)
    assert low < 0 < high
    graph = onnx.load(done.bundle / "onnx" / "vision_encoder_quantized.onnx", load_external_data=False)
    (scan,) = [node for node in graph.graph.node if node.op_type == "Scan"]
    kinds = [node.op_type for node in scan.attribute[0].g.node] if scan.attribute[0].HasField("g") else []
    kinds += [node.op_type for attribute in scan.attribute[1:] for node in attribute.g.node]
    assert kinds.count("QuantizeLinear") == 4 * tiny.spec.vision.layers + 1  # q, k and v share theirs
    assert "DynamicQuantizeLinear" not in kinds


def test_a_damaged_state_is_refused_with_the_remedy(tiny: Case, calibration: Path, tmp_path: Path) -> None:
    rules, documents, work = recipe(), read_data(calibration, 6), tmp_path / "work"

    class Stopped(Exception):
        pass

    def stopping(text: str) -> None:
        if "layer 3" in text:
            raise Stopped

    with pytest.raises(Stopped):
        calibrate_on(documents, tiny.checkpoint, tiny.spec, tiny.weights, rules, work, stopping)
    (state,) = work.glob("*/rounding.state")
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"rounding\.state.*remove what calibration kept in"):
        calibrate_on(documents, tiny.checkpoint, tiny.spec, tiny.weights, rules, work)


def test_damaged_integers_are_refused_by_the_files_name(tiny: Case, tmp_path: Path) -> None:
    rules = recipe()
    source = calibrate("tiny", tiny.spec, tiny.weights, rules, tiny.prompts, tmp_path / "work")
    name = "model.text_model.layers.0.self_attn.q_proj.weight"
    (path,) = (tmp_path / "work").glob(f"*/integers/{name}.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"q_proj\.weight\.safetensors"):
        source.quantized(name, rules.scheme(name))


def test_the_budget_of_tiles_gives_way_before_documents_do(demo: Case, calibration: Path) -> None:
    documents = read_data(calibration, 24)
    whole, used = calibration_prompts(demo.processor, documents, 1 << 30, demo.spec.text.max_positions)
    assert used.documents == len(documents)
    assert used.tokens == whole.tokens == sum(map(len, whole.ids))
    few, small = calibration_prompts(demo.processor, documents, whole.tokens * 2 // 3, demo.spec.text.max_positions)
    assert small.documents == len(documents)
    assert small.tiles < used.tiles
    assert len(few.tiles) < len(whole.tiles)
    tight, least = calibration_prompts(demo.processor, documents, 300, demo.spec.text.max_positions)
    assert 1 <= least.documents < len(documents)
    assert tight.tokens <= 300


def test_a_prompt_ends_with_its_answer_and_its_end(demo: Case, calibration: Path) -> None:
    encoder = PromptEncoder.from_folder(demo.processor)
    for document, ids, answer in zip(read_data(calibration), demo.prompts.ids, demo.prompts.answer, strict=False):
        assert ids[-1] == encoder.end_id
        assert encoder.decode(ids[answer:]).strip() == document.answers[0]
        assert encoder.decode(ids[:answer]).endswith("Assistant:")


def test_the_digest_is_of_what_documents_hold_not_of_where_they_lie(
    demo: Case, calibration: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(calibration, tmp_path / "elsewhere")
    assert calibration_prompts(demo.processor, read_data(moved), 16384, demo.spec.text.max_positions)[1] == demo.used
    lines = (moved / "documents.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    (moved / "documents.jsonl").write_text("\n".join([json.dumps(row | {"answer": "other"}), *lines[1:]]) + "\n")
    assert (
        calibration_prompts(demo.processor, read_data(moved), 16384, demo.spec.text.max_positions)[1].sha256
        != demo.used.sha256
    )


def test_an_image_that_is_none_is_refused_by_name(demo: Case, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png"):
        calibration_prompts(demo.processor, [Document(tmp_path / "broken.png", "What?", ("x",), "all")], 100, 1000)


def test_a_document_beyond_the_context_is_refused_by_name(demo: Case, calibration: Path) -> None:
    documents = read_data(calibration)
    with pytest.raises(
        DataError, match=rf"{documents[0].image}: \d+ tokens with its answer, the model takes 9 at once"
    ):
        calibration_prompts(demo.processor, documents, 16384, 9)


def test_texts_alone_calibrate_the_decoder_and_say_what_they_cannot(tiny: Case, tmp_path: Path) -> None:
    texts = [Document(None, f"What is {i}?", (str(i),), "all") for i in range(6)]
    prompts, _ = calibration_prompts(tiny.processor, texts, 16384, tiny.spec.text.max_positions)
    decoder = recipe(factors=True, match="model.text_model.layers.*_proj.weight")
    source = calibrate("tiny", tiny.spec, tiny.weights, decoder, prompts, tmp_path)
    name = "model.text_model.layers.0.mlp.up_proj.weight"
    assert as_floats(source.quantized(name, decoder.scheme(name))).shape == tiny.weights.shape(name)
    with pytest.raises(DataError, match=r"no calibration document has an image, which the rounding of .*vision"):
        calibrate("tiny", tiny.spec, tiny.weights, recipe(), prompts, tmp_path)
    rule = {"match": "*vision_model.encoder*.weight", "format": "column", "reduced_range": False}
    limits = {"activation_features": 1, "activation_logits": 1, "loss_kl": 1, "loss_exact": 1}
    static = parse_recipe(
        {"name": "s", "description": "", "rule": [rule | {"activations": "static"}], "limits": limits}, "test"
    )
    with pytest.raises(DataError, match=r"no calibration document has an image, which the activations of .*vision"):
        calibrate("tiny", tiny.spec, tiny.weights, static, prompts, tmp_path)


def test_images_are_observed_where_texts_come_first(tiny: Case, calibration: Path, tmp_path: Path) -> None:
    texts = [Document(None, f"What is {i}?", (str(i),), "all") for i in range(9)]
    mixed, _ = calibration_prompts(
        tiny.processor, [*texts, *read_data(calibration, 2)], 16384, tiny.spec.text.max_positions
    )
    assert len(mixed.chosen([9, 0]).tiles) == mixed.counts[9] > 0
    rules = recipe(factors=True)
    assert calibrate("tiny", tiny.spec, tiny.weights, rules, mixed, tmp_path).shape(EMBED)


def test_other_pixels_of_the_same_tiles_are_calibrated_anew(tiny: Case, tmp_path: Path) -> None:
    rules = recipe(factors=True)
    calibrate("tiny", tiny.spec, tiny.weights, rules, tiny.prompts, tmp_path / "work")
    brighter = replace(tiny.prompts, pixels=lambda some: tiny.prompts.pixels(some) + np.float32(0.5))
    calibrate("tiny", tiny.spec, tiny.weights, rules, brighter, tmp_path / "work")
    assert len(list((tmp_path / "work").iterdir())) == 2


def test_the_second_half_is_fed_by_the_embedding_as_it_will_be(tiny: Case) -> None:
    rules = parse_recipe(
        {
            "name": "e",
            "description": "",
            "rule": [{"match": EMBED, "format": "block", "bits": 4, "block": 32, "symmetric": False}],
            "limits": {"activation_features": 1, "activation_logits": 1, "loss_kl": 1, "loss_exact": 1},
        },
        "test",
    )
    ids = np.array([3, 1, 3, 3, 1, 3])
    rows = Rounding(tiny.weights, rules, lambda *_: None).rows(EMBED, ids)
    whole = as_floats(tiny.weights.quantized(EMBED, rules.scheme(EMBED)))
    assert np.array_equal(rows[:3], tiny.weights[EMBED][ids[:3]])
    assert np.array_equal(rows[3:], whole[ids[3:]])
    assert not np.array_equal(rows[3:], rows[:3])


def test_a_work_folder_that_is_a_file_is_named(tiny: Case, tmp_path: Path) -> None:
    (tmp_path / "work").write_text("")
    with pytest.raises(CheckpointError, match=r"work/.*: cannot be made: Not a directory"):
        calibrate("tiny", tiny.spec, tiny.weights, recipe(), tiny.prompts, tmp_path / "work")


def test_a_calibrated_recipe_without_documents_is_refused_with_the_remedy() -> None:
    with pytest.raises(RecipeError, match=r"recipe int4 is calibrated: give documents with --calibration .*int4-quick"):
        calibration_documents(load_recipe("int4"), None)
    assert calibration_documents(load_recipe("int4-quick"), None) == []


def test_an_embedding_cannot_be_rounded_by_inputs_that_it_has_not(tiny: Case, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"embed_tokens\.weight is looked up"):
        calibrate("tiny", tiny.spec, tiny.weights, recipe(match="*"), tiny.prompts, tmp_path)


def test_second_moments_are_those_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.calibrate, "COLUMNS", 7)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((50, 20)).astype(np.float32))
    np.testing.assert_allclose(second_moments(x), (x.T @ x).numpy(), rtol=1e-5, atol=1e-5)


def test_larger_models_are_calibrated_on_fewer_tokens(tiny_checkpoint: Path) -> None:
    tiny = read_spec(tiny_checkpoint)
    assert affordable_tokens(tiny) == 16384
    text = replace(tiny.text, hidden=2048, layers=24, ffn=8192, heads=32, kv_heads=32, head_dim=64)
    vision = replace(tiny.vision, hidden=1152, layers=27, ffn=4304, image_size=384, patch_size=14)
    assert 3500 < affordable_tokens(replace(tiny, text=text, vision=vision, scale_factor=3)) < 5000


@pytest.mark.parametrize(("outputs", "rows"), [(4, 10), (90, 100)])
def test_changed_outputs_are_the_same_either_way(outputs: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.calibrate, "ROWS", 32)
    rng = np.random.default_rng(0)
    matrix, before, now = (
        torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        for shape in ((outputs, 20), (rows, 20), (rows, 20))
    )
    wanted = before @ matrix.T
    found = changed_outputs(matrix, wanted, before, now)
    np.testing.assert_allclose(found, (wanted - now @ matrix.T).T @ now, rtol=1e-3, atol=1e-3)
    unseen = changed_outputs(matrix, None, before, now)
    np.testing.assert_allclose(unseen, found, rtol=1e-3, atol=1e-3)


def test_the_fewer_the_rows_the_more_damping() -> None:
    assert damping(10_000, 512) == 0.05
    assert damping(1000, 1000) == 0.1
    assert damping(10, 1000) == 0.2


def test_factors_are_found_for_planted_outliers_and_only_there(tiny: Case) -> None:
    every = list(folds(tiny.spec))
    planted = every[0]
    k = tiny.spec.vision.hidden
    quiet: dict[str, Moments] = {}
    for fold in every:
        width = tiny.weights.shape(fold.readers[0])[1]
        one = np.ones(width, np.float32)
        quiet |= dict.fromkeys(fold.readers, Moments(-3 * one, 3 * one, one))
    loud = np.ones(k, np.float32)
    loud[5] = 200
    seen = Moments(-3 * loud, 3 * loud, np.square(loud))
    rules = load_recipe("int4")
    chosen = choose_factors(tiny.spec, tiny.weights, rules, quiet | dict.fromkeys(planted.readers, seen))
    (factors,) = [factors for fold, factors in chosen if fold == planted]
    assert factors[5] > 8 * np.median(factors)
    assert np.array_equal(np.log2(factors), np.rint(np.log2(factors)))


def test_quantizing_reads_each_weight_through_its_factors(tiny: Case) -> None:
    fold = next(iter(folds(tiny.spec)))
    factors = np.full(tiny.spec.vision.hidden, 4, np.float32)
    folded, name = Folded(tiny.weights, [(fold, factors)]), fold.readers[0]
    scheme = recipe("fitted", match="*").scheme(name)
    found: Any = folded.quantized(name, scheme)
    w: npt.NDArray[np.float32] = tiny.weights[name] * 4
    wanted = quantize_blocks(lambda a, b: w[a:b], (w.shape[0], w.shape[1]), bits=4, block=32)
    assert np.array_equal(dequantize(found), dequantize(wanted))
    assert isinstance(tiny.weights, Weights)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"rule = 5", r"rule is 5, want a list of tables"),
        (b"\xff", r"cannot be read as UTF-8 text"),
        (
            b'[[rule]]\nmatch = "*"\nformat = "block"\nbits = 4.0\nblock = 32\nsymmetric = true',
            r"bits is 4.0, want 4 or 8",
        ),
        (
            b'[[rule]]\nmatch = "*"\nformat = "block"\nbits = 4\nblock = 32.0\nsymmetric = true',
            r"block is 32.0, want 16",
        ),
    ],
)
def test_a_recipe_file_of_another_form_is_refused_by_name(content: bytes, message: str, tmp_path: Path) -> None:
    limits = b"\n[limits]\nactivation_features = 1\nactivation_logits = 1\nloss_kl = 1\nloss_exact = 1\n"
    path = tmp_path / "mine.toml"
    path.write_bytes(b'name = "mine"\ndescription = ""\n' + content + limits)
    with pytest.raises(RecipeError, match=rf"mine\.toml: .*{message}"):
        load_recipe(str(path))
