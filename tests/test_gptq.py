"""GPTQ: the factor is H's, the sweep loses less than rounding does; outliers that break rounding do not break it."""

import numpy as np
import pytest

from quantize.gptq import DAMPING, feedback, output_error, quantize_gptq
from quantize.int4 import F32, dequantize, quantize_blocks, unpack
from quantize.scaling import weight_factors


def inputs(k: int, rows: int = 2000, *, seed: int = 0, outliers: int = 0, tails: bool = False) -> F32:
    """f32 [rows, k]: correlated, of uneven loudness; some channels 50 times as large, heavy tails on demand."""
    rng = np.random.default_rng(seed)
    drawn = rng.standard_t(3, (rows, k)) if tails else rng.standard_normal((rows, k))
    x = drawn * rng.lognormal(0, 0.7, k) @ (np.eye(k) + rng.standard_normal((k, k)) / k**0.5)
    x[:, rng.choice(k, outliers, replace=False)] *= 50
    return np.asarray(x, dtype=np.float32)


def rounded(w: F32, bits: int, *, fit: bool, block: int = 32) -> F32:
    shape = (w.shape[0], w.shape[1])
    return dequantize(quantize_blocks(lambda a, b: w[a:b], shape, bits=bits, block=block, fit=fit))


@pytest.mark.parametrize("by_importance", [False, True])
@pytest.mark.parametrize("k", [5, 128, 300])
def test_the_factor_is_that_of_the_damped_second_moments(k: int, by_importance: bool) -> None:
    x = inputs(k)
    hessian = x.T @ x
    made = feedback(hessian.copy(), by_importance=by_importance)
    unit = made.carried.astype(np.float64) + np.eye(k)
    wanted = hessian.astype(np.float64)[np.ix_(made.order, made.order)]
    wanted += np.eye(k) * DAMPING * np.diagonal(hessian).mean()
    assert (np.tril(made.carried) == 0).all()
    np.testing.assert_allclose(unit * made.pivots @ unit.T, wanted, atol=1e-5 * np.abs(wanted).max())
    loud = np.diagonal(hessian)[made.order]
    assert (np.diff(loud) <= 0).all() if by_importance else (made.order == np.arange(k)).all()


def test_solving_is_a_division_by_the_damped_second_moments() -> None:
    x = inputs(300)
    hessian = x.T @ x
    cross = np.random.default_rng(1).standard_normal((40, 300)).astype(np.float32)
    damped = hessian.astype(np.float64) + np.eye(300) * DAMPING * np.diagonal(hessian).mean()
    wanted = np.linalg.solve(damped, cross.T.astype(np.float64)).T
    found = feedback(hessian.copy()).solved(cross)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_without_correlation_it_is_fitted_rounding() -> None:
    w = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    made = feedback(np.eye(96, dtype=np.float32) * 7)
    tensor = quantize_gptq(w, made, bits=4, block=32)
    fitted = quantize_blocks(lambda a, b: w[a:b], w.shape, bits=4, block=32, importance=np.ones(96, np.float32))
    assert (tensor.packed == fitted.packed).all()


