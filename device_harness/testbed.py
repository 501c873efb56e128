"""Devices where there is none: Debian's adbd in a network namespace of its own, and sshd on loopback.

    python -m device_harness.testbed [--cache build/testbed]

fetches what they take and is not installed, by apt as this system has it configured, unpacked into the cache and never
installed: adbd and adb of Debian trixie (34), adb and sshd of the system's own release. `tests/test_adb.py` and
`tests/test_ssh.py` run on them (`make test-devices`). Needs Debian and root. Not covered: what only Android has, of
which stubs print a few words; no radio, no phone's heat.
"""

import argparse
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

CACHE = Path("build/testbed")
PROJECT = Path(__file__).resolve().parent.parent
SUITE = "trixie"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
SSHD = Path("/usr/sbin/sshd")
PORT, SERVER_PORT = 6555, 5038  # in the namespace
WAIT_S = 20.0
STUBS = {
    "getprop": 'case "$1" in ro.product.model) echo Fake;; *) echo;; esac',
    "dumpsys": """[ "$1" = thermalservice ] && cat <<'END'
IsStatusOverride: false
HAL Ready: true
Current temperatures from HAL:
	Temperature{mValue=31.5, mType=0, mName=CPU0, mStatus=0}
	Temperature{mValue=29.25, mType=3, mName=SKIN, mStatus=0}
Current cooling devices from HAL:
END""",
}


class TestbedError(RuntimeError):
    """A testbed that cannot be set up; the message says what is missing."""

    __test__ = False  # no class of tests


# ---- what is needed


def obstacle() -> str | None:
    """Why no fake Android device can be set up here; None: nothing is in the way."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "a network namespace takes Linux and root"
    missing = [name for name in ("unshare", "nsenter", "ip", "apt-get", "dpkg") if shutil.which(name) is None]
    return f"{', '.join(missing)} not installed" if missing else None


def fetched(cache: Path = CACHE) -> bool:
    """Whether `fetch` has done its work."""
    return all((cache / name).is_dir() for name in ("new", "own"))


def fetch(cache: Path = CACHE) -> None:
    """Gets the packages that are not there yet.

    Raises:
        TestbedError: if apt cannot.
    """
    cache.mkdir(parents=True, exist_ok=True)
    mirror = _mirror()
    for name, suite, packages in (("new", SUITE, ("adbd", "adb")), ("own", mirror[1], ("adb", "openssh-server"))):
        if not (cache / name).is_dir():
            _unpack(cache, name, f"deb [signed-by={KEYRING}] {mirror[0]} {suite} main\n", packages)


def _mirror() -> tuple[str, str]:
    """Address and release of the Debian archive that this system's apt uses."""
    words = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    lines = _apt(["indextargets", "--format", words, "Created-By: Packages"]).splitlines()
    for uri, release, component in (line.split() for line in lines if len(line.split()) == 3):
        if re.search(r"/debian/?$", uri) and component == "main" and "-" not in release:
            return uri, release
    raise TestbedError("apt has no archive of Debian configured here, which alone has adbd")


