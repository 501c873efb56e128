"""The story from top to bottom: answer here, or ask the marketplace, as the owner allows.

    router = Router(local=..., backends=[...], policy=Policy("prefer_on_device"), privacy=Privacy(consent=ask_user),
                    state=Path("router.sqlite3"))
    answer = router.ask("What does the gauge read?", [Path("gauge.jpg")])
    print(answer.text, answer.receipt.source)

The default policy answers on the device alone and opens no socket. Whatever the mode, nothing leaves without a consent
hook that agreed and a reservation in the ledger. Not covered: conversations of several turns, tools, hedged requests.
"""

import logging
import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from router_client.cloud import Cloud
from router_client.errors import ConfigError
from router_client.ledger import Ledger
from router_client.local import ContextTooLongError, Local, Picture, Question, Token, hard_signal, repeats
from router_client.market import Market
from router_client.policy import Backend, Budget, Policy, Privacy
from router_client.receipt import Attempt, Receipt
from router_client.request import question_of
from router_client.run import Answer, Clock, Delta, Done, Event, Reset, Run, SystemClock
from router_client.worker import Worker

__all__ = ["Answer", "Delta", "Done", "Event", "Reset", "Router"]
log = logging.getLogger("router_client")


class Router:
    """Answers questions. May be used by several threads at once.

    Args:
        local: what answers on this device; None: nothing does.
        backends: where else to ask, in the order of preference.
        policy, budget, privacy: what the owner allows.
        state: the ledger's file; needed with backends.
        p_wrong: from a local answer's tokens, how probably it is wrong; None where that is not known. One that raises
            counts as not known.
        on_receipt: called with each request's receipt when it is over, also after an error or an abandoned stream.
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
        on_receipt: Callable[[Receipt], None] | None = None,
        clock: Clock = SystemClock(),  # noqa: B008 -- has no state
    ) -> None:
        if policy.mode != "on_device_only" and backends and state is None:
            raise ConfigError("state is missing: without a ledger nothing may be spent")
        if local is None and policy.mode in {"on_device_only", "prefer_on_device"}:
            raise ConfigError(f"local is missing, which mode {policy.mode} asks first")
        self.policy = policy
        self._local = local
        self._p_wrong = p_wrong
        self._warned = False
        self._on_receipt = on_receipt
        self._clock = clock
        self._cloud: Cloud | None = None
        self._ledger = None if state is None else Ledger(state)
        if self._ledger is not None and backends:
            caps = budget.caps()
            self.market = Market(tuple(backends), policy, privacy, caps, self._ledger, clock)
            self._cloud = Cloud(self.market, policy, privacy, caps, self._ledger, clock)

    def close(self) -> None:
        """Closes connections and the ledger; a router can be used again afterwards."""
        if self._cloud is not None:
            for wire in self._cloud.market.wires.values():
                wire.close()
        if self._ledger is not None:
            self._ledger.close()

    def ask(self, text: str, images: Sequence[Picture] = (), *, escalate: bool = False, **more: Any) -> Answer:
        """The whole answer; until it is there, any switch between the device and offers is free.

        Args:
            text: the question.
            images: files, or the bytes of files; never an address.
            escalate: the caller's wish to ask further at once, where the mode allows it.
            more: other fields of `local.Question`.

        Raises:
            ConfigError: for what cannot be asked.
            RouterError: without an answer; it has the receipt.
        """
        for event in self._events(question_of(text, images, more), escalate, None):
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
        question = question_of(text, images, more)
        whole = question.schema is not None or question.valid is not None
        return self._events(question, escalate, None if whole else self.policy.holdback)

    def _events(self, question: Question, escalate: bool, holdback: int | None) -> Generator[Event, None, None]:
        began = self._clock.monotonic()
        receipt = Receipt(self.policy.mode)
        run = Run(question, receipt, self._clock, began + self.policy.deadline_s, holdback)
        done: Done | None = None
        try:
            done = yield from self._modes(run, escalate)
        finally:
            receipt.ms = (self._clock.monotonic() - began) * 1000
            self._report(receipt)
        yield done

    def _report(self, receipt: Receipt) -> None:
        source = receipt.source or "no answer"
        log.info("%s: %s %s, %.0f ms", receipt.mode, source, receipt.refused, receipt.ms)
        if self._on_receipt is not None:
            try:
                self._on_receipt(receipt)
            except Exception as exc:  # noqa: BLE001 -- the owner's function; an answer is not lost by it
                log.warning("the receipt callback failed: %s", type(exc).__name__)

    def _modes(self, run: Run, escalate: bool) -> Generator[Event, None, Done]:
        """Who is asked, in which order: the whole of the mode table."""
        mode, receipt = self.policy.mode, run.receipt
        if mode == "on_device_only" or (mode == "prefer_on_device" and not escalate):
            signal = yield from self._on_device(run)
            if not signal:
                return run.done("local")
            receipt.reason = signal
            if mode == "on_device_only" or signal not in self.policy.escalate_on:
                receipt.refused = "policy"
                return (yield from self._settle_for_local(run, signal))
            if run.released and self.policy.stream_failure == "terminate":
                receipt.refused = "committed"
                return (yield from self._settle_for_local(run, signal))
            yield from run.restart()
        else:
            receipt.reason = "caller" if escalate else mode
        share_s = (self.policy.local_s or 0.0) if mode == "prefer_cloud" and self._local is not None else 0.0
        if self._cloud is None:
            receipt.refused = "no_backend"
        elif (yield from self._cloud.answer(run, share_s)):
            return run.done("cloud")
        failure = receipt.refused
        if mode == "cloud_only":
            raise run.error(failure)
        if run.local_text is None and self._local is not None:
            yield from self._on_device(run)
        return (yield from self._settle_for_local(run, failure))

    def _settle_for_local(self, run: Run, code: str) -> Generator[Event, None, Done]:
        """The local answer as it is, marked; an error where there is none that ended."""
        if run.local_text is None:
            raise run.error(code)
        run.receipt.degraded = True
        if not run.released:
            run.pieces = [run.local_text]
        yield from run.flush()
        return run.done("local")

    def _on_device(self, run: Run) -> Generator[Event, None, str]:
        """Answers here; returns the reason not to trust it, "" if there is none."""
        assert self._local is not None
        local, question, clock = self._local, run.question, self._clock
        began = clock.monotonic()
        limit = run.deadline if self.policy.local_s is None else min(run.deadline, began + self.policy.local_s)
        tokens: list[Token] = []
        signal = ""
        run.pieces = []

        def work(put: Callable[[Token], None], stop: threading.Event) -> None:
            if why := local.available():
                raise _UnavailableError(why)
            for token in local.stream(question, stop):
                if stop.is_set():
                    return
                put(token)

        worker = Worker(work)
        try:
            while (token := worker.next(limit - clock.monotonic())) is not None:
                tokens.append(token)
                yield from run.hand_out(token.text)
                if token.finish or repeats(run.pieces):
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
            worker.close()
        if not signal:
            run.local_finish = tokens[-1].finish if tokens else ""
            run.local_text = "".join(run.pieces)
            signal = hard_signal(question, run.pieces, run.local_finish) or self._doubt(run, tokens)
        ms = (clock.monotonic() - began) * 1000
        run.receipt.attempts.append(Attempt("local", signal or "ok", ms))
        log.info("local: %s, %.0f ms", signal or "ok", ms)
        if not signal:
            yield from run.flush()
        return signal

    def _doubt(self, run: Run, tokens: Sequence[Token]) -> str:
        """ "low_confidence", or "" also where nothing is known: then only the hard signals count."""
        if self._p_wrong is None or self.policy.max_p_wrong is None:
            return ""
        try:
            p_wrong = self._p_wrong(tokens)
        except Exception as exc:  # noqa: BLE001 -- the owner's function
            p_wrong = None
            if not self._warned:
                self._warned = True
                log.warning("p_wrong failed: %s; only hard signals count", type(exc).__name__)
        if p_wrong is None or not 0 <= p_wrong <= 1:  # also what is not a number
            return ""
        run.receipt.p_wrong = p_wrong
        return "low_confidence" if p_wrong > self.policy.max_p_wrong else ""


class _UnavailableError(Exception):
    """The local leg said why it cannot answer."""
