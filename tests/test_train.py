"""The training of the demo checkpoint: its schedule, its batches, and a step of it from nothing to a checkpoint."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import SmolVLMForConditionalGeneration

from demo.documents import GLYPHS, TILE, TRAIN_FONTS, make_document
from demo.train import (
    IGNORE,
    PHASES,
    SEQ_LEN,
    Plan,
    begin,
    example,
    few_shapes,
    glyph_weight,
    learning_rate,
    phase_at,
    train,
)
from runtimes.preprocess import ImageSettings
from runtimes.prompt import END, PromptEncoder

SETTINGS = ImageSettings(tile_size=TILE, longest_edge=2 * TILE)


def test_the_phases_cover_the_plan_and_follow_one_another() -> None:
    plan = Plan()
    assert [p.end for p in PHASES] == sorted({p.end for p in PHASES})
    assert PHASES[-1].end == plan.steps
    for first, then in pairwise(PHASES):
        assert phase_at(first.end - 1)[1] is first
        assert phase_at(first.end) == (first.end, then)
    with pytest.raises(ValueError, match="beyond the last phase"):
        phase_at(plan.steps)


def test_the_learning_rate_warms_up_wherever_optimizers_are_new_and_ends_near_zero() -> None:
    plan = Plan()
    for start in (0, *(first.end for first, then in pairwise(PHASES) if then.restart)):
        rates = [learning_rate(start + i, plan) for i in range(plan.warmup)]
        assert rates == sorted(rates)
        assert rates[0] < rates[-1] / 100
    assert learning_rate(plan.steps - 1, plan) < plan.lr / 100
    assert all(0 < glyph_weight(step, plan) <= 1 for step in range(0, plan.steps, 100))


def test_only_answers_are_learned_and_every_glyph_has_its_cell(demo_checkpoint: Path) -> None:
    encoder = PromptEncoder.from_folder(demo_checkpoint)
    document = make_document("train", 5, kind="form", faces=TRAIN_FONTS)
    turns = document.turns[:2]
    tiles, glyphs, ids, labels = example(document, turns, SETTINGS, encoder)
    learned = [label for label in labels if label != IGNORE]
    assert encoder.tokenizer.decode(learned, skip_special_tokens=False) == "".join(f" {t.answer}{END}" for t in turns)
    assert [i for i, label in zip(ids, labels, strict=True) if label != IGNORE] == learned
    assert ids.count(encoder.image_id) == len(tiles) * SEQ_LEN
    assert (glyphs[-1] == IGNORE).all()  # the whole image, reduced
    assert 0 < (glyphs[:-1] > 0).sum() <= len(document.glyphs)
    assert glyphs.max() <= len(GLYPHS)


def test_few_shapes_keeps_one_question_about_a_shape_and_the_first_turn() -> None:
    turns = make_document("train", 1, kind="label").turns
    kept = few_shapes(turns)
    assert kept[0] is turns[0]
    assert sum(t.task == "shape" for t in kept) == 1
    assert [t for t in kept if t.task != "shape"] == [t for t in turns if t.task != "shape"]


def test_a_phase_that_restarts_begins_from_what_a_checkpoint_holds(demo_checkpoint: Path) -> None:
    model = SmolVLMForConditionalGeneration.from_pretrained(demo_checkpoint, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 2**-12)  # between two bf16 numbers
    namer, optims = begin(model, Plan(), 7)
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())
    assert torch.equal(namer.weight, begin(model, Plan(), 7)[0].weight)
    assert all(not optim.state for optim in optims)


def test_training_writes_a_checkpoint_with_the_carried_tokenizer_and_goes_on_where_it_stopped(
    demo_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(steps=2, batch=2)
    record = train(plan, tmp_path / "out", workers=0)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (demo_checkpoint / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "config.json").read_bytes() == (demo_checkpoint / "config.json").read_bytes()
    SmolVLMForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "training.json").read_text()) == json.loads(json.dumps(record))
    assert record["log"][-1]["step"] == 2
    train(plan, tmp_path / "out", workers=0)
    assert "resuming at step 2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another plan"):
        train(Plan(steps=3, batch=2), tmp_path / "out", workers=0)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ValueError, match="want one at which a phase restarts"):
        train(plan, tmp_path / "out", workers=0, finished=demo_checkpoint)
