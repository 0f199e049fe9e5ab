"""Waiting for what other processes do."""

import time


def until(condition, log=str, seconds=240):
    """Return when the condition holds; AssertionError with the log after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, log()
        time.sleep(0.05)
