"""When to leave an account, a model or an offer alone: a circuit breaker as pure functions on a value.

CLOSED until at least 5 calls of the last minute failed and these are at least half of them; then OPEN for 30 s,
doubled at each further opening up to 15 min; then one probe is let through, and closes it or opens it anew. A block
with a reason (no credit, not served, rate limit) is beside that: it ends by time alone, and says nothing about health.
Times are seconds since 1970: the state is shared between processes and outlives a boot; a clock set back ends a wait.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

WINDOW_S = 60.0
LEAST_FAILURES = 5
FIRST_WAIT_S, MOST_WAIT_S = 30.0, 900.0
MOST_CALLS = 64  # remembered


@dataclass(frozen=True)
class Health:
    """What is remembered of one account, model or offer.

    calls: (when, whether it succeeded), the oldest first.
    trips: openings in a row without a success between them; 0: closed.
    since, until: of the current opening, or of the probe that is under way.
    block_since, block_until, block_code: of a block.
    """

    calls: tuple[tuple[float, bool], ...] = ()
    trips: int = 0
    since: float = 0.0
    until: float = 0.0
    block_since: float = 0.0
    block_until: float = 0.0
    block_code: str = ""

    def as_json(self) -> dict[str, Any]:
        """For storage."""
        return asdict(self)


def health_of(value: object) -> Health:
    """What was stored; a fresh state for what cannot be one."""
    try:
        fields = dict(value)  # type: ignore[call-overload]
        calls = tuple((float(at), bool(ok)) for at, ok in fields.pop("calls"))
        code, trips = str(fields.pop("block_code")), int(fields.pop("trips"))
        times = {key: float(n) for key, n in fields.items()}
        if not all(map(math.isfinite, (*times.values(), *(at for at, _ in calls)))):
            return Health()
        return Health(calls=calls, block_code=code, trips=trips, **times)
    except (TypeError, ValueError, KeyError):
        return Health()


def _waiting(since: float, until: float, now: float) -> bool:
    """Whether an interval still runs. Before its beginning the clock was set back: then it has ended too."""
    return since <= now < until


def reason(health: Health, now: float) -> str:
    """Why not to call: the code of a block, "breaker_open", or "" if a call would be admitted."""
    if _waiting(health.block_since, health.block_until, now):
        return health.block_code
    if health.trips and _waiting(health.since, health.until, now):
        return "breaker_open"
    return ""


def admit(health: Health, now: float) -> Health | None:
    """The state after a call was let through, or None if it must not be made.

    After an opening only one probe is admitted per wait, so that one which never reports back blocks nobody for ever.
    """
    if reason(health, now):
        return None
    return replace(health, since=now, until=now + _wait_s(health.trips)) if health.trips else health


def record(health: Health, ok: bool, now: float) -> Health:
    """The state after a call that says something about health."""
    if ok and health.trips:
        return replace(health, calls=(), trips=0, since=0.0, until=0.0)
    calls = (*(c for c in health.calls if now - WINDOW_S < c[0] <= now), (now, ok))[-MOST_CALLS:]
    failures = sum(not good for _, good in calls)
    if ok or (not health.trips and (failures < LEAST_FAILURES or failures * 2 < len(calls))):
        return replace(health, calls=calls)
    trips = health.trips + 1
    return replace(health, calls=(), trips=trips, since=now, until=now + _wait_s(trips))


def block(health: Health, code: str, seconds: float, now: float) -> Health:
    """The state with a block, unless a longer one is running."""
    running = _waiting(health.block_since, health.block_until, now)
    if running and health.block_until >= now + seconds:
        return health
    return replace(health, block_since=now, block_until=now + seconds, block_code=code)


def _wait_s(trips: int) -> float:
    return min(MOST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(trips - 1, 16))
