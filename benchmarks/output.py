"""Where benchmarks write: a table in Markdown, beside the numbers it rests on in JSON."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from naign.errors import InputError
from naign.storage.local import write_atomically

ROOT = Path(__file__).parents[1]
Record = dict[str, Any]


def check_place(to: Path) -> None:
    """Raises InputError if no table can be written there."""
    if to.name in ("", "..") or to.suffix:
        raise InputError(f"--to {to}: give a file's name without an ending, as benchmarks/results/mine")
    for folder in to.parents:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--to {to}: {folder} is a file")


def stored(to: Path, rows: type) -> Record:
    """The numbers of an earlier table at `to`, by row; {} if there is none.

    Raises InputError if the place holds something else, before hours of training.
    """
    check_place(to)
    file = to.with_suffix(".json")
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: {error}: move it away, or write --to another place") from None
    sound = isinstance(found, dict) and all(isinstance(row, rows) for row in found.values())
    if not sound:
        raise InputError(f"{file} does not hold the numbers of a table: move it away, or write --to another place")
    return found


def write_tables(
    to: Path,
    head: str,  # of each table; {} stands for the title of its data set
    titles: dict[str, str],
    rows_of: Callable[[str], Any],
    table_of: Callable[[Any], str],
) -> None:
    """Measure every data set, by name; write and print a page with a table of each, and of those measured before."""
    found = stored(to, object)
    try:
        for rows in found.values():
            table_of(rows)
    except (TypeError, ValueError, KeyError, AttributeError):
        raise InputError(f"{to.with_suffix('.json')} is of another script: write --to another place") from None
    for name, title in titles.items():
        found[title] = rows_of(name)
    tables = {head.format(title): table_of(rows) for title, rows in found.items()}
    text = pages(tables)
    write(to, text, found)
    print(text)


def write(to: Path, text: str, numbers: object) -> None:
    """Write a table and its numbers."""
    to.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(to.with_suffix(".json"), json.dumps(numbers, indent=1) + "\n")
    write_atomically(to.with_suffix(".md"), text)


def table(
    titles: list[str],
    rows: list[list[str]],
) -> str:
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(
    title: str,
    titles: list[str],
    rows: list[list[str]],
) -> str:
    """A table below its title and the command that made it."""
    return f"{title}\n\n{command()}\n\n{table(titles, rows)}\n"


def pages(tables: dict[str, str]) -> str:
    """Several tables by title, below the command that made them."""
    parts = [command()]
    for title, text in tables.items():
        parts += [title, text]
    return "\n\n".join(parts) + "\n"


def command() -> str:
    """The command line of this process."""
    script = f"benchmarks/{Path(sys.argv[0]).name}"
    return f"`{shlex.join(['python', script, *sys.argv[1:]])}`"


def spread(values: Iterable[float | None], digits: int) -> str:
    """Mean ± standard deviation of the values that are not None."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{mean(known):.{digits}f}"
    if len(known) == 1:
        return text
    return f"{text} ± {stdev(known):.{digits}f}"


def seeds_of(good: int, lost: int = 0) -> str:
    """The number of seeds of a row, and how many of them diverged."""
    plural = "" if good == 1 else "s"
    diverged = f"; {lost} of {good + lost} diverged" if lost else ""
    return f" ({good} seed{plural}{diverged})"


def number(value: float) -> str:
    """Three digits, or none behind the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def megabytes(value: float) -> str:
    """A size in MB or GB."""
    if value >= 1e9:
        return f"{number(value / 1e9)} GB"
    return f"{number(value / 1e6)} MB"


def machine() -> Record:
    """The processor of this machine, and the cores that this process may use."""
    processor = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.split(": ")[1]
    return {"processor": processor, "cores": len(os.sched_getaffinity(0))}


def say(text: str) -> None:
    """Print progress."""
    print(text, file=sys.stderr, flush=True)
