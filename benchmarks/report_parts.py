"""A report from top to bottom: verdicts, comparisons, runs, token budget, losses, kernels."""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from benchmarks.comparison import Comparison
from benchmarks.figures import Inputs, groups, spread
from benchmarks.noise import LEAST_RUNS
from benchmarks.plots import (
    Bar,
    Forest,
    Mark,
    Place,
    Trace,
    curve_plot,
    forest_plot,
    memory_plot,
    ranges_plot,
    scatter_plot,
    short,
)
from benchmarks.records import BudgetPoint, BundleName, Kernel, Loss, Run
from benchmarks.report_page import Block, Facts, Heading, Plot, Table, Text

TITLE = "Benchmark report"
NOTHING = 1e-9  # a mean KL below is rounding of fp32, and has no place on a plot of losses


def report_blocks(inputs: Inputs, figures: dict[str, Any]) -> list[Block]:
    """The report from top to bottom."""
    blocks: list[Block] = [Heading(1, TITLE), *map(comparison_verdict, inputs.comparisons)]
    blocks += dict.fromkeys(map(_limits_verdict, figures["groups"]))
    for number, one in enumerate(inputs.comparisons, 1):
        blocks += comparison_blocks(one, f"comparison-{number}")
    for number, (runs, row) in enumerate(zip(groups(inputs.runs), figures["groups"], strict=True), 1):
        blocks += _group_blocks(runs, row, f"group-{number}")
    curves: dict[tuple[BundleName, str], list[BudgetPoint]] = {}
    for point in inputs.budget:
        curves.setdefault((point.bundle, point.profile), []).append(point)
    for number, points in enumerate(curves.values(), 1):
        blocks += _budget_blocks(sorted(points, key=lambda point: point.tiles), f"budget-{number}")
    if inputs.losses:
        blocks += _loss_blocks(inputs.losses)
    if inputs.kernels:
        blocks += _kernel_blocks(inputs.kernels)
    return blocks


def comparison_verdict(one: Comparison) -> Text:
    """A comparison in a line."""
    worse = [_named(row.name) for row in one.rows if row.regression]
    base = one.base[0].commit[:12] or "the base"
    if worse:
        return Text(f"Regression against {base}: {', '.join(worse)}", "bad")
    if any(row.ratio.interval_95 for row in one.rows):
        return Text(f"No regression seen against {base}", "good")
    return Text(f"Not judged against {base}: fewer than {LEAST_RUNS} runs", "bad")


def _limits_verdict(row: dict[str, Any]) -> Text:
    over = [limit["name"] for limit in row["limits_met"] if limit["runs_over"]] or row["over"]
    name = f"{row['bundle']['model']} {row['bundle']['recipe']} on profile {row['profile']}"
    return Text(f"{name}: over {', '.join(over)}", "bad") if over else Text(f"{name}: within all limits", "good")


def _group_blocks(runs: Sequence[Run], row: dict[str, Any], name: str) -> Iterator[Block]:
    setting = runs[0].setting
    yield Heading(2, f"{setting.bundle.model} {setting.bundle.recipe} on profile {setting.profile}")
    yield Facts(_facts(runs))
    yield Heading(3, "Phases")
    yield Table(
        "phases",
        ("phase", "samples", "median, ms", "10 % to 90 %, ms", "limit, ms", "CPU, s a run", "peak, MiB"),
        [
            (
                _named(p["name"]),
                str(p["samples"]),
                f"{p['median_ms']:,.2f}",
                f"{p['low_ms']:,.2f} to {p['high_ms']:,.2f}",
                "-" if p["limit_ms"] is None else f"{p['limit_ms']:,.2f} ({p['median_ms'] / p['limit_ms']:.1f} x)",
                f"{p['cpu_s']:.2f}",
                _mib(p["peak_rss_mib"]),
            )
            for p in row["phases"]
        ],
    )
    if row["limits_met"]:
        yield Heading(3, "Limits of the profile")
        yield Table(
            "limits",
            ("limit", "at most", "worst run", "met"),
            [
                (
                    limit["name"],
                    f"{limit['at_most']:,.0f}",
                    f"{limit['worst']:,.1f}",
                    f"no: {limit['runs_over']} of {len(runs)} runs over" if limit["runs_over"] else "yes",
                )
                for limit in row["limits_met"]
            ],
            left=(3,),
        )
    if row["over"]:
        yield Text(f"The runs themselves said that they were over: {'; '.join(row['over'])}.")
    yield _group_plots(runs, row, name)


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    setting = runs[0].setting
    env, job = setting.environment, setting.job
    texts = env.texts
    kept = "kept to it" if setting.memory_enforced else "NOT enforced"
    cores = "kept to them" if setting.cores_enforced else "NOT enforced"
    simulated = "simulated on this machine, no device's figures" if setting.simulated else "measured on the device"
    measured = sorted({min(run.measured for run in runs), max(run.measured for run in runs)})
    packages = (("Python", "python"), ("ONNX Runtime", "onnxruntime"), ("NumPy", "numpy"))
    software = ", ".join(f"{name} {texts[key]}" for name, key in packages if texts[key])
    picture = f"a picture of {setting.first_token_tiles} tiles" if setting.first_token_tiles else "no picture"
    return [
        ("bundle", str(setting.bundle)),
        ("profile", f"{setting.profile}, {simulated}"),
        (
            "cores",
            f"{setting.cpus} of the profile's {setting.cores}, {cores}; threads: {job['threads'] or 'its choice'}",
        ),
        ("memory", f"{setting.memory_mib:,} MiB, {kept}"),
        ("machine", ", ".join(filter(None, (texts["processor"], texts["machine"], f"{env.cores or '?'} cores")))),
        ("instructions", " ".join(env.instruction_set) or "none of those that kernels are chosen by"),
        ("software", f"{texts['system']}; {software}"),
        ("execution", setting.execution),
        *([("first token", f"{picture}, {setting.first_token_tokens:,} tokens")] if setting.first_token_tokens else []),
        (
            "text",
            f"prefill of {job['prefill_tokens']:,} tokens; {job['decode_tokens']:,} tokens at {job['decode_at']:,}",
        ),
        ("runs", f"{len(runs)}, {' to '.join(measured)}"),
        ("commit", runs[0].commit or "not known"),
    ]


