"""Is it slower, or is it noise? Ratios of what two versions take, with 95 % intervals over runs.

A run's figure is one number (the median of its samples), and runs are what is resampled: samples of one run share
its luck. Runs that were made in pairs, one of each version directly after the other, are compared pair by pair, so
that a machine that gets slower meanwhile slows both. Between pairs the mean of the logarithms is trimmed by a quarter
at each end: one run beside which something else was running changes little. Not covered: several machines.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
LEAST_RUNS = 6  # below, no resampling can reach 95 %
LEAST_EFFECT = 0.05  # what is slower by less than this for sure, is no regression
TRIMMED = 4  # one in so many is left out at each end

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ratio:
    """The new version's figure as a multiple of the base's; above 1 it takes more.

    interval_95: None with fewer than LEAST_RUNS runs a side.
    """

    ratio: float
    interval_95: tuple[float, float] | None
    paired: bool
    runs: tuple[int, int]

    @property
    def direction(self) -> int:
        """1: more than the base for all that is known, -1: less, 0: that cannot be told."""
        if self.interval_95 is None:
            return 0
        low, high = self.interval_95
        return (low > 1) - (high < 1)

    def regression(self, least_effect: float = LEAST_EFFECT) -> bool:
        """Whether the whole interval is above an effect that matters."""
        return self.interval_95 is not None and self.interval_95[0] > 1 + least_effect


def paired_ratio(base: Sequence[float] | Numbers, new: Sequence[float] | Numbers, *, seed: int = 0) -> Ratio:
    """Of runs in pairs: base[i] and new[i] were made one after the other. Figures are above 0."""
    logs = np.log(np.asarray(new, np.float64)) - np.log(np.asarray(base, np.float64))
    means = _drawn(logs, np.random.default_rng(seed)) if len(logs) >= LEAST_RUNS else None
    return _ratio(_centre(logs[None])[0], means, True, (len(logs), len(logs)))


def unpaired_ratio(base: Sequence[float] | Numbers, new: Sequence[float] | Numbers, *, seed: int = 0) -> Ratio:
    """Of runs from two times: each side is resampled by itself, and what changed in between is not seen."""
    logs = [np.log(np.asarray(side, np.float64)) for side in (base, new)]
    runs = len(base), len(new)
    means = None
    if min(runs) >= LEAST_RUNS:
        random = np.random.default_rng(seed)
        before, after = (_drawn(side, random) for side in logs)
        means = after - before
    return _ratio(_centre(logs[1][None])[0] - _centre(logs[0][None])[0], means, False, runs)


def _drawn(logs: Numbers, random: np.random.Generator) -> Numbers:
    """The centres of as many values drawn with replacement, RESAMPLES times."""
    return _centre(logs[random.integers(0, len(logs), (RESAMPLES, len(logs)))])


def _centre(rows: Numbers) -> Numbers:
    """The trimmed mean of each row."""
    size = rows.shape[1]
    cut = size // TRIMMED
    return np.asarray(np.sort(rows, axis=1)[:, cut : size - cut].mean(axis=1))


def _ratio(log: float, means: Numbers | None, paired: bool, runs: tuple[int, int]) -> Ratio:
    interval = None
    if means is not None:
        tail = expanded_tail(min(runs))
        low, high = np.exp(np.quantile(means, [tail, 1 - tail]))
        interval = float(low), float(high)
    return Ratio(math.exp(log), interval, paired, runs)


@cache
def expanded_tail(runs: int) -> float:
    """The part of the resampled means to leave out at each end for an interval of 95 %.

    Less than 2.5 %, since a percentile interval of few values is too narrow: T. Hesterberg, "What Teachers Should Know
    About the Bootstrap", The American Statistician 69, 2015, section 5.3 (the expanded percentile interval).
    """
    return NormalDist().cdf(-math.sqrt(runs / (runs - 1)) * student_quantile(0.975, runs - 1))


def student_quantile(chance: float, freedom: int) -> float:
    """The point below which Student's t, with so many degrees of freedom, is with a chance of one half or more."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)

    def below(t: float) -> float:
        x = np.linspace(0, t, 4001)
        return 0.5 + float(np.trapezoid(scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2), x))

    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < chance else (low, middle)
    return (low + high) / 2
