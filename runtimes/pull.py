"""Fetches a bundle, checks it against its manifest and signature, and puts it in its place with one rename.

    python -m runtimes.pull SOURCE [DEST] [--key PUBLIC_KEY] [--reuse FOLDER] [--only payload]

SOURCE is hf://org/name[/folder][@revision], https://.../folder, or a folder. A pull that was stopped, however, goes on
when the same command runs again: what is here of it lies in a hidden folder beside DEST. Without --key a bundle is what
its source says it is: digests show that nothing was lost on the way, not who made it.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TypeVar

from runtimes.bundle import clear_errors, file_digest, read_bundle, read_manifest, refuse_existing, sync, sync_tree
from runtimes.keys import SIGNATURE_BYTES, verify_signature
from runtimes.manifest import MANIFEST, SIGNATURE, BundleError, FileEntry, Manifest, parse_json, parse_manifest
from runtimes.source import (
    HUB,
    MAX_MANIFEST_BYTES,
    STRONG_ETAG,
    TIMEOUT_S,
    Changed,
    Different,
    FolderSource,
    Interrupted,
    Missing,
    Source,
    open_source,
    read_all,
    read_some,
)

MAX_FILES = 10_000
CHUNK = 1 << 20
ATTEMPTS = 5  # in a row without a further byte
LONGEST_PAUSE_S = 8.0
SPARE_BYTES = 16 << 20  # of the disk, for what a file system needs besides
T = TypeVar("T")


@dataclass(frozen=True)
class Offer:
    """What a source says that it has: checked, and not fetched yet."""

    source: Source
    text: bytes  # manifest.json
    signature: bytes | None
    manifest: Manifest

    def entries(self, payload_only: bool) -> list[FileEntry]:
        """The files that are wanted."""
        return [e for e in self.manifest.files if e.role == "payload" or not payload_only]


@dataclass(frozen=True)
class Pulled:
    """What a pull did; bytes of files."""

    bundle: Path
    fetched: int
    reused: int  # already here: by --reuse, or by a pull that was stopped
    was_there: bool  # DEST was this bundle already


@dataclass(frozen=True)
class Options:
    """How to fetch."""

    reuse: Sequence[Path] = ()  # bundles whose files are taken where they are the same
    payload_only: bool = False
    pause_s: float = 0.5  # before another try; doubled each time
    progress: Callable[[str], None] = lambda _: None


def pull(dest: Path, offer: Offer, options: Options) -> Pulled:
    """Makes `dest` the bundle that is offered.

    Killed at any moment, `dest` is absent or whole, and the next call goes on with what was fetched. Of two calls
    for one bundle and place the second waits for the first.

    Raises:
        BundleError: if `dest` is something else, the disk is too small, or the source does not give what its manifest
            says. What is right of what was fetched is kept for the next call.
    """
    dest = dest.absolute()
    with clear_errors(dest):
        dest.parent.mkdir(parents=True, exist_ok=True)
        while True:
            if _is_there(dest, offer, options.payload_only):
                _remove_partials(dest)
                return Pulled(dest, 0, sum(e.size for e in offer.entries(options.payload_only)), was_there=True)
            with _partial(dest, offer, options.progress) as folder:
                if folder is None or os.path.lexists(dest):
                    continue  # another call finished meanwhile
                done = _Filling(offer, dest, folder, options).fill()
                if os.path.lexists(dest):
                    continue
                refuse_existing(dest)
                (folder / "bundle").rename(dest)
                sync(dest.parent)
            _remove_partials(dest)
            return done


def read_offer(
    source: Source,
    *,
    key: Path | None = None,
    least_version: int = 1,
    allow_pending: bool = False,
    pause_s: float = 0.5,
) -> Offer:
    """Fetches a source's manifest and signature, and checks both.

    Args:
        key: the public key that must have signed it; None: nobody need have.
        least_version: an older bundle is refused.
        allow_pending: accept a bundle that nothing has been shown of.

    Raises:
        BundleError: with the reason why this bundle is not to be pulled.
    """

    def fetch(path: str, most: int) -> bytes:
        with source.open(path) as piece:
            return read_all(piece.stream, most, f"{source.name}: {path}")

    where = f"{source.name}: {MANIFEST}"
    text = again(lambda: fetch(MANIFEST, MAX_MANIFEST_BYTES), where, pause_s)
    try:
        signature = again(lambda: fetch(SIGNATURE, SIGNATURE_BYTES), f"{source.name}: {SIGNATURE}", pause_s)
    except Missing:
        signature = None
    if key is not None:
        verify_signature(text, signature, key, source.name)
    elif signature is not None and len(signature) != SIGNATURE_BYTES:
        raise BundleError(f"{source.name}: {SIGNATURE} has {len(signature)} bytes, want {SIGNATURE_BYTES}")
    manifest = parse_manifest(parse_json(text, where), where)
    if len(manifest.files) > MAX_FILES:
        raise BundleError(f"{where}: lists {len(manifest.files):,} files, want at most {MAX_FILES:,}")
    if manifest.version < least_version:
        raise BundleError(f"{where}: version is {manifest.version}, want {least_version} or later: it was superseded")
    if manifest.proof.state != "passed" and not allow_pending:
        raise BundleError(
            f"{where}: proof is {manifest.proof.state}: nothing has shown yet that it computes what its model does"
        )
    return Offer(source, text, signature, manifest)


def again(action: Callable[[], T], where: str, pause_s: float) -> T:
    """Does something that may be interrupted, up to ATTEMPTS times. Raises BundleError."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except Interrupted as exc:
            if attempt == ATTEMPTS:
                raise BundleError(f"{where}: {exc} ({ATTEMPTS} times)") from exc
            _rest(pause_s, attempt)
    raise AssertionError("unreachable")


