"""Quantization keeps what it promises: half a step, the smaller error, fp16 scales, packing both ways."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.int4 import (
    F32,
    FP16_MAX,
    QTensor,
    dequantize,
    dequantize_columns,
    pack,
    quantize_blocks,
    quantize_columns,
    unpack,
)


def quantized(w: F32, bits: int = 4, block: int = 32, symmetric: bool = False) -> QTensor:
    n, k = w.shape
    return quantize_blocks(lambda a, b: w[a:b], (n, k), bits=bits, block=block, symmetric=symmetric)


def plain_round(w: F32, bits: int, block: int) -> F32:
    """Round to nearest over the block's whole range, scales in fp16: what the search must not do worse than."""
    n, k = w.shape
    blocks = w.reshape(n, k // block, block)
    top = 2**bits - 1
    low, high = np.minimum(blocks.min(-1, keepdims=True), 0), np.maximum(blocks.max(-1, keepdims=True), 0)
    scale = ((high - low) / top).astype(np.float16).astype(np.float32)
    zero = np.clip(np.rint(-low / scale), 0, top)
    q = np.clip(np.rint(blocks / scale) + zero, 0, top)
    return np.asarray(((q - zero) * scale).reshape(n, k), dtype=np.float32)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 9),
    k=st.integers(1, 200),
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32, 64]),
    symmetric=st.booleans(),
    scale=st.sampled_from([1e-4, 0.02, 3.0, 1e3]),
)
def test_a_weight_inside_the_range_moves_by_at_most_half_a_step(
    seed: int, n: int, k: int, bits: int, block: int, symmetric: bool, scale: float
) -> None:
    w = (np.random.default_rng(seed).standard_normal((n, k)) * scale).astype(np.float32)
    q = quantized(w, bits, block, symmetric)
    back = dequantize(q)
    step = np.repeat(q.scales.astype(np.float32), block, axis=1)[:, :k]
    codes = unpack(q.packed, bits).reshape(n, -1)[:, :k]
    inside = (codes > 0) & (codes < 2**bits - 1)  # at the ends a weight may be clipped for its block's good
    assert (np.abs(back - w)[inside] <= step[inside] * 0.5001).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_without_fitting_it_is_plain_rounding(bits: int) -> None:
    w = np.random.default_rng(7).standard_normal((64, 64)).astype(np.float32)
    plain = quantize_blocks(lambda a, b: w[a:b], (64, 64), bits=bits, block=32, fit=False)
    np.testing.assert_allclose(dequantize(plain), plain_round(w, bits, 32), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fitting_to_importance_lowers_the_error_that_counts(bits: int) -> None:
    rng = np.random.default_rng(8)
    w = rng.standard_normal((128, 64)).astype(np.float32)
    importance = rng.lognormal(0, 2, 64).astype(np.float32)
    lost = {}
    for name, counts in (("all alike", None), ("weighted", importance)):
        tensor = quantize_blocks(lambda a, b: w[a:b], (128, 64), bits=bits, block=32, importance=counts)
        lost[name] = float((np.square(dequantize(tensor) - w) * importance).sum())
    assert lost["weighted"] < lost["all alike"] * 0.9


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_scale_is_a_positive_normal_fp16_number(symmetric: bool) -> None:
    w = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32) * 0.02
    scales = quantized(w, symmetric=symmetric).scales
    assert scales.dtype == np.float16
    assert (scales > 0).all()
    assert np.isfinite(scales).all()


def test_symmetric_blocks_have_the_zero_point_in_the_middle() -> None:
    w = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    assert (quantized(w, 4, symmetric=True).zeros == 8).all()
    assert (quantized(w, 8, symmetric=True).zeros == 128).all()


@pytest.mark.parametrize("spread", ["normal", "heavy"])
def test_the_search_beats_plain_rounding_on_the_same_grid_of_bits(spread: str) -> None:
    rng = np.random.default_rng(1)
    drawn = rng.standard_normal((256, 256)) if spread == "normal" else rng.standard_t(3, (256, 256))
    w = drawn.astype(np.float32)
    found = float(np.square(dequantize(quantized(w)) - w).sum())
    plain = float(np.square(plain_round(w, 4, 32) - w).sum())
    assert found < plain * 0.99


