"""Data sets are read from files in the formats that they are published in; what is wrong in one is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks.datasets import DataSet, read_dataset
from export.documents import DataError

DOCVQA = {
    "dataset_name": "docvqa",
    "dataset_version": "1.0",
    "dataset_split": "val",
    "data": [
        {
            "questionId": 49153,
            "question": "What is the 'actual' value per 1000?",
            "question_types": ["figure/diagram"],
            "image": "documents/a_1.png",
            "docId": 14465,
            "ucsf_document_id": "a",
            "ucsf_document_page_no": "1",
            "answers": ["0.28", ".28"],
            "data_split": "val",
        },
        {"questionId": 49154, "question": "Which page?", "image": "documents/a_1.png", "answers": ["1"]},
    ],
}
TEXTVQA = {
    "dataset_type": "val",
    "dataset_name": "textvqa",
    "dataset_version": "0.5.1",
    "data": [
        {
            "question": "what is the brand?",
            "image_id": "003a8ae2ef43b901",
            "image_classes": ["Camera"],
            "answers": ["nokia"] * 9 + ["nokia phone"],
            "question_tokens": ["what"],
            "question_id": 34602,
            "set_name": "val",
        }
    ],
}
CHARTQA = [
    {"imgname": "41699051005347.png", "query": "How many bars?", "label": "3"},
    {"imgname": "41699051005347.png", "query": "Which is larger?", "label": "Rent"},
]
FILES: dict[str, tuple[Any, str]] = {
    "DocVQA": (DOCVQA, "documents/a_1.png"),
    "TextVQA": (TEXTVQA, "train_images/003a8ae2ef43b901.jpg"),
    "ChartQA": (CHARTQA, "png/41699051005347.png"),
}
METRIC = {"DocVQA": "anls", "TextVQA": "vqa", "ChartQA": "relaxed"}


def write(folder: Path, content: Any, image: str, indent: int | None = None) -> Path:
    (folder / image).parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / image)
    (folder / "data.json").write_text(json.dumps(content, indent=indent), encoding="utf-8")
    return folder / "data.json"


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", FILES)
def test_a_published_format_is_recognised_by_its_content(name: str, indent: int | None, tmp_path: Path) -> None:
    content, image = FILES[name]
    data = read_dataset(write(tmp_path, content, image, indent))
    assert (data.name, data.metric) == (name, METRIC[name])
    assert {item.image for item in data.items} == {tmp_path / image}
    first = data.items[0]
    want = {
        "DocVQA": ("49153", "What is the 'actual' value per 1000?", ("0.28", ".28")),
        "TextVQA": ("34602", "what is the brand?", ("nokia",) * 9 + ("nokia phone",)),
        "ChartQA": ("0", "How many bars?", ("3",)),
    }
    assert (first.name, first.question, first.answers) == want[name]


@pytest.mark.parametrize("name", FILES)
def test_a_named_folder_of_images_goes_before_the_usual_one(name: str, tmp_path: Path) -> None:
    content, image = FILES[name]
    path = write(tmp_path, content, image)
    elsewhere = tmp_path / "elsewhere"
    usual = tmp_path / Path(image).parts[0]
    elsewhere.mkdir()
    with pytest.raises(DataError, match="no file"):
        read_dataset(path, images=elsewhere)
    inside = elsewhere / usual.name if name == "DocVQA" else elsewhere / "images"
    usual.rename(inside)
    found = read_dataset(path, images=elsewhere if name == "DocVQA" else inside).items[0].image
    assert found == inside / Path(image).name


def test_the_projects_own_lines_are_read_as_the_proof_reads_them(tmp_path: Path) -> None:
    rows = [{"image": None, "question": "Why?", "answer": ["a", "b"], "task": "why"}, {"question": "How?"}]
    (tmp_path / "documents.jsonl").write_text("\n" + "\n".join(map(json.dumps, rows)), encoding="utf-8")
    for path in (tmp_path, tmp_path / "documents.jsonl"):
        data = read_dataset(path)
        assert (data.name, data.metric) == ("documents", "exact")
        assert [(i.name, i.answers, i.task) for i in data.items] == [("1", ("a", "b"), "why"), ("2", (), "all")]
    with pytest.raises(DataError, match="relative to itself"):
        read_dataset(tmp_path, images=tmp_path)
    (tmp_path / "documents.jsonl").write_text('{"image": 3, "question": "?"}')
    with pytest.raises(DataError, match="line 1: image is 3"):
        read_dataset(tmp_path)
    (tmp_path / "documents.jsonl").write_text('{"question": "?"}\n' + "[" * 100_000)
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_dataset(tmp_path)


def test_a_limit_leaves_the_rest_unread(tmp_path: Path) -> None:
    rows = [CHARTQA[0], {"broken": True}]
    path = write(tmp_path, rows, FILES["ChartQA"][1])
    assert len(read_dataset(path, limit=1).items) == 1
    with pytest.raises(DataError, match=r"data\.json\[1\]\.imgname is None"):
        read_dataset(path)
    with pytest.raises(DataError, match="limit of 0"):
        read_dataset(path, limit=0)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("DocVQA", "question", "", r"data\[0\]\.question is '', want a text"),
        ("DocVQA", "questionId", None, r"data\[0\]\.questionId is None, want a number or a text"),
        (
            "DocVQA",
            "questionId",
            "\x1b[2J",
            r"data\[0\]\.questionId is '\\x1b\[2J', want a number or a text in one line",
        ),
        ("DocVQA", "answers", [], r"data\[0\]\.answers is \[\], want a list of texts"),
        ("DocVQA", "answers", ["a", 1], r"data\[0\]\.answers is \['a', 1\]"),
        ("DocVQA", "answers", "a", r"data\[0\]\.answers is 'a'"),
        ("DocVQA", "image", 7, r"data\[0\]\.image is 7, want a text"),
        ("DocVQA", "image", "documents/none.png", r"data\[0\]\.image is 'documents/none.png', but there is no file"),
        ("TextVQA", "answers", ["a"] * 9, r"data\[0\]\.answers are 9, want those of 10 people"),
        ("TextVQA", "image_id", None, r"data\[0\]\.image_id is None, want a text"),
        ("TextVQA", "question_id", [1], r"data\[0\]\.question_id is \[1\]"),
        ("ChartQA", "label", 3, r"\[0\]\.label is 3, want a text"),
        ("ChartQA", "query", None, r"\[0\]\.query is None, want a text"),
    ],
)
def test_a_wrong_field_is_named_with_its_item(name: str, field: str, value: Any, message: str, tmp_path: Path) -> None:
    content, image = FILES[name]
    content = json.loads(json.dumps(content))
    (content["data"] if isinstance(content, dict) else content)[0][field] = value
    path = write(tmp_path, content, image)
    with pytest.raises(DataError, match=message) as caught:
        read_dataset(path)
    assert str(tmp_path) in str(caught.value)


HOSTILE = [
    "../outside.png",
    "/etc/hostname",
    "documents/../../outside.png",
    "link/outside.png",
    "link.png",
    "a\0b",
    ".",
]


@pytest.mark.parametrize("image", [*HOSTILE, "x" * 5000, "circle"])
@pytest.mark.parametrize("name", FILES)
def test_an_image_outside_of_the_folder_is_refused(name: str, image: str, tmp_path: Path) -> None:
    content, inside = FILES[name]
    content = json.loads(json.dumps(content))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder, content, inside)
    images = folder if name == "DocVQA" else (folder / inside).parent
    for suffix in ("", ".jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"outside.png{suffix}", "PNG")
        (images / f"link.png{suffix}").symlink_to(tmp_path / f"outside.png{suffix}")
        (images / f"circle{suffix}").symlink_to(images / f"circle{suffix}")
    (images / "link").symlink_to(tmp_path)
    field = {"DocVQA": "image", "TextVQA": "image_id", "ChartQA": "imgname"}[name]
    (content["data"] if isinstance(content, dict) else content)[0][field] = image
    (folder / "data.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=rf"\[0\]\.{field} is .*(leads out of|no path|no file)"):
        read_dataset(folder / "data.json")


def test_a_folder_of_images_may_itself_be_a_link(tmp_path: Path) -> None:
    content, image = FILES["ChartQA"]
    (tmp_path / "real").mkdir()
    write(tmp_path / "real", content, image)
    (tmp_path / "png").symlink_to(tmp_path / "real" / "png")
    assert read_dataset(tmp_path / "real" / "data.json", images=tmp_path / "png").items


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "no list with an object"),
        ("[1]", "no list with an object"),
        ('{"data": {}}', "data: is no list"),
        ('{"data": [{"id": 1}]}', r"data\[0\]: has the fields id; want DocVQA"),
        ('[{"questionId": 1}]', r"\[0\]: has the fields questionId"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('"text"', "no list"),
        ('{"question": 3}', "line 1: question is 3"),
    ],
)
def test_another_content_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path / "data.json")


def test_a_file_that_is_missing_or_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_dataset(tmp_path / "none.json")
    (tmp_path / "data.json").write_text(json.dumps(CHARTQA))
    with pytest.raises(DataError, match="no such folder"):
        read_dataset(tmp_path / "data.json")
    monkeypatch.setattr("benchmarks.datasets.MAX_BYTES", 10)
    with pytest.raises(DataError, match="at most 10 are read"):
        read_dataset(tmp_path / "data.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["questionId", "question", "image", "image_id", "answers", "imgname", "query", "label", "data"]
)


@given(st.dictionaries(FIELDS, JSON, max_size=6), st.booleans())
def test_any_json_is_read_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, row: dict[str, Any], listed: bool
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "png").mkdir()
    path = folder / "data.json"
    path.write_text(json.dumps([row] if listed else {"data": [row]}))
    message = str(folder)
    try:
        data: DataSet | None = read_dataset(path)
    except DataError as exc:
        data, message = None, str(exc)
    assert str(folder) in message
    assert data is None or len(data.items) == 1
