"""python -m runtimes.serve, by OpenAI's own client and by raw sockets: answers, limits, faults, and who may ask."""

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

import runtimes.api
from router_client.client import Delta, Done, Router
from router_client.policy import read_config
from runtimes.api import Access, make_server
from runtimes.ask import ask
from runtimes.bundle import read_bundle
from runtimes.chat import Chat, Turn, open_chat
from runtimes.completions import Limits
from runtimes.generate import Sampling, log_softmax
from runtimes.preprocess import ImageSettings
from runtimes.prompt import PromptEncoder
from runtimes.runner import BundleSettings, EngineError, Floats
from runtimes.serve import bind, main
from runtimes.service import Service
from tests.fakes import CONTEXT, HIDDEN, SEQ_LEN, TILE, ScriptRunner, byte_tokenizer, make_bundle
from tests.media import pages_pdf, write_video
from tests.media import picture as movie_frame

ROOT = Path(__file__).parent.parent
NAME = "tests/fake"
SECRET = "an apple a day 4711"


@dataclass
class Running:
    """A server in a thread of this process."""

    port: int
    service: Service
    server: Any
    log: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, key: str = "none") -> Any:  # any, since tests send what its types do not allow
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=20)

    def post(self, body: Any, **headers: str) -> httpx2.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        names = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        return httpx2.post(f"{self.url}/chat/completions", content=data, headers=names, timeout=20)

    def settled(self, taken: int = 0) -> bool:
        """Waits until no more than so many requests have a place."""
        return wait_for(lambda: self.service.taken <= taken)


