"""Tables and the demo's adapter: tables that can be read, an adapter that fits its record, and reads them in INT4."""

import hashlib
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import demo.adapter
from demo.adapter import CHECKPOINT, PLAIN, SETTINGS, Batches, Plan, learning_rate, train
from demo.documents import GRADES, SPLITS, TRAIN_FONTS, digest, split_of, write_documents
from demo.tables import LONGEST, make_table
from demo.train import IGNORE, answer_losses
from export.adapter_config import CONFIG
from export.android import export_android
from export.documents import read_data
from export.lora import TENSORS, adapter_digest, open_adapter
from export.spec import read_spec
from runtimes.ask import ask
from runtimes.bundle import read_bundle
from runtimes.preprocess import cut, to_rgb
from runtimes.prompt import PromptEncoder
from runtimes.tensorfile import read_header

ADAPTER = CHECKPOINT.parent / "adapter"


def test_the_same_arguments_give_the_same_table() -> None:
    one, two = make_table("test", 7), make_table("test", 7)
    assert np.array_equal(np.asarray(one.image), np.asarray(two.image))
    assert (one.turns, one.glyphs) == (two.turns, two.glyphs)
    assert make_table("test", 8).turns != one.turns


@pytest.mark.parametrize("grade", GRADES)
def test_every_cell_can_be_asked_for_and_belongs_to_its_split(grade: str) -> None:
    for split in SPLITS:
        for index in range(12):
            table = make_table(split, index, grade)
            cells = [turn for turn in table.turns if turn.task == "cell"]
            assert len({turn.question for turn in table.turns}) == len(table.turns)
            assert len({turn.answer for turn in cells}) == len(cells) >= 4
            assert {turn.answer for turn in table.turns} == {turn.answer for turn in cells}
            assert all(split_of(turn.answer) == split for turn in cells)
            assert max(len(turn.answer) for turn in cells) <= max(LONGEST.values())


def test_a_cell_lies_where_its_question_says() -> None:
    """Row by row and column by column, the first glyphs of the answers go down and to the right."""
    for index in range(20):
        table = make_table("search", index)
        text = "".join(glyph.name for glyph in table.glyphs)
        places: dict[tuple[int, int], tuple[float, float]] = {}
        for turn in table.turns:
            if turn.task == "cell" and text.count(turn.answer) == 1:
                row, column = (int(word.strip(",?")) for word in turn.question.split() if word.strip(",?").isdigit())
                glyph = table.glyphs[text.index(turn.answer)]
                places[row, column] = (glyph.x, glyph.y)
        for (row, column), (x, y) in places.items():
            for (other_row, other_column), (other_x, other_y) in places.items():
                assert row >= other_row or y < other_y
                assert column >= other_column or x < other_x


def test_a_table_is_cut_into_four_tiles_and_none_through_a_line_of_text() -> None:
    for index in range(20):
        table = make_table("calibration", index)
        _, rows, cols = cut(to_rgb(table.image), SETTINGS)
        assert (rows, cols) == (2, 2)
        assert all(abs(glyph.y - 0.5) > 0.03 for glyph in table.glyphs)


def test_written_tables_are_read_back_as_data(tmp_path: Path) -> None:
    assert len(list(write_documents("search", 3, "worn", tmp_path / "t", make_table))) == 3
    found = [document.answers[0] for document in read_data(tmp_path / "t")]
    assert found == [make_table("search", i, "worn").turns[0].answer for i in range(3)]


