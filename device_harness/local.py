"""This machine as a device: a shell and a folder."""

from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import BinaryIO

from device_harness.device import MOST_ANSWER, Said, demand, run_script


class LocalDevice:
    """A `Device` whose root is a folder here."""

    def __init__(self, root: Path) -> None:
        self.name, self.root = "local", str(root.absolute())

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
        return run_script(_command, script, deadline_s=deadline_s, sink=sink, most_bytes=most_bytes, on_line=on_line)

    def push(self, file: Path, path: str, *, deadline_s: float) -> None:
        """See `Device.push`."""
        demand(run_script(_command, f"cat > {quote(path)}", deadline_s=deadline_s, stdin=file), f"writing {path}")

    def close(self) -> None:
        """Nothing is held."""


def _command(script: str) -> list[str]:
    return ["sh", "-c", script]
