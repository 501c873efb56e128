"""Synthetic documents with questions: labels, signs and forms, drawn by seed, never stored.

A document is a function of (split, index, grade). Splits are disjoint twice over: by seed, and by
text: every free string (a value, a word) belongs to one split by its SHA-256. The test split is
drawn in a font family that no other split uses.

    python -m demo.documents --split test --count 500 --out build/documents

writes PNG files and `documents.jsonl`, the format that `make export-android DATA=` reads.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

TILE = 96  # a document is laid out on 1 x 2, 2 x 1 or 2 x 2 tiles of this many units
NODE_MODULES = Path(__file__).parent / "fonts" / "node_modules"
GRADES = ("clean", "worn", "hard")
MIXED = "mixed"

# Text of a split: SHA-256's first byte modulo 16 says whose a string is.
SPLITS = {"train": range(12), "calibration": range(12, 13), "search": range(13, 14), "test": range(14, 16)}
Face = tuple[str, str]  # a font package of PyPI or, with an @, of npm, and a file in it
FIRST_FONTS: tuple[Face, ...] = (  # those of the first training phases
    ("font_roboto", "Roboto-Regular.ttf"),
    ("font_roboto", "Roboto-Medium.ttf"),
    ("font_roboto", "Roboto-Bold.ttf"),
    ("font_source_sans_pro", "SourceSansPro-Regular.ttf"),
    ("font_source_sans_pro", "SourceSansPro-Semibold.ttf"),
    ("font_source_sans_pro", "SourceSansPro-Bold.ttf"),
    ("font_source_serif_pro", "SourceSerifPro-Regular.ttf"),
    ("font_source_serif_pro", "SourceSerifPro-Semibold.ttf"),
    ("font_lato", "Lato-Regular.ttf"),
    ("font_lato", "Lato-Bold.ttf"),
    ("font_caladea", "Caladea-Regular.ttf"),
    ("font_caladea", "Caladea-Bold.ttf"),
)
TRAIN_FONTS: tuple[Face, ...] = (
    *FIRST_FONTS,
    ("font_hanken_grotesk", "HankenGrotesk-Regular.otf"),
    ("font_hanken_grotesk", "HankenGrotesk-Medium.otf"),
    ("font_hanken_grotesk", "HankenGrotesk-SemiBold.otf"),
    ("font_hanken_grotesk", "HankenGrotesk-Bold.otf"),
    ("font_rhd", "RedHatDisplay-Regular.ttf"),
    ("font_rhd", "RedHatDisplay-Medium.ttf"),
    ("font_rhd", "RedHatDisplay-SemiBold.ttf"),
    ("font_rhd", "RedHatDisplay-Bold.ttf"),
    ("font_fredoka_one", "FredokaOne-Regular.ttf"),
    ("font_fjallaone", "FjallaOne-Regular.ttf"),
    ("font_roboto", "Roboto-Black.ttf"),
    ("font_roboto", "Roboto-Italic.ttf"),
    ("font_source_sans_pro", "SourceSansPro-Black.ttf"),
    ("font_lato", "Lato-Black.ttf"),
    ("font_lato", "Lato-Italic.ttf"),
    ("font_source_serif_pro", "SourceSerifPro-Bold.ttf"),
)
# Those of the last training phase are npm packages: `npm ci` in demo/fonts. Nothing but training needs them.
# fmt: off
WEB_FAMILIES = (
    "archivo", "arvo", "asap", "barlow", "be-vietnam-pro", "bitter", "cabin", "comfortaa", "courier-prime", "dm-sans",
    "epilogue", "exo-2", "figtree", "fira-sans", "ibm-plex-mono", "ibm-plex-sans", "inter", "jetbrains-mono", "jost",
    "kanit", "karla", "lexend", "libre-franklin", "lora", "merriweather", "montserrat", "mulish", "noto-sans",
    "nunito", "open-sans", "oswald", "outfit", "overpass", "plus-jakarta-sans", "poppins", "pt-sans", "pt-serif",
    "public-sans", "quicksand", "roboto-mono", "roboto-slab", "rubik", "sora", "space-grotesk", "space-mono",
    "titillium-web", "ubuntu", "urbanist", "work-sans",
)
# fmt: on
WEB_FONTS: tuple[Face, ...] = tuple(
    (f"@fontsource/{family}", f"{family}-latin-{weight}-normal.woff")
    for family in WEB_FAMILIES
    for weight in (400, 700)
)
TEST_FONTS: tuple[Face, ...] = (("font_manrope", "Manrope-Medium.ttf"), ("font_manrope", "Manrope-Bold.ttf"))

COLOURS = {
    "red": (208, 32, 36),
    "green": (30, 140, 60),
    "blue": (34, 84, 200),
    "yellow": (240, 200, 20),
    "purple": (126, 50, 160),
    "orange": (240, 126, 20),
    "black": (16, 16, 16),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
FIELDS = {
    "total": "price",
    "price": "price",
    "tax": "price",
    "date": "date",
    "due": "date",
    "time": "time",
    "code": "code",
    "seat": "code",
    "batch": "code",
    "name": "word",
    "city": "word",
    "item": "word",
    "order": "number",
    "table": "number",
    "gate": "number",
    "size": "number",
}
HEADINGS = ("RECEIPT", "INVOICE", "TICKET", "NOTICE", "LABEL", "ORDER", "PASS", "FORM")
# I, O, Q and l look like others in many fonts; real codes avoid them too.
CAPITALS = "ABCDEFGHJKLMNPRSTUVWXYZ"
CONSONANTS, VOWELS = "bcdfghjkmnprstvwz", "aeou"
CHARACTERS = sorted(set(CAPITALS + CAPITALS.lower() + "ilo" + "IOQ" + "0123456789" + ".:/-" + "".join(HEADINGS)))
KINDS = {"label": (2, 1), "slip": (2, 1), "sign": (1, 2), "form": (2, 2), "notice": (2, 2), "tag": (1, 1)}
GLYPHS = CHARACTERS + [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


@dataclass(frozen=True)
class Turn:
    """A question on a document, its answer, and which of the three tasks it is."""

    task: str  # "line", "field" or "shape"; of a table "cell" or "column"
    question: str
    answer: str


@dataclass(frozen=True)
class Glyph:
    """What stands where: the centre of a character or shape as a fraction of the image's sides."""

    name: str  # one of GLYPHS
    x: float
    y: float


