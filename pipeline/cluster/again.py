"""A host that lost another one keeps its process, and so its pod: it executes itself anew and meets the others again.

An orchestrator that replaces only what is lost has one pod to place, and the others do not wait out the back-off of a
restart of their own. Nothing is kept of the start before but two numbers in the environment: threads, connections and
the state of torch's agent end with it.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from pipeline.cluster.exit_codes import GRACE, Ending, kill_children, say
from pipeline.cluster.meeting import Links
from pipeline.errors import SIGNALS, Unavailable

LIMIT = 5  # starts in a row that may end early although the same hosts are there
LONG = 600.0  # seconds of ranks at work after which a start has not ended early


def check_progress(links: Links) -> None:
    """Raise Unavailable where the same hosts met again and again, and none of these starts lasted."""
    if links.generation - links.since >= LIMIT:
        said = f"{LIMIT} starts in a row ended within {LONG / 60:.0f} minutes, and no host was lost"
        raise Unavailable(f"{said}: see above what the ranks said, and whether hosts reach each other on all ports")


def meet_again(environ: Mapping[str, str], code: int, ending: Ending, links: Links, seconds: float) -> int:
    """Execute this process anew, with the environment that it was given. Its ranks were at work for so many `seconds`.

    Any thread may call it. Returns `code`, for this host to end with, where it was asked to end
    meanwhile or its ranks do not go.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # kept over the exec, until there are handlers for them
    if ending.asked or psutil.wait_procs(kill_children(), timeout=GRACE)[1]:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return code
    since = links.generation if seconds >= LONG else links.since
    say(f"this host stays, and waits for the others to meet again (they have met {links.generation} times)")
    for file in Path("/proc/self/fd").glob("*"):  # of C++ libraries, among them the port of the ranks' store
        with contextlib.suppress(OSError):  # the one by which the folder was read is closed already
            os.set_inheritable(int(file.name), int(file.name) < 3)
    past = {"NAIGN_GENERATION": str(links.generation), "NAIGN_SINCE": str(since)}
    sys.stdout.flush()
    if ending.asked:  # meanwhile: other threads still take signals
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return code
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**environ, **past})
