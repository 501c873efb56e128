"""The story from top to bottom: answer here, or ask the marketplace, as the owner allows.

    router = Router(local=..., backends=[...], policy=Policy("prefer_on_device"), privacy=Privacy(consent=ask_user),
                    state=Path("router.sqlite3"))
    answer = router.ask("What does the gauge read?", [Path("gauge.jpg")])
    print(answer.text, answer.receipt.source)

The default policy answers on the device alone and opens no socket. Whatever the mode, nothing leaves without a consent
hook that agreed and a reservation in the ledger. Not covered: conversations of several turns, tools, hedged requests.
"""

import base64
import hashlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from router_client import breaker
from router_client.errors import AttemptFailed, ConfigError, Fault, RouterError
from router_client.images import Encoded, ImageRefusedError, reencode
from router_client.ledger import BudgetRefused, Ledger, LedgerError
from router_client.local import ContextTooLongError, Local, Picture, Question, Token, fits, hard_signal, repeats
from router_client.offers import (
    FRESH_S,
    USABLE_S,
    Offer,
    Size,
    bound_nano,
    cost_nano,
    parse_catalogue,
    rank,
    refusal,
    with_labels,
)
from router_client.policy import Backend, Budget, Plan, Policy, Privacy
from router_client.receipt import Attempt, Egress, Receipt
from router_client.retry import RetryBudget, full_jitter_s
from router_client.stream import Chat
from router_client.transport import Exchange, Wire, Worker

log = logging.getLogger("router_client")
LEAST_LEFT = 0.02  # of the deadline, or a second if that is less: with less left no attempt begins
CATALOGUE_PAUSE_S = 30.0  # after a catalogue could not be had
COOL_S = 5.0  # after a 429 that names no time, doubled by each


class Clock(Protocol):
    """Time, which tests replace."""

    def now(self) -> float:
        """Seconds since 1970."""

    def monotonic(self) -> float:
        """Seconds that only go on."""

    def sleep(self, seconds: float) -> None:
        """Waits."""


class SystemClock:
    """The machine's."""

    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)
    sleep = staticmethod(time.sleep)


@dataclass(frozen=True)
class Answer:
    """A text and where it comes from."""

    text: str
    receipt: Receipt


@dataclass(frozen=True)
class Delta:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class Reset:
    """What was handed out is void; another answer begins. Only with stream_failure="restart"."""


@dataclass(frozen=True)
class Done:
    """The end of a stream."""

    answer: Answer


Event = Delta | Reset | Done


@dataclass
class _Run:
    """One request under way."""

    question: Question
    receipt: Receipt
    began: float
    deadline: float
    holdback: int | None  # None: nothing is handed out before the end
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    pieces: list[str] = field(default_factory=list)
    released: int = 0
    local_text: str | None = None
    local_finish: str = ""
    detail: str = ""

    def hand_out(self, piece: str) -> Iterator[Delta]:
        """Takes a piece; gives out what is no longer held back."""
        self.pieces.append(piece)
        if self.holdback is not None and (self.released or len(self.pieces) > self.holdback):
            yield from self.flush()

    def flush(self) -> Iterator[Delta]:
        """Gives out all that was taken."""
        if text := "".join(self.pieces[self.released :]):
            yield Delta(text)
        self.released = len(self.pieces)


