"""Trains the demo checkpoint: a small SmolVLM that reads the documents of `demo.documents`.

    make train OUT=build/demo-checkpoint        (a few hours on two cores; goes on where it was stopped)

What makes it learn to read is the auxiliary loss: a linear layer on the connector's output names the
character whose centre lies in each sub-cell of a token; it fades and is thrown away. Hidden matrices
are trained with Muon, everything else with AdamW.
"""

import argparse
import ctypes
import json
import math
import platform
import random
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from demo.documents import (
    FIRST_FONTS,
    GLYPHS,
    GRADES,
    TILE,
    TRAIN_FONTS,
    WEB_FONTS,
    Document,
    Face,
    Turn,
    digest,
    make_document,
)
from demo.tokenizer import save_tokenizer, train_tokenizer
from runtimes.preprocess import ImageSettings, cut, to_rgb
from runtimes.prompt import END, ImagePart, Message, PromptEncoder

SUB_COLS, SUB_ROWS = 4, 2  # sub-cells of a token in which the auxiliary loss looks for a glyph
TOKEN = 24  # pixels a side that one image token covers: patch 12 x scale factor 2
SEQ_LEN = (TILE // TOKEN) ** 2
GLYPH_CLASS = {name: i + 1 for i, name in enumerate(GLYPHS)}  # 0 is blank
IGNORE = -100


@dataclass(frozen=True)
class Plan:
    """Everything that fixes a training run; all lengths in steps.

    The learning rate warms up, follows the beginning of a cosine of length `cosine`, and falls linearly
    through each cooldown of PHASES.
    """

    steps: int = 7500
    cosine: int = 4000
    glyph_fade: int = 2400
    batch: int = 32
    lr: float = 2e-3
    warmup: int = 150
    weight_decay: float = 0.05
    seed: int = 20261124


@dataclass(frozen=True)
class Phase:
    """A stretch of training that ends before step `end`.

    buckets: shares of BUCKETS; grades: shares of GRADES; turns: questions a document; all_shapes: also
    several questions about shapes; faces: fonts; rates: the learning rate falls linearly from the first
    to the second; None: the cosine; glyph: so does the weight of the glyph loss; None: 1, fading to 0.1.
    restart: the phase begins with the weights of the checkpoint as written (bf16), with fresh optimizers, a fresh
    namer and a warm-up, so that it can begin from a finished checkpoint on another machine.
    """

    end: int
    buckets: tuple[float, ...]
    grades: tuple[int, ...]
    turns: int
    all_shapes: bool
    faces: tuple[Face, ...]
    rates: tuple[float, float] | None = None
    glyph: tuple[float, float] | None = None
    restart: bool = False


# Tiles first, then whole documents, then cleaner ones in ever smaller steps, at last in many more fonts. Their number
# is what decides: with those of PyPI alone 93 % of unseen texts in known fonts were read, but 85 % in an unseen
# font, nearly all for its flat-topped 3 and its open 4, which no known font had.
LATE = (0.05, 0.5, 0.4, 0.05)
PHASES = (
    Phase(1000, (0.75, 0.25, 0.0, 0.0), (100, 0, 0), 4, True, FIRST_FONTS),
    Phase(2250, LATE, (60, 22, 18), 4, True, FIRST_FONTS),
    Phase(3300, LATE, (75, 15, 10), 5, False, FIRST_FONTS, (8.7e-4, 2e-5)),
    Phase(4200, LATE, (80, 13, 7), 5, False, TRAIN_FONTS, (7e-4, 2e-5)),
    Phase(7500, LATE, (76, 15, 9), 7, False, TRAIN_FONTS + WEB_FONTS, (1e-3, 5e-6), (0.5, 0.1), True),
)
# Kinds of document in a batch, longest edge in tiles.
BUCKETS = (
    (("tag",), 1),
    (("label", "sign", "slip"), 2),
    (("form", "notice"), 2),
    (("label", "slip", "form", "notice"), 1),
)


def phase_at(step: int) -> tuple[int, Phase]:
    """(first step, phase) of a step."""
    start = 0
    for phase in PHASES:
        if step < phase.end:
            return start, phase
        start = phase.end
    raise ValueError(f"step {step} is beyond the last phase")


def demo_config(tokenizer: Tokenizer) -> SmolVLMConfig:
    """Small, but with every trait of the family: GQA, untied head, odd FFN and head widths, pixel shuffle."""
    image_token_id: int = tokenizer.token_to_id("<image>")  # type: ignore[assignment]  # the tokenizer has it
    return SmolVLMConfig(
        image_token_id=image_token_id,
        scale_factor=2,
        tie_word_embeddings=False,
        vision_config={
            "hidden_size": 192,
            "intermediate_size": 528,  # 16.5 blocks of 32, as 4304 is 134.5
            "num_hidden_layers": 5,
            "num_attention_heads": 4,  # head width 48
            "image_size": TILE,
            "patch_size": TOKEN // 2,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "hidden_act": "silu",
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": False,
            "bos_token_id": tokenizer.token_to_id("<|im_start|>"),
            "eos_token_id": tokenizer.token_to_id("<end_of_utterance>"),
            "pad_token_id": tokenizer.token_to_id("<|im_end|>"),
        },
    )


class Batches(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Batch k is a function of (plan.seed, k): a resumed run sees what an uninterrupted one would."""

    def __init__(self, plan: Plan, encoder: PromptEncoder) -> None:
        self.plan, self.encoder = plan, encoder

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"{self.plan.seed}/{step}")
        _, phase = phase_at(step)
        kinds, edge = rng.choices(BUCKETS, weights=phase.buckets)[0]
        settings = ImageSettings(tile_size=TILE, longest_edge=edge * TILE)
        rows = []
        for i in range(self.plan.batch):
            kind = kinds[i % len(kinds)]
            grade = "clean" if phase.grades[0] == 100 else rng.choices(GRADES, weights=phase.grades)[0]
            document = make_document("train", step * self.plan.batch + i, grade, kind, phase.faces)
            turns = (document.turns if phase.all_shapes else few_shapes(document.turns))[: phase.turns]
            rows.append(example(document, turns, settings, self.encoder))
        return collate(rows)


def few_shapes(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns with one question about a shape at most, the first one staying first."""
    shapes = [t for t in turns if t.task == "shape"][1:]
    return tuple(t for t in turns if t not in shapes)


def example(
    document: Document, turns: tuple[Turn, ...], settings: ImageSettings, encoder: PromptEncoder
) -> tuple[np.ndarray, np.ndarray, list[int], list[int]]:
    """Tiles u8 [N, S, S, 3], glyph classes [N, SEQ_LEN, sub-cells], token ids and labels of one document."""
    tiles, rows, cols = cut(to_rgb(document.image), settings)
    glyphs = np.full((len(tiles), SEQ_LEN, SUB_ROWS * SUB_COLS), IGNORE, dtype=np.int64)
    # Glyphs are named on the tiles, not on the reduced whole image, unless that is all there is.
    if rows or document.kind == "tag":
        grid = (max(rows, 1), max(cols, 1))
        glyphs[: grid[0] * grid[1]] = 0
        for glyph in document.glyphs:
            x, y = glyph.x * grid[1] * TILE, glyph.y * grid[0] * TILE
            if 0 <= x < grid[1] * TILE and 0 <= y < grid[0] * TILE:
                tile = int(y // TILE) * grid[1] + int(x // TILE)
                tx, ty = x % TILE, y % TILE
                token = int(ty // TOKEN) * (TILE // TOKEN) + int(tx // TOKEN)
                sub = int(ty % TOKEN * SUB_ROWS / TOKEN) * SUB_COLS + int(tx % TOKEN * SUB_COLS / TOKEN)
                glyphs[tile, token, sub] = GLYPH_CLASS[glyph.name]
    ids: list[int] = []
    labels: list[int] = []
    for i, turn in enumerate(turns):
        if i == 0:
            asked = encoder.encode([Message("user", (ImagePart(rows, cols), turn.question))])
        else:
            asked = encoder.tokenizer.encode("\n").ids + encoder.encode(
                [Message("user", (turn.question,))], start=False
            )
        answer = encoder.tokenizer.encode(f" {turn.answer}{END}").ids
        ids += asked + answer
        labels += [IGNORE] * len(asked) + answer
    return np.stack([np.asarray(t) for t in tiles]), glyphs, ids, labels


def collate(rows: list[tuple[np.ndarray, np.ndarray, list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Pads token ids on the right (a causal model never sees the padding)."""
    longest = max(len(ids) for _, _, ids, _ in rows)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    labels = np.full((len(rows), longest), IGNORE, dtype=np.int64)
    for i, (_, _, row_ids, row_labels) in enumerate(rows):
        ids[i, : len(row_ids)] = row_ids
        labels[i, : len(row_labels)] = row_labels
    return {
        "tiles": torch.from_numpy(np.stack([r[0] for r in rows])),
        "glyphs": torch.from_numpy(np.stack([r[1] for r in rows])),
        "ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
    }


def answer_losses(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(answer loss, answer token accuracy, the connector's features [B*N, SEQ_LEN, hidden])."""
    tiles = batch["tiles"].flatten(0, 1).permute(0, 3, 1, 2)  # [B*N, 3, S, S]
    pixels = tiles.float() / 127.5 - 1
    hidden = model.model.vision_model(pixel_values=pixels).last_hidden_state
    features = model.model.connector(hidden)  # [B*N, SEQ_LEN, hidden]
    ids, labels = batch["ids"], batch["labels"]
    embeds = model.model.text_model.embed_tokens(ids)
    embeds = embeds.masked_scatter((ids == model.config.image_token_id).unsqueeze(-1), features)
    out = model.model.text_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    asked = labels[:, 1:] != IGNORE  # only the answers pass the head
    logits = model.lm_head(out[:, :-1][asked])
    wanted = labels[:, 1:][asked]
    loss = nn.functional.cross_entropy(logits, wanted)
    return loss, (logits.argmax(-1) == wanted).float().mean(), features


def losses(
    model: SmolVLMForConditionalGeneration, namer: nn.Linear, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(answer loss, glyph loss, answer token accuracy, glyph accuracy)."""
    answer_loss, accuracy, features = answer_losses(model, batch)
    glyphs = batch["glyphs"].flatten(0, 1)  # [B*N, SEQ_LEN, subs]
    known = glyphs[..., 0] != IGNORE
    if known.any():
        named = namer(features[known]).unflatten(-1, (SUB_ROWS * SUB_COLS, -1))
        target = glyphs[known]
        weight = torch.ones(named.shape[-1], device=named.device)
        weight[0] = 0.05
        glyph_loss = nn.functional.cross_entropy(named.flatten(0, 1), target.flatten(), weight=weight)
        seen = target > 0
        glyph_accuracy = (named.argmax(-1)[seen] == target[seen]).float().mean()
    else:
        glyph_loss, glyph_accuracy = features.new_zeros(()), features.new_full((), float("nan"))
    return answer_loss, glyph_loss, accuracy, glyph_accuracy


def _between(ends: tuple[float, float], step: int, start: int, end: int) -> float:
    return ends[0] + (ends[1] - ends[0]) * (step - start) / (end - start)


def learning_rate(step: int, plan: Plan) -> float:
    """Linear warm-up, the beginning of a cosine, then what the phase says."""
    if step < plan.warmup:
        return plan.lr * (step + 1) / plan.warmup
    start, phase = phase_at(step)
    if phase.rates is not None:
        ramp = min(1.0, (step - start + 1) / plan.warmup) if phase.restart else 1.0
        return ramp * _between(phase.rates, step, start, phase.end)
    done = (step - plan.warmup) / (plan.cosine - plan.warmup)
    return plan.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def glyph_weight(step: int, plan: Plan) -> float:
    """What the phase says, or 1 fading to 0.1."""
    start, phase = phase_at(step)
    if phase.glyph is not None:
        return _between(phase.glyph, step, start, phase.end)
    return max(0.1, 1 - 0.9 * step / plan.glyph_fade)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by Newton-Schulz iteration (K. Jordan, 2024, "Muon: An
    optimizer for hidden layers"), scaled to AdamW's RMS (J. Liu et al., arXiv:2502.16982).

    torch.optim.Muon iterates in bfloat16, which costs a third of a step on a CPU without it: this is fp32,
    one batched product for all matrices of a shape.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault(tuple(p.shape), []).append(p)
            for shape, params in shapes.items():
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    gradient = p.grad if p.grad is not None else torch.zeros_like(p)
                    buffer.lerp_(gradient, 1 - group["momentum"])
                    updates.append(gradient.lerp(buffer, group["momentum"]))
                x = torch.stack(updates)
                x = x.mT if shape[0] > shape[1] else x
                x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = x.mT if shape[0] > shape[1] else x
                scale = 0.2 * math.sqrt(max(shape)) * group["lr"]
                for p, update in zip(params, x, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def optimizers(model: nn.Module, namer: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices; AdamW for embeddings, head, norms, biases, the convolution and the namer."""
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and not any(k in name for k in ("embed", "lm_head"))
        (hidden if matrix else rest).append(parameter)
    rest += list(namer.parameters())
    return [
        Muon(hidden, lr=plan.lr, weight_decay=plan.weight_decay),
        torch.optim.AdamW(rest, lr=plan.lr, betas=(0.9, 0.98), weight_decay=plan.weight_decay),
    ]


def begin(model: Any, plan: Plan, step: int) -> tuple[nn.Linear, list[torch.optim.Optimizer]]:
    """A namer and optimizers for the phases from `step` on; the weights as a checkpoint holds them, in bf16."""
    torch.manual_seed(plan.seed + step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    namer = nn.Linear(model.config.text_config.hidden_size, SUB_ROWS * SUB_COLS * (len(GLYPHS) + 1)).to(model.device)
    return namer, optimizers(model, namer, plan)


def keep_memory() -> None:
    """Tells glibc to keep what is freed: returning it to the kernel after every operation costs a fifth of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def train(plan: Plan, out: Path, device: str = "cpu", workers: int = 1, finished: Path | None = None) -> dict[str, Any]:
    """Trains and writes the checkpoint to `out`; goes on from `out`/training.pt if it is there.

    `finished` is a checkpoint whose record ends where a phase restarts: training begins with that phase.
    Returns the record.
    """
    restarts = {first.end for first, then in pairwise(PHASES) if then.restart}
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    tokenizer = train_tokenizer()
    save_tokenizer(tokenizer, out)
    encoder = PromptEncoder(tokenizer, SEQ_LEN)
    config = demo_config(tokenizer)
    model: Any = SmolVLMForConditionalGeneration(config)
    model.to(device)
    namer, optims = begin(model, plan, 0)
    state_path, start, log, spent = out / "training.pt", 0, [], 0.0
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        if state["plan"] != asdict(plan):
            raise ValueError(f"{state_path}: was made by another plan: {state['plan']}")
        model.load_state_dict(state["model"])
        namer.load_state_dict(state["namer"])
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        start, log, spent = state["step"], state["log"], state["seconds"]
        print(f"resuming at step {start}")
    elif finished is not None:
        record = json.loads((finished / "training.json").read_text(encoding="utf-8"))
        start, log, spent = record["plan"]["steps"], record["log"], record["minutes"] * 60
        if start not in restarts:
            raise ValueError(f"{finished}: ends at step {start}, want one at which a phase restarts: {restarts}")
        if (finished / "tokenizer.json").read_bytes() != (out / "tokenizer.json").read_bytes():
            raise ValueError(f"{finished}/tokenizer.json: is not the tokenizer that this script trains")
        model.load_state_dict(load_file(finished / "model.safetensors", device))
        print(f"beginning with step {start} from {finished}")
    loader = torch.utils.data.DataLoader(
        Batches(plan, encoder),
        batch_size=None,
        sampler=range(start, plan.steps),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    began, window = time.monotonic(), []
    model.train()
    for step, batch in zip(range(start, plan.steps), loader, strict=True):
        if step in restarts:
            namer, optims = begin(model, plan, step)
        on_device = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = learning_rate(step, plan)
        answer_loss, glyph_loss, accuracy, glyph_accuracy = losses(model, namer, on_device)
        (answer_loss + glyph_weight(step, plan) * glyph_loss).backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *namer.parameters()], 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        window.append((answer_loss.item(), accuracy.item(), glyph_loss.item(), glyph_accuracy.item()))
        if (step + 1) % 50 == 0 or step + 1 == plan.steps:
            means = np.nanmean(np.array(window), axis=0)
            seconds = spent + time.monotonic() - began
            row = dict(
                zip(("loss", "token_accuracy", "glyph_loss", "glyph_accuracy"), means.round(4).tolist(), strict=True)
            )
            log.append({"step": step + 1, "minutes": round(seconds / 60, 2), **row})
            print(json.dumps(log[-1]), flush=True)
            window = []
        if (step + 1) % 250 == 0 or step + 1 == plan.steps:
            state = {
                "plan": asdict(plan),
                "model": model.state_dict(),
                "namer": namer.state_dict(),
                "optims": [o.state_dict() for o in optims],
                "step": step + 1,
                "log": log,
                "seconds": spent + time.monotonic() - began,
            }
            torch.save(state, state_path.with_suffix(".tmp"))
            state_path.with_suffix(".tmp").replace(state_path)
            save_checkpoint(model, out)
    record = {
        "plan": asdict(plan),
        "phases": [{**asdict(phase), "faces": len(phase.faces)} for phase in PHASES],
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": round((spent + time.monotonic() - began) / 60, 1),
        "train_digest_100": digest("train", 100),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": device,
        "threads": torch.get_num_threads(),
        "log": [row for row in log if row["step"] % 250 == 0 or row["step"] == plan.steps],
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def save_checkpoint(model: Any, out: Path) -> None:
    """Writes what Hugging Face's classes read: config, bf16 weights, generation and processor settings."""
    config = model.config
    model.generation_config.bos_token_id = config.text_config.bos_token_id
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    config.dtype = torch.bfloat16
    config.architectures = ["SmolVLMForConditionalGeneration"]
    config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    weights = {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    image = SmolVLMImageProcessorPil(
        size={"longest_edge": 2 * TILE},
        max_image_size={"longest_edge": TILE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    settings = image.to_dict() | {"processor_class": "SmolVLMProcessor"}
    (out / "preprocessor_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    processor = {"image_seq_len": SEQ_LEN, "processor_class": "SmolVLMProcessor"}
    (out / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint; an unfinished run goes on")
    parser.add_argument("--finished", type=Path, help="a checkpoint to begin the last phase with")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw documents (default: %(default)s)")
    args = parser.parse_args()
    keep_memory()
    record = train(Plan(), args.out, args.device, args.workers, args.finished)
    print(f"{record['parameters']:,} parameters, {record['minutes']} minutes, checkpoint in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
