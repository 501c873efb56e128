"""A report as Markdown and as one HTML page from the same parts. The page needs no network and no script, is light or
dark as the reader's system is, and fits a phone: what is wider scrolls in its own box. Every text is escaped here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.markdown import cell

MOST = 2000  # characters of a paragraph
STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --ink: #1a1a19; --muted: #5f5e58; --line: #deddd6; --grid: #ebeae4;
  --blue: #2a6fc9; --faint: #2a6fc966; --green: #1d7f49; --red: #c22f2f; --band: #8884;
  --card: #fff }
@media (prefers-color-scheme: dark) { :root { --page: #171716; --ink: #eeede8; --muted: #a9a89f; --line: #3a3a37;
  --grid: #2b2b29; --blue: #6ba6f2; --faint: #6ba6f277; --green: #55c285; --red: #f27a7a;
  --band: #8886; --card: #1f1f1e } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1120px; padding: 16px; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 8px 0 }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 40px 0 8px; padding-top: 16px; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 24px 0 8px }
p { margin: 8px 0; max-width: 75ch }
.verdict { border-left: 4px solid var(--line); padding: 4px 12px; font-weight: 600 }
.verdict.good { border-color: var(--green) }
.verdict.bad { border-color: var(--red) }
dl { display: grid; grid-template-columns: minmax(0, max-content) minmax(0, 1fr); gap: 2px 16px; margin: 8px 0 }
dt { color: var(--muted) }
dd { margin: 0 }
.scroll { overflow-x: auto; margin: 8px 0; border: 1px solid var(--line); border-radius: 6px; background: var(--card) }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums;
  overflow-wrap: normal }
th, td { padding: 6px 12px; text-align: right; white-space: nowrap }
th:first-child, td:first-child, .left { text-align: left }
thead th { color: var(--muted); font-weight: 600; border-bottom: 1px solid var(--line) }
tbody tr + tr > * { border-top: 1px solid var(--grid) }
tbody th { font-weight: 500 }
.plots { display: grid; gap: 16px; margin: 16px 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)) }
figure { margin: 0; padding: 12px 8px; max-width: 540px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card) }
figcaption { font-size: 14px; color: var(--muted); padding: 4px 4px 0 }
figure > strong { display: block; font-size: 14px; padding: 0 4px 4px }
.plot { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif }
.plot .ink { fill: var(--ink) } .plot .muted { fill: var(--muted) } .plot .value { fill: var(--ink); font-size: 10px }
.plot .grid { stroke: var(--grid) } .plot .axis { stroke: var(--muted) } .plot .mark { stroke: var(--muted);
  stroke-dasharray: 2 3; opacity: .7 }
.plot .limit { stroke: var(--red); stroke-dasharray: 5 3 } .plot .band { fill: var(--band) }
.plot .sample { fill: var(--faint) } .plot .range { stroke: var(--blue); stroke-width: 2.5 }
.plot .middle { stroke: var(--ink); stroke-width: 2 } .plot .point { fill: var(--blue) }
.plot .trace, .plot .behind { fill: none; stroke: var(--blue); stroke-width: 1.6; stroke-linejoin: round }
.plot .behind { stroke: var(--faint) }
.plot .range.worse { stroke: var(--red) } .plot .point.worse { fill: var(--red) }
.plot .range.better { stroke: var(--green) } .plot .point.better { fill: var(--green) }
"""


@dataclass(frozen=True)
class Heading:
    """A heading of level 1 to 3."""

    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph. mood: "" for plain text; "good" or "bad" for a verdict."""

    text: str
    mood: str = ""


@dataclass(frozen=True)
class Facts:
    """Names and what they are."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """The first column names the row. `left`: numbers of columns of words."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plot:
    """An SVG of `benchmarks.plots`, which is on the page alone."""

    title: str
    svg: str
    caption: str = ""


Block = Heading | Text | Facts | Table | Sequence[Plot]


def markdown(blocks: Sequence[Block]) -> str:
    """The parts as Markdown, without the plots."""
    return "\n\n".join(filter(None, map(_markdown, blocks))) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {cell(text, MOST)}"
        case Text(text, mood):
            return f"**{cell(text, MOST)}**" if mood else cell(text, MOST)
        case Facts(rows):
            return "\n".join(["| | |", "|---|---|", *(_row(row) for row in rows)])
        case Table(_, head, rows):
            return "\n".join([_row(head), "|" + "---|" * len(head), *map(_row, rows)])
    return ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell(text, MOST) for text in cells)} |"


def page(title: str, blocks: Sequence[Block]) -> str:
    """The parts as one HTML page."""
    body = "\n".join(line for block in blocks for line in _html(block))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html(block: Block) -> Iterator[str]:
    match block:
        case Heading(level, text):
            yield f"<h{level}>{escape(text)}</h{level}>"
        case Text(text, mood):
            yield f'<p class="verdict {mood}">{escape(text)}</p>' if mood else f"<p>{escape(text)}</p>"
        case Facts(rows):
            yield "<dl>"
            yield from (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows)
            yield "</dl>"
        case Table():
            yield from _html_table(block)
        case _:
            yield '<div class="plots">'
            for plot in block:
                caption = f"<figcaption>{escape(plot.caption)}</figcaption>" if plot.caption else ""
                yield f"<figure><strong>{escape(plot.title)}</strong>{plot.svg}{caption}</figure>"
            yield "</div>"


def _html_table(table: Table) -> Iterator[str]:
    def kind(column: int) -> str:
        return ' class="left"' if column in table.left else ""

    yield f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.title)}"><table>'
    head = "".join(f'<th scope="col"{kind(i)}>{escape(text)}</th>' for i, text in enumerate(table.head))
    yield f"<thead><tr>{head}</tr></thead><tbody>"
    for first, *rest in table.rows:
        cells = "".join(f"<td{kind(i)}>{escape(text)}</td>" for i, text in enumerate(rest, 1))
        yield f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'
    yield "</tbody></table></div>"
