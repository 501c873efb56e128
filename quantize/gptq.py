"""GPTQ: integers chosen one input at a time, each rounding error made good by the inputs still to come.

With inputs x of a layer, H = sum of x x^T, and E = W - Q, a matrix's output error is tr(E H E^T). Where
H = (U + I) D (U + I)^T with U strictly upper triangular, rounding w_k + sum_j<k (w_j - q_j) U_jk to the nearest
integer, input by input, is what Frantar et al. (GPTQ, arXiv:2210.17323) compute by way of H^-1: Chee et al.
(QuIP, arXiv:2307.13304, theorem 6) show that the two are the same.

Layers before have changed the inputs already. What the weights would have to be to give the old outputs y for the
new inputs, W + sum of (y - W x) x^T H^-1, is quantized in place of W (Li et al., GPTAQ, arXiv:2504.02692).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantize.int4 import F32, QTensor, empty_blocks, pack, quantize_blocks

DAMPING = 0.01  # of H's mean diagonal, added to all of it: GPTQ's own value
PANEL = 256  # columns worked on together: what they change elsewhere is one product of matrices
STEP = 32  # inputs of a panel that are rounded before what they change in it is multiplied


@dataclass(frozen=True)
class Feedback:
    """What the inputs of a layer say about rounding its weights; the same for every matrix that reads them.

    order: i64 [K], the inputs in the order in which they are rounded.
    carried: f32 [K, K], U in that order: how much of input j's error input k takes over (strictly upper).
    pivots: f32 [K], D in that order.
    importance: f32 [K], H's damped diagonal in the matrix's own order.
    """

    order: npt.NDArray[np.int64]
    carried: F32
    pivots: F32
    importance: F32

    def solved(self, cross: F32) -> F32:
        """cross H^-1, f32 [N, K]: what to add to weights where `cross` is the sum of (y - W x) x^T, f32 [N, K]."""
        k = len(self.order)
        x = np.ascontiguousarray(cross.T[self.order])  # [K, N], solved in place, panel by panel
        panels = [slice(start, min(start + PANEL, k)) for start in range(0, k, PANEL)]
        unit = [np.linalg.inv(self.carried[p, p] + np.eye(p.stop - p.start, dtype=np.float32)) for p in panels]
        for p, inverse in zip(reversed(panels), reversed(unit), strict=True):
            x[p] = inverse @ x[p]
            x[: p.start] -= self.carried[: p.start, p] @ x[p]
        x /= self.pivots[:, None]
        for p, inverse in zip(panels, unit, strict=True):
            x[p] = inverse.T @ x[p]
            x[p.stop :] -= self.carried[p, p.stop :].T @ x[p]
        out = np.empty_like(cross)
        out[:, self.order] = x.T
        return out


def feedback(hessian: F32, *, damping: float = DAMPING, by_importance: bool = True) -> Feedback:
    """Factors H; `hessian` is used up.

    Args:
        hessian: f32 [K, K], the sum of x x^T over a layer's inputs x (symmetric).
        damping: as a part of the mean of H's diagonal.
        by_importance: the inputs that count most are rounded first ("activation order"); otherwise in their own order.

    Raises:
        ValueError: H is not finite, has no positive entry on its diagonal, or cannot be factored.
    """
    diagonal = np.ascontiguousarray(np.diagonal(hessian))
    mean = float(diagonal.mean(dtype=np.float64))
    if not np.isfinite(mean) or mean <= 0 or not np.isfinite(hessian).all():
        raise ValueError(f"the mean square of its inputs is {mean:g}, want a finite number above 0 in each entry")
    order = np.argsort(-diagonal, kind="stable") if by_importance else np.arange(len(diagonal))
    # U is upper triangular: the factor L of the matrix turned end for end, turned back.
    backward = order[::-1]
    turned = hessian[np.ix_(backward, backward)]
    extra = np.float32(mean * damping)
    turned[np.diag_indices_from(turned)] += extra
    _cholesky(turned)
    carried = turned[::-1, ::-1]
    roots = np.diagonal(carried).copy()
    carried /= roots  # each column by its own diagonal: a unit diagonal
    carried[np.diag_indices_from(carried)] = 0
    return Feedback(order, np.ascontiguousarray(carried), np.square(roots), diagonal + extra)


def _cholesky(a: F32) -> None:
    """Makes the lower Cholesky factor in place, panel by panel, so that nearly all of it is products of matrices."""
    n = len(a)
    for start in range(0, n, PANEL):
        stop = min(start + PANEL, n)
        panel = a[start:, start:stop]
        if start:
            panel -= a[start:, :start] @ a[start:stop, :start].T
        try:
            corner = np.linalg.cholesky(a[start:stop, start:stop].astype(np.float64))
        except np.linalg.LinAlgError as exc:
            raise ValueError(f"its inputs' second moments are not positive definite from input {start} on") from exc
        inverse = np.linalg.inv(corner).astype(np.float32)
        a[start:stop, start:stop] = corner
        a[stop:, start:stop] = a[stop:, start:stop] @ inverse.T
        a[start:stop, stop:] = 0


def quantize_gptq(weights: F32, made: Feedback, *, bits: int, block: int, symmetric: bool = False) -> QTensor:
    """Quantizes a matrix f32 [N, K]; errors and what is not named here as in `quantize_blocks`.

    Each block's scale and zero point are fitted to the weights as they are, by how much their inputs count, before
    anything is rounded: rounding in any order then finds them ready.
    """
    n, k = shape = weights.shape
    if made.importance.shape != (k,):
        raise ValueError(f"has {k} inputs, its activations {len(made.importance)}")
    grid = quantize_blocks(
        lambda a, b: weights[a:b], shape, bits=bits, block=block, symmetric=symmetric, importance=made.importance
    )
    scales = np.ascontiguousarray(grid.scales.T, dtype=np.float32)  # [blocks, N]
    zeros = np.ascontiguousarray(grid.zeros.T, dtype=np.float32)
    places = made.order // block
    top = np.float32(2**bits - 1)

    given = np.ascontiguousarray(weights.T[made.order])  # [K, N], in the order of rounding
    errors = np.empty_like(given)
    codes = np.empty((k, n), dtype=np.uint8)
    targets = given.copy()
    for start in range(0, k, STEP):  # PANEL is a multiple of it
        stop, panel = min(start + STEP, k), start - start % PANEL
        wanted = targets[start:stop]
        wanted += made.carried[panel:start, start:stop].T @ errors[panel:start]
        inside = made.carried[start:stop, start:stop]
        for i in range(stop - start):
            scale, zero = scales[places[start + i]], zeros[places[start + i]]
            q = np.rint(wanted[i] / scale)
            q += zero
            np.clip(q, 0, top, out=q)
            codes[start + i] = q
            q -= zero
            q *= scale
            np.subtract(given[start + i], q, out=errors[start + i])
            if start + i + 1 < stop:
                wanted[i + 1 :] += inside[i, i + 1 :, None] * errors[start + i]
        if stop % PANEL == 0:  # what the panel leaves to all later inputs, in one product
            targets[stop:] += made.carried[panel:stop, stop:].T @ errors[panel:stop]

    tensor = empty_blocks(shape, bits, block)
    blocks = grid.scales.shape[1]
    padded = np.repeat(grid.zeros, block, axis=1)  # [N, blocks * block]: beyond K lie zero points
    padded[:, made.order] = codes.T
    tensor.packed[:] = pack(padded.reshape(n, blocks, block), bits)
    tensor.scales[:], tensor.zeros[:] = grid.scales, grid.zeros
    return tensor


def output_error(weights: F32, quantized: F32, hessian: F32) -> float:
    """tr(E H E^T) as a part of tr(W H W^T): the relative squared error of a layer's outputs, E = weights - quantized.

    Args:
        weights, quantized: f32 [N, K]. hessian: f32 [K, K].
    """
    error = weights - quantized
    lost = np.einsum("nk,nk->", error @ hessian, error, dtype=np.float64)
    return float(lost / np.einsum("nk,nk->", weights @ hessian, weights, dtype=np.float64))
