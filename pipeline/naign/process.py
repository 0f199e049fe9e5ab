"""Signals, and how a process ends: what entry points call before imports that take seconds.

SIGTERM, SIGINT, SIGUSR1, SIGHUP and SIGQUIT ask a process to end. Until training begins it leaves at once
(`leave_when_asked`); from then on `distributed.StopRequest` asks all ranks for a checkpoint, and `naign launch` passes
signals on to its ranks (cluster/launch.py). `on_signals` is what installs each of these handlers.
"""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from naign.errors import Outcome

# Requests to end, which a launcher forwards to its ranks; Slurm's is USR1.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)


def on_signals(handler: Callable[..., Any] | signal.Handlers) -> None:
    """Handle all of SIGNALS by `handler`; SIGHUP stays ignored where it is, as under nohup."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def leave(code: int) -> NoReturn:
    """Exit without interpreter shutdown, which takes 0.7 s of processor time, waits for a tracker that hangs, and
    aborts, hiding `code`, where a thread still waits for gloo's store.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def leave_on_failure() -> Iterator[None]:
    """Leave with the code of a SystemExit, or with 1 after the traceback of any other error."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error.code, int) and error.code:
            leave(error.code)
        if error.code:
            leave(Outcome.FAILED)
    except BaseException:
        traceback.print_exc()
        leave(Outcome.FAILED)


def leave_when_asked(text: str = "") -> None:
    """Leave with 75, and `text` on stderr, at any of SIGNALS and when the launcher dies (Linux)."""

    def asked(*_: object) -> NoReturn:
        if text:
            print(text, file=sys.stderr)
        leave(Outcome.INTERRUPTED)

    die_with_launcher(signal.SIGKILL)
    on_signals(asked)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked while `naign launch` became this process


def die_with_launcher(number: signal.Signals) -> None:
    """Have Linux send this process the signal when its launcher dies, unless `naign launch` became this process."""
    launcher = int(os.environ.get("NAIGN_LAUNCHER", os.getppid()))
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ and launcher != os.getpid()
    if sys.platform != "linux" or not is_launched:
        return
    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
    if os.getppid() != launcher:  # it died before that call
        leave(Outcome.INTERRUPTED)
