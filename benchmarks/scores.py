"""How an answer is scored against those that count as right, and how sure a mean or a difference of scores is.

An answer's score is a number from 0 to 1 by one of four metrics, each as the data set that it comes from defines it:

    exact     equal to an answer                                              the project's own documents
    anls      nearness of spelling, 0 below one half                          DocVQA
    vqa       how many of ten people said the same, after normalisation       TextVQA, VQA
    relaxed   numbers within 5 %, otherwise equal but for case                ChartQA

Intervals are of 95 %. Where several questions are asked about one document they are drawn together: they share its
difficulties. Not covered: judging free text, for which none of these was made.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from demo.evaluate import wilson

METRICS = ("exact", "anls", "vqa", "relaxed")
ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
ANNOTATORS = 10
EQUAL = 1e-9  # scores that differ by less are the same: thirds are summed in different orders
RESAMPLES = 2000
DRAWN_AT_ONCE = 1 << 22  # indices of the bootstrap in memory at a time

Numbers = npt.NDArray[np.float64]


def score(metric: str, answer: str, answers: Sequence[str]) -> float:
    """The score of an answer, from 0 to 1.

    Args:
        metric: one of METRICS.
        answer: as it was given.
        answers: those that count as right (at least one); for "vqa" one a person.
    """
    match metric:
        case "exact":
            return exact_match(answer, answers)
        case "anls":
            return anls(answer, answers)
        case "vqa":
            return vqa_accuracy(answer, answers)
        case "relaxed":
            return max(relaxed_accuracy(answer, one) for one in answers)
    raise ValueError(f"metric is {metric!r}, want one of {', '.join(METRICS)}")


def exact_match(answer: str, answers: Sequence[str]) -> float:
    """1 for an answer that is one of the right ones, character by character, but for white space around it."""
    return float(answer.strip() in {one.strip() for one in answers})


def anls(answer: str, answers: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest right answer; below one half it counts as 0.

    A. F. Biten et al., "Scene Text Visual Question Answering", ICCV 2019, https://arxiv.org/abs/1905.13648, equation
    1, with two things as the evaluator of the DocVQA challenge has them (https://rrc.cvc.uab.es/?ch=17): texts are
    compared in lower case with their white space made single, while the length that a distance is divided by is that
    of the texts as given; and a similarity of just one half counts.
    """
    best = 0.0
    for right in answers:
        length = max(len(right), len(answer))
        distance = levenshtein(" ".join(right.lower().split()), " ".join(answer.lower().split()))
        best = max(best, 1 - distance / length if length else 1.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def levenshtein(a: str, b: str) -> int:
    """The least number of insertions, deletions and substitutions that make `b` of `a`."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """How many people said the same, in thirds and at most 1, averaged over leaving out one person at a time.

    S. Antol et al., "VQA: Visual Question Answering", ICCV 2015, https://arxiv.org/abs/1505.00468; leaving one out:
    https://visualqa.org/evaluation.html. With ten people, 0, 1, 2, 3 and 4 or more that agree give 0, 0.3, 0.6, 0.9
    and 1. Both sides are normalised as TextVQA's evaluator does (`vqa_normal`). VQA's own differs in one case: where
    all ten said the same, it compares without normalising.
    """
    normal = vqa_normal(answer)
    agree = [vqa_normal(one) == normal for one in answers]
    same, people = sum(agree), len(agree)
    return sum(min((same - one) / 3, 1.0) for one in agree) / people


_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_POINT = re.compile(r"\.(?!\d)")
_POINTS_REMOVED = 32  # by accident: the evaluator hands a flag (re.UNICODE) to the argument that counts
_DIGIT_COMMA = re.compile(r"\d,+\d")
# What a word with an apostrophe too few becomes. The evaluator lists no others: "hed" is one of them, "shed" is not.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {w[:i] + w[i + 1 :]: w for w in _CONTRACTED.split() for i in range(len(w)) if w[i] == "'"}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the other way round in the evaluator too


def vqa_normal(text: str) -> str:
    """An answer as TextVQA's evaluator compares it: lower case, number words as digits, no articles, no punctuation.

    The rules of VQA (https://visualqa.org/evaluation.html) after a step of TextVQA's own that drops commas and
    question marks and parts a genitive's "'s" (`EvalAIAnswerProcessor` of https://github.com/facebookresearch/mmf),
    with what its code does otherwise than its description: a mark beside white space vanishes while any other leaves
    a space; a point vanishes unless a digit follows.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    vanish = _DIGIT_COMMA.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or vanish else " ")
    words = [_NUMBERS.get(word, word) for word in _POINT.sub("", out, count=_POINTS_REMOVED).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def relaxed_accuracy(answer: str, right: str) -> float:
    """1 for a number within 5 % of the right one, and for a text that is equal but for case.

    A. Masry et al., "ChartQA", Findings of ACL 2022, https://arxiv.org/abs/2203.10244, section 5.1; percentages as
    in `relaxed_correctness` of https://github.com/google-research/pix2struct, which those who report ChartQA use:
    "14 %" is 0.14, and where 0 is right, only the same text is.
    """
    wanted, found = _number(right), _number(answer)
    if wanted and found is not None:
        return float(abs(found - wanted) / abs(wanted) <= RELAXED_TOLERANCE)
    return float(answer.strip().lower() == right.strip().lower())


def _number(text: str) -> float | None:
    """The finite number that a text is, a percentage as a fraction."""
    text = text.strip()
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# ---- how sure


def mean_interval(
    sums: Sequence[float],
    counts: Sequence[float],
    documents: Sequence[int],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """A bootstrap interval of sum(sums) / sum(counts), resampling documents; the same arguments, the same interval.

    B. Efron, "Bootstrap Methods", 1979: the percentile interval. With a score's differences as sums and ones as
    counts it is a paired one; with sums over an answer's tokens and their number, one of a mean over tokens.

    Args:
        sums: of each item.
        counts: of each item.
        documents: the number of each item's document, from 0.
        resamples: how often all documents are drawn.
        seed: of the draws.
    """
    by_document: Numbers = np.zeros((2, max(documents) + 1))
    np.add.at(by_document[0], list(documents), sums)
    np.add.at(by_document[1], list(documents), counts)
    by_document = by_document[:, by_document[1] > 0]
    size = by_document.shape[1]
    random, means = np.random.default_rng(seed), np.empty(resamples)
    rows = max(1, DRAWN_AT_ONCE // size)
    for start in range(0, resamples, rows):
        drawn = random.integers(0, size, (min(rows, resamples - start), size))
        total = by_document[:, drawn].sum(axis=2)  # [2, rows]
        means[start : start + len(drawn)] = total[0] / total[1]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def score_summary(scores: Sequence[float], documents: Sequence[int]) -> dict[str, Any]:
    """Mean and interval of scores. Wilson's, where each is right or wrong and about a document of its own."""
    alone = len(set(documents)) == len(documents)
    if alone and set(scores) <= {0.0, 1.0}:
        interval, kind = wilson(round(sum(scores)), len(scores)), "Wilson"
        interval = max(interval[0], 0.0), min(interval[1], 1.0)
    else:
        interval, kind = mean_interval(scores, [1.0] * len(scores), documents), "bootstrap"
    return {
        "items": len(scores),
        "documents": len(set(documents)),
        "mean": sum(scores) / len(scores),
        "interval_95": list(interval),
        "interval": kind,
    }


def paired_summary(reference: Sequence[float], found: Sequence[float], documents: Sequence[int]) -> dict[str, Any]:
    """The difference that a system makes on the same items: below 0 it is worse than the reference.

    `lost` and `gained` count items, `worse` and `better` documents; the exact figures are of documents. They say what
    a bootstrap cannot: where nothing has changed its interval has no width.
    """
    difference = [f - r for f, r in zip(found, reference, strict=True)]
    by_document: dict[int, float] = {}
    for document, change in zip(documents, difference, strict=True):
        by_document[document] = by_document.get(document, 0.0) + change
    worse, better = (sum(sign * change > EQUAL for change in by_document.values()) for sign in (-1, 1))
    return {
        "difference": sum(difference) / len(difference),
        "interval_95": list(mean_interval(difference, [1.0] * len(difference), documents)),
        "lost": sum(d < -EQUAL for d in difference),
        "gained": sum(d > EQUAL for d in difference),
        "worse": worse,
        "better": better,
        "worse_rate_interval_95": list(exact_interval(worse, len(by_document))),
        "sign_test_p": sign_test(worse, better),
    }


def exact_interval(hits: int, count: int) -> tuple[float, float]:
    """The exact interval of a proportion (C. J. Clopper and E. S. Pearson, 1934), which holds for 0 hits as well."""
    hit = np.arange(count + 1)
    logs = np.array([math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in hit])

    def at_most(k: int, p: float) -> float:
        return float(np.exp(logs + hit * math.log(p) + (count - hit) * math.log1p(-p))[: k + 1].sum())

    def where(k: int, chance: float) -> float:
        """The p at which `at_most(k, p)`, which falls with p, is `chance`."""
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if at_most(k, middle) > chance else (low, middle)
        return (low + high) / 2

    return where(hits - 1, 0.975) if hits else 0.0, where(hits, 0.025) if hits < count else 1.0


def sign_test(lost: int, gained: int) -> float:
    """The chance of a split as uneven or more, were losing and gaining equally likely (McNemar's test, exact)."""
    changed, fewer = lost + gained, min(lost, gained)
    tail = sum(math.comb(changed, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / (1 << changed))
