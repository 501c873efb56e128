"""The carried checkpoint and its documents: splits that share nothing, a record that fits, a model that reads."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, SmolVLMForConditionalGeneration

from demo.documents import (
    CHARACTERS,
    GRADES,
    KINDS,
    NODE_MODULES,
    SPLITS,
    TEST_FONTS,
    TRAIN_FONTS,
    WEB_FONTS,
    Document,
    digest,
    make_document,
    split_of,
    write_documents,
)
from demo.evaluate import evaluate, wilson
from demo.run import QUESTION, SAMPLE
from export.documents import read_data
from runtimes.ask import ask
from runtimes.preprocess import preprocess, read_settings


def free_strings(document: Document) -> set[str]:
    """Answers that are drawn values, not words of a closed class."""
    return {t.answer for t in document.turns if t.task == "field"}


def test_the_same_arguments_give_the_same_document() -> None:
    one, two = make_document("test", 7), make_document("test", 7)
    assert np.array_equal(np.asarray(one.image), np.asarray(two.image))
    assert (one.turns, one.glyphs) == (two.turns, two.glyphs)
    assert make_document("test", 8).turns != one.turns


def test_no_free_string_of_a_split_belongs_to_another() -> None:
    for split in SPLITS:
        for index in range(30):
            for value in free_strings(make_document(split, index, kind="form")):
                assert split_of(value) == split


def test_the_splits_cover_every_string_once() -> None:
    buckets = [b for r in SPLITS.values() for b in r]
    assert sorted(buckets) == list(range(16))


def test_the_test_split_has_a_font_family_that_training_has_not() -> None:
    trained = {package for package, _ in TRAIN_FONTS + WEB_FONTS}
    assert all(package not in trained for package, _ in TEST_FONTS)
    assert not [package for package in trained if "manrope" in package]


def test_the_web_fonts_are_those_that_npm_installs() -> None:
    packages = json.loads((NODE_MODULES.parent / "package.json").read_text())["dependencies"]
    assert {package for package, _ in WEB_FONTS} == set(packages)


def test_a_font_that_is_not_installed_is_named_with_its_remedy() -> None:
    with pytest.raises(FileNotFoundError, match=r"run `npm ci` in .*fonts"):
        make_document("train", 0, faces=[("@fontsource/absent", "absent.woff")])


@pytest.mark.parametrize("grade", GRADES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_grade_can_be_drawn_and_asked(kind: str, grade: str) -> None:
    document = make_document("calibration", 3, grade, kind)
    assert len(document.turns) >= 3
    assert all(turn.answer and turn.question for turn in document.turns)
    for glyph in document.glyphs:
        assert " " in glyph.name or glyph.name in CHARACTERS
        assert 0 <= glyph.x <= 1
    columns, rows = KINDS[kind]
    assert document.image.width / document.image.height == pytest.approx(columns / rows, rel=0.2)


def test_documents_are_harder_by_grade() -> None:
    def roughness(grade: str) -> float:
        images = [np.asarray(make_document("search", i, grade).image, dtype=np.float32) for i in range(8)]
        return float(np.mean([np.abs(np.diff(i, axis=0)).mean() for i in images]))

    assert len({round(roughness(g), 3) for g in GRADES}) == 3


def test_written_documents_are_read_back_as_data(tmp_path: Path) -> None:
    assert len(list(write_documents("search", 3, "worn", tmp_path / "d"))) == 3
    documents = read_data(tmp_path / "d")
    assert [d.answers[0] for d in documents] == [make_document("search", i, "worn").turns[0].answer for i in range(3)]


def test_the_record_belongs_to_this_generator_and_checkpoint(demo_checkpoint: Path) -> None:
    record = json.loads((demo_checkpoint / "training.json").read_text())
    assert record["train_digest_100"] == digest("train", 100)
    with safe_open(demo_checkpoint / "model.safetensors", "pt") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118  # not a mapping
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    assert record["parameters"] == sum(int(np.prod(s)) for s in shapes)
    assert record["log"][-1]["step"] == record["plan"]["steps"]


def test_the_checkpoint_is_small_and_has_the_familys_traits(demo_checkpoint: Path) -> None:
    assert (demo_checkpoint / "model.safetensors").stat().st_size <= 30_000_000
    config = AutoConfig.from_pretrained(demo_checkpoint)
    assert config.model_type == "smolvlm"
    assert config.text_config.num_key_value_heads < config.text_config.num_attention_heads
    assert not config.tie_word_embeddings
    assert config.scale_factor > 1
    assert config.vision_config.intermediate_size % 32
    tiles = preprocess(make_document("test", 0).image, read_settings(demo_checkpoint / "preprocessor_config.json"))
    assert len(tiles.pixels) > 1
    assert AutoTokenizer.from_pretrained(demo_checkpoint).convert_tokens_to_ids("<image>") == config.image_token_id
    SmolVLMForConditionalGeneration.from_pretrained(demo_checkpoint)


def test_the_published_accuracy_is_of_this_checkpoint_and_what_it_is_meant_to_be(demo_checkpoint: Path) -> None:
    rows = json.loads((demo_checkpoint / "evaluation.json").read_text())
    weights = hashlib.sha256((demo_checkpoint / "model.safetensors").read_bytes()).hexdigest()
    assert {(row["split"], row["weights_sha256"]) for row in rows} == {("test", weights)}
    grades = {row["grade"]: row["tasks"] for row in rows}
    assert set(grades) == set(GRADES)
    for tasks in grades.values():
        assert tasks["all"]["documents"] >= 500
        assert set(tasks) == {"all", "field", "line", "shape"}
    assert grades["clean"]["all"]["exact"] > grades["hard"]["all"]["exact"]
    assert grades["clean"]["all"]["exact"] >= 0.9
    assert min(row["exact"] for row in grades["clean"].values()) >= 0.8


def test_the_checkpoint_reads_as_published(demo_checkpoint: Path) -> None:
    """A small sample, drawn apart from the published one, is no worse than its interval allows."""
    published = json.loads((demo_checkpoint / "evaluation.json").read_text())[0]["tasks"]["all"]["exact"]
    row = evaluate(demo_checkpoint, "test", "clean", 60)["tasks"]["all"]
    assert row["interval_95"][1] >= published


def test_the_bundle_answers_the_question_of_make_demo(demo_bundle: Path) -> None:
    asked = ask(demo_bundle, QUESTION, [SAMPLE])
    assert asked.answer.text == "69.57"
    assert asked.answer.finish_reason == "stop"


def test_an_interval_holds_its_proportion() -> None:
    low, high = wilson(90, 100)
    assert low < 0.9 < high
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-9)
