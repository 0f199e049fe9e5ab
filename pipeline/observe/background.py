"""A tracker in a separate thread, behind a bounded queue, so that training never waits for it."""

import logging
import queue
import threading
import time
from collections.abc import Callable

from pipeline.errors import one_line
from pipeline.observe.trackers import Tracker

log = logging.getLogger("naign.monitor")

WAITING = 256  # most reports that wait for a tracker; a round makes up to five
PATIENCE = 5.0  # seconds that a run waits at its end for all trackers together
_PREFIX = "tracker-"  # of the threads' names


class Background:
    """A tracker whose thread passes it all reports in order. Reports are dropped while the queue is full."""

    def __init__(self, name: str, build: Callable[[], Tracker]) -> None:
        self.name, self.dropped, self.failed = name, 0, False
        self._build = build
        self._queue: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"{_PREFIX}{name}", daemon=True)
        self._thread.start()

    def put(self, act: Callable[[Tracker], None]) -> None:
        """Queue a call of the tracker, or drop it. Returns at once; any thread may call it."""
        if self.failed:
            return
        if self._queue.qsize() < WAITING:
            self._queue.put(act)
            return
        self.dropped += 1
        if self.dropped == 1:
            log.warning("tracker %s does not keep up: reports are dropped while %d wait", self.name, WAITING)

    def end(self) -> None:
        """Close the tracker after everything in the queue. Returns at once."""
        self._queue.put(None)

    def wait(self, until: float) -> None:
        """Wait for the tracker to close, at most until a time of time.monotonic()."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            log.warning("tracker %s has not finished after %.0f s: the run ends without it", self.name, PATIENCE)
            self.dropped += self._queue.qsize()
        if self.dropped:
            log.warning("tracker %s has missed %d reports: metrics.jsonl has all of them", self.name, self.dropped)

    def _work(self) -> None:
        try:
            tracker = self._build()
            for act in iter(self._queue.get, None):
                act(tracker)
            tracker.close()
        except BaseException as error:  # any, such as the panics of Rust, which are no Exception
            self.failed = True
            why = f"{type(error).__name__}: {one_line(error)}"
            log.warning("tracker %s failed and is left out from now on: %s", self.name, why)
            self._queue = queue.SimpleQueue()  # frees what is waiting


def trackers_hang() -> bool:
    """Whether a tracker's thread still runs: its library may also block the interpreter's shutdown."""
    return any(thread.name.startswith(_PREFIX) for thread in threading.enumerate())
