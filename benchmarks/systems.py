"""What answers questions: a bundle, or the full-precision reference. A third kind is in endpoint.py.

All get the same picture and the same question, decode greedily and stop at the same number of tokens. A system's
`identity` is everything that its answers depend on: two of the same identity may be taken for each other.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
import torch
import transformers
from tokenizers import Tokenizer

from benchmarks.datasets import Item
from export.checkpoint import ADAPTER_FILES, FILES, resolve
from export.lora import adapter_digest, open_merged
from export.processor import image_settings
from export.prove import ANSWER_TOKENS, greedy
from export.reference import Reference, reference_ids, reference_pixels, reference_processor
from export.spec import read_json, read_spec
from runtimes.bundle import Bundle
from runtimes.chat import open_chat
from runtimes.preprocess import ImageSettings, load_image, preprocess
from runtimes.prompt import ImagePart, Message, PromptEncoder
from runtimes.runner import Floats, InputError, Runner, engine_name
from runtimes.verify import step_logits


@dataclass(frozen=True)
class Decoding:
    """What all systems of a comparison share.

    tiles: the most that an image becomes (1, 5, 10 or 17), for a bundle and the reference; None: the bundle's number.
    instruction: a line that follows each question, such as "Answer with a single word or phrase."
    """

    max_new_tokens: int = ANSWER_TOKENS
    instruction: str = ""
    tiles: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}, want 1 or more")

    def question(self, item: Item) -> str:
        """The text that is asked."""
        return f"{item.question}\n{self.instruction}" if self.instruction else item.question


@dataclass(frozen=True)
class Answer:
    """What a system said, and whether it was `cut` off at the most tokens allowed. Where its tokens can be seen:
    `tokens`, the end token included; of the reference also `logits`, f32 [len(tokens), vocab], of which row i chose
    token i; `prompt` is a digest of the prompt's tokens."""

    text: str
    cut: bool = False
    tokens: tuple[int, ...] | None = None
    logits: Floats | None = None
    prompt: str | None = None


class System(Protocol):
    """Whatever answers a question about an image."""

    @property
    def name(self) -> str:
        """In a report."""

    @property
    def identity(self) -> dict[str, Any]:
        """All that its answers depend on, as JSON."""

    def answer(self, item: Item) -> Answer:
        """Its greedy answer."""

    def along(self, item: Item, reference: Answer) -> Floats | None:
        """Its logits f32 [len(tokens), vocab] along the reference's answer; None where it has none to compare."""


class BundleSystem:
    """A bundle, run by whatever engine runs it here.

    Raises:
        BundleError, InputError: as `open_chat`.
    """

    def __init__(self, bundle: Bundle, decoding: Decoding, *, threads: int = 0) -> None:
        chat = open_chat(bundle, tiles=decoding.tiles, threads=threads)
        self.runner: Runner = chat.runner
        self.encoder: PromptEncoder = chat.encoder
        self.settings: ImageSettings = chat.settings
        self._decoding = decoding
        self._last: _Asked | None = None
        self.adapter_digest = bundle.manifest.adapter.sha256 if bundle.manifest.adapter else None
        manifest, engine = bundle.manifest, engine_name(bundle)
        if manifest.target == "onnx":
            engine = f"{engine} {onnxruntime.__version__}"
        self.name = f"{manifest.model.name} {manifest.recipe.name}, {engine}"
        self.identity: dict[str, Any] = {
            "kind": "bundle",
            "model": manifest.model.name,
            "recipe": manifest.recipe.name,
            "target": manifest.target,
            "payload_digest": manifest.payload_digest,
            "engine": engine,
            "images": asdict(self.settings),
            "decoding": asdict(decoding),
        }

    def answer(self, item: Item) -> Answer:
        """As in `System`."""
        asked = self._ask(item)
        if asked.tokens is None:
            asked.tokens = greedy(self.runner, asked.ids, asked.features, self._decoding.max_new_tokens)
        text = self.encoder.decode(asked.tokens).strip()
        cut = asked.tokens[-1] not in self.runner.settings.eos_ids
        return Answer(text, cut, asked.tokens, prompt=prompt_digest(asked.ids))

    def along(self, item: Item, reference: Answer) -> Floats | None:
        """As in `System`; None if the reference has another vocabulary.

        Raises:
            InputError: if the reference had another prompt, though it has as many tokens to choose from.
        """
        if reference.logits is None or not reference.tokens:
            return None
        if reference.logits.shape[1] != self.runner.settings.vocab:
            return None
        asked = self._ask(item)
        if prompt_digest(asked.ids) != reference.prompt:
            raise InputError("the bundle and the reference make different prompts of it: is it the bundle's model?")
        logits = step_logits(self.runner, asked.ids, asked.features, reference.tokens)
        if np.array_equal(logits.argmax(axis=1), reference.tokens):
            asked.tokens = reference.tokens  # the same choices all along: its own answer is this one
        return logits

    def _ask(self, item: Item) -> "_Asked":
        """The item as the model sees it; the last one is kept, since its answer follows its logits."""
        if self._last is None or self._last.item != item:
            tiles = [preprocess(load_image(item.image), self.settings)] if item.image else []
            parts: tuple[str | ImagePart, ...] = (
                *(ImagePart(t.rows, t.cols) for t in tiles),
                self._decoding.question(item),
            )
            try:
                ids = self.encoder.encode([Message("user", parts)])
            except ValueError as exc:
                raise InputError(str(exc)) from exc
            features = self.runner.encode_image(tiles[0].pixels) if tiles else np.zeros((0, 1, 1), np.float32)
            self._last = _Asked(item, ids, features)
        return self._last


