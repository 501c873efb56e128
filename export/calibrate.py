"""Quantization that looks at what flows through the model: statistics, factors, integers, layer by layer.

    python -m export.calibrate MODEL --recipe int4 --data documents.jsonl --work FOLDER

Documents run through the model in two passes. The first, in full precision, notes each channel's range and mean square,
from which factors are chosen and folded into the weights. The second goes layer by layer: the inputs of every product
are what the layers before it, already quantized, make of the documents, and its integers are chosen for them (GPTQ).
Left out, because it is too little to be felt: activations in 8 bits, and a vision tower of which nothing has GPTQ.
Both keep their place after each layer, so that a stopped run goes on. Memory: a layer, and the documents' activations.
"""

import argparse
import hashlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from torch import Tensor

from export.checkpoint import resolve
from export.documents import DataError, Document, read_data
from export.folds import Fold, Folded, folds
from export.processor import write_processor_files
from export.smolvlm import CONNECTOR, EMBED, HEAD, TEXT, VISION, matrices
from export.spec import CheckpointError, ModelSpec, read_spec
from export.torch_ops import ROWS, Box, Prompts, Resumption, TorchOps, multiply, run_decoder, run_vision
from export.weights import WeightSource, matrix_shape, naming, open_weights
from quantize.gptq import feedback, quantize_gptq
from quantize.int4 import F32, ColumnTensor, QTensor, as_floats, dequantize
from quantize.recipe import DEFAULT, UNCALIBRATED, Recipe, RecipeError, Scheme, load_recipe
from quantize.scaling import input_factors, sampled, weight_factors
from runtimes.manifest import Calibration
from runtimes.preprocess import (
    TILE_BUDGETS,
    ImageError,
    ImageSettings,
    cut,
    load_image,
    normalize,
    read_settings,
    to_rgb,
)
from runtimes.prompt import ImagePart, Message, PromptEncoder
from runtimes.tensorfile import TensorFileError, read_header, read_tensor, write_tensors

VERSION = 2  # of what is kept in a work folder; results of another version are not taken up
MOST_TOKENS = 16384  # of prompts and answers; beyond it little is gained
WORK = 2.2e13  # weights times what passes through them: 4,100 tokens of the 2.2B, 15,000 of the 256M
ENOUGH = 32  # documents: for fewer, images are given a smaller token budget
OBSERVED = 8  # documents of the first pass, those with images before those without
LAST = (EMBED, HEAD)  # the matrix that gives logits, which calibration has no use for
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

    def __init__(self, weights: WeightSource, moments: Mapping[str, Moments]) -> None:
        super().__init__(weights)
        self.moments = dict(moments)

    def arrays(self) -> dict[str, F32]:
        """All that was noted, to be kept."""
        return {f"{part}:{name}": value for name, m in self.moments.items() for part, value in vars(m).items()}

    def product(self, names: Sequence[str], x: Tensor) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=0).square_().div_(len(x))
        self.moments |= dict.fromkeys(names, Moments(x.amin(0).numpy(), x.amax(0).numpy(), square.numpy()))
        if names[0] in LAST:
            return torch.empty((0, 0))
        return multiply(x, stacked([self.weights[name] for name in names]))


def _read_moments(path: Path) -> dict[str, Moments]:
    if not path.exists():
        return {}
    header = read_header(path)
    names = {name.split(":")[1] for name in header if ":" in name}
    parts = Moments.__dataclass_fields__
    return {n: Moments(**{p: np.asarray(read_tensor(path, header[f"{p}:{n}"])) for p in parts}) for n in names}


