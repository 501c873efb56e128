"""The untouched Hugging Face model in fp32: what every bundle is judged against.

The model's own code runs; only its weights are brought in, module by module, from a mapping of names to
arrays, so that a 2.2B in fp32 needs the memory of its largest tensors. It never runs our export code.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoTokenizer, Idefics3ForConditionalGeneration, SmolVLMForConditionalGeneration
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE, get_image_prompt_string

from export.spec import ModelSpec

F32 = npt.NDArray[np.float32]
RESIDENT_BYTES = 2 << 30  # weights kept between uses; what is beyond is read again


class Tensors(Protocol):
    """Weights by Hugging Face name: the checkpoint's own, or what a recipe left of them."""

    def __getitem__(self, name: str) -> F32: ...


@dataclass(frozen=True)
class Generated:
    """features: one f32 [N, L, hidden] for all tiles of the prompt (N = 0 without images);
    prompt_logits: f32 [T, vocab]; tokens: greedy continuation; logits: f32 [len(tokens), vocab], row i chose
    tokens[i]."""

    features: F32
    prompt_logits: F32
    tokens: tuple[int, ...]
    logits: F32


class Reference:
    """A Hugging Face SmolVLM (or Idefics3) over lazily read weights.

    Args:
        folder: the checkpoint (config.json is read from it; nothing else).
        weights: where parameters come from.
        resident_bytes: how much of them may stay in memory.
    """

    def __init__(self, folder: Path, spec: ModelSpec, weights: Tensors, resident_bytes: int = RESIDENT_BYTES) -> None:
        self.spec, self._weights, self._room = spec, weights, resident_bytes
        self._kept: dict[str, torch.Tensor] = {}
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        config.dtype = torch.float32
        for part in (config.text_config, config.vision_config):
            part.dtype = torch.float32
        model_class = (
            SmolVLMForConditionalGeneration if spec.architecture == "smolvlm" else Idefics3ForConditionalGeneration
        )
        with torch.device("meta"):
            model = model_class(config)
        # Non-persistent buffers are computed, not stored: made again off the meta device by their own code.
        rotary = model.model.text_model.rotary_emb
        model.model.text_model.rotary_emb = type(rotary)(config=model.config.text_config)
        if left := [n for n, b in model.named_buffers() if b.is_meta]:
            raise RuntimeError(f"the reference has buffers that nothing fills: {left}")
        self.model = model.train(False)
        tied = {"lm_head": "model.text_model.embed_tokens"} if spec.text.tied else {}
        for name, module in self.model.named_modules():
            keys = tuple(key for key, _ in module.named_parameters(recurse=False))
            if keys:
                _empty(module, keys)
                module.register_forward_pre_hook(self._bring(tied.get(name, name), keys))
                module.register_forward_hook(lambda module, _args, _out, keys=keys: _empty(module, keys))

    def _bring(self, source: str, keys: tuple[str, ...]) -> Any:
        def hook(module: nn.Module, _args: object) -> None:
            for key in keys:
                setattr(module, key, nn.Parameter(self._tensor(f"{source}.{key}"), requires_grad=False))

        return hook

    def _tensor(self, name: str) -> torch.Tensor:
        if name in self._kept:
            return self._kept[name]
        tensor = torch.from_numpy(np.ascontiguousarray(self._weights[name]))
        if self._room >= tensor.nbytes:
            self._room -= tensor.nbytes
            self._kept[name] = tensor
        return tensor

    @torch.inference_mode()
    def generate(self, ids: Sequence[int], pixels: F32 | None, new_tokens: int, *, stop: bool = True) -> Generated:
        """Greedy continuation of a prompt.

        Args:
            ids: token ids, image tokens in place.
            pixels: f32 [N, 3, S, S], all tiles of all images in order; None for text alone.
            new_tokens: at most this many.
            stop: end with the model's turn; False goes on beyond it.
        """
        inputs: dict[str, Any] = {"input_ids": torch.tensor([list(ids)]), "use_cache": True}
        if pixels is not None:
            inputs["pixel_values"] = torch.from_numpy(pixels)[None]
            side = pixels.shape[-1]
            inputs["pixel_attention_mask"] = torch.ones((1, len(pixels), side, side), dtype=torch.int64)
        out = self.model(**inputs)
        features = np.zeros((0, self.spec.tokens_per_tile, self.spec.text.hidden), dtype=np.float32)
        if pixels is not None:
            pooled = out.image_hidden_states
            pooled = pooled.pooler_output if hasattr(pooled, "pooler_output") else pooled
            pooled = torch.cat(list(pooled)) if isinstance(pooled, (list, tuple)) else pooled
            features = pooled.reshape(-1, *features.shape[1:]).numpy()
        prompt_logits = out.logits[0].numpy()
        tokens: list[int] = []
        rows: list[F32] = []
        row = prompt_logits[-1]
        while len(tokens) < new_tokens:
            rows.append(row)
            tokens.append(int(row.argmax()))
            if (stop and tokens[-1] in self.spec.eos_ids) or len(tokens) == new_tokens:
                break
            step = torch.tensor([[tokens[-1]]])
            out = self.model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
            row = out.logits[0, -1].numpy()
        logits = np.stack(rows) if rows else np.zeros((0, self.spec.text.vocab), dtype=np.float32)
        return Generated(features, prompt_logits, tuple(tokens), logits)


