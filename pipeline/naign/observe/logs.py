"""Logging of a training: a line per record on stderr, above the progress bar, with its rank and round."""

import ctypes
import logging
import os
import sys


def set_up(rank: int, world: int) -> None:
    """Log from INFO on rank 0, from WARNING elsewhere and for libraries, whose own levels (TORCH_LOGS, ...) stay."""
    handler = _Lines(rank, world)
    root = logging.getLogger()
    others = [other for other in root.handlers if not isinstance(other, _Lines)]
    root.handlers = [handler, *others]
    root.setLevel(logging.WARNING)
    level = logging.WARNING
    if rank == 0:
        level = logging.INFO
    logging.getLogger("naign").setLevel(level)
    # DeepSpeed sets a level and a handler of its own at import, which may be later.
    logging.getLogger("DeepSpeed").filters = [handler.divert]


def at_round(number: int | None) -> None:
    """Set the round of log lines from now on; None: no round."""
    _Lines.round = number


class _Lines(logging.Handler):
    """Writes `[rank 3, round 12] warning: ...`; no rank if there is only one, no round if none is set."""

    round: int | None = None  # of the process, since threads log too

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self._rank = rank
        self._world = world
        self._process = os.getpid()

    def format(self, record: logging.LogRecord) -> str:
        place = []
        if self._world > 1:
            place.append(f"rank {self._rank}")
        is_rank = os.getpid() == self._process  # a worker of the loader reads ahead and does not know the round
        if is_rank and self.round is not None:
            place.append(f"round {self.round}")
        line = super().format(record)
        if record.name.split(".")[0] != "naign":
            line = f"{record.name}: {line}"
        line = f"{record.levelname.lower()}: {line}"
        if place:
            line = f"[{', '.join(place)}] {line}"
        return line

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line over the progress bar, which is drawn again below. The bar's lock is not acquired: a worker
        killed with it would block the process of the bar.
        """
        try:
            line = f"{self.format(record)}\n"
            if sys.stderr.isatty():
                line = f"\r\x1b[K{line}"
            sys.stderr.write(line)
            sys.stderr.flush()
        except Exception:
            self.handleError(record)

    def divert(self, record: logging.LogRecord) -> bool:
        """A logger's filter: warnings go to this handler, and nothing to its own."""
        if record.levelno >= logging.WARNING:
            self.handle(record)
        return False


def title(text: str) -> None:
    """Name the calling thread `naign <text>`, for ps and top. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(15, f"naign {text}".encode()[:15], 0, 0, 0)  # PR_SET_NAME, of at most 15 bytes
