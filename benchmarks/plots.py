"""Plots as SVG inside a page: colours are the page's CSS classes, so that one drawing serves light and dark.

A plot is 360 units wide with text of 11: on a phone that is its size in pixels, on a wide screen it grows. Every plot
has a title and a description for those who cannot see it. Texts from files are escaped here.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360
LETTER = 6.9  # the width of a character, about
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 38
MOST_POINTS = 400  # of a line


@dataclass(frozen=True)
class Scale:
    """Numbers to places along an axis, and where its ticks are."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers along it."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1,) if self.high / self.low > 300 else (1, 2, 5)
            return [
                s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d * 1.0000001 <= self.high * 1.0001
            ]
        step = nice(abs(self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def nice(step: float) -> float:
    """The next round number: 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(s * power for s in (1, 2, 5, 10) if s * power >= step * 0.999)


def linear(values: Sequence[float], start: float, end: float, *, zero: bool = True) -> Scale:
    """A scale that holds all values, from 0 if asked for, to a round number."""
    high, low = max(values), 0.0 if zero else min(values)
    step = nice(max(high - low, abs(high) * 1e-6, 1e-12) / 5)
    return Scale(math.floor(low / step) * step, (math.floor(high / step) + 1) * step, start, end)


def logarithmic(values: Sequence[float], start: float, end: float) -> Scale:
    """A scale that holds all values, which are above 0, with room at both ends."""
    low, high = min(values) / 1.3, max(values) * 1.3
    if high / low < 12:  # so that there are a few ticks
        middle = math.sqrt(low * high)
        low, high = min(low, middle / 3.5), max(high, middle * 3.5)
    return Scale(low, high, start, end, log=True)


def short(value: float) -> str:
    """A number in few characters: three digits that count."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e7:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


class Drawing:
    """Marks on a plot, as they are added."""

    def __init__(self, height: float) -> None:
        self.height = height
        self._marks: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """A line of a CSS class."""
        self._marks.append(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def path(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A line through points."""
        self._marks.append(f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """A filled rectangle."""
        self._marks.append(f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>')

    def dot(self, x: float, y: float, kind: str, radius: float = 2.5) -> None:
        """A filled circle."""
        self._marks.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>')

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "start", kind: str = "ink", turn: bool = False
    ) -> None:
        """A text that begins, ends or is in the middle at a place; `turn` has it read upwards."""
        turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
        self._marks.append(
            f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}>{escape(text)}</text>'
        )

    def x_axis(self, scale: Scale, label: str, top: float, ticks: Sequence[float] | None = None) -> None:
        """Ticks with their numbers below, a grid, and what they are of; numbers that would touch are left out."""
        bottom, free = self.height - BOTTOM, -1e9
        for value in scale.ticks() if ticks is None else ticks:
            x, text = scale(value), short(value)
            self.line(x, top, x, bottom, "grid")
            half = len(text) * LETTER / 2
            if x - half > free + 4 and x + half <= WIDTH:
                self.text(x, bottom + 14, text, anchor="middle", kind="muted")
                free = x + half
        self.line(scale.start, bottom, scale.end, bottom, "axis")
        self.text((scale.start + scale.end) / 2, self.height - 6, label, anchor="middle")

    def y_axis(self, scale: Scale, label: str, right: float) -> None:
        """Ticks with their numbers to the left, a grid, and what they are of."""
        for value in scale.ticks():
            y = scale(value)
            self.line(LEFT, y, right, y, "grid")
            self.text(LEFT - 5, y + 4, short(value), anchor="end", kind="muted")
        self.text(10, (scale.start + scale.end) / 2, label, anchor="middle", turn=True)

    def svg(self, name: str, title: str, description: str) -> str:
        """The plot; `name` is its own on the page."""
        return (
            f'<svg class="plot" viewBox="0 0 {WIDTH} {self.height:g}" role="img" '
            f'aria-labelledby="{name}-title {name}-desc">'
            f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
            f"{''.join(self._marks)}</svg>"
        )


@dataclass(frozen=True)
class Bar:
    """A row of a plot of ranges: all samples, the range of most of them, and the middle."""

    name: str
    samples: Sequence[float]
    low: float
    middle: float
    high: float


def ranges_plot(name: str, title: str, bars: Sequence[Bar], label: str) -> str:
    """A row for each bar on a logarithmic axis; the number is the middle."""
    row, top = 30, TOP + 4
    drawing = Drawing(top + row * len(bars) + BOTTOM)
    left = max(LEFT, 8 + LETTER * max(len(bar.name) for bar in bars))
    every = [sample for bar in bars for sample in (*bar.samples, bar.low, bar.high)]
    scale = logarithmic(every, left, WIDTH - RIGHT)
    drawing.x_axis(scale, label, top)
    for i, bar in enumerate(bars):
        y = top + row * i + row * 0.64
        drawing.text(left - 6, y + 4, bar.name, anchor="end")
        for sample in _thinned(sorted(bar.samples)):
            drawing.dot(scale(sample), y, "sample", 2)
        drawing.line(scale(bar.low), y, scale(bar.high), y, "range")
        middle = scale(bar.middle)
        drawing.line(middle, y - 6, middle, y + 6, "middle")
        text = short(bar.middle)
        half = len(text) * LETTER / 2
        drawing.text(min(max(middle, left + half), WIDTH - half), y - 9, text, anchor="middle", kind="value")
    said = "; ".join(f"{bar.name} {short(bar.middle)}" for bar in bars)
    return drawing.svg(name, title, f"Medians, {label}: {said}.")


def _thinned(values: Sequence[float]) -> Sequence[float]:
    return values[:: max(1, len(values) // 100)]


@dataclass(frozen=True)
class Trace:
    """A run's memory over time, and the number and start of each phase."""

    points: Sequence[tuple[float, float]]
    starts: Sequence[tuple[float, int]]


def memory_plot(name: str, title: str, traces: Sequence[Trace], limit_mib: float | None) -> str:
    """Memory over time: the first trace with its phases' starts, others behind it; a limit if it is near."""
    drawing, top = Drawing(240), TOP + 42
    every = [mib for trace in traces for _, mib in trace.points]
    ends = [s for trace in traces for s, _ in trace.points]
    near = limit_mib is not None and limit_mib < 2 * max(every)
    x = linear(ends, LEFT, WIDTH - RIGHT)
    y = linear([*every, limit_mib] if near and limit_mib is not None else every, drawing.height - BOTTOM, top)
    drawing.x_axis(x, "time since the process began, s", top)
    drawing.y_axis(y, "resident memory, MiB", WIDTH - RIGHT)
    last = [-1e9] * 3  # where the last number of each level ends: numbers that would touch go a level up
    for s, number in traces[0].starts:
        place, text = x(min(s, x.high)), str(number)
        level = next((i for i, end in enumerate(last) if place - len(text) * LETTER / 2 > end + 3), len(last) - 1)
        last[level] = place + len(text) * LETTER / 2
        high = top - 5 - 13 * level
        drawing.line(place, high + 2, place, drawing.height - BOTTOM, "mark")
        drawing.text(place, high, text, anchor="middle", kind="value")
    for trace in reversed(traces):
        points = [(x(s), y(mib)) for s, mib in highest(trace.points)]
        drawing.path(points, "trace" if trace is traces[0] else "behind")
    if near and limit_mib is not None:
        drawing.line(LEFT, y(limit_mib), WIDTH - RIGHT, y(limit_mib), "limit")
        drawing.text(WIDTH - RIGHT, y(limit_mib) - 4, f"limit {short(limit_mib)}", anchor="end", kind="value")
    description = f"From 0 to {short(max(ends))} s; at most {short(max(every))} MiB in {len(traces)} runs."
    return drawing.svg(name, title, description)


def highest(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most so many points: of each part of the line the highest, so that no peak is lost."""
    size = math.ceil(len(points) / most)
    return [max(points[i : i + size], key=lambda point: point[1]) for i in range(0, len(points), size)]


@dataclass(frozen=True)
class Place:
    """A point of a curve: at x a middle, from low to high, and all samples."""

    x: float
    middle: float
    low: float
    high: float
    samples: Sequence[float] = ()


def curve_plot(name: str, title: str, places: Sequence[Place], labels: tuple[str, str], *, zero: bool = True) -> str:
    """A line through the middles, ranges and samples; ticks at the points' own x."""
    drawing = Drawing(220)
    values = [v for p in places for v in (p.low, p.high, p.middle, *p.samples)]
    x = Scale(0, max(p.x for p in places) * 1.06 or 1.0, LEFT + 4, WIDTH - RIGHT)
    y = linear(values, drawing.height - BOTTOM, TOP + 8, zero=zero)
    drawing.x_axis(x, labels[0], TOP + 8, [p.x for p in places])
    drawing.y_axis(y, labels[1], WIDTH - RIGHT)
    drawing.path([(x(p.x), y(p.middle)) for p in places], "trace")
    for place in places:
        for sample in _thinned(place.samples):
            drawing.dot(x(place.x), y(sample), "sample", 2)
        if not place.samples:
            drawing.line(x(place.x), y(place.low), x(place.x), y(place.high), "range")
        drawing.dot(x(place.x), y(place.middle), "point", 3.5)
        text = short(place.middle)
        half = len(text) * LETTER / 2
        above = y(max([place.high, *place.samples])) - 7
        drawing.text(min(max(x(place.x), LEFT + half + 6), WIDTH - half), above, text, anchor="middle", kind="value")
    said = "; ".join(f"{short(place.x)}: {short(place.middle)}" for place in places)
    return drawing.svg(name, title, f"{labels[1]} by {labels[0]}: {said}.")


@dataclass(frozen=True)
class Mark:
    """A named point with an interval upwards and downwards."""

    name: str
    x: float
    y: float
    low: float
    high: float


def scatter_plot(name: str, title: str, marks: Sequence[Mark], labels: tuple[str, str]) -> str:
    """Named points, y logarithmic; names stand where they touch no other name or point."""
    drawing = Drawing(260)
    right = WIDTH - RIGHT - 12 - LETTER * max(len(m.name) for m in marks)  # room for the names
    high = max(m.x for m in marks)
    x = linear([high, high * (WIDTH - RIGHT - LEFT) / max(right - LEFT, WIDTH / 3)], LEFT + 4, WIDTH - RIGHT)
    y = logarithmic([v for m in marks for v in (m.low, m.high, m.y)], drawing.height - BOTTOM, TOP)
    drawing.x_axis(x, labels[0], TOP)
    drawing.y_axis(y, labels[1], WIDTH - RIGHT)
    taken = [(x(m.x) - 5, y(m.y) - 5, x(m.x) + 5, y(m.y) + 5) for m in marks]
    for mark in marks:
        drawing.line(x(mark.x), y(mark.low), x(mark.x), y(mark.high), "range")
        drawing.dot(x(mark.x), y(mark.y), "point", 4)
    for mark in sorted(marks, key=lambda m: m.y):
        box = next(filter(_free(taken), _boxes(x(mark.x), y(mark.y), len(mark.name) * LETTER)), None)
        if box is None:  # nowhere without touching: the table has it
            continue
        taken.append(box)
        drawing.text(box[0], box[3] - 3, mark.name)
    said = "; ".join(f"{m.name} {short(m.x)}, {short(m.y)}" for m in marks)
    return drawing.svg(name, title, f"{labels[0]}, {labels[1]}: {said}.")


Box = tuple[float, float, float, float]


def _boxes(x: float, y: float, width: float) -> Iterator[Box]:
    """Places for a name about a point: right, left, then lower and higher."""
    for dy in (0, 13, -13, 26, -26, 39, -39):
        yield x + 8, y - 7 + dy, x + 8 + width, y + 7 + dy
        yield x - 8 - width, y - 7 + dy, x - 8, y + 7 + dy


def _free(taken: Sequence[Box]) -> Callable[[Box], bool]:
    def free(box: Box) -> bool:
        inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0
        return inside and all(
            box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1] for other in taken
        )

    return free


@dataclass(frozen=True)
class Forest:
    """A ratio with its interval, None where there are too few runs."""

    name: str
    ratio: float
    interval: tuple[float, float] | None
    kind: str  # CSS class: "worse", "better" or "same"


def forest_plot(name: str, title: str, rows: Sequence[Forest], least_effect: float) -> str:
    """Ratios on a logarithmic axis about 1, the effects that do not matter as a band."""
    row, top = 26, TOP
    drawing = Drawing(top + row * len(rows) + BOTTOM)
    left = max(LEFT, 8 + LETTER * max(len(r.name) for r in rows))
    every = [value for r in rows for value in (r.ratio, *(r.interval or ()))]
    far = max(*every, 1 / min(every), (1 + least_effect) ** 2, 1.1) ** 1.08
    scale = Scale(1 / far, far, left, WIDTH - RIGHT, log=True)
    steps = [0.1, 0.2, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.4, 2.0, 5.0, 10.0]
    wide = 4 if far > 2 else 2 if far > 1.25 else 1
    ticks = [t for t in steps if scale.low <= t <= scale.high and (wide == 1 or t not in (0.95, 1.05))]
    ticks = [t for t in ticks if wide < 4 or t in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)]
    bottom = drawing.height - BOTTOM
    drawing.box(
        scale(1 / (1 + least_effect)),
        top,
        scale(1 + least_effect) - scale(1 / (1 + least_effect)),
        bottom - top,
        "band",
    )
    drawing.x_axis(scale, "new / base (above 1: takes more)", top, ticks)
    drawing.line(scale(1), top, scale(1), bottom, "axis")
    for i, one in enumerate(rows):
        y = top + row * (i + 0.5)
        drawing.text(left - 6, y + 4, one.name, anchor="end")
        if one.interval:
            drawing.line(scale(one.interval[0]), y, scale(one.interval[1]), y, f"range {one.kind}")
        drawing.dot(scale(one.ratio), y, f"point {one.kind}", 4)
    said = "; ".join(f"{r.name} {r.ratio:.3f}" for r in rows)
    return drawing.svg(name, title, f"Ratios with 95 % intervals: {said}.")
