"""How well the demo checkpoint, in fp32, reads documents that it has never seen.

    python -m demo.evaluate [--count 1000] [--grade clean] [--checkpoint demo/checkpoint] [--tables] [--lora ADAPTER]

Answers are generated freely by Hugging Face's own model and compared exactly; intervals are Wilson's, 95 %. With
--tables it is asked about tables (`demo.tables`), with --lora PEFT merges an adapter into it first.
"""

import argparse
import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import SmolVLMForConditionalGeneration

from demo.documents import GRADES, SPLITS, Document, make_document
from demo.tables import make_table
from export.lora import adapter_digest
from runtimes.preprocess import preprocess, read_settings
from runtimes.prompt import ImagePart, Message, PromptEncoder

CHECKPOINT = Path(__file__).parent / "checkpoint"
ANSWER_TOKENS = 32
BATCH = 32


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The score interval of a proportion (E. B. Wilson, 1927)."""
    p, centre = right / count, (right / count + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (p * (1 - p) / count + z * z / (4 * count * count)) ** 0.5
    return centre - half, centre + half


@torch.inference_mode()
def answers(
    folder: Path, documents: Sequence[Document], progress: Callable[[str], None], adapter: Path | None = None
) -> list[str]:
    """The checkpoint's greedy answer to the first question of each document."""
    model: Any = SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    if adapter is not None:
        import peft  # seconds, and only here

        model = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    model.eval()
    encoder = PromptEncoder.from_folder(folder)
    settings = read_settings(folder / "preprocessor_config.json")
    groups: dict[tuple[int, int], list[tuple[int, list[int], torch.Tensor]]] = defaultdict(list)
    for number, document in enumerate(documents):
        tiles = preprocess(document.image, settings)
        ids = encoder.encode([Message("user", (ImagePart(tiles.rows, tiles.cols), document.turns[0].question))])
        groups[len(ids), len(tiles.pixels)].append((number, ids, torch.from_numpy(tiles.pixels)))
    found = [""] * len(documents)
    done, last = 0, time.monotonic()
    for group in groups.values():  # prompts of one length: a batch needs no padding
        for start in range(0, len(group), BATCH):
            batch = group[start : start + BATCH]
            prompts = torch.tensor([row[1] for row in batch])
            pixels = torch.stack([row[2] for row in batch])
            mask = torch.ones_like(prompts)
            out = model.generate(
                input_ids=prompts,
                attention_mask=mask,
                pixel_values=pixels,
                max_new_tokens=ANSWER_TOKENS,
                do_sample=False,
            )
            for (number, *_), row in zip(batch, out[:, prompts.shape[1] :].tolist(), strict=True):
                end = row.index(encoder.end_id) if encoder.end_id in row else len(row)
                found[number] = encoder.decode(row[:end]).strip()
            done += len(batch)
            if time.monotonic() - last > 2:
                progress(f"{done} of {len(documents)}")
                last = time.monotonic()
    return found


def evaluate(
    folder: Path,
    split: str,
    grade: str,
    count: int,
    progress: Callable[[str], None] = lambda _: None,
    *,
    tables: bool = False,
    adapter: Path | None = None,
) -> dict[str, Any]:
    """Exact match by task over the first `count` documents (or tables) of a split, with intervals."""
    documents = [make_table(split, i, grade) if tables else make_document(split, i, grade) for i in range(count)]
    found = answers(folder, documents, progress, adapter)
    right: dict[str, list[bool]] = defaultdict(list)
    for document, answer in zip(documents, found, strict=True):
        turn = document.turns[0]
        right[turn.task].append(answer == turn.answer)
        right["all"].append(answer == turn.answer)
    rows = {}
    for task, results in sorted(right.items()):
        low, high = wilson(sum(results), len(results))
        rows[task] = {
            "documents": len(results),
            "exact": round(sum(results) / len(results), 4),
            "interval_95": [round(low, 4), round(high, 4)],
        }
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    result: dict[str, Any] = {"split": split, "grade": grade, "weights_sha256": weights, "tasks": rows}
    if tables or adapter:
        result |= {"pages": "tables" if tables else "documents", "recipe": "fp32"}
        result |= {"adapter_sha256": adapter_digest(adapter) if adapter else None}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--tables", action="store_true", help="ask about tables in place of documents")
    parser.add_argument("--lora", type=Path, metavar="ADAPTER", help="folder of an adapter to merge in (needs peft)")
    parser.add_argument("--split", choices=sorted(SPLITS), default="test")
    parser.add_argument("--grade", choices=GRADES, action="append", help="may be repeated (default: all)")
    parser.add_argument("--count", type=int, default=1000, help="documents a grade (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    results = []
    for grade in args.grade or GRADES:
        progress = lambda text, grade=grade: print(f"{grade}: {text}", file=sys.stderr, flush=True)  # noqa: E731  # one line
        results.append(
            evaluate(args.checkpoint, args.split, grade, args.count, progress, tables=args.tables, adapter=args.lora)
        )
        for task, row in results[-1]["tasks"].items():
            low, high = row["interval_95"]
            print(f"{grade:6} {task:6} {row['exact']:7.2%}  ({low:.1%} to {high:.1%}, {row['documents']} documents)")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
