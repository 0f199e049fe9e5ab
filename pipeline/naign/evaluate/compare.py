"""Runs side by side: evaluations, and the settings that differ."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from naign.errors import InputError, one_line, printable
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
    if len(folders) < 2:
        raise InputError(f"{len(folders)} runs given: compare 2 or more")
    given = Counter(folder.resolve() for folder in folders)
    place, count = given.most_common(1)[0]
    if count > 1:
        raise InputError(f"{printable(str(place))} is given twice: leave it out once")
    names = Counter(place.name for place in given)
    sides = []
    for folder in folders:
        label = folder.resolve().name
        if names[label] > 1:
            label = str(folder)
        try:
            sides.append(_read_side(folder, label))
        except (OSError, *MALFORMED) as error:
            why = getattr(error, "strerror", None) or error
            path = printable(str(folder))
            remedy = f"give local runs (`naign fetch` copies one), or models after `naign evaluate {path}`"
            raise InputError(f"'{path}' cannot be compared: {why}: {remedy}") from None
    return sides


def _read_side(folder: Path, label: str) -> Side:
    """The side of a run, or of an evaluated model. Raises one of MALFORMED for others."""
    metrics = flat(read_json(folder / "evaluation/metrics.json"))
    if is_run(folder) or not metrics:
        run = read_run(folder, label)
        return Side(label, str(folder), run.state, run.images_seen, read_settings(folder), metrics)
    settings = flat(read_json(folder / "config.json").get("config", {}))  # beside an exported model
    images_seen = int(metrics["images_seen"] or 0)
    return Side(label, str(folder), "model", images_seen, settings, metrics)


def settings_that_differ(sides: Sequence[Side]) -> dict[str, list[str]]:
    """The value of each run by setting, "–" where it has none. Runs without any settings are not counted."""
    found = {}
    for key in dict.fromkeys(key for side in sides for key in side.settings):
        values = [one_line(side.settings.get(key, "–")) for side in sides]
        known = {value for side, value in zip(sides, values, strict=True) if side.settings}
        if key not in IGNORED and len(known) > 1:
            found[key] = values
    return found


def numbers(sides: Sequence[Side]) -> dict[str, list[float | None]]:
    """The values of all sides by path, of those of NUMBERS that one of them has."""
    found = {}
    for path in NUMBERS:
        values = [number(side.metrics.get(path)) for side in sides]
        if set(values) != {None}:
            found[path] = values
    return found


def unlike(sides: Sequence[Side]) -> list[str]:
    """What differs of SAME."""
    evaluated = [side.metrics for side in sides if side.metrics]
    found = []
    for path, name in SAME.items():
        values = {metrics.get(path) for metrics in evaluated}
        if len(values) > 1:
            found.append(name)
    return found