def _group_plots(runs: Sequence[Run], row: dict[str, Any], name: str) -> list[Plot]:
    samples = {p: [s for run in runs for s in run.phases[p].samples_ms] for p in runs[0].phases}
    bars = [
        Bar(_named(p["name"]), samples[p["name"]], p["low_ms"], p["median_ms"], p["high_ms"]) for p in row["phases"]
    ]
    title = "Latency by phase"
    svg = ranges_plot(f"{name}-latency", title, bars, "ms, logarithmic")
    plots = [Plot(title, svg, "Dots are samples, the line holds the middle 80 %, the number is the median.")]
    shown = sorted((run for run in runs if run.memory), key=lambda run: -max(mib for _, mib in run.memory))
    if shown:
        traces = [Trace(run.memory, [(s, i) for i, (s, _) in enumerate(run.starts, 1)]) for run in shown]
        key = ", ".join(f"{i} {_named(p)} {short(s)} s" for i, (s, p) in enumerate(shown[0].starts, 1))
        title = "Memory over time"
        svg = memory_plot(f"{name}-memory", title, traces, runs[0].setting.memory_mib)
        plots.append(Plot(title, svg, f"The run with the highest peak, others behind it. Phases begin: {key}."))
    return plots


def comparison_blocks(one: Comparison, name: str) -> Iterator[Block]:
    """What was compared with what, how, and the figures; `name` is its plot's own on the page."""
    base, new = one.base[0], one.new[0]
    yield Heading(2, f"Against {base.commit[:12] or 'the base'}")
    if one.paired:
        how = f"{len(one.base)} interleaved pairs of runs on one machine; ratios are of pairs"
    else:
        how = (
            f"Unpaired: {len(one.base)} runs of the base and {len(one.new)} new ones from another time; what else the "
            "machine did at either time is in the ratios"
        )
    yield Text(
        f"{how}. Intervals are of 95 %, by bootstrap over {'pairs' if one.paired else 'runs'}. A regression: the whole "
        f"interval is above {1 + one.least_effect:g}."
    )
    yield Facts([("base", _version(base)), ("new", _version(new)), *(("note", note) for note in one.notes)])
    yield Table(
        "comparison",
        ("what", "verdict", "ratio", "95 %", "base", "new"),
        [
            (
                f"{_named(row.name)}, {row.unit}",
                row.verdict,
                f"{row.ratio.ratio:.3f}",
                " to ".join(f"{bound:.3f}" for bound in row.ratio.interval_95 or ()) or "-",
                f"{row.base:,.2f}",
                f"{row.new:,.2f}",
            )
            for row in one.rows
        ],
        left=(1,),
    )
    rows = [
        Forest(
            _named(row.name),
            row.ratio.ratio,
            row.ratio.interval_95,
            "worse" if row.regression else "better" if row.ratio.direction < 0 else "same",
        )
        for row in one.rows
    ]
    if rows:
        title = "New against base"
        svg = forest_plot(name, title, rows, one.least_effect)
        band = f"the band is {one.least_effect * 100:g} % either way"
        yield [Plot(title, svg, f"Points are ratios, lines 95 % intervals; {band}.")]


