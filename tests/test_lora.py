"""Merging an adapter gives the weights that PEFT's own merge gives, and whatever it cannot merge is refused by name."""

import json
import re
import shutil
import time
import tracemalloc
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SmolVLMForConditionalGeneration

import export.adapter_config
from export.adapter_config import CONFIG, LINEAR, Module, read_adapter_config
from export.android import export_android
from export.checkpoint import ADAPTER_FILES, resolve
from export.dequantized import write_dequantized
from export.lora import PIECE, TENSORS, Adapter, Merged, Update, adapter_digest, add_product, open_adapter, open_merged
from export.prove import ProofError, prove, prove_bundle
from export.spec import CheckpointError, read_spec, tensor_shapes
from export.weights import F32, Weights, WeightSource, open_weights
from quantize.int4 import ColumnTensor, QTensor
from quantize.recipe import Scheme, load_recipe
from runtimes.bundle import read_bundle
from runtimes.manifest import BundleError
from runtimes.tensorfile import read_header, write_tensors
from tests.checkpoints import make_checkpoint
from tests.conftest import LOOSE

TEXT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VISION = r"vision_model\.encoder\.layers\.\d+\.(self_attn|mlp)\.\w+"
LAYERS = r".*\.layers\.\d+\.(self_attn|mlp)\.(\w+_proj|fc\d)"
Q0 = "model.text_model.layers.0.self_attn.q_proj"
A0 = f"base_model.model.{Q0}.lora_A.weight"


def load(checkpoint: Path) -> Any:
    return SmolVLMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)


def make_adapter(checkpoint: Path, out: Path, **config: Any) -> Path:
    """An adapter with random factors, as PEFT saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of both libraries, about each other
        model = peft.get_peft_model(load(checkpoint), peft.LoraConfig(**config))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        model.save_pretrained(str(out))
    return out


def peft_merge(checkpoint: Path, adapter: Path) -> dict[str, F32]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(load(checkpoint), str(adapter))
        merged = model.merge_and_unload()
    return {name: tensor.numpy() for name, tensor in merged.state_dict().items()}


def worst(found: WeightSource, wanted: Mapping[str, F32], names: Mapping[str, Any]) -> tuple[float, str]:
    """The largest difference, relative to the tensor's largest value, and the tensor."""

    def difference(name: str) -> float:
        return float(np.abs(found[name] - wanted[name]).max() / np.abs(wanted[name]).max())

    return max((difference(name), name) for name in names)


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on every layer's matrices, with other ranks for vision; do not write into it."""
    out = tmp_path_factory.mktemp("lora") / "adapter"
    patterns = {"rank_pattern": {VISION: 2, "down_proj": 6}, "alpha_pattern": {VISION: 5, r"layers\.1\..*": 3}}
    return make_adapter(tiny_checkpoint, out, r=4, lora_alpha=8, target_modules=LAYERS, **patterns)


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    return shutil.copytree(adapter, tmp_path / "copied")


def open_copy(checkpoint: Path, folder: Path) -> Adapter:
    return open_adapter(folder, read_spec(checkpoint))


