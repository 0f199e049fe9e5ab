"""SIGTERM, SIGUSR1, SIGHUP and Ctrl-C ask for a checkpoint and exit code 75, once all ranks agree.

The handler and the agreement are here; training/loop.py writes the checkpoint. Before the first round a signal ends the
program at once (`process.leave_when_asked`).
"""

import math
import signal
import time
from typing import Any

from torch.distributed import distributed_c10d as c10d

from naign.distributed.ranks import SideGroup
from naign.process import die_with_launcher, on_signals

POLL_SECONDS = 0.5  # approximate seconds between two collective polls


class StopRequest:
    """Set by the first signal to any rank; a second Ctrl-C ends the program at once. Everything has to be done `within`
    seconds after a signal. Collective; ranks wait for each other for `timeout` seconds.
    """

    def __init__(
        self,
        *,
        within: float = math.inf,
        world: int = 1,
        timeout: float = 660,
    ) -> None:
        self.requested = False
        self._within = within
        self._deadline = math.inf
        self._group = SideGroup(world, timeout=timeout)
        self._store: Any = None
        if world > 1:
            self._store = c10d.PrefixStore("stop", c10d._get_default_store())
        on_signals(self._handle)
        # The launcher's death counts as a SIGTERM: Accelerate's launcher of a single process does not forward that.
        die_with_launcher(signal.SIGTERM)

    def _handle(self, number: int, _: object = None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self._deadline = time.monotonic() + self._within
        self.requested = True

    @property
    def left(self) -> float:
        """Seconds until everything has to be done; infinite without a signal."""
        return max(0.0, self._deadline - time.monotonic())

    def seen(self) -> bool:
        """Whether any rank was asked to stop, as far as this one knows. Not collective."""
        if self._store is not None:
            if self.requested:
                self._store.set("asked", "1")
            elif self._store.check(["asked"]):
                self._handle(signal.SIGTERM)
        return self.requested

    def poll_stop(self, elapsed: float = 0.0) -> tuple[bool, float]:
        """Collective: whether any rank was asked, and the largest `elapsed` of all ranks."""
        requested, elapsed = self._group.largest(self.requested, elapsed)
        if requested:
            self._handle(signal.SIGTERM)
        return bool(requested), elapsed


class StopPoll:
    """Polls for a stop request in a phase where all ranks poll equally often; they communicate about twice a second."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop
        self._stride = 2
        self._calls = 0
        self._last = time.monotonic()
        self.elapsed = 0.0  # seconds up to the last poll, on the slowest rank; the same on every rank

    def __call__(self) -> bool:
        """Collective: whether to stop here, the same on every rank."""
        self._calls += 1
        if self._calls < self._stride:
            return False
        now = time.monotonic()
        stopping, elapsed = self._stop.poll_stop(now - self._last)
        self.elapsed += elapsed
        # A function of values that all ranks share, so that their strides stay equal; the first one times a step.
        wanted = int(self._calls * POLL_SECONDS / max(elapsed, 1e-6))
        self._stride = max(1, min(8 * self._stride, wanted))
        self._calls = 0
        self._last = now
        return stopping
