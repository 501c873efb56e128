"""A web server on this machine that misbehaves as it is told to, and bundles for it to serve."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from runtimes.bundle import Bundle, read_bundle, stage_bundle, write_manifest
from runtimes.manifest import Proof
from tests.fakes import byte_tokenizer, fake_manifest

DATA = "onnx/decoder_model_merged_q4.onnx_data"
FILES = {
    "config.json": b"{}",
    "onnx/decoder_model_merged_q4.onnx": b"graph" * 100,
    DATA: bytes(range(256)) * 1024,
    "tokenizer.json": b'{"a": 1}',
    "empty.txt": b"",
    "cases/cases.json": b"[]",
}
TEMPLATE = fake_manifest(byte_tokenizer())


def make_served(out: Path, *, version: int = 1, proven: bool = True, files: dict[str, bytes] = FILES) -> Bundle:
    """A bundle of small files; its report is of its payload."""
    manifest = replace(TEMPLATE, version=version)
    with stage_bundle(out) as folder:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        digest = write_manifest(folder, manifest).payload_digest
        if proven:
            (folder / "report.json").write_text(json.dumps({"payload_digest": digest}))
            write_manifest(folder, replace(manifest, proof=Proof("passed", "report.json")))
    return read_bundle(out, allow_pending=True)


@dataclass
class Asked:
    """A request that came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class Answer:
    """What is sent; the server fills in Content-Length unless it is among the headers."""

    status: int
    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False  # close the connection behind `content`, whatever was promised
    stall: bool = False  # say nothing more behind `content`


Serve = Callable[[Asked], Answer]


@dataclass
class Server:
    """A running server."""

    url: str
    asked: list[Asked]
    serve: Serve  # may be replaced

    def paths(self) -> list[str]:
        return [a.path for a in self.asked]


def folder_answer(folder: Path, asked: Asked, *, ranges: bool = True, etags: bool = True) -> Answer:
    """What an honest web server sends."""
    path = folder / unquote(urlsplit(asked.path).path).lstrip("/")
    if not path.is_file():
        return Answer(404)
    content = path.read_bytes()
    status = path.stat()
    headers = {"ETag": f'"{status.st_ino:x}-{status.st_mtime_ns:x}"'} if etags else {}
    wanted = asked.headers.get("range", "")
    if ranges and wanted and asked.headers.get("if-range", headers.get("ETag")) == headers.get("ETag"):
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(content):
            return Answer(416)
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return Answer(206, content[start:], headers)
    return Answer(200, content, headers)


@contextmanager
def serving(serve: Serve | Path) -> Iterator[Server]:
    """Serves a folder, or what a function answers, on a free port of 127.0.0.1."""
    stopping = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else b""
            body += self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked = Asked(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body)
            running.asked.append(asked)
            answer = running.serve(asked)
            self.send_response(answer.status)
            for name, value in ({"Content-Length": str(len(answer.content))} | answer.headers).items():
                self.send_header(name, value)
            self.end_headers()
            try:
                if self.command != "HEAD":
                    self.wfile.write(answer.content)
                if answer.stall:
                    self.wfile.flush()
                    stopping.wait(20)
            except OSError:
                self.close_connection = True  # the client went
            if answer.cut or answer.stall:
                self.close_connection = True

        def chunks(self) -> bytes:
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815  # http.server's names

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A client that was killed is part of the tests."""

    def serve_folder(asked: Asked) -> Answer:
        assert isinstance(serve, Path)
        return folder_answer(serve, asked)

    with Quiet(("127.0.0.1", 0), Handler) as server:
        running = Server(
            f"http://127.0.0.1:{server.server_address[1]}", [], serve_folder if isinstance(serve, Path) else serve
        )
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield running
        finally:
            stopping.set()
            server.shutdown()
            thread.join()
