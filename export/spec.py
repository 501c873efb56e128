"""What a checkpoint's config.json says the model is: every size checked, what cannot work refused by name.

Keys that are left out get the defaults of transformers' SmolVLMConfig, Idefics3Config and LlamaConfig
(the published 2.2B leaves out its numbers of heads). Values are checked, weights are not looked at.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ARCHITECTURES = ("smolvlm", "idefics3")
VISION_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
CONFIG_BYTES = 16 << 20  # a config file above this is refused unread

Table = dict[str, Any]


class CheckpointError(ValueError):
    """A fault of a checkpoint; the message names the file and the tensor or field."""


@dataclass(frozen=True)
class VisionSpec:
    """The vision tower: a SigLIP encoder on square tiles."""

    hidden: int
    layers: int
    heads: int
    head_dim: int
    ffn: int
    image_size: int  # pixels a side of a tile
    patch_size: int  # pixels a side; what is left of the tile beyond whole patches is not looked at
    norm_eps: float
    activation: str  # "gelu_tanh" or "gelu"

    @property
    def grid(self) -> int:
        """Patches a side of a tile."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of a tile."""
        return self.grid**2


@dataclass(frozen=True)
class TextSpec:
    """The text model: Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    rope_theta: float
    norm_eps: float
    tied: bool  # the head is the embedding


@dataclass(frozen=True)
class ModelSpec:
    """A whole model, as its config.json and generation_config.json describe it."""

    architecture: str  # "smolvlm" or "idefics3"
    vision: VisionSpec
    text: TextSpec
    scale_factor: int  # pixel shuffle: scale_factor**2 patches become one token
    image_token_id: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of a tile."""
        return (self.vision.grid // self.scale_factor) ** 2


def read_spec(folder: Path) -> ModelSpec:
    """Reads config.json and, where there is one, generation_config.json.

    Raises:
        CheckpointError: naming file and field, for anything that is missing, impossible or not supported.
    """
    path = folder / "config.json"
    if not path.exists() and (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder}: is a LoRA adapter; its model is the checkpoint (MODEL), and this is LORA")
    config = read_json(path)
    where = str(path)
    architecture = config.get("model_type")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"{where}: model_type is {architecture!r}, want one of {', '.join(ARCHITECTURES)}")
    for key in ("quantization_config", "per_layer_config"):
        _refuse(config, key, where)
    vision = _vision(_table(config, "vision_config", where), f"{where}: vision_config.")
    # transformers gives eps 1e-5 to a text_config that is absent, Llama's 1e-6 to one that leaves it out.
    norm_eps = 1e-5 if config.get("text_config") is None else 1e-6
    tied = _flag(config, "tie_word_embeddings", where)  # text_config's own flag has no effect
    text = _text(_table(config, "text_config", where), norm_eps, tied, f"{where}: text_config.")
    scale_factor = _int(config, "scale_factor", 2, f"{where}: ", 1, 64)
    if vision.grid % scale_factor:
        raise CheckpointError(
            f"{where}: scale_factor is {scale_factor}, but a tile has {vision.grid} patches a side, no multiple of it"
        )
    image_token_id = _int(config, "image_token_id", 128257, f"{where}: ", 0, text.vocab - 1)
    bos_id, eos_ids, pad_id = _special_ids(folder, config, text.vocab)
    return ModelSpec(architecture, vision, text, scale_factor, image_token_id, bos_id, eos_ids, pad_id)


