"""What a bundle is: a folder of files, listed in its manifest.json by size and SHA-256, written once.

    read_bundle     checks every file against the manifest and hands out a `Bundle`
    stage_bundle    a hidden folder beside the target that becomes the bundle with one rename
    write_manifest  lists what lies in the staged folder
    replace_manifest  the one later change: a pending proof becomes a passed one, evidence is added

Does not cover: authenticity, which is what a signature is for (`runtimes.keys`, checked by `runtimes.pull`): whoever
can change a file and the manifest can change a bundle. Nor a change after the check: read, then use.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from runtimes.manifest import (
    HALF_MANIFEST,
    MANIFEST,
    SIGNATURE,
    BundleError,
    FileEntry,
    Json,
    Manifest,
    Proof,
    load_json,
    parse_manifest,
    payload_digest,
    role_of,
)


@dataclass(frozen=True)
class Bundle:
    """A folder whose files were checked against its manifest."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """The file `name` (as in the manifest, such as "onnx/embed_tokens.onnx").

        Raises:
            BundleError: if the manifest does not list it.
        """
        if all(entry.path != name for entry in self.manifest.files):
            raise BundleError(f"{self.folder / MANIFEST}: does not list {name}, which is needed")
        return self.folder / name

    def has_evidence(self) -> bool:
        """Whether the files that prove it are there too; False where only the payload was pulled."""
        return all((self.folder / e.path).is_file() for e in self.manifest.files if e.role == "evidence")

    def json(self, name: str) -> Json:
        """The content of the JSON file `name`. Raises BundleError if it is not listed or not an object."""
        return load_json(self.path(name))


# ---- reading


def read_bundle(folder: Path, *, allow_pending: bool = False, check_digests: bool = True) -> Bundle:
    """Reads a bundle and checks every file in it.

    Its evidence may be left out, all of it or none: what runs a bundle does not need it.

    Args:
        folder: the bundle.
        allow_pending: accept a bundle whose proof has not passed yet.
        check_digests: hash every file; False checks names and sizes only.

    Raises:
        BundleError: naming the file that is missing, extra, a link, or of another size or content than
            the manifest says, or the manifest's field that is wrong.
    """
    manifest = read_manifest(folder)
    pending = manifest.proof.state == "pending"
    if pending and not allow_pending:
        missing = (
            "nothing has shown yet that it computes what its model computes (--allow-pending runs it all the same)"
        )
        raise BundleError(f"{folder}: proof is pending: {missing}")
    listed = {entry.path: entry for entry in manifest.files}
    found = dict(_files(folder))
    if not any(listed[path].role == "evidence" for path in listed.keys() & found.keys()):
        listed = {path: entry for path, entry in listed.items() if entry.role == "payload"}
    for path in sorted(listed.keys() - found.keys()):
        raise BundleError(f"{folder / path}: missing, but listed in {MANIFEST}")
    for path in sorted(found.keys() - listed.keys()):
        if path not in (MANIFEST, SIGNATURE) and not (pending and _leftover(path)):
            raise BundleError(f"{folder / path}: extra, not listed in {MANIFEST}")
    for entry in listed.values():
        _check_file(folder, entry, found[entry.path], check_digests)
    return Bundle(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks manifest.json alone. Raises BundleError naming the field."""
    if not folder.is_dir():
        raise BundleError(f"{folder}: not a folder, so not a bundle")
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder / MANIFEST}: missing, so the folder is not a bundle")
    return parse_manifest(load_json(folder / MANIFEST), str(folder / MANIFEST))


def _leftover(path: str) -> bool:
    """Whether an interrupted proof may have left this file in a pending bundle."""
    return path == HALF_MANIFEST or role_of(path) == "evidence"


