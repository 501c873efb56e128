"""A bundle and the runner on a device: what is there, by digests that the runner computes, and what has to be sent.

    ROOT/.smolport-device   the folder is the harness's own
    ROOT/runner/            smolport-run and its libraries
    ROOT/bundle/            the bundle that ran last
    ROOT/incoming/          files under way, each renamed into its place when all of them arrived whole
    ROOT/runs/NONCE/        a run: pid, out/

A bundle's manifest comes last, so that a folder without it, or with another's, is none. One run at a time: a new one
ends what an earlier one left running and removes its files.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from device_harness.device import CONTROL_S, Device, DeviceError, demand, one_line, transfer_s
from runtimes.bundle import Bundle
from runtimes.manifest import MANIFEST

PROGRAM = "smolport-run"
MARK = ".smolport-device"
MOST_FILES = 10_000
LINES_A_SCRIPT = 16
ELF_MACHINES = {3: "i686", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
ALIASES = {"arm64": "aarch64", "amd64": "x86_64", "i386": "i686", "i586": "i686"}


@dataclass(frozen=True)
class Sent:
    """A file here that is to be there."""

    file: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class Runner:
    """The native runner: its program, and what it needs beside it, by name.

    emulator: the words on the device that run the program, where its CPU is another.
    """

    files: Mapping[str, Sent]
    architecture: str | None  # of the program; None: it is a script
    emulator: tuple[str, ...] = ()


def read_runner(program: Path, emulator: Sequence[str] = ()) -> Runner:
    """The program and the shared libraries in its folder.

    Raises:
        ValueError: if it is no file.
    """
    if not program.is_file():
        raise ValueError(f"{program}: the runner is {'no file' if program.exists() else 'missing'}")
    libraries = {p.name: p for p in sorted(program.parent.iterdir()) if re.search(r"\.so(\.[\d.]+)?$", p.name)}
    files = {PROGRAM: _sent(program), **{name: _sent(path) for name, path in libraries.items()}}
    return Runner(files, elf_machine(program), tuple(emulator))


def elf_machine(program: Path) -> str | None:
    """The architecture that an ELF file is for, by `uname -m`'s name; None: it is no ELF file."""
    with program.open("rb") as file:
        head = file.read(20)
    if head[:4] != b"\x7fELF" or len(head) < 20:
        return None
    number = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
    return ELF_MACHINES.get(number, f"ELF machine {number}")


def bundle_files(bundle: Bundle) -> dict[str, Sent]:
    """What of a bundle is sent: all of it, the manifest last."""
    files = {e.path: Sent(bundle.folder / e.path, e.size, e.sha256) for e in bundle.manifest.files}
    return files | {MANIFEST: _sent(bundle.folder / MANIFEST)}


def _sent(file: Path) -> Sent:
    with file.open("rb") as content:
        return Sent(file, file.stat().st_size, hashlib.file_digest(content, "sha256").hexdigest())


def inside(device: Device, *names: str) -> str:
    """A path below the device's root, quoted for its shell."""
    return quote("/".join((device.root, *names)))


def prepare(device: Device) -> str:
    """Makes the root ready and empties what an earlier run left; returns `uname -m`.

    Raises:
        DeviceError: if the folder holds something else, or cannot be written.
    """
    script = f"""
if [ -e {inside(device)} ] && [ ! -f {inside(device, MARK)} ] && [ -n "$(ls -A {inside(device)})" ]; then
  echo {quote(f"{device.root} holds files that are not the harness's")} >&2; exit 9
fi
mkdir -p {inside(device)} && : > {inside(device, MARK)} || exit 1
cd {inside(device)} || exit 1
{_end_runs("runs/*")}
rm -rf incoming runs
mkdir -p runner bundle incoming runs && uname -m
"""
    said = device.shell(script, deadline_s=CONTROL_S)
    if said.code == 9:
        raise DeviceError("refused", f"{device.name}: {said.last}; name another folder")
    found = one_line(demand(said, f"{device.name}: making {device.root}").stdout.decode("utf-8", "replace"), 40)
    return known_as(found)


def known_as(machine: str) -> str:
    """An architecture by the name that Linux gives it."""
    return ALIASES.get(machine, machine)


def _end_runs(pattern: str) -> str:
    """Ends the runs whose folders match, if the process by that number is still the run: its words name its folder."""
    return f"""for run in {pattern}; do
  [ -f "$run/pid" ] || continue
  pid=$(cat "$run/pid")
  case "$(tr '\\0' ' ' 2>/dev/null < "/proc/$pid/cmdline")" in *"${{run##*/}}"*) kill -9 "$pid";; esac
done"""


def end_run(device: Device, nonce: str) -> None:
    """Ends a run that is given up, if the device still answers."""
    device.shell(f"cd {inside(device)} && {_end_runs(f'runs/{nonce}')}; true", deadline_s=CONTROL_S)


def remove_run(device: Device, nonce: str) -> None:
    """Removes a run's files."""
    demand(device.shell(f"rm -rf {inside(device, 'runs', nonce)}", deadline_s=CONTROL_S), "removing the run's files")


def runner_words(device: Device, runner: Runner, arguments: Sequence[str]) -> str:
    """The command for the device's shell that runs the runner; libraries are those beside it."""
    words = [*runner.emulator, f"{device.root}/runner/{PROGRAM}", *arguments]
    return f"env LD_LIBRARY_PATH={inside(device, 'runner')} {' '.join(map(quote, words))}"


