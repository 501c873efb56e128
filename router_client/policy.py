"""What the owner allows: modes, deadlines, caps, privacy, backends; and the file that says so."""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from router_client.errors import AttemptFailed, ConfigError, Fault
from router_client.ledger import Caps, nano
from router_client.offers import NAME, Offer, Provider, price

MODES = ("on_device_only", "prefer_on_device", "prefer_cloud", "cloud_only")
REASONS = frozenset(
    "unavailable error deadline truncated repetition empty schema context low_confidence caller".split()  # noqa: SIM905
)
STREAM_FAILURES = ("terminate", "restart")
SORTS = ("price", "latency", "throughput", "listed")
PLAIN: dict[str, type] = {t.__name__: t for t in (bool, float, frozenset, int, str, tuple)}
T = TypeVar("T")


@dataclass(frozen=True)
class Policy:
    """Who answers, and how long that may take.

    escalate_on: in prefer_on_device, what sends a question on; of REASONS.
    max_p_wrong: a local answer that is more probably wrong than this is "low_confidence"; None: not judged.
    local_s: the local answer's own time, after which it is cancelled ("deadline"); None: all of deadline_s.
    holdback: pieces of text held back before the first one is handed out; until then any switch goes unseen.
    stream_failure: when an answer breaks after that: "terminate", or "restart" (a Reset event, then another answer).
    """

    mode: str = "on_device_only"
    escalate_on: frozenset[str] = REASONS
    max_p_wrong: float | None = None
    deadline_s: float = 60.0
    connect_s: float = 3.0
    first_token_s: float = 10.0
    idle_s: float = 20.0
    local_s: float | None = None
    max_attempts: int = 3
    holdback: int = 24
    stream_failure: str = "terminate"

    def __post_init__(self) -> None:
        _among("mode", self.mode, MODES)
        _among("stream_failure", self.stream_failure, STREAM_FAILURES)
        if unknown := self.escalate_on - REASONS:
            raise ConfigError(f"escalate_on has {sorted(unknown)}, want of {sorted(REASONS)}")
        for name in ("deadline_s", "connect_s", "first_token_s", "idle_s", "local_s"):
            seconds = getattr(self, name)
            if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
                raise ConfigError(f"{name} is {seconds}, want seconds above 0")
        if self.max_p_wrong is not None and not 0 <= self.max_p_wrong <= 1:
            raise ConfigError(f"max_p_wrong is {self.max_p_wrong}, want 0 to 1")
        if not 1 <= self.max_attempts <= 10 or self.holdback < 0:
            raise ConfigError(f"max_attempts is {self.max_attempts}, holdback {self.holdback}, want 1 to 10, 0 or more")


@dataclass(frozen=True)
class Budget:
    """Caps in USD; None: no cap. `max_escalations` requests may leave within `escalations_s`."""

    per_request_usd: float | None = 0.01
    per_day_usd: float | None = 0.10
    per_month_usd: float | None = 1.0
    max_escalations: int | None = 20
    escalations_s: float = 3600.0

    def caps(self) -> Caps:
        """In nano-USD.

        Raises:
            ConfigError: for what is no amount.
        """
        names = ("per_request_usd", "per_day_usd", "per_month_usd")
        request, day, month = (None if (v := getattr(self, name)) is None else nano(v, name) for name in names)
        return Caps(request, day, month, self.max_escalations, self.escalations_s)


@dataclass(frozen=True)
class Plan:
    """What would leave the device, shown to the consent hook before anything does.

    destinations: offers, the first choice first; each may be asked, until one answers.
    hosts: where they are.
    models: who would answer: not the local model.
    cost_bound_nano_usd: of all attempts together; None where no cap is set and a price unknown.
    """

    destinations: tuple[str, ...]
    hosts: tuple[str, ...]
    models: tuple[str, ...]
    reason: str
    images: int
    image_bytes: int
    dimensions: tuple[tuple[int, int], ...]
    text_bytes: int
    cost_bound_nano_usd: int | None