class Router:
    """Answers questions. May be used by several threads at once.

    Args:
        local: what answers on this device; None: nothing does.
        backends: where else to ask, in the order of preference.
        policy, budget, privacy: what the owner allows.
        state: the ledger's file; needed with backends.
        p_wrong: from a local answer's tokens, how probably it is wrong; None where that is not known.
        clock: time.

    Raises:
        ConfigError: for what cannot be.
    """

    def __init__(
        self,
        *,
        local: Local | None = None,
        backends: Sequence[Backend] = (),
        policy: Policy = Policy(),  # noqa: B008 -- frozen
        budget: Budget = Budget(),  # noqa: B008
        privacy: Privacy = Privacy(),  # noqa: B008
        state: Path | None = None,
        p_wrong: Callable[[Sequence[Token]], float | None] | None = None,
        clock: Clock = SystemClock(),  # noqa: B008 -- has no state
    ) -> None:
        if policy.mode != "on_device_only" and backends and state is None:
            raise ConfigError("state is missing: without a ledger nothing may be spent")
        if local is None and policy.mode in {"on_device_only", "prefer_on_device"}:
            raise ConfigError(f"local is missing, which mode {policy.mode} asks first")
        self.policy, self.privacy = policy, privacy
        self.backends = tuple(backends)
        self.caps = budget.caps()
        self._local = local
        self._p_wrong = p_wrong
        self._clock = clock
        self._ledger = None if state is None else Ledger(state)
        self._wires = {b.name: Wire(b) for b in self.backends}
        self._retries = RetryBudget()
        self._refreshing: set[str] = set()

    def close(self) -> None:
        """Closes connections; a router can be used again afterwards."""
        for wire in self._wires.values():
            wire.close()

    def ask(self, text: str, images: Sequence[Picture] = (), *, escalate: bool = False, **more: Any) -> Answer:
        """The whole answer; until it is there, any switch between the device and offers is free.

        Args:
            text: the question.
            images: files, or the bytes of files; never an address.
            escalate: the caller's wish to ask further at once, where the mode allows it.
            more: other fields of `local.Question`.

        Raises:
            RouterError: without an answer; it has the receipt.
        """
        for event in self._events(_question(text, images, more), escalate, None):
            if isinstance(event, Done):
                return event.answer
        raise AssertionError("an answer or an exception ends every run")

    def stream(
        self, text: str, images: Sequence[Picture] = (), *, escalate: bool = False, **more: Any
    ) -> Generator[Event, None, None]:
        """The answer as it comes, after `Policy.holdback` pieces; arguments as for `ask`.

        With a schema or a check the whole answer is held back until it is known to pass.

        Raises:
            RouterError: without a whole answer; its `partial` is what was handed out.
        """
        question = _question(text, images, more)
        whole = question.schema is not None or question.valid is not None
        return self._events(question, escalate, None if whole else self.policy.holdback)

    def _events(self, question: Question, escalate: bool, holdback: int | None) -> Generator[Event, None, None]:
        began = self._clock.monotonic()
        run = _Run(question, Receipt(self.policy.mode), began, began + self.policy.deadline_s, holdback)
        try:
            yield from self._modes(run, escalate)
        finally:
            run.receipt.ms = (self._clock.monotonic() - began) * 1000

    def _modes(self, run: _Run, escalate: bool) -> Generator[Event, None, None]:
        """Who is asked, in which order: the whole of the mode table."""
        mode = self.policy.mode
        if mode in {"on_device_only", "prefer_on_device"} and not (escalate and mode == "prefer_on_device"):
            signal = yield from self._on_device(run, run.deadline)
            if not signal:
                yield self._done(run, "local")
                return
            run.receipt.reason = signal
            if mode == "on_device_only" or signal not in self.policy.escalate_on or run.released:
                run.receipt.refused = "committed" if run.released and mode != "on_device_only" else "policy"
                if not (run.released and mode != "on_device_only" and self.policy.stream_failure == "restart"):
                    yield from self._settle_for_local(run, signal)
                    return
                run.receipt.refused = ""
                yield from self._restart(run)
        elif mode == "prefer_on_device":
            run.receipt.reason = "caller"
        else:
            run.receipt.reason = "caller" if escalate else mode
        if not run.released:
            run.pieces = []
        share_s = (self.policy.local_s or 0.0) if mode == "prefer_cloud" and self._local is not None else 0.0
        if (yield from self._cloud(run, share_s)):
            yield self._done(run, "cloud")
            return
        failure = run.receipt.refused
        if mode == "cloud_only":
            raise self._error(run, failure)
        if run.local_text is None and self._local is not None:
            signal = yield from self._on_device(run, run.deadline)
            if signal and run.local_text is None:
                raise self._error(run, failure)
        yield from self._settle_for_local(run, failure)

    def _settle_for_local(self, run: _Run, code: str) -> Generator[Event, None, None]:
        """The local answer as it is, marked; an error where there is none that ended."""
        if run.local_text is None:
            raise self._error(run, code)
        run.receipt.degraded = True
        if not run.released:
            run.pieces = [run.local_text]
        if run.holdback is not None:
            yield from run.flush()
        yield self._done(run, "local")

    def _restart(self, run: _Run) -> Iterator[Reset]:
        if run.released:
            run.receipt.restarted = True
            yield Reset()
        run.pieces, run.released = [], 0

    def _done(self, run: _Run, source: str) -> Done:
        run.receipt.source = source
        if source == "local":
            run.receipt.finish_reason = run.local_finish
        run.receipt.ms = (self._clock.monotonic() - run.began) * 1000
        return Done(Answer("".join(run.pieces), run.receipt))

    def _error(self, run: _Run, code: str) -> RouterError:
        run.receipt.ms = (self._clock.monotonic() - run.began) * 1000
        partial = "".join(run.pieces[: run.released])
        return RouterError(code or "no_answer", run.detail, run.receipt, partial)

    # The local leg.

    def _on_device(self, run: _Run, deadline: float) -> Generator[Event, None, str]:
        """Answers here; returns the reason not to trust it, "" if there is none."""
        assert self._local is not None
        began = self._clock.monotonic()
        tokens: list[Token] = []
        signal = ""
        run.pieces = []
        local, question = self._local, run.question
        limit = deadline if self.policy.local_s is None else min(deadline, began + self.policy.local_s)

        def work(put: Callable[[Token], None], stop: threading.Event) -> None:
            if why := local.available():
                raise _UnavailableError(why)
            for token in local.stream(question, stop):
                if stop.is_set():
                    return
                put(token)

        worker = Worker(work)
        try:
            while (token := worker.next(limit - self._clock.monotonic())) is not None:
                tokens.append(token)
                yield from run.hand_out(token.text)
                if token.finish:
                    break
                if repeats(run.pieces):
                    break
        except TimeoutError:
            signal = "deadline"
        except _UnavailableError as exc:
            signal, run.detail = "unavailable", str(exc)
        except ContextTooLongError:
            signal = "context"
        except Exception as exc:  # noqa: BLE001 -- whatever the local engine raises
            signal, run.detail = "error", type(exc).__name__
        finally:
            worker.stop.set()
        if not signal:
            run.local_finish = tokens[-1].finish if tokens else ""
            run.local_text = "".join(run.pieces)
            signal = hard_signal(question, run.pieces, run.local_finish) or self._doubt(run, tokens)
        ms = (self._clock.monotonic() - began) * 1000
        run.receipt.attempts.append(Attempt("local", signal or "ok", ms))
        log.info("local: %s, %.0f ms", signal or "ok", ms)
        if not signal and run.holdback is not None:
            yield from run.flush()
        return signal

    def _doubt(self, run: _Run, tokens: Sequence[Token]) -> str:
        if self._p_wrong is None or self.policy.max_p_wrong is None:
            return ""
        run.receipt.p_wrong = self._p_wrong(tokens)
        doubtful = run.receipt.p_wrong is not None and run.receipt.p_wrong > self.policy.max_p_wrong
        return "low_confidence" if doubtful else ""

    # The cloud leg.

    def _left_s(self, run: _Run, share_s: float = 0.0) -> float:
        return run.deadline - share_s - self._clock.monotonic()

    def _cloud(self, run: _Run, share_s: float) -> Generator[Event, None, bool]:
        """Asks offers; True with an answer in run.pieces, or else run.receipt.refused says why not."""
        began_with = run.detail
        try:
            planned = self._planned(run, share_s)
            if planned is None:
                return False
            return (yield from self._attempts(run, planned, share_s))
        except LedgerError as exc:
            run.receipt.refused, run.detail = "ledger", str(exc)
            return False
        finally:
            run.detail = run.detail or began_with

    def _planned(self, run: _Run, share_s: float) -> "_Planned | None":
        """Offers that consent was given for; None with the refusal noted. Only catalogues are fetched here."""
        receipt, question = run.receipt, run.question
        if not self.backends or self._ledger is None:
            receipt.refused = "no_backend"
            return None
        if self.privacy.consent is None:
            receipt.refused = "no_consent_hook"
            return None
        try:
            encoded = [self._encode(p, 1) for p in question.images]
        except ImageRefusedError as exc:
            receipt.refused, run.detail = "image", str(exc)
            return None
        size = Size(_text_bytes(question), len(encoded), question.max_tokens)
        offers, why = self.offers(size, lambda: self._left_s(run, share_s))
        if not offers:
            receipt.refused, run.detail = "no_offer", "; ".join(f"{n}: {w}" for n, w in sorted(why.items())[:20])
            return None
        offers = offers[: self.policy.max_attempts]
        bounds = [bound_nano(offer, size) for offer in offers]
        known = [b for b in bounds if b is not None]
        dimensions = tuple((e.width, e.height) for e in encoded)
        plan = Plan(
            tuple(o.name for o in offers),
            tuple(sorted({b.host for b in self.backends if b.name in {o.backend for o in offers}})),
            tuple(dict.fromkeys(o.model for o in offers)),
            receipt.reason,
            len(encoded),
            sum(len(e.data) for e in encoded),
            dimensions,
            size.text_bytes,
            max(known) * self.policy.max_attempts if len(known) == len(bounds) else None,
        )
        asked = self._clock.monotonic()
        agreed = self.privacy.consent(plan) is True
        run.deadline += self._clock.monotonic() - asked  # a person's time is not the machine's
        if not agreed:
            receipt.refused = "consent"
            return None
        egress = Egress(plan.images, plan.image_bytes, plan.text_bytes, plan.dimensions)
        return _Planned(offers, encoded, size, egress)

    def offers(self, size: Size, left_s: Callable[[], float]) -> tuple[list[Offer], dict[str, str]]:
        """(offers that may be asked, the best first; why each other one may not). Fetches catalogues if need be.

        Raises:
            LedgerError: if the state cannot be read.
        """
        assert self._ledger is not None
        caps = [c for c in (self.caps.request_nano, self.caps.day_nano, self.caps.month_nano) if c is not None]
        good: list[Offer] = []
        why: dict[str, str] = {}
        for backend in self.backends:
            try:
                token = read_token(backend)
            except AttemptFailed as failed:
                why[backend.name] = failed.fault.detail
                continue
            if blocked := breaker.reason(self._ledger.health(_account(backend, token)), self._clock.now()):
                why[backend.name] = blocked
                continue
            try:
                found = self.catalogue(backend, left_s)
            except AttemptFailed as failed:
                why[backend.name] = f"no catalogue: {failed.fault.code}"
                continue
            kept = []
            for offer in found:
                if offer.model not in backend.models:
                    continue
                words = refusal(offer, backend, size, self.privacy.require, min(caps, default=None))
                for key in (_model(offer), _offer(offer, size.images)):
                    words = words or breaker.reason(self._ledger.health(key), self._clock.now())
                if words:
                    why[offer.name] = words
                else:
                    kept.append(offer)
            for model in set(backend.models) - {o.model for o in found}:
                why[f"{backend.name}/{model}"] = "not served"
            good += rank(kept, backend.sort, size)
        return good, why

    def catalogue(self, backend: Backend, left_s: Callable[[], float]) -> list[Offer]:
        """Offers of a backend: as configured, or from its catalogue, which is kept for a week.

        An old one is used while a thread fetches a new one; only without one does a request wait.

        Raises:
            AttemptFailed: if there is none.
            LedgerError: if the state cannot be used.
        """
        assert self._ledger is not None
        if backend.offers:
            return [with_labels(replace(o, backend=backend.name), backend) for o in backend.offers]
        key, now = f"catalogue {backend.name} {backend.base_url}", self._clock.now()
        if (kept := self._ledger.kept(key)) and abs(now - kept[0]) < USABLE_S:
            try:
                offers = parse_catalogue(kept[1], backend)
            except ValueError:
                pass
            else:
                if not 0 <= now - kept[0] < FRESH_S and key not in self._refreshing:
                    self._refreshing.add(key)
                    threading.Thread(target=self._refresh, args=(backend, key), daemon=True).start()
                return offers
        if code := breaker.reason(self._ledger.health(key), now):
            raise AttemptFailed(Fault(code, "network"))
        return self._fetch(backend, key, left_s)

    def _fetch(self, backend: Backend, key: str, left_s: Callable[[], float]) -> list[Offer]:
        assert self._ledger is not None
        now = self._clock.now()
        try:
            text = self._wires[backend.name].catalogue(self.policy, left_s, now)
            offers = parse_catalogue(text, backend)
        except (AttemptFailed, ValueError) as exc:
            fault = exc.fault if isinstance(exc, AttemptFailed) else Fault("catalogue_unreadable", "network")
            self._ledger.change_health(key, lambda h: breaker.block(h, fault.code, CATALOGUE_PAUSE_S, now), now)
            raise AttemptFailed(fault) from None
        self._ledger.keep(key, text, now)
        return offers

    def _refresh(self, backend: Backend, key: str) -> None:
        try:
            self._fetch(backend, key, lambda: self.policy.deadline_s)
        except (AttemptFailed, LedgerError):
            log.info("%s: the catalogue could not be refreshed", backend.name)
        finally:
            self._refreshing.discard(key)

    def _encode(self, picture: Picture, shrink: int) -> Encoded:
        privacy = self.privacy
        return reencode(
            picture,
            max_side=privacy.max_side // shrink,
            quality=privacy.jpeg_quality,
            max_bytes=privacy.max_image_bytes // shrink**2,
        )

    def _attempts(self, run: _Run, planned: "_Planned", share_s: float) -> Generator[Event, None, bool]:
        """The one loop that retries: an attempt, what it says, whom to ask next."""
        out: set[str] = set()  # offers that are not asked again
        tries: dict[str, int] = {}
        made = 0
        while True:
            open_to = [o for o in planned.offers if o.name not in out]
            offer = min(open_to, key=lambda o: tries.get(o.name, 0), default=None)
            if offer is None or made >= self.policy.max_attempts:
                run.receipt.refused = run.receipt.refused or "all_failed"
                return False
            if made and not self._retries.take():
                run.receipt.refused = "retry_budget"
                return False
            if tries.get(offer.name, 0) and not self._wait(run, planned, tries[offer.name], share_s):
                return False
            if self._left_s(run, share_s) < min(1.0, LEAST_LEFT * self.policy.deadline_s):
                run.receipt.refused = "deadline"
                return False
            fault, counted = yield from self._attempt(run, offer, planned, share_s)
            if fault is None:
                return True
            run.receipt.refused, run.detail = fault.code, fault.detail or run.detail
            if not counted:
                out.add(offer.name)
                continue
            made += 1
            tries[offer.name] = tries.get(offer.name, 0) + 1
            if run.released:
                if self.policy.stream_failure == "terminate":
                    raise self._error(run, fault.code)
                yield from self._restart(run)
            run.pieces = []
            gone = self._excluded(fault, offer, planned)
            if gone is None:
                return False
            out |= gone

    def _wait(self, run: _Run, planned: "_Planned", tries: int, share_s: float) -> bool:
        """Before the same offer is asked again; False if there is no time for it."""
        seconds = max(planned.wish_s + 0.01 if planned.wish_s else 0.0, full_jitter_s(tries - 1))
        if seconds >= self._left_s(run, share_s):
            return False
        self._clock.sleep(seconds)
        return True

    def _excluded(self, fault: Fault, offer: Offer, planned: "_Planned") -> set[str] | None:
        """Whom not to ask again in this request; None: nobody."""
        match fault.scope:
            case "account":
                return {o.name for o in planned.offers if o.backend == offer.backend}
            case "model":
                return {o.name for o in planned.offers if (o.backend, o.model) == (offer.backend, offer.model)}
            case "network":
                planned.unreachable += 1
                return {o.name for o in planned.offers if o.backend == offer.backend and planned.unreachable > 1}
            case "offer":
                again = fault.counts or fault.code == "http_429"
                return set() if again and fault.block_s < 600 else {offer.name}
        if fault.code == "too_large" and planned.encoded and planned.shrink == 1:
            planned.shrink = 2
            return {o.name for o in planned.offers if o.name != offer.name}  # the same offer, once, with less
        if fault.code == "bad_request" and not planned.minimal:
            planned.minimal = True
            others = [o for o in planned.offers if o.name != offer.name]
            return {offer.name} if others else set()
        return None

    def _attempt(
        self, run: _Run, offer: Offer, planned: "_Planned", share_s: float
    ) -> Generator[Event, None, tuple[Fault | None, bool]]:
        """(why it failed or None, whether it was made). Money is reserved before and booked after, whatever happens."""
        assert self._ledger is not None
        ledger, receipt, clock = self._ledger, run.receipt, self._clock
        backend = next(b for b in self.backends if b.name == offer.backend)
        try:
            token = read_token(backend)
        except AttemptFailed as failed:
            return failed.fault, False
        now = clock.now()
        account, health = _account(backend, token), _offer(offer, planned.size.images)
        for key in (account, _model(offer), health):  # another process may have learnt something
            if code := breaker.reason(ledger.health(key), now):
                return Fault(code, "offer"), False
        if not ledger.change_health(health, lambda h: breaker.admit(h, now), now):
            return Fault("breaker_open", "offer"), False
        if planned.shrink > 1:
            try:
                planned.encoded = [self._encode(p, planned.shrink) for p in run.question.images]
            except ImageRefusedError as exc:
                return Fault("image", "request", str(exc)), False
        bound = bound_nano(offer, planned.size) or 0
        try:
            entry = ledger.reserve(run.id, offer.name, bound, self.caps, now, reason=receipt.reason, consent=True)
        except BudgetRefused as refused:
            return Fault(refused.code, "offer", str(refused)), False
        body = _body(run.question, offer, planned)
        exchange = Exchange(Chat(token))
        began = clock.monotonic()
        fault: Fault | None = Fault("abandoned", "request", maybe_billed=True)
        cost, billed = bound, "maybe"
        policy, wire = self.policy, self._wires[backend.name]
        receipt.egress = planned.egress
        try:
            with closing(wire.chat(exchange, body, token, policy, lambda: self._left_s(run, share_s), now)) as pieces:
                for piece in pieces:
                    yield from run.hand_out(piece)
            if not run.pieces:
                run.pieces = [exchange.chat.text]
            fault = None
            if not fits(run.question, exchange.chat.text):
                fault = Fault("schema", "offer", maybe_billed=True, block_s=0)
        except AttemptFailed as failed:
            fault = failed.fault
        finally:  # also when the caller walks away from a stream
            billed, cost = self._book(entry, offer, exchange, fault, bound, run)
        ms = (clock.monotonic() - began) * 1000
        outcome = "ok" if fault is None else fault.code
        detail = "" if fault is None else fault.detail
        receipt.attempts.append(Attempt(offer.name, outcome, ms, exchange.ttft_ms, billed, cost, detail))
        log.info("%s: %s, %.0f ms", offer.name, outcome, ms)
        self._learn(fault, account, offer, health, planned)
        if fault is None:
            if run.holdback is not None:
                yield from run.flush()
            self._retries.earn()
            self._note(receipt, offer, exchange)
        return fault, True

    def _book(
        self, entry: int, offer: Offer, exchange: Exchange, fault: Fault | None, bound: int, run: _Run
    ) -> tuple[str, int]:
        """(billed, nano-USD) as written to the ledger. One that fails now leaves the reservation, which is spent."""
        assert self._ledger is not None
        usage, receipt = exchange.chat.usage, run.receipt
        ended = fault is None or fault.code in {"schema", "empty"}
        served = exchange.headers.get("x-inference-provider", "")
        priced = offer if served in {"", offer.provider} else self._served(offer, served)
        known = cost_nano(priced, usage) if usage and priced else None
        billed, cost = ("yes" if known is not None else "maybe", bound if known is None else known)
        if ended and fault is None:
            receipt.usage_source = "bound" if known is None else "provider"
        try:
            if ended:
                self._ledger.settle(entry, cost)
            elif fault is not None and fault.maybe_billed:
                self._ledger.uncertain(entry)
                billed, cost = "maybe", bound
            else:
                self._ledger.release(entry)
                billed, cost = "no", 0
            if self.caps.day_nano is not None:
                receipt.day_left_nano_usd = self.caps.day_nano - self._ledger.spent(self._clock.now())[0]
        except LedgerError:
            log.warning("the ledger could not be written: what was reserved stays booked")
        receipt.cost_nano_usd += cost
        return billed, cost

    def _served(self, offer: Offer, provider: str) -> Offer | None:
        """The offer of the provider that really answered, for its price; None where that is not known."""
        backend = next(b for b in self.backends if b.name == offer.backend)
        try:
            found = self.catalogue(backend, lambda: 0.0)
        except AttemptFailed:
            return None
        return next((o for o in found if (o.model, o.provider) == (offer.model, provider)), None)

    def _learn(self, fault: Fault | None, account: str, offer: Offer, health: str, planned: "_Planned") -> None:
        """Remembers what an attempt says about the account, the model or the offer; nothing about anyone else."""
        assert self._ledger is not None
        now = self._clock.now()
        if fault is None or fault.counts:
            self._ledger.change_health(health, lambda h: breaker.record(h, fault is None, now), now)
        seconds = 0.0 if fault is None else fault.block_s
        planned.wish_s = 0.0 if fault is None else fault.retry_after_s or 0.0
        if fault is not None and fault.code == "http_429" and not seconds:
            seconds, planned.cools = COOL_S * 2.0**planned.cools, planned.cools + 1
            planned.wish_s = seconds
        if fault is not None and seconds:
            key = {"account": account, "model": _model(offer)}.get(fault.scope, health)
            self._ledger.change_health(key, lambda h: breaker.block(h, fault.code, seconds, now), now)

    def _note(self, receipt: Receipt, offer: Offer, exchange: Exchange) -> None:
        chat, headers = exchange.chat, exchange.headers
        receipt.refused = ""
        receipt.model_asked, receipt.provider_asked = offer.asked, offer.provider
        receipt.model_served = chat.model
        receipt.provider_served = headers.get("x-inference-provider", "")[:128]
        receipt.request_id = headers.get("x-request-id", "")[:128]
        if receipt.provider_served and offer.provider:
            receipt.served_as_asked = receipt.provider_served == offer.provider
        receipt.finish_reason = chat.finish_reason
        if chat.usage:
            receipt.prompt_tokens, receipt.completion_tokens = chat.usage.prompt_tokens, chat.usage.completion_tokens
        if offer.price_in is None or offer.price_out is None:
            receipt.cost_basis = "price unknown"
        else:
            at = datetime.fromtimestamp(self._clock.now(), UTC).strftime("%Y-%m-%dT%H:%MZ")
            prices = f"in={offer.price_in / 10**9:g} out={offer.price_out / 10**9:g} USD/M"
            receipt.cost_basis = f"{offer.name} {at} {prices}"


