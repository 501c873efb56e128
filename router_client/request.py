"""A question as it is taken from the caller, and as it is written for an offer."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router_client.errors import ConfigError
from router_client.images import Encoded
from router_client.local import Picture, Question
from router_client.offers import MOST_TOKENS, Offer


def question_of(text: object, images: Sequence[object], more: Mapping[str, Any]) -> Question:
    """The arguments of `Router.ask`, checked.

    Raises:
        ConfigError: for what cannot be asked.
    """
    if not isinstance(text, str) or not text.strip():
        raise ConfigError("the question is empty, or no text")
    pictures: list[Picture] = []
    for picture in images:
        if not isinstance(picture, bytes | Path):
            raise ConfigError("an image is a file's Path or bytes: an address would have a third party fetch it")
        pictures.append(picture)
    question = Question(text, tuple(pictures), **more)
    if type(question.max_tokens) is not int or not 1 <= question.max_tokens <= MOST_TOKENS:
        raise ConfigError(f"max_tokens is {question.max_tokens!r}, want 1 to {MOST_TOKENS}")
    if not isinstance(question.system, str):
        raise ConfigError("system is no text")
    try:
        json.dumps([question.temperature, question.schema], allow_nan=False)
    except (TypeError, ValueError, RecursionError) as exc:
        raise ConfigError(f"schema or temperature is nothing that JSON can say: {exc}") from exc
    if not isinstance(question.schema, Mapping | None):
        raise ConfigError("schema is no JSON object")
    return question


def text_bytes(question: Question) -> tuple[int, int]:
    """(all that is sent of a question but images, the most that a server can make of it).

    Some tokenizers apply NFKC first, by which one character of 3 bytes may become 18 characters of 33.
    """
    from unicodedata import normalize  # slow to import

    schema = "" if question.schema is None else json.dumps(question.schema)
    text = question.text + question.system + schema
    sent, normal = (len(t.encode("utf-8", "replace")) for t in (text, normalize("NFKC", text)))
    return sent, max(sent, normal)


def chat_body(question: Question, offer: Offer, encoded: Sequence[Encoded], *, minimal: bool) -> bytes:
    """The request; "model" comes first, so that a proxy need not read the images to route it.

    Args:
        question: what is asked.
        offer: whom; what its provider is known to refuse is left away.
        encoded: the question's images.
        minimal: leave away all that some provider may refuse.
    """
    content: list[dict[str, Any]] = []
    for image in encoded:
        url = "data:image/jpeg;base64," + base64.b64encode(image.data).decode("ascii")
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": question.text})  # last, as the models here are trained to read it
    messages: list[dict[str, Any]] = [{"role": "system", "content": question.system}] if question.system else []
    messages.append({"role": "user", "content": content if encoded else question.text})
    body: dict[str, Any] = {
        "model": offer.asked,
        "messages": messages,
        "max_tokens": question.max_tokens,
        "stream": True,
    }
    if not minimal:
        body |= {"temperature": question.temperature, "stream_options": {"include_usage": True}}
        if question.schema is not None:
            schema = {"name": "answer", "schema": dict(question.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return json.dumps({key: value for key, value in body.items() if key not in offer.known.refuses}).encode()
