"""How long to wait before another attempt, and when to stop trying: full jitter, Retry-After, a budget of retries."""

import math
import random
import re
import threading
import time
from collections.abc import Callable, Mapping

BASE_S, CAP_S = 0.25, 4.0
EARNED_S = 60.0  # in which a retry is earned
MAX_WISH_S = 120.0  # a longer Retry-After is taken for a mistake, as the openai client does
RATE_LIMIT = re.compile(r"(?:^|;)\s*([rt])\s*=\s*(\d{1,9})(?![\d.])")


def full_jitter_s(attempt: int, uniform: Callable[[float, float], float] = random.uniform) -> float:
    """Seconds before attempt `attempt` + 1 (from 0): uniform from 0 to a bound that doubles.

    Source: "Exponential backoff and jitter", AWS Architecture Blog.
    """
    return uniform(0.0, min(CAP_S, BASE_S * 2.0 ** min(attempt, 16)))


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """The server's wish in seconds: retry-after-ms, Retry-After as seconds or a date, or an exhausted RateLimit.

    None where there is none, or none that makes sense (0 or less, not a number, more than two minutes).
    """
    ms, plain = headers.get("retry-after-ms", ""), headers.get("retry-after", "")
    for text, scale in ((ms, 1000.0), (plain, 1.0)):
        try:
            return _sensible(float(text) / scale)
        except ValueError:
            pass
    if plain:
        from email.utils import parsedate_to_datetime  # slow to import

        try:
            return _sensible(parsedate_to_datetime(plain).timestamp() - now)
        except (ValueError, TypeError, OverflowError, IndexError):
            return None
    for item in headers.get("ratelimit", "").split(","):  # only the policy that is used up is the reason
        fields = dict(RATE_LIMIT.findall(item))
        if fields.get("r") == "0" and "t" in fields:
            return _sensible(float(fields["t"]))
    return None


def _sensible(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) and 0 < seconds <= MAX_WISH_S else None


class RetryBudget:
    """Keeps a client from hammering when everything fails.

    A retry costs a whole token; a success earns a tenth and a minute one, so that an offer which is down for good
    does not use up the retries of those who ask now and then.
    """

    def __init__(self, most: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.tokens = self.most = most
        self._clock, self._at = clock, clock()
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Whether another retry is allowed; pays for it."""
        with self._lock:
            if passed := self._clock() - self._at:
                self._at += passed
                self.tokens = min(self.most, self.tokens + max(0.0, passed) / EARNED_S)
            if self.tokens < 1:
                return False
            self.tokens -= 1
            return True

    def earn(self) -> None:
        """After a success."""
        with self._lock:
            self.tokens = min(self.most, self.tokens + 0.1)
