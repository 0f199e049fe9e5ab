"""The exact nearest candidate over all ranks: checks of the arguments, communication, and the loop over blocks.

The search of one rank is in `one_rank.py`. 'Nearest' is a total order, (distance, id), so the answer is the same for
every world size, block size, thread count and backend.

    distances, ids = nearest(images, samples, first_id)  # (q, d) and (c, d): each rank passes its own rows
    answer = search(images, Blocks(rows=10**6, make=generate), first_id=rank * 10**6, neighbours=5)
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.match.bound import Quantized, encode
from pipeline.match.exchange import Ranks, ranks_of
from pipeline.match.method import METHODS, SearchPlan, plan_search
from pipeline.match.one_rank import SEEDS, Searcher, Timer
from pipeline.match.order import NO_ID, keep_least
from pipeline.philox import MAX_ID

MOST_NEIGHBOURS = 2**20


@dataclass(kw_only=True, slots=True)
class Blocks:
    """Candidates that are generated block by block during the search and then dropped: memory is O(size), not
    O(rows)."""

    rows: int
    """Candidates of this rank."""
    make: Callable[[int, int], Tensor]
    """make(low, high) -> this rank's candidates low to high, (high - low, d) float32. It is called once for each block
    of `size` rows, in order, on every rank as often as on the rank with most rows, with low == high where a rank has
    none left; and again by another search. If it raises on any rank, all ranks leave the search before the next block:
    that rank with its own exception, the others with RuntimeError."""
    size: int = 4096
    """Candidates made and searched at once; the same on every rank."""


@dataclass(kw_only=True, slots=True)
class Answer:
    distances: Tensor  # (q, k) float64: squared L2, ascending; infinite where fewer than k candidates are left
    ids: Tensor  # (q, k) int64, ascending among equal distances; -1 where there is none
    proved: float  # share of this rank's (query, candidate) pairs that needed no sieve beyond the method's own
    measured: float  # candidates of this rank, per query, that no bound excluded
    method: str  # this rank's, with its parameters
    travelled: str  # what was sent to every rank: queries or pool
    received: int  # bytes that other ranks sent to this one
    seconds: dict[str, float]  # of this rank: make, project, search, rescore, exchange


class NotFinite(ValueError):
    """NaN or infinity among the queries or the candidates."""


def nearest(
    queries: Tensor,  # (q, d) float32, any q >= 0 on each rank
    candidates: Tensor | Blocks,  # (c, d) float32, any c >= 0 on each rank; or Blocks that make them
    first_id: int,  # candidate i of this rank has id first_id + i
    *,
    group: dist.ProcessGroup | None = None,  # None: the default group, or this process alone where there is none
    method: str = "auto",  # auto, flat, projected or rounded; the answer is the same
) -> tuple[Tensor, Tensor]:
    """Collective: squared L2 distance (q,) float32 and id (q,) int64 of the nearest candidate over all ranks.

    'Nearest' is by the float64 sum of squared differences of the given float32 values, smallest id on a tie. The
    distance is that sum rounded, infinite above 3.4e38. Queries may lie on any device; results lie on the same one.

    Raises:
        ValueError: on every rank, if a value is NaN or infinite, if shapes or types differ, if ids leave [0, 2**62) or
            are shared by ranks, or if no rank has a candidate.
        RuntimeError: if a rank dies or is silent for longer than the process group's timeout.
    """
    answer = search(queries, candidates, first_id, group=group, method=method)
    return answer.distances[:, 0].float(), answer.ids[:, 0]


def search(
    queries: Tensor,  # this, candidates, first_id, group and method: as in `nearest`
    candidates: Tensor | Blocks,
    first_id: int,
    *,
    group: dist.ProcessGroup | None = None,
    method: str = "auto",
    neighbours: int = 1,  # k: how many of the nearest
    skip: Tensor | None = None,  # (s,) int64: ids that are left out, the same on every rank
) -> Answer:
    """Collective: the k nearest candidates of each query over all ranks. Raises as `nearest` does.

    Either all queries travel to every rank, which answers for its own candidates, or all candidates do, block by block:
    whichever are fewer rows.
    """
    ranks, timer = ranks_of(group), Timer("make", "project", "search", "rescore", "exchange")
    with timer("exchange"):
        shards = agree(queries, candidates, first_id, (neighbours, method), ranks)
        blocks, queries = as_blocks(candidates), queries.detach()
        counts, pool = [shard.queries for shard in shards], [shard.rows for shard in shards]
        by_queries = sum(counts) <= sum(pool)
        # One of the two is this process alone, for which every exchange is a no-op.
        query_ranks, pool_ranks = (ranks, Ranks()) if by_queries else (Ranks(), ranks)
        makers = [shards[ranks.rank]] if by_queries else shards
        if not by_queries:
            counts, pool = [len(queries)], [sum(pool)]
        asked = query_ranks.gather(queries, counts)

    searcher = None
    for low in range(0, max(shard.rows for shard in shards), blocks.size):
        block = make_block(blocks, low, queries, ranks, timer)
        with timer("exchange"):
            block, ids = gather_block(block, [shard.ids(low) for shard in makers], pool_ranks)
        if searcher is None:
            plan, encoded = agree_on_plan(asked, block, method, pool, counts, query_ranks, timer)
            searcher = Searcher(asked, plan, timer, neighbours=neighbours, encoded=encoded)
        if skip is not None and len(skip):
            left = ~torch.isin(ids, skip.to(ids.device))
            block, ids = block[left.to(block.device)], ids[left]
        if low == 0:
            searcher.seed(block, SEEDS // query_ranks.world)
            share_limit(searcher, query_ranks, timer)
        searcher.add(block, ids)
        share_limit(searcher, query_ranks, timer)
    assert searcher is not None, "a pool that is not empty has a block"

    with timer("exchange"):
        distances, ids = deliver_answers(searcher, counts, query_ranks)
    return Answer(
        distances=distances.to(queries.device),
        ids=ids.to(queries.device),
        proved=searcher.proved,
        measured=searcher.measured / max(1, len(asked)),
        method=plan.described,
        travelled="queries" if by_queries else "pool",
        received=query_ranks.received + pool_ranks.received,
        seconds=timer.seconds,
    )


Settings = tuple[int, str]  # neighbours and method of `search`


class Shard(NamedTuple):
    """One rank's arguments, as far as every rank must know them before data is exchanged."""

    queries: int  # rows
    dims: int
    rows: int  # candidates
    first_id: int
    size: int  # of a block
    settings: Settings

    def ids(self, low: int) -> Tensor:
        """Of the candidates in this rank's block that begins at row `low`."""
        low, high = min(low, self.rows), min(low + self.size, self.rows)
        return torch.arange(self.first_id + low, self.first_id + high)