@dataclass(frozen=True)
class Privacy:
    """What may leave. Without a consent hook, nothing.

    require: labels that a provider's data policy must have, like "zero_retention"; unknown is a refusal.
    """

    consent: Callable[[Plan], bool] | None = field(default=None, repr=False)
    max_side: int = 1024
    jpeg_quality: int = 85
    max_image_bytes: int = 2**20
    require: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not (64 <= self.max_side <= 8192 and 10 <= self.jpeg_quality <= 95 and self.max_image_bytes >= 4096):
            raise ConfigError(
                f"max_side {self.max_side}, jpeg_quality {self.jpeg_quality}, max_image_bytes {self.max_image_bytes}: "
                "want 64 to 8192, 10 to 95, 4096 or more"
            )


@dataclass(frozen=True)
class Backend:
    """An OpenAI-compatible endpoint.

    token: called for each request; None: the endpoint wants none.
    models: those that may answer, by their names there.
    offers: what it serves, for an endpoint without Hugging Face's catalogue; empty: GET base_url/models is asked.
    allow, deny: providers; an empty `allow` is all.
    max_usd_per_m: the dearest (input, output) price allowed, in USD per million tokens.
    image_tokens: the most that one image can take with its models.
    bill_to: an organization of Hugging Face that pays.
    providers: what is known of providers, each in place of the package's own entry; "" is an own server.
    at_once: requests under way; the others wait, so that one refused account is not asked by all.
    allow_http: plain HTTP to other hosts than this one; then a token travels unencrypted.
    """

    name: str
    base_url: str
    models: tuple[str, ...]
    token: Callable[[], str] | None = field(default=None, repr=False)
    offers: tuple[Offer, ...] = ()
    allow: frozenset[str] = frozenset()
    deny: frozenset[str] = frozenset()
    sort: str = "price"
    max_usd_per_m: tuple[float, float] | None = None
    image_tokens: int | None = None
    bill_to: str = ""
    providers: Mapping[str, Provider] = field(default_factory=dict)
    at_once: int = 4
    proxy: str | None = field(default=None, repr=False)
    allow_http: bool = False

    def __post_init__(self) -> None:
        from urllib.parse import urlsplit  # slow to import

        where = f"backend {self.name!r}"
        parts = urlsplit(self.base_url)
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"{where}: want a name of letters, digits, and . _ - within")
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"{where}: base_url is no http(s) address without a query")
        if parts.username or parts.password:
            raise ConfigError(f"{where}: base_url holds a user name or password; a token has a field of its own")
        if parts.scheme == "http" and not self.allow_http and not _loopback(parts.hostname):
            raise ConfigError(f"{where}: base_url is unencrypted; allow_http would allow that")
        if not self.models:
            raise ConfigError(f"{where}: models is empty: there is no default that costs money")
        _among(f"{where}: sort", self.sort, SORTS)
        if self.bill_to and not NAME.fullmatch(self.bill_to):
            raise ConfigError(f"{where}: bill_to is no name of an organization")
        if any(not NAME.fullmatch(model.replace(":", "-")) for model in self.models):
            raise ConfigError(f"{where}: models holds what is no name of a model")
        for name in ("image_tokens", "at_once"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ConfigError(f"{where}: {name} is {number}, want 1 or more")

    @property
    def host(self) -> str:
        """Where it is."""
        return self.base_url.partition("://")[2].partition("/")[0]


def read_token(backend: Backend) -> str:
    """A backend's token, checked before it can reach a header, whose errors would quote it.

    Raises:
        AttemptFailed: if there is none, or none that can be one.
    """
    if backend.token is None:
        return ""
    try:
        token = backend.token()
    except Exception:  # noqa: BLE001 -- the owner's function; its words may hold the token
        raise AttemptFailed(Fault("no_token", "account", "the token could not be read")) from None
    if not token:
        raise AttemptFailed(Fault("no_token", "account", "there is no token"))
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise AttemptFailed(Fault("bad_token", "account", "the token holds characters that no token has"))
    return token


@dataclass(frozen=True)
class Config:
    """A configuration file."""

    policy: Policy
    budget: Budget
    privacy: Privacy
    backends: tuple[Backend, ...]
    state: Path


def read_config(path: Path) -> Config:
    """Reads a TOML file: `state`, tables [policy], [budget], [privacy], and a [[backend]] for each endpoint.

    A backend names its token by `token_env` or `token_file`; the token is read when it is needed. Its [[backend.offer]]
    have prices `usd_in` and `usd_out` per million tokens. A relative `state` is beside the file.

    Raises:
        ConfigError: naming the file, the key, what was found and what was wanted.
    """
    import tomllib  # slow to import

    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{path}: cannot be read: {exc}") from exc
    try:
        _known(values, {"state", "policy", "budget", "privacy", "backend"}, "the file")
        if not isinstance(values.get("state"), str):
            raise ConfigError("state is missing: the file of the ledger")
        backends = tuple(_backend(dict(b)) for b in values.get("backend", []))
        if len({b.name for b in backends}) < len(backends):
            raise ConfigError("two backends have one name")
        return Config(
            _table(Policy, values.get("policy", {}), "policy"),
            _table(Budget, values.get("budget", {}), "budget"),
            _table(Privacy, values.get("privacy", {}), "privacy", omit={"consent"}),
            backends,
            path.parent / Path(values["state"]).expanduser(),
        )
    except (TypeError, ValueError, KeyError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc


def _backend(values: dict[str, Any]) -> Backend:
    where = f"backend {values.get('name')!r}"
    env, file = values.pop("token_env", None), values.pop("token_file", None)
    rows = values.pop("offer", [])
    if "token" in values or (env is not None and file is not None):
        raise ConfigError(f"{where}: a token comes by token_env or by token_file, which exclude each other")
    if env is not None:
        values["token"] = lambda: os.environ.get(env, "")
    if file is not None:
        values["token"] = lambda: Path(file).expanduser().read_text("utf-8").strip()
    offers = []
    for row in rows:
        _known(row, {"model", "provider", "vision", "context", "usd_in", "usd_out", "image_tokens"}, f"{where}: offer")
        prices = {"price_in": price(row.pop("usd_in", None)), "price_out": price(row.pop("usd_out", None))}
        offers.append(_table(Offer, {"backend": values["name"], **row, **prices}, f"{where}: offer"))
    rows = values.pop("providers", {}).items()
    providers = {name: _table(Provider, row, f"{where}: provider {name!r}") for name, row in rows}
    return _table(Backend, {**values, "offers": tuple(offers), "providers": providers}, where)


def _table(kind: type[T], values: Mapping[str, Any], where: str, omit: frozenset[str] | set[str] = frozenset()) -> T:
    """A dataclass from a table; arrays become what the field is; false is None where a cap is meant."""
    named = {f.name: str(f.type).removeprefix("<class '") for f in fields(kind) if f.name not in omit}  # type: ignore[arg-type]
    _known(values, set(named), where)
    made: dict[str, Any] = {}
    for key, value in values.items():
        first = re.split(r"\W", named[key])[0]
        if isinstance(value, list) and first in {"frozenset", "tuple"}:
            made[key] = PLAIN[first](value)
        elif value is False and "None" in named[key]:
            made[key] = None  # TOML has no null
        elif first in PLAIN and type(value) is not PLAIN[first] and (first, type(value)) != ("float", int):
            raise ConfigError(f"{where}: {key} is {value!r}, want {first}")
        else:
            made[key] = value
    return kind(**made)


def _known(values: Mapping[str, Any], names: set[str], where: str) -> None:
    if unknown := sorted(set(values) - names):
        raise ConfigError(f"{where} has {', '.join(unknown)}, want of {', '.join(sorted(names))}")


def _among(name: str, value: str, wanted: tuple[str, ...]) -> None:
    if value not in wanted:
        raise ConfigError(f"{name} is {value!r}, want one of {', '.join(wanted)}")


def _loopback(host: str) -> bool:
    return host in {"localhost", "::1"} or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None
