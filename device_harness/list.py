"""The devices that `python -m device_harness.run` can be given now.

    python -m device_harness.list [--json]

Lists what adb has, with state and product; this machine is `local`, and an ssh host is named by hand. Exit code 1: adb
is there and failed. Not there yet: iOS devices.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict

from device_harness.adb import Listed, list_devices
from device_harness.device import DeviceError

READY = "device"
STATES = {
    "unauthorized": "allow this computer on the device's screen",
    "offline": "does not answer: connect it again",
    "recovery": "is in recovery: start it",
    "sideload": "is in sideload: start it",
    "no permissions": "may not be opened: see Android's notes on udev rules",
}


def hint(device: Listed) -> str:
    """What a state asks for; "" for a device that is ready."""
    return next((text for state, text in STATES.items() if device.state.startswith(state)), "")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m device_harness.list", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adb", default="adb", metavar="FILE", help="the adb client (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    args = parser.parse_args(arguments)
    installed = shutil.which(args.adb) is not None
    try:
        found = list_devices(args.adb) if installed else []
    except DeviceError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps({"adb": installed, "devices": [asdict(device) for device in found]}))
        return 0
    print("local\tthis machine")
    for device in found:
        about = " ".join(filter(None, (device.model, device.product and f"({device.product})")))
        text = device.state if device.state == READY else f"{device.state}: {hint(device) or 'not ready'}"
        print(f"adb:{device.serial}\t{text}\t{about}")
    if not found:
        print("no device on adb" if installed else f"{args.adb} is not installed, so no Android device is listed")
    print("ssh://[user@]host[:port][/folder]\tany host that ssh reaches without a question")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
