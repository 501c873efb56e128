"""runtimes/preprocess.py against Hugging Face's Pillow processor, bit for bit, and its refusals."""

import contextlib
import io
import json
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.models.smolvlm.image_processing_pil_smolvlm import (
    SmolVLMImageProcessorPil,
    get_resize_output_image_size,
)

from runtimes.preprocess import (
    MAX_EDGE,
    MAX_IMAGE_PIXELS,
    TILE_BUDGETS,
    ImageError,
    ImageSettings,
    Tiles,
    cut,
    grid_size,
    load_image,
    preprocess,
    read_settings,
    resized_size,
    settings_from_config,
)

quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
SMALL = ImageSettings(tile_size=16, longest_edge=48)
CONFIG: dict[str, Any] = {
    "max_image_size": {"longest_edge": 384},
    "size": {"longest_edge": 1536},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
# mode -> NumPy type and channels of its content; palettes are made by conversion
MODES: dict[str, tuple[Any, int]] = {
    "1": (np.uint8, 1),
    "L": (np.uint8, 1),
    "LA": (np.uint8, 2),
    "P": (np.uint8, 1),
    "PA": (np.uint8, 2),
    "RGB": (np.uint8, 3),
    "RGBA": (np.uint8, 4),
    "RGBa": (np.uint8, 4),
    "RGBX": (np.uint8, 4),
    "CMYK": (np.uint8, 4),
    "YCbCr": (np.uint8, 3),
    "LAB": (np.uint8, 3),
    "HSV": (np.uint8, 3),
    "I": (np.int32, 1),
    "I;16": (np.uint16, 1),
    "I;16B": (np.uint16, 1),
    "F": (np.float32, 1),
}


def noise(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    """An image of random bytes."""
    kind, channels = MODES[mode]
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (height, width, channels), np.uint8)
    if kind is np.int32:
        data = random.integers(-1000, 70000, (height, width, 1), np.int32)
    elif kind is np.uint16:
        data = random.integers(0, 65536, (height, width, 1), np.uint16)
    elif kind is np.float32:
        data = random.normal(128, 100, (height, width, 1)).astype(np.float32)
    if mode == "1":
        return Image.frombytes("L", (width, height), data.tobytes()).convert("1")
    image = Image.frombytes(mode, (width, height), data.tobytes())
    if mode in ("P", "PA"):
        image.putpalette(random.integers(0, 256, 768, np.uint8).tobytes())
    return image


def reference(image: Image.Image, want: ImageSettings) -> Tiles:
    """What Hugging Face's processor makes of a PIL image that is transposed by its EXIF orientation."""
    processor = SmolVLMImageProcessorPil(
        do_resize=want.resize,
        size={"longest_edge": want.longest_edge},
        max_image_size={"longest_edge": want.tile_size},
        do_image_splitting=want.split,
        resample=want.resample,
        rescale_factor=want.rescale_factor,
        image_mean=list(want.mean),
        image_std=list(want.std),
        return_row_col_info=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of palettes, which the reference converts as it should
        out = processor(ImageOps.exif_transpose(image), return_tensors="np")
    return Tiles(out["pixel_values"][0], out["rows"][0][0], out["cols"][0][0])


def assert_same(ours: Tiles, theirs: Tiles) -> None:
    assert (ours.rows, ours.cols) == (theirs.rows, theirs.cols)
    assert ours.pixels.dtype == theirs.pixels.dtype == np.float32
    assert ours.pixels.shape == theirs.pixels.shape
    if ours.pixels.tobytes() != theirs.pixels.tobytes():
        differs = ours.pixels != theirs.pixels
        worst = float(np.abs(ours.pixels - theirs.pixels).max())
        pytest.fail(
            f"{differs.sum()} of {differs.size} values differ by up to {worst}, first at {np.argwhere(differs)[0]}"
        )


edges = st.one_of(st.integers(1, 8), st.integers(1, 100), st.integers(1, 700))
sizes = st.one_of(
    st.tuples(edges, edges),
    st.tuples(st.just(1), st.integers(1, 5000)),
    st.tuples(st.integers(1, 5000), st.just(1)),
).filter(lambda s: s[0] * s[1] <= 120_000)
numbers = st.floats(0.01, 2)
tile_settings = st.builds(
    ImageSettings,
    tile_size=st.integers(4, 40),
    longest_edge=st.integers(1, 170),
    split=st.booleans(),
    resample=st.sampled_from([int(r) for r in Image.Resampling]),
    rescale_factor=st.sampled_from([1 / 255, 0.00392156862745098, 1 / 256, 1.0]),
    mean=st.tuples(numbers, numbers, numbers),
    std=st.tuples(numbers, numbers, numbers),
)


@quick
@given(size=sizes, mode=st.sampled_from(sorted(MODES)), want=tile_settings, seed=st.integers(0, 99))
def test_pixels_equal_the_reference_for_any_size_mode_and_setting(
    size: tuple[int, int], mode: str, want: ImageSettings, seed: int
) -> None:
    image = noise(mode, *size, seed)
    assert_same(preprocess(image, want), reference(image, want))


@quick
@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    want=tile_settings.map(lambda s: ImageSettings(s.tile_size, s.longest_edge, s.split, False, s.resample)),
)
def test_pixels_equal_the_reference_where_images_are_not_resized_first(
    size: tuple[int, int], want: ImageSettings
) -> None:
    image = noise("RGB", *size)
    assert_same(preprocess(image, want), reference(image, want))


@pytest.mark.parametrize("tiles", TILE_BUDGETS)
@pytest.mark.parametrize(("tile", "size"), [(384, (640, 480)), (512, (333, 1000))])
def test_pixels_equal_the_reference_at_the_published_sizes(tiles: int, tile: int, size: tuple[int, int]) -> None:
    want = ImageSettings(tile, 4 * tile).with_budget(tiles)
    image = noise("RGB", *size).resize(size, box=(0, 0, size[0] / 8, size[1] / 8))
    ours = preprocess(image, want)
    assert_same(ours, reference(image, want))
    assert len(ours.pixels) <= tiles


@pytest.mark.parametrize(("size", "edge"), [((9000, 3), 5000), ((2, 4097), 16384), ((4096, 1), 4096)])
def test_pixels_equal_the_reference_beyond_its_largest_edge(size: tuple[int, int], edge: int) -> None:
    want = ImageSettings(tile_size=512, longest_edge=edge)
    image = noise("L", *size)
    ours = preprocess(image, want)
    assert_same(ours, reference(image, want))
    assert max(ours.rows, ours.cols) * want.tile_size <= MAX_EDGE


# ---- transparency and files


def transparent(mode: str, transparency: Any) -> Image.Image:
    image = noise(mode, 30, 20)
    image.info["transparency"] = transparency
    return image


@pytest.mark.parametrize(
    ("mode", "transparency"),
    [("1", 0), ("L", 7), ("P", 3), ("P", bytes(range(256))), ("RGB", (1, 2, 3)), ("I", 9), ("I;16", 4), ("F", 1)],
)
def test_transparency_of_any_mode_is_handled_as_in_the_reference(mode: str, transparency: Any) -> None:
    image = transparent(mode, transparency)
    try:
        theirs = reference(image, SMALL)
    except (ValueError, OSError):
        with pytest.raises(ImageError, match=f"mode {mode}"):
            preprocess(image, SMALL)
    else:
        assert_same(preprocess(image, SMALL), theirs)


def test_transparent_pixels_become_white_and_are_not_dropped() -> None:
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert np.all(preprocess(image, SMALL).pixels == 1.0)


FILES: list[tuple[str, str, dict[str, Any]]] = [
    ("png", "1", {}),
    ("png", "L", {"transparency": 7}),
    ("png", "LA", {}),
    ("png", "P", {}),
    ("png", "P", {"transparency": bytes(range(256))}),
    ("png", "RGB", {"transparency": (1, 2, 3)}),
    ("png", "RGBA", {}),
    ("png", "I;16", {}),
    ("tiff", "I;16", {}),
    ("tiff", "I;16B", {}),
    ("tiff", "F", {}),
    ("tiff", "CMYK", {"compression": "tiff_lzw"}),
    ("tiff", "LAB", {}),
    ("jpg", "L", {}),
    ("jpg", "RGB", {"quality": 60, "subsampling": 2}),
    ("jpg", "CMYK", {}),
    ("jpg", "YCbCr", {}),
    ("gif", "P", {"transparency": 3}),
    ("webp", "RGBA", {"lossless": True}),
    ("bmp", "RGB", {}),
    ("ppm", "I", {}),
]


@pytest.mark.parametrize(("suffix", "mode", "options"), FILES)
def test_files_equal_the_reference(tmp_path: Path, suffix: str, mode: str, options: dict[str, Any]) -> None:
    path = tmp_path / f"image.{suffix}"
    image = noise(mode, 37, 23)
    if mode == "I":
        image = image.point(lambda v: v * 0.5 + 600)  # into the 16 bits that files of this mode hold
    image.save(path, **options)
    with Image.open(path) as opened:
        theirs = reference(opened, SMALL)
    assert_same(preprocess(load_image(path), SMALL), theirs)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"image.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise("RGB", 50, 20).save(path, exif=exif)
    with Image.open(path) as opened:
        theirs = reference(opened, SMALL)
    ours = preprocess(load_image(path), SMALL)
    assert_same(ours, theirs)
    assert (ours.rows > ours.cols) == (orientation in (5, 6, 7, 8))  # turned by a quarter, the image stands


def test_of_an_animation_the_first_frame_is_seen(tmp_path: Path) -> None:
    first, second = noise("P", 20, 20, 1), noise("P", 20, 20, 2)
    first.save(tmp_path / "image.gif", save_all=True, append_images=[second])
    with Image.open(tmp_path / "image.gif") as opened:
        theirs = reference(opened, SMALL)
    assert_same(preprocess(load_image(tmp_path / "image.gif"), SMALL), theirs)


# ---- sizes and budgets


class SizesOnly(SmolVLMImageProcessorPil):
    """The reference's arithmetic of sizes, without its pixels."""

    def resize(self, image: Any, size: Any, resample: Any = None) -> Any:  # type: ignore[override]  # sizes, no image
        return size.width, size.height


@settings(max_examples=1000, deadline=None)
@given(st.integers(1, 6000), st.integers(1, 6000), st.integers(1, 5000), st.integers(1, 600))
def test_sizes_equal_the_reference(width: int, height: int, edge: int, tile: int) -> None:
    blank = np.broadcast_to(np.uint8(0), (3, height, width))
    assert resized_size(width, height, edge) == get_resize_output_image_size(blank, edge)[::-1]
    assert grid_size(width, height, tile) == SIZES.resize_for_vision_encoder(blank, tile)


SIZES = SizesOnly()


@given(st.integers(1, 20000), st.integers(1, 20000), st.integers(1, MAX_EDGE * 4), st.integers(2, 600))
def test_no_image_becomes_more_tiles_than_the_settings_say(width: int, height: int, edge: int, tile: int) -> None:
    want = ImageSettings(tile, edge)
    across, down = grid_size(*resized_size(width, height, edge), tile)
    rows, cols = down // tile, across // tile
    assert (1 if rows * cols == 1 else rows * cols + 1) <= want.max_tiles


@given(st.integers(2, 600), st.sampled_from(sorted(TILE_BUDGETS)), st.booleans())
def test_a_budget_is_never_exceeded_by_its_settings(tile: int, tiles: int, resize: bool) -> None:
    assert ImageSettings(tile, 4 * tile, resize=resize).with_budget(tiles).max_tiles <= tiles


def test_a_budget_is_reached_by_a_square_image_and_is_a_multiple_of_the_tile() -> None:
    for tiles, side in TILE_BUDGETS.items():
        want = ImageSettings(384, 1536).with_budget(tiles)
        assert want.longest_edge == side * 384
        assert len(cut(Image.new("RGB", (100, 100)), want)[0]) == want.max_tiles == tiles


@pytest.mark.parametrize("tiles", [0, 2, 16, 18, -1])
def test_another_budget_is_refused(tiles: int) -> None:
    with pytest.raises(ValueError, match=r"tiles, want one of \[1, 5, 10, 17\]"):
        SMALL.with_budget(tiles)


def test_the_number_of_tiles_has_no_limit_where_images_are_not_resized() -> None:
    assert ImageSettings(16, 48, split=False, resize=False).max_tiles == 1
    with pytest.raises(ValueError, match="do_resize is false"):
        _ = ImageSettings(16, 48, resize=False).max_tiles


# ---- settings


def test_settings_are_read_field_by_field(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    config = CONFIG | {"do_image_splitting": False, "resample": 3, "rescale_factor": 0.25, "do_resize": False}
    path.write_text(json.dumps(config | {"image_mean": [0.1, 0.2, 1], "image_std": [1, 2, 3], "do_pad": True}))
    wanted = ImageSettings(384, 1536, False, False, 3, 0.25, (0.1, 0.2, 1.0), (1.0, 2.0, 3.0))
    assert read_settings(path) == wanted


def test_the_processors_own_settings_mean_to_us_what_they_mean_to_it() -> None:
    theirs = SmolVLMImageProcessorPil(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    want = settings_from_config(json.loads(theirs.to_json_string()), "it")
    image = noise("RGB", 60, 41)
    assert_same(preprocess(image, want), reference(image, want))
    assert np.array_equal(preprocess(image, want).pixels, theirs(image, return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_image_size", None),
        ("max_image_size", {"longest_edge": "384"}),
        ("max_image_size", {"longest_edge": True}),
        ("max_image_size", {"longest_edge": 0}),
        ("size", 1536),
        ("size", {"height": 384, "width": 384}),
        ("size", {"longest_edge": 384.0}),
        ("size", {"longest_edge": 10**9}),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", 0.5),
        ("image_mean", [0.5, 0.5, float("nan")]),
        ("image_std", [0.5, 0.5, 0]),
        ("image_std", [0.5, True, 0.5]),
        ("image_std", [0.5, 10**400, 0.5]),
        ("resample", 99),
        ("resample", None),
        ("resample", True),
        ("resample", "LANCZOS"),
        ("rescale_factor", 0),
        ("rescale_factor", 255),
        ("rescale_factor", "1/255"),
        ("do_rescale", False),
        ("do_normalize", False),
        ("do_convert_rgb", False),
        ("do_convert_rgb", None),
        ("do_resize", "no"),
        ("do_image_splitting", 1),
    ],
)
def test_a_wrong_setting_is_refused_by_file_and_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"config\.json: {field}"):
        settings_from_config(CONFIG | {field: value}, "config.json")


@pytest.mark.parametrize("field", CONFIG)
def test_a_missing_setting_is_refused_by_file_and_field(field: str) -> None:
    with pytest.raises(ValueError, match=rf"config\.json: {field}"):
        settings_from_config({k: v for k, v in CONFIG.items() if k != field}, "config.json")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"null"])
