"""python -m runtimes.ask: what it prints where, and its exit codes. Called in this process but for one test."""

import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import runtimes.ask
from runtimes.ask import ask, main
from runtimes.bundle import Bundle, read_bundle
from runtimes.chat import read_front
from runtimes.generate import Sampling
from runtimes.plan import plan
from runtimes.prompt import VideoPart
from runtimes.runner import EngineError
from tests.fakes import CONTEXT, SEQ_LEN, make_bundle
from tests.media import pages_pdf, picture, write_video

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("fake") / "bundle").folder


@pytest.fixture(scope="module")
def pending(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("fake") / "pending", proven=False).folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of four seconds."""
    pytest.importorskip("av", reason="PyAV is not installed: pip install '.[video]'")
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_video(path, (picture(i) for i in range(40)), rate=10)
    return path


@pytest.fixture(scope="module")
def pdf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PDF of three pages, twice as wide as high: three tiles each."""
    pytest.importorskip("pypdfium2", reason="pypdfium2 is not installed: pip install '.[pdf]'")
    path = tmp_path_factory.mktemp("pdf") / "three.pdf"
    path.write_bytes(pages_pdf(["1 0 0 rg 0 0 100 100 re f"] * 3))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_it_answers_about_an_image_on_stdout_and_reports_on_stderr(
    bundle: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, bundle, "--image", image, "--max-new-tokens", 6, "What?")
    wanted = ask(bundle, "What?", [image], sampling=Sampling(6)).answer
    assert code == 0
    assert out == wanted.text + "\n"
    assert f"{len(wanted.ids)} tokens ({wanted.finish_reason}), 3 tiles, {wanted.prompt_tokens} prompt tokens" in err


