"""The operations of `smolvlm.py` as ONNX for ONNX Runtime, weights streamed to external data.

Operators outside the ONNX standard are ONNX Runtime's (domain com.microsoft; definitions in its
ContribOperators.md). A *twin* is the same graph over the same bytes with fp32 compute: integers are
dequantized, then multiplied.
"""

import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export.smolvlm import VISION, stacked_name
from export.spec import CheckpointError, TextSpec, VisionSpec, position_ids, rope_tables
from export.weights import WeightSource, block_tensors, column_tensors
from quantize.int4 import QTensor, pack
from quantize.recipe import Recipe, Scheme

OPSETS = {"": 21, "com.microsoft": 1}
MS = "com.microsoft"
LEAST_ENGINE = "1.23"  # 8-bit GatherBlockQuantized
PAGE = 1 << 16  # large tensors start on this boundary, so that every system can map them
LARGE = 1 << 20
SHARD_BYTES = 2_000_000_000  # a data file stays below: what browsers, file systems and 32-bit offsets can take
Array = npt.NDArray[np.generic]
DTYPES = {
    "float32": ir.DataType.FLOAT,
    "uint8": ir.DataType.UINT8,
    "int8": ir.DataType.INT8,
    "int64": ir.DataType.INT64,
    "int32": ir.DataType.INT32,
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in the external data."""

    file: str  # beside the graph

    dtype: ir.DataType
    shape: tuple[int, ...]
    offset: int
    length: int


class DataFile:
    """External data: tensors one after the other, large ones on page boundaries; a full file is followed by another.

    The files are `path`, then `path` with `_1`, `_2`, ... behind it, as transformers.js counts them.

    Args:
        path: the first file; made, as all of them, and an existing one is an error.
        shard_bytes: every file is smaller.
        written: read existing files instead, and compare what would be written with what is there; the index of
            their graph, which says where a file ended and the next one began.
    """

    def __init__(
        self, path: Path, *, shard_bytes: int = SHARD_BYTES, written: Mapping[str, Stored] | None = None
    ) -> None:
        self.path, self._limit, self._written = path, shard_bytes, written
        self.index: dict[str, Stored] = {}
        self.different: list[str] = []  # with `written`: tensors that are not what they should be
        self.files: list[str] = []
        self._file = self._open()

    def write(self, name: str, array: Array) -> None:
        if name in self.index:
            raise ValueError(f"{self.path.name}: the tensor {name} is written twice")
        array = np.ascontiguousarray(array)
        if sys.byteorder == "big":
            array = array.byteswap()
        align = PAGE if array.nbytes >= LARGE else 64
        offset = -(-self._file.tell() // align) * align
        if self._written is None and array.nbytes >= self._limit:
            raise CheckpointError(f"{name} takes {array.nbytes:,} bytes, and a data file has less than {self._limit:,}")
        if self._is_for_the_next(name, offset + array.nbytes):
            self._file.close()
            self._file, offset = self._open(), 0
        self._file.seek(offset)
        content = array.reshape(-1).view(np.uint8).data
        if self._written is None:
            self._file.write(content)
        elif self._file.read(array.nbytes) != content:
            self.different.append(name)
        self._file.seek(offset + array.nbytes)
        self.index[name] = Stored(self.files[-1], DTYPES[array.dtype.name], array.shape, offset, array.nbytes)

    def _is_for_the_next(self, name: str, end: int) -> bool:
        """Whether a tensor that would end at `end` is the first of another file."""
        if self._written is not None:
            return name in self._written and self._written[name].file == data_name(self.path.name, len(self.files))
        return end >= self._limit

    def _open(self) -> BinaryIO:
        path = self.path.with_name(data_name(self.path.name, len(self.files)))
        self.files.append(path.name)
        if self._written is None:
            return path.open("xb")
        return path.open("rb") if path.is_file() else io.BytesIO()  # every tensor of a missing file is different

    def close(self) -> None:
        self._file.close()


def data_name(first: str, number: int) -> str:
    """The name of a graph's data file `number`, from 0; `first` is that of the first."""
    return f"{first}_{number}" if number else first


def stored_index(graph: Path) -> dict[str, Stored]:
    """The external tensors of a saved graph, by initializer name."""
    index = {}
    for name, value in ir.load(graph).graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            shape = tuple(int(d) for d in tensor.shape.numpy())
            index[name] = Stored(str(tensor.location), tensor.dtype, shape, tensor.offset or 0, tensor.length or 0)
    return index


class OnnxOps:
    """Builds one graph; `finish` saves it.

    Args:
        weights, recipe: where tensors come from and in which format they are stored.
        data: written as the graph is built; None for a twin.
        index: for a twin, the tensors already written (from `stored_index`).
    """

    def __init__(
        self,
        name: str,
        weights: WeightSource,
        recipe: Recipe,
        *,
        data: DataFile | None = None,
        index: dict[str, Stored] | None = None,
    ) -> None:
        if (data is None) == (index is None):
            raise ValueError("give a data file to write, or the index of one that is written")
        self.name, self.weights, self.recipe = name, weights, recipe
        self._data, self._index, self.twin = data, index, index is not None
        self._root: list[ir.Node] = []
        self.nodes = self._root
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}
        self._counts: dict[str, int] = {}
        self.used: dict[str, Scheme] = {}  # matrix name -> how it was stored
        self._decoder: dict[str, ir.Value] = {}  # values that all layers of a decoder share

    # --- nodes, constants, tensors

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, object] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        return self.node_n(op, inputs, attributes, domain=domain, outputs=outputs, dtype=dtype)[0]

    def node_n(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, object] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
        dtype: ir.DataType | None = None,
    ) -> Sequence[ir.Value]:
        count = self._counts[op] = self._counts.get(op, -1) + 1
        name = f"{self.name}/{op}_{count}"
        values = [ir.val(f"{name}/{i}", dtype=dtype) for i in range(outputs)]
        self.nodes.append(ir.node(op, inputs, attributes, domain=domain, outputs=values, name=name))  # type: ignore[arg-type]  # attributes are plain values
        return values

    def constant(self, name: str, array: Array) -> ir.Value:
        """A small initializer inside the graph file; the same name is the same value."""
        if name not in self._initializers:
            value = ir.val(name, const_value=ir.tensor(array, name=name))
            self._initializers[name] = value
        return self._initializers[name]

    def ints(self, *numbers: int) -> ir.Value:
        return self.constant("ints_" + "_".join(map(str, numbers)), np.array(numbers, dtype=np.int64))

    def tensors(self, names: Sequence[str], make: Callable[[], Sequence[Array]]) -> list[ir.Value]:
        """Initializers in external data; `make` computes them all, and only if they are not written yet."""
        if names[0] not in self._initializers:
            if self._data is not None:
                for name, array in zip(names, make(), strict=True):
                    self._data.write(name, array)
            index = self._data.index if self._data is not None else self._index
            assert index is not None
            for name in names:
                if name not in index:
                    raise ValueError(f"{self.name}: its data holds no tensor {name}")
                s = index[name]
                tensor = ir.ExternalTensor(s.file, s.offset, s.length, s.dtype, shape=ir.Shape(s.shape), name=name)
                self._initializers[name] = ir.val(name, dtype=s.dtype, shape=s.shape, const_value=tensor)
        return [self._initializers[name] for name in names]

    def vector(self, name: str) -> ir.Value:
        return self.tensors([name], lambda: [self.weights[name]])[0]

    @contextmanager
    def subgraph(self) -> Iterator[list[ir.Node]]:
        """Nodes made inside go to the list; initializers stay with the outer graph."""
        outer, self.nodes = self.nodes, []
        try:
            yield self.nodes
        finally:
            self.nodes = outer

    # --- linear layers

    def linear(self, x: ir.Value, weights: Sequence[str], biases: Sequence[str] = ()) -> ir.Value:
        schemes = [self.recipe.scheme(name) for name in weights]
        if any(s != schemes[0] for s in schemes):
            parts = self.linears(x, weights, biases)
            return self.node("Concat", parts, {"axis": -1}, dtype=ir.DataType.FLOAT)
        self.used.update(dict.fromkeys(weights, schemes[0]))
        title = stacked_name(weights)
        bias = None
        if biases:
            bias_title = title.removesuffix(".weight") + ".bias"
            bias = self.tensors([bias_title], lambda: [np.concatenate([self.weights[b] for b in biases])])[0]
        match schemes[0].format:
            case "block":
                return self._linear_block(x, title, weights, bias, schemes[0])
            case "column":
                return self._linear_column(x, title, weights, bias, schemes[0])
        matrix = self.tensors([f"{title}.t"], lambda: [np.concatenate([self.weights[w] for w in weights]).T])[0]
        return self._plus(self.node("MatMul", [x, matrix], dtype=ir.DataType.FLOAT), bias)

    def linears(self, x: ir.Value, weights: Sequence[str], biases: Sequence[str] = ()) -> list[ir.Value]:
        return [self.linear(x, [w], biases[i : i + 1]) for i, w in enumerate(weights)]

    def _plus(self, x: ir.Value, bias: ir.Value | None) -> ir.Value:
        return x if bias is None else self.node("Add", [x, bias], dtype=ir.DataType.FLOAT)

    def _linear_block(
        self, x: ir.Value, title: str, weights: Sequence[str], bias: ir.Value | None, scheme: Scheme
    ) -> ir.Value:
        """MatMulNBits: B u8 [N, blocks, bytes], scales [N, blocks], zero points packed [N, blocks * bits / 8]."""

        def make() -> list[Array]:
            parts = block_tensors(self.weights, weights, scheme)
            return [
                np.concatenate([p.packed for p in parts]),
                np.concatenate([p.scales for p in parts]).astype(np.float32),
                np.concatenate([packed_zeros(p) for p in parts]),
            ]

        q, scales, zeros = self.tensors([f"{title}.q", f"{title}.scales", f"{title}.zeros"], make)
        attributes = {
            "K": self.weights.shape(weights[0])[1],
            "N": sum(self.weights.shape(w)[0] for w in weights),
            "bits": scheme.bits,
            "block_size": scheme.block,
            "accuracy_level": 1 if self.twin else 4,  # 1: fp32 compute, 4: activations in int8
        }
        product = self.node("MatMulNBits", [x, q, scales, zeros], attributes, domain=MS, dtype=ir.DataType.FLOAT)
        return self._plus(product, bias)

    def _linear_column(
        self, x: ir.Value, title: str, weights: Sequence[str], bias: ir.Value | None, scheme: Scheme
    ) -> ir.Value:
        """u8 activations, quantized on the fly per tensor, times s8 weights [K, N]."""

        def make() -> list[Array]:
            parts = column_tensors(self.weights, weights, scheme)
            return [
                np.concatenate([p.values for p in parts]).T,
                np.concatenate([p.scales for p in parts]).astype(np.float32),
            ]

        q, scales = self.tensors([f"{title}.q", f"{title}.scales"], make)
        if self.twin:
            matrix = self._dequantized(q, scales)
            return self._plus(self.node("MatMul", [x, matrix], dtype=ir.DataType.FLOAT), bias)
        x8, x_scale, x_zero = (
            self._ranged_activation(x, weights[0]) if scheme.activations == "static" else self._quantized_activation(x)
        )
        return self.node(
            "MatMulIntegerToFloat", [x8, q, x_scale, scales, x_zero, None, bias], domain=MS, dtype=ir.DataType.FLOAT
        )

    def _dequantized(self, q: ir.Value, scales: ir.Value) -> ir.Value:
        """f32 [K, N], computed in the outermost graph: once, not for each tile."""
        inner, self.nodes = self.nodes, self._root
        try:
            return self.node("DequantizeLinear", [q, scales], {"axis": 1}, dtype=ir.DataType.FLOAT)
        finally:
            self.nodes = inner

    def _quantized_activation(self, x: ir.Value) -> Sequence[ir.Value]:
        """DynamicQuantizeLinear, once for all products of the same x."""
        for node in reversed(self.nodes):
            if node.op_type == "DynamicQuantizeLinear" and node.inputs[0] is x:
                return node.outputs
        return self.node_n("DynamicQuantizeLinear", [x], outputs=3)

    def _ranged_activation(self, x: ir.Value, weight: str) -> Sequence[ir.Value]:
        """QuantizeLinear over the range that calibration saw, once for all products of the same x."""
        for node in reversed(self.nodes):
            if node.op_type == "QuantizeLinear" and node.inputs[0] is x:
                return [node.outputs[0], *(value for value in node.inputs[1:] if value is not None)]
        low, high = self.weights.input_range(weight)
        low, high = min(low, 0.0), max(high, 0.0)  # zero is exact
        scale = np.float32((high - low) / 255 or 1)
        scales = self.constant(f"{weight}.input_scale", np.asarray(scale))
        zero = self.constant(f"{weight}.input_zero", np.asarray(np.clip(np.rint(-low / scale), 0, 255), dtype=np.uint8))
        x8 = self.node("QuantizeLinear", [x, scales, zero], dtype=ir.DataType.UINT8)
        return [x8, scales, zero]

    # --- the other operations

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.node("Add", [a, b], dtype=ir.DataType.FLOAT)

    def layer_norm(self, x: ir.Value, name: str, eps: float) -> ir.Value:
        inputs = [x, self.vector(f"{name}.weight"), self.vector(f"{name}.bias")]
        return self.node("LayerNormalization", inputs, {"axis": -1, "epsilon": eps}, dtype=ir.DataType.FLOAT)

    def rms_norm(self, x: ir.Value, weight: str, eps: float) -> ir.Value:
        # SimplifiedLayerNormalization is ONNX Runtime's, registered in the standard domain.
        attributes = {"axis": -1, "epsilon": eps, "stash_type": 1}
        inputs = [x, self.vector(weight)]
        return self.node("SimplifiedLayerNormalization", inputs, attributes, dtype=ir.DataType.FLOAT)

    def add_rms_norm(self, x: ir.Value, residual: ir.Value, weight: str, eps: float) -> tuple[ir.Value, ir.Value]:
        out = self.node_n(
            "SkipSimplifiedLayerNormalization",
            [x, residual, self.vector(weight)],
            {"epsilon": eps},
            domain=MS,
            outputs=4,  # normed, mean, inverse deviation, sum
            dtype=ir.DataType.FLOAT,
        )
        return out[0], out[3]

    def gelu(self, x: ir.Value, kind: str) -> ir.Value:
        return self.node(
            "Gelu", [x], {"approximate": "tanh" if kind == "gelu_tanh" else "none"}, dtype=ir.DataType.FLOAT
        )

    def silu_gate(self, gate: ir.Value, up: ir.Value) -> ir.Value:
        silu = self.node("QuickGelu", [gate], {"alpha": 1.0}, domain=MS, dtype=ir.DataType.FLOAT)
        return self.node("Mul", [silu, up], dtype=ir.DataType.FLOAT)

    def patch_embed(self, pixels: ir.Value, vision: VisionSpec) -> ir.Value:
        at = f"{VISION}.embeddings"
        kernel = self.tensors([f"{at}.patch_embedding.weight"], lambda: [self.weights[f"{at}.patch_embedding.weight"]])[
            0
        ]
        ids = np.asarray(position_ids(vision.grid))
        positions = self.tensors(
            [f"{at}.positions"], lambda: [self.weights[f"{at}.position_embedding.weight"][ids][None]]
        )[0]
        x = self.node("Unsqueeze", [pixels, self.ints(0)], dtype=ir.DataType.FLOAT)
        stride = [vision.patch_size, vision.patch_size]
        conv = [x, kernel, self.vector(f"{at}.patch_embedding.bias")]
        x = self.node("Conv", conv, {"kernel_shape": stride, "strides": stride}, dtype=ir.DataType.FLOAT)
        x = self.node("Reshape", [x, self.ints(1, vision.hidden, vision.patches)], dtype=ir.DataType.FLOAT)
        x = self.node("Transpose", [x], {"perm": [0, 2, 1]}, dtype=ir.DataType.FLOAT)  # [1, P, C]
        return self.add(x, positions)

    def attend_all(self, q: ir.Value, k: ir.Value, v: ir.Value, heads: int) -> ir.Value:
        return self.node("MultiHeadAttention", [q, k, v], {"num_heads": heads}, domain=MS, dtype=ir.DataType.FLOAT)

    def attend_cached(self, qkv: ir.Value, layer: int, text: TextSpec) -> ir.Value:
        shared = self._decoder
        past = [self._kv(f"past_key_values.{layer}.{part}", text, "past_sequence_length") for part in ("key", "value")]
        self.inputs += past
        cos, sin = self.tensors(["rope.cos", "rope.sin"], lambda: rope_tables(text))
        attributes = {
            "num_heads": text.heads,
            "kv_num_heads": text.kv_heads,
            "scale": float(text.head_dim**-0.5),
            "do_rotary": 1,
            "rotary_interleaved": 0,
        }
        inputs = [qkv, None, None, *past, shared["last_position"], shared["total_length"], cos, sin]
        out, key, value = self.node_n(
            "GroupQueryAttention", inputs, attributes, domain=MS, outputs=3, dtype=ir.DataType.FLOAT
        )
        for part, present in (("key", key), ("value", value)):
            present.name = f"present.{layer}.{part}"
            present.shape = ir.Shape(["batch_size", text.kv_heads, "total_sequence_length", text.head_dim])
            self.outputs.append(present)
        return out

    def _kv(self, name: str, text: TextSpec, length: str) -> ir.Value:
        return ir.val(name, dtype=ir.DataType.FLOAT, shape=["batch_size", text.kv_heads, length, text.head_dim])

    def pixel_shuffle(self, x: ir.Value, grid: int, factor: int) -> ir.Value:
        side = grid // factor
        # [1, P, C] -> rows and columns of patches, each split into (side, factor) -> the factors together
        x = self.node("Reshape", [x, self.ints(side, factor, side, factor, -1)], dtype=ir.DataType.FLOAT)
        x = self.node("Transpose", [x], {"perm": [0, 2, 1, 3, 4]}, dtype=ir.DataType.FLOAT)
        return self.node(
            "Reshape",
            [x, self.constant("tokens", np.array([1, side * side, -1], dtype=np.int64))],
            dtype=ir.DataType.FLOAT,
        )

    def last_rows(self, x: ir.Value) -> ir.Value:
        start, end = self._decoder["first_row"], self.ints(np.iinfo(np.int64).max)
        return self.node("Slice", [x, start, end, self.ints(1)], dtype=ir.DataType.FLOAT)

    # --- whole graphs

    def begin_decoder(self, text: TextSpec) -> ir.Value:
        """Declares the decoder's inputs and derives lengths from the mask; returns inputs_embeds."""
        int64 = ir.DataType.INT64
        embeds = ir.val("inputs_embeds", dtype=ir.DataType.FLOAT, shape=["batch_size", "sequence_length", text.hidden])
        mask = ir.val("attention_mask", dtype=int64, shape=["batch_size", "total_sequence_length"])
        keep = ir.val("num_logits_to_keep", dtype=int64, shape=[])
        self.inputs += [embeds, mask, keep]
        length = self.node("ReduceSum", [mask, self.ints(1)], {"keepdims": 0}, dtype=int64)
        last = self.node("Sub", [length, self.ints(1)], dtype=int64)
        total = self.node(
            "Gather",
            [self.node("Shape", [mask], dtype=int64), self.constant("one", np.array(1, np.int64))],
            dtype=int64,
        )
        # first row kept: T - n for n > 0, 0 for n = 0
        rows = self.node("Shape", [embeds], {"start": 1, "end": 2}, dtype=int64)  # [T]
        n = self.node("Reshape", [keep, self.ints(1)], dtype=int64)
        none = self.node("Equal", [n, self.ints(0)], dtype=ir.DataType.BOOL)
        tail = self.node("Max", [self.node("Sub", [rows, n], dtype=int64), self.ints(0)], dtype=int64)
        self._decoder = {
            "last_position": self.node("Cast", [last], {"to": ir.DataType.INT32.value}, dtype=ir.DataType.INT32),
            "total_length": self.node("Cast", [total], {"to": ir.DataType.INT32.value}, dtype=ir.DataType.INT32),
            "first_row": self.node("Where", [none, self.ints(0), tail], dtype=int64),
        }
        return embeds

    def embedding(self, weight: str) -> None:
        """The whole embedding graph: input_ids -> inputs_embeds."""
        vocab, hidden = self.weights.shape(weight)
        scheme = self.recipe.scheme(weight)
        self.used[weight] = scheme
        ids = ir.val("input_ids", dtype=ir.DataType.INT64, shape=["batch_size", "sequence_length"])
        self.inputs.append(ids)
        if scheme.format == "column":
            raise CheckpointError(
                f"recipe {self.recipe.name}: {weight} is in format column, an embedding wants float or block"
            )
        if scheme.format == "float":
            out = self.node("Gather", [self.vector(weight), ids], {"axis": 0}, dtype=ir.DataType.FLOAT)
        else:

            def make() -> list[Array]:
                (q,) = block_tensors(self.weights, [weight], scheme)
                flat = q.packed.reshape(vocab, -1)[:, : hidden * scheme.bits // 8]
                return [flat, q.scales.astype(np.float32), packed_zeros(q)]

            q, scales, zeros = self.tensors([f"{weight}.q", f"{weight}.scales", f"{weight}.zeros"], make)
            attributes = {
                "bits": scheme.bits,
                "block_size": scheme.block,
                "gather_axis": 0,
                "quantize_axis": 1,
            }
            out = self.node(
                "GatherBlockQuantized", [q, ids, scales, zeros], attributes, domain=MS, dtype=ir.DataType.FLOAT
            )
        self.output(out, "inputs_embeds", ["batch_size", "sequence_length", hidden])

    def tiles(self, vision: VisionSpec, tower: Callable[[ir.Value], ir.Value], tokens: int, hidden: int) -> None:
        """The whole vision graph: the tower runs tile by tile (Scan), so that activations quantized on the
        fly never depend on a tile's neighbours and memory does not grow with their number. Padding tiles,
        whose mask is all false, are dropped as the reference drops them."""
        side, boolean = vision.image_size, ir.DataType.BOOL
        shape: list[int | str | None] = ["batch_size", "num_images", 3, side, side]
        pixels = ir.val("pixel_values", dtype=ir.DataType.FLOAT, shape=shape)
        mask = ir.val("pixel_attention_mask", dtype=boolean, shape=["batch_size", "num_images", side, side])
        self.inputs += [pixels, mask]
        flat = self.node("Reshape", [pixels, self.ints(-1, 3, side, side)], dtype=ir.DataType.FLOAT)
        bits = self.node("Reshape", [mask, self.ints(-1, side * side)], dtype=boolean)
        numbers = self.node("Cast", [bits], {"to": ir.DataType.UINT8.value}, dtype=ir.DataType.UINT8)
        most = self.node("ReduceMax", [numbers, self.ints(1)], {"keepdims": 0}, dtype=ir.DataType.UINT8)
        real = self.node("Cast", [most], {"to": boolean.value}, dtype=boolean)
        kept = self.node("Compress", [flat, real], {"axis": 0}, dtype=ir.DataType.FLOAT)
        with self.subgraph() as nodes:
            tile = ir.val("tile", dtype=ir.DataType.FLOAT, shape=[3, side, side])
            features = self.node("Squeeze", [tower(tile), self.ints(0)], dtype=ir.DataType.FLOAT)  # [L, hidden]
            features.shape = ir.Shape([tokens, hidden])
        body = ir.Graph([tile], [features], nodes=nodes, name="tile")
        scan = self.node("Scan", [kept], {"num_scan_inputs": 1, "body": body}, dtype=ir.DataType.FLOAT)
        self.output(scan, "image_features", ["num_tiles", tokens, hidden])

    def output(self, value: ir.Value, name: str, shape: Sequence[int | str]) -> None:
        value.name, value.shape = name, ir.Shape(shape)
        self.outputs.insert(0, value)

    def finish(self, path: Path) -> None:
        """Saves the graph (not the data, which is written already)."""
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=list(self._initializers.values()),
            opset_imports=OPSETS,
            name=self.name,
        )
        # The cache may be one preallocated buffer, past and present at once; runtimes/ort.py uses it so.
        properties = {"smolport.kv_cache": "in_place"} if self._decoder else {}
        ir.save(ir.Model(graph, ir_version=10, producer_name="smolport", metadata_props=properties), path)


def packed_zeros(tensor: QTensor) -> npt.NDArray[np.uint8]:
    """Zero points as MatMulNBits and GatherBlockQuantized take them: u8 [N, blocks] for 8 bits; for 4 bits
    two in a byte along a row, the low nibble first, an odd last one alone."""
    zeros = tensor.zeros
    if tensor.bits == 4 and zeros.shape[1] % 2:
        zeros = np.pad(zeros, ((0, 0), (0, 1)))
    return pack(zeros, tensor.bits)
