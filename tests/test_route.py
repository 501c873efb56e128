"""python -m runtimes.ask --route: the whole path from a bundle to a receipt, with a marketplace on loopback."""

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.documents import make_document
from router_client.policy import MODES
from runtimes.ask import ROUTES, ask, main
from runtimes.bundle import read_bundle
from runtimes.chat import open_chat
from runtimes.local_leg import confidence_file, template_digest
from tests import router_server
from tests.router_server import SECRET, TEXT
from tests.test_router_faults import server

__all__ = ["server"]  # a fixture
ROOT = Path(__file__).resolve().parent.parent
QUESTION = "Read line 1."


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "page.png"
    make_document("test", 3, "clean").image.save(path)
    return path


@pytest.fixture(scope="module")
def local_text(demo_bundle: Path, image: Path) -> str:
    return ask(demo_bundle, QUESTION, [image]).answer.text


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def learnt(bundle: Path, path: Path, bias: float, **more: str) -> Path:
    """A file that says one thing of every answer of the bundle: 1 / (1 + exp(-bias))."""
    found = read_bundle(bundle)
    content: dict[str, Any] = {
        "schema": 1,
        "payload_digest": found.manifest.payload_digest,
        "template_digest": template_digest(open_chat(found)),
        "bias": bias,
        "features": [{"name": "log_tokens", "mean": 0, "scale": 1, "weight": 0}],
        "budgets": {},
        "fitted": {},
        **more,
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def config(server: router_server.Router, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROUTE_TEST_TOKEN", SECRET)
    server.offer("ok", "alpha")
    path = tmp_path / "router.toml"
    path.write_text(
        f"""state = "ledger"
[policy]
max_p_wrong = 0.5
[[backend]]
name = "fake"
base_url = "{server.base_url}"
token_env = "ROUTE_TEST_TOKEN"
models = ["test/ok"]
image_tokens = 1000
""",
        "utf-8",
    )
    return path


@pytest.fixture
def no_socket(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Sockets raise, and the attempts are listed."""
    opened: list[str] = []

    def banned(*_: object, **__: object) -> None:
        opened.append("a socket")
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, banned)
    yield opened
    assert not opened


def test_on_device_only_gives_the_bundles_own_answer_and_opens_no_socket(
    demo_bundle: Path,
    image: Path,
    local_text: str,
    config: Path,
    no_socket: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [demo_bundle, "--image", image, QUESTION, "--route", "on_device_only", "--json", "--consent"]
    code, out, err = run(capsys, *arguments, "--router-config", config)
    shown = json.loads(out.splitlines()[-1])
    assert (code, out.splitlines()[0], shown["answer"]) == (0, local_text, local_text)
    assert local_text
    assert (shown["receipt"]["source"], shown["receipt"]["egress"]) == ("local", None)
    assert "answered on this device" in err
    assert not no_socket


def test_low_confidence_asks_further_and_says_who_answered_and_why(
    demo_bundle: Path,
    image: Path,
    local_text: str,
    config: Path,
    server: router_server.Router,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [demo_bundle, "--image", image, QUESTION, "--route", "prefer_on_device", "--json", "--consent"]
    arguments += ["--router-config", config, "--confidence"]
    code, out, _ = run(capsys, *arguments, learnt(demo_bundle, tmp_path / "sure.json", -2.0))
    receipt = json.loads(out.splitlines()[-1])["receipt"]
    assert (code, out.splitlines()[0], receipt["source"], server.received) == (0, local_text, "local", [])
    assert receipt["p_wrong"] == pytest.approx(0.1192, abs=1e-4)
    code, out, err = run(capsys, *arguments, learnt(demo_bundle, tmp_path / "unsure.json", 2.0))
    shown = json.loads(out.splitlines()[-1])
    assert (code, shown["answer"]) == (0, TEXT)
    receipt = shown["receipt"]
    assert (receipt["source"], receipt["reason"]) == ("cloud", "low_confidence")
    assert [attempt["outcome"] for attempt in receipt["attempts"]] == ["low_confidence", "ok"]
    assert receipt["p_wrong"] == pytest.approx(0.8808, abs=1e-4)
    assert local_text not in out
    assert "to be sent (low_confidence)" in err
    assert "answered by test/ok:alpha (served: served-m at alpha) because of low_confidence, " in err
    assert "local answer wrong with probability 0.881; $0.001107" in err
    assert SECRET not in out + err
    (chat,) = server.chats
    assert chat.model == "test/ok:alpha"


def test_what_was_learnt_of_another_bundle_is_not_used_and_that_is_said_once(
    demo_bundle: Path,
    image: Path,
    local_text: str,
    config: Path,
    server: router_server.Router,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = learnt(demo_bundle, tmp_path / "other.json", 2.0, template_digest="0" * 64)
    arguments = [demo_bundle, "--image", image, QUESTION, "--route", "prefer_on_device", "--router-config", config]
    with caplog.at_level(logging.WARNING, "router_client"):
        code, out, _ = run(capsys, *arguments, "--consent", "--confidence", file)
    assert (code, out, server.received) == (0, local_text + "\n", [])
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "other.json: template_digest is '0000" in warning


def test_where_nobody_can_be_asked_nothing_leaves(
    demo_bundle: Path,
    image: Path,
    local_text: str,
    config: Path,
    server: router_server.Router,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal:
        def __init__(self, says: str, there: bool = True) -> None:
            self.isatty, self.readline = lambda: there, lambda: says

    arguments = [demo_bundle, "--image", image, QUESTION, "--route", "prefer_cloud", "--router-config", config]
    for terminal in (Terminal("y\n", there=False), Terminal("\n"), Terminal("n\n")):
        monkeypatch.setattr(sys, "stdin", terminal)
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (0, local_text + "\n")
        assert "answered on this device, though another answer was wanted" in err
        assert "not asked further: consent" in err
    assert not server.chats
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert run(capsys, *arguments)[1] == TEXT + "\n"
    assert len(server.chats) == 1


def test_without_an_answer_it_fails_with_a_receipt(
    demo_bundle: Path, image: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, tmp_path / "none", "--image", image, QUESTION, "--route", "on_device_only", "--json")
    assert (code, json.loads(out)["receipt"]["reason"]) == (1, "unavailable")
    assert "not a folder, so not a bundle" in err
    page = tmp_path / "no.png"
    assert run(capsys, demo_bundle, "--image", page, QUESTION, "--route", "cloud_only")[0] == 2
    config.write_text("colour = 1\n", "utf-8")
    code, _, err = run(capsys, demo_bundle, QUESTION, "--route", "on_device_only", "--router-config", config)
    assert (code, "router.toml: " in err) == (2, True)
    with pytest.raises(SystemExit, match="2"):
        main([str(demo_bundle), "--consent", QUESTION])


def test_without_a_route_no_router_is_loaded(demo_bundle: Path, image: Path, local_text: str) -> None:
    code = (
        "import sys; from runtimes.ask import main; code = main(sys.argv[1:]);"
        "loaded = {m.partition('.')[0] for m in sys.modules};"
        "assert not loaded & {'router_client', 'sqlite3', 'httpx2'}; exit(code)"
    )
    command = [sys.executable, "-c", code, str(demo_bundle), "--image", str(image), QUESTION]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, local_text + "\n"), done.stderr


def test_the_modes_are_the_routers_and_what_was_learnt_lies_beside_the_bundle(tmp_path: Path) -> None:
    assert ROUTES == MODES
    assert confidence_file(tmp_path / "a.b") == tmp_path.resolve() / "a.b.confidence.json"
