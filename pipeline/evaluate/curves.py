"""Curves as the coordinates of an SVG: scales, ticks, and long series brought to as many points as can be seen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]

WIDTH, HEIGHT = 460, 250  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 58, 8, 8, 24  # margins
MOST = 250  # points of a curve; more are averaged
WIDE = 4.0  # largest value over the smallest, from which on the scale is logarithmic


@dataclass(frozen=True, slots=True)
class Line:
    """A curve of one run."""

    run: int  # its number
    points: str  # of an SVG polyline


@dataclass(frozen=True, slots=True)
class Chart:
    """A panel with a curve a run."""

    title: str
    lines: list[Line]
    across: list[tuple[float, str]]  # ticks of images: place and text
    up: list[tuple[float, str]]  # ticks of values
    logarithmic: bool


def draw_chart(title: str, series: dict[int, list[Point]]) -> Chart | None:
    """A chart of curves by the run's number, each with x rising; None where no curve has two points."""
    curves = {run: averaged(points) for run, points in series.items() if len(points) > 1}
    if not curves:
        return None
    (x_low, x_high), (low, high) = (
        bounds([point[axis] for line in curves.values() for point in line]) for axis in (0, 1)
    )
    logarithmic = low > 0 and high / low > WIDE
    scale = math.log10 if logarithmic else float
    bottom, top = scale(low), scale(high)
    if bottom == top:
        bottom, top = bottom - 0.5, top + 0.5

    def place(x: float, y: float) -> Point:
        right, over = (x - x_low) / max(x_high - x_low, 1e-300), (scale(y) - bottom) / (top - bottom)
        return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - over * (HEIGHT - TOP - BOTTOM)

    lines = [
        Line(run, " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points)))
        for run, points in curves.items()
    ]
    values = logarithmic_ticks(low, high) if logarithmic else ticks(low, high)
    return Chart(
        title=title,
        lines=lines,
        across=[(place(tick, low)[0], short(tick)) for tick in ticks(x_low, x_high)],
        up=[(place(x_low, tick)[1], short(tick)) for tick in values],
        logarithmic=logarithmic,
    )


def averaged(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """At most so many points: means of as many consecutive ones each."""
    each = -(-len(points) // most)
    parts = [points[first : first + each] for first in range(0, len(points), each)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def bounds(values: Sequence[float]) -> Point:
    return min(values), max(values)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About so many round numbers within the bounds, 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw)) if raw else 0.0
    if not power:  # bounds so close that it underflows
        return [low]
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, first + 4 * count) if number * step <= high + 1e-9 * step]


def logarithmic_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within the bounds; of few decades also 2 and 5 times those."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) < 5 else (1,)
    every = -(-len(decades) // 6)
    found = (factor * 10.0**decade for decade in decades[::every] for factor in factors)
    return [tick for tick in found if low <= tick <= high]


def short(value: float) -> str:
    """Three significant digits, with K, M or G for thousands, millions and more."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size and value < 1e15:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