def _files(folder: Path, below: str = "") -> Iterator[tuple[str, int]]:
    """(relative path, size) of every file under `folder`; a link or special file is an error."""
    try:
        entries = sorted(os.scandir(folder / below), key=lambda e: e.name)
    except OSError as exc:
        raise BundleError(f"{folder / below}: cannot be read: {exc.strerror}") from exc
    for entry in entries:
        path = f"{below}{entry.name}"
        status = entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            yield from _files(folder, f"{path}/")
        elif stat.S_ISREG(status.st_mode):
            yield path, status.st_size
        else:
            what = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
            raise BundleError(f"{folder / path}: {what}, which a bundle may not hold")


def _check_file(folder: Path, entry: FileEntry, size: int, digest: bool) -> None:
    path = folder / entry.path
    if size != entry.size:
        what = "truncated" if size < entry.size else "too long"
        raise BundleError(f"{path}: {what}: {size:,} bytes, {MANIFEST} says {entry.size:,}")
    if digest and (found := file_digest(path)) != entry.sha256:
        raise BundleError(f"{path}: content has changed: SHA-256 {found}, {MANIFEST} says {entry.sha256}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex. Raises BundleError naming it."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise BundleError(f"{path}: cannot be read: {exc.strerror}") from exc


# ---- writing


@contextmanager
def stage_bundle(out: Path) -> Iterator[Path]:
    """Yields a hidden folder beside `out` to write into; when the body succeeds it becomes `out`.

    Everything is flushed to the disk, then moved with one rename: whenever the process dies, `out` is
    absent or whole. When the body raises, the folder is removed. What killed processes left for the
    same `out` is removed first; a living one's folder is locked and stays.

    Raises:
        BundleError: if `out` exists (before the body runs, or by the time of the rename), its parent
            cannot be written, or the disk is full.
    """
    out = out.absolute()
    with clear_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(out)
        refuse_existing(out)
        stage, lock = _make_stage(out)
    try:
        with clear_errors(out, disk_only=True):
            yield stage
        with clear_errors(out):
            sync_tree(stage)
            refuse_existing(out)
            try:
                stage.rename(out)  # a folder that appeared meanwhile and is not empty makes it fail
            except OSError as exc:
                refuse_existing(out, exc)
                raise
            sync(out.parent)
    finally:
        if stage.exists():
            shutil.rmtree(stage, ignore_errors=True)
        os.close(lock)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Writes manifest.json for the files that lie in `folder`; same files and fields, same bytes.

    Args:
        folder: where `stage_bundle` lets a bundle be written.
        manifest: everything but `files` and `payload_digest`, which are computed.

    Returns:
        The manifest as written.

    Raises:
        BundleError: if the result is one that `read_bundle` would refuse.
    """
    entries = tuple(_entry(folder, path, size) for path, size in _files(folder) if path not in (MANIFEST, SIGNATURE))
    entries = tuple(sorted(entries, key=lambda e: e.path))
    manifest = replace(manifest, files=entries, payload_digest=payload_digest(entries))
    text = _dump(asdict(manifest))
    parsed = parse_manifest(json.loads(text), str(folder / MANIFEST))
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return parsed


def replace_manifest(bundle: Bundle, proof: Proof, evidence: Path | None = None) -> Bundle:
    """Ends a pending proof: adds the files of the folder `evidence`, then replaces the manifest in one step.

    Killed at any moment, the bundle is still the pending one (which may hold evidence that its manifest
    does not list; the next call removes it) or already the new one. Keys that this version does not
    know are kept.

    Args:
        bundle: a pending bundle.
        proof: what the manifest says from now on; its report is a path in the bundle.
        evidence: a folder with files such as cases/0.safetensors and report.json, copied as they lie.

    Raises:
        BundleError: if the proof is not pending, a file of the bundle has changed since it was written,
            or `evidence` holds a file that is not evidence or is in the bundle already.
    """
    folder = bundle.folder
    manifest = read_manifest(folder)
    if manifest.proof.state != "pending" or manifest != bundle.manifest:
        raise BundleError(f"{folder / MANIFEST}: was replaced meanwhile, or its proof is not pending")
    if (folder / SIGNATURE).exists():
        raise BundleError(f"{folder / SIGNATURE}: is of a pending bundle, and a proof changes what it signs: remove it")
    added = dict(_files(evidence)) if evidence else {}
    listed = {entry.path for entry in manifest.files}
    for path in added:
        if role_of(path) != "evidence":
            raise BundleError(f"{folder / path}: a proof adds cases and reports only")
        if path in listed:
            raise BundleError(f"{folder / path}: is in the bundle already, and nothing in it is overwritten")
    sizes = dict(_files(folder))
    for path in sizes.keys() - listed:
        if _leftover(path):
            (folder / path).unlink()
    read_bundle(folder, allow_pending=True)
    copied: list[Path] = []
    try:
        with clear_errors(folder):
            for path in added:
                assert evidence is not None
                copied.append(folder / path)
                copied[-1].parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(evidence / path, copied[-1])
            entries = [*manifest.files, *(_entry(folder, path, (folder / path).stat().st_size) for path in added)]
            content = load_json(folder / MANIFEST)
            content["files"] = [asdict(entry) for entry in sorted(entries, key=lambda e: e.path)]
            content["proof"] = asdict(proof)
            parse_manifest(content, str(folder / MANIFEST))
            copied.append(folder / HALF_MANIFEST)
            copied[-1].write_text(_dump(content), encoding="utf-8")
            sync_tree(folder)
            copied[-1].replace(folder / MANIFEST)
            copied.clear()
            sync(folder)
    finally:
        for leftover in copied:
            leftover.unlink(missing_ok=True)
    return read_bundle(folder, allow_pending=True, check_digests=False)


def _dump(content: Json) -> str:
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _entry(folder: Path, path: str, size: int) -> FileEntry:
    return FileEntry(path, size, file_digest(folder / path), role_of(path))


def refuse_existing(out: Path, cause: OSError | None = None) -> None:
    """Raises BundleError if anything is at `out`."""
    if os.path.lexists(out):
        raise BundleError(f"{out}: exists already, and a bundle is never overwritten") from cause


@contextmanager
def clear_errors(out: Path, disk_only: bool = False) -> Iterator[None]:
    """Turns the system's errors into a BundleError about `out`; `disk_only`: a full disk alone."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BundleError(f"{out}: no space left on the disk; nothing was changed there") from exc
        if disk_only:
            raise
        raise BundleError(f"{out}: cannot be written: {exc.strerror} ({exc.filename or exc})") from exc


# A staged folder is locked by the process that fills it (flock on the folder itself): the kernel ends the
# lock with the process, however it dies, and no process id can be mistaken for another's.


def _make_stage(out: Path) -> tuple[Path, int]:
    """A new staged folder for `out` and the descriptor that holds its lock."""
    import fcntl  # POSIX only: bundles are read anywhere, but made on Linux and macOS

    while True:
        stage = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
        stage.mkdir()
        descriptor = os.open(stage, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            return stage, descriptor  # a file system without locks: nobody can lock it, nobody removes it
        if stage.exists() and os.path.samestat(stage.stat(), os.fstat(descriptor)):
            return stage, descriptor
        os.close(descriptor)  # another call took it for a dead one between mkdir and flock


def _remove_dead(out: Path) -> None:
    """Removes the staged folders for `out` whose processes are dead."""
    import fcntl

    name = re.compile(re.escape(f".{out.name}.partial-") + "[0-9a-f]{8}")
    for entry in os.scandir(out.parent):
        if not name.fullmatch(entry.name) or not entry.is_dir(follow_symlinks=False):
            continue
        try:
            descriptor = os.open(entry.path, os.O_RDONLY)
        except OSError:
            continue  # gone meanwhile, or not ours to open
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(entry.path, ignore_errors=True)
        except OSError:
            pass  # its process lives
        finally:
            os.close(descriptor)


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flushes a folder and all in it to the disk."""
    for base, _, names in os.walk(folder):
        for name in names:
            sync(Path(base) / name)
        sync(Path(base))
