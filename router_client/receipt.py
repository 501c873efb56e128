"""Who answered, why, what was tried, what left the device and what it cost: with every answer and every error."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Attempt:
    """One try at an answer.

    offer: "local", or backend/model:provider.
    outcome: "ok", or the code of what went wrong.
    ms, ttft_ms: from the start of the attempt to its end and to its first piece of text.
    billed: "no", "yes" by the provider's count, or "maybe", which is booked as spent.
    detail: the server's words, scrubbed.
    request_id, trace_id: the server's name for the request and ours, for its support.
    """

    offer: str
    outcome: str
    ms: float
    ttft_ms: float | None = None
    billed: str = "no"
    cost_nano_usd: int = 0
    detail: str = ""
    request_id: str = ""
    trace_id: str = ""


@dataclass(frozen=True)
class Egress:
    """What left the device; bytes of one upload, of which there may be as many as attempts."""

    images: int
    image_bytes: int
    text_bytes: int
    dimensions: tuple[tuple[int, int], ...]
    metadata: str = "stripped"
    consent: str = "granted"


@dataclass
class Receipt:
    """Filled in as a request goes on.

    source: "local", "cloud", or "" without an answer.
    reason: why the cloud was asked: a reason of policy.REASONS, or the mode that prefers it.
    refused: why the cloud was not asked, or no further: "on_device_only", "consent", "budget_day", "no_offer"...
    degraded: the answer is the local one although another was wanted.
    served_as_asked: False where the provider named in the response is not the one asked.
    usage_source: "provider", or "bound" where it named none and the reserved amount stays booked.
    cost_basis: the price that the cost was computed with.
    warnings: the server's, one of each.
    """

    mode: str = ""
    source: str = ""
    reason: str = ""
    refused: str = ""
    degraded: bool = False
    p_wrong: float | None = None
    model_asked: str = ""
    model_served: str = ""
    provider_asked: str = ""
    provider_served: str = ""
    served_as_asked: bool | None = None
    request_id: str = ""
    finish_reason: str = ""
    attempts: list[Attempt] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    usage_source: str = ""
    cost_nano_usd: int = 0
    cost_basis: str = ""
    egress: Egress | None = None
    day_left_nano_usd: int | None = None
    restarted: bool = False
    warnings: list[str] = field(default_factory=list)
    ms: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """For storage or display."""
        return asdict(self)
