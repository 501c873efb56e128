"""The wire of the server: who may ask, OpenAI's routes, requests in, events out. The entry is serve.py.

Not covered: what a request means (completions.py) and when it is answered (service.py).
"""

import asyncio
import hmac
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from runtimes.completions import ApiError, ChatRequest, Writer, read_request
from runtimes.service import Began, Ended, Event, Failed, Job, Piece, Service, internal

if TYPE_CHECKING:
    import uvicorn
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
BODY_S = 30.0  # for a request's body to come
SEND_S = 30.0  # for a client to take a piece of an answer
ALIVE_S = 15.0  # after so long without a piece a stream says that it is alive
GRACE_S = 10  # for the answer at work when the server ends
CONNECTIONS = 64


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Args:
        key: a bearer token that requests must bring; None: none is asked for.
        hosts: names in Host headers, without a port; empty: any.
        origins: of web pages that may ask.
    """

    key: str | None = None
    hosts: tuple[str, ...] = LOCAL_NAMES
    origins: tuple[str, ...] = ()

    def check(self, headers: dict[str, str], *, key: bool = True) -> None:
        """Raises ApiError unless a request with these headers (names in small letters) may be answered."""
        host, port = _split_port(headers.get("host", "").lower())
        if self.hosts and (host not in self.hosts or not port.isdigit()):
            raise ApiError(403, "the Host header names another machine; see --allow-host", "host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins:
            raise ApiError(403, "this web page may not ask; see --allow-origin", "origin_not_allowed")
        if self.key is None or not key:
            return
        given = headers.get("authorization", "")
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), f"Bearer {self.key}".encode()):
            raise ApiError(401, "the key is missing or wrong: Authorization: Bearer KEY", "invalid_api_key")


def _split_port(host: str) -> tuple[str, str]:
    name, colon, port = host.rpartition(":")
    return (name, port) if colon and not host.endswith("]") else (host, "0")


def make_app(service: Service, access: Access) -> "ASGIApp":
    """The application: routes, and the checks in front of them."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    born = int(time.time())
    modalities = ["text", "image"]
    modalities += [name for name, package in (("video", "av"), ("file", "pypdfium2")) if find_spec(package)]

    def model(name: str) -> dict[str, Any]:
        facts = {"id": name, "object": "model", "created": born, "owned_by": "smolport"}
        return facts | {
            "context_length": service.context,
            "architecture": {"input_modalities": modalities, "output_modalities": ["text"]},
        }

    async def health(_: Request) -> "Response":
        status = "ending" if service.closing else "ok"
        return JSONResponse({"status": status, "requests": service.taken}, 503 if service.closing else 200)

    async def models(_: Request) -> "Response":
        return JSONResponse({"object": "list", "data": [model(name) for name in service.names]})

    async def one_model(request: Request) -> "Response":
        name = request.path_params["name"]
        if name not in service.names:
            raise ApiError(404, "no such model; see /v1/models", "model_not_found", "model")
        return JSONResponse(model(name))

    async def api_error(_: Request, exc: Exception) -> "Response":
        assert isinstance(exc, ApiError)
        return error_response(exc)

    async def http_error(_: Request, exc: Exception) -> "Response":
        assert isinstance(exc, HTTPException)
        return error_response(ApiError(exc.status_code, f"{exc.detail}".lower(), "not_found"))

    async def unforeseen(*_: object) -> "Response":
        return error_response(ApiError(500, "an error of the server", "internal_error"))

    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/v1/chat/completions", Completions(service), methods=["POST"]),
        ],
        exception_handlers={ApiError: api_error, HTTPException: http_error, Exception: unforeseen},
    )

    async def guarded(scope: "Scope", receive: "Receive", send: "Send") -> None:
        """No request comes further that may not, and no error further than this."""
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        try:
            access.check(headers, key=scope["path"] != "/health")
            await app(scope, receive, send)
        except ApiError as exc:
            await error_response(exc)(scope, receive, send)
        except Exception as exc:  # noqa: BLE001  # uvicorn would log its words, and a request's may be among them
            service.log(internal(exc))  # Starlette has answered

    if not access.origins:
        return guarded
    return CORSMiddleware(
        guarded,
        allow_origins=access.origins,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type", *(f"x-stainless-{name}" for name in STAINLESS)],
    )


# What OpenAI's own client says about itself; in a browser each of these headers has to be allowed.
STAINLESS = (
    *("arch", "async", "custom-poll-interval", "helper-method", "lang", "os", "package-version", "poll-helper"),
    *("read-timeout", "retry-count", "runtime", "runtime-version", "stream-helper", "timeout"),
)


def error_response(error: ApiError) -> "Response":
    """An error as a response."""
    from starlette.responses import Response

    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(json.dumps(error.body()), error.status, headers, "application/json")


