"""Stand-ins: a bundle whose small graphs have the real ones' inputs and outputs, and a runner that follows a script.

The bundle's weights are random: it computes nothing of use, but every input counts in every output.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from runtimes.bundle import Bundle, read_bundle, stage_bundle, write_manifest
from runtimes.manifest import (
    Engine,
    ImageLimits,
    InstructionSet,
    Manifest,
    MemoryEstimate,
    ModelSource,
    Proof,
    RecipeUsed,
    TextLimits,
)
from runtimes.ort import IN_PLACE
from runtimes.runner import BundleSettings, Cancelled, Floats, check_pixels, check_tokens

SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<fake_token_around_image>",
    "<global-img>",
    "<image>",
    *(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)),
    "<end_of_utterance>",
]
TILE, SEQ_LEN, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 8, 4, 32, 2, 4, 2, 16, 384


def byte_tokenizer() -> Tokenizer:
    """Byte-level, a token a byte, with SmolVLM's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    return tokenizer


def fake_manifest(tokenizer: Tokenizer) -> Manifest:
    """A pending manifest without files."""
    vocabulary = tokenizer.get_vocab()
    return Manifest(
        target="onnx",
        model=ModelSource("tests/fake", None, None, "smolvlm"),
        version=1,
        recipe=RecipeUsed("none", {"embed": {"scheme": "fp32", "bits": 32, "block": None}}),
        tools={"onnx": onnx.__version__},
        opsets={"ai.onnx": 21, "com.microsoft": 1},
        engine=Engine("onnxruntime", "1.20"),
        instruction_set=InstructionSet(("avx2",), saturates_without_vnni=True),
        image=ImageLimits(TILE, 2 * TILE, 5, SEQ_LEN),
        text=TextLimits(
            context=CONTEXT,
            vocab=len(vocabulary),
            hidden=HIDDEN,
            layers=LAYERS,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            eos_ids=(vocabulary["<end_of_utterance>"],),
            image_token_id=vocabulary["<image>"],
        ),
        memory=(MemoryEstimate(5, CONTEXT, 10_000_000),),
    )


def make_bundle(out: Path, *, in_place: bool = True, proven: bool = True) -> Bundle:
    """Writes a whole bundle; `in_place`: its decoder declares that past and present may be one buffer."""
    tokenizer = byte_tokenizer()
    manifest = fake_manifest(tokenizer)
    text = manifest.text
    random = np.random.default_rng(7)
    with stage_bundle(out) as folder:
        (folder / "onnx").mkdir()
        save(embed_graph(random, text.vocab), folder / "onnx/embed_tokens_quantized.onnx")
        save(vision_graph(random), folder / "onnx/vision_encoder.onnx")
        save(decoder_graph(random, text.vocab, in_place), folder / "onnx/decoder_model_merged_q4.onnx")
        tokenizer.save(str(folder / "tokenizer.json"))
        dtypes = {"embed_tokens": "q8", "vision_encoder": "fp32", "decoder_model_merged": "q4"}
        files: dict[str, dict[str, Any]] = {
            "config.json": {
                "image_token_id": text.image_token_id,
                "text_config": {
                    "vocab_size": text.vocab,
                    "hidden_size": HIDDEN,
                    "num_hidden_layers": LAYERS,
                    "num_key_value_heads": KV_HEADS,
                    "head_dim": HEAD_DIM,
                },
                "vision_config": {"image_size": TILE},
                "transformers.js_config": {"dtype": dtypes},
            },
            "generation_config.json": {"eos_token_id": list(text.eos_ids)},
            "processor_config.json": {"image_seq_len": SEQ_LEN},
            "preprocessor_config.json": {
                "max_image_size": {"longest_edge": TILE},
                "size": {"longest_edge": 2 * TILE},
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            },
        }
        if proven:
            files["report.json"] = {"passed": True}
            manifest = replace(manifest, proof=Proof("passed", "report.json"))
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        write_manifest(folder, manifest)
    return read_bundle(out, allow_pending=True)


def save(model: onnx.ModelProto, path: Path) -> None:
    """Writes the graph with its weights beside it, as the exporter does."""
    onnx.checker.check_model(model)
    onnx.save(model, path, save_as_external_data=True, location=path.name + "_data", size_threshold=64)


