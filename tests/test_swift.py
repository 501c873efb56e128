"""What a Core ML bundle takes that needs no Core ML, in Swift, against the runtime in Python.

Compiled and run with any swiftc on the PATH; skipped, visibly, without one. Not covered: runtimes/swift/Device.swift,
whose calls to Core ML are a sample that has not run, and the tokenizer, for which Swift has a library.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.generate import Sampling, log_softmax, scores
from runtimes.manifest import parse_manifest
from runtimes.prompt import IMAGE, ImagePart, Message, chat_string
from tests.kotlin_port import PortError

pytestmark = pytest.mark.client

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [ROOT / "runtimes" / "swift" / "Smolport.swift", ROOT / "tests" / "swift" / "main.swift"]


class Port:
    """The program of tests/swift/main.swift, running."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str, **fields: Any) -> Any:
        """The answer to one request. Raises PortError where the port refuses."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": what} | fields) + "\n")
        self._process.stdin.flush()
        reply = json.loads(self._process.stdout.readline())
        if "error" in reply:
            raise PortError(reply["error"])
        return reply["answer"]

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Port]:
    """The Swift sources, compiled and running."""
    compiler = shutil.which("swiftc")
    if compiler is None:
        pytest.skip("swiftc is not installed: the Swift sample is not compiled")
    program = tmp_path_factory.mktemp("swift") / "port"
    command = [compiler, "-warnings-as-errors", "-swift-version", "6", "-o", program, *SOURCES]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    port = Port(program)
    yield port
    port.close()


def test_the_sizes_of_a_manifest_are_read(port: Port, tiny_ios_bundle: Path) -> None:
    path = tiny_ios_bundle / "manifest.json"
    manifest = parse_manifest(json.loads(path.read_text("utf-8")), "manifest.json")
    text = manifest.text
    wanted = [manifest.image.tile_size, manifest.image.tokens_per_tile, text.context, text.vocab, text.image_token_id]
    assert port.ask("sizes", file=str(path)) == wanted


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"min_reader": 9}, "schema 9, this one knows 3"),
        ({"target": "onnx"}, "target is onnx, want coreml"),
        ({"proof": {"state": "pending", "report": None}}, "proof is pending, want passed"),
        ({"text": {}}, "manifest.json: "),
        ({"version": "1"}, "manifest.json: "),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(
    port: Port, tiny_ios_bundle: Path, tmp_path: Path, change: dict[str, object], complaint: str
) -> None:
    content = json.loads((tiny_ios_bundle / "manifest.json").read_text("utf-8")) | change
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(PortError, match=complaint):
        port.ask("sizes", file=str(tmp_path / "manifest.json"))


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20).filter(lambda t: IMAGE not in t)
grids = st.sampled_from([(0, 0), (1, 2), (2, 1), (3, 4)])
turns_of = st.lists(
    st.tuples(
        st.sampled_from(["user", "assistant", "system"]),
        st.lists(st.one_of(texts, grids), min_size=1, max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=300)
@given(turns=turns_of, reply=st.booleans(), start=st.booleans())
def test_a_chat_is_the_same_text(
    port: Port, turns: list[tuple[str, tuple[str | tuple[int, int], ...]]], reply: bool, start: bool
) -> None:
    messages = [Message(r, tuple(p if isinstance(p, str) else ImagePart(*p) for p in parts)) for r, parts in turns]
    asked = [{"role": role, "parts": parts} for role, parts in turns]
    found = port.ask("chat", turns=asked, per_tile=3, reply=reply, start=start)
    assert found == chat_string(messages, 3, reply=reply, start=start)


@pytest.mark.parametrize(
    ("turns", "complaint"),
    [
        ([], "a chat without messages"),
        ([{"role": "user", "parts": []}], "a user message without content"),
        ([{"role": "root", "parts": ["Hi"]}], "role is root"),
        ([{"role": "user", "parts": ["<ima", "ge>"]}], "spells the token <image>"),
        ([{"role": "user", "parts": ["<image>\u0301"]}], "spells the token <image>"),
        ([{"role": "user", "parts": [[0, 1]]}], "0 rows and 1 columns"),
    ],
)
def test_a_wrong_chat_is_refused(port: Port, turns: list[object], complaint: str) -> None:
    with pytest.raises(PortError, match=complaint):
        port.ask("chat", turns=turns, per_tile=3, reply=True, start=True)


def test_tokens_go_through_the_decoder_as_the_runner_feeds_them(port: Port) -> None:
    """By `CoreMLRunner.extend` with keep=1: a chunk where more than one token is left and all its rows have room."""
    context = 40
    for chunk in (2, 5, 16):
        for filled in range(0, context, 3):
            for tokens in range(1, context - filled + 1):
                wanted, at = [], 0
                while at < tokens:
                    take = min(chunk, tokens - at) if filled + at + chunk <= context else 1
                    wanted.append(["decode" if take == 1 else "prefill", at, take, filled + at])
                    at += take
                assert port.ask("steps", tokens=tokens, filled=filled, chunk=chunk, context=context) == wanted
    with pytest.raises(PortError, match="do not fit into the context of 40"):
        port.ask("steps", tokens=3, filled=38, chunk=5, context=40)


@settings(max_examples=300)
@given(
    size=st.integers(3, 50),
    seed=st.integers(0, 1 << 32),
    coarse=st.booleans(),
    temperature=st.sampled_from([0.0, 0.7, 1.9]),
    top_k=st.integers(0, 60),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    penalty=st.sampled_from([1.0, 1.2, 0.8]),
    random=st.floats(0, 1, exclude_max=True),
)
def test_scores_and_choices_are_equal(
    port: Port,
    size: int,
    seed: int,
    coarse: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    penalty: float,
    random: float,
) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)
    logits = np.round(logits) if coarse else logits
    wanted = scores(logits, [0, 1, 1], Sampling(4, temperature, top_k, top_p, penalty))
    image = size - 1
    found = port.ask(
        "scores",
        logits=[float(v) for v in logits],
        seen=[0, 1, 1],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=penalty,
        image_id=image,
        random=random if temperature else None,
    )
    assert np.array_equal(np.array(found["scores"], np.uint32).view(np.float32), wanted)
    if not np.isfinite(wanted[:image]).any():
        return
    wanted[image] = -np.inf
    if temperature == 0:
        assert found["token"] == int(np.argmax(wanted))
        return
    assert np.isfinite(wanted[found["token"]])
    total = np.cumsum(np.exp(log_softmax(wanted)))
    before = total[found["token"] - 1] if found["token"] else 0.0
    assert before - 1e-9 <= random <= total[found["token"]] + 1e-9
