"""What knowing how probably an answer is wrong is worth: calibration, risk by coverage, and what escalations buy.

An escalation budget b sends on the b of all answers that are most probably wrong. At random it would send on b of the
wrong ones, so `beyond_random` is the share of wrong answers that are among those sent on, less b; with whatever answers
there being right with probability q, accuracy is higher than with random escalation by `beyond_random` times the share
of wrong answers, for every q. Intervals are of 95 %, by bootstrap over documents.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.logistic import Numbers, log_loss

BUDGETS = (0.1, 0.2, 0.3)
ORACLES = (1.0, 0.9)  # how often whoever is asked next is right: assumed, not measured
COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
BINS = 10
RESAMPLES = 2000
PERFECT = 200  # draws of what would be wrong if the probabilities were right


def evaluate(
    p_wrong: Numbers, wrong: Numbers, documents: npt.NDArray[np.int64], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """All figures; `passed`: with every budget more is caught than at random, by an interval that excludes zero.

    Args:
        p_wrong: [N], the probabilities.
        wrong: [N], 1 where the answer was.
        documents: [N], the number of each answer's document, from 0.
        resamples: of the bootstrap.
        seed: of its draws; the same arguments give the same figures.
    """
    random = np.random.default_rng(seed)
    values, drawn = _figures(p_wrong, wrong), []
    order = np.argsort(documents, kind="stable")
    by_document = np.split(order, np.flatnonzero(np.diff(documents[order])) + 1)
    alone = len(by_document) == len(wrong)
    for _ in range(resamples):
        rows = random.integers(0, len(by_document), len(by_document))
        if not alone:
            rows = np.concatenate([by_document[i] for i in rows])
        drawn.append(list(_figures(p_wrong[rows], wrong[rows]).values()))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    found = {
        name: {"value": value, "interval_95": [float(low[i]), float(high[i])]}
        for i, (name, value) in enumerate(values.items())
    }
    rate = values["wrong_rate"]
    budgets: list[dict[str, Any]] = [
        {
            "budget": b,
            "wrong_caught": found[f"caught {b}"],
            "beyond_random": found[f"beyond {b}"],
            "accuracy": [
                {"next_is_right": q, "random": _accuracy(rate, b, b, q)} | found[f"accuracy {b} {q}"] for q in ORACLES
            ],
        }
        for b in BUDGETS
    ]
    return {
        "answers": len(wrong),
        "wrong": int(wrong.sum()),
        **{name: found[name] for name in ("wrong_rate", "ece", "brier", "log_loss", "auroc", "risk_area")},
        "ece_of_a_perfect_model": float(np.mean([ece(p_wrong, _as_said(p_wrong, random)) for _ in range(PERFECT)])),
        "brier_of_the_rate_alone": rate * (1 - rate),
        "reliability": reliability(p_wrong, wrong),
        "risk_coverage": [{"coverage": c} | found[f"risk {c}"] for c in COVERAGES],
        "budgets": budgets,
        "passed": all(row["beyond_random"]["interval_95"][0] > 0 for row in budgets),
    }


def _as_said(p_wrong: Numbers, random: np.random.Generator) -> Numbers:
    return (random.random(len(p_wrong)) < p_wrong).astype(np.float64)


def _figures(p_wrong: Numbers, wrong: Numbers) -> dict[str, float]:
    """Every figure that has an interval."""
    rate = float(wrong.mean())
    at = {share: caught(p_wrong, wrong, share) for share in {*BUDGETS, *(1 - c for c in COVERAGES)}}
    ordered = wrong[np.argsort(p_wrong, kind="stable")]
    return {
        "wrong_rate": rate,
        "ece": ece(p_wrong, wrong),
        "brier": float(np.mean((p_wrong - wrong) ** 2)),
        "log_loss": log_loss(p_wrong, wrong),
        "auroc": auroc(p_wrong, wrong),
        "risk_area": float((np.cumsum(ordered) / np.arange(1, len(ordered) + 1)).mean()),  # mean over all coverages
        **{f"risk {c}": rate * (1 - at[1 - c]) / c for c in COVERAGES},
        **{f"caught {b}": at[b] for b in BUDGETS},
        **{f"beyond {b}": at[b] - b for b in BUDGETS},
        **{f"accuracy {b} {q}": _accuracy(rate, at[b], b, q) for b in BUDGETS for q in ORACLES},
    }


def _accuracy(rate: float, found: float, budget: float, oracle: float) -> float:
    """Of all answers, when `budget` of them are given by another who is right with probability `oracle`."""
    return 1 - rate * (1 - found) - budget * (1 - oracle)


def caught(p_wrong: Numbers, wrong: Numbers, budget: float) -> float:
    """The share of the wrong answers among the `budget` of all that are most probably wrong.

    Of equal probabilities the same part is taken of right and wrong ones; where nothing is wrong it is the budget.
    """
    if not wrong.sum():
        return budget
    order = np.argsort(-p_wrong, kind="stable")
    ordered = p_wrong[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    counts = np.diff(np.append(starts, len(ordered)))
    taken = np.clip(budget * len(wrong) - starts, 0, counts) / counts  # of each group of equals
    return float((np.add.reduceat(wrong[order], starts) * taken).sum() / wrong.sum())


def auroc(p_wrong: Numbers, wrong: Numbers) -> float:
    """How often a wrong answer has a higher probability than a right one, equals counting half; 0.5 without one."""
    ones = float(wrong.sum())
    if not 0 < ones < len(wrong):
        return 0.5
    _, place, counts = np.unique(p_wrong, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[place]  # from 1; equals share theirs
    return float((rank[wrong == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(wrong) - ones)))


def reliability(p_wrong: Numbers, wrong: Numbers) -> list[dict[str, float]]:
    """Bins of equally many answers, by probability: what was said, what was so."""
    parts = np.array_split(np.argsort(p_wrong, kind="stable"), BINS)
    return [
        {"answers": len(part), "said": float(p_wrong[part].mean()), "wrong": float(wrong[part].mean())}
        for part in parts
        if len(part)
    ]


def ece(p_wrong: Numbers, wrong: Numbers) -> float:
    """Expected calibration error: the mean over the bins, by their answers, of |said - wrong|.

    M. P. Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015, with bins of
    equally many answers. By chance a perfect model has more than 0 of it: `ece_of_a_perfect_model`.
    """
    return sum(row["answers"] * abs(row["said"] - row["wrong"]) for row in reliability(p_wrong, wrong)) / len(wrong)


def at_thresholds(p_wrong: Numbers, wrong: Numbers, chosen: Sequence[tuple[float, float]]) -> list[dict[str, float]]:
    """What a device sends on that has a threshold for p_wrong; `chosen`: (budget that it was chosen for, threshold)."""
    return [
        {
            "budget": budget,
            "threshold": threshold,
            "escalated": float((p_wrong > threshold).mean()),
            "wrong_caught": float(wrong[p_wrong > threshold].sum() / max(float(wrong.sum()), 1.0)),
        }
        for budget, threshold in chosen
    ]