def wait_for(happened: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.perf_counter() + seconds
    while not happened() and time.perf_counter() < end:
        time.sleep(0.005)
    return happened()


@contextmanager
def serving(
    chat: Chat, access: Access | None = None, limits: Limits | None = None, **options: Any
) -> Iterator[Running]:
    log: list[str] = []
    service = Service(chat, (NAME,), "fp_0", limits or Limits(), log=log.append, **options)
    ready = threading.Event()
    with bind("127.0.0.1", 0) as listening:
        server = make_server(service, access or Access(), ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            assert ready.wait(20)
            yield Running(listening.getsockname()[1], service, server, log)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("fake") / "bundle").folder


@pytest.fixture(scope="module")
def running(bundle: Path) -> Iterator[Running]:
    with serving(open_chat(read_bundle(bundle), vision=True)) as found:
        yield found


class SlowRunner(ScriptRunner):
    """Says "a", "b", ... without end, and each token when it is let: see `go`."""

    def __init__(self, step_s: float = 0.0) -> None:
        tokenizer = byte_tokenizer()
        self.encoder = PromptEncoder(tokenizer, SEQ_LEN)
        vocab = tokenizer.get_vocab_size()
        letters = [tokenizer.token_to_id(c) for c in "abcdefghijklmnopqrstuvwxyz"]

        def script(ids: list[int]) -> Floats:
            logits = np.zeros(vocab, dtype=np.float32)
            logits[letters[len(ids) % 26]] = 9
            return logits

        sizes = BundleSettings(
            vocab, HIDDEN, 1, 1, 16, 4096, TILE, SEQ_LEN, self.encoder.image_id, (self.encoder.end_id,)
        )
        super().__init__(sizes, script)
        self.step_s = step_s
        self.go = threading.Event()
        self.go.set()
        self.fault: Exception | None = None
        self.fault_at = 0  # tokens fed one by one before the fault

    def extend(self, cache: Any, ids: Sequence[int], features: Floats | None = None, keep: int = 1) -> Floats:
        while not self.go.wait(0.01):
            self._stop_if_cancelled()
        time.sleep(self.step_s)
        if self.fault and len(self.fed) >= self.fault_at:
            raise self.fault
        return super().extend(cache, ids, features, keep)

    def chat(self) -> Chat:
        return Chat(self, self.encoder, ImageSettings(TILE, 2 * TILE))


def picture(color: str = "red", size: tuple[int, int] = (40, 20)) -> Image.Image:
    image = Image.new("RGB", size, color)
    image.putpixel((3, 3), (1, 2, 3))
    return image


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    out = io.BytesIO()
    image.save(out, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def user(*parts: str | Image.Image) -> Any:
    content = [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image_url", "image_url": {"url": data_url(p)}}
        for p in parts
    ]
    return {"role": "user", "content": content}


# ---- what it answers


def test_models_are_listed_and_one_is_found_by_its_name(running: Running) -> None:
    client = running.client()
    (found,) = client.models.list().data
    assert found.id == NAME
    assert client.models.retrieve(NAME) == found
    assert found.model_extra is not None
    assert (found.model_extra["context_length"], found.owned_by) == (CONTEXT, "smolport")
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.models.retrieve("another")


def test_an_answer_is_the_one_that_ask_gives(running: Running, bundle: Path, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    wanted = ask(bundle, "What?", [tmp_path / "a.png"], sampling=Sampling(12)).answer
    found = running.client().chat.completions.create(model=NAME, messages=[user(picture(), "What?")], max_tokens=12)
    (choice,) = found.choices
    assert (choice.message.content, choice.message.role) == (wanted.text, "assistant")
    assert choice.finish_reason == wanted.finish_reason == "length"
    assert choice.logprobs is None
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (wanted.prompt_tokens, 12)
    assert found.usage.total_tokens == wanted.prompt_tokens + 12
    assert (found.object, found.model, found.system_fingerprint) == ("chat.completion", NAME, "fp_0")
    assert found.id.startswith("chatcmpl-")
    assert abs(found.created - time.time()) < 60


def test_a_conversation_is_fed_as_the_chat_is_encoded(running: Running, bundle: Path) -> None:
    red, blue = picture("red"), picture("blue", (20, 40))
    said: Any = [
        {"role": "developer", "content": "Be short."},
        user("First", red, "then", blue, "which?"),
        {"role": "assistant", "content": "Both."},
        user("And?", blue),
    ]
    chat = open_chat(read_bundle(bundle))
    turns = [
        Turn("system", ("Be short.",)),
        Turn("user", ("First", red, "then", blue, "which?")),
        Turn("assistant", ("Both.",)),
        Turn("user", ("And?", blue)),
    ]
    reply = chat.say(turns, Sampling(9))
    found = running.client().chat.completions.create(model=NAME, messages=said, max_completion_tokens=9)
    assert found.choices[0].message.content == reply.answer().text
    assert found.usage is not None
    assert found.usage.prompt_tokens == reply.prompt_tokens
    assert (
        found.usage.model_dump()["prompt_tokens_details"]["image_tokens"] == 9 * SEQ_LEN == reply.image_tiles * SEQ_LEN
    )


def test_low_detail_is_one_tile(running: Running) -> None:
    for detail, tiles in (("low", 1), ("high", 3), ("auto", 3)):
        url = {"url": data_url(picture()), "detail": detail}
        said: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]
        found = running.client().chat.completions.create(model=NAME, messages=said, max_tokens=1)
        assert found.usage is not None
        assert found.usage.model_dump()["prompt_tokens_details"]["image_tokens"] == tiles * SEQ_LEN


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_images_of_the_usual_formats_are_read(running: Running, kind: str) -> None:
    said: Any = user("What?")
    said["content"].append({"type": "image_url", "image_url": {"url": data_url(picture(), kind)}})
    assert running.client().chat.completions.create(model=NAME, messages=[said], max_tokens=1).choices


def test_a_stream_is_the_same_answer_in_pieces(running: Running) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": [user(picture(), "What?")], "max_tokens": 30, "seed": 3}
    asked["temperature"] = 1.5
    whole = running.client().chat.completions.create(**asked)
    chunks = list(
        running.client().chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked)
    )
    *pieces, last = chunks
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole.choices[0].message.content
    assert len(pieces) > 10
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [p.choices[0].finish_reason for p in pieces] == [None] * (len(pieces) - 1) + [whole.choices[0].finish_reason]
    assert (last.choices, last.usage) == ([], whole.usage)
    assert len({(c.id, c.created) for c in chunks}) == 1


def test_a_stream_on_the_wire_ends_with_done_and_has_usage_only_if_asked(running: Running) -> None:
    asked = {"model": NAME, "messages": [user("What?")], "max_tokens": 3, "stream": True}
    found = running.post(asked)
    assert found.headers["content-type"].startswith("text/event-stream")
    events = found.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(e.removeprefix("data: ")) for e in events[:-2])
    events = running.post(asked | {"stream_options": {"include_usage": True}}).text.split("\n\n")[:-2]
    usages = [json.loads(e.removeprefix("data: "))["usage"] for e in events]
    assert usages[:-1] == [None] * (len(usages) - 1)
    assert usages[-1]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_the_models_and_their_bytes_are_the_answer(
    running: Running, bundle: Path, stream: bool
) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": [user("What?")], "max_tokens": 40, "logprobs": True}
    asked |= {"top_logprobs": 4, "temperature": 1.2, "seed": 5}
    client = running.client().chat.completions
    if stream:
        chunks = [c.choices[0] for c in client.create(stream=True, **asked)]
        content = "".join(c.delta.content or "" for c in chunks)
        entries = [e for c in chunks if c.logprobs for e in c.logprobs.content or []]
    else:
        (choice,) = client.create(**asked).choices
        assert choice.logprobs is not None
        content, entries = choice.message.content or "", choice.logprobs.content or []
    chat = open_chat(read_bundle(bundle))
    reply = chat.say([Turn("user", ("What?",))], Sampling(40, 1.2, seed=5), top=4)
    steps = [s for s in reply if s.token.id not in chat.runner.settings.eos_ids]
    assert [e.logprob for e in entries] == [s.token.logprob for s in steps]
    assert [bytes(e.bytes) if e.bytes else None for e in entries] == [
        chat.encoder.token_bytes(s.token.id) for s in steps
    ]
    assert None in [e.bytes for e in entries]  # random weights give special tokens, too
    spelled = b"".join(bytes(e.bytes or []) for e in entries).decode("utf-8", "replace").removeprefix(" ")
    assert content
    assert spelled.startswith(content.rstrip("\ufffd"))
    for entry, step in zip(entries, steps, strict=True):
        assert [t.logprob for t in entry.top_logprobs] == [p for _, p in step.token.top]
        assert len(entry.top_logprobs) == 4
        assert sorted((t.logprob for t in entry.top_logprobs), reverse=True) == [t.logprob for t in entry.top_logprobs]


def test_the_most_likely_tokens_are_those_of_the_raw_logits() -> None:
    chat = SlowRunner().chat()
    (step, *_) = list(chat.say([Turn("user", ("x",))], Sampling(2), top=3))
    assert step.token.top[0] == (step.token.id, step.token.logprob)
    fed = chat.ids[:-2]
    raw = log_softmax(chat.runner._script(fed))  # type: ignore[attr-defined]  # noqa: SLF001  # the fake's own
    assert [p for _, p in step.token.top] == sorted(raw, reverse=True)[:3]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_string(stream: bool) -> None:
    with serving(SlowRunner().chat()) as found:
        asked: dict[str, Any] = {"model": NAME, "messages": [user("x")], "max_tokens": 20, "logprobs": True}
        whole = found.client().chat.completions.create(**asked).choices[0].message.content or ""
        asked["stop"] = [whole[5:8], "never"]
        if stream:
            chunks = [c.choices[0] for c in found.client().chat.completions.create(stream=True, **asked)]
            text, reason = "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason
            entries = [e for c in chunks if c.logprobs for e in c.logprobs.content or []]
        else:
            (choice,) = found.client().chat.completions.create(**asked).choices
            assert choice.logprobs is not None
            text, reason, entries = choice.message.content or "", choice.finish_reason, choice.logprobs.content or []
        assert (text, reason) == (whole[:5], "stop")
        assert "".join(e.token for e in entries) == whole[:5]
        assert found.settled()


