"""When a run is done: its budget is spent, or quality.patience ended it. Imports neither torch nor a configuration."""

import math
from collections.abc import Mapping
from typing import Any

MEASURED = ("quality.samples", "quality.split", "quality.encoder", "data.path", "data.index")
"""Settings that decide what quality/fd is measured on: distances compare only where they are the same."""


def count_rounds(settings: Mapping[str, Any]) -> int:
    """Rounds that spend the budget, by settings such as {'train.images': 60000}."""
    images, size, passes = (int(settings[key]) for key in ("train.images", "match.round", "train.passes"))
    return -(-images // (size * passes))


def count_network_rounds(settings: Mapping[str, Any]) -> int:
    """The first of these rounds, in which f is trained; in the others, of prior.alone, the prior learns alone."""
    rounds = count_rounds(settings)
    return rounds - int(rounds * settings.get("prior.alone", 0.0))


def is_done(settings: Mapping[str, Any], rounds: int, best: Mapping[str, Any]) -> bool:
    """Whether a run of so many rounds is done; `best` is the content of its best.json, or {}."""
    return rounds >= count_rounds(settings) or is_exhausted(settings, rounds, best)


def is_exhausted(settings: Mapping[str, Any], rounds: int, best: Mapping[str, Any]) -> bool:
    """Whether quality.patience measurements in a row were no better than the best one."""
    waited = settings["quality.patience"] * settings["quality.rounds"]
    return is_comparable(settings, rounds, best) and 0 < waited <= rounds - int(best["round"])


def is_comparable(settings: Mapping[str, Any], rounds: int, best: Mapping[str, Any]) -> bool:
    """Whether `best` has a finite distance of one of so many rounds, measured as the settings say."""
    fd, since = best.get("fd"), best.get("round")
    sound = isinstance(fd, int | float) and abs(fd) < math.inf and isinstance(since, int) and 0 < since <= rounds
    return sound and best.get("measured") == measured_by(settings)


def measured_by(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What best.json records of how it was measured."""
    return {key: settings.get(key) for key in MEASURED}
