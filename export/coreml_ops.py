"""The operations of `smolvlm.py` as MIL programs for Core ML, weights streamed to weight.bin.

Built with coremltools' Builder, which checks every type and shape. Its constants stand for weights that are read,
quantized and written one after the other when the program is saved, so that a whole model is never in memory.

Activations are fp16, as Core ML's GPU computes; the rotary table is fp32 and rounded after it was looked up.
Dimension letters as in `smolvlm.py`; L here is the number of rows of the KV cache.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_chatter = logging.getLogger("coremltools")
_level = _chatter.level
_chatter.setLevel(logging.ERROR)  # on Linux an import warns of everything that runs on macOS only
import coremltools
from coremltools import proto
from coremltools.converters.mil.backend.mil.helper import (
    create_file_value_tensor,
    create_immediate_value,
    types_to_proto_primitive,
)
from coremltools.converters.mil.backend.mil.load import CoreMLProtoExporter, MILProtoExporter
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813  # coremltools' own habit
from coremltools.converters.mil.mil import Function, Program, types

_chatter.setLevel(_level)

from export.smolvlm import VISION, stacked_name
from export.spec import CheckpointError, TextSpec, VisionSpec, position_ids, rope_tables
from export.weights import WeightSource, block_tensors, column_tensors, matrix_shape
from quantize.int4 import QTensor, pack, unpack
from quantize.recipe import Recipe, Scheme
from runtimes.blobfile import BlobWriter
from runtimes.mil_package import SPECIFICATION
from runtimes.milproto import BLOB_FILE

TARGET = coremltools.target.iOS18  # the first with states, multifunction packages and per-block scales
HALF_MAX = float(np.finfo(np.float16).max)
Array = npt.NDArray[Any]
Var = Any  # a value in a MIL program; coremltools has no types

BUILTIN = {
    "fp16": types.fp16,
    "fp32": types.fp32,
    "int8": types.int8,
    "uint8": types.uint8,
    "uint4": types.uint4,
}


@dataclass(frozen=True)
class Constant:
    """A constant to come: its type and shape are known, its values are made when they are written."""

    name: str
    type: str
    shape: tuple[int, ...]


class WeightFile:
    """weight.bin in the making; constants of the same name, in whichever function, are one blob.

    Args:
        path: the file; made, and an existing one is an error.
        check: compare with an existing file instead.
    """

    def __init__(self, path: Path, *, check: bool = False) -> None:
        self.writer = BlobWriter(path, check=check)
        self._groups: dict[str, tuple[Sequence[Constant], Callable[[], Sequence[Array]]]] = {}
        self._offsets: dict[str, int] = {}

    def constants(self, wanted: Sequence[Constant], make: Callable[[], Sequence[Array]]) -> list[Var]:
        """Constants in the function that is being built.

        Args:
            wanted: made together.
            make: all their values, each as `BlobWriter.write` takes it; called once, when the program is saved.
        """
        variables = []
        for constant in wanted:
            self._groups.setdefault(constant.name, (wanted, make))
            blank = np.zeros((), dtype=types.nptype_from_builtin(BUILTIN[constant.type]))
            variable = mb.const(val=np.broadcast_to(blank, constant.shape), name=identifier(constant.name))
            variable.op.weight_id = constant.name
            variables.append(variable)
        return variables

    def offset(self, name: str) -> int:
        """Where the constant's blob is; writes it, and what is made together with it, if it is not there yet."""
        if name not in self._offsets:
            wanted, make = self._groups[name]
            for constant, values in zip(wanted, make(), strict=True):
                count = int(np.prod(constant.shape))
                self._offsets[constant.name] = self.writer.write(constant.type, values, count, constant.name)
        return self._offsets[name]

    def close(self) -> None:
        """Ends the file."""
        self.writer.close()


class _Exporter(MILProtoExporter):  # type: ignore[misc]  # has no types
    """coremltools' exporter, with constants from a WeightFile; all others are small and stay in the program."""

    def __init__(self, program: Any, weights: WeightFile) -> None:
        super().__init__(program, "", SPECIFICATION)
        self._weights = weights

    def get_milproto_value(self, var: Any) -> Any:
        if var.op.weight_id is None:
            return create_immediate_value(var)
        return create_file_value_tensor(
            file_name=BLOB_FILE,
            offset=self._weights.offset(var.op.weight_id),
            dim=var.shape,
            data_type=types_to_proto_primitive(var.sym_type.get_primitive()),
        )


