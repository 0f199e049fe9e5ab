"""A host that lost another one keeps its pod and process id: it executes itself anew and meets the others again.

The orchestrator replaces only the pod that was lost (`meeting.meet`, `admission.Guests`), and the others need not wait
out the back-off of a restart. Of the previous start only two numbers stay, in the environment.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from naign.cluster.exit_codes import GRACE, Ending, kill_children, say
from naign.cluster.meeting import Links
from naign.errors import SIGNALS, Unavailable

LIMIT = 5  # starts in a row of the same hosts that may end early
LONG = 600.0  # seconds of training after which a start has not ended early


def check_progress(links: Links) -> None:
    """Raise Unavailable after LIMIT starts of the same hosts none of which lasted LONG seconds."""
    if links.generation - links.since >= LIMIT:
        problem = f"{LIMIT} starts in a row ended within {LONG / 60:.0f} minutes, and no host was lost"
        raise Unavailable(f"{problem}: see the ranks' messages above, and whether hosts reach each other on all ports")


def meet_again(environ: Mapping[str, str], code: int, ending: Ending, links: Links, seconds: float) -> int:
    """Execute this process anew in its original environment `environ`, after `seconds` of training, from any thread.

    Returns `code`, the exit code of this host, only if it was asked to end meanwhile or its ranks cannot be killed.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # across the exec, until the new program sets handlers
    if not ending.asked and not psutil.wait_procs(kill_children(), timeout=GRACE)[1]:
        since = links.generation if seconds >= LONG else links.since
        say(f"this host stays, and waits for the others to meet again (they have met {links.generation} times)")
        for file in Path("/proc/self/fd").glob("*"):  # C++ libraries leave some open, as the port of the ranks' store
            with contextlib.suppress(OSError):  # glob's descriptor is closed already
                os.set_inheritable(int(file.name), int(file.name) < 3)
        past = {"NAIGN_GENERATION": str(links.generation), "NAIGN_SINCE": str(since)}
        sys.stdout.flush()
        if not ending.asked:  # meanwhile: other threads still receive signals
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**environ, **past})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return code
