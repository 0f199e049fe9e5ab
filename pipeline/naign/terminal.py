"""Progress of commands on stderr: a bar on a terminal, and lines in a log."""

import errno
import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

DELAY = 2.0  # seconds before which no bar is shown
LOG_EVERY = 10.0  # seconds between the lines of a log


def counted(
    what: str,
    todo: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    unit: str = "it",
    shown: bool = True,
) -> "tqdm[Any]":
    """A bar over what is to do, or for `update`; lines in a log."""
    return tqdm(
        todo,
        desc=f"{what}: ",
        total=total,
        unit=unit,
        delay=DELAY,
        leave=False,
        disable=not shown,
        **in_log(),
    )


def in_log() -> dict[str, Any]:
    """Options of tqdm: where stderr is not a terminal, a line every LOG_EVERY seconds."""
    if sys.stderr.isatty():
        return {"dynamic_ncols": True}
    return {
        "file": _Lines(),
        "mininterval": LOG_EVERY,
        "bar_format": "{desc}{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
    }


class _Lines:
    """stderr for tqdm, with a line for each update."""

    def write(self, text: str) -> None:
        text = text.strip()
        if text:
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None: ...


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Say what a call without steps to count is doing, until it returns."""
    with tqdm(desc=what, bar_format="{desc} ...", leave=False, disable=None):
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
