"""A rank that makes no progress ends itself and says for whom it waited; one that makes some is left alone."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.distributed.watchdog import Heard, Post, Watchdog, describe
from pipeline.errors import FAILED
from tests.conftest import forked
from tests.distributed.ranks import WORKER, free_port

PREPARED = """
import ctypes, os, threading, time
from pipeline.distributed import watchdog
watchdog.PATIENCE = 0.3
def hang():
    time.sleep(60)
"""


def program(text: str) -> subprocess.CompletedProcess[str]:
    """Run a program after PREPARED to its end."""
    return subprocess.run(
        [sys.executable, "-c", PREPARED + text],
        env=forked(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@contextmanager
def two_ranks(case: str, folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Both ranks of a case of tests/distributed/watchdog_cases.py, which are killed in the end."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, f"watchdog_cases.{case}", str(folder), "60", "[]"],
            env=forked(**address, RANK=str(rank)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def verdict(worker: subprocess.Popen[str]) -> str:
    """The one line that a rank says before it ends itself."""
    errors = worker.communicate(timeout=30)[1]
    assert worker.returncode == FAILED, errors
    (line,) = [line for line in errors.splitlines() if " has waited " in line or " has made no progress " in line]
    assert "most recent call first" in errors and "watchdog_cases.py" in errors.split(line)[1], "stacks come after"
    return line


@pytest.mark.slow
def test_a_rank_that_is_late_is_named_by_the_one_that_waits(tmp_path):
    with two_ranks("late", tmp_path) as (waiting, _):
        said = verdict(waiting)
    assert said.startswith("rank 0 has waited 2 s in match of round 12 for rank 1, last progress ")
    assert "in take of round 12 (host " in said


@pytest.mark.slow
def test_a_rank_that_is_frozen_is_silent(tmp_path):
    with two_ranks("frozen", tmp_path) as (waiting, _):
        said = verdict(waiting)
    assert said.startswith("rank 0 has waited 3 s in match of round 12 for rank 1, last heard of ")
    assert "s ago in match of round 12 (host " in said


@pytest.mark.slow
def test_a_rank_that_was_killed_is_silent(tmp_path):
    with two_ranks("killed", tmp_path) as (waiting, _):
        said = verdict(waiting)
    assert said.startswith("rank 0 has waited 3 s in match of round 12 for rank 1, last heard of ")
    assert "s ago in take of round 12 (host " in said


@pytest.mark.slow
def test_the_store_goes_with_the_rank_that_holds_it(tmp_path):
    with two_ranks("holder_killed", tmp_path) as (_, waiting):
        said = verdict(waiting)
    assert said.startswith("rank 1 has waited 2 s in match of round 12")
    assert "the store cannot be reached (" in said and said.endswith("): rank 0, which holds it, is gone")


@pytest.mark.slow
def test_a_rank_that_left_is_named(tmp_path):
    with two_ranks("left", tmp_path) as (waiting, _):
        said = verdict(waiting)
    assert said.startswith("rank 0 has waited 2 s in match of round 12 for rank 1, which left in take of round 12")


@pytest.mark.slow
def test_two_ranks_that_make_progress_part_without_a_word(tmp_path):
    with two_ranks("slow", tmp_path) as workers:
        errors = [worker.communicate(timeout=30)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert errors == ["", ""]


def test_a_process_that_stalls_ends_itself():
    done = program(
        "with watchdog.Watchdog(rank=0, world=1, timeout=1) as it:\n    it.enter('fit', 3)\n    it.beat()\n    hang()"
    )
    assert done.returncode == FAILED
    said, stacks = done.stderr.split("\n", 1)
    assert said == "rank 0 has made no progress for 1 s in fit of round 3"
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


def test_leaving_stops_the_threads():
    with Watchdog(rank=0, world=1, timeout=30, every=0.01) as watchdog:
        assert (watchdog.phase, watchdog.round) == ("setup", 0)
        watchdog.enter("take", 4)
        watchdog.beat()
        assert (watchdog.phase, watchdog.round) == ("take", 4)
        assert "watchdog" in {thread.name for thread in threading.enumerate()}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("watchdog")]


def test_a_wall_clock_that_jumps_changes_nothing(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with Watchdog(rank=0, world=1, timeout=5, every=0.01):
        time.sleep(0.1)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_a_timeout_that_is_none_is_refused(timeout):
    with pytest.raises(ValueError, match="the watchdog's timeout is .* more than 0"):
        Watchdog(rank=0, world=1, timeout=timeout)


TAKE, MATCH, FIT = (
    {"phase": "take", "round": 12, "order": 1},
    {"phase": "match", "round": 12, "order": 2},
    {"phase": "fit", "round": 12, "order": 3},
)


def post(place: dict[str, object], *, beats: int = 5, idle: float = 600, state: str = "at work") -> Post:
    return Post(**place, beats=beats, idle=idle, host="xyz", state=state)


def fresh(one: Post) -> Heard:
    return Heard(one, ago=2, unchanged=0)


@pytest.mark.parametrize(
    ("heard", "said"),
    [
        (None, "rank 0 has made no progress for 600 s in match of round 12"),
        (
            {1: fresh(post(MATCH)), 2: fresh(post(MATCH))},
            "rank 0 has made no progress for 600 s in match of round 12, where all 3 ranks are",
        ),
        (
            {1: fresh(post(MATCH)), 2: Heard(post(TAKE), ago=598, unchanged=597)},
            "rank 0 has waited 600 s in match of round 12 for rank 2, last heard of 598 s ago in take of round 12 "
            "(host xyz)",
        ),
        (
            {1: fresh(post(TAKE, idle=1)), 2: fresh(post(MATCH))},
            "rank 0 has waited 600 s in match of round 12 for rank 1, last progress 3 s ago in take of round 12 "
            "(host xyz)",
        ),
        (
            {1: fresh(post(MATCH, beats=3)), 2: fresh(post(MATCH, beats=4))},  # rank 2 may wait for rank 1 as well
            "rank 0 has waited 600 s in match of round 12 for rank 1, 2 beats behind, last progress 602 s ago in "
            "match of round 12 (host xyz)",
        ),
        (
            {1: fresh(post(MATCH, beats=3)), 2: fresh(post(TAKE, beats=9))},  # the phase comes before the beats
            "rank 0 has waited 600 s in match of round 12 for rank 2, last progress 602 s ago in take of round 12 "
            "(host xyz)",
        ),
        (
            {2: fresh(post(MATCH))},
            "rank 0 has waited 600 s in match of round 12 for rank 1, which was never heard of",
        ),
        (
            {1: fresh(post(MATCH, state="left")), 2: fresh(post(FIT, state="left"))},  # rank 2 was done, so not it
            "rank 0 has waited 600 s in match of round 12 for rank 1, which left in match of round 12 (host xyz)",
        ),
        (
            {1: Heard(post(MATCH, state="ended"), ago=40, unchanged=40), 2: fresh(post(MATCH))},  # waited, as we do
            "rank 0 has made no progress for 600 s in match of round 12, where all 3 ranks are",
        ),
        (
            {1: fresh(post(FIT)), 2: fresh(post(MATCH))},
            "rank 0 has made no progress for 600 s in match of round 12, and is behind rank 1 in fit of round 12",
        ),
    ],
)
def test_the_message_names_who_is_behind(heard, said):
    assert describe(0, 3, post(MATCH), heard, silence=17) == said


def test_a_long_list_is_cut():
    said = describe(0, 20, post(MATCH), {rank: fresh(post(TAKE)) for rank in range(1, 20)}, silence=17)
    assert "rank 8, last" in said and "rank 9" not in said and said.endswith("; and 11 more")


def test_what_was_read_before_the_store_was_lost_is_told():
    heard = {1: fresh(post(MATCH)), 2: fresh(post(TAKE))}
    said = describe(0, 3, post(MATCH), heard, silence=17, lost="refused")
    assert "for rank 2, last progress 602 s ago in take" in said
    assert said.endswith("; the store cannot be reached (refused): rank 0, which holds it, is gone")
    said = describe(0, 3, post(MATCH), {}, silence=17, lost="refused")
    assert said == (
        "rank 0 has waited 600 s in match of round 12; the store cannot be reached (refused): "
        "rank 0, which holds it, is gone"
    )
