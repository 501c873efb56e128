"""What a build of the native runner needs and the machine lacks, fetched by apt and pip as they are configured here.

    headers     ONNX Runtime's C API (Debian trixie's libonnxruntime-dev, by a pinned version and digest)
    compiler    g++ for AArch64 and its libraries, from the system's own release
    emulator    qemu-user 10 (Debian trixie; that of older releases crashes on loading ONNX Runtime)
    library     ONNX Runtime for AArch64 (its wheel)

Packages are unpacked below a cache folder and never installed: no rights are needed. Not covered: systems without apt,
which name their own folders (`python -m runtimes.native.build --help`).
"""

import hashlib
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

HEADER = "onnxruntime_c_api.h"
HEADER_SHA256 = "7783e9664bdb0b1b36145b5c8587dd1bc9a399aa000edf2e3dd03003cafc6882"  # of 1.21.0: API level 21
HEADER_PACKAGE, EMULATOR_PACKAGE, CROSS_PACKAGE = "libonnxruntime-dev", "qemu-user", "g++-aarch64-linux-gnu"
HEADER_VERSION, EMULATOR_LEAST = "1.21.0+dfsg-1", 10
SUITE = "trixie"
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


class BuildError(RuntimeError):
    """Something that a build needs is missing or unfit; the message says what and how to give it."""


def run(command: Sequence[str], what: str, folder: Path | None = None) -> str:
    """Runs a command and returns its output.

    Raises:
        BuildError: if it cannot be started or fails, with the end of what it said.
    """
    try:
        done = subprocess.run(  # noqa: S603  # commands of this module and of build.py
            command, cwd=folder, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as exc:
        raise BuildError(f"{what}: {command[0]} cannot be started: {exc.strerror}") from exc
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-3000:]
        raise BuildError(f"{what}: {command[0]} failed with {done.returncode}:\n{said}")
    return done.stdout


def header_folder(cache: Path, fetch: bool = True) -> Path:
    """The folder of the pinned header: of the system, of the cache, or fetched into it.

    Raises:
        BuildError: if it cannot be had, or is another than the pinned one.
    """
    for folder in (Path("/usr/include/onnxruntime"), cache / "headers" / "usr/include/onnxruntime"):
        if (folder / HEADER).is_file() and _sha256(folder / HEADER) == HEADER_SHA256:
            return folder
    hint = "give the folder of another copy with --headers"
    _unpack(cache, "headers", SUITE, [f"{HEADER_PACKAGE}={HEADER_VERSION}"], hint, fetch)
    path = cache / "headers" / "usr/include/onnxruntime" / HEADER
    found = _sha256(path) if path.is_file() else "missing"
    if found != HEADER_SHA256:
        raise BuildError(f"{path}: SHA-256 is {found}, want {HEADER_SHA256}; {hint}")
    return path.parent


def cross_compiler(cache: Path, fetch: bool = True) -> tuple[list[str], Path]:
    """The command of a C++ compiler for AArch64, and the folder with its C library, for an emulator's -L.

    Raises:
        BuildError: if there is none and none can be fetched.
    """
    if found := shutil.which(CROSS_COMPILER):
        return [found], Path("/usr/aarch64-linux-gnu")
    root = cache / "cross"
    compiler = root / "usr/bin" / CROSS_COMPILER
    if not compiler.exists():
        hint = f"install {CROSS_PACKAGE}, or give another compiler with --compiler"
        _unpack(cache, "cross", None, [CROSS_PACKAGE], hint, fetch)
        if not compiler.exists():
            raise BuildError(f"{compiler}: is missing in {CROSS_PACKAGE}; {hint}")
    # Linker scripts name absolute paths, which are taken below the root; the assembler's own libraries lie there too.
    (libraries,) = {path.parent for path in (root / "usr/lib").glob("*/libopcodes-*-arm64.so")}
    command = ["env", f"LD_LIBRARY_PATH={libraries.resolve()}", str(compiler), f"--sysroot={root}"]
    return command, root / "usr/aarch64-linux-gnu"


def emulator(cache: Path) -> Path | None:
    """qemu-user for AArch64, of the system or the cache; None where there is none of a fit version."""
    for path in (shutil.which(EMULATOR), cache / "emulator" / "usr/bin" / EMULATOR):
        if path and Path(path).is_file():
            version = re.search(r"version (\d+)\.", run([str(path), "--version"], "emulator"))
            if version and int(version[1]) >= EMULATOR_LEAST:
                return Path(path)
    return None


def fetch_emulator(cache: Path) -> Path:
    """As `emulator`, fetched where it is missing.

    Raises:
        BuildError: if it cannot be had.
    """
    if found := emulator(cache):
        return found
    hint = f"install qemu-user {EMULATOR_LEAST} or later"
    _unpack(cache, "emulator", SUITE, [EMULATOR_PACKAGE], hint, True)
    if found := emulator(cache):
        return found
    raise BuildError(f"{cache / 'emulator'}: holds no {EMULATOR} {EMULATOR_LEAST} or later; {hint}")


