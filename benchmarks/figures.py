"""What a report says in numbers, as JSON has it: runs put together by what was measured, and what follows from them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks.comparison import Comparison
from benchmarks.noise import RESAMPLES
from benchmarks.records import BudgetPoint, Kernel, Loss, Run
from benchmarks.run import BOUNDS

SCHEMA = 1


@dataclass(frozen=True)
class Inputs:
    """All that a report is made from."""

    runs: Sequence[Run]
    comparisons: Sequence[Comparison] = ()
    budget: Sequence[BudgetPoint] = ()
    losses: Sequence[Loss] = ()
    kernels: Sequence[Kernel] = ()


def groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of one setting, commit and comparison together, in the order in which they come."""
    found: list[list[Run]] = []
    for run in runs:
        for group in found:
            if _same(group[0], run):
                group.append(run)
                break
        else:
            found.append([run])
    return found


def _same(a: Run, b: Run) -> bool:
    one, other = a.pair and a.pair[0], b.pair and b.pair[0]
    return (a.setting, a.commit, one, list(a.phases)) == (b.setting, b.commit, other, list(b.phases))


def report_figures(inputs: Inputs) -> dict[str, Any]:
    """The report as JSON; the same inputs, the same report."""
    return {
        "schema": SCHEMA,
        "groups": [_group(group) for group in groups(inputs.runs)],
        "comparisons": [_comparison(one) for one in inputs.comparisons],
        "budget": [_budget(point) for point in inputs.budget],
        "losses": [asdict(loss) for loss in inputs.losses],
        "kernels": [asdict(kernel) for kernel in inputs.kernels],
    }


def spread(samples: Sequence[float]) -> tuple[float, float]:
    """From which to which most samples are: a tenth is below, a tenth above."""
    ordered = sorted(samples)
    return ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]


def _group(runs: Sequence[Run]) -> dict[str, Any]:
    first = runs[0]
    return {
        "commit": first.commit,
        "measured": [min(run.measured for run in runs), max(run.measured for run in runs)],
        "runs": len(runs),
        **asdict(first.setting),
        "phases": [_phase(name, runs) for name in first.phases],
        "peak_rss_mib": _most(run.peak_rss_mib for run in runs),
        "peak_counted_mib": _most(run.peak_counted_mib for run in runs),
        "limits_met": limits_met(runs),
        "over": list(dict.fromkeys(text for run in runs for text in run.over)),
    }


def _phase(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    phases = [run.phases[name] for run in runs]
    samples = [sample for phase in phases for sample in phase.samples_ms]
    low, high = spread(samples)
    return {
        "name": name,
        "samples": len(samples),
        "median_ms": median(samples),
        "low_ms": low,
        "high_ms": high,
        "limit_ms": median(least) if (least := [p.limit_ms for p in phases if p.limit_ms is not None]) else None,
        "cpu_s": median(phase.cpu_s for phase in phases),
        "peak_rss_mib": _most(phase.peak_rss_mib for phase in phases),
    }


def limits_met(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each limit of the profile, what was measured (the worst run's median or peak), and how many runs are over it."""
    setting = runs[0].setting
    rows = []
    for name, phase in BOUNDS.items():
        if name in setting.limits and phase in runs[0].phases:
            medians = [median(run.phases[phase].samples_ms) for run in runs]
            rows.append(_limit(name, setting.limits[name], medians))
    peaks = [run.peak_rss_mib for run in runs if run.peak_rss_mib is not None]
    if peaks:
        rows.append(_limit("memory_mib", float(setting.memory_mib), peaks))
    return rows


def _limit(name: str, bound: float, found: Sequence[float]) -> dict[str, Any]:
    return {"name": name, "at_most": bound, "worst": max(found), "runs_over": sum(value > bound for value in found)}


def _comparison(one: Comparison) -> dict[str, Any]:
    base, new = one.base[0], one.new[0]
    return {
        "base": {"commit": base.commit, "bundle": asdict(base.setting.bundle)},
        "new": {"commit": new.commit, "bundle": asdict(new.setting.bundle)},
        "paired": one.paired,
        "runs": [len(one.base), len(one.new)],
        "least_effect": one.least_effect,
        "resamples": RESAMPLES,
        "notes": list(one.notes),
        "regression": one.regression,
        "rows": [
            {
                "name": row.name,
                "unit": row.unit,
                "base": row.base,
                "new": row.new,
                "ratio": row.ratio.ratio,
                "interval_95": row.ratio.interval_95,
                "verdict": row.verdict,
                "regression": row.regression,
            }
            for row in one.rows
        ],
    }


def _budget(point: BudgetPoint) -> dict[str, Any]:
    low, high = spread(point.samples_ms)
    found = {name: value for name, value in asdict(point).items() if name not in ("where", "samples_ms")}
    return found | {
        "samples": len(point.samples_ms),
        "median_ms": median(point.samples_ms),
        "low_ms": low,
        "high_ms": high,
    }


def _most(values: Any) -> float | None:
    return max((value for value in values if value is not None), default=None)
