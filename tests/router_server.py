"""A server on loopback that speaks the router's protocol and every fault of it, over real sockets.

The part of a model's name behind the slash says what a request for it meets: "test/eof_no_finish:alpha". Provider beta
always answers well. Every request is kept.
"""

import json
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

STALL_S = 3.0
SECRET = "tok-3f9aQz81"


@dataclass(frozen=True)
class Received:
    """A request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def model(self) -> str:
        """Of a chat request."""
        return str(json.loads(self.body)["model"])


def event(value: object, end: bytes = b"\n\n", start: bytes = b"data: ") -> bytes:
    """One server-sent event."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return start + text.encode() + end


def chunk(content: str | None = None, finish: str | None = None, **more: object) -> dict[str, Any]:
    """One chat completion chunk."""
    delta = {} if content is None else {"content": content}
    return {"id": "c", "model": "served-m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


USAGE = {"prompt_tokens": 1093, "completion_tokens": 9, "total_tokens": 1102}
START = [chunk(""), chunk("It reads "), chunk("42 psi ✓.")]
END = [chunk(finish="stop"), {"choices": [], "usage": USAGE, "time_info": {"queue_time": 0.1}}, "[DONE]"]
TEXT = "It reads 42 psi ✓."
GOOD = b"".join(map(event, [*START, *END]))

STREAMS: dict[str, bytes] = {
    "ok": GOOD,
    "ok_stream_A": GOOD,
    "ok_stream_B": b"".join(map(event, [*START, chunk(finish="stop", usage=USAGE)])),
    "no_usage": b"".join(map(event, [*START, chunk(finish="stop"), "[DONE]"])),
    "comment": b": OPENROUTER PROCESSING\n\n" + GOOD.replace(b"\n\n", b"\n\n: keep-alive\n\n"),
    "data_nospace": GOOD.replace(b"data: ", b"data:"),
    "crlf": GOOD.replace(b"\n", b"\r\n"),
    "multi_line_data": GOOD.replace(b', "choices"', b',\ndata: "choices"'),
    "inband_err_obj": event(START[1]) + event({"error": {"message": "provider blew up", "code": 502}}),
    "inband_err_str": event(START[1]) + event({"error": "upstream timed out", "error_type": "overloaded"}),
    "event_error": event(START[1]) + event({"message": "upstream timed out"}, start=b"event: error\ndata: "),
    "eof_no_finish": b"".join(map(event, START)),
    "done_no_finish": b"".join(map(event, [*START, "[DONE]"])),
    "reasoning_only": event({"choices": [{"delta": {"content": None, "reasoning": TEXT}}]}) + b"".join(map(event, END)),
    "newline_then_reasoning": event(chunk("\n\n"))
    + event({"choices": [{"delta": {"reasoning_content": TEXT}}]})
    + b"".join(map(event, END)),
    "empty_choices": event({"choices": []}) + event("[DONE]"),
}

DEPLETED = "You have depleted your monthly included credits. Purchase pre-paid credits to continue."
NO_RIGHT = (
    "This authentication method does not have sufficient permissions to call Inference Providers on behalf of {} me"
)
RATE = {"error": {"message": "Rate limit exceeded", "type": "rate_limit_error", "code": "rate_limit_exceeded"}}
NOT_ENABLED = {
    "error": {
        "message": "The requested model 'x/y' is not supported by any provider you have enabled.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_supported",
    }
}
NOT_FOUND = {"error": {"message": "The requested model 'x/y' does not exist.", "code": "model_not_found"}}
PARAMETER = {"message": "max_tokens and max_completion_tokens cannot both be set", "code": "wrong_api_format"}
ERRORS: dict[str, tuple[int, object, dict[str, str]]] = {
    "401": (401, {"error": "Invalid username or password."}, {"www-authenticate": 'Bearer realm="Authentication"'}),
    "401_html": (401, "<html>Sign in</html>", {"content-type": "text/html"}),
    "402": (402, {"error": DEPLETED}, {}),
    "403": (403, {"error": NO_RIGHT.format("user")}, {}),
    "403_org": (403, {"error": NO_RIGHT.format("org")}, {}),
    "403_gated": (403, {"error": "You cannot access this model unless the model owner gives you access."}, {}),
    "400_not_supported": (400, NOT_ENABLED, {}),
    "400_not_found": (400, NOT_FOUND, {}),
    "400_provider": (400, {"error": "Model not supported by provider together"}, {}),
    "404": (404, {"error": "Model x not found."}, {}),
    "400_param": (400, PARAMETER, {}),
    "422_param": (422, PARAMETER, {}),
    "400_image": (400, {"error": {"message": "image_url content is not supported by this model"}}, {}),
    "413": (413, "<html>nginx</html>", {"content-type": "text/html"}),
    "429": (429, RATE, {}),
    "429_title": (429, {"status": 429, "title": "Too Many Requests"}, {}),
    "429_retry_after_s": (429, RATE, {"retry-after": "7"}),
    "429_ratelimit_hdr": (429, RATE, {"ratelimit": '"api";r=0;t=55', "ratelimit-policy": '"fixed window";"api";q=500'}),
    "408": (408, "", {}),
    "500": (500, {"error": "Internal Error, please report to us"}, {}),
    "502": (502, "<html>bad gateway</html>", {"content-type": "text/html"}),
    "503": (503, {"error": "Service Unavailable"}, {}),
    "504": (504, "", {}),
    "529": (529, "", {}),
    "302": (302, "", {"location": "http://127.0.0.1:1/elsewhere"}),
    "echo_token": (500, {"error": f"bad header Authorization: Bearer {SECRET} and {SECRET}"}, {}),
    "html_200": (200, "<html>hello</html>", {"content-type": "text/html"}),
    "json_error_200": (200, {"error": "nope"}, {"content-type": "application/json"}),
    "json_empty_choices": (200, {"choices": []}, {"content-type": "application/json"}),
    "gzip_200": (200, "x", {"content-type": "text/event-stream", "content-encoding": "gzip"}),
    "json_200": (
        200,
        {"model": "served-m", "usage": USAGE, "choices": [{"message": {"content": TEXT}, "finish_reason": "stop"}]},
        {"content-type": "application/json"},
    ),
}


@dataclass
class Router:
    """The server's side: what to answer, and what was received."""

    now: Callable[[], float] = time.time
    catalogue: bytes | int = 500  # a status is answered as an error
    received: list[Received] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    stop: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    @property
    def base_url(self) -> str:
        """For a backend."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def chats(self) -> list[Received]:
        """Chat requests alone."""
        return [r for r in self.received if r.method == "POST"]

    def offer(self, scenario: str, *providers: str, price: object = (1.0, 1.5), **more: object) -> None:
        """Makes the catalogue list a scenario's model at the providers, each dearer than the one before."""
        rows = []
        for n, provider in enumerate(providers):
            row: dict[str, object] = {"provider": provider, "status": "live", "context_length": 4096, **more}
            if isinstance(price, tuple):
                row["pricing"] = {"input": price[0] * (n + 1), "output": price[1] * (n + 1)}
            rows.append(row)
        model = {"id": f"test/{scenario}", "architecture": {"input_modalities": ["image", "text"]}, "providers": rows}
        self.catalogue = json.dumps({"object": "list", "data": [model]}).encode()

    def answer(self, request: Received, sock: socket.socket) -> None:
        """Writes what the scenario says."""
        if request.method == "GET":
            status, body = (200, self.catalogue) if isinstance(self.catalogue, bytes) else (self.catalogue, b"{}")
            sock.sendall(head(status, {"content-type": "application/json", "content-length": str(len(body))}) + body)
            return
        name, _, provider = request.model.removeprefix("test/").partition(":")
        self.counts[request.model] += 1
        if provider == "beta":
            name = "ok"
        if name.endswith("_then_ok"):
            name = name.removesuffix("_then_ok") if self.counts[request.model] == 1 else "ok"
        self.meet(name, provider, request, sock)

    def meet(self, name: str, provider: str, request: Received, sock: socket.socket) -> None:
        """One scenario."""
        request_id = f"req-{request.headers.get('x-amzn-trace-id', '')[:8]}"
        headers = {"content-type": "text/event-stream", "x-inference-provider": provider, "x-request-id": request_id}
        if name == "429_retry_after_date":
            fail(sock, 429, RATE, {"retry-after": formatdate(self.now() + 9, usegmt=True)})
            return
        if name in ERRORS:
            fail(sock, *ERRORS[name])
            return
        if name in {"402_stalls", "401_cut"}:
            sock.sendall(head(int(name[:3]), {"content-length": "500"}) + b'{"error": "no')
            if name == "402_stalls":
                self.stop.wait(STALL_S)
            return
        if name == "503_wish_of_gamma":
            fail(sock, 503, {"error": "x"}, {"retry-after": "50"} if provider == "gamma" else {})
            return
        if name == "stall_before_headers":
            self.stop.wait(STALL_S)
            return
        if name in {"wrong_provider_header", "wrong_provider_known"}:
            headers["x-inference-provider"] = "beta" if name == "wrong_provider_known" else "gamma"
        if name == "model_key_first" and not request.body.startswith(b'{"model"'):
            name = "eof_no_finish"
        if name == "billing_header_echo":
            headers["x-hf-warning"] = f"billing; paid by {request.headers.get('x-hf-bill-to')} {SECRET}"
        sock.sendall(head(200, {**headers, "transfer-encoding": "chunked"}))
        self.body(name, sock)

    def body(self, name: str, sock: socket.socket) -> None:
        """Of a response that began well."""
        match name:
            case "stall_before_first":
                sock.sendall(chunked(b": hello\n\n"))
                self.stop.wait(STALL_S)
            case "stall_mid":
                sock.sendall(chunked(b"".join(map(event, START))))
                self.stop.wait(STALL_S)
            case "stall_after_finish":
                sock.sendall(chunked(b"".join(map(event, [*START, END[0]]))))
                self.stop.wait(STALL_S)
            case "comments_after_finish":
                sock.sendall(chunked(b"".join(map(event, [*START, END[0]]))))
                while not self.stop.wait(0.05):
                    sock.sendall(chunked(b": keep-alive\n\n"))
            case "flood":
                while not self.stop.is_set():
                    sock.sendall(chunked(event(chunk("ab")) * 500))
                    self.counts["flooded"] += 1
            case "slow_drip":
                for _ in range(int(STALL_S / 0.05)):
                    sock.sendall(chunked(event(chunk("a"))))
                    if self.stop.wait(0.05):
                        return
            case "tcp_reset":
                sock.sendall(chunked(b"".join(map(event, START))))
                time.sleep(0.05)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            case "incomplete_chunk":
                sock.sendall(chunked(b"".join(map(event, START)))[:-9])
            case "utf8_split":
                for byte in GOOD:
                    sock.sendall(chunked(bytes([byte])))
                sock.sendall(b"0\r\n\r\n")
            case _:
                sock.sendall(chunked(STREAMS.get(name, GOOD)) + b"0\r\n\r\n")


def fail(sock: socket.socket, status: int, value: object, headers: Mapping[str, str]) -> None:
    """Writes a response in one piece."""
    body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
    more = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    sock.sendall(head(status, more) + body)


def head(status: int, headers: Mapping[str, str]) -> bytes:
    """The start of a response."""
    lines = [f"HTTP/1.1 {status} X", "connection: close", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def chunked(data: bytes) -> bytes:
    """One chunk of a body."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def serve(router: Router) -> socketserver.ThreadingTCPServer:
    """Starts a server of it; shut it down."""

    class Handler(socketserver.StreamRequestHandler):
        """One request a connection."""

        def handle(self) -> None:
            line = self.rfile.readline().decode()
            if not line:
                return
            method, path, _ = line.split(" ")
            headers = {}
            while (text := self.rfile.readline().decode().strip()) != "":
                key, _, value = text.partition(":")
                headers[key.lower()] = value.strip()
            body = self.rfile.read(int(headers.get("content-length", "0")))
            request = Received(method, path, headers, body)
            router.received.append(request)
            try:
                router.answer(request, self.connection)
            except (BrokenPipeError, ConnectionResetError):
                return  # the client went away, as it may

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

        def shutdown_request(self, request: Any) -> None:
            if getattr(request, "fileno", lambda: -1)() >= 0:
                linger = request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
                if struct.unpack("ii", linger) == (1, 0):  # a reset is wanted, and no orderly end
                    request.close()
                    return
            super().shutdown_request(request)

    server = Server(("127.0.0.1", 0), Handler)
    router.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server
