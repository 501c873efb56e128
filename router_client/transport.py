"""One HTTP request with its deadlines, and the thread that makes every deadline hold.

Name resolution, TLS and servers that drip bytes have no deadline of their own, so a request runs in a thread that hands
over what arrives, and the caller waits no longer than it may. An abandoned request sends nothing any more: the first
byte leaves, or the request is given up, under one lock. Connections are not kept: on one that a server has closed
meanwhile nobody can tell whether the request was billed.
"""

import contextlib
import math
import socket
import threading
import time
import uuid
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from router_client.errors import AttemptFailed, Fault, classify, quiet, scrub
from router_client.policy import Backend, Policy
from router_client.stream import Chat, bad_stream
from router_client.worker import Worker

if TYPE_CHECKING:
    import httpx2

MOST_ERROR_BYTES = 2**16
MOST_CATALOGUE_BYTES = 2**23
AFTER_FINISH_S = 2.0  # that a whole answer waits for its usage
AFTER_REFUSAL_S = 1.0  # that a refusal waits for its words: its status has said enough
AFTER_S = 1.0  # the sockets' own limits come this much later: who waits decides which deadline has passed


class Abandoned(Exception):
    """Raised in the thread of a request that nobody waits for."""


@dataclass(frozen=True)
class Ready:
    """The client is loaded, and connects."""


@dataclass(frozen=True)
class Sent:
    """From here on the server may do work."""


@dataclass(frozen=True)
class Head:
    """A response begins; header names are in lower case."""

    status: int
    headers: dict[str, str]


Item = Ready | Sent | Head | bytes


@dataclass
class Exchange:
    """One request under way: what the caller wants to know of it at any time."""

    chat: Chat
    trace_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    sent: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    ttft_ms: float | None = None
    sock: socket.socket | None = field(default=None, repr=False)
    _given_up: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def send(self) -> None:
        """Called before the first byte leaves.

        Raises:
            Abandoned: if it must not.
        """
        with self._lock:
            if self._given_up:
                raise Abandoned
            self.sent = True

    def give_up(self) -> bool:
        """From here on nothing begins to be sent; whether something was before."""
        with self._lock:
            self._given_up = True
            return self.sent

    def close(self) -> None:
        """Ends it, whatever its thread waits for."""
        self.give_up()
        if self.sock is not None:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)


