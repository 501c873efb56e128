"""Images as they may leave: decoded, turned upright, made smaller, encoded anew without metadata.

Needs Pillow; without it an image is refused, because a file as it is carries where and when it was taken.
"""

import io
from dataclasses import dataclass, field

from router_client.errors import quiet
from router_client.local import Picture

FORMATS = ("JPEG", "PNG", "WEBP")
MOST_PIXELS = 64_000_000
MOST_FILE_BYTES = 2**27
LEAST_SIDE = 64


class ImageRefusedError(ValueError):
    """The image cannot be sent; says why."""


@dataclass(frozen=True)
class Encoded:
    """A JPEG file without metadata."""

    data: bytes = field(repr=False)
    width: int
    height: int


def read_image(picture: Picture) -> bytes:
    """The bytes of an image file.

    Raises:
        ImageRefusedError: for one that cannot be read, or is too large.
    """
    if isinstance(picture, bytes):
        return picture
    try:
        with picture.open("rb") as file:
            data = file.read(MOST_FILE_BYTES + 1)
    except (OSError, ValueError) as exc:
        raise ImageRefusedError(f"the image file cannot be read: {type(exc).__name__}") from exc
    if len(data) > MOST_FILE_BYTES:
        raise ImageRefusedError(f"the image file has more than {MOST_FILE_BYTES} bytes")
    return data


def reencode(file: bytes, *, max_side: int, quality: int, max_bytes: int) -> Encoded:
    """Makes what may be sent of an image: the pixels, at most `max_side` long, in at most `max_bytes`.

    Raises:
        ImageRefusedError: without Pillow, for what is no JPEG, PNG or WebP, or what does not fit.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as exc:
        raise ImageRefusedError("Pillow is not installed: an image is not sent as it is, with its metadata") from exc
    quiet("PIL")  # it logs metadata for debugging
    try:
        with Image.open(io.BytesIO(file), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ImageRefusedError(f"image of {image.width} x {image.height}, want {MOST_PIXELS} pixels or fewer")
            upright = ImageOps.exif_transpose(image)
            if upright.mode != "RGB":  # what is transparent is seen on white
                seen = upright.convert("RGBA")
                upright = Image.new("RGBA", seen.size, "white")
                upright.alpha_composite(seen)
                upright = upright.convert("RGB")
            pixels = Image.frombytes("RGB", upright.size, upright.tobytes())  # pixels, and nothing that came along
    except ImageRefusedError:
        raise
    except Exception as exc:  # broken metadata makes Pillow raise almost anything
        raise ImageRefusedError(f"not a readable {', '.join(FORMATS)} image: {type(exc).__name__}") from exc
    side = max_side
    while side >= LEAST_SIDE:
        small = pixels.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        small.save(out, "JPEG", quality=quality)
        if out.tell() <= max_bytes:
            return Encoded(out.getvalue(), small.width, small.height)
        side = min(side, max(small.size)) * 3 // 4
    raise ImageRefusedError(f"does not fit {max_bytes} bytes at {LEAST_SIDE} pixels")
