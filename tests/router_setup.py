"""A client of the server on loopback, a clock, and a local leg that does what it is told: for the router's tests."""

import io
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from PIL import Image

from router_client.client import Answer, Router
from router_client.errors import DAY_S, RouterError
from router_client.ledger import CLOCK_FLOOR_S, Entry, Ledger
from router_client.local import Question, Token
from router_client.policy import Backend, Budget, Plan, Policy, Privacy
from router_client.receipt import Receipt
from tests import router_server
from tests.router_server import SECRET

NOW = CLOCK_FLOOR_S + 200 * DAY_S
COST = 1093 * 1000 + 9 * 1500  # nano-USD of the server's usage at its first price
SHORT = Policy("cloud_only", connect_s=1, first_token_s=0.5, idle_s=0.5, deadline_s=2, max_attempts=2)


@dataclass
class FakeClock:
    """Goes on by sleeping alone."""

    at: float = NOW
    slept: list[float] = field(default_factory=list)

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.at += seconds


@dataclass
class Here:
    """A local leg that says what it is told to, at a pace.

    stopped: set when it was told to stop.
    blind_s: how long it works on the question without looking at `stop`.
    """

    tokens: Sequence[Token] = (Token("here"), Token("", finish="stop"))
    why: str = ""
    error: Exception | None = None
    pace_s: float = 0.0
    blind_s: float = 0.0
    asked: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    def available(self) -> str:
        return self.why

    def stream(self, question: Question, stop: threading.Event) -> Iterator[Token]:
        self.asked += 1
        time.sleep(self.blind_s)
        for token in self.tokens:
            if stop.wait(self.pace_s):
                self.stopped.set()
                return
            yield token
        if self.error:
            raise self.error


@pytest.fixture
def server() -> Iterator[router_server.Router]:
    """The other side."""
    router = router_server.Router()
    running = router_server.serve(router)
    yield router
    router.stop.set()
    running.shutdown()
    running.server_close()


@dataclass
class Setup:
    """A client of the server."""

    server: router_server.Router
    state: Path
    clock: FakeClock = field(default_factory=FakeClock)
    plans: list[Plan] = field(default_factory=list)
    policy: Policy = SHORT
    budget: Budget = field(default_factory=Budget)
    privacy: Privacy = field(default_factory=Privacy)
    local: Here | None = None
    backend: dict[str, object] = field(default_factory=dict)
    real_time: bool = False
    receipts: list[Receipt] = field(default_factory=list)

    def consent(self, plan: Plan) -> bool:
        self.plans.append(plan)
        return True

    def router(self, scenario: str) -> Router:
        fields = {"token": lambda: SECRET, "image_tokens": 1000, **self.backend}
        backend = Backend("fake", self.server.base_url, (f"test/{scenario}",), **fields)  # type: ignore[arg-type]
        privacy = self.privacy if self.privacy.consent else replace(self.privacy, consent=self.consent)
        more: dict[str, object] = {} if self.real_time else {"clock": self.clock}
        more["on_receipt"] = self.receipts.append
        return Router(
            local=self.local, backends=[backend], policy=self.policy, budget=self.budget, privacy=privacy,
            state=self.state, **more,  # type: ignore[arg-type]
        )  # fmt: skip

    def ask(self, scenario: str, *providers: str, **more: object) -> Answer | RouterError:
        """The answer, or the error, to one question about a scenario's model at the providers."""
        if providers:
            self.server.offer(scenario, *providers)
        router = self.router(scenario)
        try:
            return router.ask("What does it read?", **more)  # type: ignore[arg-type]
        except RouterError as error:
            return error
        finally:
            router.close()

    def entries(self) -> list[Entry]:
        return Ledger(self.state).entries()


@pytest.fixture
def setup(server: router_server.Router, tmp_path: Path) -> Setup:
    """A client of it, in cloud_only."""
    made = Setup(server, tmp_path / "ledger")
    server.now = made.clock.now
    return made


def png(width: int = 40, height: int = 20) -> bytes:
    """A file with metadata."""
    out = io.BytesIO()
    image = Image.effect_noise((width, height), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    image.save(out, "PNG", exif=exif)
    return out.getvalue()
