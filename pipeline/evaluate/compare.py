"""Several runs on one page: curves, settings that differ, evaluations, samples side by side. See compare.html.jinja."""

import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from safetensors import SafetensorError, safe_open

from pipeline.errors import InputError, printable, require
from pipeline.evaluate import curves
from pipeline.evaluate.curves import Chart, Point, draw_chart
from pipeline.evaluate.report import DAMAGE, pages
from pipeline.evaluate.runs import flat, number, parse_line, pick, read_json, read_run, read_settings, regular, whole

MOST = 16  # runs of a page
PICTURE = 32 << 20  # bytes of a picture that is embedded, at most
COLOURS = ("#2d6cdf", "#e07a1f", "#2e9e5b", "#c4161c", "#8e5bd0", "#13a3b5", "#b5893a", "#d0509a")
OWN = ("run.path", "run.remote", "resume")
"""Settings that always differ, or say nothing of what was learned."""


class Number(NamedTuple):
    """A line of the table of evaluations."""

    title: str
    path: str  # in metrics.json
    better: str = ""  # min or max


REPAIRS = [Number(f"repair, {name.lower()}", f"restoration.{kind}.once", "min") for kind, name in DAMAGE.items()]
NUMBERS = (
    Number("FD of f(z), × floor", "fd.once_ratio", "min"),
    Number("FD of f(z)", "fd.once", "min"),
    Number("FD of f(f(z))", "fd.twice", "min"),
    Number("floor", "fd.floor"),
    Number("second encoder, × floor", "second.once_ratio", "min"),
    Number("recall", "coverage.recall", "max"),
    Number("precision", "coverage.precision", "max"),
    Number("density", "coverage.density"),
    Number("coverage", "coverage.coverage", "max"),
    *REPAIRS,
    Number("idempotence, samples", "idempotence.samples", "min"),
    Number("reconstruction", "reconstruction", "min"),
    Number("nearest training example, × test's", "nearest.ratio"),
    Number("training, processor seconds", "cpu_seconds"),
)
SAME = {
    "dataset": "data set",
    "encoder": "encoder",
    "counts.samples": "number of samples",
    "counts.test": "test examples",
    "counts.floor": "training examples of the floor",
}
"""What must be the same of two evaluations whose distances are compared, by its path."""


@dataclass(kw_only=True)
class Side:
    """A run on the page."""

    label: str
    path: str
    state: str
    images_seen: int
    settings: dict[str, Any]
    metrics: dict[str, Any]  # of its evaluation; {}: none
    series: dict[str, list[Point]]  # over images seen, by name
    picture: bytes | None  # samples, as a PNG file
    colour: str
    dash: str  # of its curves, beyond the first COLOURS


def render_comparison(folders: Sequence[Path]) -> str:
    """The page, as HTML. Raises InputError for what is no run, and for too few, too many or the same ones."""
    resolved = [folder.resolve() for folder in folders]
    twice = [str(folder) for folder, count in Counter(resolved).items() if count > 1]
    require(
        (2 <= len(folders) <= MOST, f"{len(folders)} runs given: compare 2 to {MOST}"),
        (not twice, f"{printable(''.join(twice[:1]))} is given twice: leave it out once"),
    )
    names = Counter(folder.name for folder in resolved)
    labels = [
        str(given) if names[folder.name] > 1 else folder.name for given, folder in zip(folders, resolved, strict=True)
    ]
    sides = [_read(folder, label, turn) for turn, (folder, label) in enumerate(zip(folders, labels, strict=True))]
    given = {
        "sides": sides,
        "charts": draw_charts(sides),
        "settings": settings_that_differ(sides),
        "numbers": [(one, [number(pick(side.metrics, one.path)) for side in sides]) for one in NUMBERS],
        "unlike": [name for path, name in SAME.items() if _unlike(sides, path)],
        "curves": curves,
    }
    return pages().get_template("compare.html.jinja").render(given) + "\n"


