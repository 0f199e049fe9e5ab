"""A run that is killed again and again, one rank or all of them, in every phase, ends as if nothing had happened.

NAIGN_KILLS sets how often (20 for the record that docs/training.md names); the log is kills.txt in the
test's folder, or NAIGN_KILLS_LOG.
"""

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from naign.checkpoint.writer import is_complete, newest_checkpoint
from naign.data.dataset import DataConfig
from naign.data.format.manifest import Manifest
from naign.data.order import Order, pieces
from naign.data.reader import DataSet
from naign.storage.store import open_store
from tests.e2e.ranks import Job
from tests.e2e.runs import losses, newest, rounds_of, same, weights
from tests.proxy import Faults

KILLS = int(os.environ.get("NAIGN_KILLS", "5"))
PHASES = ("take", "match", "fit", "write", "upload")
ROUNDS, STEPS = 6 * KILLS + 8, 8
"""Of the run, and of a round."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kills_cost_time_and_nothing_else(digits, small, bucket, proxy, tmp_path):
    draw = random.Random(1)
    run = tmp_path / "run"
    options = [*small, f"--train.images={256 * ROUNDS}", "--checkpoint.rounds=2"]
    with Job(tmp_path, 2, ("--run.path=whole", *options)) as job:
        job.ends(0, within=300)

    proxy.faults = Faults(latency=0.02)
    options += ["--run.path=run", f"--run.remote={bucket}/run", "--data.trace=trace", "--train.timeout=30"]
    log = []
    before = 0
    for number in range(KILLS):
        phase = PHASES[number % len(PHASES)]
        rank = draw.randrange(2)
        everyone = number % 2 == 1
        with Job(tmp_path, 2, tuple(options)) as job:
            wanted = before // STEPS + draw.randrange(1, 6)
            job.wait_for(lambda: rounds_of(run) >= wanted, 90)  # noqa: B023
            time.sleep(draw.uniform(0, 0.1))
            job.wait_for(lambda: phase in job.phases(rank), 90)  # noqa: B023
            for process in job.processes if everyone else [job.processes[rank]]:
                process.send_signal(signal.SIGKILL)
            codes = job.ended(60)  # the other rank leaves by itself
            assert -signal.SIGKILL in codes and 0 not in codes, job.said()
            resumed = re.search(r"resuming from \S*(step-\d+)", job.said())
            assert int(resumed[1][5:]) >= before if resumed else before == 0
        whole = newest_checkpoint(run / "checkpoints")
        before = int(whole.name[5:]) if whole else 0
        partial = [f.name for f in (run / "checkpoints").glob("step-*") if not is_complete(f)]
        who = "all ranks" if everyone else f"rank {rank}"
        log.append(
            f"{number + 1:2d}. {who} in {phase}: exit codes {codes}, it had begun from "
            f"{resumed[1] if resumed else 'nothing'}; newest whole checkpoint {whole.name if whole else 'none'}"
            f"{', not whole: ' + ', '.join(partial) if partial else ''}"
        )
    # The last time without anything local: from the bucket.
    if before:
        run.rename(tmp_path / "lost")
    with Job(tmp_path, 2, tuple(options)) as job:
        job.ends(0, within=300)
        resumed = re.search(r"resuming from \S*(step-\d+)", job.said())
    log.append(f"then, the folder lost, from the bucket's {resumed[1] if resumed else 'nothing'} to the end")
    Path(os.environ.get("NAIGN_KILLS_LOG", tmp_path / "kills.txt")).write_text("\n".join(log) + "\n")

    # The same end, the same losses of what was reported since, and the same weights.
    found = losses(run)
    assert found == losses(tmp_path / "whole")[-len(found) :] and len(found) >= 8
    assert same(weights(run), weights(tmp_path / "whole"))
    last = newest(run).name
    assert last == newest(tmp_path / "whole").name
    assert last in open_store(f"{bucket}/run/checkpoints").folders()
    assert "manifest.json" in open_store(f"{bucket}/run/checkpoints/{last}").list()

    # The keys that were read are the plan's: of every round all, and none that is not of it.
    seen = set()
    for file in (tmp_path / "trace").iterdir():
        seen.update(line for line in file.read_text().splitlines() if int(line.split()[1]) < ROUNDS)
    assert seen == planned(digits)


def planned(data):
    """What the order says of all rounds: "epoch round key" of each image."""
    shards = Manifest.load(data).split("train").shards
    order = Order(sizes=tuple(shard.samples for shard in shards), seed=0, round_size=256)
    reader = DataSet(DataConfig(path=data)).reader("train")
    found = set()
    for round in range(ROUNDS):
        for piece in pieces(order, round, 0, 256):
            found.update(f"{piece.epoch} {round} {reader.row(raw).key}" for raw in reader.raw([piece]))
    return found
