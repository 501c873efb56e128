"""No deadline is passed, whatever stalls: names, handshakes, the ledger, images, tokens, the local engine. Imports."""

import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from router_client.client import Answer, Router
from router_client.errors import RouterError
from router_client.ledger import Ledger
from router_client.local import Question, Token
from router_client.offers import Offer
from router_client.policy import Backend, Policy, Privacy
from router_client.worker import MOST_WAITING, Worker
from tests import router_server
from tests.router_server import SECRET, TEXT, chunk, event
from tests.router_setup import Here, server, setup

__all__ = ["server", "setup"]  # fixtures
ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S, MARGIN_S = 0.6, 0.25
POLICY = Policy("cloud_only", connect_s=0.3, first_token_s=5, idle_s=5, deadline_s=DEADLINE_S)
OFFER = Offer("", "test/ok", vision=True, context=4096, price_in=0, price_out=0)


def timed(call: Callable[[], object]) -> tuple[object, float]:
    """What a call returned or the RouterError that it raised, and the seconds it took."""
    began = time.monotonic()
    try:
        result = call()
    except RouterError as error:
        result = error
    return result, time.monotonic() - began


def fixed(
    base_url: str,
    tmp_path: Path,
    policy: Policy = POLICY,
    token: Callable[[], str] | None = None,
    model: str = "test/ok",
) -> Router:
    """A router with one offer that no catalogue is needed for."""
    offers = (replace(OFFER, model=model),)
    backend = Backend("b", base_url, (model,), token, offers, image_tokens=1000)
    return Router(backends=[backend], policy=policy, privacy=Privacy(consent=lambda _: True), state=tmp_path / "ledger")


def states(tmp_path: Path) -> list[str]:
    return [e.state for e in Ledger(tmp_path / "ledger").entries()]


def test_a_name_that_is_not_resolved_costs_the_connect_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def stalled(*_: object, **__: object) -> None:
        over.wait(5)
        raise socket.gaierror("late")

    monkeypatch.setattr(socket, "getaddrinfo", stalled)
    for connect_s, outcomes in ((0.1, ["connect_timeout"] * 2), (5.0, ["deadline"])):
        (tmp_path / "ledger").unlink(missing_ok=True)
        policy = replace(POLICY, connect_s=connect_s, deadline_s=1.0)
        error, took = timed(lambda p=policy: fixed("https://far.example/v1", tmp_path, p).ask("What?"))  # type: ignore[misc]
        assert isinstance(error, RouterError)
        assert [a.outcome for a in error.receipt.attempts] == outcomes
        assert {a.billed for a in error.receipt.attempts} == {"no"}
        assert took < 1.0 + MARGIN_S
    over.set()


@pytest.mark.parametrize(("pause_s", "sent", "state"), [(0.15, 1, "uncertain"), (0.0, 0, "released")])
def test_a_connection_that_comes_up_after_it_was_given_up_sends_nothing_or_is_booked_as_spent(
    server: router_server.Router, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause_s: float, sent: int, state: str
) -> None:
    """The thread that waits is held up between its timeout and what it does then; the connection comes up meanwhile."""
    real, taken = socket.getaddrinfo, Worker.next

    def slow(*arguments: Any, **more: Any) -> Any:
        time.sleep(0.35)
        return real(*arguments, **more)

    def held_up(worker: Worker[Any], timeout_s: float) -> Any:
        try:
            return taken(worker, timeout_s)
        except TimeoutError:
            time.sleep(pause_s)
            raise

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    monkeypatch.setattr(Worker, "next", held_up)
    router = fixed(server.base_url.replace("127.0.0.1", "localhost"), tmp_path, replace(POLICY, max_attempts=1))
    error, _ = timed(lambda: router.ask("What?"))
    time.sleep(0.2)
    assert isinstance(error, RouterError)
    assert (error.code, len(server.chats), states(tmp_path)) == ("connect_timeout", sent, [state])
    assert error.receipt.attempts[0].billed == ("maybe" if sent else "no")


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that lets anyone connect and never says a word."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        yield listening.getsockname()[1]


def test_a_handshake_that_stalls_costs_the_connect_deadline(tmp_path: Path, silent: int) -> None:
    error, took = timed(lambda: fixed(f"https://127.0.0.1:{silent}/v1", tmp_path).ask("What?"))
    assert isinstance(error, RouterError)
    assert error.receipt.attempts[0].outcome == "connect_timeout"
    assert set(states(tmp_path)) == {"released"}
    assert took < DEADLINE_S + MARGIN_S


