"""Each operation of the executor means what torch and coremltools mean by it; our exporter has no part in this."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # its usual name

from runtimes.mil import _dequantize
from runtimes.mil_ops import MOVES, OPERATIONS, OperationError
from runtimes.mil_package import DEQUANTIZE

coremltools = pytest.importorskip("coremltools")
from coremltools.converters.mil.mil import Builder as mb  # noqa: E402, N813
from coremltools.converters.mil.mil import Function, types  # noqa: E402

R = np.random.default_rng(0)


def floats(*shape: int, scale: float = 1.0) -> Any:
    return (R.standard_normal(shape) * scale).astype(np.float32)


X, Y = floats(2, 3, 8), floats(2, 3, 8)
Q, K, V = floats(1, 2, 5, 8), floats(1, 2, 7, 8), floats(1, 2, 7, 8)
MASK = np.where(R.random((1, 1, 5, 7)) < 0.4, np.float32(-30000), np.float32(0))
MASK[..., 0] = 0
WIDE = floats(2, 3, 8, scale=40)
I32 = np.int32


@dataclass(frozen=True)
class Example:
    """inputs: of the operation; expected: by torch; known: coremltools computes its value too."""

    kind: str
    inputs: Mapping[str, Any]
    expected: Callable[[], Any]
    known: bool = True


def t(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def rows(x: Any, axis: int, *indices: int) -> Any:
    return t(x).index_select(axis, torch.tensor(indices))


def updated() -> Any:
    out = t(X).clone()
    out[1:2, 0:3, 2:6] = t(floats_update)
    return out


floats_update = floats(1, 3, 4)
PICTURE, KERNEL = floats(1, 3, 14, 15), floats(6, 3, 4, 4)
GAMMA, BETA, MATRIX, BIAS = floats(8), floats(8), floats(5, 8), floats(5)

EXAMPLES = [
    Example("abs", {"x": X}, lambda: t(X).abs()),
    Example("add", {"x": X, "y": Y[:, :, :1]}, lambda: t(X) + t(Y[:, :, :1])),
    Example("cast", {"x": X, "dtype": "fp32"}, lambda: t(X)),
    Example("concat", {"values": [X, Y], "axis": -1}, lambda: torch.cat([t(X), t(Y)], -1)),
    Example("concat", {"values": [X, Y], "axis": 0}, lambda: torch.cat([t(X), t(Y)], 0)),
    Example(
        "conv",
        {"x": PICTURE, "weight": KERNEL, "bias": floats(6) * 0 + 2, "strides": [4, 4], "pad_type": "valid"},
        lambda: F.conv2d(t(PICTURE), t(KERNEL), torch.full((6,), 2.0), stride=4),
        known=False,
    ),
    Example("gather", {"x": X, "indices": np.array([2], I32), "axis": 1}, lambda: rows(X, 1, 2)),
    Example("gather", {"x": X, "indices": np.array([1, 0, 1], I32), "axis": 0}, lambda: rows(X, 0, 1, 0, 1)),
    Example("gelu", {"x": WIDE, "mode": "EXACT"}, lambda: F.gelu(t(WIDE))),
    Example("gelu", {"x": WIDE, "mode": "TANH_APPROXIMATION"}, lambda: F.gelu(t(WIDE), approximate="tanh")),
    Example("identity", {"x": X}, lambda: t(X)),
    Example(
        "layer_norm",
        {"x": WIDE, "axes": [-1], "gamma": GAMMA, "beta": BETA, "epsilon": np.float32(1e-6)},
        lambda: F.layer_norm(t(WIDE), (8,), t(GAMMA), t(BETA), 1e-6),
    ),
    Example("linear", {"x": X, "weight": MATRIX, "bias": BIAS}, lambda: F.linear(t(X), t(MATRIX), t(BIAS))),
    Example("maximum", {"x": X, "y": np.float32(0.25)}, lambda: t(X).clamp_min(0.25)),
    Example("mul", {"x": X, "y": Y}, lambda: t(X) * t(Y)),
    Example("real_div", {"x": X, "y": Y}, lambda: t(X) / t(Y)),
    Example("real_div", {"x": np.float32(0.5), "y": Y}, lambda: 0.5 / t(Y)),
    Example("reduce_max", {"x": X, "axes": [-1], "keep_dims": True}, lambda: t(X).amax(-1, keepdim=True)),
    Example("reduce_mean", {"x": X, "axes": [-1], "keep_dims": True}, lambda: t(X).mean(-1, keepdim=True)),
    Example("reshape", {"x": X, "shape": [3, -1, 4]}, lambda: t(X).reshape(3, -1, 4)),
    Example("rsqrt", {"x": np.abs(X), "epsilon": np.float32(0.01)}, (t(X).abs() + 0.01).rsqrt),
    Example(
        "scaled_dot_product_attention",
        {"query": Q, "key": K, "value": V, "attn_mask": MASK},
        lambda: F.scaled_dot_product_attention(t(Q), t(K), t(V), t(MASK)),
    ),
    Example(
        "scaled_dot_product_attention",
        {"query": Q * 30, "key": K * 30, "value": V},
        lambda: F.scaled_dot_product_attention(t(Q * 30), t(K * 30), t(V)),
    ),
    Example("silu", {"x": WIDE}, lambda: F.silu(t(WIDE)), known=False),
    Example("slice_by_size", {"x": X, "begin": [1, 0, 3], "size": [1, -1, 4]}, lambda: t(X)[1:2, :, 3:7]),
    Example("slice_update", {"x": X, "update": floats_update, "begin": [1, 0, 2], "end": [2, 3, 6]}, updated),
    Example("split", {"x": X, "num_splits": 2, "axis": -1}, lambda: t(X).split(4, -1)),
    Example("split", {"x": X, "split_sizes": [3, 5], "axis": 2}, lambda: t(X).split([3, 5], 2)),
    Example("tile", {"x": X, "reps": [1, 2, 3]}, lambda: t(X).repeat(1, 2, 3)),
    Example("transpose", {"x": X, "perm": [0, 2, 1]}, lambda: t(X).permute(0, 2, 1)),
]


def listed(result: Any) -> list[Any]:
    return [np.asarray(part) for part in (result if isinstance(result, (tuple, list)) else [result])]


def by_coremltools(example: Example) -> list[Any] | None:
    """The value that coremltools itself gives the operation when all inputs are constants."""
    with Function({}, opset_version=coremltools.target.iOS18):
        made = getattr(mb, example.kind)(**example.inputs)
    values = [part.val for part in (made if isinstance(made, (tuple, list)) else [made])]
    return None if any(value is None for value in values) else listed(values)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.kind)
def test_an_operation_means_what_torch_and_coremltools_mean(example: Example) -> None:
    found = listed(OPERATIONS[example.kind](example.inputs))
    for part, wanted in zip(found, listed(example.expected()), strict=True):
        assert part.shape == wanted.shape
        assert np.abs(part - wanted).max() <= 2e-6 * max(1, float(np.abs(wanted).max()))
    inferred = by_coremltools(example)
    assert (inferred is not None) == example.known
    for part, wanted in zip(found, inferred or found, strict=True):
        assert part.shape == wanted.shape
        assert np.abs(part - wanted).max() <= 2e-6 * max(1, float(np.abs(wanted).max()))


def test_every_operation_has_an_example() -> None:
    assert {e.kind for e in EXAMPLES} == set(OPERATIONS)
    assert MOVES - {"read_state"} <= set(OPERATIONS)


@pytest.mark.parametrize(
    ("name", "width", "blocks", "with_offset"),
    [("uint4", 32, 4, True), ("uint8", 32, 2, True), ("int8", 12, 1, False), ("int4", 24, 12, False)],
)
def test_dequantized_blocks_are_coremltools_own(name: str, width: int, blocks: int, with_offset: bool) -> None:
    low, high = {"uint4": (0, 16), "uint8": (0, 256), "int8": (-128, 128), "int4": (-8, 8)}[name]
    kind = types.nptype_from_builtin(getattr(types, name))
    data = R.integers(low, high, (6, width)).astype(kind)
    scale = np.abs(floats(6, blocks)).astype(np.float16)
    offset = R.integers(low, high, (6, blocks)).astype(kind) if with_offset else None
    with Function({}, opset_version=coremltools.target.iOS18):
        made = mb.constexpr_blockwise_shift_scale(data=data, scale=scale, offset=offset)
    # coremltools multiplies in fp16; in f32 the same integers and scales give the same before it is rounded
    wanted = made.op.decompress(data, scale.astype(np.float32), None if offset is None else offset.astype(np.float32))
    found = _dequantize(data, scale.astype(np.float32), offset, half=False)
    assert np.array_equal(found, wanted)
    rounded = _dequantize(data, scale.astype(np.float32), offset, half=True)
    assert np.array_equal(rounded, made.op.materialized_val_inference().astype(np.float32))
    assert made.op.op_type == DEQUANTIZE


@pytest.mark.parametrize(
    ("kind", "inputs", "message"),
    [
        ("slice_by_size", {"x": X, "begin": [0, 0, 5], "size": [2, 3, 4]}, "rows"),
        ("slice_update", {"x": X, "update": floats(1, 3, 4), "begin": [1, 0, 6], "end": [2, 3, 10]}, "rows"),
        ("slice_update", {"x": X, "update": floats(1, 3, 3), "begin": [1, 0, 2], "end": [2, 3, 6]}, "an update of"),
        (
            "slice_update",
            {"x": X, "update": X, "begin": [0, 0, 0], "end": [2, 3, 8], "stride": [1, 1, 2]},
            "stride",
        ),
        ("split", {"x": X, "split_sizes": [3, 4], "axis": 2}, "parts of"),
        ("concat", {"values": [X, X], "axis": 0, "interleave": True}, "interleave"),
        ("reshape", {"x": X, "shape": [0, 24]}, "0 is not supported"),
        ("gather", {"x": X, "indices": np.array([3], I32), "axis": 1}, "index"),
        ("gather", {"x": X, "indices": np.array([-1], I32), "axis": 1}, "index"),
        ("cast", {"x": X, "dtype": "int32"}, "dtype"),
        ("gelu", {"x": X, "mode": "SIGMOID_APPROXIMATION"}, "mode"),
        ("conv", {"x": PICTURE, "weight": KERNEL, "strides": [2, 2], "pad_type": "valid"}, "separate patches"),
        ("conv", {"x": PICTURE, "weight": KERNEL, "strides": [4, 4], "pad_type": "same"}, "separate patches"),
        ("scaled_dot_product_attention", {"query": Q, "key": K, "value": V, "attn_mask": MASK == 0}, "truth values"),
    ],
)
def test_what_an_operation_does_not_take_is_refused(kind: str, inputs: Mapping[str, Any], message: str) -> None:
    with pytest.raises(OperationError, match=message):
        OPERATIONS[kind](inputs)
