"""Whether the fields of a dataclass are what their annotations say, for what an owner writes in a file or in Python."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, get_args, get_origin

from router_client.errors import ConfigError


def check(owner: Any, where: str) -> None:
    """Checks every field. What is kept out of a repr is not quoted: it may be secret.

    Raises:
        ConfigError: naming `where`, the field, what was found and what was wanted.
    """
    for field in fields(owner):
        value = getattr(owner, field.name)
        if not _is(value, field.type):
            found = repr(value) if field.repr else f"a {type(value).__name__}"
            raise ConfigError(f"{where}: {field.name} is {found}, want {_words(field.type)}")


def number(where: str, name: str, value: float | None, least: float, most: float, *, above: bool = False) -> None:
    """Checks a range; None is none, and what is no number is out of every range.

    Raises:
        ConfigError: naming all of that.
    """
    if value is not None and not (least <= value <= most and math.isfinite(value) and not (above and value == least)):
        wanted = f"above {least}" if above else f"{least} or more"
        raise ConfigError(f"{where}: {name} is {value}, want {wanted}{'' if most == math.inf else f', at most {most}'}")


def _is(value: object, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(_is(value, k) for k in inner)
    if origin is tuple and inner[-1] is not ...:
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(_is, value, inner))
    if origin is tuple:
        return isinstance(value, tuple) and all(_is(v, inner[0]) for v in value)
    if origin is frozenset:
        return isinstance(value, frozenset | set) and all(_is(v, inner[0]) for v in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_is(k, inner[0]) and _is(v, inner[1]) for k, v in value.items())
    if origin is Callable:
        return callable(value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


def _words(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
