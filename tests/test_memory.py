"""Memory is predicted from a bundle's manifest, and measured: they agree, and what cannot fit is refused unopened."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks.measure import Job
from benchmarks.run import expect, measure_bundle
from device_harness.profiles import find_profile
from export.android import export_android
from runtimes import memory
from runtimes.bundle import Bundle, read_bundle
from runtimes.manifest import BundleError
from runtimes.memory import Footprint, predict, room
from runtimes.runner import InputError
from tests.checkpoints import make_checkpoint

LOOSE_128 = """
name = "loose-128"
description = "4 bits in blocks of 128; random weights lose what they lose."
[[rule]]
match = "model.text_model.layers.*_proj.weight"
format = "block"
bits = 4
block = 128
symmetric = false
[[rule]]
match = "*embed_tokens.weight"
format = "block"
bits = 8
block = 128
symmetric = false
[[rule]]
match = "lm_head.weight"
format = "block"
bits = 8
block = 128
symmetric = false
[limits]
activation_features = 10.0
activation_logits = 10.0
loss_kl = 100.0
loss_exact = 1.0
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bundle whose weights outweigh the process around them; the proof is pending."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "loose.toml").write_text(LOOSE_128)
    sizes: dict[str, Any] = {"hidden": 1024, "heads": 16, "kv_heads": 16, "ffn": 4096, "layers": 12, "vocab": 8192}
    tower: dict[str, Any] = {"image_size": 224, "patch_size": 14, "vision_hidden": 512, "vision_heads": 8}
    sizes |= tower | {"vision_ffn": 2048, "vision_layers": 6, "scale_factor": 4, "max_positions": 4096}
    model = make_checkpoint(folder / "model", seed=3, **sizes)
    out = folder / "bundle"
    return export_android(str(model), out, str(folder / "loose.toml"), with_proof=False).bundle


def predicted(bundle: Bundle, **asked: Any) -> Footprint:
    """By the manifest of a bundle."""
    files = {entry.path: entry.size for entry in bundle.manifest.files}
    return predict(bundle.manifest, bundle.json("config.json"), files, **asked)


# Tokens enough that the cache decides: at load two threads race, and where they do not meet the peak is less.
@pytest.mark.parametrize(("tiles", "prompt", "cached"), [(0, 64, 64), (1, 256, 1600), (5, 256, 2400)])
def test_the_measured_peak_is_within_ten_percent(large: Path, tiles: int, prompt: int, cached: int) -> None:
    profile = find_profile("x86-laptop")
    job = Job(str(large), tiles, prompt, cached, decode_tokens=2, threads=1, warmup=0, repeats=1, allow_pending=True)
    (record,) = measure_bundle(large, profile, job, 1)
    expected, measured = record["predicted_peak_mib"], record["peak_rss_mib"]
    if measured is None:
        pytest.skip("this system does not tell a process's peak")
    assert measured > 200  # the weights, not the interpreter, decide
    assert expected == pytest.approx(measured, rel=0.1)


def test_what_cannot_fit_is_refused_before_anything_is_loaded(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(find_profile("x86-laptop"), memory_mib=150)
    monkeypatch.setattr("benchmarks.run.run_once", lambda *_: pytest.fail("it was started"))
    with pytest.raises(InputError, match=r"about \d+ MiB at 1 tiles, profile x86-laptop gives an app 150 MiB; fewer"):
        measure_bundle(large, small, Job(str(large), allow_pending=True), 1)


def test_the_manifest_tells_the_same_without_the_process_around(large: Path) -> None:
    bundle = read_bundle(large, allow_pending=True)
    rows = bundle.manifest.memory
    assert {(row.tiles, row.context) for row in rows} >= {(1, 1024), (5, 4096)}
    for row in rows:
        assert row.bytes == predicted(bundle, tiles=row.tiles, tokens=row.context, base=0).peak


def test_scales_and_matrices_are_counted_as_the_graph_stores_them(large: Path) -> None:
    bundle = read_bundle(large, allow_pending=True)
    kv = bundle.manifest.text
    (path,) = (large / "onnx").glob("decoder*.onnx")
    graph = onnx.load(path, load_external_data=False).graph
    bytes_of = {t.name: 4 * int(np.prod(t.dims)) for t in graph.initializer if t.name.endswith(".scales")}
    data = path.with_name(path.name + "_data").stat().st_size
    found = predicted(bundle, tiles=0, tokens=64, base=0)
    head = kv.vocab * kv.hidden  # packed from 8 bits
    assert found.load == data + 2 * sum(bytes_of.values()) + head + 2 * memory.SESSION


def test_more_tokens_take_their_keys_and_values_and_the_room_beside_them(tiny_bundle: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    text = bundle.manifest.text
    short, long = (predicted(bundle, tiles=0, tokens=count).prompt for count in (200, 400))
    token = 2 * 4 * text.layers * text.kv_heads * text.head_dim
    assert long - short >= token * (room(400, text.context) - room(200, text.context))
    assert room(10**6, 4096) == 4096


def test_an_image_of_many_tiles_does_not_keep_the_tower(large: Path) -> None:
    bundle = read_bundle(large, allow_pending=True)
    few, many = (predicted(bundle, tiles=tiles, tokens=500).prompt for tiles in (memory.RELEASE_TILES - 1, 5))
    tower = sum(e.size for e in bundle.manifest.files if e.path.startswith("onnx/vision"))
    assert few - many > tower * 0.9


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("text_config", "intermediate_size", None), ("vision_config", "patch_size", 0), ("text_config", None, None)],
)
def test_a_config_without_a_size_is_refused_by_name(tiny_bundle: Path, part: str, name: str | None, value: Any) -> None:
    bundle = read_bundle(tiny_bundle)
    config = json.loads((tiny_bundle / "config.json").read_text())
    if name is None:
        config[part] = "no table"
    else:
        config[part][name] = value
    with pytest.raises(BundleError, match=rf"config\.json: {part}\.{name or 'hidden_size'} is .*, want a positive"):
        predict(bundle.manifest, config, {}, tiles=1, tokens=100)


def test_core_ml_is_not_covered(tiny_bundle: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    other = replace(bundle, manifest=replace(bundle.manifest, target="coreml"))
    assert expect(other, Job("")) is None
    with pytest.raises(BundleError, match="predicted for target onnx"):
        predicted(other, tiles=1, tokens=100)
