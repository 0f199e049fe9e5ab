"""Runs of several ranks. From three on, the order in which ranks are added is seen in the bits of a sum."""

import json
import shutil
import socket

import pytest

from tests.conftest import SMALL
from tests.e2e.ranks import Job
from tests.e2e.runs import newest, same, weights
from tests.e2e.test_engines import engine, launch
from tests.programs import succeeded

pytestmark = pytest.mark.slow

OPTIONS = [*SMALL, "--match.round=384", "--train.batch=48", "--train.images=1536"]
"""Four rounds of eight steps."""


@pytest.mark.parametrize("name", ["cpu", "zero2"])
def test_three_ranks_resume_bit_for_bit(name, digits, tmp_path):
    options = [f"--data.path={digits}", *OPTIONS, "--checkpoint.rounds=1", "--checkpoint.keep=0"]
    file = engine(name, tmp_path)
    succeeded(launch(file, tmp_path, "--run.path=whole", *options, ranks=3))
    first, *_, last = sorted((tmp_path / "whole/checkpoints").glob("step-*"))
    shutil.copytree(first, tmp_path / "again/checkpoints" / first.name)
    done = launch(file, tmp_path, "--run.path=again", *options, ranks=3)
    succeeded(done)
    assert "resuming from" in done.stderr + done.stdout
    assert newest(tmp_path / "again").name == last.name
    assert same(weights(tmp_path / "again"), weights(tmp_path / "whole"))


def test_processor_time_is_that_of_all_ranks_over_all_resumptions(digits, tmp_path):
    options = [*SMALL, f"--data.path={digits}", "--run.path=run", "--resume=changed", "--checkpoint.rounds=2"]
    # The clock is read after each round and for each checkpoint: of rounds 2 and 3, then of 4 and 5.
    for ranks, rounds, spent in (
        (2, 3, 5 * (1 + 2)),
        (1, 5, 5 * (1 + 2) + 4 * 1),
    ):
        images = f"--train.images={256 * rounds}"
        with Job(tmp_path, ranks, (*options, images), program="tests/e2e/clocked.py") as job:
            job.ends(0, within=120)
        assert json.loads((newest(tmp_path / "run") / "trainer.json").read_text())["cpu_seconds"] == spent


def test_a_rank_that_the_others_wait_for_is_named(digits, tmp_path):
    options = [*SMALL, f"--data.path={digits}", "--run.path=run", "--train.images=4096", "--report.pictures=0"]
    with Job(tmp_path, 2, tuple(options), program="tests/e2e/slowed.py") as job:
        job.ends(0, within=120)
    assert f"rank 1 on {socket.gethostname()} is slow in phase match" in job.said()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(row.get("speed/waited", 0) for row in rows) > 0.1
