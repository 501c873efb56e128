"""An Android device behind the `adb` program, with its debugging bridge's own shell and push.

Android 7 or later (a shell that keeps stderr and exit codes apart). Nothing is installed: the runner is a program in
a folder that the shell's user owns.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from device_harness.device import (
    CONTROL_S,
    MOST_ANSWER,
    DeviceError,
    Said,
    one_line,
    reason_of,
    run_command,
    run_script,
)

ROOT = "/data/local/tmp/smolport"  # the one place where adb's user may write and run programs
SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")

GONE = re.compile(r"offline|device '.*' not found|no devices|unauthorized|closed|read copy response|protocol fault")


@dataclass(frozen=True)
class Listed:
    """A line of `adb devices -l`."""

    serial: str
    state: str
    product: str
    model: str


class AdbDevice:
    """A `Device` by its serial number.

    Args:
        serial: as `adb devices` prints it.
        root: the harness's folder there.
        program: the adb client.

    Raises:
        ValueError: if the serial number is none.
        DeviceError: if the device is not ready.
    """

    def __init__(self, serial: str, *, root: str = ROOT, program: str = "adb") -> None:
        if not SERIAL.fullmatch(serial):
            raise ValueError(f"{serial!r} is no serial number, as `adb devices` prints it")
        self.name, self.root = f"adb:{serial}", root
        self._adb = [program, "-s", serial]
        state, said = self._state()
        if state != "device":
            raise DeviceError("offline", f"{self.name}: not ready; adb said {said or state or 'nothing'}")

    def _state(self) -> tuple[str, str]:
        """What `get-state` gives, and what it says beside."""
        code, out, err = run_command([*self._adb, "get-state"], CONTROL_S)
        return "" if code else one_line(out.decode("utf-8", "replace")), one_line(" / ".join(err))

    def _command(self, script: str) -> list[str]:
        return [*self._adb, "shell", "-T", script]

    def shell(
        self,
        script: str,
        *,
        deadline_s: float,
        sink: BinaryIO | None = None,
        most_bytes: int = MOST_ANSWER,
        on_line: Callable[[str], None] | None = None,
    ) -> Said:
        """See `Device.shell`."""
        return run_script(
            self._command, script, deadline_s=deadline_s, sink=sink, most_bytes=most_bytes, on_line=on_line
        )

    def push(self, file: Path, path: str, *, deadline_s: float) -> None:
        """See `Device.push`."""
        code, out, err = run_command([*self._adb, "push", str(file), path], deadline_s)
        if code:
            said = one_line(" / ".join([*err, out.decode("utf-8", "replace")])) or "nothing"
            reason = reason_of(code, said)
            lost = reason == "failed" and (GONE.search(said) is not None or self._state()[0] != "device")
            raise DeviceError("offline" if lost else reason, f"adb push to {path}: {said}")

    def close(self) -> None:
        """adb's server is its user's, and stays."""


def list_devices(program: str = "adb") -> list[Listed]:
    """All that `adb devices` lists. Raises DeviceError if adb cannot be run or fails."""
    code, out, err = run_command([program, "devices", "-l"], CONTROL_S)
    if code:
        raise DeviceError("failed", f"{program} devices: {one_line(' / '.join(err)) or 'it said nothing'}")
    return parse_devices(out.decode("utf-8", "replace"))


def parse_devices(text: str) -> list[Listed]:
    """The lines behind "List of devices attached": serial, state in one or more words, key:value pairs."""
    found = []
    for line in text.partition("List of devices attached")[2].splitlines():
        words = one_line(line).split()
        if len(words) < 2:
            continue
        pairs = dict(word.split(":", 1) for word in words[2:] if re.match(r"[a-z_]+:", word))
        state = " ".join([words[1], *(word for word in words[2:] if not re.match(r"[a-z_]+:", word))])
        found.append(Listed(words[0], state, pairs.get("product", ""), pairs.get("model", "")))
    return found