def describe(offer: Offer, payload_only: bool) -> str:
    """What will be fetched, and the disk and the memory that it takes."""
    manifest = offer.manifest
    entries = offer.entries(payload_only)
    signed = "signed" if offer.signature is not None else "not signed"
    text = (
        f"{_plain(manifest.model.name)}, recipe {_plain(manifest.recipe.name)}, version {manifest.version}, "
        f"{_plain(manifest.target)}, {signed}: {len(entries)} files, {_size(sum(e.size for e in entries))} of disk"
    )
    rows = sorted(manifest.memory, key=lambda row: row.bytes)
    spans = [f"{_size(r.bytes)} ({r.tiles} tiles, {r.context} tokens)" for r in (rows[:1] + rows[1:][-1:])]
    return text + (f"; memory to expect {' to '.join(spans)}, without the process around it" if spans else "")


class _Filling:
    """One pull's work in its hidden folder:

    bundle/         files that are whole, at their places
    parts/SHA256    a file as far as it has come; SHA256.etag: what its source calls that content
    """

    def __init__(self, offer: Offer, dest: Path, folder: Path, options: Options) -> None:
        self.offer, self.dest, self.options = offer, dest, options
        self.bundle, self.parts = folder / "bundle", folder / "parts"
        self.entries = offer.entries(options.payload_only)
        self.fetched = self.reused = self.came = 0
        self._told = self._began = time.monotonic()

    def fill(self) -> Pulled:
        """Fetches what is missing, then checks the whole."""
        for made in (self.bundle, self.parts):
            made.mkdir(exist_ok=True)
        self._tidy()
        missing = [entry for entry in self.entries if not self._is_whole(entry)]
        self.reused = sum(e.size for e in self.entries) - sum(e.size for e in missing)
        self._want_room(missing)
        with _other_partials(self.dest, self.bundle.parent) as others:
            self._take_parts(others, missing)
            known = self._known([*self.options.reuse, *(other / "bundle" for other in others)])
            for entry in missing:
                if not self._copied(entry, known.get((entry.sha256, entry.size), [])):
                    self._fetch(entry)
                    self.fetched += entry.size
                known.setdefault((entry.sha256, entry.size), []).append((self.bundle, entry.path))
        (self.bundle / MANIFEST).write_bytes(self.offer.text)
        if self.offer.signature is not None:
            (self.bundle / SIGNATURE).write_bytes(self.offer.signature)
        sync_tree(self.bundle)
        read_bundle(self.bundle, allow_pending=True)
        return Pulled(self.dest, self.fetched, self.reused, was_there=False)

    def _tidy(self) -> None:
        """Removes what does not belong into the bundle: links, and files that are not wanted now."""
        wanted = {entry.path for entry in self.entries}
        for base, folders, names in os.walk(self.bundle):
            for name in [*folders, *names]:
                path = Path(base) / name
                if path.is_symlink() or (name in names and path.relative_to(self.bundle).as_posix() not in wanted):
                    path.unlink()

    def _is_whole(self, entry: FileEntry) -> bool:
        path = self.bundle / entry.path
        if not path.is_file():
            return False
        if path.stat().st_size == entry.size and file_digest(path) == entry.sha256:
            return True
        path.unlink()
        return False

    def _want_room(self, missing: Sequence[FileEntry]) -> None:
        here = sum(p.stat().st_size for p in self.parts.iterdir() if not p.is_symlink())
        need = sum(entry.size for entry in missing) - here + (SPARE_BYTES if missing else 0)
        free = shutil.disk_usage(self.parts).free
        if need > free:
            raise BundleError(f"{self.dest}: {_size(need)} of disk are needed there, {_size(free)} are free")

    def _take_parts(self, others: Sequence[Path], missing: Sequence[FileEntry]) -> None:
        """Goes on with what a pull of another version had begun; without its etag, which was another file's."""
        for other in others:
            for entry in missing:
                part = other / "parts" / entry.sha256
                if part.is_file() and not part.is_symlink() and not (self.parts / entry.sha256).exists():
                    part.rename(self.parts / entry.sha256)

    def _known(self, folders: Sequence[Path]) -> dict[tuple[str, int], list[tuple[Path, str]]]:
        """Where files are already, by digest and size, as the manifests beside them say. A copy is checked."""
        known: dict[tuple[str, int], list[tuple[Path, str]]] = {}
        for folder in folders:
            with suppress(BundleError):  # no bundle, or not a whole one: nothing to take by its manifest
                for entry in read_manifest(folder).files:
                    known.setdefault((entry.sha256, entry.size), []).append((folder, entry.path))
        return known

    def _copied(self, entry: FileEntry, places: Sequence[tuple[Path, str]]) -> bool:
        copy = self.parts / f"{entry.sha256}.copy"
        for folder, path in places:
            digest, left = hashlib.sha256(), entry.size
            try:
                with FolderSource(folder).open(path) as piece, copy.open("wb") as file:
                    while left and (content := read_some(piece.stream, min(CHUNK, left))):
                        file.write(content)
                        digest.update(content)
                        left -= len(content)
            except (BundleError, Interrupted):  # it is fetched instead
                continue
            if digest.hexdigest() == entry.sha256 and left == 0:
                self._place(copy, entry)
                self.reused += entry.size
                return True
        copy.unlink(missing_ok=True)
        return False

    def _fetch(self, entry: FileEntry) -> None:
        """Fetches a file, in as many requests as it takes while each brings something."""
        part = self.parts / entry.sha256
        furthest, failures = _length(part), 0
        while True:
            try:
                self._continue(entry, part)
            except Different as exc:
                raise BundleError(f"{exc}; {self._what_changed()}") from exc
            except Interrupted as exc:
                if isinstance(exc, Changed):
                    part.unlink(missing_ok=True)
                if (length := _length(part)) > furthest:
                    furthest, failures = length, 0
                failures += 1
                if failures >= ATTEMPTS:
                    raise BundleError(
                        f"{self.offer.source.name}: {entry.path}: {exc} ({ATTEMPTS} times); {length:,} of "
                        f"{entry.size:,} bytes are here: the same command goes on from them"
                    ) from exc
                self.options.progress(f"{entry.path}: {exc}; going on")
                _rest(self.options.pause_s, failures)
            else:
                return

    def _continue(self, entry: FileEntry, part: Path) -> None:
        """One request for the rest of a file; places it when its digest is right."""
        name = f"{self.offer.source.name}: {entry.path}"
        if _length(part) > entry.size:
            part.unlink()
        with _open_part(part) as file:
            digest = hashlib.file_digest(file, "sha256")
            start = at = file.tell()
            if start < entry.size:
                tag = part.with_name(f"{part.name}.etag")
                with self.offer.source.open(entry.path, start, _read_etag(tag) if start else None, entry.size) as piece:
                    if piece.start != start:
                        file.seek(0)
                        file.truncate()
                        start, at, digest = 0, 0, hashlib.sha256()
                    if not start:
                        tag.write_text(piece.etag or "", encoding="ascii")
                    while content := read_some(piece.stream, min(CHUNK, entry.size - at + 1)):
                        if at + len(content) > entry.size:
                            file.truncate(0)
                            raise Different(
                                f"{name}: the source sends more than the {entry.size:,} bytes of the manifest"
                            )
                        _write_all(file, content)
                        digest.update(content)
                        at += len(content)
                        self._tell(entry, at, len(content))
            if at < entry.size:
                raise Interrupted(f"the source broke off at byte {at:,} of {entry.size:,}")
            if digest.hexdigest() != entry.sha256:
                file.truncate(0)
                if start:
                    raise Changed("the part that was here and the rest do not make up the file")
                raise Different(f"{name}: SHA-256 is {digest.hexdigest()}, the manifest says {entry.sha256}: dropped")
            os.fsync(file.fileno())
        self._place(part, entry)

    def _place(self, part: Path, entry: FileEntry) -> None:
        path = self.bundle / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        part.replace(path)
        for leftover in (self.parts / entry.sha256, self.parts / f"{entry.sha256}.etag"):
            leftover.unlink(missing_ok=True)

    def _what_changed(self) -> str:
        """Whether the source has become another bundle since its manifest was read."""
        try:
            with self.offer.source.open(MANIFEST) as piece:
                same = read_all(piece.stream, MAX_MANIFEST_BYTES, MANIFEST) == self.offer.text
        except (BundleError, Interrupted):
            return "and its manifest cannot be read any more"
        if same:
            return "its manifest is still the same, so the file was damaged there or on the way"
        return "its manifest has changed meanwhile: it holds another version now, so pull again"

    def _tell(self, entry: FileEntry, at: int, count: int) -> None:
        self.came += count
        now = time.monotonic()
        if now - self._told >= 2:
            self._told = now
            rate = self.came / (now - self._began) / 1e6
            self.options.progress(f"{entry.path}: {at * 100 // entry.size} % of {_size(entry.size)}, {rate:.1f} MB/s")


