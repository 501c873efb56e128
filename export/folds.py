"""Where the architecture lets a channel be multiplied in one tensor and divided in another, and nothing else change.

    norm -> q, k, v      norm -> gate, up      norm -> fc1      norm -> head (where it is not the embedding)
    v -> o               up -> down

A factor moves weight from the inputs of a product to its matrix: what SmoothQuant (Xiao et al., arXiv:2211.10438) and
AWQ (Lin et al., arXiv:2306.00978) do against channels that are much larger than the others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from export.smolvlm import HEAD, TEXT, VISION
from export.spec import ModelSpec
from export.weights import WeightSource
from quantize.int4 import F32


@dataclass(frozen=True)
class Fold:
    """Channels between two products.

    writers: tensors of [C, ...] whose rows make the channels: each may be divided by a factor of its own.
    readers: matrices [N, C * repeats] whose columns take the channels.
    repeats, width: consecutive runs of `width` channels are each read `repeats` times (heads that share a kv head).
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    repeats: int = 1
    width: int = 1

    def spread(self, channels: F32) -> F32:
        """Per channel [C] -> per column of the readers [C * repeats]."""
        runs = channels.reshape(-1, 1, self.width)
        return np.ascontiguousarray(np.broadcast_to(runs, (len(runs), self.repeats, self.width)).reshape(-1))

    def gathered(self, columns: F32) -> F32:
        """Per column of the readers -> [repeats, C]: what each channel is to each of its uses."""
        return np.ascontiguousarray(
            columns.reshape(-1, self.repeats, self.width).swapaxes(0, 1).reshape(self.repeats, -1)
        )


def folds(spec: ModelSpec) -> Iterator[Fold]:
    """Every fold of the architecture, in the order of the graphs."""
    for i in range(spec.vision.layers):
        at = f"{VISION}.encoder.layers.{i}"
        qkv = tuple(f"{at}.self_attn.{p}_proj.weight" for p in "qkv")
        value = (qkv[2], f"{at}.self_attn.v_proj.bias")
        yield Fold((f"{at}.layer_norm1.weight", f"{at}.layer_norm1.bias"), qkv)
        yield Fold(value, (f"{at}.self_attn.out_proj.weight",))
        yield Fold((f"{at}.layer_norm2.weight", f"{at}.layer_norm2.bias"), (f"{at}.mlp.fc1.weight",))
    text = spec.text
    for i in range(text.layers):
        at = f"{TEXT}.layers.{i}"
        qkv = tuple(f"{at}.self_attn.{p}_proj.weight" for p in "qkv")
        gate, up, down = (f"{at}.mlp.{p}_proj.weight" for p in ("gate", "up", "down"))
        yield Fold((f"{at}.input_layernorm.weight",), qkv)
        yield Fold((qkv[2],), (f"{at}.self_attn.o_proj.weight",), text.heads // text.kv_heads, text.head_dim)
        yield Fold((f"{at}.post_attention_layernorm.weight",), (gate, up))
        yield Fold((up,), (down,))
    if not text.tied:
        yield Fold((f"{TEXT}.norm.weight",), (HEAD,))


class Folded(WeightSource):
    """A WeightSource with factors folded in.

    Args:
        factors: pairs of a fold and its factors, f32 [C], each above 0; powers of two leave every product of the
            model bit for bit as it was.
    """

    def __init__(self, weights: WeightSource, factors: Sequence[tuple[Fold, F32]]) -> None:
        self._weights = weights
        self.columns: dict[str, F32] = {}  # by what the columns of a matrix are multiplied, its inputs divided
        self._rows: dict[str, F32] = {}
        for fold, factor in factors:
            self._rows |= {name: np.reciprocal(factor) for name in fold.writers}
            self.columns |= {name: fold.spread(factor) for name in fold.readers}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._weights.shape(name)

    def rows(self, name: str, start: int, stop: int) -> F32:
        """Rows [start, stop) of a tensor's first dimension. Raises CheckpointError as the weights do."""
        rows = self._weights.rows(name, start, stop)
        if (divided := self._rows.get(name)) is not None:
            rows = rows * divided[start:stop].reshape(-1, *[1] * (rows.ndim - 1))
        if (multiplied := self.columns.get(name)) is not None:
            rows = rows * multiplied
        return rows
