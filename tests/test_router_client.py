"""Modes, consent, hold-back, configuration, doctor and spend."""

import base64
import io
import json
import random
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from router_client import doctor, spend
from router_client.client import Answer, Delta, Done, Event, Reset, Router
from router_client.errors import ConfigError, RouterError
from router_client.images import ImageRefusedError, read_image, reencode
from router_client.ledger import Ledger
from router_client.local import ContextTooLongError, Question, Token, fits
from router_client.offers import Offer, Provider
from router_client.policy import REASONS, Backend, Budget, Plan, Policy, Privacy, read_config
from runtimes.generate import Sampling
from runtimes.route import ask_routed
from tests import router_server
from tests.router_server import SECRET, TEXT
from tests.router_setup import COST, SHORT, Here, Setup, png, server, setup

__all__ = ["server", "setup"]  # fixtures
ROOT = Path(__file__).resolve().parent.parent
OWN = '[[backend]]\nname = "own"\nbase_url = "http://127.0.0.1/v1"\nmodels = ["m"]\n'
STOP = Token("", finish="stop")
BAD: dict[str, Here] = {
    "unavailable": Here(why="still loading"),
    "error": Here([Token("a")], error=RuntimeError("engine")),
    "truncated": Here([Token("a"), Token("", finish="length")]),
    "repetition": Here([Token("no "), *[Token("la ")] * 40, STOP]),
    "empty": Here([STOP]),
    "context": Here([], error=ContextTooLongError()),
    "deadline": Here([Token("a")] * 500, pace_s=0.05),
    "low_confidence": Here(),
    "schema": Here(),
}


