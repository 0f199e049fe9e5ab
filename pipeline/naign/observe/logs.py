"""Logging of a training: a line per record on stderr, above the progress bar, with its rank and round."""

import ctypes
import logging
import os
import sys

from tqdm import tqdm


def set_up(rank: int, world: int) -> None:
    """Log from INFO on rank 0, from WARNING elsewhere and for libraries, whose own levels (TORCH_LOGS, ...) stay."""
    handler = _Lines(rank, world)
    root, deepspeed = logging.getLogger(), logging.getLogger("DeepSpeed")
    root.handlers = [*(other for other in root.handlers if not isinstance(other, _Lines)), handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("naign").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    others = (other for other in deepspeed.filters if not isinstance(getattr(other, "__self__", None), _Lines))
    deepspeed.filters = [*others, handler.divert]


def at_round(number: int | None) -> None:
    """Set the round of log lines from now on; None: no round."""
    _Lines.round = number


class _Lines(logging.Handler):
    """Writes `[rank 3, round 12] warning: ...`; no rank if there is only one, no round if none is set."""

    round: int | None = None  # of the process, since threads log too

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self._rank, self._world, self._process = rank, world, os.getpid()

    def format(self, record: logging.LogRecord) -> str:
        is_rank = os.getpid() == self._process  # a worker of the loader reads ahead and does not know the round
        place = [f"rank {self._rank}"] if self._world > 1 else []
        place += [f"round {self.round}"] if is_rank and self.round is not None else []
        name = "" if record.name.split(".")[0] == "naign" else f"{record.name}: "
        line = f"{record.levelname.lower()}: {name}{super().format(record)}"
        return f"[{', '.join(place)}] {line}" if place else line

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            if self._rank == 0 and os.getpid() == self._process:
                tqdm.write(line, file=sys.stderr)
                return
            # The bar belongs to another process. Do not acquire its lock: a worker killed with it would block that
            # process. Overwrite the bar's line; the bar is redrawn below.
            before, after = ("\r", "\x1b[K") if sys.stderr.isatty() else ("", "")
            sys.stderr.write(f"{before}{line}{after}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)

    def divert(self, record: logging.LogRecord) -> bool:
        """A logger's filter: warnings go to this handler, and nothing to its own, which DeepSpeed sets at import."""
        if record.levelno >= logging.WARNING:
            self.handle(record)
        return False


def title(text: str) -> None:
    """Name the calling thread `naign <text>`, for ps and top. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(15, f"naign {text}".encode()[:15], 0, 0, 0)  # PR_SET_NAME, of at most 15 bytes