def _read(folder: Path, label: str, turn: int) -> Side:
    metrics, named = read_json(folder / "evaluation/metrics.json"), printable(str(folder))
    try:
        run = read_run(folder, label)
        state, seen, settings = run.state, run.images_seen, read_settings(folder)
    except InputError as error:
        if not metrics:
            model = os.path.exists(folder / "model.safetensors")
            remedy = f": run `naign evaluate {named}` first" if model else ""
            raise InputError(f"'{named}' cannot be compared: {error}{remedy}") from None
        state, seen, settings = "model", whole(metrics.get("images_seen")), _recorded(folder / "model.safetensors")
    except OSError as error:
        raise InputError(f"'{named}' cannot be compared: {error.strerror}") from None
    colour, dash = COLOURS[turn % len(COLOURS)], "6 3" if turn >= len(COLOURS) else "none"
    return Side(
        label=label,
        path=str(folder),
        state=state,
        images_seen=seen,
        settings=settings,
        metrics=metrics,
        series=read_series(folder / "metrics.jsonl"),
        picture=_picture(folder),
        colour=colour,
        dash=dash,
    )


def _recorded(file: Path) -> dict[str, Any]:
    """The settings in the header of an exported model; {} where it has none."""
    try:
        with safe_open(regular(file), framework="numpy") as opened:
            config = parse_line((opened.metadata() or {}).get("naign", "")).get("config")
        return flat(config.items()) if isinstance(config, dict) else {}
    except (SafetensorError, OSError, RecursionError):
        return {}


def read_series(file: Path) -> dict[str, list[Point]]:
    """The curves of metrics.jsonl that the page shows, of finite values; {} without it."""
    found: dict[str, list[Point]] = {}
    try:
        with regular(file).open("rb") as lines:
            for entry in map(parse_line, lines):
                seen = number(entry.get("images_seen"))
                for name, value in entry.items():
                    shown = name == "match/distance" or (
                        name.startswith(("loss/", "quality/")) and "seconds" not in name
                    )
                    if shown and seen is not None and (finite := number(value)) is not None:
                        found.setdefault(name, []).append((seen, finite))
    except OSError:
        return {}
    return {name: sorted(points) for name, points in found.items()}


def draw_charts(sides: Sequence[Side]) -> list[Chart]:
    """Quality first, then the match, then losses, the total before its terms."""
    names = sorted({name for side in sides for name in side.series}, key=lambda name: (name != "loss/total", name))
    rooms = ("quality/", "match/", "loss/")
    ordered = [name for room in rooms for name in names if name.startswith(room)]
    drawn = (
        draw_chart(name, {turn: side.series[name] for turn, side in enumerate(sides) if name in side.series})
        for name in ordered
    )
    return [chart for chart in drawn if chart]


def settings_that_differ(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """Key and the value of each run, "–" where it has none; of runs without any settings none is counted."""
    keys = dict.fromkeys(key for side in sides for key in side.settings if key not in OWN)
    rows = [
        (key, [_masked(str(side.settings.get(key, "–"))) if side.settings else "–" for side in sides]) for key in keys
    ]
    known = [turn for turn, side in enumerate(sides) if side.settings]
    return [(key, values) for key, values in rows if len({values[turn] for turn in known}) > 1]


def _masked(value: str) -> str:
    """Without the user and password of addresses: the page may be passed on."""
    return re.sub(r"://[^\s/]*@", "://...@", value)


def _unlike(sides: Sequence[Side], path: str) -> bool:
    return len({str(pick(side.metrics, path)) for side in sides if side.metrics}) > 1


def _picture(folder: Path) -> bytes | None:
    """The samples that evaluation drew, or else the last that training did; None without a PNG file of them."""
    for file in (
        folder / "evaluation/samples.png",
        *sorted(folder.glob("samples/samples-[0-9]*.png"), reverse=True)[:1],
    ):
        try:
            if regular(file).stat().st_size <= PICTURE:
                content = file.read_bytes()
                with Image.open(io.BytesIO(content), formats=["PNG"]) as opened:
                    opened.verify()
                return content
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue
    return None
