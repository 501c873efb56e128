"""Random checkpoints of full size: what is written is a checkpoint like any other."""

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

from benchmarks import random_checkpoint
from benchmarks.random_checkpoint import SIZES, write_random_checkpoint
from export.spec import ModelSpec, read_spec, tensor_shapes
from export.weights import open_weights
from runtimes.manifest import BundleError
from runtimes.preprocess import preprocess, read_settings
from runtimes.prompt import ImagePart, Message, PromptEncoder

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every size, small: few layers, narrow ones, a short vocabulary, shards of 250 kB."""
    for size, config in SIZES.items():
        text, vision = config["text_config"], config["vision_config"]
        heads = text.get("num_attention_heads", 32)
        small: dict[str, Any] = config | {
            "text_config": text
            | {"hidden_size": 4 * heads, "head_dim": 4, "intermediate_size": 48, "num_hidden_layers": 2},
            "vision_config": vision
            | {"hidden_size": 4 * vision["num_attention_heads"], "intermediate_size": 40, "num_hidden_layers": 2},
        }
        monkeypatch.setitem(SIZES, size, small)
    monkeypatch.setattr(random_checkpoint, "VOCAB", 1000)
    monkeypatch.setattr(random_checkpoint, "SHARD_BYTES", 250_000)
    monkeypatch.setattr(random_checkpoint, "PIECE", 1000)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("size", sorted(SIZES))
def test_a_random_checkpoint_is_read_by_transformers_and_by_us_alike(size: str, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    written = list(write_random_checkpoint(size, folder))
    assert sorted(written) == sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(written) > 1
    spec = read_spec(folder)
    weights = open_weights(folder, spec)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert set(weights) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert np.array_equal(weights[name], parameter.detach().numpy()), name


@pytest.mark.usefixtures("tiny")
def test_the_pipeline_from_picture_to_logits_runs_on_it(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    list(write_random_checkpoint("256m", folder))
    spec, encoder = read_spec(folder), PromptEncoder.from_folder(folder)
    settings = read_settings(folder / "preprocessor_config.json")
    assert settings.max_tiles == 17
    tiles = preprocess(Image.new("RGB", (40, 30), "red"), settings.with_budget(1))
    assert encoder.image_id == spec.image_token_id
    assert encoder.end_id in spec.eos_ids
    ids = encoder.encode([Message("user", (ImagePart(tiles.rows, tiles.cols), "What?"))])
    assert AutoTokenizer.from_pretrained(folder).encode("What?") == encoder.tokenizer.encode("What?").ids
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), pixel_values=torch.from_numpy(tiles.pixels)[None])
    assert out.logits.shape == (1, len(ids), spec.text.vocab)
    assert torch.isfinite(out.logits).all()
    assert out.logits.std() > 0


@pytest.mark.usefixtures("tiny")
def test_the_seed_alone_decides_the_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        list(write_random_checkpoint("2.2b", tmp_path / name, seed))
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b
    assert {name for name in a if a[name] != c[name]} == {name for name in a if name.endswith(".safetensors")}


@pytest.mark.usefixtures("tiny")
def test_weights_are_small_and_norms_near_one(tmp_path: Path) -> None:
    list(write_random_checkpoint("2.2b", tmp_path / "c"))
    weights = open_weights(tmp_path / "c", read_spec(tmp_path / "c"))
    matrix = weights["model.text_model.embed_tokens.weight"]
    assert abs(float(matrix.mean())) < 1e-3
    assert abs(float(matrix.std()) - 0.02) < 1e-3
    assert not np.array_equal(matrix[0], matrix[1])
    assert abs(float(weights["model.text_model.norm.weight"].mean()) - 1) < 0.01
    assert abs(float(weights["model.vision_model.post_layernorm.weight"].mean()) - 1) < 0.02
    assert abs(float(weights["model.vision_model.post_layernorm.bias"].mean())) < 0.02


@pytest.mark.usefixtures("tiny")
def test_an_existing_folder_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(BundleError, match=str(tmp_path)):
        list(write_random_checkpoint("256m", tmp_path))
    assert files(tmp_path) == {"mine": b"mine"}


@pytest.mark.usefixtures("tiny")
def test_a_run_that_is_broken_off_leaves_nothing(tmp_path: Path) -> None:
    with closing(write_random_checkpoint("2.2b", tmp_path / "c")) as writing:
        next(writing)
        assert not (tmp_path / "c").exists()
    assert not list(tmp_path.iterdir())


def spec_of(size: str, folder: Path) -> ModelSpec:
    random_checkpoint._write_settings(size, folder)  # noqa: SLF001  # the settings without gigabytes of weights
    return read_spec(folder)


@pytest.mark.parametrize(
    ("size", "parameters", "tokens_per_tile", "heads", "head_width"),
    [
        ("2.2b", 2_246_784_880, 81, (32, 32), 72),
        ("500m", 460_173_504, 64, (15, 5), 64),
        ("256m", 228_099_648, 64, (9, 3), 64),
    ],
)
def test_full_sizes_are_the_published_ones(
    size: str, parameters: int, tokens_per_tile: int, heads: tuple[int, int], head_width: int, tmp_path: Path
) -> None:
    spec = spec_of(size, tmp_path)
    assert sum(int(np.prod(shape)) for shape in tensor_shapes(spec).values()) == parameters
    assert spec.tokens_per_tile == tokens_per_tile
    assert (spec.text.heads, spec.text.kv_heads) == heads
    assert (spec.text.head_dim, spec.vision.head_dim) == (64, head_width)


def test_the_2b_leaves_out_its_heads_as_published(tmp_path: Path) -> None:
    spec_of("2.2b", tmp_path)
    assert not {"num_attention_heads", "num_key_value_heads"} & set(
        json.loads((tmp_path / "config.json").read_text())["text_config"]
    )


def test_the_command_names_what_is_wrong_and_exits_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.random_checkpoint", "--size", "256m", "--out"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr
    assert not done.stdout
