"""What a report is made from: lines of `benchmarks.run` and `benchmarks.budget`, and the results of quality, sizes and
kernels, each read into what it promises or refused by file, line and field."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checked import At, read_lines, read_whole

RUN_SCHEMA = 1
BUDGET_SCHEMA = 1
PHASE = re.compile(r"[a-z][a-z0-9_]{0,30}")
MOST_PHASES = 20
ENVIRONMENT = ("machine", "system", "processor", "python", "onnxruntime", "numpy")  # the texts of it
SETTINGS = ("tiles", "prefill_tokens", "decode_at", "decode_tokens", "threads", "seed")  # the numbers of a job


@dataclass(frozen=True)
class BundleName:
    """Which bundle it was."""

    model: str
    target: str
    recipe: str
    payload_digest: str

    def __str__(self) -> str:
        return f"{self.model} {self.recipe} ({self.target}), payload {self.payload_digest[:12]}"


@dataclass(frozen=True)
class Environment:
    """The machine, and what ran on it. `texts` has the fields of ENVIRONMENT."""

    texts: Mapping[str, str]
    cores: int | None
    instruction_set: tuple[str, ...]
    saturates: bool


@dataclass(frozen=True)
class Setting:
    """What was measured and within what: runs of two settings have different things to say.

    limits: of the profile, where the line has them: name -> ms.
    job: the numbers of SETTINGS.
    """

    bundle: BundleName
    profile: str
    cores: int
    memory_mib: int
    limits: Mapping[str, float]
    execution: str
    simulated: bool
    memory_enforced: bool
    cores_enforced: bool
    cpus: int
    environment: Environment
    job: Mapping[str, int]
    options: Mapping[str, str]
    first_token_tiles: int
    first_token_tokens: int


@dataclass(frozen=True)
class PhaseRun:
    """One phase of one run; `limit_ms` is what the machine allows at best, where that is known."""

    samples_ms: tuple[float, ...]
    cpu_s: float
    peak_rss_mib: float | None
    limit_ms: float | None = None


@dataclass(frozen=True)
class Run:
    """A line of `benchmarks.run` or `device_harness.run`.

    where: the file and line.
    pair: the name of a comparison and the number of this run's pair in it, where it was made by `benchmarks.paired`.
    memory: (s, MiB) over time; starts: (s, phase).
    """

    where: str
    measured: str
    commit: str
    setting: Setting
    phases: Mapping[str, PhaseRun]
    peak_counted_mib: float | None
    over: tuple[str, ...]
    memory: tuple[tuple[float, float], ...]
    starts: tuple[tuple[float, str], ...]
    pair: tuple[str, int] | None

    @property
    def peak_rss_mib(self) -> float | None:
        """The highest of the phases."""
        return max((p.peak_rss_mib for p in self.phases.values() if p.peak_rss_mib is not None), default=None)


@dataclass(frozen=True)
class Accuracy:
    """The score on documents, 0 to 1."""

    mean: float
    interval_95: tuple[float, float]
    items: int
    data: str
    metric: str


@dataclass(frozen=True)
class BudgetPoint:
    """A line of `benchmarks.budget`: what a picture of at most `tiles` tiles costs."""

    where: str
    bundle: BundleName
    profile: str
    simulated: bool
    environment: Environment
    tiles: int
    image_tokens: int
    prompt_tokens: int
    samples_ms: tuple[float, ...]
    peak_rss_mib: float | None
    accuracy: Accuracy | None


@dataclass(frozen=True)
class Loss:
    """What a recipe loses, mean KL in nats a token, and its bundle's size where that is known."""

    recipe: str
    model: str
    kl: float
    interval_95: tuple[float, float]
    score: float | None
    size_bytes: int | None


@dataclass(frozen=True)
class Kernel:
    """A row of a pytest-benchmark file, s."""

    name: str
    rounds: int
    median_s: float
    quartiles_s: tuple[float, float]


def read_runs(path: Path) -> list[Run]:
    """The runs of a file. Raises ReportError."""
    return [_run(line) for line in read_lines(path)]


def read_budget(path: Path) -> list[BudgetPoint]:
    """The points of a token-budget curve. Raises ReportError."""
    return [budget_point(line) for line in read_lines(path)]


def read_losses(path: Path, sizes: Path | None) -> list[Loss]:
    """The bundles of a report of `benchmarks.quality` that has a reference.

    Args:
        path: its JSON.
        sizes: lines with payload_digest and payload_bytes, as `benchmarks.recipe_loss` writes them.

    Raises:
        ReportError: naming file and field.
    """
    known = {}
    if sizes is not None:
        known = {line["payload_digest"].text(): line["payload_bytes"].whole(1) for line in read_lines(sizes)}
    found = []
    for row in read_whole(path)["systems"].items():
        against, identity = row.optional("against_reference"), row["identity"]
        kl = against.optional("kl") if against else None
        if kl is None or identity.optional("payload_digest") is None:
            continue
        score = row["scores"].optional("all")
        found.append(
            Loss(
                recipe=identity["recipe"].text(),
                model=identity["model"].text(),
                kl=kl["mean"].number(),
                interval_95=_interval(kl["interval_95"]),
                score=score["mean"].number(most=1) if score else None,
                size_bytes=known.get(identity["payload_digest"].text()),
            )
        )
    return found


