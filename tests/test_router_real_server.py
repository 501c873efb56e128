"""An answer through an OpenAI-compatible server that is not ours: Hugging Face's `transformers serve`, a random model.

Text alone: the server reads images with a torchvision that fits its torch, which not every environment has.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest

from router_client.client import Delta, Done, Router
from router_client.errors import RouterError
from router_client.ledger import Ledger
from router_client.offers import Offer
from router_client.policy import Backend, Policy, Privacy

MISSING = [name for name in ("fastapi", "uvicorn", "openai", "rich") if find_spec(name) is None]
NAME = "random-model"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of the server, which runs for the tests of this file."""
    if MISSING:
        pytest.skip(f"transformers serve needs {', '.join(MISSING)}")
    folder = tmp_path_factory.mktemp("served")
    make_model(folder / NAME)
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port = listening.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", NAME, "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            limit = time.monotonic() + 90
            while not healthy(port):
                assert process.poll() is None, (folder / "log").read_text("utf-8")[-2000:]
                assert time.monotonic() < limit
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()
            process.wait()


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def make_model(folder: Path) -> None:
    """Writes a random Llama of one layer with a chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from demo.tokenizer import save_tokenizer
    from tests.checkpoints import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.token_to_id("<|im_start|>"),
        eos_token_id=tokenizer.token_to_id("<end_of_utterance>"),
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def router(address: str, state: Path, model: str = NAME) -> Router:
    """A client of it, by configuration alone."""
    offer = Offer("", model, context=1024, price_in=10**9, price_out=2 * 10**9)
    backend = Backend("own", address, (model,), offers=(offer,))
    policy = Policy("cloud_only", first_token_s=30, holdback=0)
    return Router(backends=[backend], policy=policy, privacy=Privacy(consent=lambda _: True), state=state)


def test_it_answers_and_is_paid_by_its_own_count(address: str, tmp_path: Path) -> None:
    client = router(address, tmp_path / "ledger")
    answer = client.ask("Hello there.", max_tokens=12)
    receipt = answer.receipt
    assert (receipt.source, receipt.finish_reason) == ("cloud", "length")  # a random model has no end
    assert NAME in receipt.model_served
    assert receipt.completion_tokens == 12
    assert receipt.prompt_tokens
    assert receipt.cost_nano_usd == receipt.prompt_tokens * 1000 + 12 * 2000
    assert [(e.state, e.nano_usd) for e in Ledger(tmp_path / "ledger").entries()] == [
        ("settled", receipt.cost_nano_usd)
    ]
    *deltas, done = client.stream("Hello there.", max_tokens=12)
    assert isinstance(done, Done)
    assert len(deltas) > 1
    assert "".join(d.text for d in deltas if isinstance(d, Delta)) == done.answer.text == answer.text


def test_what_it_refuses_is_an_error_by_name_and_costs_nothing(address: str, tmp_path: Path) -> None:
    with pytest.raises(RouterError) as caught:
        router(address, tmp_path / "ledger", "another-model").ask("Hello there.", max_tokens=12)
    assert caught.value.receipt.attempts[0].outcome.startswith(("http_", "bad_request"))
    assert {e.state for e in Ledger(tmp_path / "ledger").entries()} == {"released"}