def test_it_is_gptq_as_published() -> None:
    """Against the paper's own procedure: columns one by one, what is left updated by the Cholesky factor of H^-1."""
    rng = np.random.default_rng(3)
    k, n = 64, 8
    x = inputs(k, 500, seed=3)
    hessian = (x.T @ x).astype(np.float64)
    w = rng.standard_normal((n, k)).astype(np.float32)
    made = feedback(hessian.astype(np.float32), by_importance=False)
    tensor = quantize_gptq(w, made, bits=4, block=32)
    damped = hessian + np.eye(k) * DAMPING * np.diagonal(hessian).mean()
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left = w.astype(np.float64)
    scales = np.repeat(tensor.scales.astype(np.float64), 32, axis=1)
    zeros = np.repeat(tensor.zeros.astype(np.float64), 32, axis=1)
    codes = np.empty((n, k))
    for i in range(k):
        codes[:, i] = np.clip(np.rint(left[:, i] / scales[:, i]) + zeros[:, i], 0, 15)
        error = (left[:, i] - (codes[:, i] - zeros[:, i]) * scales[:, i]) / upper[i, i]
        left[:, i:] -= error[:, None] * upper[i, i:]
    found = unpack(tensor.packed, 4).reshape(n, k)
    assert (found == codes).mean() > 0.99  # a tie may fall either way


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_lose_less_than_half_of_what_rounding_loses(bits: int, block: int) -> None:
    x = inputs(256)
    hessian = x.T @ x
    w = np.random.default_rng(2).standard_normal((192, 256)).astype(np.float32) * 0.02
    made = feedback(hessian.copy())
    found = output_error(w, dequantize(quantize_gptq(w, made, bits=bits, block=block)), hessian)
    for fit in (False, True):
        assert found < 0.5 * output_error(w, rounded(w, bits, fit=fit, block=block), hessian)


def test_outlier_channels_that_break_plain_rounding_do_not_break_it() -> None:
    """Ten channels 50 times as loud, read by weights a fiftieth as large: what trained models look like."""
    x = inputs(256, outliers=10, tails=True)
    hessian = x.T @ x
    loud = np.sqrt(np.diagonal(hessian))
    w = np.random.default_rng(4).standard_t(4, (192, 256)).astype(np.float32) * 0.02
    w /= np.where(loud > 10 * np.median(loud), np.float32(50), np.float32(1))
    plain = output_error(w, rounded(w, 4, fit=False), hessian)
    alone = output_error(w, dequantize(quantize_gptq(w, feedback(hessian.copy()), bits=4, block=32)), hessian)
    factors, _ = weight_factors([w], np.square(x).mean(axis=0), bits=4, block=32, symmetric=False)
    made = feedback(hessian / np.outer(factors, factors))
    both = output_error(w, dequantize(quantize_gptq(w * factors, made, bits=4, block=32)) / factors, hessian)
    assert plain > 0.04  # a fifth of the outputs' size
    assert alone < plain / 3
    assert both < plain / 10


def test_old_outputs_are_approached_where_inputs_have_changed() -> None:
    rng = np.random.default_rng(5)
    before = inputs(128, 3000)
    now = before @ (np.eye(128, dtype=np.float32) + rng.standard_normal((128, 128)).astype(np.float32) * 0.02)
    w = rng.standard_normal((64, 128)).astype(np.float32)
    wanted = before @ w.T
    made = feedback(now.T @ now)
    target = w + made.solved((wanted - now @ w.T).T @ now)
    lost = {}
    for name, weights in (("as they are", w), ("towards the old outputs", target)):
        tensor = dequantize(quantize_gptq(weights, made, bits=4, block=32))
        lost[name] = float(np.square(now @ tensor.T - wanted).sum() / np.square(wanted).sum())
    assert lost["towards the old outputs"] < lost["as they are"] / 3


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (np.zeros((4, 4), np.float32), "mean square of its inputs is 0"),
        (np.full((4, 4), np.nan, np.float32), "mean square of its inputs is nan"),
        (np.array([[1, 5], [5, 1]], np.float32), "not positive definite"),
    ],
)
def test_second_moments_that_cannot_be_are_refused(hessian: F32, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        feedback(hessian)


def test_inputs_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="has 8 inputs, its activations 4"):
        quantize_gptq(np.zeros((2, 8), np.float32), feedback(np.eye(4, dtype=np.float32)), bits=4, block=4)


def test_a_partial_last_block_is_padded_with_zero_points() -> None:
    x = inputs(40)
    w = np.random.default_rng(6).standard_normal((3, 40)).astype(np.float32)
    tensor = quantize_gptq(w, feedback(x.T @ x), bits=4, block=32)
    assert (unpack(tensor.packed, 4)[:, 1, 8:] == tensor.zeros[:, 1:2]).all()
    assert dequantize(tensor).shape == (3, 40)
