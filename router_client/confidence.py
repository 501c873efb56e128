"""How probably a local answer is wrong, by a model that was fitted on the very bundle and prompt that gave it.

A ridge logistic regression on what the tokens' log-probabilities say, kept in a small JSON file beside the bundle
(FORMAT.md). Of another bundle or another prompt it says nothing, so the file names both by digest and is refused where
they differ; then only the hard signals of local.py count. Not covered: fitting it; documents unlike those it was
fitted on; answers that were sampled at a temperature.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router_client.local import Token

SCHEMA = 1
# In nats. A quantile is linear between neighbours; a logprob is taken from -50 to 0, a margin from -50 to 50.
FEATURES = (
    "logprob_min",
    "logprob_p10",
    "logprob_p50",
    "logprob_sum",
    "log_surprise",  # the natural logarithm of -logprob_sum, at least 1e-6
    "margin_min",
    "margin_p10",
    "log_tokens",  # the natural logarithm of the number of tokens, the stop token included
)
MOST_BYTES = 2**16
MOST_NUMBER = 1e6
WIDEST = 50.0
LEAST_SURPRISE = 1e-6
KEYS = {"schema", "payload_digest", "template_digest", "bias", "features", "budgets", "fitted"}

log = logging.getLogger("router_client")


class ConfidenceError(ValueError):
    """A file that cannot be used, or is of another bundle or prompt; names file, field, found and wanted."""


@dataclass(frozen=True)
class Feature:
    """One term: weight * (value - mean) / scale."""

    name: str
    mean: float
    scale: float
    weight: float


@dataclass(frozen=True)
class Confidence:
    """The model; a function from tokens to the probability that what they say is wrong.

    budgets: share of answers -> the p_wrong that this share of the fitted answers was above: what to set
        `Policy.max_p_wrong` to for at most so many escalations, of documents like those.
    """

    features: tuple[Feature, ...]
    bias: float
    budgets: Mapping[float, float]

    def __call__(self, tokens: Sequence[Token]) -> float | None:
        """From 0 to 1; None for tokens without log-probabilities or margins."""
        values = features([t.logprob for t in tokens], [t.margin for t in tokens])
        if values is None:
            return None
        z = self.bias + sum(f.weight * (values[f.name] - f.mean) / f.scale for f in self.features)
        small = math.exp(-abs(z))
        return (1.0 if z >= 0 else small) / (1 + small)


def features(logprobs: Sequence[float | None], margins: Sequence[float | None]) -> dict[str, float] | None:
    """The values of FEATURES for an answer's tokens; None if there are none, or one is missing or NaN."""
    known = [v for v in logprobs if v is not None and not math.isnan(v)]
    wins = [v for v in margins if v is not None and not math.isnan(v)]
    if not known or len(known) < len(logprobs) or len(wins) < len(logprobs):
        return None
    known = sorted(min(max(v, -WIDEST), 0.0) for v in known)
    wins = sorted(min(max(v, -WIDEST), WIDEST) for v in wins)
    total = sum(known)
    values = (
        known[0],
        quantile(known, 0.1),
        quantile(known, 0.5),
        total,
        math.log(max(-total, LEAST_SURPRISE)),
        wins[0],
        quantile(wins, 0.1),
        math.log(len(known)),
    )
    return dict(zip(FEATURES, values, strict=True))


def quantile(ordered: Sequence[float], part: float) -> float:
    """Of values in order, linear between neighbours."""
    place = part * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def load(path: Path, payload_digest: str, template_digest: str) -> Confidence:
    """Reads a file, for the bundle and the prompt with these digests.

    Raises:
        ConfidenceError: for a file that is not there, is not what it should be, or is of another bundle or prompt.
    """
    values = _object(path)
    if values.get("schema") != SCHEMA or isinstance(values.get("schema"), bool):
        raise ConfidenceError(f"{path}: schema is {_shown(values.get('schema'))}, want {SCHEMA}")
    if set(values) != KEYS:
        wrong = ", ".join(_shown(k) for k in sorted(set(values) ^ KEYS)[:5])
        raise ConfidenceError(f"{path}: {wrong} missing or unknown, want {', '.join(sorted(KEYS))}")
    for key, wanted in (("payload_digest", payload_digest), ("template_digest", template_digest)):
        if values[key] != wanted:
            raise ConfidenceError(f"{path}: {key} is {_shown(values[key])}, the bundle's is {_shown(wanted)}")
    rows = values["features"]
    if not isinstance(rows, list) or not 1 <= len(rows) <= len(FEATURES):
        raise ConfidenceError(f"{path}: features is {_shown(rows)}, want a list of 1 to {len(FEATURES)}")
    terms = tuple(_feature(row, f"{path}: features[{i}]") for i, row in enumerate(rows))
    if len({term.name for term in terms}) < len(terms):
        raise ConfidenceError(f"{path}: features name one twice")
    return Confidence(terms, _number(values["bias"], f"{path}: bias"), _budgets(values["budgets"], f"{path}: budgets"))


def load_or_warn(path: Path, payload_digest: str, template_digest: str) -> Confidence | None:
    """As `load`; where that refuses, None and one warning with the reason: then only the hard signals count."""
    try:
        return load(path, payload_digest, template_digest)
    except ConfidenceError as exc:
        log.warning("low confidence is not judged: %s", exc)
        return None


def _object(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as exc:
        raise ConfidenceError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    if len(data) > MOST_BYTES:
        raise ConfidenceError(f"{path}: has more than {MOST_BYTES:,} bytes")
    try:
        values = json.loads(data.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as exc:
        raise ConfidenceError(f"{path}: is not JSON: {exc}") from exc
    if not isinstance(values, dict):
        raise ConfidenceError(f"{path}: is {_shown(values)}, want an object")
    return values


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _feature(row: Any, where: str) -> Feature:
    names = {"name", "mean", "scale", "weight"}
    if not isinstance(row, dict) or set(row) != names:
        raise ConfidenceError(f"{where} is {_shown(row)}, want an object of {', '.join(sorted(names))}")
    if row["name"] not in FEATURES:
        raise ConfidenceError(f"{where}.name is {_shown(row['name'])}, want one of {', '.join(FEATURES)}")
    mean, scale, weight = (_number(row[key], f"{where}.{key}") for key in ("mean", "scale", "weight"))
    if scale < 1 / MOST_NUMBER:
        raise ConfidenceError(f"{where}.scale is {scale}, want {1 / MOST_NUMBER} or more")
    return Feature(row["name"], mean, scale, weight)


def _budgets(value: Any, where: str) -> dict[float, float]:
    if not isinstance(value, dict) or len(value) > 20:
        raise ConfidenceError(f"{where} is {_shown(value)}, want an object of at most 20")
    found = {}
    for key, limit in value.items():
        try:
            share = float(key)
        except ValueError:
            share = math.nan
        limit = _number(limit, f"{where}[{_shown(key)}]")  # noqa: PLW2901 -- checked
        if not (0 < share < 1 and 0 <= limit <= 1):
            raise ConfidenceError(f"{where}[{_shown(key)}] is {limit}, want a share between 0 and 1, and 0 to 1")
        found[share] = limit
    return found


def _number(value: Any, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and abs(value) <= MOST_NUMBER):  # nor is NaN
        raise ConfidenceError(f"{where} is {_shown(value)}, want a number of at most {MOST_NUMBER:,.0f} either way")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
