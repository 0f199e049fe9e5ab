"""What the ranks of test_search.py run: every problem shared out in several ways, and every way to get it wrong."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from naign.distributed.signals import StopPoll, StopRequest
from naign.errors import Stopped
from naign.match import Blocks, MatchConfig, match_round, matcher, nearest, search
from naign.match.method import METHODS
from tests.match.problems import CASES, draw

Share = Callable[[int, int, int], tuple[int, int]]

SHARES: dict[str, Share] = {
    "even": lambda rows, rank, world: (rows * rank // world, rows * (rank + 1) // world),
    "shuffled": lambda rows, rank, world: SHARES["even"](
        rows, (3 * rank + 1) % world if world != 3 else 2 - rank, world
    ),
    "uneven": lambda rows, rank, world: (rows * rank**2 // world**2, rows * (rank + 1) ** 2 // world**2),
    "one rank has all": lambda rows, rank, world: (0, rows) if rank == world - 1 else (0, 0),
}
"""Which rows [first, last) a rank has: (rows, rank, world)."""


def answers(rank: int, world: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of every problem, shared out every way and by every method: this rank's query rows, distances and ids."""
    found = {}
    for number, (name, (queries, candidates)) in enumerate(CASES.items()):
        for turn, (way, share) in enumerate(SHARES.items()):
            method = METHODS[(number + turn) % len(METHODS)]
            first, last = share(len(candidates), rank, world)
            low, high = SHARES["even"](len(queries), rank, world)
            part = candidates[first:last]
            blocks = Blocks(rows=last - first, make=lambda a, b, part=part: part[a:b], size=(64, 1000)[turn % 2])
            distances, ids = nearest(queries[low:high], blocks, first, method=method)
            found[f"{name}, {way}"] = (torch.arange(low, high), distances, ids)
    return found


def travelling(rank: int, world: int) -> dict[str, Any]:
    """Few queries are sent to the candidates, few candidates to the queries; which does not change the answer."""
    few, many = draw(0, 40, 30), draw(1, 2000, 30)
    found: dict[str, Any] = {}
    for name, (queries, candidates) in {"queries": (few, many), "pool": (many, few)}.items():
        low, high = SHARES["even"](len(queries), rank, world)
        first, last = SHARES["even"](len(candidates), rank, world)
        answer = search(queries[low:high], candidates[first:last], first, neighbours=3)
        assert answer.travelled == name
        found[name] = (torch.arange(low, high), answer.distances, answer.ids)
        found[f"{name} received"] = answer.received
    same = draw(2, 1, 30).repeat(400, 1)  # ids descend with the ranks, and all are equally near
    answer = search(draw(3, 900, 30)[:300], same, 400 * (world - 1 - rank), neighbours=3, method="rounded")
    assert answer.travelled == "queries"
    many_queries = search(draw(3, 500, 30), same, 400 * (world - 1 - rank), neighbours=3, method="rounded")
    assert many_queries.travelled == "pool"
    found["descending"] = torch.cat([answer.ids, many_queries.ids])
    return found


