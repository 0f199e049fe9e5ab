"""Quality against cost, of every method and all three sets, as one picture.

    python benchmarks/cost.py

Reads the tables in benchmarks/results and writes docs/cost.svg. A point is a run: processor seconds of training, and
the Frechet distance of its samples f(z) in multiples of that of real images, the floor. It is one floor for all runs
of a set, also for those of older tables, which were divided by another draw's.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
SETS = {
    "MNIST": ("rivals", "imle"),
    "Fashion-MNIST": ("rivals_fashion",),
    "CIFAR-10": ("rivals_cifar10", "imle_cifar10"),
}
NOISE = "NAIGN, f of noise"
WITH_CLASSES = "with classes"
METHODS = {
    "NAIGN": "NAIGN, prior",
    "the paper's two terms": NOISE,
    "f of noise by IMLE": NOISE,
    "autoencoder, flow": "autoencoder, flow",
    "autoencoder, code": "autoencoder, mixture",
    "denoising autoencoder": "autoencoder, mixture",
    "VAE": "VAE",
    "flow": "flow in pixels",
    "IGN": "IGN",
}
"""Methods by the beginning of a row's name; other rows are not shown."""
SHAPES = {  # around (0, 0)
    "NAIGN, prior": ("ours", "M-6 0A6 6 0 1 0 6 0A6 6 0 1 0-6 0Z"),
    NOISE: ("ours open", "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0-5 0Z"),
    "autoencoder, flow": ("ours", "M-5-5H5V5H-5Z"),
    WITH_CLASSES: ("ours", "M0-8L8 0L0 8L-8 0Z"),
    "autoencoder, mixture": ("other", "M-5-5H5V5H-5Z"),
    "VAE": ("other", "M0-6L6 5L-6 5Z"),
    "flow in pixels": ("other open", "M-6 0H6M0-6V6"),
    "IGN": ("other open", "M-5-5L5 5M5-5L-5 5"),
}
WIDTH = 560
"""Pixels of the picture."""
LEFT = 58
"""To the axis."""
PANEL = 150
"""A panel's height."""
GAP = 34
"""Between panels."""
TOP = 104
"""Above the first."""
COST = (80, 7000)
DISTANCE = (1, 4000)
"""Ends of the axes."""
TICKS = (100, 300, 1000, 3000)
STYLE = """\
text { font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #59636e; }
.name { font-weight: 600; fill: #1f2328; }
.grid { stroke: #d1d9e0; }
.floor { stroke: #59636e; stroke-dasharray: 4 3; }
.ours { fill: #2d6cdf; stroke: #2d6cdf; stroke-width: 2; }
.other { fill: #e07a1f; stroke: #e07a1f; stroke-width: 2; }
.open { fill: none; }
.back { fill: #ffffff; }
@media (prefers-color-scheme: dark) {
  text { fill: #9198a1; }
  .name { fill: #f0f6fc; }
  .grid { stroke: #3d444d; }
  .floor { stroke: #9198a1; }
  .ours { fill: #5b8def; stroke: #5b8def; }
  .other { fill: #e58b3a; stroke: #e58b3a; }
  .open { fill: none; }
  .back { fill: #0d1117; }
}"""


def points(name: str) -> Iterator[tuple[str, float, float]]:
    """(method, processor seconds, distance in multiples of the floor) of every run of a set that recorded both."""
    tables = {}
    for table in (*SETS[name], "classes"):
        tables[table] = json.loads((RESULTS / f"{table}.json").read_text())
    floor = floor_of(tables[SETS[name][0]])
    for table, rows in tables.items():
        for row, runs in rows.items():
            method = with_classes(name, row) if table == "classes" else method_of(row)
            for run in runs:
                if not method or not run.get("cpu_seconds"):
                    continue
                yield method, run["cpu_seconds"], run["fd"]["once"] / floor
                if row.startswith("NAIGN"):
                    yield NOISE, run["cpu_seconds"], run["fd"]["noise"] / floor


