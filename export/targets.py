"""What the proof needs to know of a target: how to make its payload again, its twin, what is shipped, the limits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.dequantized import Dequantized
from export.reference import Tensors
from export.spec import CheckpointError, ModelSpec
from export.weights import WeightSource
from quantize.int4 import F32
from quantize.recipe import Recipe
from runtimes.bundle import Bundle
from runtimes.coreml import Executed
from runtimes.manifest import OPERATORS, BundleError
from runtimes.runner import Runner

HALF_LIMIT = 0.02  # relative L2: what rounding to fp16 after each operation may change


@dataclass(frozen=True)
class Target:
    """A written bundle as the proof sees it.

    different: makes the payload again; names what is not the same, byte for byte.
    stored: makes the weights that the payload's bytes stand for, for the reference; they hold the integers.
    unrounded: the same before constants were rounded for this target; None if none is.
    twin: the payload with fp32 compute.
    shipped: the payload as a device computes it.
    faults: after both have run, what else speaks against the payload.
    extra: after both have run, entries for the report.
    evidence: makes files that a device's developer needs and a runner does not, by name.
    features_limit, logits_limit: of the difference between the two, relative L2.
    elsewhere: how many times the error of this machine another one may show; None: only the limits hold.
    """

    different: Callable[[], list[str]]
    stored: Callable[[], Tensors]
    unrounded: Callable[[], Tensors] | None
    twin: Callable[[], Runner]
    shipped: Callable[[], Runner]
    faults: Callable[[], list[str]]
    extra: Callable[[], dict[str, Any]]
    evidence: Callable[[], dict[str, str]]
    features_limit: float
    logits_limit: float
    elsewhere: float | None


def open_target(bundle: Bundle, spec: ModelSpec, weights: WeightSource, recipe: Recipe) -> Target:
    """The target of a bundle, by its manifest; `weights` is what it was made of, after calibration if there was one.

    Raises:
        BundleError: for one that cannot be proven.
    """
    match bundle.manifest.target:
        case "onnx":
            return _onnx(bundle, spec, weights, recipe)
        case "coreml":
            return _coreml(bundle, spec, weights, recipe)
        case other:
            raise BundleError(f"{bundle.folder / 'manifest.json'}: target is {other!r}, want onnx or coreml")


def need_coremltools() -> None:
    """Raises CheckpointError, with the remedy, where Core ML packages cannot be made."""
    try:
        import export.coreml_packages  # noqa: F401  # the first import of coremltools
    except ModuleNotFoundError as exc:
        if exc.name != "coremltools":
            raise
        where = "there are builds for macOS and for Linux on x86-64"
        raise CheckpointError(f"Core ML packages need coremltools: pip install '.[ios]' ({where})") from exc


def _onnx(bundle: Bundle, spec: ModelSpec, weights: WeightSource, recipe: Recipe) -> Target:
    from export.onnx_graphs import GRAPHS, check_graphs, twin_graph
    from export.operators import required_operators
    from runtimes.ort import OrtRunner

    folder = bundle.folder / "onnx"

    def twin() -> Runner:
        return OrtRunner(bundle, graphs={g: twin_graph(g, folder, spec, weights, recipe) for g in GRAPHS})

    return Target(
        different=lambda: check_graphs(folder, spec, weights, recipe),
        stored=lambda: Dequantized(spec, weights, recipe, keep=True),
        unrounded=None,
        twin=twin,
        shipped=lambda: OrtRunner(bundle),
        faults=list,
        extra=dict,
        evidence=lambda: {OPERATORS: required_operators(bundle)},
        features_limit=recipe.limits.activation_features,
        logits_limit=recipe.limits.activation_logits,
        elsewhere=2,  # ARM and x86 agreed to a tenth of it; kernels without zero points: 1.5 times
    )


def _coreml(bundle: Bundle, spec: ModelSpec, weights: WeightSource, recipe: Recipe) -> Target:
    need_coremltools()
    from export.coreml_packages import check_packages
    from runtimes.coreml import FOLDER, CoreMLRunner, prefill_chunk

    folder = bundle.folder / FOLDER
    context = bundle.manifest.text.context
    ideal, half = Executed(half=False), Executed(half=True, watch=True)
    chunk = prefill_chunk(bundle)
    if not chunk <= context <= spec.text.max_positions:
        most = spec.text.max_positions
        raise BundleError(
            f"{bundle.folder / 'manifest.json'}: text.context is {context}, the model has {most} positions"
        )

    def shipped() -> Runner:
        ideal.forget()  # its weights are gigabytes
        return CoreMLRunner(bundle, load=half)

    def faults() -> list[str]:
        unread = sorted(set(ideal.unread()) | set(half.unread()))
        infinite = [where for where, seen in half.magnitudes.items() if not seen.finite]
        return [f"{where} is not finite" for where in infinite] + [f"nothing has read {name}" for name in unread]

    return Target(
        different=lambda: check_packages(folder, spec, weights, recipe, context, chunk),
        stored=lambda: HalfConstants(Dequantized(spec, weights, recipe, keep=True)),
        unrounded=lambda: Dequantized(spec, weights, recipe, keep=True),
        twin=lambda: CoreMLRunner(bundle, load=ideal),
        shipped=shipped,
        faults=faults,
        evidence=dict,
        extra=lambda: {"fp16_range": fp16_range(half)},
        features_limit=HALF_LIMIT,
        logits_limit=HALF_LIMIT,
        elsewhere=None,  # no device has shown yet how far its kernels are from these
    )


def fp16_range(executed: Executed) -> dict[str, Any]:
    """The largest magnitude of each kind of operation, and the operation that came closest to fp16's end."""
    largest: dict[str, float] = {}
    for seen in executed.magnitudes.values():
        largest[seen.kind] = max(largest.get(seen.kind, 0.0), seen.largest)
    where, most = max(executed.magnitudes.items(), key=lambda item: item[1].largest)
    return {
        "limit": int(np.finfo(np.float16).max),
        "largest": most.largest,
        "operation": where,
        "largest_by_kind": largest,
    }


class HalfConstants:
    """Weights as a Core ML bundle holds them: what is not in integers rounded to fp16."""

    def __init__(self, weights: Dequantized) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> F32:
        array = self._weights[name]
        if self._weights.in_integers(name):
            return array
        rounded: Any = array.astype(np.float16)
        return np.asarray(rounded, dtype=np.float32)
