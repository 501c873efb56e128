"""Compiles the Kotlin port with a test server around it, once for each state of the sources, and asks it questions."""

import base64
import hashlib
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [ROOT / "runtimes" / "kotlin" / "src", ROOT / "tests" / "kotlin"]
BUILD = ROOT / "build" / "kotlin"
JAVA = 17
# No answer from a registry is a missing need; anything else that npm says is a fault of the lock file.
UNREACHABLE = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH", "ERR_SOCKET_TIMEOUT")

F32 = npt.NDArray[np.float32]


def class_path() -> str:
    """The compiled port and Kotlin's library; skips, with the reason, where a tool is missing."""
    java, npm = shutil.which("java"), shutil.which("npm")
    if java is None or npm is None:
        pytest.skip(f"{'npm' if java else 'Java'} is not installed: the Kotlin port is not compiled")
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=True).stderr
    version = said.partition('"')[2].partition(".")[0]
    if not version.isdigit() or int(version) < JAVA:
        pytest.skip(f"Java is {said.splitlines()[0]}, the Kotlin port wants {JAVA}: it is not compiled")
    library = _compiler(npm)
    files = sorted(path for folder in SOURCES for path in folder.glob("*.kt"))
    lock = SOURCES[1] / "package-lock.json"
    digest = hashlib.sha256()
    for path in [*files, lock]:
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    jar = BUILD / f"{digest.hexdigest()[:16]}.jar"
    if not jar.exists():
        half = jar.with_suffix(".partial.jar")
        names = ("kotlin-compiler", "kotlin-stdlib", "kotlin-script-runtime", "kotlin-reflect", "annotations-13.0")
        jars = ":".join(str(library / f"{name}.jar") for name in names)
        # One tier of the JIT: the compiler is done before the other one pays.
        start = [java, "-Xmx1g", "-XX:TieredStopAtLevel=1", "-cp", jars, "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler"]
        options = ["-jvm-target", str(JAVA), "-Werror", "-progressive", "-no-reflect", "-kotlin-home", library.parent]
        command = [*map(str, [*start, *options, "-d", half, *files])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        for old in BUILD.glob("*.jar"):
            if old != half:
                old.unlink()
        half.rename(jar)
    return f"{jar}:{library / 'kotlin-stdlib.jar'}"


def _compiler(npm: str) -> Path:
    """The folder of the locked compiler's jars."""
    folder = BUILD / "compiler"
    lock, installed = SOURCES[1] / "package-lock.json", folder / "node_modules" / ".package-lock.json"
    if not installed.exists() or (folder / lock.name).read_bytes() != lock.read_bytes():
        folder.mkdir(parents=True, exist_ok=True)
        for name in (lock.name, "package.json"):
            shutil.copyfile(SOURCES[1] / name, folder / name)
        patience = ["--fetch-retries=2", "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=5000"]
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", *patience]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
        if reason := next((code for code in UNREACHABLE if done.returncode != 0 and code in done.stderr), None):
            pytest.skip(f"no package registry answers npm ({reason}): the Kotlin port is not compiled")
        assert done.returncode == 0, done.stderr
    return folder / "node_modules" / "kotlin-compiler" / "lib"


class PortError(Exception):
    """What the port refused, in its own words."""


class Port:
    """The port in one JVM that answers questions; see tests/kotlin/Serve.kt."""

    def __init__(self, classes: str) -> None:
        command = ["java", "-Xmx1g", "-cp", classes, "smolport.test.ServeKt"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str, **fields: Any) -> Any:
        """The answer to one request. Raises PortError where the port refuses."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": what} | fields) + "\n")
        self._process.stdin.flush()
        reply = json.loads(self._process.stdout.readline())
        assert "crash" not in reply, reply["crash"]
        if "error" in reply:
            raise PortError(reply["error"])
        return reply["answer"]

    def close(self) -> None:
        """Ends the JVM."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


def encoded(data: bytes | npt.NDArray[Any]) -> str:
    """Bytes, or an array's, for a request."""
    return base64.b64encode(data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()).decode()


def floats(text: str) -> F32:
    """The numbers in an answer."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


def same_bytes(answer: dict[str, Any], wanted: npt.NDArray[np.uint8]) -> None:
    """Asserts that the bytes of an answer are those of an array, and says where they are not."""
    flat = np.ascontiguousarray(wanted).reshape(-1)
    assert answer["size"] == flat.size
    if answer["bytes"] is not None:
        found = np.frombuffer(base64.b64decode(answer["bytes"]), dtype=np.uint8)
        wrong = np.flatnonzero(found != flat)
        assert not wrong.size, f"{wrong.size} of {flat.size} bytes, first at {wrong[0]}: {found[wrong[0]]}"
    assert answer["sha256"] == hashlib.sha256(flat.tobytes()).hexdigest()


def bits(value: float) -> int:
    """A float64 as the signed integer of its bits."""
    return int(np.float64(value).view(np.int64))


def doubles(values: Sequence[float]) -> list[int]:
    """The same of each."""
    return [bits(v) for v in values]
