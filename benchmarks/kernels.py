"""What the pieces take, as a pytest-benchmark suite; run by name, not by `make test`.

    python -m pytest benchmarks/kernels.py [--benchmark-json FILE] [--benchmark-compare]

Sizes are those of one matrix or tile of the 2.2B, and the carried checkpoint where a whole model is needed. Compare
runs of one machine with each other only.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture

from demo.documents import write_documents
from export.android import export_android
from quantize.gptq import feedback, quantize_gptq
from quantize.int4 import dequantize, pack, quantize_blocks, quantize_columns, unpack
from runtimes.bundle import read_bundle
from runtimes.chat import Chat, open_chat
from runtimes.ort import OrtRunner
from runtimes.preprocess import ImageSettings, preprocess
from runtimes.prompt import ImagePart, Message, PromptEncoder

T = TypeVar("T")
CHECKPOINT = Path(__file__).resolve().parent.parent / "demo" / "checkpoint"
MATRIX = (2048, 2048)  # a projection of the 2.2B
SETTINGS = ImageSettings(tile_size=384, longest_edge=1536)  # as SmolVLM2 2.2B has them


def few(benchmark: BenchmarkFixture, work: Callable[[], T]) -> T:
    """Three rounds after one to warm up, of what takes a second."""
    return benchmark.pedantic(work, rounds=3, warmup_rounds=1)  # type: ignore[no-any-return, no-untyped-call]


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    """Normal numbers, f32."""
    return np.random.default_rng(0).standard_normal(MATRIX).astype(np.float32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The carried checkpoint without calibration or proof: neither changes what a step takes."""
    out = tmp_path_factory.mktemp("kernels") / "bundle"
    return export_android(str(CHECKPOINT), out, "int4-quick", with_proof=False).bundle


@pytest.mark.parametrize("fit", [False, True], ids=["nearest", "fitted"])
@pytest.mark.parametrize("block", [32, 128])
def test_quantize_blocks(benchmark: BenchmarkFixture, matrix: np.ndarray, block: int, fit: bool) -> None:
    """Round-to-nearest in blocks, plain and fitted."""
    made = benchmark(lambda: quantize_blocks(lambda a, b: matrix[a:b], MATRIX, bits=4, block=block, fit=fit))
    assert made.shape == MATRIX


def test_quantize_gptq(benchmark: BenchmarkFixture, matrix: np.ndarray) -> None:
    """GPTQ with its factorization, from 4,096 inputs."""
    x = np.random.default_rng(1).standard_normal((4096, MATRIX[1])).astype(np.float32)
    hessian = (x.T @ x / len(x)).astype(np.float32)
    made = few(benchmark, lambda: quantize_gptq(matrix, feedback(hessian.copy(), damping=0.05), bits=4, block=32))
    assert made.shape == MATRIX


def test_quantize_columns(benchmark: BenchmarkFixture, matrix: np.ndarray) -> None:
    """Eight bits a channel."""
    made = benchmark(lambda: quantize_columns(lambda a, b: matrix[a:b], MATRIX))
    assert made.values.shape == MATRIX


def test_pack(benchmark: BenchmarkFixture) -> None:
    """Nibbles to bytes."""
    values = np.random.default_rng(0).integers(0, 16, MATRIX, dtype=np.uint8)
    assert (unpack(benchmark(lambda: pack(values, 4)), 4) == values).all()


def test_dequantize(benchmark: BenchmarkFixture, matrix: np.ndarray) -> None:
    """Blocks back to floats."""
    made = quantize_blocks(lambda a, b: matrix[a:b], MATRIX, bits=4, block=32)
    assert benchmark(lambda: dequantize(made)).shape == MATRIX


@pytest.mark.parametrize("tiles", [1, 5, 10, 17])
def test_preprocess(benchmark: BenchmarkFixture, tiles: int) -> None:
    """A photograph of 12 megapixels, decoded, to tiles."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), dtype=np.uint8))
    made = few(benchmark, lambda: preprocess(image, SETTINGS.with_budget(tiles)))
    assert 1 <= len(made.pixels) <= tiles


def test_prompt(benchmark: BenchmarkFixture, bundle: Path) -> None:
    """A question about an image of 17 tiles, to token ids."""
    encoder = PromptEncoder.from_folder(bundle)
    message = Message("user", (ImagePart(4, 4), "What is the total of this invoice?"))
    assert len(benchmark(lambda: encoder.encode([message]))) > 17 * encoder.seq_len


def test_decode_step(benchmark: BenchmarkFixture, bundle: Path) -> None:
    """One token of the carried checkpoint: what is left when the matrices are small."""
    runner = OrtRunner(read_bundle(bundle, allow_pending=True), threads=1)
    token = runner.settings.eos_ids[0]
    cache = runner.new_cache()
    room = itertools.count()

    def step() -> np.ndarray:
        nonlocal cache
        if next(room) % 256 == 0:
            cache = runner.new_cache()
            runner.extend(cache, [token] * 64)
        return runner.extend(cache, [token])

    assert benchmark(step).shape == (1, runner.settings.vocab)


def test_answer(benchmark: BenchmarkFixture, bundle: Path, tmp_path: Path) -> None:
    """A question about a document, to the end of the answer."""
    for _ in write_documents("test", 1, "clean", tmp_path / "documents"):
        pass
    image = Image.open(next((tmp_path / "documents").rglob("*.png"))).convert("RGB")
    opened = open_chat(read_bundle(bundle, allow_pending=True), threads=1, vision=True)

    def ask() -> int:
        chat = Chat(opened.runner, opened.encoder, opened.settings)
        return len(chat.ask("What does the first line say?", [image]).answer().ids)

    assert benchmark(ask) > 0


def test_export(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """The carried checkpoint to graphs, no calibration, no proof."""
    folders = itertools.count()

    def export() -> Path:
        return export_android(str(CHECKPOINT), tmp_path / str(next(folders)), "int4-quick", with_proof=False).bundle

    assert few(benchmark, export).is_dir()


def test_export_ios(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """The carried checkpoint to Core ML packages, no calibration, no proof."""
    pytest.importorskip("coremltools")
    from export.ios import export_ios

    folders = itertools.count()

    def export() -> Path:
        return export_ios(str(CHECKPOINT), tmp_path / str(next(folders)), "int4-quick", with_proof=False).bundle

    assert few(benchmark, export).is_dir()
