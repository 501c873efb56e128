"""runtimes/video.py against Hugging Face's SmolVLMProcessor and PyAV reader, on videos made here, and its refusals."""

import itertools
import json
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from num2words import num2words
from PIL import Image

from demo.tokenizer import save_tokenizer
from runtimes.preprocess import ImageSettings, resized_size
from runtimes.prompt import IMAGE, Message, PromptEncoder, VideoPart, chat_string, number_words
from runtimes.video import (
    Clip,
    Frames,
    Rgb,
    VideoError,
    VideoLimits,
    VideoSettings,
    frame_tile,
    normalize_frames,
    read_video,
    read_video_settings,
    sample_indices,
    video_part,
    video_settings,
)
from tests.checkpoints import tiny_tokenizer
from tests.hf_processor import ORACLE, hf_processor
from tests.media import picture, write_video

av = pytest.importorskip("av", reason="PyAV is not installed: pip install '.[video]'")
oracle = pytest.mark.skipif(not ORACLE.is_dir(), reason=f"torchvision is not in {ORACLE.name}: make setup")

TILE, SEQ_LEN = 16, 4
CONFIG: dict[str, Any] = {
    "size": {"longest_edge": 4 * TILE},
    "max_image_size": {"longest_edge": TILE},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7],
    "image_processor_type": "SmolVLMImageProcessor",
    "processor_class": "SmolVLMProcessor",
    "resample": 1,
    "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 4 * TILE}},
}