def test_a_ledger_that_another_process_holds_is_waited_for_no_longer(
    server: router_server.Router, tmp_path: Path
) -> None:
    Ledger(tmp_path / "ledger").spent(time.time())
    with closing(sqlite3.connect(tmp_path / "ledger", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        error, took = timed(lambda: fixed(server.base_url, tmp_path).ask("What?"))
        assert isinstance(error, RouterError)
        assert (error.code, server.received) == ("deadline", [])
        assert took < DEADLINE_S + MARGIN_S
        local = Here()
        router = fixed(server.base_url, tmp_path, replace(POLICY, mode="prefer_cloud", local_s=0.3))
        router._local = local  # noqa: SLF001
        answer, took = timed(lambda: router.ask("What?"))
        assert isinstance(answer, Answer)
        assert (answer.text, answer.receipt.degraded) == ("here", True)
        assert took < DEADLINE_S + MARGIN_S


def test_an_answer_does_not_wait_for_its_booking(server: router_server.Router, tmp_path: Path) -> None:
    """The ledger is held from when the request arrives: the answer comes in time, the booking follows."""
    other = sqlite3.connect(tmp_path / "ledger", isolation_level=None, check_same_thread=False)
    answer_well = server.answer

    def hold(request: router_server.Received, sock: socket.socket) -> None:
        other.execute("BEGIN IMMEDIATE")
        answer_well(request, sock)

    server.answer = hold  # type: ignore[method-assign]
    answer, took = timed(lambda: fixed(server.base_url, tmp_path).ask("What?"))
    assert isinstance(answer, Answer)
    assert (answer.text, answer.receipt.usage_source) == (TEXT, "bound")  # what is certain now
    assert took < DEADLINE_S + MARGIN_S
    other.execute("ROLLBACK")
    other.close()
    limit = time.monotonic() + 5
    while states(tmp_path) != ["settled"]:
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are needed")
def test_an_image_that_cannot_be_read_in_time_is_not_waited_for(server: router_server.Router, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    error, took = timed(lambda: fixed(server.base_url, tmp_path).ask("What?", [tmp_path / "pipe"]))
    assert isinstance(error, RouterError)
    assert (error.code, server.received) == ("deadline", [])
    assert took < DEADLINE_S + MARGIN_S
    (tmp_path / "pipe").write_bytes(b"")  # lets its reader go


def test_a_token_that_takes_too_long_is_not_waited_for(server: router_server.Router, tmp_path: Path) -> None:
    over = threading.Event()

    def token() -> str:
        over.wait(5)
        return SECRET

    error, took = timed(lambda: fixed(server.base_url, tmp_path, token=token).ask("What?"))
    over.set()
    assert isinstance(error, RouterError)
    assert (error.code, server.received) == ("deadline", [])
    assert took < DEADLINE_S + MARGIN_S


def test_a_reservation_that_nobody_waits_for_any_more_is_released(server: router_server.Router, tmp_path: Path) -> None:
    calls = iter([0.0, 0.8, 0.0])  # the second time is when an attempt begins

    def token() -> str:
        time.sleep(next(calls))
        return SECRET

    error, took = timed(lambda: fixed(server.base_url, tmp_path, token=token).ask("What?"))
    assert isinstance(error, RouterError)
    assert took < DEADLINE_S + MARGIN_S
    time.sleep(0.8)
    assert states(tmp_path) == ["released"]
    assert not server.received


def test_a_persons_time_is_not_the_machines(server: router_server.Router, tmp_path: Path) -> None:
    def slow(_: object) -> bool:
        time.sleep(DEADLINE_S)
        return True

    router = fixed(server.base_url, tmp_path)
    router._cloud._planner._privacy = Privacy(consent=slow)  # type: ignore[union-attr]  # noqa: SLF001
    answer, took = timed(lambda: router.ask("What?"))
    assert isinstance(answer, Answer)
    assert took < 2 * DEADLINE_S + MARGIN_S


@pytest.mark.parametrize("mode", ["on_device_only", "prefer_on_device"])
def test_a_slow_local_answer_is_cancelled_and_its_engine_stops(mode: str) -> None:
    slow = Here([Token("word ")] * 1000, pace_s=0.02)
    error, took = timed(lambda: Router(local=slow, policy=Policy(mode, deadline_s=0.3)).ask("What?"))
    assert isinstance(error, RouterError)
    assert (error.receipt.reason, error.receipt.attempts[0].outcome) == ("deadline", "deadline")
    assert took < 0.3 + MARGIN_S
    assert slow.stopped.wait(0.5)  # and it does not go on to its thousandth word


def test_an_engine_that_does_not_look_up_is_left_alone_at_the_deadline() -> None:
    blind = Here(blind_s=1.5)
    error, took = timed(lambda: Router(local=blind, policy=Policy(deadline_s=0.3)).ask("What?"))
    assert isinstance(error, RouterError)
    assert took < 0.3 + MARGIN_S


@dataclass
class Flood:
    """A local leg that never pauses."""

    given: int = 0

    def available(self) -> str:
        return ""

    def stream(self, question: Question, stop: threading.Event) -> Iterator[Token]:
        while not stop.is_set():
            self.given += 1
            yield Token(f" {self.given}")


def test_an_engine_that_never_pauses_is_stopped_at_the_deadline_and_waits_for_its_reader() -> None:
    flood = Flood()
    error, took = timed(lambda: Router(local=flood, policy=Policy(deadline_s=0.3)).ask("What?"))
    assert isinstance(error, RouterError)
    assert took < 0.3 + MARGIN_S
    flood = Flood()
    events = Router(local=flood, policy=Policy(holdback=0)).stream("What?")
    next(events)
    time.sleep(0.2)
    assert flood.given <= MOST_WAITING + 2
    events.close()


def test_a_request_given_up_leaves_no_thread_behind(server: router_server.Router, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    policy = replace(POLICY, deadline_s=0.3)  # and the sockets' own limit is 6 s
    error, _ = timed(lambda: fixed(server.base_url, tmp_path, policy, model="test/stall_before_headers").ask("What?"))
    assert isinstance(error, RouterError)
    time.sleep(0.3)
    assert [t.name for t in set(threading.enumerate()) - before if t.name == "router"] == []


def test_a_server_that_floods_waits_for_the_reader(server: router_server.Router, tmp_path: Path) -> None:
    """What a paused caller does not take stays with the server, and nothing goes on after the deadline."""
    policy = replace(POLICY, holdback=0, deadline_s=1)
    router = fixed(server.base_url, tmp_path, policy, model="test/flood")
    events = router.stream("What?")
    next(events)
    time.sleep(0.7)
    assert server.counts["flooded"] * len(event(chunk("ab")) * 500) < 40 * 2**20
    error, took = timed(lambda: list(events))
    assert isinstance(error, RouterError)
    assert took < 0.3 + MARGIN_S
    assert states(tmp_path) == ["uncertain"]


def test_a_stream_that_is_left_stops_the_local_engine() -> None:
    slow = Here([Token("word ")] * 1000, pace_s=0.01)
    events = Router(local=slow, policy=Policy(holdback=0)).stream("What?")
    next(events)
    events.close()
    assert slow.stopped.wait(0.5)


class Blocked:
    """A local leg that is not ready and takes long to say so."""

    def available(self) -> str:
        time.sleep(1.5)
        return "loading"

    def stream(self, question: Question, stop: threading.Event) -> Iterator[Token]:
        raise AssertionError("it was not ready")


def test_even_the_question_whether_it_can_answer_has_a_deadline() -> None:
    error, took = timed(lambda: Router(local=Blocked(), policy=Policy(deadline_s=0.3)).ask("What?"))
    assert isinstance(error, RouterError)
    assert took < 0.3 + MARGIN_S


def test_all_that_a_device_imports_takes_less_than_100_ms() -> None:
    code = (
        "import sys, time; began = time.process_time(); import router_client.client, router_client.doctor\n"
        "print(time.process_time() - began)\n"
        "names = {n.partition('.')[0] for n in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(sorted(n for n in names if not n.startswith('_')))"
    )
    took = []
    for _ in range(5):  # the processor's time, the best of five: what the code costs, not what else the machine does
        done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
                              capture_output=True, text=True, check=True)  # fmt: skip
        seconds, names = done.stdout.splitlines()
        took.append(float(seconds))
    assert min(took) < 0.1, took
    assert "httpx2" not in names
    assert "PIL" not in names
    assert "router_client" in names
    assert not [folder for folder in ("export", "runtimes", "quantize", "benchmarks") if folder in names]
