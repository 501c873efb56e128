"""Synthetic documents made hard by blur, small print or noise, so that a model that reads them well is wrong at times.

Each hardship in turn, by index; how much of it, by seed. Pictures are PNG in memory, drawn anew each time.
"""

import io
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from demo.documents import TILE, make_document, split_of

VERSION = 1  # of the drawing: answers that are kept name it
# Blur in the documents' own units (a tile's side / 96), the part of the pixels that is left, grain in levels of 255.
BLUR, SMALL, NOISE = (0.8, 2.2), (0.2, 0.5), (30.0, 90.0)
HARDSHIPS = ("clean", "all", "blur", "small", "noise")  # "all": the documents' own grade "hard", some of each


@dataclass(frozen=True)
class HardDocument:
    """A picture, a question on it and its answer."""

    png: bytes
    question: str
    answer: str
    hardship: str


def make_hard_document(split: str, index: int) -> HardDocument:
    """Draws document `index` of a split; the two fix every pixel.

    Raises:
        ValueError: if it shows a value that belongs to another split.
    """
    hardship = HARDSHIPS[index % len(HARDSHIPS)]
    document = make_document(split, index, "hard" if hardship == "all" else "clean")
    turn = document.turns[0]
    if turn.task == "field" and split_of(turn.answer) != split:
        raise ValueError(f"document {index} of split {split} asks for {turn.answer!r}, which is of another split")
    rng = random.Random(f"smolport-hard-documents/{VERSION}/{split}/{index}")
    file = io.BytesIO()
    _worse(document.image, hardship, rng, max(document.image.size)).save(file, "PNG")
    return HardDocument(file.getvalue(), turn.question, turn.answer, hardship)


def _worse(image: Image.Image, hardship: str, rng: random.Random, longest: int) -> Image.Image:
    match hardship:
        case "blur":
            return image.filter(ImageFilter.GaussianBlur(rng.uniform(*BLUR) * longest / (2 * TILE)))
        case "small":
            part = rng.uniform(*SMALL)
            size = (max(1, round(image.width * part)), max(1, round(image.height * part)))
            return image.resize(size, Image.Resampling.BILINEAR)
        case "noise":
            generator = np.random.default_rng(rng.getrandbits(64))
            grain = generator.standard_normal((image.height, image.width, 1), dtype=np.float32)
            grain *= rng.uniform(*NOISE)
            return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
    return image
