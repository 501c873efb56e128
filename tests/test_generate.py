"""The loop over a runner, and conversations: with a runner that follows a script, and with ONNX Runtime."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from transformers.generation import logits_process as reference

from demo.tokenizer import train_tokenizer
from runtimes.bundle import Bundle
from runtimes.chat import Answer, Chat, Reply, open_chat
from runtimes.generate import REPLACEMENT, Sampling, TextStream, generate, log_softmax, scores
from runtimes.manifest import BundleError
from runtimes.preprocess import ImageSettings
from runtimes.prompt import END, ImagePart, Message, PromptEncoder
from runtimes.runner import BundleSettings, Floats, InputError
from tests.fakes import CONTEXT, SEQ_LEN, TILE, ScriptRunner, byte_tokenizer, make_bundle

ENCODER = PromptEncoder(byte_tokenizer(), SEQ_LEN)
VOCAB = ENCODER.tokenizer.get_vocab_size()
SETTINGS = BundleSettings(
    vocab=VOCAB,
    hidden=2,
    layers=1,
    kv_heads=1,
    head_dim=2,
    context=CONTEXT,
    tile_size=TILE,
    seq_len=SEQ_LEN,
    image_id=ENCODER.image_id,
    eos_ids=(ENCODER.end_id, ENCODER.tokenizer.get_vocab()["<|im_end|>"]),
)
IMAGES = ImageSettings(tile_size=TILE, longest_edge=2 * TILE)
WIDE, SMALL = Image.new("RGB", (40, 20), "red"), Image.new("RGB", (8, 8), "blue")
REPLY_OPENS = ENCODER.tokenizer.encode("Assistant:").ids


def tokens(text: str) -> list[int]:
    return list(ENCODER.tokenizer.encode(text).ids)


def row(token: int, height: float = 5.0) -> Floats:
    logits = np.sin(np.arange(VOCAB, dtype=np.float32))
    logits[token] = height
    return logits


def saying(*answers: str) -> ScriptRunner:
    """A runner that gives these answers to the turns of a chat; the text <end_of_utterance> ends one."""
    scripts = [tokens(f" {a}") for a in answers]

    def script(fed: list[int]) -> Floats:
        opened = [i for i in range(len(fed)) if fed[i : i + len(REPLY_OPENS)] == REPLY_OPENS]
        said = len(fed) - opened[-1] - len(REPLY_OPENS) if opened else 0
        answer = scripts[max(len(opened), 1) - 1]
        return row(answer[said] if said < len(answer) else tokens(".")[0])

    return ScriptRunner(SETTINGS, script)


def chat_with(runner: ScriptRunner) -> Chat:
    return Chat(runner, ENCODER, IMAGES)


def fed(runner: ScriptRunner) -> list[int]:
    return [token for call in runner.fed for token in call]


# ---- choosing a token


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=1.0, top_k=10_000),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=2.0, top_p=1e-6),
        Sampling(temperature=0.6, top_k=40, top_p=0.9, repetition_penalty=1.2),
        Sampling(temperature=1.0, repetition_penalty=0.8),
    ],
    ids=repr,
)
def test_scores_are_those_of_transformers_processors(seed: int, sampling: Sampling) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, 300).astype(np.float32)
    seen = random.integers(0, 300, 50).tolist()
    wanted, ids = torch.from_numpy(logits)[None], torch.tensor([seen])
    if sampling.repetition_penalty != 1:
        wanted = reference.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, wanted)
    wanted = reference.TemperatureLogitsWarper(sampling.temperature)(ids, wanted)
    if sampling.top_k:
        wanted = reference.TopKLogitsWarper(sampling.top_k)(ids, wanted)
    if sampling.top_p < 1:
        wanted = reference.TopPLogitsWarper(sampling.top_p)(ids, wanted)
    np.testing.assert_allclose(scores(logits, seen, sampling), wanted[0].numpy(), rtol=1e-6)


def test_scores_leave_the_logits_alone_and_greedy_ignores_the_limits() -> None:
    logits = row(3)
    before = logits.copy()
    out = scores(logits, [3], Sampling(repetition_penalty=2.0, top_k=1, top_p=0.1))
    np.testing.assert_array_equal(logits, before)
    assert np.isfinite(out).all()
    assert out[3] == logits[3] / 2


def test_log_softmax_is_that_of_torch_also_for_large_logits() -> None:
    logits = np.array([1000.0, 999.0, -1000.0], dtype=np.float32)
    wanted = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    np.testing.assert_allclose(log_softmax(logits), wanted, atol=1e-9)


def sampled(sampling: Sampling, script: Callable[[list[int]], Floats], prompt: Sequence[int] = (1,)) -> list[int]:
    runner = ScriptRunner(SETTINGS, script)
    return [t.id for t in generate(runner, runner.new_cache(), prompt, sampling=sampling)]


def test_sampling_follows_the_probabilities_and_repeats_with_its_seed() -> None:
    chances = np.array([0.5, 0.3, 0.15, 0.05])
    logits = np.full(VOCAB, -1e9, dtype=np.float32)
    logits[10:14] = np.log(chances)
    sampling = Sampling(300, temperature=1.0, seed=4)
    found = sampled(sampling, lambda _: logits)
    share = np.bincount(found, minlength=14)[10:14] / len(found)
    np.testing.assert_allclose(share, chances, atol=0.08)
    assert sampled(sampling, lambda _: logits) == found
    assert sampled(replace(sampling, seed=5), lambda _: logits) != found


def test_one_candidate_is_greedy_and_a_ruled_out_token_is_never_drawn() -> None:
    assert sampled(Sampling(20, temperature=5.0, top_k=1), lambda ids: row(len(ids))) == list(range(1, 21))
    assert set(sampled(Sampling(200, temperature=50.0, top_k=2), lambda _: row(7) + row(9))) == {7, 9}


def test_the_repetition_penalty_counts_prompt_and_answer() -> None:
    def script(_: list[int]) -> Floats:
        logits = np.zeros(VOCAB, dtype=np.float32)
        logits[1:6] = [5, 4.5, 4, 3.5, 3]  # token 1 is in the prompt
        return logits

    assert sampled(Sampling(4, repetition_penalty=1.9), script) == [2, 3, 4, 5]


@pytest.mark.parametrize("stop", SETTINGS.eos_ids)
def test_every_stop_token_stops(stop: int) -> None:
    found = sampled(Sampling(10), lambda ids: row(stop if len(ids) == 4 else 50))
    assert found == [50, 50, 50, stop]


def test_the_image_token_is_never_chosen() -> None:
    image = SETTINGS.image_id
    assert sampled(Sampling(2), lambda _: row(image) + row(50, 4.0)) == [50, 50]
    assert image not in sampled(Sampling(50, temperature=1.0), lambda _: row(image, 9.0))


def test_the_last_token_is_not_fed() -> None:
    runner = ScriptRunner(SETTINGS, lambda ids: row(len(ids)))
    cache = runner.new_cache()
    assert [t.id for t in generate(runner, cache, [1, 2], sampling=Sampling(3))] == [2, 3, 4]
    assert cache.ids == [1, 2, 2, 3]


def test_generation_ends_with_the_context() -> None:
    found = sampled(Sampling(1000), lambda _: row(50), prompt=[1] * (CONTEXT - 3))
    assert found == [50] * 4  # three fit, and one more is known


def test_logprobs_are_those_of_the_raw_logits() -> None:
    runner = ScriptRunner(SETTINGS, lambda _: row(7))
    found = list(
        generate(runner, runner.new_cache(), [7], sampling=Sampling(3, temperature=9.0, repetition_penalty=3.0))
    )
    wanted = torch.log_softmax(torch.from_numpy(row(7)), -1).tolist()
    for token in found:
        assert token.logprob == pytest.approx(wanted[token.id], abs=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
    ],
    ids=str,
)
def test_sampling_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(wrong))} is .*, want"):
        Sampling(**wrong)


# ---- text as it comes


@pytest.fixture(scope="module")
def demo_tokenizer() -> Tokenizer:
    return train_tokenizer(documents=40)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
@example("a\u0301 👩‍👩‍👧 \u200d\ufffd x")
@example("\U0001d518\U0001d52b \x00\n\t ü")
def test_streamed_text_is_whole_characters_that_add_up(demo_tokenizer: Tokenizer, text: str) -> None:
    def decode(ids: Sequence[int]) -> str:
        return str(demo_tokenizer.decode(list(ids), skip_special_tokens=True))

    ids = demo_tokenizer.encode(text).ids
    stream = TextStream(decode)
    pieces = [stream.push(token) for token in ids]
    whole = decode(ids)
    assert "".join(pieces) == whole.removesuffix(REPLACEMENT)
    if REPLACEMENT not in whole:
        # a piece comes with the token that completes it: never early, never later
        for i in range(len(ids)):
            sent, known = "".join(pieces[: i + 1]), decode(ids[: i + 1])
            assert sent == known.rstrip(REPLACEMENT)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 639), max_size=30))
def test_any_tokens_stream_to_what_they_decode_to(demo_tokenizer: Tokenizer, ids: list[int]) -> None:
    def decode(part: Sequence[int]) -> str:
        return str(demo_tokenizer.decode(list(part), skip_special_tokens=True))

    stream = TextStream(decode)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == decode(ids).removesuffix(REPLACEMENT)
    assert all(piece.encode() for piece in pieces if piece)  # no lone surrogates


# ---- conversations


def test_an_answer_has_its_text_ids_logprobs_and_reason() -> None:
    runner = saying(f"Größe 3{END}")
    reply = chat_with(runner).ask("How?")
    steps = list(reply)
    answer = reply.answer()
    assert "".join(step.text for step in steps) == answer.text == "Größe 3"
    assert answer.ids == tuple(tokens(f" Größe 3{END}")) == tuple(step.token.id for step in steps)
    assert answer.logprobs == tuple(step.token.logprob for step in steps)
    assert answer.finish_reason == "stop"
    assert answer.prompt_tokens == len(tokens(f"<|im_start|>User: How?{END}\nAssistant:"))
    assert answer.timings.first_token_ms == pytest.approx(
        answer.timings.preprocess_ms + answer.timings.image_ms + answer.timings.prefill_ms
    )
    assert answer == reply.answer()


def test_half_a_character_at_the_end_is_no_text() -> None:
    answer = chat_with(saying("aß")).ask("How?", sampling=Sampling(3)).answer()
    assert (answer.text, answer.finish_reason, len(answer.ids)) == ("a", "length", 3)


def whole_chat(*turns: tuple[tuple[str | ImagePart, ...], str]) -> list[int]:
    messages = []
    for asked, answered in turns:
        messages += [Message("user", asked), Message("assistant", (answered,))]
    return ENCODER.encode(messages[:-1]) + tokens(f" {messages[-1].parts[0]}")


def test_what_is_fed_over_three_turns_is_the_whole_chat_encoded_at_once() -> None:
    runner = saying(f"One 1.{END}", "Two is cut", f"Three ü{END}")
    chat = chat_with(runner)
    assert chat.ask("First?", [WIDE]).answer().finish_reason == "stop"
    assert chat.ask("Second?", sampling=Sampling(7)).answer() == Like(text="Two is", finish_reason="length")
    assert chat.ask(" Third\n?", [SMALL, WIDE]).answer().text == "Three ü"
    wide, small = ImagePart(1, 2), ImagePart(2, 2)
    wanted = whole_chat(((wide, "First?"), "One 1."), (("Second?",), "Two is"), ((small, wide, " Third\n?"), "Three ü"))
    assert fed(runner) == wanted
    assert chat.ids == wanted
    assert runner.tiles_encoded == 3 + 5 + 3


class Like:
    """Equal to an answer with these attributes."""

    def __init__(self, **wanted: object) -> None:
        self.wanted = wanted

    def __eq__(self, other: object) -> bool:
        return {name: getattr(other, name) for name in self.wanted} == self.wanted

    __hash__ = None  # type: ignore[assignment]  # only compared


def test_a_stop_token_other_than_the_end_token_is_replaced_by_it() -> None:
    runner = saying("One<|im_end|>", f"Two{END}")
    chat = chat_with(runner)
    assert chat.ask("First?").answer().finish_reason == "stop"
    chat.ask("Second?").answer()
    assert fed(runner) == whole_chat((("First?",), "One"), (("Second?",), "Two"))


def test_an_encoded_image_is_computed_once_for_many_questions() -> None:
    runner = saying(f"One{END}", f"Two{END}")
    image = chat_with(runner).encode(WIDE)
    for _ in range(2):
        assert chat_with(runner).ask("What?", [image]).answer().image_tiles == 3
    assert runner.tiles_encoded == 3
    assert (
        runner.fed[0][: runner.fed[0].index(ENCODER.end_id)]
        == ENCODER.encode([Message("user", (ImagePart(1, 2), "What?"))], reply=False)[:-2]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the question is empty"),
        (" \n", "the question is empty"),
        ("what <image>?", "spells the token <image>"),
        ("a\udcff", "no UTF-8 text"),
        ("x" * CONTEXT, r"context of 384 has no room for a prompt of 4\d\d tokens"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused_before_anything_runs(text: str, message: str) -> None:
    runner = saying(f"One{END}", f"Two{END}")
    chat = chat_with(runner)
    with pytest.raises(InputError, match=message):
        chat.ask(text, [WIDE])
    assert (runner.fed, runner.tiles_encoded) == ([], 0)
    assert chat.ask("First?").answer().text == "One"
    with pytest.raises(InputError, match=message.replace("for a", r"for .* of conversation and a")):
        chat.ask(text, [WIDE])
    assert chat.ask("Second?").answer().text == "Two"
    assert fed(runner) == whole_chat((("First?",), "One"), (("Second?",), "Two"))


def test_a_conversation_that_fills_the_context_says_so() -> None:
    chat = chat_with(saying("x" * CONTEXT))
    assert chat.ask("First?", sampling=Sampling(CONTEXT)).answer().finish_reason == "length"
    with pytest.raises(InputError, match="has no room for 385 tokens of conversation and a prompt of"):
        chat.ask("Second?")


def test_cancelled_in_the_middle_the_answer_so_far_stays_in_the_conversation() -> None:
    runner = saying(f"One two three{END}", f"Four{END}")
    chat = chat_with(runner)
    reply = chat.ask("First?")
    for step in reply:
        if step.text == "o":
            chat.cancel()
    assert reply.answer() == Like(text="One two", finish_reason="cancelled")
    assert chat.ask("Second?").answer().text == "Four"
    assert fed(runner) == whole_chat((("First?",), "One two"), (("Second?",), "Four"))


@pytest.mark.parametrize("where", ["encode_image", "extend"])
def test_cancelled_before_the_first_token_the_turn_was_never_asked(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = saying(f"One{END}", f"Two{END}")
    chat = chat_with(runner)
    chat.ask("First?").answer()
    original = getattr(runner, where)

    def cancelled_first(*arguments: Any) -> Any:
        chat.cancel()
        return original(*arguments)

    monkeypatch.setattr(runner, where, cancelled_first)
    assert chat.ask("Bad?", [WIDE]).answer() == Like(text="", ids=(), finish_reason="cancelled")
    monkeypatch.undo()
    assert chat.ask("Second?").answer().text == "Two"
    assert fed(runner) == whole_chat((("First?",), "One"), (("Second?",), "Two"))


def test_a_cancel_between_answers_does_nothing() -> None:
    chat = chat_with(saying(f"One{END}", f"Two{END}"))
    chat.cancel()
    assert chat.ask("First?").answer().finish_reason == "stop"
    chat.cancel()
    assert chat.ask("Second?").answer().finish_reason == "stop"


def test_a_reply_that_is_closed_ends_there_and_the_conversation_goes_on() -> None:
    runner = saying(f"One two{END}", f"Three{END}")
    chat = chat_with(runner)
    reply = chat.ask("First?")
    for step in reply:
        if step.text == "e":
            break
    with pytest.raises(InputError, match="one question at a time"):
        next(chat.ask("Meanwhile?"))
    reply.close()
    with pytest.raises(ValueError, match="closed"):
        reply.answer()
    assert chat.ask("Second?").answer().text == "Three"
    assert fed(runner) == whole_chat((("First?",), "One"), (("Second?",), "Three"))


def test_a_question_put_before_another_was_answered_is_refused() -> None:
    chat = chat_with(saying(f"One{END}", f"Two{END}"))
    first, second = chat.ask("First?"), chat.ask("Second?")
    first.answer()
    with pytest.raises(InputError, match="one question at a time"):
        second.answer()


# ---- with ONNX Runtime


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("fake") / "bundle")


def test_two_turns_with_a_kept_cache_have_the_logprobs_of_the_whole_chat_run_at_once(bundle: Bundle) -> None:
    chat = open_chat(bundle, threads=1)
    image = chat.encode(WIDE)
    answers = [
        chat.ask("First?", [image], Sampling(9)).answer(),
        chat.ask("Second?", (), Sampling(9, temperature=1.0, seed=2)).answer(),
    ]
    runner = chat.runner
    rows = runner.extend(runner.new_cache(), chat.ids, image.features.reshape(-1, image.features.shape[-1]), keep=0)
    logprobs = log_softmax(rows)
    for answer in answers:
        ids = [i for i in answer.ids if i not in runner.settings.eos_ids]
        at = _find(chat.ids, ids)
        wanted = [logprobs[at + i - 1, token] for i, token in enumerate(answer.ids)]
        np.testing.assert_allclose(answer.logprobs, wanted, atol=1e-3)


def _find(ids: Sequence[int], part: Sequence[int]) -> int:
    """Where `part` stands in `ids`, behind an opening of a reply."""
    starts = [i for i in range(len(ids)) if list(ids[i : i + len(part)]) == list(part)]
    return next(i for i in starts if list(ids[i - len(REPLY_OPENS) : i]) == REPLY_OPENS)


def test_an_answer_is_cancelled_from_another_thread_within_a_token(bundle: Bundle) -> None:
    chat = open_chat(bundle, threads=1)
    reply = chat.ask("First?", sampling=Sampling(10_000, temperature=1.0))
    seen = threading.Event()
    at_cancel: list[int] = []
    done: list[int] = []

    def cancel() -> None:
        seen.wait()
        chat.cancel()
        at_cancel.append(len(done))

    thread = threading.Thread(target=cancel)
    thread.start()
    for step in reply:
        done.append(step.token.id)
        seen.set()
        if len(done) > 1:
            thread.join()  # so that what comes now comes after the cancellation
    thread.join()
    answer: Answer = reply.answer()
    assert answer.finish_reason == "cancelled"
    assert len(done) <= at_cancel[0] + 1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("processor_config.json", {"image_seq_len": 5}, r"processor_config\.json: image_seq_len is 5, .* says 4"),
        ("processor_config.json", {"image_seq_len": "x"}, r"processor_config\.json: image_seq_len is 'x'"),
        (
            "preprocessor_config.json",
            {"max_image_size": {"longest_edge": 9}},
            "longest_edge is 9, manifest.json says 8",
        ),
        ("preprocessor_config.json", {"image_std": 0}, r"preprocessor_config\.json: image_std"),
        ("tokenizer.json", {"model": None}, r"tokenizer\.json: cannot be read as a tokenizer"),
    ],
)
def test_files_that_disagree_with_the_manifest_are_named(
    bundle: Bundle, tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    with pytest.raises(BundleError, match=message):
        open_chat(replace(bundle, folder=folder))


def test_the_token_budget_is_a_choice_at_run_time(bundle: Bundle) -> None:
    tiles = []
    for budget in (None, 1, 10):
        answer = open_chat(bundle, tiles=budget).ask("What?", [WIDE], Sampling(1)).answer()
        tiles.append(answer.image_tiles)
    assert tiles == [3, 1, 7]
    with pytest.raises(InputError, match="token budget: 2 tiles"):
        open_chat(bundle, tiles=2)


def test_a_reply_is_an_iterator() -> None:
    reply: Iterator[object] = chat_with(saying(f"One{END}")).ask("First?")
    assert isinstance(reply, Reply)
    assert iter(reply) is reply
