"""What a bundle is: a folder of files, listed in its manifest.json by size and SHA-256, written once.

    read_bundle     checks every file against the manifest and hands out a `Bundle`
    stage_bundle    a hidden folder beside the target that becomes the bundle with one rename
    write_manifest  lists what lies in the staged folder
    replace_manifest  the one later change: a pending proof becomes a passed one, evidence is added

Does not cover: authenticity. Whoever can change a file and the manifest can change a bundle; compare
`payload_digest` with one from a source you trust. Nor a change after the check: read, then use.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

SCHEMA = 1  # the manifests that this module writes, and the newest that it reads
MANIFEST = "manifest.json"
HALF_MANIFEST = ".manifest.json.partial"  # the next manifest of a bundle, until it replaces the present one
MAX_JSON_BYTES = 64 * 2**20

Json = dict[str, Any]


class BundleError(ValueError):
    """A bundle that cannot be used or written; the message names the file and what is wrong with it."""


# ---- the manifest: field names are the JSON keys, and FORMAT.md says what each one means


@dataclass(frozen=True)
class ModelSource:
    """Where the weights come from."""

    name: str  # hub id or folder name
    revision: str | None  # the resolved commit
    license: str | None
    architecture: str  # "smolvlm" | "idefics3"


@dataclass(frozen=True)
class RecipeUsed:
    """What was done to each tensor: at least `scheme` (str) and `bits` (int) under the tensor's name."""

    name: str
    tensors: Mapping[str, Json]


@dataclass(frozen=True)
class Engine:
    """What runs the bundle, and the oldest version of it that does."""

    name: str
    least: str


@dataclass(frozen=True)
class InstructionSet:
    """The exporting machine's relevant CPU flags, and whether the graphs need more than any x86 has."""

    flags: tuple[str, ...]
    saturates_without_vnni: bool  # u8 x s8 products may exceed 16 bits: x86 without VNNI needs the slower exact mode


@dataclass(frozen=True)
class ImageLimits:
    """How images become tokens; sizes in pixels."""

    tile_size: int
    longest_edge: int
    max_tiles: int
    tokens_per_tile: int


@dataclass(frozen=True)
class TextLimits:
    """The sizes of the decoder; `context` is the most tokens that prompt and answer may have together."""

    context: int
    vocab: int
    hidden: int
    layers: int
    kv_heads: int
    head_dim: int
    eos_ids: tuple[int, ...]
    image_token_id: int