@dataclass
class _Planned:
    """What consent was given for, and how it is asked."""

    offers: list[Offer]
    encoded: list[Encoded]
    size: Size
    egress: Egress
    shrink: int = 1
    minimal: bool = False
    unreachable: int = 0
    cools: int = 0
    wish_s: float = 0.0


class _UnavailableError(Exception):
    """The local leg said why it cannot answer."""


def read_token(backend: Backend) -> str:
    """A backend's token, checked before it can reach a header, whose errors would quote it.

    Raises:
        AttemptFailed: if there is none, or none that can be one.
    """
    if backend.token is None:
        return ""
    try:
        token = backend.token()
    except Exception:  # noqa: BLE001 -- the owner's function; its words may hold the token
        raise AttemptFailed(Fault("no_token", "account", "the token could not be read")) from None
    if not token:
        raise AttemptFailed(Fault("no_token", "account", "there is no token"))
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise AttemptFailed(Fault("bad_token", "account", "the token holds characters that no token has"))
    return token


def _question(text: str, images: Sequence[object], more: Mapping[str, Any]) -> Question:
    if not text.strip():
        raise ConfigError("the question is empty")
    pictures: list[Picture] = []
    for picture in images:
        if not isinstance(picture, bytes | Path):
            raise ConfigError("an image is a file's Path or bytes: an address would have a third party fetch it")
        pictures.append(picture)
    question = Question(text, tuple(pictures), **more)
    if question.max_tokens < 1:
        raise ConfigError(f"max_tokens is {question.max_tokens}, want 1 or more")
    return question


