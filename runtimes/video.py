"""Video file -> frames as tiles, equal bit for bit to Hugging Face's SmolVLMVideoProcessor given the same frames.

    counted frames, fps -> indices -> decoded, upright RGB -> longest edge to `longest_edge` -> S x S -> mean, std

Indices, timestamps and pixels are those of the reference, which resizes by torchvision: its kernel for bytes has
weights of 16 bits and rounds between the two passes (see `resize`), so that Pillow would differ in some pixels. The
equality is with torch's kernels for bytes (x86 with AVX2, ARM64); elsewhere the reference itself differs by rounding.

A video is hostile: no other file is opened and no address asked (demuxers that do either are not among FORMATS), and
VideoLimits bound what is decoded. Decoding needs PyAV, the extra `video`.

Not covered: sound, subtitles, several video streams (the first is taken), transparency (dropped, as the reference
does), seeking (every frame before the last one that is shown is decoded), a sandbox around the decoder.
"""

import io
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from runtimes.preprocess import (
    MAX_EDGE,
    ImageError,
    ImageSettings,
    Pixels,
    read_config,
    resized_size,
    settings_from_config,
)
from runtimes.prompt import VideoPart

if TYPE_CHECKING:
    import av

Rgb = npt.NDArray[np.uint8]

FPS, MAX_FRAMES, EDGE_TILES = 1.0, 64, 4  # of the published checkpoints: the longest edge in tile sizes
SKIPPED_S = 1  # at both ends of a clip that is longer than its frames can show
MOST_FRAMES = 999  # that a setting may ask for
FORMATS = ("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts")  # FFmpeg's demuxers
CODECS = frozenset(
    ("h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "libvpx", "libvpx-vp9", "mpeg4", "mpeg2video", "mjpeg", "h263")
)


class VideoError(ImageError):
    """The file is not a video that can be used."""


@dataclass(frozen=True)
class VideoLimits:
    """What of a video is read at most; beyond it is a VideoError, not a shorter video."""

    bytes: int = 2 << 30
    side: int = 8192  # pixels
    pixels: int = 4096 * 2304  # of a frame
    seconds: int = 2 * 3600  # from its first frame to its last
    frames: int = 2 * 3600 * 60
    work_s: float = 300  # for counting and decoding


LIMITS = VideoLimits()


@dataclass(frozen=True)
class VideoSettings:
    """How a video becomes frames."""

    image: ImageSettings  # tile size, filter and normalization
    longest_edge: int  # before a frame is made square
    fps: float = FPS
    max_frames: int = MAX_FRAMES

    def with_frames(self, frames: int) -> "VideoSettings":
        """The same settings with at most so many frames. Raises ValueError."""
        if not 1 <= frames <= MOST_FRAMES:
            raise ValueError(f"{frames} frames of a video, want 1 to {MOST_FRAMES}")
        return replace(self, max_frames=frames)


@dataclass(frozen=True)
class Clip:
    """What is known of a video before it is decoded; its frames are spread evenly over `duration` seconds."""

    frames: int
    fps: float
    duration: float

    def __post_init__(self) -> None:
        if self.frames < 1 or not (0 < self.fps < 1e6 and 0 < self.duration < 1e9):
            raise ValueError(f"a video of {self.frames} frames, {self.fps} a second, {self.duration} s")


@dataclass(frozen=True)
class Frames:
    """The frames that stand for a video: `pixels` f32 [N, 3, S, S], and their place in a prompt."""

    pixels: Pixels
    part: VideoPart
    clip: Clip
    indices: tuple[int, ...]


def video_settings(config: dict[str, Any], where: str) -> VideoSettings:
    """Reads preprocessor_config.json's content; without `video_sampling`, what the published checkpoints have.

    Raises:
        ValueError: as `settings_from_config`.
    """
    image = settings_from_config(config, where)
    sampling = config.get("video_sampling", {})
    if not isinstance(sampling, dict):
        raise ValueError(f"{where}: video_sampling is {sampling!r}, want an object")
    fps, frames = sampling.get("fps", FPS), sampling.get("max_frames", MAX_FRAMES)
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps <= 1000:
        raise ValueError(f"{where}: video_sampling.fps is {fps!r}, want a number in (0, 1000]")
    if type(frames) is not int or not 1 <= frames <= MOST_FRAMES:
        raise ValueError(f"{where}: video_sampling.max_frames is {frames!r}, want 1 to {MOST_FRAMES}")
    size = sampling.get("video_size", {"longest_edge": EDGE_TILES * image.tile_size})
    edge = size.get("longest_edge") if isinstance(size, dict) else None
    if type(edge) is not int or not 1 <= edge <= 4 * MAX_EDGE:
        raise ValueError(f"{where}: video_sampling.video_size is {size!r}, want {{'longest_edge': pixels}}")
    return VideoSettings(image, edge, float(fps), frames)


def read_video_settings(path: Path) -> VideoSettings:
    """Reads a preprocessor_config.json file. Raises ValueError naming the file and the field."""
    return video_settings(read_config(path), str(path))


def sample_indices(clip: Clip, settings: VideoSettings) -> tuple[int, ...]:
    """Which frames stand for the video, ascending: `fps` a second, at most `max_frames`, evenly spread."""
    wanted = max(1, min(round(settings.fps * clip.duration), settings.max_frames))
    first, last = 0, clip.frames - 1
    if clip.duration - 2 * SKIPPED_S > settings.max_frames * settings.fps:
        first = int(SKIPPED_S * clip.fps)
        last = min(int(clip.frames - SKIPPED_S * clip.fps), last)
        if first >= last:
            first, last = 0, clip.frames - 1
    return tuple(int(i) for i in np.unique(np.linspace(first, last, wanted, dtype=int)))


def video_part(clip: Clip, indices: tuple[int, ...]) -> VideoPart:
    """The video's place in a prompt; a frame's time is its index over the frame rate."""
    return VideoPart(int(clip.duration), tuple(int(i / clip.fps) for i in indices))


# ---- pixels


def _lanczos(x: float) -> float:
    if not -3 <= x < 3:
        return 0.0
    if x == 0:
        return 1.0
    a, b = x * math.pi, x / 3 * math.pi
    return math.sin(a) / a * math.sin(b) / b


def _bilinear(x: float) -> float:
    return max(0.0, 1 - abs(x))


def _bicubic(x: float) -> float:  # a = -0.5
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


FILTERS: dict[int, tuple[Callable[[float], float], float]] = {  # Pillow's number -> function, half its width
    int(Image.Resampling.LANCZOS): (_lanczos, 3.0),
    int(Image.Resampling.BICUBIC): (_bicubic, 2.0),
    int(Image.Resampling.BILINEAR): (_bilinear, 1.0),
}
BAND = 64  # rows of output that one product makes


def _weights(size: int, to: int, resample: int) -> tuple[list[int], list[npt.NDArray[np.int64]], int]:
    """What `to` outputs take of `size` inputs: first inputs, integer weights, and the bits of their fraction.

    The fraction is as long as the largest weight allows in 16 bits with a sign.
    """
    function, support = FILTERS[resample]
    scale = size / to
    stretch = max(scale, 1.0)
    starts, exact = [], []
    for i in range(to):
        center = scale * (i + 0.5)
        start = max(int(center - support * stretch + 0.5), 0)
        stop = min(int(center + support * stretch + 0.5), size)
        found = [function((j - center + 0.5) * (1.0 / stretch)) for j in range(start, stop)]
        total = sum(found)
        starts.append(start)
        exact.append(np.array([w / total if total else w for w in found]))
    most, bits = max(float(w.max()) for w in exact), 0
    while bits < 22 and int(0.5 + most * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    return starts, [np.trunc(w * (1 << bits) + np.copysign(0.5, w)).astype(np.int64) for w in exact], bits


def _resize_rows(rgb: Rgb, to: int, resample: int) -> Rgb:
    """u8 [H, ...] -> u8 [to, ...]: bands of rows, each a product with the part of the input that it needs.

    Bytes count from -128 so that all sums are whole numbers which fp32 holds exactly; else fp64 is taken.
    """
    if rgb.shape[0] == to:
        return rgb
    starts, weights, bits = _weights(rgb.shape[0], to, resample)
    exact = max(int(np.abs(w).sum()) for w in weights) * 128 < 1 << 24
    flat: npt.NDArray[Any] = rgb.reshape(rgb.shape[0], -1).astype(np.float32 if exact else np.float64)  # [H, X]
    flat -= 128
    out = np.empty((to, flat.shape[1]), dtype=np.uint8)
    for begin in range(0, to, BAND):
        end = min(begin + BAND, to)
        first = min(starts[begin:end])
        last = max(s + len(w) for s, w in zip(starts[begin:end], weights[begin:end], strict=True))
        matrix = np.zeros((end - begin, last - first), dtype=flat.dtype)
        sums = np.empty((end - begin, 1), dtype=np.int64)  # what counting from -128 left out, and half a step
        for row, (start, w) in enumerate(zip(starts[begin:end], weights[begin:end], strict=True)):
            matrix[row, start - first : start - first + len(w)] = w
            sums[row] = 128 * int(w.sum()) + (1 << bits >> 1)
        levels = (matrix @ flat[first:last]).astype(np.int64) + sums
        levels >>= bits
        out[begin:end] = np.clip(levels, 0, 255)
    return out.reshape(to, *rgb.shape[1:])


def resize(rgb: Rgb, width: int, height: int, resample: int) -> Rgb:
    """u8 [H, W, 3] -> u8 [height, width, 3], as torch's kernel for bytes: first along the rows, then the columns."""
    columns = _resize_rows(np.ascontiguousarray(rgb.transpose(1, 0, 2)), width, resample)  # [width, H, 3]
    return _resize_rows(np.ascontiguousarray(columns.transpose(1, 0, 2)), height, resample)


def frame_tile(rgb: Rgb, settings: VideoSettings) -> Rgb:
    """An upright frame u8 [H, W, 3] -> a square tile u8 [S, S, 3], by way of the longest edge as the reference goes."""
    height, width = rgb.shape[:2]
    edge, side = min(settings.longest_edge, MAX_EDGE), settings.image.tile_size
    first = resize(rgb, *resized_size(width, height, edge), settings.image.resample)
    return resize(first, side, side, settings.image.resample)


def normalize_frames(tiles: Rgb, settings: ImageSettings) -> Pixels:
    """u8 [N, S, S, 3] -> f32 [N, 3, S, S]; the reference folds the factor into mean and deviation, in fp32."""
    levels = np.arange(256, dtype=np.float32)
    factor = np.float32(1.0 / settings.rescale_factor)
    out = np.empty((len(tiles), 3, *tiles.shape[1:3]), dtype=np.float32)
    for channel in range(3):
        mean, std = (np.float32(v[channel]) * factor for v in (settings.mean, settings.std))
        out[:, channel] = ((levels - mean) / std)[tiles[..., channel]]
    return out


# ---- decoding


def read_video(
    source: Path | bytes,
    settings: VideoSettings,
    limits: VideoLimits = LIMITS,
    check: Callable[[], None] = lambda: None,
) -> Frames:
    """Decodes the frames that stand for a video.

    Args:
        source: a file, or its content.
        settings: how many, how large.
        limits: of what is read.
        check: called between frames; what it raises ends the work.

    Raises:
        VideoError: naming the file, if it is missing, no video, damaged or cut off, or beyond a limit; if PyAV is
            not installed; if the settings ask for a filter that is not in FILTERS.
    """
    where, opened = _source(source, limits)
    if settings.image.resample not in FILTERS:
        names = ", ".join(Image.Resampling(f).name for f in FILTERS)
        raise VideoError(f"{where}: the bundle's resample is {settings.image.resample}, videos need one of {names}")
    until = time.monotonic() + limits.work_s

    def tick() -> None:
        check()
        if time.monotonic() > until:
            raise VideoError(f"{where}: takes longer than {limits.work_s:g} s to decode")

    clip = _count(opened, where, limits, tick)
    indices = sample_indices(clip, settings)
    tiles, decoded = _decode(opened, where, limits, tick, settings, indices)
    if len(tiles) < len(indices) and decoded:
        # There are fewer frames than packets: some packets are never shown, or a list of edits leaves them out.
        clip = Clip(decoded, clip.fps * decoded / clip.frames, clip.duration)
        indices = sample_indices(clip, settings)
        tiles, decoded = _decode(opened, where, limits, tick, settings, indices)
    if not tiles or len(tiles) < len(indices):
        raise VideoError(f"{where}: only {decoded} of {clip.frames} frames can be decoded")
    pixels = normalize_frames(np.stack(tiles), settings.image)
    return Frames(pixels, video_part(clip, indices), clip, indices)


Opener = Callable[[], io.BufferedIOBase]


def _source(source: Path | bytes, limits: VideoLimits) -> tuple[str, Opener]:
    """The name for errors, and what opens the content anew."""
    if isinstance(source, bytes):
        where, size = "the video", len(source)
    else:
        where = str(source)
        try:
            if not source.is_file():
                raise VideoError(f"{where}: is no file")
            size = source.stat().st_size
        except OSError as exc:
            raise VideoError(f"{where}: cannot be read: {exc.strerror or exc}") from exc
    if size > limits.bytes:
        raise VideoError(f"{where}: {size:,} bytes, at most {limits.bytes:,} are accepted")
    if isinstance(source, bytes):
        return where, lambda: io.BytesIO(source)
    return where, lambda: source.open("rb")


@contextmanager
def _opened(
    source: Opener, where: str, limits: VideoLimits
) -> "Iterator[tuple[av.container.InputContainer, av.VideoStream]]":
    """The container and its video; what goes wrong inside is a VideoError."""
    try:
        import av
    except ImportError as exc:
        raise VideoError(f"{where}: videos need PyAV: pip install '.[video]'") from exc
    # A file object has no name that FFmpeg could take for an address; the white lists keep it from opening another.
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
    try:
        with source() as file, av.open(file, "r", options=options, metadata_errors="replace") as container:
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                raise VideoError(f"{where}: holds no video")
            stream = streams[0]
            context: Any = stream.codec_context  # None, whatever its type says, for a codec that FFmpeg does not know
            if context is None or context.name not in CODECS:
                found = "nothing known" if context is None else context.name
                raise VideoError(f"{where}: is coded as {found}, want one of {', '.join(sorted(CODECS))}")
            _check_size(context.width, context.height, where, limits)
            context.options = {"max_pixels": str(limits.pixels)}
            yield container, stream
    except (av.FFmpegError, OSError) as exc:
        raise VideoError(f"{where}: cannot be read as a video: {exc.strerror or exc}") from exc


def _check_size(width: int, height: int, where: str, limits: VideoLimits) -> None:
    if width < 1 or height < 1:
        raise VideoError(f"{where}: its frames have no size")
    if max(width, height) > limits.side or width * height > limits.pixels:
        raise VideoError(
            f"{where}: frames of {width} x {height}, at most {limits.pixels:,} pixels and {limits.side:,} a side "
            "are accepted"
        )


def _count(source: Opener, where: str, limits: VideoLimits, tick: Callable[[], None]) -> Clip:
    """Counts without decoding: headers may say nothing, or what is not so."""
    count = packets = 0
    first: int | None = None
    end, length = 0, 0
    with _opened(source, where, limits) as (container, stream):
        said, rate, base = stream.frames, stream.average_rate, stream.time_base
        for packet in container.demux(stream):
            if not packet.size:
                continue
            tick()
            packets += 1
            at = packet.dts if packet.pts is None else packet.pts
            if packet.is_discard:
                continue
            count += 1
            if count > limits.frames:
                raise VideoError(f"{where}: more than the {limits.frames:,} frames that are accepted")
            if at is not None:
                first = at if first is None else min(first, at)
                if at + (packet.duration or 0) >= end or count == 1:
                    end, length = at + (packet.duration or 0), packet.duration or 0
    if not count:
        raise VideoError(f"{where}: holds no frames")
    if said > packets:
        raise VideoError(f"{where}: is cut off: its header says {said:,} frames, it holds {packets:,}")
    span = Fraction(0)
    if first is not None and base is not None:
        span = (end - first) * base
        if not length:  # of the last frame: as long as the others are on average
            span += span / (count - 1) if count > 1 else 0
    if span <= 0:
        span = count / rate if rate else Fraction(count, 25)
    if span > limits.seconds:
        raise VideoError(f"{where}: {float(span):,.0f} s, at most {limits.seconds:,} are accepted")
    try:
        return Clip(count, float(count / span), float(span))
    except ValueError as exc:
        raise VideoError(f"{where}: {exc}") from exc


def _decode(
    source: Opener,
    where: str,
    limits: VideoLimits,
    tick: Callable[[], None],
    settings: VideoSettings,
    indices: tuple[int, ...],
) -> tuple[list[Rgb], int]:
    """The tiles of the frames with these indices, as many as there are, and how many frames were decoded."""
    tiles: list[Rgb] = []
    decoded = 0
    with _opened(source, where, limits) as (container, stream):
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            tick()
            if decoded == indices[len(tiles)]:
                _check_size(frame.width, frame.height, where, limits)
                if frame.is_corrupt:
                    raise VideoError(f"{where}: frame {decoded} is damaged")
                rgb: Rgb = frame.to_ndarray(format="rgb24")  # type: ignore[assignment]  # u8, whatever its type says
                tiles.append(frame_tile(np.rot90(rgb, frame.rotation // 90), settings))
            decoded += 1
            if len(tiles) == len(indices):
                break
    return tiles, decoded
