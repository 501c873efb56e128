"""A bundle as the router's local leg: the figures of its tokens, cancellation, what does not fit."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from router_client.local import ContextTooLongError, Local, Question, Token
from runtimes.bundle import read_bundle
from runtimes.chat import Chat, open_chat
from runtimes.generate import Sampling, generate
from runtimes.local_leg import LocalLeg, template_digest
from runtimes.manifest import BundleError
from runtimes.preprocess import load_image, preprocess
from runtimes.prompt import ImagePart, Message
from runtimes.runner import Floats
from runtimes.verify import step_logits
from tests.fakes import CONTEXT, ScriptRunner
from tests.test_generate import ENCODER, IMAGES, SETTINGS, VOCAB, chat_with, saying

NEVER = threading.Event()


def leg_of(runner: ScriptRunner) -> LocalLeg:
    return LocalLeg(lambda: chat_with(runner))


def text_of(tokens: Sequence[Token]) -> str:
    return "".join(token.text for token in tokens)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.effect_noise((60, 40), 80).convert("RGB").save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


@pytest.mark.parametrize("kind", ["tiny_bundle", "tiny_ios_bundle"])
def test_log_probabilities_and_margins_are_those_of_the_runners_logits(
    kind: str, picture: Path, request: pytest.FixtureRequest
) -> None:
    bundle = read_bundle(request.getfixturevalue(kind))
    chat = open_chat(bundle)
    leg: Local = LocalLeg(lambda: chat)
    assert leg.available() == ""
    tiles, compared = preprocess(load_image(picture), chat.settings), 0
    for text, heat in (("What?", 0.0), ("What?", 1.0), ("Read line 1.", 2.0), ("What colour is it?", 3.0)):
        question = Question(text, (picture.read_bytes(),), max_tokens=9, temperature=heat)
        found = list(leg.stream(question, NEVER))
        answer = open_chat(bundle).ask(text, [load_image(picture)], Sampling(9, heat)).answer()
        assert text_of(found) == answer.text
        ids = chat.encoder.encode([Message("user", (ImagePart(tiles.rows, tiles.cols), text))])
        logits = step_logits(chat.runner, ids, chat.runner.encode_image(tiles.pixels), answer.ids)
        wanted = torch.log_softmax(torch.from_numpy(logits).double(), dim=-1).numpy()
        figures = found[: len(answer.ids)]
        others = wanted.copy()
        others[:, chat.runner.settings.image_id] = -np.inf
        for i, (token, step) in enumerate(zip(answer.ids, figures, strict=True)):
            others[i, token] = -np.inf
            assert step.logprob == pytest.approx(wanted[i, token], abs=2e-5)
            assert step.margin == pytest.approx(wanted[i, token] - others[i].max(), abs=2e-5)
            compared += 1
        if answer.finish_reason == "length":
            assert found[len(answer.ids) :] == [Token("", finish="length")]
    assert compared > 6


def test_a_margin_is_against_the_best_that_could_have_been_chosen_and_below_zero_for_a_lesser_token() -> None:
    logits: Floats = np.full(VOCAB, -9, dtype=np.float32)
    logits[[5, 6, SETTINGS.image_id]] = 2.0, 1.5, 3.0  # the image token is never chosen
    runner = ScriptRunner(SETTINGS, lambda _: logits)
    (greedy,) = generate(runner, runner.new_cache(), [1], sampling=Sampling(1))
    assert greedy.id == 5
    assert greedy.margin == pytest.approx(0.5)
    assert greedy.logprob == pytest.approx(float(torch.log_softmax(torch.from_numpy(logits).double(), 0)[5]))
    sampled = [
        token
        for seed in range(30)
        for token in generate(runner, runner.new_cache(), [1], sampling=Sampling(1, temperature=1.0, seed=seed))
    ]
    lesser = [token.margin for token in sampled if token.id == 6]
    assert lesser
    assert lesser == pytest.approx([-0.5] * len(lesser))


def test_an_answer_ends_with_why_it_ended() -> None:
    ended = list(leg_of(saying("four<end_of_utterance>")).stream(Question("What?"), NEVER))
    assert (text_of(ended), ended[-1].finish) == ("four", "stop")
    assert all(token.logprob is not None and token.margin is not None for token in ended)
    cut = list(leg_of(saying("four")).stream(Question("What?", max_tokens=3), NEVER))
    assert (text_of(cut), cut[-1]) == ("fo", Token("", finish="length"))


def test_a_system_prompt_comes_first_and_every_question_is_a_conversation_of_its_own() -> None:
    runner = saying("a<end_of_utterance>")
    leg = leg_of(runner)
    for _ in range(2):
        list(leg.stream(Question("What?", system="Be brief."), NEVER))
    wanted = ENCODER.encode([Message("system", ("Be brief.",)), Message("user", ("What?",))])
    assert [call for call in runner.fed if len(call) > 1] == [wanted, wanted]


def test_what_does_not_fit_is_told_apart_from_what_fails() -> None:
    with pytest.raises(ContextTooLongError, match="no room for a prompt"):
        list(leg_of(saying("a")).stream(Question("x" * CONTEXT), NEVER))


@pytest.mark.parametrize("after", [1, 3])
def test_it_stops_within_a_token(after: int) -> None:
    runner, stop = saying("a long answer that would go on and on"), threading.Event()
    shown = []
    for token in leg_of(runner).stream(Question("What?"), stop):
        shown.append(token)
        if len(shown) == after:
            stop.set()
    assert len(shown) == after
    assert len(runner.fed) == after  # the prompt, and a call for each further token


def test_a_picture_under_way_is_cancelled_and_the_next_question_is_answered(picture: Path) -> None:
    class Slow(ScriptRunner):
        slow = True

        def encode_image(self, pixels: Floats) -> Floats:
            began = time.monotonic()
            while self.slow and time.monotonic() - began < 20:
                self._stop_if_cancelled()
                time.sleep(0.005)
            return super().encode_image(pixels)

    runner, stop = Slow(SETTINGS, saying("four<end_of_utterance>")._script), threading.Event()  # noqa: SLF001
    leg, question = leg_of(runner), Question("What?", (picture,))
    threading.Timer(0.1, stop.set).start()
    began = time.monotonic()
    assert list(leg.stream(question, stop)) == []
    assert time.monotonic() - began < 5
    runner.slow = False
    assert text_of(list(leg.stream(question, NEVER))) == "four"


def test_questions_at_once_wait_for_each_other_and_one_that_is_given_up_does_not() -> None:
    runner = saying("four<end_of_utterance>")
    leg, given_up = leg_of(runner), threading.Event()
    first = leg.stream(Question("What?"), NEVER)
    next(first)
    results: dict[str, str] = {}
    waits = threading.Thread(target=lambda: results.update(b=text_of(list(leg.stream(Question("Why?"), NEVER)))))
    waits.start()
    given_up.set()
    assert list(leg.stream(Question("How?"), given_up)) == []
    calls = len(runner.fed)
    time.sleep(0.1)
    assert len(runner.fed) == calls
    list(first)
    waits.join(10)
    assert results == {"b": "four"}


def test_what_cannot_be_loaded_is_unavailable_until_it_can() -> None:
    chats: list[Chat] = []

    def load() -> Chat:
        if not chats:
            raise BundleError("bundle: manifest.json\nis missing")
        return chats[0]

    leg = LocalLeg(load)
    assert leg.available() == "bundle: manifest.json is missing"
    chats.append(chat_with(saying("a<end_of_utterance>")))
    assert leg.available() == ""


def test_a_template_digest_is_of_the_format_and_of_how_pictures_become_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = saying("a")
    same = {template_digest(Chat(runner, ENCODER, IMAGES)) for _ in range(2)}
    other = template_digest(Chat(runner, ENCODER, replace(IMAGES, longest_edge=4 * IMAGES.tile_size)))
    monkeypatch.setattr("runtimes.prompt.END", "<|im_end|>")
    reworded = template_digest(Chat(runner, ENCODER, IMAGES))
    assert len({*same, other, reworded}) == 3
