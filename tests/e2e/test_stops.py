"""A run that is asked to stop does so in time from any phase, on all ranks with code 75, and goes on bit for bit."""

import json
import signal
import time

import pytest

from naign.checkpoint.writer import newest_checkpoint
from naign.errors import INTERRUPTED
from tests.conftest import SMALL
from tests.e2e.ranks import Job
from tests.e2e.runs import losses, reports, same, weights
from tests.programs import succeeded
from tests.proxy import Faults

pytestmark = pytest.mark.slow

WITHIN = 15
LONG = {
    "match": ["--match.ratio=50", "--train.passes=1"],
    "fit": ["--train.passes=20"],
    "take": ["--train.passes=1"],
    "write": ["--train.passes=1", "--checkpoint.rounds=1", "--train.ema=0.9"],
    "upload": ["--train.passes=1", "--checkpoint.rounds=1"],
}
"""Settings under which a run spends most of its time in a phase."""


def options(data, phase, rounds):
    passes = next(int(option.split("=")[1]) for option in LONG[phase] if option.startswith("--train.passes"))
    return [
        *(f"--data.path={data}", *SMALL, *LONG[phase], f"--train.images={256 * rounds * passes}"),
        f"--stop.within={WITHIN}",
    ]


@pytest.mark.parametrize("phase", ["match", "fit"])
def test_a_stop_within_a_round_goes_on_bit_for_bit(phase, digits, tmp_path):
    more = options(digits, phase, 6)
    with Job(tmp_path, 2, ("--run.path=whole", *more)) as job:
        assert job.ended(120) == [0, 0], job.said()
    rounds = 0
    for asked in (0, 1):
        with Job(tmp_path, 2, ("--run.path=run", *more)) as job:
            job.wait_for(lambda: len(reports(tmp_path / "run")) > rounds and phase in job.phases(asked))  # noqa: B023
            sent = time.monotonic()
            job.processes[asked].send_signal((signal.SIGTERM, signal.SIGUSR1)[asked])
            assert job.ended(WITHIN) == [INTERRUPTED] * 2, job.said()
            assert time.monotonic() - sent < WITHIN
        newest = newest_checkpoint(tmp_path / "run/checkpoints")
        assert newest
        rounds = json.loads((newest / "trainer.json").read_text())["round"]
        assert 0 < rounds < 6
    with Job(tmp_path, 2, ("--run.path=run", *more)) as job:
        assert job.ended() == [0, 0]
    assert losses(tmp_path / "run", "match/") == losses(tmp_path / "whole", "match/")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_stop_while_the_store_does_not_answer(naign, bucket, proxy, tmp_path):
    data = f"{bucket}/digits"
    succeeded(naign(f"pack digits --to {data} --shards 4"))
    proxy.faults = Faults(latency=1000, only=".tar")
    with Job(tmp_path, 2, ("--run.path=run", *options(data, "take", 8))) as job:
        job.wait_for(lambda: "take" in job.phases(1))
        sent = time.monotonic()
        job.processes[1].send_signal(signal.SIGTERM)
        assert job.ended(WITHIN) == [INTERRUPTED] * 2, job.said()
        assert time.monotonic() - sent < WITHIN


@pytest.mark.parametrize(("phase", "asked"), [("write", 0), ("upload", 1)])
def test_a_stop_while_a_checkpoint_is_written_or_sent(phase, asked, digits, bucket, proxy, tmp_path):
    more = options(digits, phase, 200)
    if phase == "upload":
        more.append(f"--run.remote={bucket}/run")
    with Job(tmp_path, 2, ("--run.path=run", *more)) as job:
        job.wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists())
        if phase == "upload":
            proxy.faults = Faults(latency=0.3)
        job.wait_for(lambda: phase in job.phases(asked))
        sent = time.monotonic()
        job.processes[asked].send_signal(signal.SIGTERM)
        assert job.ended(WITHIN + 5) == [INTERRUPTED] * 2, job.said()
        assert time.monotonic() - sent < WITHIN + 5
    assert newest_checkpoint(tmp_path / "run/checkpoints")