def build_program(functions: Mapping[str, Callable[[], Any]]) -> Any:
    """A program of functions, each made by a call that returns it; more than one share their weights."""
    mb.name_count.clear()  # counts on through the process otherwise, and names differ from one build to the next
    program = Program()
    for name, make in functions.items():
        program.add_function(name, make())
    program.default_function_name = next(iter(functions))
    program.export_as_multifunction = len(functions) > 1
    program.skip_all_passes = True  # nothing is left to improve, and what is written is what was built
    return program


def save_program(program: Any, weights: WeightFile, described: Mapping[str, str], title: str) -> bytes:
    """Writes the weights and returns model.mlmodel.

    Args:
        described: what each input, output and state holds, for whoever opens the package in Xcode.
        title: of the package.
    """
    mil = _Exporter(program, weights).export()
    model = CoreMLProtoExporter(
        program,
        mil,
        predicted_feature_name=None,
        predicted_probabilities_name=None,
        classifier_config=None,
        convert_to="mlprogram",
        convert_from="milinternal",
        specification_version=SPECIFICATION,
    ).export(SPECIFICATION)
    model.description.metadata.shortDescription = title
    for part in [model.description, *model.description.functions]:
        for feature in [*part.input, *part.output, *part.state]:
            feature.shortDescription = described[feature.name]
    assert isinstance(model, proto.Model_pb2.Model)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def identifier(name: str) -> str:
    """A tensor's name as MIL allows it."""
    return name.removeprefix("model.").replace(".", "_").replace("+", "_and_")


def half(array: Array, name: str) -> npt.NDArray[np.float16]:
    """Rounded to fp16. Raises CheckpointError, naming the tensor, for what lies beyond."""
    if (peak := float(np.abs(array).max(initial=0))) > HALF_MAX:
        raise CheckpointError(f"{name} holds {peak:.3g}, beyond fp16's {HALF_MAX:.0f}, in which Core ML computes")
    return array.astype(np.float16)


def half_epsilon(value: float, name: str) -> np.float16:
    """An epsilon in fp16. Raises CheckpointError where rounding would change what it means."""
    rounded = np.float16(value)
    if not abs(float(rounded) - value) <= 0.05 * value:
        raise CheckpointError(f"{name} is {value:.3g}, which fp16 holds as {float(rounded):.3g}: too small for Core ML")
    return rounded


