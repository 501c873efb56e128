"""Factors a channel: powers of two, chosen only where they help, and against outliers they help a lot."""

import numpy as np
import pytest

from quantize.int4 import F32, dequantize, dequantize_columns, quantize_blocks, quantize_columns
from quantize.scaling import MOST, input_factors, powers, weight_factors


def outliers(k: int, loud: int, times: float) -> F32:
    """f32 [2000, k], some channels much larger."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, k)).astype(np.float32)
    x[:, :loud] *= times
    return x


def test_factors_are_powers_of_two_within_bounds() -> None:
    factors = powers(np.random.default_rng(0).lognormal(0, 6, 100).astype(np.float32))
    assert (np.log2(factors) == np.rint(np.log2(factors))).all()
    assert factors.max() <= MOST
    assert factors.min() >= 1 / MOST


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_of_loud_inputs_are_rounded_more_finely(bits: int) -> None:
    x = outliers(128, 6, 40)
    w = np.random.default_rng(1).standard_normal((96, 128)).astype(np.float32)
    w[:, :6] /= 20
    square = np.square(x).mean(axis=0)
    factors, left = weight_factors([w[:48], w[48:]], square, bits=bits, block=32, symmetric=False)

    def lost(by: F32) -> float:
        scaled = w * by
        back = dequantize(quantize_blocks(lambda a, b: scaled[a:b], w.shape, bits=bits, block=32)) / by
        return float(np.square(x @ (back - w).T).sum() / np.square(x @ w.T).sum())

    assert left < 0.5
    assert lost(factors) < 0.5 * lost(np.ones(128, np.float32))


def test_activations_of_eight_bits_are_evened_out() -> None:
    """What SmoothQuant is for: one range for all channels leaves those that are not outliers hardly a step."""
    x = outliers(128, 4, 60)
    w = np.random.default_rng(2).standard_normal((96, 128)).astype(np.float32)
    w[:, :4] /= 60
    square = np.square(x).mean(axis=0)
    factors, left = input_factors([w], x.min(axis=0), x.max(axis=0), square)

    def lost(by: F32) -> float:
        narrow, wide = x / by, w * by
        step = (narrow.max() - narrow.min()) / 255
        q = dequantize_columns(quantize_columns(lambda a, b: wide[a:b], w.shape))
        return float(np.square(np.rint(narrow / step) * step @ q.T - x @ w.T).sum() / np.square(x @ w.T).sum())

    assert left < 0.1
    assert lost(np.ones(128, np.float32)) > 0.02
    assert lost(factors) < 0.1 * lost(np.ones(128, np.float32))


def test_even_inputs_get_no_factors() -> None:
    x = outliers(64, 0, 1)
    w = np.random.default_rng(3).standard_normal((96, 64)).astype(np.float32)
    square = np.square(x).mean(axis=0)
    assert weight_factors([w], square, bits=4, block=32, symmetric=False)[1] > 0.95
    assert input_factors([w], x.min(axis=0), x.max(axis=0), square)[1] > 0.8


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    x = outliers(64, 2, 30)
    x[:, 10] = 0
    w = np.random.default_rng(4).standard_normal((32, 64)).astype(np.float32)
    square = np.square(x).mean(axis=0)
    for factors, left in (
        weight_factors([w], square, bits=4, block=32, symmetric=False),
        input_factors([w], x.min(axis=0), x.max(axis=0), square),
    ):
        assert np.isfinite(factors).all()
        assert 0 < left <= 1
