"""A checkpoint's weights: read as Hugging Face reads them, and refused by name where they are not the model's."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from export import weights as weights_module
from export.spec import CheckpointError, read_spec
from export.weights import EMBEDDING, HEAD, INDEX, SINGLE, Weights, open_weights
from tests.checkpoints import make_checkpoint

Q = "model.text_model.layers.0.self_attn.q_proj.weight"
SHARD = "model-00001-of-00003.safetensors"
Tensors = dict[str, torch.Tensor]


def opened(folder: Path) -> Weights:
    return open_weights(folder, read_spec(folder))


def edited(folder: Path, edit: Callable[[Tensors], object], file: str = SINGLE) -> Path:
    """The checkpoint with the tensors of one file changed."""
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    make_checkpoint(folder / "single")
    make_checkpoint(folder / "tied", tied=True)
    make_checkpoint(folder / "sharded", max_shard_size=400_000)
    assert (folder / "sharded" / SHARD).exists()
    return folder


@pytest.fixture
def single(originals: Path, tmp_path: Path) -> Path:
    return shutil.copytree(originals / "single", tmp_path / "single")


@pytest.fixture
def tied(originals: Path, tmp_path: Path) -> Path:
    return shutil.copytree(originals / "tied", tmp_path / "tied")


@pytest.fixture
def sharded(originals: Path, tmp_path: Path) -> Path:
    return shutil.copytree(originals / "sharded", tmp_path / "sharded")


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"dtype": "float32"},
        {"dtype": "float16", "tied": True},
        {"max_shard_size": 100_000},
        {"architecture": "idefics3", "kv_heads": 4, "head_dim": 24, "scale_factor": 4},
    ],
)
def test_values_are_those_of_from_pretrained_in_float32(sizes: dict[str, Any], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", **sizes)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    found = opened(folder)
    wanted = {name: p.detach().numpy() for name, p in model.named_parameters()}
    assert set(found) == set(found.names) == set(wanted)
    assert len(found) == len(wanted)
    for name, values in wanted.items():
        assert found.shape(name) == values.shape
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name], values), name


def test_rows_are_rows_of_the_whole(single: Path) -> None:
    found = opened(single)
    whole = found[EMBEDDING]
    for start, stop in ((0, 0), (0, 1), (7, 29), (300, whole.shape[0])):
        assert np.array_equal(found.rows(EMBEDDING, start, stop), whole[start:stop])
    with pytest.raises(ValueError, match="rows"):
        found.rows(EMBEDDING, 0, whole.shape[0] + 1)


def test_a_returned_array_is_the_callers_own(single: Path) -> None:
    found = opened(single)
    found[Q][:] = 0
    assert found[Q].any()


def test_nothing_is_read_before_it_is_asked_for(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr(weights_module, "read_tensor", fail)
    assert Q in opened(single)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_found_when_read_and_named(value: float, single: Path) -> None:
    edited(single, lambda t: t[Q][5].index_fill_(0, torch.tensor([3]), value))
    found = opened(single)
    with pytest.raises(CheckpointError, match=rf"{Q}\[5, 3\] is {value}"):
        found[Q]
    with pytest.raises(CheckpointError, match=r"\[5, 3\]"):
        found.rows(Q, 4, 6)
    assert np.isfinite(found.rows(Q, 0, 5)).all()


def test_a_float64_beyond_float32_is_refused(single: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[Q] = tensors[Q].double()
        tensors[Q][0, 0] = 1e39

    found = opened(edited(single, edit))
    with pytest.raises(CheckpointError, match=r"\[0, 0\] is inf"):
        found[Q]


def test_a_missing_tensor_is_named(single: Path) -> None:
    with pytest.raises(CheckpointError, match=f"lacks {Q}$"):
        opened(edited(single, lambda t: t.pop(Q)))


def test_many_missing_tensors_are_counted(single: Path) -> None:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if "text_model.layers.1" in name]:
            del tensors[name]

    with pytest.raises(CheckpointError, match=r"lacks model\.text_model\.layers\.1\..* and 6 more"):
        opened(edited(single, edit))


def test_an_untied_head_that_is_missing_explains_the_flag(single: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight; .*tie_word_embeddings"):
        opened(edited(single, lambda t: t.pop(HEAD)))


def test_an_extra_tensor_is_named(single: Path) -> None:
    name = "model.text_model.layers.2.self_attn.q_proj.weight"
    with pytest.raises(CheckpointError, match=f"model.safetensors: holds {name}, which the model"):
        opened(edited(single, lambda t: t.update({name: torch.zeros(2)})))


def test_buffers_that_no_model_reads_are_passed_over(single: Path) -> None:
    extra = {
        "model.text_model.rotary_emb.inv_freq": torch.zeros(8),
        "model.text_model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "model.vision_model.embeddings.position_ids": torch.zeros(16, dtype=torch.int64),
    }
    assert not set(extra) & set(opened(edited(single, lambda t: t.update(extra))))


def test_a_wrong_shape_is_named_with_both_shapes(single: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{Q} is \[64, 32\], want \[64, 64\]"):
        opened(edited(single, lambda t: t.update({Q: t[Q][:, :32].contiguous()})))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_a_dtype_that_is_no_weight_is_named(dtype: torch.dtype, single: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{Q} is of dtype"):
        opened(edited(single, lambda t: t.update({Q: t[Q].to(dtype)})))


def test_a_truncated_file_is_named(single: Path) -> None:
    data = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is truncated"):
        opened(single)


def test_a_file_that_became_shorter_is_named_when_read(single: Path) -> None:
    found = opened(single)
    os.truncate(single / SINGLE, 20_000)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: ends .*\({HEAD}\)"):
        found[HEAD]


def test_a_tied_checkpoint_may_hold_the_matrix_twice(tied: Path) -> None:
    wanted = opened(tied)[EMBEDDING]
    found = opened(edited(tied, lambda t: t.update({HEAD: t[EMBEDDING].clone()})))
    assert HEAD not in found
    assert np.array_equal(found[EMBEDDING], wanted)


def test_a_tied_checkpoint_may_hold_the_matrix_under_the_heads_name(tied: Path) -> None:
    wanted = opened(tied)[EMBEDDING]
    edited(tied, lambda t: t.update({HEAD: t.pop(EMBEDDING)}))
    assert np.array_equal(opened(tied)[EMBEDDING], wanted)
    model = AutoModelForImageTextToText.from_pretrained(tied, dtype=torch.float32)
    assert np.array_equal(model.state_dict()[EMBEDDING].numpy(), wanted)


def test_a_tied_checkpoint_with_two_different_matrices_is_refused(tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "SLAB", 1000)  # the difference is in the last of many pieces

    def edit(tensors: Tensors) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][-1, -1] += 1

    with pytest.raises(CheckpointError, match=rf"{HEAD} differs from {EMBEDDING}.*tie_word_embeddings to false"):
        opened(edited(tied, edit))


def reindexed(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    with pytest.raises(CheckpointError, match=f"{SHARD}: is missing, but {INDEX} names it"):
        opened(sharded)


def test_a_tensor_that_its_shard_lacks_is_named(sharded: Path) -> None:
    name = next(iter(load_file(sharded / SHARD)))
    with pytest.raises(CheckpointError, match=f"{SHARD}: lacks {name}, which {INDEX} puts there"):
        opened(edited(sharded, lambda t: t.pop(name), SHARD))


def test_a_tensor_in_another_shard_than_the_index_says_is_named(sharded: Path) -> None:
    name = next(iter(load_file(sharded / SHARD)))
    other = SHARD.replace("00001", "00002")
    with pytest.raises(CheckpointError, match=f"{SHARD}: holds {name}, which {INDEX} puts in {other}"):
        opened(reindexed(sharded, lambda m: m.update({name: other})))


def test_a_tensor_that_the_index_does_not_know_is_named(sharded: Path) -> None:
    name = next(iter(load_file(sharded / SHARD)))
    with pytest.raises(CheckpointError, match=f"holds {name}, which {INDEX} puts in no shard"):
        opened(reindexed(sharded, lambda m: m.pop(name)))


@pytest.mark.parametrize(
    "shard",
    [
        *("../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..\\b.safetensors", "C:b.safetensors"),
        *("model.bin", "", ".hidden.safetensors", "a\0.safetensors", 3, None, ["model.safetensors"]),
    ],
)
def test_an_index_that_leads_out_of_the_folder_is_refused(shard: Any, sharded: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{INDEX}: puts {Q} in"):
        opened(reindexed(sharded, lambda m: m.update({Q: shard})))


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[", "3"])
def test_an_index_without_a_map_is_refused(content: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX):
        opened(sharded)


def test_a_single_file_goes_before_an_index_as_in_transformers(single: Path, sharded: Path) -> None:
    (single / INDEX).write_text((sharded / INDEX).read_text())
    assert set(opened(single)) == set(opened(sharded))


def test_no_weights_at_all_are_named_and_old_ones_too(single: Path) -> None:
    (single / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json$"):
        opened(single)
    (single / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin must be converted"):
        opened(single)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_reading_by_rows_keeps_memory_to_the_rows(tmp_path: Path) -> None:
    """An embedding of 13 MB in BF16, 26 MB in float32, passes through 1 MB at a time."""
    folder = make_checkpoint(tmp_path / "c", vocab=100_000, tied=True)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from export.spec import read_spec\n"
        "from export.weights import EMBEDDING, open_weights\n"
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "folder = Path(sys.argv[1])\n"
        "weights = open_weights(folder, read_spec(folder))\n"
        "before = peak()\n"
        "for start in range(0, 100_000, 4_000):\n"
        "    weights.rows(EMBEDDING, start, start + 4_000)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert int(done.stdout) < 5_000, "KiB beyond what was in memory before"
