"""What keys and values kept in 8 bits cost in answers, by the granularity of their scales.

    python -m benchmarks.kv_cache --model demo/checkpoint --data DOCUMENTS [DOCUMENTS ...] --calibration DOCUMENTS

Scales are fixed beforehand, as GroupQueryAttention of ONNX Runtime has them (k_quant_type, v_quant_type): symmetric
int8, the largest magnitude over the calibration documents is 127, what is beyond it is clipped. Every key and value is
rounded before anything attends to it, an answer's and its prompt's alike. Weights and activations are in fp32: the
rounding is simulated, no engine's cache is run. One JSON line a row (--out), and the table of `benchmarks.methods`.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.forced import Documents, Weighted
from benchmarks.methods import carry_out, command, data_sets, summary
from export.calibrate import affordable_tokens, calibration_prompts
from export.checkpoint import resolve
from export.documents import read_data
from export.processor import write_processor_files
from export.spec import ModelSpec, read_spec
from export.torch_ops import Prompts, TorchOps, run_decoder, run_vision
from export.weights import open_weights

LARGEST = {8: 127, 4: 7}
GRANULARITIES = ("channel", "tensor")  # what has a scale of its own: each channel of [G, D], or a layer's keys at all
Range = tuple[Tensor, Tensor]  # f32 [G, D] each: the largest magnitudes of a layer's keys and values


def ranges(spec: ModelSpec, tensors: Weighted, prompts: Prompts) -> dict[int, Range]:
    """The largest magnitude of each channel of each layer's keys and values over the calibration prompts."""
    found: dict[int, Range] = {}

    def observe(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found[layer] = (keys.abs().amax(0), values.abs().amax(0))
        return keys, values

    features = run_vision(TorchOps(spec, tensors, prompts))
    run_decoder(TorchOps(spec, tensors, prompts, attended=observe), features)
    return found


def rounded(x: Tensor, largest: Tensor, bits: int) -> Tensor:
    """x after a cache of so many bits; `largest` broadcasts to it and is what the last integer stands for."""
    steps = LARGEST[bits]
    scale = largest.clamp_min(torch.finfo(torch.float32).tiny) / steps
    return (x / scale).round_().clamp_(-steps - 1, steps).mul_(scale)


def cache(found: dict[int, Range], granularity: str, bits: int) -> Callable[[int, Tensor, Tensor], Range]:
    """What `TorchOps` attends to in place of full keys and values."""

    def attended(layer: int, keys: Tensor, values: Tensor) -> Range:
        of_k, of_v = (x if granularity == "channel" else x.amax() for x in found[layer])
        return rounded(keys, of_k, bits), rounded(values, of_v, bits)

    return attended


def compare(
    model: str, data: list[Path], calibration: Path, bits: list[int], progress: Callable[[str], None], limit: int | None
) -> Iterator[dict[str, Any]]:
    """Rows for every width and granularity, each data set in turn. Raises CheckpointError, DataError."""
    folder = resolve(model).folder
    spec = read_spec(folder)
    weights = open_weights(folder, spec)
    tensors = Weighted(weights)
    sets = data_sets(data, limit)
    with tempfile.TemporaryDirectory() as scratch:
        processor = Path(scratch)
        write_processor_files(folder, spec, processor, None)
        prompts, used = calibration_prompts(
            processor, read_data(calibration), affordable_tokens(spec), spec.text.max_positions
        )
        progress(f"calibration: {used.tokens} tokens")
        found = ranges(spec, tensors, prompts)
        for name, read in sets.items():
            documents = Documents(spec, weights, processor, read, progress)
            for bit in bits:
                for granularity in GRANULARITIES:
                    progress(f"{name}: {bit} bits, a scale a {granularity}")
                    got = documents.measure(tensors, vision=False, attended=cache(found, granularity, bit))
                    head = {"data": name, "bits": bit, "block": "", "method": f"a scale a {granularity}"}
                    yield head | summary(documents, got, None)


def main() -> int:
    parser = command("benchmarks.kv_cache", __doc__, "documents that fix the scales")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4], choices=sorted(LARGEST), help="default: 8 4")
    args = parser.parse_args()
    return carry_out(
        lambda progress: compare(args.model, args.data, args.calibration, args.bits, progress, args.limit), args.out
    )


if __name__ == "__main__":
    raise SystemExit(main())
