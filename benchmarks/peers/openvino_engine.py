"""OpenVINO on the CPU. `model` is a folder of `openvino_convert`; it has no vision tower.

The head is computed for the last token alone, as openvino_genai does it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.phases import Engine, Job, Picture, serve


class OpenvinoEngine:
    """A compiled model, whose cache is its state."""

    def __init__(self, job: Job) -> None:
        import openvino

        if job.vision:
            raise RuntimeError("the vision tower is not converted for OpenVINO")
        core = openvino.Core()
        model = core.read_model(Path(job.model) / "openvino_model.xml")
        _last_token_only(model)
        settings = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY"} | job.options
        self._request: Any = core.compile_model(model, "CPU", settings).create_infer_request()
        self._past = 0

    def reset(self) -> None:
        self._request.reset_state()
        self._past = 0

    def feed(self, ids: Sequence[int]) -> None:
        total = self._past + len(ids)
        self._request.infer(
            {
                "input_ids": np.array([ids], dtype=np.int64),
                "attention_mask": np.ones((1, total), dtype=np.int64),
                "position_ids": np.arange(self._past, total, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
        )
        rows = self._request.get_tensor("logits").shape[1]
        if rows != 1:
            raise RuntimeError(f"OpenVINO computed {rows} rows of logits, want the last alone")
        self._past = total

    def tile(self, picture: Picture) -> Callable[[], None]:
        raise NotImplementedError

    def ask(self, picture: Picture, question: str) -> int:
        raise NotImplementedError


def _last_token_only(model: Any) -> None:
    """Cuts all but the last row off the head's input, [1, T, C] -> [1, 1, C]."""
    import openvino.opset13 as ops

    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    hidden = node.input_value(0)
    start, stop, one, axis = (ops.constant([i], np.int64) for i in (-1, np.iinfo(np.int64).max, 1, 1))
    last = ops.slice(hidden, start, stop, one, axis)
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


def open_engine(job: Job) -> Engine:
    """The converted model, loaded."""
    return OpenvinoEngine(job)


def main() -> int:
    return serve("openvino_engine", "Measures OpenVINO: a job on stdin, results on stdout.", open_engine)


if __name__ == "__main__":
    raise SystemExit(main())
