"""A checkpoint of full size with random weights: what an export costs can be measured without a download.

    python -m benchmarks.random_checkpoint --size 2.2b --out FOLDER [--seed 0]

Configuration as published for SmolVLM2; tensors are drawn in pieces and written shard by shard. The
tokenizer is the demo's, whose ids all lie within the published vocabulary: the whole pipeline runs,
and what the model says is noise.
"""

import argparse
import json
import math
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.spec import read_spec, tensor_shapes
from runtimes.bundle import stage_bundle
from runtimes.manifest import BundleError
from runtimes.prompt import END, IMAGE, START
from runtimes.tensorfile import TensorFileError, stream_tensors, to_bf16

SHARD_BYTES = 500_000_000
PIECE = 1 << 20  # values drawn at a time
STD = 0.02

_SIGLIP_SO400M = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
_SIGLIP_B16 = {
    "hidden_size": 768,
    "image_size": 512,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "patch_size": 16,
}

# What the published config.json files say; the 2.2B's leaves out its numbers of text heads (32, Llama's default).
SIZES: dict[str, dict[str, Any]] = {
    "2.2b": {
        "scale_factor": 3,
        "tie_word_embeddings": False,
        "text_config": {
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "rope_theta": 130000,
        },
        "vision_config": _SIGLIP_SO400M,
    },
    "500m": {
        "scale_factor": 4,
        "tie_word_embeddings": True,
        "text_config": {
            "head_dim": 64,
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_attention_heads": 15,
            "num_hidden_layers": 32,
            "num_key_value_heads": 5,
            "rope_theta": 100000,
        },
        "vision_config": _SIGLIP_B16,
    },
    "256m": {
        "scale_factor": 4,
        "tie_word_embeddings": True,
        "text_config": {
            "head_dim": 64,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "rope_theta": 100000,
        },
        "vision_config": _SIGLIP_B16,
    },
}
VOCAB, MAX_POSITIONS = 49280, 8192


def write_random_checkpoint(size: str, out: Path, seed: int = 0) -> Generator[str]:
    """Writes a checkpoint to the new folder `out`; yields the name of each file of weights when it is whole.

    The same size and seed give the same weights. `out` appears with one rename, when all is written.

    Raises:
        BundleError, TensorFileError: if `out` exists, cannot be written, or the disk is full.
    """
    with stage_bundle(out) as stage:
        _write_settings(size, stage)
        shapes = tensor_shapes(read_spec(stage))
        shards = _shards(shapes)
        places: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            entries = {tensor: ("BF16", shapes[tensor]) for tensor in names}
            stream_tensors(stage / name, entries, lambda tensor: random_tensor(tensor, shapes[tensor], seed))
            places |= dict.fromkeys(names, name)
            yield name
        if len(shards) > 1:
            total = sum(2 * math.prod(shape) for shape in shapes.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            _write_json(stage / "model.safetensors.index.json", index)


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Iterator[npt.NDArray[np.uint16]]:
    """The bits of a tensor in BF16, piece by piece: a function of name, shape and seed alone."""
    generator = np.random.Generator(np.random.SFC64([seed, *name.encode()]))
    one = np.float32(1 if "norm" in name and name.endswith(".weight") else 0)  # a norm's gamma
    left = math.prod(shape)
    while left:
        values = generator.standard_normal(min(left, PIECE), dtype=np.float32)
        values *= np.float32(STD)
        values += one
        yield to_bf16(values)
        left -= values.size


def _shards(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        need = 2 * math.prod(shape)
        if shards[-1] and held + need > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += need
    return shards


def _write_settings(size: str, folder: Path) -> None:
    """config.json and generation_config.json, tokenizer and processor files."""
    from demo.tokenizer import save_tokenizer, train_tokenizer  # loads transformers

    tokenizer = train_tokenizer(documents=200)
    save_tokenizer(tokenizer, folder)
    ids = {
        "bos_token_id": tokenizer.token_to_id(START),
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id("<|im_end|>"),
    }
    chosen = SIZES[size]
    text = {"model_type": "llama", "vocab_size": VOCAB, "max_position_embeddings": MAX_POSITIONS, "rms_norm_eps": 1e-5}
    config = chosen | {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "dtype": "bfloat16",
        "image_token_id": tokenizer.token_to_id(IMAGE),
        "text_config": text | ids | chosen["text_config"],
        "vision_config": {"model_type": "smolvlm_vision"} | chosen["vision_config"],
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", ids)
    tile = chosen["vision_config"]["image_size"]
    settings = {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SmolVLMImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_image_size": {"longest_edge": tile},
        "processor_class": "SmolVLMProcessor",
        "resample": 1,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": 4 * tile},
    }
    _write_json(folder / "preprocessor_config.json", settings)
    seq_len = read_spec(folder).tokens_per_tile
    _write_json(folder / "processor_config.json", {"image_seq_len": seq_len, "processor_class": "SmolVLMProcessor"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    """Parses the arguments and writes; 2 on an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.random_checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}, want 0 or more")
    try:
        for name in write_random_checkpoint(args.size, args.out, args.seed):
            print(f"wrote {name}", file=sys.stderr, flush=True)
    except (BundleError, TensorFileError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    print(f"random {args.size} checkpoint in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