def floor_of(rows: dict[str, list[dict[str, Any]]]) -> float:
    """The floor that the recipe's runs were measured with."""
    recipe = next(row for row in rows if row.endswith(".yaml"))
    return fmean(run["fd"]["floor"] for run in rows[recipe])


def method_of(row: str) -> str:
    """The method of a row; empty for a row that is not shown."""
    for beginning, method in METHODS.items():
        if row.startswith(beginning):
            return method
    return ""


def with_classes(name: str, row: str) -> str:
    """The same for a row of classes.json."""
    if not row.startswith(f"{name}, "):
        return ""
    what = row.split(", ")[1]
    if what.startswith(("with", "guidance", "the flow")):
        return WITH_CLASSES
    return ""


def across(seconds: float) -> float:
    low = math.log(COST[0])
    high = math.log(COST[1])
    share = (math.log(seconds) - low) / (high - low)
    return LEFT + share * (WIDTH - LEFT - 14)


def down(ratio: float) -> float:
    low = math.log(DISTANCE[0])
    high = math.log(DISTANCE[1])
    return PANEL * (high - math.log(ratio)) / (high - low)


def line(
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    style: str,
) -> str:
    ends = f'x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"'
    return f'<line {ends} class="{style}"/>'


def number(value: float) -> str:
    """With one digit, or none for whole numbers that are given as such."""
    return str(value) if isinstance(value, int) else f"{value:.1f}"


def text(
    x: float,
    y: float,
    words: str,
    style: str = "",
    anchor: str = "start",
) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{words}</text>'


def mark(method: str, x: float, y: float) -> str:
    style, path = SHAPES[method]
    return f'<path transform="translate({x:.1f} {y:.1f})" class="{style}" d="{path}"/>'


def panel(name: str, top: int) -> Iterator[str]:
    """A set's axes and points."""
    for ratio in (1, 10, 100, 1000):
        y = top + down(ratio)
        style = "floor" if ratio == 1 else "grid"
        yield line(LEFT, y, WIDTH - 14, y, style)
        yield text(LEFT - 8, y + 5, f"{ratio:,}", "", "end")
    yield text(WIDTH - 14, top + PANEL - 6, "real images", "", "end")
    for seconds in TICKS:
        x = across(seconds)
        yield line(x, top, x, top + PANEL, "grid")
    yield text(LEFT + 8, top + PANEL - 8, name, "name")
    for method, cost, ratio in sorted(points(name), key=is_open):  # open marks hide nothing
        yield mark(method, across(cost), top + down(ratio))


def is_open(run: tuple[str, float, float]) -> bool:
    style, _ = SHAPES[run[0]]
    return "open" in style


def framed(
    width: int,
    height: int,
    title: str,
    parts: list[str],
) -> str:
    """The parts as one picture, with the colours and fonts of STYLE."""
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{title}</title>",
        f"<style>\n{STYLE}\n</style>",
        '<rect width="100%" height="100%" rx="6" class="back"/>',
        *parts,
        "</svg>\n",
    ]
    return "\n".join(lines)


def picture() -> str:
    """The picture as SVG, with colours for light and for dark."""
    height = TOP + len(SETS) * (PANEL + GAP) + 14
    parts: list[str] = []
    for place, method in enumerate(SHAPES):
        x = 16 + 190 * (place % 3)
        y = 14 + 22 * (place // 3)
        parts.append(mark(method, x, y))
        parts.append(text(x + 14, y + 5, method))
    parts.append(text(8, TOP - 12, "distance of samples to test images, × floor"))
    for place, name in enumerate(SETS):
        parts += panel(name, TOP + place * (PANEL + GAP))
    bottom = TOP + len(SETS) * (PANEL + GAP) - GAP
    for seconds in TICKS:
        parts.append(
            text(
                across(seconds),
                bottom + 18,
                f"{seconds:,}",
                "",
                "middle",
            )
        )
    parts.append(
        text(
            (LEFT + WIDTH) / 2,
            bottom + 40,
            "training, processor seconds",
            "",
            "middle",
        )
    )
    return framed(WIDTH, height, "Quality of samples against the cost of training", parts)


if __name__ == "__main__":
    (ROOT / "docs/cost.svg").write_text(picture())
