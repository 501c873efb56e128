"""Weights in few bits: blocks with a scale and a zero point, or one scale per output channel.

Both formats are affine, w = scale * (q - zero), and every scale is representable in fp16, rounded before
the integers are chosen: ONNX (fp32 scales) and Core ML (fp16 scales) carry the same integers.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

CHUNK = 1 << 19  # weights worked on at a time by a thread: large enough that threads seldom wait for the lock
# Ranges tried, as a part of the block's full range: the fewer the bits, the more of the range is worth giving up.
SHRINK = {2: (1.0, 0.88, 0.76, 0.64, 0.52), 3: (1.0, 0.92, 0.84, 0.76, 0.68), 4: (1.0, 0.92, 0.84), 8: (1.0,)}
FP16_MAX, FP16_TINY = 65504.0, 2.0**-24


@dataclass(frozen=True)
class QTensor:
    """A matrix in blocks along its rows (the layout of ONNX Runtime's MatMulNBits).

    packed: u8 [N, blocks, block * bits / 8], the low nibble first; a row's last block is padded with zero points.
        2 and 3 bits are for comparing methods and lie a byte each.
    scales: f16 [N, blocks].
    zeros: u8 [N, blocks], one zero point each (not packed).
    shape: (N, K) of the matrix.
    """

    packed: U8
    scales: npt.NDArray[np.float16]
    zeros: U8
    shape: tuple[int, int]
    bits: int
    block: int


@dataclass(frozen=True)
class ColumnTensor:
    """A matrix in signed 8 bits with one scale per output channel (a column of ONNX's B).

    values: i8 [N, K]; scales: f16 [N]; the zero point is 0.
    """

    values: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float16]


def pack(values: U8, bits: int) -> U8:
    """u8 [..., n] below 2**bits -> u8 [..., n * bits / 8], the low nibble first; only 4 bits share bytes."""
    if bits != 4:
        return values
    return np.ascontiguousarray(values[..., 0::2] | (values[..., 1::2] << 4))


def unpack(packed: U8, bits: int) -> U8:
    """The inverse of `pack`."""
    if bits != 4:
        return packed
    out = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.uint8)
    out[..., 0::2] = packed & 15
    out[..., 1::2] = packed >> 4
    return out


def _fp16_scale(scale: F32) -> F32:
    """Rounded to fp16; a block too small for any scale gets 1 (its integers are then all zero points)."""
    rounded = scale.astype(np.float16).astype(np.float32)
    return np.where(rounded < FP16_TINY, np.float32(1), rounded)


def affine(
    w: F32, bits: int, *, symmetric: bool = False, fit: bool = True, importance: F32 | None = None
) -> tuple[U8, F32, U8]:
    """Rounds blocks to integers, each block with its scale and zero point.

    With `fit`, each block's squared error is minimised: every range of SHRINK is tried, and for given integers the
    best scale is the least-squares solution sum(h w (q - z)) / sum(h (q - z)^2), which leaves
    sum(h w^2) - sum(h w (q - z))^2 / sum(h (q - z)^2): the range that leaves least wins, and the integers are chosen
    again for its best scale. Without it, the block's full range is divided evenly (plain round-to-nearest).

    Args:
        w: f32 [n, block].
        importance: f32 [n, block], what an error of each weight counts (h); None: all the same.

    Returns:
        Integers [n, block], scales [n] representable in fp16, zero points [n].

    Raises:
        ValueError: a block needs a scale beyond fp16.
    """
    # Blocks lie in columns while they are worked on: NumPy reduces and broadcasts along rows many times faster.
    w = np.ascontiguousarray(w.T)  # [block, n]
    weighted = w if importance is None else w * np.ascontiguousarray(importance.T)
    top = np.float32(2**bits - 1)
    mid = np.float32(2 ** (bits - 1))
    low = np.minimum(w.min(axis=0), 0)
    high = np.maximum(w.max(axis=0), 0)
    if symmetric:
        full = np.maximum(-low / mid, high / (mid - 1))
    else:
        full = (high - low) / top
    if (peak := float(full.max(initial=0))) > FP16_MAX:
        raise ValueError(f"a block needs the scale {peak:.3g}, beyond fp16's {FP16_MAX:.0f}")

    q = np.empty_like(w)

    def round_to(scale: F32, zero: F32) -> None:
        """Fills q with q - z."""
        np.multiply(w, 1 / scale, out=q)
        np.rint(q, out=q)
        np.maximum(q, -zero, out=q)
        np.minimum(q, top - zero, out=q)

    def zero_points(scale: F32, shrink: np.float32) -> F32:
        return np.full_like(scale, mid) if symmetric else np.clip(np.rint(-low * shrink / scale), 0, top)

    if fit:
        best = np.full_like(full, -1)
        scales, zeros = np.empty_like(full), np.empty_like(full)
        for shrink in map(np.float32, SHRINK[bits]):
            scale = _fp16_scale(full * shrink)
            zero = zero_points(scale, shrink)
            round_to(scale, zero)
            product = np.einsum("ij,ij->j", weighted, q)
            square = np.einsum("ij,ij->j", q, q) if importance is None else np.einsum("ij,ji,ij->j", q, importance, q)
            solved = np.divide(product, square, out=np.zeros_like(product), where=square > 0)
            removed = product * solved
            better = removed > best
            best = np.where(better, removed, best)
            scales = np.where(better, np.where(solved > 0, solved, scale), scales)
            zeros = np.where(better, zero, zeros)
        scales = _fp16_scale(np.minimum(scales, FP16_MAX))
    else:
        scales = _fp16_scale(full)
        zeros = zero_points(scales, np.float32(1))
    round_to(scales, zeros)
    np.add(q, zeros, out=q)
    return q.astype(np.uint8).T, scales, zeros.astype(np.uint8)


def by_rows(work: Callable[[int, int], None], rows: int, rows_at_once: int) -> None:
    """Runs work(start, stop) over row ranges in a thread for each core (NumPy releases the lock)."""
    starts = range(0, rows, rows_at_once)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda start: work(start, min(start + rows_at_once, rows)), starts):
            pass


def quantize_blocks(
    read_rows: Callable[[int, int], F32],
    shape: tuple[int, int],
    *,
    bits: int,
    block: int,
    symmetric: bool = False,
    fit: bool = True,
    importance: F32 | None = None,
) -> QTensor:
    """Quantizes a matrix, some rows at a time, each weight by itself; arguments not named here as in `affine`.

    Args:
        read_rows: (start, stop) -> f32 [stop - start, K]; called from several threads.
        shape: (N, K). K need not be a multiple of `block`.
        bits: 4 or 8 (2 and 3 where methods are compared).
        block: weights along K that share a scale; even.
        symmetric: zero point 2**(bits-1) everywhere; otherwise each block has its own.
        importance: f32 [K], what an error in each input's weights counts.

    Raises:
        ValueError: bits or block out of range, or weights too large for an fp16 scale.
    """
    n, k = shape
    tensor = empty_blocks(shape, bits, block)
    blocks, padding = tensor.scales.shape[1], tensor.scales.shape[1] * block - k
    counts = None if importance is None else np.pad(importance, (0, padding)).reshape(blocks, block)

    def work(start: int, stop: int) -> None:
        rows = read_rows(start, stop)
        if padding:
            rows = np.pad(rows, ((0, 0), (0, padding)))
        each = None if counts is None else np.tile(counts, (stop - start, 1))
        q, s, z = affine(rows.reshape(-1, block), bits, symmetric=symmetric, fit=fit, importance=each)
        tensor.packed[start:stop] = pack(q, bits).reshape(stop - start, blocks, -1)
        tensor.scales[start:stop] = s.reshape(stop - start, blocks)
        tensor.zeros[start:stop] = z.reshape(stop - start, blocks)

    by_rows(work, n, max(1, CHUNK // (blocks * block)))
    return tensor


def empty_blocks(shape: tuple[int, int], bits: int, block: int) -> QTensor:
    """A QTensor to be filled. Raises ValueError if bits or block are out of range."""
    if bits not in SHRINK:
        raise ValueError(f"bits is {bits}, want 4 or 8")
    if block < 2 or block % 2:
        raise ValueError(f"block is {block}, want an even number")
    n, blocks = shape[0], -(-shape[1] // block)
    return QTensor(
        np.empty((n, blocks, block // 2 if bits == 4 else block), dtype=np.uint8),
        np.empty((n, blocks), dtype=np.float16),
        np.empty((n, blocks), dtype=np.uint8),
        shape,
        bits,
        block,
    )


def dequantize(tensor: QTensor) -> F32:
    """The matrix that the integers stand for: f32 [N, K]."""
    n, k = tensor.shape
    out = np.empty((n, k), dtype=np.float32)

    def work(start: int, stop: int) -> None:
        q = unpack(tensor.packed[start:stop], tensor.bits).astype(np.float32)
        q -= tensor.zeros[start:stop, :, None]
        q *= tensor.scales[start:stop, :, None].astype(np.float32)
        out[start:stop] = q.reshape(stop - start, -1)[:, :k]

    by_rows(work, n, max(1, CHUNK // k))
    return out


def quantize_columns(
    read_rows: Callable[[int, int], F32], shape: tuple[int, int], *, reduced_range: bool = False
) -> ColumnTensor:
    """Signed 8 bits per output channel, symmetric; arguments as in `quantize_blocks`.

    Args:
        reduced_range: use 7 bits (-64..63), for x86 processors without VNNI, whose u8 x s8 products
            saturate at 16 bits (ONNX Runtime's quantization documentation).
    """
    n, k = shape
    values = np.empty((n, k), dtype=np.int8)
    scales = np.empty(n, dtype=np.float16)
    top = np.float32(63 if reduced_range else 127)

    def work(start: int, stop: int) -> None:
        w = read_rows(start, stop)
        full = np.abs(w).max(axis=1) / top
        if (peak := float(full.max(initial=0))) > FP16_MAX:
            raise ValueError(f"a channel needs the scale {peak:.3g}, beyond fp16's {FP16_MAX:.0f}")
        scale = _fp16_scale(full)
        q = np.clip(np.rint(w / scale[:, None]), -top - 1, top)
        values[start:stop] = q.astype(np.int8)
        scales[start:stop] = scale

    by_rows(work, n, max(1, CHUNK // k))
    return ColumnTensor(values, scales)


def dequantize_columns(tensor: ColumnTensor) -> F32:
    """The matrix that the integers stand for: f32 [N, K]."""
    return tensor.values.astype(np.float32) * tensor.scales[:, None].astype(np.float32)


def as_floats(tensor: QTensor | ColumnTensor) -> F32:
    """f32 [N, K], what integers of either format stand for."""
    return dequantize(tensor) if isinstance(tensor, QTensor) else dequantize_columns(tensor)
