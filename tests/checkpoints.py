"""Tiny random checkpoints, made with Hugging Face's own classes, that the tests run on."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from demo.tokenizer import SPECIAL, save_tokenizer

CLASSES: dict[str, tuple[Any, Any, Any, str]] = {
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil, "SmolVLMProcessor"),
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil, "Idefics3Processor"),
}
CORPUS = (
    "User: What is written on the label? Assistant: The label says total 12.80 and date 2024-03-17.",
    "User: Which colour is the shape? Assistant: The shape is green. System: You see documents and answer questions.",
)


@cache
def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE of about 340 tokens: every byte, SmolVLM's special tokens and a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(SPECIAL) + 40,
        initial_alphabet=alphabet,
        special_tokens=[AddedToken(t, normalized=False, special=True) for t in SPECIAL],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def make_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    architecture: str = "smolvlm",
    image_size: int = 60,
    patch_size: int = 14,
    scale_factor: int = 2,
    vision_hidden: int = 144,
    vision_layers: int = 2,
    vision_heads: int = 2,
    vision_ffn: int = 100,
    vision_act: str = "gelu_pytorch_tanh",
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    ffn: int = 112,
    vocab: int | None = None,
    max_positions: int = 1024,
    rope_theta: float = 10000.0,
    tied: bool = False,
    dtype: str = "bfloat16",
    max_shard_size: int | str = "5GB",
) -> Path:
    """Writes a random checkpoint with tokenizer and processor files to `folder` and returns it.

    The defaults have every trait of the family that an exporter can get wrong: an image size that is no
    multiple of the patch size, vision heads 72 wide, FFN widths that are no multiple of 32, fewer kv
    heads than heads, an untied head, norms away from one, biases away from zero. Weights are scaled so
    that activations neither vanish nor saturate. The same arguments give the same bytes.

    Args:
        architecture: "smolvlm" or "idefics3".
        vocab: rows of the embedding; the tokenizer's size by default, more is padding.
        dtype: of the stored weights, "bfloat16", "float16" or "float32".
        max_shard_size: bytes; smaller than the weights, it makes shards and an index.
    """
    config_class, model_class, image_class, processor_class = CLASSES[architecture]
    tokenizer = tiny_tokenizer()
    ids = {t: tokenizer.token_to_id(t) for t in ("<image>", "<|im_start|>", "<end_of_utterance>", "<|im_end|>")}
    config = config_class(
        image_token_id=ids["<image>"],
        scale_factor=scale_factor,
        tie_word_embeddings=tied,
        vision_config={
            "hidden_size": vision_hidden,
            "intermediate_size": vision_ffn,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": vision_heads,
            "image_size": image_size,
            "patch_size": patch_size,
            "hidden_act": vision_act,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": vocab or tokenizer.get_vocab_size(),
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": max_positions,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
            "tie_word_embeddings": tied,
            "bos_token_id": ids["<|im_start|>"],
            "eos_token_id": ids["<end_of_utterance>"],
            "pad_token_id": ids["<|im_end|>"],
        },
    )
    with torch.device("meta"):
        model = model_class(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    randomize(model, seed)
    model.generation_config.bos_token_id = ids["<|im_start|>"]
    model.generation_config.eos_token_id = ids["<end_of_utterance>"]
    model.generation_config.pad_token_id = ids["<|im_end|>"]
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(tokenizer, folder)
    image = image_class(
        size={"longest_edge": 2 * image_size},
        max_image_size={"longest_edge": image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    settings = image.to_dict() | {"processor_class": processor_class}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    seq_len = (image_size // patch_size // scale_factor) ** 2
    processor = {"image_seq_len": seq_len, "processor_class": processor_class}
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    return folder


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Fills every parameter: matrices keep the scale of what they multiply, norms spread around one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(".bias"):
            parameter.copy_(0.2 * noise)
        elif parameter.ndim == 1:  # a norm's gamma
            parameter.copy_(1 + 0.2 * noise)
        elif "position_embedding" in name:
            parameter.copy_(0.5 * noise)
        elif "embed_tokens" in name or "lm_head" in name:
            parameter.copy_(2 * parameter.shape[-1] ** -0.5 * noise)
        else:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
