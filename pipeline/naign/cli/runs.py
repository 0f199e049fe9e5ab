"""The command that lists runs."""

from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from naign.cli.output import Json, print_json
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
        found, others = find_runs(folder)
    if json:
        named = [{"path": path, "problem": problem} for path, problem in others.items()]
        print_json({"folder": folder, "runs": [asdict(run) for run in found], "others": named})
        return
    rows = [HEADER, *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = row[0].ljust(widths[0])
        for cell, width in zip(row[1:], widths[1:], strict=True):
            line += "  " + cell.rjust(width)
        print(line.rstrip())
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
    if value is None:
        return "–"
    return f"{value:.4g}"
