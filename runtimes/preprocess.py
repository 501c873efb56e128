"""Image file -> tiles of pixels, equal bit for bit to Hugging Face's Pillow processor for SmolVLM.

The steps (and every rounding in them) follow `SmolVLMImageProcessorPil` of transformers:

    EXIF-transpose -> RGB on white -> longest edge to `longest_edge` -> sides up to multiples of the
    tile size -> tiles row by row, then the whole image as one tile -> 1/255, mean, std

Not covered: the torchvision processor (other rounding), and formats that are programs (EPS). Videos: video.py.
"""

import io
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_EDGE = 4096  # the reference never resizes beyond this
MAX_IMAGE_PIXELS = 178_956_970  # above this an image is refused before it is decoded; Pillow does so by default
TILE_BUDGETS = {1: 1, 5: 2, 10: 3, 17: 4}  # at most this many tiles -> longest edge in tile sizes

Pixels = npt.NDArray[np.float32]


class ImageError(ValueError):
    """The file is not an image that can be used."""


@dataclass(frozen=True)
class ImageSettings:
    """How an image becomes tiles; the fields of preprocessor_config.json that matter."""

    tile_size: int  # max_image_size.longest_edge: a tile is tile_size x tile_size
    longest_edge: int  # size.longest_edge: what the longest edge is resized to
    split: bool = True  # do_image_splitting
    resize: bool = True  # do_resize
    resample: int = int(Image.Resampling.LANCZOS)
    rescale_factor: float = 1 / 255
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def with_budget(self, tiles: int) -> "ImageSettings":
        """The same settings with at most `tiles` tiles an image: 1, 5, 10 or 17. Images are resized to it.

        Raises:
            ValueError: for any other number.
        """
        if tiles not in TILE_BUDGETS:
            raise ValueError(f"token budget: {tiles} tiles, want one of {sorted(TILE_BUDGETS)}")
        edge = TILE_BUDGETS[tiles] * self.tile_size
        edge = max(edge - edge % 2, 1)  # the short edge is rounded up to even, and must not pass the long one
        return replace(self, longest_edge=edge, resize=True)

    @property
    def max_tiles(self) -> int:
        """The most tiles that an image can become.

        Raises:
            ValueError: if images are split but not resized before: then there is no limit.
        """
        if not self.split:
            return 1
        if not self.resize:
            raise ValueError("images are split as large as they are (do_resize is false): no limit to their tiles")
        edge = min(self.longest_edge + self.longest_edge % 2, MAX_EDGE)  # the short edge may be rounded up
        side = math.ceil(edge / self.tile_size)
        return 1 if side == 1 else side * side + 1


@dataclass(frozen=True)
class Tiles:
    """One image, cut: `pixels` f32 [N, 3, S, S]; `rows` and `cols` are 0 where it was not split."""

    pixels: Pixels
    rows: int
    cols: int


