"""Small ruled tables with questions about their cells: documents that the carried checkpoint was not trained on.

A table is a function of (split, index, grade), as a document of `demo.documents` is, whose splits, fonts and values
it shares. Rows count from 1 below the header, if there is one.

    python -m demo.tables --split test --count 500 --out build/tables

writes PNG files and `documents.jsonl`, the format that `make export-android DATA=` reads.
"""

import argparse
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from demo.documents import (
    FIELDS,
    GRADES,
    MIXED,
    SPLITS,
    TEST_FONTS,
    TILE,
    TRAIN_FONTS,
    Document,
    Face,
    Sheet,
    Turn,
    Writer,
    digest,
    write_documents,
)

COLUMNS = (2, 3)
LONGEST = {2: 8, 3: 6}  # characters of a value, by the number of columns; a date has 8
MARGIN, PADDING = 4.0, 3.5  # units between the paper's edge and the table, between a rule and its text


def make_table(split: str, index: int, grade: str = "clean", faces: Sequence[Face] = ()) -> Document:
    """Draws table `index` of a split on 2 x 2 tiles; arguments as in `demo.documents.make_document`."""
    if grade == MIXED:
        grade = GRADES[index % len(GRADES)]
    rng = random.Random(f"smolport-tables/1/{split}/{index}/{grade}")
    width, height = 2 * TILE, round(2 * TILE * rng.uniform(0.86, 1.0))
    sheet = Sheet(rng, width, height, rng.uniform(1.0, 1.7), faces or (TEST_FONTS if split == "test" else TRAIN_FONTS))
    # A rule lies on the fold between the tiles: lines of text are never cut lengthwise, though columns may be.
    above, below = rng.choice([(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2)])
    columns = rng.choice(COLUMNS)
    ys = [*_parts(MARGIN, height / 2, above), *_parts(height / 2, height - MARGIN, below)[1:]]
    xs = _parts(MARGIN, width - MARGIN, columns)
    header = above + below > 2 and rng.random() < 0.5
    names = rng.sample([name for name, kind in sorted(FIELDS.items()) if columns == 2 or kind != "date"], columns)
    cells = _cells(Writer(rng, split), names, above + below - header)

    ink = sheet.ink if rng.random() < 0.5 else ((150, 150, 150) if sheet.dark else (130, 130, 130))
    for lines, across in ((ys, True), (xs, False)):
        for at in lines:
            ends = ((xs[0], at), (xs[-1], at)) if across else ((at, ys[0]), (at, ys[-1]))
            thick = 2.0 if header and across and at == ys[1] else 0.8
            sheet.line(ends, ink, thick)
    grid = [[name.capitalize() for name in names], *cells] if header else cells
    room = xs[1] - xs[0] - 2 * PADDING
    size = rng.uniform(12, 15.5) if grade == "hard" else rng.uniform(15, 20)
    size = min(sheet.fit(text, size, room) for line in grid for text in line)
    centred = [rng.random() < 0.5 for _ in names]
    for line, (top, bottom) in zip(grid, pairwise(ys), strict=True):
        play = max(0.0, (bottom - top) / 2 - size * 0.62 - 2)
        centre = (top + bottom) / 2 + rng.uniform(-play, play) * 0.5
        for text, left, in_middle in zip(line, xs, centred, strict=False):
            slack = room - sheet.length(text, size)
            sheet.text(text, left + PADDING + (slack / 2 if in_middle else 0.0), centre, size)

    turns = []
    for r, row in enumerate(cells, 1):
        for c, (name, value) in enumerate(zip(names, row, strict=True), 1):
            turns.append(Turn("cell", f"What is in row {r}, column {c}?", value))
            if header:
                turns.append(Turn("column", f"What is the {name} in row {r}?", value))
    rng.shuffle(turns)
    return Document(sheet.wear(grade), tuple(turns), tuple(sheet.glyphs), "table", grade)


def _parts(start: float, end: float, count: int) -> list[float]:
    """The edges of `count` equal parts."""
    return [start + (end - start) * i / count for i in range(count + 1)]


def _cells(writer: Writer, names: Sequence[str], rows: int) -> list[list[str]]:
    """Values that are short enough for their columns, no two of a table the same."""
    seen: set[str] = set()
    cells: list[list[str]] = []
    for _ in range(rows):
        cells.append([])
        for name in names:
            value = writer.value(FIELDS[name])
            while value in seen or len(value) > LONGEST[len(names)]:
                value = writer.value(FIELDS[name])
            seen.add(value)
            cells[-1].append(value)
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.tables", description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=sorted(SPLITS), default="test")
    parser.add_argument("--grade", choices=[*GRADES, MIXED], default="clean")
    parser.add_argument("--count", type=int, default=500, help="tables (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    args = parser.parse_args()
    for _ in write_documents(args.split, args.count, args.grade, args.out, make_table):
        pass
    print(f"{args.count} tables of split {args.split} ({args.grade}) in {args.out}")
    print(f"digest {digest(args.split, args.count, args.grade, make_table)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