def make_folder(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint's tokenizer and processor files, without a model."""
    save_tokenizer(tiny_tokenizer(), folder)
    files = {
        "preprocessor_config.json": config,
        "processor_config.json": {"image_seq_len": SEQ_LEN, "processor_class": "SmolVLMProcessor"},
        "config.json": {"model_type": "smolvlm"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("processor"), CONFIG)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> PromptEncoder:
    return PromptEncoder.from_folder(folder)


SETTINGS = video_settings(CONFIG, "here")


def number_of(tile: Any) -> int:
    """What `picture` says, read from a normalized tile f32 [3, S, S]."""
    row = tile[1, TILE // 4].reshape(8, -1).mean(axis=1)
    return sum(int(level > 0) << bit for bit, level in enumerate(row))


def numbers(found: Frames) -> list[int]:
    return [number_of(tile) for tile in found.pixels]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds, each frame with its number."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_video(path, (picture(i) for i in range(100)), options={"movflags": "faststart"})
    return path


# ---- as the reference


def test_numbers_are_written_as_the_reference_writes_them() -> None:
    assert [number_words(n) for n in range(1000)] == [num2words(n) for n in range(1000)]


def same_prompt(
    folder: Path, encoder: PromptEncoder, clip: Clip, question: str, most: int | None = None, before: str | None = None
) -> None:
    options = ({"num_frames": most} if most else {}) | ({"before": before} if before is not None else {})
    theirs = hf_processor().ask_video(folder, question, (clip.frames, 2, 2), clip.fps, clip.duration, **options)
    assert "error" not in theirs, theirs["error"]
    ours = SETTINGS.with_frames(most) if most else SETTINGS
    indices = sample_indices(clip, ours)
    assert list(indices) == theirs["indices"]
    parts = () if before is None else (before,)
    messages = [Message("user", (*parts, video_part(clip, indices), question))]
    assert chat_string(messages, SEQ_LEN) == theirs["text"]
    assert encoder.encode(messages) == theirs["ids"]


@oracle
@pytest.mark.parametrize(
    ("frames", "fps", "most"),
    [
        *((1, 25.0, None), (2, 25.0, None), (12, 25.0, None), (13, 25.0, None), (75, 25.0, 1), (1500, 25.0, None)),
        *((1650, 25.0, None), (1675, 25.0, None), (1651, 25.0, None), (1640, 24.8, None), (3000, 29.97, 64)),
        *((5000, 1.0, 100), (4000, 0.5, 8), (100, 60.0, 101), (7000, 120.0, 3), (3600, 59.94005994005994, 20)),
        *((3001, 0.01, 5), (2000, 24000 / 1001, None), (300, 12.5, 10), (299, 12.5, 10), (301, 12.5, 10)),
    ],
)
def test_indices_text_and_tokens_equal_the_reference(
    folder: Path, encoder: PromptEncoder, frames: int, fps: float, most: int | None
) -> None:
    same_prompt(folder, encoder, Clip(frames, fps, frames / fps), "What happens?", most)


@oracle
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    frames=st.integers(1, 4000),
    fps=st.one_of(st.sampled_from([10.0, 24.0, 30000 / 1001, 25.0]), st.floats(0.05, 240)),
    drift=st.sampled_from([1.0, 1.0, 0.9, 1.1]),
    most=st.one_of(st.none(), st.integers(1, 200)),
    question=st.sampled_from(["What happens?", "", "\nand then", " Größe 🧾 ", ":"]),
    before=st.sampled_from([None, "Look:", "", "\n"]),
)
def test_any_length_rate_and_number_of_frames_equal_the_reference(
    folder: Path,
    encoder: PromptEncoder,
    frames: int,
    fps: float,
    drift: float,
    most: int | None,
    question: str,
    before: str | None,
) -> None:
    same_prompt(folder, encoder, Clip(frames, fps, drift * frames / fps), question, most, before)


SHAPES = [(72, 128), (128, 72), (48, 48), (16, 16), (5, 300), (300, 5), (37, 91), (2, 2), (480, 270), (9, 16)]


def tiles_of(frames: Rgb, settings: VideoSettings) -> Any:
    return normalize_frames(np.stack([frame_tile(frame, settings) for frame in frames]), settings.image)


@oracle
@pytest.mark.parametrize("resample", [1, 2, 3])
def test_pixels_equal_the_reference_bit_for_bit(tmp_path: Path, resample: int) -> None:
    folder = make_folder(tmp_path / "processor", CONFIG | {"resample": resample})
    ours = read_video_settings(folder / "preprocessor_config.json")
    random = np.random.default_rng(resample)
    for height, width in SHAPES:
        frames = random.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        np.save(tmp_path / "frames.npy", frames)
        out = tmp_path / "pixels.npy"
        theirs = hf_processor().ask_video(folder, "x", tmp_path / "frames.npy", 1.0, 2.0, pixels=str(out))
        assert "error" not in theirs, theirs["error"]
        np.testing.assert_array_equal(tiles_of(frames, ours), np.load(out), err_msg=f"{width} x {height}")


@oracle
def test_pixels_of_a_published_size_equal_the_reference_and_would_not_by_pillow(tmp_path: Path) -> None:
    sizes = {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}}
    sampling = {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 1536}}
    folder = make_folder(tmp_path / "processor", CONFIG | sizes | {"video_sampling": sampling})
    ours = read_video_settings(folder / "preprocessor_config.json")
    frames = np.random.default_rng(0).integers(0, 256, (1, 1080, 608, 3), dtype=np.uint8)
    np.save(tmp_path / "frames.npy", frames)
    out = tmp_path / "pixels.npy"
    hf_processor().ask_video(folder, "x", tmp_path / "frames.npy", 1.0, 1.0, pixels=str(out))
    theirs = np.load(out)
    np.testing.assert_array_equal(tiles_of(frames, ours), theirs)
    first = Image.fromarray(frames[0]).resize(resized_size(608, 1080, 1536), Image.Resampling.LANCZOS)
    pillow = np.asarray(first.resize((384, 384), Image.Resampling.LANCZOS))
    assert (normalize_frames(pillow[None], ours.image) != theirs).mean() > 0.01


def test_frames_are_those_that_transformers_reads(clip: Path) -> None:
    from transformers.video_utils import load_video

    def indices(metadata: Any, **_: Any) -> list[int]:
        found = Clip(metadata.total_num_frames, metadata.fps, metadata.duration)
        return list(sample_indices(found, SETTINGS))

    frames, metadata = load_video(str(clip), backend="pyav", sample_indices_fn=indices)  # type: ignore[arg-type]  # a path will do
    found = read_video(clip, SETTINGS)
    assert found.clip == Clip(metadata.total_num_frames, metadata.fps, metadata.duration) == Clip(100, 25.0, 4.0)
    assert list(found.indices) == metadata.frames_indices == numbers(found) == [0, 33, 66, 99]
    np.testing.assert_array_equal(found.pixels, tiles_of(frames, SETTINGS))
    assert found.part == VideoPart(4, (0, 1, 2, 3))


# ---- whatever the file is


