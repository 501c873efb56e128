"""The operators that a bundle names are those that ONNX Runtime runs, and its own parser reads them."""

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnxruntime.tools.reduced_build_config_parser import parse_config

from export.operators import _add, optimized, required_operators
from runtimes.bundle import Bundle, read_bundle
from runtimes.manifest import OPERATORS
from runtimes.ort import OrtRunner
from runtimes.preprocess import normalize, read_settings
from runtimes.runner import graph_paths
from runtimes.verify import read_cases


def listed(path: Path) -> dict[str, dict[int, set[str]]]:
    """As ONNX Runtime's build reads it: domain, opset, operators."""
    found, _ = parse_config(str(path))
    return {domain: {opset: set(names) for opset, names in by.items()} for domain, by in found.items()}


def executed(bundle: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The operators whose kernels ran for the golden cases, as ONNX Runtime's profiler saw them."""
    sessions: list[onnxruntime.InferenceSession] = []
    real = onnxruntime.InferenceSession

    def profiled(model: str | bytes, options: onnxruntime.SessionOptions, **rest: object) -> object:
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / f"profile-{len(sessions)}")
        sessions.append(real(model, options, **rest))
        return sessions[-1]

    monkeypatch.setattr(onnxruntime, "InferenceSession", profiled)
    runner = OrtRunner(bundle)
    settings = read_settings(bundle.path("preprocessor_config.json"))
    case = next(c for c in read_cases(bundle.folder) if len(c.tiles) > 1)
    features = runner.encode_image(normalize(case.tiles, settings))
    cache = runner.new_cache()
    runner.extend(cache, case.ids, features.reshape(-1, features.shape[-1]))
    runner.extend(cache, case.tokens[:1])
    monkeypatch.undo()
    events = [e for s in sessions for e in json.loads(Path(s.end_profiling()).read_text())]
    return {e["args"]["op_name"] for e in events if e.get("cat") == "Node" and "op_name" in e.get("args", {})}


def test_everything_that_runs_is_listed(demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = listed(demo_bundle / OPERATORS)
    names = {name for by in found.values() for some in by.values() for name in some}
    ran = executed(read_bundle(demo_bundle), tmp_path, monkeypatch)
    assert ran <= names
    assert {"MatMulNBits", "GroupQueryAttention"} <= ran
    # what the optimizer puts there is in no graph of the bundle, and a build without it could not load them
    held = {
        node.op_type
        for path in graph_paths(read_bundle(demo_bundle)).values()
        for node in onnx.load(str(path), load_external_data=False).graph.node
    }
    assert ran - held - {"DynamicQuantizeLinear", "MatMulInteger"}
    assert set(found) <= {"ai.onnx", "com.microsoft", "com.microsoft.nchwc"}
    assert set(found["ai.onnx"]) == {21}


def test_it_is_evidence_and_no_part_of_the_payload(demo_bundle: Path, demo_ios_bundle: Path) -> None:
    bundle = read_bundle(demo_bundle)
    assert {f.role for f in bundle.manifest.files if f.path == OPERATORS} == {"evidence"}
    assert bundle.manifest.payload_digest in (demo_bundle / OPERATORS).read_text()
    assert not (demo_ios_bundle / OPERATORS).exists()
    assert (demo_bundle / OPERATORS).read_text() == required_operators(bundle)


def value(name: str, kind: int = TensorProto.FLOAT, shape: tuple[int, ...] = ()) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def branching(tmp_path: Path) -> Path:
    """A graph whose rare operators are in an If within an If, and in a function."""

    def branch(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph(nodes, name, [], [value(name)])

    inner = helper.make_node(
        "If",
        ["flag"],
        ["deep"],
        then_branch=branch("a", helper.make_node("Asinh", ["x"], ["a"])),
        else_branch=branch("b", helper.make_node("Mish", ["x"], ["b"])),
    )
    outer = helper.make_node(
        "If",
        ["flag"],
        ["outer"],
        then_branch=branch("deep", inner),
        else_branch=branch("c", helper.make_node("Own", ["x"], ["c"], domain="mine")),
    )
    own = helper.make_function(
        "mine", "Own", ["p"], ["q"], [helper.make_node("Erf", ["p"], ["q"])], [helper.make_opsetid("", 21)]
    )
    graph = helper.make_graph([outer], "g", [value("x"), value("flag", TensorProto.BOOL)], [value("outer")])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("mine", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=[own], ir_version=10), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_operators_of_subgraphs_and_functions_are_listed(tmp_path: Path) -> None:
    path = branching(tmp_path)
    found: dict[tuple[str, int], set[str]] = {}
    _add(found, onnx.load(str(path)))
    assert found == {("ai.onnx", 21): {"If", "Asinh", "Mish", "Erf"}, ("mine", 1): {"Own"}}
    _add(found, optimized(path))
    assert "Erf" in found["ai.onnx", 21]
