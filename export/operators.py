"""required_operators.config: which operators of ONNX Runtime an ONNX bundle needs, for a reduced build of it.

The format is that of its build's `--include_ops_by_config`: lines of `domain;opset;Operator,Operator`. Listed is what
the graphs hold, and what ONNX Runtime makes of them when it loads them: its optimizer puts fused operators in their
place, which a build without them could not run. Not covered: types of tensors, by which such a build could be smaller
still; and what the optimizer of another version fuses.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import onnx
import onnxruntime

from runtimes.bundle import Bundle
from runtimes.runner import graph_paths

ONNX_DOMAIN = "ai.onnx"  # in a model it may also be ""
Operators = dict[tuple[str, int], set[str]]  # domain and opset: operators


def required_operators(bundle: Bundle) -> str:
    """The text of the file, for a bundle whose target is "onnx"."""
    found: Operators = {}
    for path in graph_paths(bundle).values():
        graph = onnx.load(str(path), load_external_data=False)
        for model in (graph, optimized(path)):
            _add(found, model)
    lines = [f"# of the payload {bundle.manifest.payload_digest}, for ONNX Runtime {onnxruntime.__version__}"]
    lines += [f"{domain};{opset};{','.join(sorted(found[domain, opset]))}" for domain, opset in sorted(found)]
    return "\n".join(lines) + "\n"


def optimized(path: Path) -> onnx.ModelProto:
    """A graph as ONNX Runtime runs it on this machine's CPU, without its external data."""
    with tempfile.TemporaryDirectory(prefix="smolport-operators-") as scratch:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors: what matters is raised
        options.optimized_model_filepath = str(Path(scratch) / "optimized.onnx")
        # Initializers go to a file of their own, of which nothing is wanted: external ones are left where they are.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "initializers")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath, load_external_data=False)


def _add(found: Operators, model: onnx.ModelProto) -> None:
    """Adds a model's operators, those of its subgraphs and of its functions too."""
    opsets = _opsets(model.opset_import)
    for node in _nodes(model.graph.node):
        _add_node(found, node, opsets)
    for function in model.functions:
        for node in _nodes(function.node):
            _add_node(found, node, opsets | _opsets(function.opset_import))


def _add_node(found: Operators, node: onnx.NodeProto, opsets: Mapping[str, int]) -> None:
    domain = node.domain or ONNX_DOMAIN
    found.setdefault((domain, opsets[domain]), set()).add(node.op_type)


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {i.domain or ONNX_DOMAIN: i.version for i in imports}


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those of the graphs among their attributes."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
                yield from _nodes(graph.node)
