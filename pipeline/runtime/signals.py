"""SIGTERM, SIGUSR1 and Ctrl-C ask for a checkpoint and exit 75; the loop looks at `requested` where it can stop."""

import signal
import types


class StopRequest:
    """Set by the first signal; a second Ctrl-C ends the program at once."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