def settings_from_config(config: dict[str, Any], where: str) -> ImageSettings:
    """Reads preprocessor_config.json's content; `where` names the file in errors.

    Raises:
        ValueError: if a field is missing, has the wrong type, or asks for what this module does not do.
    """

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9

    def edge(key: str) -> int:
        value = config.get(key)
        found = value.get("longest_edge") if isinstance(value, dict) else None
        if not isinstance(found, int) or isinstance(found, bool):
            raise ValueError(f"{where}: {key} is {value!r}, want {{'longest_edge': pixels}}")
        if not 1 <= found <= MAX_EDGE * 4:
            raise ValueError(f"{where}: {key}.longest_edge is {found}, want 1 to {MAX_EDGE * 4}")
        return found

    def flag(key: str) -> bool:
        value = config.get(key, True)
        if not isinstance(value, bool):
            raise ValueError(f"{where}: {key} is {value!r}, want true or false")
        return value

    def triple(key: str) -> tuple[float, float, float]:
        value = config.get(key)
        if not isinstance(value, list) or len(value) != 3 or not all(number(v) for v in value):
            raise ValueError(f"{where}: {key} is {value!r}, want three numbers")
        return float(value[0]), float(value[1]), float(value[2])

    for key in ("do_rescale", "do_normalize", "do_convert_rgb"):
        if not flag(key):
            raise ValueError(f"{where}: {key} is false, only true is supported")
    std = triple("image_std")
    if min(std) <= 0:
        raise ValueError(f"{where}: image_std is {list(std)}, want positive numbers")
    resample = config.get("resample", int(Image.Resampling.LANCZOS))
    if not isinstance(resample, int) or isinstance(resample, bool) or resample not in list(Image.Resampling):
        raise ValueError(f"{where}: resample is {resample!r}, want the number of a Pillow filter")
    factor = config.get("rescale_factor", 1 / 255)
    if not number(factor) or not 0 < factor <= 1:
        raise ValueError(f"{where}: rescale_factor is {factor!r}, want a number in (0, 1]")
    return ImageSettings(
        tile_size=edge("max_image_size"),
        longest_edge=edge("size"),
        split=flag("do_image_splitting"),
        resize=flag("do_resize"),
        resample=resample,
        rescale_factor=float(factor),
        mean=triple("image_mean"),
        std=std,
    )


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file's object. Raises ValueError naming the file."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ValueError(f"{path}: cannot be read as JSON: {exc}") from exc
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds {type(config).__name__}, want an object")
    return config


def read_settings(path: Path) -> ImageSettings:
    """Reads a preprocessor_config.json file. Raises ValueError naming the file and the field."""
    return settings_from_config(read_config(path), str(path))


def load_image(path: Path | str) -> Image.Image:
    """Opens, decodes and EXIF-transposes an image file; of an animation, the first frame.

    Raises:
        ImageError: naming the file, if it is missing, not an image, damaged, or larger than
            MAX_IMAGE_PIXELS (the size is read from the header, before decoding).
    """
    with _opened(path, str(path)) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def decode_image(data: bytes, pixels: int = MAX_IMAGE_PIXELS, formats: tuple[str, ...] | None = None) -> Image.Image:
    """As `load_image`, for a file's content.

    Args:
        data: the file.
        pixels: more are refused before anything is decoded.
        formats: Pillow's names of those that are accepted; None: all.

    Raises:
        ImageError: likewise.
    """
    with _opened(io.BytesIO(data), "the image", pixels, formats) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def check_image(data: bytes, pixels: int, formats: tuple[str, ...]) -> None:
    """Reads the header alone. Raises ImageError as `decode_image` does; the rest may still be damaged."""
    with _opened(io.BytesIO(data), "the image", pixels, formats):
        pass


