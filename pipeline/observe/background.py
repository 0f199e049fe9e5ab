"""A tracker in a thread of its own, behind a bounded queue: training never waits for it, whatever it does."""

import logging
import queue
import threading
import time
from collections.abc import Callable

from pipeline.errors import one_line
from pipeline.observe.trackers import Tracker

log = logging.getLogger("naign.monitor")

WAITING = 256  # reports that wait for a tracker at most; a round makes up to five
PATIENCE = 5.0  # seconds that the end of a run waits for all trackers together
_PREFIX = "tracker-"  # of the threads' names


class Background:
    """A tracker that is told everything in order by its own thread. Reports that find the queue full are dropped."""

    def __init__(self, name: str, build: Callable[[], Tracker]) -> None:
        self.name, self.dropped, self.failed = name, 0, False
        self._build = build
        self._queue: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"{_PREFIX}{name}", daemon=True)
        self._thread.start()

    def put(self, act: Callable[[Tracker], None]) -> None:
        """Have the tracker do something, or drop it. Returns at once; any thread may call it."""
        if self.failed:
            return
        if self._queue.qsize() < WAITING:
            self._queue.put(act)
            return
        self.dropped += 1
        if self.dropped == 1:
            log.warning("tracker %s does not keep up: reports that find %d waiting are dropped", self.name, WAITING)

    def end(self) -> None:
        """Have the tracker close after everything that was put. Returns at once."""
        self._queue.put(None)

    def wait(self, until: float) -> None:
        """Return once the tracker has closed, or at a time of time.monotonic(), whichever is first."""
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
        except BaseException as error:  # whatever another library may raise, as Rust's panics, which are no Exception
            self.failed = True
            why = f"{type(error).__name__}: {one_line(error)}"
            log.warning("tracker %s failed, and is left out from here on: %s", self.name, why)
            self._queue = queue.SimpleQueue()  # free what is waiting


def trackers_hang() -> bool:
    """Whether a tracker's thread is still at work: its library may also hold up the interpreter's shutdown."""
    return any(thread.name.startswith(_PREFIX) for thread in threading.enumerate())
