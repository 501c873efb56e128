"""Money and health: caps that hold for any sequence, any clock, several processes and kill -9; the breaker's rules."""

import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_client import breaker
from router_client.breaker import Health, admit, block, health_of, reason, record, withdraw
from router_client.errors import DAY_S, ConfigError
from router_client.ledger import CLOCK_FLOOR_S, BudgetRefused, Caps, Ledger, LedgerError, nano, windows

ROOT = Path(__file__).resolve().parent.parent
NOW = CLOCK_FLOOR_S + 200 * DAY_S
CAPS = Caps(request_nano=60, day_nano=100, month_nano=250)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """An empty one."""
    return Ledger(tmp_path / "new folder" / "ledger.sqlite3")


def refused(ledger: Ledger, nano_usd: int, caps: Caps = CAPS, now: float = NOW, request: str = "r") -> str:
    """The code of the refusal, "" if the call was booked."""
    try:
        ledger.reserve(request, "o", nano_usd, caps, now)
    except BudgetRefused as refusal:
        return refusal.code
    return ""


def test_a_call_is_settled_released_or_booked_as_spent(ledger: Ledger) -> None:
    a, b, c, d = (ledger.reserve(f"r{n}", "o", 20, CAPS, NOW) for n in range(4))
    ledger.settle(a, 5)
    ledger.release(b)
    ledger.uncertain(c)
    assert [(e.state, e.nano_usd) for e in ledger.entries()] == [
        ("settled", 5), ("released", 0), ("uncertain", 20), ("reserved", 20),
    ]  # fmt: skip
    assert ledger.spent(NOW) == (45, 45)
    with pytest.raises(LedgerError, match=f"entry {a} is not reserved"):
        ledger.release(a)
    ledger.reserve("later", "o", 0, CAPS, NOW + 601)
    assert ledger.entries()[d - 1].state == "uncertain"
    ledger.settle(d, 7)  # it was only slow
    assert ledger.spent(NOW + 601) == (32, 32)


def test_each_cap_refuses_and_books_nothing(ledger: Ledger) -> None:
    assert refused(ledger, 61) == "budget_request"
    assert refused(ledger, 60) == ""
    assert refused(ledger, 1) == "budget_request"
    assert refused(ledger, 41, request="s") == "budget_day"
    assert refused(ledger, 40, request="s") == ""
    assert refused(ledger, 60, now=NOW + DAY_S, request="t") == ""
    assert refused(ledger, 40, now=NOW + DAY_S, request="u") == ""
    assert refused(ledger, 51, now=NOW + 2 * DAY_S, request="v") == "budget_month"
    assert len(ledger.entries()) == 4
    assert refused(ledger, -1) == "budget_request"
    assert refused(ledger, 2**63, Caps(None, None, None)) == "budget_request"


def test_no_amount_locks_the_file(ledger: Ledger) -> None:
    """What a provider's count may come to is more than SQLite can add up."""
    free = Caps(None, None, None)
    for n in range(5):
        ledger.settle(ledger.reserve(f"r{n}", "o", 2**62, free, NOW), 2**70)
    assert ledger.spent(NOW) == (5 * 2**62, 5 * 2**62)
    assert refused(ledger, 1) == "budget_day"
    assert refused(ledger, 1, free) == ""


def test_the_escalation_rate_counts_requests_not_attempts(ledger: Ledger) -> None:
    caps = Caps(None, None, None, escalations=2, escalations_s=3600)
    assert [refused(ledger, 1, caps, request=r) for r in "aabab"] == [""] * 5
    assert refused(ledger, 1, caps, request="c") == "escalation_rate"
    assert refused(ledger, 1, caps, NOW + 3601, request="c") == ""


def test_a_clock_that_is_not_set_spends_nothing(ledger: Ledger) -> None:
    assert refused(ledger, 1, now=1000.0) == "clock_not_set"


