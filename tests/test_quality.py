"""An evaluation finds what was planted, goes on where it was killed, and trusts nothing that an endpoint says."""

import base64
import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.datasets import DataSet, Item
from benchmarks.endpoint import MAX_BODY, MAX_WAIT_S, SHOWN, Endpoint, EndpointError
from benchmarks.journal import JournalError, open_journal
from benchmarks.markdown import cell
from benchmarks.quality import evaluate, item_keys, main, write_report
from benchmarks.quality_report import Given, compare, report_text
from benchmarks.scores import exact_interval, mean_interval
from benchmarks.systems import Answer, BundleSystem, Decoding, ReferenceSystem, checkpoint_digest
from export.android import export_android
from export.documents import DataError
from export.lora import adapter_digest
from runtimes.bundle import read_bundle
from runtimes.preprocess import load_image
from runtimes.runner import EngineError, Floats, InputError
from tests.checkpoints import make_checkpoint
from tests.test_lora import make_adapter

DECODING = Decoding()
VOCAB = 11


class Scripted:
    """A system whose answers are a function of the item; with `sure`, also logits that prefer the token 3."""

    def __init__(self, name: str, says: Callable[[Item], str], sure: float | None = None) -> None:
        self.name, self._says, self._sure = name, says, sure
        self.identity: dict[str, Any] = {"kind": "scripted", "name": name, "images": (0.5, 0.5)}
        self.asked: list[str] = []

    def _logits(self, tokens: int) -> Floats:
        logits = np.zeros((tokens, VOCAB), dtype=np.float32)
        logits[:, 3] = self._sure or 0.0
        return logits

    def answer(self, item: Item) -> Answer:
        self.asked.append(item.name)
        text = self._says(item)
        if self._sure is None:
            return Answer(text)
        return Answer(text, False, (3, 3), self._logits(2), "prompt")

    def along(self, item: Item, reference: Answer) -> Floats | None:
        return None if self._sure is None or reference.tokens is None else self._logits(len(reference.tokens))


def right(item: Item) -> str:
    return item.answers[0] if item.answers else "?"


def questions(count: int, metric: str = "exact") -> DataSet:
    items = [Item(str(i), None, f"Question {i}?", (f"answer {i}",), "ab"[i % 2]) for i in range(count)]
    return DataSet("documents", metric, tuple(items))


def test_planted_losses_are_found_and_the_interval_leaves_out_0(tmp_path: Path) -> None:
    worse = Scripted("worse", lambda item: "wrong" if int(item.name) < 12 else right(item), sure=2.0)
    reference = Scripted("reference", right, sure=3.0)
    report = evaluate(questions(100), [worse], reference, DECODING, tmp_path)
    row = report["systems"][0]
    assert report["reference"]["scores"]["all"]["mean"] == 1
    assert {task: one["mean"] for task, one in row["scores"].items()} == {"all": 0.88, "a": 0.88, "b": 0.88}
    against = row["against_reference"]
    assert (against["scores"]["all"]["lost"], against["scores"]["all"]["gained"]) == (12, 0)
    assert against["scores"]["all"]["interval_95"][1] < 0
    assert against["scores"]["all"]["sign_test_p"] < 0.001
    assert [one["item"] for one in against["lost"]] == [str(i) for i in range(12)]
    assert against["answers_equal"]["mean"] == 0.88
    assert against["answers_equal"]["interval"] == "Wilson"
    most = exact_interval(12, 100)[1]
    assert f"| 12 / 0 | 12 / 0 | {most:.2%} |" in report_text(report)
    # KL of softmax([3, 0 x 10]) from softmax([2, 0 x 10]), by its definition
    p, q = np.exp(3) / (np.exp(3) + 10), np.exp(2) / (np.exp(2) + 10)
    want = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert against["tokens"] == 200
    assert against["kl"]["mean"] == pytest.approx(want, rel=1e-6)
    assert against["kl"]["interval_95"] == pytest.approx([want, want], rel=1e-6)
    assert against["top1"] == {"rate": 1.0, "interval_95": [1.0, 1.0]}


