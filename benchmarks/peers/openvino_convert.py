"""A checkpoint's text model for OpenVINO, by optimum-intel: int4 weights in groups of 64, head and embedding int8.

    python -m benchmarks.peers.openvino_convert CHECKPOINT OUT      in the environment of openvino.txt

The vision tower is not converted.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.peers.checkpoint import write_llama

GROUP = 64


def convert(checkpoint: Path, out: Path) -> None:
    """Writes the model into the existing folder `out`."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        text = Path(name)
        write_llama(checkpoint, text)
        scheme = OVWeightQuantizationConfig(bits=4, sym=True, group_size=GROUP, ratio=1.0)
        model = OVModelForCausalLM.from_pretrained(text, export=True, compile=False, quantization_config=scheme)
        model.save_pretrained(out)


def main() -> int:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.openvino_convert", description=summary)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="an existing folder")
    args = parser.parse_args()
    convert(args.checkpoint, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
