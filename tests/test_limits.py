"""The limit that stands beside a figure: counted by hand on known sizes, and never beaten by what is measured."""

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from benchmarks.limits import Machine, Work, bundle_work, limits_ms, measure_machine
from runtimes.bundle import Bundle, read_bundle

SLOW = Machine(threads=1, read=1e9, int8=1e9, fp32=1e9)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return read_bundle(tiny_bundle)


def work_of(bundle: Bundle) -> Work:
    files = {entry.path: entry.size for entry in bundle.manifest.files}
    return bundle_work(bundle.manifest, bundle.json("config.json"), files)


def test_operations_are_those_of_the_graphs_matrices(bundle: Bundle) -> None:
    (path,) = (bundle.folder / "onnx").glob("decoder*.onnx")
    total = 0
    for node in onnx.load(path, load_external_data=False).graph.node:
        if node.op_type == "MatMulNBits":
            sizes = {a.name: a.i for a in node.attribute}
            total += 2 * sizes["K"] * sizes["N"]
    work = work_of(bundle)
    assert (work.token[0] + work.head[0], work.token[1] + work.head[1]) == (total, 0)
    assert work.weights == path.with_name(path.name + "_data").stat().st_size
    text = bundle.manifest.text
    assert work.cache == 2 * 4 * text.layers * text.kv_heads * text.head_dim


def test_a_towers_operations_are_those_of_its_layers(bundle: Bundle) -> None:
    config = bundle.json("config.json")
    vision = config["vision_config"]
    h, f, layers = vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    tokens, hidden = bundle.manifest.image.tokens_per_tile, bundle.manifest.text.hidden
    connector = 2 * h * config["scale_factor"] ** 2 * hidden * tokens
    integers, floats = work_of(bundle).tile
    assert integers == 2 * patches * layers * (4 * h * h + 2 * h * f) + connector
    assert floats == 4 * layers * patches**2 * h + 2 * patches * 3 * vision["patch_size"] ** 2 * h


def test_a_limit_is_bytes_or_operations_whichever_takes_longer() -> None:
    work = Work(weights=10**9, cache=10**6, token=(10**8, 0), head=(10**8, 0), tile=(2 * 10**9, 10**9), attention=0)
    found = limits_ms(work, SLOW, prefill=100, decode_at=500, tiles=3, tokens=50)
    assert found == pytest.approx({"image": 3000, "prefill": 10100, "decode": 1500, "first_token": 3 * 3000 + 5100})
    fast = limits_ms(work, replace(SLOW, int8=1e15), prefill=100, decode_at=500, tiles=0, tokens=50)
    assert fast == pytest.approx({"prefill": 1000, "decode": 1500, "first_token": 1000})
    attending = replace(work, attention=2 * 10**6)
    assert limits_ms(attending, SLOW, prefill=100, decode_at=0, tiles=0, tokens=1)["prefill"] == pytest.approx(20100)


def test_the_machines_peaks_are_measured() -> None:
    machine = measure_machine(1)
    assert machine.threads == 1
    assert machine.read > 1e8
    assert machine.int8 > machine.fp32 / 4 > 1e7
