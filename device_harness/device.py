"""What the harness asks of a device, and how a command is run there: with a deadline, bounded, and never believed.

A device is a POSIX shell and a way to put a file. Every script ends by saying a word that was made for it alone, on
stderr, with its exit code: where that word is missing the script did not end, whatever the transport's own exit code
is (a daemon killed during `adb shell` gives 0 with adb 29). Not covered: a device that answers as the golden cases do
because it has read them.
"""

import os
import secrets
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from shlex import quote
from typing import BinaryIO, Literal, Protocol

CONTROL_S = 60.0  # deadline of a command that does next to nothing
SLOWEST = 500_000  # bytes a second: a slower transfer is given up
MOST_ANSWER = 1 << 22  # bytes of an answer that is text
MOST_STDERR = 1 << 24
MOST_LINE = 4096
KEPT_LINES = 20  # of stderr, for messages

Reason = Literal["offline", "killed", "timed out", "full disk", "refused", "failed", "bad result"]


class DeviceError(RuntimeError):
    """What was asked of a device was not done; `reason` is one word or two for it."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason


@dataclass(frozen=True)
class Said:
    """What a script that ended left: its exit code, its output, and the last lines of stderr."""

    code: int
    stdout: bytes
    stderr: tuple[str, ...]

    @property
    def last(self) -> str:
        """The end of stderr in one line."""
        return one_line(" / ".join(self.stderr[-3:])) or "nothing"


class Device(Protocol):
    """A machine that scripts are run on. `root` is the harness's folder there, perhaps relative to where it begins."""

    name: str
    root: str

    def shell(
        self,
        script: str,
        *,
        deadline_s: float,
        sink: BinaryIO | None = None,
        most_bytes: int = MOST_ANSWER,
        on_line: Callable[[str], None] | None = None,
    ) -> Said:
        """Runs a script of `sh` to its end.

        Args:
            deadline_s: after so many seconds it is given up.
            sink: takes stdout; without it `Said` has it.
            most_bytes: of stdout.
            on_line: called for each line of stderr as it comes.

        Raises:
            DeviceError: if it did not end, or sent more than it may.
        """
        ...

    def push(self, file: Path, path: str, *, deadline_s: float) -> None:
        """Puts a file at a path whose folder is there. That it arrived whole is for the caller to check.

        Raises:
            DeviceError: if it failed.
        """
        ...

    def close(self) -> None:
        """Ends what the connection holds."""
        ...


def one_line(text: str, most: int = 400) -> str:
    """A text from a device in one line of printable characters: a terminal obeys others."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: most * 4]).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def transfer_s(size: int) -> float:
    """Seconds that a transfer of `size` bytes may take."""
    return CONTROL_S + size / SLOWEST


def demand(said: Said, what: str) -> Said:
    """A script's end, which must be a good one. Raises DeviceError naming `what` was tried."""
    if said.code == 0:
        return said
    raise DeviceError(reason_of(said.code, said.last), f"{what} ended with {said.code}: {said.last}")


def reason_of(code: int, text: str) -> Reason:
    """Why something ended with a code that is not 0."""
    if "No space left" in text or "not enough space" in text.lower():
        return "full disk"
    return "killed" if code in (128 + signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGKILL) else "failed"


def pull(device: Device, path: str, file: Path, *, most_bytes: int) -> None:
    """Gets a file of at most `most_bytes` into a new one, which is removed if it does not come whole."""
    try:
        with file.open("xb") as sink:
            script = f"cat {quote(path)}"
            said = device.shell(script, deadline_s=transfer_s(most_bytes), sink=sink, most_bytes=most_bytes)
            demand(said, f"reading {path}")
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def run_script(
    command: Callable[[str], Sequence[str]],
    script: str,
    *,
    deadline_s: float,
    stdin: Path | None = None,
    sink: BinaryIO | None = None,
    most_bytes: int = MOST_ANSWER,
    on_line: Callable[[str], None] | None = None,
) -> Said:
    """`Device.shell` for whatever passes a script to a shell.

    Args:
        command: script -> the program and its arguments that run it.
        stdin: a file that the script reads.
    """
    mark = secrets.token_hex(12)
    code: int | None = None

    def hear(line: str) -> bool:
        nonlocal code
        word, _, number = line.partition(" ")
        if word != mark:
            if on_line is not None:
                on_line(line)
            return True
        code = int(number) if number.isdigit() and len(number) < 4 else None
        return False

    whole = f"(\n{script}\n)\nprintf '\\n%s %s\\n' {mark} $? >&2"
    left, out, err = run_command(command(whole), deadline_s, stdin, sink, most_bytes, hear)
    if code is None:
        said = one_line(" / ".join(err[-3:])) or "nothing"
        reason: Reason = "full disk" if "No space left" in said else "offline"
        raise DeviceError(reason, f"the connection ended before the command did ({left}); it said {said}")
    return Said(code, out, err)


def run_command(
    command: Sequence[str],
    deadline_s: float,
    stdin: Path | None = None,
    sink: BinaryIO | None = None,
    most_bytes: int = MOST_ANSWER,
    hear: Callable[[str], bool] = lambda _: True,
) -> tuple[int, bytes, tuple[str, ...]]:
    """Runs a program here: exit code, stdout, and the lines of stderr that `hear` wants kept.

    Raises:
        DeviceError: if it is not installed, is not done in time, or says more than it may.
    """
    into = sink or BytesIO()
    kept: deque[str] = deque(maxlen=KEPT_LINES)
    with open(stdin or os.devnull, "rb") as source:  # noqa: PTH123  # one of two
        try:
            process = subprocess.Popen(  # noqa: S603  # our own arguments; what is quoted for the device's shell is one of them
                command, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        except OSError as exc:
            raise DeviceError("failed", f"{command[0]} cannot be run: {exc.strerror}") from exc
    assert process.stdout is not None
    assert process.stderr is not None
    sizes, half, until = {"out": 0, "err": 0}, b"", time.monotonic() + deadline_s

    def lines(data: bytes) -> None:
        for line in data.split(b"\n"):
            if (text := one_line(line.decode("utf-8", "replace"), MOST_LINE)) and hear(text):
                kept.append(text)

    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ, "out")
            selector.register(process.stderr, selectors.EVENT_READ, "err")
            while selector.get_map():
                if (remaining := until - time.monotonic()) <= 0:
                    raise DeviceError("timed out", f"not done after {deadline_s:,.0f} s")
                ended = process.poll() is not None
                ready = selector.select(min(remaining, 0.2))
                if ended and not ready:
                    break  # something else holds its pipes: a server that it started
                for key, _ in ready:
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fileobj)
                        continue
                    sizes[key.data] += len(data)
                    if sizes[key.data] > (most_bytes if key.data == "out" else MOST_STDERR):
                        raise DeviceError("bad result", f"it sent more than {most_bytes:,} bytes")
                    if key.data == "out":
                        into.write(data)
                        continue
                    *whole, half = (half + data).split(b"\n")
                    lines(b"\n".join(whole))
                    if len(half) > MOST_LINE:
                        lines(half)
                        half = b""
        lines(half)
        code = process.wait(timeout=max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired as exc:
        raise DeviceError("timed out", f"not done after {deadline_s:,.0f} s") from exc
    finally:
        with suppress(ProcessLookupError):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()
    return code, into.getvalue() if isinstance(into, BytesIO) and sink is None else b"", tuple(kept)