@dataclass(frozen=True)
class Document:
    """A drawn document: the picture, its questions (the first is the one that tests ask), its glyphs."""

    image: Image.Image
    turns: tuple[Turn, ...]
    glyphs: tuple[Glyph, ...]
    kind: str
    grade: str


Draw = Callable[[str, int, str], Document]  # (split, index, grade)


@lru_cache(maxsize=256)  # each holds an open file
def _font(package: str, name: str, size: int) -> ImageFont.FreeTypeFont:
    web = package.startswith("@")
    path = (NODE_MODULES / package if web else resources.files(package)) / "files" / name
    if web and not path.is_file():
        raise FileNotFoundError(f"{path}: the fonts of training are missing: run `npm ci` in {NODE_MODULES.parent}")
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def split_of(text: str) -> str:
    """The split that owns a free string."""
    bucket = hashlib.sha256(text.encode()).digest()[0] % 16
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


class Writer:
    """Free strings of one split, from one random stream."""

    def __init__(self, rng: random.Random, split: str) -> None:
        self.rng, self.split = rng, split

    def value(self, kind: str) -> str:
        """A value of one kind (those of FIELDS, "upper" and "lower") that the split owns."""
        while True:
            text = self._any(kind)
            if split_of(text) == self.split:
                return text

    def _any(self, kind: str) -> str:
        rng = self.rng
        match kind:
            case "price":
                return f"{rng.randint(1, 10 ** rng.randint(1, 3) - 1)}.{rng.randint(0, 99):02d}"
            case "date":
                return f"{rng.randint(1, 28):02d}/{rng.randint(1, 12):02d}/{rng.randint(20, 39)}"
            case "time":
                return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
            case "code":
                letters = "".join(rng.choices(CAPITALS, k=rng.randint(1, 2)))
                return f"{letters}-{rng.randint(1, 999):0{rng.randint(2, 3)}d}"
            case "number":
                return str(rng.randint(10, 10 ** rng.randint(2, 5) - 1))
            case "word" | "upper" | "lower":
                letters = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 3)))
                letters += rng.choice(CONSONANTS) if rng.random() < 0.6 or len(letters) < 3 else ""
                return {"word": letters.capitalize(), "upper": letters.upper(), "lower": letters}[kind]
        raise ValueError(f"unknown kind of value {kind!r}")

    def phrase(self, budget: int) -> str:
        """One or two words or values of at most `budget` characters."""
        kinds = ["word", "upper", "lower", "number", "code", "price"]
        first = self.value(self.rng.choice(kinds))
        while len(first) > budget:
            first = self.value(self.rng.choice(kinds))
        second = self.value(self.rng.choice(kinds))
        both = f"{first} {second}"
        return both if len(both) <= budget and self.rng.random() < 0.6 else first


