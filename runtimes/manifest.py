"""manifest.json: what a bundle says of itself. Field names are the JSON keys; FORMAT.md says what each one means."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

SCHEMA = 3  # the manifests that this module writes
LEAST_READER = 1  # the oldest reader that understands them: what came later (ADDED) may be ignored
OPERATORS = "required_operators.config"
EVIDENCE = ("report.json", "report.md", OPERATORS)  # beside cases/
MANIFEST = "manifest.json"
SIGNATURE = (
    "manifest.json.sig"  # beside it where the bundle is signed (runtimes/keys.py); the manifest does not list it
)
HALF_MANIFEST = ".manifest.json.partial"  # the next manifest of a bundle, until it replaces the present one
MAX_JSON_BYTES = 64 * 2**20

Json = dict[str, Any]
# Keys that came later: the schema, and what their absence means in older manifests.
ADDED: dict[str, tuple[int, Any]] = {"notes": (2, []), "adapter": (3, None), "calibration": (3, None)}


class BundleError(ValueError):
    """A bundle that cannot be used or written; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class ModelSource:
    """Where the weights come from."""

    name: str  # hub id or folder name
    revision: str | None  # the resolved commit
    license: str | None
    architecture: str  # "smolvlm" | "idefics3"


@dataclass(frozen=True)
class AdapterSource:
    """A LoRA adapter that was merged into the weights; `sha256` of its adapter_config.json and tensors, in a row."""

    name: str  # hub id or folder name
    revision: str | None  # the resolved commit
    sha256: str


@dataclass(frozen=True)
class RecipeUsed:
    """What was done to each tensor: at least `scheme` (str) and `bits` (int) under the tensor's name."""

    name: str
    tensors: Mapping[str, Json]


@dataclass(frozen=True)
class Calibration:
    """The documents by which integers and factors were chosen; `sha256` is FORMAT.md's digest of them."""

    sha256: str
    documents: int
    tokens: int  # of prompts and answers
    tiles: int  # of an image at most


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
    calibration: Calibration | None = None
    notes: tuple[str, ...] = ()  # what whoever uses the bundle must know, in sentences
    adapter: AdapterSource | None = None
    proof: Proof = Proof("pending", None)
    files: tuple[FileEntry, ...] = ()
    payload_digest: str = ""
    schema: int = SCHEMA
    min_reader: int = LEAST_READER


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
    absent = {key: meaning for key, (since, meaning) in ADDED.items() if schema < since}
    manifest: Manifest = _parse(Manifest, absent | content, where)
    _check(manifest, where)
    return manifest


def payload_digest(files: Iterable[FileEntry]) -> str:
    """SHA-256 over the sorted lines "path<TAB>size<TAB>sha256<LF>" of the payload files."""
    lines = sorted(f"{f.path}\t{f.size}\t{f.sha256}\n" for f in files if f.role == "payload")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def role_of(path: str) -> str:
    """The role that `write_manifest` gives a file: what lies in cases/, the reports and the operators are evidence."""
    return "evidence" if path.startswith("cases/") or path in EVIDENCE else "payload"


def load_json(path: Path) -> Json:
    """A JSON file that holds an object; repeated keys, NaN and infinity are refused.

    Raises:
        BundleError: naming the file.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise BundleError(f"{path}: larger than {MAX_JSON_BYTES:,} bytes")
        text = path.read_bytes()
    except OSError as exc:
        raise BundleError(f"{path}: cannot be read as JSON: {exc}") from exc
    return parse_json(text, str(path))


def parse_json(text: bytes, where: str) -> Json:
    """The object that JSON bytes hold; as `load_json`. `where` names them in errors."""

    def unique(pairs: list[tuple[str, Any]]) -> Json:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("an object repeats a key")
        return content

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        content = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as exc:
        raise BundleError(f"{where}: cannot be read as JSON: {exc}") from exc
    if not isinstance(content, dict):
        raise BundleError(f"{where}: holds {_kind(content)}, want an object")
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
    if manifest.calibration is not None:
        hexadecimal = re.fullmatch("[0-9a-f]{64}", manifest.calibration.sha256) is not None
        want(hexadecimal, "calibration.sha256", manifest.calibration.sha256, "64 hex digits")
    for name, used in manifest.recipe.tensors.items():
        for key, kind in (("scheme", str), ("bits", int)):
            _parse(kind, used.get(key), f"{where}: recipe.tensors.{name}.{key}")
    if manifest.adapter is not None:
        hexadecimal = re.fullmatch("[0-9a-f]{64}", manifest.adapter.sha256) is not None
        want(hexadecimal, "adapter.sha256", manifest.adapter.sha256, "64 hex digits")
    seen: set[str] = set()
    for entry in manifest.files:
        want(_safe(entry.path), "a file's path", entry.path, "a relative path below the bundle, with forward slashes")
        want(_key(entry.path) not in seen, "a file's path", entry.path, "each file listed once")
        want(entry.size >= 0, f"the size of {entry.path}", entry.size, "0 or more")
        hexadecimal = re.fullmatch("[0-9a-f]{64}", entry.sha256) is not None
        want(hexadecimal, f"sha256 of {entry.path}", entry.sha256, "64 hex digits")
        want(entry.role in ("payload", "evidence"), f"the role of {entry.path}", entry.role, "payload or evidence")
        seen.add(_key(entry.path))
    folders: dict[str, str] = {}  # as file systems that ignore case see them -> as they are spelled
    for entry in manifest.files:
        for end in (i for i, character in enumerate(entry.path) if character == "/"):
            folder = entry.path[:end]
            want(_key(folder) not in seen, "a file's path", folder, f"a folder, as {entry.path} has it, or a file")
            spelled = folders.setdefault(_key(folder), folder)
            want(spelled == folder, "a file's path", entry.path, f"the folder spelled {spelled}, as elsewhere")
    if manifest.proof.report is not None:
        listed = _key(manifest.proof.report) in seen
        want(listed, "proof.report", manifest.proof.report, "a file that the manifest lists")
    digest = payload_digest(manifest.files)
    want(manifest.payload_digest == digest, "payload_digest", manifest.payload_digest, f"{digest} by the files listed")


def _key(path: str) -> str:
    """Equal for names that some file system takes for one: case, and composed or decomposed letters."""
    return unicodedata.normalize("NFC", path).casefold()


def _safe(path: str) -> bool:
    parts = path.split("/")
    plain = path.isprintable() and not set(path) & set("\\:") and _key(path) not in (MANIFEST, HALF_MANIFEST, SIGNATURE)
    return plain and all(part not in ("", ".", "..") for part in parts)
