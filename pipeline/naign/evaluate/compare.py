"""Runs side by side: evaluations, and the settings that differ."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from naign.errors import InputError, one_line, printable, require
from naign.evaluate.report import DAMAGE
from naign.evaluate.runs import MALFORMED, flat, is_run, number, read_json, read_run, read_settings

IGNORED = ("run.path", "run.remote", "resume")
"""Settings that always differ, or say nothing of what was learned."""

NUMBERS = {
    "fd.once_ratio": ("FD of f(z), × floor", "min"),
    "fd.once": ("FD of f(z)", "min"),
    "fd.twice": ("FD of f(f(z))", "min"),
    "fd.floor": ("floor", ""),
    "second.once_ratio": ("second encoder, × floor", "min"),
    "coverage.recall": ("recall", "max"),
    "coverage.precision": ("precision", "max"),
    "coverage.density": ("density", ""),
    "coverage.coverage": ("coverage", "max"),
    **{f"restoration.{kind}.once": (f"repair, {name}", "min") for kind, name in DAMAGE.items()},
    "idempotence.samples": ("idempotence, samples", "min"),
    "reconstruction": ("reconstruction", "min"),
    "nearest.ratio": ("nearest training example, × test's", ""),
    "cpu_seconds": ("training, processor seconds", ""),
}
"""By path in metrics.json, the title of a row, and which is better: min, max or ""."""

SAME = {
    "dataset": "data set",
    "encoder": "encoder",
    "counts.samples": "number of samples",
    "counts.test": "test examples",
    "counts.floor": "training examples of the floor",
}
"""By path in metrics.json, what two evaluations must share for their distances to compare."""


class Side(NamedTuple):
    """One of the runs."""

    label: str
    path: str
    state: str
    images_seen: int
    settings: dict[str, Any]
    metrics: dict[str, Any]  # of its evaluation, by path; {}: none


def read_sides(folders: Sequence[Path]) -> list[Side]:
    """Two or more runs or evaluated models. Raises InputError for what is neither, or given twice."""
    given = Counter(folder.resolve() for folder in folders)
    twice = [str(place) for place, count in given.items() if count > 1]
    require(
        (len(folders) >= 2, f"{len(folders)} runs given: compare 2 or more"),
        (not twice, f"{printable(''.join(twice[:1]))} is given twice: leave it out once"),
    )
    names = Counter(place.name for place in given)
    return [_read(folder, names) for folder in folders]


def _read(folder: Path, names: Counter[str]) -> Side:
    """The side of a folder, called by its name, or by its path where several of `names` are the same."""
    path, name = str(folder), folder.resolve().name
    label = path if names[name] > 1 else name
    try:
        metrics = flat(read_json(folder / "evaluation/metrics.json"))
        if is_run(folder) or not metrics:
            run = read_run(folder, label)
            return Side(label, path, run.state, run.images_seen, read_settings(folder), metrics)
        settings = flat(read_json(folder / "config.json").get("config", {}))  # beside an exported model
        return Side(label, path, "model", int(metrics["images_seen"] or 0), settings, metrics)
    except (OSError, *MALFORMED) as error:
        why = error.strerror if isinstance(error, OSError) else error
        remedy = f"give local runs (`naign fetch` copies one), or models after `naign evaluate {printable(path)}`"
        raise InputError(f"'{printable(path)}' cannot be compared: {why}: {remedy}") from None


def settings_that_differ(sides: Sequence[Side]) -> dict[str, list[str]]:
    """The value of each run by setting, "–" where it has none. Runs without any settings are not counted."""
    keys = dict.fromkeys(key for side in sides for key in side.settings if key not in IGNORED)
    rows = {key: [one_line(side.settings.get(key, "–")) if side.settings else "–" for side in sides] for key in keys}
    known = [turn for turn, side in enumerate(sides) if side.settings]
    return {key: values for key, values in rows.items() if len({values[turn] for turn in known}) > 1}


def numbers(sides: Sequence[Side]) -> dict[str, list[float | None]]:
    """The values of all sides by path, of those of NUMBERS that one of them has."""
    rows = {path: [number(side.metrics.get(path)) for side in sides] for path in NUMBERS}
    return {path: values for path, values in rows.items() if any(value is not None for value in values)}


def unlike(sides: Sequence[Side]) -> list[str]:
    """What differs of SAME."""
    evaluated = [side.metrics for side in sides if side.metrics]
    return [name for path, name in SAME.items() if len({metrics.get(path) for metrics in evaluated}) > 1]