class Sheet:
    """A canvas in units (TILE to a tile side), drawn at `scale` pixels a unit."""

    def __init__(self, rng: random.Random, width: int, height: int, scale: float, faces: Sequence[Face]) -> None:
        self.rng, self.width, self.height, self.scale = rng, width, height, scale
        self.pixels = (round(width * scale), round(height * scale))
        self.glyphs: list[Glyph] = []
        self.face = rng.choice(faces)
        dark = rng.random() < 0.25
        paper = [rng.randint(0, 70) if dark else rng.randint(190, 255) for _ in range(3)]
        ink = [rng.randint(215, 255) if dark else rng.randint(0, 80) for _ in range(3)]
        self.ink = (ink[0], ink[1], ink[2])
        self.dark = dark
        self.image = Image.new("RGB", self.pixels, (paper[0], paper[1], paper[2]))
        if rng.random() < 0.3:  # a shaded sheet
            other = tuple(max(0, min(255, c + rng.randint(-28, 28))) for c in paper)
            ramp = Image.linear_gradient("L").resize(self.pixels)
            ramp = ramp.transpose(Image.Transpose.TRANSPOSE).resize(self.pixels) if rng.random() < 0.5 else ramp
            self.image.paste(Image.new("RGB", self.pixels, other), mask=ramp)
        self.draw = ImageDraw.Draw(self.image)
        if rng.random() < 0.25:  # a frame
            inset = rng.uniform(0.5, 2.5) * scale
            box = (inset, inset, self.pixels[0] - 1 - inset, self.pixels[1] - 1 - inset)
            self.draw.rectangle(box, outline=self.ink, width=max(1, round(scale * 0.8)))

    def length(self, text: str, size: float) -> float:
        """The width of a text, in units."""
        return _font(*self.face, max(4, round(size * self.scale))).getlength(text) / self.scale

    def fit(self, text: str, size: float, room: float) -> float:
        """The largest size up to `size` at which `text` takes at most `room` units."""
        return size if (need := self.length(text, size)) <= room else size * room / need

    def text(self, text: str, x: float, centre: float, size: float) -> None:
        """Draws from `x` with capitals centred on `centre`; all in units."""
        font = _font(*self.face, max(4, round(size * self.scale)))
        baseline = (centre + 0.35 * size) * self.scale
        left = x * self.scale
        self.draw.text((left, baseline), text, fill=self.ink, font=font, anchor="ls")
        for i, character in enumerate(text):
            if character != " ":
                middle = left + (font.getlength(text[:i]) + font.getlength(text[: i + 1])) / 2
                self.glyphs.append(Glyph(character, middle / self.pixels[0], centre * self.scale / self.pixels[1]))

    def line(
        self, ends: tuple[tuple[float, float], tuple[float, float]], colour: tuple[int, int, int], thick: float
    ) -> None:
        """Draws a straight line; all in units."""
        at = [(x * self.scale, y * self.scale) for x, y in ends]
        self.draw.line(at, fill=colour, width=max(1, round(thick * self.scale)))

    def shape(self, name: str, colour: str, x: float, y: float, radius: float) -> None:
        """Draws a shape centred on (x, y); all in units."""
        cx, cy, r = x * self.scale, y * self.scale, radius * self.scale
        fill = COLOURS[colour]
        box = (cx - r, cy - r, cx + r, cy + r)
        match name:
            case "circle":
                self.draw.ellipse(box, fill=fill)
            case "ring":
                self.draw.ellipse(box, outline=fill, width=max(2, round(r * 0.35)))
            case "square":
                self.draw.rectangle(box, fill=fill)
            case "triangle":
                self.draw.polygon([(cx, cy - r), (cx + r, cy + r), (cx - r, cy + r)], fill=fill)
            case "cross":
                w = r * 0.33
                self.draw.rectangle((cx - r, cy - w, cx + r, cy + w), fill=fill)
                self.draw.rectangle((cx - w, cy - r, cx + w, cy + r), fill=fill)
            case "star":
                turns = np.arange(10) * np.pi / 5 - np.pi / 2
                reach = np.where(np.arange(10) % 2 == 0, r, r * 0.42)
                points = zip(cx + reach * np.cos(turns), cy + reach * np.sin(turns), strict=True)
                self.draw.polygon([(float(a), float(b)) for a, b in points], fill=fill)
        self.glyphs.append(Glyph(f"{colour} {name}", cx / self.pixels[0], cy / self.pixels[1]))

    def wear(self, grade: str) -> Image.Image:
        """The finished picture with the blur and noise of its grade."""
        rng = self.rng
        blur, noise = {
            "clean": (0.0, rng.uniform(0, 4)),
            "worn": (rng.uniform(0.2, 0.7), rng.uniform(4, 14)),
            "hard": (rng.uniform(0.5, 1.2), rng.uniform(8, 26)),
        }[grade]
        image = self.image
        if blur:
            image = image.filter(ImageFilter.GaussianBlur(blur * self.scale))
        if noise > 1:
            generator = np.random.default_rng(rng.getrandbits(64))
            grain = generator.standard_normal((self.pixels[1], self.pixels[0], 1), dtype=np.float32) * noise
            image = Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
        return image


