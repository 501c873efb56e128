"""Builds the native runner, `smolport-run`, with ONNX Runtime's library beside it.

    python -m runtimes.native.build [--target host|linux-arm64] [--out FOLDER] [--emulator]
                                    [--headers FOLDER] [--library FILE] [--compiler COMMAND]

What is missing (headers, a compiler for AArch64, its ONNX Runtime, qemu-user) is fetched by apt and pip as they are
configured here, into build/native/cache, and nothing is installed. Not covered: Android (README.md has the steps).
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtimes.native.packages import (
    HEADER,
    BuildError,
    arm64_library,
    cross_compiler,
    fetch_emulator,
    header_folder,
    host_architecture,
    run,
)

SOURCES = Path(__file__).resolve().parent
FOLDER = Path("build/native")
TARGETS = ("host", "linux-arm64")
PROGRAM, LIBRARY = "smolport-run", "libonnxruntime.so.1"
LEAST_API = 21
FLAGS = ("-std=c++17", "-O2", "-g1", "-Wall", "-Wextra", "-Wshadow", "-pthread")
STATIC = ("-static-libstdc++", "-static-libgcc")  # a device may have an older one
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@dataclass(frozen=True)
class Built:
    """A folder with the program and ONNX Runtime's library; `sysroot`: for an emulator's -L, None on the host."""

    folder: Path
    sysroot: Path | None

    @property
    def program(self) -> Path:
        """The program's file."""
        return self.folder / PROGRAM

    def emulated(self, emulator: Path, cpu: str) -> list[str]:
        """The command that runs the program on a CPU that qemu-user shows, such as cortex-a76."""
        return [str(emulator), "-cpu", cpu, *(["-L", str(self.sysroot)] if self.sysroot else []), str(self.program)]


def build(
    target: str = "host",
    out: Path | None = None,
    *,
    headers: Path | None = None,
    library: Path | None = None,
    compiler: Sequence[str] | None = None,
    sanitize: bool = False,
    fetch: bool = True,
    cache: Path = FOLDER / "cache",
) -> Built:
    """Compiles the runner and puts the library beside it; both replace what was there.

    Args:
        target: "host" or "linux-arm64".
        out: the folder; None: build/native/TARGET.
        headers: the folder of onnxruntime_c_api.h, of API level 21 or later, in place of the pinned one.
        library: ONNX Runtime's shared library, in place of that of the installed package's version.
        compiler: a command, in place of g++ or clang++; for another target a cross compiler.
        sanitize: with address and undefined-behaviour checks that end the program.
        fetch: get what is missing; otherwise that is an error.
        cache: where fetched packages stay.

    Raises:
        BuildError: if something is missing and cannot be fetched, or does not compile.
    """
    out = out or FOLDER / target
    sysroot = None
    if target == "host":
        command = list(compiler or _host_compiler())
    elif target == "linux-arm64":
        if compiler:
            command = list(compiler)
        else:
            command, sysroot = cross_compiler(cache, fetch)
    else:
        raise BuildError(f"target is {target}, want one of {', '.join(TARGETS)}")
    include = _own_headers(headers) if headers else header_folder(cache, fetch)
    source = library or (_host_library() if target == "host" else arm64_library(cache, engine_version(), fetch))
    if not source.is_file():
        raise BuildError(f"{source}: is no file, want ONNX Runtime's shared library")
    out.mkdir(parents=True, exist_ok=True)
    shared, program = out / LIBRARY, out / PROGRAM
    half = out / f".{PROGRAM}.partial"
    shutil.copyfile(source, out / f".{LIBRARY}.partial")
    (out / f".{LIBRARY}.partial").replace(shared)
    digest = f'-DSMOLPORT_SOURCE_SHA256="{source_sha256()}"'
    extra = SANITIZE if sanitize else STATIC
    link = [str(shared), "-Wl,-rpath,$ORIGIN", "-Wl,--allow-shlib-undefined"]
    run(
        [*command, *FLAGS, *extra, digest, f"-I{include}", str(SOURCES / "main.cpp"), *link, "-o", str(half)],
        f"{SOURCES / 'main.cpp'} for {target}",
    )
    half.replace(program)
    return Built(out, sysroot)


def source_sha256() -> str:
    """Over the runner's source files, name and content, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def engine_version() -> str:
    """The version of the installed onnxruntime package. Raises BuildError without one."""
    try:
        return importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError as exc:
        raise BuildError("the onnxruntime package is not installed; give a library with --library") from exc


def _host_library() -> Path:
    spec = importlib.util.find_spec("onnxruntime")
    folder = Path(spec.origin).parent / "capi" if spec and spec.origin else Path("onnxruntime/capi")
    found = sorted(folder.glob("libonnxruntime.so.*"))
    if not found:
        raise BuildError(f"{folder}: holds no libonnxruntime.so.*; give a library with --library")
    return found[-1]


def _host_compiler() -> list[str]:
    for command in ("g++", "clang++"):
        if shutil.which(command):
            return [command]
    raise BuildError("no C++ compiler: install g++ or clang++, or give one with --compiler")


def _own_headers(folder: Path) -> Path:
    path = folder / HEADER
    try:
        level = re.search(r"^#define ORT_API_VERSION (\d+)", path.read_text("utf-8", errors="replace"), re.MULTILINE)
    except OSError as exc:
        raise BuildError(f"{path}: cannot be read: {exc.strerror}") from exc
    if not level or int(level[1]) < LEAST_API:
        raise BuildError(f"{path}: API level is {level[1] if level else 'not stated'}, want {LEAST_API} or later")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m runtimes.native.build", description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, default="host", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"default: {FOLDER}/TARGET")
    parser.add_argument("--headers", type=Path, metavar="FOLDER", help=f"of {HEADER}; default: fetched, 1.21.0")
    parser.add_argument("--library", type=Path, metavar="FILE", help="ONNX Runtime; default: the installed version's")
    parser.add_argument(
        "--compiler", metavar="COMMAND", help="default: $CXX, g++, clang++; a cross compiler is fetched"
    )
    parser.add_argument(
        "--emulator", action="store_true", help="also have qemu-user at hand, which `test-devices` uses"
    )
    parser.add_argument("--sanitize", action="store_true", help="with address and undefined-behaviour checks")
    args = parser.parse_args()
    compiler = args.compiler or (os.environ.get("CXX") if args.target == "host" else None)
    try:
        done = build(
            args.target,
            args.out,
            headers=args.headers,
            library=args.library,
            compiler=shlex.split(compiler) if compiler else None,
            sanitize=args.sanitize,
        )
        if args.emulator and host_architecture() != "aarch64":
            print(fetch_emulator(FOLDER / "cache"))
    except BuildError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    print(done.program)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
