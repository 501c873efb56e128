"""Every fault of the protocol over real sockets: who is asked next, what is booked, and that no deadline is passed."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from router_client.client import Answer
from router_client.errors import DAY_S, RouterError
from router_client.ledger import Ledger
from router_client.local import Token
from router_client.policy import Budget, Policy
from tests import router_server, test_router_time
from tests.router_server import SECRET, TEXT
from tests.router_setup import COST, NOW, SHORT, Here, Setup, png, server, setup

__all__ = ["server", "setup"]  # fixtures

WELL = [
    "ok", "ok_stream_A", "ok_stream_B", "comment", "data_nospace", "crlf", "utf8_split", "multi_line_data",
    "reasoning_only", "newline_then_reasoning", "model_key_first", "json_200",
]  # fmt: skip


@pytest.mark.parametrize("scenario", WELL)
def test_a_good_answer_is_read_in_every_shape_and_paid_as_counted(setup: Setup, scenario: str) -> None:
    answer = setup.ask(scenario, "alpha", images=[png()])
    assert isinstance(answer, Answer), answer
    receipt = answer.receipt
    assert (answer.text, receipt.source, receipt.finish_reason) == (TEXT, "cloud", "stop")
    assert (receipt.cost_nano_usd, receipt.usage_source) == (COST, "provider")
    assert [(e.state, e.nano_usd) for e in setup.entries()] == [("settled", COST)]
    assert receipt.model_served in {"served-m", ""}
    assert receipt.day_left_nano_usd == 100_000_000 - COST
    assert (receipt.model_asked, receipt.provider_asked) == (f"test/{scenario}:alpha", "alpha")


# scenario: (code, may have been billed, whom that leaves: "next" another offer, "none" nobody, "same" the same again)
FAULTS: dict[str, tuple[str, bool, str]] = {
    "inband_err_obj": ("in_band_error", True, "next"),
    "inband_err_str": ("in_band_error", True, "next"),
    "event_error": ("in_band_error", True, "next"),
    "eof_no_finish": ("truncated", True, "next"),
    "done_no_finish": ("truncated", True, "next"),
    "tcp_reset": ("truncated", True, "next"),
    "incomplete_chunk": ("truncated", True, "next"),
    "stall_before_headers": ("first_token_timeout", True, "next"),
    "stall_before_first": ("first_token_timeout", True, "next"),
    "stall_mid": ("idle_timeout", True, "next"),
    "empty_choices": ("truncated", True, "next"),
    "html_200": ("bad_stream", True, "next"),
    "gzip_200": ("bad_stream", True, "next"),
    "json_error_200": ("in_band_error", True, "next"),
    "json_empty_choices": ("truncated", True, "next"),
    "401": ("http_401", False, "none"),
    "401_html": ("http_401", False, "none"),
    "401_cut": ("http_401", False, "none"),  # the status has said enough
    "402": ("http_402", False, "none"),
    "402_stalls": ("http_402", False, "none"),
    "402_then_ok": ("http_402", False, "none"),
    "403": ("http_403", False, "none"),
    "403_org": ("http_403", False, "none"),
    "403_gated": ("gated", False, "none"),
    "400_not_supported": ("model_not_supported", False, "none"),
    "400_not_found": ("model_not_found", False, "none"),
    "400_provider": ("model_not_supported_here", False, "next"),
    "404": ("http_404", False, "next"),
    "400_param": ("bad_request", False, "next"),
    "422_param": ("bad_request", False, "next"),
    "400_image": ("no_vision", False, "next"),
    "413": ("too_large", False, "same"),
    "429": ("http_429", False, "next"),
    "429_title": ("http_429", False, "next"),
    "429_retry_after_s": ("http_429", False, "next"),
    "429_retry_after_date": ("http_429", False, "next"),
    "429_ratelimit_hdr": ("http_429", False, "next"),
    "408": ("http_408", False, "next"),
    "500": ("http_500", False, "next"),
    "502": ("http_502", False, "next"),
    "503": ("http_503", False, "next"),
    "504": ("http_504", False, "next"),
    "529": ("http_529", False, "next"),
    "302": ("http_302", True, "next"),
    "echo_token": ("http_500", False, "next"),
}


@pytest.mark.parametrize("scenario", FAULTS)
def test_a_fault_is_named_booked_and_answered_by_whoever_it_leaves(
    setup: Setup, scenario: str, caplog: pytest.LogCaptureFixture
) -> None:
    code, maybe_billed, leaves = FAULTS[scenario]
    caplog.set_level(logging.DEBUG)
    result = setup.ask(scenario, "alpha", "beta", images=[png()])
    attempts = result.receipt.attempts
    assert (attempts[0].offer, attempts[0].outcome) == (f"fake/test/{scenario}:alpha", code)
    assert attempts[0].billed == ("maybe" if maybe_billed else "no")
    first = setup.entries()[0]
    assert first.state == ("uncertain" if maybe_billed else "released")
    assert first.nano_usd == (first.reserved_nano_usd if maybe_billed else 0)
    assert [r.model.partition(":")[2] for r in setup.server.chats] == {
        "next": ["alpha", "beta"], "none": ["alpha"], "same": ["alpha", "alpha"],
    }[leaves]  # fmt: skip
    if leaves == "next":
        assert isinstance(result, Answer)
        assert (result.text, result.receipt.provider_served) == (TEXT, "beta")
    else:
        assert isinstance(result, RouterError)
        assert result.code == code
    everything = f"{result!r} {result.receipt} {caplog.text} {[vars(r) for r in caplog.records]}"
    assert SECRET not in everything
    assert "What does it read?" not in everything
    assert "base64" not in caplog.text


@pytest.mark.parametrize("scenario", ["401", "402", "403_gated", "400_not_supported", "400_provider", "404"])
def test_what_is_refused_for_longer_is_not_asked_again(setup: Setup, scenario: str) -> None:
    first, second = setup.ask(scenario, "alpha"), setup.ask(scenario)
    assert isinstance(first, RouterError)
    assert isinstance(second, RouterError)
    assert second.code == "no_offer"
    assert len(setup.server.chats) == 1


def test_a_new_token_and_half_an_hour_lift_what_they_should(setup: Setup) -> None:
    setup.ask("401", "alpha")
    setup.backend["token"] = lambda: "another"
    setup.ask("401")
    assert len(setup.server.chats) == 2
    setup.ask("402", "alpha")  # the same account: latched by the refused token
    setup.backend["token"] = lambda: "third"
    setup.server.offer("402_then_ok", "alpha")
    Ledger(setup.state).keep(f"catalogue fake {setup.server.base_url}", setup.server.catalogue.decode(), NOW)  # type: ignore[union-attr]
    assert isinstance(setup.ask("402_then_ok"), RouterError)
    assert isinstance(setup.ask("402_then_ok"), RouterError)
    setup.clock.at += 1801
    assert isinstance(setup.ask("402_then_ok"), Answer)


def test_a_single_offer_is_asked_again_after_a_full_jitter(setup: Setup) -> None:
    answer = setup.ask("503_then_ok", "alpha")
    assert isinstance(answer, Answer)
    assert [a.outcome for a in answer.receipt.attempts] == ["http_503", "ok"]
    assert len(setup.clock.slept) == 1
    assert 0 <= setup.clock.slept[0] <= 0.25


@pytest.mark.parametrize(
    ("scenario", "wish_s"), [("429_retry_after_s_then_ok", 7), ("429_retry_after_date_then_ok", 9), ("429_then_ok", 5)]
)
def test_a_wish_to_wait_is_granted_if_there_is_time(setup: Setup, scenario: str, wish_s: float) -> None:
    setup.policy = replace(SHORT, deadline_s=30)
    assert isinstance(setup.ask(scenario, "alpha"), Answer)
    assert setup.clock.slept == [pytest.approx(wish_s, abs=1.01)]
    setup.policy, setup.clock.at = SHORT, setup.clock.at + 3600
    setup.server.counts.clear()
    refused = setup.ask(scenario)
    assert isinstance(refused, RouterError)
    assert refused.code == "http_429"
    assert len(setup.server.chats) == 3


def test_a_wish_to_wait_is_that_of_one_offer(setup: Setup) -> None:
    setup.policy = replace(SHORT, deadline_s=60, max_attempts=3)
    error = setup.ask("503_wish_of_gamma", "alpha", "gamma")
    assert [a.offer.rpartition(":")[2] for a in error.receipt.attempts] == ["alpha", "gamma", "alpha"]
    assert sum(setup.clock.slept) <= 0.25
    setup.state.unlink()
    error = setup.ask("503_wish_of_gamma", "gamma")  # which alone is waited for
    assert setup.clock.slept[1:] == [pytest.approx(50, abs=1)]


def test_an_image_too_large_is_sent_once_more_and_smaller(setup: Setup) -> None:
    assert isinstance(setup.ask("413_then_ok", "alpha", images=[png(800, 600)]), Answer)
    first, second = (len(r.body) for r in setup.server.chats)
    assert second < first


def test_a_refused_parameter_leaves_all_but_the_least_away(setup: Setup) -> None:
    answer = setup.ask("400_param", "alpha", "beta", schema={"type": "string"}, valid=lambda _: True)
    assert isinstance(answer, RouterError)  # what beta says is no JSON
    assert [a.outcome for a in answer.receipt.attempts] == ["bad_request", "schema"]
    first, second = (json.loads(r.body) for r in setup.server.chats)
    assert "response_format" in first
    assert set(second) == {"model", "messages", "max_tokens", "stream"}


def test_five_failures_open_the_breaker_for_images_alone(setup: Setup) -> None:
    setup.policy = replace(SHORT, max_attempts=1)
    for _ in range(5):
        assert (
            getattr(setup.ask("500", *(() if setup.entries() else ("alpha",)), images=[png()]), "code", "")
            == "http_500"
        )
    blocked = setup.ask("500", images=[png()])
    assert isinstance(blocked, RouterError)
    assert (blocked.code, "breaker_open" in str(blocked)) == ("no_offer", True)
    assert getattr(setup.ask("500"), "code", "") == "http_500"  # text is another matter
    setup.clock.at += 31
    assert getattr(setup.ask("500", images=[png()]), "code", "") == "http_500"  # the probe
    assert getattr(setup.ask("500", images=[png()]), "code", "") == "no_offer"


def test_no_usage_leaves_the_reservation_booked(setup: Setup) -> None:
    answer = setup.ask("no_usage", "alpha")
    assert isinstance(answer, Answer)
    (entry,) = setup.entries()
    assert answer.receipt.usage_source == "bound"
    assert (entry.state, entry.nano_usd) == ("settled", entry.reserved_nano_usd)
    assert answer.receipt.cost_nano_usd == entry.reserved_nano_usd > 0


def test_a_whole_answer_does_not_wait_long_for_its_usage(setup: Setup) -> None:
    for scenario in ("stall_after_finish", "comments_after_finish"):
        began = time.monotonic()
        answer = setup.ask(scenario, "alpha")
        assert time.monotonic() - began < SHORT.idle_s + 1
        assert isinstance(answer, Answer)
        assert answer.receipt.usage_source == "bound"
        setup.state.unlink()


def test_another_provider_than_asked_is_flagged_and_paid_at_its_price(setup: Setup) -> None:
    answer = setup.ask("wrong_provider_header", "alpha")
    assert isinstance(answer, Answer)
    receipt = answer.receipt
    assert (receipt.provider_served, receipt.served_as_asked) == ("gamma", False)
    assert receipt.usage_source == "bound"  # gamma's price is not known
    setup.state = setup.state.with_name("second")
    answer = setup.ask("wrong_provider_known", "alpha", "beta")
    assert isinstance(answer, Answer)
    assert answer.receipt.cost_nano_usd == 2 * COST


def test_a_missing_price_is_not_free(setup: Setup) -> None:
    setup.server.offer("ok", "alpha", price=None)
    refused = setup.ask("ok")
    assert isinstance(refused, RouterError)
    assert (refused.code, "price unknown" in str(refused)) == ("no_offer", True)
    assert not setup.server.chats
    setup.budget = Budget(None, None, None)
    assert isinstance(setup.ask("ok"), Answer)


def test_a_provider_nobody_knows_is_an_offer_like_any_other(setup: Setup) -> None:
    answer = setup.ask("provider_unknown", "brand-new-9")
    assert isinstance(answer, Answer)
    assert answer.receipt.provider_asked == "brand-new-9"


def test_a_catalogue_is_kept_and_an_old_one_is_better_than_none(setup: Setup) -> None:
    setup.ask("ok", "alpha")
    setup.server.catalogue = 500
    assert isinstance(setup.ask("ok"), Answer)
    assert [r.path for r in setup.server.received if r.method == "GET"] == ["/v1/models"]
    setup.clock.at += 2 * DAY_S
    assert isinstance(setup.ask("ok"), Answer)
    setup.clock.at += 6 * DAY_S
    refused = setup.ask("ok")
    assert isinstance(refused, RouterError)
    assert refused.code == "no_offer"
    assert "no catalogue: http_500" in str(refused)
    count = len(setup.server.received)
    setup.ask("ok")  # and is not asked for again at once
    assert len(setup.server.received) == count


def test_the_organization_that_pays_is_named_and_the_token_stays_with_chats(setup: Setup) -> None:
    setup.backend["bill_to"] = "my-org"
    answer = setup.ask("billing_header_echo", "alpha")
    assert isinstance(answer, Answer)
    assert answer.receipt.warnings == ["billing; paid by my-org [token]"]
    (attempt,) = answer.receipt.attempts
    get, post = setup.server.received
    assert post.headers["x-amzn-trace-id"] == attempt.trace_id
    assert attempt.request_id == answer.receipt.request_id == f"req-{attempt.trace_id[:8]}"
    assert "authorization" not in get.headers
    assert (post.headers["x-hf-bill-to"], post.headers["authorization"]) == ("my-org", f"Bearer {SECRET}")
    assert post.body.startswith(b'{"model": "test/billing_header_echo:alpha"')


SLOW = ["stall_before_headers", "stall_before_first", "stall_mid", "slow_drip"]


@pytest.mark.parametrize(
    ("mode", "scenario"),
    [*(("prefer_cloud", s) for s in SLOW), *(("cloud_only", s) for s in dict.fromkeys([*SLOW, *FAULTS, *WELL]))],
)
def test_the_deadline_holds_within_250_ms(setup: Setup, mode: str, scenario: str) -> None:
    setup.real_time = True
    setup.local = Here([Token("slow")] * 400, pace_s=0.02) if mode == "prefer_cloud" else None
    setup.policy = Policy(mode, connect_s=0.5, first_token_s=5, idle_s=5, deadline_s=0.6, max_attempts=3)
    setup.server.now = time.time
    began = time.monotonic()
    result = setup.ask(scenario, "alpha")
    took = time.monotonic() - began
    assert took < 0.6 + 0.25
    if scenario in SLOW:
        assert isinstance(result, RouterError)
        assert result.code == "deadline"
        assert [e.state for e in setup.entries()] == ["uncertain"]


def test_a_host_that_does_not_answer_costs_the_connect_deadline_and_nothing_else(setup: Setup) -> None:
    setup.real_time = True
    setup.server.offer("ok", "alpha")
    setup.ask("ok")
    setup.server.received.clear()
    setup.policy = Policy("cloud_only", connect_s=0.2, deadline_s=3)
    port, setup.server.port = setup.server.port, 9  # nobody listens there
    catalogue = setup.server.catalogue
    assert isinstance(catalogue, bytes)
    Ledger(setup.state).keep(f"catalogue fake {setup.server.base_url}", catalogue.decode(), time.time())
    error = setup.ask("ok")
    setup.server.port = port
    assert isinstance(error, RouterError)
    assert [a.outcome for a in error.receipt.attempts] == ["connect", "connect"]  # one more try, then no more
    assert error.receipt.attempts[0].billed == "no"
    assert {e.state for e in setup.entries()[1:]} == {"released"}


def test_an_abandoned_stream_is_booked_as_spent(setup: Setup) -> None:
    setup.server.offer("slow_drip", "alpha")
    setup.policy = replace(SHORT, holdback=0)
    events = setup.router("slow_drip").stream("What?")
    next(events)
    events.close()
    assert [e.state for e in setup.entries()] == ["uncertain"]


# The rows of the protocol's fault matrix, and of its table of errors.
MATRIX = [
    "ok", "ok_stream_A", "ok_stream_B", "no_usage", "comment", "data_nospace", "crlf", "utf8_split",
    "multi_line_data", "inband_err_obj", "inband_err_str", "event_error", "eof_no_finish", "done_no_finish",
    "tcp_reset", "stall_before_first", "stall_mid", "slow_drip", "html_200", "empty_choices", "reasoning_only",
    "429_retry_after_s", "429_retry_after_date", "429_ratelimit_hdr", "503_then_ok", "402_then_ok", "price_missing",
    "catalogue_500", "catalogue_stale", "provider_unknown", "wrong_provider_header", "billing_header_echo",
    "model_key_first",
]  # fmt: skip
ERROR_TABLE = [
    "401", "401_html", "402", "403", "403_org", "403_gated", "400_not_supported", "400_not_found", "400_provider",
    "404", "400_param", "422_param", "400_image", "413", "429", "429_title", "408", "500", "502", "503", "504", "529",
    "transport_dns", "transport_connect", "transport_tls", "json_error_200", "json_empty_choices", "html_200",
]  # fmt: skip
OWN_TESTS: dict[str, Callable[..., None]] = {
    "no_usage": test_no_usage_leaves_the_reservation_booked,
    "slow_drip": test_the_deadline_holds_within_250_ms,
    "503_then_ok": test_a_single_offer_is_asked_again_after_a_full_jitter,
    "price_missing": test_a_missing_price_is_not_free,
    "catalogue_500": test_a_catalogue_is_kept_and_an_old_one_is_better_than_none,
    "catalogue_stale": test_a_catalogue_is_kept_and_an_old_one_is_better_than_none,
    "provider_unknown": test_a_provider_nobody_knows_is_an_offer_like_any_other,
    "wrong_provider_header": test_another_provider_than_asked_is_flagged_and_paid_at_its_price,
    "billing_header_echo": test_the_organization_that_pays_is_named_and_the_token_stays_with_chats,
    "transport_connect": test_a_host_that_does_not_answer_costs_the_connect_deadline_and_nothing_else,
    "transport_dns": test_router_time.test_a_name_that_is_not_resolved_costs_the_connect_deadline,
    "transport_tls": test_router_time.test_a_handshake_that_stalls_costs_the_connect_deadline,
}


def test_every_row_of_the_matrix_is_met() -> None:
    rows = [*MATRIX, *ERROR_TABLE]
    assert [row for row in rows if row not in {*WELL, *FAULTS, *OWN_TESTS}] == []
    assert (len(MATRIX), len(ERROR_TABLE)) == (33, 28)
    served = {*router_server.STREAMS, *router_server.ERRORS}
    assert served <= {*WELL, *FAULTS, *OWN_TESTS}  # and nothing is served that no test meets
