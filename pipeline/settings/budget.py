"""How many rounds spend the budget of a run. Imports neither torch nor a configuration."""

from collections.abc import Mapping
from typing import Any


def count_rounds(settings: Mapping[str, Any]) -> int:
    """Rounds that spend the budget, by settings such as {'train.images': 60000}."""
    images, size, passes = (int(settings[key]) for key in ("train.images", "match.round", "train.passes"))
    return -(-images // (size * passes))


def count_network_rounds(settings: Mapping[str, Any]) -> int:
    """The first of these rounds, in which f is trained; in the others, of prior.alone, the prior learns alone."""
    rounds = count_rounds(settings)
    return rounds - int(rounds * settings.get("prior.alone", 0.0))