def test_divergences_are_averaged_over_tokens_and_drawn_by_document() -> None:
    data, documents = questions(6), [0, 0, 1, 1, 2, 2]
    divergences = [(0.1,), (0.2, 0.4), (0.0, 0.0, 0.3), (1.0,), (0.5, 0.5), (0.05,)]
    found = [Given("x", False, kl, (True,) + (False,) * (len(kl) - 1)) for kl in divergences]
    row = compare(data, [Given("x")] * 6, found, documents)
    sums, counts = [sum(kl) for kl in divergences], [float(len(kl)) for kl in divergences]
    assert row["tokens"] == 10
    assert row["kl"]["mean"] == pytest.approx(sum(sums) / 10)
    assert row["kl"]["interval_95"] == list(mean_interval(sums, counts, documents))
    assert row["top1"]["rate"] == 0.6
    assert row["top1"]["interval_95"] == list(mean_interval([1.0] * 6, counts, documents))


def test_an_identical_system_loses_nothing(tmp_path: Path) -> None:
    reference, same = Scripted("reference", right, sure=3.0), Scripted("same", right, sure=3.0)
    against = evaluate(questions(30), [same], reference, DECODING, tmp_path)["systems"][0]["against_reference"]
    for one in against["scores"].values():
        assert (one["difference"], one["interval_95"], one["lost"]) == (0, [0, 0], 0)
    assert against["answers_equal"]["mean"] == 1
    assert against["kl"]["mean"] == pytest.approx(0, abs=1e-12)


def test_graded_scores_are_paired_too(tmp_path: Path) -> None:
    near = Scripted("near", lambda item: right(item)[:-1] + "x")
    report = evaluate(questions(40, "anls"), [near], Scripted("reference", right), DECODING, tmp_path)
    against = report["systems"][0]["against_reference"]
    assert against["scores"]["all"]["difference"] == pytest.approx(
        -np.mean([1 / len(f"answer {i}") for i in range(40)])
    )
    assert against["scores"]["all"]["interval_95"][1] < 0
    assert "kl" not in against


def test_items_without_right_answers_are_only_compared(tmp_path: Path) -> None:
    data = questions(4)
    data = replace(data, items=(*data.items[:2], *(replace(item, answers=()) for item in data.items[2:])))
    system = Scripted("s", lambda item: "other" if item.name == "3" else right(item))
    report = evaluate(data, [system], Scripted("reference", right), DECODING, tmp_path)
    assert report["systems"][0]["scores"]["all"]["items"] == 2
    assert report["systems"][0]["against_reference"]["answers_equal"]["mean"] == 0.75
    bare = replace(data, items=data.items[2:])
    report = evaluate(bare, [system], Scripted("reference", right), DECODING, tmp_path)
    assert report["systems"][0]["scores"] == {}
    assert "| score |" not in report_text(report)
    assert "word for word: 50.00%" in report_text(report)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    def dies(item: Item) -> str:
        if item.name == "6":
            raise KeyboardInterrupt
        return right(item)

    data, reference = questions(10), Scripted("reference", right, sure=3.0)
    with pytest.raises(KeyboardInterrupt):
        evaluate(data, [Scripted("s", dies, sure=2.0)], reference, DECODING, tmp_path)
    for path in tmp_path.glob("*.jsonl"):  # killed in the middle of a line
        with path.open("ab") as file:
            file.write(b'{"item": "torn", "te')
    again, before = Scripted("s", right, sure=2.0), Scripted("reference", right, sure=3.0)
    report = evaluate(data, [again], before, DECODING, tmp_path)
    assert before.asked == []
    assert again.asked == ["6", "7", "8", "9"]
    fresh = evaluate(data, [Scripted("s", right, sure=2.0)], reference, DECODING, tmp_path / "fresh")
    assert report == fresh
    more = Scripted("s", right, sure=2.0)
    evaluate(questions(12), [more], before, DECODING, tmp_path)
    assert more.asked == before.asked == ["10", "11"]


def test_the_references_answers_serve_the_next_system(tmp_path: Path) -> None:
    data, reference = questions(5), Scripted("reference", right, sure=3.0)
    one = evaluate(data, [Scripted("one", right, sure=1.0)], reference, DECODING, tmp_path)
    two = evaluate(data, [Scripted("two", right, sure=2.0)], reference, DECODING, tmp_path)
    assert len(reference.asked) == 5
    kl = [report["systems"][0]["against_reference"]["kl"]["mean"] for report in (one, two)]
    assert kl[0] > kl[1] > 0
    other = Scripted("another reference", right, sure=3.0)
    evaluate(data, [Scripted("two", right, sure=2.0)], other, DECODING, tmp_path)
    assert len(other.asked) == 5


