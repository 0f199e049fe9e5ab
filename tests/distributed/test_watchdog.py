"""A rank that makes no progress ends itself and says for whom it waited; one that makes some is left alone."""

import json
import re
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from naign.distributed.watchdog import Post, Watchdog, describe
from naign.errors import FAILED
from tests.distributed.ranks import WORKER, started
from tests.programs import ends, execute

PREPARED = """
import ctypes, os, threading, time
from naign.distributed import watchdog
watchdog.PATIENCE = 0.3
def hang():
    time.sleep(60)
"""


def program(text):
    """Run a program after PREPARED to its end."""
    return execute([sys.executable, "-c", PREPARED + text], timeout=30)


@contextmanager
def two_ranks(case, folder):
    """Both ranks of a case of tests/distributed/watchdog_cases.py, which are killed in the end."""
    workers = started([sys.executable, "-c", WORKER, f"watchdog_cases.{case}", str(folder), "60", "[]"], 2)
    try:
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def verdict(worker):
    """The lines that a rank says before it ends itself."""
    errors = worker.communicate(timeout=30)[1]
    assert worker.returncode == FAILED, errors
    said = re.search(r"^rank \d has made no progress .*\n(  rank .*\n)*", errors, re.M)
    assert said, errors
    stacks = errors[said.end() :]
    assert "most recent call first" in stacks and "watchdog_cases.py" in stacks, "stacks come after"
    return said[0].splitlines()


@pytest.mark.slow
def test_a_rank_that_is_late_is_named_by_the_one_that_waits(tmp_path):
    with two_ranks("late", tmp_path) as (waiting, _):
        mine, other = verdict(waiting)
    assert mine == "rank 0 has made no progress for 2 s in match of round 12, beat 0"
    assert re.fullmatch(r"  rank 1 in take of round 12, beat 0, last progress \d s ago, host \S+: BEHIND", other)


@pytest.mark.slow
def test_a_rank_that_is_frozen_is_silent(tmp_path):
    with two_ranks("frozen", tmp_path) as (waiting, _):
        mine, other = verdict(waiting)
    assert mine == "rank 0 has made no progress for 3 s in match of round 12, beat 0"
    assert other.startswith("  rank 1 in match of round 12, beat 0, last progress ")
    assert re.search(r": SILENT for \d s$", other)


@pytest.mark.slow
def test_the_store_goes_with_the_rank_that_holds_it(tmp_path):
    with two_ranks("holder_killed", tmp_path) as (_, waiting):
        mine = verdict(waiting)[0]
    assert re.match(r"rank 1 has made no progress for \d+ s in match of round 12", mine)
    assert "the store cannot be reached (" in mine and mine.endswith("): rank 0, which holds it, is gone")


@pytest.mark.slow
def test_two_ranks_that_make_progress_part_without_a_word(tmp_path):
    with two_ranks("slow", tmp_path) as workers:
        for worker in workers:
            assert ends(worker, 0, timeout=30) == ""


def test_a_process_that_stalls_ends_itself():
    done = program(
        "with watchdog.Watchdog(rank=0, world=1, timeout=1) as it:\n    it.enter('fit', 3)\n    it.beat()\n    hang()"
    )
    assert done.returncode == FAILED
    said, stacks = done.stderr.split("\n", 1)
    assert said == "rank 0 has made no progress for 1 s in fit of round 3, beat 1"
    assert "in hang" in stacks


@pytest.mark.slow
def test_a_process_that_beats_slowly_is_left_alone():
    done = program(
        "with watchdog.Watchdog(rank=0, world=1, timeout=1, every=0.1) as it:\n"
        "    for _ in range(5):\n"
        "        time.sleep(0.5)\n"
        "        it.beat()\n"
        "time.sleep(2.5)  # whatever was left behind would end it\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stall", "said"),
    [
        # Code that never lets go of the interpreter: no other Python thread runs.
        ("ctypes.PyDLL(None).sleep(60)", "Timeout (0:00:0"),
        # A message that never gets away.
        ("it._say = lambda text: hang(); hang()", ""),
        ("it._say = None; hang()", "in hang"),
    ],
)
def test_it_ends_whatever_hangs_or_breaks(stall, said):
    begin = time.monotonic()
    done = program(f"with watchdog.Watchdog(rank=0, world=1, timeout=1) as it:\n    {stall}")
    assert done.returncode == FAILED and said in done.stderr
    assert time.monotonic() - begin < 20


