"""When a run is done. Imports neither torch nor a configuration."""

from collections.abc import Mapping
from typing import Any


def count_rounds(settings: Mapping[str, Any]) -> int:
    """Rounds of stage 1, by settings such as {'train.images': 60000}."""
    images = int(settings["train.images"])
    a_round = int(settings["match.round"]) * int(settings["train.passes"])
    return -(-images // a_round)


def is_done(settings: Mapping[str, Any], trainer: Mapping[str, Any]) -> bool:
    """Whether a run is done whose newest checkpoint has that trainer.json."""
    return int(trainer.get("round", 0)) >= count_rounds(settings) and trainer.get("fitted", 0) >= 1