def test_a_file_and_its_bytes_give_the_same(clip: Path) -> None:
    one, other = read_video(clip, SETTINGS), read_video(clip.read_bytes(), SETTINGS)
    np.testing.assert_array_equal(one.pixels, other.pixels)
    assert one.part == other.part


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("mp4", "mpeg4", {}),
        ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),  # no length, no count in the header
        ("matroska", "libx264", {}),
        ("matroska", "libx264", {"live": "1"}),  # no duration in the header
        ("webm", "libvpx", {}),
        ("webm", "libvpx-vp9", {}),
        ("avi", "mpeg4", {}),
        ("mpegts", "libx264", {}),
        ("mov", "libx264", {}),
        ("mp4", "libx265", {"x265-params": "log-level=none"}),
    ],
)
def test_every_container_gives_the_same_frames(
    tmp_path: Path, container: str, codec: str, options: dict[str, str]
) -> None:
    path = tmp_path / "clip"
    write_video(path, (picture(i) for i in range(50)), container=container, codec=codec, options=options)
    found = read_video(path, SETTINGS)
    assert (found.clip.frames, numbers(found)) == (50, [0, 49])
    assert found.clip.fps == pytest.approx(25, rel=0.01)
    assert found.part == VideoPart(2, (0, 1))


def test_a_frame_rate_of_the_television_is_exact(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", (picture(i) for i in range(90)), rate=Fraction(30000, 1001))
    assert read_video(tmp_path / "clip.mp4", SETTINGS).clip == Clip(90, 30000 / 1001, 3.003)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_variable_rate_counts_the_frames_over_the_whole_length(tmp_path: Path, container: str) -> None:
    at = [*range(0, 1000, 40), *range(1000, 9000, 500)]  # 25 frames in the first second, then two a second
    path = tmp_path / "clip"
    write_video(path, (picture(i) for i in range(len(at))), at_ms=at, container=container)
    found = read_video(path, SETTINGS)
    assert found.clip.frames == 41
    assert found.clip.duration == pytest.approx(9, abs=0.5)
    assert found.clip.fps == pytest.approx(41 / 9, rel=0.06)
    assert numbers(found) == list(found.indices)


@pytest.mark.parametrize(("turned", "matrix"), [(90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (270, (0, -1, 1, 0))])
def test_a_video_that_was_held_upright_is_shown_upright(
    tmp_path: Path, turned: int, matrix: tuple[int, int, int, int]
) -> None:
    upright = picture(5, 64, 64)
    stored = np.ascontiguousarray(np.rot90(upright, turned // 90))  # counter-clockwise: players turn it back
    write_video(tmp_path / "clip.mp4", [stored] * 25)
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    a, b, c, d = (v << 16 for v in matrix)
    at = data.index(b"tkhd") + 44  # version and flags, times, ids, duration, layer, group, volume
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    assert numbers(read_video(bytes(data), SETTINGS)) == [5]


def test_packets_that_are_never_shown_do_not_count(tmp_path: Path) -> None:
    """A recording that began in the midst of a stream: what comes before its first whole picture cannot be shown."""
    write_video(
        tmp_path / "whole.mkv",
        (picture(i) for i in range(100)),
        container="matroska",
        codec_options={"g": "25", "bf": "0"},
    )
    with av.open(str(tmp_path / "whole.mkv")) as whole, av.open(str(tmp_path / "clip.mkv"), "w") as out:
        stream = out.add_stream_from_template(whole.streams.video[0])
        for number, packet in enumerate(p for p in whole.demux(video=0) if p.size):
            packet.stream = stream
            if number:
                out.mux(packet)
    found = read_video(tmp_path / "clip.mkv", SETTINGS)
    assert found.clip.frames < 99
    assert found.clip.duration == pytest.approx(4, abs=0.1)
    assert numbers(found) == [25 + i for i in found.indices]
    assert found.indices[-1] == found.clip.frames - 1 == 74


def test_a_single_frame_is_a_video(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", [picture(3)])
    found = read_video(tmp_path / "clip.mp4", SETTINGS)
    assert (numbers(found), found.part) == ([3], VideoPart(0, (0,)))


def test_a_long_clip_leaves_out_its_first_and_last_second(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", (picture(i) for i in range(200)), rate=20)
    found = read_video(tmp_path / "clip.mp4", SETTINGS.with_frames(4))
    assert numbers(found) == list(found.indices) == [20, 73, 126, 180]


# ---- what is refused


def audio(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())


def no_frames(path: Path) -> None:
    with av.open(str(path), "w", format="mp4", options={"movflags": "empty_moov"}) as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        out.start_encoding()


def another_codec(path: Path) -> None:
    write_video(path, [picture(0)], codec="ffv1", container="matroska")


def playlist(path: Path) -> None:
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")


def list_of_files(path: Path) -> None:
    path.write_text("ffconcat version 1.0\nfile clip.mp4\n")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (audio, "holds no video"),
        (no_frames, "holds no frames|cannot be read|have no size"),
        (another_codec, "coded as ffv1, want one of"),
        (playlist, "cannot be read as a video"),
        (list_of_files, "cannot be read as a video"),
        (lambda path: path.write_bytes(b""), "cannot be read as a video"),
        (lambda path: path.write_bytes(bytes(range(256)) * 64), "cannot be read as a video"),
        (lambda path: Image.new("RGB", (9, 9)).save(path, "PNG"), "cannot be read as a video"),
        (lambda path: path.mkdir(), "is no file"),
        (lambda path: None, "is no file"),
    ],
)
def test_what_is_no_video_is_refused_by_name(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / "http:clip.mp4"
    make(path)
    with pytest.raises(VideoError, match=message) as caught:
        read_video(path, SETTINGS)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9, 0.99])
def test_a_video_that_was_cut_off_is_refused(clip: Path, kept: float) -> None:
    data = clip.read_bytes()
    with pytest.raises(VideoError, match=r"the video: (is cut off: its header says 100 frames|cannot be read)"):
        read_video(data[: int(len(data) * kept)], SETTINGS)


def test_a_video_cut_off_before_its_index_is_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", (picture(i) for i in range(25)))  # the index comes last
    data = (tmp_path / "clip.mp4").read_bytes()
    with pytest.raises(VideoError, match="cannot be read as a video"):
        read_video(data[: len(data) // 2], SETTINGS)


def test_any_damage_is_an_error_or_a_video(clip: Path) -> None:
    data = clip.read_bytes()
    random = np.random.default_rng(4)
    ends = {"read": 0, "refused": 0}
    for _ in range(60):
        mutant = bytearray(data)
        for at in random.integers(0, len(data), 8):
            mutant[at] = int(random.integers(256))
        try:
            found = read_video(bytes(mutant), SETTINGS, VideoLimits(work_s=20))
            assert np.isfinite(found.pixels).all()
            ends["read"] += 1
        except VideoError:
            ends["refused"] += 1
    assert min(ends.values()) > 0


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (VideoLimits(bytes=1000), "bytes, at most 1,000 are accepted"),
        (VideoLimits(side=63), "frames of 64 x 48, at most"),
        (VideoLimits(pixels=3071), "frames of 64 x 48, at most 3,071 pixels"),
        (VideoLimits(seconds=3), "4 s, at most 3 are accepted"),
        (VideoLimits(frames=99), "more than the 99 frames"),
        (VideoLimits(work_s=0), "takes longer than 0 s"),
    ],
)
def test_what_is_beyond_a_limit_is_refused(clip: Path, limits: VideoLimits, message: str) -> None:
    with pytest.raises(VideoError, match=message):
        read_video(clip, SETTINGS, limits)


def test_the_work_ends_when_it_is_told_to(clip: Path) -> None:
    class Enough(Exception):
        pass

    calls = itertools.count()

    def check() -> None:
        if next(calls) > 120:  # in the midst of decoding
            raise Enough

    with pytest.raises(Enough):
        read_video(clip, SETTINGS, check=check)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_sampling": 3}, "video_sampling is 3"),
        ({"video_sampling": {"fps": 0}}, "fps is 0"),
        ({"video_sampling": {"fps": True}}, "fps is True"),
        ({"video_sampling": {"max_frames": 1000}}, "max_frames is 1000, want 1 to 999"),
        ({"video_sampling": {"video_size": {"shortest_edge": 5}}}, "video_size is"),
        ({"video_sampling": {"video_size": {"longest_edge": 0}}}, "video_size is"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"here: .*{message}"):
        video_settings(CONFIG | change, "here")


def test_a_filter_that_torch_has_not_is_refused(clip: Path) -> None:
    with pytest.raises(VideoError, match="resample is 0, videos need one of LANCZOS, BICUBIC, BILINEAR"):
        read_video(clip, video_settings(CONFIG | {"resample": 0}, "here"))


def test_without_settings_those_of_the_published_checkpoints_hold() -> None:
    config = {k: v for k, v in CONFIG.items() if k != "video_sampling"}
    assert video_settings(config, "here") == VideoSettings(
        ImageSettings(TILE, 4 * TILE, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7)), 4 * TILE, 1.0, 64
    )


def test_a_part_without_frames_is_refused_and_a_text_cannot_forge_one(encoder: PromptEncoder) -> None:
    with pytest.raises(ValueError, match="0 frames"):
        VideoPart(3, ())
    with pytest.raises(ValueError, match=IMAGE):
        encoder.encode([Message("user", (VideoPart(1, (0,)), f"Frame from 00:01:{IMAGE}"))])
