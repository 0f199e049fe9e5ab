"""Draws docs/f.svg, docs/architecture.svg and docs/rooms.svg: `python docs/diagrams.py`.

Each picture holds its own colours for light and for dark, so it can be shown on any page.
"""

import tomllib
from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
STYLE = """\
text { font: 16px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
.dim { font-size: 14px; fill: #59636e; }
.name { font-weight: 600; }
.box { fill: #eef4ff; stroke: #2d6cdf; stroke-width: 1.5; }
.core { fill: #fff1e5; stroke: #e07a1f; stroke-width: 1.5; }
.line { fill: none; stroke: #59636e; stroke-width: 1.5; }
.head { fill: #59636e; }
.back { fill: #ffffff; }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc; }
  .dim { fill: #9198a1; }
  .box { fill: #16233b; stroke: #5b8def; }
  .core { fill: #3a2413; stroke: #e58b3a; }
  .line { stroke: #9198a1; }
  .head { fill: #9198a1; }
  .back { fill: #0d1117; }
}"""
ROOMS = {
    "cli": "the naign program",
    "cluster": "naign launch and naign render",
    "training": "the loop: read, learn, match, fit, report, checkpoint",
    "neighbours": "samples that copy images",
    "evaluate": "measurements and the report",
    "config": "every setting",
    "model": "networks, losses, priors, a trained model",
    "match": "the exact nearest sample of every image",
    "checkpoint": "checkpoints in a folder and in a bucket",
    "observe": "trackers, logs, naign doctor",
    "data": "packing and reading shards; who reads what",
    "distributed": "engines, ranks, stopping together",
    "storage": "a folder or a bucket, behind one protocol",
    "philox": "random numbers by (seed, round, id)",
    "settings": "bounds of settings, choices by name",
    "terminal": "progress bars",
    "process": "signals, and how a process ends",
    "errors": "errors and exit codes",
}


def text(
    x: float,
    y: float,
    words: str,
    style: str = "",
    anchor: str = "start",
) -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}">{escape(words)}</text>'


def box(
    x: float,
    y: float,
    width: float,
    height: float,
    words: str,
    style: str = "box",
) -> str:
    """A rounded box with its name in the middle."""
    name = text(x + width / 2, y + height / 2 + 5.5, words, "name", "middle")
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7" class="{style}"/>{name}'


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    """A line with a head; horizontal or vertical."""
    right = (to_x > x) - (to_x < x)
    down = (to_y > y) - (to_y < y)
    points = f"{to_x:g},{to_y:g}"
    for side in (-4, 4):
        corner_x = to_x - 8 * right + side * down
        corner_y = to_y - 8 * down + side * right
        points += f" {corner_x:g},{corner_y:g}"
    line = f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" class="line"/>'
    return f'{line}<polygon points="{points}" class="head"/>'


def picture(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    back = '<rect width="100%" height="100%" rx="6" class="back"/>'  # legible on a page that does not follow the system
    lines = [
        head,
        f"<title>{title}</title>",
        f"<style>\n{STYLE}\n</style>",
        back,
        *parts,
        "</svg>\n",
    ]
    return "\n".join(lines)


def draw_f() -> str:
    """From z, a damaged image and any image through f, narrow at its code, to a sample, a repair and an energy."""
    rows = [
        ("z", "noise, or from the prior", "a new sample", "f(z)"),
        ("a damaged image", "noise, blur, gaps", "its repair", "f(image)"),
        ("any image x", "", "its energy", "mean of (f(x) − x)²"),
    ]
    parts = []
    for number, (given, more, made, how) in enumerate(rows):
        y = 36 + 72 * number
        parts += [
            text(4, y, given, "name"),
            text(4, y + 20, more, "dim"),
            text(384, y, made, "name"),
            text(384, y + 20, how, "dim"),
            arrow(192, y - 5, 222, y - 5),
            arrow(344, y - 5, 374, y - 5),
        ]
    bow = "M228 10L270 88L296 88L338 10L338 200L296 122L270 122L228 200Z"
    parts += [
        f'<path d="{bow}" class="core" stroke-linejoin="round"/>',
        text(283, 50, "f", "name", "middle"),
        text(283, 110, "code", "dim", "middle"),
    ]
    return picture(520, 210, "What f does", parts)


def draw_architecture() -> str:
    """A round: from the tars through two of the ranks, which search and learn together, to a checkpoint in a bucket."""
    left, right, width = 16, 396, 268
    parts = [
        box(16, 8, 648, 36, "WebDataset tars in S3 or a folder"),
        text(340, 64, "byte ranges, checked by SHA-256", "dim", "middle"),
        text(340, 206, "queries", "dim", "middle"),
        text(340, 232, "nearest", "dim", "middle"),
        text(340, 322, "gradients", "dim", "middle"),
        box(16, 420, 648, 36, "checkpoint: written in the background, copied to S3"),
        text(340, 478, "resumed on any number of ranks, under any engine", "dim", "middle"),
    ]
    for x, rank in ((left, "rank 0"), (right, "rank 1, ..., n - 1")):
        middle = x + width / 2
        parts += [
            arrow(middle, 44, middle, 82),
            box(x, 84, width, 60, ""),
            text(middle, 108, rank, "name", "middle"),
            text(middle, 130, "its share of the round's images", "dim", "middle"),
            arrow(middle, 144, middle, 174),
            box(x, 176, width, 82, "", "core"),
            text(middle, 202, "IMLE: its part of the pool", "name", "middle"),
            text(middle, 224, "samples f(noise), exact search", "dim", "middle"),
            text(middle, 244, "nearest by (distance, id)", "dim", "middle"),
            arrow(middle, 258, middle, 288),
            box(x, 290, width, 82, "", "core"),
            text(middle, 316, "a step of f", "name", "middle"),
            text(middle, 338, "reconstruction, IMLE, repair", "dim", "middle"),
            text(middle, 358, "DDP, FSDP2, or DeepSpeed's ZeRO", "dim", "middle"),
            arrow(middle, 372, middle, 418),
        ]
    for y in (212, 328):
        parts += [arrow(340, y, left + width, y), arrow(340, y, right, y)]
    return picture(680, 490, "What trains: shards, ranks, a sharded search, a step, a checkpoint", parts)


def draw_rooms() -> str:
    """The rooms of the package in the order of pyproject.toml: each may import those below it."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    order = next(contract["layers"] for contract in contracts if contract.get("exhaustive"))
    parts = [
        text(8, 20, "A room imports only from rooms below it.", "name"),
        arrow(16, 36, 16, 36 + 30 * len(order) - 6),
    ]
    for number, name in enumerate(order):
        y = 34 + 30 * number
        parts.append(box(36, y, 118, 24, name))
        parts.append(text(168, y + 17, ROOMS[name], "dim"))
    return picture(500, 40 + 30 * len(order), "The rooms of the package", parts)


DRAWINGS = {"f": draw_f, "architecture": draw_architecture, "rooms": draw_rooms}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (ROOT / f"docs/{name}.svg").write_text(draw())
