"""How often two bundles of one model answer differently, and how close the call was where they do.

    python -m benchmarks.disagreement build/demo-android build/demo-ios --data DOCUMENTS [--out FILE.jsonl]

Both answer every question greedily with the engine that runs them here (a Core ML bundle off macOS: its saved programs,
emulated). One JSON line: the rate with its interval, each bundle's exact answers, and every difference: both answers
and the gap of log-probability between the two tokens where they part, as each bundle sees it. Not covered: speed.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from demo.evaluate import wilson
from export.documents import DataError, Document, read_data
from export.prove import ANSWER_TOKENS, greedy, kl_divergence
from runtimes.bundle import Bundle, read_bundle
from runtimes.generate import log_softmax
from runtimes.manifest import BundleError
from runtimes.preprocess import ImageError, load_image, preprocess, read_settings
from runtimes.prompt import ImagePart, Message, PromptEncoder
from runtimes.runner import EngineError, Floats, InputError, engine_name, open_runner
from runtimes.verify import step_logits


class Answering:
    """A bundle that answers documents; its runner is loaded once."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.runner = bundle, open_runner(bundle)
        self.encoder = PromptEncoder.from_folder(bundle.folder)
        self.settings = read_settings(bundle.path("preprocessor_config.json"))

    def prompt(self, document: Document) -> tuple[list[int], Floats]:
        """Token ids, and features of the document's image (none: of no tile)."""
        tiles = [preprocess(load_image(document.image), self.settings)] if document.image else []
        ids = self.encoder.encode([Message("user", (*(ImagePart(t.rows, t.cols) for t in tiles), document.question))])
        return ids, self.runner.encode_image(tiles[0].pixels) if tiles else np.zeros((0, 1, 1), np.float32)

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as an answer."""
        return self.encoder.decode(tokens).strip()


def compare_bundles(first: Bundle, second: Bundle, documents: Sequence[Document]) -> dict[str, Any]:
    """The row that the command prints.

    Raises:
        BundleError, InputError, EngineError, ImageError: if a bundle or a picture cannot be used.
    """
    pair = (Answering(first), Answering(second))
    sizes = [(one.runner.settings.vocab, sorted(one.runner.settings.eos_ids)) for one in pair]
    tokenizers = [next(f.sha256 for f in one.bundle.manifest.files if f.path == "tokenizer.json") for one in pair]
    if sizes[0] != sizes[1] or tokenizers[0] != tokenizers[1]:
        raise BundleError(f"{first.folder} and {second.folder}: are of different tokenizers, so of different models")
    differences, divergences, right = [], [], [0, 0]
    last = time.monotonic()
    for number, document in enumerate(documents):
        if time.monotonic() - last > 2:
            print(f"document {number} of {len(documents)}", file=sys.stderr, flush=True)
            last = time.monotonic()
        prompts = [one.prompt(document) for one in pair]
        found = [greedy(one.runner, *p, ANSWER_TOKENS) for one, p in zip(pair, prompts, strict=True)]
        # both along the first one's answer
        rows = [step_logits(one.runner, *p, found[0]) for one, p in zip(pair, prompts, strict=True)]
        divergences += kl_divergence(rows[0], rows[1])
        texts = [one.text(tokens) for one, tokens in zip(pair, found, strict=True)]
        for side in (0, 1):
            right[side] += texts[side] in document.answers
        if texts[0] != texts[1]:
            at = next(i for i, (a, b) in enumerate(zip(*found, strict=False)) if a != b)
            tokens = found[0][at], found[1][at]
            gaps = [float(log_softmax(r[at])[tokens[0]] - log_softmax(r[at])[tokens[1]]) for r in rows]
            differences.append(
                {"document": number, "task": document.task, "answers": texts, "label": document.answers, "gaps": gaps}
            )
    low, high = wilson(len(differences), len(documents))
    return {
        "bundles": [
            {
                "model": one.bundle.manifest.model.name,
                "target": one.bundle.manifest.target,
                "recipe": one.bundle.manifest.recipe.name,
                "engine": engine_name(one.bundle),
                "payload_digest": one.bundle.manifest.payload_digest,
                "exact": right[side] / len(documents),
            }
            for side, one in enumerate(pair)
        ],
        "documents": len(documents),
        "differ": len(differences),
        "rate": len(differences) / len(documents),
        "interval_95": [low, high],
        "kl_mean": float(np.mean(divergences)),
        "differences": differences,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.disagreement", description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs=2, metavar="BUNDLE")
    parser.add_argument("--data", type=Path, required=True, help="documents.jsonl, or the folder that holds it")
    parser.add_argument("--limit", type=int, help="use at most this many documents")
    parser.add_argument("--out", type=Path, help="append the JSON line to this file too")
    args = parser.parse_args()
    try:
        first, second = (read_bundle(folder) for folder in args.bundles)
        row = {"data": args.data.name} | compare_bundles(first, second, read_data(args.data, args.limit))
    except (BundleError, DataError, ImageError, InputError, EngineError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    print(json.dumps(row, ensure_ascii=False))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    low, high = row["interval_95"]
    exact = " and ".join(f"{b['exact']:.1%} ({b['engine']})" for b in row["bundles"])
    print(
        f"{row['differ']} of {row['documents']} answers differ: {row['rate']:.2%} ({low:.2%} to {high:.2%}); exact are "
        f"{exact}; mean KL {row['kl_mean']:.1e}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
