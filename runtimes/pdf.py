"""Pages of a PDF -> images, drawn by PDFium, the extra `pdf`.

Drawn are text, pictures, annotations and filled-in forms, on white, with the longest edge at a given number of pixels:
that which images are resized to anyway. No script is run (this build of PDFium has none), nothing is fetched.

A PDF is hostile: PdfLimits bound its bytes, pages, pixels and seconds. PDFium is not safe for threads: one at a time.

Not covered: passwords, layers that are off, a limit to what PDFium itself takes for one picture in a page (memory, and
time between two objects of a page), a sandbox around it.
"""

import ctypes
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from runtimes.preprocess import MAX_EDGE, ImageError

NEEDS_PASSWORD = 4  # FPDF_ERR_PASSWORD, and next to it an encryption that PDFium does not know
UNKNOWN_SECURITY = 5
RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")


class PdfError(ImageError):
    """The file is not a PDF that can be used."""


@dataclass(frozen=True)
class PdfLimits:
    """What of a PDF is drawn at most; beyond it is a PdfError, not fewer pages."""

    bytes: int = 200 << 20
    pages: int = 20  # that are drawn
    work_s: float = 120


LIMITS = PdfLimits()


def page_numbers(pages: str | None, count: int, where: str, most: int) -> tuple[int, ...]:
    """The pages that "1-3,7" asks for, from 1, in the order given; None: all.

    Raises:
        PdfError: if that is no list of pages, if there is no such page, or if they are more than `most`.
    """
    if pages is None:
        numbers = list(range(1, count + 1))
    else:
        numbers = []
        for piece in pages.replace(" ", "").split(","):
            match = RANGE.fullmatch(piece)
            if not match:
                raise PdfError(f"{where}: pages are {pages[:40]!r}, want numbers and ranges such as 1-3,7")
            first, last = int(match[1]), int(match[2] or match[1])
            if not 1 <= first <= last <= count:
                raise PdfError(f"{where}: pages {piece} asked for, it has 1 to {count}")
            numbers += range(first, min(last, first + most) + 1)  # one too many is enough to be refused
            if len(numbers) > most:
                break
    if len(numbers) > most:
        asked = f"has {count} pages" if pages is None else f"more than {most} pages are asked for"
        raise PdfError(f"{where}: {asked}, at most {most} are looked at: ask for some (pages such as 1-{most})")
    return tuple(numbers)


def read_pdf(
    source: Path | bytes,
    edge: int,
    pages: str | None = None,
    limits: PdfLimits = LIMITS,
    check: Callable[[], None] = lambda: None,
) -> list[Image.Image]:
    """Draws pages.

    Args:
        source: a file, or its content.
        edge: pixels of a page's longest edge, 1 to MAX_EDGE.
        pages: such as "1-3,7"; None: all.
        limits: of what is read.
        check: called now and then; what it raises ends the work.

    Returns:
        RGB images.

    Raises:
        PdfError: naming the file, if it is missing, no PDF, damaged, locked, without pages, or beyond a limit; for
            pages that it does not have; if pypdfium2 is not installed.
        ValueError: for another `edge`.
    """
    if not 1 <= edge <= MAX_EDGE:
        raise ValueError(f"pages of {edge} pixels, want 1 to {MAX_EDGE}")
    where = "the PDF" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else _content(source, where, limits)
    if len(data) > limits.bytes:
        raise PdfError(f"{where}: {len(data):,} bytes, at most {limits.bytes:,} are accepted")
    until = time.monotonic() + limits.work_s

    def tick() -> None:
        check()
        if time.monotonic() > until:
            raise PdfError(f"{where}: takes longer than {limits.work_s:g} s to draw")

    with _document(data, where) as document:
        images = []
        for number in page_numbers(pages, len(document), where, limits.pages):
            tick()
            images.append(_draw(document, number, edge, where, tick))
    return images


def _content(path: Path, where: str, limits: PdfLimits) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(limits.bytes + 1)
    except OSError as exc:
        raise PdfError(f"{where}: cannot be read: {exc.strerror or exc}") from exc


@contextmanager
def _document(data: bytes, where: str) -> Iterator[Any]:
    try:
        import pypdfium2
    except ImportError as exc:
        raise PdfError(f"{where}: PDFs need pypdfium2: pip install '.[pdf]'") from exc
    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as exc:
        # PDFium's code is the last error's: a document without pages leaves that of the one before.
        if b"/Encrypt" in data and getattr(exc, "err_code", None) in (NEEDS_PASSWORD, UNKNOWN_SECURITY):
            raise PdfError(f"{where}: is locked with a password") from exc
        raise PdfError(f"{where}: cannot be read as a PDF with pages") from exc
    with closing(document):
        if not len(document):
            raise PdfError(f"{where}: has no pages")
        try:
            document.init_forms()
            yield document
        except pypdfium2.PdfiumError as exc:
            raise PdfError(f"{where}: is damaged: {exc}") from exc


def _draw(document: Any, number: int, edge: int, where: str, tick: Callable[[], None]) -> Image.Image:
    """One page, in steps between which `tick` may raise."""
    import pypdfium2
    from pypdfium2 import raw

    with closing(document[number - 1]) as page:
        points_wide, points_high = page.get_size()
        if not (0 < points_wide < 1e6 and 0 < points_high < 1e6):
            raise PdfError(f"{where}: page {number} is {points_wide:g} x {points_high:g} points")
        scale = edge / max(points_wide, points_high)
        width, height = max(1, round(points_wide * scale)), max(1, round(points_high * scale))
        raised: list[BaseException] = []

        def pause(_: Any) -> int:
            try:
                tick()
            except BaseException as exc:  # noqa: BLE001  # raised again where PDFium has returned
                raised.append(exc)
            return bool(raised)

        waits = raw.IFSDK_PAUSE(version=1)
        waits.NeedToPauseNow = type(waits.NeedToPauseNow)(pause)
        with closing(pypdfium2.PdfBitmap.new_native(width, height, raw.FPDFBitmap_BGR)) as bitmap:
            bitmap.fill_rect((255, 255, 255, 255), 0, 0, width, height)
            where_to = (0, 0, width, height, 0, raw.FPDF_ANNOT)
            state = raw.FPDF_RenderPageBitmap_Start(bitmap, page, *where_to, ctypes.byref(waits))
            raw.FPDF_RenderPage_Close(page)
            if raised:
                raise raised[0]
            if state != raw.FPDF_RENDER_DONE:
                raise PdfError(f"{where}: page {number} cannot be drawn")
            if document.formenv:
                raw.FPDF_FFLDraw(document.formenv, bitmap, page, *where_to)
            image: Image.Image = bitmap.to_pil().convert("RGB").copy()  # its pixels are the bitmap's, which ends here
            return image
