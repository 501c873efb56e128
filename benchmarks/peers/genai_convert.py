"""A checkpoint's text model for onnxruntime-genai, by its own builder: int4 for the CPU.

    python -m benchmarks.peers.genai_convert CHECKPOINT OUT [block_size=128 ...]      in the environment of genai.txt

The builder holds the model in fp32: 13 to 15 GB for the 2.2B. The vision tower is not converted: the builder knows none
of this family.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.checkpoint import write_llama


def convert(checkpoint: Path, out: Path, options: Sequence[str]) -> None:
    """Writes the model into the existing folder `out`."""
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        text = Path(name)
        write_llama(checkpoint, text)
        (text / "cache").mkdir()
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(text), "-o", str(out)]
        command += ["-p", "int4", "-e", "cpu", "-c", str(text / "cache")]
        command += ["--extra_options", *options] if options else []
        subprocess.run(command, check=True)  # noqa: S603  # the installed builder


def main() -> int:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.genai_convert", description=summary)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="an existing folder")
    parser.add_argument("options", nargs="*", help="of the builder, as NAME=VALUE")
    args = parser.parse_args()
    convert(args.checkpoint, args.out, args.options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