def refused(rank: int, world: int) -> dict[str, str]:
    """What each rank is told when the last one is wrong."""
    last = rank == world - 1
    queries, candidates = draw(0, 5, 3), draw(1, 8, 3)
    nan, infinite = queries.clone(), candidates.clone()
    nan[2, 1], infinite[7, 0] = torch.nan, torch.inf

    def failing(low: int, high: int) -> Tensor:
        if last and low:
            raise OSError("the disk is gone")
        return draw(2, high - low, 3)

    def counted(low: int, high: int) -> Tensor:
        made.append(low)
        return failing(low, high)

    made: list[int] = []
    tries: dict[str, Callable[[], object]] = {
        "nan": lambda: nearest(nan if last else queries, candidates, 8 * rank),
        "infinity": lambda: nearest(queries, infinite if last else candidates, 8 * rank),
        "none": lambda: nearest(queries, candidates[:0], 0),
        "dims": lambda: nearest(
            queries[:, :2] if last else queries, candidates[:, :2] if last else candidates, 8 * rank
        ),
        "dtype": lambda: nearest(queries.double() if last else queries, candidates.double() if last else candidates, 0),
        "ids": lambda: nearest(queries, candidates, 2**62 - 4 if last else 0),
        "size": lambda: nearest(queries, Blocks(rows=8, make=lambda low, high: candidates[low:high], size=8 - last), 0),
        "neighbours": lambda: search(queries, candidates, 8 * rank, neighbours=1 + last),
        "shared ids": lambda: nearest(queries, candidates, 4 * rank),
        "failing": lambda: nearest(queries, Blocks(rows=8, make=failing, size=4), 8 * rank),
        "failing in lock-step": lambda: nearest(queries, Blocks(rows=8, make=counted, size=1), 8 * rank),
    }
    told = {}
    for name, attempt in tries.items():
        try:
            attempt()
            told[name] = "nothing"
        except (ValueError, RuntimeError, OSError) as error:
            told[name] = f"{type(error).__name__}: {error}"
    distances, _ = nearest(queries, candidates, 8 * rank)  # the group is as good as before
    told |= {"afterwards": str(len(distances)), "made in lock-step": str(len(made))}
    return told


def lost(rank: int, world: int) -> dict[str, Any]:
    """The last rank leaves in the middle of a search, without a word."""

    def make(low: int, high: int) -> Tensor:
        if rank == world - 1 and low:
            os._exit(0)
        return draw(2, high - low, 3)

    return told_of(lambda: nearest(draw(0, 5, 3), Blocks(rows=8, make=make, size=4), 8 * rank))


def silent(rank: int, world: int) -> dict[str, Any]:
    """The last rank falls silent in the middle of a search, for longer than the group's timeout."""

    def make(low: int, high: int) -> Tensor:
        if rank == world - 1 and low:
            time.sleep(12)
            os._exit(0)
        return draw(2, high - low, 3)

    return told_of(lambda: nearest(draw(0, 5, 3), Blocks(rows=8, make=make, size=4), 8 * rank))


def told_of(attempt: Callable[[], object]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        attempt()
    except RuntimeError as error:
        return {"told": str(error), "seconds": time.perf_counter() - start}
    return {"told": "nothing", "seconds": time.perf_counter() - start}


ASKED = 30
"""Block after which one rank is asked to stop."""


def stopped(rank: int, world: int) -> dict[str, Any]:
    """Blocks made by this rank until a match ends, of 200 in all: one rank is asked to stop, or fails to sample."""
    matcher.HELD_ROWS = 8  # so that a search makes many parts of the pool, each of four blocks

    def match(images: int, ratio: float, fail: bool) -> tuple[str, int]:
        stop = StopRequest(within=600, world=world, timeout=60)
        poll, made = StopPoll(stop), list[int]()

        def look() -> None:
            if poll():
                raise Stopped

        def sample(ids: Tensor) -> Tensor:
            time.sleep(0.02)
            made.append(len(ids))
            if rank == world - 1 and len(made) == ASKED:
                if fail:
                    raise OSError("the disk is gone")
                os.kill(os.getpid(), signal.SIGTERM)
            return draw(int(ids[0]), len(ids), 1, 2, 2)

        rows = images * (rank + 1) // world - images * rank // world
        config = MatchConfig(round=images, ratio=ratio, block=2)
        try:
            match_round(draw(rank, rows, 1, 2, 2), sample, config, look)
        except (Stopped, OSError, RuntimeError) as error:
            assert not isinstance(error, Stopped) or stop.left <= 600  # the time limit is every rank's
            return type(error).__name__, len(made)
        return "nothing", len(made)

    blocks = 200 * world - 1  # the last rank has fewer
    return {
        "queries travel": match(30, 2 * blocks / 30, False),
        "the pool travels": match(3 * blocks, 2 / 3, False),
        "sampling fails": match(30, 2 * blocks / 30, True),
    }
