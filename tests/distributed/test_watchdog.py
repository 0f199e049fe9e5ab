"""A rank that makes no progress ends itself and says where it is; one that makes some is left alone."""

import json
import sys
import threading
import time

import pytest

from naign.distributed.watchdog import Watchdog
from naign.errors import FAILED
from tests.programs import execute

PREPARED = """
import ctypes, os, threading, time
from naign.distributed import watchdog
watchdog.PATIENCE = 1
def hang():
    time.sleep(60)
"""


def program(text):
    """Run a program after PREPARED to its end."""
    return execute([sys.executable, "-c", PREPARED + text], timeout=30)


def test_a_process_that_stalls_ends_itself(tmp_path):
    error = tmp_path / "error"
    done = program(
        f"os.environ['TORCHELASTIC_ERROR_FILE'] = {str(error)!r}\n"
        "with watchdog.Watchdog(rank=2, timeout=1) as it:\n    it.enter('fit', 3)\n    it.beat()\n    hang()"
    )
    assert done.returncode == FAILED
    said, stacks = done.stderr.split("\n", 1)
    assert said == "rank 2 has made no progress for 1 s in fit of round 3, beat 1"
    assert "in hang" in stacks
    assert json.loads(error.read_text())["message"] == said


@pytest.mark.slow
def test_a_process_that_beats_slowly_is_left_alone():
    done = program(
        "with watchdog.Watchdog(rank=0, timeout=1) as it:\n"
        "    for _ in range(5):\n"
        "        time.sleep(0.5)\n"
        "        it.beat()\n"
        "time.sleep(2.5)  # whatever was left behind would end it\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_code_that_never_releases_the_interpreter_is_ended():
    begin = time.monotonic()
    done = program(
        "with watchdog.Watchdog(rank=0, timeout=1) as it:\n    time.sleep(0.5)\n    ctypes.PyDLL(None).sleep(60)"
    )
    assert done.returncode == FAILED
    assert "Timeout (0:00:0" in done.stderr
    assert time.monotonic() - begin < 20


def test_leaving_stops_the_thread():
    with Watchdog(rank=0, timeout=1) as watchdog:
        assert (watchdog.phase, watchdog.round) == ("setup", 0)
        watchdog.enter("take", 4)
        watchdog.beat()
        assert (watchdog.phase, watchdog.round) == ("take", 4)
        assert "watchdog" in {thread.name for thread in threading.enumerate()}
    for thread in threading.enumerate():
        assert not thread.name.startswith("watchdog")
