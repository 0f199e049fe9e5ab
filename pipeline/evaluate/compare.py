"""Runs side by side: evaluations, and the settings that differ."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import InputError, one_line, printable, require
from pipeline.evaluate.report import DAMAGE
from pipeline.evaluate.runs import flat, number, pick, read_json, read_run, read_settings, whole

IGNORED = ("run.path", "run.remote", "resume")
"""Settings that always differ, or say nothing of what was learned."""


class Number(NamedTuple):
    """A row of the table of evaluations."""

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
"""By path in metrics.json, what two evaluations must share for their distances to compare."""


@dataclass(kw_only=True)
class Side:
    """One of the runs."""

    label: str
    path: str
    state: str
    images_seen: int
    settings: dict[str, Any]
    metrics: dict[str, Any]  # of its evaluation; {}: none


class Comparison(NamedTuple):
    """Each list of values has one entry a run, in the order of `sides`."""

    sides: list[Side]
    numbers: list[tuple[Number, list[float | None]]]  # those that a run has
    settings: list[tuple[str, list[str]]]  # those that differ; "–" where a run has none
    unlike: list[str]  # of SAME, what differs


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Compare two or more runs or evaluated models. Raises InputError for what is neither, or given twice."""
    resolved = [folder.resolve() for folder in folders]
    twice = [str(folder) for folder, count in Counter(resolved).items() if count > 1]
    require(
        (len(folders) >= 2, f"{len(folders)} runs given: compare 2 or more"),
        (not twice, f"{printable(''.join(twice[:1]))} is given twice: leave it out once"),
    )
    names = Counter(folder.name for folder in resolved)
    labels = [
        str(given) if names[folder.name] > 1 else folder.name for given, folder in zip(folders, resolved, strict=True)
    ]
    sides = [_read(folder, label) for folder, label in zip(folders, labels, strict=True)]
    rows = [(row, [number(pick(side.metrics, row.path)) for side in sides]) for row in NUMBERS]
    return Comparison(
        sides,
        [(row, values) for row, values in rows if any(value is not None for value in values)],
        settings_that_differ(sides),
        [name for path, name in SAME.items() if _unlike(sides, path)],
    )


def _read(folder: Path, label: str) -> Side:
    metrics, named = read_json(folder / "evaluation/metrics.json"), printable(str(folder))
    try:
        run = read_run(folder, label)
        state, seen, settings = run.state, run.images_seen, read_settings(folder)
    except InputError as error:
        if not metrics:
            model = os.path.exists(folder / "model.safetensors")
            remedy = f": run `naign evaluate {named}` first" if model else ""
            raise InputError(f"'{named}' cannot be compared: {error}{remedy}") from None
        config = read_json(folder / "config.json").get("config")  # beside an exported model
        settings = flat(config) if isinstance(config, dict) else {}
        state, seen = "model", whole(metrics.get("images_seen"))
    except OSError as error:
        raise InputError(f"'{named}' cannot be compared: {error.strerror}") from None
    return Side(label=label, path=str(folder), state=state, images_seen=seen, settings=settings, metrics=metrics)


def settings_that_differ(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """Key and value of each run, "–" where it has none. Runs without any settings are not counted."""
    keys = dict.fromkeys(key for side in sides for key in side.settings if key not in IGNORED)
    rows = [(key, [one_line(side.settings.get(key, "–")) if side.settings else "–" for side in sides]) for key in keys]
    known = [turn for turn, side in enumerate(sides) if side.settings]
    return [(key, values) for key, values in rows if len({values[turn] for turn in known}) > 1]


def _unlike(sides: Sequence[Side], path: str) -> bool:
    return len({str(pick(side.metrics, path)) for side in sides if side.metrics}) > 1
