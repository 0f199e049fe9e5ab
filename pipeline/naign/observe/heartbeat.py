"""What the first rank of each host leaves after a round for the page of its launcher (`naign launch --metrics`)."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from naign.storage.local import write_atomically


class Heartbeat:
    """Replaces a file of JSON: when the newest round `ended`, the `longest` time between two ends, when the newest
    `checkpoint` was complete (seconds of time.monotonic, one clock for all processes of a machine), and `series`, as
    Prometheus names them after `naign_`. Those that end in _total count from this start of the ranks.
    """

    def __init__(
        self,
        file: Path,
        *,
        images: int,  # the run's goal
        seen: int,  # of them, before this start
    ) -> None:
        self._file = file
        self._images = images
        self._first = seen
        self._ended = time.monotonic()
        self._longest = 0.0
        self._rounds = 0
        self._bytes = 0.0
        self._retries = 0.0

    def beat(
        self,
        values: Mapping[str, float],
        *,
        seen: int,
        phases: Mapping[str, float],
        checkpoint: float,
    ) -> None:
        """A round ended with the metrics `values`; `phases` took so many seconds, each in all rounds of this start."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._ended)
        self._ended = now
        self._rounds += 1
        self._bytes += values.get("data/megabytes", 0.0) * 1e6  # while the prior is fitted nothing is read
        self._retries += values.get("data/retries", 0.0)
        series = {
            "rounds_total": self._rounds,
            "images_total": seen - self._first,
            "images_seen": seen,
            "images_goal": self._images,
            "data_read_bytes_total": self._bytes,
            "data_retries_total": self._retries,
        }
        for phase, seconds in phases.items():
            series[f'phase_seconds_total{{phase="{phase}"}}'] = seconds
        for name, value in values.items():
            if name.startswith("loss/"):
                series[f'loss{{term="{name[5:]}"}}'] = value
        state = {"ended": now, "longest": self._longest, "checkpoint": checkpoint, "series": series}
        with suppress(OSError):  # a full disk of temporary files does not end a run
            write_atomically(self._file, json.dumps(state), sync=False)
