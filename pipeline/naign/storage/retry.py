"""Retries of requests to a store: the pause before the next attempt, and the number of attempts."""

import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace

from naign.errors import Unavailable, one_line

log = logging.getLogger("naign.store")

ATTEMPTS = 10  # failures in a row, without a byte of progress between, before a store counts as out of reach
FIRST_PAUSE = 0.2  # seconds: the longest pause after the first failure; it doubles with each that follows
LONGEST_PAUSE = 10.0  # seconds
_chance = random.Random()  # not the global one, which belongs to the program


@dataclass(slots=True)
class Tally:
    """Counts of what reading took."""

    bytes: int = 0  # received, from a store or a cache
    retries: int = 0  # requests that had to be made again
    reread: int = 0  # bytes read again because their hash was wrong
    cached: int = 0  # bytes of those received that came from the cache

    def add(self, **more: int) -> None:
        with _LOCK[0]:
            for name, value in more.items():
                setattr(self, name, getattr(self, name) + value)

    def take(self) -> "Tally":
        """The counts so far, which begin again at 0."""
        with _LOCK[0]:
            counts = replace(self)
            self.__init__()  # type: ignore[misc]
        return counts

    def merge(self, other: "Tally") -> None:
        self.add(**asdict(other))


_LOCK = [threading.Lock()]
os.register_at_fork(after_in_child=lambda: _LOCK.__setitem__(0, threading.Lock()))  # a thread may have held it

allowed: ContextVar[int] = ContextVar("allowed")  # attempts in this thread; unset: ATTEMPTS


@contextlib.contextmanager
def at_most(attempts: int) -> Iterator[None]:
    """Context: give up after so many attempts in this thread, for callers that can do without the answer."""
    before = allowed.set(attempts)
    try:
        yield
    finally:
        allowed.reset(before)


class Patience:
    """Pauses between attempts: exponential back-off with full jitter, so that ranks do not retry together."""

    def __init__(self, what: str, tally: Tally) -> None:
        self._what, self._tally, self._failures, self._most = what, tally, 0, allowed.get(ATTEMPTS)

    def wait(self, error: BaseException, *, at: str = "", progress: bool = False) -> None:
        """Pause after a failure. Raises Unavailable after ATTEMPTS of them in a row, or as many as `at_most` allows."""
        self._failures = 1 if progress else self._failures + 1
        error = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error  # fsspec's
        where, cause = f"{self._what}{at}", f"{type(error).__name__}: {one_line(error)}"
        if self._failures >= self._most:
            remedy = "Check the network, the server and its address, then run the same command again: it continues"
            failed = f"given up after {self._failures} attempts; the last failed with {cause}"
            raise Unavailable(f"{where}: {failed}. {remedy}") from None
        pause = _chance.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (self._failures - 1)))
        log.warning("%s: %s; attempt %d of %d in %.1f s", where, cause, self._failures + 1, self._most, pause)
        self._tally.add(retries=1)
        time.sleep(pause)
