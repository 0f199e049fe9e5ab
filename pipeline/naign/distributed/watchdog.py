"""Ends a rank that makes no progress, and says where it is.

Each rank does so for itself, by its own clock: the one that the others waited for is in the earliest round, phase and
beat, or says nothing since it is gone.
"""

import faulthandler
import os
import sys
import threading
import time
from contextlib import suppress
from typing import Self

from naign.errors import FAILED, pass_on

PATIENCE = 15.0  # seconds after which faulthandler ends the process where this thread cannot


class Watchdog:
    """Ends the process with exit code 1 when neither `enter` nor `beat` was called for `timeout` seconds.

    The process group's timeout must be longer, or it would fail first. A process can run one at a time: a thread that
    never releases the interpreter is ended by faulthandler, which has one timer.
    """

    def __init__(self, *, rank: int, timeout: float) -> None:
        self.enter("setup", 0)
        self._rank = rank
        self._timeout = timeout
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def enter(self, phase: str, round: int) -> None:
        """This rank begins a phase of a round, which is progress."""
        self.phase = phase
        self.round = round
        self._beats = 0  # since the phase began
        self._since = time.monotonic()

    def beat(self) -> None:
        """Progress inside a phase: a step, a block. Costs an assignment and a look at the clock."""
        self._beats += 1
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        self._since = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        """The body of the thread."""
        every = min(5.0, self._timeout / 10)
        while not self._stop.wait(every):
            # If this thread cannot run for so long, no Python code can: faulthandler ends the process.
            with suppress(RuntimeError):  # the container allows no more threads: do without
                faulthandler.dump_traceback_later(self._timeout + PATIENCE, exit=True, file=2)
            idle = time.monotonic() - self._since
            if idle >= self._timeout:
                self._give_up(idle)
        faulthandler.cancel_dump_traceback_later()

    def _give_up(self, idle: float) -> None:
        """Say why and end the process."""
        place = f"{self.phase} of round {self.round}, beat {self._beats}"
        text = f"rank {self._rank} has made no progress for {idle:.0f} s in {place}"
        try:
            print(text, file=sys.stderr, flush=True)
            pass_on(text)
            faulthandler.dump_traceback(file=2)
        finally:
            os._exit(FAILED)