def agree(queries: Tensor, candidates: Tensor | Blocks, first_id: int, settings: Settings, ranks: Ranks) -> list[Shard]:
    """Collective: every rank's shard; ValueError, the same on every rank, if one is invalid or two contradict."""
    mine: Shard | ValueError
    try:
        mine = describe(queries, candidates, first_id, settings, ranks.rank)
    except ValueError as error:
        mine = error
    shards = ranks.collect(mine)
    for rank, shard in enumerate(shards):
        if shard.dims != (dims := shards[0].dims):
            raise ValueError(f"nearest: the rows of rank {rank} have {shard.dims} values, those of rank 0 have {dims}")
        if (shard.size, shard.settings) != (shards[0].size, shards[0].settings):
            raise ValueError(f"nearest: block size, neighbours or method of rank {rank} differ from rank 0's")
    spans = sorted((s.first_id, s.first_id + s.rows, rank) for rank, s in enumerate(shards) if s.rows)
    if not spans:
        raise ValueError("nearest: no rank has a candidate")
    for (_, last, rank), (first, _, other) in zip(spans, spans[1:], strict=False):
        if first < last:
            raise ValueError(f"nearest: ranks {rank} and {other} both have a candidate with the id {first}")
    return shards


def describe(queries: Tensor, candidates: Tensor | Blocks, first_id: int, settings: Settings, rank: int) -> Shard:
    """This rank's shard; ValueError if one of its arguments is invalid."""
    if not isinstance(queries, Tensor) or not isinstance(candidates, Tensor | Blocks):
        raise ValueError(f"nearest: queries and candidates of rank {rank} must be torch tensors, or Blocks of such")
    if queries.ndim != 2 or not queries.shape[1]:
        raise ValueError(f"nearest: the queries of rank {rank} must be a matrix (q, d) with d >= 1")
    types = {rows.dtype for rows in (queries, candidates) if isinstance(rows, Tensor)}
    if types != {torch.float32}:
        name = "of two types" if len(types) > 1 else str(types.pop()).removeprefix("torch.")
        raise ValueError(f"nearest: queries and candidates of rank {rank} are {name}, they must be float32")
    dims = queries.shape[1]
    if isinstance(candidates, Tensor) and candidates.shape[1:] != queries.shape[1:]:
        raise ValueError(f"nearest: the candidates of rank {rank} are not rows of {dims} values as the queries are")
    blocks, (neighbours, method) = as_blocks(candidates), settings
    if not (isinstance(blocks.rows, int) and isinstance(blocks.size, int) and blocks.rows >= 0 and blocks.size >= 1):
        raise ValueError(f"nearest: the Blocks of rank {rank} need rows >= 0 and size >= 1, whole numbers")
    if not isinstance(first_id, int) or not 0 <= first_id <= MAX_ID - blocks.rows:
        raise ValueError(f"nearest: the ids of rank {rank} leave [0, 2**62): it starts at {first_id}")
    if method not in METHODS:
        raise ValueError(f"nearest: the method of rank {rank} is none of {', '.join(METHODS)}")
    if not isinstance(neighbours, int) or not 1 <= neighbours <= MOST_NEIGHBOURS:
        raise ValueError(f"nearest: neighbours of rank {rank} must be a whole number from 1 to {MOST_NEIGHBOURS}")
    if (bad := first_not_finite(queries)) >= 0:
        raise NotFinite(f"nearest: NaN or infinity in the queries of rank {rank}, row {bad}")
    return Shard(len(queries), dims, blocks.rows, first_id, blocks.size, settings)


