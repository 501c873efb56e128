"""What a search found, and how it is written: the recipe as TOML, the front as JSON and as a drawing, a table."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.front import Option, Point
from benchmarks.groups import Group
from quantize.recipe import Recipe, Scheme

SCHEMA = 1  # of the front's JSON


@dataclass(frozen=True)
class Found:
    """What a search found.

    about: what was asked for and of what: digests of model and documents, limits.
    chosen: the number of the point in `front`.
    measured: of the points that were measured whole, by number: the fields of `loss_row`.
    """

    about: Mapping[str, Any]
    recipe: Recipe
    groups: tuple[Group, ...]
    options: tuple[tuple[Option, ...], ...]
    front: tuple[Point, ...]
    chosen: int
    measured: Mapping[int, Mapping[str, Any]]


def recipe_text(recipe: Recipe) -> str:
    """A recipe as TOML."""
    lines = [f"name = {_text(recipe.name)}", f"description = {_text(recipe.description)}"]
    if recipe.factors:
        lines.append("factors = true")
    for pattern, scheme in recipe.rules:
        fields: dict[str, Any] = {"match": pattern, "format": scheme.format}
        if scheme.format == "block":
            fields |= {"bits": scheme.bits, "block": scheme.block, "symmetric": scheme.symmetric}
            if scheme.rounding != Scheme.rounding:
                fields |= {"rounding": scheme.rounding}
        elif scheme.format == "column":
            fields |= {"reduced_range": scheme.reduced_range}
            if scheme.activations != Scheme.activations:
                fields |= {"activations": scheme.activations}
        lines += ["", "[[rule]]", *(f"{key} = {_text(value)}" for key, value in fields.items())]
    lines += ["", "[limits]", *(f"{key} = {_text(value)}" for key, value in vars(recipe.limits).items())]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)  # a TOML value too: strings, numbers, true and false are alike


def front_record(found: Found) -> dict[str, Any]:
    """The front and all that was measured, as JSON: each point says what it changes of the one before."""
    rows = []
    for number, point in enumerate(found.front):
        before = found.front[number - 1].formats if number else (None,) * len(found.groups)
        steps = zip(found.groups, before, point.formats, strict=True)
        rows.append(
            {
                "size_bytes": point.size_bytes,
                "predicted_kl": point.loss,
                "changed": {group.name: new for group, old, new in steps if new != old},
                "measured": found.measured.get(number),
            }
        )
    return {
        "schema": SCHEMA,
        **found.about,
        "groups": [
            {"name": group.name, "options": [vars(option) for option in options]}
            for group, options in zip(found.groups, found.options, strict=True)
        ],
        "front": rows,
        "chosen": found.chosen,
    }


def draw_front(found: Found, path: Path) -> None:
    """The front as an SVG; the same front, the same bytes."""
    import matplotlib as mpl  # a second, and only here
    from matplotlib.figure import Figure  # without pyplot nothing asks for a screen

    with mpl.rc_context({"svg.hashsalt": "front", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        sizes = [point.size_bytes / 1e6 for point in found.front]
        axes.plot(sizes, [p.loss for p in found.front], ".-", color="tab:blue", label="predicted: sum over groups")
        numbers = sorted(found.measured)
        rows = [found.measured[i] for i in numbers]
        spread = [[abs(r["kl_interval_95"][side] - r["kl"]) for r in rows] for side in (0, 1)]
        measured = [row["kl"] for row in rows]
        axes.errorbar(
            [sizes[i] for i in numbers],
            measured,
            yerr=spread,
            fmt="o",
            color="tab:orange",
            capsize=3,
            label="measured, 95 % interval",
        )
        axes.plot(
            sizes[found.chosen],
            found.measured[found.chosen]["kl"],
            "s",
            markersize=11,
            fillstyle="none",
            color="black",
            label="chosen",
        )
        axes.axhline(found.about["max_loss"], color="grey", linestyle="--", linewidth=1, label="most loss allowed")
        if min(point.loss for point in found.front) > 0 and min(measured) > 0:
            axes.set_yscale("log")
        axes.set_xlabel("bundle, MB")
        axes.set_ylabel("mean KL from full precision, nats a token")
        axes.legend()
        axes.grid(visible=True, alpha=0.3)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def table(found: Found) -> str:
    """The points that were measured, as Markdown."""
    lines = ["| MB | KL predicted | KL measured | 95 % | exact | full precision |", "|---|---|---|---|---|---|"]
    for number in sorted(found.measured):
        point, row = found.front[number], found.measured[number]
        low, high = row["kl_interval_95"]
        exact = row["exact"]
        cells = [f"{point.size_bytes / 1e6:.2f}", f"{point.loss:.2e}", f"{row['kl']:.2e}", f"{low:.1e} to {high:.1e}"]
        cells += [f"{exact[part]['mean']:.1%}" if exact else "" for part in ("recipe", "full_precision")]
        mark = " (chosen)" if number == found.chosen else ""
        lines.append(f"| {cells[0]}{mark} | {' | '.join(cells[1:])} |")
    return "\n".join(lines)


def megabytes(size: float) -> str:
    """Bytes as text."""
    return f"{size / 1e6:.2f} MB"
