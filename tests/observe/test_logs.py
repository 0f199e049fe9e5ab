"""Who logs what, and how a line looks."""

import logging
import os
import subprocess
import sys

import pytest

from naign.observe import logs
from tests.conftest import environment

NAMES = ("", "naign", "naign.store", "DeepSpeed", "some.library")


@pytest.fixture(autouse=True)
def as_before():
    """Loggers and round as they were."""
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [(logger.level, logger.handlers[:], logger.filters[:], logger.propagate) for logger in loggers]
    yield
    logs.at_round(None)
    for logger, (level, logger.handlers, logger.filters, logger.propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)


LEVELS = ("debug", "info", "warning", "error")


@pytest.mark.parametrize(
    "rank, round, place, ours",
    [
        (0, None, "[rank 0]", LEVELS[1:]),
        (3, 12, "[rank 3, round 12]", LEVELS[2:]),
    ],
)
def test_levels_and_places(
    capsys,
    rank,
    round,
    place,
    ours,
):
    logs.set_up(rank, 4)
    logs.at_round(round)
    for name in ("naign.store", "some.library"):
        for level in LEVELS:
            getattr(logging.getLogger(name), level)("a %s", level)
    assert capsys.readouterr().err.splitlines() == [
        *(f"{place} {level}: a {level}" for level in ours),
        f"{place} warning: some.library: a warning",
        f"{place} error: some.library: a error",
    ]


def test_one_rank_needs_no_number_and_a_second_set_up_no_second_line(capsys):
    logs.set_up(0, 2)
    logs.set_up(0, 1)
    logging.getLogger("naign.run").warning("damaged")
    logs.at_round(0)
    logging.getLogger("naign.run").warning("damaged")
    assert capsys.readouterr() == ("", "warning: damaged\n[round 0] warning: damaged\n")


def test_a_traceback_follows_its_line(capsys):
    logs.set_up(0, 1)
    try:
        raise RuntimeError("why")
    except RuntimeError:
        logging.getLogger("naign.run").exception("it broke")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["error: it broke", "Traceback (most recent call last):"]
    assert lines[-1] == "RuntimeError: why"


def test_a_line_replaces_the_bar_of_a_terminal(capsys, monkeypatch):
    """Without tqdm's lock, which a worker that is killed would keep."""
    logs.set_up(0, 2)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logging.getLogger("naign.store").warning("slow")
    assert capsys.readouterr().err == "\r\x1b[K[rank 0] warning: slow\n"


def test_a_worker_of_the_loader_does_not_know_the_round(capfd):
    logs.set_up(0, 2)
    logs.at_round(5)
    child = os.fork()
    if not child:
        logging.getLogger("naign.store").warning("slow")
        os._exit(0)
    os.waitpid(child, 0)
    assert capfd.readouterr().err == "[rank 0] warning: slow\n"


@pytest.mark.parametrize("imported", ["before", "after"])
def test_deepspeed_is_quiet_whenever_it_comes(capsys, imported):
    """Older versions set a level and a handler of their own."""
    logger = logging.getLogger("DeepSpeed")
    if imported == "after":
        logs.set_up(1, 2)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(logging.StreamHandler(sys.stdout))
    if imported == "before":
        logs.set_up(1, 2)
    logger.info("a hundred lines of configuration")
    logger.warning("loss scale too low")
    assert capsys.readouterr() == ("", "[rank 1] warning: DeepSpeed: loss scale too low\n")


@pytest.mark.slow
def test_the_real_deepspeed():
    script = """
from naign.observe.logs import at_round, set_up
set_up(0, 2)
at_round(3)
from deepspeed.utils import logger, log_dist
logger.setLevel("INFO")
log_dist("one", ranks=[0])
logger.info("two")
logger.warning("three")
"""
    command = [sys.executable, "-c", script]
    more = environment(DS_ACCELERATOR="cpu")
    done = subprocess.run(
        command,
        env=more,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    assert done.stderr == "[rank 0, round 3] warning: DeepSpeed: three\n"