@contextmanager
def _opened(
    source: Path | str | io.BytesIO,
    where: str,
    pixels: int = MAX_IMAGE_PIXELS,
    formats: tuple[str, ...] | None = None,
) -> Iterator[Image.Image]:
    """An image of which only the header was read; what goes wrong with it is an ImageError."""
    try:
        # Pillow warns of large sizes and of damaged metadata: the image is refused here, or good enough.
        with warnings.catch_warnings(action="ignore"), Image.open(source, formats=formats) as image:
            width, height = image.size
            if width * height > pixels:
                raise ImageError(f"{where}: {width} x {height} pixels, at most {pixels:,} are accepted")
            if image.format == "EPS":
                raise ImageError(f"{where}: is a PostScript program, which is not run")
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError as exc:
        wanted = f"{', '.join(formats)}, which are accepted" if formats else "a format that Pillow reads"
        raise ImageError(f"{where}: not an image in {wanted}") from exc
    except Image.DecompressionBombError as exc:
        raise ImageError(f"{where}: more pixels than the {pixels:,} accepted ({exc})") from exc
    except OSError as exc:
        raise ImageError(f"{where}: cannot be read as an image: {exc.strerror or exc}") from exc
    except Exception as exc:  # on damaged files Pillow's decoders raise what they happen to run into
        raise ImageError(f"{where}: is damaged: {type(exc).__name__}: {exc}") from exc


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB; transparency is composited on white, as the reference does.

    Raises:
        ImageError: if the image has no pixels, or a mode that Pillow cannot convert.
    """
    if 0 in image.size:
        raise ImageError(f"an image of {image.width} x {image.height} has no pixels")
    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")
    except (ValueError, OSError) as exc:
        raise ImageError(f"an image of mode {image.mode} cannot be converted to RGB: {exc}") from exc


def resized_size(width: int, height: int, longest_edge: int) -> tuple[int, int]:
    """(width, height) with the longest edge at `longest_edge`, the other made even, MAX_EDGE as a cap."""
    aspect = width / height
    if width >= height:
        width, height = longest_edge, int(longest_edge / aspect)
        height += height % 2
    else:
        width, height = int(longest_edge * aspect), longest_edge
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    aspect = width / height
    if width >= height and width > MAX_EDGE:
        width, height = MAX_EDGE, int(MAX_EDGE / aspect)
    elif height > width and height > MAX_EDGE:
        width, height = int(MAX_EDGE * aspect), MAX_EDGE
    return max(width, 1), max(height, 1)


def grid_size(width: int, height: int, tile: int) -> tuple[int, int]:
    """(width, height) with each side up to a multiple of `tile`."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect) / tile) * tile
    return width, height


def tile_grid(width: int, height: int, settings: ImageSettings) -> tuple[int, int]:
    """Rows and columns of tiles that an image of this size is cut into; 0, 0 if it is not split."""
    if not settings.split:
        return 0, 0
    if settings.resize:
        width, height = resized_size(width, height, settings.longest_edge)
    width, height = grid_size(width, height, settings.tile_size)
    tile = settings.tile_size
    return (0, 0) if width <= tile and height <= tile else (height // tile, width // tile)


def cut(image: Image.Image, settings: ImageSettings) -> tuple[list[Image.Image], int, int]:
    """The tiles of an RGB image as RGB images of S x S, with rows and columns (0, 0 if not split)."""
    tile = settings.tile_size
    if settings.resize:
        image = image.resize(resized_size(*image.size, settings.longest_edge), settings.resample)
    if not settings.split:
        return [image.resize((tile, tile), settings.resample)], 0, 0
    image = image.resize(grid_size(*image.size, tile), settings.resample)
    width, height = image.size
    if width <= tile and height <= tile:
        return [image], 0, 0
    rows, cols = height // tile, width // tile
    tiles = [image.crop((c * tile, r * tile, (c + 1) * tile, (r + 1) * tile)) for r in range(rows) for c in range(cols)]
    tiles.append(image.resize((tile, tile), settings.resample))
    return tiles, rows, cols


def normalize(rgb: npt.NDArray[np.uint8], settings: ImageSettings) -> Pixels:
    """u8 [N, S, S, 3] -> f32 [N, 3, S, S]: (x * rescale_factor - mean) / std in the reference's arithmetic.

    A byte has 256 values, so each channel is a table: the reference multiplies in float64, rounds to
    float32, then subtracts and divides in float32.
    """
    levels = (np.arange(256, dtype=np.float64) * settings.rescale_factor).astype(np.float32)
    out = np.empty((rgb.shape[0], 3, *rgb.shape[1:3]), dtype=np.float32)
    for channel in range(3):
        table = (levels - np.float32(settings.mean[channel])) / np.float32(settings.std[channel])
        out[:, channel] = table[rgb[..., channel]]
    return out


def preprocess(image: Image.Image, settings: ImageSettings) -> Tiles:
    """A PIL image (EXIF already applied, see `load_image`) -> its tiles. Raises ImageError as `to_rgb` does."""
    tiles, rows, cols = cut(to_rgb(image), settings)
    return Tiles(normalize(np.stack([np.asarray(t) for t in tiles]), settings), rows, cols)
