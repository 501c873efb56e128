"""Factors a channel, chosen so that rounding a matrix (or its inputs) costs less; powers of two, so that folding them
into the tensors around is exact.

Sources: Lin et al., AWQ (arXiv:2306.00978): weights of loud inputs enlarged before rounding. Xiao et al.,
SmoothQuant (arXiv:2211.10438): loud inputs made quieter before they are rounded themselves.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from quantize.int4 import F32, dequantize, quantize_blocks

STRENGTHS = tuple(i / 8 for i in range(9))  # how much of the channels' unevenness is moved: the exponents tried
MOST = 2.0**10  # a factor goes no further from 1 than this: fp16 constants must hold what is left
ROWS = 512  # of each matrix, spread over all of it, on which a strength is tried


def powers(factors: F32) -> F32:
    """The nearest powers of two, centred on 1 and kept within MOST of it."""
    exponents = np.log2(factors)
    exponents = np.rint(exponents - np.median(exponents))
    limit = np.log2(MOST)
    return np.asarray(np.exp2(np.clip(exponents, -limit, limit)), dtype=np.float32)


def sampled(count: int) -> slice:
    """Rows of a matrix of `count` on which to try: ROWS of them, evenly spread."""
    return slice(None, None, max(1, count // ROWS))


def _rows(matrix: F32, start: int, stop: int) -> F32:
    return matrix[start:stop]


def weight_factors(
    matrices: Sequence[F32], mean_square: F32, *, bits: int, block: int, symmetric: bool
) -> tuple[F32, float]:
    """Factors for matrices that read the same inputs and are rounded in blocks.

    The error of rounding is counted as sum_k m_k (w_k - q_k / s_k)^2, with m the inputs' mean square, which leaves out
    only that errors of different inputs may cancel.

    Args:
        matrices: f32 [rows, K] each, rows on which to try.
        mean_square: f32 [K].

    Returns:
        f32 [K], all ones where nothing is gained, and the error left as a part of that without factors.
    """
    w = np.concatenate(list(matrices))
    loudness = np.sqrt(np.maximum(mean_square, mean_square.mean() * 1e-6))
    best, least, plain = np.ones_like(loudness), np.inf, np.inf
    for strength in STRENGTHS:
        factors = powers(loudness**strength)
        scaled = w * factors
        tensor = quantize_blocks(
            partial(_rows, scaled),
            (w.shape[0], w.shape[1]),
            bits=bits,
            block=block,
            symmetric=symmetric,
            importance=mean_square / factors**2,
        )
        error = (dequantize(tensor) - scaled) / factors
        lost = float(np.einsum("nk,nk,k->", error, error, mean_square, dtype=np.float64))
        if strength == 0:
            plain = lost
        if lost < least:
            best, least = factors, lost
    return best, least / plain if plain > 0 else 1.0


def input_factors(matrices: Sequence[F32], low: F32, high: F32, mean_square: F32) -> tuple[F32, float]:
    """Factors for matrices [rows, K] of 8 bits a column whose inputs are rounded to 8 bits too, one range for all.

    Both errors are counted as that of even rounding, a twelfth of the step squared: the inputs' through every weight,
    the weights' by the inputs' mean square.

    Args:
        matrices: f32 [rows, K] each, rows on which to try.
        low, high, mean_square: f32 [K], each input's range and mean square.

    Returns:
        f32 [K], by which weights are to be multiplied and inputs divided, and the error left as a part of that without.
    """
    w = np.concatenate(list(matrices))
    loudness = np.maximum(np.maximum(-low, high), 1e-6 * max(float(high.max()), -float(low.min()), 1e-30))
    weight = np.maximum(np.abs(w).max(axis=0), 1e-6 * np.abs(w).max())
    best, least, plain = np.ones_like(loudness), np.inf, np.inf
    for strength in STRENGTHS:
        factors = powers(loudness**strength / weight ** (1 - strength)) if strength else np.ones_like(loudness)
        scaled = w * factors
        step = (max(float((high / factors).max()), 0) - min(float((low / factors).min()), 0)) / 255
        weight_steps = np.abs(scaled).max(axis=1, keepdims=True) / 127
        lost = step**2 * float(np.square(scaled).sum(dtype=np.float64))
        lost += float((np.square(weight_steps) * (mean_square / factors**2)).sum(dtype=np.float64))
        if strength == 0:
            plain = lost
        if lost < least:
            best, least = factors, lost
    return best, least / plain if plain > 0 else 1.0