def embed_graph(random: np.random.Generator, vocab: int) -> onnx.ModelProto:
    """ids -> rows of a table."""
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"])]
    return _model(
        nodes,
        [_value("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])],
        [_value("inputs_embeds", TensorProto.FLOAT, ["batch_size", "sequence_length", HIDDEN])],
        {"table": random.normal(size=(vocab, HIDDEN))},
    )


def vision_graph(random: np.random.Generator) -> onnx.ModelProto:
    """A projection of each tile plus the mean over all tiles: a tile's neighbours change its features, so that
    a runner that gives it several at once is found out. The mask counts as a factor."""
    side = TILE
    nodes = [
        helper.make_node("Cast", ["pixel_attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "channel"], ["mask5"]),
        helper.make_node("Mul", ["pixel_values", "mask5"], ["masked"]),
        helper.make_node("ReduceMean", ["pixel_values"], ["mean"], keepdims=1),
        helper.make_node("Add", ["masked", "mean"], ["mixed"]),
        helper.make_node("Reshape", ["mixed", "flat"], ["rows"]),
        helper.make_node("MatMul", ["rows", "projection"], ["features"]),
        helper.make_node("Reshape", ["features", "tokens"], ["image_features"]),
    ]
    return _model(
        nodes,
        [
            _value("pixel_values", TensorProto.FLOAT, ["batch_size", "num_images", 3, side, side]),
            _value("pixel_attention_mask", TensorProto.BOOL, ["batch_size", "num_images", side, side]),
        ],
        [_value("image_features", TensorProto.FLOAT, ["num_tiles", SEQ_LEN, HIDDEN])],
        {
            "channel": np.array([2]),
            "flat": np.array([-1, 3 * side * side]),
            "tokens": np.array([-1, SEQ_LEN, HIDDEN]),
            "projection": random.normal(size=(3 * side * side, SEQ_LEN * HIDDEN)) / 14,
        },
    )


def decoder_graph(random: np.random.Generator, vocab: int, in_place: bool = True) -> onnx.ModelProto:
    """Attention layers with RoPE and a cache, lengths from the mask, a head over the last rows."""
    inputs = [
        _value("inputs_embeds", TensorProto.FLOAT, ["batch_size", "sequence_length", HIDDEN]),
        _value("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
        _value("num_logits_to_keep", TensorProto.INT64, []),
    ]
    outputs = [_value("logits", TensorProto.FLOAT, ["batch_size", "rows", vocab])]
    angles = np.arange(CONTEXT)[:, None] / 100 ** (np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    weights: dict[str, npt.NDArray[Any]] = {
        "one": np.array([1]),
        "first": np.array(1),
        "zero": np.array([0]),
        "big": np.array([2**31 - 1]),
        "cos": np.cos(angles),
        "sin": np.sin(angles),
        "head": random.normal(size=(HIDDEN, vocab)),
    }
    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "one"], ["lengths"], keepdims=0),
        helper.make_node("Sub", ["lengths", "one"], ["lasts"]),
        helper.make_node("Cast", ["lasts"], ["last"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["mask_shape"]),
        helper.make_node("Gather", ["mask_shape", "first"], ["totals"]),
        helper.make_node("Cast", ["totals"], ["total"], to=TensorProto.INT32),
        helper.make_node("Reshape", ["num_logits_to_keep", "one"], ["keep"]),
        helper.make_node("Neg", ["keep"], ["start"]),
    ]
    x = "inputs_embeds"
    for i in range(LAYERS):
        weights[f"qkv.{i}"] = random.normal(size=(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM)) / HIDDEN**0.5
        weights[f"out.{i}"] = random.normal(size=(HEADS * HEAD_DIM, HIDDEN)) / 4
        past = [f"past_key_values.{i}.{part}" for part in ("key", "value")]
        present = [f"present.{i}.{part}" for part in ("key", "value")]
        inputs += [_value(name, TensorProto.FLOAT, ["batch_size", KV_HEADS, "past", HEAD_DIM]) for name in past]
        outputs += [_value(name, TensorProto.FLOAT, ["batch_size", KV_HEADS, "total", HEAD_DIM]) for name in present]
        nodes += [
            helper.make_node("MatMul", [x, f"qkv.{i}"], [f"q.{i}"]),
            helper.make_node(
                "GroupQueryAttention",
                [f"q.{i}", "", "", *past, "last", "total", "cos", "sin"],
                [f"attended.{i}", *present],
                domain="com.microsoft",
                num_heads=HEADS,
                kv_num_heads=KV_HEADS,
                do_rotary=1,
            ),
            helper.make_node("MatMul", [f"attended.{i}", f"out.{i}"], [f"mixed.{i}"]),
            helper.make_node("Add", [x, f"mixed.{i}"], [f"x.{i}"]),
        ]
        x = f"x.{i}"
    nodes += [
        helper.make_node("Slice", [x, "start", "big", "one"], ["kept"]),
        helper.make_node("MatMul", ["kept", "head"], ["logits"]),
    ]
    model = _model(nodes, inputs, outputs, weights)
    if in_place:
        helper.set_model_props(model, {IN_PLACE[0]: IN_PLACE[1]})
    return model


def _value(name: str, kind: int, shape: Sequence[str | int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Mapping[str, npt.NDArray[Any]],
) -> onnx.ModelProto:
    arrays = {n: a.astype(np.float32) if a.dtype == np.float64 else a for n, a in weights.items()}
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "fake", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


class ScriptCache:
    """The tokens that were fed."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    @property
    def length(self) -> int:
        return len(self.ids)


class ScriptRunner:
    """A `Runner` whose next logits [vocab] are a function of all tokens fed so far."""

    def __init__(self, settings: BundleSettings, script: Callable[[list[int]], Floats]) -> None:
        self.settings, self._script = settings, script
        self.fed: list[list[int]] = []  # the ids of each call
        self.tiles_encoded = 0
        self._cancelled = False

    def encode_image(self, pixels: Floats) -> Floats:
        check_pixels(pixels, self.settings)
        self._stop_if_cancelled()
        self.tiles_encoded += len(pixels)
        return np.zeros((len(pixels), self.settings.seq_len, self.settings.hidden), dtype=np.float32)

    def new_cache(self) -> ScriptCache:
        return ScriptCache()

    def extend(self, cache: Any, ids: Sequence[int], features: Floats | None = None, keep: int = 1) -> Floats:
        check_tokens(ids, features, cache.length, keep, self.settings)
        self._stop_if_cancelled()
        self.fed.append(list(ids))
        rows = []
        for token in ids:
            cache.ids.append(token)
            rows.append(self._script(cache.ids))
        return np.stack(rows)[-keep:]

    def cancel(self) -> None:
        self._cancelled = True

    def resume(self) -> None:
        self._cancelled = False

    def _stop_if_cancelled(self) -> None:
        if self._cancelled:
            raise Cancelled