class _Rows(WeightSource):
    """A matrix in memory, under its name."""

    def __init__(self, name: str, matrix: F32) -> None:
        self._name, self._matrix = name, matrix

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the matrix."""
        assert name == self._name
        return self._matrix.shape

    def rows(self, name: str, start: int, stop: int) -> F32:
        """Rows [start, stop)."""
        assert name == self._name
        return self._matrix[start:stop]


class Exact(_Source):
    """Weights as they are."""

    def product(self, names: Sequence[str], x: Tensor) -> Tensor:
        return multiply(x, stacked([self.weights[name] for name in names]))


class Rounding(_Source):
    """The second pass, over prompts that are there twice: for the first half weights are as they were, for the second
    each matrix is quantized when its inputs are there, so that its outputs come close to those of the first half.

    keep: called with every matrix that was quantized by its inputs.
    """

    def __init__(self, weights: WeightSource, recipe: Recipe, keep: Callable[[str, QTensor], None]) -> None:
        super().__init__(weights)
        self._recipe, self._keep = recipe, keep

    def rows(self, name: str, ids: npt.NDArray[np.int64]) -> F32:
        looked_up, scheme = super().rows(name, ids), self._recipe.scheme(name)
        if scheme.format == "float":
            return looked_up
        half = len(ids) // 2
        now = _Rows(name, looked_up[half:]).quantized(name, scheme)
        return np.concatenate([looked_up[:half], as_floats(now)])

    def product(self, names: Sequence[str], x: Tensor) -> Tensor:
        before, now = x.chunk(2)
        schemes = [self._recipe.scheme(name) for name in names]
        by_inputs, last = any(scheme.rounding == "gptq" for scheme in schemes), names[0] in LAST
        if last and not by_inputs:
            return torch.empty((0, 0))
        floats = [self.weights[name] for name in names]
        matrix = stacked(floats)
        out = torch.empty((0 if last else len(x), len(matrix)))
        wanted, given = out[: len(out) // 2], out[len(out) // 2 :]
        multiply(before[: len(wanted)], matrix, wanted)
        if by_inputs:
            cross = changed_outputs(matrix, None if last else wanted, before, now)
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
        multiply(now[: len(given)], stacked(floats), given)
        return out


def changed_outputs(matrix: Tensor, wanted: Tensor | None, before: Tensor, now: Tensor) -> Tensor:
    """Sum over rows of (y - W x) x^T, f32 [N, K]: y = `wanted` were the outputs of inputs `before`, and x is `now`.

    Where that is less work, or y is not there, as W times the sum of (x_before - x) x^T.
    """
    (n, k), rows = matrix.shape, len(now)
    if wanted is None or k * (rows + n) < 2 * n * rows:
        change = torch.zeros((k, k))
        for start in range(0, rows, ROWS):
            part = slice(start, start + ROWS)
            change.addmm_((before[part] - now[part]).T, now[part])
        return matrix @ change
    cross = torch.zeros((n, k))
    for start in range(0, rows, ROWS):
        part = slice(start, start + ROWS)
        cross.addmm_((wanted[part] - now[part] @ matrix.T).T, now[part])
    return cross


def damping(rows: int, inputs: int) -> float:
    """How much of the second moments' mean diagonal is added to it: more where there were few rows to learn from."""
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


