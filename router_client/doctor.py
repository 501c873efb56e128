"""Says in words what keeps a configured cloud leg from answering.

    python -m router_client.doctor --config router.toml

Looks at tokens, catalogues and what the policy leaves of them; then asks the first offer for one token of text, which
costs a fraction of a cent, is reserved in the ledger, and is the only way to see a missing permission or credit.
Exit code 0: it would answer; 1: it would not; 2: the configuration cannot be used. Not covered: the local leg.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from router_client.client import Router
from router_client.errors import AttemptFailed, ConfigError, RouterError
from router_client.ledger import LedgerError
from router_client.offers import Size
from router_client.policy import Config, read_config, read_token

ADVICE = {
    "http_401": "the token is refused: it is wrong, expired or revoked",
    "http_402": "no credit is left: buy credit, or wait for the month's end",
    "http_403": "the token may not call inference providers: give it that permission (and membership, with bill_to)",
    "gated": "the model is gated: accept its terms with this account",
    "model_not_supported": "no provider that the account has enabled serves the model",
    "model_not_found": "there is no such model",
    "connect": "the host cannot be reached",
    "connect_timeout": "the host does not answer",
    "clock_not_set": "the device's clock is not set",
}
IMAGE = Size(text_bytes=200, images=1, max_tokens=128)  # what offers are judged by


def doctor(config: Config, *, call: bool = True) -> tuple[bool, list[str]]:
    """(whether a backend would answer, what was found in words).

    Args:
        config: what is judged; its mode is not: a cloud leg can be tried before it is switched on.
        call: whether to ask an offer for one token.
    """
    found: list[str] = []
    if not config.backends:
        return False, ["no backend is configured"]
    if config.policy.mode == "on_device_only":
        found.append("mode is on_device_only: nothing will be asked until that is changed")
    policy = replace(config.policy, mode="cloud_only", max_attempts=1)
    well = False
    for backend in config.backends:
        try:
            read_token(backend)
        except AttemptFailed as failed:
            found.append(f"{backend.name}: {failed.fault.detail}")
            continue
        privacy = replace(config.privacy, consent=lambda _: True)  # no image and no question of the owner's is sent
        router = Router(backends=[backend], policy=policy, budget=config.budget, privacy=privacy, state=config.state)
        try:
            router.market.lift(backend)
            offers, why = router.market.offers(IMAGE, lambda: policy.deadline_s)
            found += [f"{name}: {words}" for name, words in sorted(why.items())]
            if not offers:
                found.append(f"{backend.name}: no offer is left for a question about an image")
                continue
            found.append(f"{backend.name}: {len(offers)} offers, first {offers[0].name}")
            if call:
                answer = router.ask("Say yes.", max_tokens=1)
                found.append(f"{backend.name}: answered, {answer.receipt.cost_nano_usd} nano-USD")
            well = True
        except RouterError as error:
            attempts = error.receipt.attempts
            code = attempts[-1].outcome if attempts else error.code
            if code in {"empty", "truncated"} and attempts[-1].ttft_ms is not None:
                found.append(f"{backend.name}: was let in, and one token was too little for an answer")
                well = True
                continue
            found.append(f"{backend.name}: {ADVICE.get(code, code)} ({error})")
        finally:
            router.close()
    return well, found


def main(arguments: Sequence[str] | None = None) -> int:
    text = (__doc__ or "").partition("\n")[0]
    command = argparse.ArgumentParser(prog="python -m router_client.doctor", description=text)
    command.add_argument("--config", type=Path, required=True, help="the router's configuration, a TOML file")
    command.add_argument("--no-call", action="store_true", help="look at tokens, catalogues and policy alone")
    given = command.parse_args(arguments)
    try:
        well, found = doctor(read_config(given.config), call=not given.no_call)
    except (ConfigError, LedgerError) as exc:
        print(exc, file=sys.stderr)
        return 2
    print("\n".join(found))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
