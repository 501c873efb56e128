"""What is said of how probably a local answer is wrong: by hand, against hostile files, and with planted faults."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.confidence import judge, learn, main
from benchmarks.confidence_report import report_text
from benchmarks.datasets import DataSet, Item, read_dataset
from benchmarks.escalation import auroc, caught, ece, evaluate
from benchmarks.hard_documents import HARDSHIPS, make_hard_document
from benchmarks.judged import Judged, drawn_sources, file_sources
from benchmarks.logistic import Numbers, fit, fit_chosen
from demo.documents import make_document, split_of
from export.documents import DataError
from router_client.confidence import (
    FEATURES,
    MOST_BYTES,
    Confidence,
    ConfidenceError,
    Feature,
    features,
    load,
    load_or_warn,
)
from router_client.local import Token
from runtimes.bundle import read_bundle

PAYLOAD, TEMPLATE = "a" * 64, "b" * 64
GOOD: dict[str, Any] = {
    "schema": 1,
    "payload_digest": PAYLOAD,
    "template_digest": TEMPLATE,
    "bias": -1.0,
    "features": [{"name": "margin_min", "mean": 2.0, "scale": 0.5, "weight": -1.5}],
    "budgets": {"0.1": 0.7, "0.2": 0.4},
    "fitted": {"answers": 1000},
}


def written(folder: Path, content: Any) -> Path:
    path = folder / "confidence.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


# ---- features and the model, by hand


def test_features_are_what_they_say() -> None:
    found = features([-0.1, -2.0, -0.2], [3.0, 0.5, 1.0])
    assert found == pytest.approx(
        {
            "logprob_min": -2.0,
            "logprob_p10": -2.0 + 0.2 * 1.8,  # a fifth of the way from the least to the next
            "logprob_p50": -0.2,
            "logprob_sum": -2.3,
            "log_surprise": math.log(2.3),
            "margin_min": 0.5,
            "margin_p10": 0.5 + 0.2 * 0.5,
            "log_tokens": math.log(3),
        }
    )
    certain = features([0.0, 1e-17], [math.inf, 60.0])
    assert certain is not None
    assert (certain["logprob_sum"], certain["log_surprise"], certain["margin_min"]) == (0.0, math.log(1e-6), 50.0)
    least = features([-math.inf], [-math.inf])
    assert least is not None
    assert all(math.isfinite(value) for value in least.values())


@pytest.mark.parametrize(
    ("logprobs", "margins"),
    [([], []), ([-1.0, None], [1.0, 1.0]), ([-1.0], [None]), ([math.nan], [1.0]), ([-1.0], [math.nan])],
)
def test_without_figures_nothing_is_said(logprobs: list[float | None], margins: list[float | None]) -> None:
    assert features(logprobs, margins) is None
    known = Confidence((Feature("margin_min", 0.0, 1.0, 1.0),), 0.0, {})
    assert known([Token("", *pair) for pair in zip(logprobs, margins, strict=True)]) is None


def test_quantiles_are_those_of_numpy() -> None:
    random = np.random.default_rng(1)
    for size in (1, 2, 5, 40):
        logprobs, margins = -random.exponential(size=size), random.exponential(size=size)
        found = features(logprobs.tolist(), margins.tolist())
        assert found is not None
        assert [found["logprob_p10"], found["logprob_p50"]] == pytest.approx(np.quantile(logprobs, [0.1, 0.5]).tolist())
        assert found["margin_p10"] == pytest.approx(np.quantile(margins, 0.1))


def test_a_file_is_the_model_that_it_describes(tmp_path: Path) -> None:
    found = load(written(tmp_path, GOOD), PAYLOAD, TEMPLATE)
    assert found.budgets == {0.1: 0.7, 0.2: 0.4}
    wanted = 1 / (1 + math.exp(-(-1.0 - 1.5 * (1.0 - 2.0) / 0.5)))
    assert found([Token("a", -0.3, 4.0), Token("", -0.1, 1.0, "stop")]) == pytest.approx(wanted)
    huge = replace(found, bias=1e6)
    assert (huge([Token("", -1.0, 1.0)]), replace(found, bias=-1e6)([Token("", -1.0, 1.0)])) == (1.0, 0.0)


# ---- hostile files


def term(**more: Any) -> dict[str, Any]:
    return {"features": [GOOD["features"][0] | more]}


BAD: dict[str, tuple[Any, str]] = {
    "another bundle": ({"payload_digest": "c" * 64}, "payload_digest is 'ccc"),
    "another prompt": ({"template_digest": None}, "template_digest is None"),
    "another schema": ({"schema": 2}, "schema is 2, want 1"),
    "a schema that is true": ({"schema": True}, "schema is True"),
    "an unknown feature": (term(name="entropy"), r"features\[0\].name is 'entropy', want one of logprob_min"),
    "a feature twice": ({"features": GOOD["features"] * 2}, "name one twice"),
    "no feature": ({"features": []}, r"features is \[\]"),
    "too many": ({"features": GOOD["features"] * 99}, "want a list of 1 to 8"),
    "a feature with more": (term(power=2), r"features\[0\] is"),
    "NaN": (term(weight=math.nan), "not JSON: NaN is no number"),
    "infinity": ({"bias": -math.inf}, "not JSON: -Infinity is no number"),
    "a number beyond floats": (b'{"schema": 1, "bias": 1e999}', "missing or unknown"),
    "a large number": (term(mean=1e7), r"features\[0\].mean is 10000000.0"),
    "an integer beyond floats": (term(weight=10**400), r"features\[0\].weight is 1000"),
    "true for a number": ({"bias": True}, "bias is True"),
    "a text for a number": (term(scale="1"), r"features\[0\].scale is '1'"),
    "no scale": (term(scale=0), r"features\[0\].scale is 0"),
    "a budget beyond 1": ({"budgets": {"1.5": 0.5}}, r"budgets\['1.5'\]"),
    "a budget that is none": ({"budgets": {"nan": 0.5}}, r"budgets\['nan'\]"),
    "a threshold beyond 1": ({"budgets": {"0.1": 1.5}}, "is 1.5"),
    "an unknown key": ({"code": "x"}, "'code' missing or unknown"),
    "a list": (b"[]", "want an object"),
    "no JSON": (b"{", "is not JSON"),
    "no UTF-8": (b"\xff", "is not JSON"),
    "deep": (b"[" * 60_000, "is not JSON"),
    "long": (b" " * (MOST_BYTES + 1), "has more than 65,536 bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_not_what_it_should_be_is_refused_by_file_and_field(tmp_path: Path, case: str) -> None:
    change, message = BAD[case]
    path = written(tmp_path, change if isinstance(change, bytes) else GOOD | change)
    with pytest.raises(ConfidenceError, match=rf"confidence\.json: .*{message}"):
        load(path, PAYLOAD, TEMPLATE)


def test_a_field_that_is_missing_is_named_and_so_is_a_file(tmp_path: Path) -> None:
    for key in GOOD.keys() - {"schema"}:
        with pytest.raises(ConfidenceError, match=f"'{key}' missing"):
            load(written(tmp_path, {k: v for k, v in GOOD.items() if k != key}), PAYLOAD, TEMPLATE)
    with pytest.raises(ConfidenceError, match=r"gone\.json: cannot be read"):
        load(tmp_path / "gone.json", PAYLOAD, TEMPLATE)


def test_a_refusal_is_one_warning_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, GOOD)
    with caplog.at_level(logging.WARNING, "router_client"):
        assert load_or_warn(path, PAYLOAD, TEMPLATE) is not None
        assert not caplog.records
        assert load_or_warn(path, "c" * 64, TEMPLATE) is None
    (record,) = caplog.records
    assert "low confidence is not judged: " in record.getMessage()
    assert "payload_digest" in record.getMessage()


# ---- the fit


def planted(count: int, seed: int = 0) -> tuple[Numbers, Numbers]:
    """Rows, and outcomes by known weights."""
    random = np.random.default_rng(seed)
    x = random.normal([3.0, -1.0, 0.0], [2.0, 0.1, 1.0], (count, 3))
    z = -1.0 + 1.2 * (x[:, 0] - 3) / 2 - 0.7 * (x[:, 1] + 1) / 0.1
    return x, (random.random(count) < 1 / (1 + np.exp(-z))).astype(np.float64)


def test_a_fit_finds_planted_weights_and_is_the_least_of_its_loss() -> None:
    x, y = planted(20_000)
    model = fit(x, y, 0.01)
    assert [model.bias, *model.weights] == pytest.approx([-1.0, 1.2, -0.7, 0.0], abs=0.06)
    x, y = planted(300)
    for penalty in (0.1, 30.0):
        model = fit(x, y, penalty)
        rows = np.column_stack([np.ones(300), (x - model.mean) / model.scale])

        def loss(at: Numbers, rows: Numbers = rows, y: Numbers = y, penalty: float = penalty) -> float:
            return float(np.logaddexp(0, rows @ at).sum() - y @ rows @ at + penalty / 2 * at[1:] @ at[1:])

        best = np.array([model.bias, *model.weights])
        for step in np.random.default_rng(2).normal(0, 1e-3, (50, 4)):
            assert loss(best + step) > loss(best)


def test_a_fit_stands_what_separates_perfectly_and_refuses_what_is_all_the_same() -> None:
    x = np.linspace(-1, 1, 60)[:, None]
    model = fit(x, (x[:, 0] > 0).astype(np.float64), 0.01)
    assert np.isfinite([model.bias, *model.weights]).all()
    with pytest.raises(ValueError, match="0 of 60 answers are wrong"):
        fit(x, np.zeros(60), 1.0)


def test_answers_about_one_document_are_left_out_together() -> None:
    """With each document four times, a leak would make left-out predictions of pure noise come true."""
    random = np.random.default_rng(3)
    x, y = random.normal(size=(100, 30)), (random.random(100) < 0.4).astype(np.float64)
    documents = np.repeat(np.arange(100), 4)
    _, p = fit_chosen(np.repeat(x, 4, axis=0), np.repeat(y, 4), documents)
    assert auroc(p, np.repeat(y, 4)) < 0.65
    _, leaked = fit_chosen(np.repeat(x, 4, axis=0), np.repeat(y, 4), np.arange(400))
    assert auroc(leaked, np.repeat(y, 4)) > 0.75


# ---- the figures


def test_what_is_caught_is_counted_and_equals_share() -> None:
    p, wrong = np.array([0.9, 0.8, 0.1, 0.1, 0.1]), np.array([1.0, 0.0, 1.0, 0.0, 0.0])
    assert [caught(p, wrong, b) for b in (0.2, 0.4, 0.6, 1.0)] == pytest.approx([0.5, 0.5, 0.5 + 0.5 / 3, 1.0])
    assert caught(np.full(5, 0.3), wrong, 0.3) == pytest.approx(0.3)
    assert caught(p, np.zeros(5), 0.3) == 0.3
    assert auroc(p, wrong) == pytest.approx((3 + (0 + 0.5 + 0.5)) / 6)
    assert auroc(np.full(5, 0.3), wrong) == 0.5


def test_calibration_error_is_the_mean_distance_in_bins() -> None:
    p = np.repeat([0.0, 0.5, 1.0, 0.2], 5)
    wrong = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1], dtype=np.float64)
    assert ece(p, wrong) == pytest.approx((0.1 + 0.2 + 0.3 + 0.5 + 0.5 + 0.25) / 10)  # ten bins of two
    exact = np.repeat([0.0, 1.0], 50)
    assert ece(exact, exact) == 0.0


def test_accuracy_is_of_the_answers_kept_and_of_those_given_by_another() -> None:
    p, wrong = np.linspace(1, 0, 100), np.array([1.0] * 20 + [0.0] * 80)
    wrong[[5, 60]] = wrong[[60, 5]]
    found = evaluate(p, wrong, np.arange(100), resamples=50)
    ten, twenty, _ = found["budgets"]
    assert ten["wrong_caught"]["value"] == pytest.approx(9 / 20)
    assert ten["beyond_random"]["value"] == pytest.approx(9 / 20 - 0.1)
    assert [row["value"] for row in ten["accuracy"]] == pytest.approx([0.89, 0.88])
    assert [row["random"] for row in ten["accuracy"]] == pytest.approx([0.82, 0.81])
    assert [row["value"] for row in twenty["accuracy"]] == pytest.approx([0.99, 0.97])
    gain = [row["value"] - row["random"] for row in ten["accuracy"]]
    assert gain == pytest.approx([0.2 * ten["beyond_random"]["value"]] * 2)
    risks = {row["coverage"]: row["value"] for row in found["risk_coverage"]}
    assert (risks[1.0], risks[0.8]) == pytest.approx((0.2, 1 / 80))


def test_intervals_are_over_documents() -> None:
    random = np.random.default_rng(4)
    p = random.random(60)
    wrong = (random.random(60) < p).astype(np.float64)
    alone = evaluate(p, wrong, np.arange(60), resamples=300)["wrong_rate"]["interval_95"]
    four = evaluate(np.tile(p, 4), np.tile(wrong, 4), np.tile(np.arange(60), 4), resamples=300)
    same = four["wrong_rate"]["interval_95"]
    assert same[1] - same[0] == pytest.approx(alone[1] - alone[0], rel=0.2)
    blind = evaluate(np.tile(p, 4), np.tile(wrong, 4), np.arange(240), resamples=300)["wrong_rate"]["interval_95"]
    assert blind[1] - blind[0] < 0.7 * (same[1] - same[0])


# ---- learning and judging, with planted faults


def answers(split: str, count: int, seed: int, *, informed: bool = True) -> list[Judged]:
    """Answers whose wrongness shows in their tokens, or does not."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        doubt = random.normal(-3, 2)
        length = int(random.integers(1, 9))
        surprise = np.exp(doubt + random.normal(0, 0.3, length))
        chance = 1 / (1 + math.exp(-2 * (doubt + 2))) if informed else 0.3
        wrong = bool(random.random() < chance)
        figures = tuple((-surprise).tolist()), tuple(np.log1p(1 / surprise).tolist())
        rows.append(Judged(split, f"{split} {seed} {i}", HARDSHIPS[i % 5], wrong, "", *figures))
    return rows


