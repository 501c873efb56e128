"""python -m runtimes.ask: what it prints where, and its exit codes. Called in this process but for one test."""

import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import runtimes.ask
from runtimes.ask import ask, main
from runtimes.bundle import read_bundle
from runtimes.generate import Sampling
from runtimes.runner import EngineError
from tests.fakes import CONTEXT, make_bundle

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
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("as_json", [False, True])
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(
    bundle: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, as_json: bool
) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(image.read_bytes()[:-30])
    bomb = bytearray(image.read_bytes())
    bomb[16:24] = (2**16).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bomb)
    files = {name.upper(): str(tmp_path / f"{name}.png") for name in ("text", "half", "bomb")}
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
