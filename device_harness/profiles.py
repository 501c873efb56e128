"""Profiles of devices: what an app gets there and what a bundle must reach, from `profiles.toml` or another file."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

SHIPPED = Path(__file__).with_name("profiles.toml")
KINDS = ("phone", "tablet", "board", "laptop")
ENGINES = {"onnx": "onnxruntime", "coreml": "coreml"}  # target -> what runs it
OPTIONS = {"onnxruntime": {"mlas.disable_kleidiai", "session.x64quantprecision"}, "coreml": set[str]()}
TILES = (1, 5, 10, 17)
MOST_CORES, MOST_MIB, MOST_TOKENS, MOST_MS = 1024, 1 << 24, 1 << 20, 86_400_000
SOURCED = ("cores", "memory_mib", "limits")  # what `sources` must speak of


T = TypeVar("T", int, str)


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the file and the field."""


@dataclass(frozen=True)
class Bounds:
    """What a run must stay below, ms. Peak memory has its bound in the profile."""

    load_ms: int
    first_token_ms: int
    token_ms: int


@dataclass(frozen=True)
class Profile:
    """One device.

    target: "onnx" or "coreml", the bundle that it takes.
    cores: CPU cores that a run gets.
    memory_mib: the most that an app may use.
    options: of the engine; for onnxruntime, session settings.
    tiles: the most tiles an image is cut into.
    context: tokens that must fit.
    sources: where the figures come from.
    """

    name: str
    title: str
    kind: str
    target: str
    cores: int
    memory_mib: int
    engine: str
    options: Mapping[str, str]
    tiles: int
    context: int
    limits: Bounds
    sources: Mapping[str, str]


def read_profiles(path: Path = SHIPPED) -> dict[str, Profile]:
    """All profiles of a file, by name.

    Raises:
        ProfileError: if it cannot be read, or a field is missing, unknown or out of its range.
    """
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except OSError as exc:
        raise ProfileError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    except ValueError as exc:  # not UTF-8, or not TOML
        raise ProfileError(f"{path}: is not TOML: {exc}") from exc
    if not tables:
        raise ProfileError(f"{path}: holds no profile")
    return {name: _profile(name, table, f"{path}: {name}") for name, table in tables.items()}


def find_profile(name: str) -> Profile:
    """A shipped profile by name, or one of a file's as FILE.toml:NAME (FILE.toml alone if it holds just one).

    Raises:
        ProfileError: if there is none, naming those that there are.
    """
    file, colon, inner = name.rpartition(":")
    if name.endswith(".toml"):
        profiles = read_profiles(Path(name))
        if len(profiles) > 1:
            raise ProfileError(f"{name}: holds {', '.join(profiles)}; name one as {name}:{next(iter(profiles))}")
        return next(iter(profiles.values()))
    where = Path(file) if colon and file.endswith(".toml") else SHIPPED
    wanted, profiles = (inner if where is not SHIPPED else name), read_profiles(where)
    if wanted not in profiles:
        raise ProfileError(f"profile {wanted!r} is unknown, want one of {', '.join(profiles)} or a .toml file")
    return profiles[wanted]


def _profile(name: str, table: Any, where: str) -> Profile:
    keys = {
        *("title", "kind", "target", "cores", "memory_mib", "engine", "options", "tiles", "context"),
        *("limits", "sources"),
    }
    _keys(table, keys, where, optional={"options"})
    target = _one_of(table, "target", tuple(ENGINES), where)
    engine = _one_of(table, "engine", (ENGINES[target],), where)
    options = table.get("options", {})
    _keys(options, OPTIONS[engine], f"{where}: options", optional=OPTIONS[engine])
    bounds = table["limits"]
    _keys(bounds, {"load_ms", "first_token_ms", "token_ms"}, f"{where}: limits")
    sources = table["sources"]
    _keys(sources, set(SOURCED), f"{where}: sources")
    return Profile(
        name=name,
        title=_text(table, "title", where),
        kind=_one_of(table, "kind", KINDS, where),
        target=target,
        cores=_number(table, "cores", MOST_CORES, where),
        memory_mib=_number(table, "memory_mib", MOST_MIB, where),
        engine=engine,
        options={key: _text(options, key, f"{where}: options") for key in options},
        tiles=_one_of(table, "tiles", TILES, where),
        context=_number(table, "context", MOST_TOKENS, where),
        limits=Bounds(**{key: _number(bounds, key, MOST_MS, f"{where}: limits") for key in bounds}),
        sources={key: _text(sources, key, f"{where}: sources") for key in SOURCED},
    )


def _keys(found: Any, wanted: set[str], where: str, optional: frozenset[str] | set[str] = frozenset()) -> None:
    if not isinstance(found, dict):
        raise ProfileError(f"{where}: is {type(found).__name__}, want a table")
    if missing := sorted(wanted - set(found) - set(optional)):
        raise ProfileError(f"{where}: {', '.join(missing)} missing")
    if unknown := sorted(set(found) - wanted):
        raise ProfileError(f"{where}: unknown {', '.join(unknown)}, want {', '.join(sorted(wanted)) or 'none'}")


def _one_of(table: dict[str, Any], key: str, allowed: tuple[T, ...], where: str) -> T:
    value = table[key]
    if isinstance(value, bool) or value not in allowed:
        raise ProfileError(f"{where}: {key} is {value!r}, want {' or '.join(map(str, allowed))}")
    return allowed[allowed.index(value)]


def _number(table: dict[str, Any], key: str, most: int, where: str) -> int:
    value = table[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ProfileError(f"{where}: {key} is {value!r}, want a whole number of 1 to {most:,}")
    return value


def _text(table: dict[str, Any], key: str, where: str) -> str:
    value = table[key]
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ProfileError(f"{where}: {key} is {value!r}, want a line of text")
    return value