def _text_bytes(question: Question) -> int:
    schema = "" if question.schema is None else json.dumps(question.schema)
    return len((question.text + question.system + schema).encode("utf-8", "replace"))


def _account(backend: Backend, token: str) -> str:
    """A key that changes with the token and does not hold it."""
    mark = hashlib.sha256(f"{backend.base_url} {backend.bill_to} {token}".encode()).hexdigest()[:16]
    return f"account {backend.name} {mark}"


def _model(offer: Offer) -> str:
    return f"model {offer.backend}/{offer.model}"


def _offer(offer: Offer, images: int) -> str:
    return f"offer {offer.name} {'image' if images else 'text'}"


def _body(question: Question, offer: Offer, planned: _Planned) -> bytes:
    """The request; "model" comes first, so that a proxy need not read the images to route it."""
    content: list[dict[str, Any]] = [{"type": "text", "text": question.text}]
    for encoded in planned.encoded:
        url = "data:image/jpeg;base64," + base64.b64encode(encoded.data).decode("ascii")
        content.append({"type": "image_url", "image_url": {"url": url}})
    messages: list[dict[str, Any]] = [{"role": "system", "content": question.system}] if question.system else []
    messages.append({"role": "user", "content": content if planned.encoded else question.text})
    body: dict[str, Any] = {
        "model": offer.asked,
        "messages": messages,
        "max_tokens": question.max_tokens,
        "stream": True,
    }
    if not planned.minimal:
        body |= {"temperature": question.temperature, "stream_options": {"include_usage": True}}
        if question.schema is not None:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": dict(question.schema)},
            }
    return json.dumps(body).encode()