def _shape_turns(colour: str, shape: str) -> list[Turn]:
    return [
        Turn("shape", "Name the coloured shape.", f"{colour} {shape}"),
        Turn("shape", f"What colour is the {shape}?", colour),
        Turn("shape", f"What shape is {colour}?", shape),
    ]


def _line_turns(lines: list[str]) -> list[Turn]:
    turns = [Turn("line", f"Read line {i}.", line) for i, line in enumerate(lines, 1)]
    turns.append(Turn("line", "Read the last line.", lines[-1]))
    turns.append(Turn("line", "Read the first line.", lines[0]))
    return turns


def line_centres(rng: random.Random, top: float, height: float, count: int, size: float, free: bool) -> list[float]:
    """Centres of `count` lines in a band; `free` lets them wander out of their slots."""
    slot = height / count
    play = max(0.0, slot / 2 - size * 0.62)
    return [top + slot * (i + 0.5) + rng.uniform(-play, play) * (1.6 if free else 1.0) for i in range(count)]


def make_document(
    split: str, index: int, grade: str = "clean", kind: str | None = None, faces: Sequence[Face] = ()
) -> Document:
    """Draws document `index` of a split.

    Args:
        split: a key of SPLITS.
        index: any non-negative number; together with the other arguments it fixes every pixel.
        grade: one of GRADES, or MIXED: each in turn, by index.
        kind: "label" or "slip" (2:1), "sign" (1:2), "form" or "notice" (about square), "tag" (one tile);
            by seed if None, where it is never "tag".
        faces: fonts to choose from, in place of the split's own.
    """
    if grade == MIXED:
        grade = GRADES[index % len(GRADES)]
    rng = random.Random(f"smolport-documents/1/{split}/{index}/{grade}/{kind}")
    kind = kind or rng.choices(["label", "sign", "slip", "form", "notice"], weights=[25, 15, 20, 25, 15])[0]
    columns, bands = KINDS[kind]
    width, height = columns * TILE, bands * TILE
    if width == height:  # about square: the processor stretches the short side to the grid
        height = round(height * rng.uniform(0.86, 1.0))
    elif width > height:
        height = round(height * rng.uniform(0.9, 1.0))
    else:
        width = round(width * rng.uniform(0.9, 1.0))
    faces = faces or (TEST_FONTS if split == "test" else TRAIN_FONTS)
    sheet = Sheet(rng, width, height, rng.uniform(1.0, 1.7), faces)
    writer = Writer(rng, split)
    hard = grade == "hard"
    size = rng.uniform(12, 15.5) if hard else rng.uniform(16, 22)
    turns: list[Turn] = []
    shape, colour = rng.choice(SHAPES), rng.choice([c for c in COLOURS if not (sheet.dark and c == "black")])
    half = width / 2

    def put_lines(lines: list[str], centres: list[float], left: float, room: float) -> None:
        centred = rng.random() < 0.4
        for line, centre in zip(lines, centres, strict=True):
            fitted = sheet.fit(line, size, room)
            slack = room - sheet.length(line, fitted)
            x = left + (slack / 2 if centred else rng.uniform(0, min(slack, 4.0)))
            sheet.text(line, x, centre, fitted)

    if kind in ("form", "slip"):
        # heading?   | name      value |  names left of the fold, values right of it
        per_half = rng.choice([2, 3])
        centres = [
            c
            for b in range(bands)
            for c in line_centres(rng, height / bands * b + 2, height / bands - 4, per_half, size, hard)
        ]
        lines: list[str] = []
        if bands == 2:
            heading = rng.choice(HEADINGS)
            room = half - 8
            sheet.text(heading, rng.uniform(3, 6), centres[0], sheet.fit(heading, size * 1.1, room))
            lines.append(heading)
            centres = centres[1:]
        names = rng.sample(sorted(FIELDS), len(centres))
        colon, right = rng.random() < 0.5, rng.random() < 0.5
        for name, centre in zip(names, centres, strict=True):
            value = writer.value(FIELDS[name])
            shown = name.capitalize() + (":" if colon else "")
            fitted = min(sheet.fit(shown, size, half - 8), sheet.fit(value, size, half - 8))
            sheet.text(shown, 4.0, centre, fitted)
            x = width - 4 - sheet.length(value, fitted) if right else half + 4
            sheet.text(value, x, centre, fitted)
            lines.append(f"{shown} {value}")
            turns.append(Turn("field", rng.choice(["What is the {}?", "Find the {}."]).format(name), value))
        turns += _line_turns(lines)
    elif kind == "notice":
        per_half = rng.choice([2, 3])
        band = rng.randrange(2)  # the half with the shape; the other has lines across the fold
        lines, centres = [], []
        for b in range(2):
            slots = line_centres(rng, height / 2 * b + 2, height / 2 - 4, per_half, size, hard)
            if b == band:
                corner = rng.randrange(2)
                radius = rng.uniform(16, 28)
                x = half * corner + rng.uniform(radius + 4, half - radius - 4)
                y = height / 2 * b + rng.uniform(radius + 3, max(radius + 3.1, height / 2 - radius - 3))
                sheet.shape(shape, colour, x, y, radius)
                texts = [writer.phrase(8) for _ in slots]
                put_lines(texts, slots, 4 + half * (1 - corner), half - 8)
            else:
                texts = [writer.phrase(13) for _ in slots]
                put_lines(texts, slots, 4, width - 8)
            lines += texts
        turns += _line_turns(lines) + _shape_turns(colour, shape)
    else:
        # label: text | shape (either side)     sign and tag: shape over text (either end) or text alone
        count = rng.choice([2, 3]) if kind != "tag" else rng.choice([1, 2])
        texts = [writer.phrase(8) for _ in range(count)]
        if kind == "label":
            side = rng.randrange(2)
            radius = rng.uniform(18, 34)
            x = half * side + rng.uniform(radius + 4, half - radius - 4)
            sheet.shape(shape, colour, x, height / 2 + rng.uniform(-6, 6), radius)
            put_lines(texts, line_centres(rng, 2, height - 4, count, size, hard), 4 + half * (1 - side), half - 8)
        else:
            side, middle = rng.randrange(2), height / 2
            radius = min(rng.uniform(18, 34), middle / 2 - 3)
            x = rng.uniform(radius + 4, width - radius - 4)
            sheet.shape(shape, colour, x, middle * side + middle / 2, radius)
            put_lines(texts, line_centres(rng, middle * (1 - side) + 2, middle - 4, count, size, hard), 4, width - 8)
        turns += _line_turns(texts) + _shape_turns(colour, shape)

    by_task: dict[str, list[Turn]] = {}
    for turn in turns:
        by_task.setdefault(turn.task, []).append(turn)
    first = rng.choice(by_task[rng.choice(sorted(by_task))])
    rest = [t for t in turns if t is not first]
    rng.shuffle(rest)
    return Document(sheet.wear(grade), (first, *rest), tuple(sheet.glyphs), kind, grade)