# ---- the training of the adapter


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan of seconds, with the fonts that are always there."""
    monkeypatch.setattr(demo.adapter, "FACES", TRAIN_FONTS)
    monkeypatch.setattr(demo.adapter, "SAVE_EVERY", 1)
    return Plan(steps=3, batch=3, tables=2, turns=2, warmup=1)


def test_a_batch_is_fixed_by_its_number_and_holds_tables_and_documents(short: Plan, demo_checkpoint: Path) -> None:
    batches = Batches(short, PromptEncoder.from_folder(demo_checkpoint))
    one, two = batches[1], batches[1]
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["tiles"], batches[2]["tiles"])
    shapes = {tuple(Batches(Plan(batch=2, tables=1), batches.encoder)[i]["tiles"].shape[:2]) for i in range(12)}
    assert shapes == {(2, 5), (2, 3)}  # tables with forms and notices; documents of two tiles
    assert len(PLAIN) == 3
    assert (one["labels"] != IGNORE).sum() < (one["labels"] == IGNORE).sum()


def test_the_learning_rate_of_the_adapter_warms_up_and_ends_near_zero() -> None:
    plan = Plan()
    rates = [learning_rate(step, plan) for step in range(plan.steps)]
    assert max(rates) == pytest.approx(plan.lr)
    assert rates[: plan.warmup] == sorted(rates[: plan.warmup])
    assert rates[-1] < plan.lr / 1000


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(
    short: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings.simplefilter("ignore")  # of peft and transformers, about each other
    whole = train(short, tmp_path / "whole", workers=0)
    losses, calls = answer_losses, []

    def stop(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return losses(*arguments)

    monkeypatch.setattr(demo.adapter, "answer_losses", stop)
    with pytest.raises(KeyboardInterrupt):
        train(short, tmp_path / "halves", workers=0)
    monkeypatch.setattr(demo.adapter, "answer_losses", losses)
    resumed = train(short, tmp_path / "halves", workers=0)
    assert (tmp_path / "halves" / TENSORS).read_bytes() == (tmp_path / "whole" / TENSORS).read_bytes()
    assert [row["loss"] for row in resumed["log"]] == [row["loss"] for row in whole["log"]]
    assert json.loads((tmp_path / "whole" / CONFIG).read_text())["base_model_name_or_path"] is None
    with pytest.raises(ValueError, match="was made by another plan"):
        train(Plan(steps=4), tmp_path / "halves", workers=0)
    open_adapter(tmp_path / "whole", read_spec(CHECKPOINT))


# ---- the adapter that the repository carries


def test_the_adapters_record_belongs_to_this_generator_and_plan() -> None:
    record = json.loads((ADAPTER / "training.json").read_text(encoding="utf-8"))
    assert record["train_digest_100"] == digest("train", 100, draw=make_table)
    assert record["plan"] == json.loads(json.dumps(asdict(Plan())))
    assert record["log"][-1]["step"] == record["plan"]["steps"]
    shapes = [info.shape for info in read_header(ADAPTER / TENSORS).values()]
    assert record["parameters"] == sum(int(np.prod(shape)) for shape in shapes)


def test_the_adapter_is_small_and_on_text_and_vision_with_ranks_of_their_own(demo_checkpoint: Path) -> None:
    assert (ADAPTER / TENSORS).stat().st_size < 800_000
    opened = open_adapter(ADAPTER, read_spec(demo_checkpoint))
    ranks = {name.split(".")[1]: opened.factors(name).left.shape[1] for name in opened.names}
    assert ranks == {"text_model": Plan().rank, "vision_model": Plan().vision_rank}


def test_the_published_accuracy_is_of_this_adapter_and_what_it_is_meant_to_be(demo_checkpoint: Path) -> None:
    rows = json.loads((ADAPTER / "evaluation.json").read_text(encoding="utf-8"))
    weights = hashlib.sha256((demo_checkpoint / "model.safetensors").read_bytes()).hexdigest()
    assert {(row["split"], row["grade"], row["weights_sha256"]) for row in rows} == {("test", "clean", weights)}
    assert {row["adapter_sha256"] for row in rows} == {None, adapter_digest(ADAPTER)}
    exact = {}
    for row in rows:
        assert row["tasks"]["all"]["documents"] >= 500
        exact[row["pages"], row["adapter_sha256"] is not None, row["recipe"]] = row["tasks"]["all"]["exact"]
    assert exact["tables", False, "fp32"] < 0.1
    assert exact["tables", True, "fp32"] > 0.8
    assert exact["tables", True, "int4"] > 0.8
    assert exact["documents", True, "fp32"] > 0.9
    assert exact["documents", True, "int4"] > 0.9


def test_the_int4_bundle_with_the_adapter_reads_tables(demo_checkpoint: Path, tmp_path: Path) -> None:
    """Without the adapter it answers none or one of them."""
    count = 24
    for _ in write_documents("test", count, "clean", tmp_path / "tables", make_table):
        pass
    for _ in write_documents("calibration", 48, "mixed", tmp_path / "calibration", make_table):
        pass
    made = export_android(
        str(demo_checkpoint),
        tmp_path / "bundle",
        lora=str(ADAPTER),
        data=tmp_path / "tables",
        calibration=tmp_path / "calibration",
    )
    assert made.report is not None
    assert made.report["quantization_loss"]["exact"]["all"]["bundle"] >= 0.6
    right = 0
    for index in range(4):
        turn = make_table("test", index).turns[0]
        right += ask(made.bundle, turn.question, [tmp_path / "tables" / f"{index:05d}.png"]).answer.text == turn.answer
    assert right >= 2
    manifest = read_bundle(made.bundle).manifest
    assert manifest.adapter is not None
    assert manifest.adapter.sha256 == adapter_digest(ADAPTER)