def _empty(module: nn.Module, keys: tuple[str, ...]) -> None:
    """Takes a module's parameters away; what stands in has the right type and device, and no elements."""
    for key in keys:
        setattr(module, key, nn.Parameter(torch.empty(0), requires_grad=False))


def reference_processor(settings: dict[str, Any], architecture: str) -> Any:
    """Hugging Face's Pillow processor for the architecture, with a preprocessor_config.json's settings."""
    keys = (
        "do_image_splitting",
        "do_resize",
        "image_mean",
        "image_std",
        "max_image_size",
        "resample",
        "rescale_factor",
        "size",
    )
    processor_class = SmolVLMImageProcessorPil if architecture == "smolvlm" else Idefics3ImageProcessorPil
    return processor_class(**{k: settings[k] for k in keys if k in settings})


def reference_pixels(processor: Any, image: Image.Image) -> tuple[F32, int, int]:
    """(pixels f32 [N, 3, S, S], rows, cols) of a PIL image that is EXIF-transposed already."""
    out = processor(images=[image], return_tensors="np", return_row_col_info=True)
    return np.asarray(out["pixel_values"][0], dtype=np.float32), int(out["rows"][0][0]), int(out["cols"][0][0])


@cache
def _tokenizer(folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.chat_template is None:
        stored = folder / "chat_template.json"
        template = json.loads(stored.read_text(encoding="utf-8"))["chat_template"] if stored.exists() else None
        tokenizer.chat_template = template or DEFAULT_CHAT_TEMPLATE
    return tokenizer


def reference_ids(
    folder: Path,
    turns: Sequence[tuple[str, Sequence[str | None]]],
    grids: Sequence[tuple[int, int]],
    tokens_per_tile: int,
) -> list[int]:
    """Token ids of a chat by Hugging Face's template, image string and tokenizer.

    Args:
        folder: the checkpoint.
        turns: (role, parts); None stands for the next image.
        grids: (rows, cols) of each image.
        tokens_per_tile: image tokens a tile.
    """
    tokenizer = _tokenizer(folder)
    conversation = [
        {"role": role, "content": [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]}
        for role, parts in turns
    ]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    pieces = text.split("<image>")
    strings = [
        get_image_prompt_string(
            rows,
            cols,
            tokens_per_tile,
            fake_token_around_image="<fake_token_around_image>",
            image_token="<image>",
            global_image_token="<global-img>",
        )
        for rows, cols in grids
    ]
    whole = "".join(piece + image for piece, image in zip(pieces, [*strings, ""], strict=True))
    return list(tokenizer(whole)["input_ids"])