def test_a_seed_repeats_and_without_one_answers_differ(running: Running) -> None:
    def answer(**options: Any) -> str:
        said = [user("What?")]
        found = running.client().chat.completions.create(model=NAME, messages=said, max_tokens=30, **options)
        return str(found.choices[0].message.content)

    assert answer(temperature=2, seed=-7) == answer(temperature=2, seed=-7) != answer(temperature=2, seed=8)
    assert len({answer(temperature=2) for _ in range(4)}) > 1
    assert answer() == answer(temperature=0) == answer(temperature=1e-12, seed=1) == answer(temperature=1, top_p=0)
    assert answer(temperature=2, seed=1, extra_body={"top_k": 1}) == answer()


def test_tokens_are_at_most_those_that_the_server_allows_or_the_context_holds() -> None:
    with serving(SlowRunner().chat(), limits=Limits(new_tokens=7)) as found:
        for options in ({}, {"max_tokens": 100}, {"max_completion_tokens": 7}):
            usage = found.client().chat.completions.create(model=NAME, messages=[user("x")], **options).usage
            assert usage.completion_tokens == 7


# ---- what it refuses


BAD: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "no messages": ({"messages": []}, "invalid_value", "messages"),
    "messages of another type": ({"messages": "hello"}, "invalid_type", "messages"),
    "a message of another type": ({"messages": ["hello"]}, "invalid_value", "messages[0]"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "messages[0].role"),
    "no content": ({"messages": [{"role": "user"}]}, "invalid_value", "messages[0].content"),
    "tool calls": (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        "unsupported_parameter",
        "messages[0].tool_calls",
    ),
    "unknown part": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "invalid_value",
        "messages[0].content[0].type",
    ),
    "half a character": ({"messages": [{"role": "user", "content": "\ud800"}]}, "invalid_value", "messages[0].content"),
    "image token": ({"messages": [{"role": "user", "content": "<image>"}]}, "invalid_value", "messages[0].content"),
    "tools": ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
    "n": ({"n": 2}, "unsupported_parameter", "n"),
    "n of another type": ({"n": True}, "unsupported_parameter", "n"),
    "penalty": ({"frequency_penalty": 0.5}, "unsupported_parameter", "frequency_penalty"),
    "bias": ({"logit_bias": {"3": 1}}, "unsupported_parameter", "logit_bias"),
    "schema": ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
    "unknown": ({"min_p": 0.1}, "unknown_parameter", "min_p"),
    "max_tokens": ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    "max_tokens of another type": ({"max_tokens": 3.5}, "invalid_type", "max_tokens"),
    "two maxima": ({"max_tokens": 3, "max_completion_tokens": 4}, "invalid_value", "max_tokens"),
    "temperature": ({"temperature": 2.5}, "invalid_value", "temperature"),
    "temperature of another type": ({"temperature": "0"}, "invalid_type", "temperature"),
    "no number": ({"temperature": float("nan")}, "invalid_value", "temperature"),
    "a huge number": ({"temperature": 10**400}, "invalid_value", "temperature"),
    "top_p": ({"top_p": 1.1}, "invalid_value", "top_p"),
    "stop": ({"stop": ["a"] * 5}, "invalid_value", "stop"),
    "empty stop": ({"stop": ""}, "invalid_value", "stop"),
    "top_logprobs alone": ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
    "stream": ({"stream": 1}, "invalid_type", "stream"),
    "stream options": ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    "too long": ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "context_length_exceeded", "messages"),
    "far too long": ({"messages": [{"role": "user", "content": "x" * 10**6}]}, "context_length_exceeded", "messages"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_told_its_parameter_in_openais_shape(running: Running, case: str, stream: bool) -> None:
    change, code, param = BAD[case]
    found = running.post({"model": NAME, "messages": [user("hi")]} | ({"stream": True} if stream else {}) | change)
    if case in ("stream", "stream options") and stream:
        return
    error = found.json()["error"]
    assert (found.status_code, error["code"], error["param"]) == (400, code, param)
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert running.settled()


def test_what_changes_nothing_is_ignored_and_what_asks_for_nothing_is_taken(running: Running) -> None:
    asked = {"model": NAME, "messages": [user("hi") | {"name": "ann"}], "max_tokens": 1, "user": "u", "store": False}
    neutral = {"n": 1, "presence_penalty": 0.0, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    assert running.post(asked | neutral | {"seed": None, "functions": None, "logit_bias": {}}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"a": 1e999999}',
        b"[" * 100_000,
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_body_that_is_no_request_is_refused(running: Running, body: bytes) -> None:
    assert running.post(body).status_code == 400


def test_openais_client_raises_its_own_errors(running: Running) -> None:
    create = running.client().chat.completions.create
    with pytest.raises(openai.BadRequestError) as too_long:
        create(model=NAME, messages=[user("x" * CONTEXT)])
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        create(model="gpt-5", messages=[user("x")])
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        running.client().embeddings.create(model=NAME, input="x", encoding_format="float")
    wrong = httpx2.get(f"{running.url}/chat/completions")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")


def header_of(width: int, height: int) -> bytes:
    """A PNG whose header claims a size."""
    import zlib

    out = io.BytesIO()
    picture().save(out, "PNG")
    data = bytearray(out.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def damaged() -> bytes:
    out = io.BytesIO()
    picture().save(out, "PNG")
    return out.getvalue()[:-30]


def other_format(kind: str) -> bytes:
    out = io.BytesIO()
    picture().save(out, kind)
    return out.getvalue()


def of(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


BAD_IMAGES: dict[str, tuple[str, str]] = {
    "elsewhere": ("https://host.example/a.png", "remote_url_refused"),
    "without TLS": ("http://127.0.0.1/a.png", "remote_url_refused"),
    "a file": ("file:///etc/passwd", "remote_url_refused"),
    "a path": ("/etc/passwd", "remote_url_refused"),
    "no base64": ("data:image/png;base64,@@@@", "invalid_data_url"),
    "half a byte": ("data:image/png;base64,AAAAA", "invalid_data_url"),
    "no content": ("data:image/png;base64", "invalid_data_url"),
    "not encoded": ("data:image/png,abc", "invalid_data_url"),
    "another type": (of(damaged(), "image/svg+xml"), "unsupported_type"),
    "no type": (of(damaged(), ""), "unsupported_type"),
    "not an image": (of(b"hello"), "invalid_image"),
    "empty": (of(b""), "invalid_image"),
    "another format inside": (of(other_format("TIFF")), "invalid_image"),
    "a program": (of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "invalid_image"),
    "damaged": (of(damaged()), "invalid_image"),
    "too many pixels": (of(header_of(9000, 9000)), "invalid_image"),
    "a bomb": (of(header_of(2**16, 2**16)), "invalid_image"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_image_is_refused_with_its_reason(running: Running, case: str, stream: bool) -> None:
    url, code = BAD_IMAGES[case]
    said = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    found = running.post({"model": NAME, "messages": [said], "stream": stream})
    assert (found.status_code, found.json()["error"]["code"]) == (400, code)
    assert running.settled()


def media(*parts: Any) -> Any:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def video_part(data: bytes | str, kind: str = "video/mp4") -> Any:
    return {"type": "video_url", "video_url": {"url": data if isinstance(data, str) else of(data, kind)}}


def file_part(data: bytes | str, kind: str = "application/pdf") -> Any:
    url = data if isinstance(data, str) else of(data, kind)
    return {"type": "file", "file": {"filename": "a.pdf", "file_data": url}}


@pytest.fixture(scope="module")
def clip() -> bytes:
    """A video of three seconds."""
    pytest.importorskip("av", reason="PyAV is not installed: pip install '.[video]'")
    out = io.BytesIO()
    write_video(out, (movie_frame(i) for i in range(30)), rate=10)
    return out.getvalue()


@pytest.fixture(scope="module")
def pdf() -> bytes:
    """A PDF of two pages, twice as wide as high: three tiles each."""
    pytest.importorskip("pypdfium2", reason="pypdfium2 is not installed: pip install '.[pdf]'")
    return pages_pdf(["1 0 0 rg 0 0 100 100 re f"] * 2)


def test_a_video_is_answered_as_ask_answers_it(running: Running, bundle: Path, clip: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(clip)
    wanted = ask(bundle, "What?", video=tmp_path / "a.mp4", sampling=Sampling(12)).answer
    found = running.client().chat.completions.create(
        model=NAME, messages=[media(video_part(clip), "What?")], max_tokens=12
    )
    assert found.choices[0].message.content == wanted.text
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (wanted.prompt_tokens, 12)
    assert found.usage.model_dump()["prompt_tokens_details"]["image_tokens"] == 3 * SEQ_LEN
    stream = running.client().chat.completions.create(
        model=NAME, messages=[media(video_part(clip), "What?")], max_tokens=12, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == wanted.text


def test_pages_of_a_pdf_are_answered_as_ask_answers_them(
    running: Running, bundle: Path, pdf: bytes, tmp_path: Path
) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf)
    picture().save(tmp_path / "a.png")
    wanted = ask(bundle, "What?", [tmp_path / "a.png"], pdf=tmp_path / "a.pdf", sampling=Sampling(12)).answer
    image = {"type": "image_url", "image_url": {"url": data_url(picture())}}
    found = running.client().chat.completions.create(
        model=NAME, messages=[media(image, file_part(pdf), "What?")], max_tokens=12
    )
    assert found.choices[0].message.content == wanted.text
    assert found.usage is not None
    assert found.usage.prompt_tokens == wanted.prompt_tokens
    assert found.usage.model_dump()["prompt_tokens_details"]["image_tokens"] == 9 * SEQ_LEN


def test_the_list_of_models_says_what_they_take(running: Running, clip: bytes, pdf: bytes) -> None:
    assert clip
    assert pdf
    model = httpx2.get(f"{running.url}/models").json()["data"][0]
    assert model["architecture"]["input_modalities"] == ["text", "image", "video", "file"]


BAD_MEDIA: dict[str, tuple[list[Any], str]] = {
    "no video": ([video_part(b"hello")], "invalid_video"),
    "a playlist": ([video_part(b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n")], "invalid_video"),
    "half a video": (["CLIP", "half"], "invalid_video"),
    "a video elsewhere": ([video_part("https://host.example/a.mp4")], "remote_url_refused"),
    "a video file": ([video_part("file:///etc/passwd")], "remote_url_refused"),
    "frames as a video": ([video_part(b"x", "video/jpeg")], "unsupported_type"),
    "no url": ([{"type": "video_url", "video_url": "data:"}], "invalid_value"),
    "two videos": ([video_part(b"x"), video_part(b"y")], "unsupported_content"),
    "a video and an image": (
        [video_part(b"x"), {"type": "image_url", "image_url": {"url": data_url(picture())}}],
        "unsupported_content",
    ),
    "a video and a PDF": ([video_part(b"x"), file_part(b"y")], "unsupported_content"),
    "no PDF": ([file_part(b"hello")], "invalid_file"),
    "another file": ([file_part(b"hello", "text/plain")], "unsupported_type"),
    "bare base64": ([file_part(base64.b64encode(b"%PDF").decode())], "remote_url_refused"),
    "a file kept": ([{"type": "file", "file": {"file_id": "file-1"}}], "unsupported_content"),
    "no file": ([{"type": "file"}], "unsupported_content"),
    "audio": ([{"type": "input_audio", "input_audio": {}}], "invalid_value"),
}


@pytest.mark.parametrize("case", BAD_MEDIA)
def test_bad_media_are_refused_with_their_reason(running: Running, clip: bytes, pdf: bytes, case: str) -> None:
    assert pdf
    parts, code = BAD_MEDIA[case]
    parts = [video_part(clip[: len(clip) // 2]) if p == "CLIP" else p for p in parts]
    found = running.post({"model": NAME, "messages": [media(*parts)]})
    error = found.json()["error"]
    assert (found.status_code, error["code"], error["type"]) == (400, code, "invalid_request_error")
    assert error["param"].startswith("messages")
    assert running.settled()


def test_a_video_and_a_pdf_are_the_users_alone(running: Running) -> None:
    for part in (video_part(b"x"), file_part(b"x")):
        found = running.post({"model": NAME, "messages": [{"role": "system", "content": [part]}, user("x")]})
        assert found.json()["error"]["param"] == "messages[0].content[0].type"


def test_more_pages_than_images_are_taken_are_refused(pdf: bytes) -> None:
    with serving(SlowRunner().chat(), limits=Limits(images=3)) as found:
        two = found.post({"model": NAME, "messages": [media(file_part(pdf))], "max_tokens": 1})
        assert two.status_code == 200
        four = found.post({"model": NAME, "messages": [media(file_part(pdf), file_part(pdf))]})
        assert (four.status_code, four.json()["error"]["code"]) == (400, "invalid_file")
        assert "has 2 pages, at most 1 are looked at" in four.text


def test_a_video_that_is_too_long_is_refused(clip: bytes) -> None:
    with serving(SlowRunner().chat(), limits=Limits(video_seconds=2)) as found:
        long = found.post({"model": NAME, "messages": [media(video_part(clip))]})
        assert (long.status_code, long.json()["error"]["code"]) == (400, "invalid_video")
        assert "3 s, at most 2 are accepted" in long.text


def endless(*arguments: Any) -> Any:
    """In place of decoding: goes on until it is told to end."""
    while True:
        arguments[-1]()
        time.sleep(0.005)


def test_decoding_ends_when_the_client_goes_away_or_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtimes.service.read_video", endless)
    with serving(SlowRunner().chat(), time_limit_s=0.3) as found:
        body = {"model": NAME, "messages": [media(video_part(b"x"))]}
        late = found.post(body)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "time_limit")
        assert found.settled()
    with serving(SlowRunner().chat()) as found:
        wire = raw(found.port, body)
        assert wait_for(lambda: found.service.taken == 1)
        time.sleep(0.1)
        wire.close()
        assert found.settled()


def test_too_many_images_are_refused() -> None:
    with serving(SlowRunner().chat(), limits=Limits(images=2)) as found:
        three = found.post({"model": NAME, "messages": [user(picture(), picture()), user(picture())]})
        assert (three.status_code, three.json()["error"]["code"]) == (400, "too_many_images")


def test_images_that_cannot_fit_are_refused_before_they_are_decoded(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("runtimes.service.decode_image", never)
    many = running.post({"model": NAME, "messages": [user(*[picture()] * 16, "x" * (CONTEXT - 16 * SEQ_LEN + 1))]})
    assert (many.status_code, many.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_large_body_is_refused_by_its_length_and_without_one() -> None:
    with serving(SlowRunner().chat(), limits=Limits(body_bytes=1000)) as found:
        assert found.post({"model": NAME, "messages": [user("x" * 2000)]}).status_code == 413

        def chunks() -> Iterator[bytes]:
            for _ in range(100):
                yield b" " * 100

        headers = {"content-type": "application/json"}
        chunked = httpx2.post(f"{found.url}/chat/completions", content=chunks(), headers=headers)
        assert (chunked.status_code, chunked.json()["error"]["code"]) == (413, "request_too_large")
        assert found.settled()


@pytest.mark.parametrize("headers", [{"content_type": "text/plain"}, {"content_encoding": "gzip"}])
def test_a_body_that_says_it_is_something_else_is_refused(running: Running, headers: dict[str, str]) -> None:
    assert running.post({"model": NAME, "messages": [user("x")]}, **headers).status_code == 415


# ---- who may ask


def head(port: int, host: str, path: str = "/v1/models", more: str = "") -> str:
    """The status line of an answer."""
    with socket.create_connection(("127.0.0.1", port), 10) as wire:
        wire.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{more}\r\n".encode())
        return wire.recv(4096).decode().partition("\r\n")[0]


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("LOCALHOST:1", True),
        ("127.0.0.1:8080", True),
        ("[::1]:8080", True),
        ("evil.example", False),
        ("evil.example:80", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost:80@evil.example", False),
        ("localhost:", False),
        ("", False),
    ],
)
def test_a_name_that_was_bound_to_loopback_elsewhere_is_refused(running: Running, host: str, allowed: bool) -> None:
    for path in ("/v1/models", "/health"):
        assert head(running.port, host, path).split()[1] == ("200" if allowed else "403")


def test_a_web_page_may_not_ask_unless_its_origin_was_allowed(running: Running) -> None:
    assert "403" in head(running.port, "localhost", more="Origin: https://evil.example\r\n")
    assert "403" in head(running.port, "localhost", more="Origin: null\r\n")
    good = "http://localhost:3000"
    with serving(SlowRunner().chat(), Access(origins=(good,))) as found:
        assert httpx2.get(f"{found.url}/models", headers={"origin": "https://evil.example"}).status_code == 403
        answer = httpx2.get(f"{found.url}/models", headers={"origin": good})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, good)
        asked = {"origin": good, "access-control-request-method": "POST"}
        asked["access-control-request-headers"] = "authorization, content-type, x-stainless-retry-count"
        preflight = httpx2.options(f"{found.url}/chat/completions", headers=asked)
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, good)
        refused = httpx2.options(f"{found.url}/chat/completions", headers=asked | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in refused.headers


def test_a_key_is_asked_for_and_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr("runtimes.api.hmac.compare_digest", compare)
    key = "k" * 20
    with serving(SlowRunner().chat(), Access(key, hosts=())) as found:
        assert found.client(key=key).models.list().data[0].id == NAME
        for wrong in ("none", key[:-1], key + "k"):
            with pytest.raises(openai.AuthenticationError) as refused:
                found.client(key=wrong).chat.completions.create(model=NAME, messages=[user("x")])
            assert refused.value.code == "invalid_api_key"
        assert httpx2.get(f"{found.url}/models").status_code == 401
        assert httpx2.get(f"{found.url}/models", headers={"authorization": f"bearer {key}"}).status_code == 401
        assert httpx2.get(f"{found.url}/models", headers={b"authorization": b"Bearer \xff\xfe"}).status_code == 401
        assert httpx2.get(f"http://127.0.0.1:{found.port}/health").json()["status"] == "ok"
        assert httpx2.get(f"{found.url}/nothing").status_code == 401  # nobody learns what there is
    assert len(compared) == 8


# ---- one at a time


def ask_in_thread(found: Running, results: list[Any], **options: Any) -> threading.Thread:
    def run() -> None:
        asked = {"model": NAME, "messages": [user("x")], "max_tokens": 5} | options
        try:
            results.append(found.client().chat.completions.create(**asked))
        except openai.OpenAIError as exc:
            results.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_requests_wait_in_line_and_one_too_many_is_told_when_to_come_again() -> None:
    runner = SlowRunner()
    runner.go.clear()
    with serving(runner.chat(), queue=2) as found:
        results: list[Any] = []
        threads = [ask_in_thread(found, results) for _ in range(3)]
        assert wait_for(lambda: found.service.taken == 3)
        with pytest.raises(openai.RateLimitError) as full:
            found.client().chat.completions.create(model=NAME, messages=[user("x")])
        assert full.value.code == "queue_full"
        assert 1 <= int(full.value.response.headers["retry-after"]) <= 120
        assert httpx2.get(f"http://127.0.0.1:{found.port}/health").json() == {"status": "ok", "requests": 3}
        runner.go.set()
        for thread in threads:
            thread.join()
        assert [r.choices[0].finish_reason for r in results] == ["length"] * 3
        assert found.settled()
        assert len(runner.fed) == 3 * 5


def raw(port: int, body: dict[str, Any]) -> socket.socket:
    data = json.dumps({"model": NAME, "messages": [user("x")], "max_tokens": 1000} | body).encode()
    wire = socket.create_connection(("127.0.0.1", port), 10)
    wire.sendall(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return wire


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_goes_away_stops_the_answer_within_a_token(stream: bool, reset: bool) -> None:
    runner = SlowRunner(step_s=0.01)
    with serving(runner.chat()) as found:
        wire = raw(found.port, {"stream": stream})
        if stream:
            assert b"200 OK" in wire.recv(4096)
        assert wait_for(lambda: len(runner.fed) > 5)
        if reset:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        wire.close()
        fed = len(runner.fed)
        assert found.settled()
        assert len(runner.fed) <= fed + 20  # 10 ms a token; seeing that it is gone takes some
        stopped = len(runner.fed)
        time.sleep(0.1)
        assert len(runner.fed) == stopped
        assert wait_for(lambda: any(" 499 " in line for line in found.log))
        assert found.client().chat.completions.create(model=NAME, messages=[user("x")], max_tokens=2).choices


def test_a_client_that_goes_away_during_a_long_prompt_stops_it() -> None:
    runner = SlowRunner()
    runner.go.clear()
    with serving(runner.chat()) as found:
        wire = raw(found.port, {})
        assert wait_for(lambda: found.service.taken == 1)
        time.sleep(0.1)
        wire.close()
        assert found.settled()  # though the runner was never let go on
        assert runner.fed == []


def test_a_client_that_goes_away_while_it_waits_frees_its_place_and_is_never_answered() -> None:
    runner = SlowRunner()
    runner.go.clear()
    with serving(runner.chat(), queue=1) as found:
        first: list[Any] = []
        thread = ask_in_thread(found, first)
        assert wait_for(lambda: found.service.taken == 1)
        wire = raw(found.port, {})
        assert wait_for(lambda: found.service.taken == 2)
        wire.close()
        assert found.settled(1)
        runner.go.set()
        thread.join()
        assert first[0].choices[0].finish_reason == "length"
        assert len(runner.fed) == 5


def test_a_client_that_reads_nothing_holds_up_nobody() -> None:
    runner = SlowRunner()
    with serving(runner.chat(), limits=Limits(new_tokens=4000)) as found:
        wire = raw(found.port, {"stream": True, "max_tokens": 4000, "logprobs": True, "top_logprobs": 20})
        assert found.settled(0)
        assert found.client().chat.completions.create(model=NAME, messages=[user("x")], max_tokens=2).choices
        wire.close()


def test_at_the_end_what_waits_is_refused_and_what_is_at_work_is_finished() -> None:
    runner = SlowRunner()
    runner.go.clear()
    with serving(runner.chat()) as found:
        results: list[Any] = []
        first = ask_in_thread(found, results)
        assert wait_for(lambda: found.service.taken == 1)
        waiting: list[Any] = []
        second = ask_in_thread(found, waiting, stream=True)
        assert wait_for(lambda: found.service.taken == 2)
        idle = raw(found.port, {"model": "no such"})
        assert b"404" in idle.recv(4096)
        found.server.should_exit = True
        second.join()
        assert isinstance(waiting[0], openai.InternalServerError)
        assert (waiting[0].status_code, waiting[0].code) == (503, "shutting_down")
        assert waiting[0].response.headers["retry-after"]
        runner.go.set()
        first.join()
        assert results[0].choices[0].finish_reason == "length"
        idle.close()


def test_at_the_end_an_answer_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.api, "GRACE_S", 1)
    runner = SlowRunner()
    runner.go.clear()
    began = time.perf_counter()
    with serving(runner.chat()) as found:
        wire = raw(found.port, {})
        assert wait_for(lambda: found.service.taken == 1)
    assert time.perf_counter() - began < 10
    wire.close()


# ---- faults


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_at_once_is_500_and_the_next_request_is_answered(stream: bool) -> None:
    runner = SlowRunner()
    runner.fault = EngineError("decoder: broke")
    with serving(runner.chat()) as found:
        failed = found.post({"model": NAME, "messages": [user(SECRET)], "stream": stream})
        text = failed.text
        assert "decoder: broke" in text
        assert "engine_failed" in text
        assert (failed.status_code == 500) is not stream  # a stream had begun
        assert "[DONE]" not in text
        runner.fault = None
        assert found.client().chat.completions.create(model=NAME, messages=[user("x")], max_tokens=2).choices


def test_an_engine_that_fails_in_the_middle_of_a_stream_is_an_error_of_openais_client() -> None:
    runner = SlowRunner()
    runner.fault, runner.fault_at = EngineError("decoder: broke"), 4
    with serving(runner.chat()) as found:
        chunks: list[Any] = []
        with pytest.raises(openai.APIError, match="decoder: broke"):
            chunks.extend(found.client().chat.completions.create(model=NAME, messages=[user("x")], stream=True))
        assert len("".join(c.choices[0].delta.content or "" for c in chunks)) == 4
        assert found.settled()


@pytest.mark.parametrize("fault", [ValueError(SECRET), MemoryError(), KeyError(SECRET)])
def test_an_error_that_nobody_foresaw_is_500_and_says_nothing_of_the_request(fault: Exception) -> None:
    runner = SlowRunner()
    runner.fault = fault
    with serving(runner.chat()) as found:
        failed = found.post({"model": NAME, "messages": [user(SECRET)]})
        assert failed.status_code == 500
        assert SECRET not in failed.text
        assert SECRET not in "".join(found.log)
        runner.fault = None
        assert found.client().chat.completions.create(model=NAME, messages=[user("x")], max_tokens=2).choices


def test_an_error_of_the_wire_itself_is_500_and_logged_without_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError(SECRET)

    with serving(SlowRunner().chat()) as found:
        monkeypatch.setattr(runtimes.api, "read_request", failing)
        failed = found.post({"model": NAME, "messages": [user(SECRET)]})
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "internal_error")
        assert wait_for(lambda: any("error: RuntimeError in test_serve.py:" in line for line in found.log))
        assert SECRET not in "".join(found.log)
        assert found.settled()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_given_up(stream: bool) -> None:
    runner = SlowRunner(step_s=0.02)
    with serving(runner.chat(), time_limit_s=0.3) as found:
        late = found.post({"model": NAME, "messages": [user("x")], "max_tokens": 1000, "stream": stream})
        assert "time_limit" in late.text
        assert (late.status_code == 504) is not stream
        assert found.settled()
        runner.go.clear()  # so does one that takes too long before its first token
        assert found.post({"model": NAME, "messages": [user("x")]}).status_code == 504


def test_a_body_or_a_head_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.api, "BODY_S", 0.3)
    with serving(SlowRunner().chat()) as found, socket.create_connection(("127.0.0.1", found.port), 10) as wire:
        wire.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 50\r\n\r\n{"
        )
        assert wait_for(lambda: found.service.taken == 1)
        assert b" 408 " in wire.recv(4096)
        assert found.settled()
        for sent in (b"", b"GET /v1/mod"):
            with socket.create_connection(("127.0.0.1", found.port), 10) as slow:
                slow.sendall(sent)
                assert slow.recv(4096) == b""


def test_a_stream_says_that_it_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.api, "ALIVE_S", 0.05)
    runner = SlowRunner()
    runner.go.clear()
    with serving(runner.chat()) as found:
        threading.Timer(0.4, runner.go.set).start()
        text = found.post({"model": NAME, "messages": [user("x")], "max_tokens": 2, "stream": True}).text
        assert ": at work\n\n" in text
        assert text.endswith("data: [DONE]\n\n")


def test_what_is_no_http_is_answered_or_closed_and_changes_nothing(running: Running) -> None:
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(200) + b"\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", running.port), 10) as wire:
            wire.sendall(garbage)
            with suppress(OSError):
                wire.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                assert wire.recv(4096).startswith((b"HTTP/1.1 4", b""))
    assert running.client().models.list().data


def test_the_log_has_counts_and_times_and_nothing_else(running: Running) -> None:
    running.log.clear()
    said = [user(picture(), SECRET)]
    found = running.client().chat.completions.create(model=NAME, messages=said, max_tokens=3)
    assert wait_for(lambda: bool(running.log))
    (line,) = running.log
    assert found.usage is not None
    assert re.fullmatch(
        rf"\d\d:\d\d:\d\d 200 3 tiles, {found.usage.prompt_tokens} \+ 3 tokens \(length\); "
        r"waited \d+\.\d\d s, first token after \d+\.\d\d s, all \d+\.\d\d s",
        line,
    )


# ---- the command


def start(bundle: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "runtimes.serve", str(bundle), "--port", "0", *options]
    env = os.environ | {"PYTHONWARNINGS": "error"} | environment
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, encoding="utf-8")


def ready(server: subprocess.Popen[str]) -> tuple[str, list[str]]:
    assert server.stderr is not None
    lines = []
    for line in server.stderr:
        lines.append(line)
        if match := re.fullmatch(r"serving at (http://\S+)\n", line):
            return match.group(1), lines
    raise AssertionError(lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_as_a_command_it_loads_serves_and_ends_by_a_signal(bundle: Path, number: signal.Signals) -> None:
    with start(bundle, "--name", "mine", "--tiles", "1") as server:
        try:
            url, lines = ready(server)
            assert lines[0] == f"loading {bundle}\n"
            assert (
                "tests/fake, recipe none, ONNX Runtime, context 384, images of at most 1 tiles of 4 tokens" in lines[1]
            )
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
            found = client.chat.completions.create(model="mine", messages=[user(picture(), SECRET)], max_tokens=2)
            digest = read_bundle(bundle).manifest.payload_digest
            assert found.system_fingerprint == f"fp_{digest[:12]}"
            server.send_signal(number)
            assert server.stderr is not None
            rest = server.stderr.read()
            assert server.wait(20) == 0
            assert SECRET not in rest
            assert "tokens (length)" in rest
            assert rest.endswith("ended\n")
        finally:
            server.kill()


def test_it_listens_elsewhere_only_with_a_key(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "0123456789abcdef"
    with start(bundle, "--host", "0.0.0.0", "--key-env", "THE_KEY", THE_KEY=key) as server:
        try:
            url, _ = ready(server)
            port = url.rpartition(":")[2].removesuffix("/v1")
            assert "401" in head(int(port), "anywhere.example")
            assert "200" in head(int(port), "anywhere.example", more=f"Authorization: Bearer {key}\r\n")
        finally:
            server.kill()
    for host in ("0.0.0.0", "::", "192.0.2.1", "host.example"):
        assert main([str(bundle), "--host", host]) == 2
        assert "needs a key: --key-env" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--key-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE holds 0 characters, want 16 or more"),
        (["--key-env", "BAD_KEY"], "holds what no header can"),
        (["--queue", "-1"], "queue is -1"),
        (["--time-limit", "nan"], "time_limit is nan"),
        (["--max-body-mb", "0"], "max_body_mb is 0"),
        (["--port", "99999"], "port is 99999"),
        (["--frames", "0"], "frames is 0, want 1 to 999"),
    ],
)
def test_an_option_that_cannot_be_used_is_exit_code_2(
    bundle: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BAD_KEY", "with a space in the middle")
    assert main([str(bundle), *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_port_that_is_taken_is_said_before_the_bundle_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        assert main([str(tmp_path / "nowhere"), "--port", str(taken.getsockname()[1])]) == 2
    err = capsys.readouterr().err
    assert "cannot listen at 127.0.0.1 port" in err
    assert "loading" not in err


def test_a_bundle_that_cannot_be_used_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere"), "--port", "0"]) == 2
    assert "not a folder" in capsys.readouterr().err
    pending = make_bundle(tmp_path / "pending", proven=False).folder
    assert main([str(pending), "--port", "0"]) == 2
    assert "proof is pending" in capsys.readouterr().err


def test_the_router_client_asks_a_device_by_configuration_alone(quick_bundle: Path, tmp_path: Path) -> None:
    """It reads the picture that the router made anew, and says what that took."""
    sample = ROOT / "demo" / "samples" / "form.png"
    wanted = ask(quick_bundle, "What is the total?", [sample]).answer
    with serving(open_chat(read_bundle(quick_bundle), vision=True)) as device:
        (tmp_path / "router.toml").write_text(
            f"""
            state = "router.sqlite3"
            [policy]
            mode = "cloud_only"
            [[backend]]
            name = "device"
            base_url = "{device.url}"
            models = ["{NAME}"]
            [[backend.offer]]
            model = "{NAME}"
            vision = true
            context = 2048
            usd_in = 0
            usd_out = 0
            """,
            encoding="utf-8",
        )
        config = read_config(tmp_path / "router.toml")
        router = Router(
            backends=config.backends,
            policy=config.policy,
            budget=config.budget,
            state=config.state,
            privacy=replace(config.privacy, consent=lambda _: True),
        )
        *deltas, done = router.stream("What is the total?", [sample])
        assert isinstance(done, Done)
        answer = done.answer
        assert "".join(d.text for d in deltas if isinstance(d, Delta)) == answer.text == wanted.text == "69.57"
        receipt = answer.receipt
        assert (receipt.source, receipt.model_served) == ("cloud", NAME)
        assert (receipt.prompt_tokens, receipt.usage_source) == (wanted.prompt_tokens, "provider")
        assert receipt.completion_tokens == len(wanted.ids)
        assert receipt.egress
        assert (receipt.cost_nano_usd, receipt.egress.images) == (0, 1)
        assert "What" not in "".join(device.log)


def guide() -> dict[str, list[str]]:
    """The blocks of the server's guide, by language."""
    found: dict[str, list[str]] = {"bash": [], "python": []}
    text = (ROOT / "runtimes" / "SERVE.md").read_text(encoding="utf-8")
    for kind, block in re.findall(r"^```(bash|python)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        found[kind].append(block)
    return found


@contextmanager
def started(folder: Path, script: str, port: int) -> Iterator[str]:
    """The server as a script of the guide starts it, on a port that is free; the line that says where."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [
        "bash",
        "-c",
        f"{script.replace('python -m runtimes.serve', 'exec python -m runtimes.serve').strip()} --port {port}",
    ]
    server = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, encoding="utf-8")
    assert server.stderr
    said: list[str] = []
    try:
        while "serving at" not in (line := server.stderr.readline()):
            assert line, "".join(said)
            said.append(line)
        yield line
    finally:
        server.terminate()
        server.communicate(timeout=20)
        assert server.returncode == 0


@pytest.mark.skipif(None in (shutil.which("curl"), shutil.which("bash")), reason="curl or bash is not installed")
def test_the_commands_of_the_guide_do_what_it_says(bundle: Path, clip: bytes, pdf: bytes, tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "smolvlm2").symlink_to(bundle)
    picture().save(tmp_path / "receipt.jpg")
    (tmp_path / "clip.mp4").write_bytes(clip)
    (tmp_path / "invoice.pdf").write_bytes(pdf)
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    start, curl, with_key = guide()["bash"]
    (program,) = guide()["python"]

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    install, serve = start.splitlines()
    extras = re.fullmatch(r"pip install '\.\[(.*)\]'", install)
    assert extras
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(extras[1].split(",")) <= set(declared)
    with started(tmp_path, serve, port) as line:
        assert f"serving at http://127.0.0.1:{port}/v1" in line
        models, _, completion = run("bash", "-c", curl.replace("8080", str(port))).partition("}]}")
        assert '"id":"smolvlm2"' in models
        answer = json.loads(completion)["choices"][0]
        assert answer["finish_reason"] in ("stop", "length")
        said = run(sys.executable, "-c", program.replace("8080", str(port)))
        usage = re.findall(r"prompt_tokens=(\d+)", said)
        assert len(usage) == program.count("\nask(") == 4
        assert int(usage[0]) < int(usage[1])  # two images take more than one
    with started(tmp_path, with_key.replace("0.0.0.0", "127.0.0.1"), port):
        refused = httpx2.get(f"http://127.0.0.1:{port}/v1/models")
        assert refused.status_code == 401