class Calibrated(WeightSource):
    """A WeightSource with factors folded in, and the integers that were chosen for it.

    Args:
        folded: the weights.
        folder: holds a file for each matrix that was quantized by its inputs.
        ranges: the smallest and largest input of each matrix whose activations are static.
    """

    def __init__(self, folded: Folded, folder: Path, ranges: Mapping[str, tuple[float, float]]) -> None:
        self._folded, self._folder, self._ranges = folded, folder, ranges

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._folded.shape(name)

    def rows(self, name: str, start: int, stop: int) -> F32:
        """Rows [start, stop) of a tensor's first dimension. Raises CheckpointError as the weights do."""
        return self._folded.rows(name, start, stop)

    def input_range(self, name: str) -> tuple[float, float]:
        """The smallest and largest input of a matrix. Raises CheckpointError where calibration has not seen it."""
        return self._ranges[name] if name in self._ranges else super().input_range(name)

    def quantized(self, name: str, scheme: Scheme) -> QTensor | ColumnTensor:
        """A matrix in the scheme's format. Raises CheckpointError, naming a file that is not what it should be."""
        if scheme.rounding != "gptq":
            return super().quantized(name, scheme)
        path, (n, k) = self._folder / f"{name}.safetensors", matrix_shape(self, name)
        blocks = -(-k // scheme.block)
        width = scheme.block // 2 if scheme.bits == 4 else scheme.block
        wanted = {"packed": (n, blocks, width), "scales": (n, blocks), "zeros": (n, blocks)}
        try:
            header = read_header(path)
            arrays = {part: np.asarray(read_tensor(path, header[part])) for part in wanted}
        except (TensorFileError, KeyError) as exc:
            raise CheckpointError(f"{path}: does not hold the integers of {name}: {exc}") from exc
        for part, shape in wanted.items():
            if arrays[part].shape != shape:
                raise CheckpointError(f"{path}: {part} is {list(arrays[part].shape)}, want {list(shape)}")
        return QTensor(**arrays, shape=(n, k), bits=scheme.bits, block=scheme.block)


def calibration_documents(recipe: Recipe, path: Path | None) -> list[Document]:
    """The documents for a recipe; none if it needs none. Raises RecipeError if it needs some; DataError."""
    if not recipe.calibrated:
        return []
    if path is None:
        raise RecipeError(
            f"recipe {recipe.name} is calibrated: give documents with --calibration (documents.jsonl: image, question, "
            f"answer; {ENOUGH} or more of the kind that the model will meet), or take recipe {UNCALIBRATED}"
        )
    return read_data(path)


def calibrate(
    model: str,
    spec: ModelSpec,
    weights: WeightSource,
    recipe: Recipe,
    prompts: Prompts,
    work: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> Calibrated:
    """Quantizes what the recipe wants quantized by its inputs; takes up what an earlier call left in `work`.

    Args:
        model: tells these weights from all others (`identity`).
        prompts: documents that the model is to stay good at.
        work: folder for what is kept, a folder for each combination of weights, recipe and prompts.

    Raises:
        CheckpointError: naming a tensor that cannot be quantized, or a folder that cannot be used. RecipeError: the
            recipe asks for what cannot be. DataError: no document has the image that a vision tower is calibrated on.
    """
    if recipe.scheme(EMBED).rounding == "gptq":
        raise RecipeError(f"recipe {recipe.name}: {EMBED} is looked up, not multiplied: its rounding cannot be gptq")
    folder = work / _key(model, spec, recipe, prompts)
    integers = folder / "integers"
    try:
        integers.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise CheckpointError(f"{integers}: cannot be made: {exc.strerror or exc}") from exc
    with FileLock(folder / "lock"):
        static = [name for name in matrices(spec) if recipe.scheme(name).activations == "static"]
        chosen: list[tuple[Fold, F32]] = []
        ranges: dict[str, tuple[float, float]] = {}
        if recipe.factors or static:
            chosen, ranges = _observed(spec, weights, recipe, prompts, static, folder, progress)
        source = Calibrated(Folded(weights, chosen), integers, ranges)
        quantized = {name for name in matrices(spec) if recipe.scheme(name).rounding == "gptq"}
        seen = sorted(name for name in quantized if _sees(name))
        if seen and not len(prompts.tiles):
            raise DataError(f"no calibration document has an image, which the rounding of {seen[0]} needs")
        if all((integers / f"{name}.safetensors").exists() for name in quantized):
            return source

        def keep(name: str, tensor: QTensor) -> None:
            arrays: dict[str, npt.NDArray[Any]] = {
                "packed": tensor.packed,
                "scales": tensor.scales,
                "zeros": tensor.zeros,
            }
            _write(integers / f"{name}.safetensors", arrays)

        state = folder / "rounding.state"
        resumption = Resumption(state, _counted(spec, "rounding", progress))
        twice = prompts.twice()
        rounding = Rounding(source, recipe, keep)
        features = run_vision(
            TorchOps(spec, rounding, twice, resumption) if seen else TorchOps(spec, Exact(source), prompts, resumption)
        )
        if not seen and features.value is not None:
            features = Box(torch.cat([features.tensor, features.tensor]))
        run_decoder(TorchOps(spec, rounding, twice, resumption, every_row=True), features)
        if missing := sorted(name for name in quantized if not (integers / f"{name}.safetensors").exists()):
            raise CheckpointError(f"{folder}: lacks the integers of {missing[0]}; remove the folder and begin again")
        state.unlink(missing_ok=True)
    return source


def _sees(name: str) -> bool:
    """Whether a matrix is part of the vision tower, or of what follows it."""
    return name.startswith(VISION) or name == CONNECTOR


def _observed(
    spec: ModelSpec,
    weights: WeightSource,
    recipe: Recipe,
    prompts: Prompts,
    static: Sequence[str],
    folder: Path,
    progress: Callable[[str], None],
) -> tuple[list[tuple[Fold, F32]], dict[str, tuple[float, float]]]:
    """The first pass and what follows from it, factors and the ranges of static activations; kept in a file."""
    path = folder / "factors.safetensors"
    every = list(folds(spec))
    if not path.exists():
        few = prompts.chosen(sorted(range(len(prompts.counts)), key=lambda i: not prompts.counts[i])[:OBSERVED])
        if static and not len(few.tiles):
            raise DataError(f"no calibration document has an image, which the activations of {static[0]} need")
        seen, state = folder / "observed.safetensors", folder / "observing.state"
        observed = Observed(weights, _read_moments(seen))
        say = _counted(spec, "observing", progress)

        def arriving(place: str) -> None:
            say(place)
            _write(seen, observed.arrays())

        resumption = Resumption(state, arriving)
        features = run_vision(TorchOps(spec, observed, few, resumption))
        run_decoder(TorchOps(spec, observed, few, resumption, every_row=True), features)
        progress("calibration: choosing factors")
        chosen = choose_factors(spec, weights, recipe, observed.moments) if recipe.factors else []
        columns = Folded(weights, chosen).columns
        limits: dict[str, F32] = {}
        for name in static:
            seen_there, by = observed.moments[name], columns.get(name, np.ones(1, np.float32))
            limits[f"range:{name}"] = np.array([(seen_there.low / by).min(), (seen_there.high / by).max()], np.float32)
        found: dict[str, F32] = {"none": np.zeros(0, np.float32)}  # a file holds something
        _write(path, found | limits | {str(every.index(fold)): factors for fold, factors in chosen})
        for done in (seen, state):
            done.unlink(missing_ok=True)
    header = read_header(path)
    factors = [
        (fold, np.asarray(read_tensor(path, header[str(i)]), dtype=np.float32))
        for i, fold in enumerate(every)
        if str(i) in header
    ]
    ranges = {}
    for name in static:
        low, high = read_tensor(path, header[f"range:{name}"])
        ranges[name] = (float(low), float(high))
    return factors, ranges


def choose_factors(
    spec: ModelSpec, weights: WeightSource, recipe: Recipe, moments: Mapping[str, Moments]
) -> list[tuple[Fold, F32]]:
    """Factors for every fold that gains by them; each is chosen on what those before left of the weights."""
    chosen: list[tuple[Fold, F32]] = []
    for fold in folds(spec):
        source = Folded(weights, chosen)
        scheme = recipe.scheme(fold.readers[0])
        if scheme.format == "float" or fold.readers[0] not in moments:  # no document has an image
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


def calibrate_on(
    documents: Sequence[Document],
    folder: Path,
    spec: ModelSpec,
    weights: WeightSource,
    recipe: Recipe,
    work: Path,
    progress: Callable[[str], None] = lambda _: None,
    *,
    adapter: str = "",
    processor: Path | None = None,
) -> tuple[Calibrated, Calibration]:
    """`calibrate` on as many of the documents as two cores get through; what it ran on, for the manifest.

    Args:
        folder: the checkpoint.
        adapter: the digest of an adapter that is merged into `weights`.
        processor: holds the bundle's processor files; None: those of the checkpoint as it is.

    Raises:
        CheckpointError, RecipeError, DataError: naming what cannot be used.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if processor is None:
            processor = Path(scratch)
            write_processor_files(folder, spec, processor, None)
        prompts, used = calibration_prompts(processor, documents, affordable_tokens(spec), spec.text.max_positions)
    progress(f"calibration: {used.documents} documents of at most {used.tiles} tiles, kept in {work}")
    try:
        return calibrate(identity(folder, adapter), spec, weights, recipe, prompts, work, progress), used
    except TensorFileError as exc:
        raise CheckpointError(f"{exc}; remove what calibration kept in {work} and begin again") from exc


def identity(folder: Path, adapter: str = "") -> str:
    """SHA-256 over a checkpoint's config.json and weights, and the digest of an adapter that is merged into them."""
    sha = hashlib.sha256(adapter.encode())
    for path in sorted([folder / "config.json", *folder.glob("model*.safetensors")]):
        with path.open("rb") as file:
            sha.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return sha.hexdigest()


def affordable_tokens(spec: ModelSpec) -> int:
    """Tokens, image tokens among them, to calibrate with: as many as two cores get through in minutes."""
    text, vision = spec.text, spec.vision
    heads = (2 * text.heads + 2 * text.kv_heads) * text.head_dim
    decoder = text.layers * text.hidden * (heads + 3 * text.ffn)
    tower = vision.layers * vision.hidden * (4 * vision.hidden + 2 * vision.ffn)
    return int(min(MOST_TOKENS, WORK / (decoder + tower * vision.patches / spec.tokens_per_tile)))


def calibration_prompts(
    folder: Path, documents: Sequence[Document], tokens: int, context: int
) -> tuple[Prompts, Calibration]:
    """Documents as the model will see them, their answers after them, as many as fit.

    Images get the largest token budget, up to the bundle's own, at which ENOUGH documents (or all) fit.

    Args:
        folder: holds the bundle's tokenizer and preprocessor_config.json.
        tokens: at most this many in all.
        context: the most that the model takes at once.

    Raises:
        DataError: naming a document that cannot be used.
    """
    settings, encoder = read_settings(folder / "preprocessor_config.json"), PromptEncoder.from_folder(folder)
    budgets = [settings]
    if settings.split and settings.resize:
        budgets += [settings.with_budget(b) for b in sorted(TILE_BUDGETS, reverse=True) if b < settings.max_tiles]
    for budget in budgets:
        made = [_prompt(document, budget, encoder) for document in documents[:ENOUGH]]
        if sum(len(ids) for ids, _, _ in made) <= tokens:
            break
    total = 0
    kept: list[tuple[tuple[int, ...], int, list[npt.NDArray[np.uint8]]]] = []
    sha = hashlib.sha256()
    for number, document in enumerate(documents):
        one = made[number] if number < len(made) else _prompt(document, budget, encoder)
        if len(one[0]) > context:
            raise DataError(
                f"{_which(document)}: {len(one[0]):,} tokens with its answer, the model takes {context:,} at once"
            )
        if kept and total + len(one[0]) > tokens:
            break
        total += len(one[0])
        kept.append(one)
        image = hashlib.sha256(document.image.read_bytes()).hexdigest() if document.image else None
        sha.update(json.dumps([image, document.question, document.answers[:1]]).encode() + b"\n")
    tiles = [tile for _, _, cut_tiles in kept for tile in cut_tiles]
    side = settings.tile_size
    prompts = Prompts(
        tuple(ids for ids, _, _ in kept),
        tuple(answer for _, answer, _ in kept),
        tuple(len(cut_tiles) for _, _, cut_tiles in kept),
        np.stack(tiles) if tiles else np.zeros((0, side, side, 3), np.uint8),
        lambda some: normalize(some, settings),
    )
    return prompts, Calibration(sha.hexdigest(), len(kept), total, budget.max_tiles)


def _prompt(
    document: Document, settings: ImageSettings, encoder: PromptEncoder
) -> tuple[tuple[int, ...], int, list[npt.NDArray[np.uint8]]]:
    """(ids of prompt and answer, where the answer starts, tiles)"""
    parts: tuple[str | ImagePart, ...] = (document.question,)
    tiles: list[npt.NDArray[np.uint8]] = []
    try:
        if document.image:
            pieces, rows, cols = cut(to_rgb(load_image(document.image)), settings)
            tiles, parts = [np.asarray(piece) for piece in pieces], (ImagePart(rows, cols), document.question)
        ids = encoder.encode([Message("user", parts)])
        whole = ids
        if document.answers and document.answers[0]:
            turns = [Message("user", parts), Message("assistant", document.answers[:1])]
            whole = encoder.encode(turns, reply=False)
            while whole[-1] != encoder.end_id:  # a newline follows the answer's end
                whole.pop()
    except (ImageError, ValueError) as exc:
        raise DataError(f"{_which(document)}: {exc}") from exc
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, whole, strict=False)))
    return tuple(whole), same, tiles