# ---- equality with PEFT


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": TEXT},
        {"r": 3, "lora_alpha": 7, "target_modules": ["out_proj", "fc1", "mlp.fc2", Q0], "use_rslora": True},
        {
            "r": 4,
            "target_modules": LAYERS,
            "rank_pattern": {VISION: 2, "down_proj": 6, Q0: 8},
            "alpha_pattern": {r"layers\.1\..*": 3, "q_proj": 5, Q0: 1},
            "use_rslora": True,
        },
        {"r": 2, "target_modules": "all-linear", "fan_in_fan_out": True},
        {"r": 2, "target_modules": ["embed_tokens", "lm_head", "proj", "position_embedding", "patch_embedding"]},
        {"r": 2, "target_modules": TEXT, "exclude_modules": r".*vision.*", "init_lora_weights": "gaussian"},
        {"r": 2, "target_modules": TEXT, "exclude_modules": ["v_proj", "layers.0.self_attn.o_proj"]},
    ],
    ids=["text", "rslora", "patterns", "all-linear", "ends", "exclude-pattern", "exclude-list"],
)
def test_the_merged_weights_are_those_of_pefts_own_merge(
    config: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = make_adapter(tiny_checkpoint, tmp_path / "adapter", **config)
    spec = read_spec(tiny_checkpoint)
    opened = open_adapter(folder, spec)
    plain, wanted = open_weights(tiny_checkpoint, spec), peft_merge(tiny_checkpoint, folder)
    merged = Merged(plain, opened)
    difference, name = worst(merged, wanted, tensor_shapes(spec))
    assert difference < 1e-6, f"{name} differs by {difference}"
    changed = {name for name in tensor_shapes(spec) if not np.array_equal(plain[name], wanted[name])}
    assert changed == set(opened.names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_half_the_width_are_merged_in_float32(
    dtype: torch.dtype, copied: Path, tiny_checkpoint: Path
) -> None:
    tensors = {name: t.to(dtype) for name, t in load_file(copied / TENSORS).items()}
    save_file(tensors, copied / TENSORS)
    spec = read_spec(tiny_checkpoint)
    merged = open_merged(tiny_checkpoint, spec, copied)
    difference, name = worst(merged, peft_merge(tiny_checkpoint, copied), tensor_shapes(spec))
    assert difference < 1e-6, f"{name} differs by {difference}"


def test_a_copy_of_the_embedding_in_the_adapter_takes_the_checkpoints_place(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = make_adapter(tiny_checkpoint, tmp_path / "adapter", r=2, target_modules=["embed_tokens", "lm_head"])
    tensors = load_file(folder / TENSORS)
    copies = [name for name in tensors if name.endswith("base_layer.weight")]
    assert len(copies) == 2
    save_file(tensors | {name: tensors[name] + 0.5 for name in copies}, folder / TENSORS)
    spec = read_spec(tiny_checkpoint)
    merged = open_merged(tiny_checkpoint, spec, folder)
    assert worst(merged, peft_merge(tiny_checkpoint, folder), tensor_shapes(spec))[0] < 1e-6


def test_rows_are_the_rows_of_the_whole(adapter: Path, tiny_checkpoint: Path) -> None:
    merged = open_merged(tiny_checkpoint, read_spec(tiny_checkpoint), adapter)
    whole = merged[f"{Q0}.weight"]
    for start, stop in ((0, 1), (5, 23), (len(whole) - 3, len(whole)), (7, 7)):
        assert np.allclose(merged.rows(f"{Q0}.weight", start, stop), whole[start:stop], atol=1e-6)


@pytest.mark.parametrize(("rows", "rank", "width"), [(300, 16, 2048), (40, 700, 1000), (3, 9000, 40), (1, 1, 1)])
def test_a_product_in_pieces_is_the_product(rows: int, rank: int, width: int) -> None:
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal(s).astype(np.float32) for s in ((rows, rank), (rank, width)))
    into = np.ones((rows, width), dtype=np.float32)
    pieces: list[int] = []

    class Watched(np.ndarray):
        def __matmul__(self, other: Any) -> Any:
            pieces.append(self.shape[0] * self.shape[1] * other.shape[1])
            return np.asarray(self) @ np.asarray(other)

    add_product(into, left.view(Watched), right, np.float32(0.5))
    assert np.allclose(into, 1 + 0.5 * (left.astype(np.float64) @ right), atol=1e-3)
    assert max(pieces) <= PIECE


def test_a_wrong_scaling_or_a_changed_factor_is_seen(copied: Path, tiny_checkpoint: Path) -> None:
    spec = read_spec(tiny_checkpoint)
    wanted = peft_merge(tiny_checkpoint, copied)
    tensors = load_file(copied / TENSORS)
    tensors[A0][1, 2] += 0.01
    save_file(tensors, copied / TENSORS)
    difference, name = worst(open_merged(tiny_checkpoint, spec, copied), wanted, tensor_shapes(spec))
    assert difference > 1e-4
    assert name == f"{Q0}.weight"
    edit(copied, lambda config: config.update(lora_alpha=9))
    assert worst(open_merged(tiny_checkpoint, spec, copied), wanted, tensor_shapes(spec))[0] > 1e-2


def test_a_tied_checkpoint_takes_an_adapter_that_leaves_the_embedding_alone(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "tied", tied=True)
    spec = read_spec(checkpoint)
    folder = make_adapter(checkpoint, tmp_path / "adapter", r=2, target_modules="all-linear")
    merged = open_merged(checkpoint, spec, folder)
    assert worst(merged, peft_merge(checkpoint, folder), tensor_shapes(spec))[0] < 1e-6
    for end in ("lm_head", "embed_tokens"):
        refused = make_adapter(checkpoint, tmp_path / end, r=2, target_modules=[end, "q_proj"])
        with pytest.raises(CheckpointError, match=rf"names .*{end}, but config\.json ties head and embedding"):
            open_adapter(refused, spec)


# ---- what is refused


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    change(config)
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("peft_type", "LOHA", "peft_type is 'LOHA', only LORA"),
        ("r", 0, "r is 0, want an integer from 1"),
        ("r", True, "r is True, want an integer"),
        ("r", 10**400, "r is 1000.*, want an integer"),
        ("lora_alpha", "8", "lora_alpha is '8', want a finite number"),
        ("lora_alpha", float("nan"), "lora_alpha is nan, want a finite number"),
        ("bias", "all", "bias is 'all', only 'none'"),
        ("use_rslora", "yes", "use_rslora is 'yes', want true or false"),
        ("use_dora", True, "use_dora is True, want it absent or off"),
        ("lora_bias", True, "lora_bias is True, want it absent or off"),
        ("modules_to_save", ["lm_head"], r"modules_to_save is \['lm_head'\], want it absent or off"),
        ("trainable_token_indices", [1], r"trainable_token_indices is \[1\], want it absent or off"),
        ("target_parameters", ["weight"], "target_parameters is .*, want it absent or off"),
        ("layer_replication", [[0, 1]], "layer_replication is .*, want it absent or off"),
        ("layers_to_transform", [0], "layers_to_transform is .*, want it absent or off"),
        ("alora_invocation_tokens", [3], "alora_invocation_tokens is .*, want it absent or off"),
        ("a_key_of_tomorrow", 1, "a_key_of_tomorrow is 1, want it absent or off"),
        ("init_lora_weights", "pissa", "init_lora_weights is 'pissa', want one of True, False, gaussian"),
        ("init_lora_weights", 1, "init_lora_weights is 1, want one of"),
        ("target_modules", None, "target_modules is None, want a pattern or a list"),
        ("target_modules", [3], r"target_modules is \[3\], want a pattern or a list"),
        ("target_modules", ["c_attn"], r"target_modules is \['c_attn'\], which names no module"),
        ("target_modules", "(", "target_modules is no regular expression: .*unterminated"),
        ("exclude_modules", 5, "exclude_modules is 5, want a pattern or a list"),
        ("rank_pattern", [1], r"rank_pattern is \[1\], want an object"),
        ("rank_pattern", {"q_proj": -1}, r"rank_pattern\.q_proj is -1, want an integer"),
        ("rank_pattern", {"[": 1}, "rank_pattern is no regular expression"),
        ("rank_pattern", {str(i): 1 for i in range(5000)}, "rank_pattern has 5,000 patterns, want at most 4,096"),
        ("alpha_pattern", {"q_proj": float("inf")}, r"alpha_pattern\.q_proj is inf, want a finite number"),
    ],
)
def test_a_field_that_is_not_supported_is_named(
    key: str, value: object, message: str, copied: Path, tiny_checkpoint: Path
) -> None:
    edit(copied, lambda config: config.update({key: value}))
    with pytest.raises(CheckpointError, match=rf"{re.escape(CONFIG)}: {message}"):
        open_copy(tiny_checkpoint, copied)


