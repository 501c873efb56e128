"""A bundle beside other engines: what is measured, how it is summed up, what becomes of a peer that fails."""

import ast
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.peers import environments
from benchmarks.peers import run as peers
from benchmarks.peers.checkpoint import Tensors, read_sizes, write_llama
from benchmarks.peers.environments import PeerError, checkpoint_digest, ensure_converted, pins
from benchmarks.peers.llama_convert import interleaved, text_names, vision_names, vocabulary, write_text, write_vision
from benchmarks.peers.phases import FIRST_TOKEN, VISION, Job, Picture, measure, read_job, text_phase
from benchmarks.peers.run import OURS, SYSTEMS, Ready, System, figures, jobs, main, measure_once, measure_round, table

HERE = Path(environments.__file__).parent
SETTINGS = {"threads": 1, "repeats": 2, "decode_tokens": 3}


class Recorder:
    """An engine that writes down what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def reset(self) -> None:
        self.calls.append(("reset", 0))

    def feed(self, ids: Sequence[int]) -> None:
        self.calls.append(("feed", len(ids)))

    def tile(self, picture: Picture) -> Callable[[], None]:
        assert len(picture.rgb) == picture.width * picture.height * 3
        return lambda: self.calls.append(("tile", picture.width))

    def ask(self, picture: Picture, question: str) -> int:
        self.calls.append(("ask", picture.height))
        return 77


def record(number: int, system: str, peak: float = 100.0, **ms: float) -> dict[str, Any]:
    samples = {name: [value] for name, value in ms.items()}
    return {"round": number, "system": system, "runs": {"text": {"samples_ms": samples, "peak_rss_mib": peak}}}


def test_an_engine_is_asked_for_every_phase_and_every_sample_is_kept() -> None:
    engine = Recorder()
    job = Job("m", ("prefill100", "decode7", VISION, FIRST_TOKEN), 128, 1000, 4, repeats=2, decode_tokens=3)
    found = measure(lambda _: engine, job)
    assert {name: len(samples) for name, samples in found["samples_ms"].items()} == {
        "load": 1,
        "prefill100": 2,
        "decode7": 3,
        VISION: 2,
        FIRST_TOKEN: 1,
    }
    assert found["first_token_tokens"] == 77
    prefill = [("reset", 0), ("feed", 64), *[("reset", 0), ("feed", 100)] * 2]
    decode = [("reset", 0), ("feed", 7), *[("feed", 1)] * 4]
    assert engine.calls == [*prefill, *decode, *[("tile", 16)] * 3, ("ask", 12)]


def test_a_job_is_read_from_json_and_a_wrong_one_refused() -> None:
    job = Job("m", ("prefill8",), 16, 100, 4, options={"a": "b"})
    assert read_job(json.dumps({**vars(job)})) == job
    with pytest.raises(ValueError, match="want an object of"):
        read_job('{"phases": [], "colour": 1}')
    assert text_phase("decode0") == ("decode", 0)
    assert text_phase(VISION) is None
    for wrong in ("prefill0", "prefill", "decode-1", "images"):
        with pytest.raises(ValueError, match="phase"):
            text_phase(wrong)


def test_the_jobs_of_a_round_have_room_for_what_is_asked(tiny_checkpoint: Path) -> None:
    ready = Ready(SYSTEMS["llama"], Path("python"), Path("model"), {})
    found = jobs(ready, tiny_checkpoint, ("prefill20", "decode30", VISION), SETTINGS)
    assert (found["text"].phases, found["text"].context) == (("prefill20", "decode30"), 34)
    assert (found["picture"].phases, found["picture"].tile_size) == ((VISION,), 60)
    assert found["picture"].options == {"mmproj": "mmproj-f16.gguf"}
    blind = Ready(SYSTEMS["genai"], Path("python"), Path("model"), {})
    assert jobs(blind, tiny_checkpoint, (VISION,), SETTINGS) == {}


def test_ours_is_measured_in_a_process_of_its_own(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    ready = Ready(System(OURS, OURS, vision=True), Path(sys.executable), tiny_bundle, {})
    phases = ("prefill20", "decode0", VISION, FIRST_TOKEN)
    (found,) = measure_round(1, [ready], lambda r: jobs(r, tiny_checkpoint, phases, SETTINGS))
    assert "error" not in found
    assert len(found["runs"]["text"]["samples_ms"]["decode0"]) == 3
    assert found["runs"]["picture"]["first_token_tokens"] > 13 * 4
    assert {"prefill of 20, tok/s", "decode after 0, tok/s", "load, picture, s"} <= figures(found).keys()


def test_ratios_are_of_the_same_round_and_above_one_where_ours_is_faster() -> None:
    records = [
        record(1, OURS, 50, prefill10=100, load=1000),
        record(1, "llama", 100, prefill10=200, load=500),
        record(2, OURS, 50, prefill10=400, load=1000),
        record(2, "llama", 100, prefill10=400, load=500),
    ]
    assert figures(records[0]) == {"prefill of 10, tok/s": 100, "load, text, s": 1, "peak of memory, text, MiB": 50}
    lines = table(records).splitlines()
    assert lines[0] == "| | ours | llama |"
    assert "| prefill of 10, tok/s | 62.5 | 37.5 (1.50; 1.00 to 2.00) |" in lines
    assert "| load, text, s | 1.00 | 0.50 (0.50; 0.50 to 0.50) |" in lines
    assert "| peak of memory, text, MiB | 50.0 | 100 (0.50; 0.50 to 0.50) |" in lines


def test_a_round_that_failed_is_in_no_figure() -> None:
    broken = {"round": 2, "system": "llama", "error": "no"}
    lines = table([record(1, OURS, decode0=10), record(1, "llama", decode0=20), record(2, OURS, decode0=40), broken])
    assert "| decode after 0, tok/s | 62.5 | 50.0 (2.00; 2.00 to 2.00) |" in lines


def test_one_system_that_fails_is_recorded_and_the_others_go_on(tiny_checkpoint: Path) -> None:
    def once(ready: Ready, job: Job) -> dict[str, Any]:
        if ready.system.name == "llama":
            raise PeerError("llama: killed")
        return {"samples_ms": {"load": [1.0]}, "peak_rss_mib": None}

    systems = [Ready(SYSTEMS[name], Path("python"), Path("model"), {"x": "1"}) for name in ("llama", "genai")]
    first, second = measure_round(3, systems, lambda r: jobs(r, tiny_checkpoint, ("prefill8",), SETTINGS), once)
    assert first == {"round": 3, "system": "llama", "versions": {"x": "1"}, "error": "llama: killed"}
    assert figures(second) == {"load, text, s": 0.001}


def test_a_peer_that_cannot_be_installed_is_named_and_fails_the_command(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(system: System, checkpoint: Path, work: Path) -> Ready:
        if system.name == "genai":
            raise PeerError("genai: install: no such version")
        return Ready(system, Path(sys.executable), work, {})

    measured = {"samples_ms": {"prefill8": [4.0]}, "first_token_tokens": 0, "peak_rss_mib": 5.0}
    monkeypatch.setattr(peers, "prepare", prepare)
    monkeypatch.setattr(peers, "measure_once", lambda ready, job: measured)
    out = tmp_path / "deep" / "peers.jsonl"
    arguments = ["--checkpoint", str(tiny_checkpoint), "--peers", "llama", "genai", "--phases", "prefill8"]
    assert main([*arguments, "--rounds", "2", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "| prefill of 8, tok/s | 2,000 |" in printed
    assert "not measured: genai: install: no such version" in printed
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [(line["round"], line["system"]) for line in lines] == [(1, "llama"), (2, "llama")]
    assert lines[0]["checkpoint"]["digest"] == checkpoint_digest(tiny_checkpoint)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "0"], "--rounds is 0"),
        (["--phases", "sleep"], "phase 'sleep' is unknown"),
        (["--bundle", "nowhere"], "nowhere"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(
    arguments: list[str], said: str, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", str(tiny_checkpoint), "--peers", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_process_that_fails_is_an_error_with_what_it_said(tmp_path: Path) -> None:
    ready = Ready(SYSTEMS["llama"], Path(sys.executable), tmp_path, {})
    with pytest.raises(PeerError, match=r"(?s)llama: prefill8: exit code 1: .*ModuleNotFoundError.*llama_cpp"):
        measure_once(ready, Job(str(tmp_path), ("prefill8",), 16, 100, 4))


def test_a_conversion_that_fails_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="llama: convert"):  # there is no gguf in this environment, or no llama_cpp
        ensure_converted("llama", Path(sys.executable), tiny_checkpoint, ["a word too many"], tmp_path)
    assert list((tmp_path / "converted").iterdir()) == []


def test_a_conversion_is_of_one_checkpoint_and_one_set_of_options(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"):
        (copy / name).write_bytes((tiny_checkpoint / name).read_bytes())
    place = environments.converted_folder("genai", copy, [], tmp_path)
    assert place == environments.converted_folder("genai", tiny_checkpoint, [], tmp_path)
    assert place != environments.converted_folder("genai", copy, ["block_size=128"], tmp_path)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1  # the first weight
    (copy / "model.safetensors").write_bytes(data)
    assert place != environments.converted_folder("genai", copy, [], tmp_path)
    with pytest.raises(PeerError, match="want a checkpoint"):
        checkpoint_digest(tmp_path)


@pytest.mark.parametrize("peer", ["llama", "genai", "openvino"])
def test_all_that_a_peer_installs_is_pinned(peer: str) -> None:
    assert pins(peer)
    assert "torchvision" not in pins(peer)


def test_a_requirement_without_a_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# why\na==1\nb>=2\n", "utf-8")
    with pytest.raises(ValueError, match="'b>=2' pins no version"):
        pins("p", tmp_path)


@pytest.mark.parametrize("path", sorted({*HERE.glob("*_engine.py"), *HERE.glob("*_convert.py")}), ids=lambda p: p.stem)
def test_what_runs_in_a_peers_environment_needs_nothing_of_ours(path: Path) -> None:
    allowed = {"benchmarks.peers.phases", "benchmarks.peers.checkpoint"}
    for module in (path, HERE / "phases.py", HERE / "checkpoint.py"):
        names = [
            node.module for node in ast.walk(ast.parse(module.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)
        ]
        ours = {name for name in names if name and name.partition(".")[0] in {"benchmarks", "runtimes", "export"}}
        assert ours <= allowed, module


def test_the_text_model_alone_computes_what_the_whole_computes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM, SmolVLMForConditionalGeneration

    write_llama(tiny_checkpoint, tmp_path)
    ids = torch.arange(100, 120)[None]
    with torch.no_grad():
        whole = SmolVLMForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32)(input_ids=ids)
        alone = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(input_ids=ids)
    np.testing.assert_allclose(alone.logits.numpy(), whole.logits.numpy(), atol=1e-5)


def test_every_tensor_of_a_checkpoint_has_a_place_in_a_gguf(tiny_checkpoint: Path) -> None:
    text, vision = read_sizes(tiny_checkpoint)
    names = [*text_names(text), *vision_names(vision)]
    assert sorted(theirs for _, theirs in names) == sorted(Tensors(tiny_checkpoint))
    assert len({ours for ours, _ in names}) == len(names)


def test_permuted_rows_turn_as_neighbours_as_the_halves_did() -> None:
    heads, width = 2, 8
    rows = np.random.default_rng(0).normal(size=(heads * width, 5))
    x, angle = np.arange(1.0, 6.0), np.linspace(0.1, 1.0, width // 2)

    def turn(a: Any, b: Any) -> tuple[Any, Any]:
        return a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)

    halves = (rows @ x).reshape(heads, 2, width // 2)
    pairs = (interleaved(rows, heads) @ x).reshape(heads, width // 2, 2)
    want, got = turn(halves[:, 0], halves[:, 1]), turn(pairs[..., 0], pairs[..., 1])
    np.testing.assert_allclose(got, want)


def test_a_vocabulary_is_filled_up_and_has_the_token_before_the_whole_picture(tiny_checkpoint: Path) -> None:
    tokenizer = json.loads((tiny_checkpoint / "tokenizer.json").read_text("utf-8"))
    known = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}
    size = max(known.values()) + 1
    tokens, kinds, merges = vocabulary(tiny_checkpoint, size + 4)
    assert len(tokens) == len(set(tokens)) == len(kinds) == size + 4
    assert "ĊĊ" in tokens
    assert tokens.index("<image>") == known["<image>"]
    assert all(len(merge.split(" ")) == 2 for merge in merges)
    with pytest.raises(ValueError, match="no token for two line ends"):
        vocabulary(tiny_checkpoint, size)


def test_a_gguf_holds_the_checkpoints_values(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="only in the environment of llama.txt")
    from tests.checkpoints import make_checkpoint

    checkpoint = make_checkpoint(tmp_path / "checkpoint", vocab=512)
    source = Tensors(checkpoint)
    write_text(checkpoint, tmp_path / "text.gguf")
    write_vision(checkpoint, tmp_path / "vision.gguf", eight_bit=True)
    text, vision = read_sizes(checkpoint)
    for file, names in (("text.gguf", text_names(text)), ("vision.gguf", vision_names(vision))):
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / file).tensors}
        for ours, theirs in names:
            values = gguf.dequantize(found[ours].data, found[ours].tensor_type)
            assert values.size == source.float32(theirs).size
            np.testing.assert_allclose(np.sort(values, None), np.sort(source.float32(theirs), None), atol=0.02)
