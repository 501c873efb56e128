"""External data in several files: each below the limit, named as transformers.js counts them, proven like one."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.android import export_android
from export.onnx_graphs import check_graphs
from export.onnx_ops import SHARD_BYTES, DataFile, stored_index
from export.spec import CheckpointError, read_spec
from export.weights import open_weights
from quantize.recipe import load_recipe
from runtimes.bundle import read_bundle
from runtimes.memory import data_bytes
from runtimes.verify import verify
from tests.conftest import LOOSE

LIMIT = 339_000  # the tiny checkpoint's largest tensor just fits


@pytest.fixture(scope="module")
def sharded(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle in small shards, proven; do not write into it."""
    return export_android(
        str(tiny_checkpoint), tmp_path_factory.mktemp("shards") / "bundle", LOOSE, shard_bytes=LIMIT
    ).bundle


def test_a_sharded_bundle_is_proven_verifies_and_holds_what_one_in_single_files_holds(
    sharded: Path, tiny_bundle: Path
) -> None:
    bundle = read_bundle(sharded)
    assert verify(bundle).passed
    for graph in (sharded / "onnx").glob("*.onnx"):
        single = tiny_bundle / "onnx" / graph.name
        found, wanted = stored_index(graph), stored_index(single)
        assert list(found) == list(wanted)
        for name, stored in found.items():
            there = (graph.parent / stored.file).read_bytes()[stored.offset :][: stored.length]
            assert there == (single.parent / wanted[name].file).read_bytes()[wanted[name].offset :][: stored.length]


def test_every_data_file_is_below_the_limit_and_config_counts_them(sharded: Path) -> None:
    config = json.loads((sharded / "config.json").read_text())
    counts = config["transformers.js_config"]["use_external_data_format"]
    assert max(counts.values()) >= 2
    for name, count in counts.items():
        names = [f"{name}_data", *(f"{name}_data_{i}" for i in range(1, count))]
        assert sorted(p.name for p in (sharded / "onnx").glob(f"{name}_data*")) == sorted(names)
        assert all(0 < (sharded / "onnx" / n).stat().st_size < LIMIT for n in names)
        tensors = onnx.load(sharded / "onnx" / name, load_external_data=False).graph.initializer
        used = {e.value for t in tensors for e in t.external_data if e.key == "location"}
        assert used == set(names)
    assert SHARD_BYTES <= 2 * 10**9


def test_memory_counts_every_shard(sharded: Path, tiny_bundle: Path) -> None:
    for graph in ("embed_tokens", "vision_encoder", "decoder_model_merged"):
        sizes = [{e.path: e.size for e in read_bundle(b).manifest.files} for b in (sharded, tiny_bundle)]
        by_hand = sum(n for path, n in sizes[0].items() if re.search(rf"/{graph}.*_data(_\d+)?$", path))
        assert data_bytes(sizes[0], graph) == by_hand
        assert abs(by_hand - data_bytes(sizes[1], graph)) < 64 * 20  # alignment apart
    assert (
        data_bytes({"onnx/decoder_model_merged_q4.onnx_data_12": 5, "onnx/decoder_model_merged_q4.onnx": 9}, "d") == 0
    )
    assert data_bytes({"onnx/decoder_model_merged_q4.onnx_data_12": 5}, "decoder_model_merged") == 5


@pytest.mark.parametrize("change", ["flip", "missing"])
def test_a_change_in_a_later_shard_is_named(sharded: Path, tiny_checkpoint: Path, tmp_path: Path, change: str) -> None:
    folder = shutil.copytree(sharded / "onnx", tmp_path / "onnx")
    indices = [stored_index(graph) for graph in sorted(folder.glob("*.onnx"))]
    name, stored = next((n, s) for index in indices for n, s in index.items() if s.file.endswith("_data_1"))
    content = bytearray((folder / stored.file).read_bytes())
    content[stored.offset] ^= 1
    if change == "flip":
        (folder / stored.file).write_bytes(content)
    else:
        (folder / stored.file).unlink()
    spec = read_spec(tiny_checkpoint)
    found = check_graphs(folder, spec, open_weights(tiny_checkpoint, spec), load_recipe(LOOSE))
    assert f"{stored.file}: tensor {name}" in found
    assert len(found) == 1 or change == "missing"
    assert check_graphs(sharded / "onnx", spec, open_weights(tiny_checkpoint, spec), load_recipe(LOOSE)) == []


def test_a_file_is_full_one_byte_below_the_limit_and_a_tensor_that_fits_none_is_refused(tmp_path: Path) -> None:
    data = DataFile(tmp_path / "g.onnx_data", shard_bytes=129)
    for i in range(3):
        data.write(f"t{i}", np.full(64, i, dtype=np.uint8))
    data.write("last", np.zeros(100, dtype=np.uint8))
    with pytest.raises(CheckpointError, match="big takes 129 bytes, and a data file has less than 129"):
        data.write("big", np.zeros(129, dtype=np.uint8))
    data.close()
    assert data.files == ["g.onnx_data", "g.onnx_data_1", "g.onnx_data_2"]
    assert [(s.file, s.offset) for s in data.index.values()] == [
        ("g.onnx_data", 0),
        ("g.onnx_data", 64),
        ("g.onnx_data_1", 0),
        ("g.onnx_data_2", 0),
    ]
    with pytest.raises(FileExistsError):
        DataFile(tmp_path / "g.onnx_data")
    written = {n: replace(s) for n, s in data.index.items()}
    again = DataFile(tmp_path / "g.onnx_data", written=written)
    again.write("t0", np.full(64, 0, dtype=np.uint8))
    again.write("t1", np.full(64, 9, dtype=np.uint8))
    again.write("t2", np.full(64, 2, dtype=np.uint8))
    again.close()
    assert again.different == ["t1"]
