"""OpenAI's chat completions: what of a request is understood, and what is sent back. No server: see serve.py.

A request is hostile until `read_request` has returned it: sizes are bounded, every parameter is known, images are
data URLs whose header says that they are images of an accepted format and size; videos and PDFs are data URLs of such
a type, and looked into when their turn comes. What is accepted, ignored and refused
is in three tables below; a parameter that is null counts as not given.

Not covered: tools, JSON schemas, several choices, audio: each is refused by name, since leaving it out would change
the answer.
"""

import base64
import binascii
import json
import math
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtimes.generate import Sampling, Token
from runtimes.pdf import PdfError
from runtimes.preprocess import ImageError, check_image
from runtimes.prompt import IMAGE, PromptEncoder
from runtimes.runner import ContextError, InputError
from runtimes.video import VideoError

READ = {
    *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop"),
    *("stream", "stream_options", "logprobs", "top_logprobs"),
    *("top_k", "repetition_penalty"),  # not OpenAI's; the sampler has them
}
IGNORED = {  # they do not change what is answered
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "reasoning_effort", "verbosity"),
}
REFUSED: dict[str, tuple[Any, ...]] = {  # unless they have one of these values, which ask for nothing
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
IMAGE_TYPES = {  # media types, with Pillow's name of the format
    "image/png": "PNG",
    "image/jpeg": "JPEG",
    "image/jpg": "JPEG",
    "image/webp": "WEBP",
    "image/gif": "GIF",
}
VIDEO_TYPES = (
    *("video/mp4", "video/quicktime", "video/webm", "video/x-matroska", "video/matroska", "video/x-msvideo"),
    *("video/avi", "video/mp2t", "video/3gpp"),
)
FILE_TYPES = ("application/pdf",)
IMAGE_FORMATS = tuple(sorted(set(IMAGE_TYPES.values())))
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
DETAILS = ("auto", "low", "high")
LEAST_TEMPERATURE = 1e-3  # below it a division would leave fp32; the best token is all that is left anyway
MOST_STOPS, MOST_STOP_CHARACTERS, MOST_TOP = 4, 256, 20
SHOWN = 60  # characters of a request's own words that a message repeats


class ApiError(Exception):
    """What a client is told in place of an answer.

    Args:
        status: of HTTP.
        message: one line.
        code: a word that programs compare.
        param: the parameter at fault.
        retry_after_s: when to try again.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    body_bytes: int = 20 << 20
    images: int = 16  # pages of PDFs among them
    video_seconds: int = 3600
    pixels: int = 50_000_000  # of one image
    messages: int = 512
    new_tokens: int = 1024  # also where none are asked for


@dataclass(frozen=True)
class Picture:
    """An image as it came: checked, not decoded; `low` asks for a single tile."""

    data: bytes
    low: bool


@dataclass(frozen=True)
class Video:
    """A video as it came, not looked into."""

    data: bytes


@dataclass(frozen=True)
class Document:
    """A PDF as it came, not looked into; each page is an image."""

    data: bytes


Part = str | Picture | Video | Document


@dataclass(frozen=True)
class ChatMessage:
    """A turn as it came."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class ChatRequest:
    """A request that can be answered, unless its prompt is beyond the context or an image is damaged."""

    model: str
    messages: tuple[ChatMessage, ...]
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    logprobs: bool
    top: int  # of the most likely tokens, log-probabilities to send along


def refuse(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """An error of the request, at a parameter."""
    return ApiError(400, f"{param}: {message}", code, param)


def read_request(body: bytes, models: Sequence[str], limits: Limits) -> ChatRequest:
    """A request's body -> what it asks for.

    Args:
        body: as it came.
        models: the names that the model goes by.
        limits: beyond them a request is refused.

    Raises:
        ApiError: naming the parameter, what was found and what was wanted.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise ApiError(400, f"the body is not JSON: {_short(exc)}", "invalid_json") from exc
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body is a JSON {_kind(fields)}, want an object", "invalid_json")
    fields = {name: value for name, value in fields.items() if value is not None}
    for name, value in fields.items():
        if name in REFUSED:
            if isinstance(value, bool) or value not in REFUSED[name]:  # True would equal 1
                raise refuse(name, "is not supported", "unsupported_parameter")
        elif name not in READ | IGNORED:
            raise refuse(_short(name), "is not a parameter that is known here", "unknown_parameter")
    model = _get(fields, "model", str)
    if model not in models:
        message = f"the model {_short(model)!r} does not exist, want {' or '.join(models)}"
        raise ApiError(404, message, "model_not_found", "model")
    options = _get(fields, "stream_options", dict, {})
    if unknown := options.keys() - {"include_usage", "include_obfuscation"}:
        raise refuse(f"stream_options.{_short(min(unknown))}", "is not known here", "unknown_parameter")
    stream = _get(fields, "stream", bool, False)
    if options and not stream:
        raise refuse("stream_options", "is for streams; stream is not true")
    logprobs, top = _get(fields, "logprobs", bool, False), _get(fields, "top_logprobs", int, 0)
    if not 0 <= top <= MOST_TOP:
        raise refuse("top_logprobs", f"is {top}, want 0 to {MOST_TOP}")
    if top and not logprobs:
        raise refuse("top_logprobs", "needs logprobs to be true")
    return ChatRequest(
        model=model,
        messages=_messages(fields, limits),
        sampling=_sampling(fields, limits),
        stops=_stops(fields),
        stream=stream,
        include_usage=_get(options, "include_usage", bool, False, "stream_options.include_usage"),
        logprobs=logprobs,
        top=top,
    )


def _sampling(fields: Mapping[str, Any], limits: Limits) -> Sampling:
    most = [_get(fields, name, int) for name in ("max_completion_tokens", "max_tokens") if name in fields]
    if len(set(most)) > 1:
        raise refuse("max_tokens", "and max_completion_tokens differ: give one")
    for count in most:
        if count < 1:
            raise refuse(
                "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens", "want 1 or more"
            )
    temperature, top_p = _number(fields, "temperature", 0.0), _number(fields, "top_p", 1.0)
    if not 0 <= temperature <= 2:
        raise refuse("temperature", f"is {temperature:g}, want 0 to 2")
    if not 0 <= top_p <= 1:
        raise refuse("top_p", f"is {top_p:g}, want 0 to 1")
    top_k = _get(fields, "top_k", int, 0)
    penalty = _number(fields, "repetition_penalty", 1.0)
    if not 0.01 <= penalty <= 100:
        raise refuse("repetition_penalty", f"is {penalty:g}, want 0.01 to 100")
    seed = _get(fields, "seed", int, secrets.randbits(63))
    return Sampling(
        max_new_tokens=min([limits.new_tokens, *most]),
        temperature=temperature if temperature >= LEAST_TEMPERATURE else 0.0,
        top_k=max(top_k, 0),  # clients write -1 for no limit too
        top_p=max(top_p, 1e-6),
        repetition_penalty=penalty,
        seed=seed % (1 << 64),
    )


def _stops(fields: Mapping[str, Any]) -> tuple[str, ...]:
    found = fields.get("stop", [])
    stops = [found] if isinstance(found, str) else found
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise refuse("stop", "want a string or a list of strings")
    if len(stops) > MOST_STOPS or not all(1 <= len(s) <= MOST_STOP_CHARACTERS for s in stops):
        raise refuse("stop", f"want at most {MOST_STOPS} strings of 1 to {MOST_STOP_CHARACTERS} characters")
    return tuple(stops)


def _messages(fields: Mapping[str, Any], limits: Limits) -> tuple[ChatMessage, ...]:
    found = _get(fields, "messages", list)
    if not 1 <= len(found) <= limits.messages:
        raise refuse("messages", f"has {len(found)} elements, want 1 to {limits.messages}")
    messages = []
    for i, message in enumerate(found):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise refuse(where, f"is a JSON {_kind(message)}, want an object")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise refuse(f"{where}.role", f"is {_short(role)!r}, want one of {', '.join(ROLES)}")
        for name in ("tool_calls", "function_call", "audio"):
            if message.get(name):
                raise refuse(f"{where}.{name}", "is not supported", "unsupported_parameter")
        messages.append(ChatMessage(ROLES[role], _parts(message.get("content"), f"{where}.content", role, limits)))
    parts = [part for message in messages for part in message.parts]
    images = sum(isinstance(part, (Picture, Document)) for part in parts)
    videos = sum(isinstance(part, Video) for part in parts)
    if images > limits.images:
        raise refuse("messages", f"hold {images} images, at most {limits.images} are accepted", "too_many_images")
    if videos > 1 or (videos and images):
        held = f"{videos} videos" if videos > 1 else "images and a video"
        raise refuse("messages", f"hold {held}: the model knows images, or one video", "unsupported_content")
    return tuple(messages)


def _parts(content: Any, where: str, role: str, limits: Limits) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (_text(content, where),)
    if not isinstance(content, list) or not content:
        raise refuse(where, "want a string, or a list of parts")
    parts: list[Part] = []
    for i, part in enumerate(content):
        at = f"{where}[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            parts.append(_text(part.get("text"), f"{at}.text"))
        elif kind == "image_url" and role == "user":
            parts.append(_picture(part.get("image_url"), f"{at}.image_url", limits))
        elif kind == "video_url" and role == "user":
            url = _url(part.get("video_url"), f"{at}.video_url")
            parts.append(Video(read_data_url(url, VIDEO_TYPES, f"{at}.video_url.url")))
        elif kind == "file" and role == "user":
            parts.append(_document(part.get("file"), f"{at}.file"))
        else:
            wanted = "text, image_url, video_url or file" if role == "user" else "text"
            raise refuse(f"{at}.type", f"is {_short(kind)!r}, want {wanted} in a message of role {role}")
    return tuple(parts)


def _text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise refuse(where, f"is a JSON {_kind(text)}, want a string")
    if not text.isascii() and any(0xD800 <= ord(c) <= 0xDFFF for c in text):
        raise refuse(where, "holds half a character (a lone surrogate)")
    if IMAGE in text:
        raise refuse(where, f"spells the token {IMAGE}; give the image as a part")
    return text


def _picture(given: Any, where: str, limits: Limits) -> Picture:
    url = _url(given, where)
    detail = given.get("detail") or "auto"
    if detail not in DETAILS:
        raise refuse(f"{where}.detail", f"is {_short(detail)!r}, want one of {', '.join(DETAILS)}")
    data = read_data_url(url, IMAGE_TYPES, f"{where}.url")
    try:
        check_image(data, limits.pixels, IMAGE_FORMATS)
    except ImageError as exc:
        raise refuse(f"{where}.url", str(exc), "invalid_image") from exc
    return Picture(data, detail == "low")


def _url(given: Any, where: str) -> str:
    url = given.get("url") if isinstance(given, dict) else None
    if not isinstance(url, str):
        raise refuse(where, "want an object with a url")
    return url


def _document(given: Any, where: str) -> Document:
    data = given.get("file_data") if isinstance(given, dict) else None
    if not isinstance(data, str):
        raise refuse(
            where, "want an object with file_data; no files are kept here, so no file_id", "unsupported_content"
        )
    return Document(read_data_url(data, FILE_TYPES, f"{where}.file_data"))


def read_data_url(url: str, types: Iterable[str], where: str) -> bytes:
    """The content of data:TYPE;base64,CONTENT.

    Raises:
        ApiError: for any other URL (none is fetched), another type, or content that is no base64.
    """
    if not url[:5].lower() == "data:":
        raise refuse(where, "is not a data URL; nothing is fetched from elsewhere", "remote_url_refused")
    head, comma, content = url[5:].partition(",")
    kind, _, rest = head.partition(";")
    if kind.lower() not in types:
        raise refuse(where, f"is of type {_short(kind)!r}, want one of {', '.join(types)}", "unsupported_type")
    if not comma or rest.rpartition(";")[2].strip().lower() != "base64":
        raise refuse(where, "want data:TYPE;base64,CONTENT", "invalid_data_url")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise refuse(where, "its content is not base64", "invalid_data_url") from exc


def from_input_error(exc: InputError | ImageError) -> ApiError:
    """The error of a request that turned out to be none that can be run."""
    if isinstance(exc, ContextError):
        return ApiError(400, str(exc), "context_length_exceeded", "messages")
    code = "invalid_value"
    for kind, name in ((VideoError, "invalid_video"), (PdfError, "invalid_file"), (ImageError, "invalid_image")):
        if isinstance(exc, kind):
            code = name
            break
    return ApiError(400, str(exc), code, "messages")


def _get(fields: Mapping[str, Any], name: str, kind: type, default: Any = None, where: str = "") -> Any:
    """A field of a type; bool is no int. Raises ApiError, also where it is missing and has no default."""
    value = fields.get(name)
    if value is None:
        if default is None:
            raise refuse(where or name, "is missing", "missing_required_parameter")
        return default
    if type(value) is not kind:
        wanted = {str: "string", int: "integer", bool: "boolean", dict: "object", list: "array"}[kind]
        raise refuse(where or name, f"is a JSON {_kind(value)}, want {wanted}", "invalid_type")
    return value


def _number(fields: Mapping[str, Any], name: str, default: float) -> float:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise refuse(name, f"is a JSON {_kind(value)}, want a number", "invalid_type")
    return float(value) if abs(value) < 1e300 else math.nan


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _short(value: object) -> str:
    """What is repeated of a request's own words: printable, encodable, short."""
    text = str(value)[:SHOWN].encode("ascii", "backslashreplace").decode()
    return "".join(c if c.isprintable() else "?" for c in text)


# ---- what is sent back


@dataclass(frozen=True)
class Usage:
    """Tokens of a request and its answer; those sampled include the one that ended it."""

    prompt: int
    completion: int
    image: int  # of the prompt

    def body(self) -> dict[str, Any]:
        """OpenAI's usage object; image_tokens is an addition."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": self.image},
        }


@dataclass(frozen=True)
class Writer:
    """Writes the answer to one request as objects of OpenAI's API."""

    model: str
    fingerprint: str  # of the bundle
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(
        self, text: str, finish_reason: str, usage: Usage, logprobs: list[dict[str, Any]] | None
    ) -> dict[str, Any]:
        """The whole answer."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None},
            "finish_reason": finish_reason,
        }
        return self._head("chat.completion") | {"choices": [choice], "usage": usage.body()}

    def chunk(
        self,
        delta: dict[str, str],
        finish_reason: str | None = None,
        logprobs: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """A piece of a stream."""
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None},
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self.include_usage else {}
        return self._head("chat.completion.chunk") | {"choices": [choice]} | usage

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The last piece of a stream that was asked to include usage."""
        return self._head("chat.completion.chunk") | {"choices": [], "usage": usage.body()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def token_entry(encoder: PromptEncoder, token: Token) -> dict[str, Any]:
    """OpenAI's object for a token with its log-probability.

    `bytes` is exact, and null for a special token, which is in no text; `token` is its name, or text as far as the
    bytes are (a character may be spread over several). The first token of an answer begins with the space that the
    message leaves out.
    """
    top = [_token(encoder, *pair) for pair in token.top]
    return _token(encoder, token.id, token.logprob) | {"top_logprobs": top}


def _token(encoder: PromptEncoder, token: int, logprob: float) -> dict[str, Any]:
    data = encoder.token_bytes(token)
    if data is None:
        return {"token": encoder.tokenizer.id_to_token(token) or "", "logprob": logprob, "bytes": None}
    return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}