def shuffled(rows: Sequence[Judged]) -> list[Judged]:
    order = np.random.default_rng(9).permutation(len(rows))
    return [replace(row, wrong=rows[i].wrong) for row, i in zip(rows, order, strict=True)]


def judged_by_file(tmp_path: Path, fitted: Sequence[Judged], test: Sequence[Judged]) -> dict[str, Any]:
    content, _ = learn(fitted, PAYLOAD, TEMPLATE)
    return judge(test, fitted, written(tmp_path, content), PAYLOAD, TEMPLATE)


def test_what_is_learnt_is_calibrated_and_beats_random_escalation(tmp_path: Path) -> None:
    found = judged_by_file(tmp_path, answers("calibration", 1500, 1), answers("test", 1500, 2))
    assert found["passed"]
    assert found["ece"]["value"] < 3 * found["ece_of_a_perfect_model"]
    assert found["brier"]["value"] < found["brier_of_the_rate_alone"]
    for row in found["at_thresholds"]:
        assert row["escalated"] == pytest.approx(row["budget"], abs=0.04)
    assert found["wrong"] == sum(row["wrong"] * row["answers"] for row in found["by_kind"].values())


def test_shuffled_labels_do_not_pass(tmp_path: Path) -> None:
    fitted, test = answers("calibration", 1500, 1), answers("test", 1500, 2)
    for one, other in ((fitted, shuffled(test)), (shuffled(fitted), shuffled(test))):
        found = judged_by_file(tmp_path, one, other)
        assert not found["passed"]
        assert all(abs(row["beyond_random"]["value"]) < 0.1 for row in found["budgets"])