# ---- the hidden folder


@contextmanager
def _partial(dest: Path, offer: Offer, progress: Callable[[str], None]) -> Iterator[Path | None]:
    """The hidden folder of this bundle for `dest`, locked; None if it went while this call waited for the lock."""
    import fcntl  # POSIX only, as in runtimes/bundle.py

    folder = dest.parent / f".{dest.name}.pull-{hashlib.sha256(offer.text).hexdigest()[:16]}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"another pull into {dest} is running: waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder if _is_still(folder, descriptor) else None
    finally:
        os.close(descriptor)


@contextmanager
def _other_partials(dest: Path, own: Path | None) -> Iterator[list[Path]]:
    """Hidden folders of pulls into `dest` that no process is filling, locked meanwhile."""
    import fcntl

    name = re.compile(re.escape(f".{dest.name}.pull-") + "[0-9a-f]{16}")
    found, descriptors = [], []
    try:
        for entry in os.scandir(dest.parent):
            path = Path(entry.path)
            if not name.fullmatch(entry.name) or not entry.is_dir(follow_symlinks=False) or path == own:
                continue
            with suppress(OSError):  # gone, not ours, or its process lives
                descriptors.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW))
                fcntl.flock(descriptors[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_still(path, descriptors[-1]):
                    found.append(path)
        yield found
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _remove_partials(dest: Path) -> None:
    with _other_partials(dest, None) as folders:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _is_still(folder: Path, descriptor: int) -> bool:
    with suppress(OSError):
        return os.path.samestat(folder.lstat(), os.fstat(descriptor))
    return False


def _is_there(dest: Path, offer: Offer, payload_only: bool) -> bool:
    """Whether `dest` is the offered bundle already. Raises BundleError if it is something else."""
    if not os.path.lexists(dest):
        return False
    path = dest / MANIFEST
    if dest.is_symlink() or not path.is_file() or path.read_bytes() != offer.text:
        what = f"version {offer.manifest.version} of {_plain(offer.manifest.model.name)}"
        raise BundleError(
            f"{dest}: exists already and is not this bundle ({what}), and a bundle is never overwritten: choose "
            f"another folder (--reuse {dest} takes from it what is the same)"
        )
    if not read_bundle(dest, allow_pending=True).has_evidence() and not payload_only:
        raise BundleError(f"{dest}: is this bundle without its evidence: choose another folder, with --reuse {dest}")
    return True


def _open_part(path: Path) -> FileIO:
    """A part for reading and writing, unbuffered: what was written is there when this process is killed."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    return FileIO(os.open(path, flags, 0o644), "r+")


def _write_all(file: FileIO, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


def _length(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.lstat().st_size
    return 0


def _read_etag(path: Path) -> str | None:
    with suppress(OSError, ValueError):
        text = path.read_text(encoding="ascii")
        return text if STRONG_ETAG.fullmatch(text) else None
    return None


def _rest(pause_s: float, attempt: int) -> None:
    time.sleep(min(pause_s * 2 ** (attempt - 1), LONGEST_PAUSE_S))


def _size(count: int) -> str:
    """Bytes for people; by whole numbers, since a manifest may name any."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            tenths = count * 10 // unit
            return f"{tenths // 10}.{tenths % 10} {name}" if tenths < 10**7 else f"more than {10**6:,} {name}"
    return f"{count} bytes"


def _plain(text: str) -> str:
    """A text from outside as one that cannot steer a terminal."""
    return text[:200] if text.isprintable() else repr(text[:200])


# ---- the command


def default_dest(source: str) -> Path:
    """A folder here, named as the source. Raises BundleError if it has no plain name."""
    name = source.partition("@")[0] if source.startswith("hf://") else source
    name = name.rstrip("/").rpartition("/")[2]
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise BundleError(f"{source}: gives no name to a folder here: name DEST")
    return Path(name)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m runtimes.pull",
        description=__doc__.splitlines()[0],
        epilog="HF_ENDPOINT is another hub's address, HF_TOKEN a token for it.",
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="hf://org/name[/folder][@revision], https://.../folder, a folder"
    )
    parser.add_argument(
        "dest", metavar="DEST", nargs="?", type=Path, help="the new folder (default: named as SOURCE, here)"
    )
    parser.add_argument("--key", type=Path, metavar="FILE", help="the public key that must have signed it")
    parser.add_argument("--min-version", type=int, default=1, metavar="N", help="refuse an older version")
    parser.add_argument(
        "--reuse",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="a bundle whose files are taken where they are the same; may be repeated",
    )
    parser.add_argument(
        "--only", choices=["payload"], help="leave out the evidence: runs, but cannot be verified or published"
    )
    parser.add_argument("--allow-pending", action="store_true", help="also a bundle whose proof has not passed")
    parser.add_argument("--dry-run", action="store_true", help="say what it is and what it takes, fetch nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    args = parser.parse_args()
    began = time.monotonic()

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    hub, token = os.environ.get("HF_ENDPOINT") or HUB, os.environ.get("HF_TOKEN") or None
    options = Options(args.reuse, args.only == "payload", progress=progress)
    try:
        dest = args.dest or default_dest(args.source)
        source = again(lambda: open_source(args.source, hub=hub, token=token, timeout_s=TIMEOUT_S), args.source, 0.5)
        offer = read_offer(source, key=args.key, least_version=args.min_version, allow_pending=args.allow_pending)
        progress(describe(offer, options.payload_only))
        if offer.signature is not None and args.key is None:
            progress("its signature is not checked: that takes --key")
        if args.dry_run:
            return 0
        done = pull(dest, offer, options)
    except (BundleError, KeyboardInterrupt) as exc:
        text = str(exc) or "stopped; the same command goes on where it was"
        print(f"error: {text}", file=sys.stderr)
        if args.json:
            print(json.dumps({"ok": False, "error": text}))
        return 2
    what = "is there already" if done.was_there else f"fetched {_size(done.fetched)}, {_size(done.reused)} were here"
    print(f"{done.bundle}: {what}, every digest is right ({time.monotonic() - began:.1f} s)")
    if args.json:
        summary = {"ok": True, "bundle": str(done.bundle), "fetched_bytes": done.fetched, "reused_bytes": done.reused}
        digest = offer.manifest.payload_digest
        print(
            json.dumps(
                summary | {"was_there": done.was_there, "version": offer.manifest.version, "payload_digest": digest}
            )
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
