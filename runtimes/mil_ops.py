"""What the operations of a MIL program mean, in NumPy.

Each function takes an operation's inputs by their MIL names and gives its outputs. Floats are f32 whatever the program
declares; rounding is the executor's business. The meaning is that of coremltools' operation reference (iOS 15 to 18);
what an operation could also do, and no program here does, is refused.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Inputs = Mapping[str, Any]


class OperationError(ValueError):
    """Inputs that an operation does not take, or that are not supported."""


def _integers(value: Any) -> list[int]:
    return [int(v) for v in np.atleast_1d(value)]


def _slice_by_size(i: Inputs) -> Array:
    x, begin, size = i["x"], _integers(i["begin"]), _integers(i["size"])
    if not len(begin) == len(size) == x.ndim:
        raise OperationError(f"begin {begin} and size {size} of a tensor of {list(x.shape)}")
    ends = [d if s == -1 else b + s for b, s, d in zip(begin, size, x.shape, strict=True)]
    if any(not 0 <= b < e <= d for b, e, d in zip(begin, ends, x.shape, strict=True)):
        raise OperationError(f"rows {begin} to {ends} of a tensor of {list(x.shape)}")
    # a copy: what was read from a state must not change when the state does
    return np.array(x[tuple(slice(b, e) for b, e in zip(begin, ends, strict=True))])


def update_region(i: Inputs) -> tuple[slice, ...]:
    """The part of x that a slice_update replaces. Raises OperationError if it leaves x or `update` does not fit."""
    x, update, begin, end = i["x"], i["update"], _integers(i["begin"]), _integers(i["end"])
    for name in ("stride", "begin_mask", "end_mask", "squeeze_mask"):
        if name in i and any(int(v) != (name == "stride") for v in np.atleast_1d(i[name])):
            raise OperationError(f"{name} is {np.atleast_1d(i[name]).tolist()}, which is not supported")
    if not len(begin) == len(end) == x.ndim or any(
        not 0 <= b < e <= d for b, e, d in zip(begin, end, x.shape, strict=True)
    ):
        raise OperationError(f"rows {begin} to {end} of a tensor of {list(x.shape)}")
    region = tuple(slice(b, e) for b, e in zip(begin, end, strict=True))
    if tuple(e - b for b, e in zip(begin, end, strict=True)) != update.shape:
        raise OperationError(f"an update of {list(update.shape)} for rows {begin} to {end}")
    return region


def _slice_update(i: Inputs) -> Array:
    out: Array = np.array(i["x"])
    out[update_region(i)] = i["update"]
    return out


def _split(i: Inputs) -> tuple[Array, ...]:
    x, axis = i["x"], int(i["axis"])
    if "split_sizes" in i:
        sizes = _integers(i["split_sizes"])
    else:
        count = max(1, int(i["num_splits"]))
        sizes = [x.shape[axis] // count] * count
    if sum(sizes) != x.shape[axis]:
        raise OperationError(f"parts of {sizes} of axis {axis} of a tensor of {list(x.shape)}")
    return tuple(np.split(x, np.cumsum(sizes)[:-1], axis=axis))


def _concat(i: Inputs) -> Array:
    if i.get("interleave", False):
        raise OperationError("interleave is true, which is not supported")
    return np.concatenate(i["values"], axis=int(i["axis"]))


def _reshape(i: Inputs) -> Array:
    shape = _integers(i["shape"])
    if 0 in shape:
        raise OperationError(f"shape {shape}, where 0 is not supported")
    return np.asarray(i["x"].reshape(shape))


def _gather(i: Inputs) -> Array:
    axis = int(i["axis"])
    if int(i.get("batch_dims", 0)):
        raise OperationError("batch_dims, which is not supported")
    x, indices = i["x"], np.asarray(i["indices"])
    if indices.min() < 0 or indices.max() >= x.shape[axis]:
        raise OperationError(f"index {indices.tolist()} of axis {axis} of a tensor of {list(x.shape)}")
    return np.asarray(np.take(x, indices, axis=axis))


def _cast(i: Inputs) -> Array:
    if i["dtype"] not in ("fp16", "fp32"):
        raise OperationError(f"dtype is {i['dtype']}, want fp16 or fp32")
    return np.asarray(i["x"], dtype=np.float32)


def _linear(i: Inputs) -> Floats:
    product: Floats = i["x"] @ i["weight"].T
    if "bias" in i:
        product += i["bias"]
    return product


def _conv(i: Inputs) -> Floats:
    """A convolution whose kernels do not overlap: patches times a matrix."""
    x, weight = i["x"], i["weight"]  # [B, C, H, W], [N, C, h, w]
    h, w = weight.shape[2:]
    strides = _integers(i["strides"])
    plain = i["pad_type"] == "valid" and int(i.get("groups", 1)) == 1
    if not plain or strides != [h, w] or set(_integers(i.get("dilations", [1, 1]))) != {1} or len(x) != 1:
        raise OperationError("a convolution that is not one of separate patches of one picture, valid, in one group")
    rows, columns = x.shape[2] // h, x.shape[3] // w
    patches = x[0, :, : rows * h, : columns * w].reshape(-1, rows, h, columns, w).transpose(1, 3, 0, 2, 4)
    out = patches.reshape(rows * columns, -1) @ weight.reshape(len(weight), -1).T
    if "bias" in i:
        out += i["bias"]
    return np.ascontiguousarray(out.T).reshape(1, len(weight), rows, columns)


def _layer_norm(i: Inputs) -> Floats:
    x = i["x"]
    axes = tuple(_integers(i["axes"]))
    centred = x - x.mean(axis=axes, keepdims=True)
    variance = (centred * centred).mean(axis=axes, keepdims=True)
    out: Floats = centred / np.sqrt(variance + np.float32(i["epsilon"]))
    if "gamma" in i:
        out *= i["gamma"]
    if "beta" in i:
        out += i["beta"]
    return out


def _gelu(i: Inputs) -> Floats:
    x: Floats = i["x"]
    match i["mode"]:
        case "TANH_APPROXIMATION":
            inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
            return np.asarray(np.float32(0.5) * x * (1 + np.tanh(inner)))
        case "EXACT":
            erf = np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2))
            return np.asarray(0.5 * x * (1 + erf), dtype=np.float32)
        case mode:
            raise OperationError(f"mode is {mode}, want TANH_APPROXIMATION or EXACT")


def _silu(i: Inputs) -> Floats:
    x: Floats = i["x"]
    with np.errstate(over="ignore"):  # exp(-x) of a very negative x is infinite, and x / inf is right
        return np.asarray(x / (1 + np.exp(-x)))


def _attention(i: Inputs) -> Floats:
    """softmax(q k^T / sqrt(E) + mask) v"""
    q, k, v = i["query"], i["key"], i["value"]  # [B, ..., L, E], [B, ..., S, E], [B, ..., S, EV]
    scores = (q * np.float32(1 / math.sqrt(q.shape[-1]))) @ np.swapaxes(k, -1, -2)
    if "attn_mask" in i:
        if i["attn_mask"].dtype == np.bool_:
            raise OperationError("a mask of truth values, which is not supported")
        scores += i["attn_mask"]
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return np.asarray(scores @ v)


def _axes(i: Inputs) -> dict[str, Any]:
    return {"axis": tuple(_integers(i["axes"])), "keepdims": bool(i["keep_dims"])}


# kind -> (inputs that it needs, that it may have)
SIGNATURES: Mapping[str, tuple[str, str]] = {
    "abs": ("x", ""),
    "add": ("x y", ""),
    "cast": ("x dtype", ""),
    "concat": ("values axis", "interleave"),
    "conv": ("x weight pad_type strides", "bias dilations groups pad"),
    "gather": ("x indices axis", "batch_dims validate_indices"),
    "gelu": ("x mode", ""),
    "identity": ("x", ""),
    "layer_norm": ("x axes epsilon", "gamma beta"),
    "linear": ("x weight", "bias"),
    "maximum": ("x y", ""),
    "mul": ("x y", ""),
    "real_div": ("x y", ""),
    "reduce_max": ("x axes keep_dims", ""),
    "reduce_mean": ("x axes keep_dims", ""),
    "reshape": ("x shape", ""),
    "rsqrt": ("x epsilon", ""),
    "scaled_dot_product_attention": ("query key value", "attn_mask"),
    "silu": ("x", ""),
    "slice_by_size": ("x begin size", ""),
    "slice_update": ("x update begin end", "stride begin_mask end_mask squeeze_mask"),
    "split": ("x axis", "split_sizes num_splits"),
    "tile": ("x reps", ""),
    "transpose": ("x perm", ""),
}


def result_shape(kind: str, i: Inputs) -> tuple[int, ...] | None:
    """The shape of a result that may be much larger than what it is made of; None for all others."""
    match kind:
        case "add" | "maximum" | "mul" | "real_div":
            return np.broadcast_shapes(np.shape(i["x"]), np.shape(i["y"]))
        case "tile":
            return tuple(d * r for d, r in zip(i["x"].shape, _integers(i["reps"]), strict=True))
        case "linear":
            return (*i["x"].shape[:-1], i["weight"].shape[0])
        case "gather":
            axis = int(i["axis"])
            return (*i["x"].shape[:axis], *np.shape(i["indices"]), *i["x"].shape[axis + 1 :])
    return None


# Values go through these unchanged, so that they need no rounding.
MOVES = frozenset(
    [
        "concat",
        "gather",
        "identity",
        "read_state",
        "reshape",
        "slice_by_size",
        "slice_update",
        "split",
        "tile",
        "transpose",
    ]
)

OPERATIONS: Mapping[str, Callable[[Inputs], Any]] = {
    "abs": lambda i: np.abs(i["x"]),
    "add": lambda i: i["x"] + i["y"],
    "cast": _cast,
    "concat": _concat,
    "conv": _conv,
    "gather": _gather,
    "gelu": _gelu,
    "identity": lambda i: i["x"],
    "layer_norm": _layer_norm,
    "linear": _linear,
    "maximum": lambda i: np.maximum(i["x"], i["y"]),
    "mul": lambda i: i["x"] * i["y"],
    "real_div": lambda i: i["x"] / i["y"],
    "reduce_max": lambda i: np.max(i["x"], **_axes(i)),
    "reduce_mean": lambda i: np.mean(i["x"], **_axes(i)),
    "reshape": _reshape,
    "rsqrt": lambda i: 1 / np.sqrt(i["x"] + np.float32(i["epsilon"])),
    "scaled_dot_product_attention": _attention,
    "silu": _silu,
    "slice_by_size": _slice_by_size,
    "slice_update": _slice_update,
    "split": _split,
    "tile": lambda i: np.tile(i["x"], _integers(i["reps"])),
    "transpose": lambda i: np.transpose(i["x"], _integers(i["perm"])),
}