def _apt(arguments: Sequence[str], options: Sequence[str] = ()) -> str:
    command = ["apt-get", *options, *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603  # our own words
    except OSError as exc:
        raise TestbedError(f"apt-get cannot be run: {exc.strerror}") from exc
    except subprocess.CalledProcessError as exc:
        raise TestbedError(f"apt-get {arguments[0]} failed: {exc.stderr.strip()[-500:]}") from exc


def _unpack(cache: Path, name: str, source: str, packages: Sequence[str]) -> None:
    """Packages and all that they need, unpacked into a folder of the cache that appears when it is whole."""
    state, half = (cache / f".{name}.apt").absolute(), cache / f".{name}.partial"
    for old in (state, half):
        shutil.rmtree(old, ignore_errors=True)
    for folder in ("lists/partial", "cache/archives/partial", "parts"):
        (state / folder).mkdir(parents=True)
    (state / "sources.list").write_text(source, encoding="utf-8")
    (state / "status").touch()  # nothing is installed, so that everything comes
    places = {
        "Dir::Etc::sourcelist": "sources.list",
        "Dir::Etc::sourceparts": "parts",
        "Dir::State::lists": "lists",
        "Dir::State::status": "status",
        "Dir::Cache": "cache",
    }
    options = [f"-o{key}={state / value}" for key, value in places.items()]
    options += ["-oAPT::Sandbox::User=root", "-oAcquire::Languages=none", "-oDebug::NoLocking=true"]
    _apt(["update"], options)
    _apt(["install", "--yes", "--no-install-recommends", "--download-only", *packages], options)
    for archive in sorted((state / "cache" / "archives").glob("*.deb")):
        subprocess.run(["dpkg", "--extract", str(archive), str(half)], check=True)  # noqa: S603, S607  # found by `obstacle`
    half.rename(cache / name)
    shutil.rmtree(state)


def loaded(root: Path, program: str) -> list[str]:
    """The words that run a program of an unpacked root with that root's own libraries."""
    root = root.absolute()
    loader = next((path for usr in ("usr/", "") for path in root.glob(f"{usr}lib/*/ld-linux-*.so.*")), None)
    if loader is None:
        raise TestbedError(f"{root}: holds no dynamic loader")
    folders = [root / usr / "lib" / loader.parent.name for usr in ("usr", "")]
    paths = ":".join(str(path) for folder in folders for path in (folder, folder / "android"))
    return [str(loader), "--library-path", paths, str(root / program)]


# ---- adb


@dataclass
class AdbBed:
    """A fake Android device in a network namespace.

    serial: of the device. client: a program that is adb, in the namespace. home: a folder of this device.
    """

    serial: str
    client: Path
    home: Path
    _inside: tuple[str, ...]
    _daemon: tuple[str, ...]
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        """Starts the daemon and connects it."""
        environment = {**os.environ, "ADBD_PORT": str(PORT), "PATH": f"{self.home / 'bin'}:{os.environ['PATH']}"}
        self._processes.append(_popen([*self._inside, *self._daemon], self.home / "adbd.log", environment))
        _until(lambda: "connected" in self.adb("connect", self.serial), "adb connect")
        _until(lambda: self.adb("-s", self.serial, "get-state").strip() == "device", "a device")

    def kill(self) -> None:
        """Kills the daemon, as a phone that restarts or a cable that is pulled; what it started lives on."""
        _end(self._processes.pop())

    def adb(self, *arguments: str) -> str:
        """What adb says."""
        done = subprocess.run([self.client, *arguments], capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
        return done.stdout + done.stderr


@contextmanager
def adb_bed(folder: Path, version: str, cache: Path = CACHE) -> Iterator[AdbBed]:
    """A fake device that is up.

    Args:
        folder: an empty one.
        version: of the client and its server: "new" (trixie's) or "own" (of this system's release).

    Raises:
        TestbedError: if it does not come up.
    """
    if reason := obstacle():
        raise TestbedError(reason)
    guard = [sys.executable, "-m", "device_harness.no_vsock"]
    holder = _popen(["unshare", "--net", "--", *guard, "sleep", "infinity"], folder / "holder.log")
    space = Path(f"/proc/{holder.pid}/ns/net")
    bed: AdbBed | None = None
    server = None
    own = Path("/proc/self/ns/net").readlink()
    try:
        _until(
            lambda: space.readlink() != own and b"sleep" in Path(f"/proc/{holder.pid}/cmdline").read_bytes(), "unshare"
        )
        inside = ["nsenter", f"--net={space}", "--"]
        subprocess.run([*inside, "ip", "link", "set", "lo", "up"], check=True)  # noqa: S603
        for name, text in STUBS.items():
            stub = folder / "bin" / name
            stub.parent.mkdir(exist_ok=True)
            stub.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
            stub.chmod(0o755)
        words = loaded(cache / version, "usr/lib/android-sdk/platform-tools/adb")
        where = [f"HOME={folder.absolute()}", f"ANDROID_ADB_SERVER_PORT={SERVER_PORT}"]
        client = folder / "adb"
        client.write_text(
            f'#!/bin/sh\nexec {" ".join(map(quote, [*inside, "env", *where, *words]))} "$@"\n', encoding="utf-8"
        )
        client.chmod(0o755)
        server = _popen([*inside, *guard, "env", *where, *words, "nodaemon", "server"], folder / "server.log")
        daemon = [*guard, *loaded(cache / "new", "usr/lib/android-sdk/platform-tools/adbd")]
        bed = AdbBed(f"127.0.0.1:{PORT}", client.absolute(), folder.absolute(), tuple(inside), tuple(daemon))
        _until(lambda: "List of devices" in bed.adb("devices"), "adb's server")
        bed.start()
        yield bed
    finally:
        if server is not None:
            _end(server)
        inner = _namespace(space)
        for process in Path("/proc").glob("[0-9]*") if inner not in (None, own) else ():
            if int(process.name) != holder.pid and _namespace(process / "ns" / "net") == inner:
                os.kill(int(process.name), 9)  # what the daemon started
        for left in bed._processes if bed is not None else ():  # noqa: SLF001  # made here
            _end(left)
        _end(holder)


def _namespace(link: Path) -> Path | None:
    try:
        return link.readlink()
    except OSError:
        return None


# ---- ssh


@dataclass(frozen=True)
class SshBed:
    """An sshd on loopback. config: of a client that may log in."""

    address: str
    config: Path
    pid: int

    def kill_sessions(self) -> int:
        """Kills all of the server's connections, and not what runs in them; returns how many processes that were."""
        children = {int(p.name) for p in Path("/proc").glob("[0-9]*") if _parent(p) == self.pid}
        inner = {
            int(p.name) for p in Path("/proc").glob("[0-9]*") if _parent(p) in children and _name(p).startswith("sshd")
        }
        for pid in children | inner:
            os.kill(pid, 9)
        return len(children | inner)


def find_sshd(cache: Path = CACHE) -> list[str] | None:
    """The words that run sshd: the system's, or the cache's; None where there is neither."""
    if SSHD.is_file():
        return [str(SSHD)]
    unpacked = (cache / "own" / "usr" / "sbin" / "sshd").absolute()
    if not unpacked.is_file() or os.geteuid() != 0:
        return None
    (libraries,) = {path.parent for path in (cache / "own" / "usr" / "lib").absolute().glob("*/libwrap.so.0")}
    return ["env", f"LD_LIBRARY_PATH={_alone(cache, libraries)}", str(unpacked)]


def _alone(cache: Path, libraries: Path) -> Path:
    """A folder with links to the libraries that this system lacks: its own C library stays in use."""
    folder = (cache / "lacking").absolute()
    folder.mkdir(exist_ok=True)
    for library in libraries.glob("*.so*"):
        if (
            not (Path("/usr/lib") / libraries.name / library.name).exists()
            and not (Path("/lib") / libraries.name / library.name).exists()
        ):
            link = folder / library.name
            if not link.is_symlink():
                link.symlink_to(library)
    return folder


@contextmanager
def ssh_bed(folder: Path, sshd: Sequence[str]) -> Iterator[SshBed]:
    """An sshd with keys and configuration of its own, for the user who runs this.

    Args:
        folder: an empty one, for the user alone.

    Raises:
        TestbedError: if it does not come up.
    """
    folder = folder.absolute()
    for key in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
        subprocess.run(command, check=True)  # noqa: S603
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "user.pub",
        "PidFile": "none",
        "UsePAM": "no",
        "StrictModes": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
    }
    known = (folder / "host.pub").read_text("utf-8").split()[:2]
    (folder / "known").write_text(f"[127.0.0.1]:{port} {' '.join(known)}\n", encoding="utf-8")
    client = {"IdentityFile": folder / "user", "IdentitiesOnly": "yes", "UserKnownHostsFile": folder / "known"}
    for name, table in (("sshd_config", server), ("ssh_config", client)):
        (folder / name).write_text("".join(f"{key} {value}\n" for key, value in table.items()), encoding="utf-8")
    process = _popen([*_with_user(folder), *sshd, "-D", "-e", "-f", str(folder / "sshd_config")], folder / "sshd.log")
    try:
        _until(lambda: _listens(port) or process.poll() is not None, "sshd")
        if process.poll() is not None:
            raise TestbedError(f"sshd: {(folder / 'sshd.log').read_text('utf-8', 'replace').strip()[-500:]}")
        user = pwd.getpwuid(os.geteuid()).pw_name
        yield SshBed(f"ssh://{user}@127.0.0.1:{port}", folder / "ssh_config", process.pid)
    finally:
        _end(process)


def _with_user(folder: Path) -> list[str]:
    """Words before sshd's own, where root lacks the user and folder that it wants: a mount namespace has them."""
    if os.geteuid() != 0:
        return []
    try:
        pwd.getpwnam("sshd")
    except KeyError:
        users = folder / "passwd"
        users.write_text(
            Path("/etc/passwd").read_text("utf-8") + "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n",
            encoding="utf-8",
        )
        script = 'mount --bind "$0" /etc/passwd && mount -t tmpfs none /run && mkdir -m 755 /run/sshd && exec "$@"'
        return ["unshare", "--mount", "--", "sh", "-c", script, str(users)]
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    return []


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# ---- processes


def _popen(command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    with log.open("ab") as said:
        return subprocess.Popen(  # noqa: S603  # our own words
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd=PROJECT, env=environment
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _until(done: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while True:
        try:
            if done():
                return
        except OSError:
            pass
        if time.monotonic() > end:
            raise TestbedError(f"{what}: did not come in {WAIT_S:.0f} s")
        time.sleep(0.05)


def _parent(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return None


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m device_harness.testbed", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="FOLDER", help="for packages (%(default)s)")
    args = parser.parse_args(arguments)
    try:
        if reason := obstacle():
            raise TestbedError(reason)
        fetch(args.cache)
    except TestbedError as exc:
        print(f"no fake device here: {exc}", file=sys.stderr)
        return 1
    print(f"adbd, two versions of adb, and sshd are in {args.cache}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
