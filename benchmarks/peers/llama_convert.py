"""A checkpoint for llama.cpp, as its own tools make one: text.gguf (Q4_0), mmproj-f16.gguf, mmproj-q8_0.gguf.

    python -m benchmarks.peers.llama_convert CHECKPOINT OUT        in the environment of llama.txt

The text model is written in BF16 and quantized by llama.cpp: matrices Q4_0, the head Q6_K (Q8_0 where a row is no
multiple of 256). In the vision tower, q8_0 leaves matrices f16 whose rows are no multiple of 32 (the 2.2B's second
FFN matrix), as llama.cpp's converter does.
"""

import argparse
import ctypes
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.checkpoint import Array, Tensors, TextSizes, VisionSizes, read_sizes

TEXT_PARTS = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
VISION_PARTS = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
NORMAL, CONTROL, UNUSED = 1, 3, 5  # kinds of tokens
Q8_BLOCK = 32


def text_names(sizes: TextSizes) -> Iterator[tuple[str, str]]:
    """(GGUF's name, the checkpoint's) of every tensor of the text model."""
    yield "token_embd.weight", "model.text_model.embed_tokens.weight"
    yield "output_norm.weight", "model.text_model.norm.weight"
    if not sizes.tied:
        yield "output.weight", "lm_head.weight"
    for layer in range(sizes.layers):
        for theirs, ours in TEXT_PARTS.items():
            yield f"blk.{layer}.{ours}", f"model.text_model.layers.{layer}.{theirs}"


def vision_names(sizes: VisionSizes) -> Iterator[tuple[str, str]]:
    """(GGUF's name, the checkpoint's) of every tensor of the vision tower and the connector."""
    top = "model.vision_model"
    for kind in ("weight", "bias"):
        yield f"v.patch_embd.{kind}", f"{top}.embeddings.patch_embedding.{kind}"
        yield f"v.post_ln.{kind}", f"{top}.post_layernorm.{kind}"
        for layer in range(sizes.layers):
            for theirs, ours in VISION_PARTS.items():
                yield f"v.blk.{layer}.{ours}.{kind}", f"{top}.encoder.layers.{layer}.{theirs}.{kind}"
    yield "v.position_embd.weight", f"{top}.embeddings.position_embedding.weight"
    yield "mm.model.fc.weight", "model.connector.modality_projection.proj.weight"


