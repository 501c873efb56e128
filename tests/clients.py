"""What the tests of clients need: fetches what can be fetched, says what is missing.

    python -m tests.clients

Chromium comes from this system's apt, for root on Debian; transformers.js and ONNX Runtime for the web come from npm.
Java and Swift are only looked for. What stays missing is a visible skip in `make test-clients`.
"""

import argparse
import os
import shutil
import subprocess

from runtimes.web.build import SiteError, install_packages
from tests.browser import PROGRAMS

APT_S = 600


def fetch_chromium() -> None:
    """Installs Chromium by apt where that is possible and none is there."""
    if any(map(shutil.which, PROGRAMS)) or os.name != "posix" or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
        try:
            done = subprocess.run(
                ["apt-get", "-qq", *command],
                env=environment,
                timeout=APT_S,
                capture_output=True,
                text=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            print(f"apt-get {command[0]} took more than {APT_S} s")
            return
        if done.returncode != 0:
            print(f"apt-get {command[0]} failed: {' '.join(done.stderr.split())[-300:]}")
            return


def missing() -> list[str]:
    """Sentences, one for each thing that is not here."""
    found = [
        f"{name} is not installed: {what} is not tried"
        for name, what in (
            ("node", "transformers.js"),
            ("npm", "transformers.js"),
            ("java", "the Kotlin port"),
            ("swiftc", "the Swift port"),
        )
        if shutil.which(name) is None
    ]
    if not any(map(shutil.which, PROGRAMS)):
        found.append(f"no browser ({', '.join(PROGRAMS)}): the page is not tried")
    try:
        install_packages()
    except SiteError as exc:
        found.append(f"{exc}: transformers.js is not tried")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=(__doc__ or "").splitlines()[0])
    parser.parse_args()
    fetch_chromium()
    for line in missing():
        print(f"missing: {line}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