def test_the_default_opens_no_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def banned(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", banned)
    monkeypatch.setattr(socket, "getaddrinfo", banned)
    backend = Backend("b", "https://router.example/v1", ("m",), token=lambda: SECRET)
    router = Router(local=Here(), backends=[backend], privacy=Privacy(consent=lambda _: True), state=tmp_path / "l")
    answer = router.ask("What?", escalate=True)
    assert (answer.text, answer.receipt.source, answer.receipt.egress) == ("here", "local", None)
    with pytest.raises(RouterError, match="unavailable"):
        Router(local=BAD["unavailable"], backends=[backend]).ask("What?")
    cloudy = Router(backends=[backend], policy=SHORT, privacy=Privacy(consent=lambda _: True), state=tmp_path / "l")
    with pytest.raises(RouterError, match="no catalogue: connect"):  # the ban is one that a socket meets
        cloudy.ask("What?")


def test_importing_everything_is_quick_and_brings_no_client() -> None:
    code = (
        "import sys, router_client.client, router_client.doctor; print('httpx2' in sys.modules, 'PIL' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False False\n"


@pytest.mark.parametrize("signal", sorted(BAD))
def test_each_signal_sends_a_question_on_only_if_the_policy_says_so(setup: Setup, signal: str) -> None:
    setup.local = BAD[signal]
    setup.real_time = signal == "deadline"
    setup.server.offer("ok", "alpha")
    valid = (lambda text: text == TEXT) if signal == "schema" else None
    for escalate_on in (frozenset({signal}), REASONS - {signal}):
        local_s = 0.2 if signal == "deadline" else None
        setup.policy = replace(
            SHORT, mode="prefer_on_device", escalate_on=escalate_on, local_s=local_s, max_p_wrong=0.5
        )
        router = setup.router("ok")
        router._p_wrong = lambda _: 0.9 if signal == "low_confidence" else 0.1  # noqa: SLF001
        try:
            result: Answer | RouterError = router.ask("What?", valid=valid)
        except RouterError as error:
            result = error
        assert result.receipt.reason == signal
        if signal in escalate_on:
            assert isinstance(result, Answer)
            assert (result.text, result.receipt.source) == (TEXT, "cloud")
            assert setup.plans[-1].reason == signal
        else:
            assert result.receipt.egress is None
            assert result.receipt.degraded or isinstance(result, RouterError)
    assert len(setup.server.chats) == 1


def test_without_consent_nothing_leaves_and_the_local_answer_stands(setup: Setup) -> None:
    setup.local = BAD["truncated"]
    setup.policy = replace(SHORT, mode="prefer_on_device")
    setup.privacy = Privacy(consent=lambda plan: bool(setup.consent(plan) and False))
    answer = setup.ask("ok", "alpha", images=[png(3000, 1500)])
    assert isinstance(answer, Answer)
    assert (answer.text, answer.receipt.degraded, answer.receipt.refused) == ("a", True, "consent")
    (plan,) = setup.plans
    assert (plan.destinations, plan.dimensions) == (("fake/test/ok:alpha",), ((1024, 512),))
    assert plan.cost_bound_nano_usd == 2 * ((18 + 64 + 1000) * 1000 + 256 * 1500)  # two attempts
    assert not setup.server.chats
    assert not setup.entries()


def test_a_caller_may_ask_further_and_the_cloud_may_come_first(setup: Setup) -> None:
    setup.local, setup.policy = Here(), replace(SHORT, mode="prefer_on_device")
    answer = setup.ask("ok", "alpha", escalate=True)
    assert isinstance(answer, Answer)
    assert (answer.receipt.reason, setup.local.asked) == ("caller", 0)
    setup.policy = replace(SHORT, mode="prefer_cloud")
    assert getattr(setup.ask("ok"), "text", "") == TEXT
    down = setup.ask("503", "alpha")
    assert isinstance(down, Answer)
    assert (down.text, down.receipt.degraded) == ("here", True)


def test_after_the_commit_point_no_second_voice_speaks(setup: Setup) -> None:
    setup.server.offer("eof_no_finish", "alpha", "beta")
    setup.policy = replace(SHORT, holdback=1)
    shown: list[Event] = []
    with pytest.raises(RouterError, match="truncated") as caught:
        shown.extend(setup.router("eof_no_finish").stream("What?"))
    assert "".join(d.text for d in shown if isinstance(d, Delta)) == caught.value.partial == TEXT
    assert len(setup.server.chats) == 1
    setup.policy = replace(SHORT, holdback=1, stream_failure="restart")
    events = list(setup.router("eof_no_finish").stream("What?"))
    reset = events.index(Reset())
    assert "".join(d.text for d in events[reset:] if isinstance(d, Delta)) == TEXT
    assert isinstance(events[-1], Done)
    assert events[-1].answer.receipt.restarted
    setup.policy = replace(SHORT, holdback=24)  # held back, so that the switch goes unseen
    assert Reset() not in list(setup.router("eof_no_finish").stream("What?"))


def test_what_leaves_has_no_metadata_and_addresses_are_refused() -> None:
    encoded = reencode(png(500, 250), max_side=100, quality=85, max_bytes=10**6)
    assert (encoded.width, encoded.height) == (100, 50)
    assert b"taken at home" in png(500, 250)
    assert b"taken at home" not in encoded.data
    assert b"Exif" not in encoded.data
    with pytest.raises(ImageRefusedError, match="not a readable"):
        reencode(b"GIF89a", max_side=100, quality=85, max_bytes=10**6)
    with pytest.raises(ImageRefusedError, match="cannot be read: FileNotFoundError"):
        read_image(Path("none.png"))
    with pytest.raises(ConfigError, match="an address would"):
        Router(local=Here()).ask("What?", ["https://x.example/a.png"])  # type: ignore[list-item]


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what is broken
def test_an_image_with_broken_metadata_is_refused_and_nothing_else_is_raised() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8825] = 6, "home", {1: "N", 2: (1.0, 2.0, 3.0)}
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG", exif=exif)
    good, dice, causes = out.getvalue(), random.Random(1), set()
    for _ in range(1500):
        bad = bytearray(good)
        for _ in range(dice.randint(1, 6)):
            bad[good.index(b"Exif") + dice.randrange(150)] = dice.choice([0, 1, 2, 3, 5, 7, 10, 12, 255])
        try:
            reencode(bytes(bad), max_side=64, quality=80, max_bytes=2**20)
        except ImageRefusedError as exc:
            causes.add(type(exc.__cause__))
    assert causes & {TypeError, AttributeError, struct.error}  # what Pillow raises of it


def test_an_image_that_changes_meanwhile_leaves_as_it_was_shown(setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "gauge.png"
    path.write_bytes(png(800, 400))

    def agree(plan: Plan) -> bool:
        path.write_bytes(png(333, 777))
        return plan.dimensions == ((800, 400),)

    setup.privacy = Privacy(consent=agree)
    assert isinstance(setup.ask("413_then_ok", "alpha", images=[path]), Answer)
    sizes = []
    for request in setup.server.chats:
        url = json.loads(request.body)["messages"][-1]["content"][0]["image_url"]["url"]
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
            sizes.append(image.size)
    assert sizes == [(800, 400), (512, 256)]


@pytest.mark.parametrize(
    "more",
    [
        {"schema": {"enum": {1}}}, {"schema": {"x": float("nan")}}, {"schema": [1]}, {"schema": True},
        {"max_tokens": "9"}, {"max_tokens": True}, {"max_tokens": 10**12}, {"system": b"x"}, {"temperature": object()},
    ],
)  # fmt: skip
def test_a_question_that_cannot_be_sent_is_refused_at_once(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Router(local=Here()).ask("What?", **more)


def test_a_check_that_raises_says_no_and_what_was_spent_is_booked(setup: Setup) -> None:
    error = setup.ask("ok", "alpha", valid=lambda text: int(text) > 0)
    assert isinstance(error, RouterError)
    assert error.code == "schema"
    assert [(e.state, e.nano_usd) for e in setup.entries()] == [("settled", COST)]


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"properties": {"a": True, "b": False}}, '{"a": 1}', '{"b": 1}'),
        ({"items": {"type": ["integer", "null"]}}, "[1, null]", '["a"]'),
        ({"type": "object", "properties": [1], "required": "a", "enum": 5}, None, "{}"),
        ({"type": {"a": 1}}, None, "1"),
    ],
)
def test_a_schema_of_any_shape_is_judged_without_an_error(
    schema: dict[str, object], good: str | None, bad: str
) -> None:
    assert good is None or fits(Question("q", schema=schema), good)
    assert not fits(Question("q", schema=schema), bad)


