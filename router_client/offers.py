"""Who could answer, whom the owner allows, and what this request costs there.

Prices are integers: nano-USD per million tokens. A price that is not stated is unknown, never free.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from router_client.checks import check, number
from router_client.errors import DAY_S, HOUR_S, ConfigError
from router_client.stream import Usage

if TYPE_CHECKING:
    from router_client.policy import Backend

FRESH_S, USABLE_S = 6 * HOUR_S, 7 * DAY_S  # of a catalogue
NAME = re.compile(r"[A-Za-z0-9][\w./+-]{0,127}", re.ASCII)
OVERHEAD_TOKENS = 64  # of a chat template around the messages
NOMINAL_IMAGE_TOKENS = 1024  # for comparing offers where nothing is known; never for a bound
MOST_TOKENS = 10**8
MOST_PRICE = 10**15  # a million USD per million tokens
PARAMETERS = frozenset(["temperature", "stream_options", "response_format"])  # that a request does without


@dataclass(frozen=True)
class Provider:
    """What no catalogue says of a provider. What is not known to be so is unknown, and unknown is not enough.

    labels: of its data policy, like "zero_retention".
    max_side, max_image_bytes: of an image; None: not known, and the owner's own limits hold.
    refuses: of PARAMETERS, those that it is not sent.
    source: where this is said.
    """

    labels: frozenset[str] = frozenset()
    max_side: int | None = None
    max_image_bytes: int | None = None
    refuses: frozenset[str] = frozenset()
    source: str = ""

    def __post_init__(self) -> None:
        check(self, "provider")
        if unknown := sorted(self.refuses - PARAMETERS):
            raise ConfigError(f"provider: refuses has {unknown}, want of {sorted(PARAMETERS)}")
        number("provider", "max_side", self.max_side, 64, math.inf)
        number("provider", "max_image_bytes", self.max_image_bytes, 4096, math.inf)


def read_providers(path: Path) -> dict[str, Provider]:
    """The package's own table, which an owner's entries replace."""
    table = {}
    for name, row in json.loads(path.read_text("utf-8")).items():
        labels, refuses = frozenset(row.pop("labels")), frozenset(row.pop("refuses"))
        table[name] = Provider(labels=labels, refuses=refuses, **row)
    return table


PROVIDERS = read_providers(Path(__file__).parent / "providers.json")


@dataclass(frozen=True)
class Offer:
    """A model at a provider of a backend. None: not stated.

    provider: "" where the backend is the only one (a server of one's own).
    context: tokens of question and answer together.
    price_in, price_out: nano-USD per million tokens.
    latency_ms, throughput: the backend's last probe; to the first token, and tokens per second after it.
    image_tokens: the most that one image of the size sent can take.
    known: what is known of the provider besides.
    """

    backend: str
    model: str
    provider: str = ""
    vision: bool = False
    context: int | None = None
    price_in: int | None = None
    price_out: int | None = None
    latency_ms: float | None = None
    throughput: float | None = None
    image_tokens: int | None = None
    known: Provider = Provider()

    @property
    def asked(self) -> str:
        """The model string of a request: always pinned, since a server's own choice changes price and policy."""
        return f"{self.model}:{self.provider}" if self.provider else self.model

    @property
    def name(self) -> str:
        """As receipts and logs call it."""
        return f"{self.backend}/{self.asked}"


@dataclass(frozen=True)
class Size:
    """What of a request decides its cost. text_bytes: the most that a server can make of its text."""

    text_bytes: int
    images: int
    max_tokens: int


def cost_nano(offer: Offer, usage: Usage) -> int | None:
    """What a provider's count costs, rounded up; None without a price."""
    if offer.price_in is None or offer.price_out is None:
        return None
    return -(-(usage.prompt_tokens * offer.price_in + usage.completion_tokens * offer.price_out) // 10**6)


def bound_nano(offer: Offer, size: Size) -> int | None:
    """The most that a call can cost; None where nothing bounds it.

    A token is at least a byte of text, as sent or as a tokenizer may normalize it. Images count by the configured
    bound, or else as the offer's whole context.
    """
    text = size.text_bytes + OVERHEAD_TOKENS
    tokens: int | None = text
    if size.images:
        tokens = None if offer.image_tokens is None else text + size.images * offer.image_tokens
    if tokens is None or (offer.context is not None and offer.context < tokens):
        tokens = 0 if offer.context is None and offer.price_in == 0 else offer.context  # however many, they are free
    return None if tokens is None else cost_nano(offer, Usage(tokens, size.max_tokens))


def estimate(offer: Offer, size: Size) -> Usage:
    """What a call probably takes, for comparing offers and contexts."""
    each = NOMINAL_IMAGE_TOKENS if offer.image_tokens is None else offer.image_tokens
    return Usage(size.text_bytes // 4 + OVERHEAD_TOKENS + size.images * each, size.max_tokens)


def refusal(offer: Offer, backend: "Backend", size: Size, required: frozenset[str], cap_nano: int | None) -> str:
    """Why an offer must not be used for this request; "" if it may.

    Args:
        offer: any.
        backend: where it is.
        size: of the request.
        required: labels that its data policy must have; unknown is not enough.
        cap_nano: the most that a request may cost; None if no cap is set, and only then a price may be unknown.
    """
    needed = sum((usage := estimate(offer, size)).__dict__.values())
    bound = bound_nano(offer, size)
    checks: list[tuple[bool, str]] = [
        (offer.model not in backend.models, "model not listed"),
        (bool(backend.allow) and offer.provider not in backend.allow, "provider not allowed"),
        (offer.provider in backend.deny, "provider denied"),
        (size.images > 0 and not offer.vision, "no image input"),
        (offer.context is not None and needed > offer.context, f"context of {offer.context}, {needed} needed"),
        (
            not required <= offer.known.labels,
            f"data policy: {', '.join(sorted(required - offer.known.labels))} not known",
        ),
        (cap_nano is not None and cost_nano(offer, usage) is None, "price unknown"),
        (
            cost_nano(offer, usage) is not None and bound is None,
            "cost unbounded: neither image tokens nor context are known",
        ),
        (
            cap_nano is not None and bound is not None and bound > cap_nano,
            f"may cost {bound} nano-USD, {cap_nano} allowed",
        ),
        (_dearer(offer, backend.max_usd_per_m), "dearer per token than allowed"),
    ]
    return next((words for wrong, words in checks if wrong), "")


def rank(offers: Sequence[Offer], sort: str, size: Size) -> list[Offer]:
    """The best first: by "price" (of this request), "latency", "throughput" or "listed". Unknown comes last."""
    keys: dict[str, Callable[[Offer], float | None]] = {
        "price": lambda o: cost_nano(o, estimate(o, size)),
        "latency": lambda o: o.latency_ms,
        "throughput": lambda o: None if o.throughput is None else -o.throughput,
        "listed": lambda _: 0,
    }
    return sorted(offers, key=lambda o: math.inf if (found := keys[sort](o)) is None else found)


def _dearer(offer: Offer, limits: tuple[float, float] | None) -> bool:
    if limits is None:
        return False
    prices = zip((offer.price_in, offer.price_out), limits, strict=True)
    return any(price is None or price > limit * 10**9 for price, limit in prices)


def parse_catalogue(text: str, backend: "Backend") -> list[Offer]:
    """Live offers of a backend's GET /models; entries that make no sense are left out.

    Raises:
        ValueError: if it is no catalogue at all.
    """
    try:
        value = json.loads(text)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    models = value.get("data") if isinstance(value, dict) else None
    if isinstance(models, dict):  # of a single model
        models = [models]
    if models is None and isinstance(value, dict) and "id" in value:
        models = [value]
    if not isinstance(models, list):
        raise ValueError("no list of models under 'data'")
    return [offer for model in models if isinstance(model, dict) for offer in _offers(model, backend)]


def _offers(model: Mapping[str, Any], backend: "Backend") -> Iterator[Offer]:
    architecture = model.get("architecture")
    inputs = architecture.get("input_modalities") if isinstance(architecture, dict) else None
    vision = isinstance(inputs, list) and "image" in inputs
    providers = model.get("providers")
    for entry in providers if isinstance(providers, list) else []:
        names = (model.get("id"), entry.get("provider")) if isinstance(entry, dict) else ()
        if len(names) != 2 or not all(isinstance(n, str) and NAME.fullmatch(n) for n in names):
            continue
        if entry.get("status") != "live":
            continue
        pricing = entry.get("pricing") if isinstance(entry.get("pricing"), dict) else {}
        context = entry.get("context_length")
        offer = Offer(
            backend.name,
            str(names[0]),
            str(names[1]),
            vision=vision,
            context=context if type(context) is int and 0 < context <= MOST_TOKENS else None,
            price_in=price(pricing.get("input")),
            price_out=price(pricing.get("output")),
            latency_ms=_positive(entry.get("first_token_latency_ms")),
            throughput=_positive(entry.get("throughput")),
        )
        yield completed(offer, backend)


def completed(offer: Offer, backend: "Backend") -> Offer:
    """An offer with what is known of its provider, by the owner's table or else the package's, and its image bound."""
    known = backend.providers.get(offer.provider) or PROVIDERS.get(offer.provider) or offer.known
    bound = backend.image_tokens if offer.image_tokens is None else offer.image_tokens
    return replace(offer, known=known, image_tokens=bound)


def price(usd_per_m: object) -> int | None:
    """Nano-USD per million tokens, rounded up, of a stated price; None for what is no price."""
    from fractions import Fraction  # slow to import

    number = _positive(usd_per_m)
    return None if number is None or number > 10**6 else math.ceil(Fraction(str(number)) * 10**9)


def _positive(value: object) -> float | None:
    """A finite number of 0 or more; numbers in a text count, as one catalogue of this kind writes them."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= 0 else None
