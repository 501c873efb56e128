"""Quantization that looks at what flows through the model: statistics, factors, integers, layer by layer.

    python -m export.calibrate MODEL --recipe int4 --data documents.jsonl --work FOLDER

Documents run through the model in two passes. The first, in full precision, notes each channel's range and mean square,
from which factors are chosen and folded into the weights. The second goes layer by layer: the inputs of every product
are what the layers before it, already quantized, make of the documents, and its integers are chosen for them (GPTQ).
Both keep their place after each layer, so that a stopped run goes on. Memory: one layer, and the documents' activations.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from export.folds import Fold, Folded, folds
from export.spec import CheckpointError, ModelSpec
from export.torch_ops import ROWS, Prompts, Resumption, TorchOps, multiply, run_decoder, run_vision
from export.weights import WeightSource, matrix_shape, naming, rounded
from quantize.gptq import feedback, quantize_gptq
from quantize.int4 import F32, ColumnTensor, QTensor, dequantize, dequantize_columns
from quantize.recipe import Recipe, Scheme
from quantize.scaling import input_factors, sampled, weight_factors
from runtimes.tensorfile import TensorFileError, read_header, read_tensor, write_tensors

COLUMNS = 2048  # inputs whose second moments are summed at a time


@dataclass(frozen=True)
class Moments:
    """What a product's inputs were, channel by channel: f32 [K] each."""

    low: F32
    high: F32
    mean_square: F32


class _Source:
    """`torch_ops.Tensors` over a WeightSource; what a product does with its inputs is left to whoever derives."""

    def __init__(self, weights: WeightSource) -> None:
        self.weights = weights

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.shape(name)

    def vector(self, name: str) -> F32:
        return self.weights[name]

    def rows(self, name: str, ids: npt.NDArray[np.int64]) -> F32:
        distinct, places = np.unique(ids, return_inverse=True)
        return np.concatenate([self.weights.rows(name, int(i), int(i) + 1) for i in distinct])[places]


class Observed(_Source):
    """The first pass: full precision, each product's inputs noted under its first matrix."""

    def __init__(self, weights: WeightSource) -> None:
        super().__init__(weights)
        self.moments: dict[str, Moments] = {}

    def product(self, names: Sequence[str], x: Tensor) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=0).square_().div_(len(x))
        self.moments |= dict.fromkeys(names, Moments(x.amin(0).numpy(), x.amax(0).numpy(), square.numpy()))
        return multiply(x, stacked([self.weights[name] for name in names]))


class Rounding(_Source):
    """The second pass, over prompts that are there twice: for the first half weights are as they were, for the second
    each matrix is quantized when its inputs are there, so that its outputs come close to those of the first half.

    keep: called with every matrix that was quantized by its inputs.
    """

    def __init__(self, weights: WeightSource, recipe: Recipe, keep: Callable[[str, QTensor], None]) -> None:
        super().__init__(weights)
        self._recipe, self._keep = recipe, keep

    def product(self, names: Sequence[str], x: Tensor) -> Tensor:
        before, now = x.chunk(2)
        schemes = [self._recipe.scheme(name) for name in names]
        floats = [self.weights[name] for name in names]
        matrix = stacked(floats)
        out = torch.empty((len(x), len(matrix)))
        for start in range(0, len(before), ROWS):
            torch.mm(before[start : start + ROWS], matrix.T, out=out[: len(before)][start : start + ROWS])
        wanted, given = out.chunk(2)
        if any(scheme.rounding == "gptq" for scheme in schemes):
            cross = torch.zeros(matrix.shape)  # sum of (y - W x) x^T
            for start in range(0, len(now), ROWS):
                some = now[start : start + ROWS]
                cross.addmm_((wanted[start : start + ROWS] - some @ matrix.T).T, some)
            with naming(names[0]):
                made = feedback(second_moments(now), damping=damping(len(now), now.shape[1]))
        row = 0
        for i, (name, scheme) in enumerate(zip(names, schemes, strict=True)):
            rows = slice(row, row + len(floats[i]))
            row = rows.stop
            if scheme.rounding == "gptq":
                with naming(name):
                    target = floats[i] + made.solved(cross[rows].numpy())
                    tensor = quantize_gptq(
                        target, made, bits=scheme.bits, block=scheme.block, symmetric=scheme.symmetric
                    )
                self._keep(name, tensor)
                floats[i] = dequantize(tensor)
            elif scheme.format != "float":
                floats[i] = as_floats(self.weights.quantized(name, scheme))
        matrix = stacked(floats)
        for start in range(0, len(now), ROWS):
            torch.mm(now[start : start + ROWS], matrix.T, out=given[start : start + ROWS])
        return out


def damping(rows: int, inputs: int) -> float:
    """How much of the second moments' mean diagonal is added to it: the more, the fewer rows there were to learn from."""
    return 0.05 * min(max(2 * inputs / rows, 1.0), 4.0)


def stacked(matrices: Sequence[F32]) -> Tensor:
    """Matrices along their outputs."""
    return torch.from_numpy(matrices[0] if len(matrices) == 1 else np.concatenate(matrices))


def second_moments(x: Tensor) -> F32:
    """Sum of x x^T over rows, f32 [K, K]; the half below the diagonal is computed, the other is its mirror."""
    k = x.shape[1]
    out = torch.zeros((k, k))
    for start in range(0, k, COLUMNS):
        stop = min(start + COLUMNS, k)
        torch.mm(x[:, start:].T, x[:, start:stop], out=out[start:, start:stop])
        out[start:stop, stop:] = out[stop:, start:stop].T
    return out.numpy()


def as_floats(tensor: QTensor | ColumnTensor) -> F32:
    """f32 [N, K], what integers stand for."""
    return dequantize(tensor) if isinstance(tensor, QTensor) else dequantize_columns(tensor)


def choose_factors(
    spec: ModelSpec, weights: WeightSource, recipe: Recipe, moments: Mapping[str, Moments]
) -> list[tuple[Fold, F32]]:
    """Factors for every fold that gains by them; each is chosen on what those before left of the weights."""
    chosen: list[tuple[Fold, F32]] = []
    for fold in folds(spec):
        source = Folded(weights, chosen)
        scheme = recipe.scheme(fold.readers[0])
        if scheme.format == "float":
            continue
        seen = moments[fold.readers[0]]
        matrices = []
        for name in fold.readers:
            rows = range(*sampled(source.shape(name)[0]).indices(source.shape(name)[0]))
            matrices.append(np.concatenate([source.rows(name, i, i + 1) for i in rows]))
        if fold.repeats > 1:  # a channel that several columns read: they are one channel, seen several times
            matrices = [
                m.reshape(len(m), -1, fold.repeats, fold.width).transpose(2, 0, 1, 3).reshape(len(m) * fold.repeats, -1)
                for m in matrices
            ]
        square = fold.gathered(seen.mean_square).mean(axis=0)
        if scheme.format == "column":
            low, high = fold.gathered(seen.low).min(axis=0), fold.gathered(seen.high).max(axis=0)
            factors, left = input_factors(matrices, low, high, square)
        else:
            factors, left = weight_factors(
                matrices, square, bits=scheme.bits, block=scheme.block, symmetric=scheme.symmetric
            )
        if left < 0.98:
            chosen.append((fold, factors))
    return chosen