class Wire:
    """A backend's HTTP client."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._client: httpx2.Client | None = None
        self._lock = threading.Lock()

    def _http(self) -> "httpx2.Client":
        import httpx2

        with self._lock:
            if self._client is None:
                quiet("httpcore2")  # it logs the headers of responses
                limits = httpx2.Limits(max_keepalive_connections=0)
                self._client = httpx2.Client(trust_env=False, proxy=self._backend.proxy, limits=limits)
            return self._client

    def close(self) -> None:
        """Closes every connection."""
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _start(
        self, method: str, path: str, headers: dict[str, str], body: bytes, policy: Policy, exchange: Exchange
    ) -> Worker[Item]:
        url = self._backend.base_url.rstrip("/") + path
        read_s = max(policy.first_token_s, policy.idle_s)

        def run(put: Callable[[Item], None], stop: threading.Event) -> None:
            import httpx2  # here, since that and reading certificates take time on a small device

            client = self._http()
            timeout = httpx2.Timeout(read_s + AFTER_S, connect=policy.connect_s + AFTER_S)
            put(Ready())

            def trace(name: str, info: Any) -> None:
                if name.endswith(("connect_tcp.complete", "start_tls.complete")):
                    exchange.sock = info["return_value"].get_extra_info("socket")
                if name == "http11.send_request_headers.started":
                    exchange.send()
                    put(Sent())

            more = {"accept-encoding": "identity", **headers}
            extensions = {"trace": trace}
            with client.stream(
                method, url, headers=more, content=body, timeout=timeout, extensions=extensions
            ) as reply:
                put(Head(reply.status_code, {k.lower(): v for k, v in reply.headers.items()}))
                for data in reply.iter_raw():
                    if stop.is_set():
                        return
                    put(data)

        return Worker(run)

    def chat(
        self, exchange: Exchange, body: bytes, token: str, policy: Policy, left_s: Callable[[], float], now: float
    ) -> Generator[str, None, None]:
        """Sends a chat request; yields pieces of the answer as they arrive.

        Args:
            exchange: filled in on the way, and meaningful after any failure.
            body: JSON.
            token: "" sends none.
            policy: its deadlines.
            left_s: seconds left of the whole request.
            now: seconds since 1970.

        Raises:
            AttemptFailed: for everything that is no whole answer.
        """
        headers = {"content-type": "application/json", "accept": "text/event-stream"}
        headers["x-amzn-trace-id"] = exchange.trace_id
        if token:
            headers["authorization"] = f"Bearer {token}"
        if self._backend.bill_to:
            headers["x-hf-bill-to"] = self._backend.bill_to
        began = time.monotonic()
        plain = bytearray()
        streams, status = False, 0
        items = self._items("POST", "/chat/completions", headers, body, policy, left_s, exchange)
        for item in items:
            if isinstance(item, Head):
                status, exchange.headers = item.status, item.headers
                streams = 200 <= status < 300 and _check_head(item)
            elif streams:
                for piece in exchange.chat.feed(item):
                    if exchange.ttft_ms is None:
                        exchange.ttft_ms = (time.monotonic() - began) * 1000
                    if piece:
                        yield piece
                if exchange.chat.done:
                    items.close()
                    break
            else:
                plain += item
                if len(plain) > (MOST_ERROR_BYTES if status >= 300 else MOST_CATALOGUE_BYTES):
                    items.close()
                    break
        if status >= 300:
            raise AttemptFailed(classify(status, exchange.headers, bytes(plain), now=now, token=token))
        if not streams:
            piece = exchange.chat.whole(bytes(plain))
            exchange.ttft_ms = (time.monotonic() - began) * 1000
            if piece:
                yield piece
        exchange.chat.finish()

    def catalogue(self, policy: Policy, left_s: Callable[[], float], now: float) -> str:
        """The text of GET /models; no token is sent, since none is needed.

        Raises:
            AttemptFailed: if there is none.
        """
        body = bytearray()
        head: Head | None = None
        exchange = Exchange(Chat())
        for item in self._items("GET", "/models", {}, b"", policy, left_s, exchange):
            if isinstance(item, Head):
                head = item
            else:
                body += item
                if len(body) > MOST_CATALOGUE_BYTES:
                    raise AttemptFailed(Fault("catalogue_too_large", "network"))
        assert head is not None
        if head.status != 200:
            raise AttemptFailed(classify(head.status, head.headers, bytes(body), now=now))
        return body.decode("utf-8", "replace")

    def _items(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes,
        policy: Policy,
        left_s: Callable[[], float],
        exchange: Exchange,
    ) -> Generator[Head | bytes, None, None]:
        """What arrives, each within its deadline."""
        chat = exchange.chat
        worker = self._start(method, path, headers, body, policy, exchange)
        limit = math.inf
        refused = ended = False
        late = Fault("connect_timeout", "network")
        try:
            while True:
                wait_s, rest_s = limit - time.monotonic(), left_s()
                try:
                    item = worker.next(min(wait_s, rest_s))
                except TimeoutError:
                    if chat.finish_reason or refused:
                        return  # the answer is whole, only its usage is missing; or a refusal's words are
                    sent = exchange.give_up()
                    if rest_s < wait_s:
                        late = Fault("deadline", "request")
                    raise AttemptFailed(replace(late, maybe_billed=sent)) from None
                except Exception as exc:  # noqa: BLE001 -- whatever the client raises; it may quote what was sent
                    if chat.finish_reason or refused:
                        return
                    raise AttemptFailed(_broken(exc, exchange)) from None
                if item is None:
                    return
                if isinstance(item, Ready):
                    limit = time.monotonic() + policy.connect_s
                    continue
                if isinstance(item, Sent):
                    limit = time.monotonic() + policy.first_token_s
                    late = Fault("first_token_timeout", "offer", counts=True)
                    continue
                if isinstance(item, Head) and item.status >= 300:
                    refused, limit = True, time.monotonic() + AFTER_REFUSAL_S
                yield item
                if chat.finish_reason and not ended:  # once: comments may go on for long
                    ended, limit = True, time.monotonic() + min(AFTER_FINISH_S, policy.idle_s)
                elif not ended and exchange.ttft_ms is not None:
                    limit = time.monotonic() + policy.idle_s
                    late = Fault("idle_timeout", "offer", counts=True)
        finally:
            worker.close()
            exchange.close()


def _check_head(head: Head) -> bool:
    """Whether a good response streams; False for one in one piece."""
    kind = head.headers.get("content-type", "").partition(";")[0].strip().lower()
    if head.headers.get("content-encoding", "identity") != "identity":
        raise AttemptFailed(bad_stream("compressed, although that was not accepted"))
    if kind not in {"text/event-stream", "application/json"}:
        raise AttemptFailed(bad_stream(f"content type {scrub(kind)!r}"))
    return kind == "text/event-stream"


def _broken(exc: Exception, exchange: Exchange) -> Fault:
    """A failure of the connection. The exception's words are left out: they may quote the request."""
    kind = type(exc).__name__
    if not exchange.sent:
        return Fault("connect_timeout" if "Timeout" in kind else "connect", "network", kind)
    code = "truncated" if exchange.headers else "connection_lost"
    return Fault(code, "offer", kind, maybe_billed=True, counts=True)
