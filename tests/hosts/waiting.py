"""Waiting for what other processes do."""

import time
from collections.abc import Callable


def until(condition: Callable[[], object], log: Callable[[], str] = str, seconds: float = 240) -> None:
    """Return when the condition holds; AssertionError with the log after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, log()
        time.sleep(0.05)
