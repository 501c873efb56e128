"""Every failure of a request, classed by what it says something about, so that nothing else is punished for it."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from router_client.retry import retry_after_s

if TYPE_CHECKING:
    from router_client.receipt import Receipt

Scope = Literal["account", "network", "model", "offer", "request"]
MINUTE_S, HOUR_S, DAY_S = 60.0, 3600.0, 86400.0
UNTIL_CHANGED_S = 365 * DAY_S  # of a refused token: the latch is keyed by the token, and the doctor lifts it
MAX_DETAIL = 300  # characters of a server's words that are kept
SECRETS = re.compile(r"(?i)bearer\s+\S+|\b(?:hf|sk|pk|gsk|csk)[-_][\w-]{6,}|data:[^\s\"']*")


class ConfigError(ValueError):
    """What the owner configured cannot be used; names the field, what was found and what was wanted."""


class RouterError(Exception):
    """No answer. `code` says why in a word, `receipt` what was tried, `partial` what was handed out before."""

    def __init__(self, code: str, message: str, receipt: "Receipt", partial: str = "") -> None:
        super().__init__(f"{code}: {message}" if message else code)
        self.code = code
        self.receipt = receipt
        self.partial = partial


@dataclass(frozen=True)
class Fault:
    """Why one attempt failed.

    code: stable, fit for a log: "http_503", "truncated", "idle_timeout".
    scope: what it says something about.
    detail: the server's words without secrets; for a person, never for a log or a decision.
    maybe_billed: whether the provider may have done the work.
    block_s: how long to leave alone what `scope` names.
    counts: whether it counts toward the offer's breaker.
    retry_after_s: the server's wish, if it had one.
    """

    code: str
    scope: Scope
    detail: str = ""
    maybe_billed: bool = False
    block_s: float = 0.0
    counts: bool = False
    retry_after_s: float | None = None


class AttemptFailed(Exception):
    """Carries a fault from where it is seen to where it is decided upon."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.code)
        self.fault = fault


def quiet(library: str) -> None:
    """Keeps a library's notes for debugging out of the log: they hold what a user did not mean to write there.

    An owner who gave its logger a level gets them.
    """
    logger = logging.getLogger(library)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def scrub(text: str, token: str = "") -> str:
    """A server's words on one short line, without the token, anything like one, or embedded data."""
    if token:
        text = text.replace(token, "[token]")
    text = SECRETS.sub("[removed]", text)
    text = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r" +", " ", text).strip()[:MAX_DETAIL]


def server_words(headers: Mapping[str, str], body: bytes) -> tuple[str, str]:
    """(message, code) of an error response, in whichever of the known shapes; HTML says nothing."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    message, code = _from_json(value)
    if not message:
        message = headers.get("x-error-message", "")
    if not message and value is None and not body.lstrip().startswith(b"<"):
        message = body[:4096].decode("utf-8", "replace")
    return message, code or headers.get("x-error-code", "")


def _from_json(value: Any) -> tuple[str, str]:
    if not isinstance(value, dict):
        return "", ""
    error = value.get("error")
    holders = [error, *(value["errors"] if isinstance(value.get("errors"), list) else []), value]
    code = next((str(h["code"]) for h in holders if isinstance(h, dict) and h.get("code")), "")
    if isinstance(error, str):
        return error, code
    for holder in holders:
        if isinstance(holder, dict):
            for key in ("message", "detail", "title"):
                if isinstance(holder.get(key), str) and holder[key]:
                    return holder[key], code
    return ("unnamed error" if error else ""), code


def classify(status: int, headers: Mapping[str, str], body: bytes, *, now: float, token: str = "") -> Fault:
    """The fault that a response other than 2xx is.

    Args:
        status: of the response.
        headers: names in lower case.
        body: as far as it was read.
        now: seconds since 1970: a Retry-After may be a date, and credit comes with a month.
        token: what must not appear in the detail.
    """
    message, code = server_words(headers, body)
    text = f"{message} {code}".lower()
    detail = scrub(message, token)
    match status:
        case 401:
            return Fault("http_401", "account", detail, block_s=UNTIL_CHANGED_S)
        case 402:  # the status alone: the wording has changed before
            return Fault("http_402", "account", detail, block_s=min(30 * MINUTE_S, _month_left_s(now)))
        case 403:
            if "permission" not in text and ("access this model" in text or "gated" in text):
                return Fault("gated", "model", detail, block_s=DAY_S)
            return Fault("http_403", "account", detail, block_s=5 * MINUTE_S)
        case 429:
            wait_s = retry_after_s(headers, now)
            wide = "organization" in text or "account" in text
            return Fault("http_429", "account" if wide else "offer", detail, block_s=wait_s or 0, retry_after_s=wait_s)
        case 404:
            return Fault("http_404", "offer", detail, block_s=HOUR_S)
        case 413:
            return Fault("too_large", "request", detail)
        case 400 | 422:
            return _bad_request(text, detail)
        case 408:
            return Fault("http_408", "offer", detail, counts=True)
    if status >= 500:
        return Fault(f"http_{status}", "offer", detail, counts=True, retry_after_s=retry_after_s(headers, now))
    if status < 400:  # a redirect is not followed: it would take the token elsewhere
        return Fault(f"http_{status}", "offer", detail, maybe_billed=True, counts=True)
    return Fault(f"http_{status}", "request", detail)


def _month_left_s(now: float) -> float:
    """Seconds until the next month of UTC begins, at least one."""
    day = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return max(1.0, (day.replace(day=1) + timedelta(days=32)).replace(day=1).timestamp() - now)


def _bad_request(text: str, detail: str) -> Fault:
    """A 400 means a bad request, or no provider, or a limit; only the words tell."""
    if "model_not_found" in text:
        return Fault("model_not_found", "model", detail, block_s=DAY_S)
    if "model_not_supported" in text or "not supported by any provider" in text:
        return Fault("model_not_supported", "model", detail, block_s=HOUR_S)
    if "not supported by provider" in text:
        return Fault("model_not_supported_here", "offer", detail, block_s=HOUR_S)
    if "too large" in text:
        return Fault("too_large", "request", detail)
    if "context" in text and ("length" in text or "window" in text):
        return Fault("context_too_long", "offer", detail)
    if ("image" in text and "support" in text) or "only 'text'" in text:
        return Fault("no_vision", "offer", detail, block_s=DAY_S)
    return Fault("bad_request", "request", detail)
