"""In: files as points of time and quality. Out: their places, front, ticks and labels in the pixels of a drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LETTER_PX, LINE_PX = 7, 14
"""About the width and the line height of a 12 px sans-serif."""


@dataclass(frozen=True)
class Point:
    """One file or trial.

    Attributes:
        ms: Time of one inference, > 0.
        y: Quality; the drawing's `higher_is_better` says which way.
        role: `predicted` (its time is an estimate), `trial`, `recovered`, `candidate`, `unpruned` or `shipped`,
            in the order in which marks cover one another.
        name: Written beside the mark, or ``.
    """

    ms: float
    y: float
    role: str
    name: str = ""


ROLES = ("predicted", "trial", "recovered", "candidate", "unpruned", "shipped")


@dataclass(frozen=True)
class Mark:
    """A point at its place."""

    point: Point
    x: float
    y: float


@dataclass(frozen=True)
class Label:
    """A name, right of `x` (anchor `start`) or left of it (`end`), with the pixels it covers."""

    text: str
    role: str
    x: float
    y: float
    anchor: str
    span: tuple[float, float]


@dataclass(frozen=True)
class Drawing:
    """A scatter in pixels: `front` is an SVG path, ticks are (pixel, text)."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    marks: tuple[Mark, ...]
    labels: tuple[Label, ...]
    front: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def frame(points: Sequence[Point], least: float) -> tuple[float, float]:
    """Return the range of y to draw: around what could ship, with room of two spans or `least` for other trials.

    Trials before recovery can be far below everything else; a frame that holds them all would show nothing.
    """
    shippable = [p.y for p in points if p.role not in ("predicted", "trial")] or [p.y for p in points]
    reach = max(2 * (max(shippable) - min(shippable)), least)
    inside = [p.y for p in points if min(shippable) - reach <= p.y <= max(shippable) + reach]
    margin = max(0.06 * (max(inside) - min(inside)), least / 10)
    return min(inside) - margin, max(inside) + margin


def front(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """Return the points that no other point beats in both time and quality, fastest first."""
    sign = 1 if higher_is_better else -1
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.ms, -sign * p.y)):
        if not best or sign * point.y > sign * best[-1].y:
            best.append(point)
    return best


def draw(
    points: Sequence[Point], y_range: tuple[float, float], size: tuple[int, int], *, higher_is_better: bool
) -> Drawing:
    """Place points inside `y_range` in a drawing of `size` pixels: time logarithmic, better always upwards."""
    width, height = size
    left, right, top, bottom = 44, width - 12, 26, height - 40
    low, high = min(p.ms for p in points) / 1.12, max(p.ms for p in points) * 1.12

    def across(ms: float) -> float:
        return round(left + (right - left) * math.log(ms / low) / math.log(high / low), 1)

    def down(y: float) -> float:
        share = (y - y_range[0]) / (y_range[1] - y_range[0])
        return round(bottom - (bottom - top) * (share if higher_is_better else 1 - share), 1)

    marks = [Mark(p, across(p.ms), down(p.y)) for p in sorted(points, key=lambda p: ROLES.index(p.role))]
    corners = front([p for p in points if p.role != "predicted"], higher_is_better)
    steps = [f"{'H' if i else 'M'}{across(p.ms)}{'V' if i else ','}{down(p.y)}" for i, p in enumerate(corners)]
    return Drawing(
        *size,
        left,
        right,
        top,
        bottom,
        marks=tuple(marks),
        labels=tuple(_labels([mark for mark in marks if mark.point.name], right)),
        front="".join(steps),
        x_ticks=tuple((across(ms), f"{ms:g}") for ms in log_ticks(low, high)),
        y_ticks=tuple((down(y), f"{y:g}") for y in ticks(*y_range, count=5)),
    )


def _labels(marks: Sequence[Mark], right: float) -> list[Label]:
    """Write each name above its mark, leftwards near the right edge, below the mark where another name is there."""
    placed: list[Label] = []
    for mark in sorted(marks, key=lambda m: (m.point.role != "shipped", m.y)):
        length = LETTER_PX * len(mark.point.name)
        leftwards = mark.x + length > right
        start = mark.x + 6 - length if leftwards else mark.x - 6
        y = mark.y - 12
        while any(
            abs(y - other.y) < LINE_PX and start < other.span[1] and other.span[0] < start + length for other in placed
        ):
            y += 34 if y < mark.y else LINE_PX
        placed.append(
            Label(
                mark.point.name,
                mark.point.role,
                round(start + length if leftwards else start, 1),
                round(y, 1),
                "end" if leftwards else "start",
                (start, start + length),
            )
        )
    return placed


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return round values (1, 2 or 5 times a power of ten apart) within [low, high], about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    return [round(step * i, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten within [low, high], or evenly spaced values where the range is short."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    candidates = [round(factor * 10.0**power, 10) for power in powers for factor in (1, 2, 5)]
    inside = [tick for tick in candidates if low <= tick <= high]
    return inside if len(inside) >= 3 else ticks(low, high, count=5)
