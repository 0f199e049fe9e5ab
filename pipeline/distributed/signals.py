"""SIGTERM, SIGUSR1 and Ctrl-C ask for a checkpoint and exit 75, when all ranks agree."""

import ctypes
import math
import os
import signal
import sys
import time
import types
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

c10d: Any = dist.distributed_c10d

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopRequest:
    """Set by the first signal to any rank; a second Ctrl-C ends the program at once. To be made on every rank."""

    def __init__(
        self,
        *,
        within: float = math.inf,  # seconds after a signal in which all has to be done
        world: int = 1,
        timeout: float = 660,  # seconds that ranks wait for each other
    ) -> None:
        self.requested = False
        self._within, self._world = within, world
        self._deadline = math.inf
        patience = timedelta(seconds=timeout)
        self._group: Any = dist.new_group(backend="gloo", timeout=patience) if world > 1 else None
        self._board: Any = c10d.PrefixStore("stop", c10d._get_default_store()) if world > 1 else None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)
        if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
            # Accelerate's launcher of a single process dies of a SIGTERM without handing it on: take its death for one.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self._deadline = time.monotonic() + self._within
        self.requested = True

    @property
    def left(self) -> float:
        """Seconds until all has to be done; infinite without a signal."""
        return max(0.0, self._deadline - time.monotonic())

    def seen(self) -> bool:
        """Whether any rank was asked, as far as this one knows: to be looked at where ranks do not go in step."""
        if self._board is None:
            return self.requested
        if self.requested:
            self._board.set("asked", "1")
            return True
        if self._board.check(["asked"]):
            self._note(signal.SIGTERM, None)
        return self.requested

    def agree(self, spent: float = 0.0) -> tuple[bool, float]:
        """Collective: whether any rank was asked, and the most that any rank says it has `spent`."""
        mine = torch.tensor([float(self.requested), spent], dtype=torch.float64)
        if self._group is not None:
            dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._group)
        if mine[0] and not self.requested:
            self._note(signal.SIGTERM, None)
        return bool(mine[0]), float(mine[1])


EVERY = 0.5
"""Seconds between two agreements, about."""


class Poll:
    """Looks at a stop request where all ranks pass equally often; they talk only about twice a second."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop, self._stride, self._passed, self._last = stop, 1, 0, time.monotonic()

    def __call__(self) -> bool:
        """Collective: whether to stop here, the same on every rank."""
        self._passed += 1
        if self._passed < self._stride:
            return False
        now = time.monotonic()
        stopping, spent = self._stop.agree(now - self._last)
        # From what all ranks know alike, so that they count alike.
        self._stride = max(1, min(2 * self._stride, int(self._passed * EVERY / max(spent, 1e-6))))
        self._passed, self._last = 0, now
        return stopping

    def begin(self) -> "Poll":
        """Collective: a phase begins that is like the last one."""
        self._passed, self._last = 0, time.monotonic()
        return self
