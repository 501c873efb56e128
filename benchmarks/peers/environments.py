"""A peer's environment and the checkpoint converted for it: made once, kept under one folder for the next time."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SAMPLE = 1 << 16  # bytes of a file of weights that its digest covers, beside its header

# Prints what is installed, as {name: version}.
INSTALLED = (
    "import json, importlib.metadata as m; "
    "print(json.dumps({d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}))"
)


class PeerError(RuntimeError):
    """A peer cannot be installed, does not take the checkpoint, or fails when it runs."""


def pins(peer: str, folder: Path = HERE) -> dict[str, str]:
    """{package: version} of a peer's requirements. Raises ValueError for a line that pins nothing."""
    found = {}
    for line in (folder / f"{peer}.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            name, equals, version = line.partition("==")
            if not equals:
                raise ValueError(f"{peer}.txt: {line!r} pins no version")
            found[name.lower().replace("_", "-")] = version
    return found


def run(command: Sequence[str | Path], what: str, text: str | None = None) -> str:
    """A program's stdout, run from the top of the checkout. Raises PeerError with the end of what it said."""
    done = subprocess.run(  # noqa: S603  # our modules and pip
        [str(word) for word in command], input=text, cwd=ROOT, capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-6:]
        raise PeerError(f"{what}: exit code {done.returncode}: " + "\n  ".join(line[-300:] for line in said))
    return done.stdout


def ensure_environment(peer: str, work: Path) -> Path:
    """The Python of a peer's environment, which is made where it is not, or holds other versions.

    Raises:
        PeerError: if something cannot be installed.
    """
    folder = work / peer
    python, wanted = folder / "bin" / "python", pins(peer)
    if not python.exists():
        run([sys.executable, "-m", "venv", folder], f"{peer}: environment")
    if not _lacking(python, wanted):
        return python
    pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--no-deps", "--requirement", HERE / f"{peer}.txt"], f"{peer}: install")
    if lacking := _lacking(python, wanted):
        raise PeerError(f"{peer}: after the install there is no {', '.join(lacking)}")
    return python


def _lacking(python: Path, wanted: dict[str, str]) -> list[str]:
    found = json.loads(run([python, "-c", INSTALLED], "list of packages"))
    return [f"{name}=={v}" for name, v in wanted.items() if found.get(name, "").partition("+")[0] != v]


def checkpoint_digest(folder: Path) -> str:
    """A name for a checkpoint, hex: of its settings, and of each file of weights the header and the first bytes.

    Raises:
        PeerError: if there is no config.json, or no weights.
    """
    digest = hashlib.sha256()
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        raise PeerError(f"{folder}: want a checkpoint: config.json and *.safetensors")
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        digest.update((folder / name).read_bytes() if (folder / name).exists() else b"")
    for path in weights:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            digest.update(file.read(length + SAMPLE))
        digest.update(str(path.stat().st_size).encode())
    return digest.hexdigest()


def converted_folder(peer: str, checkpoint: Path, options: Sequence[str], work: Path) -> Path:
    """Where a conversion is kept: another checkpoint, version, option or converter has another place."""
    key = hashlib.sha256(json.dumps([checkpoint_digest(checkpoint), *options]).encode())
    for path in (HERE / f"{peer}.txt", HERE / f"{peer}_convert.py", HERE / "checkpoint.py"):
        key.update(path.read_bytes())
    return work / "converted" / f"{peer}-{key.hexdigest()[:16]}"


def ensure_converted(peer: str, python: Path, checkpoint: Path, options: Sequence[str], work: Path) -> Path:
    """The folder of the checkpoint converted for a peer, by `<peer>_convert` in its environment if it is not there.

    Raises:
        PeerError: if the conversion fails; nothing is left then.
    """
    out = converted_folder(peer, checkpoint, options, work)
    if out.exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f"{peer}-", suffix=".partial", dir=out.parent))
    try:
        run(
            [python, "-m", f"benchmarks.peers.{peer}_convert", checkpoint.resolve(), stage, *options],
            f"{peer}: convert",
        )
        os.replace(stage, out)  # noqa: PTH105  # refuses a folder that holds something
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return out