def test_only_the_calibration_split_is_fitted_on_and_only_others_judge(tmp_path: Path) -> None:
    fitted, test = answers("calibration", 300, 1), answers("test", 300, 2)
    with pytest.raises(DataError, match="answers of split test are not fitted on"):
        learn([*fitted, test[0]], PAYLOAD, TEMPLATE)
    path = written(tmp_path, learn(fitted, PAYLOAD, TEMPLATE)[0])
    with pytest.raises(DataError, match="answers of split calibration do not judge"):
        judge([*test, fitted[0]], fitted, path, PAYLOAD, TEMPLATE)
    with pytest.raises(DataError, match="1 documents of the test split were fitted on"):
        judge([*test, replace(fitted[0], split="test")], fitted, path, PAYLOAD, TEMPLATE)


def test_hard_signals_are_left_out_and_too_few_answers_are_refused() -> None:
    fitted = answers("calibration", 300, 1)
    cut = [replace(row, wrong=True, signal="truncated", document=f"cut {i}") for i, row in enumerate(fitted)]
    assert learn([*fitted, *cut], PAYLOAD, TEMPLATE) == learn(fitted, PAYLOAD, TEMPLATE)
    with pytest.raises(DataError, match="199 answers without a hard signal"):
        learn([*fitted[:199], *cut], PAYLOAD, TEMPLATE)
    with pytest.raises(DataError, match="0 of them wrong"):
        learn([replace(row, wrong=False) for row in fitted], PAYLOAD, TEMPLATE)