def interleaved(rows: Array, heads: int) -> Array:
    """Rows of a query or key matrix in the order of llama.cpp's rotary embedding, which pairs neighbours.

    Hugging Face pairs row i of a head with row i + D/2.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def vocabulary(folder: Path, size: int) -> tuple[list[str], list[int], list[str]]:
    """Tokens, their kinds and the merges of tokenizer.json, filled up to `size`.

    libmtmd puts the token "\\n\\n" before a picture's last tile: where the tokenizer has none, an unused id is it.
    """
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    known = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    special = {t["id"]: t["content"] for t in tokenizer["added_tokens"]}
    known |= special
    tokens = [known.get(i, f"[UNUSED{i}]") for i in range(size)]
    kinds = [CONTROL if i in special else NORMAL if i in known else UNUSED for i in range(size)]
    if "ĊĊ" not in tokens:
        if UNUSED not in kinds:
            raise ValueError(f"{folder / 'tokenizer.json'}: no token for two line ends, and no unused id")
        place = kinds.index(UNUSED)
        tokens[place], kinds[place] = "ĊĊ", NORMAL
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    return tokens, kinds, merges


def write_text(folder: Path, out: Path) -> None:
    """The text model in BF16."""
    import gguf

    sizes, _ = read_sizes(folder)
    source = Tensors(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))["text_config"]
    writer: Any = gguf.GGUFWriter(out, "llama")
    writer.add_block_count(sizes.layers)
    writer.add_context_length(sizes.context)
    writer.add_embedding_length(sizes.hidden)
    writer.add_feed_forward_length(sizes.ffn)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_rope_dimension_count(sizes.head_dim)
    writer.add_rope_freq_base(sizes.rope_theta)
    writer.add_layer_norm_rms_eps(sizes.rms_eps)
    writer.add_vocab_size(sizes.vocab)
    tokens, kinds, merges = vocabulary(folder, sizes.vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config.get("bos_token_id", 0))
    writer.add_eos_token_id(config.get("eos_token_id", 0))
    writer.add_add_bos_token(False)
    types = gguf.GGMLQuantizationType

    def read(name: str) -> Array:
        values = source.float32(name)
        if name.endswith("q_proj.weight"):
            return interleaved(values, sizes.heads)
        return interleaved(values, sizes.kv_heads) if name.endswith("k_proj.weight") else values

    entries = [
        (ours, theirs, types.F32 if len(source.shape(theirs)) == 1 else types.BF16)
        for ours, theirs in text_names(sizes)
    ]
    _write(writer, entries, source, read)


def write_vision(folder: Path, out: Path, *, eight_bit: bool) -> None:
    """The vision tower and the connector, matrices f16 or q8_0."""
    import gguf

    text, sizes = read_sizes(folder)
    pictures = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
    writer: Any = gguf.GGUFWriter(out, "clip")
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("idefics3")
    writer.add_vision_projection_dim(text.hidden)
    writer.add_vision_image_size(sizes.tile_size)
    writer.add_vision_patch_size(sizes.patch_size)
    writer.add_vision_embedding_length(sizes.hidden)
    writer.add_vision_feed_forward_length(sizes.ffn)
    writer.add_vision_block_count(sizes.layers)
    writer.add_vision_head_count(sizes.heads)
    writer.add_vision_image_mean(pictures["image_mean"])
    writer.add_vision_image_std(pictures["image_std"])
    writer.add_vision_attention_layernorm_eps(sizes.norm_eps)
    writer.add_vision_projector_scale_factor(sizes.scale_factor)
    writer.add_vision_use_gelu(True)
    writer.add_uint32("clip.vision.preproc_image_size", sizes.longest_edge)
    writer.add_file_type(7 if eight_bit else 1)
    types, source = gguf.GGMLQuantizationType, Tensors(folder)

    def stored_as(name: str) -> Any:
        shape = source.shape(name)
        if len(shape) == 1 or ".embeddings." in name:
            return types.F32
        return types.Q8_0 if eight_bit and shape[-1] % Q8_BLOCK == 0 else types.F16

    entries = [(ours, theirs, stored_as(theirs)) for ours, theirs in vision_names(sizes)]
    _write(writer, entries, source, source.float32)


def _write(writer: Any, entries: list[tuple[str, str, Any]], source: Tensors, read: Callable[[str], Array]) -> None:
    """The file: (GGUF's name, the checkpoint's, type) of every tensor, one in memory at a time."""
    from gguf.quants import quant_shape_to_byte_shape, quantize

    for ours, theirs, kind in entries:
        shape = quant_shape_to_byte_shape(source.shape(theirs), kind)
        writer.add_tensor_info(ours, shape, np.dtype(np.uint8), math.prod(shape), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, theirs, kind in entries:
        writer.write_tensor_data(quantize(np.ascontiguousarray(read(theirs)), kind))
    writer.close()


def quantize_text(wide: Path, out: Path, threads: int) -> None:
    """What `llama-quantize wide out Q4_0` does."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.nthread, settings.ftype = threads, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    if code := llama_cpp.llama_model_quantize(bytes(wide), bytes(out), ctypes.byref(settings)):
        raise RuntimeError(f"llama_model_quantize: {code}")


def convert(checkpoint: Path, out: Path) -> None:
    """Writes the three files into the existing folder `out`."""
    wide = out / "wide.gguf"
    write_text(checkpoint, wide)
    quantize_text(wide, out / "text.gguf", threads=2)
    wide.unlink()
    write_vision(checkpoint, out / "mmproj-f16.gguf", eight_bit=False)
    write_vision(checkpoint, out / "mmproj-q8_0.gguf", eight_bit=True)


def main() -> int:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.llama_convert", description=summary)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="an existing folder")
    args = parser.parse_args()
    convert(args.checkpoint, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
