"""Our runtime, measured as the peers are: `model` is the folder of a bundle for Android."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.peers.phases import Engine, Job, Picture, serve
from runtimes.bundle import Bundle, read_bundle
from runtimes.chat import Chat
from runtimes.generate import Sampling
from runtimes.ort import OrtRunner
from runtimes.preprocess import preprocess, read_settings
from runtimes.prompt import PromptEncoder


class OurEngine:
    """A runner and one cache."""

    def __init__(self, bundle: Bundle, job: Job) -> None:
        self._bundle = bundle
        self._runner = OrtRunner(bundle, threads=job.threads, vision=job.vision, config=job.options)
        self._cache = self._runner.new_cache()

    def reset(self) -> None:
        self._cache = self._runner.new_cache()

    def feed(self, ids: Sequence[int]) -> None:
        self._runner.extend(self._cache, ids)

    def tile(self, picture: Picture) -> Callable[[], None]:
        images = read_settings(self._bundle.path("preprocessor_config.json"))
        pixels = preprocess(_image(picture), images).pixels[:1]
        return lambda: _forget(self._runner.encode_image(pixels))

    def ask(self, picture: Picture, question: str) -> int:
        images = read_settings(self._bundle.path("preprocessor_config.json"))
        chat = Chat(self._runner, PromptEncoder.from_folder(self._bundle.folder), images)
        reply = chat.ask(question, [_image(picture)], Sampling(1))
        next(reply)
        return reply.answer().prompt_tokens


def _image(picture: Picture) -> Image.Image:
    pixels = np.frombuffer(picture.rgb, np.uint8).reshape(picture.height, picture.width, 3)
    return Image.fromarray(pixels)


def _forget(_: object) -> None:
    """What was computed is of no use."""


def open_engine(job: Job) -> Engine:
    """The bundle's runner. Digests are not checked: no peer does, and what loading costs is asked."""
    return OurEngine(read_bundle(Path(job.model), allow_pending=True, check_digests=False), job)


def main() -> int:
    return serve("ours", "Measures a bundle: a job on stdin, results on stdout.", open_engine)


if __name__ == "__main__":
    raise SystemExit(main())
