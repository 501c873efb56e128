"""The operations of `smolvlm.py` in PyTorch, over many prompts at once: what calibration runs, and what compares
ways of rounding without an export for each.

Weights are asked for as they are used, product by product, so that whoever gives them sees the inputs of each.
Not a reference: that is the Hugging Face model, with which tests compare this.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from export.smolvlm import EMBED, VISION, decoder, vision_tower
from export.spec import ModelSpec, TextSpec, VisionSpec, position_ids, rope_tables
from quantize.int4 import F32
from runtimes.tensorfile import read_header, read_tensor, write_tensors

ROWS = 4096  # inputs multiplied at a time
RESTORED = ("h", "x")


@dataclass(frozen=True)
class Prompts:
    """Prompts with what follows them.

    ids: token ids of each prompt and its answer, image tokens in place.
    answer: where the answer starts in each.
    counts: tiles of each.
    tiles: u8 [N, S, S, 3], the tiles of all images of all prompts in order.
    pixels: makes f32 [n, 3, S, S] of n tiles.
    """

    ids: tuple[tuple[int, ...], ...]
    answer: tuple[int, ...]
    counts: tuple[int, ...]
    tiles: npt.NDArray[np.uint8]
    pixels: Callable[[npt.NDArray[np.uint8]], F32]

    @property
    def tokens(self) -> int:
        """Tokens of all prompts and answers."""
        return sum(map(len, self.ids))

    def twice(self) -> "Prompts":
        """All of them, and then all of them again."""
        tiles = np.concatenate([self.tiles, self.tiles])
        return Prompts(self.ids * 2, self.answer * 2, self.counts * 2, tiles, self.pixels)

    def chosen(self, numbers: Sequence[int]) -> "Prompts":
        """Those of the numbers, in their order."""
        ends = np.cumsum([0, *self.counts])
        ids, answer, counts = (tuple(part[i] for i in numbers) for part in (self.ids, self.answer, self.counts))
        tiles = np.concatenate([self.tiles[:0], *(self.tiles[ends[i] : ends[i + 1]] for i in numbers)])
        return Prompts(ids, answer, counts, tiles, self.pixels)  # type: ignore[arg-type]


class Tensors(Protocol):
    """Where weights come from; names are those of the checkpoint."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def product(self, names: Sequence[str], x: Tensor) -> Tensor:
        """x W^T, f32 [rows, K] -> f32 [rows, N], matrices stacked along their outputs."""

    def vector(self, name: str) -> F32:
        """A tensor that no recipe quantizes."""

    def rows(self, name: str, ids: npt.NDArray[np.int64]) -> F32:
        """Rows of a matrix that is looked up."""


