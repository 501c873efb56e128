"""Scores against values worked out by hand from the definitions; intervals against what is known of them."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scores import (
    METRICS,
    anls,
    exact_interval,
    exact_match,
    levenshtein,
    mean_interval,
    paired_summary,
    relaxed_accuracy,
    score,
    score_summary,
    sign_test,
    vqa_accuracy,
    vqa_normal,
)
from export.prove import paired_exact

TEXT = st.text(max_size=12)


def test_exact_match_wants_every_character_but_white_space_around() -> None:
    assert exact_match(" 12.80\n", ["12.80"]) == 1
    assert exact_match("12.8", ["12.80"]) == 0
    assert exact_match("Total", ["total"]) == 0
    assert exact_match("b", ["a", "b"]) == 1


@pytest.mark.parametrize(
    ("answer", "answers", "want"),
    [
        ("Hello World", ["hello world"], 1.0),
        ("hello  world ", ["hello world"], 1.0),  # white space is made single
        ("hallo", ["hello"], 0.8),
        ("ab", ["ac"], 0.5),  # one half counts
        ("abc", ["axy"], 0.0),  # a third does not
        ("", ["total"], 0.0),
        ("", [""], 1.0),
        ("xyz", ["total", "xyzz"], 0.75),  # the nearest answer
        ("Käse", ["kase"], 0.75),
        ("ÉTÉ", ["été"], 1.0),
        ("14%", ["14 %"], 0.75),  # answers are sensitive to spaces
        ("ab ", ["ac"], 1 - 1 / 3),  # the length is that of the texts as given
    ],
)
def test_anls_is_what_its_evaluator_gives(answer: str, answers: list[str], want: float) -> None:
    assert anls(answer, answers) == pytest.approx(want)


@given(TEXT, TEXT)
def test_levenshtein_is_a_distance_and_anls_is_symmetric(a: str, b: str) -> None:
    assert levenshtein(a, b) == levenshtein(b, a) <= max(len(a), len(b))
    assert (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, b) >= abs(len(a) - len(b))
    assert anls(a, [b]) == anls(b, [a])


@given(TEXT, st.integers(0, 12), st.characters())
def test_one_inserted_character_is_a_distance_of_one(text: str, at: int, character: str) -> None:
    assert levenshtein(text, text[:at] + character + text[at:]) == 1


@pytest.mark.parametrize(("agreeing", "want"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_by_how_many_of_ten_agree(agreeing: int, want: float) -> None:
    answers = ["red"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    random.Random(0).shuffle(answers)
    assert vqa_accuracy("Red.", answers) == pytest.approx(want)


def test_vqa_accuracy_is_the_mean_over_subsets_of_nine() -> None:
    answers = ["x"] * 3 + ["y"] * 7
    subsets = [[a for j, a in enumerate(answers) if j != left_out] for left_out in range(10)]
    want = sum(min(subset.count("x") / 3, 1) for subset in subsets) / 10
    assert vqa_accuracy("x", answers) == pytest.approx(want)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("The cat", "cat"),
        ("a an the", ""),
        ("A", ""),
        ("another theme", "another theme"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("twenty two", "twenty 2"),  # only zero to ten
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("shed", "shed"),  # a word of its own, not in the list
        ("1,000", "1000"),
        ("3.14", "3.14"),
        ("end.", "end"),
        ("St. John", "st john"),
        ("3. 4", "3 4"),
        (".5", ".5"),
        ("left/right", "left right"),
        ("left / right", "left right"),
        ("coca-cola", "coca cola"),
        ("coca- cola", "coca cola"),
        ("really?!", "really"),
        ("john's", "john 's"),
        ("50%", "50%"),  # the percent sign is no punctuation to it
        ("$5", "$5"),
        ("  new\nline\t", "new line"),
        ("Ünïcode Straße", "ünïcode straße"),
        ("", ""),
        ("." * 40, "." * 8),  # the evaluator removes 32 points and no more
    ],
)
def test_normalisation_is_the_evaluators(text: str, want: str) -> None:
    assert vqa_normal(text) == want


def test_a_mark_beside_white_space_anywhere_vanishes_everywhere() -> None:
    assert vqa_normal("a-b - c-d") == "ab cd"
    assert vqa_normal("b-c") == "b c"


@given(st.text(max_size=20), st.lists(TEXT, min_size=10, max_size=10))
def test_vqa_accuracy_is_between_0_and_1_and_blind_to_order_and_case(answer: str, answers: list[str]) -> None:
    value = vqa_accuracy(answer, answers)
    assert 0 <= value <= 1
    assert vqa_accuracy(answer, answers[::-1]) == pytest.approx(value)
    if answer.isascii():
        assert vqa_accuracy(answer.upper(), answers) == pytest.approx(value)


@pytest.mark.parametrize(
    ("answer", "right", "want"),
    [
        ("105", "100", 1),  # just 5 %
        ("105.1", "100", 0),
        ("95", "100", 1),
        ("-100", "100", 0),
        ("14%", "14%", 1),
        ("0.14", "14%", 1),  # a percentage is a fraction
        ("14", "14%", 0),
        ("14.5 %", "14%", 1),
        ("0", "0", 1),
        ("0.0", "0", 0),  # where 0 is right, texts are compared
        ("0.001", "0", 0),
        ("Yes", "yes", 1),
        ("yes ", "Yes", 1),
        ("yes.", "yes", 0),
        ("2,000", "2000", 0),  # no number to the evaluator
        ("", "5", 0),
        ("", "", 1),
        ("five", "5", 0),
        ("1e2", "100", 1),
        ("nan", "NaN", 1),  # texts
        ("inf", "5", 0),
        ("%", "%", 1),
        ("Ägypten", "ägypten", 1),
    ],
)
def test_relaxed_accuracy_of_numbers_percentages_and_texts(answer: str, right: str, want: float) -> None:
    assert relaxed_accuracy(answer, right) == want


@given(st.floats(-1e9, 1e9).filter(lambda x: abs(x) > 1e-3), st.floats(-0.2, 0.2))
def test_relaxed_accuracy_holds_for_every_size(right: float, change: float) -> None:
    if abs(abs(change) - 0.05) > 1e-6:
        assert relaxed_accuracy(repr(right * (1 + change)), repr(right)) == (abs(change) < 0.05)


@given(st.sampled_from(METRICS), TEXT, st.lists(TEXT, min_size=1, max_size=4))
def test_every_score_is_from_0_to_1_and_1_for_what_all_say(metric: str, answer: str, answers: list[str]) -> None:
    assert 0 <= score(metric, answer, answers) <= 1
    assert score(metric, answer, [answer] * 10) == 1
    if metric != "vqa":
        assert score(metric, answer, [*answers, answer]) == 1


def test_an_unknown_metric_is_an_error() -> None:
    with pytest.raises(ValueError, match="'bleu', want one of exact, anls, vqa, relaxed"):
        score("bleu", "a", ["a"])


def test_identical_systems_differ_by_0_with_an_interval_of_no_width() -> None:
    scores = list(np.random.default_rng(1).random(60))
    paired = paired_summary(scores, scores, range(60))
    assert (paired["difference"], paired["interval_95"]) == (0, [0, 0])
    assert (paired["lost"], paired["gained"], paired["sign_test_p"]) == (0, 0, 1)
    assert paired["worse_rate_interval_95"][0] == 0
    assert 0.04 < paired["worse_rate_interval_95"][1] < 0.07  # 60 unchanged ones do not show that none can be lost


def test_lost_answers_give_an_interval_below_0() -> None:
    paired = paired_summary([1.0] * 100, [0.0] * 12 + [1.0] * 88, range(100))
    assert paired["difference"] == pytest.approx(-0.12)
    low, high = paired["interval_95"]
    assert low < -0.12 < high < 0
    assert (paired["lost"], paired["gained"]) == (12, 0)
    assert paired["sign_test_p"] == 2 / 2**12


def test_the_paired_interval_is_that_of_the_proof_where_each_item_is_a_document() -> None:
    generator = random.Random(3)
    pairs = [(generator.random() < 0.8, generator.random() < 0.7) for _ in range(150)]
    proof = paired_exact(pairs)
    paired = paired_summary([float(p[0]) for p in pairs], [float(p[1]) for p in pairs], range(150))
    assert paired["difference"] == pytest.approx(-proof["loss"])
    assert paired["interval_95"] == pytest.approx([-bound for bound in reversed(proof["loss_interval_95"])])
    assert (paired["lost"], paired["gained"]) == (proof["lost"], proof["gained"])


def test_the_interval_does_not_depend_on_how_much_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(np.random.default_rng(2).random(50))
    whole = mean_interval(values, [1.0] * 50, range(50))
    monkeypatch.setattr("benchmarks.scores.DRAWN_AT_ONCE", 175)
    assert mean_interval(values, [1.0] * 50, range(50)) == whole
    assert mean_interval(values, [1.0] * 50, range(50), seed=1) != whole


def test_questions_on_one_document_are_drawn_together() -> None:
    # 100 documents, on each of which all ten questions are right or all are wrong: 100 coin throws, not 1000
    values = [float(document % 2) for document in range(100) for _ in range(10)]
    documents = [document for document in range(100) for _ in range(10)]
    low, high = mean_interval(values, [1.0] * 1000, documents)
    apart = mean_interval(values, [1.0] * 1000, range(1000))
    assert (high - low) / (apart[1] - apart[0]) == pytest.approx(math.sqrt(10), rel=0.15)
    assert score_summary(values, documents)["interval"] == "bootstrap"
    assert score_summary(values, documents)["documents"] == 100


def test_a_document_is_worse_or_better_once_however_many_questions_it_has() -> None:
    before, after = [1.0, 1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.5, 1.0]
    paired = paired_summary(before, after, [0, 0, 0, 1, 2])
    assert (paired["lost"], paired["gained"], paired["worse"], paired["better"]) == (3, 2, 2, 1)
    assert paired["sign_test_p"] == 1
    assert paired["worse_rate_interval_95"] == list(exact_interval(2, 3))


def test_documents_without_a_question_of_the_task_are_not_drawn() -> None:
    values = list(np.random.default_rng(4).random(20))
    assert mean_interval(values, [1.0] * 20, range(0, 100, 5)) == mean_interval(values, [1.0] * 20, range(20))


def test_a_mean_over_tokens_counts_every_token() -> None:
    low, high = mean_interval([10.0, 0.0], [100.0, 1.0], [0, 1])
    assert (low, high) == (0.0, 0.1)  # either document twice; both: 10 / 101


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 5))
@settings(max_examples=30)
def test_an_interval_lies_within_the_values_and_is_the_same_each_time(values: list[float], every: int) -> None:
    documents = [i // every for i in range(len(values))]
    low, high = mean_interval(values, [1.0] * len(values), documents, resamples=200)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
    assert mean_interval(values, [1.0] * len(values), documents, resamples=200) == (low, high)


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    random_numbers = np.random.default_rng(5)
    covered = 0
    for draw in range(200):
        values = list(random_numbers.normal(0.3, 0.2, 60))
        low, high = mean_interval(values, [1.0] * 60, range(60), resamples=400, seed=draw)
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 200


def test_right_or_wrong_gets_wilsons_interval_and_graded_scores_a_bootstrap() -> None:
    summary = score_summary([1.0] * 40, range(40))
    assert summary["interval"] == "Wilson"
    assert summary["interval_95"] == pytest.approx([40 / (40 + 1.96**2), 1.0])  # known for all right
    assert score_summary([0.5, 1.0], range(2))["interval"] == "bootstrap"


def test_the_exact_interval_of_known_cases() -> None:
    assert exact_interval(0, 10) == pytest.approx((0, 1 - 0.025**0.1))
    assert exact_interval(10, 10) == pytest.approx((0.025**0.1, 1))
    assert exact_interval(1, 10) == pytest.approx((1 - 0.975**0.1, 0.44502), abs=1e-5)


@given(st.integers(1, 60), st.data())
@settings(max_examples=40)
def test_the_exact_interval_leaves_out_a_fortieth_on_each_side(count: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, count))
    low, high = exact_interval(hits, count)
    assert low <= hits / count <= high

    def chance(ks: range, p: float) -> float:
        return sum(math.comb(count, k) * p**k * (1 - p) ** (count - k) for k in ks)

    if hits:
        assert chance(range(hits, count + 1), low) == pytest.approx(0.025)
    if hits < count:
        assert chance(range(hits + 1), high) == pytest.approx(0.025)


@pytest.mark.parametrize(("lost", "gained"), list(itertools.product(range(5), repeat=2)))
def test_the_sign_test_is_the_binomial_tail(lost: int, gained: int) -> None:
    n = lost + gained
    as_uneven = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(lost - gained)) / 2**n
    assert sign_test(lost, gained) == pytest.approx(as_uneven)
