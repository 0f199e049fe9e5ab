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
    print_table(HEADER, [_row(run) for run in listed])
    for path, problem in others.items():
        print(f"{printable(path, LONGEST)}: {problem}")


def compare(folders: Positional[tuple[Path, ...]], /, *, json: Json = False) -> None:
    """Print runs side by side: evaluations, the best marked by *, and the settings that differ.

    Args:
        folders: Two local runs or more; also exported models that were evaluated.
    """
    from naign.evaluate.compare import NUMBERS, numbers, read_sides, settings_that_differ, unlike

    with busy("reading runs"):
        sides = read_sides(folders)
    evaluation, settings, differs = numbers(sides), settings_that_differ(sides), unlike(sides)
    if json:
        keys = ("label", "path", "state", "images_seen")
        named = [{key: getattr(side, key) for key in keys} for side in sides]
        print_json({"runs": named, "evaluation": evaluation, "settings": settings, "unlike": differs})
        return
    labels = [printable(side.label, LONGEST) for side in sides]
    state = ("state", *(side.state for side in sides))
    seen = ("images seen", *(f"{side.images_seen:,}" for side in sides))
    measured = [(NUMBERS[path][0], *_marked(values, NUMBERS[path][1])) for path, values in evaluation.items()]
    print_table(("run", *labels), [state, seen, *measured])
    print()
    if settings:
        print_table(("setting", *labels), [(name, *values) for name, values in settings.items()])
        print()
    for label, side in zip(labels, sides, strict=True):
        if not side.metrics:
            print(f"{label} was not evaluated: run `naign evaluate {printable(side.path, LONGEST)}`")
    if differs:
        print(f"not the same for all: {', '.join(differs)}; distances do not compare")


def _marked(values: Sequence[float | None], better: str) -> list[str]:
    """The values as text, the best with a * where there are at least two; better: min, max or ""."""
    from naign.evaluate.report import number

    known = [value for value in values if value is not None]
    best = None if not better or len(known) < 2 else (min if better == "min" else max)(known)
    return [f"{number(value)}{'*' if value is not None and value == best else ''}" for value in values]


def _row(run: "Run") -> tuple[str, ...]:
    digits = ("–" if value is None else f"{value:.4g}" for value in (run.fd_over_floor, run.recall, run.fd))
    stale = run.measured and run.measured_at and run.measured_at != run.images_seen
    measured = f"{run.measured or '–'}{f' at {run.measured_at:,}' if stale else ''}"
    return (
        *(printable(run.name, LONGEST), run.state, f"{run.images_seen:,}", f"{run.images:,}", *digits, measured),
        *(bytes_in_words(run.bytes), str(timedelta(seconds=int(run.age_seconds)))),
    )