class Completions:
    """POST /v1/chat/completions, as an ASGI application: a response, or a stream of events."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answers one request; gives it up, and its place, when the client goes away."""
        job = self._service.enter()
        status = 499  # the client went away
        ended: Ended | None = None
        try:
            body = await _read_body(scope, receive, self._service.limits.body_bytes)
            request = await asyncio.to_thread(read_request, body, self._service.names, self._service.limits)
            del body
            job.start(request)
            answer = asyncio.ensure_future(self._answer(job, request, scope, receive, send))
            gone = asyncio.ensure_future(_gone(receive))
            try:
                await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
                if answer.done():
                    status, ended = answer.result()
            finally:
                for task in (answer, gone):
                    task.cancel()
                await asyncio.gather(answer, gone, return_exceptions=True)
        except ApiError as exc:
            status = exc.status
            raise
        except (TimeoutError, OSError):
            pass  # the client takes nothing any more
        finally:
            job.stop()
            self._service.log(_line(status, job, ended))

    async def _answer(
        self, job: Job, request: ChatRequest, scope: "Scope", receive: "Receive", send: "Send"
    ) -> tuple[int, Ended | None]:
        """Sends the answer or the error; the status for the log, and what the answer was."""
        first = await job.events.get()
        if isinstance(first, Failed):
            raise first.error
        assert isinstance(first, Began)
        writer = Writer(request.model, self._service.fingerprint, request.include_usage)
        if request.stream:
            return await _send_stream(job, request, writer, send)
        text, entries = "", list[dict[str, Any]]()
        while isinstance(event := await job.events.get(), Piece):
            text += event.text
            entries += event.entries
        if isinstance(event, Failed):
            raise event.error
        assert isinstance(event, Ended)
        whole = writer.completion(text, event.finish_reason, event.usage, entries if request.logprobs else None)
        from starlette.responses import Response

        await Response(json.dumps(whole), media_type="application/json")(scope, receive, send)
        return 200, event


async def _send_stream(job: Job, request: ChatRequest, writer: Writer, send: "Send") -> tuple[int, Ended | None]:
    """Server-sent events, an error in the middle among them."""

    async def put(data: str) -> None:
        async with asyncio.timeout(SEND_S):
            await send({"type": "http.response.body", "body": data.encode(), "more_body": True})

    async def put_json(value: dict[str, Any]) -> None:
        await put(f"data: {json.dumps(value)}\n\n")

    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await put_json(writer.chunk({"role": "assistant", "content": ""}))
    while True:
        try:
            event: Event = await asyncio.wait_for(job.events.get(), ALIVE_S)
        except TimeoutError:
            await put(": at work\n\n")
            continue
        if not isinstance(event, Piece):
            break
        entries = list(event.entries) if request.logprobs else None
        await put_json(writer.chunk({"content": event.text}, None, entries))
    if isinstance(event, Ended):
        await put_json(writer.chunk({}, event.finish_reason))
        if request.include_usage:
            await put_json(writer.usage(event.usage))
        await put("data: [DONE]\n\n")
    elif isinstance(event, Failed):
        await put_json(event.error.body())
    await send({"type": "http.response.body", "body": b"", "more_body": False})
    return (
        (200, event) if isinstance(event, Ended) else (event.error.status if isinstance(event, Failed) else 500, None)
    )


async def _read_body(scope: "Scope", receive: "Receive", most: int) -> bytes:
    """The body. Raises ApiError for one that is too large, too slow, compressed or no JSON by its header."""
    headers = {k.decode("latin-1"): v.decode("latin-1").strip().lower() for k, v in scope["headers"]}
    if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ApiError(415, "Content-Type must be application/json", "unsupported_media_type")
    if headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "a compressed body is not accepted", "unsupported_media_type")
    large = ApiError(413, f"the body is larger than {most:,} bytes", "request_too_large")
    length = headers.get("content-length", "0")
    if not length.isdigit() or int(length) > most:
        raise large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise OSError("the client went away")
                body += message.get("body", b"")
                if len(body) > most:
                    raise large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError as exc:
        raise ApiError(408, f"the body did not come within {BODY_S:g} s", "request_timeout") from exc


async def _gone(receive: "Receive") -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _line(status: int, job: Job, ended: Ended | None) -> str:
    """About a request, for the log."""
    total = time.perf_counter() - job.entered
    line = f"{time.strftime('%H:%M:%S')} {status}"
    if ended is None:
        return f"{line} after {total:.2f} s"
    counts = f"{ended.tiles} tiles, {ended.usage.prompt} + {ended.usage.completion} tokens ({ended.finish_reason})"
    times = f"waited {job.began - job.entered:.2f} s, first token after {ended.first_token_s:.2f} s, all {total:.2f} s"
    return f"{line} {counts}; {times}"


def make_server(service: Service, access: Access, on_ready: Callable[[], None] = lambda: None) -> "uvicorn.Server":
    """A server that ends with the service: first what waits is refused, then what is at work gets GRACE_S."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

    class Connection(H11Protocol):
        """Closed if a request's head does not come within BODY_S."""

        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._between():
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._patience:
                self._patience.cancel()
            super().connection_lost(exc)

        def _between(self) -> bool:
            cycle: RequestResponseCycle | None = self.cycle  # None before the first request, whatever its type says
            return cycle is None or cycle.response_complete

        def _wait(self) -> None:
            if self._patience is None:
                self._patience = self.loop.call_later(BODY_S, self._give_up)

        def _give_up(self) -> None:
            self._patience = None
            if self._between():
                self.transport.close()

    class Ending(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            service.close()
            await super().shutdown(sockets)
            await asyncio.to_thread(service.join)

    return Ending(
        uvicorn.Config(
            make_app(service, access),
            http=Connection,
            ws="none",
            loop="asyncio",
            lifespan="off",
            access_log=False,
            log_level="critical",  # what went wrong is in our own lines
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=GRACE_S,
        )
    )
