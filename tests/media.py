"""Videos and PDFs for tests, made as they are needed."""

import io
import zlib
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.video import Rgb


def picture(number: int, width: int = 64, height: int = 48) -> Rgb:
    """A frame that says its number, in squares for bits: bright is 1. The first row of them is the number's."""
    out = np.zeros((height, width, 3), dtype=np.uint8)
    for bit in range(8):
        level = 235 if number >> bit & 1 else 20
        out[: height // 2, bit * width // 8 : (bit + 1) * width // 8] = level
    out[height // 2 :] = (30, 120, 60)
    return out


def write_video(
    path: Path | io.BytesIO,
    frames: Iterable[Rgb],
    *,
    rate: Fraction | int = 25,
    codec: str = "libx264",
    at_ms: Sequence[int] | None = None,
    container: str = "mp4",
    options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
) -> None:
    """Writes a video; `at_ms`: the time of each frame, else they are even."""
    import av  # an extra, which tests that use it ask for first

    with av.open(
        path if isinstance(path, io.BytesIO) else str(path), "w", format=container, options=options or {}
    ) as out:
        stream: Any = out.add_stream(codec, rate=rate, options=codec_options)
        stream.pix_fmt = "yuv420p"
        if at_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, rgb in enumerate(frames):
            if not number:
                stream.height, stream.width = rgb.shape[:2]
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            if at_ms is not None:
                frame.pts, frame.time_base = at_ms[number], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def make_pdf(objects: Sequence[bytes | str], root: int = 1, trailer: str = "") -> bytes:
    """A PDF of these objects, numbered from 1, with a table of their places."""
    out, places = bytearray(b"%PDF-1.7\n"), []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += (
            f"{number} 0 obj\n".encode() + (content.encode() if isinstance(content, str) else content) + b"\nendobj\n"
        )
    table = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    out += b"".join(f"{place:010} 00000 n \n".encode() for place in places)
    out += f"trailer\n<</Size {len(objects) + 1}/Root {root} 0 R{trailer}>>\nstartxref\n{table}\n%%EOF\n".encode()
    return bytes(out)


def content_stream(content: str) -> bytes:
    """A stream of drawing commands."""
    packed = zlib.compress(content.encode())
    return f"<</Length {len(packed)}/Filter/FlateDecode>>stream\n".encode() + packed + b"\nendstream"


def pages_pdf(contents: Sequence[str], box: str = "0 0 200 100", page: str = "") -> bytes:
    """A PDF with a page for each content stream."""
    kids = " ".join(f"{3 + 2 * i} 0 R" for i in range(len(contents)))
    objects: list[bytes | str] = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Count {len(contents)}/Kids[{kids}]>>",
    ]
    for i, content in enumerate(contents):
        objects.append(f"<</Type/Page/Parent 2 0 R/MediaBox[{box}]/Contents {4 + 2 * i} 0 R{page}>>")
        objects.append(content_stream(content))
    return make_pdf(objects)
