"""Headless Chromium for tests: it reaches loopback alone, and whatever a page asks of others is written down.

Skips, visibly, where no Chromium is installed. The browser is the system's; playwright drives it and brings none.
"""

import re
import shutil
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from runtimes.web.serve import Server

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Chromium's own business; what is left of it goes to the proxy too, and is told from a page's requests by its hosts.
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-domain-reliability", "--no-pings"]
OWN = re.compile(r" (?:https?://)?[\w.-]+\.(?:google|googleapis|gvt1|gstatic)\.com[:/]")


class Recorder(socketserver.ThreadingTCPServer):
    """A proxy that connects nobody: it keeps the first line of each request."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        self.lines: list[str] = []
        lines = self.lines

        class Refuse(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                lines.append(self.rfile.readline(4096).decode("latin-1").strip())
                self.wfile.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        super().__init__(("127.0.0.1", 0), Refuse)


@dataclass(frozen=True)
class Chromium:
    """A running browser. `proxied`: what it sent to anything but loopback. `requested`: every address of a page."""

    browser: Browser
    proxied: list[str]
    requested: list[str]

    def outside(self, url: str) -> list[str]:
        """All that was asked of others than the server at `url` since the last call."""
        pages = [found for found in self.requested if not found.startswith((url, "blob:", "data:"))]
        others = [line for line in self.proxied if not OWN.search(line)]
        self.requested.clear()
        self.proxied.clear()
        return pages + others

    @contextmanager
    def page(self, **options: Any) -> Iterator[Page]:
        """A page in a fresh profile; `options` are those of playwright's new_context."""
        context = self.context(**options)
        try:
            yield context.new_page()
        finally:
            context.close()

    def context(self, **options: Any) -> BrowserContext:
        """A fresh profile; the caller closes it."""
        context = self.browser.new_context(**options)
        context.set_default_timeout(60_000)
        context.on("request", lambda request: self.requested.append(request.url))
        # What the page's policy stops is announced as well, and not sent.
        context.on("requestfailed", lambda r: self.requested.remove(r.url) if r.failure == "csp" else None)
        return context


@contextmanager
def open_chromium() -> Iterator[Chromium]:
    """Starts the browser. Skips the test where none is installed."""
    program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(PROGRAMS)} is installed")
    with Recorder() as recorder, sync_playwright() as playwright:
        threading.Thread(target=recorder.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(
            executable_path=program,
            args=QUIET,
            proxy={"server": f"http://127.0.0.1:{recorder.server_address[1]}", "bypass": "127.0.0.1"},
        )
        try:
            yield Chromium(browser, recorder.lines, [])
        finally:
            browser.close()
            recorder.shutdown()


class Watched(Server):
    """A server that keeps the path of every request in `requests` and answers none to a path that `held` is found in.

    Playwright's routes do not see what a service worker asks for; this does.
    """

    def __init__(self, folder: Path, *, isolated: bool) -> None:
        self.requests: list[str] = []
        self.held: str | None = None
        self.released = threading.Event()
        super().__init__(folder, isolated=isolated, seen=self._see)

    def _see(self, path: str) -> None:
        self.requests.append(path)
        if self.held is not None and self.held in path:
            self.released.wait(60)


@contextmanager
def serving(folder: Path, *, isolated: bool = True) -> Iterator[Watched]:
    """runtimes.web.serve for as long as the block runs."""
    with Watched(folder, isolated=isolated) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