def read_json(path: Path) -> Table:
    """The object in a JSON file. Raises CheckpointError if it is missing, huge, not JSON or not an object."""
    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, want at most {CONFIG_BYTES:,}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise CheckpointError(f"{path}: is missing") from exc
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    except RecursionError as exc:
        raise CheckpointError(f"{path}: is nested too deep") from exc
    except CheckpointError:
        raise
    except ValueError as exc:  # not UTF-8, not JSON, or a number of thousands of digits
        raise CheckpointError(f"{path}: is not JSON: {exc}") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, want an object")
    return content


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name of every tensor -> its shape; `lm_head.weight` is absent where it is tied."""
    v, t = spec.vision, spec.text
    q, kv = t.heads * t.head_dim, t.kv_heads * t.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.vision_model.embeddings.patch_embedding.weight": (v.hidden, 3, v.patch_size, v.patch_size),
        "model.vision_model.embeddings.patch_embedding.bias": (v.hidden,),
        "model.vision_model.embeddings.position_embedding.weight": (v.patches, v.hidden),
        "model.vision_model.post_layernorm.weight": (v.hidden,),
        "model.vision_model.post_layernorm.bias": (v.hidden,),
        "model.connector.modality_projection.proj.weight": (t.hidden, v.hidden * spec.scale_factor**2),
        "model.text_model.embed_tokens.weight": (t.vocab, t.hidden),
        "model.text_model.norm.weight": (t.hidden,),
    }
    if not t.tied:
        shapes["lm_head.weight"] = (t.vocab, t.hidden)
    for i in range(v.layers):
        layer = f"model.vision_model.encoder.layers.{i}"
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{norm}.{part}": (v.hidden,) for part in ("weight", "bias")}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{layer}.self_attn.{name}.weight"] = (v.hidden, v.hidden)
            shapes[f"{layer}.self_attn.{name}.bias"] = (v.hidden,)
        shapes[f"{layer}.mlp.fc1.weight"] = (v.ffn, v.hidden)
        shapes[f"{layer}.mlp.fc1.bias"] = (v.ffn,)
        shapes[f"{layer}.mlp.fc2.weight"] = (v.hidden, v.ffn)
        shapes[f"{layer}.mlp.fc2.bias"] = (v.hidden,)
    for i in range(t.layers):
        layer = f"model.text_model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (t.hidden,),
            f"{layer}.self_attn.q_proj.weight": (q, t.hidden),
            f"{layer}.self_attn.k_proj.weight": (kv, t.hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, t.hidden),
            f"{layer}.self_attn.o_proj.weight": (t.hidden, q),
            f"{layer}.post_attention_layernorm.weight": (t.hidden,),
            f"{layer}.mlp.gate_proj.weight": (t.ffn, t.hidden),
            f"{layer}.mlp.up_proj.weight": (t.ffn, t.hidden),
            f"{layer}.mlp.down_proj.weight": (t.hidden, t.ffn),
        }
    return shapes


def position_ids(grid: int) -> npt.NDArray[np.int64]:
    """Position ids of a full tile, i64 [grid * grid], row by row: what the reference's float32 computes.

    The reference (SmolVLMVisionEmbeddings) asks into which of `grid` equal parts of [0, 1) a patch's
    coordinate i / grid falls. Coordinates and boundaries are the same numbers, rounded differently, so for
    many grids (19, 25, 29, 31, 41 among them) a patch gets its neighbour's id; for 27 and 32 none does.
    """
    coordinates = np.arange(grid, dtype=np.float32) * (np.float32(1) / np.float32(grid))
    coordinates = np.minimum(coordinates, np.float32(1 - 1e-6))
    parts = np.searchsorted(_boundaries(grid), coordinates, side="right")
    ids: npt.NDArray[np.int64] = (parts[:, None] * grid + parts[None, :]).reshape(-1).astype(np.int64)
    return ids


def _boundaries(grid: int) -> npt.NDArray[np.float32]:
    """torch.arange(1 / grid, 1.0, 1 / grid) in float32, bit for bit as PyTorch computes it on x86.

    It works in float64, in pairs of vectors of 8: the first value of a vector is rounded to float32
    before multiples of the step are added; what is left after the last pair is rounded once.
    """
    step = 1 / grid
    count = math.ceil((1.0 - step) / step)
    index = np.arange(count)
    once = (step + index * step).astype(np.float32)
    base = (step + index // 8 * 8 * step).astype(np.float32).astype(np.float64)
    twice = (base + index % 8 * step).astype(np.float32)
    return np.where(index < count // 16 * 16, twice, once)


def rope_tables(text: TextSpec) -> list[npt.NDArray[np.float32]]:
    """cos and sin f32 [positions, D / 2] of the rotary embedding, in the reference's float32 arithmetic."""
    exponents = np.arange(0, text.head_dim, 2, dtype=np.int64).astype(np.float32) / np.float32(text.head_dim)
    inverse = (1.0 / np.power(np.float64(text.rope_theta), exponents.astype(np.float64)).astype(np.float32)).astype(
        np.float32
    )
    angles = np.arange(text.max_positions, dtype=np.float32)[:, None] * inverse[None, :]
    return [np.cos(angles), np.sin(angles)]


