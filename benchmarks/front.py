"""Formats of groups of tensors, traded for size: the convex front between bytes and loss.

Each group has a few formats, each with a size and a loss, and losses are taken to add up over groups. Of all
combinations that are least in size + loss / price for some price, each follows from the one before by moving one group
to its next format: the step that loses least for each byte saved comes first (H. Everett, "Generalized Lagrange
multiplier method", Operations Research 11, 1963; for rate and distortion: Y. Shoham and A. Gersho, 1988). Not covered:
combinations between two of these points, of which one may be a little smaller at the same loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Option:
    """A group in one of its formats."""

    format: str
    size_bytes: int
    loss: float


@dataclass(frozen=True)
class Point:
    """A format for every group, in the order of the groups."""

    formats: tuple[str, ...]
    size_bytes: int
    loss: float


def convex_options(options: Sequence[Option]) -> list[Option]:
    """Those of a group's formats that any price may choose: smaller and smaller, each step dearer than the last."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda one: (one.loss, one.size_bytes)):
        if kept and option.size_bytes >= kept[-1].size_bytes:
            continue
        while len(kept) > 1 and _price(kept[-2], kept[-1]) >= _price(kept[-1], option):
            kept.pop()
        kept.append(option)
    return kept


def convex_front(groups: Sequence[Sequence[Option]], rest_bytes: int) -> list[Point]:
    """All points of the front, from the least loss to the least size.

    Args:
        groups: the formats of each.
        rest_bytes: what is stored besides, whatever the formats.
    """
    chains = [convex_options(options) for options in groups]
    now = [chain[0] for chain in chains]
    points = [_point(now, rest_bytes)]
    steps = [(_price(a, b), i, b) for i, chain in enumerate(chains) for a, b in pairwise(chain)]
    for _, i, option in sorted(steps, key=lambda step: step[:2]):  # steps of one group stay in their order
        now[i] = option
        points.append(_point(now, rest_bytes))
    return points


def first_within_size(front: Sequence[Point], max_bytes: float) -> int | None:
    """The number of the point of least loss among those of at most so many bytes."""
    return next((i for i, point in enumerate(front) if point.size_bytes <= max_bytes), None)


def last_within_loss(front: Sequence[Point], max_loss: float, scale: float = 1.0) -> int | None:
    """The number of the smallest point whose loss, times `scale`, is at most so much."""
    found = [i for i, point in enumerate(front) if point.loss * scale <= max_loss]
    return found[-1] if found else None


def _price(larger: Option, smaller: Option) -> float:
    """Loss for each byte saved."""
    return (smaller.loss - larger.loss) / (larger.size_bytes - smaller.size_bytes)


def _point(options: Sequence[Option], rest_bytes: int) -> Point:
    return Point(
        tuple(option.format for option in options),
        sum(option.size_bytes for option in options) + rest_bytes,
        sum(option.loss for option in options),
    )
