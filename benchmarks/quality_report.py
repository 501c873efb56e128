"""Answers to figures: scores by task, what a system loses against the reference, and both as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.datasets import DataSet, Item
from benchmarks.markdown import cell
from benchmarks.scores import EQUAL, mean_interval, paired_summary, score, score_summary

LISTED = 100  # lost answers in the report, at most
SHOWN = 10  # of them in its Markdown


@dataclass(frozen=True)
class Given:
    """A system's answer to one item, and whether it was cut off at the most tokens allowed.

    Of each token of the reference's answer: the divergence KL(reference || system) in nats, and whether both have the
    same best token; None where the system's logits were not seen.
    """

    text: str
    cut: bool = False
    kl: tuple[float, ...] | None = None
    agreed: tuple[bool, ...] | None = None


def summarise(data: DataSet, given: Sequence[Given], documents: Sequence[int]) -> dict[str, Any]:
    """Scores of one system: of all items that have right answers, and by task where there are several.

    Args:
        data: the items.
        given: an answer to each.
        documents: each item's document, by number.
    """
    scores = _scores(data, given)
    labelled = [i for i, value in enumerate(scores) if value is not None]
    return {
        task: score_summary([_known(scores[i]) for i in chosen], [documents[i] for i in chosen])
        for task, chosen in _tasks(data.items, labelled).items()
    }


def compare(
    data: DataSet, reference: Sequence[Given], found: Sequence[Given], documents: Sequence[int]
) -> dict[str, Any]:
    """A system against the reference on the same items; below 0 a difference is a loss."""
    before, after = _scores(data, reference), _scores(data, found)
    labelled = [i for i, value in enumerate(before) if value is not None]
    tasks = {
        task: paired_summary(
            [_known(before[i]) for i in chosen], [_known(after[i]) for i in chosen], [documents[i] for i in chosen]
        )
        for task, chosen in _tasks(data.items, labelled).items()
    }
    lost = [i for i in labelled if _known(after[i]) < _known(before[i]) - EQUAL]
    equal = [float(r.text == f.text) for r, f in zip(reference, found, strict=True)]
    row: dict[str, Any] = {
        "scores": tasks,
        "answers_equal": score_summary(equal, documents),
        "lost": [
            {
                "item": data.items[i].name,
                "question": data.items[i].question,
                "answers": list(data.items[i].answers),
                "reference": reference[i].text,
                "system": found[i].text,
                "scores": [before[i], after[i]],
            }
            for i in lost[:LISTED]
        ],
    }
    followed = [(i, one.kl, one.agreed) for i, one in enumerate(found) if one.kl and one.agreed]
    if followed:
        counts = [float(len(kl)) for _, kl, _ in followed]
        where = [documents[i] for i, _, _ in followed]
        divergences, agreed = [sum(kl) for _, kl, _ in followed], [float(sum(same)) for _, _, same in followed]
        every = np.concatenate([np.asarray(kl) for _, kl, _ in followed])
        row["tokens"] = len(every)
        row["kl"] = {
            "mean": float(every.mean()),
            "interval_95": list(mean_interval(divergences, counts, where)),
            "p99": float(np.quantile(every, 0.99)),
        }
        row["top1"] = {"rate": sum(agreed) / sum(counts), "interval_95": list(mean_interval(agreed, counts, where))}
    return row


def _scores(data: DataSet, given: Sequence[Given]) -> list[float | None]:
    """Of each item; None for one without right answers."""
    return [
        score(data.metric, one.text, item.answers) if item.answers else None
        for item, one in zip(data.items, given, strict=True)
    ]


def _known(value: float | None) -> float:
    assert value is not None
    return value


def _tasks(items: Sequence[Item], chosen: Sequence[int]) -> dict[str, list[int]]:
    """Items by task, all of them first; nothing where none is chosen."""
    names = sorted({items[i].task for i in chosen} - {"all"})
    every = {"all": list(chosen)} if chosen else {}
    if len({items[i].task for i in chosen}) < 2:
        return every
    return every | {name: [i for i in chosen if items[i].task == name] for name in names}


def report_text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    data, decoding = report["data"], report["decoding"]
    lines = [
        f"# Quality on {cell(data['name'])}: {data['items']} questions, {data['documents']} documents",
        "",
        f"Metric {data['metric']}; greedy, at most {decoding['max_new_tokens']} tokens"
        + (f", each question followed by {cell(repr(decoding['instruction']))}" if decoding["instruction"] else "")
        + f". Data `{data['digest'][:12]}`. Intervals are of 95 %, over documents.",
        "",
    ]
    rows = [report["reference"]] if report["reference"] else []
    rows += report["systems"]
    if any(row["scores"] for row in rows):
        lines += ["| system | task | questions | score | interval |", "|---|---|---|---|---|"]
        for row in rows:
            for task, one in row["scores"].items():
                span = f"{_percent(*one['interval_95'])}, {one['interval']}"
                cells = [cell(row["name"]), cell(task), str(one["items"]), f"{one['mean']:.2%}", span]
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    for row in report["systems"]:
        if row["against_reference"]:
            lines += [f"## {cell(row['name'])} against {cell(report['reference']['name'])}", ""]
            lines += _against(row["against_reference"])
    lines.append("What the figures are of:")
    lines.append("")
    for row in rows:
        of = row["identity"]
        cut = f"; {row['cut']} answers cut off at {decoding['max_new_tokens']} tokens" if row["cut"] else ""
        what = next((f"{k} `{of[k]}`" for k in ("payload_digest", "checkpoint_digest", "url") if k in of), "")
        lines.append(f"- {cell(row['name'])}: {what}{cut}")
    return "\n".join(lines) + "\n"


def _against(row: dict[str, Any]) -> list[str]:
    lines = []
    if row["scores"]:
        lines += [
            "| task | difference | interval | lost / gained | documents worse / better | worse at most | sign test |",
            "|---|---|---|---|---|---|---|",
        ]
        for task, one in row["scores"].items():
            cells = [
                cell(task),
                f"{one['difference']:+.2%}",
                " to ".join(f"{bound:+.2%}" for bound in one["interval_95"]),
                f"{one['lost']} / {one['gained']}",
                f"{one['worse']} / {one['better']}",
                f"{one['worse_rate_interval_95'][1]:.2%}",
                f"p = {one['sign_test_p']:.3g}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    equal = row["answers_equal"]
    sentence = f"The same answer word for word: {equal['mean']:.2%} ({_percent(*equal['interval_95'])})."
    if "kl" in row:
        kl, top1 = row["kl"], row["top1"]
        sentence += (
            f" Along the reference's answers, {row['tokens']} tokens: mean KL {kl['mean']:.2e} "
            f"({kl['interval_95'][0]:.2e} to {kl['interval_95'][1]:.2e}), 99th percentile {kl['p99']:.2e}; "
            f"the same best token {top1['rate']:.2%} ({_percent(*top1['interval_95'])})."
        )
    lines += [sentence, ""]
    if row["lost"]:
        lines += ["| lost | question | right | reference | system |", "|---|---|---|---|---|"]
        for one in row["lost"][:SHOWN]:
            right = ", ".join(dict.fromkeys(one["answers"]))
            texts = [one["item"], one["question"], right, one["reference"], one["system"]]
            lines.append(f"| {' | '.join(map(cell, texts))} |")
        lines.append("")
    return lines


def _percent(low: float, high: float) -> str:
    return f"{low:.2%} to {high:.2%}"
