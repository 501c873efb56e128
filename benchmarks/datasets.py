"""Reads the questions of a data set from the file that it is published as; which one it is, its content says.

    project    documents.jsonl, as `make export-android DATA=` takes it        images: beside the file
    DocVQA     {"dataset_name", "data": [{"questionId", "image", ...}]}        images: as named, beside the file
    TextVQA    {"dataset_name", "data": [{"image_id", "answers": [ten]}]}      images: train_images, as <image_id>.jpg
    ChartQA    [{"imgname", "query", "label"}]                                 images: png

Files of the three come from elsewhere: an image that they name outside of the image folder, by its path or by a link,
is refused. Not covered: splits without answers, images that are fetched, data sets kept as Parquet.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scores import ANNOTATORS
from export.documents import MAX_DATA_LINE, DataError, read_data

MAX_BYTES = 1 << 30  # of a file read as a whole: a training split of TextVQA has a tenth of it
FORMATS = "DocVQA's, TextVQA's or ChartQA's JSON, or lines of JSON with image, question and answer"


@dataclass(frozen=True)
class Item:
    """A question on an image (or on none) and the answers that count as right (none: only compared)."""

    name: str  # what the data set calls it, for reports
    image: Path | None
    question: str
    answers: tuple[str, ...]
    task: str


@dataclass(frozen=True)
class DataSet:
    """Questions that are scored by one metric."""

    name: str
    metric: str  # of benchmarks.scores.METRICS
    items: tuple[Item, ...]


def read_dataset(path: Path, images: Path | None = None, limit: int | None = None) -> DataSet:
    """Reads a data set of any of the four formats.

    Args:
        path: its file; for the project's format also the folder with documents.jsonl.
        images: the folder of the images; None: where the table above has them, beside the file.
        limit: read at most this many items.

    Raises:
        DataError: naming file, item and field.
    """
    if limit is not None and limit < 1:
        raise DataError(f"{path}: a limit of {limit} items, want 1 or more")
    content = None if path.is_dir() else _whole(path)
    if content is None:
        if images is not None:
            raise DataError(f"{path}: names its images relative to itself: a folder of images is for other formats")
        documents = read_data(path, limit)
        items = [Item(str(i), d.image, d.question, d.answers, d.task) for i, d in enumerate(documents, 1)]
        return DataSet("documents", "exact", tuple(items))
    rows = content.get("data") if isinstance(content, dict) else content
    where = f"{path}: data" if isinstance(content, dict) else str(path)
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
        raise DataError(f"{where}: is no list with an object in it; want {FORMATS}")
    keys, rows = rows[0].keys(), rows[:limit]
    if isinstance(content, dict) and "questionId" in keys:
        folder = _Images(images or path.parent)
        return DataSet("DocVQA", "anls", tuple(_docvqa(row, f"{where}[{i}]", folder) for i, row in enumerate(rows)))
    if isinstance(content, dict) and "image_id" in keys:
        folder = _Images(images or path.parent / "train_images")  # those of the validation split are in it too
        return DataSet("TextVQA", "vqa", tuple(_textvqa(row, f"{where}[{i}]", folder) for i, row in enumerate(rows)))
    if isinstance(content, list) and "imgname" in keys:
        folder = _Images(images or path.parent / "png")
        found = tuple(_chartqa(row, f"{where}[{i}]", folder, i) for i, row in enumerate(rows))
        return DataSet("ChartQA", "relaxed", found)
    raise DataError(f"{where}[0]: has the fields {', '.join(sorted(map(str, keys)))[:200]}; want {FORMATS}")


def _whole(path: Path) -> Any:
    """The content of a file that is one JSON value; None for a file of lines."""
    try:
        with path.open("rb") as file:
            first = file.readline(MAX_DATA_LINE)
            while first and not first.strip():
                first = file.readline(MAX_DATA_LINE)
            if _is_document(first):
                return None
            if (size := path.stat().st_size) > MAX_BYTES:
                raise DataError(f"{path}: has {size:,} bytes, at most {MAX_BYTES:,} are read")
            return json.loads(first + file.read())
    except OSError as exc:
        raise DataError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        if isinstance(exc, DataError):
            raise
        raise DataError(f"{path}: not JSON: {exc}; want {FORMATS}") from exc


def _is_document(line: bytes) -> bool:
    """Whether a file's first line is one of the project's format."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "data" not in row


class _Images:
    """A folder of images, and what it takes for a file to be one of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; name the one of the images (--images)")
        self._resolved = folder.resolve()

    def find(self, name: str, where: str) -> Path:
        """The image's path. Raises DataError if it is not a file, or one outside of the folder."""
        path = self.folder / name
        try:
            inside, there = path.resolve().is_relative_to(self._resolved), path.is_file()
        except (OSError, ValueError, RuntimeError) as exc:  # too long, a null byte, links in a circle
            raise DataError(f"{where} is {name[:80]!r}, which is no path: {exc}") from exc
        if not inside:
            raise DataError(f"{where} is {name[:80]!r}, which leads out of {self.folder}")
        if not there:
            raise DataError(f"{where} is {name[:80]!r}, but there is no file {path}")
        return path


def _docvqa(row: Any, where: str, images: _Images) -> Item:
    """M. Mathew et al., "DocVQA", WACV 2021; https://www.docvqa.org/datasets."""
    row = _object(row, where)
    image = images.find(_text(row, "image", where), f"{where}.image")
    return Item(_name(row, "questionId", where), image, _text(row, "question", where), _texts(row, where), "docvqa")


def _textvqa(row: Any, where: str, images: _Images) -> Item:
    """A. Singh et al., "Towards VQA Models That Can Read", CVPR 2019; https://textvqa.org/dataset."""
    row = _object(row, where)
    image = images.find(f"{_text(row, 'image_id', where)}.jpg", f"{where}.image_id")
    answers = _texts(row, where)
    if len(answers) != ANNOTATORS:
        raise DataError(f"{where}.answers are {len(answers)}, want those of {ANNOTATORS} people")
    return Item(_name(row, "question_id", where), image, _text(row, "question", where), answers, "textvqa")


def _chartqa(row: Any, where: str, images: _Images, number: int) -> Item:
    """A. Masry et al., "ChartQA", Findings of ACL 2022; https://github.com/vis-nlp/ChartQA."""
    row = _object(row, where)
    image = images.find(_text(row, "imgname", where), f"{where}.imgname")
    label = _text(row, "label", where)
    return Item(str(number), image, _text(row, "query", where), (label,), "chartqa")


def _object(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: is {type(row).__name__}, want an object")
    return row


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}.{key} is {repr(value)[:80]}, want a text")
    return value


def _name(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, (int, str)) or isinstance(value, bool) or not str(value).isprintable():
        raise DataError(f"{where}.{key} is {repr(value)[:80]}, want a number or a text in one line")
    return str(value)


def _texts(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The field "answers"."""
    values: Sequence[Any] | None = row.get("answers")
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise DataError(f"{where}.answers is {repr(values)[:80]}, want a list of texts (a test split has none)")
    return tuple(values)