def flat_blocks(tensors: Sequence[QTensor]) -> list[Array]:
    """Matrices stacked along their outputs as constexpr_blockwise_shift_scale takes them.

    Core ML's blocks divide the width K. Where `block` does not, blocks of gcd(K, block) repeat the scale and zero
    point of the block that they are a part of, which says the same.

    Returns:
        Integers packed, scales f16 [N, K / width], zero points packed; width is gcd(K, block).
    """
    (_, k), block, bits = tensors[0].shape, tensors[0].block, tensors[0].bits
    width = gcd(k, block)

    def narrowed(parts: Array) -> Array:
        return np.repeat(parts, block // width, axis=1)[:, : k // width]

    integers = [t.packed.reshape(t.shape[0], -1) for t in tensors]  # rows padded to whole blocks
    if k * bits % 8:  # a row ends within a byte
        flat = _pack_flat(np.concatenate([unpack(part, bits)[:, :k] for part in integers]))
    else:
        flat = np.concatenate([part[:, : k * bits // 8] for part in integers])
    zeros = np.concatenate([narrowed(t.zeros) for t in tensors])
    scales = np.concatenate([narrowed(t.scales) for t in tensors])
    return [flat, scales, _pack_flat(zeros) if bits == 4 else zeros]


def _pack_flat(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """u8 of any shape, values below 16 -> two in a byte, rows run on into each other."""
    flat = values.reshape(-1)
    return pack(np.append(flat, np.uint8(0)) if flat.size % 2 else flat, 4)


class MilOps:
    """Builds one function of a MIL program; see `Ops` for what the methods mean.

    Args:
        weights, recipe: where tensors come from and in which format they are stored.
        file: where they are written when the program is saved.
        rows: tokens fed at a time; 0 for the vision tower.
        context: rows of the KV cache.
    """

    def __init__(
        self, weights: WeightSource, recipe: Recipe, file: WeightFile, *, rows: int = 0, context: int = 0
    ) -> None:
        self.weights, self.recipe, self.file, self.rows, self.context = weights, recipe, file, rows, context
        self.used: dict[str, Scheme] = {}  # matrix name -> how it was stored
        self._decoder: dict[str, Var] = {}  # values that all layers of a decoder share
        self._counts: dict[str, int] = {}
        self._zeros: dict[int, Var] = {}  # biases of zeros by width

    def op(self, kind: str, *, title: str | None = None, **inputs: Any) -> Var:
        """An operation of MIL, named after a tensor or numbered: the same in every build."""
        if title is None:
            count = self._counts[kind] = self._counts.get(kind, -1) + 1
            title = f"{kind}_{count}"
        return getattr(mb, kind)(name=title, **inputs)

    def vector(self, name: str) -> Var:
        """A tensor that is not quantized, in fp16."""
        constant = Constant(name, "fp16", self.weights.shape(name))
        return self.file.constants([constant], lambda: [half(self.weights[name], name)])[0]

    # --- linear layers

    def linear(self, x: Var, weights: Sequence[str], biases: Sequence[str] = ()) -> Var:
        schemes = [self.recipe.scheme(name) for name in weights]
        if any(s != schemes[0] for s in schemes):
            return self.op("concat", values=self.linears(x, weights, biases), axis=-1)
        self.used.update(dict.fromkeys(weights, schemes[0]))
        title = stacked_name(weights)
        matrix = self._matrix(title, weights, schemes[0])
        return self.op("linear", x=x, weight=matrix, bias=self._bias(title, biases, matrix.shape[0]))

    def linears(self, x: Var, weights: Sequence[str], biases: Sequence[str] = ()) -> list[Var]:
        return [self.linear(x, [w], biases[i : i + 1]) for i, w in enumerate(weights)]

    def _bias(self, title: str, names: Sequence[str], outputs: int) -> Var:
        """fp16 [N]; where there is none zeros, which MIL wants: one blob for all of a width."""
        if names:
            constant = Constant(title.removesuffix(".weight") + ".bias", "fp16", (outputs,))
            make = lambda: [np.concatenate([half(self.weights[name], name) for name in names])]  # noqa: E731
            return self.file.constants([constant], make)[0]
        if outputs not in self._zeros:
            constant = Constant(f"zeros.{outputs}", "fp16", (outputs,))
            (self._zeros[outputs],) = self.file.constants([constant], lambda: [np.zeros(outputs, np.float16)])
        return self._zeros[outputs]

    def _matrix(self, title: str, names: Sequence[str], scheme: Scheme) -> Var:
        """fp16 [N, K]: matrices stacked along their outputs."""
        n, k = sum(self.weights.shape(name)[0] for name in names), matrix_shape(self.weights, names[0])[1]
        match scheme.format:
            case "block":
                integers = "uint4" if scheme.bits == 4 else "uint8"
                blocks = k // gcd(k, scheme.block)
                wanted = [
                    Constant(f"{title}.q", integers, (n, k)),
                    Constant(f"{title}.scales", "fp16", (n, blocks)),
                    Constant(f"{title}.zeros", integers, (n, blocks)),
                ]
                make = lambda: flat_blocks(block_tensors(self.weights, names, scheme))  # noqa: E731
                q, scales, zeros = self.file.constants(wanted, make)
                blocks_of = {"data": q, "scale": scales, "offset": zeros}
                return self.op("constexpr_blockwise_shift_scale", title=identifier(title), **blocks_of)
            case "column":
                wanted = [Constant(f"{title}.q", "int8", (n, k)), Constant(f"{title}.scales", "fp16", (n, 1))]

                def columns() -> list[Array]:
                    parts = column_tensors(self.weights, names, scheme)
                    return [np.concatenate([p.values for p in parts]), np.concatenate([p.scales for p in parts])]

                q, scales = self.file.constants(wanted, columns)
                return self.op("constexpr_blockwise_shift_scale", title=identifier(title), data=q, scale=scales)
        make = lambda: [np.concatenate([half(self.weights[name], name) for name in names])]  # noqa: E731
        return self.file.constants([Constant(title, "fp16", (n, k))], make)[0]

    # --- the other operations

    def add(self, a: Var, b: Var) -> Var:
        return self.op("add", x=a, y=b)

    def layer_norm(self, x: Var, name: str, eps: float) -> Var:
        gamma, beta = self.vector(f"{name}.weight"), self.vector(f"{name}.bias")
        return self.op("layer_norm", x=x, axes=[-1], gamma=gamma, beta=beta, epsilon=half_epsilon(eps, name))

    def rms_norm(self, x: Var, weight: str, eps: float) -> Var:
        """x / sqrt(mean(x^2) + eps) * weight without a square that leaves fp16 (which ends at 65504 = 256^2).

        With s = max(max|x|, sqrt(eps)) that is y / sqrt(mean(y^2) + (sqrt(eps) / s)^2) for y = x / s: every square
        is at most 1, and either the mean is at least 1 / C or the second term is 1.
        """
        root = half_epsilon(sqrt(eps), f"the square root of the epsilon of {weight}")
        peak = self.op("reduce_max", x=self.op("abs", x=x), axes=[-1], keep_dims=True)  # [B, T, 1]
        scale = self.op("maximum", x=peak, y=root)
        y = self.op("real_div", x=x, y=scale)
        mean = self.op("reduce_mean", x=self.op("mul", x=y, y=y), axes=[-1], keep_dims=True)
        floor = self.op("real_div", x=root, y=scale)
        total = self.op("add", x=mean, y=self.op("mul", x=floor, y=floor))
        y = self.op("mul", x=y, y=self.op("rsqrt", x=total, epsilon=np.float16(0)))
        return self.op("mul", x=y, y=self.vector(weight))

    def add_rms_norm(self, x: Var, residual: Var, weight: str, eps: float) -> tuple[Var, Var]:
        total = self.add(x, residual)
        return self.rms_norm(total, weight, eps), total

    def gelu(self, x: Var, kind: str) -> Var:
        return self.op("gelu", x=x, mode="TANH_APPROXIMATION" if kind == "gelu_tanh" else "EXACT")

    def silu_gate(self, gate: Var, up: Var) -> Var:
        return self.op("mul", x=self.op("silu", x=gate), y=up)

    def patch_embed(self, pixels: Var, vision: VisionSpec) -> Var:
        at = f"{VISION}.embeddings"
        kernel, bias = self.vector(f"{at}.patch_embedding.weight"), self.vector(f"{at}.patch_embedding.bias")
        table = f"{at}.position_embedding.weight"
        ids = np.asarray(position_ids(vision.grid))
        (positions,) = self.file.constants(
            [Constant(f"{at}.positions", "fp16", (1, vision.patches, vision.hidden))],
            lambda: [half(self.weights[table][ids], table)],
        )
        stride = [vision.patch_size, vision.patch_size]
        x = self.op("conv", x=pixels, weight=kernel, bias=bias, strides=stride, pad_type="valid")  # [1, C, grid, grid]
        x = self.op("reshape", x=x, shape=[1, vision.hidden, vision.patches])
        return self.add(self.op("transpose", x=x, perm=[0, 2, 1]), positions)  # [1, P, C]

    def attend_all(self, q: Var, k: Var, v: Var, heads: int) -> Var:
        _, patches, width = q.shape
        split = [
            self.op("transpose", x=self.op("reshape", x=part, shape=[1, patches, heads, -1]), perm=[0, 2, 1, 3])
            for part in (q, k, v)
        ]  # [1, H, P, D] each
        x = self.op("scaled_dot_product_attention", query=split[0], key=split[1], value=split[2])
        return self.op("reshape", x=self.op("transpose", x=x, perm=[0, 2, 1, 3]), shape=[1, patches, width])

    def attend_cached(self, qkv: Var, layer: int, text: TextSpec) -> Var:
        """
            qkv -> [1, H + 2G, T, D] -> q, k (rotated), v
            k, v -> rows position ... position + T of layer's part of the states
            q [1, G, (H / G) T, D] x the whole cache, masked -> [1, T, H D]

        Heads that share keys lie together, so that they are rows of one query: no key is repeated.
        """
        h, g, d, t = text.heads, text.kv_heads, text.head_dim, self.rows
        shared = self._decoder
        x = self.op("reshape", x=qkv, shape=[1, t, h + 2 * g, d])
        x = self.op("transpose", x=x, perm=[0, 2, 1, 3])  # [1, H + 2G, T, D]
        turning, v = self.op("split", x=x, split_sizes=[h + g, g], axis=1)
        first, second = self.op("split", x=turning, num_splits=2, axis=-1)
        across = self.op("mul", x=self.op("concat", values=[second, first], axis=-1), y=shared["sin"])
        turning = self.add(self.op("mul", x=turning, y=shared["cos"]), across)
        q, k = self.op("split", x=turning, split_sizes=[h, g], axis=1)
        begin = self.op(
            "concat", values=[np.array([layer, 0], np.int32), shared["position"], np.zeros(1, np.int32)], axis=0
        )
        end = self.op(
            "concat", values=[np.array([layer + 1, g], np.int32), shared["end"], np.array([d], np.int32)], axis=0
        )
        cached = []
        for name, rows in (("key_cache", k), ("value_cache", v)):
            state = self.op("read_state", input=shared[name])
            state = self.op("slice_update", x=state, update=rows, begin=begin, end=end)  # [layers, G, L, D]
            state = self.op("coreml_update_state", state=shared[name], value=state)
            cached.append(self.op("slice_by_size", x=state, begin=[layer, 0, 0, 0], size=[1, g, self.context, d]))
        q = self.op("reshape", x=q, shape=[1, g, h // g * t, d]) if h != g else q
        x = self.op("scaled_dot_product_attention", query=q, key=cached[0], value=cached[1], attn_mask=shared["mask"])
        x = self.op("reshape", x=x, shape=[1, h, t, d]) if h != g else x
        return self.op("reshape", x=self.op("transpose", x=x, perm=[0, 2, 1, 3]), shape=[1, t, h * d])

    def pixel_shuffle(self, x: Var, grid: int, factor: int) -> Var:
        side, channels = grid // factor, x.shape[-1]
        # rows and columns of patches, each split into (side, factor); a row's factor stays with its channels
        x = self.op("reshape", x=x, shape=[side, factor, side, factor * channels])
        x = self.op("transpose", x=x, perm=[0, 2, 1, 3])
        return self.op("reshape", x=x, shape=[1, side * side, factor * factor * channels])

    def last_rows(self, x: Var) -> Var:
        if "last_row" not in self._decoder:
            return x
        return self.op("gather", x=x, indices=self._decoder["last_row"], axis=1)  # [1, 1, C]

    # --- whole functions

    def vision_function(self, vision: VisionSpec, tower: Callable[[Var], Var]) -> Any:
        """pixel_values fp16 [1, 3, S, S] -> image_features fp16 [1, tokens, hidden]."""
        side = vision.image_size
        inputs = {"pixel_values": mb.placeholder(shape=(1, 3, side, side), dtype=types.fp16)}
        with Function(inputs, opset_version=TARGET) as function:
            features = tower(function.inputs["pixel_values"])
            features.name = "image_features"
            function.set_outputs([features])
        return function

    def decoder_function(self, text: TextSpec, decoder: Callable[[Var], Var]) -> Any:
        """inputs_embeds, attention_mask, position (and last_row where T > 1), two states -> logits."""
        t, g = self.rows, text.kv_heads
        cache = mb.state_tensor_placeholder(shape=(text.layers, g, self.context, text.head_dim), dtype=types.fp16)
        other = mb.state_tensor_placeholder(shape=(text.layers, g, self.context, text.head_dim), dtype=types.fp16)
        inputs = {
            "inputs_embeds": mb.placeholder(shape=(1, t, text.hidden), dtype=types.fp16),
            "attention_mask": mb.placeholder(shape=(1, 1, t, self.context), dtype=types.fp16),
            "position": mb.placeholder(shape=(1,), dtype=types.int32),
        }
        if t > 1:
            inputs["last_row"] = mb.placeholder(shape=(1,), dtype=types.int32)
        with Function({**inputs, "key_cache": cache, "value_cache": other}, opset_version=TARGET) as function:
            given = self._decoder = dict(function.inputs)
            given["end"] = self.op("add", x=given["position"], y=np.array([t], np.int32))
            given["mask"] = given["attention_mask"]
            if t > 1 and text.heads != g:
                given["mask"] = self.op("tile", x=given["mask"], reps=[1, 1, text.heads // g, 1])
            given |= self._rope(text, given["position"])
            logits = decoder(given["inputs_embeds"])
            logits.name = "logits"
            function.set_outputs([logits])
        return function

    def _rope(self, text: TextSpec, position: Var) -> dict[str, Var]:
        """cos and sin fp16 [T, D] of the rows' positions; the first half of sin is negative, for a rotation as
        x * cos + swap_halves(x) * sin."""

        def make() -> list[Array]:
            cos, sin = (table[: self.context] for table in rope_tables(text))
            return [np.concatenate([cos, cos], axis=1), np.concatenate([-sin, sin], axis=1)]

        wanted = [Constant(f"rope.{part}", "fp32", (self.context, text.head_dim)) for part in ("cos", "sin")]
        begin = self.op("concat", values=[position, np.zeros(1, np.int32)], axis=0)
        rows = {}
        for part, table in zip(("cos", "sin"), self.file.constants(wanted, make), strict=True):
            taken = self.op("slice_by_size", x=table, begin=begin, size=[self.rows, text.head_dim])
            rows[part] = self.op("cast", x=taken, dtype="fp16")
        return rows
