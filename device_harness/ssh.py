"""A device behind the `ssh` program: one connection that is kept, and a session for each script.

Needs a key that asks for nothing (BatchMode) and a POSIX shell there. `~/.ssh/config` counts; `config` names another.
"""

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import BinaryIO
from urllib.parse import urlsplit

from device_harness.device import MOST_ANSWER, DeviceError, Said, demand, one_line, run_command, run_script

ROOT = ".smolport"  # below the home folder
CONNECT_S = 20
ALIVE_S, ALIVE_COUNT = 5, 3  # a silent connection is given up after their product
HOST, USER = re.compile(r"[A-Za-z0-9:][A-Za-z0-9._:%-]*"), re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class SshDevice:
    """A `Device` at an address such as ssh://user@host:22/folder.

    Args:
        address: user, port and folder may be missing.
        config: in place of the user's configuration of ssh.
        program: the ssh client.

    Raises:
        ValueError: if the address is none.
        DeviceError: if there is no connection.
    """

    def __init__(self, address: str, *, config: Path | None = None, program: str = "ssh") -> None:
        host, user, port, root = parse_address(address)
        self.name, self.root = address, root or ROOT
        self._folder = Path(tempfile.mkdtemp(prefix="smolport-"))  # short: a socket's path has at most 104 bytes
        options = [f"ControlPath={self._folder}/c", "BatchMode=yes", f"ConnectTimeout={CONNECT_S}"]
        options += [f"ServerAliveInterval={ALIVE_S}", f"ServerAliveCountMax={ALIVE_COUNT}", "ForwardAgent=no"]
        options += ["ForwardX11=no", "PermitLocalCommand=no", "ClearAllForwardings=yes"]
        self._ssh = [program, "-T", *(["-F", str(config)] if config else [])]
        for option in options:
            self._ssh += ["-o", option]
        self._ssh += [*(["-l", user] if user else []), *(["-p", str(port)] if port else [])]
        self._host = host
        self._master: subprocess.Popen[bytes] | None = None
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        """Opens the connection that sessions share, and waits for it."""
        log = self._folder / "log"
        try:
            with log.open("wb") as said:
                self._master = subprocess.Popen(  # noqa: S603  # our own arguments; host and user are checked
                    [*self._ssh, "-M", "-N", "--", self._host],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    start_new_session=True,
                )
        except OSError as exc:
            raise DeviceError("failed", f"{self._ssh[0]} cannot be run: {exc.strerror}") from exc
        until = time.monotonic() + CONNECT_S + 10
        while not (self._folder / "c").exists() or self._control("check"):
            if self._master.poll() is not None or time.monotonic() > until:
                text = one_line(log.read_text("utf-8", "replace")) or "nothing"
                raise DeviceError("offline", f"{self.name}: no connection; ssh said {text}")
            time.sleep(0.02)

    def _control(self, action: str) -> int:
        return run_command([*self._ssh, "-O", action, "--", self._host], CONNECT_S)[0]

    def _command(self, script: str) -> list[str]:
        # the user's own shell may be none of sh's family: it is given one command with one quoted word
        return [*self._ssh, "-o", "ControlMaster=no", "--", self._host, f"exec sh -c {quote(script)}"]

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
        script = f"cat > {quote(path)}"
        demand(run_script(self._command, script, deadline_s=deadline_s, stdin=file), f"writing {path}")

    def close(self) -> None:
        """Ends the connection."""
        if self._master is not None and self._master.poll() is None:
            self._master.terminate()
            try:
                self._master.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._master.kill()
                self._master.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def parse_address(address: str) -> tuple[str, str | None, int | None, str]:
    """ssh://[user@]host[:port][/root] -> host, user, port, root ("" where there is none).

    Raises:
        ValueError: if it is of another form. A host or user that begins with "-" would be an option of ssh.
    """
    wanted = "want ssh://[user@]host[:port][/folder]"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as exc:
        raise ValueError(f"{address!r} is no address: {exc}, {wanted}") from exc
    host, user = parts.hostname or "", parts.username
    plain = not (parts.query or parts.fragment or parts.password is not None) and parts.path.isprintable()
    if (
        parts.scheme != "ssh"
        or not plain
        or not HOST.fullmatch(host)
        or (user is not None and not USER.fullmatch(user))
    ):
        raise ValueError(f"{address!r} is no address: {wanted}")
    return host, user, port, "" if parts.path == "/" else parts.path.rstrip("/")
