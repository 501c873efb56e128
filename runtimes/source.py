"""Where a bundle is pulled from: a folder, a web server, or a Hugging Face hub, none of which is trusted.

A source hands out bytes by a file's path, from a position on. What they must be is the manifest's to say, and
`runtimes.pull` compares. Here it is seen to that a request goes where it should: https (http on this machine alone, for
mirrors and tests), a redirect to nothing less, a token to the host that it is for and to no other.
"""

import http.client
import io
import ipaddress
import os
import re
import stat
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from runtimes.manifest import BundleError, parse_json

HUB = "https://huggingface.co"
MAX_MANIFEST_BYTES = 16 << 20
MAX_ANSWER_BYTES = 16 << 20  # of a hub that is asked for a commit
MAX_REDIRECTS = 5
TIMEOUT_S = 30.0
HUB_ID = re.compile(
    r"hf://(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?P<folder>(/[\w.-]+)*)(@(?P<revision>\w[\w./-]*))?", re.ASCII
)
STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]{1,200}"')


class Interrupted(Exception):
    """The source stopped answering, or said that it cannot now: worth another try."""


class Changed(Interrupted):
    """What is here of a file cannot be continued: worth another try from its beginning."""


class Missing(BundleError):
    """The source has no such file."""


class Different(BundleError):
    """The source has something else than the manifest says."""


@dataclass(frozen=True)
class Piece:
    """An open answer: bytes of a file from `start` on."""

    stream: io.BufferedIOBase
    start: int
    etag: str | None  # what the source calls this content, if it can be relied on


class Source(Protocol):
    """Where files are."""

    name: str  # for messages

    def open(
        self, path: str, start: int = 0, etag: str | None = None, size: int | None = None
    ) -> AbstractContextManager[Piece]:
        """A file from `start` on if its content is still `etag`'s, else from 0.

        Raises:
            Interrupted: another try may succeed. Missing: there is no such file. Different: it has another size.
                BundleError: any other refusal.
        """


def open_source(source: str, *, hub: str = HUB, token: str | None = None, timeout_s: float = TIMEOUT_S) -> Source:
    """The source that a text names: hf://org/name[/folder][@revision], https://..., or a folder.

    A hub's revision is resolved to a commit here, so that all files are of one.

    Args:
        hub: the hub's address.
        token: for the hub alone.
        timeout_s: a source that says nothing for so long is taken for dead.

    Raises:
        BundleError: if it is none of these, or is not there. Interrupted: if the hub cannot be reached now.
    """
    if source.startswith("hf://"):
        match = HUB_ID.fullmatch(source)
        if not match or ".." in source:
            raise BundleError(f"{source}: want hf://org/name, with /folder and @revision as needed")
        check_token(token)
        name, revision = match["name"], match["revision"] or "main"
        commit = hub_commit(hub, name, revision, token, timeout_s)
        base = f"{hub.rstrip('/')}/{name}/resolve/{commit}{match['folder']}"
        return WebSource(base, f"{source.partition('@')[0]}@{commit[:12]}", token, timeout_s)
    if "://" in source:
        return WebSource(source.rstrip("/"), source, None, timeout_s)
    folder = Path(source)
    if not folder.is_dir():
        raise BundleError(f"{source}: is no folder, and neither https://... nor hf://org/name")
    return FolderSource(folder)


def hub_commit(hub: str, name: str, revision: str, token: str | None, timeout_s: float = TIMEOUT_S) -> str:
    """The commit that a revision of a hub's model stands for now. Raises as `Source.open`."""
    where = f"{name}@{revision}"
    address = f"{hub.rstrip('/')}/api/models/{name}/revision/{urllib.parse.quote(revision, safe='')}"
    try:
        with WebSource(address, where, token, timeout_s).open("") as piece:
            text = read_all(piece.stream, MAX_ANSWER_BYTES, f"{where}: the hub's answer")
    except Missing as exc:
        raise Missing(f"{where}: the hub has no such model or revision, or does not show it without a token") from exc
    commit = parse_json(text, f"{where}: the hub's answer").get("sha")
    if not isinstance(commit, str) or not re.fullmatch("[0-9a-f]{40}", commit):
        raise BundleError(f"{where}: the hub's answer names no commit: sha is {commit!r:.60}")
    return commit


