"""An export that is killed, at whatever moment, leaves no bundle or the whole one, and the next export works."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from runtimes.bundle import read_bundle
from runtimes.verify import verify
from tests.conftest import LOOSE, ROOT

KILLS = 100
# The imports take longer than the export; so each one is a fork of a process that has done them.
EXPORT = """
import os, sys
from pathlib import Path
from export.android import export_android
import export.prove, onnxruntime, transformers.models.smolvlm.modeling_smolvlm
checkpoint, recipe = sys.argv[1:]
while (line := sys.stdin.readline()):
    child = os.fork()
    if not child:
        try:
            export_android(checkpoint, Path(line.strip()), recipe)
            os._exit(0)
        except BaseException as exc:
            print(repr(exc), file=sys.stderr)
            os._exit(1)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_killed_at_a_hundred_moments_an_export_leaves_nothing_or_all_of_it(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    rng = random.Random(11)
    before = tree(tiny_checkpoint)
    payload = read_bundle(tiny_bundle).manifest.payload_digest
    out = tmp_path / "bundle"
    kills = wholes = 0
    with subprocess.Popen(
        [sys.executable, "-c", EXPORT, str(tiny_checkpoint), str(LOOSE)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None

        def one(after_s: float | None) -> float:
            """An export, killed so many seconds after its begin; returns what it took."""
            nonlocal kills, wholes
            print(out, file=parent.stdin, flush=True)
            child = int(parent.stdout.readline())  # type: ignore[union-attr]
            began = time.monotonic()
            if after_s is not None:
                time.sleep(after_s)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            code = int(parent.stdout.readline())  # type: ignore[union-attr]
            took = time.monotonic() - began
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
            assert out.exists() or code != 0
            if out.exists():
                found = read_bundle(out)  # every digest
                assert (found.manifest.payload_digest, found.manifest.proof.state) == (payload, "passed")
                wholes += 1
                out.rename(tmp_path / f"whole-{wholes}")
            return took

        usual = one(None)
        while kills < KILLS:
            one(rng.uniform(0, 1.05 * usual))
        one(None)
        parent.stdin.close()
    assert wholes >= 2
    assert tree(tiny_checkpoint) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"whole-{i + 1}" for i in range(wholes))
    assert verify(read_bundle(tmp_path / f"whole-{wholes}")).passed
