"""Progress of commands on stderr, where that is a terminal."""

import errno
import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

DELAY = 2.0  # seconds before which no bar is shown


def counted(
    what: str,
    todo: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    unit: str = "it",
    shown: bool = True,
) -> "tqdm[Any]":
    """A bar over what is to do, or for `update`."""
    return tqdm(
        todo,
        desc=what,
        total=total,
        unit=unit,
        delay=DELAY,
        leave=False,
        disable=not shown or None,  # None: where stderr is not a terminal
    )


@contextmanager
def busy(what: str, *, shown: bool = True) -> Iterator[None]:
    """Say what a call without steps to count is doing, until it returns."""
    with tqdm(desc=what, bar_format="{desc} ...", leave=False, disable=not shown or None):
        yield


class _Terminal(io.FileIO):
    """A terminal; what is written after it was closed is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(data)


def outlive_terminal() -> None:
    """Ignore writes to a terminal that was closed, so that a run that SIGHUP stops can still write its checkpoint."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream.isatty():
            raw = _Terminal(stream.fileno(), "w", closefd=False)
            text = io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=True)
            setattr(sys, name, text)