def test_logits_that_were_cut_off_are_made_again(tmp_path: Path) -> None:
    data, reference = questions(5), Scripted("reference", right, sure=3.0)
    first = evaluate(data, [Scripted("s", right, sure=2.0)], reference, DECODING, tmp_path)
    logits = next(tmp_path.glob("*.logits"))
    os.truncate(logits, logits.stat().st_size - 4)
    for path in tmp_path.glob("along-*"):
        path.unlink()
    assert evaluate(data, [Scripted("s", right, sure=2.0)], reference, DECODING, tmp_path) == first
    assert reference.asked[5:] == ["4"]


def test_the_same_question_twice_is_asked_once(tmp_path: Path) -> None:
    data = questions(3)
    data = replace(data, items=data.items + data.items)
    system, reference = Scripted("s", right, sure=1.0), Scripted("reference", right, sure=2.0)
    report = evaluate(data, [system], reference, DECODING, tmp_path)
    assert len(system.asked) == len(reference.asked) == 3
    assert report["systems"][0]["scores"]["all"]["items"] == 6


def test_questions_on_one_picture_are_one_document_and_a_changed_picture_is_another_item(tmp_path: Path) -> None:
    for name, colour in (("a.png", "red"), ("b.png", "red"), ("c.png", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / name)
    items = [Item(n, tmp_path / n, q, (), "all") for n, q in (("a.png", "x"), ("a.png", "y"), ("b.png", "x"))]
    items += [Item("c.png", tmp_path / "c.png", "x", (), "all"), Item("none", None, "x", (), "all")]
    keys, documents = item_keys(items)
    assert documents == [0, 0, 0, 1, 2]
    assert keys[0] == keys[2]  # the same pixels under another name
    assert len(set(keys)) == 4
    Image.new("RGB", (4, 4), "green").save(tmp_path / "a.png")
    assert item_keys(items)[0][0] not in keys
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png: cannot be read"):
        item_keys(items)


def test_an_error_names_system_and_item_and_keeps_what_was_answered(tmp_path: Path) -> None:
    def fails(item: Item) -> str:
        if item.name == "2":
            raise EngineError("logits hold NaN")
        return right(item)

    with pytest.raises(EngineError, match="s, item 2: logits hold NaN"):
        evaluate(questions(4), [Scripted("s", fails)], None, DECODING, tmp_path)
    again = Scripted("s", right)
    evaluate(questions(4), [again], None, DECODING, tmp_path)
    assert again.asked == ["2", "3"]


def journal_path(folder: Path) -> Path:
    evaluate(questions(3), [Scripted("s", right)], None, DECODING, folder)
    return next(folder.glob("answers-*"))


@pytest.mark.parametrize(
    ("line", "damage", "message"),
    [
        (1, b'{"item": "half', "line 2 is no row"),
        (1, b"\0\0\0\0", "line 2 is no row"),
        (1, b"[1]", "line 2 is no row"),
        (1, b'{"text": "x"}', "line 2 has no item"),
        (0, b'{"schema": 0}', "line 1 is of another system"),
    ],
)
def test_a_damaged_journal_is_refused_by_name(line: int, damage: bytes, message: str, tmp_path: Path) -> None:
    path = journal_path(tmp_path)
    lines = path.read_bytes().splitlines()
    lines[line] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(JournalError, match=message) as caught:
        journal_path(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("tail", [b"", b"{", b'{"item": "x"}', b"\0" * 100, b"\xff\n", b'{"item": "x", "te\n'])
def test_an_unfinished_last_line_is_cut_off(tail: bytes, tmp_path: Path) -> None:
    path = journal_path(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    journal_path(tmp_path)
    assert path.read_bytes() == whole


def test_a_journal_is_open_once_at_a_time(tmp_path: Path) -> None:
    with (
        open_journal(tmp_path / "j.jsonl", {}),
        pytest.raises(JournalError, match="another run"),
        open_journal(tmp_path / "j.jsonl", {}),
    ):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot be written"), open_journal(tmp_path / "file" / "j.jsonl", {}):
        pass


def test_the_report_is_the_same_each_time_and_says_what_was_found(tmp_path: Path) -> None:
    def wrong(item: Item) -> str:
        return "a|b\n`<b>`" if item.name == "1" else right(item)

    reference = Scripted("reference", right, sure=3.0)
    report = evaluate(questions(8), [Scripted("s", wrong, sure=2.0)], reference, DECODING, tmp_path)
    path = write_report(report, tmp_path)
    first = path.read_bytes(), path.with_suffix(".json").read_bytes()
    assert write_report(report, tmp_path) == path
    assert (path.read_bytes(), path.with_suffix(".json").read_bytes()) == first
    assert json.loads(first[1]) == json.loads(json.dumps(report))
    text = first[0].decode()
    assert "| s | all | 8 | 87.50% |" in text
    assert "| all | -12.50% |" in text
    assert r"| 1 | Question 1? | answer 1 | answer 1 | a\|b \`\<b\>\` |" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)
    with pytest.raises(JournalError, match="cannot be written"):
        write_report(report, tmp_path / "none")


def test_a_cell_is_one_short_line_without_markup() -> None:
    assert cell("a\nb\t c\x1b[31m") == r"a b c \[31m"
    assert cell("![x](http://h)") == r"\!\[x\](http://h)"
    assert len(cell("x" * 200)) == 80


# ---- bundles and the reference


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Item, ...]:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    items = [Item("text", None, "What is a label?", ("x",), "text")]
    for i, size in enumerate([(50, 60, 3), (90, 130, 3)]):
        path = folder / f"{i}.png"
        Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)).save(path)
        items.append(Item(f"picture {i}", path, "What does it say?", ("x",), "image"))
    return tuple(items)


