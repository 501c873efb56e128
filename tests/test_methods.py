"""Comparisons of weights alone: ways of rounding, and keys and values in few bits. Losses planted and found."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from benchmarks import kv_cache, methods
from benchmarks.forced import Forced
from export.documents import DataError
from export.spec import read_spec
from export.weights import open_weights


def forced(exact: list[int], kl: list[float]) -> Forced:
    return Forced(np.array(kl), np.ones(len(kl)), np.array(exact, dtype=bool), 3 * len(kl))


def known(reference: Forced, numbers: Iterable[int], answered: Iterable[int]) -> Any:
    return SimpleNamespace(reference=reference, numbers=list(numbers), answered=list(answered))


def test_a_row_says_what_is_lost_and_what_is_gained() -> None:
    reference, plain = forced([1, 1, 1, 0], [0, 0, 0, 0]), forced([0, 0, 1, 1], [4, 2, 1, 1])
    found = forced([1, 0, 1, 1], [1, 1, 1, 1])
    row = methods.summary(known(reference, range(4), range(4)), found, plain)
    assert (row["documents"], row["lost"], row["gained"], row["loss"]) == (4, 1, 1, 0)
    low, high = row["loss_interval_95"]
    assert low < 0 < high
    assert row["kl_of_plain"] == pytest.approx(0.5)
    assert 0.25 <= row["kl_of_plain_interval_95"][0] < 0.5 < row["kl_of_plain_interval_95"][1] <= 1
    clustered = methods.summary(known(reference, [0, 0, 1, 1], [0, 1, 2]), found, plain)
    assert (clustered["documents"], clustered["exact"]) == (2, pytest.approx(2 / 3))  # the fourth has no answer
    ones, twenty_lost = forced([1] * 80, [0.0] * 80), forced([0] * 20 + [1] * 60, [1.0] * 80)
    alone, in_fours = (
        methods.summary(known(ones, numbers, range(80)), twenty_lost, None)["loss_interval_95"]
        for numbers in (range(80), [i // 4 for i in range(80)])
    )
    assert in_fours[1] - in_fours[0] > 1.3 * (alone[1] - alone[0])
    assert "0.50 (" in methods.table([{"data": "d", "bits": 4, "block": 32, "method": "m"} | row])


def test_every_way_of_rounding_is_measured_on_the_same_documents(
    tiny_checkpoint: Path, calibration: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = ["--model", str(tiny_checkpoint), "--data", str(calibration), "--calibration", str(calibration)]
    assert run(methods, [*arguments, "--bits", "2", "--limit", "6", "--out", str(out)]) == 0
    rows = {row["method"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows.keys() == methods.METHODS.keys()
    assert {row["documents"] for row in rows.values()} == {6}
    without_factors = [row["kl"] for method, row in rows.items() if "factors" not in method]
    assert len(set(without_factors)) == len(without_factors)  # each method is its own
    assert rows["factors, GPTQ"]["kl"] < rows["plain"]["kl"] < rows["plain, no zero points"]["kl"]
    assert rows["factors, GPTQ"]["calibration_tokens"] > 0 == rows["fitted"]["calibration_tokens"]
    assert "| factors, GPTQ |" in capsys.readouterr().out


@pytest.mark.parametrize(("bits", "steps"), [(8, 127), (4, 7)])
def test_an_integer_is_at_most_half_a_step_off_and_what_is_beyond_is_clipped(bits: int, steps: int) -> None:
    largest = torch.tensor([[1.0, 64.0], [0.25, 3.0]])
    x = (torch.rand(50, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1) * largest
    found = kv_cache.rounded(x.clone(), largest, bits)
    assert bool(((found - x).abs() <= largest / steps * 0.5001).all())
    assert 2 * steps + 1 >= len(torch.unique(found[:, 0, 0])) > steps / 4
    assert kv_cache.rounded(100 * largest[None], largest, bits)[0].tolist() == largest.tolist()


def test_scales_of_channels_keep_what_one_scale_loses(tiny_checkpoint: Path, calibration: Path, tmp_path: Path) -> None:
    """One value channel 256 times as loud as all others, and undone where it is read."""
    spec = read_spec(tiny_checkpoint)
    weights = open_weights(tiny_checkpoint, spec)
    tensors = {name: np.array(weights[name]) for name in weights}
    planted = tmp_path / "planted"
    planted.mkdir()
    for path in tiny_checkpoint.iterdir():
        if path.suffix != ".safetensors":
            (planted / path.name).write_bytes(path.read_bytes())
    for layer in range(spec.text.layers):
        at = f"model.text_model.layers.{layer}.self_attn"
        tensors[f"{at}.v_proj.weight"][0] *= 256
        columns = tensors[f"{at}.o_proj.weight"].reshape(spec.text.hidden, spec.text.heads, spec.text.head_dim)
        columns[:, : spec.text.heads // spec.text.kv_heads, 0] /= 256
    save_file(tensors, planted / "model.safetensors")
    kl: dict[str, dict[str, float]] = {}
    for name, model in {"as it was": tiny_checkpoint, "planted": planted}.items():
        rows = kv_cache.compare(str(model), [calibration], calibration, [8], lambda _: None, 4)
        kl[name] = {row["method"]: row["kl"] for row in rows}
    channel, tensor = "a scale a channel", "a scale a tensor"
    assert kl["planted"][channel] == pytest.approx(kl["as it was"][channel], rel=0.05)
    assert kl["planted"][tensor] > 50 * kl["planted"][channel]
    assert kl["as it was"][tensor] < 50 * kl["as it was"][channel]


@pytest.mark.parametrize("module", [methods, kv_cache])
def test_data_that_is_not_there_is_named(
    module: Any, tiny_checkpoint: Path, calibration: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = ["--data", str(tmp_path / "none"), "--calibration", str(calibration)]
    assert run(module, ["--model", str(tiny_checkpoint), *data]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def run(module: Any, arguments: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["command", *arguments])
        return int(module.main())


def test_sets_that_cannot_be_told_apart_are_refused(calibration: Path, tmp_path: Path) -> None:
    assert list(methods.data_sets([calibration], 2)) == ["documents"]
    with pytest.raises(DataError, match="another data set is called documents too"):
        methods.data_sets([calibration, calibration / "documents.jsonl"], 2)
    silent = tmp_path / "silent.jsonl"
    silent.write_text('{"image": null, "question": "What?"}\n')
    with pytest.raises(DataError, match="none of its questions has an answer"):
        methods.data_sets([silent], None)


def test_rows_are_kept_as_they_come(tmp_path: Path) -> None:
    out = tmp_path / "new" / "rows.jsonl"

    def rows() -> Iterator[dict[str, Any]]:
        yield {"a": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        methods.kept(rows(), out)
    assert out.read_text() == '{"a": 1}\n'
    with pytest.raises(DataError, match="cannot be written: "):
        methods.kept([], out / "inside")