def digests(device: Device, runner: Runner, folder: str) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every file below a folder of the root, as the runner finds them now.

    Raises:
        DeviceError: if the runner does not run there, or its answer is of another form.
    """
    command = runner_words(device, runner, ["--digests", f"{device.root}/{folder}"])
    sizes = sum(sent.size for sent in runner.files.values())
    said = demand(device.shell(command, deadline_s=transfer_s(sizes) + 600), f"{PROGRAM} --digests {folder}")
    return parse_digests(said.stdout, f"{PROGRAM} --digests {folder}")


def parse_digests(text: bytes, where: str) -> dict[str, tuple[int, str]]:
    """The answer of `--digests`, each field checked. Raises DeviceError."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise DeviceError("bad result", f"{where}: its answer is not JSON: {one_line(str(exc))}") from exc
    rows = content.get("files") if isinstance(content, dict) else None
    if not isinstance(rows, list) or len(rows) > MOST_FILES:
        raise DeviceError("bad result", f"{where}: files is no list of at most {MOST_FILES:,}")
    found = {}
    for row in rows:
        path, size, sha256 = (row.get(key) if isinstance(row, dict) else None for key in ("path", "size", "sha256"))
        good = isinstance(path, str) and type(size) is int and size >= 0 and isinstance(sha256, str)
        if not good or not re.fullmatch("[0-9a-f]{64}", str(sha256)) or not safe(str(path)):
            raise DeviceError("bad result", f"{where}: {one_line(repr(row), 100)} is no path, size and sha256")
        found[str(path)] = (int(str(size)), str(sha256))
    return found


def safe(path: str) -> bool:
    """Whether a path that a device named stays below the folder it was asked about."""
    return all(part not in ("", ".", "..") for part in path.split("/")) and "\0" not in path and len(path) < 1000


def send_runner(device: Device, runner: Runner, say: Callable[[str], None]) -> list[str]:
    """Puts the runner there; returns the names that were sent. The program always is: it says what the rest is.

    Raises:
        DeviceError: if a file does not arrive, or the program does not run there.
    """
    _place(device, "runner", {PROGRAM: runner.files[PROGRAM]}, say, None)
    wanted = {name: (sent.size, sent.sha256) for name, sent in runner.files.items()}
    sent = [PROGRAM]
    try:
        found = digests(device, runner, "runner")
    except DeviceError as exc:
        if exc.reason not in ("failed", "killed"):
            raise
        found = {}  # a library is missing or broken
    missing = {name: runner.files[name] for name in wanted if name != PROGRAM and found.get(name) != wanted[name]}
    if missing or not found:
        _place(device, "runner", missing, say, None)
        sent += missing
        found = digests(device, runner, "runner")
    for name, digest in wanted.items():
        if found.get(name) != digest:
            raise DeviceError("failed", f"{device.name}: {name} did not arrive whole")
    _remove(device, "runner", found.keys() - wanted.keys())
    return sent


def send_bundle(device: Device, runner: Runner, files: Mapping[str, Sent], say: Callable[[str], None]) -> list[str]:
    """Makes ROOT/bundle the bundle: sends what differs, removes what is not of it; returns the paths that were sent.

    Raises:
        DeviceError: if a file does not arrive whole; the bundle there is then none that a runner takes.
    """
    found = digests(device, runner, "bundle")
    changed = {path: sent for path, sent in files.items() if found.get(path) != (sent.size, sent.sha256)}
    if changed and MANIFEST not in changed:
        changed[MANIFEST] = files[MANIFEST]
    if changed:
        demand(device.shell(f"rm -f {inside(device, 'bundle', MANIFEST)}", deadline_s=CONTROL_S), "removing a manifest")
    _remove(device, "bundle", found.keys() - files.keys())
    _place(device, "bundle", changed, say, runner)
    return list(changed)


def _remove(device: Device, folder: str, paths: set[str]) -> None:
    removals = [f"rm -f -- {inside(device, folder, path)} || exit 1" for path in sorted(paths)]
    _several(device, removals, f"removing files of {folder}")


def _several(device: Device, lines: Sequence[str], what: str) -> None:
    """Runs lines in order, many at a time: each script is a journey to the device, and has a longest length."""
    for start in range(0, len(lines), LINES_A_SCRIPT):
        script = "\n".join(lines[start : start + LINES_A_SCRIPT])
        demand(device.shell(script, deadline_s=CONTROL_S), what)


def _place(
    device: Device, folder: str, files: Mapping[str, Sent], say: Callable[[str], None], runner: Runner | None
) -> None:
    """Sends files beside their places, has the runner check them where there is one, and renames them.

    Raises:
        DeviceError: if one fails; what is under way is then removed, so that a full disk has room again.
    """
    try:
        for number, (path, sent) in enumerate(files.items()):
            say(f"push {folder}/{path}, {sent.size:,} bytes")
            device.push(sent.file, f"{device.root}/incoming/{number}", deadline_s=transfer_s(sent.size))
        if runner is not None and files:
            found = digests(device, runner, "incoming")
            for number, (path, sent) in enumerate(files.items()):
                if found.get(str(number)) != (sent.size, sent.sha256):
                    size = f"{found[str(number)][0]:,} bytes" if str(number) in found else "nothing"
                    raise DeviceError("failed", f"{path} did not arrive whole: {size} of {sent.size:,}, or other ones")
        moves = []
        for number, path in enumerate(files):
            source, target = inside(device, "incoming", str(number)), inside(device, folder, path)
            mode = 755 if path == PROGRAM and folder == "runner" else 644
            move = f"chmod {mode} {source} && mv -f {source} {target}"
            moves.append(f'mkdir -p "$(dirname {target})" && {move} || exit 1')
        _several(device, moves, f"placing files in {folder}")
    except DeviceError as exc:
        if exc.reason == "full disk":
            device.shell(
                f"rm -rf {inside(device, 'incoming')}; mkdir {inside(device, 'incoming')}", deadline_s=CONTROL_S
            )
        raise
