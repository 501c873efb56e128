"""What the owner allows: modes, deadlines, caps, privacy, backends; and the file that says so."""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from router_client.checks import check, number
from router_client.errors import DAY_S, AttemptFailed, ConfigError, Fault
from router_client.ledger import Caps, nano
from router_client.offers import MOST_PRICE, MOST_TOKENS, NAME, Offer, Provider, price

if TYPE_CHECKING:
    from urllib.parse import SplitResult

MODES = ("on_device_only", "prefer_on_device", "prefer_cloud", "cloud_only")
REASONS = frozenset(
    "unavailable error deadline truncated repetition empty schema context low_confidence caller".split()  # noqa: SIM905
)
STREAM_FAILURES = ("terminate", "restart")
SORTS = ("price", "latency", "throughput", "listed")
PROXIES = ("http", "https", "socks5", "socks5h")
MOST_S = 86400.0  # of any deadline
T = TypeVar("T")


@dataclass(frozen=True)
class Policy:
    """Who answers, and how long that may take.

    escalate_on: in prefer_on_device, what sends a question on; of REASONS.
    max_p_wrong: a local answer that is more probably wrong than this is "low_confidence"; None: not judged.
    first_token_s: from the first byte sent, so that the time of an upload is part of it.
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
        check(self, "policy")
        _among("policy: mode", self.mode, MODES)
        _among("policy: stream_failure", self.stream_failure, STREAM_FAILURES)
        if unknown := self.escalate_on - REASONS:
            raise ConfigError(f"policy: escalate_on has {sorted(unknown)}, want of {sorted(REASONS)}")
        for name in ("deadline_s", "connect_s", "first_token_s", "idle_s", "local_s"):
            number("policy", name, getattr(self, name), 0, MOST_S, above=True)
        number("policy", "max_p_wrong", self.max_p_wrong, 0, 1)
        number("policy", "max_attempts", self.max_attempts, 1, 10)
        number("policy", "holdback", self.holdback, 0, math.inf)


@dataclass(frozen=True)
class Budget:
    """Caps in USD; None: no cap. `max_escalations` requests may leave within `escalations_s`."""

    per_request_usd: float | None = 0.01
    per_day_usd: float | None = 0.10
    per_month_usd: float | None = 1.0
    max_escalations: int | None = 20
    escalations_s: float = 3600.0

    def __post_init__(self) -> None:
        check(self, "budget")
        number("budget", "max_escalations", self.max_escalations, 0, math.inf)
        number("budget", "escalations_s", self.escalations_s, 0, 366 * DAY_S, above=True)
        self.caps()

    def caps(self) -> Caps:
        """In nano-USD."""
        names = ("per_request_usd", "per_day_usd", "per_month_usd")
        request, day, month = (
            None if (v := getattr(self, name)) is None else nano(v, f"budget: {name}") for name in names
        )
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
        check(self, "privacy")
        number("privacy", "max_side", self.max_side, 64, 8192)
        number("privacy", "jpeg_quality", self.jpeg_quality, 10, 95)
        number("privacy", "max_image_bytes", self.max_image_bytes, 4096, math.inf)


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
        where = f"backend {self.name!r}"
        check(self, where)
        parts = _address(where, "base_url", self.base_url)
        proxy = None if self.proxy is None else _address(where, "proxy", self.proxy)
        if proxy is not None and (proxy.scheme not in PROXIES or not proxy.hostname):
            raise ConfigError(f"{where}: proxy is no address that begins with one of {', '.join(PROXIES)} and ://")
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"{where}: want a name of letters, digits, and . _ - within")
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"{where}: base_url is no http(s) address without a query")
        if parts.username or parts.password:
            raise ConfigError(f"{where}: base_url holds a user name or password; a token has a field of its own")
        at_home = _loopback(parts.hostname) and (proxy is None or _loopback(proxy.hostname or ""))
        if parts.scheme == "http" and not self.allow_http and not at_home:
            raise ConfigError(f"{where}: base_url is unencrypted; allow_http would allow that")
        if not self.models:
            raise ConfigError(f"{where}: models is empty: there is no default that costs money")
        _among(f"{where}: sort", self.sort, SORTS)
        if self.bill_to and not NAME.fullmatch(self.bill_to):
            raise ConfigError(f"{where}: bill_to is no name of an organization")
        if any(not NAME.fullmatch(model.replace(":", "-")) for model in self.models):
            raise ConfigError(f"{where}: models holds what is no name of a model")
        for limit in self.max_usd_per_m or ():
            number(where, "max_usd_per_m", limit, 0, math.inf)
        number(where, "image_tokens", self.image_tokens, 1, MOST_TOKENS)
        number(where, "at_once", self.at_once, 1, 1000)
        for offer in self.offers:
            named = f"{where}: offer {offer.model!r}"
            check(offer, named)
            if offer.model not in self.models:
                raise ConfigError(f"{named}: models does not list it, but {', '.join(self.models)}")
            if not NAME.fullmatch(offer.provider or "own"):
                raise ConfigError(f"{named}: provider is {offer.provider!r}, want letters, digits, and . _ - within")
            for name, least in (("context", 1), ("image_tokens", 1), ("price_in", 0), ("price_out", 0)):
                number(named, name, getattr(offer, name), least, MOST_PRICE if least == 0 else MOST_TOKENS)

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
    if not isinstance(token, str):
        raise AttemptFailed(Fault("bad_token", "account", "the token is no text"))
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
            raise ConfigError("state is missing, want the file of the ledger")
        backends = tuple(_backend(b) for b in _tables(values, "backend", "the file"))
        if len({b.name for b in backends}) < len(backends):
            raise ConfigError("two backends have one name")
        return Config(
            _table(Policy, values.get("policy", {}), "policy"),
            _table(Budget, values.get("budget", {}), "budget"),
            _table(Privacy, values.get("privacy", {}), "privacy", omit={"consent"}),
            backends,
            path.parent / Path(values["state"]).expanduser(),
        )
    except (ValueError, RuntimeError) as exc:  # the latter of a home that is not known
        raise ConfigError(f"{path}: {exc}") from exc


def _backend(values: dict[str, Any]) -> Backend:
    where = f"backend {values.get('name')!r}"
    env, file = values.pop("token_env", None), values.pop("token_file", None)
    for key, value in (("token_env", env), ("token_file", file)):
        if value is not None and not (isinstance(value, str) and value):
            raise ConfigError(f"{where}: {key} is {value!r}, want a name")
    rows = _tables(values, "offer", where)
    values.pop("offer", None)
    if "token" in values or (env is not None and file is not None):
        raise ConfigError(f"{where}: a token comes by token_env or by token_file, which exclude each other")
    if env is not None:
        values["token"] = lambda: os.environ.get(env, "")
    if file is not None:
        values["token"] = lambda: Path(file).expanduser().read_text("utf-8").strip()
    offers = []
    for row in rows:
        _known(row, {"model", "provider", "vision", "context", "usd_in", "usd_out", "image_tokens"}, f"{where}: offer")
        for key, name in (("usd_in", "price_in"), ("usd_out", "price_out")):
            if key in row:
                stated = row.pop(key)
                row[name] = price(stated)
                if row[name] is None:
                    raise ConfigError(
                        f"{where}: offer: {key} is {stated!r}, want USD per million tokens, 0 to a million"
                    )
        offers.append(_table(Offer, {"backend": "", **row}, f"{where}: offer"))
    known = _dict(values.pop("providers", {}), f"{where}: providers")
    providers = {name: _table(Provider, row, f"{where}: provider {name!r}") for name, row in known.items()}
    return _table(Backend, {**values, "offers": tuple(offers), "providers": providers}, where)


def _table(kind: type[T], values: object, where: str, omit: frozenset[str] | set[str] = frozenset()) -> T:
    """A dataclass, which checks itself, from a table; arrays become what the field is; false lifts what may be None."""
    known = {f.name: f for f in fields(kind) if f.name not in omit}  # type: ignore[arg-type]
    found = _dict(values, where)
    _known(found, set(known), where)
    made: dict[str, Any] = {}
    for key, value in found.items():
        wanted = str(known[key].type)
        if isinstance(value, list):
            made[key] = frozenset(map(_plain, value)) if wanted.startswith("frozenset") else tuple(value)
        else:
            made[key] = None if value is False and "None" in wanted else value  # TOML has no null
    for name, one in known.items():
        if name not in made and one.default is MISSING and one.default_factory is MISSING:
            raise ConfigError(f"{where}: {name} is missing")
    return kind(**made)


def _dict(value: object, where: str) -> dict[str, Any]:
    """A copy of a table."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {value!r}, want a table")
    return dict(value)