def _vision(config: Table, where: str) -> VisionSpec:
    activation = config.get("hidden_act", "gelu_pytorch_tanh")
    if not isinstance(activation, str) or activation not in VISION_ACTIVATIONS:
        raise CheckpointError(f"{where}hidden_act is {activation!r}, want one of {', '.join(VISION_ACTIVATIONS)}")
    if config.get("num_channels", 3) != 3:
        raise CheckpointError(f"{where}num_channels is {config['num_channels']!r}, only 3 is supported")
    hidden = _int(config, "hidden_size", 1152, where, 1, 1 << 15)
    heads = _int(config, "num_attention_heads", 16, where, 1, 1 << 10)
    if hidden % heads:
        raise CheckpointError(f"{where}hidden_size is {hidden}, no multiple of num_attention_heads {heads}")
    image_size = _int(config, "image_size", 224, where, 1, 1 << 12)
    patch_size = _int(config, "patch_size", 32, where, 1, 1 << 10)
    if not 1 <= image_size // patch_size <= 256:
        raise CheckpointError(
            f"{where}image_size is {image_size} and patch_size {patch_size}: "
            f"{image_size // patch_size} patches a side, want 1 to 256"
        )
    return VisionSpec(
        hidden=hidden,
        layers=_int(config, "num_hidden_layers", 12, where, 1, 1 << 10),
        heads=heads,
        head_dim=hidden // heads,
        ffn=_int(config, "intermediate_size", 3072, where, 1, 1 << 17),
        image_size=image_size,
        patch_size=patch_size,
        norm_eps=_float(config, "layer_norm_eps", 1e-6, where, 0.1),
        activation=VISION_ACTIVATIONS[activation],
    )


def _text(config: Table, norm_eps: float, tied: bool, where: str) -> TextSpec:
    for key, default, what in (("model_type", "llama", "text model"), ("hidden_act", "silu", "activation")):
        if config.get(key, default) != default:
            raise CheckpointError(f"{where}{key} is {config[key]!r}, the only {what} supported is {default}")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key, False) is not False:
            raise CheckpointError(f"{where}{key} is {config[key]!r}, only false is supported")
    for key in ("quantization_config", "per_layer_config"):
        _refuse(config, key, where.removesuffix("."))
    hidden = _int(config, "hidden_size", 4096, where, 1, 1 << 15)
    heads = _int(config, "num_attention_heads", 32, where, 1, 1 << 10)
    if hidden % heads:
        raise CheckpointError(f"{where}hidden_size is {hidden}, no multiple of num_attention_heads {heads}")
    kv_heads = heads
    if config.get("num_key_value_heads") is not None:
        kv_heads = _int(config, "num_key_value_heads", heads, where, 1, 1 << 10)
    if heads % kv_heads:
        raise CheckpointError(f"{where}num_attention_heads is {heads}, no multiple of num_key_value_heads {kv_heads}")
    head_dim = hidden // heads
    if config.get("head_dim") is not None:
        head_dim = _int(config, "head_dim", head_dim, where, 1, 1 << 10)
    if head_dim % 2:
        raise CheckpointError(f"{where}head_dim is {head_dim}, want an even number: rotary embeddings turn pairs")
    return TextSpec(
        hidden=hidden,
        layers=_int(config, "num_hidden_layers", 32, where, 1, 1 << 10),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=_int(config, "intermediate_size", 11008, where, 1, 1 << 17),
        vocab=_int(config, "vocab_size", 32000, where, 1, 1 << 21),
        max_positions=_int(config, "max_position_embeddings", 2048, where, 1, 1 << 18),
        rope_theta=_rope_theta(config, where),
        norm_eps=_float(config, "rms_norm_eps", norm_eps, where, 0.1),
        tied=tied,
    )