def test_a_missing_field_or_file_is_named(copied: Path, tiny_checkpoint: Path) -> None:
    edit(copied, lambda config: [config.pop(key) for key in ("r", "target_modules")])
    with pytest.raises(CheckpointError, match="lacks r, target_modules"):
        open_copy(tiny_checkpoint, copied)
    (copied / CONFIG).write_text("[")
    with pytest.raises(CheckpointError, match="is not JSON"):
        open_copy(tiny_checkpoint, copied)
    (copied / CONFIG).unlink()
    with pytest.raises(CheckpointError, match=rf"{CONFIG}: is missing"):
        open_copy(tiny_checkpoint, copied)


def test_keys_that_an_older_peft_did_not_write_may_be_absent(copied: Path, tiny_checkpoint: Path) -> None:
    before = open_copy(tiny_checkpoint, copied).names
    kept = ("peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
    edit(copied, lambda config: [config.pop(key) for key in set(config) - set(kept)])
    assert open_copy(tiny_checkpoint, copied).names == before


def test_a_pattern_that_would_take_for_ever_is_ended(
    copied: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.adapter_config, "MATCH_SECONDS", 1)
    edit(copied, lambda config: config.update(target_modules=r"(\w+\.?)+x!"))
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="target_modules takes more than 1 s to match"):
        open_copy(tiny_checkpoint, copied)
    assert time.monotonic() - began < 10


Tensors = dict[str, torch.Tensor]


def _without(tensors: Tensors) -> Tensors:
    return {name: t for name, t in tensors.items() if name != A0}


