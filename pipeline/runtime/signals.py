"""SIGTERM, SIGUSR1 and Ctrl-C ask for a checkpoint and exit 75; the loop looks at `requested` where it can stop."""

import ctypes
import os
import signal
import sys
import types

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopRequest:
    """Set by the first signal; a second Ctrl-C ends the program at once."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)
        if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
            # Accelerate's launcher of a single process dies of a SIGTERM without handing it on: take its death for one.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