def multiply(x: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """x W^T, f32 [rows, K] and [N, K] -> f32 [rows, N], some rows at a time; into `out` if it is given."""
    out = torch.empty((len(x), len(matrix))) if out is None else out
    for start in range(0, len(x), ROWS):
        torch.mm(x[start : start + ROWS], matrix.T, out=out[start : start + ROWS])
    return out


class Box:
    """A value on its way through the model; empty while a run that was stopped is caught up with."""

    __slots__ = ("value",)

    def __init__(self, value: Tensor | None) -> None:
        self.value = value

    @property
    def tensor(self) -> Tensor:
        """The value, which must be there."""
        assert self.value is not None
        return self.value


class Resumption:
    """Keeps the state between layers in one file, and takes it up again after a stop.

    Until the layer that the file names is reached, operations compute nothing. A layer is begun again from its start.
    """

    def __init__(self, path: Path, arriving: Callable[[str], None] = lambda _: None) -> None:
        """`arriving` is called with each layer's place before its state is kept."""
        self._path, self._arriving = path, arriving
        self._target: str | None = None
        if path.exists():
            (self._target,) = (name.removeprefix("at:") for name in read_header(path) if name.startswith("at:"))

    @property
    def catching_up(self) -> bool:
        """Whether operations compute nothing yet."""
        return self._target is not None

    def arrive(self, place: str, state: Sequence[Box]) -> None:
        """A layer starts: its state is restored, or written beside and put in place."""
        if self._target is None:
            self._arriving(place)
            partial = self._path.with_suffix(".partial")
            partial.unlink(missing_ok=True)
            named = dict(zip(RESTORED, (box.tensor.numpy() for box in state), strict=False))
            write_tensors(partial, {f"at:{place}": np.zeros(1, np.uint8), **named})
            partial.replace(self._path)
        elif self._target == place:
            header = read_header(self._path)
            for name, box in zip(RESTORED, state, strict=False):
                box.value = torch.from_numpy(np.array(read_tensor(self._path, header[name])))
            self._target = None


class TorchOps:
    """`smolvlm.Ops` over Prompts: vision values are f32 [tiles * P, C], text values f32 [tokens, C].

    Args:
        tensors: where weights come from.
        prompts: whose tokens and tiles the values belong to.
        resumption: where a layer's state is kept; None: nowhere.
        every_row: logits of every token, not of those before an answer's tokens alone.
        attended: called with (layer, keys, values), f32 [tokens, G, D], keys rotated; returns what is attended to
            in their place (an 8-bit cache, for instance).
    """

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Tensors,
        prompts: Prompts,
        resumption: Resumption | None = None,
        *,
        every_row: bool = False,
        attended: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda _, k, v: (k, v),
    ) -> None:
        self.spec, self.tensors, self.prompts, self._resumption = spec, tensors, prompts, resumption
        self._attended, self._every_row = attended, every_row
        self._lengths = [len(ids) for ids in prompts.ids]
        positions = np.concatenate([np.arange(n) for n in self._lengths])
        self._cos, self._sin = (torch.from_numpy(table[positions])[:, None] for table in rope_tables(spec.text))

    def _op(self, compute: Callable[[], Tensor]) -> Box:
        return Box(None if self._resumption and self._resumption.catching_up else compute())

    def _arrive(self, place: str, *state: Box) -> None:
        if self._resumption:
            self._resumption.arrive(place, state)

    def linear(self, x: Box, weights: Sequence[str], biases: Sequence[str] = ()) -> Box:
        def compute() -> Tensor:
            out = self.tensors.product(weights, x.tensor)
            return (
                out.add_(torch.from_numpy(np.concatenate([self.tensors.vector(n) for n in biases]))) if biases else out
            )

        return self._op(compute)

    def linears(self, x: Box, weights: Sequence[str], biases: Sequence[str] = ()) -> list[Box]:
        stacked = self.linear(x, weights, biases)
        if stacked.value is None:
            return [Box(None) for _ in weights]
        sizes = [self.tensors.shape(name)[0] for name in weights]
        return [Box(part) for part in stacked.tensor.split(sizes, dim=1)]

    def add(self, a: Box, b: Box) -> Box:
        return self._op(lambda: a.tensor + b.tensor)

    def layer_norm(self, x: Box, name: str, eps: float) -> Box:
        if name.endswith("layer_norm1"):
            self._arrive(name.removesuffix(".layer_norm1"), x)

        def compute() -> Tensor:
            gamma, beta = (torch.from_numpy(self.tensors.vector(f"{name}.{part}")) for part in ("weight", "bias"))
            return functional.layer_norm(x.tensor, gamma.shape, gamma, beta, eps)

        return self._op(compute)

    def rms_norm(self, x: Box, weight: str, eps: float) -> Box:
        h = self._op(lambda: self._rms(x.tensor, weight, eps))
        if weight.endswith("layers.0.input_layernorm.weight"):
            self._arrive(weight.removesuffix(".input_layernorm.weight"), h, x)
        return h

    def add_rms_norm(self, x: Box, residual: Box, weight: str, eps: float) -> tuple[Box, Box]:
        whole = self.add(x, residual)
        h = self._op(lambda: self._rms(whole.tensor, weight, eps))
        if weight.endswith(".input_layernorm.weight"):
            self._arrive(weight.removesuffix(".input_layernorm.weight"), h, whole)
        return h, whole

    def _rms(self, x: Tensor, weight: str, eps: float) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], torch.from_numpy(self.tensors.vector(weight)), eps)

    def gelu(self, x: Box, kind: str) -> Box:
        approximate = "tanh" if kind == "gelu_tanh" else "none"
        return self._op(lambda: functional.gelu(x.tensor, approximate=approximate))

    def silu_gate(self, gate: Box, up: Box) -> Box:
        return self._op(lambda: functional.silu(gate.tensor).mul_(up.tensor))

    def patch_embed(self, pixels: Box, vision: VisionSpec) -> Box:  # noqa: ARG002  # tiles come from the prompts
        at = f"{VISION}.embeddings"

        def compute() -> Tensor:
            kernel, bias, table = (
                torch.from_numpy(self.tensors.vector(f"{at}.{name}"))
                for name in ("patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight")
            )
            positions = table[torch.from_numpy(position_ids(vision.grid))]
            out = torch.empty((len(self.prompts.tiles) * vision.patches, vision.hidden))
            for i in range(len(self.prompts.tiles)):
                tile = torch.from_numpy(self.prompts.pixels(self.prompts.tiles[i : i + 1]))
                rows = functional.conv2d(tile, kernel, bias, stride=vision.patch_size)[0].flatten(1).T  # [P, C]
                torch.add(rows, positions, out=out[i * vision.patches : (i + 1) * vision.patches])
            return out

        return self._op(compute)

    def attend_all(self, q: Box, k: Box, v: Box, heads: int) -> Box:
        patches = self.spec.vision.patches

        def compute() -> Tensor:
            out = torch.empty((len(q.tensor), q.tensor.shape[1]))
            for start in range(0, len(out), patches):
                queries, keys, values = (
                    box.tensor[start : start + patches].unflatten(1, (heads, -1)).transpose(0, 1)[None]
                    for box in (q, k, v)
                )
                attended = functional.scaled_dot_product_attention(queries, keys, values)[0]  # [H, P, D]
                out[start : start + patches] = attended.transpose(0, 1).flatten(1)
            return out

        return self._op(compute)

    def attend_cached(self, qkv: Box, layer: int, text: TextSpec) -> Box:
        width, kv = text.heads * text.head_dim, text.kv_heads * text.head_dim

        def compute() -> Tensor:
            q, k, v = (
                part.unflatten(1, (-1, text.head_dim)) for part in qkv.tensor.split([width, kv, kv], dim=1)
            )  # [tokens, heads, D]
            q = self._rotated(q)
            k, v = self._attended(layer, self._rotated(k), v)
            out = torch.empty((len(q), width))
            start = 0
            for length in self._lengths:
                one = slice(start, start + length)
                queries, keys, values = (part[one].transpose(0, 1)[None] for part in (q, k, v))
                attended = functional.scaled_dot_product_attention(
                    queries, keys, values, is_causal=True, enable_gqa=True
                )[0]  # [H, T, D]
                out[one] = attended.transpose(0, 1).flatten(1)
                start += length
            return out

        return self._op(compute)

    def _rotated(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * self._cos - b * self._sin, b * self._cos + a * self._sin], dim=-1)

    def pixel_shuffle(self, x: Box, grid: int, factor: int) -> Box:
        side = grid // factor
        return self._op(
            lambda: (
                x.tensor.reshape(-1, side, factor, side, factor, x.tensor.shape[1])
                .transpose(2, 3)
                .reshape(-1, x.tensor.shape[1] * factor**2)
            )
        )

    def last_rows(self, x: Box) -> Box:
        return x if self._every_row else self._op(lambda: x.tensor[self.answer_rows()])

    def answer_rows(self) -> Tensor:
        """i64, the rows whose next token is one of an answer's; of a prompt without one, its last row."""
        rows, start = [], 0
        for length, answer in zip(self._lengths, self.prompts.answer, strict=True):
            rows.append(np.arange(start + answer - 1, start + max(answer, length - 1)))
            start += length
        return torch.from_numpy(np.concatenate(rows))


@torch.inference_mode()
def run_vision(ops: TorchOps) -> Box:
    """The features of all tiles, f32 [tiles * L, hidden]; an empty box where the run is being caught up with."""
    if not len(ops.prompts.tiles):
        return Box(torch.empty((0, ops.spec.text.hidden)))
    return vision_tower(ops, ops.spec, Box(None))


@torch.inference_mode()
def run_decoder(ops: TorchOps, features: Box) -> F32:
    """Logits at the answers' tokens (or every one), f32 [rows, vocab], features in the place of image tokens."""

    def embedded() -> Tensor:
        ids = np.concatenate([np.array(i, dtype=np.int64) for i in ops.prompts.ids])
        x = torch.from_numpy(ops.tensors.rows(EMBED, ids))
        image = torch.from_numpy(ids == ops.spec.image_token_id)
        if image.any():
            x[image] = features.tensor
        return x

    x = Box(None) if features.value is None and len(ops.prompts.tiles) else Box(embedded())
    return np.asarray(decoder(ops, ops.spec, x).tensor.numpy())
