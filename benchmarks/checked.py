"""JSON from a file whose content may be anything: each value is checked where it is taken, and a fault names its place.

Texts come back in one line of printable characters, cut where they are long; numbers are finite. Fields that nothing
asks for are passed over.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

MOST_BYTES = 1 << 28  # of a file
MOST_TEXT = 200  # characters of a text
MOST_NUMBER = 1e15


class ReportError(ValueError):
    """A file that cannot be reported on; the message names the file, the line and the field."""


@dataclass(frozen=True)
class At:
    """A value of a JSON file and where it stands: the file with its line, and the field."""

    value: Any
    where: str
    field: str = ""

    def fail(self, wanted: str) -> NoReturn:
        """Raises ReportError with place, what was found and what was wanted."""
        name = f"{self.field} is" if self.field else "is"
        raise ReportError(f"{self.where}: {name} {one_line(repr(self.value), 60)}, want {wanted}")

    def __getitem__(self, key: str) -> "At":
        """A field of an object, which must be there."""
        if not isinstance(self.value, dict):
            self.fail("an object")
        if key not in self.value:
            raise ReportError(f"{self.where}: {self._inner(key)} is missing")
        return At(self.value[key], self.where, self._inner(key))

    def _inner(self, key: str) -> str:
        return f"{self.field}.{one_line(key, 40)}".lstrip(".")

    def optional(self, key: str) -> "At | None":
        """A field of an object; None where it is not there, or null."""
        if isinstance(self.value, dict) and self.value.get(key) is None:
            return None
        return self[key]

    def fields(self, most: int = 100) -> dict[str, "At"]:
        """All fields of an object."""
        if not isinstance(self.value, dict) or len(self.value) > most:
            self.fail(f"an object of at most {most} fields")
        return {one_line(key): At(value, self.where, self._inner(key)) for key, value in self.value.items()}

    def items(self, most: int = 1 << 20, least: int = 0) -> list["At"]:
        """All items of a list."""
        if not isinstance(self.value, list) or not least <= len(self.value) <= most:
            self.fail(f"a list of {least} to {most:,} items")
        return [At(value, self.where, f"{self.field}[{i}]") for i, value in enumerate(self.value)]

    def number(self, least: float = 0, most: float = MOST_NUMBER) -> float:
        """A finite number."""
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            self.fail("a number")
        if not least <= self.value <= most:  # nor is NaN
            self.fail(f"a number of {least:,} to {most:,.0f}")
        return float(self.value)

    def positive(self) -> float:
        """A number above 0."""
        if not self.number():
            self.fail("a number above 0")
        return float(self.value)

    def whole(self, least: int = 0, most: int = 1 << 53) -> int:
        """A whole number."""
        if isinstance(self.value, bool) or not isinstance(self.value, int) or not least <= self.value <= most:
            self.fail(f"a whole number of {least:,} to {most:,}")
        return self.value

    def flag(self) -> bool:
        """true or false."""
        if not isinstance(self.value, bool):
            self.fail("true or false")
        return self.value

    def text(self) -> str:
        """A text, in one line."""
        if not isinstance(self.value, str):
            self.fail("a text")
        return one_line(self.value)

    def numbers(self, *, least_items: int = 0, positive: bool = False) -> tuple[float, ...]:
        """A list of numbers."""
        return tuple(at.positive() if positive else at.number() for at in self.items(least=least_items))


def one_line(text: str, most: int = MOST_TEXT) -> str:
    """A text of anyone's in one line of printable characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: most * 4]).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def read_lines(path: Path) -> Iterator[At]:
    """The objects in a file of JSON lines.

    Raises:
        ReportError: if it cannot be read, holds nothing, or a line is no JSON.
    """
    found = False
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            found = True
            yield _parse(line, f"{path}: line {number}")
    if not found:
        raise ReportError(f"{path}: holds no line")


def read_whole(path: Path) -> At:
    """The content of a JSON file. Raises ReportError if it cannot be read or is no JSON."""
    return _parse(_read(path), str(path))


def _read(path: Path) -> str:
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ReportError(f"{path}: has {size:,} bytes, at most {MOST_BYTES:,} are read")
        return path.read_text("utf-8")
    except OSError as exc:
        raise ReportError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise ReportError(f"{path}: is not UTF-8: {exc}") from exc


def _parse(text: str, where: str) -> At:
    def constant(name: str) -> float:
        raise ValueError(f"{name} is no number")

    try:
        return At(json.loads(text, parse_constant=constant), where)
    except (ValueError, RecursionError) as exc:
        raise ReportError(f"{where}: is not JSON: {exc}") from exc
