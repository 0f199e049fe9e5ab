"""The exit code of a host, from how its ranks ended and what the other hosts reported."""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil

from naign.errors import BAD_INPUT, FAILED, INTERRUPTED, PEER_LOST, on_signals

GRACE = 10.0  # seconds to wait for another host's code, or for killed processes
SOON = 3.0  # seconds that ranks have to notice by themselves that another host is gone
MEANINGS = {
    BAD_INPUT: "bad configuration or input, which is not tried again",
    INTERRUPTED: "stopped on request; the same command goes on from the newest checkpoint",
    PEER_LOST: "a rank, a host or stored data is lost; once all are there, they go on from the newest checkpoint",
}
CRASHED = "crashed; see its last lines above"


def program() -> str:
    """The command as typed: `naign train` or `naign launch`."""
    return "naign train" if sys.argv[1:2] == ["train"] else "naign launch"


def say(text: str) -> None:
    print(f"{program()}: {text}", file=sys.stderr, flush=True)


def leave_at_once(*_: object) -> None:
    """End this process on a signal, while there are no ranks."""
    say(MEANINGS[INTERRUPTED])
    os._exit(INTERRUPTED)


class Ending:
    """Decides this host's exit code, and kills its ranks if they do not end after another host did."""

    def __init__(self, patience: float, *, alone: bool = False) -> None:
        self._patience, self._alone = patience, alone  # patience: seconds for ranks to end after another host did
        self._ended, self._over = threading.Event(), threading.Event()  # the ranks ended; the exit code is decided
        self.codes: dict[int, int | None] = {}  # of other hosts by index; None: the host vanished
        self._is_cause = False  # the others end because this host did
        self.stay: Callable[[], object] = lambda: None  # executes this process anew, to meet the others again
        self.lost = False  # another host vanished
        self.killed = False  # a rank on this host was killed by an external signal
        self.stopping = False  # this host received a signal, not only another one
        self.asked = False  # a signal came after the ranks ended or were asked to: do not wait any more

    def listen(self) -> None:
        """From now on a signal only sets `asked`."""
        on_signals(lambda *_: setattr(self, "asked", True))

    def wait_for(self, condition: Callable[[], bool], within: float = math.inf) -> None:
        """Return when the condition holds, after `within` seconds, or on a signal."""
        end = time.monotonic() + within
        while not condition() and not self.asked and time.monotonic() < end:
            time.sleep(0.05)

    def report(self, code: int, reason: str) -> None:
        """Log why this host's ranks ended with `code`: the last line, where the others end because of it."""
        self._is_cause = code == BAD_INPUT or self.killed
        say(reason)

    def note(self, host: int, code: int | None, lost: bool) -> None:
        """Record how `host` ended (code None: vanished; lost: it knew of a lost one); await or kill the local ranks."""
        over = self._over.is_set()
        self.lost = self.lost or (not over and (code is None or lost))
        self.codes[host] = code
        if over:
            return
        if not self._is_cause:
            say(f"host {host} ended {'without a code: lost' if code is None else f'with code {code}'}")
        # While no host is lost, ranks may be writing a checkpoint.
        if not self._ended.wait(SOON if lost or code is None else self._patience):
            say("this host's ranks do not end: killed")
            self.lost = True
            # Without ranks torch's agent waits for those of other hosts, which do not exist.
            if not self._ended.wait(GRACE if kill_children() else SOON):
                self.stay()
                os._exit(INTERRUPTED if self.asked else PEER_LOST)

    def judge(self, code: int) -> int:
        """The exit code of this host whose ranks ended with `code`: a crash may be the consequence of a lost host."""
        self._ended.set()
        crashed = code not in (0, BAD_INPUT, INTERRUPTED)
        if crashed and not self.killed and not self._alone:
            self.wait_for(lambda: bool(self.codes), GRACE)
            if code != PEER_LOST and {*self.codes.values()} == {PEER_LOST}:
                self.wait_for(lambda: self.lost, SOON)  # the host that they lost may still report its end
        self._over.set()
        if code == PEER_LOST and BAD_INPUT in self.codes.values():  # Slurm takes the highest of all hosts' codes
            return BAD_INPUT
        return PEER_LOST if self.lost and crashed else code

    def may_go_on(self, code: int) -> bool:
        """Whether this host, which would end with `code`, can meet the others again, as nothing is wrong with it."""
        ended = code == PEER_LOST or (code == INTERRUPTED and not self.stopping)  # as another host was asked to
        return ended and not self.asked and not self._alone


def kill_children() -> list[psutil.Process]:
    """Kill all descendants of this process. Returns them."""
    children = psutil.Process().children(recursive=True)
    for process in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return children


def explain(failures: Mapping[int, Any]) -> tuple[int, str, bool]:
    """The exit code of this host's ranks, a sentence for the last line of the log, and `Ending.killed`. `failures` are
    torchelastic's ProcessFailure by local rank; those that it killed long after the first are ignored.
    """
    first = min(failure.timestamp for failure in failures.values())
    causes = [failure for failure in failures.values() if failure.exitcode >= 0 or failure.timestamp < first + GRACE]
    failure = max(causes, key=lambda failure: weight(failure.exitcode))
    code = int(failure.exitcode)
    if code < 0:
        killer = signal.Signals(-code).name
        hint = ": out of memory?" if -code == signal.SIGKILL else ""
        # A library may abort when it loses a peer, as NCCL's watchdog does.
        return FAILED, f"rank {failure.local_rank} of this host was ended by {killer}{hint}", -code != signal.SIGABRT
    reason = "" if failure.message == "<N/A>" or "traceback" in failure.message else f": {failure.message}"
    meaning = MEANINGS.get(code, CRASHED)
    return code, f"rank {failure.local_rank} of this host ended with code {code}, {meaning}{reason}", False


def weight(code: int) -> int:
    """Order of exit codes: a host ends with its rank's code of the largest weight, so a crash is never hidden."""
    return {BAD_INPUT: 3, PEER_LOST: 1, INTERRUPTED: 0, 0: 0}.get(code, 2)