def _rope_theta(config: Table, where: str) -> float:
    """rope_scaling goes before rope_parameters, their rope_theta before the one beside them."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = _table(config, key, where.removesuffix("."))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"{where}{key} is of type {kind!r}: scaled rotary embeddings are not supported")
    for holder, name in ((config, where), (rope, f"{where}{key}.")):
        # transformers' Llama carries the factor along but does not use it; other readers do.
        if holder.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise CheckpointError(f"{name}partial_rotary_factor is {holder['partial_rotary_factor']!r}, want 1")
    unknown = set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown:
        raise CheckpointError(f"{where}{key} has {', '.join(sorted(unknown))}: only rope_theta is supported")
    if "rope_theta" in rope:
        return _float(rope, "rope_theta", 0.0, f"{where}{key}.", 1e12)
    return _float(config, "rope_theta", 10000.0, where, 1e12)


def _special_ids(folder: Path, config: Table, vocab: int) -> tuple[int | None, tuple[int, ...], int | None]:
    """(bos, eos, pad): from generation_config.json, else config.json, else its text_config, else Llama's."""
    places: list[tuple[Table, str]] = [(config, f"{folder / 'config.json'}: ")]
    path = folder / "generation_config.json"
    if path.exists():
        places.insert(0, (read_json(path), f"{path}: "))
    text = _table(config, "text_config", "")
    places.append((text, f"{folder / 'config.json'}: text_config."))

    def find(key: str) -> tuple[Any, str]:
        for table, where in places:
            # config.json's own pad_token_id is a left-over that transformers ignores.
            if table.get(key) is not None and not (key == "pad_token_id" and table is config):
                return table[key], f"{where}{key}"
        # Llama's defaults hold only where text_config is silent, not where it says null.
        default = {"bos_token_id": 1, "eos_token_id": 2}.get(key)
        return (None if key in text else default), key

    def one(value: Any, where: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab:
            raise CheckpointError(f"{where} is {value!r}, want a token id below {vocab}")
        return value

    bos, bos_where = find("bos_token_id")
    eos, eos_where = find("eos_token_id")
    pad, pad_where = find("pad_token_id")
    eos_list = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return (
        None if bos is None else one(bos, bos_where),
        tuple(dict.fromkeys(one(e, eos_where) for e in eos_list)),
        None if pad is None else one(pad, pad_where),
    )


def _table(config: Table, key: str, where: str) -> Table:
    """The object under `key`; empty where it is absent or null."""
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {key} is {type(value).__name__}, want an object")
    return value


def _refuse(config: Table, key: str, where: str) -> None:
    if config.get(key) is not None:
        raise CheckpointError(f"{where}: has {key}, which is not supported; give the full-precision checkpoint")


def _flag(config: Table, key: str, where: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: {key} is {value!r}, want true or false")
    return value


def _int(config: Table, key: str, default: int, where: str, low: int, high: int) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        found = f"{value!r:.40}" if key in config else f"left out, so {default}"
        raise CheckpointError(f"{where}{key} is {found}, want a whole number from {low} to {high}")
    return value


def _float(config: Table, key: str, default: float, where: str, high: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= high:
        raise CheckpointError(f"{where}{key} is {value!r:.40}, want a number above 0, at most {high:g}")
    return float(value)
