"""The stream decoder, cut at every byte and fed with anything; errors by scope; waits."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_client import errors, retry, stream
from router_client.errors import AttemptFailed, classify, scrub
from router_client.stream import Chat, Events, Lines, Usage


def chunk(content: str | None = None, finish: str | None = None, **more: object) -> dict[str, object]:
    delta = {} if content is None else {"content": content}
    return {"model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


def data(*values: object, end: str = "\n\n", space: str = " ") -> bytes:
    texts = (v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values)
    return "".join(f"data:{space}{text}{end}" for text in texts).encode()


WHOLE = [chunk(""), chunk("Grüße "), chunk("😀", None), chunk(finish="stop")]
USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}


def read(raw: bytes, size: int | None = None) -> Chat:
    chat = Chat()
    pieces = [raw] if size is None else [raw[i : i + size] for i in range(0, len(raw), size)]
    text = "".join(piece for part in pieces for piece in chat.feed(part))
    assert text == chat.text
    chat.finish()
    return chat


@pytest.mark.parametrize("size", [None, 1, 2, 3, 7])
@pytest.mark.parametrize(
    "raw",
    [
        data(*WHOLE, USAGE, "[DONE]"),
        data(*WHOLE, USAGE, "[DONE]", end="\r\n\r\n"),
        data(*WHOLE, USAGE, "[DONE]", end="\r\r"),
        data(*WHOLE, USAGE, "[DONE]", space=""),
        data(*WHOLE[:-1], chunk(finish="stop", usage=USAGE["usage"])),  # usage beside choices, no [DONE]
        b": keep-alive\n\n" + data(WHOLE[0]) + b"id: 1\nretry: 5\n: x\n\n" + data(*WHOLE[1:], USAGE, "[DONE]"),
        b"\xef\xbb\xbf" + data(*WHOLE, USAGE, "[DONE]"),
        data(*WHOLE, USAGE, "[DONE]").replace(b', "choices"', b',\ndata: "choices"'),  # one event on two lines
        data(chunk("Grüße "), *map(json.dumps, (chunk("\ud83d"), chunk("\ude00"))), chunk(finish="stop"), USAGE),
    ],
)
def test_an_answer_is_the_same_however_it_is_cut(raw: bytes, size: int | None) -> None:
    chat = read(raw, size)
    assert (chat.text, chat.finish_reason, chat.usage) == ("Grüße 😀", "stop", Usage(7, 2))


@given(st.binary(), st.lists(st.integers(0, 400), max_size=12))
def test_lines_are_those_of_the_whole_wherever_it_is_cut(raw: bytes, cuts: list[int]) -> None:
    raw += b"\n"
    edges = [0, *sorted(min(c, len(raw)) for c in cuts), len(raw)]
    lines = Lines()
    found = [line for a, b in pairwise(edges) for line in lines.feed(raw[a:b])]
    want = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]
    assert found == [want[0].removeprefix(stream.BOM), *want[1:]]


GARBAGE = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [b"data: ", b"data:", b"event: error\n", b"\n\n", b"\r", b": c\n", b"data: [DONE]\n\n", b'{"a":']
    ).flatmap(lambda start: st.binary(max_size=20).map(lambda rest: start + rest)),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["choices", "delta", "content", "error", "usage", "finish_reason", "index", "message"]),
                inner,
                max_size=4,
            )
        ),
    ).map(lambda value: b"data: " + json.dumps(value).encode() + b"\n\n"),
)


@given(st.lists(GARBAGE, max_size=12))
def test_anything_ends_in_an_answer_or_a_fault_and_the_same_one_byte_by_byte(parts: list[bytes]) -> None:
    raw = b"".join(parts)
    results = []
    for size in (None, 1):
        try:
            results.append(("answer", read(raw, size).text))
        except AttemptFailed as failed:
            results.append(("fault", failed.fault.code))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (data(*WHOLE[:-1]), "truncated"),
        (data(*WHOLE[:-1], "[DONE]"), "truncated"),
        (data(*WHOLE)[:-1], "truncated"),  # the last event never ended
        (data(chunk("a"), {"error": {"message": "blew up", "code": 502}}), "in_band_error"),
        (data(chunk("a"), {"error": "timed out", "error_type": "overloaded"}), "in_band_error"),
        (data(chunk("a")) + b'event: error\ndata: {"message":"timed out"}\n\n', "in_band_error"),
        (data("no json"), "bad_stream"),
        (data("[" * 100_000), "bad_stream"),
        (data(chunk(finish="stop")), "empty"),
        (b"data: " + b"x" * (stream.MAX_LINE_BYTES + 1), "bad_stream"),
        (b"data: xx\n" * (stream.MAX_EVENT_BYTES // 3), "bad_stream"),
        (b":" + b"x" * 1000 + b"\n" + data(*[": x" * 100_000] * 40), "bad_stream"),
    ],
)
def test_what_is_no_whole_answer_is_a_fault(raw: bytes, code: str) -> None:
    with pytest.raises(AttemptFailed) as caught:
        read(raw)
    assert caught.value.fault.code == code
    assert caught.value.fault.maybe_billed


def test_what_follows_done_is_not_read() -> None:
    assert read(data(*WHOLE, "[DONE]", chunk(" and more"), "no json")).text == "Grüße 😀"


def test_an_answer_filed_under_reasoning_is_taken_only_if_it_ended() -> None:
    thought = {"choices": [{"delta": {"content": None, "reasoning_content": "It is 42."}, "finish_reason": None}]}
    chat = Chat()
    assert list(chat.feed(data(thought, chunk(finish="stop")))) == [""]  # a sign of life, and nothing to hand out
    chat.finish()
    assert chat.text == "It is 42."
    with pytest.raises(AttemptFailed):
        read(data(thought, chunk(finish="length")))


@pytest.mark.parametrize("count", [-1, True, 1.5, "7", None, 10**10])
def test_an_impossible_count_is_no_usage(count: object) -> None:
    assert stream.usage_of({"prompt_tokens": count, "completion_tokens": 1}) is None


def test_an_event_needs_no_data_and_a_field_no_value() -> None:
    assert list(Events().feed(b"event: x\n\ndata\n\ndata: a\nother: b\n\n")) == [("", ""), ("", "a")]


BODIES: dict[str, tuple[int, object, str, str]] = {
    "bad token": (401, {"error": "Invalid username or password."}, "http_401", "account"),
    "no credit": (402, {"error": "You have depleted your monthly included credits."}, "http_402", "account"),
    "no permission": (
        403,
        {
            "error": "This authentication method does not have sufficient permissions to call Inference Providers on "
            "behalf of user someone"
        },
        "http_403",
        "account",
    ),
    "gated": (
        403,
        {"error": "You cannot access this model unless the model owner gives you access."},
        "gated",
        "model",
    ),
    "not served": (
        400,
        {
            "error": {
                "message": "The requested model 'x/y' is not supported by any provider you have enabled.",
                "code": "model_not_supported",
            }
        },
        "model_not_supported",
        "model",
    ),
    "not found": (400, {"error": {"message": "does not exist", "code": "model_not_found"}}, "model_not_found", "model"),
    "not here": (400, {"error": "Model not supported by provider together"}, "model_not_supported_here", "offer"),
    "404": (404, {"error": "Model x not found."}, "http_404", "offer"),
    "parameter": (400, {"message": "cannot both be set", "code": "wrong_api_format"}, "bad_request", "request"),
    "422": (422, {"detail": "unknown field"}, "bad_request", "request"),
    "image": (400, {"error": {"message": "image_url is not supported"}}, "no_vision", "offer"),
    "image 2": (422, {"message": "only 'text' content type"}, "no_vision", "offer"),
    "413": (413, b"<html>nginx</html>", "too_large", "request"),
    "large": (400, {"error": "request entity too large"}, "too_large", "request"),
    "context": (400, {"error": {"message": "maximum context length is 4096"}}, "context_too_long", "offer"),
    "429": (429, {"status": 429, "title": "Too Many Requests"}, "http_429", "offer"),
    "429 all": (429, {"error": "rate limit of your organization"}, "http_429", "account"),
    "408": (408, b"", "http_408", "offer"),
    "500": (500, {"error": "Internal Error, please report to us"}, "http_500", "offer"),
    "502": (502, b"<html>bad gateway</html>", "http_502", "offer"),
    "redirect": (302, b"", "http_302", "offer"),
}


@pytest.mark.parametrize(("status", "body", "code", "scope"), BODIES.values(), ids=BODIES)
def test_an_error_is_classed_by_what_it_says_something_about(status: int, body: object, code: str, scope: str) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    fault = classify(status, {}, raw, now=0)
    assert (fault.code, fault.scope) == (code, scope)
    assert "<" not in fault.detail


@given(
    st.integers(300, 599),
    st.binary() | st.recursive(st.none() | st.text(), st.lists).map(lambda v: json.dumps(v).encode()),
)
def test_every_error_has_a_class(status: int, body: bytes) -> None:
    fault = classify(status, {"retry-after": body[:9].decode("latin-1")}, body, now=0)
    assert fault.scope in {"account", "model", "offer", "request"}
    assert len(fault.detail) <= errors.MAX_DETAIL


def test_a_detail_holds_no_token_and_no_picture() -> None:
    body = b'{"error":"Bearer hf_abcdefghij is bad: secret-7 data:image/png;base64,AAAA\\n\\u001b[31m"}'
    detail = classify(500, {}, body, now=0, token="secret-7").detail
    assert detail == "[removed] is bad: [token] [removed] [31m"
    assert "x-y" in scrub("x-y")


@pytest.mark.parametrize(
    ("headers", "want"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:42 GMT"}, 42.0),
        ({"retry-after": "0"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "121"}, None),
        ({"retry-after": "soon"}, None),
        ({"ratelimit": '"api";r=0;t=55'}, 55.0),
        ({"ratelimit": '"api";r=3;t=55'}, None),  # on every response; not the reason
        ({"ratelimit": '"a";r=3;t=9, "b";r=0;t=11'}, 11.0),
        ({}, None),
    ],
)
def test_a_wish_to_wait_is_read_in_all_its_forms(headers: dict[str, str], want: float | None) -> None:
    assert retry.retry_after_s(headers, now=0.0) == want


def test_jitter_is_full_and_bounded() -> None:
    bounds: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        return high

    waits = [retry.full_jitter_s(n, uniform) for n in (0, 1, 2, 3, 4, 5, 10**6)]
    assert waits == [0.25, 0.5, 1, 2, 4, 4, 4]
    assert {low for low, _ in bounds} == {0.0}


@given(st.lists(st.booleans()))
def test_retries_are_paid_for_by_successes(steps: list[bool]) -> None:
    budget = retry.RetryBudget(clock=lambda: 0.0)
    taken = 0
    for success in steps:
        if success:
            budget.earn()
        else:
            taken += budget.take()
    assert taken <= 10 + 0.1 * steps.count(True)
    assert 0 <= budget.tokens <= 10


def test_retries_come_back_with_time() -> None:
    now = 0.0
    budget = retry.RetryBudget(clock=lambda: now)
    assert [budget.take() for _ in range(11)] == [True] * 10 + [False]
    now = 59.0
    assert not budget.take()
    now = 61.0
    assert (budget.take(), budget.take()) == (True, False)
    now = 10.0  # a clock set back gives none
    assert not budget.take()
    now = 10**6
    assert [budget.take() for _ in range(11)] == [True] * 10 + [False]


def test_threads_cannot_take_one_retry_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking and taking, another thread gets its turn."""

    class Slow(retry.RetryBudget):
        def __getattribute__(self, name: str) -> object:
            if name == "tokens":
                time.sleep(0.001)
            return super().__getattribute__(name)

    budget = Slow(clock=lambda: 0.0)
    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(lambda _: budget.take(), range(40))) == 10
    monkeypatch.setattr(budget, "_lock", nullcontext())  # without the lock the same would go wrong
    budget.tokens = 10
    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(lambda _: budget.take(), range(40))) > 10