def test_a_bundle_is_followed_along_the_references_answers(
    tiny_bundle: Path, tiny_checkpoint: Path, pictures: tuple[Item, ...], tmp_path: Path
) -> None:
    decoding = Decoding(max_new_tokens=6)
    system = BundleSystem(read_bundle(tiny_bundle), decoding)
    reference = ReferenceSystem(str(tiny_checkpoint), decoding, system.settings)
    report = evaluate(DataSet("d", "exact", pictures), [system], reference, decoding, tmp_path)
    against = report["systems"][0]["against_reference"]
    assert 0 < against["kl"]["mean"] < 1
    assert 0 < against["top1"]["rate"] <= 1
    for item in pictures:
        answer = reference.answer(item)
        assert answer.tokens is not None
        assert answer.logits is not None
        assert len(answer.tokens) == len(answer.logits) <= 6
        logits = system.along(item, answer)
        assert logits is not None
        assert logits.shape == answer.logits.shape
        alone = BundleSystem(read_bundle(tiny_bundle), decoding).answer(item)
        assert system.answer(item) == alone  # whether it followed the reference before or not
        assert alone.prompt == answer.prompt


def test_a_bundle_that_makes_the_same_choices_is_not_run_twice(
    tiny_bundle: Path, pictures: tuple[Item, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for item in pictures:
        own = BundleSystem(read_bundle(tiny_bundle), Decoding(max_new_tokens=5)).answer(item)
        assert own.tokens is not None
        system = BundleSystem(read_bundle(tiny_bundle), Decoding(max_new_tokens=5))
        shown = np.zeros((len(own.tokens), system.runner.settings.vocab), dtype=np.float32)
        system.along(item, replace(own, logits=shown))
        monkeypatch.setattr(system.runner, "extend", None)
        assert system.answer(item) == own


def test_a_model_of_another_vocabulary_is_not_followed_and_one_of_another_prompt_is_refused(
    tiny_bundle: Path, pictures: tuple[Item, ...]
) -> None:
    system = BundleSystem(read_bundle(tiny_bundle), DECODING)
    vocab = system.runner.settings.vocab
    other = Answer("x", False, (1,), np.zeros((1, vocab + 1), dtype=np.float32), "prompt")
    assert system.along(pictures[0], other) is None
    assert system.along(pictures[0], Answer("x")) is None
    with pytest.raises(InputError, match="different prompts"):
        system.along(pictures[0], replace(other, logits=np.zeros((1, vocab), dtype=np.float32)))
    with pytest.raises(InputError, match="<image>"):
        system.answer(replace(pictures[0], question="What is <image>?"))


def test_an_instruction_and_a_budget_of_tiles_are_part_of_what_is_asked(
    tiny_bundle: Path, tiny_checkpoint: Path, pictures: tuple[Item, ...]
) -> None:
    plain, told = Decoding(), Decoding(instruction="Answer briefly.", tiles=1)
    assert told.question(pictures[0]) == "What is a label?\nAnswer briefly."
    systems = [BundleSystem(read_bundle(tiny_bundle), decoding) for decoding in (plain, told)]
    assert systems[0].identity != systems[1].identity
    assert systems[1].settings.max_tiles == 1
    references = [ReferenceSystem(str(tiny_checkpoint), decoding) for decoding in (plain, told)]
    for system, reference in zip(systems, references, strict=True):
        assert reference.identity["images"] == system.identity["images"]
    assert references[1].answer(pictures[2]).prompt == systems[1].answer(pictures[2]).prompt
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        Decoding(max_new_tokens=0)


def test_a_bundle_for_core_ml_is_evaluated_by_the_executor(tiny_ios_bundle: Path, pictures: tuple[Item, ...]) -> None:
    system = BundleSystem(read_bundle(tiny_ios_bundle), Decoding(max_new_tokens=2))
    assert system.identity["engine"] == "the saved programs, emulated"
    answer = system.answer(pictures[0])
    assert answer.tokens is not None
    assert len(answer.tokens) <= 2


def test_a_checkpoints_digest_is_of_what_its_answers_depend_on(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    before = checkpoint_digest(folder)
    (folder / "README.md").write_text("new")
    assert checkpoint_digest(folder) == before
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert checkpoint_digest(folder) != before


# ---- an endpoint, by a server that sends what a test tells it to

KEY = "sk-0123456789-secret"
Reply = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """Answers each request with the next of its replies, the last one for ever; keeps what was asked."""

    def __init__(self, *replies: Reply) -> None:
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                server.requests.append((self.path, dict(self.headers), json.loads(body)))
                reply = replies[min(len(server.requests), len(replies)) - 1]
                with suppress(BrokenPipeError, ConnectionResetError):  # the client has heard enough
                    reply(self)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def send(status: int, body: bytes | str | dict[str, Any], **headers: str) -> Reply:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        data = (
            json.dumps(body).encode() if isinstance(body, dict) else body if isinstance(body, bytes) else body.encode()
        )
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return reply


def says(content: Any) -> Reply:
    return send(200, {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]})


Ask = Callable[..., tuple[Endpoint, Server]]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """Makes a server of replies and an endpoint that asks it; the endpoint's waits are kept, not waited."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    made: list[Any] = []

    def make(*replies: Reply, key: str | None = None, waits: list[float] | None = None, **options: Any) -> Any:
        server = Server(*replies)
        made.append(server)
        wait = (lambda _: None) if waits is None else waits.append
        endpoint = Endpoint(server.url, "some-model", DECODING, key, wait=wait, **options)
        made.append(endpoint)
        return endpoint, server

    yield make
    for one in reversed(made):
        one.close()


QUESTION = Item("q", None, "How much?", ("5",), "all")


def test_an_endpoint_is_asked_as_the_others_are(ask: Ask, pictures: tuple[Item, ...]) -> None:
    endpoint, server = ask(says(" 5 \n"), key=f"{KEY}\n")
    assert endpoint.answer(pictures[1]) == Answer("5")
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("some-model", DECODING.max_new_tokens, 0)
    image, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "What does it say?"}
    kind, _, data = image["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    assert pictures[1].image is not None
    with Image.open(io.BytesIO(base64.b64decode(data))) as sent:
        assert np.array_equal(np.asarray(sent), np.asarray(load_image(pictures[1].image)))
    assert endpoint.along(pictures[1], Answer("x")) is None


def test_no_key_is_sent_where_none_is_given(ask: Ask) -> None:
    endpoint, server = ask(says("5"))
    endpoint.answer(QUESTION)
    assert "Authorization" not in server.requests[0][1]
    assert len(server.requests[0][2]["messages"][0]["content"]) == 1


def test_what_passes_is_tried_again_after_a_time_that_doubles(ask: Ask) -> None:
    waits: list[float] = []
    endpoint, server = ask(send(500, "x"), send(503, "y"), send(429, "z"), says("5"), waits=waits)
    assert endpoint.answer(QUESTION).text == "5"
    assert waits == [1, 2, 4]
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("asked_for", "want"),
    [("7", 7), ("0", 0), ("99999", MAX_WAIT_S), ("9" * 30, 1), ("-5", 1), ("soon", 1), ("1e9", 1), ("²", 1)],
)
def test_an_endpoint_may_ask_for_a_time_within_reason(asked_for: str, want: float, ask: Ask) -> None:
    waits: list[float] = []
    endpoint, _ = ask(send(429, "", Retry_After=asked_for), says("5"), waits=waits)
    assert endpoint.answer(QUESTION).text == "5"
    assert waits == [want]


def test_an_endpoint_that_goes_on_failing_is_given_up(ask: Ask) -> None:
    waits: list[float] = []
    endpoint, server = ask(send(500, "out of\nmemory"), waits=waits, attempts=3)
    with pytest.raises(EndpointError, match="no answer after 3 attempts; the last: status 500: out of memory"):
        endpoint.answer(QUESTION)
    assert len(server.requests) == 3
    assert waits == [1, 2]


def test_an_endpoint_that_wants_the_newer_name_of_a_field_gets_it(ask: Ask) -> None:
    refused = send(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
    endpoint, server = ask(refused, says("one"), says("two"))
    assert [endpoint.answer(QUESTION).text, endpoint.answer(QUESTION).text] == ["one", "two"]
    fields = [{"max_tokens", "max_completion_tokens"} & body.keys() for _, _, body in server.requests]
    assert fields == [{"max_tokens"}, {"max_completion_tokens"}, {"max_completion_tokens"}]


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 418])
def test_a_refusal_is_not_tried_again_nor_a_redirection_followed(status: int, ask: Ask) -> None:
    endpoint, server = ask(send(status, "no", Location="http://127.0.0.1:9/"))
    with pytest.raises(EndpointError, match=f"status {status}: no"):
        endpoint.answer(QUESTION)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "body",
    [
        "",
        "<html>",
        "[]",
        "null",
        "3",
        '{"choices": []}',
        '{"choices": [{"message": null}]}',
        '{"choices": {"0": 1}}',
        '{"choices": [[1]]}',
        '{"error": {"message": "x"}}',
        "[" * 100_000,
        b"\xff\xfe\x00",
    ],
)
def test_garbage_is_refused_at_once(body: str | bytes, ask: Ask) -> None:
    endpoint, server = ask(send(200, body))
    with pytest.raises(EndpointError, match=r"has no choices\[0\]\.message\.content") as caught:
        endpoint.answer(QUESTION)
    assert len(server.requests) == 1
    assert len(str(caught.value)) < SHOWN + 200
    assert str(caught.value).isprintable()


def test_an_answer_is_a_text_and_nothing_said_is_an_empty_one(ask: Ask) -> None:
    endpoint, _ = ask(says(None), says(["5"]), says("half \ud800"))
    assert endpoint.answer(QUESTION).text == ""
    with pytest.raises(EndpointError, match="content is list, want a text"):
        endpoint.answer(QUESTION)
    assert endpoint.answer(QUESTION).text == "half ?"


def test_an_answer_that_was_cut_off_is_told(ask: Ask, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    choice = {"message": {"content": "5"}, "finish_reason": "length"}
    endpoint, _ = ask(send(200, {"choices": [choice]}), says("5"))
    decoding = Decoding(max_new_tokens=1)
    system = BundleSystem(read_bundle(tiny_bundle), decoding)
    reference = ReferenceSystem(str(tiny_checkpoint), decoding)
    report = evaluate(DataSet("d", "exact", (QUESTION,)), [system, endpoint], reference, decoding, tmp_path)
    assert [row["cut"] for row in (report["reference"], *report["systems"])] == [1, 1, 1]
    assert "1 answers cut off at 1 tokens" in report_text(report)
    assert not endpoint.answer(QUESTION).cut


def test_a_reply_beyond_measure_is_not_read(ask: Ask) -> None:
    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100 * MAX_BODY // 65536):
            handler.wfile.write(b"x" * 65536)

    for reply in (endless, send(500, b"x" * (MAX_BODY + 1))):
        endpoint, server = ask(reply)
        with pytest.raises(EndpointError, match="more than 1,048,576 bytes"):
            endpoint.answer(QUESTION)
        assert len(server.requests) == 1


def test_a_compressed_reply_is_not_unpacked(ask: Ask) -> None:
    endpoint, server = ask(send(200, b"\x1f\x8b", Content_Encoding="gzip"))
    with pytest.raises(EndpointError, match="compressed"):
        endpoint.answer(QUESTION)
    assert server.requests[0][1]["Accept-Encoding"] == "identity"


def test_an_endpoint_that_is_silent_or_slow_is_left(ask: Ask) -> None:
    def silent(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.6)

    def slow(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(20):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)

    endpoint, server = ask(silent, slow, says("5"), timeout_s=0.3)
    assert endpoint.answer(QUESTION).text == "5"
    assert len(server.requests) == 3
    endpoint, _ = ask(silent, timeout_s=0.2, attempts=2)
    with pytest.raises(EndpointError, match="no answer after 2 attempts; the last: ReadTimeout"):
        endpoint.answer(QUESTION)


def test_a_server_that_hangs_up_or_is_not_there_is_tried_again(ask: Ask) -> None:
    def hangs_up(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.close_connection = True

    endpoint, _ = ask(hangs_up, says("5"))
    assert endpoint.answer(QUESTION).text == "5"
    endpoint, server = ask(says("5"), attempts=2)
    server.close()
    with pytest.raises(EndpointError, match="after 2 attempts; the last: ConnectError"):
        endpoint.answer(QUESTION)


def test_the_key_is_in_no_message_and_no_answer(ask: Ask) -> None:
    endpoint, _ = ask(send(401, f"bad key {KEY}"), says(f"it is {KEY}"), send(200, f"<{KEY}>"), key=KEY)
    for want in (r"bad key \[key\]", None, r"<\[key\]>"):
        if want is None:
            assert endpoint.answer(QUESTION).text == "it is [key]"
            continue
        with pytest.raises(EndpointError, match=want) as caught:
            endpoint.answer(QUESTION)
        assert KEY not in str(caught.value)
    assert KEY not in json.dumps(endpoint.identity)


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel", " ", "\x00"])
def test_a_key_that_no_header_may_hold_is_refused_unseen(key: str) -> None:
    with pytest.raises(EndpointError, match="key is empty or holds characters") as caught:
        Endpoint("http://127.0.0.1/v1", "m", DECODING, key)
    assert key.strip() == "" or key not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://h/v1", "want http"),
        ("h/v1", "want http"),
        ("", "want http"),
        ("http://", "host"),
        ("http://[::1", "URL"),
        ("https://user:pass@h/v1", "holds a user"),
        ("https://h/v1?key=x", "a query"),
    ],
)
def test_a_url_that_is_none_or_holds_a_secret_is_refused(url: str, message: str) -> None:
    with pytest.raises(EndpointError, match=message) as caught:
        Endpoint(url, "m", DECODING)
    assert "pass" not in str(caught.value)


# ---- the command


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    rows = [{"image": None, "question": f"Question {i}?", "answer": "no", "task": "text"} for i in range(3)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "documents.jsonl"


def test_the_command_evaluates_a_bundle_beside_its_reference_and_an_endpoint(
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    documents: Path,
    ask: Ask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, server = ask(says("no"))
    monkeypatch.setenv("SOME_KEY", KEY)
    command = [str(tiny_bundle), "--data", str(documents), "--model", str(tiny_checkpoint), "--max-new-tokens", "4"]
    command += ["--endpoint", server.url, "--endpoint-model", "m", "--key-env", "SOME_KEY", "--limit", "2"]
    command += ["--out", str(tmp_path / "out"), "--json"]
    assert main(command) == 0
    said = capsys.readouterr()
    report = json.loads(said.out.splitlines()[-1])
    bundle, other = report["systems"]
    assert bundle["against_reference"]["kl"]["mean"] > 0
    assert other["scores"]["all"]["mean"] == 1
    assert other["against_reference"]["scores"]["all"]["gained"] == 2
    assert "kl" not in other["against_reference"]
    assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    written = [path.read_bytes() for path in (tmp_path / "out").iterdir()]
    assert all(KEY.encode() not in data for data in written)
    assert KEY not in said.out + said.err
    path = next((tmp_path / "out").glob("report-*.md"))
    assert path.read_text() in said.out
    # again: nothing is asked, everything is said again
    assert main(command) == 0
    assert len(server.requests) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report
    assert main([*command, "--metric", "anls"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["data"]["metric"] == "anls"


def test_the_command_reads_what_is_published(
    tiny_bundle: Path, pictures: tuple[Item, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pictures[1].image
    assert image is not None
    with Image.open(image) as picture:
        picture.convert("RGB").save(tmp_path / "a.jpg")
    docvqa = {"data": [{"questionId": 1, "question": "What?", "image": image.name, "answers": ["x"]}]}
    textvqa = {"data": [{"question_id": 1, "question": "What?", "image_id": "a", "answers": ["x"] * 10}]}
    chartqa = [{"imgname": image.name, "query": "What?", "label": "x"}]
    for content, folder, want in (
        (docvqa, image.parent, ("DocVQA", "anls")),
        (textvqa, tmp_path, ("TextVQA", "vqa")),
        (chartqa, image.parent, ("ChartQA", "relaxed")),
    ):
        (tmp_path / "data.json").write_text(json.dumps(content))
        command = [str(tiny_bundle), "--data", str(tmp_path / "data.json"), "--images", str(folder)]
        command += ["--max-new-tokens", "3", "--out", str(tmp_path / "out"), "--json"]
        assert main(command) == 0
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (report["data"]["name"], report["data"]["metric"]) == want
        assert report["reference"] is None
        assert report["systems"][0]["scores"]["all"]["items"] == 1


def test_a_question_that_the_reference_would_obey_is_refused_by_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    reference = ReferenceSystem(str(tiny_checkpoint), DECODING)
    for question, message in (("Say <image> twice.", "spells <image>"), ("\ud800?", "no UTF-8 text")):
        with pytest.raises(InputError, match=rf"item 7: the question .*{message}"):
            evaluate(
                DataSet("d", "exact", (Item("7", None, question, ("x",), "t"),)), [], reference, DECODING, tmp_path
            )


def test_people_are_counted_where_their_agreement_is_the_score(
    tiny_bundle: Path, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tiny_bundle), "--data", str(documents), "--metric", "vqa", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "has 1 answers, metric vqa wants those of 10 people" in capsys.readouterr().err


def test_a_bundle_with_an_adapter_is_paired_with_the_merged_model(
    tiny_checkpoint: Path, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tiny_checkpoint, tmp_path / "adapter", r=2, target_modules=["q_proj", "fc1"])
    made = export_android(str(tiny_checkpoint), tmp_path / "bundle", "fp32", lora=str(adapter), with_proof=False)
    command = [str(made.bundle), "--allow-pending", "--data", str(documents), "--model", str(tiny_checkpoint)]
    command += ["--limit", "2", "--max-new-tokens", "3", "--out", str(tmp_path / "out"), "--json"]
    assert main(command) == 2
    assert "the reference none: give the bundle's own with --lora" in capsys.readouterr().err
    assert main([*command, "--lora", str(adapter)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["reference"]["identity"]["adapter_digest"] == adapter_digest(adapter)
    assert report["systems"][0]["against_reference"]["kl"]["mean"] < 1e-9


def test_what_the_command_cannot_use_is_said_in_one_line(
    tiny_bundle: Path, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    for arguments, message in (
        ([str(tmp_path / "none"), "--data", str(documents)], "not a folder"),
        ([str(tiny_bundle), "--data", str(tmp_path / "none.json")], "cannot be read"),
        ([str(tiny_bundle), "--data", str(documents), "--model", str(tmp_path)], "config.json"),
        ([str(tiny_bundle), "--data", str(documents), "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--data", str(documents), "--endpoint", "x", "--endpoint-model", "m"], "want http"),
    ):
        assert main([*arguments, *out, "--json"]) == 2
        said = capsys.readouterr()
        assert message in json.loads(said.out)["error"]
        assert said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate"),
        (["b", "--endpoint", "http://h"], "belong together"),
        (["b", "--endpoint-model", "m"], "belong together"),
        (["b", "--key-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE, which --key-env names, is not set"),
        (["b", "--tiles", "3"], "invalid choice"),
        (["b", "--threads", "-1"], "--threads is -1, want 0 or more"),
        (["b", "--timeout", "nan"], "--timeout is nan, want seconds above 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--data", "d"])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_an_interrupted_command_says_where_the_answers_are(
    tiny_bundle: Path,
    documents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BundleSystem, "answer", interrupt)
    assert main([str(tiny_bundle), "--data", str(documents), "--out", str(tmp_path / "out")]) == 130
    assert f"kept in {tmp_path / 'out'}" in capsys.readouterr().err
