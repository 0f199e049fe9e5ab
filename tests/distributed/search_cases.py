"""What the ranks of test_search.py run: every problem shared out in several ways, and every way to get it wrong."""

import os
import signal
import time

import torch

from naign.distributed.signals import StopPoll, StopRequest
from naign.errors import Stopped
from naign.match import Blocks, MatchConfig, match_round, nearest, pool, search
from tests.match.problems import CASES, draw


def even(rows, rank, world):
    return rows * rank // world, rows * (rank + 1) // world


def uneven(rows, rank, world):
    return rows * rank**2 // world**2, rows * (rank + 1) ** 2 // world**2


def one_has_all(rows, rank, world):
    if rank == world - 1:
        return 0, rows
    return 0, 0


SHARES = (even, uneven, one_has_all)
"""Which rows [first, last) a rank has: (rows, rank, world)."""


def answers(rank, world):
    """This rank's query rows, distances and ids of every problem, shared out every way and by both methods."""
    found = {}
    for number, (name, (queries, candidates)) in enumerate(CASES.items()):
        low, high = even(len(queries), rank, world)
        for turn, share in enumerate(SHARES):
            first, last = share(len(candidates), rank, world)
            part = candidates[first:last]
            blocks = Blocks(
                rows=last - first,
                make=lambda a, b, part=part: part[a:b],
                size=(64, 1000)[turn % 2],
            )
            method = ("flat", "bounded")[(number + turn) % 2]
            result = search(
                queries[low:high],
                blocks,
                first,
                method=method,
                neighbours=3,
            )
            found[f"{name}, {share.__name__}"] = (torch.arange(low, high), result.distances, result.ids)
    return found


def refused(rank, world):
    """What each rank is told when the last one is wrong."""
    last = rank == world - 1
    queries, candidates = draw(0, 5, 3), draw(1, 8, 3)
    good = {"queries": queries, "candidates": candidates, "first_id": 8 * rank}
    nan = queries.clone()
    nan[2, 1] = torch.nan
    infinite = candidates.clone()
    infinite[7, 0] = torch.inf
    made = []

    def failing(low, high):
        made.append(low)
        if last and low:
            raise OSError("the disk is gone")
        return draw(2, high - low, 3)

    def blocks(size):
        return Blocks(rows=8, make=failing, size=size)

    wrong = {
        "nan": {"queries": nan},
        "infinity": {"candidates": infinite},
        "dims": {"queries": queries[:, :2], "candidates": candidates[:, :2]},
        "dtype": {"queries": queries.double()},
        "ids": {"first_id": 2**62 - 4},
        "size": {"candidates": blocks(8)},
    }
    told = {}
    for name, values in wrong.items():
        told[name] = told_of(lambda values=values: search(**(good | (values if last else {}))))["told"]
    told["none"] = told_of(lambda: nearest(queries, candidates[:0], 0))["told"]
    told["shared ids"] = told_of(lambda: nearest(queries, candidates, 4 * rank))["told"]
    for size in (4, 1):
        made.clear()
        in_blocks = told_of(lambda size=size: search(queries, blocks(size), 8 * rank))
        told[f"failing in blocks of {size}"] = in_blocks["told"]
    distances, _ = nearest(**good)  # the group is as good as before
    return told | {"afterwards": str(len(distances)), "made in lock-step": str(len(made))}


def left(rank, world, silent):
    """The last rank leaves in the middle of a search, without a word, after so many seconds."""

    def make(low, high):
        if rank == world - 1 and low:
            time.sleep(silent)
            os._exit(0)
        return draw(2, high - low, 3)

    return told_of(lambda: search(draw(0, 5, 3), Blocks(rows=8, make=make, size=4), 8 * rank))


def lost(rank, world):
    return left(rank, world, 0)


def silent(rank, world):
    """For longer than the group's timeout."""
    return left(rank, world, 12)


def told_of(attempt):
    start = time.perf_counter()
    told = "nothing"
    try:
        attempt()
    except (ValueError, RuntimeError, OSError) as error:
        told = f"{type(error).__name__}: {error}"
    return {"told": told, "seconds": time.perf_counter() - start}


ASKED = 30
"""Block after which one rank is asked to stop."""


def stopped(rank, world):
    """Blocks made by this rank until a match ends, of 200 in all: one rank is asked to stop, or fails to sample."""
    pool.HELD_ROWS = 8  # so that a search makes many parts of the pool, each of four blocks
    samples = 2 * (200 * world - 1)  # the last rank has fewer blocks

    def match(fail):
        stop = StopRequest(within=600, world=world, timeout=60)
        poll = StopPoll(stop)
        made = []

        def look():
            if poll():
                raise Stopped

        def sample(ids):
            time.sleep(0.02)
            made.append(len(ids))
            if rank == world - 1 and len(made) == ASKED:
                if fail:
                    raise OSError("the disk is gone")
                os.kill(os.getpid(), signal.SIGTERM)
            return draw(
                int(ids[0]),
                len(ids),
                1,
                2,
                2,
            )

        first, last = even(30, rank, world)
        config = MatchConfig(round=30, ratio=samples / 30, block=2)
        try:
            match_round(
                draw(
                    rank,
                    last - first,
                    1,
                    2,
                    2,
                ),
                sample,
                config,
                look,
            )
        except (Stopped, OSError, RuntimeError) as error:
            assert not isinstance(error, Stopped) or stop.left <= 600  # the time limit is every rank's
            return type(error).__name__, len(made)
        return "nothing", len(made)

    return {"stopped": match(fail=False), "failed": match(fail=True)}


ROUND = 96
GROUPS = (0, 48, 24, 12, 6)
IMAGES, SAMPLES = (
    draw(5, ROUND, 1, 4, 4),
    draw(
        6,
        10 * ROUND,
        1,
        4,
        4,
    ),
)


def grouped(rank, world):
    """Ids, distances and metrics of the match of this rank's images, by the size of a group."""
    found = {}
    low, high = even(ROUND, rank, world)
    for size in GROUPS:
        config = MatchConfig(
            round=ROUND,
            group=size,
            ratio=10,
            block=8,
        )
        match = match_round(IMAGES[low:high], SAMPLES.__getitem__, config)
        found[size] = (match.ids, match.distances, match.values)
    return found


def failing_group(rank, world):
    """What each rank is told, and how often it has polled and sampled, when sampling fails in one of its groups."""
    low, high = even(ROUND, rank, world)
    found = {}
    for name, size in (("within a rank", 12), ("of two ranks", 48)):
        counts = {"polls": 0, "samples": 0}

        def poll(counts=counts):
            counts["polls"] += 1

        def sample(ids, counts=counts):
            counts["samples"] += 1
            if rank == 1 and counts["samples"] == 3:
                raise OSError("the disk is gone")
            return SAMPLES[ids]

        config = MatchConfig(
            round=ROUND,
            group=size,
            ratio=10,
            block=8,
        )
        told = told_of(lambda: match_round(IMAGES[low:high], sample, config, poll))["told"]  # noqa: B023
        match_round(IMAGES[low:high], SAMPLES.__getitem__, config)  # the groups are as good as before
        found[name] = (told, counts["polls"], counts["samples"])
    return found
