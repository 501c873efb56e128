"""The verdict on outputs: which differences are faults, and which unequal tokens are ties."""

from dataclasses import replace

import numpy as np
import pytest

from runtimes.verify import TIE_WIDTH, Case, Outputs, compare

LIMIT, VOCAB, TOKENS = 0.02, 49280, 4


def make_case() -> Case:
    """One text, no image; logits of noise, in each row a token that leads by 5."""
    logits = np.random.default_rng(0).normal(size=(TOKENS, VOCAB)).astype(np.float32)
    tokens = tuple(range(TOKENS))
    logits[range(TOKENS), tokens] = logits.max(axis=1) + 5
    empty = np.zeros((0, 4, 8), np.float32)
    return Case(
        "text", (("user", ("a",)),), 64, (), (1, 2), tokens, (), np.zeros((0, 8, 8, 3), np.uint8), empty, logits
    )


def right(case: Case) -> Outputs:
    return Outputs(True, case.grids, case.ids, case.features.copy(), case.logits.copy())


def judge(case: Case, out: Outputs) -> tuple[list[str], int]:
    parity = compare([(case, out)], features_limit=LIMIT, logits_limit=LIMIT)
    assert parity.tokens == TOKENS
    return [str(fault) for fault in parity.faults], parity.ties


def test_equal_outputs_pass() -> None:
    case = make_case()
    assert judge(case, right(case)) == ([], 0)


@pytest.mark.parametrize("what", ["pixels", "grids", "ids", "nan"])
def test_what_must_be_equal_is_a_fault_where_it_is_not(what: str) -> None:
    case = make_case()
    out = right(case)
    if what == "nan":
        out.logits[1, 7] = np.nan
    else:
        change = {"pixels": {"pixels_equal": False}, "grids": {"grids": ((1, 2),)}, "ids": {"ids": (1, 3)}}
        out = replace(out, **change[what])  # type: ignore[arg-type]
    faults, _ = judge(case, out)
    assert faults


def test_one_logit_that_is_wrong_is_a_fault_though_the_whole_is_within_the_limit() -> None:
    case = make_case()
    out = right(case)
    out.logits[2, 2] -= 6
    faults, ties = judge(case, out)
    assert len(faults) == 1, "the relative error is 0.014"
    assert "greedy token 2" in faults[0]
    assert ties == 0


@pytest.mark.parametrize(("width", "tie"), [(0.9, True), (1.1, False)])
@pytest.mark.parametrize("leads", [True, False])
def test_a_tie_is_as_wide_as_the_limit_says(width: float, tie: bool, leads: bool) -> None:
    """`leads`: in the reference the case's token leads, or lies behind, which no greedy choice gives."""
    case = make_case()
    row = case.logits[1]
    gap = width * TIE_WIDTH * LIMIT * float(np.sqrt(np.square(row, dtype=np.float64).mean()))
    row[9] = row[1] - gap if leads else row[1] + gap
    out = right(case)
    out.logits[1, 9] = row[1] + 1e-3 + (0 if leads else gap)
    faults, ties = judge(case, out)
    assert ties == int(tie)
    assert [fault for fault in faults if "greedy token 1" in fault] == ([] if tie else faults)
    assert bool(faults) == (not tie)
