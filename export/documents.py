"""Documents to measure or calibrate on: a JSONL file of images, questions and answers, read without trust."""

import json
from dataclasses import dataclass
from pathlib import Path

MAX_DATA_LINE = 1 << 20


class DataError(ValueError):
    """A documents file that cannot be used; the message names the line and the field."""


@dataclass(frozen=True)
class Document:
    """A question on an image (or on none), with the answers that count as right (none: only compared)."""

    image: Path | None
    question: str
    answers: tuple[str, ...]
    task: str


def read_data(path: Path, limit: int | None = None) -> list[Document]:
    """Reads a JSONL file, or documents.jsonl in a folder.

    A line is {"image": path beside the file or null, "question": text, "answer": text or a list of texts
    (optional), "task": name (optional)}.

    Raises:
        DataError: naming the line and the field.
    """
    path = path / "documents.jsonl" if path.is_dir() else path
    documents: list[Document] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(documents) >= limit:
                    break
                if line.strip():
                    documents.append(_document(line, path.parent, f"{path}: line {number}"))
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{path}: cannot be read: {exc}") from exc
    if not documents:
        raise DataError(f"{path}: holds no document")
    return documents


def _document(line: str, folder: Path, where: str) -> Document:
    if len(line) > MAX_DATA_LINE:
        raise DataError(f"{where}: longer than {MAX_DATA_LINE:,} characters")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{where}: not JSON: {exc}") from exc
    if not isinstance(row, dict):
        raise DataError(f"{where}: is {type(row).__name__}, want an object")
    image, question, answer = row.get("image"), row.get("question"), row.get("answer", [])
    if image is not None and not isinstance(image, str):
        raise DataError(f"{where}: image is {image!r}, want a path or null")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: question is {question!r}, want a text")
    answers = [answer] if isinstance(answer, str) else answer
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise DataError(f"{where}: answer is {answer!r}, want a text or a list of texts")
    if image is not None and not (folder / image).is_file():
        raise DataError(f"{where}: image {folder / image} does not exist")
    return Document(folder / image if image else None, question, tuple(answers), str(row.get("task", "all")))