def as_blocks(candidates: Tensor | Blocks) -> Blocks:
    """Candidates as blocks: slices of a tensor."""
    if isinstance(candidates, Blocks):
        return candidates
    return Blocks(rows=len(candidates), make=lambda low, high: candidates[low:high])


def first_not_finite(rows: Tensor) -> int:
    """The first of the rows (n, d) that holds NaN or infinity; -1 if none does."""
    if not rows.numel() or bool(torch.isfinite(rows.sum())):  # finite values alone have a finite sum
        return -1
    bad = ~torch.isfinite(rows).all(1)
    return int(bad.int().argmax()) if bad.any() else -1


def make_block(blocks: Blocks, low: int, queries: Tensor, ranks: Ranks, timer: Timer) -> Tensor:
    """Collective: this rank's candidates of the block that begins at row `low`, on the device of the queries.

    All ranks raise here together if `make` fails on one, or returns anything but such a block.
    """
    low, high = (min(row, blocks.rows) for row in (low, low + blocks.size))
    try:
        with timer("make"):
            block = torch.as_tensor(blocks.make(low, high)).detach().to(queries.device)
    except Exception:
        with contextlib.suppress(Exception):  # this rank's exception says more
            ranks.collect(RuntimeError(f"nearest: rank {ranks.rank} failed to make its candidates from row {low} on"))
        raise
    what, fault = f"the candidates of rank {ranks.rank}, row", None
    if block.shape != (high - low, queries.shape[1]) or block.dtype != queries.dtype:
        fault = ValueError(f"nearest: shape or type differs from the queries' for {what} {low}")
    elif (bad := first_not_finite(block)) >= 0:
        fault = NotFinite(f"nearest: NaN or infinity in {what} {low + bad}")
    with timer("exchange"):
        ranks.collect(fault)
    return block


def gather_block(block: Tensor, spans: list[Tensor], ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Collective: the ranks' blocks, whose ids are `spans`, as one (n, d), with ids (n,) ascending."""
    block, ids = ranks.gather(block, [len(span) for span in spans]), torch.cat(spans)
    if (ids.diff() < 0).any():
        order = ids.argsort()
        block, ids = block[order.to(block.device)], ids[order]
    return block, ids


def share_limit(searcher: Searcher, ranks: Ranks, timer: Timer) -> None:
    """Collective: lower the limits to the least of all ranks: a candidate beyond it is not among the nearest."""
    with timer("exchange"):
        searcher.limit = ranks.least(searcher.limit)


def deliver_answers(searcher: Searcher, counts: list[int], ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Collective: distances and ids (q, k) of this rank's queries, the least of all ranks' answers."""
    packed = torch.stack([searcher.distances.view(torch.int64), searcher.ids], dim=2)
    parts = ranks.deliver(packed, counts)
    distances = parts[..., 0].contiguous().view(torch.float64)
    distances, ids = keep_least(distances, parts[..., 1], searcher.neighbours)
    return distances, torch.where(ids == NO_ID, -1, ids)


def agree_on_plan(
    queries: Tensor,  # those of all `ranks`
    block: Tensor,  # this rank's first candidates
    method: str,
    pool: list[int],  # candidates of each rank
    counts: list[int],  # queries of each rank
    ranks: Ranks,
    timer: Timer,
) -> tuple[SearchPlan, Quantized | None]:
    """Collective: the plan of the first rank with candidates, and all queries, which each rank encodes for its part."""
    leader = next(rank for rank, rows in enumerate(pool) if rows)
    plan = None
    if ranks.rank == leader:
        with timer("project"):
            plan = plan_search(queries, block, method=method, expected=max(pool))
    with timer("exchange"):
        plan = ranks.broadcast(plan and plan.to("cpu"), leader).to(queries.device)
        ranks.received += (plan.centre.nbytes + plan.basis.nbytes) * (ranks.rank != leader)
    if plan.method == "flat":
        return plan, None
    first = sum(counts[: ranks.rank])
    with timer("project"):
        mine = encode(queries[first : first + counts[ranks.rank]], plan.frame(plan.method))
    with timer("exchange"):
        values = ranks.gather(mine.values.clone(memory_format=torch.contiguous_format).view(torch.uint8), counts).view(
            plan.dtype
        )
        numbers = ranks.gather(torch.stack([mine.error, mine.length, mine.square], 1), counts)
    return plan, Quantized(values=values, error=numbers[:, 0], length=numbers[:, 1], square=numbers[:, 2])
