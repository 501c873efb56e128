"""What no software can beat on this machine: the time that a bundle's bytes and operations take at the measured peaks.

    python -m benchmarks.limits BUNDLE [--threads 2] [--prefill-tokens 512] [--decode-at 0] [--tokens 1150 --tiles 13]

Three peaks are measured: bytes read from memory, products of u8 and s8, and of fp32 (ONNX Runtime's, large matrices).
A token reads every weight of the decoder and the cache once; a prompt's products and the tower's are integers where the
recipe makes them so, attention is fp32. What takes longer, bytes or operations, is the limit. Not covered: norms,
activation functions and all else that is neither.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from runtimes.bundle import read_bundle
from runtimes.manifest import BundleError, Manifest
from runtimes.memory import CONNECTOR, EMBED, HEAD, VISION, data_bytes, matrix_shapes

READ_BYTES = 1 << 26  # a thread's, beyond its share of any cache
REPEATS = 5


@dataclass(frozen=True)
class Machine:
    """Peaks of so many threads: bytes, integer operations, fp32 operations a second."""

    threads: int
    read: float
    int8: float
    fp32: float


def measure_machine(threads: int) -> Machine:
    """The best of REPEATS of each, after one that does not count; a second or two."""
    array = np.ones((threads, READ_BYTES // 8), dtype=np.float64)
    with ThreadPoolExecutor(threads) as pool:
        read = array.nbytes / _best(lambda: list(pool.map(np.max, array)))
    x, y, z = 512, 2048, 2048
    rng = np.random.default_rng(0)
    operations = 2 * x * y * z
    weights = rng.integers(-127, 128, (y, z), dtype=np.int8)
    left = rng.integers(0, 256, (x, y), dtype=np.uint8)
    run = _session("MatMulInteger", weights, TensorProto.UINT8, TensorProto.INT32, threads)
    int8 = operations / _best(lambda: run(left))
    floats = left.astype(np.float32)
    run = _session("MatMul", weights.astype(np.float32), TensorProto.FLOAT, TensorProto.FLOAT, threads)
    fp32 = operations / _best(lambda: run(floats))
    return Machine(threads, read, int8, fp32)


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _session(op: str, weights: np.ndarray, given: int, gives: int, threads: int) -> Callable[[np.ndarray], object]:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"])],
        op,
        [value("x", given, [None, weights.shape[0]])],
        [value("y", gives, [None, weights.shape[1]])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})


@dataclass(frozen=True)
class Work:
    """What a bundle has to do.

    weights: bytes of the decoder's data, read for each token (or chunk).
    cache: bytes of keys and values that a token in the cache takes, read for each further one.
    token, tile: integer and fp32 operations of the matrices, without the head.
    head: of the head, once a prompt.
    attention: fp32 operations of a token for each one that it attends to.
    """

    weights: int
    cache: int
    token: tuple[int, int]
    head: tuple[int, int]
    tile: tuple[int, int]
    attention: int


def bundle_work(manifest: Manifest, config: Mapping[str, Any], files: Mapping[str, int]) -> Work:
    """Counts it. Arguments and errors as `runtimes.memory.predict`."""
    text, vision = config["text_config"], config["vision_config"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    wide = vision["hidden_size"] * config["scale_factor"] ** 2
    sums = {"token": [0, 0], "head": [0, 0], "tile": [0, 0]}
    shapes = matrix_shapes(manifest, config)
    if HEAD not in shapes:  # tied
        shapes = {HEAD: (manifest.text.vocab, manifest.text.hidden)} | shapes
    for name, shape in shapes.items():
        if name == EMBED:
            continue
        scheme = manifest.recipe.tensors.get(name) or manifest.recipe.tensors[EMBED]
        kind = "tile" if name.startswith((VISION, CONNECTOR)) else "head" if name == HEAD else "token"
        count = 2 * prod(shape) * (patches if kind == "tile" else 1)
        if name.startswith(CONNECTOR):
            count = 2 * wide * manifest.text.hidden * manifest.image.tokens_per_tile
        sums[kind][scheme["scheme"] == "float"] += count
    sums["tile"][1] += 2 * patches * 3 * vision["patch_size"] ** 2 * vision["hidden_size"]
    sums["tile"][1] += 4 * vision["num_hidden_layers"] * patches**2 * vision["hidden_size"]
    kv = manifest.text
    return Work(
        weights=data_bytes(files, "decoder_model_merged"),
        cache=8 * kv.layers * kv.kv_heads * kv.head_dim,
        token=(sums["token"][0], sums["token"][1]),
        head=(sums["head"][0], sums["head"][1]),
        tile=(sums["tile"][0], sums["tile"][1]),
        attention=4 * kv.layers * text["num_attention_heads"] * kv.head_dim,
    )


def limits_ms(
    work: Work, machine: Machine, *, prefill: int, decode_at: int, tiles: int, tokens: int
) -> dict[str, float]:
    """The least ms of each phase: a tile, a prompt of `prefill` tokens, a token after `decode_at`, and the first one
    after `tiles` tiles and `tokens` tokens."""

    def take(operations: tuple[int, int]) -> float:
        return operations[0] / machine.int8 + operations[1] / machine.fp32

    def prompt(count: int) -> float:
        products = count * take(work.token) + take(work.head)
        return max(products + work.attention * count * count / 2 / machine.fp32, work.weights / machine.read)

    read = (work.weights + work.cache * decode_at) / machine.read
    products = take(work.token) + take(work.head) + work.attention * decode_at / machine.fp32
    found = {"prefill": prompt(prefill), "decode": max(read, products), "first_token": prompt(tokens)}
    if tiles:
        found = {"image": take(work.tile)} | found
        found["first_token"] += tiles * found["image"]
    return {name: 1000 * seconds for name, seconds in found.items()}


def main() -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=(__doc__ or "").splitlines()[0])
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle")
    command.add_argument("--threads", type=int, default=2, metavar="N", help="%(default)s")
    for name, value, text in (
        ("--prefill-tokens", 512, "of a prompt"),
        ("--decode-at", 0, "cached tokens"),
        ("--tiles", 13, "of the picture of the first token"),
        ("--tokens", 1150, "of its prompt"),
    ):
        command.add_argument(name, type=int, default=value, metavar="N", help=f"{text} (%(default)s)")
    args = command.parse_args()
    try:
        bundle = read_bundle(args.bundle, allow_pending=True)
        files = {entry.path: entry.size for entry in bundle.manifest.files}
        work = bundle_work(bundle.manifest, bundle.json("config.json"), files)
    except BundleError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    machine = measure_machine(args.threads)
    sizes = {"prefill": args.prefill_tokens, "decode_at": args.decode_at, "tiles": args.tiles, "tokens": args.tokens}
    limits = limits_ms(work, machine, **sizes)
    print(json.dumps({"machine": asdict(machine), "work": asdict(work), "sizes": sizes, "limits_ms": limits}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
