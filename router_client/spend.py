"""Shows the ledger: what this day and month cost, what the caps leave, the last calls.

    python -m router_client.spend --config router.toml

Exit code 0: shown; 2: the configuration or the ledger cannot be used.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from router_client.errors import ConfigError
from router_client.ledger import Caps, Ledger, LedgerError, usd, windows
from router_client.policy import read_config

SHOWN = 20


def spend(ledger: Ledger, caps: Caps, now: float) -> dict[str, Any]:
    """What --json prints; amounts in nano-USD.

    Raises:
        LedgerError: if it cannot be read.
    """
    day, month = ledger.spent(now)
    entries = ledger.entries(windows(now)[1])
    return {
        "day_nano_usd": day,
        "day_cap_nano_usd": caps.day_nano,
        "month_nano_usd": month,
        "month_cap_nano_usd": caps.month_nano,
        "uncertain_nano_usd": sum(e.nano_usd for e in entries if e.state in {"reserved", "uncertain"}),
        "dated_ahead": sum(e.at > now for e in entries),
        "entries": [asdict(e) for e in entries[-SHOWN:]],
    }


def lines(shown: dict[str, Any]) -> list[str]:
    """The same for a person."""
    out = []
    for name in ("day", "month"):
        cap = shown[f"{name}_cap_nano_usd"]
        out.append(f"{name}: {usd(shown[f'{name}_nano_usd'])} of {'no cap' if cap is None else usd(cap)}")
    out.append(f"not confirmed, counted as spent: {usd(shown['uncertain_nano_usd'])}")
    if shown["dated_ahead"]:
        out.append(f"{shown['dated_ahead']} entries are dated ahead of this clock; --redate dates them now")
    for entry in shown["entries"]:
        at = datetime.fromtimestamp(entry["at"], UTC).strftime("%Y-%m-%d %H:%M:%S")
        out.append(f"{at}  {entry['state']:9}  {usd(entry['nano_usd'])}  {entry['offer']}  {entry['reason']}")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m router_client.spend", description="Shows the ledger.")
    command.add_argument("--config", type=Path, required=True, help="the router's configuration, a TOML file")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--redate", action="store_true", help="date entries of the future now: the clock was wrong")
    given = command.parse_args(arguments)
    try:
        config = read_config(given.config)
        ledger = Ledger(config.state)
        if given.redate:
            ledger.redate(time.time())
        shown = spend(ledger, config.budget.caps(), time.time())
    except (ConfigError, LedgerError) as exc:
        print(exc, file=sys.stderr)
        return 2
    print(json.dumps(shown, indent=2) if given.json else "\n".join(lines(shown)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
