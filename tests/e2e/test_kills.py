"""A run that is killed again and again, one rank or all of them, in every phase, ends as if nothing had happened.

NAIGN_KILLS sets how often (20 for the record that docs/resuming.md names); the log is kills.txt in the
test's folder, or NAIGN_KILLS_LOG.
"""

import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from naign.checkpoint.writer import is_complete, newest_checkpoint
from naign.data.format.manifest import Manifest
from naign.data.order import Order, pieces
from naign.storage.store import open_store
from tests.conftest import SMALL
from tests.e2e.ranks import Job
from tests.e2e.runs import losses, same, weights
from tests.proxy import Faults

KILLS = int(os.environ.get("NAIGN_KILLS", "5"))
PHASES = ("take", "match", "fit", "write", "upload")
ROUNDS, STEPS = 6 * KILLS + 8, 8
"""Of the run, and of a round."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kills_cost_time_and_nothing_else(digits, bucket, proxy, tmp_path):
    draw = random.Random(1)
    options = [f"--data.path={digits}", *SMALL, f"--train.images={256 * ROUNDS}", "--checkpoint.rounds=2"]
    with Job(tmp_path, 2, ("--run.path=whole", *options)) as job:
        assert job.ended(300) == [0, 0], job.said()

    proxy.faults = Faults(latency=0.02)
    options += ["--run.path=run", f"--run.remote={bucket}/run", "--data.trace=trace", "--train.timeout=30"]
    log, before = [], 0
    for number in range(KILLS):
        begun = before // STEPS
        phase = PHASES[number % len(PHASES)]
        rank, everyone = draw.randrange(2), number % 2 == 1
        with Job(tmp_path, 2, tuple(options)) as job:
            metrics, wanted = tmp_path / "run/metrics.jsonl", begun + draw.randrange(1, 6)
            job.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= wanted, 90)  # noqa: B023
            time.sleep(draw.uniform(0, 0.1))
            job.wait_for(lambda: phase in job.phases(rank), 90)  # noqa: B023
            for process in job.processes if everyone else [job.processes[rank]]:
                process.send_signal(signal.SIGKILL)
            codes = job.ended(60)  # the other rank leaves by itself
            assert -signal.SIGKILL in codes and 0 not in codes, job.said()
            resumed = re.search(r"resuming from \S*(step-\d+)", job.said())
            assert int(resumed[1][5:]) >= before if resumed else before == 0
        newest = newest_checkpoint(tmp_path / "run/checkpoints")
        before = int(newest.name[5:]) if newest else 0
        partial = [f.name for f in (tmp_path / "run/checkpoints").glob("step-*") if not is_complete(f)]
        who = "all ranks" if everyone else f"rank {rank}"
        log.append(
            f"{number + 1:2d}. {who} in {phase}: exit codes {codes}, it had begun from "
            f"{resumed[1] if resumed else 'nothing'}; newest whole checkpoint {newest.name if newest else 'none'}"
            f"{', not whole: ' + ', '.join(partial) if partial else ''}"
        )
    # The last time without anything local: from the bucket.
    if before:
        (tmp_path / "run").rename(tmp_path / "lost")
    with Job(tmp_path, 2, tuple(options)) as job:
        assert job.ended(300) == [0, 0], job.said()
        resumed = re.search(r"resuming from \S*(step-\d+)", job.said())
    log.append(f"then, the folder lost, from the bucket's {resumed[1] if resumed else 'nothing'} to the end")
    Path(os.environ.get("NAIGN_KILLS_LOG", tmp_path / "kills.txt")).write_text("\n".join(log) + "\n")

    # The same end, the same losses of what was reported since, and the same weights.
    found, expected = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert found == expected[-len(found) :] and len(found) >= 8
    ours, theirs = (newest_checkpoint(tmp_path / run / "checkpoints") for run in ("run", "whole"))
    assert ours and theirs and ours.name == theirs.name
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    names = open_store(f"{bucket}/run/checkpoints").folders()
    assert ours.name in names and "manifest.json" in open_store(f"{bucket}/run/checkpoints/{ours.name}").list()

    # The keys that were read are the plan's: of every round all, and none that is not of it.
    seen = Counter(line for file in (tmp_path / "trace").iterdir() for line in file.read_text().splitlines())
    manifest = Manifest.load(digits)
    sizes = tuple(shard.samples for shard in manifest.split("train").shards)
    starts, keys = np.cumsum([0, *sizes]), keys_of(digits)
    order = Order(sizes=sizes, seed=0, round_size=256)
    wanted = {
        f"{piece.epoch} {round} {keys[starts[piece.shard] + row]}"
        for round in range(ROUNDS)
        for piece in pieces(order, round, 0, 256)
        for row in range(piece.first, piece.last)
    }
    rounds = {line for line in seen if int(line.split()[1]) < ROUNDS}
    assert wanted == rounds


def keys_of(data):
    """Of all training images, in the order of their shards."""
    from naign.data.dataset import DataConfig
    from naign.data.mixing import DataSets
    from naign.data.order import Piece

    manifest = Manifest.load(data)
    reader = DataSets(DataConfig(path=data)).reader(0)
    shards = manifest.split("train").shards
    whole = [Piece(epoch=0, shard=i, first=0, last=shard.samples) for i, shard in enumerate(shards)]
    return [reader.row(raw).key for raw in reader.raw(whole)]