def _with(name: str, make: Callable[[Tensors], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: make(tensors)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, rf"lacks {re.escape(A0)}, which adapter_config\.json asks for"),
        (lambda _: {}, r"lacks .* and \d+ more"),
        (_with("x.lora_A.weight", lambda t: t[A0].clone()), r"holds x\.lora_A\.weight, which .* does not ask for"),
        (
            _with(f"base_model.model.{Q0}.lora_magnitude_vector", lambda t: t[A0][0].clone()),
            "holds .*lora_magnitude_vector, which .* does not ask for",
        ),
        (
            _with(f"base_model.model.{Q0}.base_layer.weight", lambda t: t[A0].clone()),
            r"holds .*base_layer\.weight, which .* does not ask for",
        ),
        (_with(A0, lambda t: t[A0].T.contiguous()), rf"{re.escape(A0)} is \[64, 4\], want \[4, 64\]"),
        (_with(A0, lambda t: t[A0][:3].clone()), rf"{re.escape(A0)} is \[3, 64\], want \[4, 64\]"),
        (_with(A0, lambda t: t[A0].to(torch.int32)), rf"{re.escape(A0)} is of dtype I32, want one of F64"),
    ],
    ids=["missing", "none", "unknown", "dora", "base-layer", "transposed", "rank", "dtype"],
)
def test_a_tensor_that_is_not_what_the_config_says_is_named(
    change: Callable[[Tensors], Tensors], message: str, copied: Path, tiny_checkpoint: Path
) -> None:
    save_file(change(load_file(copied / TENSORS)), copied / TENSORS)
    with pytest.raises(CheckpointError, match=rf"{re.escape(TENSORS)}: {message}"):
        open_copy(tiny_checkpoint, copied)


def test_a_file_of_tensors_that_is_damaged_or_pickled_is_refused(copied: Path, tiny_checkpoint: Path) -> None:
    whole = (copied / TENSORS).read_bytes()
    (copied / TENSORS).write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match="is truncated"):
        open_copy(tiny_checkpoint, copied)
    (copied / TENSORS).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        open_copy(tiny_checkpoint, copied)
    (copied / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, which must be converted"):
        open_copy(tiny_checkpoint, copied)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), rf"{TENSORS}: {re.escape(A0)}\[1, 2\] is nan, want finite"),
        (float("-inf"), rf"{TENSORS}: {re.escape(A0)}\[1, 2\] is -inf, want finite"),
        (3e38, rf"{TENSORS}: makes {re.escape(Q0)}\.weight NaN or infinite"),
    ],
)
def test_a_value_that_is_not_finite_is_named(value: float, message: str, copied: Path, tiny_checkpoint: Path) -> None:
    tensors = load_file(copied / TENSORS)
    tensors[A0][1, 2] = value
    tensors[A0.replace("lora_A", "lora_B")] *= 100
    save_file(tensors, copied / TENSORS)
    merged = open_merged(tiny_checkpoint, read_spec(tiny_checkpoint), copied)
    with pytest.raises(CheckpointError, match=message):
        merged[f"{Q0}.weight"]


def test_an_adapter_of_another_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", hidden=96)
    with pytest.raises(CheckpointError, match=r"is \[.*\], want \[.*\] by the model"):
        open_copy(other, adapter)
    deeper = make_checkpoint(tmp_path / "deeper", layers=3)
    with pytest.raises(CheckpointError, match=r"lacks base_model\.model\.model\.text_model\.layers\.2\."):
        open_copy(deeper, adapter)


def test_a_names_end_is_a_whole_part_of_it(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["b"]}))
    found = read_adapter_config(tmp_path, [Module(name, LINEAR) for name in ("a.b", "a.bb", "b", "b.c", "a.xb")])
    assert [entry.module.name for entry in found] == ["a.b", "b"]


# ---- memory