# ---- documents


def test_hard_documents_are_of_their_split_and_drawn_alike_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("calibration", "test"):
        some = [make_hard_document(split, i) for i in range(10)]
        assert some == [make_hard_document(split, i) for i in range(10)]
        assert [one.hardship for one in some] == [*HARDSHIPS] * 2
    assert not {s.key for s in drawn_sources("calibration", 50)} & {s.key for s in drawn_sources("test", 50)}

    def stray(split: str, index: int, grade: str) -> Any:
        del split
        return make_document("test", index, grade)

    monkeypatch.setattr("benchmarks.hard_documents.make_document", stray)
    fields = [i for i in range(60) if make_document("test", i, "clean").turns[0].task == "field"]
    index = next(i for i in fields if i % len(HARDSHIPS) != 1)
    assert split_of(make_document("test", index, "clean").turns[0].answer) == "test"
    with pytest.raises(ValueError, match="which is of another split"):
        make_hard_document("calibration", index)


def test_a_data_set_of_ones_own_needs_labels(tmp_path: Path) -> None:
    lines = [{"image": None, "question": "What?", "answer": ["a", "b"]}, {"image": None, "question": "Why?"}]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (source,) = file_sources(read_dataset(path, limit=1), "test")
    assert (source.read().answers, source.read().metric, source.split) == (("a", "b"), "exact", "test")
    with pytest.raises(DataError, match="item 2 has no answer"):
        file_sources(read_dataset(path), "test")
    gone = DataSet("x", "exact", (Item("1", tmp_path / "gone.png", "What?", ("a",), "all"),))
    with pytest.raises(DataError, match=r"gone\.png: cannot be read"):
        file_sources(gone, "test")