@dataclass(frozen=True)
class FileEntry:
    """One file; `path` is relative, with forward slashes; `role` is "payload" or "evidence"."""

    path: str
    size: int
    sha256: str
    role: str


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated peak memory in bytes for a token budget and a context length."""

    tiles: int
    context: int
    bytes: int


@dataclass(frozen=True)
class Proof:
    """`state` is "pending" or "passed"; `report` is the path of the report in the bundle."""

    state: str
    report: str | None


@dataclass(frozen=True)
class Manifest:
    """manifest.json. `files` and `payload_digest` are computed by `write_manifest`."""

    target: str
    model: ModelSource
    version: int
    recipe: RecipeUsed
    tools: Mapping[str, str]
    opsets: Mapping[str, int]
    engine: Engine
    instruction_set: InstructionSet
    image: ImageLimits
    text: TextLimits
    memory: tuple[MemoryEstimate, ...]
    proof: Proof = Proof("pending", None)
    files: tuple[FileEntry, ...] = ()
    payload_digest: str = ""
    schema: int = SCHEMA
    min_reader: int = SCHEMA


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

    def json(self, name: str) -> Json:
        """The content of the JSON file `name`. Raises BundleError if it is not listed or not an object."""
        return load_json(self.path(name))


# ---- reading


def read_bundle(folder: Path, *, allow_pending: bool = False, check_digests: bool = True) -> Bundle:
    """Reads a bundle and checks every file in it.

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
    for path in sorted(listed.keys() - found.keys()):
        raise BundleError(f"{folder / path}: missing, but listed in {MANIFEST}")
    for path in sorted(found.keys() - listed.keys()):
        if path != MANIFEST and not (pending and _leftover(path)):
            raise BundleError(f"{folder / path}: extra, not listed in {MANIFEST}")
    for entry in manifest.files:
        _check_file(folder, entry, found[entry.path], check_digests)
    return Bundle(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks manifest.json alone. Raises BundleError naming the field."""
    if not folder.is_dir():
        raise BundleError(f"{folder}: not a folder, so not a bundle")
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder / MANIFEST}: missing, so the folder is not a bundle")
    return parse_manifest(load_json(folder / MANIFEST), str(folder / MANIFEST))


def parse_manifest(content: Json, where: str) -> Manifest:
    """A manifest's JSON -> Manifest; `where` names the file in errors. Unknown keys are allowed.

    Raises:
        BundleError: for a missing key, a wrong type, an impossible value, or a newer schema.
    """
    schema, least = (_parse(int, content.get(key), f"{where}: {key}") for key in ("schema", "min_reader"))
    if not 1 <= least <= schema:
        raise BundleError(f"{where}: schema {schema} with min_reader {least}, want 1 <= min_reader <= schema")
    if least > SCHEMA:
        raise BundleError(f"{where}: needs a reader of schema {least}, this one knows {SCHEMA}: update smolport")
    manifest: Manifest = _parse(Manifest, content, where)
    _check(manifest, where)
    return manifest


def payload_digest(files: Iterable[FileEntry]) -> str:
    """SHA-256 over the sorted lines "path<TAB>size<TAB>sha256<LF>" of the payload files."""
    lines = sorted(f"{f.path}\t{f.size}\t{f.sha256}\n" for f in files if f.role == "payload")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def role_of(path: str) -> str:
    """The role that `write_manifest` gives a file: what lies in cases/ and the reports are evidence."""
    return "evidence" if path.startswith("cases/") or path in ("report.json", "report.md") else "payload"


def load_json(path: Path) -> Json:
    """A JSON file that holds an object; repeated keys, NaN and infinity are refused.

    Raises:
        BundleError: naming the file.
    """

    def unique(pairs: list[tuple[str, Any]]) -> Json:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("an object repeats a key")
        return content

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise BundleError(f"{path}: larger than {MAX_JSON_BYTES:,} bytes")
        content = json.loads(path.read_bytes(), object_pairs_hook=unique, parse_constant=constant)
    except BundleError:
        raise
    except (OSError, ValueError, RecursionError) as exc:
        raise BundleError(f"{path}: cannot be read as JSON: {exc}") from exc
    if not isinstance(content, dict):
        raise BundleError(f"{path}: holds {_kind(content)}, want an object")
    return content


def _parse(kind: Any, value: Any, where: str) -> Any:
    """`value` from JSON as `kind`: a dataclass here, tuple[X, ...], Mapping[str, X], X | None, or a plain type."""
    if kind is Any:
        return value
    if isinstance(kind, type) and is_dataclass(kind):
        content = _parse(dict, value, where)
        for field in fields(kind):
            if field.name not in content:
                raise BundleError(f"{where}: {field.name} is missing")
        inner = ": " if where.endswith(".json") else "."
        return kind(**{f.name: _parse(f.type, content[f.name], f"{where}{inner}{f.name}") for f in fields(kind)})
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (UnionType, Union):  # X | None
        return None if value is None else _parse(inside[0], value, where)
    if origin is tuple:
        return tuple(_parse(inside[0], v, f"{where}[{i}]") for i, v in enumerate(_parse(list, value, where)))
    if origin is not None:  # Mapping[str, X], dict[str, X]
        return {k: _parse(inside[1], v, f"{where}.{k}") for k, v in _parse(dict, value, where).items()}
    if type(value) is not kind:  # not isinstance: true is no int
        raise BundleError(f"{where} is {_kind(value)}, want {_NAMES[kind]}")
    return value


_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def _kind(value: object) -> str:
    return "missing or null" if value is None else _NAMES[type(value)]


def _check(manifest: Manifest, where: str) -> None:
    """What types alone do not say."""

    def want(true: bool, field: str, found: object, wanted: str) -> None:
        if not true:
            raise BundleError(f"{where}: {field} is {found!r}, want {wanted}")

    want(manifest.version >= 1, "version", manifest.version, "1 or more")
    want(manifest.proof.state in ("pending", "passed"), "proof.state", manifest.proof.state, "pending or passed")
    for part in ("image", "text"):
        for key, value in asdict(getattr(manifest, part)).items():
            if key not in ("eos_ids", "image_token_id"):
                want(value >= 1, f"{part}.{key}", value, "1 or more")
    for token in (*manifest.text.eos_ids, manifest.text.image_token_id):
        want(0 <= token < manifest.text.vocab, "a token id of text", token, f"0 to {manifest.text.vocab - 1}")
    for name, used in manifest.recipe.tensors.items():
        for key, kind in (("scheme", str), ("bits", int)):
            _parse(kind, used.get(key), f"{where}: recipe.tensors.{name}.{key}")
    seen: set[str] = set()
    for entry in manifest.files:
        want(_safe(entry.path), "a file's path", entry.path, "a relative path below the bundle, with forward slashes")
        want(entry.path.casefold() not in seen, "a file's path", entry.path, "each file listed once")
        want(entry.size >= 0, f"the size of {entry.path}", entry.size, "0 or more")
        hexadecimal = re.fullmatch("[0-9a-f]{64}", entry.sha256) is not None
        want(hexadecimal, f"sha256 of {entry.path}", entry.sha256, "64 hex digits")
        want(entry.role in ("payload", "evidence"), f"the role of {entry.path}", entry.role, "payload or evidence")
        seen.add(entry.path.casefold())
    if manifest.proof.report is not None:
        listed = manifest.proof.report.casefold() in seen
        want(listed, "proof.report", manifest.proof.report, "a file that the manifest lists")
    digest = payload_digest(manifest.files)
    want(manifest.payload_digest == digest, "payload_digest", manifest.payload_digest, f"{digest} by the files listed")


def _safe(path: str) -> bool:
    parts = path.split("/")
    plain = path.isprintable() and not set(path) & set("\\:") and path.casefold() not in (MANIFEST, HALF_MANIFEST)
    return plain and all(part not in ("", ".", "..") for part in parts)


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
    if digest and (found := _sha256(path)) != entry.sha256:
        raise BundleError(f"{path}: content has changed: SHA-256 {found}, {MANIFEST} says {entry.sha256}")


def _sha256(path: Path) -> str:
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
    with _clear_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(out)
        _refuse_existing(out)
        stage, lock = _make_stage(out)
    try:
        with _clear_errors(out, disk_only=True):
            yield stage
        with _clear_errors(out):
            _sync_tree(stage)
            _refuse_existing(out)
            try:
                stage.rename(out)  # a folder that appeared meanwhile and is not empty makes it fail
            except OSError as exc:
                _refuse_existing(out, exc)
                raise
            _sync(out.parent)
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
    entries = tuple(_entry(folder, path, size) for path, size in _files(folder) if path != MANIFEST)
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
        with _clear_errors(folder):
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
            _sync_tree(folder)
            copied[-1].replace(folder / MANIFEST)
            copied.clear()
            _sync(folder)
    finally:
        for leftover in copied:
            leftover.unlink(missing_ok=True)
    return read_bundle(folder, allow_pending=True, check_digests=False)


def _dump(content: Json) -> str:
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _entry(folder: Path, path: str, size: int) -> FileEntry:
    return FileEntry(path, size, _sha256(folder / path), role_of(path))


def _refuse_existing(out: Path, cause: OSError | None = None) -> None:
    if os.path.lexists(out):
        raise BundleError(f"{out}: exists already, and a bundle is never overwritten") from cause


@contextmanager
def _clear_errors(out: Path, disk_only: bool = False) -> Iterator[None]:
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for base, _, names in os.walk(folder):
        for name in names:
            _sync(Path(base) / name)
        _sync(Path(base))