def test_a_clock_set_back_frees_nothing(ledger: Ledger) -> None:
    assert refused(ledger, 60, request="a") == ""
    assert refused(ledger, 40, request="b") == ""
    for back in (1, DAY_S, 20 * DAY_S, 150 * DAY_S):
        assert refused(ledger, 1, now=NOW - back, request="c") == "budget_day"
    caps = Caps(None, 200, None)
    assert refused(ledger, 100, caps, NOW - DAY_S, request="d") == ""  # and is dated as its predecessor was
    assert refused(ledger, 1, caps, NOW, request="e") == "budget_day"


def test_an_entry_of_a_wrong_future_counts_until_the_owner_dates_it_anew(ledger: Ledger) -> None:
    assert refused(ledger, 60, now=NOW + 1000 * DAY_S) == ""
    assert refused(ledger, 41, request="b") == "budget_day"
    assert refused(ledger, 40, request="b") == ""
    assert ledger.entries()[1].at == NOW  # not of the future too
    assert ledger.redate(NOW) == 1
    assert refused(ledger, 60, now=NOW + DAY_S, request="c") == ""


OPERATIONS = st.lists(
    st.tuples(
        st.integers(0, 120),  # what the call may cost
        st.sampled_from(["settle", "over", "release", "uncertain", "killed"]),
        st.integers(0, 120),  # what it costs
        st.sampled_from([0.0, 30.0, 700.0, 5000.0, DAY_S, 40 * DAY_S]),  # how far the clock goes
    ),
    max_size=14,
)


