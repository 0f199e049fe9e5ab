"""Ranks that read a round wait for each other as long as rows arrive, and no longer; garbage is collected meanwhile."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch

from naign.config import Config
from naign.errors import INTERRUPTED, SHARED, Gone, InputError, Stopped
from naign.training import loop
from naign.training.trainer import Phases
from tests.conftest import SMALL
from tests.e2e.runs import newest
from tests.programs import execute, succeeded

LOOKS = 6


class Arriving:
    """A stream of which so many rows arrive before each look; after a float, its error."""

    error = InputError

    def __init__(self, *rows):
        self.rows_read = 100  # an earlier round's
        self.rows = rows

    def take(self, number, cancelled):
        for rows in self.rows:
            self.rows_read += rows
            if isinstance(rows, float):
                raise self.error("damaged")
            if cancelled():
                raise Stopped
        return SimpleNamespace(number=number, images=torch.zeros(1, dtype=torch.uint8))


def read_on_ranks(monkeypatch, *streams, stop=False):
    """Beats of each rank's watchdog, and what each got, where the ranks are threads."""
    slots = {}
    barrier = Barrier(len(streams), timeout=30)

    def total(values, rank):
        slots[rank] = values
        barrier.wait()
        sums = [*map(sum, zip(*slots.values(), strict=True))]
        barrier.wait()
        return sums

    monkeypatch.setattr(loop, "total", lambda values, accelerator: total(values, accelerator.rank))
    beats = [0] * len(streams)
    results = [None] * len(streams)

    def read(rank):
        def beat():
            beats[rank] += 1

        run = SimpleNamespace(
            accelerator=SimpleNamespace(rank=rank, num_processes=1, device="cpu"),
            phases=SimpleNamespace(alone=lambda phase: nullcontext()),
            watchdog=SimpleNamespace(beat=beat),
            stop=SimpleNamespace(seen=lambda: stop),
            stream=streams[rank],
        )
        try:
            rows, images = loop.read_round(run, 3)
            assert images.item() == -1, "black"
            results[rank] = rows.number
        except SHARED as error:
            results[rank] = type(error)

    with ThreadPoolExecutor(len(streams)) as threads:
        threads.map(read, range(len(streams)))
    return beats, results


@pytest.mark.parametrize("world", [1, 2])
def test_rows_that_arrive_on_any_rank_are_progress_of_all(monkeypatch, world):
    beats, results = read_on_ranks(monkeypatch, Arriving(*[10] * LOOKS), *[Arriving()] * (world - 1))
    assert results == [3] * world
    # The first look only takes note; a rank that is done is ahead by a beat, by which the watchdog knows who is behind.
    assert beats == [LOOKS] * world


def test_a_store_that_stalls_is_no_progress(monkeypatch):
    beats, results = read_on_ranks(monkeypatch, Arriving(*[0] * LOOKS), Arriving())
    assert results == [3, 3] and beats == [1, 1]


@pytest.mark.parametrize("error", [InputError, Gone])
def test_all_ranks_leave_together_where_one_fails(monkeypatch, error):
    monkeypatch.setattr(Arriving, "error", error)
    _, results = read_on_ranks(monkeypatch, Arriving(10, 0.0), Arriving(*[10] * LOOKS))
    assert results == [error, 3]  # `together` makes it everyone's


def test_all_ranks_leave_together_where_one_is_stopped(monkeypatch):
    _, results = read_on_ranks(monkeypatch, Arriving(*[0] * LOOKS), Arriving(), stop=True)
    assert results == [Stopped, 3]


@pytest.mark.parametrize(
    ("phase", "remedy"),
    [
        ("fit", "train.accumulate"),
        ("match", "match.block"),
        ("report", "smaller network"),
    ],
)
def test_a_full_gpu_names_the_phase_and_what_takes_less(phase, remedy):
    phases = Phases(
        Config(),
        SimpleNamespace(round=3),
        SimpleNamespace(enter=lambda *_: None),
        rank=0,
    )
    full = rf"full in round 3, phase {phase}: .*{remedy}.* 2 GiB"
    with pytest.raises(InputError, match=full), phases.enter(phase):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")


def test_a_phase_goes_on_after_one_inside_it():
    named = []
    watchdog = SimpleNamespace(enter=lambda name, _: named.append(name))
    phases = Phases(Config(), SimpleNamespace(round=3), watchdog, rank=0)
    with phases.enter("prior"), phases.enter("encode"):
        pass
    with phases.enter("report"):
        pass
    assert named == ["prior", "encode", "prior", "report"]


@pytest.mark.slow
def test_a_round_without_a_snapshot_ends_before_a_stop(digits, tmp_path):
    """However slow its first steps seem: left, it would take the rounds since the last checkpoint along."""
    program = """
import os, signal
import pipeline.train as program
from naign.training import loop
loop.fits_in_time = lambda *_: False
match = loop.find_match
def interrupted(run, images):
    found = match(run, images)
    if run.state.round == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return found
loop.find_match = interrupted
program.main()
"""
    options = [f"--data.path={digits}", f"--run.path={tmp_path}/run", *SMALL, "--train.images=1024"]
    done = execute([sys.executable, "-c", program, *options])
    assert done.returncode == INTERRUPTED, done.stderr
    assert json.loads((newest(tmp_path / "run") / "trainer.json").read_text())["round"] == 2


@pytest.mark.slow
def test_garbage_is_collected_once_training_begins(digits, tmp_path):
    """Modules are imported without it."""
    program = (
        "import gc, sys; import pipeline.train as program; assert not gc.isenabled(); program.leave = int; "
        "program.main(); assert gc.isenabled()"
    )
    options = [f"--data.path={digits}", f"--run.path={tmp_path}/run", *SMALL, "--train.images=256"]
    command = [sys.executable, "-c", program, *options]
    succeeded(execute(command))