def test_without_pillow_an_image_is_refused(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    error = setup.ask("ok", "alpha", images=[b"x"])
    assert isinstance(error, RouterError)
    assert (error.code, setup.server.received) == ("image", [])


def config(setup: Setup, text: str = "") -> Path:
    path = setup.state.with_name("router.toml")
    path.write_text(
        f"""state = "ledger"
[policy]
mode = "cloud_only"
escalate_on = ["error"]
[budget]
per_day_usd = 0.05
per_month_usd = false
[[backend]]
name = "fake"
base_url = "{setup.server.base_url}"
token_env = "ROUTER_TEST_TOKEN"
models = ["test/ok"]
image_tokens = 1000
{text}""",
        "utf-8",
    )
    return path


DIAGNOSES = {"401": "token is refused", "402": "no credit", "403": "permission", "400_not_supported": "no provider"}


@pytest.mark.parametrize("scenario", ["ok", *DIAGNOSES])
def test_the_doctor_says_what_is_wrong(
    setup: Setup, scenario: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROUTER_TEST_TOKEN", SECRET)
    setup.server.offer(scenario, "alpha")
    path = config(setup)
    path.write_text(path.read_text("utf-8").replace("test/ok", f"test/{scenario}"), "utf-8")
    assert doctor.main(["--config", str(path)]) == (0 if scenario == "ok" else 1)
    out = capsys.readouterr().out
    assert DIAGNOSES.get(scenario, "answered") in out
    assert SECRET not in out
    assert spend.main(["--config", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [e["state"] for e in shown["entries"]] == ["settled" if scenario == "ok" else "released"]
    assert (shown["day_cap_nano_usd"], shown["month_cap_nano_usd"]) == (50_000_000, None)
    assert spend.main(["--config", str(path)]) == 0
    assert capsys.readouterr().out.startswith("day: $")


def test_the_doctor_sees_a_missing_token_a_policy_that_leaves_nothing_and_a_model_not_served(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ROUTER_TEST_TOKEN", raising=False)
    setup.server.offer("ok", "alpha")
    for line, words in (("", "there is no token"), ('deny = ["alpha"]', "provider denied"), ("", "not served")):
        assert doctor.main(["--config", str(config(setup, line))]) == 1
        assert words in capsys.readouterr().out
        monkeypatch.setenv("ROUTER_TEST_TOKEN", SECRET)
        setup.state.unlink(missing_ok=True)
        if line:
            setup.server.offer("another", "alpha")
    assert not setup.server.chats


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("colour = 1", "has colour"),
        ('sort = "best"', "sort is 'best'"),
        ("allow_http = 1", "allow_http is 1"),
        ('token_file = "x"', "exclude each other"),
        ('token = "hf_abcdefgh"', "comes by token_env"),
        ('allow = "alpha"', "allow is 'alpha', want frozenset"),
        ('providers.alpha.refuses = ["max_tokens"]', "refuses has"),
        ("providers.alpha.max_side = 1", "max_side is 1"),
        ("at_once = 0", "at_once is 0"),
        ("[other]", "has other"),
        ("max_usd_per_m = [2.0]", r"max_usd_per_m is \(2.0,\), want tuple\[float, float\]"),
        ('max_usd_per_m = ["2", "4"]', "max_usd_per_m is"),
        ("max_usd_per_m = [nan, 4]", "max_usd_per_m is nan"),
        ('proxy = "proxy.corp:3128"', "proxy is no address that begins with"),
        ('proxy = "http://user:s3cret@proxy.corp:99999"', "proxy is no address, want a port up to 65535$"),
        ('offer = ["m"]', "offer is 'm', want a table"),
        ('providers.alpha = "x"', "provider 'alpha' is 'x', want a table"),
        ('[backend.offer]\nmodel = "m"', "offer is a dict, want an array of tables"),
        ('[[backend.offer]]\nprovider = "m"', "offer: model is missing"),
        ('[[backend.offer]]\nmodel = "m"', "offer 'm': models does not list it"),
        ('[[backend.offer]]\nmodel = "test/ok"\nprovider = "a\\u001b"', r"provider is 'a\\x1b', want"),
        ('[[backend.offer]]\nmodel = "test/ok"\nusd_in = -1', "usd_in is -1, want USD"),
        ('[[backend.offer]]\nmodel = "test/ok"\nusd_out = "free"', "usd_out is 'free', want USD"),
        ('[[backend.offer]]\nmodel = "test/ok"\nimage_tokens = -1000', "image_tokens is -1000, want 1 or more"),
        ('[[backend.offer]]\nmodel = "test/ok"\ncontext = -5', "context is -5, want 1 or more"),
    ],
)
def test_a_configuration_is_refused_by_file_and_key(setup: Setup, line: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"router.toml: .*{words}"):
        read_config(config(setup, line))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '[backend]\nname = "own"\nbase_url = "http://127.0.0.1/v1"\nmodels = ["m"]',
            "backend is a dict, want an array of tables",
        ),
        ('[[backend]]\nbase_url = "http://127.0.0.1/v1"\nmodels = ["m"]', "backend None: name is missing"),
        ('[[backend]]\nbase_url = "http://127.0.0.1/v1"\n[[backend.offer]]\nmodel = "m"', "name is missing"),
        ('[[backend]]\nname = "own"\nbase_url = "http://127.0.0.1/v1"\nmodels = [1]', r"models is \(1,\), want tuple"),
        (
            '[[backend]]\nname = "own"\nbase_url = "http://127.0.0.1:99999/v1"\nmodels = ["m"]',
            "base_url is no address, want a port",
        ),
        ('[[backend]]\nname = "own"\nbase_url = "http://[::1/v1"\nmodels = ["m"]', "base_url is no address"),
        ("[[policy]]", r"policy is \[{}\], want a table"),
        ("[policy]\nmode = 1", "policy: mode is 1, want str"),
        ("[budget]\nescalations_s = nan", "budget: escalations_s is nan, want above 0"),
        ("[budget]\nescalations_s = -1", "budget: escalations_s is -1"),
        ("[budget]\nescalations_s = 0", "budget: escalations_s is 0"),
        ("[budget]\nmax_escalations = -1", "budget: max_escalations is -1, want 0 or more"),
        ("[budget]\nper_day_usd = nan", "budget: per_day_usd is nan, want an amount"),
        (OWN + "allow = [1]", r"allow is frozenset\(\{1\}\), want frozenset\[str\]"),
        (OWN + "token_env = 5", "token_env is 5, want a name"),
    ],
)
def test_a_file_of_another_shape_is_refused_by_table_and_key(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "router.toml").write_text(f'state = "l"\n{text}\n', "utf-8")
    with pytest.raises(ConfigError, match=f"router.toml: .*{words}"):
        read_config(tmp_path / "router.toml")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Budget(escalations_s=float("nan")), "escalations_s is nan"),
        (lambda: Budget(max_escalations=True), "max_escalations is True, want int"),
        (lambda: Budget(per_day_usd=float("nan")), "per_day_usd is nan"),
        (lambda: own(token=SECRET), "token is a str, want"),
        (lambda: own(models=(1,)), "models is"),
        (lambda: own(max_usd_per_m=(2.0,)), "max_usd_per_m is"),
        (lambda: own(offers=(Offer("", "m", image_tokens=-1),)), "offer 'm': image_tokens is -1"),
        (lambda: own(offers=(Offer("", "m", price_in=0.5),)), "offer 'm': price_in is 0.5"),  # type: ignore[arg-type]
        (lambda: own(proxy="ftp://u:s3cret@p"), "proxy is no address"),
        (lambda: own(proxy="http://proxy.corp:3128"), "base_url is unencrypted"),  # beyond this host
        (lambda: Privacy(require="zero_retention"), "require is"),  # type: ignore[arg-type]
        (lambda: Provider(labels=frozenset([1])), "labels is"),  # type: ignore[list-item]
    ],
)
def test_what_is_built_in_python_is_checked_as_a_file_is(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        make()
    assert SECRET not in str(caught.value)
    assert "s3cret" not in str(caught.value)


def own(**more: Any) -> Backend:
    return Backend(**{"name": "own", "base_url": "http://127.0.0.1:1/v1", "models": ("m",), **more})


def test_an_offer_without_a_price_is_asked_only_where_no_cap_is_set(setup: Setup) -> None:
    setup.backend["offers"] = (Offer("", "test/ok", context=4096),)
    error = setup.ask("ok")
    assert isinstance(error, RouterError)
    assert "price unknown" in str(error)
    setup.budget = Budget(None, None, None)
    assert isinstance(setup.ask("ok"), Answer)
    assert setup.plans[-1].cost_bound_nano_usd is None


def test_what_would_command_a_terminal_is_not_shown() -> None:
    told = "ok\x1b]0;pwned\x07\x9b2J\r\n\tÜ ✓"
    shown: list[str] = []
    answer = ask_routed(Router(local=Here([Token(told), STOP])), "What?", [], Sampling(5), shown.append)
    assert "".join(shown) == "ok]0;pwned2J\n\tÜ ✓"
    assert answer.text == told


def test_a_fixed_offer_needs_no_catalogue(setup: Setup) -> None:
    text = '[[backend.offer]]\nmodel = "test/ok"\ncontext = 4096\nusd_in = 0\nusd_out = 0\n'
    (backend,) = read_config(config(setup, text)).backends
    backend = replace(backend, token=None)
    router = Router(backends=[backend], policy=SHORT, privacy=Privacy(consent=lambda _: True), state=setup.state)
    assert router.ask("What?").text == TEXT
    (received,) = setup.server.received
    assert (received.model, "authorization" in received.headers) == ("test/ok", False)


@pytest.mark.parametrize("token", ["tok\nen", "", "ä", f"{SECRET} {SECRET}", SECRET.encode(), 5])
def test_a_token_that_cannot_be_one_never_reaches_a_header(setup: Setup, token: object) -> None:
    setup.backend["token"] = lambda: token
    error = setup.ask("ok", "alpha")
    assert isinstance(error, RouterError)
    assert error.code == "no_offer"
    assert not token or str(token) not in str(error)
    assert not setup.server.received


def test_no_token_shows_in_any_repr(setup: Setup) -> None:
    router = setup.router("ok")
    assert SECRET not in repr([router, router.market.backends, router.policy, vars(router), vars(router._cloud)])  # noqa: SLF001


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://far.example/v1", "unencrypted"),
        ("https://u:p@far.example/v1", "password"),
        ("ftp://far.example", "no http"),
    ],
)
def test_an_address_that_would_leak_is_refused(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Backend("b", url, ("m",))


def test_the_ledger_of_the_server_is_the_clients(setup: Setup) -> None:
    """Every request that arrived has an entry, made before it."""
    booked: list[int] = []
    answer = router_server.Router.answer

    def watch(self: router_server.Router, request: router_server.Received, sock: socket.socket) -> None:
        if request.method == "POST":
            booked.append(len(Ledger(setup.state).entries()))
        answer(self, request, sock)

    setup.server.answer = watch.__get__(setup.server)  # type: ignore[method-assign]
    setup.ask("503", "alpha", "beta")
    assert booked == [1, 2]
    assert Policy().mode == "on_device_only"


GOOD_HERE, BAD_HERE, NONE_HERE = "good", "truncated", "unavailable"


@pytest.mark.parametrize(
    ("mode", "here", "cloud", "wish", "want"),
    [  # want: whose answer, whether it is degraded, how often the device was asked, how often the cloud
        ("on_device_only", GOOD_HERE, "ok", True, ("local", False, 1, 0)),
        ("on_device_only", BAD_HERE, "ok", False, ("local", True, 1, 0)),
        ("on_device_only", NONE_HERE, "ok", True, ("", False, 0, 0)),
        ("prefer_on_device", GOOD_HERE, "ok", False, ("local", False, 1, 0)),
        ("prefer_on_device", GOOD_HERE, "ok", True, ("cloud", False, 0, 1)),
        ("prefer_on_device", GOOD_HERE, "402", True, ("local", True, 1, 1)),
        ("prefer_on_device", BAD_HERE, "ok", False, ("cloud", False, 1, 1)),
        ("prefer_on_device", BAD_HERE, "402", False, ("local", True, 1, 1)),
        ("prefer_on_device", NONE_HERE, "ok", False, ("cloud", False, 0, 1)),
        ("prefer_on_device", NONE_HERE, "402", False, ("", False, 0, 1)),
        ("prefer_cloud", GOOD_HERE, "ok", False, ("cloud", False, 0, 1)),
        ("prefer_cloud", GOOD_HERE, "402", False, ("local", True, 1, 1)),
        ("prefer_cloud", BAD_HERE, "402", False, ("local", True, 1, 1)),
        ("prefer_cloud", NONE_HERE, "402", False, ("", False, 0, 1)),
        ("cloud_only", GOOD_HERE, "ok", False, ("cloud", False, 0, 1)),
        ("cloud_only", GOOD_HERE, "402", False, ("", False, 0, 1)),
    ],
)
def test_the_mode_table(
    setup: Setup, mode: str, here: str, cloud: str, wish: bool, want: tuple[str, bool, int, int]
) -> None:
    setup.local = Here() if here == GOOD_HERE else replace(BAD[here], asked=0)
    setup.policy = replace(SHORT, mode=mode)
    result = setup.ask(cloud, "alpha", escalate=wish)
    receipt = result.receipt
    assert (receipt.source, receipt.degraded, setup.local.asked, len(setup.server.chats)) == want
    assert isinstance(result, Answer) == bool(want[0])
    assert (not setup.server.received) == (want[3] == 0)  # the catalogue neither
    assert receipt.mode == mode


def test_the_configuration_of_the_readme_is_one(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text("utf-8").partition("```toml\n")[2].partition("```")[0]
    (tmp_path / "router.toml").write_text(text, "utf-8")
    config = read_config(tmp_path / "router.toml")
    assert (config.policy.mode, config.policy.escalate_on) == ("prefer_on_device", REASONS)
    assert config.budget == Budget()
    assert [b.name for b in config.backends] == ["hf", "own"]
    assert config.backends[0].providers["together"].labels == config.privacy.require == {"zero_retention"}
    assert config.backends[1].offers[0].price_out == 0
    assert config.state == tmp_path / "router.sqlite3"


def test_the_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it can with no bundle: everything it names is there, and is called as it is."""
    section = (ROOT / "README.md").read_text("utf-8").partition("## Ask the marketplace")[2]
    code, text = (section.partition(f"```{kind}\n")[2].partition("```")[0] for kind in ("python", "toml"))
    (tmp_path / "router.toml").write_text(text.replace('"prefer_on_device"', '"on_device_only"'), "utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RouterError, match=r"unavailable: .*smolvlm2"):
        exec(code, {})


def test_the_doctor_asks_again_after_a_refused_token(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The latch of a refused token ends when its owner says so: it may have been put right at the other end."""
    monkeypatch.setenv("ROUTER_TEST_TOKEN", SECRET)
    setup.server.offer("401_then_ok", "alpha")
    path = config(setup)
    path.write_text(path.read_text("utf-8").replace("test/ok", "test/401_then_ok"), "utf-8")
    assert doctor.main(["--config", str(path)]) == 1
    assert doctor.main(["--config", str(path)]) == 0
    assert "answered" in capsys.readouterr().out
    assert len(setup.server.chats) == 2


@pytest.mark.parametrize("entry", ["doctor", "spend"])
def test_an_entry_says_what_it_does_and_refuses_a_file_that_is_none(entry: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"router_client.{entry}"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "--config" in done.stdout
    command += ["--config", str(tmp_path / "none")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "none: cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
