"""When to leave an account, a model or an offer alone: a circuit breaker as pure functions on a value.

CLOSED until at least 5 calls of the last minute failed and these are at least half of them; then OPEN for 30 s,
doubled at each further opening up to 15 min; then one probe is let through, and closes it or opens it anew. A block
with a reason (no credit, not served, rate limit) is beside that: it ends by time alone, and says nothing about health;
after it too, one call finds out for all whether it still holds. Times are seconds since 1970: the state is shared
between processes and outlives a boot; a clock set back ends a wait.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

WINDOW_S = 60.0
LEAST_FAILURES = 5
FIRST_WAIT_S, MOST_WAIT_S = 30.0, 900.0
MOST_CALLS = 64  # remembered
SAMPLE_WEIGHT = 0.2  # of the newest in a moving average


@dataclass(frozen=True)
class Health:
    """What is remembered of one account, model or offer.

    calls: (when, whether it succeeded), the oldest first.
    trips: openings in a row without a success between them; 0: closed.
    since, until: of the current opening, or of the probe that is under way.
    block_since, block_until, block_code: of a block.
    probing: that block is over, and renewed while one call finds out whether it still holds.
    samples, ttft_ms, throughput: moving averages of good answers; tokens per second after the first one.
    """

    calls: tuple[tuple[float, bool], ...] = ()
    trips: int = 0
    since: float = 0.0
    until: float = 0.0
    block_since: float = 0.0
    block_until: float = 0.0
    block_code: str = ""
    probing: bool = False
    samples: int = 0
    ttft_ms: float = 0.0
    throughput: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """For storage."""
        return asdict(self)


def health_of(value: object) -> Health:
    """What was stored; a fresh state for what cannot be one."""
    try:
        fields = dict(value)  # type: ignore[call-overload]
        calls = tuple((float(at), bool(ok)) for at, ok in fields.pop("calls"))
        code, probing = str(fields.pop("block_code")), bool(fields.pop("probing"))
        counts = {key: int(fields.pop(key)) for key in ("trips", "samples")}
        numbers = {key: float(n) for key, n in fields.items()}
        if not all(map(math.isfinite, (*numbers.values(), *(at for at, _ in calls)))):
            return Health()
        return Health(calls=calls, block_code=code, probing=probing, **counts, **numbers)  # type: ignore[arg-type]
    except (TypeError, ValueError, KeyError, OverflowError):
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

    After an opening or a block only one call is admitted per wait, so that one which never reports back blocks nobody
    for ever.
    """
    if reason(health, now):
        return None
    if health.block_code:
        health = replace(health, probing=True, block_since=now, block_until=now + FIRST_WAIT_S)
    return replace(health, since=now, until=now + _wait_s(health.trips)) if health.trips else health


def withdraw(health: Health, now: float) -> Health:
    """The state after a call was let through and then not made: the probe is another's."""
    if health.probing:
        health = replace(health, block_until=min(health.block_until, now))
    return replace(health, until=min(health.until, now)) if health.trips else health


def record(health: Health, ok: bool, now: float) -> Health:
    """The state after a call that says something about health."""
    if ok:
        health = unblock(health)
    if ok and health.trips:
        return replace(health, calls=(), trips=0, since=0.0, until=0.0)
    calls = (*(c for c in health.calls if now - WINDOW_S < c[0] <= now), (now, ok))[-MOST_CALLS:]
    failures = sum(not good for _, good in calls)
    if ok or (not health.trips and (failures < LEAST_FAILURES or failures * 2 < len(calls))):
        return replace(health, calls=calls)
    trips = health.trips + 1
    return replace(health, calls=(), trips=trips, since=now, until=now + _wait_s(trips))


def measured(health: Health, ttft_ms: float, throughput: float | None) -> Health:
    """The state with one more good answer in its averages; of the first answers they are plain means."""
    weight = max(1 / (health.samples + 1), SAMPLE_WEIGHT)
    mean = health.ttft_ms + weight * (ttft_ms - health.ttft_ms)
    speed = health.throughput if throughput is None else health.throughput or throughput
    if throughput is not None:
        speed += weight * (throughput - speed)
    return replace(health, samples=min(health.samples + 1, 1000), ttft_ms=mean, throughput=speed)


def unblock(health: Health) -> Health:
    """The state after a call that came through: the block that it probed is over."""
    if not health.probing:
        return health
    return replace(health, probing=False, block_code="", block_since=0.0, block_until=0.0)


def block(health: Health, code: str, seconds: float, now: float) -> Health:
    """The state with a block, unless a longer one is running."""
    running = _waiting(health.block_since, health.block_until, now)
    if running and not health.probing and health.block_until >= now + seconds:
        return health
    return replace(health, block_since=now, block_until=now + seconds, block_code=code, probing=False)


def _wait_s(trips: int) -> float:
    return min(MOST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(trips - 1, 16))
