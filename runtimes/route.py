"""A question that may be answered elsewhere: what `runtimes.ask --route` does, with consent asked for at the terminal.

The bundle is the local leg, the owner's TOML file says what else may be asked, and a receipt says who answered and why.
Not covered: conversations.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from router_client.client import Answer, Delta, Done, Reset, Router
from router_client.confidence import Confidence, load_or_warn
from router_client.errors import ConfigError, RouterError
from router_client.ledger import LedgerError
from router_client.local import Token
from router_client.policy import Budget, Config, Plan, Policy, Privacy, read_config
from router_client.receipt import Receipt
from runtimes.bundle import Bundle, read_bundle
from runtimes.chat import Chat, open_chat
from runtimes.generate import GREEDY, Sampling
from runtimes.local_leg import LocalLeg, confidence_file, template_digest

# What else ask.py, which imports no router, needs of one.
__all__ = [
    "ConfigError",
    "LedgerError",
    "RouterError",
    "ask_routed",
    "at_terminal",
    "beforehand",
    "open_router",
    "receipt_text",
]

CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n"), ord("\t")})
Consent = Callable[[Plan], bool]


def open_router(
    folder: Path,
    mode: str,
    consent: Consent,
    *,
    config: Path | None = None,
    confidence: Path | None = None,
    tiles: int | None = None,
    sampling: Sampling = GREEDY,
    threads: int = 0,
    allow_pending: bool = False,
) -> Router:
    """A router with a bundle as its local leg, which is read when it is first asked.

    Args:
        folder: the bundle.
        mode: of router_client.policy.MODES, in place of the configuration's.
        consent: is shown what would leave.
        config: the owner's file; None: nothing but the bundle can be asked.
        confidence: what was learnt of the bundle; None: what is beside it. One that is of another bundle or prompt is
            not used, with a warning; nor is any where tokens are sampled at a temperature, which it knows nothing of.
        tiles, sampling, threads, allow_pending: as for `runtimes.ask.ask`.

    Raises:
        ConfigError: naming the file and the key.
        LedgerError: if the ledger cannot be opened.
    """
    owner = read_config(config) if config else Config(Policy(), Budget(), Privacy(), (), Path())
    file = confidence or confidence_file(folder)

    @cache
    def bundle() -> Bundle:
        return read_bundle(folder, allow_pending=allow_pending)

    def load() -> Chat:
        return open_chat(bundle(), tiles=tiles, threads=threads)

    leg = LocalLeg(load, sampling)

    @cache
    def judge() -> Confidence | None:
        return load_or_warn(file, bundle().manifest.payload_digest, template_digest(leg.loaded()))

    def p_wrong(tokens: Sequence[Token]) -> float | None:
        found = judge()
        return None if found is None else found(tokens)

    return Router(
        local=leg,
        backends=owner.backends,
        policy=replace(owner.policy, mode=mode),
        budget=owner.budget,
        privacy=replace(owner.privacy, consent=consent),
        state=owner.state if config else None,
        p_wrong=None if sampling.temperature else p_wrong,
    )


def ask_routed(
    router: Router, question: str, images: Sequence[Path], sampling: Sampling, on_text: Callable[[str], None]
) -> Answer:
    """One question; `on_text` gets the answer as it comes, and a line's end before another that replaces it.

    What would command a terminal is left out of that: the text may be a stranger's. The answer returned is as it came.

    Raises:
        ConfigError, RouterError: without an answer.
    """
    length, heat = sampling.max_new_tokens, sampling.temperature
    for event in router.stream(question, images, max_tokens=length, temperature=heat):
        match event:
            case Delta(text):
                on_text(text.translate(CONTROLS))
            case Reset():
                on_text("\n")
                print("the answer above is void; another one begins", file=sys.stderr)
            case Done(answer):
                return answer
    raise AssertionError("an answer or an exception ends every run")


def at_terminal(plan: Plan) -> bool:
    """Shows what would leave and asks; where nobody can be asked, nothing leaves."""
    print(plan_text(plan), file=sys.stderr)
    if not sys.stdin.isatty():
        print("nobody to ask: nothing leaves this device (--consent agrees beforehand)", file=sys.stderr)
        return False
    print("send it? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def beforehand(plan: Plan) -> bool:
    """Shows what leaves; whoever called agreed to it."""
    print(plan_text(plan), file=sys.stderr)
    return True


def plan_text(plan: Plan) -> str:
    """What would leave, for whom, at what cost at most."""
    sizes = ", ".join(f"{width} x {height}" for width, height in plan.dimensions)
    images = f", {plan.images} image(s) of {sizes} pixels, {plan.image_bytes:,} bytes" if plan.images else ""
    bound = plan.cost_bound_nano_usd
    cost = "cost unknown" if bound is None else f"at most ${bound / 1e9:.6f}"
    who = ", ".join(plan.destinations)
    return f"to be sent ({plan.reason}): {plan.text_bytes:,} bytes of text{images}; to {who}; {cost}"


def receipt_text(receipt: Receipt) -> str:
    """Who answered and why, in a line."""
    doubt = "" if receipt.p_wrong is None else f", local answer wrong with probability {receipt.p_wrong:.3f}"
    why = f" because of {receipt.reason}" if receipt.reason else ""
    tried = ", ".join(f"{a.offer} {a.outcome} {a.ms:.0f} ms" for a in receipt.attempts)
    if receipt.source == "cloud":
        served = " at ".join(name for name in (receipt.model_served, receipt.provider_served) if name)
        by = f"answered by {receipt.model_asked} (served: {served or 'not told'})"
        sent = receipt.egress.text_bytes + receipt.egress.image_bytes if receipt.egress else 0
        cost = f"${receipt.cost_nano_usd / 1e9:.6f}, {sent:,} bytes left the device"
        return f"{by}{why}{doubt}; {cost}; tried: {tried}"
    by = "answered on this device" if receipt.source else "not answered"
    refused = f"; not asked further: {receipt.refused}" if receipt.refused else ""
    degraded = ", though another answer was wanted" if receipt.degraded else ""
    return f"{by}{degraded}{why}{doubt}{refused}; tried: {tried or 'nothing'}"