def test_json_is_one_object_on_the_last_line(bundle: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--image", image, "--image", image, "--max-new-tokens", 5, "--json", "What?"]
    code, out, _ = run(capsys, bundle, *arguments)
    *text, last = out.splitlines()
    found: dict[str, Any] = json.loads(last)
    assert code == 0
    assert "\n".join(text) == found["answer"]
    assert found["bundle"]["payload_digest"] == read_bundle(bundle).manifest.payload_digest
    assert found["bundle"]["proof"] == "passed"
    assert (found["tokens"], found["finish_reason"], found["image_tiles"]) == (5, "length", 6)
    assert found["logprobs"]["mean"] == pytest.approx(found["logprobs"]["sum"] / 5)
    assert found["logprobs"]["least"] <= found["logprobs"]["mean"] < 0
    assert found["timings"].keys() == {
        "load_ms",
        "preprocess_ms",
        "image_ms",
        "prefill_ms",
        "decode_ms",
        "first_token_ms",
    }
    assert all(value > 0 for value in found["timings"].values())


@pytest.mark.parametrize(("budget", "tiles"), [(1, 1), (5, 3), (10, 7), (17, 9)])
def test_the_token_budget_is_a_choice(
    bundle: Path, image: Path, capsys: pytest.CaptureFixture[str], budget: int, tiles: int
) -> None:
    _, out, _ = run(capsys, bundle, "--image", image, "--tiles", budget, "--max-new-tokens", 1, "--json", "What?")
    assert json.loads(out.splitlines()[-1])["image_tiles"] == tiles


def test_without_an_image_it_answers_text(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, bundle, "--max-new-tokens", 3, "--json", "What?")
    assert (code, json.loads(out.splitlines()[-1])["image_tiles"]) == (0, 0)


def test_it_answers_about_a_video_and_says_first_what_that_takes(
    bundle: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, bundle, "--video", clip, "--max-new-tokens", 5, "--json", "What?")
    found = json.loads(out.splitlines()[-1])
    assert (code, found["image_tiles"]) == (0, 4)
    first = err.splitlines()[0]
    assert first.startswith(f"4 frames of a video of 4 s: 4 tiles, {4 * SEQ_LEN} image tokens; prompt of ")
    assert f" {found['prompt_tokens']} tokens, {found['prompt_tokens'] / CONTEXT:.0%} of the context of 384" in first
    held = min(CONTEXT, found["prompt_tokens"] + 5 + 64)
    assert f"; memory: cache {held * 8 * 2 * 2 * 16 / 2**20:,.1f} MiB" in first
    fewer = run(capsys, bundle, "--video", clip, "--frames", 2, "--max-new-tokens", 5, "--json", "What?")[1]
    assert json.loads(fewer.splitlines()[-1])["image_tiles"] == 2


def test_it_answers_about_pages_of_a_pdf_behind_images(
    bundle: Path, image: Path, pdf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, bundle, "--image", image, "--pdf", pdf, "--pages", "3,1", "--json", "What?")
    assert (code, json.loads(out.splitlines()[-1])["image_tiles"]) == (0, 9)
    assert err.startswith(f"1 image, 2 pages: 9 tiles, {9 * SEQ_LEN} image tokens; prompt of ")


def test_what_is_beyond_the_context_is_refused_with_what_would_fit(
    bundle: Path, clip: Path, pdf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = "x" * 200
    code, out, err = run(capsys, bundle, "--video", clip, question)
    match = re.fullmatch(
        r"error: the context of 384 has no room for a prompt of (\d+) tokens for 4 frames of a video of 4 s of 4 "
        r"tiles; --frames (\d) would fit\n",
        err,
    )
    assert match, err
    assert (code, out, int(match[1]) > 384) == (2, "", True)
    assert run(capsys, bundle, "--video", clip, "--frames", match[2], question)[0] == 0
    assert run(capsys, bundle, "--video", clip, "--frames", int(match[2]) + 1, question)[0] == 2

    question = "x" * 310
    code, _, err = run(capsys, bundle, "--pdf", pdf, question)
    match = re.search(r"for 3 pages of 9 tiles; --tiles (\d) or (\d) of the pages \(--pages\) would fit\n$", err)
    assert match, err
    assert run(capsys, bundle, "--pdf", pdf, "--tiles", match[1], question)[0] == 0
    assert run(capsys, bundle, "--pdf", pdf, "--pages", f"1-{match[2]}", question)[0] == 0
    assert run(capsys, bundle, "--pdf", pdf, "--pages", f"1-{int(match[2]) + 1}", question)[0] == 2
    assert "would fit" not in run(capsys, bundle, "--video", clip, "x" * 384)[2]


def test_memory_is_said_where_the_bundle_has_the_sizes(bundle: Path) -> None:
    found = read_bundle(bundle)
    front = read_front(found)
    assert plan(found, front, "What?").peak_bytes is None  # the fake's config.json lacks them
    whole = {
        "text_config": {"num_attention_heads": 4, "intermediate_size": 64, "num_key_value_heads": 2, "hidden_size": 32},
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "image_size": 8, "patch_size": 4},
    }

    class Whole(Bundle):
        def json(self, name: str) -> dict[str, Any]:
            return whole if name == "config.json" else super().json(name)

    sized = Whole(found.folder, replace(found.manifest, recipe=replace(found.manifest.recipe, tensors={})))
    text = plan(sized, front, "What?", new_tokens=9)
    video = plan(sized, front, "What?", video=VideoPart(3, (0, 1, 2)), new_tokens=9)
    assert text.peak_bytes
    assert video.peak_bytes
    assert video.peak_bytes > text.peak_bytes > 2**20
    assert f"about {video.peak_bytes / 2**20:,.0f} MiB in all" in str(video)


def test_sampling_options_reach_the_sampler_and_a_seed_repeats(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled = ["--temperature", 3, "--top-k", 50, "--top-p", 0.99, "--repetition-penalty", 1.1, "--max-new-tokens", 30]
    outs = [run(capsys, bundle, *sampled, "--seed", seed, "What?")[1] for seed in (1, 1, 2)]
    assert outs[0] == outs[1] != outs[2]
    assert outs[0] != run(capsys, bundle, "--max-new-tokens", 30, "What?")[1]


def test_the_answer_is_streamed(bundle: Path) -> None:
    pieces: list[str] = []
    sampling = Sampling(40, temperature=2.0, seed=3)
    answer = ask(bundle, "What?", sampling=sampling, on_text=pieces.append).answer
    assert "".join(pieces) == answer.text
    assert sum(bool(piece) for piece in pieces) > 5


BAD: dict[str, tuple[list[str], str]] = {
    "empty question": ([""], "the question is empty"),
    "blank question": ([" \n "], "the question is empty"),
    "too long": (["x" * CONTEXT], "the context of 384 has no room for a prompt of"),
    "spells the image token": (["what <image>"], "spells the token <image>"),
    "no image there": (["--image", "nowhere.png", "What?"], "nowhere.png: cannot be read as an image"),
    "not an image": (["--image", "TEXT", "What?"], "text.png: not an image"),
    "truncated image": (["--image", "HALF", "What?"], "half.png: cannot be read as an image"),
    "a bomb": (["--image", "BOMB", "What?"], "bomb.png: more pixels than"),
    "max new tokens": (["--max-new-tokens", "0", "What?"], "max_new_tokens is 0"),
    "temperature": (["--temperature", "nan", "What?"], "temperature is nan"),
    "threads": (["--threads", "-1", "What?"], "threads is -1"),
    "a video with an image": (["--video", "CLIP", "--image", "RED", "What?"], "images and a video in one question"),
    "a video with a PDF": (["--video", "CLIP", "--pdf", "PDF", "What?"], "images and a video in one question"),
    "no video": (["--video", "TEXT", "What?"], "text.png: cannot be read as a video"),
    "no video there": (["--video", "nowhere.mp4", "What?"], "nowhere.mp4: is no file"),
    "no frames": (["--video", "CLIP", "--frames", "0", "What?"], "0 frames of a video, want 1 to 999"),
    "frames of nothing": (["--frames", "3", "What?"], "frames are given without a video"),
    "no PDF": (["--pdf", "TEXT", "What?"], "text.png: cannot be read as a PDF"),
    "pages of nothing": (["--pages", "1", "What?"], "pages are given without a PDF"),
    "no such page": (["--pdf", "PDF", "--pages", "4", "What?"], "three.pdf: pages 4 asked for, it has 1 to 3"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("as_json", [False, True])
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(
    bundle: Path,
    image: Path,
    clip: Path,
    pdf: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    case: str,
    as_json: bool,
) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(image.read_bytes()[:-30])
    bomb = bytearray(image.read_bytes())
    bomb[16:24] = (2**16).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bomb)
    files = {name.upper(): str(tmp_path / f"{name}.png") for name in ("text", "half", "bomb")}
    files |= {"CLIP": str(clip), "PDF": str(pdf), "RED": str(image)}
    arguments, message = BAD[case]
    code, out, err = run(capsys, bundle, *(["--json"] if as_json else []), *(files.get(a, a) for a in arguments))
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert (json.loads(out) == {"error": err[7:-1]}) if as_json else out == ""


def test_a_bundle_that_cannot_be_used_is_exit_code_2(
    bundle: Path, pending: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tampered = tmp_path / "tampered"
    shutil.copytree(bundle, tampered)
    path = tampered / "onnx/embed_tokens_quantized.onnx_data"
    content = bytearray(path.read_bytes())
    content[1000] ^= 16
    path.write_bytes(content)
    for folder, message in (
        (tampered, "embed_tokens_quantized.onnx_data: content has changed"),
        (pending, "proof is pending"),
        (tmp_path / "nowhere", "not a folder"),
    ):
        code, out, err = run(capsys, folder, "What?")
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1


def test_a_pending_bundle_answers_with_the_flag(pending: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, pending, "--allow-pending", "--max-new-tokens", 1, "--json", "What?")
    assert (code, json.loads(out.splitlines()[-1])["bundle"]["proof"]) == (0, "pending")


def test_an_engine_that_fails_in_the_middle_is_exit_code_1_and_json_has_its_own_line(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, on_text: Any, **__: Any) -> None:
        on_text("The ans")
        raise EngineError("decoder: broke\nhere")

    monkeypatch.setattr(runtimes.ask, "ask", failing)
    code, out, err = run(capsys, bundle, "--json", "What?")
    assert (code, err) == (1, "error: decoder: broke here\n")
    assert out == 'The ans\n{"error": "decoder: broke here"}\n'


def test_interrupted_it_says_so(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runtimes.ask, "ask", interrupted)
    assert run(capsys, bundle, "What?")[0] == 130


def test_as_a_command_it_answers_with_help_and_with_what_the_function_returns(bundle: Path, image: Path) -> None:
    command = [sys.executable, "-m", "runtimes.ask"]
    environment = os.environ | {"PYTHONWARNINGS": "error"}
    question = [str(bundle), "--image", str(image), "--max-new-tokens", "8", "What?"]
    done = subprocess.run(
        [*command, *question], capture_output=True, cwd=ROOT, env=environment, encoding="utf-8", check=True
    )
    assert done.stdout == ask(bundle, "What?", [image], sampling=Sampling(8)).answer.text + "\n"
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
