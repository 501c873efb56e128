"""llama.cpp, by the C functions that llama-cpp-python binds; pictures by its libmtmd.

`model` is a folder of `llama_convert`; options: mmproj, the file of the vision tower there.
"""

import ctypes
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.phases import Engine, Job, Picture, serve

BATCH = 512
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def _log(level: int, text: bytes, _: object) -> None:
    if level == 4:  # error
        print(text.decode("utf-8", "replace"), end="", file=sys.stderr)


_LOG = LOG(_log)  # kept: the library calls it to the end


class LlamaEngine:
    """A context with an fp16 cache of the job's size, flash attention as llama.cpp chooses it."""

    def __init__(self, job: Job) -> None:
        import llama_cpp

        self._c: Any = llama_cpp
        self._c.llama_log_set(_LOG, ctypes.c_void_p(0))
        self._c.llama_backend_init()
        folder = Path(job.model)
        self._model = self._c.llama_model_load_from_file(
            bytes(folder / "text.gguf"), self._c.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {folder / 'text.gguf'}")
        settings = self._c.llama_context_default_params()
        settings.n_ctx = -(-job.context // 256) * 256
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = job.threads
        settings.no_perf = True
        self._context = self._c.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context")
        self._pictures = _Pictures(self._model, folder / job.options["mmproj"], job.threads) if job.vision else None

    def reset(self) -> None:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), False)

    def feed(self, ids: Sequence[int]) -> None:
        for start in range(0, len(ids), BATCH):
            piece = ids[start : start + BATCH]
            array = (self._c.llama_token * len(piece))(*piece)  # the batch only points to it
            batch = self._c.llama_batch_get_one(array, len(piece))
            if code := self._c.llama_decode(self._context, batch):
                raise RuntimeError(f"llama_decode: {code}")
        if not self._c.llama_get_logits_ith(self._context, -1):
            raise RuntimeError("llama_decode left no logits")

    def tile(self, picture: Picture) -> Callable[[], None]:
        assert self._pictures is not None
        return self._pictures.tile(picture)

    def ask(self, picture: Picture, question: str) -> int:
        assert self._pictures is not None
        self.reset()
        tokens = self._pictures.feed(self._context, picture, question)
        if not self._c.llama_get_logits_ith(self._context, -1):
            raise RuntimeError("llama.cpp left no logits after the picture")
        return tokens


class _Pictures:
    """libmtmd: the picture cut, encoded and fed as llama.cpp does it."""

    def __init__(self, model: object, path: Path, threads: int) -> None:
        from llama_cpp import mtmd_cpp

        self._c: Any = mtmd_cpp
        self._c.mtmd_log_set(_LOG, ctypes.c_void_p(0))
        self._c.mtmd_helper_log_set(_LOG, ctypes.c_void_p(0))
        settings = self._c.mtmd_context_params_default()
        settings.use_gpu, settings.print_timings, settings.warmup = False, False, False
        settings.n_threads = threads
        self._mtmd = self._c.mtmd_init_from_file(bytes(path), model, settings)
        if not self._mtmd:
            raise RuntimeError(f"libmtmd does not load {path}")

    def _chunks(self, picture: Picture, question: str) -> Any:
        data = (ctypes.c_uint8 * len(picture.rgb)).from_buffer_copy(picture.rgb)
        bitmap = self._c.mtmd_bitmap_init(picture.width, picture.height, data)
        marker = self._c.mtmd_default_marker().decode()
        said = f"<|im_start|>User:{marker}{question}<end_of_utterance>\nAssistant:".encode()
        text = self._c.mtmd_input_text(text=said, text_len=len(said), add_special=False, parse_special=True)
        chunks = self._c.mtmd_input_chunks_init()
        bitmaps = (self._c.mtmd_bitmap_p_ctypes * 1)(bitmap)
        code = self._c.mtmd_tokenize(self._mtmd, chunks, ctypes.byref(text), bitmaps, 1)
        self._c.mtmd_bitmap_free(bitmap)
        if code:
            raise RuntimeError(f"mtmd_tokenize: {code}")
        return chunks

    def tile(self, picture: Picture) -> Callable[[], None]:
        chunks = self._chunks(picture, "")
        parts = [self._c.mtmd_input_chunks_get(chunks, i) for i in range(self._c.mtmd_input_chunks_size(chunks))]
        image = next(
            part for part in parts if self._c.mtmd_input_chunk_get_type(part) == self._c.MTMD_INPUT_CHUNK_TYPE_IMAGE
        )

        def run() -> None:
            if code := self._c.mtmd_encode_chunk(self._mtmd, image):
                raise RuntimeError(f"mtmd_encode_chunk: {code}")

        return run

    def feed(self, context: object, picture: Picture, question: str) -> int:
        chunks = self._chunks(picture, question)
        past = ctypes.c_int32(0)
        code = self._c.mtmd_helper_eval_chunks(self._mtmd, context, chunks, 0, 0, BATCH, True, ctypes.byref(past))
        self._c.mtmd_input_chunks_free(chunks)
        if code:
            raise RuntimeError(f"mtmd_helper_eval_chunks: {code}")
        return past.value


def open_engine(job: Job) -> Engine:
    """The converted checkpoint, loaded."""
    return LlamaEngine(job)


def main() -> int:
    return serve("llama_engine", "Measures llama.cpp: a job on stdin, results on stdout.", open_engine)


if __name__ == "__main__":
    raise SystemExit(main())
