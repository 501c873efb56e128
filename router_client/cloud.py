"""The cloud leg: what was planned and agreed to, in one loop of attempts, each reserved before and booked after.

Whatever may take long without a limit of its own (another process in the ledger, a token that is fetched, a large
image) runs in a thread, and is waited for no longer than the deadline allows.
"""

import logging
import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime

from router_client import breaker
from router_client.breaker import Health
from router_client.errors import AttemptFailed, Fault, scrub
from router_client.images import Encoded, ImageRefusedError
from router_client.ledger import BudgetRefused, Caps, Ledger, LedgerError
from router_client.local import fits
from router_client.market import Market, account_key, model_key, offer_key
from router_client.offers import Offer, bound_nano, cost_nano
from router_client.planning import Planned, Planner
from router_client.policy import Policy, Privacy, read_token
from router_client.receipt import Attempt
from router_client.request import chat_body
from router_client.retry import RetryBudget, full_jitter_s
from router_client.run import Clock, Event, Run
from router_client.stream import Chat
from router_client.transport import Exchange
from router_client.worker import within

log = logging.getLogger("router_client")
LEAST_LEFT = 0.02  # of the deadline, or a second if that is less: with less left no attempt begins
COOL_S = 5.0  # after a 429 that names no time, doubled by each
BOOKING_S = 0.1  # past the deadline that a booking is waited for; it goes on by itself


@dataclass(frozen=True)
class _Begun:
    """An attempt that may be sent: the money is reserved."""

    offer: Offer
    token: str = field(repr=False)
    account: str
    health: str
    entry: int
    bound: int
    body: bytes = field(repr=False)


