"""A run that is asked to stop does so in time from any phase, on all ranks with code 75, and goes on bit for bit."""

import json
import signal
import time

import pytest

from naign.errors import INTERRUPTED
from tests.conftest import SMALL
from tests.e2e.ranks import Job
from tests.e2e.runs import losses, newest, rounds_of, same, weights
from tests.programs import succeeded
from tests.proxy import Faults

pytestmark = pytest.mark.slow

WITHIN = 15
LONG = {
    "match": ["--match.ratio=50"],
    "fit": [],
    "take": [],
    "write": ["--checkpoint.rounds=1", "--train.ema=0.9"],
    "upload": ["--checkpoint.rounds=1"],
}
"""Settings under which a run spends most of its time in a phase."""


def options(data, phase, rounds):
    passes = 20 if phase == "fit" else 1
    return [
        f"--data.path={data}",
        *SMALL,
        *LONG[phase],
        f"--train.passes={passes}",
        f"--train.images={256 * rounds * passes}",
        f"--stop.within={WITHIN}",
    ]


def stop(job, rank, sent=signal.SIGTERM, within=WITHIN):
    """Ask one rank to stop: all end in time."""
    begun = time.monotonic()
    job.processes[rank].send_signal(sent)
    job.ends(INTERRUPTED, within=within)
    assert time.monotonic() - begun < within


@pytest.mark.parametrize("phase", ["match", "fit"])
def test_a_stop_within_a_round_goes_on_bit_for_bit(phase, digits, tmp_path):
    run = tmp_path / "run"
    more = options(digits, phase, 6)
    with Job(tmp_path, 2, ("--run.path=whole", *more)) as job:
        job.ends(0, within=120)
    rounds = 0
    for asked, sent in ((0, signal.SIGTERM), (1, signal.SIGUSR1)):
        with Job(tmp_path, 2, ("--run.path=run", *more)) as job:
            job.wait_for(lambda: rounds_of(run) > rounds and phase in job.phases(asked))  # noqa: B023
            stop(job, asked, sent)
        rounds = json.loads((newest(run) / "trainer.json").read_text())["round"]
        assert 0 < rounds < 6
    with Job(tmp_path, 2, ("--run.path=run", *more)) as job:
        job.ends(0)
    assert losses(run, "match/") == losses(tmp_path / "whole", "match/")
    assert same(weights(run), weights(tmp_path / "whole"))


def test_a_stop_while_the_store_does_not_answer(naign, bucket, proxy, tmp_path):
    data = f"{bucket}/digits"
    succeeded(naign(f"pack digits --to {data} --shards 4"))
    proxy.faults = Faults(latency=1000, only=".tar")
    with Job(tmp_path, 2, ("--run.path=run", *options(data, "take", 8))) as job:
        job.wait_for(lambda: "take" in job.phases(1))
        stop(job, 1)


@pytest.mark.parametrize(("phase", "asked"), [("write", 0), ("upload", 1)])
def test_a_stop_while_a_checkpoint_is_written_or_sent(phase, asked, digits, bucket, proxy, tmp_path):
    more = options(digits, phase, 200)
    if phase == "upload":
        more.append(f"--run.remote={bucket}/run")
    with Job(tmp_path, 2, ("--run.path=run", *more)) as job:
        job.wait_for(lambda: rounds_of(tmp_path / "run"))
        if phase == "upload":
            proxy.faults = Faults(latency=0.3)
        job.wait_for(lambda: phase in job.phases(asked))
        stop(job, asked, within=WITHIN + 5)
    assert newest(tmp_path / "run")