@dataclass
class _Asked:
    """An item in tokens, the features f32 [N, L, hidden] of its image, and the answer's tokens once they are known."""

    item: Item
    ids: list[int]
    features: Floats
    tokens: tuple[int, ...] | None = None


def prompt_digest(ids: Sequence[int]) -> str:
    """A short name for a prompt's tokens."""
    return hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()[:16]


class ReferenceSystem:
    """The untouched Hugging Face model in fp32 with its own processor and tokenizer; loaded for its first answer.

    Args:
        model: a checkpoint folder or a hub id.
        decoding: as the systems that it is compared with.
        images: how images become tiles; None: as the checkpoint says, within the decoding's tiles.
        lora: a folder or a hub id of an adapter, merged in.

    Raises:
        CheckpointError: naming the file that cannot be used.
    """

    def __init__(
        self, model: str, decoding: Decoding, images: ImageSettings | None = None, lora: str | None = None
    ) -> None:
        checkpoint = resolve(model)
        adapter = resolve(lora, ADAPTER_FILES, "an adapter") if lora is not None else None
        self._adapter, self.adapter_digest = None, None
        if adapter is not None:
            self._adapter, self.adapter_digest = adapter.folder, adapter_digest(adapter.folder)
        self._folder, self._decoding = checkpoint.folder, decoding
        self._spec = read_spec(self._folder)
        if images is None:
            path = self._folder / "processor_config.json"
            own = read_json(path) if path.exists() else {}
            images = image_settings(self._folder, own, self._spec, decoding.tiles)
        self._images = images
        self.name = f"{checkpoint.name}, full precision"
        self.identity: dict[str, Any] = {
            "kind": "reference",
            "model": checkpoint.name,
            "checkpoint_digest": checkpoint_digest(self._folder),
            **({"adapter_digest": self.adapter_digest} if self.adapter_digest else {}),
            "engine": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "images": asdict(images),
            "decoding": asdict(decoding),
        }

    @cached_property
    def _model(self) -> Reference:
        return Reference(self._folder, self._spec, open_merged(self._folder, self._spec, self._adapter))

    @cached_property
    def _processor(self) -> Any:
        images = self._images
        config = {
            "do_image_splitting": images.split,
            "do_resize": images.resize,
            "image_mean": list(images.mean),
            "image_std": list(images.std),
            "max_image_size": {"longest_edge": images.tile_size},
            "resample": images.resample,
            "rescale_factor": images.rescale_factor,
            "size": {"longest_edge": images.longest_edge},
        }
        return reference_processor(config, self._spec.architecture)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self._folder / "tokenizer.json"))

    def answer(self, item: Item) -> Answer:
        """As in `System`, with logits. Raises InputError for a question that its tokenizer would not take as text."""
        question = self._decoding.question(item)
        if not question.isascii() and any(0xD800 <= ord(c) <= 0xDFFF for c in question):
            raise InputError("the question holds bytes that are no UTF-8 text")
        for token in self._tokenizer.get_added_tokens_decoder().values():
            if token.special and token.content in question:
                raise InputError(f"the question spells {token.content}, which the reference would take for a control")
        prepared = [reference_pixels(self._processor, load_image(item.image))] if item.image else []
        parts = (*(None for _ in prepared), question)
        grids = [(rows, cols) for _, rows, cols in prepared]
        ids = reference_ids(self._folder, (("user", parts),), grids, self._spec.tokens_per_tile)
        made = self._model.generate(ids, prepared[0][0] if prepared else None, self._decoding.max_new_tokens)
        text = self._tokenizer.decode(list(made.tokens), skip_special_tokens=True).strip()
        cut = made.tokens[-1] not in self._spec.eos_ids
        return Answer(text, cut, made.tokens, made.logits, prompt_digest(ids))

    def along(self, item: Item, reference: Answer) -> Floats | None:
        """None: it is what others are compared with."""
        del item, reference
        return None


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 over the files of a checkpoint that its answers depend on, by name and content."""
    digest = hashlib.sha256()
    wanted = [pattern for pattern in FILES if pattern != "README.md"]
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in wanted):
            with path.open("rb") as file:
                digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
