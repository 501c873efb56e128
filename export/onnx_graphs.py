"""The three graphs of an ONNX bundle: written with their data, or as fp32-compute twins over that data."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from export.onnx_ops import SHARD_BYTES, DataFile, OnnxOps, stored_index
from export.smolvlm import EMBED, HEAD, TEXT, VISION, decoder, vision_tower
from export.spec import CheckpointError, ModelSpec
from export.weights import WeightSource
from quantize.recipe import Recipe, Scheme

GRAPHS = ("embed_tokens", "vision_encoder", "decoder_model_merged")
SUFFIXES = {"fp32": "", "q8": "_quantized", "q4": "_q4"}  # transformers.js: dtype -> end of the file name


def graph_dtypes(spec: ModelSpec, recipe: Recipe) -> dict[str, str]:
    """transformers.js dtype of each graph: fp32, q8 or q4, by the fewest bits among its matrices."""
    probes = {
        "embed_tokens": [EMBED],
        "vision_encoder": [f"{VISION}.encoder.layers.{i}.mlp.fc1.weight" for i in range(spec.vision.layers)],
        "decoder_model_merged": [f"{TEXT}.layers.{i}.mlp.up_proj.weight" for i in range(spec.text.layers)]
        + [EMBED if spec.text.tied else HEAD],
    }
    names = {32: "fp32", 8: "q8", 4: "q4"}
    return {graph: names[min(recipe.scheme(t).bits for t in tensors)] for graph, tensors in probes.items()}


def graph_file(graph: str, dtype: str) -> str:
    """File name of a graph, as transformers.js looks it up."""
    return f"{graph}{SUFFIXES[dtype]}.onnx"


def _build(graph: str, ops: OnnxOps, spec: ModelSpec) -> None:
    match graph:
        case "embed_tokens":
            ops.embedding(EMBED)
        case "vision_encoder":
            tower = lambda tile: vision_tower(ops, spec, tile)  # noqa: E731  # one expression, used once
            ops.tiles(spec.vision, tower, spec.tokens_per_tile, spec.text.hidden)
        case "decoder_model_merged":
            logits = decoder(ops, spec, ops.begin_decoder(spec.text))
            ops.output(logits, "logits", ["batch_size", "logits_length", spec.text.vocab])


@dataclass(frozen=True)
class Written:
    """How each matrix was stored, and how many data files each graph has, by its file's name."""

    used: dict[str, Scheme]
    data_files: dict[str, int]


def write_graphs(
    folder: Path,
    spec: ModelSpec,
    weights: WeightSource,
    recipe: Recipe,
    progress: Callable[[str], None],
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Quantizes and writes the graphs and their external data into `folder`, files smaller than `shard_bytes`."""
    if spec.text.head_dim % 16:
        raise CheckpointError(
            f"config.json: text head width is {spec.text.head_dim}, ONNX Runtime wants a multiple of 16"
        )
    used: dict[str, Scheme] = {}
    data_files = {}
    for graph, dtype in graph_dtypes(spec, recipe).items():
        path = folder / graph_file(graph, dtype)
        progress(f"writing {path.name}")
        data = DataFile(path.with_name(path.name + "_data"), shard_bytes=shard_bytes)
        try:
            ops = OnnxOps(graph, weights, recipe, data=data)
            _build(graph, ops, spec)
            ops.finish(path)
        finally:
            data.close()
        used |= ops.used
        data_files[path.name] = len(data.files)
    return Written(used, data_files)


def check_graphs(folder: Path, spec: ModelSpec, weights: WeightSource, recipe: Recipe) -> list[str]:
    """Makes every graph and tensor again and names what in `folder` is different, byte for byte."""
    different = []
    for graph, dtype in graph_dtypes(spec, recipe).items():
        path = folder / graph_file(graph, dtype)
        data = DataFile(path.with_name(path.name + "_data"), written=stored_index(path))
        try:
            ops = OnnxOps(graph, weights, recipe, data=data)
            _build(graph, ops, spec)
        finally:
            data.close()
        different += [f"{data.index[name].file}: tensor {name}" for name in data.different]
        with tempfile.TemporaryDirectory() as scratch:
            again = Path(scratch) / path.name
            ops.finish(again)
            if again.read_bytes() != path.read_bytes():
                different.append(f"{path.name}: the graph")
    return different


def twin_graph(graph: str, folder: Path, spec: ModelSpec, weights: WeightSource, recipe: Recipe) -> bytes:
    """The fp32-compute twin of a written graph, as model bytes that refer to the data in `folder`."""
    path = folder / graph_file(graph, graph_dtypes(spec, recipe)[graph])
    ops = OnnxOps(graph, weights, recipe, index=stored_index(path))
    _build(graph, ops, spec)
    with tempfile.TemporaryDirectory() as scratch:
        twin = Path(scratch) / "twin.onnx"
        ops.finish(twin)
        return twin.read_bytes()