def _version(run: Run) -> str:
    return f"commit {run.commit[:12] or 'not known'}{'+' if run.commit.endswith('+') else ''}; {run.setting.bundle}"


def _budget_blocks(points: Sequence[BudgetPoint], name: str) -> Iterator[Block]:
    first = points[0]
    yield Heading(2, f"Token budget of {first.bundle.model} {first.bundle.recipe} on profile {first.profile}")
    yield Text(
        "What a picture of at most so many tiles costs"
        + (", simulated on this machine. " if first.simulated else ". ")
        + "Accuracy is that of the documents given: what they have no detail for, more tiles cannot show."
    )
    scored = all(point.accuracy for point in points)
    head = ["tiles", "image tokens", "prompt tokens", "samples", "first token, ms", "10 % to 90 %, ms", "peak, MiB"]
    rows = []
    for point in points:
        low, high = spread(point.samples_ms)
        row = [str(point.tiles), f"{point.image_tokens:,}", f"{point.prompt_tokens:,}", str(len(point.samples_ms))]
        row += [f"{median(point.samples_ms):,.1f}", f"{low:,.1f} to {high:,.1f}", _mib(point.peak_rss_mib)]
        one = point.accuracy
        row.append(f"{one.mean:.1%} ({one.interval_95[0]:.1%} to {one.interval_95[1]:.1%})" if one else "-")
        rows.append(row)
    yield Table("token budget", [*head, "accuracy"], rows)
    yield list(_budget_plots(points, name, scored))


def _budget_plots(points: Sequence[BudgetPoint], name: str, scored: bool) -> Iterator[Plot]:
    title, x = "First token by tiles", "tiles, at most"
    places = [Place(p.tiles, median(p.samples_ms), *spread(p.samples_ms), p.samples_ms) for p in points]
    yield Plot(title, curve_plot(f"{name}-time", title, places, (x, "first token, ms")), "Dots are samples.")
    peaks = [Place(p.tiles, m, m, m, (m,)) for p in points if (m := p.peak_rss_mib) is not None]
    if peaks:
        title = "Peak memory by tiles"
        yield Plot(title, curve_plot(f"{name}-memory", title, peaks, (x, "peak memory, MiB")))
    if scored:
        title = "Accuracy by tiles"
        known = [(p.tiles, p.accuracy) for p in points if p.accuracy]
        places = [Place(t, a.mean * 100, a.interval_95[0] * 100, a.interval_95[1] * 100) for t, a in known]
        caption = f"{known[0][1].items:,} questions of {known[0][1].data}, metric {known[0][1].metric}; lines are 95 %."
        yield Plot(title, curve_plot(f"{name}-accuracy", title, places, (x, "accuracy, %")), caption)


def _loss_blocks(losses: Sequence[Loss]) -> Iterator[Block]:
    yield Heading(2, "Size against loss by recipe")
    yield Table(
        "losses",
        ("recipe", "MB", "mean KL, nats a token", "95 %", "score"),
        [
            (
                loss.recipe,
                f"{loss.size_bytes / 1e6:,.2f}" if loss.size_bytes else "-",
                f"{loss.kl:.1e}",
                " to ".join(f"{bound:.1e}" for bound in loss.interval_95),
                f"{loss.score:.2%}" if loss.score is not None else "-",
            )
            for loss in losses
        ],
    )
    drawn = [loss for loss in losses if loss.size_bytes and loss.kl > NOTHING and loss.interval_95[0] > 0]
    if drawn:
        title = "Size against loss"
        marks = [Mark(loss.recipe, (loss.size_bytes or 0) / 1e6, loss.kl, *loss.interval_95) for loss in drawn]
        left = [loss.recipe for loss in losses if loss not in drawn]
        caption = "Lines are 95 %." + (f" Without a known size or a loss: {', '.join(left)}." if left else "")
        svg = scatter_plot("losses", title, marks, ("bundle, MB", "mean KL, nats a token"))
        yield [Plot(title, svg, caption)]


def _kernel_blocks(kernels: Sequence[Kernel]) -> Iterator[Block]:
    yield Heading(2, "Kernels")
    rows = [
        (
            kernel.name,
            str(kernel.rounds),
            short(kernel.median_s * 1e3),
            " to ".join(short(quartile * 1e3) for quartile in kernel.quartiles_s),
        )
        for kernel in kernels
    ]
    yield Table("kernels", ("kernel", "rounds", "median, ms", "middle half, ms"), rows)


def _named(phase: str) -> str:
    return phase.replace("_", " ")


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