def check_token(token: str | None) -> None:
    """Raises BundleError, without the token in it, if a token cannot be sent."""
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise BundleError("the hub's token is empty or holds a space, a line break or another character that none has")


def read_all(stream: io.BufferedIOBase, most: int, where: str) -> bytes:
    """What a stream holds. Raises BundleError if that is more than `most` bytes, Interrupted if it breaks off."""
    pieces, left = [], most
    while piece := read_some(stream, min(left + 1, 1 << 16)):
        left -= len(piece)
        if left < 0:
            raise BundleError(f"{where} is larger than {most:,} bytes")
        pieces.append(piece)
    return b"".join(pieces)


def read_some(stream: io.BufferedIOBase, most: int) -> bytes:
    """What there is of a stream now, up to `most` bytes, none at its end. Raises Interrupted if it breaks off."""
    try:
        return stream.read1(most)
    except (http.client.HTTPException, OSError) as exc:
        raise Interrupted(_reason(exc)) from exc


class FolderSource:
    """A folder on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, str(folder)

    @contextmanager
    def open(
        self,
        path: str,
        start: int = 0,
        etag: str | None = None,  # noqa: ARG002  # files on a disk have none
        size: int | None = None,
    ) -> Iterator[Piece]:
        """As `Source.open`; no link is followed below the folder."""
        where = self.folder
        try:
            for part in path.split("/"):
                where /= part
                if stat.S_ISLNK(where.lstat().st_mode):
                    raise BundleError(f"{where}: a symbolic link, which a bundle may not hold")
            status = where.lstat()
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"{where}: not a regular file")
            if size is not None and status.st_size != size:
                raise Different(f"{where}: has {status.st_size:,} bytes, the manifest says {size:,}")
            descriptor = os.open(where, os.O_RDONLY | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise Missing(f"{where}: missing") from exc
        except OSError as exc:
            raise BundleError(f"{where}: cannot be read: {exc.strerror}") from exc
        with os.fdopen(descriptor, "rb") as file:
            file.seek(start)
            yield Piece(file, start, None)


class WebSource:
    """A folder on a web server; each file is a request of its own."""

    def __init__(self, base: str, name: str, token: str | None, timeout_s: float) -> None:
        check_url(base, name)
        if urllib.parse.urlsplit(base).query or urllib.parse.urlsplit(base).fragment:
            raise BundleError(f"{name}: a folder's address has no ? and no #")
        self._base, self.name, self._token, self._timeout_s = base, name, token, timeout_s
        here = _is_here(urllib.parse.urlsplit(base).hostname or "")
        self._opener = urllib.request.build_opener(_NoRedirect, *[urllib.request.ProxyHandler({})] * here)

    @contextmanager
    def open(self, path: str, start: int = 0, etag: str | None = None, size: int | None = None) -> Iterator[Piece]:
        """As `Source.open`; `size` is what the file must have, and a server that says otherwise is refused."""
        where = f"{self.name}: {path}"
        headers = {"Accept-Encoding": "identity", "User-Agent": "smolport"}
        if start:
            headers["Range"] = f"bytes={start}-"
            if etag:
                headers["If-Range"] = etag
        url = f"{self._base}/{urllib.parse.quote(path)}" if path else self._base
        with self._request(url, headers, where) as answer:
            found = answer.headers.get("ETag", "")
            named = found if STRONG_ETAG.fullmatch(found) else None
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise BundleError(f"{where}: sent encoded, and not as it is")
            if answer.status == http.HTTPStatus.PARTIAL_CONTENT and start:
                if etag and named != etag:
                    raise Changed("another version of the file than the part that is here")
                _check_range(answer.headers.get("Content-Range", ""), start, size, where)
                yield Piece(answer, start, named)
                return
            if answer.status != http.HTTPStatus.OK:
                raise BundleError(f"{where}: the server answers {answer.status}")
            length = answer.headers.get("Content-Length")
            if size is not None and length is not None and length != str(size):
                raise Different(f"{where}: the server has {length:.30} bytes of it, the manifest says {size:,}")
            yield Piece(answer, 0, named)

    @contextmanager
    def _request(self, url: str, headers: dict[str, str], where: str) -> Iterator[http.client.HTTPResponse]:
        """The answer behind all redirects."""
        home = _origin(url)
        for _ in range(MAX_REDIRECTS + 1):
            request = urllib.request.Request(url, headers=headers)  # noqa: S310  # checked by check_url
            if self._token and _origin(url) == home:
                request.add_unredirected_header("Authorization", f"Bearer {self._token}")
            try:
                answer = self._opener.open(request, timeout=self._timeout_s)
            except urllib.error.HTTPError as exc:
                with exc:
                    if exc.code not in (301, 302, 303, 307, 308):
                        _refuse(exc.code, where)
                    url = _redirected(url, exc.headers.get("Location", ""), where)
                continue
            except (http.client.HTTPException, OSError, ValueError) as exc:
                raise Interrupted(_reason(exc)) from exc
            with answer:
                yield answer
                return
        raise BundleError(f"{where}: the server redirects more than {MAX_REDIRECTS} times")


def _redirected(url: str, location: str, where: str) -> str:
    """Where a redirect leads. Raises BundleError if that is less than https was."""
    try:
        target = urllib.parse.urljoin(url, location)
    except ValueError as exc:
        raise BundleError(f"{where}: the server redirects to what is no address") from exc
    check_url(target, f"{where}: the server redirects")
    if url.startswith("https:") and not target.startswith("https:"):
        raise BundleError(f"{where}: the server redirects from https to {target.partition(':')[0]}")
    return target


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects become errors, which `WebSource` looks at before it follows."""

    def redirect_request(self, *_: object) -> None:
        """Follows none."""


