"""Many documents at once along their right answers: what another rounding of the weights changes, without an export.

Each answer token's distribution is compared with the full-precision model's; an answer counts as exact where every
token of it, the end included, is the most likely one: greedy decoding then gives just this answer. Only weights differ,
activations are in fp32. What a bundle computes is measured by its proof and by `benchmarks.quality`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from export.calibrate import calibration_prompts
from export.documents import Document
from export.prove import kl_divergence
from export.spec import ModelSpec
from export.torch_ops import Box, Prompts, TorchOps, multiply, run_decoder, run_vision
from export.weights import WeightSource
from quantize.int4 import F32

BATCH = 64  # documents at a time


class Weighted:
    """`torch_ops.Tensors` over any mapping of names to arrays; products' matrices stay in memory."""

    def __init__(self, weights: WeightSource, changed: Callable[[str], F32 | None] = lambda _: None) -> None:
        """`changed` gives a matrix in another form, or None where it is as it was."""
        self._weights, self._changed = weights, changed
        self._kept: dict[tuple[str, ...], Tensor] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(name)

    def vector(self, name: str) -> F32:
        return self._weights[name]

    def _matrix(self, name: str) -> F32:
        changed = self._changed(name)
        return self._weights[name] if changed is None else changed

    def rows(self, name: str, ids: npt.NDArray[np.int64]) -> F32:
        if (name,) not in self._kept:
            self._kept[(name,)] = torch.from_numpy(self._matrix(name))
        return np.asarray(self._kept[(name,)].numpy()[ids])

    def product(self, names: Sequence[str], x: Tensor) -> Tensor:
        key = tuple(names)
        if key not in self._kept:
            self._kept[key] = torch.from_numpy(np.concatenate([self._matrix(name) for name in names]))
        return multiply(x, self._kept[key])


@dataclass(frozen=True)
class Forced:
    """What a model made of the documents.

    kl: f64 [documents], mean KL divergence (nats a token) from the full-precision model along each answer.
    same: f64 [documents], the part of tokens whose most likely one is the full-precision model's.
    exact: bool [documents].
    """

    kl: npt.NDArray[np.float64]
    same: npt.NDArray[np.float64]
    exact: npt.NDArray[np.bool_]
    tokens: int

    @property
    def kl_mean(self) -> float:
        """Over documents."""
        return float(self.kl.mean())


class Documents:
    """Documents, and what the full-precision model makes of them; features are computed once.

    numbers: of each question the number of its document: those about one image belong together.
    answered: places of the questions that have an answer; what is exact means nothing for the others.

    Args:
        processor: folder with the tokenizer and preprocessor_config.json.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: WeightSource,
        processor: Path,
        documents: Sequence[Document],
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.spec, self.weights = spec, weights
        seen: dict[str, int] = {}
        self.numbers = [seen.setdefault(str(d.image or i), len(seen)) for i, d in enumerate(documents)]
        self.answered = [i for i, document in enumerate(documents) if document.answers]
        self._batches: list[tuple[Prompts, Tensor, F32]] = []
        for start in range(0, len(documents), BATCH):
            progress(f"full precision: document {start} of {len(documents)}")
            prompts, _ = calibration_prompts(
                processor, documents[start : start + BATCH], 1 << 40, spec.text.max_positions
            )
            tensors = Weighted(weights)
            features = run_vision(TorchOps(spec, tensors, prompts)).tensor
            self._batches.append((prompts, features, run_decoder(TorchOps(spec, tensors, prompts), Box(features))))
        self.reference = self._forced([logits for _, _, logits in self._batches])

    def measure(self, tensors: Weighted, *, vision: bool = True, **ops: Any) -> Forced:
        """Runs other weights over the documents; without `vision` the full-precision features are taken."""
        found = []
        for prompts, features, _ in self._batches:
            own = run_vision(TorchOps(self.spec, tensors, prompts)).tensor if vision else features
            found.append(run_decoder(TorchOps(self.spec, tensors, prompts, **ops), Box(own)))
        return self._forced(found)

    def _forced(self, found: Sequence[F32]) -> Forced:
        kl: list[float] = []
        same: list[float] = []
        exact: list[bool] = []
        tokens = 0
        for (prompts, _, reference), logits in zip(self._batches, found, strict=True):
            divergence = np.array(kl_divergence(reference, logits))
            best, wanted = logits.argmax(axis=1), reference.argmax(axis=1)
            row = 0
            for ids, answer in zip(prompts.ids, prompts.answer, strict=True):
                rows = slice(row, row + max(len(ids) - answer, 1))
                row = rows.stop
                kl.append(float(divergence[rows].mean()))
                same.append(float((best[rows] == wanted[rows]).mean()))
                exact.append(best[rows].tolist() == list(ids[answer:]))
            tokens += row
        return Forced(np.array(kl), np.array(same), np.array(exact), tokens)
