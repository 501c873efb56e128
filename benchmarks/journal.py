"""What was answered so far, in files that outlive a killed run.

A journal is a JSONL file: a header, then a row an item, each written whole and at once. Of the reference also the
logits are kept, in a file of bare float32 numbers beside it that rows point into. Not covered: a machine that loses
its power, which may take the last rows with it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from runtimes.runner import Floats


class JournalError(RuntimeError):
    """A journal that cannot be read, written, or is another run's at the moment; the message names it."""


class Journal:
    """Rows by the key in their field "item"; of two with one key the later holds. Made by `open_journal`."""

    def __init__(self, path: Path, header: dict[str, Any], file: BinaryIO) -> None:
        self.path, self._file = path, file
        self.rows: dict[str, dict[str, Any]] = {}
        self._header = json.loads(json.dumps(header))  # as it is read again
        self._begun = self._read()

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row. Raises JournalError if it cannot be written."""
        lines = [] if self._begun else [self._header]
        text = "".join(json.dumps(line) + "\n" for line in [*lines, row])
        try:
            self._file.write(text.encode())
            self._file.flush()
        except OSError as exc:
            raise JournalError(f"{self.path}: cannot be written: {exc.strerror or exc}") from exc
        self._begun = True
        self.rows[row["item"]] = row

    def _read(self) -> bool:
        """Reads the rows and cuts off a last line that was not finished; whether there is a header."""
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            row = _object(line)
            if row is None:
                if line.endswith(b"\n") and self._file.read(1):  # not the last one
                    raise JournalError(f"{self.path}: line {number} is no row of a journal; move the file away")
                break
            if number == 1 and row != self._header:
                raise JournalError(f"{self.path}: line 1 is of another system or data; move the file away")
            if number > 1:
                if not isinstance(row.get("item"), str):
                    raise JournalError(f"{self.path}: line {number} has no item; move the file away")
                self.rows[row["item"]] = row
            whole += len(line)
        self._file.truncate(whole)
        self._file.seek(whole)
        return whole > 0


def _object(line: bytes) -> dict[str, Any] | None:
    """The object in a finished line."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


@contextmanager
def open_journal(path: Path, header: dict[str, Any]) -> Iterator[Journal]:
    """The journal at `path`, made with its first row. While it is open no other process can open it.

    Raises:
        JournalError: if it cannot be opened, is open elsewhere, or has another header.
    """
    import fcntl  # POSIX only, as making bundles is

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as exc:
        raise JournalError(f"{path}: cannot be written: {exc.strerror or exc}") from exc
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise JournalError(f"{path}: another run is writing to it") from exc
        yield Journal(path, header, file)


class LogitFile:
    """Logits f32 [T, vocab], one after the other; a place is the offset in bytes of the first number."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, logits: Floats) -> int:
        """Adds logits; returns their place. Raises JournalError if they cannot be written."""
        try:
            with self.path.open("ab") as file:
                place = file.tell()
                file.write(np.ascontiguousarray(logits, dtype="<f4").tobytes())
        except OSError as exc:
            raise JournalError(f"{self.path}: cannot be written: {exc.strerror or exc}") from exc
        return place

    def holds(self, place: int, tokens: int, vocab: int) -> bool:
        """Whether the file reaches to the end of the logits [tokens, vocab] at a place."""
        return self.path.exists() and self.path.stat().st_size >= place + 4 * tokens * vocab

    def read(self, place: int, tokens: int, vocab: int) -> Floats:
        """The logits f32 [tokens, vocab] at a place. Raises JournalError if they are not there."""
        try:
            with self.path.open("rb") as file:
                file.seek(place)
                data = file.read(4 * tokens * vocab)
        except OSError as exc:
            raise JournalError(f"{self.path}: cannot be read: {exc.strerror or exc}") from exc
        if len(data) < 4 * tokens * vocab:
            raise JournalError(f"{self.path}: was cut off meanwhile")
        return np.frombuffer(data, dtype="<f4").reshape(tokens, vocab)
