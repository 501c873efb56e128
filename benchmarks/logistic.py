"""Ridge logistic regression by Newton's method, its penalty chosen by cross-validation.

The same numbers in, the same model out. D. R. Cox, "The Regression Analysis of Binary Sequences", 1958; the penalty: S.
le Cessie and J. C. van Houwelingen, "Ridge Estimators in Logistic Regression", 1992.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)
FOLDS = 10
STEPS = 100

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Logistic:
    """P(y = 1) = 1 / (1 + exp(-(bias + weights . (x - mean) / scale)))."""

    mean: Numbers
    scale: Numbers
    weights: Numbers
    bias: float
    penalty: float

    def __call__(self, x: Numbers) -> Numbers:
        """Probabilities [N] of rows [N, K]."""
        z = self.bias + ((x - self.mean) / self.scale) @ self.weights
        return np.exp(-np.logaddexp(0, -z))


def fit(x: Numbers, y: Numbers, penalty: float) -> Logistic:
    """The weights with the least log loss + penalty / 2 * |weights|^2, summed over rows; the bias is not penalised.

    Args:
        x: [N, K].
        y: [N], 0 or 1, both there.
        penalty: above 0.

    Raises:
        ValueError: if all of `y` are the same, or the weights are not found.
    """
    if not 0 < y.sum() < len(y):
        raise ValueError(f"{int(y.sum())} of {len(y)} answers are wrong: there is nothing to tell apart")
    mean, scale = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-6)
    rows = np.column_stack([np.ones(len(x)), (x - mean) / scale])  # [N, 1 + K]
    ridge = np.diag([0.0] + [penalty] * x.shape[1])
    found: Numbers = np.zeros(rows.shape[1])
    found[0] = np.log(y.mean() / (1 - y.mean()))

    def loss(at: Numbers) -> float:
        z = rows @ at
        return float(np.logaddexp(0, z).sum() - y @ z + at @ ridge @ at / 2)

    for _ in range(STEPS):
        p = np.exp(-np.logaddexp(0, -rows @ found))
        slope = rows.T @ (p - y) + ridge @ found
        curve = (rows * (p * (1 - p))[:, None]).T @ rows + ridge + 1e-9 * np.eye(len(found))
        step = np.linalg.solve(curve, slope)
        while loss(found - step) > loss(found) and np.abs(step).max() > 1e-10:  # Newton's step can be too long
            step = step / 2
        found = found - step
        if np.abs(step).max() < 1e-8:
            return Logistic(mean, scale, found[1:], float(found[0]), penalty)
    raise ValueError(f"no weights were found in {STEPS} steps")


def fit_chosen(x: Numbers, y: Numbers, documents: npt.NDArray[np.int64], seed: int = 0) -> tuple[Logistic, Numbers]:
    """The fit with the penalty of PENALTIES that does best on rows that were left out.

    Args:
        x, y: as for `fit`.
        documents: [N], the number of each row's document; those of one are left out together.
        seed: of the division.

    Returns:
        The model, and the probability of each row [N] by the models that did not see its document.

    Raises:
        ValueError: as `fit`.
    """
    order = np.random.default_rng(seed).permutation(int(documents.max()) + 1)
    fold = order[documents] % FOLDS
    left_out = {}
    for penalty in PENALTIES:
        p = np.empty(len(y))
        for number in np.unique(fold):
            out = fold == number
            p[out] = fit(x[~out], y[~out], penalty)(x[out])
        left_out[penalty] = p
    best = min(PENALTIES, key=lambda penalty: log_loss(left_out[penalty], y))
    return fit(x, y, best), left_out[best]


def log_loss(p: Numbers, y: Numbers) -> float:
    """Mean negative log-likelihood in nats; probabilities within 1e-12 of 0 and 1."""
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log(1 - p)))