# ---- the command


def test_the_command_learns_from_a_bundle_goes_on_where_it_was_and_leaves_the_bundle_alone(
    demo_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file = tmp_path / "out", tmp_path / "learnt.json"
    asked: list[str] = []

    def counted(split: str, index: int) -> Any:
        asked.append(split)
        if len(asked) == 100:
            raise KeyboardInterrupt
        return make_hard_document(split, index)

    monkeypatch.setattr("benchmarks.judged.make_hard_document", counted)
    arguments = [str(demo_bundle), "--count", "220", "--out", str(out), "--file", str(file), "--json"]
    assert main(arguments) == 130
    assert not file.exists()
    assert main(arguments) == 0
    assert len(asked) == 2 * 220 + 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    digest = read_bundle(demo_bundle).manifest.payload_digest
    assert report["bundle"]["payload_digest"] == digest
    assert 0.05 < report["data"]["calibration"]["wrong"] / 220 < 0.45
    found = load(file, digest, report["template_digest"])
    assert {term.name for term in found.features} == set(FEATURES)
    before = file.read_bytes()
    assert main(arguments) == 0
    assert len(asked) == 2 * 220 + 1
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["learnt.json", "out"]
    read_bundle(demo_bundle)  # every digest is what it was


@pytest.mark.parametrize("change", [shuffled, list])
def test_the_command_writes_what_beats_chance_and_nothing_else(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[list[Judged]], list[Judged]]
) -> None:
    def invented(leg: object, identity: object, sources: Sequence[Any], *_: object) -> list[Judged]:
        return change(answers(sources[0].split, len(sources), 1 if sources[0].split == "calibration" else 2))

    monkeypatch.setattr("benchmarks.confidence.judged", invented)
    file = tmp_path / "learnt.json"
    code = main([str(tiny_bundle), "--count", "900", "--out", str(tmp_path), "--file", str(file)])
    assert (code, file.exists()) == ((0, True) if change is list else (1, False))
    assert not [*tmp_path.glob(".*")]
    text = next(tmp_path.glob("*.md")).read_text("utf-8")
    assert ("**beats** random" in text) == (change is list)
    assert report_text(json.loads(next(tmp_path.glob("confidence-*.json")).read_text("utf-8"))) == text


def test_what_is_fitted_on_is_not_asked_to_judge_itself(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tiny_bundle), "--data", "x"])
    assert "belong together" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    lines = [json.dumps({"image": None, "question": f"What is {i}?", "answer": str(i)}) for i in range(3)]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines), encoding="utf-8")
    given = ["--data", str(tmp_path), "--test-data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([str(tiny_bundle), *given, "--json"]) == 2
    assert "answers without a hard signal" in capsys.readouterr().err
