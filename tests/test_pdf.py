"""runtimes/pdf.py on PDFs that are made here: pages, sizes, limits, and what is refused."""

import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtimes.pdf import PdfError, PdfLimits, page_numbers, read_pdf
from tests.media import content_stream, make_pdf, pages_pdf

pytest.importorskip("pypdfium2", reason="pypdfium2 is not installed: pip install '.[pdf]'")

COLORS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30))


def filled(color: tuple[int, int, int]) -> str:
    """The left half of a page in a colour."""
    return " ".join(f"{c / 255:.4f}" for c in color) + " rg 0 0 100 100 re f"


FOUR = pages_pdf([filled(color) for color in COLORS])


def colors(images: Sequence[Image.Image]) -> list[Any]:
    return [image.getpixel((image.width // 4, image.height // 2)) for image in images]


def test_pages_are_drawn_upright_on_white_with_their_longest_edge_as_asked() -> None:
    images = read_pdf(FOUR, 512)
    assert [image.size for image in images] == [(512, 256)] * 4
    assert [image.mode for image in images] == ["RGB"] * 4
    assert colors(images) == list(COLORS)
    assert images[0].getpixel((400, 128)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("pages", "wanted"), [("1", [0]), ("2-3", [1, 2]), ("4,1", [3, 0]), (" 1-2, 2 ", [0, 1, 1]), ("1-4", [0, 1, 2, 3])]
)
def test_pages_come_as_they_are_asked_for(pages: str, wanted: list[int]) -> None:
    assert colors(read_pdf(FOUR, 64, pages)) == [COLORS[i] for i in wanted]


@pytest.mark.parametrize(
    "pages", ["", "0", "5", "3-2", "2-5", "1-", "a", "1;2", "-1", "1,,2", "9" * 7, "1\n", "\u0661"]
)
def test_pages_that_are_none_are_refused(pages: str) -> None:
    with pytest.raises(PdfError, match="the PDF: pages "):
        read_pdf(FOUR, 64, pages)


def test_a_turned_page_is_drawn_as_it_is_read() -> None:
    (image,) = read_pdf(pages_pdf([filled(COLORS[0])], page="/Rotate 90"), 200)
    assert image.size == (100, 200)
    assert image.getpixel((50, 20)) == COLORS[0]
    assert image.getpixel((50, 180)) == (255, 255, 255)


def test_a_filled_form_is_drawn() -> None:
    appearance = (
        f"<</Type/XObject/Subtype/Form/BBox[0 0 80 80]/Length 38>>stream\n{'1 0 0 rg 0 0 80 80 re f':<38}\nendstream"
    )
    field = (
        "<</Type/Annot/Subtype/Widget/FT/Tx/T(a)/V(b)/F 4/Rect[10 10 90 90]/P 3 0 R/AP<</N 6 0 R>>/DA(/Helv 0 Tf 0 g)>>"
    )
    data = make_pdf(
        [
            "<</Type/Catalog/Pages 2 0 R/AcroForm<</Fields[5 0 R]>>>>",
            "<</Type/Pages/Count 1/Kids[3 0 R]>>",
            "<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Contents 4 0 R/Annots[5 0 R]>>",
            content_stream("0 g"),
            field,
            appearance,
        ]
    )
    (image,) = read_pdf(data, 200)
    red, green, blue = np.asarray(image)[50, 50].tolist()
    assert (red, green, blue) != (255, 255, 255)
    assert red > max(green, blue)


def test_a_file_gives_what_its_bytes_give(tmp_path: Path) -> None:
    (tmp_path / "four.pdf").write_bytes(FOUR)
    found, wanted = read_pdf(tmp_path / "four.pdf", 100, "3"), read_pdf(FOUR, 100, "3")
    np.testing.assert_array_equal(np.asarray(found[0]), np.asarray(wanted[0]))


LOCKED = make_pdf(
    [
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Count 1/Kids[3 0 R]>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>",
        f"<</Filter/Standard/V 1/R 2/P -4/O<{'31' * 32}>/U<{'32' * 32}>>>",
    ],
    trailer="/Encrypt 4 0 R/ID[<00><00>]",
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b""), "cannot be read as a PDF"),
        (lambda path: path.write_bytes(b"%PDF-1.7\nnothing"), "cannot be read as a PDF"),
        (lambda path: Image.new("RGB", (9, 9)).save(path, "PNG"), "cannot be read as a PDF"),
        (lambda path: path.write_bytes(LOCKED), "is locked with a password"),
        (lambda path: path.write_bytes(pages_pdf([])), "cannot be read as a PDF with pages"),
        (lambda path: path.write_bytes(pages_pdf(["0 g"], "0 0 10000000 1")), r"page 1 is 1e\+07 x 1 points"),
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
        (lambda path: None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_pdf_is_refused_by_name(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / "a.pdf"
    make(path)
    with pytest.raises(PdfError, match=message) as caught:
        read_pdf(path, 64)
    assert str(path) in str(caught.value)


def test_a_pdf_cut_off_is_an_error_or_whole_pages() -> None:
    ends = set()
    for size in range(20, len(FOUR), 37):
        try:
            found = read_pdf(FOUR[:size], 64)
            assert all(image.size == (64, 32) for image in found)
            ends.add("read")
        except PdfError:
            ends.add("refused")
    assert "refused" in ends


def test_any_damage_is_an_error_or_pages() -> None:
    random = np.random.default_rng(1)
    for _ in range(150):
        mutant = bytearray(FOUR)
        for at in random.integers(0, len(FOUR), 6):
            mutant[at] = int(random.integers(256))
        with suppress(PdfError):
            assert all(max(image.size) == 64 for image in read_pdf(bytes(mutant), 64))


@pytest.mark.parametrize(
    ("limits", "pages", "message"),
    [
        (PdfLimits(bytes=100), None, "bytes, at most 100 are accepted"),
        (PdfLimits(pages=3), None, "has 4 pages, at most 3 are looked at"),
        (PdfLimits(pages=3), "1-4", "more than 3 pages are asked for"),
        (PdfLimits(pages=3), "1,1,1,1", "more than 3 pages are asked for"),
        (PdfLimits(work_s=-1), None, "takes longer than"),
    ],
)
def test_what_is_beyond_a_limit_is_refused(limits: PdfLimits, pages: str | None, message: str) -> None:
    with pytest.raises(PdfError, match=message):
        read_pdf(FOUR, 64, pages, limits)


def test_a_page_that_takes_long_ends_when_it_is_told_to() -> None:
    slow = pages_pdf(["0.1 w " + " ".join(f"0 0 m {i % 200} 100 l S" for i in range(100_000))])

    class Enough(Exception):
        pass

    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) > 3:  # past what is checked between pages
            raise Enough

    with pytest.raises(Enough):
        read_pdf(slow, 512, check=check)
    assert read_pdf(FOUR, 64, "1")  # PDFium is as good as before


def test_a_range_as_large_as_numbers_go_is_refused_at_once() -> None:
    with pytest.raises(PdfError, match="more than 20 pages"):
        page_numbers("1-999999", 999999, "x", 20)


def test_a_picture_in_a_pdf_is_drawn() -> None:
    out = io.BytesIO()
    Image.new("RGB", (60, 30), COLORS[2]).save(out, "PDF")
    (image,) = read_pdf(out.getvalue(), 120)
    assert image.size == (120, 60)
    found = np.asarray(image)[30, 60].astype(int)
    assert np.abs(found - COLORS[2]).max() <= 3  # Pillow packs it as JPEG
