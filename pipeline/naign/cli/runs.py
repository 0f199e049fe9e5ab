"""Commands that look at runs: runs, compare."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from naign.cli.output import Json, print_json, print_table
from naign.errors import bytes_in_words, printable
from naign.terminal import busy

if TYPE_CHECKING:
    from naign.evaluate.runs import Run

LONGEST = 4096  # characters of a path
HEADER = ("run", "state", "images", "of", "x floor", "recall", "FD", "measured", "size", "age")


def runs(folder: Positional[Path], /, *, json: Json = False) -> None:
    """List the runs in a folder: state, images seen, quality, size on disk, time since the last report.

    Quality is the Frechet distance of f(z), also over its floor, and recall: of `naign evaluate`, or else of the last
    measurement while training (quality.rounds), which has no floor.

    Args:
        folder: Local folder that holds runs, also in sub-folders, or a run.
    """
    from naign.evaluate.runs import find_runs

    with busy(f"reading {folder}"):
        listed, others = find_runs(folder)
    if json:
        named = [{"path": path, "problem": problem} for path, problem in others.items()]
        print_json({"folder": folder, "runs": [asdict(run) for run in listed], "others": named})
        return
    print_table([HEADER, *map(_row, listed)])
    for path, problem in others.items():
        print(f"{printable(path, LONGEST)}: {problem}")


def _row(run: "Run") -> tuple[str, ...]:
    measured = run.measured or "–"
    if run.measured and run.measured_at not in (None, run.images_seen):
        measured += f" at {run.measured_at:,}"
    return (
        printable(run.name, LONGEST),
        run.state,
        f"{run.images_seen:,}",
        f"{run.images:,}",
        _digits(run.fd_over_floor),
        _digits(run.recall),
        _digits(run.fd),
        measured,
        bytes_in_words(run.bytes),
        str(timedelta(seconds=int(run.age_seconds))),
    )


def _digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def compare(folders: Positional[tuple[Path, ...]], /) -> None:
    """Print runs side by side: evaluations, the best marked by *, and the settings that differ.

    Args:
        folders: Two local runs or more; also exported models that were evaluated.
    """
    from naign.evaluate.compare import NUMBERS, numbers, read_sides, settings_that_differ, unlike

    with busy("reading runs"):
        sides = read_sides(folders)
    labels = [printable(side.label, LONGEST) for side in sides]
    rows = [
        ("run", *labels),
        ("state", *(side.state for side in sides)),
        ("images seen", *(f"{side.images_seen:,}" for side in sides)),
    ]
    for path, values in numbers(sides).items():
        title, better = NUMBERS[path]
        rows.append((title, *_marked(values, better)))
    print_table(rows)
    settings = settings_that_differ(sides)
    if settings:
        print()
        print_table([("setting", *labels), *((name, *values) for name, values in settings.items())])
    print()
    for label, side in zip(labels, sides, strict=True):
        if not side.metrics:
            print(f"{label} was not evaluated: run `naign evaluate {printable(side.path, LONGEST)}`")
    differs = unlike(sides)
    if differs:
        print(f"not the same for all: {', '.join(differs)}; distances do not compare")


def _marked(values: Sequence[float | None], better: str) -> list[str]:
    """The values as text, the best with a * where there are at least two; better: min, max or ""."""
    from naign.evaluate.report import number

    texts = [number(value) for value in values]
    known = [value for value in values if value is not None]
    if better and len(known) > 1:
        best = min(known) if better == "min" else max(known)
        for place, value in enumerate(values):
            if value == best:
                texts[place] += "*"
    return texts