def digest(split: str, count: int, grade: str = "clean", draw: Draw = make_document) -> str:
    """SHA-256 over questions, answers and glyph positions of a split's first documents (not its pixels,
    which may differ in the last bit between FreeType versions)."""
    sha = hashlib.sha256()
    for index in range(count):
        document = draw(split, index, grade)
        for turn in document.turns:
            sha.update(f"{turn.task}\t{turn.question}\t{turn.answer}\n".encode())
        for glyph in document.glyphs:
            sha.update(f"{glyph.name}\t{glyph.x:.3f}\t{glyph.y:.3f}\n".encode())
    return sha.hexdigest()


def write_documents(split: str, count: int, grade: str, out: Path, draw: Draw = make_document) -> Iterator[Path]:
    """Writes `count` PNG files and documents.jsonl ({"image", "question", "answer", "task"} a line)."""
    out.mkdir(parents=True, exist_ok=False)
    with (out / "documents.jsonl").open("w", encoding="utf-8") as lines:
        for index in range(count):
            document = draw(split, index, grade)
            path = out / f"{index:05d}.png"
            document.image.save(path)
            turn = document.turns[0]
            row = {"image": path.name, "question": turn.question, "answer": turn.answer, "task": turn.task}
            lines.write(json.dumps(row) + "\n")
            yield path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.documents", description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=sorted(SPLITS), default="test")
    parser.add_argument("--grade", choices=[*GRADES, MIXED], default="clean")
    parser.add_argument("--count", type=int, default=500, help="documents (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    args = parser.parse_args()
    for _ in write_documents(args.split, args.count, args.grade, args.out):
        pass
    print(f"{args.count} documents of split {args.split} ({args.grade}) in {args.out}")
    print(f"digest {digest(args.split, args.count, args.grade)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