@given(OPERATIONS)
@settings(max_examples=40)
def test_no_sequence_of_calls_exceeds_a_cap_by_what_was_reserved(steps: list[tuple[int, str, int, float]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ledger, now = Ledger(Path(folder) / "l"), NOW
        model: list[tuple[float, int]] = []
        for number, (bound, end, cost, seconds) in enumerate(steps):
            now += seconds
            day, month = windows(now)
            spent_day = sum(n for at, n in model if at >= day)
            spent_month = sum(n for at, n in model if at >= month)
            fits = bound <= 60 and spent_day + bound <= 100 and spent_month + bound <= 250
            assert (refused(ledger, bound, now=now, request=str(number)) == "") == fits
            if fits:
                entry = ledger.entries()[-1].id
                booked = {"settle": min(cost, bound), "over": cost, "release": 0}.get(end, bound)
                if end in {"settle", "over"}:
                    ledger.settle(entry, booked)
                elif end != "killed":
                    getattr(ledger, end)(entry)
                model.append((now, booked))
        assert ledger.spent(now)[1] == sum(n for at, n in model if at >= windows(now)[1])


SPENDER = """
import sys
from pathlib import Path
from router_client.ledger import BudgetRefused, Caps, Ledger
ledger, number, now = Ledger(Path(sys.argv[1])), sys.argv[2], float(sys.argv[3])
ends = [ledger.uncertain, lambda e: ledger.settle(e, 70_000), ledger.release]
print("ready", flush=True)
sys.stdin.readline()
booked = 0
for call in range(25):
    try:
        entry = ledger.reserve(f"{number} {call}", "o", 100_000, Caps(None, 10_000_000, None), now)
    except BudgetRefused:
        continue
    ends[(call + int(number)) % 3](entry)
    booked += 1
print(booked, flush=True)
"""


def test_eight_processes_never_exceed_one_cap(ledger: Ledger) -> None:
    command = [sys.executable, "-c", SPENDER, str(ledger.path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    running = [subprocess.Popen([*command, str(n), str(NOW)], **pipes) for n in range(8)]  # type: ignore[call-overload]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    booked = [int(process.communicate(timeout=120)[0]) for process in running]
    assert sum(booked) == len(ledger.entries())
    assert ledger.spent(NOW)[0] <= 10_000_000
    assert ledger.spent(NOW)[0] > 9_800_000  # and the cap was reached: 200 calls of up to 100 000 wanted more


KILLED = """
import sys, time
from pathlib import Path
from router_client.ledger import Caps, Ledger
Ledger(Path(sys.argv[1])).reserve("r", "o", 60, Caps(60, 100, 250), float(sys.argv[2]))
print("reserved", flush=True)
time.sleep(60)
"""


def test_what_a_killed_process_reserved_counts_as_spent(ledger: Ledger) -> None:
    command = [sys.executable, "-c", KILLED, str(ledger.path), str(NOW)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reserved\n"
        process.send_signal(signal.SIGKILL)
    assert ledger.spent(NOW) == (60, 60)
    assert refused(ledger, 41, request="s") == "budget_day"
    assert refused(ledger, 40, now=NOW + 601, request="s") == ""
    assert [e.state for e in ledger.entries()] == ["uncertain", "reserved"]


def test_a_file_that_is_no_ledger_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    path.write_bytes(b"not a database at all " * 100)
    with pytest.raises(LedgerError, match="ledger: cannot be used: file is not a database"):
        Ledger(path).spent(NOW)
    with pytest.raises(LedgerError, match="cannot be used"):
        Ledger(path / "below").spent(NOW)


def test_a_reservation_is_on_the_disk_before_it_counts(ledger: Ledger) -> None:
    """A power cut cannot be had here: that SQLite was told to wait for the disk (FULL is 2) is all that is seen."""
    ledger.spent(NOW)
    assert ledger._connection().execute("PRAGMA synchronous").fetchone() == (2,)  # noqa: SLF001


def test_a_locked_ledger_is_an_error_within_seconds(ledger: Ledger) -> None:
    ledger.spent(NOW)
    with contextlib.closing(sqlite3.connect(ledger.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="locked"):
            Ledger(ledger.path, busy_s=0.2).reserve("r", "o", 1, CAPS, NOW)


@pytest.mark.parametrize("amount", [-0.1, float("nan"), float("inf"), True, 1e7])
def test_an_amount_that_is_none_is_refused_by_name(amount: float) -> None:
    with pytest.raises(ConfigError, match="per_day_usd is"):
        nano(amount, "per_day_usd")


def test_amounts_are_exact() -> None:
    assert nano(0.1, "x") == 100_000_000


def failed(times: int, health: Health = Health(), now: float = NOW) -> Health:  # noqa: B008 -- frozen
    for _ in range(times):
        health = record(health, False, now)
    return health


def test_a_breaker_opens_at_five_failures_that_are_half() -> None:
    assert admit(failed(4), NOW)
    assert reason(failed(5), NOW) == "breaker_open"
    mixed = Health()
    for _ in range(6):
        mixed = record(mixed, True, NOW)
    assert reason(failed(5, mixed), NOW) == ""  # 5 of 11
    assert reason(failed(6, mixed), NOW) == "breaker_open"
    slow = Health()
    for n in range(20):
        slow = record(slow, False, NOW + 15 * n)
    assert reason(slow, NOW + 300) == ""  # never 5 within a minute


def test_one_probe_closes_it_or_opens_it_for_longer() -> None:
    health = failed(5)
    waits, now = [], NOW
    for _ in range(8):
        opened = now
        while (probe := admit(health, now)) is None:
            now += 5
        waits.append(now - opened)
        assert admit(probe, now) is None  # a second one has to wait
        health = record(probe, False, now)
    assert waits == [30, 60, 120, 240, 480, 900, 900, 900]
    probe = admit(health, now + 900)
    assert probe
    assert admit(probe, now + 1800)  # the first probe never reported back
    closed = record(probe, True, now + 900)
    assert reason(failed(4, closed), now + 900) == ""


def test_a_block_ends_by_time_alone_and_a_longer_one_stays() -> None:
    health = block(Health(), "http_402", 100, NOW)
    assert reason(health, NOW + 99) == "http_402"
    assert block(health, "http_429", 5, NOW) is health
    assert reason(block(health, "gated", 500, NOW), NOW + 200) == "gated"
    assert reason(record(health, True, NOW), NOW) == "http_402"
    assert reason(health, NOW + 100) == reason(health, NOW - 1) == ""


def test_a_probe_that_was_not_made_is_anothers() -> None:
    for health in (block(Health(), "http_402", 10, NOW), failed(5)):
        probing = admit(health, NOW + 60)
        assert probing
        assert reason(probing, NOW + 60)
        assert not reason(withdraw(probing, NOW + 60), NOW + 60)
    assert withdraw(Health(), NOW) == Health()


def test_after_a_block_one_call_finds_out_for_all() -> None:
    health = block(Health(), "http_402", 100, NOW)
    assert admit(health, NOW + 99) is None
    probe = admit(health, NOW + 100)
    assert probe
    assert admit(probe, NOW + 110) is None
    assert reason(probe, NOW + 110) == "http_402"
    assert admit(probe, NOW + 131)  # it never reported back
    assert reason(breaker.unblock(probe), NOW + 110) == ""
    assert breaker.unblock(health) is health  # a call from before the block says nothing about it
    again = block(probe, "http_402", 5, NOW + 101)  # and the answer to the probe counts, also a shorter wait
    assert (reason(again, NOW + 105), reason(again, NOW + 107)) == ("http_402", "")


@given(st.lists(st.tuples(st.floats(1, 1e5), st.none() | st.floats(0.1, 1e4)), min_size=1, max_size=30))
def test_averages_lie_among_what_was_measured(samples: list[tuple[float, float | None]]) -> None:
    health = Health()
    for ttft_ms, throughput in samples:
        health = breaker.measured(health, ttft_ms, throughput)
    times = [t for t, _ in samples]
    assert min(times) * 0.999 <= health.ttft_ms <= max(times) * 1.001
    speeds = [s for _, s in samples if s is not None]
    assert min(speeds, default=0) * 0.999 <= health.throughput <= max(speeds, default=0) * 1.001
    assert health_of(json.loads(json.dumps(health.as_json()))) == health


STEPS = st.lists(st.tuples(st.sampled_from(["call ok", "call bad", "probe lost", "block"]), st.floats(-100, 1000)))


@given(STEPS)
def test_a_breaker_never_stays_closed_to_all_nor_longer_than_its_longest_wait(steps: list[tuple[str, float]]) -> None:
    health, now = Health(), NOW
    for kind, seconds in steps:
        now += seconds
        if kind == "block":
            health = block(health, "http_429", 60, now)
            continue
        admitted = admit(health, now)
        assert (admitted is None) == (reason(health, now) != "")
        if admitted is not None:
            assert not admitted.trips or admit(admitted, now) is None  # half open: one at a time
            health = admitted if kind == "probe lost" else record(admitted, kind == "call ok", now)
            assert kind != "call ok" or reason(health, now) == ""
        assert len(health.calls) <= breaker.MOST_CALLS
        assert reason(health, now + breaker.MOST_WAIT_S) == ""
        assert health_of(json.loads(json.dumps(health.as_json()))) == health


@pytest.mark.parametrize(
    "stored", [None, 7, {}, {"calls": 3}, {**Health().as_json(), "until": "x"}, {"calls": [], "a": 1}]
)
def test_a_state_that_cannot_be_is_a_fresh_one(stored: object) -> None:
    assert health_of(stored) == Health()


def test_health_is_shared_through_the_file(ledger: Ledger) -> None:
    assert ledger.change_health("a", lambda h: block(h, "http_402", 60, NOW), NOW)
    assert reason(Ledger(ledger.path).health("a"), NOW) == "http_402"
    assert not ledger.change_health("a", lambda h: admit(h, NOW), NOW)
    ledger.keep("health a", "no json", NOW)
    assert ledger.health("a") == Health()
