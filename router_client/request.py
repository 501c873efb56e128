"""A question as it is taken from the caller, and as it is written for an offer."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router_client.errors import ConfigError
from router_client.images import Encoded
from router_client.local import Picture, Question
from router_client.offers import Offer


def question_of(text: str, images: Sequence[object], more: Mapping[str, Any]) -> Question:
    """The arguments of `Router.ask`, checked.

    Raises:
        ConfigError: for what cannot be asked.
    """
    if not text.strip():
        raise ConfigError("the question is empty")
    pictures: list[Picture] = []
    for picture in images:
        if not isinstance(picture, bytes | Path):
            raise ConfigError("an image is a file's Path or bytes: an address would have a third party fetch it")
        pictures.append(picture)
    question = Question(text, tuple(pictures), **more)
    if question.max_tokens < 1:
        raise ConfigError(f"max_tokens is {question.max_tokens}, want 1 or more")
    return question


def text_bytes(question: Question) -> int:
    """All that is sent of a question but images."""
    schema = "" if question.schema is None else json.dumps(question.schema)
    return len((question.text + question.system + schema).encode("utf-8", "replace"))


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