class Cloud:
    """Asks backends. Used by several threads at once."""

    def __init__(
        self, market: Market, policy: Policy, privacy: Privacy, caps: Caps, ledger: Ledger, clock: Clock
    ) -> None:
        self.market = market
        self._planner = Planner(market, policy, privacy, clock)
        self._policy, self._caps, self._ledger, self._clock = policy, caps, ledger, clock
        self._retries = RetryBudget(clock=clock.monotonic)
        self._slots = {b.name: threading.BoundedSemaphore(b.at_once) for b in market.backends.values()}

    def answer(self, run: Run, share_s: float) -> Generator[Event, None, bool]:
        """Asks offers; True with an answer in run.pieces, or else run.receipt.refused says why not.

        Args:
            run: the request.
            share_s: seconds before the deadline that are kept for the local leg.

        Raises:
            RouterError: if an answer broke after some of it was handed out, and the policy is to end there.
        """
        try:
            planned = self._planner.plan(run, share_s)
            return planned is not None and (yield from self._attempts(run, planned, share_s))
        except LedgerError as exc:
            run.receipt.refused, run.detail = "ledger", str(exc)
        except TimeoutError:
            run.receipt.refused = "deadline"
        return False

    def _attempts(self, run: Run, planned: Planned, share_s: float) -> Generator[Event, None, bool]:
        """The one loop that retries: an attempt, what it says, whom to ask next."""
        made = 0
        while True:
            open_to = [o for o in planned.offers if o.name not in planned.out]
            offer = min(open_to, key=lambda o: (planned.tries[o.name], planned.wishes[o.name]), default=None)
            if offer is None or made >= self._policy.max_attempts:
                run.receipt.refused = run.receipt.refused or "all_failed"
                return False
            tries = planned.tries[offer.name]
            if made and not self._retries.take():
                run.receipt.refused = "retry_budget"
                return False
            again = max(tries, planned.unreachable[offer.backend])
            if again and not self._wait(run, planned.wishes[offer.name], again, share_s):
                return False
            if run.left_s(share_s) < min(1.0, LEAST_LEFT * self._policy.deadline_s):
                run.receipt.refused = "deadline"
                return False
            fault, sent = yield from self._attempt(run, offer, planned, share_s)
            if fault is None:
                return True
            run.receipt.refused, run.detail = fault.code, fault.detail or run.detail
            if not sent:
                planned.out.add(offer.name)
                continue
            made += 1
            planned.tries[offer.name] = tries + 1
            if run.released and self._policy.stream_failure == "terminate":
                raise run.error(fault.code)
            yield from run.restart()
            if not self._goes_on(fault, offer, planned):
                return False

    def _wait(self, run: Run, wish: float, tries: int, share_s: float) -> bool:
        """Before the same offer or an unreachable host is asked again; False if there is no time for it."""
        seconds = max(wish - self._clock.monotonic() + 0.01, full_jitter_s(tries - 1))
        if seconds >= run.left_s(share_s):
            return False
        self._clock.sleep(seconds)
        return True

    def _goes_on(self, fault: Fault, offer: Offer, planned: Planned) -> bool:
        """Whether this request is worth another attempt; notes whom not to ask again in it."""
        same = {o.name for o in planned.offers if o.backend == offer.backend}
        others = {o.name for o in planned.offers} - {offer.name}
        match fault.scope:
            case "account":
                planned.out |= same
            case "model":
                planned.out |= {o.name for o in planned.offers if o.name in same and o.model == offer.model}
            case "network":
                planned.unreachable[offer.backend] += 1
                planned.out |= same if planned.unreachable[offer.backend] > 1 else set()
            case "offer":
                again = fault.counts or fault.code == "http_429"
                planned.out |= set() if again and fault.block_s < 600 else {offer.name}
            case "request":
                if fault.code == "too_large" and any(planned.encoded.values()) and planned.shrink == 1:
                    planned.shrink = 2
                    planned.out |= others  # the same offer, once, with less
                elif fault.code == "bad_request" and not planned.minimal:
                    planned.minimal = True
                    planned.out |= {offer.name} if others - planned.out else set()
                else:
                    return False
        return True

    def _attempt(
        self, run: Run, offer: Offer, planned: Planned, share_s: float
    ) -> Generator[Event, None, tuple[Fault | None, bool]]:
        """(why it failed or None, whether it was sent). Money is reserved before and booked after, whatever happens."""
        slot = self._slots[offer.backend]
        if not slot.acquire(timeout=max(0.0, run.left_s(share_s))):
            return Fault("deadline", "request"), False
        try:
            encoded = self._planner.encoded(run, planned, offer, share_s)
            begun = within(lambda stop: self._begin(run, offer, planned, encoded, stop), run.left_s(share_s))
            return (yield from self._send(run, begun, planned, share_s)), True
        except AttemptFailed as failed:
            return failed.fault, False
        except ImageRefusedError as exc:
            return Fault("image", "request", str(exc)), False
        finally:
            slot.release()

    def _begin(
        self, run: Run, offer: Offer, planned: Planned, encoded: Sequence[Encoded], stop: threading.Event
    ) -> _Begun:
        """All that comes before the first byte.

        Raises:
            AttemptFailed: if the attempt must not be made.
            LedgerError: if the file cannot be used.
        """
        ledger, now = self._ledger, self._clock.now()
        token = read_token(self.market.backends[offer.backend])
        account, health = account_key(self.market.backends[offer.backend], token), offer_key(offer, planned.size.images)
        body = chat_body(run.question, offer, encoded, minimal=planned.minimal)
        for key in (account, model_key(offer), health):  # another thread or process may have learnt something
            if code := breaker.reason(ledger.health(key), now):
                raise AttemptFailed(Fault(code, "offer"))
        bound = bound_nano(offer, planned.size) or 0  # without a price, which only an owner without caps allows
        admitted: list[str] = []
        entry = None
        try:
            for key in (account, health):
                if not ledger.change_health(key, lambda h: breaker.admit(h, now), now):
                    raise AttemptFailed(Fault(breaker.reason(ledger.health(key), now) or "breaker_open", "offer"))
                admitted.append(key)
            reason = run.receipt.reason
            entry = ledger.reserve(run.id, offer.name, bound, self._caps, now, reason=reason, consent=True)
        except BudgetRefused as refused:
            raise AttemptFailed(Fault(refused.code, "offer", str(refused))) from None
        finally:
            given_up = stop.is_set()  # nobody waits any more
            if entry is None or given_up:
                self._withdraw(admitted, now)
            if entry is not None and given_up:
                ledger.release(entry)
        return _Begun(offer, token, account, health, entry, bound, body)

    def _withdraw(self, keys: Sequence[str], now: float) -> None:
        """A call that was let through was not made."""
        for key in keys:
            self._ledger.change_health(key, lambda h: breaker.withdraw(h, now), now)

    def _send(self, run: Run, begun: _Begun, planned: Planned, share_s: float) -> Generator[Event, None, Fault | None]:
        """Sends what was begun; why it failed, or None with the answer in run.pieces."""
        receipt, clock, offer = run.receipt, self._clock, begun.offer
        exchange = Exchange(Chat(begun.token))
        began = clock.monotonic()
        fault: Fault | None = Fault("abandoned", "request", maybe_billed=True)
        receipt.egress = planned.egress
        chat = self.market.wires[offer.backend].chat
        try:
            left_s = lambda: run.left_s(share_s)  # noqa: E731
            with closing(chat(exchange, begun.body, begun.token, self._policy, left_s, clock.now())) as pieces:
                for piece in pieces:
                    yield from run.hand_out(piece)
            if not "".join(run.pieces).strip():  # filed under reasoning
                run.pieces[run.released :] = [exchange.chat.text]
            fault = None
            if not fits(run.question, exchange.chat.text):
                fault = Fault("schema", "offer", maybe_billed=True)
        except AttemptFailed as failed:
            fault = failed.fault
        finally:  # also when the caller walks away from a stream
            ms = (clock.monotonic() - began) * 1000
            self._end(run, begun, exchange, fault, planned, ms)
        if fault is None:
            yield from run.flush()
            self._retries.earn()
            self._note(run, offer, exchange)
        return fault

    def _end(
        self, run: Run, begun: _Begun, exchange: Exchange, fault: Fault | None, planned: Planned, ms: float
    ) -> None:
        """Books the money, and remembers what the attempt says. Raises nothing: what is reserved is spent."""
        receipt, offer = run.receipt, begun.offer
        wish_s = 0.0 if fault is None else fault.retry_after_s or 0.0
        if fault is not None and fault.code == "http_429" and not fault.block_s:
            wish_s, planned.cools = COOL_S * 2.0**planned.cools, planned.cools + 1
        planned.wishes[offer.name] = self._clock.monotonic() + wish_s if wish_s else 0.0

        def book(_: threading.Event) -> tuple[str, int, int]:
            billed, cost = self._book(begun, exchange, fault)
            self._learn(begun, exchange, fault, wish_s, ms)
            return billed, cost, self._ledger.spent(self._clock.now())[0]

        billed, cost = "maybe", begun.bound
        try:
            billed, cost, spent = within(book, max(0.0, run.left_s()) + BOOKING_S)
            if self._caps.day_nano is not None:
                receipt.day_left_nano_usd = self._caps.day_nano - spent
        except (LedgerError, TimeoutError):
            log.warning("%s: the ledger is busy or broken: what was reserved may stay booked", offer.name)
        receipt.cost_nano_usd += cost
        if fault is None:
            receipt.usage_source = "provider" if billed == "yes" else "bound"
        outcome, detail = ("ok", "") if fault is None else (fault.code, fault.detail)
        names = self._words(exchange, "x-request-id"), exchange.trace_id
        receipt.attempts.append(Attempt(offer.name, outcome, ms, exchange.ttft_ms, billed, cost, detail, *names))
        if (warning := self._words(exchange, "x-hf-warning")) and warning not in receipt.warnings:
            receipt.warnings.append(warning)
            log.warning("%s: the server sent a warning; the receipt has it", offer.name)
        log.info("%s: %s, %.0f ms", offer.name, outcome, ms)

    def _book(self, begun: _Begun, exchange: Exchange, fault: Fault | None) -> tuple[str, int]:
        """(billed, nano-USD) as written to the ledger: the count of an answer that ended, or what was reserved."""
        if fault is None or fault.code in {"schema", "empty"}:
            known = self._counted(begun.offer, exchange)
            billed, cost = ("maybe", begun.bound) if known is None else ("yes", known)
            self._ledger.settle(begun.entry, cost)
            return billed, cost
        if fault.maybe_billed:
            self._ledger.uncertain(begun.entry)
            return "maybe", begun.bound
        self._ledger.release(begun.entry)
        return "no", 0

    def _counted(self, offer: Offer, exchange: Exchange) -> int | None:
        """Nano-USD by the count and the price of whoever served it; None where one is not known."""
        usage, served = exchange.chat.usage, exchange.headers.get("x-inference-provider", "")
        priced = offer if served in {"", offer.provider} else self.market.served(offer, served)
        return None if usage is None or priced is None else cost_nano(priced, usage)

    def _learn(self, begun: _Begun, exchange: Exchange, fault: Fault | None, wish_s: float, ms: float) -> None:
        """Remembers what an attempt says about the account, the model or the offer; nothing about anyone else."""
        now, change = self._clock.now(), self._ledger.change_health
        if not exchange.sent:
            self._withdraw((begun.account, begun.health), now)
        account_is_well = fault is None or fault.scope not in {"account", "network"}
        if exchange.headers and account_is_well:
            change(begun.account, breaker.unblock, now)
        if fault is None or fault.counts:
            change(begun.health, lambda h: _after(h, exchange, fault is None, ms, now), now)
        seconds = 0.0 if fault is None else fault.block_s or (wish_s if fault.code == "http_429" else 0.0)
        if fault is not None and seconds:
            key = {"account": begun.account, "model": model_key(begun.offer)}.get(fault.scope, begun.health)
            change(key, lambda h: breaker.block(h, fault.code, seconds, now), now)

    def _words(self, exchange: Exchange, header: str) -> str:
        return scrub(exchange.headers.get(header, ""), exchange.chat.token)[:128]

    def _note(self, run: Run, offer: Offer, exchange: Exchange) -> None:
        """The receipt of an answer."""
        receipt, chat = run.receipt, exchange.chat
        receipt.refused = ""
        receipt.model_asked, receipt.provider_asked = offer.asked, offer.provider
        receipt.model_served = chat.model
        receipt.provider_served = self._words(exchange, "x-inference-provider")
        receipt.request_id = self._words(exchange, "x-request-id")
        if receipt.provider_served and offer.provider:
            receipt.served_as_asked = receipt.provider_served == offer.provider
        receipt.finish_reason = chat.finish_reason
        if chat.usage:
            receipt.prompt_tokens, receipt.completion_tokens = chat.usage.prompt_tokens, chat.usage.completion_tokens
        receipt.cost_basis = "price unknown"
        if offer.price_in is not None and offer.price_out is not None:
            at = datetime.fromtimestamp(self._clock.now(), UTC).strftime("%Y-%m-%dT%H:%MZ")
            prices = f"in={offer.price_in / 10**9:g} out={offer.price_out / 10**9:g} USD/M"
            receipt.cost_basis = f"{offer.name} {at} {prices}"


def _after(health: Health, exchange: Exchange, ok: bool, ms: float, now: float) -> Health:
    """An offer's health after a call that says something about it, and its speed after a good one."""
    health = breaker.record(health, ok, now)
    if not ok or exchange.ttft_ms is None:
        return health
    usage, seconds = exchange.chat.usage, (ms - exchange.ttft_ms) / 1000
    good = usage is not None and usage.completion_tokens > 1 and seconds > 0
    return breaker.measured(health, exchange.ttft_ms, usage.completion_tokens / seconds if good and usage else None)
