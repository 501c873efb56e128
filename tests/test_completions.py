"""What of a request is understood: any JSON is read or refused, never more; stop strings."""

import base64
import io
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from runtimes.completions import IGNORED, READ, REFUSED, ApiError, ChatRequest, Limits, Picture, read_request
from runtimes.generate import StopText

MODEL = "m"
LIMITS = Limits()
JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
PARAMETERS = st.sampled_from(sorted(READ | IGNORED | REFUSED.keys()))
PARTS = st.fixed_dictionaries(
    {},
    optional={"type": st.sampled_from(["text", "image_url", "video_url", "file", "x"])}
    | dict.fromkeys(["text", "image_url", "video_url", "file"], JSON | st.fixed_dictionaries({"url": JSON})),
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "x"]), "content": JSON | st.lists(PARTS)})


def png() -> str:
    out = io.BytesIO()
    Image.new("RGB", (3, 2)).save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def read(fields: dict[str, Any], limits: Limits = LIMITS) -> ChatRequest:
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]} | fields
    return read_request(json.dumps(asked).encode(), [MODEL], limits)


@given(st.dictionaries(PARAMETERS, JSON, max_size=4), st.lists(MESSAGE, max_size=3))
@example({"logit_bias": {"a": 1.0}}, [])
def test_any_json_is_a_request_or_is_refused_in_a_line(fields: dict[str, Any], messages: list[Any]) -> None:
    asked = {"model": MODEL, "messages": messages} | fields
    refused = None
    try:
        found = read_request(json.dumps(asked).encode(), [MODEL], LIMITS)
        assert 1 <= found.sampling.max_new_tokens <= LIMITS.new_tokens
    except ApiError as exc:
        refused = exc
    if refused:
        assert 400 <= refused.status < 500
        assert "\n" not in str(refused)
        json.dumps(refused.body()).encode()


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_are_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        read_request(body, [MODEL], LIMITS)
    assert refused.value.status == 400


@given(st.text(max_size=300))
def test_any_url_but_that_of_an_image_is_refused(url: str) -> None:
    said = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    with pytest.raises(ApiError) as refused:
        read({"messages": said})
    assert (refused.value.status, refused.value.param) == (400, "messages[0].content[0].image_url.url")


def test_a_message_has_its_parts_in_order() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": png(), "detail": "low"}},
        {"type": "text", "text": ""},
    ]
    found = read({"messages": [{"role": "user", "content": parts}, {"role": "developer", "content": "b"}]})
    first, second = found.messages
    assert (first.role, second.role, second.parts) == ("user", "system", ("b",))
    a, image, empty = first.parts
    assert (a, empty) == ("a", "")
    assert isinstance(image, Picture)
    assert image.low


def test_images_are_only_in_what_a_user_says() -> None:
    for role in ("system", "assistant"):
        with pytest.raises(ApiError, match="in a message of role"):
            read({"messages": [{"role": role, "content": [{"type": "image_url", "image_url": {"url": png()}}]}]})


def test_the_three_tables_do_not_overlap() -> None:
    assert not READ & IGNORED
    assert not (READ | IGNORED) & REFUSED.keys()


def test_a_refusal_repeats_little_of_a_request_and_nothing_that_cannot_be_printed() -> None:
    with pytest.raises(ApiError) as refused:
        read({"\x1b[2J" + "x" * 1000: 1})
    assert len(str(refused.value)) < 200
    assert str(refused.value).isprintable()


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
)
@example(["a", "a", "b"], ["ab"])
@example(["ab", "a"], ["b", "aba"])
def test_text_ends_before_the_first_stop_string_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    stop = StopText(stops)
    shown = ""
    pushed = ""
    for piece in pieces:
        pushed += piece
        shown += stop.push(piece)
        assert pushed.startswith(shown)  # nothing is taken back
        longest = max((len(s) for s in stops), default=1)
        assert stop.stopped or len(pushed) - len(shown) < longest  # and little held back
        if stop.stopped:
            break
    shown += stop.rest()
    found = [at for at in (pushed.find(s) for s in stops) if at >= 0]
    assert stop.stopped == bool(found)
    assert shown == (pushed[: min(found)] if found else pushed)
    assert not any(s in shown for s in stops)
