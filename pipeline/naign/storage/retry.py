"""Retries of requests to a store: the pause before the next attempt, and the time after which a store is given up."""

import contextlib
import logging
import random
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace

from naign.errors import StoreLost, Unavailable

log = logging.getLogger("naign.store")

# Seconds since the first failure, without a byte of progress, after which a store is given up. Not a number of
# attempts: the more ranks ask a store that throttles, the more of their requests fail.
PATIENCE = 300.0
FIRST_PATIENCE = 30.0  # the same for a server that has never answered this process: its address may be wrong
FIRST_PAUSE = 0.2  # seconds: the longest pause after the first failure; it doubles with each that follows
LONGEST_PAUSE = 10.0  # seconds
REMEDY = "Check the network, the server and its address, then run the same command again: it continues"
_random = random.Random()  # not the global one, which belongs to the program


@dataclass(slots=True)
class Tally:
    """Counts of what reading took."""

    bytes: int = 0  # received, from a store or a cache
    retries: int = 0  # requests that had to be made again
    reread: int = 0  # bytes read again because their hash was wrong

    def add(self, **more: int) -> None:
        with _LOCK:
            for name, value in more.items():
                setattr(self, name, getattr(self, name) + value)

    def take(self) -> "Tally":
        """The counts so far, which begin again at 0."""
        with _LOCK:
            counts = replace(self)
            self.__init__()  # type: ignore[misc]
        return counts

    def merge(self, other: "Tally") -> None:
        self.add(**asdict(other))


_LOCK = threading.Lock()

limit: ContextVar[float | None] = ContextVar("limit", default=None)  # seconds, by `give_up_after`


@contextlib.contextmanager
def give_up_after(seconds: float) -> Iterator[None]:
    """Context: give up so many seconds after the first failure (0: at once), for callers that can do without."""
    before = limit.set(seconds)
    try:
        yield
    finally:
        limit.reset(before)


class Patience:
    """Pauses between attempts: exponential back-off with full jitter, so that ranks do not retry together."""

    def __init__(self, what: str, tally: Tally) -> None:
        self._what = what
        self._tally = tally
        self._failures = 0
        self._since = 0.0  # the first failure without progress after it, by the monotonic clock

    def wait(
        self,
        reason: str,
        *,
        known: bool = True,
        at: str = "",
        progress: bool = False,
    ) -> None:
        """Pause after a failure; `known`: the server has answered before. Once time is up, raises StoreLost for such a
        server, else Unavailable.
        """
        now = time.monotonic()
        if progress or not self._failures:
            self._failures = 0
            self._since = now
        self._failures += 1
        most = limit.get()
        if most is None:
            most = PATIENCE if known else FIRST_PATIENCE
        left = self._since + most - now
        where = f"{self._what}{at}"
        if left <= 0:
            kind = StoreLost if known else Unavailable
            failed = f"given up after {now - self._since:.0f} s; the last attempt failed with {reason}"
            raise kind(f"{where}: {failed}. {REMEDY}")
        longest = FIRST_PAUSE * 2.0 ** min(self._failures - 1, 9)
        pause = min(left, _random.uniform(0, min(LONGEST_PAUSE, longest)))
        log.warning(
            "%s: %s; again in %.1f s, given up in %.0f s",
            where,
            reason,
            pause,
            left,
        )
        self._tally.add(retries=1)
        time.sleep(pause)
