"""Catalogues, and which of their offers may be asked now."""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

from router_client import breaker
from router_client.breaker import Health
from router_client.errors import AttemptFailed, Fault
from router_client.ledger import Caps, Ledger, LedgerError
from router_client.offers import FRESH_S, USABLE_S, Offer, Size, completed, parse_catalogue, rank, refusal
from router_client.policy import Backend, Policy, Privacy, read_token
from router_client.run import Clock
from router_client.transport import Wire

log = logging.getLogger("router_client")
CATALOGUE_PAUSE_S = 30.0  # after a catalogue could not be had
OWN_SAMPLES = 3  # of this device's own, which then replace what a catalogue says of speed


def account_key(backend: Backend, token: str) -> str:
    """A key that changes with the token and does not hold it."""
    import hashlib  # slow to import

    mark = hashlib.sha256(f"{backend.base_url} {backend.bill_to} {token}".encode()).hexdigest()[:16]
    return f"account {backend.name} {mark}"


def model_key(offer: Offer) -> str:
    """Of a model, whoever provides it."""
    return f"model {offer.backend}/{offer.model}"


def offer_key(offer: Offer, images: int) -> str:
    """Of an offer, for questions with or without images: providers fail at one of both."""
    return f"offer {offer.name} {'image' if images else 'text'}"


class Market:
    """What the backends offer and the owner allows."""

    def __init__(
        self, backends: tuple[Backend, ...], policy: Policy, privacy: Privacy, caps: Caps, ledger: Ledger, clock: Clock
    ) -> None:
        self.backends: Mapping[str, Backend] = {b.name: b for b in backends}
        self.wires = {b.name: Wire(b) for b in backends}
        self._policy, self._privacy, self._caps = policy, privacy, caps
        self._ledger, self._clock = ledger, clock
        self._refreshing: set[str] = set()

    def offers(self, size: Size, left_s: Callable[[], float]) -> tuple[list[Offer], dict[str, str]]:
        """(offers that may be asked, the best first; why each other one may not). Fetches catalogues if need be.

        Raises:
            LedgerError: if the state cannot be read.
        """
        good: list[Offer] = []
        why: dict[str, str] = {}
        for backend in self.backends.values():
            try:
                token = read_token(backend)
                if blocked := breaker.reason(self._ledger.health(account_key(backend, token)), self._clock.now()):
                    why[backend.name] = blocked
                    continue
                found = [o for o in self.catalogue(backend, left_s) if o.model in backend.models]
            except AttemptFailed as failed:
                account = failed.fault.scope == "account"
                why[backend.name] = failed.fault.detail if account else f"no catalogue: {failed.fault.code}"
                continue
            good += rank(self._allowed(found, backend, size, why), backend.sort, size)
            for model in set(backend.models) - {o.model for o in found}:
                why[f"{backend.name}/{model}"] = "not served"
        return good, why

    def _allowed(self, found: list[Offer], backend: Backend, size: Size, why: dict[str, str]) -> list[Offer]:
        caps = (self._caps.request_nano, self._caps.day_nano, self._caps.month_nano)
        least = min((c for c in caps if c is not None), default=None)
        kept, now = [], self._clock.now()
        for offer in found:
            health = self._ledger.health(offer_key(offer, size.images))
            words = refusal(offer, backend, size, self._privacy.require, least)
            words = words or breaker.reason(self._ledger.health(model_key(offer)), now) or breaker.reason(health, now)
            if words:
                why[offer.name] = words
            else:
                kept.append(_as_measured(offer, health))
        return kept

    def catalogue(self, backend: Backend, left_s: Callable[[], float]) -> list[Offer]:
        """Offers of a backend: as configured, or from its catalogue, which is kept for a week.

        An old one is used while a thread fetches a new one; only without one does a request wait.

        Raises:
            AttemptFailed: if there is none.
            LedgerError: if the state cannot be used.
        """
        if backend.offers:
            return [completed(replace(o, backend=backend.name), backend) for o in backend.offers]
        key, now = f"catalogue {backend.name} {backend.base_url}", self._clock.now()
        if (kept := self._ledger.kept(key)) and abs(now - kept[0]) < USABLE_S:
            try:
                offers = parse_catalogue(kept[1], backend)
            except ValueError:
                pass
            else:
                if not 0 <= now - kept[0] < FRESH_S and key not in self._refreshing:
                    self._refreshing.add(key)
                    threading.Thread(target=self._refresh, args=(backend, key), daemon=True).start()
                return offers
        if code := breaker.reason(self._ledger.health(key), now):
            raise AttemptFailed(Fault(code, "network"))
        return self._fetch(backend, key, left_s)

    def _fetch(self, backend: Backend, key: str, left_s: Callable[[], float]) -> list[Offer]:
        now = self._clock.now()
        try:
            text = self.wires[backend.name].catalogue(self._policy, left_s, now)
            offers = parse_catalogue(text, backend)
        except (AttemptFailed, ValueError) as exc:
            fault = exc.fault if isinstance(exc, AttemptFailed) else Fault("catalogue_unreadable", "network")
            self._ledger.change_health(key, lambda h: breaker.block(h, fault.code, CATALOGUE_PAUSE_S, now), now)
            raise AttemptFailed(replace(fault, scope="network")) from None
        self._ledger.keep(key, text, now)
        return offers

    def _refresh(self, backend: Backend, key: str) -> None:
        try:
            self._fetch(backend, key, lambda: self._policy.deadline_s)
        except (AttemptFailed, LedgerError):
            log.info("%s: the catalogue could not be refreshed", backend.name)
        finally:
            self._refreshing.discard(key)

    def served(self, offer: Offer, provider: str) -> Offer | None:
        """The offer of the provider that really answered, for its price; None where that is not known."""
        try:
            found = self.catalogue(self.backends[offer.backend], lambda: 0.0)
        except (AttemptFailed, LedgerError):
            return None
        return next((o for o in found if (o.model, o.provider) == (offer.model, provider)), None)

    def lift(self, backend: Backend) -> None:
        """Forgets that the account was refused: its owner may have put that right.

        Raises:
            AttemptFailed: if there is no token.
        """
        key = account_key(backend, read_token(backend))
        self._ledger.change_health(key, lambda _: Health(), self._clock.now())


def _as_measured(offer: Offer, health: Health) -> Offer:
    """An offer with this device's own averages, once there are enough, or where the catalogue has none."""
    own = health.samples >= OWN_SAMPLES
    if health.samples and (own or offer.latency_ms is None):
        offer = replace(offer, latency_ms=health.ttft_ms)
    if health.throughput and (own or offer.throughput is None):
        offer = replace(offer, throughput=health.throughput)
    return offer
