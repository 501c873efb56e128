"""Nothing is spent by surprise: latches, reservations before bytes, crashes, many threads and processes, months."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from router_client.client import Answer, Router
from router_client.errors import RouterError, classify
from router_client.ledger import Entry, Ledger
from router_client.local import Question, Token
from router_client.offers import Offer, Provider, Size, bound_nano
from router_client.policy import Backend, Budget, Policy, Privacy
from router_client.request import text_bytes
from tests import router_server
from tests.router_server import SECRET, TEXT
from tests.router_setup import COST, NOW, SHORT, Here, Setup, png, server, setup

__all__ = ["server", "setup"]  # fixtures
ROOT = Path(__file__).resolve().parent.parent


def watched(setup: Setup) -> list[tuple[router_server.Received, list[Entry], int]]:
    """What the ledger and the consent hook had seen when each chat request arrived."""
    seen: list[tuple[router_server.Received, list[Entry], int]] = []
    answer = setup.server.answer

    def watch(request: router_server.Received, sock: socket.socket) -> None:
        if request.method == "POST":
            seen.append((request, Ledger(setup.state).entries(), len(setup.plans)))
        answer(request, sock)

    setup.server.answer = watch  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("scenario", ["ok", "503", "stall_mid", "400_param", "413", "429", "402"])
def test_no_byte_leaves_without_a_reservation_and_a_consent_before_it(setup: Setup, scenario: str) -> None:
    seen = watched(setup)
    setup.ask(scenario, "alpha", "beta", images=[png()])
    assert seen
    for number, (request, entries, consents) in enumerate(seen):
        booked = entries[number]
        assert booked.offer == f"fake/{request.model}"
        assert (booked.state, booked.consent) == ("reserved", 1)
        assert booked.nano_usd >= COST
        assert consents == 1
    assert all(r.method == "GET" for r in setup.server.received if r not in [s[0] for s in seen])
    assert setup.plans[0].image_bytes * 4 // 3 <= len(seen[0][0].body)


def test_many_calls_without_credit_meet_a_handful_of_refusals_and_then_none(setup: Setup) -> None:
    setup.server.offer("402", "alpha", "beta")
    setup.local, setup.policy = Here(), Policy("prefer_cloud")
    setup.budget = Budget(None, None, None, None)
    router = setup.router("402")
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: router.ask("What?"), range(40)))
    assert {(a.text, a.receipt.degraded) for a in answers} == {("here", True)}
    assert 1 <= len(setup.server.chats) <= 5
    before = len(setup.server.chats)
    for seconds in (0, 60, 1700):
        setup.clock.at = NOW + seconds
        router.ask("What?")
    assert len(setup.server.chats) == before
    setup.clock.at = NOW + 1801
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda _: router.ask("What?"), range(40)))
    assert len(setup.server.chats) == before + 1  # one call finds out for all
    assert Ledger(setup.state).spent(setup.clock.at) == (0, 0)


def test_a_probe_that_comes_through_lets_all_others_through(setup: Setup) -> None:
    setup.server.offer("402_then_ok", "alpha")
    router = setup.router("402_then_ok")
    with pytest.raises(RouterError, match="http_402"):
        router.ask("What?")
    setup.clock.at += 1801
    assert router.ask("What?").text == router.ask("What?").text == TEXT


def test_the_latch_of_no_credit_ends_with_the_month() -> None:
    late = datetime(2026, 12, 31, 23, 50, tzinfo=UTC).timestamp()
    assert classify(402, {}, b"", now=late).block_s == 600
    assert classify(402, {}, b"", now=late - 86400).block_s == 1800
    assert classify(402, {}, b"", now=late + 599.9).block_s == 1.0


def test_threads_share_what_is_left_of_a_cap(setup: Setup) -> None:
    setup.server.offer("no_usage", "alpha")  # what was reserved stays booked
    bound = (5 + 64) * 1000 + 256 * 1500
    setup.policy, setup.budget = Policy("cloud_only"), Budget(None, 10 * bound / 1e9, None, None)
    router = setup.router("no_usage")

    def ask(_: int) -> str:
        try:
            return router.ask("What?").receipt.source
        except RouterError as error:
            return error.code

    with ThreadPoolExecutor(8) as pool:
        results = Counter(pool.map(ask, range(30)))
    assert results == {"cloud": 10, "budget_day": 20}
    assert len(setup.server.chats) == 10
    assert Ledger(setup.state).spent(NOW)[0] == 10 * bound


CLIENT = """
import sys
from pathlib import Path
from router_client.client import Router
from router_client.errors import RouterError
from router_client.offers import Offer
from router_client.policy import Backend, Budget, Policy, Privacy
address, state, cap, calls = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
offer = Offer("", "test/" + sys.argv[5], context=4096, price_in=10**9, price_out=15 * 10**8)
backend = Backend("b", address, (offer.model,), None, (offer,))
router = Router(backends=[backend], policy=Policy("cloud_only", deadline_s=60), state=state,
                budget=Budget(None, cap, None, None), privacy=Privacy(consent=lambda _: True))
