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

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
SETS = {"MNIST": ("rivals", "generation"), "Fashion-MNIST": ("rivals_fashion", "generation_fashion")}
SETS["CIFAR-10"] = ("rivals_cifar10", "generation_cifar10")
METHODS = {  # the first of these that is part of a row's name says its method
    "printed": "",
    "not in the table": "",
    "the same": "",  # as NAIGN, with settings that are not the recipe's
    ": IGN": "IGN",
    "imle": "NAIGN, IMLE of noise",
    "code 128: NAIGN": "NAIGN, IMLE of noise",
    "NAIGN": "NAIGN",
    "autoencoder": "autoencoder",
    "VAE": "VAE",
    "flow, ": "flow in pixels",
}
SHAPES = {  # around (0, 0)
    "NAIGN": ("ours", "M-6 0A6 6 0 1 0 6 0A6 6 0 1 0-6 0Z"),
    "NAIGN with classes": ("ours", "M0-8L8 0L0 8L-8 0Z"),
    "NAIGN, IMLE of noise": ("ours open", "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0-5 0Z"),
    "autoencoder": ("other", "M-5-5H5V5H-5Z"),
    "VAE": ("other", "M0-6L6 5L-6 5Z"),
    "flow in pixels": ("other open", "M-6 0H6M0-6V6"),
    "IGN": ("other open", "M-5-5L5 5M5-5L-5 5"),
}
WIDTH, LEFT, PANEL, GAP, TOP = 560, 58, 150, 34, 104
"""Pixels: of the picture; to the axis; a panel's height; between panels; above the first."""
COST, DISTANCE = (80, 7000), (1, 4000)
"""Ends of the axes."""
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
    tables = {table: json.loads((RESULTS / f"{table}.json").read_text()) for table in (*SETS[name], "classes")}
    recipe = next(row for row in tables[SETS[name][0]] if row.startswith("NAIGN"))
    floor = fmean(run["fd"]["floor"] for run in tables[SETS[name][0]][recipe])
    for table, rows in tables.items():
        for row, runs in rows.items():
            if table == "classes":
                known = row.startswith(f"{name}, ") and row.split(", ")[1].startswith(("with", "guidance", "the flow"))
                method = "NAIGN with classes" if known else ""
            else:
                method = next((of for part, of in METHODS.items() if part in row), "")
            for run in runs:
                if method and run.get("cpu_seconds"):
                    yield method, run["cpu_seconds"], run["fd"]["once"] / floor


def across(seconds: float) -> float:
    low, high = map(math.log, COST)
    return LEFT + (math.log(seconds) - low) / (high - low) * (WIDTH - LEFT - 14)


def down(ratio: float) -> float:
    low, high = map(math.log, DISTANCE)
    return PANEL * (high - math.log(ratio)) / (high - low)


def text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{words}</text>'


def mark(method: str, x: float, y: float) -> str:
    style, path = SHAPES[method]
    return f'<path transform="translate({x:.1f} {y:.1f})" class="{style}" d="{path}"/>'


def panel(name: str, top: float) -> Iterator[str]:
    """A set's axes and points."""
    for ratio in (1, 10, 100, 1000):
        y = top + down(ratio)
        style = "floor" if ratio == 1 else "grid"
        yield f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - 14}" y2="{y:.1f}" class="{style}"/>'
        yield text(LEFT - 8, y + 5, f"{ratio:,}", "", "end")
    yield text(WIDTH - 14, top + PANEL - 6, "real images", "", "end")
    for seconds in (100, 300, 1000, 3000):
        x = across(seconds)
        yield f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + PANEL}" class="grid"/>'
    yield text(LEFT + 8, top + PANEL - 8, name, "name")
    runs = sorted(points(name), key=lambda run: "open" in SHAPES[run[0]][0])  # open marks hide nothing
    yield from (mark(method, across(cost), top + down(ratio)) for method, cost, ratio in runs)


def picture() -> str:
    """The picture as SVG, with colours for light and for dark."""
    height = TOP + len(SETS) * (PANEL + GAP) + 14
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">']
    parts += ["<title>Quality of samples against the cost of training</title>", f"<style>\n{STYLE}\n</style>"]
    parts.append('<rect width="100%" height="100%" rx="6" class="back"/>')
    for number, method in enumerate(SHAPES):
        x, y = 16 + 190 * (number % 3), 14 + 22 * (number // 3)
        parts += [mark(method, x, y), text(x + 14, y + 5, method)]
    parts.append(text(8, TOP - 12, "distance of samples to test images, × floor"))
    for number, name in enumerate(SETS):
        parts += panel(name, TOP + number * (PANEL + GAP))
    bottom = TOP + len(SETS) * (PANEL + GAP) - GAP
    parts += [text(across(seconds), bottom + 18, f"{seconds:,}", "", "middle") for seconds in (100, 300, 1000, 3000)]
    parts.append(text((LEFT + WIDTH) / 2, bottom + 40, "training, processor seconds", "", "middle"))
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    (ROOT / "docs/cost.svg").write_text(picture())