def test_zero_points_pay_where_weights_are_lopsided() -> None:
    w = (np.random.default_rng(2).random((64, 64)) * 0.5 + 0.3).astype(np.float32)
    with_zeros = np.square(dequantize(quantized(w)) - w).sum()
    without = np.square(dequantize(quantized(w, symmetric=True)) - w).sum()
    assert with_zeros < without


def test_a_block_of_zeros_stays_zero_and_a_tiny_one_does_not_explode() -> None:
    w = np.zeros((2, 64), dtype=np.float32)
    w[1, :32] = 1e-9
    assert np.abs(dequantize(quantized(w)) - w).max() <= 1e-9


def test_a_partial_last_block_is_padded_with_zero_points() -> None:
    w = np.random.default_rng(3).standard_normal((3, 40)).astype(np.float32)
    q = quantized(w)
    assert q.packed.shape == (3, 2, 16)
    padding = unpack(q.packed, 4)[:, 1, 8:]
    assert (padding == q.zeros[:, 1:2]).all()
    assert dequantize(q).shape == (3, 40)


def test_rows_do_not_depend_on_how_many_are_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(4).standard_normal((100, 64)).astype(np.float32)
    whole = quantized(w)
    monkeypatch.setattr("quantize.int4.CHUNK", 64)
    by_row = quantized(w)
    assert (whole.packed == by_row.packed).all()
    assert (whole.scales == by_row.scales).all()


@given(st.lists(st.integers(0, 15), min_size=2, max_size=64).filter(lambda x: len(x) % 2 == 0))
def test_packing_nibbles_is_undone_by_unpacking(values: list[int]) -> None:
    array = np.array(values, dtype=np.uint8)
    packed = pack(array, 4)
    assert packed.size == array.size // 2
    assert packed[0] == values[0] | values[1] << 4  # the low nibble first
    assert (unpack(packed, 4) == array).all()


def test_a_scale_beyond_fp16_is_refused() -> None:
    w = np.full((1, 32), FP16_MAX * 300, dtype=np.float32)
    with pytest.raises(ValueError, match="beyond fp16"):
        quantized(w)
    with pytest.raises(ValueError, match="beyond fp16"):
        quantize_columns(lambda a, b: w[a:b], (1, 32))


@pytest.mark.parametrize(
    ("bits", "block", "message"), [(5, 32, "bits is 5"), (4, 5, "block is 5"), (4, 0, "block is 0")]
)
def test_impossible_formats_are_refused_by_name(bits: int, block: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantized(np.zeros((1, 32), dtype=np.float32), bits, block)


@pytest.mark.parametrize("reduced_range", [False, True])
def test_columns_move_by_at_most_half_a_step_within_their_range(reduced_range: bool) -> None:
    w = np.random.default_rng(5).standard_normal((33, 70)).astype(np.float32)
    q = quantize_columns(lambda a, b: w[a:b], w.shape, reduced_range=reduced_range)
    top = 63 if reduced_range else 127
    assert q.values.min() >= -top - 1
    assert q.values.max() <= top
    step = q.scales.astype(np.float32)[:, None]
    # Rounding the scale to fp16 can leave the largest weight up to 2**-11 of the range outside.
    assert (np.abs(dequantize_columns(q) - w) <= step * 0.5 + np.abs(w) * 2**-10).all()


def test_reduced_range_never_saturates_16_bit_sums_and_full_range_can() -> None:
    """x86 without VNNI adds two u8 x s8 products in 16 bits (vpmaddubsw)."""
    w = np.random.default_rng(6).standard_normal((64, 64)).astype(np.float32)
    worst = {}
    for reduced in (False, True):
        q = quantize_columns(lambda a, b: w[a:b], (64, 64), reduced_range=reduced).values.astype(np.int64)
        pairs = np.abs(q[:, 0::2]) + np.abs(q[:, 1::2])
        worst[reduced] = int(pairs.max()) * 255
    assert worst[True] <= 2**15 - 1 + 255 * 2
    assert worst[False] > 2**15
