"""Money, and what must be remembered between processes: one SQLite file.

Amounts are integer nano-USD. The worst case of a call is reserved before a byte of it is sent, in one transaction
with the check of every cap, so that processes cannot spend the same money. A call ends as `settled` (the provider's
count), `released` (it was not billed) or `uncertain` (it may have been: booked as spent). A reservation whose process
was killed counts as it stands, and is called uncertain after ten minutes. Nothing of a question, an image or a token is
stored.

Clocks: days and months are those of UTC. An entry counts in every window that does not begin after it, also one dated
in the future: setting the clock back frees nothing. An entry is not dated before its predecessor, unless that lies more
than 40 days ahead (a clock that was wrong; `spend --redate` puts such entries right by the owner's hand). A clock that
shows a time before this was written is not set, and nothing is spent by it. What remains: a clock set forward has the
allowance of the day that it shows.
"""

import json
import math
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from router_client.breaker import Health, health_of
from router_client.errors import DAY_S, ConfigError

NANO = 10**9  # nano-USD in a USD
STALE_S = 600.0
AHEAD_S = 40 * DAY_S
CLOCK_FLOOR_S = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
MOST_NANO = 2**62  # SQLite's integers end a little above
BUSY_S = 10.0
SPENT = "('reserved', 'settled', 'uncertain')"
SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
    id INTEGER PRIMARY KEY AUTOINCREMENT, request TEXT NOT NULL, offer TEXT NOT NULL, at REAL NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('reserved', 'settled', 'released', 'uncertain')),
    nano_usd INTEGER NOT NULL CHECK (nano_usd >= 0), reserved_nano_usd INTEGER NOT NULL,
    reason TEXT NOT NULL, consent INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS entry_at ON entry (at);
CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, at REAL NOT NULL, value TEXT NOT NULL);
"""


class LedgerError(RuntimeError):
    """The file cannot be used; nothing is spent without it."""


class BudgetRefused(Exception):
    """A cap forbids the call. `code`: budget_request, budget_day, budget_month, escalation_rate, clock_not_set."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Caps:
    """Limits in nano-USD (None: no limit), and on how many requests may leave within a time."""

    request_nano: int | None
    day_nano: int | None
    month_nano: int | None
    escalations: int | None = None
    escalations_s: float = 3600.0


@dataclass(frozen=True)
class Entry:
    """One call's money."""

    id: int
    request: str
    offer: str
    at: float
    state: str
    nano_usd: int
    reserved_nano_usd: int
    reason: str
    consent: int


