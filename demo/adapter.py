"""Trains the demo's LoRA adapter: with it the carried checkpoint reads the tables of `demo.tables` too.

    make train-adapter OUT=build/adapter        (about half an hour on two cores; goes on where it was stopped)

Every batch holds documents of the first training beside the tables, so that those are not forgotten. The loss is
that of the answers alone. Needs peft, which `make setup` installs; using an adapter (LORA=...) does not.
"""

import argparse
import json
import math
import platform
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import SmolVLMForConditionalGeneration

from demo.documents import GRADES, TILE, TRAIN_FONTS, WEB_FONTS, digest, make_document
from demo.tables import make_table
from demo.train import SEQ_LEN, answer_losses, collate, example, few_shapes, keep_memory
from runtimes.preprocess import ImageSettings
from runtimes.prompt import PromptEncoder

CHECKPOINT = Path(__file__).parent / "checkpoint"
FACES = TRAIN_FONTS + WEB_FONTS
SETTINGS = ImageSettings(tile_size=TILE, longest_edge=2 * TILE)
PLAIN, LARGE = ("label", "sign", "slip"), ("form", "notice")  # documents of 2 tiles and of 4
SAVE_EVERY = 50  # steps


@dataclass(frozen=True)
class Plan:
    """Everything that fixes a training run; all lengths in steps."""

    steps: int = 1200
    batch: int = 24
    tables: int = 17  # of a batch; the rest are forms and notices, which have as many tiles
    documents_only: float = 0.15  # share of batches that hold no table but documents of fewer tiles
    turns: int = 6  # questions a document
    grades: tuple[int, ...] = (80, 14, 6)  # shares of GRADES
    lr: float = 2e-3
    warmup: int = 50
    rank: int = 16
    vision_rank: int = 4
    scaling: int = 2  # alpha is rank times this
    seed: int = 20261125


def adapter_config(plan: Plan) -> peft.LoraConfig:
    """Every matrix of the text model and of the vision tower's layers, the latter with a smaller rank."""
    vision = r"vision_model\.encoder\.layers\.\d+\.(self_attn|mlp)\.\w+"
    return peft.LoraConfig(
        r=plan.rank,
        lora_alpha=plan.scaling * plan.rank,
        rank_pattern={vision: plan.vision_rank},
        alpha_pattern={vision: plan.scaling * plan.vision_rank},
        target_modules=r".*\.layers\.\d+\.(self_attn\.(q|k|v|o|out)_proj|mlp\.(gate_proj|up_proj|down_proj|fc1|fc2))",
        lora_dropout=0.0,
        bias="none",
    )


class Batches(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Batch k is a function of (plan.seed, k): a resumed run sees what an uninterrupted one would."""

    def __init__(self, plan: Plan, encoder: PromptEncoder) -> None:
        self.plan, self.encoder = plan, encoder

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        plan = self.plan
        rng = random.Random(f"{plan.seed}/{step}")
        kind = rng.choice(PLAIN) if rng.random() < plan.documents_only else None
        rows = []
        for i in range(plan.batch):
            grade, index = rng.choices(GRADES, weights=plan.grades)[0], step * plan.batch + i
            if kind is None and i < plan.tables:
                document = make_table("train", index, grade, FACES)
                turns = document.turns
            else:
                document = make_document("train", index, grade, kind or LARGE[i % len(LARGE)], FACES)
                turns = few_shapes(document.turns)
            rows.append(example(document, turns[: plan.turns], SETTINGS, self.encoder))
        return collate(rows)


def learning_rate(step: int, plan: Plan) -> float:
    """A linear warm-up, then a cosine to zero."""
    if step < plan.warmup:
        return plan.lr * (step + 1) / plan.warmup
    return plan.lr * 0.5 * (1 + math.cos(math.pi * (step - plan.warmup) / (plan.steps - plan.warmup)))


def train(plan: Plan, out: Path, workers: int = 1) -> dict[str, Any]:
    """Trains and writes the adapter to `out`; goes on from `out`/training.pt if it is there. Returns the record."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    encoder = PromptEncoder.from_folder(CHECKPOINT)
    if encoder.seq_len != SEQ_LEN:
        raise ValueError(f"{CHECKPOINT}: has {encoder.seq_len} tokens a tile, want {SEQ_LEN}")
    model: Any = SmolVLMForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32, local_files_only=True)
    config = adapter_config(plan)
    adapted: Any = peft.get_peft_model(model, config)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optim = torch.optim.AdamW(parameters, lr=plan.lr, betas=(0.9, 0.98), weight_decay=0.0)
    state_path, start, log, spent = out / "training.pt", 0, [], 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        if state["plan"] != asdict(plan):
            raise ValueError(f"{state_path}: was made by another plan: {state['plan']}")
        with torch.no_grad():
            for parameter, saved in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        optim.load_state_dict(state["optim"])
        start, log, spent = state["step"], state["log"], state["seconds"]
        print(f"resuming at step {start}", flush=True)
    loader = torch.utils.data.DataLoader(
        Batches(plan, encoder),
        batch_size=None,
        sampler=range(start, plan.steps),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    began = time.monotonic()
    window: list[tuple[float, float]] = []
    model.train()
    for step, batch in zip(range(start, plan.steps), loader, strict=True):
        for group in optim.param_groups:
            group["lr"] = learning_rate(step, plan)
        loss, accuracy, _ = answer_losses(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optim.step()
        optim.zero_grad(set_to_none=True)
        window.append((loss.item(), accuracy.item()))
        if (step + 1) % SAVE_EVERY and step + 1 != plan.steps:
            continue
        seconds = spent + time.monotonic() - began
        mean_loss, mean_accuracy = (round(sum(column) / len(window), 4) for column in zip(*window, strict=True))
        window = []
        row = {"step": step + 1, "minutes": round(seconds / 60, 2), "loss": mean_loss, "token_accuracy": mean_accuracy}
        log.append(row)
        print(json.dumps(row), flush=True)
        state = {
            "plan": asdict(plan),
            "parameters": [p.detach() for p in parameters],
            "optim": optim.state_dict(),
            "step": step + 1,
            "log": log,
            "seconds": seconds,
        }
        torch.save(state, state_path.with_suffix(".tmp"))
        state_path.with_suffix(".tmp").replace(state_path)
        save_adapter(adapted, config, out)
    record = {
        "plan": asdict(plan),
        "parameters": sum(p.numel() for p in parameters),
        "minutes": round((spent + time.monotonic() - began) / 60, 1),
        "train_digest_100": digest("train", 100, draw=make_table),
        "versions": {
            "peft": peft.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "log": log,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def save_adapter(adapted: Any, config: peft.LoraConfig, out: Path) -> None:
    """Writes what peft's own loading reads, in bf16."""
    config.base_model_name_or_path = None  # it would be a path of this machine
    config.save_pretrained(str(out))
    tensors = peft.get_peft_model_state_dict(adapted)
    tensors = {name: t.detach().to(torch.bfloat16).contiguous() for name, t in tensors.items()}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.adapter", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter; an unfinished run goes on")
    parser.add_argument("--threads", type=int, help="of torch; 1 where other work shares the cores (default: all)")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw documents (default: %(default)s)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_memory()
    record = train(Plan(), args.out, args.workers)
    print(f"{record['parameters']:,} parameters, {record['minutes']} minutes, adapter in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