print("ready", flush=True)
sys.stdin.readline()
answered = 0
for _ in range(calls):
    try:
        answered += router.ask("What?").receipt.source == "cloud"
    except RouterError as error:
        assert error.code == "budget_day", error
print(answered, flush=True)
"""


def client(setup: Setup, cap_usd: float, calls: int, scenario: str) -> "subprocess.Popen[str]":
    """A process that asks, once it is told to."""
    arguments = [setup.server.base_url, str(setup.state), str(cap_usd), str(calls), scenario]
    process = subprocess.Popen([sys.executable, "-c", CLIENT, *arguments], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, cwd=ROOT)  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin
    process.stdin.write("go\n")
    process.stdin.flush()


def test_eight_clients_never_spend_more_than_their_one_cap(setup: Setup) -> None:
    bound = (5 + 64) * 1000 + 256 * 1500
    running = [client(setup, 20 * bound / 1e9, 6, "no_usage") for _ in range(8)]
    for process in running:
        go(process)
    answered = sum(int(process.communicate(timeout=120)[0]) for process in running)
    assert answered == len(setup.server.chats) == 20  # of 48 that were wanted
    assert {e.state for e in setup.entries()} == {"settled"}
    assert Ledger(setup.state).spent(time.time())[0] == 20 * bound


def test_a_client_killed_between_reserve_and_settle_has_spent_it(setup: Setup) -> None:
    process = client(setup, 1.0, 1, "slow_drip")
    go(process)
    limit = time.monotonic() + 10
    while not setup.server.chats:
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    (entry,) = setup.entries()
    assert (entry.state, entry.nano_usd) == ("reserved", entry.reserved_nano_usd)
    assert Ledger(setup.state).spent(time.time())[0] == entry.reserved_nano_usd > 0
    after = client(setup, entry.nano_usd / 1e9, 1, "ok")  # a cap that is just used up
    go(after)
    assert after.communicate(timeout=30)[0] == "0\n"
    assert len(setup.server.chats) == 1


@pytest.mark.parametrize("back_s", [60, 86400, 40 * 86400])
def test_a_clock_set_back_gives_no_second_allowance(setup: Setup, back_s: float) -> None:
    setup.budget = Budget(None, COST * 1.2 / 1e9, None)
    setup.server.offer("no_usage", "alpha")
    assert isinstance(setup.ask("no_usage", max_tokens=9, images=[png()]), Answer)
    setup.clock.at -= back_s
    refused = setup.ask("no_usage", max_tokens=9, images=[png()])
    assert getattr(refused, "code", "") == "budget_day"
    setup.clock.at = 1000.0
    assert getattr(setup.ask("no_usage"), "code", "") in {"clock_not_set", "no_offer"}
    assert len(setup.server.chats) == 1


def test_when_every_offer_is_down_the_local_answer_stands_and_says_so(setup: Setup) -> None:
    setup.server.offer("500", "alpha", "gamma")
    setup.local = Here([Token("a start"), Token("", finish="length")])
    setup.policy = replace(SHORT, mode="prefer_on_device", max_attempts=2)
    router = setup.router("500")
    answers = [router.ask("What?") for _ in range(8)]
    assert {(a.text, a.receipt.source, a.receipt.degraded) for a in answers} == {("a start", "local", True)}
    assert answers[0].receipt.refused == "http_500"
    assert answers[-1].receipt.refused == "no_offer"  # every breaker is open
    count = len(setup.server.chats)
    router.ask("What?")
    assert len(setup.server.chats) == count
    setup.policy = replace(SHORT, max_attempts=2)
    assert isinstance(setup.ask("500"), RouterError)  # cloud_only has nothing else


def test_a_refused_model_or_parameter_says_nothing_of_the_provider(setup: Setup) -> None:
    for scenario in ("400_not_supported", "400_not_found", "400_param", "413"):
        setup.ask(scenario, "alpha", images=[png()])
        health = Ledger(setup.state).health(f"offer fake/test/{scenario}:alpha image")
        assert (health.trips, health.calls) == (0, ())


def test_a_providers_known_limits_shape_what_it_is_sent(setup: Setup) -> None:
    known = Provider(frozenset(["zero_retention"]), 128, 20_000, frozenset(["temperature", "response_format"]))
    setup.backend["providers"] = {"alpha": known}
    setup.privacy = Privacy(require=frozenset(["zero_retention"]))
    answer = setup.ask("503", "alpha", "beta", images=[png(800, 400)], schema={"type": "string"})
    assert isinstance(answer, RouterError)
    assert {r.model for r in setup.server.chats} == {"test/503:alpha"}  # nothing is known of beta, which is a refusal
    body = json.loads(setup.server.chats[0].body)
    assert set(body) == {"model", "messages", "max_tokens", "stream", "stream_options"}
    assert setup.plans[0].dimensions == ((128, 64),)
    assert setup.plans[0].image_bytes <= 20_000
    assert setup.plans[0].destinations == ("fake/test/503:alpha",)


def test_unknown_policy_is_a_refusal_and_the_package_knows_what_it_says(setup: Setup) -> None:
    setup.privacy = Privacy(require=frozenset(["zero_retention"]))
    refused = setup.ask("ok", "together", "brand-new-9")
    assert isinstance(refused, RouterError)
    assert "zero_retention not known" in str(refused)
    assert not setup.plans
    setup.state = setup.state.with_name("second")
    assert isinstance(setup.ask("ok", "together", "fireworks-ai"), Answer)
    assert setup.plans[0].destinations == ("fake/test/ok:fireworks-ai",)
    setup.backend["providers"] = {"fireworks-ai": Provider()}  # the owner knows better
    assert isinstance(setup.ask("ok"), RouterError)


def test_own_measurements_rank_what_the_catalogue_says_nothing_of(setup: Setup) -> None:
    setup.backend["sort"] = "latency"
    setup.real_time = True
    setup.server.offer("ok", "alpha", "gamma")
    assert isinstance(setup.ask("ok"), Answer)  # neither is known: as listed
    health = Ledger(setup.state).health("offer fake/test/ok:alpha text")
    assert (health.samples, health.ttft_ms > 0) == (1, True)
    setup.ask("ok")
    assert [r.model for r in setup.server.chats] == ["test/ok:alpha"] * 2  # known comes before unknown
    setup.server.offer("ok", "alpha", "gamma", first_token_latency_ms=0.001)
    assert isinstance(setup.server.catalogue, bytes)
    ledger = Ledger(setup.state)
    ledger.keep(f"catalogue fake {setup.server.base_url}", setup.server.catalogue.decode(), time.time())
    setup.ask("ok")
    assert Ledger(setup.state).health("offer fake/test/ok:alpha text").samples == 3
    setup.ask("ok")  # three samples of alpha's own are slower than what the catalogue says of gamma
    assert setup.server.chats[-1].model == "test/ok:gamma"


@pytest.mark.parametrize("size", [Size(10**9, 0, 1), Size(0, 3, 10), Size(1, 1, 1)])
def test_a_bound_is_no_less_than_any_count_that_fits_it(size: Size) -> None:
    offer = Offer("b", "m", context=4096, price_in=7, price_out=11, vision=True, image_tokens=500)
    bound = bound_nano(offer, size)
    assert bound is not None
    most = min(4096, size.text_bytes + 64 + 500 * size.images)
    assert bound * 10**6 >= most * 7 + size.max_tokens * 11
    assert bound_nano(replace(offer, context=None, image_tokens=None), size) is None or not size.images


def reported(setup: Setup, ask: Callable[[Router], object]) -> list[str]:
    """The source or code of every receipt that the callback was given."""
    with suppress(RouterError):
        ask(setup.router("503"))
    return [f"{r.source}{r.refused}" for r in setup.receipts]


def test_a_cost_that_nothing_bounds_is_refused_also_without_caps(setup: Setup) -> None:
    offer = Offer("", "test/eof_no_finish", vision=True, price_in=10**9, price_out=10**9)
    setup.backend |= {"offers": (offer,), "image_tokens": None}
    setup.budget = Budget(None, None, None)
    error = setup.ask("eof_no_finish", images=[png()])
    assert isinstance(error, RouterError)
    assert "cost unbounded" in str(error)
    assert not setup.server.chats
    setup.backend["offers"] = (replace(offer, price_in=0, price_out=0),)  # however many tokens, they are free
    setup.ask("eof_no_finish", images=[png()])
    assert len(setup.server.chats) == 2
    setup.backend["offers"] = (replace(offer, context=4096),)
    setup.ask("eof_no_finish", images=[png()])
    assert setup.entries()[-1].nano_usd == 4096 * 1000 + 256 * 1000  # what was cut off is booked as its worst case


def test_a_text_that_a_server_may_normalize_is_bounded_by_the_longer_form() -> None:
    assert text_bytes(Question("\ufdfa")) == (3, 33)
    assert text_bytes(Question("\u1100\u1161")) == (6, 6)  # by which it gets no shorter


def test_a_call_that_is_not_made_leaves_the_probe_to_the_next(setup: Setup) -> None:
    assert isinstance(setup.ask("402_then_ok", "alpha"), RouterError)
    setup.clock.at += 1801
    setup.budget = Budget(max_escalations=0)
    error = setup.ask("402_then_ok")
    assert isinstance(error, RouterError)
    assert error.code == "escalation_rate"
    setup.budget = Budget()
    setup.backend["proxy"] = "http://127.0.0.1:9"  # nobody listens there
    error = setup.ask("402_then_ok")
    assert isinstance(error, RouterError)
    assert error.code == "connect"
    del setup.backend["proxy"]
    assert isinstance(setup.ask("402_then_ok"), Answer)


def test_an_offer_that_is_down_for_good_does_not_use_up_the_retries_of_a_quiet_client(setup: Setup) -> None:
    setup.server.offer("503", "alpha", "beta")
    setup.budget = Budget(1, None, None, None)
    router = setup.router("503")
    for _ in range(25):
        setup.clock.at += 120
        assert router.ask("What?").text == TEXT


def test_each_request_ends_in_one_receipt(setup: Setup) -> None:
    setup.server.offer("503", "alpha")
    assert reported(setup, lambda r: r.ask("What?")) == ["http_503"]
    setup.server.offer("503", "beta")
    setup.state = setup.state.with_name("second")
    setup.policy = replace(SHORT, holdback=0)
    assert reported(setup, lambda r: r.ask("What?"))[1:] == ["cloud"]
    assert reported(setup, lambda r: list(r.stream("What?")))[2:] == ["cloud"]
    events: list[object] = []

    def leave(router: Router) -> None:
        stream = router.stream("What?")
        events.append(next(stream))
        stream.close()

    assert reported(setup, leave)[3:] == [""]
    assert setup.receipts[-1].attempts[0].outcome == "abandoned"
    assert setup.receipts[0].ms > -1


def test_a_callback_that_fails_costs_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("do not show")

    assert Router(local=Here(), on_receipt=broken).ask("What?").text == "here"
    assert "the receipt callback failed: RuntimeError" in caplog.text
    assert "do not show" not in caplog.text


def test_a_judge_that_fails_leaves_the_hard_signals_and_is_named_once(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: object) -> float:
        raise KeyError("private words")

    setup.server.offer("ok", "alpha")
    backend = Backend("b", setup.server.base_url, ("test/ok",))
    policy = Policy("prefer_on_device", max_p_wrong=0.5)
    router = Router(local=Here(), backends=[backend], policy=policy, state=setup.state, p_wrong=broken,
                    privacy=Privacy(consent=lambda _: True))  # fmt: skip
    for _ in range(3):
        answer = router.ask("What?")
        assert (answer.text, answer.receipt.p_wrong, answer.receipt.degraded) == ("here", None, False)
    assert caplog.text.count("p_wrong failed: KeyError") == 1
    assert "private words" not in caplog.text
    for wrong in (float("nan"), -0.1, 1.1, None):
        router._p_wrong = lambda _, w=wrong: w  # noqa: SLF001
        assert router.ask("What?").receipt.p_wrong is None
    router._p_wrong = lambda tokens: 0.6 if [t.text for t in tokens] == ["here", ""] else 0.0  # noqa: SLF001
    assert router.ask("What?").receipt.source == "cloud"


def test_a_consent_hook_that_fails_or_does_not_say_true_is_a_refusal(setup: Setup) -> None:
    def broken(_: object) -> bool:
        raise RuntimeError

    for hook in (broken, lambda _: 1, lambda _: "yes", lambda _: None):
        setup.privacy = Privacy(consent=hook)  # type: ignore[arg-type]
        refused = setup.ask("ok", "alpha")
        assert isinstance(refused, RouterError)
        assert refused.code == "consent"
    assert not setup.server.chats
    assert not setup.entries()


def test_nothing_of_a_question_an_image_or_a_token_is_kept(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    picture = png()
    caplog.set_level("DEBUG")
    for number, scenario in enumerate(("ok", "echo_token", "billing_header_echo", "stall_mid", "401")):
        setup.state = setup.state.with_name(f"ledger-{number}")  # with a catalogue of its own
        result = setup.ask(scenario, "alpha", images=[picture], system="Private system words.")
        assert f"/{scenario}:" in setup.server.chats[-1].model
        everything = f"{result!r} {result} {result.receipt} {setup.plans} {caplog.text}"
        if isinstance(result, RouterError):
            everything += f"{result.args} {result.__cause__!r} {result.__context__!r}"
        for private in (SECRET, "does it read", "Private system", "taken at home", "base64,"):
            assert private not in everything
    raw = b"".join(p.read_bytes() for p in setup.state.parent.glob("ledger-*"))
    assert raw
    for private in (SECRET, "does it read", "Private system"):
        assert private.encode() not in raw


def test_a_slot_is_given_back_whatever_happens(setup: Setup) -> None:
    setup.server.offer("slow_drip", "alpha")
    setup.policy, setup.backend["at_once"] = replace(SHORT, holdback=0), 1
    setup.budget = Budget(None, None, None, None)
    router = setup.router("slow_drip")
    for _ in range(3):
        events = router.stream("What?")
        next(events)
        events.close()
    held = router.stream("What?")
    next(held)
    waited: list[str] = []

    def other() -> None:
        try:
            router.ask("What?")
        except RouterError as error:
            waited.append(error.code)

    setup.clock.at += SHORT.deadline_s  # no matter: a request has its own beginning
    thread = threading.Thread(target=other)
    thread.start()
    thread.join(5)
    held.close()
    assert waited == ["deadline"]
    assert len(setup.server.chats) == 4