def arm64_library(cache: Path, version: str, fetch: bool = True) -> Path:
    """libonnxruntime.so of `version` for AArch64, out of its wheel.

    Raises:
        BuildError: if pip cannot get it.
    """
    folder = cache / f"onnxruntime-{version}-aarch64"
    name = f"libonnxruntime.so.{version}"
    if not (folder / name).is_file():
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        platforms = [f"--platform={tag}_aarch64" for tag in ("manylinux_2_28", "manylinux_2_27", "manylinux2014")]
        half = folder.with_name(folder.name + ".partial")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        pip += ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp", *platforms]
        hint = "give the file of another copy with --library"
        if not fetch:
            raise BuildError(f"ONNX Runtime {version} for AArch64 is not here ({hint})")
        _emptied(half)
        run([*pip, f"--dest={half}", f"onnxruntime=={version}"], f"ONNX Runtime {version} for AArch64 ({hint})")
        (wheel,) = half.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            try:
                content = archive.read(f"onnxruntime/capi/{name}")
            except KeyError as exc:
                raise BuildError(f"{wheel.name}: holds no {name}; {hint}") from exc
        (half / name).write_bytes(content)
        wheel.unlink()
        _moved(half, folder)
    return folder / name


# ---- apt, with a state of its own


def _unpack(cache: Path, name: str, suite: str | None, packages: Sequence[str], hint: str, fetch: bool) -> None:
    """Downloads packages, with what of their needs is not installed, and unpacks them into `cache`/`name`.

    Args:
        suite: a release of Debian in place of the system's own; its packages are taken without what they need.
        fetch: False: whatever it would have fetched is an error.
    """
    what = f"{', '.join(packages)} of {suite or 'the system'} ({hint})"
    if not fetch:
        raise BuildError(f"{what}: is not here")
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise BuildError(f"{what}: this system has no apt")
    print(f"fetching {what}", file=sys.stderr, flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    state = _emptied(cache.absolute() / f"apt-{name}")
    for folder in ("lists/partial", "archives/partial", "parts"):
        (state / folder).mkdir(parents=True)
    (state / "status").touch()
    options = {
        "Dir::State::lists": state / "lists",
        "Dir::Cache": state,
        "Dir::Cache::archives": state / "archives",
        "APT::Sandbox::User": "root",
        "APT::Install-Recommends": "false",
        "Debug::NoLocking": "true",
        "Acquire::Languages": "none",
    }
    if suite:
        (state / "sources.list").write_text(_sources(suite, what), encoding="utf-8")
        options |= {
            "Dir::Etc::sourcelist": state / "sources.list",
            "Dir::Etc::sourceparts": state / "parts",
            "Dir::State::status": state / "status",
        }
    apt = ["apt-get", "--quiet", "--quiet", *(f"--option={key}={value}" for key, value in options.items())]
    run([*apt, "update"], what)
    if suite:
        run([*apt, "download", *packages], what, state / "archives")
    else:
        run([*apt, "--yes", "--download-only", "install", *packages], what)
    half = _emptied(cache / f"{name}.partial")
    for archive in sorted((state / "archives").glob("*.deb")):
        run(["dpkg-deb", "--extract", str(archive), str(half)], what)
    _moved(half, cache / name)
    shutil.rmtree(state)


def _sources(suite: str, what: str) -> str:
    """A sources.list for `suite` on the first mirror of Debian that the system's own sources name."""
    own = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', Path("/etc/os-release").read_text("utf-8"), re.MULTILINE))
    if own.get("ID") != "debian":
        raise BuildError(f"{what}: this system is {own.get('PRETTY_NAME', 'unknown')}, no Debian")
    for uri, suites, signed in _mirrors():
        if own.get("VERSION_CODENAME") in suites:
            return f"deb [signed-by={signed}] {uri} {suite} main\n"
    raise BuildError(f"{what}: /etc/apt names no mirror of {own.get('VERSION_CODENAME')}")


def _mirrors() -> Iterator[tuple[str, list[str], str]]:
    """(address, suites, keyring) of the system's apt sources, in both of their formats."""
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    etc = Path("/etc/apt")
    for path in sorted(etc.glob("sources.list.d/*.sources")):
        for block in re.split(r"\n\s*\n", path.read_text("utf-8")):
            fields = dict(re.findall(r"^([\w-]+):[ \t]*(\S.*)$", block, re.MULTILINE))
            if "deb" in fields.get("Types", "").split() and "URIs" in fields and "Suites" in fields:
                signed = fields.get("Signed-By", keyring)
                yield fields["URIs"].split()[0], fields["Suites"].split(), signed if signed[0] == "/" else keyring
    for path in [etc / "sources.list", *sorted(etc.glob("sources.list.d/*.list"))]:
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        for line in lines:
            if found := re.match(r"deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s", line):
                signed = re.search(r"signed-by=(\S+)", found[1] or "")
                yield found[2], [found[3]], signed[1] if signed else keyring


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _moved(half: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    half.rename(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def host_architecture() -> str:
    """This machine's, as `platform.machine` names it; arm64 is aarch64."""
    machine = platform.machine().lower()
    return {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)