def _tables(values: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """Copies of an array of tables."""
    rows = values.get(key, [])
    if not isinstance(rows, list):
        raise ConfigError(f"{where}: {key} is a {type(rows).__name__}, want an array of tables, in double brackets")
    return [_dict(row, f"{where}: {key}") for row in rows]


def _plain(value: object) -> object:
    """What a set can hold; a table in it is refused by its kind."""
    return repr(value) if isinstance(value, list | dict) else value


def _address(where: str, name: str, url: str) -> "SplitResult":
    """The parts of an address, which is not quoted: it may hold a password."""
    from urllib.parse import urlsplit  # slow to import

    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 -- read for its error
    except ValueError as exc:
        wanted = "a port up to 65535" if "ort" in str(exc) else "scheme://host"
        raise ConfigError(f"{where}: {name} is no address, want {wanted}") from None
    return parts


def _known(values: Mapping[str, Any], names: set[str], where: str) -> None:
    if unknown := sorted(set(values) - names):
        raise ConfigError(f"{where} has {', '.join(unknown)}, want of {', '.join(sorted(names))}")


def _among(name: str, value: str, wanted: tuple[str, ...]) -> None:
    if value not in wanted:
        raise ConfigError(f"{name} is {value!r}, want one of {', '.join(wanted)}")


def _loopback(host: str) -> bool:
    return host in {"localhost", "::1"} or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None
