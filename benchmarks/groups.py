"""Groups of tensors that a search gives one format each: their bytes in a bundle, and the rules that say the result.

Bytes are counted as an ONNX bundle stores them. Not counted: the gaps that put large tensors on page boundaries. The
graph files are an estimate.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from export.smolvlm import CONNECTOR, EMBED, HEAD, TEXT, VISION, matrices
from export.spec import ModelSpec, tensor_shapes
from quantize.recipe import Scheme

BLOCK4 = Scheme("block", 4, 32, rounding="fitted")
BLOCK8 = Scheme("block", 8, 32, rounding="fitted")
COLUMN8 = Scheme("column", 8)
GRAPH_BYTES = 10_500  # of a layer in a graph file: what the bundles of the carried checkpoint and of tiny ones have

# Parts of a layer: what they are called, the pattern of their tensors, and the tensors.
TEXT_PARTS = (
    ("qkv", "self_attn.[qkv]_proj.weight", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("o", "self_attn.o_proj.weight", ("self_attn.o_proj",)),
    ("gate+up", "mlp.[gu]*_proj.weight", ("mlp.gate_proj", "mlp.up_proj")),
    ("down", "mlp.down_proj.weight", ("mlp.down_proj",)),
)
VISION_PARTS = (
    ("attention", "self_attn.*.weight", tuple(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out"))),
    ("mlp", "mlp.*.weight", ("mlp.fc1", "mlp.fc2")),
)
TOWERS = (  # where the layers are, their parts, and the pattern of all of a layer
    (f"{TEXT}.layers", TEXT_PARTS, "*_proj.weight"),
    (f"{VISION}.encoder.layers", VISION_PARTS, "*.weight"),
)


@dataclass(frozen=True)
class Group:
    """Tensors that get the same format.

    formats: those to choose from, by name.
    seen: whether it changes image features, so that the vision tower has to run for it.
    """

    name: str
    tensors: tuple[str, ...]
    formats: Mapping[str, Scheme]
    seen: bool


def tensor_groups(spec: ModelSpec, *, by_layer: bool = False) -> list[Group]:
    """All groups of a model: parts of layers, or with `by_layer` whole layers; embedding, head and connector alone."""
    read, seen = {"block 8": BLOCK8, "block 4": BLOCK4}, {"column 8": COLUMN8, "block 4": BLOCK4}
    groups = [Group("embedding and head" if spec.text.tied else "embedding", (EMBED,), read, False)]
    for tower, (at, parts, _) in zip(("text", "vision"), TOWERS, strict=True):
        for i in range(spec.text.layers if tower == "text" else spec.vision.layers):
            made = [(part, tuple(f"{at}.{i}.{name}.weight" for name in names)) for part, _, names in parts]
            if by_layer:
                made = [("", tuple(name for _, names in made for name in names))]
            formats, changes_features = (read, False) if tower == "text" else (seen, True)
            groups += [Group(f"{tower} {i} {part}".rstrip(), names, formats, changes_features) for part, names in made]
    groups.append(Group("connector", (CONNECTOR,), seen, True))
    if not spec.text.tied:
        groups.append(Group("head", (HEAD,), read, False))
    return groups


def stored_bytes(shape: Sequence[int], scheme: Scheme) -> int:
    """Bytes of a matrix [N, K]: integers, fp32 scales, zero points."""
    n, k = shape
    match scheme.format:
        case "block":
            blocks = -(-k // scheme.block)
            return n * (blocks * scheme.block * scheme.bits // 8 + 4 * blocks + -(-blocks * scheme.bits // 8))
        case "column":
            return n * k + 4 * n
    return 4 * n * k


def rest_bytes(spec: ModelSpec, processor_bytes: int) -> int:
    """Bytes of a bundle that no format changes: other tensors, position tables, graphs, and the processor's files."""
    quantized = set(matrices(spec))
    floats = sum(math.prod(shape) for name, shape in tensor_shapes(spec).items() if name not in quantized)
    rope = spec.text.max_positions * spec.text.head_dim  # cosines and sines of half the width each
    return 4 * (floats + rope) + GRAPH_BYTES * (spec.text.layers + spec.vision.layers) + processor_bytes


def final_scheme(tensor: str, scheme: Scheme, *, calibrated: bool) -> Scheme:
    """A format with the rounding that a recipe uses: by the inputs of 4-bit products, if there is calibration."""
    by_inputs = calibrated and scheme.format == "block" and scheme.bits == 4 and tensor != EMBED
    return replace(scheme, rounding="gptq") if by_inputs else scheme


# ---- rules


def rules(spec: ModelSpec, schemes: Mapping[str, Scheme]) -> tuple[tuple[str, Scheme], ...]:
    """The schemes of all matrices as a recipe's rules, the exceptions of a tower before what most of it has."""
    made: list[tuple[str, Scheme]] = []
    for (at, parts, whole), layers in zip(TOWERS, (spec.text.layers, spec.vision.layers), strict=True):
        found = {(part, i): schemes[f"{at}.{i}.{names[0]}.weight"] for part, _, names in parts for i in range(layers)}
        usual = Counter(found.values()).most_common(1)[0][0]
        for scheme in sorted(set(found.values()) - {usual}, key=repr):
            alike = [i for i in range(layers) if all(found[part, i] == scheme for part, _, _ in parts)]
            made += [(f"{at}.{number}.{whole}", scheme) for number in numbers(alike, layers)]
            for part, pattern, _ in parts:
                others = [i for i in range(layers) if found[part, i] == scheme and i not in alike]
                if len(others) + len(alike) == layers:  # all layers: `alike` is said again, to the same effect
                    others = list(range(layers))
                made += [(f"{at}.{number}.{pattern}", scheme) for number in numbers(others, layers)]
        made.append((f"{at}.{whole}", usual))
    made += [(name, schemes[name]) for name in (HEAD, EMBED, CONNECTOR) if name in schemes]
    return tuple(made)


def numbers(chosen: Collection[int], count: int) -> Iterable[str]:
    """Patterns that match just the chosen ones of the numbers below `count`: * for all, [..] within each ten."""
    if chosen and len(chosen) == count:
        return ["*"]
    tens: dict[str, str] = {}
    for number in sorted(chosen):
        front, digit = str(number)[:-1], str(number)[-1]
        tens[front] = tens.get(front, "") + digit
    return [front + (digits if len(digits) == 1 else f"[{digits}]") for front, digits in tens.items()]
