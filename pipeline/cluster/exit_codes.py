"""With which code a host ends: by how its own ranks ended, and what it hears of the other hosts."""

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil

from pipeline.errors import BAD_INPUT, FAILED, INTERRUPTED, PEER_LOST, on_signals

GRACE = 10.0  # seconds to wait for another host's code, or for processes that were killed
QUIET = 30.0  # seconds without ranks after which that is told
SOON = 3.0  # seconds for ranks to notice themselves that another host is gone
MEANINGS = {
    BAD_INPUT: "bad configuration or input, which is not tried again",
    INTERRUPTED: "stopped on request; the same command goes on from the newest checkpoint",
    PEER_LOST: "another rank or host is not there; once all are, they go on from the newest checkpoint",
}
CRASHED = "crashed; see its last words above"


def program() -> str:
    """The command as typed: `naign train` starts ranks in the same way."""
    return "naign train" if sys.argv[1:2] == ["train"] else "naign launch"


def say(text: str) -> None:
    print(f"{program()}: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def heeded(idle: Callable[[], bool], leave: Callable[[], object], wait: Callable[[], object]) -> Iterator[None]:
    """While the main thread may wait in C++, where no handler runs: call `leave` a while after a signal if `idle()`
    still, and `wait` once QUIET seconds have passed.
    """
    reader, writer = socket.socketpair()
    reader.settimeout(QUIET)
    writer.setblocking(False)
    before, over = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False), threading.Event()

    def heed() -> None:
        while not over.is_set():
            try:
                asked = reader.recv(1)
            except TimeoutError:
                wait()
                reader.settimeout(None)
                continue
            if asked and not over.wait(SOON) and idle():
                leave()

    threading.Thread(target=heed, name="signals", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        writer.close()


class Ending:
    """Decides this host's exit code, and ends its ranks when another host ended and they do not end by themselves."""

    def __init__(self, patience: float, *, alone: bool = False) -> None:
        self._patience, self._alone = patience, alone  # patience: seconds for ranks to end after another host did
        self._ended, self._over = threading.Event(), threading.Event()  # this host's ranks; and its code is decided
        self._codes: dict[int, int | None] = {}
        self._saying, self._is_wrong = threading.Lock(), False  # is_wrong: this host itself, by its input
        self.stay: Callable[[], object] = lambda: None  # execute this process anew, to meet the others again
        self.lost = False  # a host vanished, as far as this one knows
        self.killed = False  # from outside: a rank of this host, which is nobody else's fault
        self.stopping = False  # this host was asked to end, and not only another one
        self.asked = False  # a signal came after the ranks had ended, or had been asked to: wait for nothing more

    def listen(self) -> None:
        """Only note signals from now on, so that none interrupts what follows."""
        on_signals(lambda *_: setattr(self, "asked", True))

    def wait_for(self, condition: Callable[[], bool], within: float = math.inf) -> None:
        """Return when the condition holds, after `within` seconds, or when this host is asked to end."""
        end = time.monotonic() + within
        while not condition() and not self.asked and time.monotonic() < end:
            time.sleep(0.05)

    def report(self, code: int, reason: str) -> None:
        """Say why this host's ranks ended with `code`. After wrong input, no other host's end is told."""
        with self._saying:
            self._is_wrong = code == BAD_INPUT
            say(reason)

    def note(self, host: int, code: int | None, lost: bool) -> None:
        """Host `host` ended with `code` (None: it did not say), and knew of a `lost` one. Waits for the ranks' end."""
        over = self._over.is_set()
        self.lost = self.lost or (not over and (code is None or lost))
        self._codes[host] = code
        if over:
            return
        with self._saying:
            if not self._is_wrong:
                say(f"host {host} ended {'without a word: lost' if code is None else f'with code {code}'}")
        # Where none is gone, ranks may be writing a checkpoint, or have missed one of this host.
        if not self._ended.wait(SOON if lost or code is None else self._patience):
            say("this host's ranks do not end: killed")
            self.lost = True
            # Without ranks torch's agent waits for those of other hosts: there are none yet, or no more.
            if not self._ended.wait(GRACE if kill_children() else SOON):
                self.stay()
                os._exit(INTERRUPTED if self.asked else PEER_LOST)

    def judge(self, code: int) -> int:
        """The code to end with, where the ranks ended with `code`: a crash may be the consequence of a lost host."""
        self._ended.set()
        crashed = code not in (0, BAD_INPUT, INTERRUPTED)
        if crashed and not self.killed and not self._alone:
            self.wait_for(lambda: bool(self._codes), GRACE)
            if code != PEER_LOST and {*self._codes.values()} == {PEER_LOST}:
                self.wait_for(lambda: self.lost, SOON)  # the word of the host that those have lost may come later
        self._over.set()
        if code == PEER_LOST and BAD_INPUT in self._codes.values():  # Slurm takes the highest of all hosts' codes
            return BAD_INPUT
        return PEER_LOST if self.lost and crashed else code

    def may_go_on(self, code: int) -> bool:
        """Whether this host, which would end with `code`, can meet the others again: nothing is wrong with itself."""
        ended = code == PEER_LOST or (code == INTERRUPTED and not self.stopping)  # as another host was asked to
        return ended and not self.asked and not self._alone

    def heard(self, host: int, within: float) -> int | None:
        """The code of another host, once it has ended; None if it vanished, or says nothing within so many seconds."""
        self.wait_for(lambda: host in self._codes, within)
        return self._codes.get(host)


def kill_children() -> list[psutil.Process]:
    """Kill all processes that this one has started, and those that they have started. Returns them."""
    found = psutil.Process().children(recursive=True)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return found


def explain(failures: Mapping[int, Any]) -> tuple[int, str, bool]:
    """The code that stands for this host's ranks, a sentence for the log's last line, and `Ending.killed`.

    `failures` are torchelastic's ProcessFailure by local rank; those that it killed long after the first do not count.
    """
    first = min(failure.timestamp for failure in failures.values())
    causes = [found for found in failures.values() if found.exitcode >= 0 or found.timestamp < first + GRACE]
    failure = max(causes, key=lambda failure: weight(failure.exitcode))
    code = int(failure.exitcode)
    if code < 0:
        killer = signal.Signals(-code).name
        hint = ": out of memory?" if -code == signal.SIGKILL else ""
        # An abort may be the library's answer to a lost peer, as NCCL's watchdog gives it.
        return FAILED, f"rank {failure.local_rank} of this host was ended by {killer}{hint}", -code != signal.SIGABRT
    reason = "" if failure.message == "<N/A>" or "traceback" in failure.message else f": {failure.message}"
    meaning = MEANINGS.get(code, CRASHED)
    return code, f"rank {failure.local_rank} of this host ended with code {code}, {meaning}{reason}", False


def weight(code: int) -> int:
    """The exit code of a host is that of its rank with the largest weight: a crash must count against the retries."""
    return {BAD_INPUT: 3, PEER_LOST: 1, INTERRUPTED: 0, 0: 0}.get(code, 2)