def _which(document: Document) -> str:
    return str(document.image or repr(document.question[:80]))


def _counted(spec: ModelSpec, what: str, progress: Callable[[str], None]) -> Callable[[str], None]:
    """Turns places into progress: which layer of how many."""
    total = spec.vision.layers + spec.text.layers

    def say(place: str) -> None:
        number = int(place.rsplit(".", 1)[1]) + (spec.vision.layers if place.startswith(TEXT) else 0)
        progress(f"calibration: {what}, layer {number + 1} of {total}")

    return say


def _write(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Writes beside, then renames: a file that is there is whole."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    write_tensors(partial, arrays)
    partial.replace(path)


def _key(model: str, spec: ModelSpec, recipe: Recipe, prompts: Prompts) -> str:
    rules = [[pattern, asdict(scheme)] for pattern, scheme in recipe.rules]
    sha = hashlib.sha256(json.dumps([VERSION, model, asdict(spec), rules, recipe.factors]).encode())
    sha.update(json.dumps([prompts.ids, prompts.answer]).encode())
    sha.update(np.ascontiguousarray(prompts.tiles).data)
    every_value = np.resize(np.arange(256, dtype=np.uint8), (1, *prompts.tiles.shape[1:]))
    sha.update(np.ascontiguousarray(prompts.pixels(every_value)).data)
    return sha.hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m export.calibrate", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or a hub id")
    parser.add_argument("--recipe", default=DEFAULT, help="a shipped recipe or a .toml file (default: %(default)s)")
    parser.add_argument("--data", type=Path, required=True, help="documents.jsonl (image, question, answer)")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for what is kept; an export takes it as --work"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    args = parser.parse_args()
    began = time.monotonic()

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        recipe, documents = load_recipe(args.recipe), read_data(args.data)
        if not recipe.calibrated:
            raise RecipeError(f"recipe {recipe.name} is not calibrated: an export needs nothing for it")
        folder = resolve(args.model).folder
        spec = read_spec(folder)
        weights = open_weights(folder, spec)
        _, used = calibrate_on(documents, folder, spec, weights, recipe, args.work, progress)
    except (CheckpointError, RecipeError, DataError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        if args.json:
            print(json.dumps({"ok": False, "error": str(exc)}))
        return 2
    print(f"recipe {recipe.name} is calibrated in {args.work} ({time.monotonic() - began:.1f} s)")
    if args.json:
        print(json.dumps({"ok": True, "calibration": asdict(used), "seconds": round(time.monotonic() - began, 1)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
