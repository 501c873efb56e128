"""A model behind an endpoint that speaks OpenAI's chat completions, as a system that answers questions."""

import base64
import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import httpx2

from benchmarks.datasets import Item
from benchmarks.systems import Answer, Decoding
from runtimes.preprocess import load_image, to_rgb
from runtimes.runner import Floats

NEWER = "max_completion_tokens"  # what newer models of OpenAI want in place of max_tokens, and say so
MAX_BODY = 1 << 20  # bytes of a reply; an answer has a few hundred
SHOWN = 200  # characters of what an endpoint says that a message repeats
RETRIED = {408, 429, 500, 502, 503, 504}
MAX_WAIT_S = 60
LEAST_SECRET = 16  # a shorter key ("none", "EMPTY") is a word that an answer may hold


class EndpointError(RuntimeError):
    """An endpoint that does not answer, or not in the way of the protocol."""


class Endpoint:
    """A model behind an endpoint that speaks OpenAI's chat completions; what it sends is not trusted.

    The picture is sent as a PNG of the pixels that the others see before they cut it into tiles. Replies are read
    up to MAX_BODY bytes, redirections are not followed, and the key is taken out of everything that comes back.

    Args:
        url: the part before /chat/completions, such as https://host/v1.
        model: its name there.
        decoding: as the systems that it is compared with; tiles are its own affair.
        key: sent as a bearer token.
        timeout_s: for a connection, for each piece of a reply, and for a whole reply.
        attempts: how often a question is put before the endpoint is given up; the time between them doubles.
        wait: sleeps so many seconds.

    Raises:
        EndpointError: for a URL or a key that cannot be used.
    """

    def __init__(
        self,
        url: str,
        model: str,
        decoding: Decoding,
        key: str | None = None,
        *,
        timeout_s: float = 120,
        attempts: int = 6,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        try:
            parsed = httpx2.URL(url.rstrip("/") + "/chat/completions")
        except (httpx2.InvalidURL, TypeError) as exc:
            raise EndpointError(f"the endpoint is {url[:SHOWN]!r}, which is no URL: {exc}") from exc
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise EndpointError(f"the endpoint is {url[:SHOWN]!r}, want http:// or https:// and a host")
        if parsed.userinfo or parsed.query or parsed.fragment:
            raise EndpointError("the endpoint's URL holds a user, a query or a fragment: it is written into reports")
        self._key = key.strip() if key else None
        if self._key is not None and not (self._key and all("!" <= c <= "~" for c in self._key)):
            raise EndpointError("the endpoint's key is empty or holds characters that no header may")
        self._url, self._model, self._decoding = parsed, model, decoding
        self._timeout_s, self._attempts, self._wait = timeout_s, attempts, wait
        self._most = "max_tokens"  # how this endpoint calls the most tokens of an answer
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._client = httpx2.Client(headers=headers, timeout=timeout_s, follow_redirects=False)
        self.name = f"{model}, {parsed.host}"
        self.identity: dict[str, Any] = {
            "kind": "endpoint",
            "url": str(parsed),
            "model": model,
            "decoding": {key: value for key, value in asdict(decoding).items() if key != "tiles"},
        }

    def close(self) -> None:
        """Ends its connections."""
        self._client.close()

    def answer(self, item: Item) -> Answer:
        """As in `System`. Raises EndpointError when it is given up."""
        content: list[dict[str, Any]] = [{"type": "text", "text": self._decoding.question(item)}]
        if item.image:
            png = io.BytesIO()
            to_rgb(load_image(item.image)).save(png, "PNG")
            data = base64.b64encode(png.getvalue()).decode()
            content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
        try:
            return self._read(self._reply(self._request(content)))
        except EndpointError as exc:
            if self._most == NEWER or NEWER not in str(exc):
                raise
            self._most = NEWER
        return self._read(self._reply(self._request(content)))

    def _request(self, content: list[dict[str, Any]]) -> bytes:
        request = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            self._most: self._decoding.max_new_tokens,
            "temperature": 0,
        }
        return json.dumps(request).encode()

    def along(self, item: Item, reference: Answer) -> Floats | None:
        """None: an endpoint does not show its logits."""
        del item, reference
        return None

    def _reply(self, request: bytes) -> str:
        """The body of a reply whose status is 200."""
        for attempt in range(1, self._attempts + 1):
            delay = float(2 ** (attempt - 1))
            try:
                status, asked_for, body = self._post(request)
                if status == 200:
                    return body
                fault = f"status {status}: {self._shown(body)}"
                if status not in RETRIED:
                    raise EndpointError(f"{self._url}: {fault}")
                if asked_for.isdecimal() and len(asked_for) < 6:
                    delay = float(asked_for)
            except httpx2.TransportError as exc:
                fault = f"{type(exc).__name__}: {self._shown(str(exc))}"
            if attempt < self._attempts:
                self._wait(min(delay, MAX_WAIT_S))
        raise EndpointError(f"{self._url}: no answer after {self._attempts} attempts; the last: {fault}")

    def _post(self, request: bytes) -> tuple[int, str, str]:
        """Status, Retry-After and body of one reply."""
        until = time.monotonic() + self._timeout_s
        with self._client.stream("POST", self._url, content=request) as response:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise EndpointError(f"{self._url}: the reply is compressed, which was not asked for")
            body = bytearray()
            for piece in response.iter_raw():
                body += piece
                if len(body) > MAX_BODY:
                    raise EndpointError(f"{self._url}: the reply has more than {MAX_BODY:,} bytes")
                if time.monotonic() > until:
                    raise httpx2.ReadTimeout(f"the reply takes more than {self._timeout_s:g} s")
            return response.status_code, response.headers.get("retry-after", ""), body.decode("utf-8", "replace")

    def _read(self, body: str) -> Answer:
        """The answer in a reply's body: choices[0].message.content, where null (nothing said) is the empty text."""
        try:
            choice = json.loads(body)["choices"][0]
            content, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as exc:
            raise EndpointError(
                f"{self._url}: the reply has no choices[0].message.content ({type(exc).__name__}): {self._shown(body)}"
            ) from exc
        if content is not None and not isinstance(content, str):
            raise EndpointError(f"{self._url}: choices[0].message.content is {type(content).__name__}, want a text")
        text = (content or "").encode("utf-8", "replace").decode("utf-8").strip()
        if self._key and len(self._key) >= LEAST_SECRET:
            text = text.replace(self._key, "[key]")  # answers are kept in files
        return Answer(text, cut)

    def _shown(self, text: str) -> str:
        """The beginning of what came back, in one line of printable characters, without the key."""
        text = text.replace(self._key, "[key]") if self._key else text
        return "".join(c if c.isprintable() else " " for c in text[:SHOWN])