def read_kernels(path: Path) -> list[Kernel]:
    """The rows of a JSON of pytest-benchmark. Raises ReportError."""
    rows = [(row["name"].text(), row["stats"]) for row in read_whole(path)["benchmarks"].items()]
    return [
        Kernel(
            name.removeprefix("test_"),
            stats["rounds"].whole(1),
            stats["median"].positive(),
            (stats["q1"].number(), stats["q3"].number()),
        )
        for name, stats in rows
    ]


def _run(line: At) -> Run:
    _schema(line, RUN_SCHEMA)
    if line["execution"].value == "qemu-user":
        line["execution"].fail("a run that has times: an emulated one states none")
    physical = line.optional("physical")
    least = {name: at.positive() for name, at in physical["limits_ms"].fields(MOST_PHASES).items()} if physical else {}
    phases = {name: _phase(name, at, least.get(name)) for name, at in line["phases"].fields(MOST_PHASES).items()}
    if not phases:
        line["phases"].fail("a phase or more")
    pair = line.optional("pair")
    return Run(
        where=line.where,
        measured=line["measured"].text(),
        commit=line["commit"].text(),
        setting=_setting(line),
        phases=phases,
        peak_counted_mib=_number_or_none(line, "peak_counted_mib"),
        over=tuple(at.text() for at in line["over"].items(100)),
        memory=tuple((a.number(), b.number()) for a, b in map(_two, line["memory_over_time"].items())),
        starts=tuple((a.number(), b.text()) for a, b in map(_two, line["phase_starts"].items(MOST_PHASES))),
        pair=(pair["comparison"].text(), pair["number"].whole()) if pair else None,
    )


def _schema(line: At, wanted: int) -> None:
    if line["schema"].whole() != wanted:
        line["schema"].fail(str(wanted))


def _phase(name: str, at: At, limit_ms: float | None) -> PhaseRun:
    if not PHASE.fullmatch(name):
        at.fail("a phase under a name of lower case letters, digits and _")
    samples = at["samples_ms"].numbers(least_items=1, positive=True)
    return PhaseRun(samples, at["cpu_s"].number(), _number_or_none(at, "peak_rss_mib"), limit_ms)


def _setting(line: At) -> Setting:
    profile, job, first = line["profile"], line["job"], line["first_token_of"]  # null: a device looks at no picture
    limits = profile.optional("limits")
    return Setting(
        bundle=_bundle(line["bundle"]),
        profile=profile["name"].text(),
        cores=profile["cores"].whole(1),
        memory_mib=profile["memory_mib"].whole(1),
        limits={name: at.positive() for name, at in limits.fields(10).items()} if limits else {},
        execution=line["execution"].text(),
        simulated=line["simulated"].flag(),
        memory_enforced=line["limit_enforced"].flag(),
        cores_enforced=line["cores_enforced"].flag(),
        cpus=line["cpus"].whole(),
        environment=_environment(line["environment"]),
        job={name: job[name].whole() for name in SETTINGS},
        options={name: at.text() for name, at in job["options"].fields().items()},
        first_token_tiles=first["tiles"].whole() if first.value is not None else 0,
        first_token_tokens=first["tokens"].whole() if first.value is not None else 0,
    )


def _bundle(at: At) -> BundleName:
    return BundleName(*(at[name].text() for name in ("model", "target", "recipe", "payload_digest")))


def _environment(at: At) -> Environment:
    cores = at.optional("cores")
    return Environment(
        texts={name: at[name].text() for name in ENVIRONMENT},
        cores=cores.whole(1) if cores else None,
        instruction_set=tuple(one.text() for one in at["instruction_set"].items(100)),
        saturates=at["saturates"].flag(),
    )


def budget_point(line: At) -> BudgetPoint:
    """One line of `benchmarks.budget`. Raises ReportError."""
    _schema(line, BUDGET_SCHEMA)
    accuracy = line.optional("accuracy")
    return BudgetPoint(
        where=line.where,
        bundle=_bundle(line["bundle"]),
        profile=line["profile"]["name"].text(),
        simulated=line["simulated"].flag(),
        environment=_environment(line["environment"]),
        tiles=line["tiles"].whole(),
        image_tokens=line["image_tokens"].whole(),
        prompt_tokens=line["prompt_tokens"].whole(1),
        samples_ms=line["samples_ms"].numbers(least_items=1, positive=True),
        peak_rss_mib=_number_or_none(line, "peak_rss_mib"),
        accuracy=_accuracy(accuracy) if accuracy else None,
    )


def _accuracy(at: At) -> Accuracy:
    low, high = (one.number(most=1) for one in _two(at["interval_95"]))
    texts = at["data"].text(), at["metric"].text()
    return Accuracy(at["mean"].number(most=1), (low, high), at["items"].whole(1), *texts)


def _two(at: At) -> tuple[At, At]:
    found = at.items(2, 2)
    return found[0], found[1]


def _interval(at: At) -> tuple[float, float]:
    low, high = _two(at)
    return low.number(), high.number()


def _number_or_none(at: At, key: str) -> float | None:
    value = at[key]
    return None if value.value is None else value.number()
