"""onnxruntime-genai's generator. `model` is a folder of `genai_convert`; it has no vision tower."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.peers.phases import Engine, Job, Picture, serve


class GenaiEngine:
    """A model; a new generator for every cache."""

    def __init__(self, job: Job) -> None:
        import onnxruntime_genai

        if job.vision:
            raise RuntimeError("onnxruntime-genai's builder has no vision tower of this family")
        self._genai: Any = onnxruntime_genai
        config = self._genai.Config(job.model)
        options = {"intra_op_num_threads": job.threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = self._genai.Model(config)
        self._context = job.context
        self._generator: Any = None

    def reset(self) -> None:
        self._generator = None  # the old cache goes before the new one comes
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=self._context, min_length=self._context)  # an end token ends nothing
        self._generator = self._genai.Generator(self._model, params)

    def feed(self, ids: Sequence[int]) -> None:
        self._generator.append_tokens(np.array([ids], dtype=np.int32))
        self._generator.get_logits()

    def tile(self, picture: Picture) -> Callable[[], None]:
        raise NotImplementedError

    def ask(self, picture: Picture, question: str) -> int:
        raise NotImplementedError


def open_engine(job: Job) -> Engine:
    """The built model, loaded."""
    return GenaiEngine(job)


def main() -> int:
    return serve("genai_engine", "Measures onnxruntime-genai: a job on stdin, results on stdout.", open_engine)


if __name__ == "__main__":
    raise SystemExit(main())
