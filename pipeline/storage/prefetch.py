"""Calls that are made by threads ahead of need: a file as a stream of parts in flight, in bounded memory."""

import io
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


PART = 16 << 20
"""Bytes asked for at once: half as many would cost a third of the speed of a fast server."""


PARALLEL = 3
"""Parts on their way at once: with those that wait to be taken, a reader holds (PARALLEL + 1) * PART bytes at most."""


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