def test_a_settings_file_that_is_no_json_object_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: "):
        read_settings(path)


def test_a_missing_settings_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: "):
        read_settings(tmp_path / "preprocessor_config.json")


# ---- bad images


def saved(kind: str, image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header gives this size, with a correct checksum, before data for one pixel."""
    whole = saved("PNG", Image.new("RGB", (1, 1)))
    header = b"IHDR" + struct.pack(">II", width, height) + whole[24:29]
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


BAD: dict[str, Callable[[], bytes]] = {
    "text": lambda: b"Total 12.80\n" * 50,
    "empty": lambda: b"",
    "png-half": lambda: saved("PNG", noise("RGB", 50, 50))[:3000],
    "png-header-only": lambda: saved("PNG", noise("RGB", 50, 50))[:33],
    "png-wrong-checksum": lambda: saved("PNG", noise("RGB", 50, 50)).replace(b"IDAT", b"IDAt"),
    "png-without-width": lambda: png_claiming(0, 5),
    "png-without-height": lambda: png_claiming(5, 0),
    "jpeg-half": lambda: saved("JPEG", noise("RGB", 50, 50))[:1500],
    "jpeg-header-only": lambda: saved("JPEG", noise("RGB", 50, 50))[:20],
    "gif-half": lambda: saved("GIF", noise("P", 50, 50))[:900],
    "tiff-half": lambda: saved("TIFF", noise("RGB", 50, 50))[:900],
    "webp-half": lambda: saved("WEBP", noise("RGB", 50, 50), lossless=True)[:900],
    "bomb": lambda: png_claiming(100_000, 100_000),
    "largest-header": lambda: png_claiming(2**31 - 1, 2**31 - 1),
    "postscript": lambda: saved("EPS", noise("RGB", 5, 5)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.png"
    path.write_bytes(BAD[name]())
    with pytest.raises(ImageError, match=rf"{name}\.png: "):
        load_image(path)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageError, match=r"folder\.png: .*directory"):
        load_image(tmp_path / "folder.png")
    with pytest.raises(ImageError, match=r"missing\.png: .*No such file"):
        load_image(tmp_path / "missing.png")


def test_a_decompression_bomb_is_refused_from_its_header_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_claiming(MAX_IMAGE_PIXELS // 1000 + 1, 1000))
    with pytest.raises(ImageError, match=rf"{MAX_IMAGE_PIXELS:,} accepted"):
        load_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # some applications switch Pillow's own limit off
    with pytest.raises(ImageError, match=rf"at most {MAX_IMAGE_PIXELS:,} are accepted"):
        load_image(path)


@settings(quick, max_examples=60)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000", "ICO", "TGA", "AVIF"]),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4),
    data=st.data(),
)
def test_damaged_files_give_an_image_or_an_image_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, flips: list[tuple[float, int]], data: st.DataObject
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = bytearray(saved(kind, noise("RGB", 20, 14), exif=exif))
    early = data.draw(st.booleans())  # headers are where decoders stumble
    for where, flip in flips:
        content[int(where * (min(80, len(content)) if early else len(content)))] ^= flip
    path = tmp_path_factory.mktemp("damaged") / "image"
    path.write_bytes(content)
    with contextlib.suppress(ImageError):
        image = load_image(path)
        assert image.size[0] * image.size[1] <= MAX_IMAGE_PIXELS
        if image.size in ((20, 14), (14, 20)):  # a header may have come to claim far more
            assert preprocess(image, SMALL).pixels.shape[1:] == (3, 16, 16)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_an_image_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="no pixels"):
        preprocess(Image.new("RGB", size), SMALL)