class Ledger:
    """One connection, which its threads take turns with; other processes have their own.

    Args:
        path: the file; made when it is first needed.
        busy_s: how long to wait for other processes before that is an error.
    """

    def __init__(self, path: Path, busy_s: float = BUSY_S) -> None:
        self.path = path
        self._busy_s = busy_s
        self._lock = threading.Lock()
        self._open: tuple[int, sqlite3.Connection] | None = None

    def close(self) -> None:
        """Closes the file; it is opened again when it is next needed."""
        with self._lock:
            if self._open is not None and self._open[0] == os.getpid():
                self._open[1].close()
            self._open = None

    def _connection(self) -> sqlite3.Connection:
        if self._open is None or self._open[0] != os.getpid():  # a connection must not cross a fork
            self.path.parent.mkdir(parents=True, exist_ok=True)
            made = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
            try:
                self._patiently(made, "PRAGMA journal_mode = WAL")
                made.execute("PRAGMA synchronous = FULL")  # a reservation survives a power cut
            except BaseException:
                made.close()
                raise
            self._open = os.getpid(), made
        return self._open[1]

    def _patiently(self, db: sqlite3.Connection, statement: str) -> None:
        """Executes what needs a lock. SQLite's own way to wait lets one of many processes starve."""
        limit = time.monotonic() + self._busy_s
        while True:
            try:
                db.execute(statement)
            except sqlite3.OperationalError as exc:
                if exc.sqlite_errorcode & 0xFF not in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
                    raise
                if time.monotonic() > limit:
                    raise
                time.sleep(random.uniform(0.0005, 0.005))
            else:
                return

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that sees and keeps out all others; rolled back on any exception."""
        with self._lock:
            try:
                db = self._connection()
                self._patiently(db, "BEGIN IMMEDIATE")
            except (OSError, sqlite3.Error) as exc:
                raise LedgerError(f"{self.path}: cannot be used: {exc}") from exc
            try:
                if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'kept'").fetchone():
                    for statement in SCHEMA.split(";"):
                        db.execute(statement)
                yield db
                db.execute("COMMIT")
            except sqlite3.Error as exc:
                raise LedgerError(f"{self.path}: {exc}") from exc
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")

    def reserve(
        self,
        request: str,
        offer: str,
        nano_usd: int,
        caps: Caps,
        now: float,
        *,
        reason: str = "",
        consent: bool = False,
    ) -> int:
        """Books the worst case of a call before it is made; returns the entry's id.

        Args:
            request: the same for all calls of one request.
            offer: whom the call asks.
            nano_usd: the most it can cost.
            caps: checked with this call included.
            now: seconds since 1970.
            reason: why the request leaves the device.
            consent: whether the consent hook agreed.

        Raises:
            BudgetRefused: if a cap would be exceeded; nothing is booked.
            LedgerError: if the file cannot be used.
        """
        if now < CLOCK_FLOOR_S:
            raise BudgetRefused("clock_not_set", f"the clock shows {_utc(now):%Y-%m-%d}, which cannot be")
        if not 0 <= nano_usd <= MOST_NANO:
            raise BudgetRefused("budget_request", f"{nano_usd} nano-USD are no amount")
        with self._write() as db:
            db.execute("UPDATE entry SET state = 'uncertain' WHERE state = 'reserved' AND at < ?", (now - STALE_S,))
            day, month = windows(now)
            for code, cap, spent in (
                ("budget_request", caps.request_nano, _sum(db, "request = ?", request)),
                ("budget_day", caps.day_nano, _sum(db, "at >= ?", day)),
                ("budget_month", caps.month_nano, _sum(db, "at >= ?", month)),
            ):
                if cap is not None and spent + nano_usd > cap:
                    words = f"{usd(spent)} spent, {usd(nano_usd)} at most for this call, {usd(cap)} allowed"
                    raise BudgetRefused(code, words)
            if caps.escalations is not None:
                query = "SELECT COUNT(DISTINCT request) FROM entry WHERE at > ? AND request != ?"
                (left,) = db.execute(query, (now - caps.escalations_s, request)).fetchone()
                if left >= caps.escalations:
                    words = f"{left} requests left the device in {caps.escalations_s:g} s, {caps.escalations} allowed"
                    raise BudgetRefused("escalation_rate", words)
            (last,) = db.execute("SELECT MAX(at) FROM entry").fetchone()
            at = last if last is not None and now < last <= now + AHEAD_S else now
            values = (request, offer, at, nano_usd, nano_usd, reason, consent)
            columns = "request, offer, at, state, nano_usd, reserved_nano_usd, reason, consent"
            row = db.execute(f"INSERT INTO entry ({columns}) VALUES (?, ?, ?, 'reserved', ?, ?, ?, ?)", values)  # noqa: S608 -- no value is in the text
            return int(row.lastrowid or 0)

    def settle(self, entry: int, nano_usd: int) -> None:
        """Books what a call cost, also if that is more than was reserved.

        Raises:
            LedgerError: if there is no such reservation, or the file cannot be used.
        """
        self._close(entry, "settled", min(max(nano_usd, 0), MOST_NANO))

    def release(self, entry: int) -> None:
        """The call was not billed. Raises as `settle`."""
        self._close(entry, "released", 0)

    def uncertain(self, entry: int) -> None:
        """The call may have been billed: what was reserved stays spent. Raises as `settle`."""
        self._close(entry, "uncertain", None)

    def _close(self, entry: int, state: str, nano_usd: int | None) -> None:
        query = "UPDATE entry SET state = ?, nano_usd = COALESCE(?, nano_usd) WHERE id = ? AND state IN (?, ?)"
        with self._write() as db:  # a slow call may have been called uncertain meanwhile: the truth is better
            if db.execute(query, (state, nano_usd, entry, "reserved", "uncertain")).rowcount != 1:
                raise LedgerError(f"{self.path}: entry {entry} is not reserved")

    def spent(self, now: float) -> tuple[int, int]:
        """Nano-USD of this day and this month, reservations included."""
        with self._write() as db:
            day, month = windows(now)
            return _sum(db, "at >= ?", day), _sum(db, "at >= ?", month)

    def entries(self, since: float = 0.0) -> list[Entry]:
        """All calls from a time on, the oldest first."""
        columns = "id, request, offer, at, state, nano_usd, reserved_nano_usd, reason, consent"
        with self._write() as db:
            rows = db.execute(f"SELECT {columns} FROM entry WHERE at >= ? ORDER BY id", (since,)).fetchall()  # noqa: S608 -- no value is in the text
        return [Entry(*row) for row in rows]

    def redate(self, now: float) -> int:
        """Dates entries of the future today, for an owner whose clock was wrong; returns how many."""
        with self._write() as db:
            return db.execute("UPDATE entry SET at = ? WHERE at > ?", (now, now)).rowcount

    def keep(self, key: str, value: str, now: float) -> None:
        """Remembers a text under a key."""
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO kept VALUES (?, ?, ?)", (key, now, value))

    def kept(self, key: str) -> tuple[float, str] | None:
        """(when, text) of a key."""
        with self._write() as db:
            row = db.execute("SELECT at, value FROM kept WHERE key = ?", (key,)).fetchone()
        return None if row is None else (float(row[0]), str(row[1]))

    def health(self, key: str) -> Health:
        """What is remembered of an account, a model or an offer."""
        found = self.kept(f"health {key}")
        return Health() if found is None else _parsed(found[1])

    def change_health(self, key: str, change: Callable[[Health], Health | None], now: float) -> bool:
        """Applies a function to what is remembered, in one transaction; False if it returns None."""
        with self._write() as db:
            row = db.execute("SELECT value FROM kept WHERE key = ?", (f"health {key}",)).fetchone()
            old = Health() if row is None else _parsed(str(row[0]))
            new = change(old)
            if new is not None and new != old:
                text = json.dumps(new.as_json())
                db.execute("INSERT OR REPLACE INTO kept VALUES (?, ?, ?)", (f"health {key}", now, text))
        return new is not None


def windows(now: float) -> tuple[float, float]:
    """When this day and this month began, in UTC."""
    day = _utc(now).replace(hour=0, minute=0, second=0, microsecond=0)
    return day.timestamp(), day.replace(day=1).timestamp()


def nano(amount_usd: float, name: str) -> int:
    """A configured amount of USD in nano-USD.

    Raises:
        ConfigError: if it is no amount; names the field.
    """
    if isinstance(amount_usd, bool) or not math.isfinite(amount_usd) or not 0 <= amount_usd <= 10**6:
        raise ConfigError(f"{name} is {amount_usd}, want an amount of USD from 0 to a million")
    return round(amount_usd * NANO)


def usd(nano_usd: int) -> str:
    """For a person."""
    return f"${nano_usd / NANO:.6f}"


def _utc(now: float) -> datetime:
    return datetime.fromtimestamp(now, UTC)


def _sum(db: sqlite3.Connection, where: str, value: str | float) -> int:
    halves = "COALESCE(SUM(nano_usd >> 32), 0), COALESCE(SUM(nano_usd & 4294967295), 0)"  # SQLite's sums may overflow
    query = f"SELECT {halves} FROM entry WHERE state IN {SPENT} AND {where}"  # noqa: S608 -- constants
    high, low = db.execute(query, (value,)).fetchone()
    return (int(high) << 32) + int(low)


def _parsed(text: str) -> Health:
    try:
        return health_of(json.loads(text))
    except ValueError:
        return Health()
