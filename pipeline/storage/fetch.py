"""Getting bytes through faults: calls that are tried again, and calls that are made ahead of need."""

import contextlib
import io
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, fields
from queue import SimpleQueue
from typing import Any, TypeVar

from pipeline.errors import Unavailable

T = TypeVar("T")
log = logging.getLogger("naign.store")

ATTEMPTS = 10
"""Failures in a row, without a byte of progress between, before a store counts as out of reach."""

FIRST_PAUSE = 0.2
"""Seconds: the longest pause after the first failure; it doubles with each that follows."""

LONGEST_PAUSE = 10.0
"""Seconds."""

PART = 16 << 20
"""Bytes asked for at once: half as many would cost a third of the speed of a fast server."""

PARALLEL = 3
"""Parts on their way at once: with those that wait to be taken, a reader holds (PARALLEL + 1) * PART bytes at most."""

_chance = random.Random()  # not the global one, which belongs to the program


@dataclass(slots=True)
class Tally:
    """What reading has cost."""

    bytes: int = 0
    """Received, from a store or a cache."""

    retries: int = 0
    """Requests that had to be made again."""

    reread: int = 0
    """Bytes read again because their hash was wrong."""

    cached: int = 0
    """Bytes of those received that came from the cache."""

    def add(self, **more: int) -> None:
        with _LOCK[0]:
            for name, value in more.items():
                setattr(self, name, getattr(self, name) + value)

    def take(self) -> "Tally":
        """What was counted, counting anew from 0."""
        with _LOCK[0]:
            taken = Tally(**{field.name: getattr(self, field.name) for field in fields(self)})
            for field in fields(self):
                setattr(self, field.name, 0)
        return taken

    def merge(self, other: "Tally") -> None:
        self.add(**{field.name: getattr(other, field.name) for field in fields(other)})


_LOCK = [threading.Lock()]


def _renew_lock() -> None:
    _LOCK[0] = threading.Lock()  # another thread may have held it at the fork


os.register_at_fork(after_in_child=_renew_lock)


_attempts: ContextVar[int] = ContextVar("attempts")


@contextlib.contextmanager
def at_most(attempts: int) -> Iterator[None]:
    """Give up after so many attempts at one thing, in this thread: for what can do without the answer."""
    before = _attempts.set(attempts)
    try:
        yield
    finally:
        _attempts.reset(before)


class Patience:
    """Waits between the attempts at one thing, ever longer, and says when to give up.

    Exponential back-off with full jitter, so that ranks that failed together do not come back together.
    """

    def __init__(self, what: str, tally: Tally) -> None:
        self._what, self._tally, self._failures, self._most = what, tally, 0, _attempts.get(ATTEMPTS)

    def wait(self, error: BaseException, *, at: str = "", progress: bool = False) -> None:
        """Pause after a failure. Raises Unavailable, with the place and the cause, after ATTEMPTS of them in a row, or
        as many as `at_most` allows.
        """
        self._failures = 1 if progress else self._failures + 1
        where = f"{self._what}{at}"
        cause = f"{type(error).__name__}: {error}"
        if self._failures >= self._most:
            raise Unavailable(
                f"{where}: given up after {self._failures} attempts; the last failed with {cause}. "
                f"Check the network, the server and AWS_ENDPOINT_URL, then run the same command again: it goes on"
            ) from None
        pause = _chance.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (self._failures - 1)))
        log.warning("%s: %s; attempt %d of %d in %.1f s", where, cause, self._failures + 1, self._most, pause)
        self._tally.add(retries=1)
        time.sleep(pause)


def in_order(calls: Iterable[Callable[[], T]], width: int = PARALLEL) -> Generator[T]:
    """The results of the calls in their order, each call made by one of `width` daemon threads ahead of need.

    At most `width` results are on their way or waiting, so memory is bounded however slowly they are taken. Raises what
    a call, or the making of it, raised, in its place. Closing the generator ends the threads once their present calls
    return.
    """
    todo: SimpleQueue[tuple[Future[T], Callable[[], T]] | None] = SimpleQueue()
    ahead: deque[Future[T]] = deque()
    threads, made = 0, iter(calls)
    try:
        while True:
            if len(ahead) == width:
                yield ahead.popleft().result()
            future: Future[T] = Future()
            try:
                todo.put((future, next(made)))
            except StopIteration:
                break
            except Exception as error:
                future.set_exception(error)
                ahead.append(future)
                break
            ahead.append(future)
            if threads < width:
                threading.Thread(target=_work, args=(todo,), name="fetch", daemon=True).start()
                threads += 1
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()
        for _ in range(threads):
            todo.put(None)


def _work(todo: "SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]") -> None:
    while item := todo.get():
        future, call = item
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(call())
        except BaseException as error:  # re-raised where the result is asked for
            future.set_exception(error)
        del item, future, call  # else the thread would keep the last result's bytes while it waits


class Parts(io.RawIOBase):
    """A stream over byte strings that follow one another."""

    def __init__(self, parts: Generator[bytes]) -> None:
        self._parts, self._part, self._at = parts, memoryview(b""), 0

    def readable(self) -> bool:
        return True

    def _advance(self) -> bool:
        """Go to the next part; False at the end."""
        following = next(self._parts, None)
        if following is not None:
            self._part, self._at = memoryview(following), 0
        return following is not None

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the present part reaches; 0 at the end."""
        while self._at == len(self._part):
            if not self._advance():
                return 0
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._part) - self._at)
        target[:count] = self._part[self._at : self._at + count]
        self._at += count
        return count

    def read(self, size: int = -1) -> bytes:
        """Exactly `size` bytes, fewer only at the end; all that are left if negative."""
        if size and self._at == len(self._part):
            part = next(self._parts, b"")
            if len(part) == size:
                return part  # as it came, not copied
            self._part, self._at = memoryview(part), 0
        found = []
        while size:
            if self._at == len(self._part) and not self._advance():
                break
            stop = len(self._part) if size < 0 else min(len(self._part), self._at + size)
            found.append(self._part[self._at : stop])
            size -= stop - self._at if size > 0 else 0
            self._at = stop
        return b"".join(found)

    def close(self) -> None:
        self._parts.close()
        self._part, self._at = memoryview(b""), 0
        super().close()
