"""A SmolVLM2 checkpoint as the converters read it: sizes with their defaults, tensors one at a time.

They run in other environments, without what `export` needs: nothing here but NumPy.
"""

import json
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

DTYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TextSizes:
    """The decoder's."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    rope_theta: float
    rms_eps: float
    tied: bool


@dataclass(frozen=True)
class VisionSizes:
    """The vision tower's, and how pictures come to it."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    tile_size: int
    patch_size: int
    norm_eps: float
    scale_factor: int  # of the pixel shuffle
    longest_edge: int  # of the picture before it is cut


def read_sizes(folder: Path) -> tuple[TextSizes, VisionSizes]:
    """The sizes in config.json and preprocessor_config.json. Raises KeyError naming a field without a default."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    text, vision = config["text_config"], config["vision_config"]
    pictures = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
    heads = text.get("num_attention_heads", 32)
    rope = text.get("rope_parameters") or {}
    return TextSizes(
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        ffn=text["intermediate_size"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads", heads),
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        vocab=text["vocab_size"],
        context=text["max_position_embeddings"],
        rope_theta=float(rope["rope_theta"] if "rope_theta" in rope else text["rope_theta"]),
        rms_eps=text["rms_norm_eps"],
        tied=config.get("tie_word_embeddings", False),
    ), VisionSizes(
        layers=vision["num_hidden_layers"],
        hidden=vision["hidden_size"],
        ffn=vision["intermediate_size"],
        heads=vision["num_attention_heads"],
        tile_size=vision["image_size"],
        patch_size=vision["patch_size"],
        norm_eps=vision.get("layer_norm_eps", 1e-6),
        scale_factor=config["scale_factor"],
        longest_edge=pictures["size"]["longest_edge"],
    )


class Tensors:
    """The tensors of all *.safetensors files of a folder, mapped; BF16 as its bits, u16."""

    def __init__(self, folder: Path) -> None:
        self._found: dict[str, tuple[Path, str, tuple[int, ...], int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            for name, info in header.items():
                if name != "__metadata__":
                    at = 8 + length + info["data_offsets"][0]
                    self._found[name] = path, info["dtype"], tuple(info["shape"]), at
        if not self._found:
            raise FileNotFoundError(f"{folder}: no *.safetensors with tensors")

    def __iter__(self) -> Any:
        return iter(self._found)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def dtype(self, name: str) -> str:
        """As safetensors names it."""
        return self._found[name][1]

    def shape(self, name: str) -> tuple[int, ...]:
        """As stored."""
        return self._found[name][2]

    def raw(self, name: str) -> Array:
        """The stored values."""
        path, dtype, shape, at = self._found[name]
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name} is {dtype}, want one of {', '.join(DTYPES)}")
        return np.memmap(path, DTYPES[dtype], "r", at, shape)

    def float32(self, name: str) -> Array:
        """The values in float32."""
        values = self.raw(name)
        if self.dtype(name) == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)


def write_llama(folder: Path, out: Path) -> None:
    """The text model as a checkpoint of its own, as transformers' LlamaForCausalLM, into the existing folder `out`."""
    source = Tensors(folder)
    sizes, _ = read_sizes(folder)
    prefix = "model.text_model."
    names = {name: "model." + name.removeprefix(prefix) for name in source if name.startswith(prefix)}
    if not sizes.tied:
        names["lm_head.weight"] = "lm_head.weight"
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for theirs, ours in names.items():
        nbytes = source.raw(theirs).nbytes
        header[ours] = {
            "dtype": source.dtype(theirs),
            "shape": source.shape(theirs),
            "data_offsets": [at, at + nbytes],
        }
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (out / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for theirs in names:
            source.raw(theirs).tofile(file)
    config = json.loads((folder / "config.json").read_text("utf-8"))["text_config"]
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "rms_norm_eps": sizes.rms_eps,
        "rope_theta": sizes.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes.rope_theta},
        "tie_word_embeddings": sizes.tied,
    }
    (out / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).exists():
            shutil.copy(folder / name, out / name)
