"""Two versions on one machine: which runs may be compared, and what the comparison says, phase by phase."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.checked import ReportError
from benchmarks.noise import LEAST_EFFECT, LEAST_RUNS, Ratio, paired_ratio, unpaired_ratio
from benchmarks.records import Run, Setting

MEMORY = "peak memory"
WORDS = {"ms": ("faster", "no difference seen", "slower"), "MiB": ("less", "no difference seen", "more")}


@dataclass(frozen=True)
class Row:
    """A phase, or the peak of memory: medians over runs, and the ratio."""

    name: str
    unit: str
    base: float
    new: float
    ratio: Ratio
    least_effect: float

    @property
    def regression(self) -> bool:
        """Whether the whole interval is above an effect that matters."""
        return self.ratio.regression(self.least_effect)

    @property
    def verdict(self) -> str:
        """In words."""
        if self.ratio.interval_95 is None:
            return f"not judged: fewer than {LEAST_RUNS} runs"
        word = WORDS[self.unit][self.ratio.direction + 1]
        if self.regression:
            return f"{word}: a regression"
        small = 1 + self.least_effect
        low, high = self.ratio.interval_95
        same = self.ratio.direction == 0 and 1 / small <= low <= high <= small
        return f"no difference above {self.least_effect * 100:g} %" if same else word


@dataclass(frozen=True)
class Comparison:
    """The runs of a new version against those of a base.

    notes: what differs and may be what is compared, such as the recipe.
    """

    base: Sequence[Run]
    new: Sequence[Run]
    paired: bool
    least_effect: float
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def regression(self) -> bool:
        """Whether any row is one."""
        return any(row.regression for row in self.rows)


def compare_runs(base: Sequence[Run], new: Sequence[Run], least_effect: float = LEAST_EFFECT) -> Comparison:
    """Compares runs of one setting with a base's, pair by pair where they were made in pairs.

    Raises:
        ReportError: if they cannot be compared, with every reason.
    """
    if reasons := list(obstacles(base[0], new[0])):
        raise ReportError(f"runs that cannot be compared: {'; '.join(reasons)}")
    pairs = _pairs(base, new)
    if pairs:
        base, new = [a for a, _ in pairs], [b for _, b in pairs]
    rows = []
    for name in base[0].phases:
        if name in new[0].phases:
            sides = [[median(run.phases[name].samples_ms) for run in side] for side in (base, new)]
            rows.append(_row(name, "ms", sides[0], sides[1], bool(pairs), least_effect))
    peaks = [[run.peak_rss_mib for run in side] for side in (base, new)]
    known = [[peak for peak in side if peak] for side in peaks]
    if known == peaks:
        rows.append(_row(MEMORY, "MiB", known[0], known[1], bool(pairs), least_effect))
    return Comparison(base, new, bool(pairs), least_effect, tuple(rows), tuple(_notes(base[0], new[0])))


def _row(name: str, unit: str, base: Sequence[float], new: Sequence[float], paired: bool, least_effect: float) -> Row:
    ratio = (paired_ratio if paired else unpaired_ratio)(base, new)
    return Row(name, unit, median(base), median(new), ratio, least_effect)


def _pairs(base: Sequence[Run], new: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Runs of the same pair, where every run of both sides is in one; otherwise none."""
    before, after = ({run.pair: run for run in side if run.pair} for side in (base, new))
    if not len(before) == len(base) == len(new) == len(after) or before.keys() != after.keys():
        return []
    return [(run, after[pair]) for pair, run in before.items()]


def obstacles(base: Run, new: Run) -> Iterator[str]:
    """What makes two runs' figures those of different things, in words."""
    before, after = _conditions(base.setting), _conditions(new.setting)
    for name, value in before.items():
        if after[name] != value:
            yield f"{name} is {after[name]} in {new.where}, {value} in {base.where}"


def _conditions(setting: Setting) -> dict[str, object]:
    """All that must be the same, by name."""
    env = setting.environment
    return {
        "environment.machine": env.texts["machine"],
        "environment.processor": repr(env.texts["processor"]),
        "environment.cores": env.cores,
        "environment.instruction_set": " ".join(env.instruction_set) or "none",
        "environment.saturates": env.saturates,
        "profile.name": setting.profile,
        "profile.cores": setting.cores,
        "profile.memory_mib": setting.memory_mib,
        "cpus": setting.cpus,
        "cores_enforced": setting.cores_enforced,
        "limit_enforced": setting.memory_enforced,
        "execution": setting.execution,
        "simulated": setting.simulated,
        "bundle.target": setting.bundle.target,
        **{f"job.{name}": value for name, value in setting.job.items()},
        "job.options": dict(setting.options),
        "first_token_of.tiles": setting.first_token_tiles,
    }


def _notes(base: Run, new: Run) -> Iterator[str]:
    before, after = base.setting, new.setting
    for name in ("system", "python", "onnxruntime", "numpy"):
        a, b = (s.environment.texts[name] for s in (before, after))
        if a != b:
            yield f"{name} is {b}, at the base {a}"
    for name in ("model", "recipe", "payload_digest"):
        a, b = (getattr(s.bundle, name)[:12] for s in (before, after))
        if a != b:
            yield f"the bundle's {name} is {b}, at the base {a}"
    if before.first_token_tokens != after.first_token_tokens:
        yield f"the prompt has {after.first_token_tokens} tokens, at the base {before.first_token_tokens}"
