"""Serves a folder that runtimes.web.build made, on this machine alone, with the headers that a real host should send.

To try a page, not to publish one: it speaks HTTP, on 127.0.0.1 alone. README.md has the headers for other servers.
"""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
# What index.html says of itself in a <meta>, and for the page alone: who may frame it.
POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'"
)
HEADERS = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
ISOLATION = {  # lets WebAssembly use threads
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    "": "application/octet-stream",
}


class Handler(SimpleHTTPRequestHandler):
    """GET and HEAD of files in one folder; no listings."""

    extensions_map = TYPES

    def __init__(self, *args: Any, headers: dict[str, str], seen: Callable[[str], None] | None, **kwargs: Any) -> None:
        self.sent, self.seen = headers, seen
        super().__init__(*args, **kwargs)

    def end_headers(self) -> None:
        """Adds the headers to every answer, errors too."""
        for name, value in self.sent.items():
            self.send_header(name, value)
        super().end_headers()

    def list_directory(self, path: str | os.PathLike[str]) -> BytesIO | None:  # noqa: ARG002 - the name is the base's
        """Refuses: a folder without index.html is not there."""
        self.send_error(HTTPStatus.NOT_FOUND)
        return None

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base's
        """On stderr, or a request's path to `seen`."""
        if self.seen is None:
            super().log_message(format, *args)
        elif format == '"%s" %s %s':
            self.seen(self.path)


class Server(ThreadingHTTPServer):
    """Serves `folder` on loopback.

    Args:
        folder: what build_site made.
        port: 0 takes a free one.
        isolated: send the headers that let a page use threads.
        seen: called with the path of each request, in place of a log on stderr.
    """

    daemon_threads = True

    def __init__(
        self, folder: Path, port: int = 0, *, isolated: bool = True, seen: Callable[[str], None] | None = None
    ) -> None:
        headers = HEADERS | (ISOLATION if isolated else {})
        super().__init__((HOST, port), partial(Handler, directory=str(folder), headers=headers, seen=seen))

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that stops loading closes the connection: no fault of the server."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m runtimes.web.serve", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="made by runtimes.web.build")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0 takes a free one")
    parser.add_argument("--no-isolation", action="store_true", help="without the headers that threads need")
    args = parser.parse_args()
    if not (args.folder / "site.json").is_file():
        print(f"error: {args.folder / 'site.json'}: missing, so the folder is no page", file=sys.stderr)
        return 2
    try:
        server = Server(args.folder, args.port, isolated=not args.no_isolation)
    except (OSError, OverflowError) as exc:
        print(f"error: port {args.port} cannot be used: {exc}", file=sys.stderr)
        return 2
    print(f"{server.url}  (Ctrl-C ends it)", flush=True)
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
