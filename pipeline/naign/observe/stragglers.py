"""Names the rank that the others wait for.

Ranks wait for one another in every collective, so a slow one makes all of them slow, in all phases. What a rank does
alone, such as reading, is therefore measured apart.
"""

import logging
import math
import time
from collections.abc import Sequence
from statistics import median_low

log = logging.getLogger("naign.train")

SHARE = 0.1
"""Of a round's time, lost by waiting, from which on a rank is named."""
SUSPECTED = 120.0
"""Seconds for which it must have been the same one, in the same phase."""
Place = tuple[int, str]
"""A rank, and what it was doing."""


class Stragglers:
    """What ranks did alone in each round, compared."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """The host's name of each rank."""
        self._hosts = hosts
        self._suspect: Place | None = None
        self._since = 0.0

    def compare(self, alone: Sequence[dict[str, float]], spent: float) -> float:
        """The share of a round that the others waited for the slowest rank, which is logged once if it stays so.

        Args:
            alone: seconds by phase that each rank needed by itself.
            spent: seconds of the round.
        """
        lost = 0.0
        slowest: Place | None = None
        for phase in alone[0]:
            seconds = [rank[phase] for rank in alone]
            excess = max(seconds) - median_low(seconds)
            if excess > lost:
                lost = excess
                slowest = (seconds.index(max(seconds)), phase)
        share = min(1.0, lost / spent)
        now = time.monotonic()
        if slowest != self._suspect or share < SHARE:
            self._suspect = slowest
            self._since = now
        elif slowest and now >= self._since + SUSPECTED:
            self._since = math.inf
            rank, phase = slowest
            log.warning(
                "rank %d on %s is slow in phase %s: %.3g s a round, where others need %.3g; all wait for it, %.0f %% "
                "of the time: see what else runs there",
                rank,
                self._hosts[rank],
                phase,
                alone[rank][phase],
                alone[rank][phase] - lost,
                100 * share,
            )
        return share