def test_the_launcher_hears_which_rank_is_silent(tmp_path):
    text = "describe = lambda *_, **__: 'rank 0 waits\\n  rank 1: SILENT\\n  rank 2'"
    text = f"watchdog.{text}\nos.environ['TORCHELASTIC_ERROR_FILE'] = {str(tmp_path / 'error')!r}\n"
    assert program(f"{text}with watchdog.Watchdog(rank=0, world=1, timeout=1) as it:\n    hang()").returncode == FAILED
    assert json.loads((tmp_path / "error").read_text())["message"] == "rank 0 waits; rank 1: SILENT"


def test_leaving_stops_the_threads():
    with Watchdog(rank=0, world=1, timeout=30, every=0.01) as watchdog:
        assert (watchdog.phase, watchdog.round) == ("setup", 0)
        watchdog.enter("take", 4)
        watchdog.beat()
        assert (watchdog.phase, watchdog.round) == ("take", 4)
        assert "watchdog" in {thread.name for thread in threading.enumerate()}
    for thread in threading.enumerate():
        assert not thread.name.startswith("watchdog")


TAKE = {"phase": "take", "round": 12, "order": 1}
MATCH = {"phase": "match", "round": 12, "order": 2}
FIT = {"phase": "fit", "round": 12, "order": 3}


def post(
    place,
    *,
    beats=5,
    idle=600,
    ago=2,
    unchanged=0,
):
    first = time.monotonic() - ago
    return Post(**place, beats=beats, idle=idle, host="xyz"), first, first + unchanged


def told(posts, *, world=3, lost=""):
    """The lines of what rank 0 says."""
    mine = post(MATCH)[0]
    return describe(0, world, mine, posts, silence=17, lost=lost).split("\n  ")


HERE = "in match of round 12, beat 5, last progress 602 s ago, host xyz"
BEFORE = "in take of round 12, beat 5, last progress 602 s ago, host xyz"
AFTER = "in fit of round 12, beat 5, last progress 602 s ago, host xyz"
STALLED = "rank 0 has made no progress for 600 s in match of round 12, beat 5"


@pytest.mark.parametrize(
    ("posts", "rows"),
    [
        (lambda: {1: post(MATCH), 2: post(MATCH)}, [f"rank 1 {HERE}", f"rank 2 {HERE}"]),  # all at the same place
        (
            lambda: {1: post(MATCH), 2: post(TAKE, ago=598, unchanged=597)},
            [
                "rank 2 in take of round 12, beat 5, last progress 1198 s ago, host xyz: SILENT for 598 s",
                f"rank 1 {HERE}",
            ],
        ),
        (  # who is silent comes first, even from further on
            lambda: {1: post(TAKE), 2: post(MATCH, ago=598, unchanged=597)},
            [
                "rank 2 in match of round 12, beat 5, last progress 1198 s ago, host xyz: SILENT for 598 s",
                f"rank 1 {BEFORE}: BEHIND",
            ],
        ),
        (
            lambda: {1: post(MATCH), 2: post(TAKE, idle=1)},
            ["rank 2 in take of round 12, beat 5, last progress 3 s ago, host xyz: BEHIND", f"rank 1 {HERE}"],
        ),
        (
            lambda: {1: post(MATCH, beats=3), 2: post(TAKE, beats=9)},  # the phase comes before the beats
            [
                "rank 2 in take of round 12, beat 9, last progress 602 s ago, host xyz: BEHIND",
                "rank 1 in match of round 12, beat 3, last progress 602 s ago, host xyz: BEHIND",
            ],
        ),
        (lambda: {1: post(MATCH)}, ["rank 2 MISSING, never heard of", f"rank 1 {HERE}"]),
        (lambda: {1: post(FIT), 2: post(MATCH)}, [f"rank 2 {HERE}", f"rank 1 {AFTER}"]),  # only this one is behind
    ],
)
def test_the_message_has_a_line_a_rank_the_missing_first_then_the_hindmost(posts, rows):
    assert told(posts()) == [STALLED, *rows]


def test_alone_it_names_no_others():
    assert told({}, world=1) == [STALLED]


def test_a_long_list_is_cut():
    posts = {}
    for rank in range(1, 20):
        posts[rank] = post(TAKE)
    said = told(posts, world=20)
    assert said[8].startswith("rank 8 in take")
    assert said[9:] == ["and 11 more"]


def test_what_was_read_before_the_store_was_lost_is_told():
    gone = f"{STALLED}; the store cannot be reached (refused): rank 0, which holds it, is gone"
    posts = {1: post(MATCH), 2: post(TAKE)}
    assert told(posts, lost="refused") == [gone, f"rank 2 {BEFORE}: BEHIND", f"rank 1 {HERE}"]
    assert told({}, lost="refused") == [gone]