def check_url(url: str, where: str) -> None:
    """Raises BundleError unless it is https, or http to this machine, without a name and password in it."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as exc:
        raise BundleError(f"{where}: its address is none") from exc
    if not host or not url.isascii() or not url.isprintable() or " " in url:
        raise BundleError(f"{where}: its address is none")
    if parts.username is not None or parts.password is not None:
        raise BundleError(f"{where}: a name or a password in an address ends up in logs: take it out")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_here(host)):
        raise BundleError(
            f"{where}: its address begins with {parts.scheme[:20]}://, want https:// (http:// on this machine)"
        )


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _check_range(header: str, start: int, size: int | None, where: str) -> None:
    """Whether the server sends what was asked for. Raises Changed, or Different of a file of another size."""
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", header)
    if match and match[3] != "*" and size is not None and int(match[3]) != size:
        raise Different(f"{where}: the server has {int(match[3]):,} bytes of it, the manifest says {size:,}")
    if not match or int(match[1]) != start or (size is not None and int(match[2]) >= size):
        raise Changed(f"another range than from byte {start:,} on was sent: {header!r:.60}")


def _refuse(code: int, where: str) -> None:
    if code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        raise Changed("the server has no byte there")
    if code in (408, 425, 429) or code >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
        raise Interrupted(f"the server answers {code}")
    if code in (404, 410):
        raise Missing(f"{where}: is not there (the server answers {code})")
    login = " (for a hub, HF_TOKEN holds a token)" if code in (401, 403) else ""
    raise BundleError(f"{where}: the server answers {code}{login}")


def _reason(exc: BaseException) -> str:
    """What went wrong, without the address, which may carry a signature."""
    cause = exc.reason if isinstance(exc, urllib.error.URLError) else exc
    if isinstance(cause, TimeoutError):
        return "the server says nothing"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return type(cause).__name__
