"""A model and documents: what a group of tensors in another format loses on them, and what a whole recipe loses."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from benchmarks.forced import Documents, Forced, Weighted
from benchmarks.groups import Group
from benchmarks.scores import mean_interval, paired_summary, score_summary
from export.calibrate import affordable_tokens, calibrate, calibration_prompts, identity
from export.documents import Document
from export.processor import write_processor_files
from export.spec import read_spec
from export.torch_ops import Prompts
from export.weights import WeightSource, open_weights
from quantize.int4 import F32, as_floats
from quantize.recipe import Recipe, Scheme

SCHEMA = 1  # of measurements that are kept
PROGRESS_S = 2.0


class _Changed(Weighted):
    """Full-precision weights that are shared, with the matrices of one group in another form."""

    def __init__(self, base: Weighted, weights: WeightSource, group: Sequence[str], scheme: Scheme) -> None:
        names = frozenset(group)
        super().__init__(weights, lambda name: as_floats(weights.quantized(name, scheme)) if name in names else None)
        self._base, self._names = base, names

    def rows(self, name: str, ids: npt.NDArray[np.int64]) -> F32:
        return super().rows(name, ids) if name in self._names else self._base.rows(name, ids)

    def product(self, names: Sequence[str], x: Tensor) -> Tensor:
        return super().product(names, x) if self._names & set(names) else self._base.product(names, x)


class Subject:
    """A model and the documents that it is measured on; the model runs when a measurement is asked for."""

    def __init__(
        self,
        folder: Path,
        documents: Sequence[Document],
        calibrating: Sequence[Document],
        scratch: Path,
        progress: Callable[[str], None],
    ) -> None:
        """`calibrating` are the documents to calibrate on (none: no calibration); `scratch` is an empty folder."""
        self.spec = read_spec(folder)
        self.weights = open_weights(folder, self.spec)
        self._documents, self._progress, self._scratch = documents, _seldom(progress), scratch
        write_processor_files(folder, self.spec, scratch, None)
        self.processor_bytes = sum(path.stat().st_size for path in scratch.iterdir())
        self.identity = identity(folder)
        self.calibration: Prompts | None = None
        self.calibration_digest: str | None = None
        if calibrating:
            self.calibration, used = calibration_prompts(
                scratch, calibrating, affordable_tokens(self.spec), self.spec.text.max_positions
            )
            self.calibration_digest = used.sha256

    @cached_property
    def _measured(self) -> Documents:
        return Documents(self.spec, self.weights, self._scratch, self._documents, self._progress)

    @cached_property
    def _base(self) -> Weighted:
        return Weighted(self.weights)

    def key(self) -> dict[str, Any]:
        """What measurements depend on: model, processor and documents."""
        sha = hashlib.sha256()
        for name in ("preprocessor_config.json", "tokenizer.json"):
            sha.update((self._scratch / name).read_bytes())
        for document in self._documents:
            image = hashlib.sha256(document.image.read_bytes()).hexdigest() if document.image else None
            sha.update(json.dumps([image, document.question, document.answers[:1]]).encode() + b"\n")
        return {"schema": SCHEMA, "model": self.identity, "data": sha.hexdigest()}

    def alone(self, group: Group, scheme: Scheme) -> dict[str, Any]:
        """What one group in a format loses."""
        tensors = _Changed(self._base, self.weights, group.tensors, scheme)
        forced = self._measured.measure(tensors, vision=group.seen)
        return {"kl": forced.kl_mean, "kl_interval_95": self._interval(forced)}

    def whole(self, recipe: Recipe, work: Path) -> dict[str, Any]:
        """What a recipe loses, its weights rounded as an export rounds them; see `loss_row`."""
        self.__dict__.pop("_base", None)  # all matrices in fp32: once is enough
        source: WeightSource = self.weights
        if recipe.calibrated:
            assert self.calibration is not None
            source = calibrate(
                self.identity, self.spec, self.weights, recipe, self.calibration, work / "calibrated", self._progress
            )

        def changed(name: str) -> F32:
            return as_floats(source.quantized(name, recipe.scheme(name)))

        forced = self._measured.measure(Weighted(source, changed))
        return self.loss_row(forced)

    def loss_row(self, forced: Forced) -> dict[str, Any]:
        """KL and exact answers with intervals of 95 %; the latter of the documents that have an answer."""
        answered = self._measured.answered
        numbers = [self._measured.numbers[i] for i in answered]
        row: dict[str, Any] = {"kl": forced.kl_mean, "kl_interval_95": self._interval(forced), "exact": None}
        if answered:
            reference, found = (x.exact[answered].astype(float).tolist() for x in (self._measured.reference, forced))
            row["exact"] = {
                "full_precision": score_summary(reference, numbers),
                "recipe": score_summary(found, numbers),
                "paired": paired_summary(reference, found, numbers),
            }
        return row

    def _interval(self, forced: Forced) -> list[float]:
        return list(mean_interval(forced.kl.tolist(), [1.0] * len(forced.kl), self._measured.numbers))


def _seldom(progress: Callable[[str], None]) -> Callable[[str], None]:
    """Passes on what is said when nothing was for a while."""
    last = time.monotonic()

    def say(text: str) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= PROGRESS_S:
            last = now
            progress(text)

    return say
