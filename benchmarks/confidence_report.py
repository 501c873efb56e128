"""The report of benchmarks.confidence as Markdown."""

from typing import Any

from benchmarks.markdown import cell


def report_text(report: dict[str, Any]) -> str:
    """All of it, for a person."""
    bundle, test, fit = report["bundle"], report["test"], report["fit"]
    digests = f"Payload {bundle['payload_digest'][:12]}, template {report['template_digest'][:12]}"
    lines = [
        f"# Confidence of {cell(bundle['model'])} {cell(bundle['recipe'])} ({cell(bundle['target'])})",
        "",
        f"{digests}, {cell(report['engine'])}, answers of at most {report['max_tokens']} tokens. Intervals of 95 %.",
        "",
        "| split | answers | wrong | hard signals | wrong by kind |",
        "|---|---|---|---|---|",
    ]
    for split, row in report["data"].items():
        low, high = row["interval_95"]
        kinds = ", ".join(f"{cell(kind)} {one['wrong'] / one['answers']:.1%}" for kind, one in row["by_kind"].items())
        rate = f"{row['wrong'] / row['answers']:.1%} ({low:.1%} to {high:.1%})"
        lines.append(f"| {split} | {row['answers']:,} | {rate} | {row['hard_signals']} | {kinds} |")
    chance = test["ece_of_a_perfect_model"]
    left_out = ", ".join(f"{name} {value:.3f}" for name, value in fit["left_out"].items())
    lines += [
        "",
        f"Fitted with penalty {fit['penalty']:g}; on left-out folds of the calibration split: {left_out}.",
        "",
        "On the test split:",
        "",
        f"- calibration error (ECE, 10 bins) {_value(test['ece'], 3)}; a perfect model's by chance: {chance:.3f}",
        f"- Brier {_value(test['brier'], 3)} (the rate alone: {test['brier_of_the_rate_alone']:.3f})",
        f"- log loss {_value(test['log_loss'], 3)}",
        f"- AUROC {_value(test['auroc'], 3)}, area under the risk-coverage curve {_value(test['risk_area'], 4)}",
        "",
        "| escalated | wrong caught | beyond random | accuracy, if the next is right always | or with 90 % |",
        "|---|---|---|---|---|",
    ]
    for row in test["budgets"]:
        bought = [f"{_percent(one)}; random {one['random']:.1%}" for one in row["accuracy"]]
        cells = [f"{row['budget']:.0%}", _percent(row["wrong_caught"]), _percent(row["beyond_random"]), *bought]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| threshold for p_wrong | chosen for | escalates | wrong caught |", "|---|---|---|---|"]
    for row in test["at_thresholds"]:
        chosen = f"{row['threshold']:.3f} | {row['budget']:.0%}"
        lines.append(f"| {chosen} | {row['escalated']:.1%} | {row['wrong_caught']:.1%} |")
    lines += ["", "| coverage | wrong among the answers kept |", "|---|---|"]
    lines += [f"| {row['coverage']:.0%} | {_percent(row, 2)} |" for row in test["risk_coverage"]]
    lines += ["", "| bin | answers | said | wrong |", "|---|---|---|---|"]
    for number, row in enumerate(test["reliability"], 1):
        lines.append(f"| {number} | {row['answers']} | {row['said']:.3f} | {row['wrong']:.3f} |")
    lines += ["", "| kind | answers | said | wrong |", "|---|---|---|---|"]
    for kind, row in test["by_kind"].items():
        lines.append(f"| {cell(kind)} | {row['answers']} | {row['said']:.3f} | {row['wrong']:.3f} |")
    lines += ["", "| ranked by | AUROC | wrong caught with 10 % | 20 % | 30 % |", "|---|---|---|---|---|"]
    for name, row in {"p_wrong": _own(test), **test["other_rankings"]}.items():
        shares = " | ".join(f"{share:.1%}" for share in row["caught"].values())
        lines.append(f"| {name} | {row['auroc']:.3f} | {shares} |")
    verdict = "beats" if test["passed"] else "does NOT beat"
    lines += ["", f"At every budget together it **{verdict}** random escalation by intervals that exclude zero."]
    return "\n".join(lines) + "\n"


def _own(test: dict[str, Any]) -> dict[str, Any]:
    caught = {str(row["budget"]): row["wrong_caught"]["value"] for row in test["budgets"]}
    return {"auroc": test["auroc"]["value"], "caught": caught}


def _value(figure: dict[str, Any], digits: int) -> str:
    low, high = figure["interval_95"]
    return f"{figure['value']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _percent(figure: dict[str, Any], digits: int = 1) -> str:
    low, high = figure["interval_95"]
    return f"{figure['value']:.{digits}%} ({low:.{digits}%} to {high:.{digits}%})"
