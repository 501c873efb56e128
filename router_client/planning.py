"""What would leave for whom at what cost, and the owner's word on it, before anything does."""

import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from router_client.images import Encoded, ImageRefusedError, read_image, reencode
from router_client.market import Market
from router_client.offers import Offer, Size, bound_nano
from router_client.policy import Plan, Policy, Privacy
from router_client.receipt import Egress
from router_client.request import text_bytes
from router_client.run import Clock, Run
from router_client.worker import within

log = logging.getLogger("router_client")
Limits = tuple[int, int]  # longest side and bytes of an image


@dataclass
class Planned:
    """What consent was given for, and how it is asked."""

    offers: list[Offer]
    images: list[bytes] = field(repr=False)  # read once: a file may be changed meanwhile
    encoded: dict[Limits, list[Encoded]]
    size: Size
    egress: Egress
    shrink: int = 1
    minimal: bool = False
    cools: int = 0
    unreachable: Counter[str] = field(default_factory=Counter)  # of a backend: how often
    out: set[str] = field(default_factory=set)  # offers that are not asked again
    tries: Counter[str] = field(default_factory=Counter)
    wishes: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # when it is to be asked again


class Planner:
    """Makes plans. Used by several threads at once."""

    def __init__(self, market: Market, policy: Policy, privacy: Privacy, clock: Clock) -> None:
        self._market, self._policy, self._privacy, self._clock = market, policy, privacy, clock

    def plan(self, run: Run, share_s: float) -> Planned | None:
        """Offers that consent was given for; None with the refusal noted. Only catalogues are fetched here."""
        receipt, question = run.receipt, run.question
        if self._privacy.consent is None:
            receipt.refused = "no_consent_hook"
            return None

        def look(_: threading.Event) -> tuple[list[Offer], dict[str, str]]:
            return self._market.offers(size, lambda: run.left_s(share_s))

        sent_bytes, most_bytes = text_bytes(question)
        size = Size(most_bytes, len(question.images), question.max_tokens)
        encoded: dict[Limits, list[Encoded]] = {}
        try:
            images = within(lambda _: [read_image(picture) for picture in question.images], run.left_s(share_s))
            self._encode(run, images, encoded, (self._privacy.max_side, self._privacy.max_image_bytes), share_s)
            offers, why = within(look, run.left_s(share_s))
            offers = offers[: self._policy.max_attempts]
            uploads = [self._encode(run, images, encoded, self._limits(o, 1), share_s) for o in offers]
        except ImageRefusedError as exc:
            receipt.refused, run.detail = "image", str(exc)
            return None
        if not offers:
            receipt.refused, run.detail = "no_offer", "; ".join(f"{n}: {w}" for n, w in sorted(why.items())[:20])
            return None
        bounds = [bound_nano(offer, size) for offer in offers]
        known = [b for b in bounds if b is not None]
        largest = max(uploads, key=lambda upload: sum(len(e.data) for e in upload))
        plan = Plan(
            tuple(o.name for o in offers),
            tuple(sorted({self._market.backends[o.backend].host for o in offers})),
            tuple(dict.fromkeys(o.model for o in offers)),
            receipt.reason,
            len(largest),
            sum(len(e.data) for e in largest),
            tuple((e.width, e.height) for e in largest),
            sent_bytes,
            max(known) * self._policy.max_attempts if len(known) == len(bounds) else None,
        )
        if not self._agreed(run, plan, self._privacy.consent):
            receipt.refused = "consent"
            return None
        egress = Egress(plan.images, plan.image_bytes, plan.text_bytes, plan.dimensions)
        return Planned(offers, images, encoded, size, egress)

    def encoded(self, run: Run, planned: Planned, offer: Offer, share_s: float) -> list[Encoded]:
        """The images as an offer gets them.

        Raises:
            ImageRefusedError: for what must not leave.
            TimeoutError: if that takes longer than there is time.
        """
        return self._encode(run, planned.images, planned.encoded, self._limits(offer, planned.shrink), share_s)

    def _agreed(self, run: Run, plan: Plan, consent: Callable[[Plan], bool]) -> bool:
        asked = self._clock.monotonic()
        try:
            return consent(plan) is True
        except Exception as exc:  # noqa: BLE001 -- the owner's function; without its word nothing leaves
            log.warning("the consent hook failed: %s", type(exc).__name__)
            return False
        finally:
            run.deadline += self._clock.monotonic() - asked  # a person's time is not the machine's

    def _limits(self, offer: Offer, shrink: int) -> Limits:
        """Of an image for an offer: the owner's, or tighter ones that its provider is known to have."""
        side, size_bytes = self._privacy.max_side, self._privacy.max_image_bytes
        side = min(side, offer.known.max_side or side)
        return side // shrink, min(size_bytes, offer.known.max_image_bytes or size_bytes) // shrink**2

    def _encode(
        self, run: Run, images: list[bytes], made: dict[Limits, list[Encoded]], limits: Limits, share_s: float
    ) -> list[Encoded]:
        """The images within limits, made once."""
        quality = self._privacy.jpeg_quality
        for image in images if limits not in made else ():

            def one(_: threading.Event, image: bytes = image) -> Encoded:
                return reencode(image, max_side=limits[0], quality=quality, max_bytes=limits[1])

            made[limits] = [*made.get(limits, []), within(one, run.left_s(share_s))]
        return made.setdefault(limits, [])