class Zeros:
    """A WeightSource of one large matrix that is never made as a whole."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.whole = shape

    def shape(self, name: str) -> tuple[int, ...]:
        return self.whole

    def rows(self, name: str, start: int, stop: int) -> F32:
        return np.zeros((stop - start, self.whole[1]), dtype=np.float32)

    def quantized(self, name: str, scheme: Scheme) -> QTensor | ColumnTensor:
        raise AssertionError("the base's own integers were asked for")

    def input_range(self, name: str) -> tuple[float, float]:
        raise AssertionError("the base's activations were asked for")

    def __getitem__(self, name: str) -> F32:
        raise AssertionError("the whole matrix was asked for")


@pytest.mark.parametrize("transposed", [False, True])
def test_reading_rows_takes_the_memory_of_the_rows_and_the_factors(transposed: bool, tmp_path: Path) -> None:
    shape, rank = (30_000, 1000), 8  # 120 MB as a whole
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, shape[1]))
    factors = {"b": b.astype(np.float32), "a": a.astype(np.float32)}
    if transposed:
        factors = {"b": np.ascontiguousarray(factors["a"].T), "a": np.ascontiguousarray(factors["b"].T)}
    write_tensors(tmp_path / TENSORS, factors)
    tensors = Weights({name: (tmp_path / TENSORS, info) for name, info in read_header(tmp_path / TENSORS).items()})
    updates = {"w": Update("b", "a", 2.0, transposed, None)}
    merged = Merged(Zeros(shape), Adapter(tmp_path / TENSORS, tensors, updates))
    tracemalloc.start()
    for start in range(0, shape[0], 500):
        found = merged.rows("w", start, start + 500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.allclose(found, 2 * (b[-500:] @ a), atol=1e-4)
    assert peak < 12e6, f"peak of {peak:,} bytes"


# ---- from an adapter to a proven bundle


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, adapter: Path) -> Path:
    """The tiny checkpoint's bundle with the adapter, its proof pending; do not write into it."""
    out = adapter.parent / "bundle"
    return export_android(str(tiny_checkpoint), out, LOOSE, lora=str(adapter), with_proof=False).bundle


def test_a_bundle_with_an_adapter_names_it_and_is_proven_against_the_merged_weights(
    bundle: Path, adapter: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    opened = read_bundle(copy, allow_pending=True)
    source = opened.manifest.adapter
    assert source is not None
    assert (source.name, source.revision, source.sha256) == (adapter.name, None, adapter_digest(adapter))
    report = prove_bundle(opened, str(tiny_checkpoint), load_recipe(LOOSE), [], lambda _: None, str(adapter))
    assert report["adapter"]["sha256"] == source.sha256
    assert "with the adapter" in (copy / "report.md").read_text(encoding="utf-8")
    assert read_bundle(copy).manifest.proof.state == "passed"


def test_a_pending_bundle_wants_its_own_adapter(
    bundle: Path, copied: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def finish(opened: Any, lora: str | None) -> None:
        prove_bundle(opened, str(tiny_checkpoint), load_recipe(LOOSE), [], lambda _: None, lora)

    opened = read_bundle(bundle, allow_pending=True)
    with pytest.raises(BundleError, match=r"was made with the adapter adapter: give it too \(--lora\)"):
        finish(opened, None)
    edit(copied, lambda config: config.update(lora_alpha=9))
    with pytest.raises(BundleError, match=r"was made with the adapter adapter of sha256 \w+, .* has \w+"):
        finish(opened, str(copied))
    plain = export_android(str(tiny_checkpoint), tmp_path / "plain", LOOSE, with_proof=False).bundle
    with pytest.raises(BundleError, match="was made without an adapter, not with copied"):
        finish(read_bundle(plain, allow_pending=True), str(copied))


def test_the_proof_sees_a_payload_that_was_made_without_the_adapter(
    bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    spec = read_spec(tiny_checkpoint)
    with pytest.raises(ProofError, match="not what the recipe makes of the checkpoint"):
        prove(copy, tiny_checkpoint, spec, open_weights(tiny_checkpoint, spec), load_recipe(LOOSE), [])


def test_the_dequantized_checkpoint_has_the_adapter_in_it(adapter: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    list(write_dequantized(tiny_checkpoint, load_recipe("fp32"), tmp_path / "merged", adapter))
    spec = read_spec(tiny_checkpoint)
    found = open_weights(tmp_path / "merged", spec)
    assert worst(found, peft_merge(tiny_checkpoint, adapter), tensor_shapes(spec))[0] < 1e-6


def test_a_bundle_for_ios_has_the_adapter_in_it_too(
    bundle: Path, adapter: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("coremltools")
    from export.ios import export_ios

    made = export_ios(str(tiny_checkpoint), tmp_path / "ios", LOOSE, lora=str(adapter), context=128, with_proof=False)
    source = read_bundle(bundle, allow_pending=True).manifest.adapter
    assert read_bundle(made.bundle, allow_pending=True).manifest.adapter == source


def test_an_adapter_is_a_folder_or_a_hub_id(adapter: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert resolve(str(adapter), ADAPTER_FILES, "an adapter").folder == adapter
    with pytest.raises(CheckpointError, match="is a file, want an adapter's folder"):
        resolve(str(adapter / CONFIG), ADAPTER_FILES, "an adapter")
    for wrong in ("", "no/such/folder"):
        with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
            export_android(str(tiny_checkpoint), tmp_path / "out", LOOSE, lora=wrong, with_proof=False)
    assert not (tmp_path / "out").exists()
