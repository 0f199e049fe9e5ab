"""Calls made by daemon threads ahead of need, in bounded memory."""

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

PART = 16 << 20  # bytes asked for at once: half as many would cost a third of the speed of a fast server
PARALLEL = 3  # parts on their way at once: with those that wait, a reader holds (PARALLEL + 1) * PART bytes at most


def in_background(call: Callable[[], T], name: str) -> Future[T]:
    """The result of a call by a daemon thread, which does not keep a program alive while it waits for a store."""
    future: Future[T] = Future()

    def run() -> None:
        nonlocal call
        try:
            result = call()
            del call  # what it holds is freed before anybody goes on: at exit a thread within torch would abort
            future.set_result(result)
        except BaseException as error:  # re-raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=(run,), name=name, daemon=True).start()
    return future


def in_order(calls: Iterable[Callable[[], T]], width: int = PARALLEL) -> Generator[T]:
    """The results of the calls in their order, each made by one of `width` threads ahead of need, in bounded memory. An
    exception of a call, or of their iterator, is raised in its turn. Once this is closed, no further call begins.
    """
    todo: SimpleQueue[tuple[Future[T], Callable[[], T]] | None] = SimpleQueue()
    ahead, made, threads = deque[Future[T]](), iter(calls), 0
    try:
        while True:
            if len(ahead) == width:
                yield ahead.popleft().result()
            ahead.append(Future())
            try:
                todo.put((ahead[-1], next(made)))
            except StopIteration:
                ahead.pop()
                break
            except Exception as error:
                ahead[-1].set_exception(error)
            if threads < width:  # few threads that last: glibc keeps memory for each that there was
                threads += 1
                in_background(partial(_work, todo), "fetch")
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()
        for _ in range(threads):
            todo.put(None)


def _work(todo: "SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]") -> None:
    for future, call in iter(todo.get, None):
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:  # re-raised where the result is asked for
                future.set_exception(error)
        del future, call  # else the thread would keep the last result's bytes while it waits
