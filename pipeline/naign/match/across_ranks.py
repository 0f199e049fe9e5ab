"""The exact nearest candidate over all ranks: checks of the arguments, communication, and the loop over blocks.

'Nearest' is a total order, (distance, id), so the answer is the same for every world size, block size and backend. That
no nearer candidate is passed over is proved in bound.py; one_rank.py searches the candidates of this rank.

    distances, ids = nearest(images, samples, first_id)  # (q, d) and (c, d): each rank passes its own rows
    answer = search(images, Blocks(rows=10**6, make=generate), first_id=rank * 10**6, neighbours=5)
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from naign.match.bound import Frame, Quantized, encode
from naign.match.distances import NO_ID, faiss_on, sort_lexically
from naign.match.exchange import Ranks, ranks_of
from naign.match.method import METHODS, plan_search
from naign.match.one_rank import SEEDS, Searcher
from naign.philox import MAX_ID

MOST_NEIGHBOURS = 2**20


@dataclass(kw_only=True, slots=True)
class Blocks:
    """Candidates that are generated block by block during the search: memory is O(size), not O(rows)."""

    rows: int
    """Candidates of this rank."""
    make: Callable[[int, int], Tensor]
    """make(low, high) -> this rank's candidates low to high, (high - low, d) float32. A search calls it for one block
    of `size` rows after another, equally often on every rank: a rank that has no candidates left is asked for an empty
    block, low == high. If it raises on any rank, all ranks leave the search before the next block: that rank with its
    own exception, the others with RuntimeError."""
    size: int = 4096
    """Candidates made and searched at once; the same on every rank."""


@dataclass(kw_only=True, slots=True)
class Answer:
    distances: Tensor  # (q, k) float64: squared L2, ascending; infinite where fewer than k candidates are left
    ids: Tensor  # (q, k) int64, ascending among equal distances; -1 where there is none
    measured: float  # candidates of this rank, per query, that no bound excluded
    method: str  # this rank's, with its parameters
    travelled: str  # what was sent to every rank: queries or pool
    received: int  # bytes that other ranks sent to this one
    exchange: float  # seconds of this rank in exchanges, waiting for others included


class NotFinite(ValueError):
    """NaN or infinity among the queries or the candidates."""


def nearest(
    queries: Tensor,  # (q, d) float32, any q >= 0 on each rank
    candidates: Tensor | Blocks,  # (c, d) float32, any c >= 0 on each rank; or Blocks that make them
    first_id: int,  # candidate i of this rank has id first_id + i
    *,
    group: dist.ProcessGroup | None = None,  # None: the default group, or this process alone where there is none
    method: str = "auto",  # auto, flat, indexed, projected or rounded; the answer is the same
) -> tuple[Tensor, Tensor]:
    """Collective: squared L2 distance (q,) float32 and id (q,) int64 of the nearest candidate over all ranks.

    'Nearest' is by the float64 sum of squared differences of the given float32 values, smallest id on a tie. The
    distance is that sum rounded, infinite above 3.4e38. Queries may lie on any device; results lie on the same one.

        distances, ids = nearest(images, samples, first_id=rank * len(samples))  # on every rank, with its own rows

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
    within: float = math.inf,  # squared L2 beyond which candidates may be missing; the same on every rank
) -> Answer:
    """Collective: the k nearest candidates of each query over all ranks. Raises as `nearest` does. Whichever are fewer
    rows travel to every rank: all queries, each rank answering for its candidates, or all candidates, block by block.
    """
    ranks = ranks_of(group)
    mine = describe(queries, candidates, first_id, neighbours, method, ranks.rank)
    shards = agree(ranks.collect(mine))
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
        block = make_block(blocks, low, queries, ranks)
        block, ids = gather_block(block, [shard.ids(low) for shard in makers], pool_ranks)
        if searcher is None:
            method, frame = agree_on_plan(asked, block, method, pool, query_ranks)
            encoded = None if method == "flat" else encode_parts(asked, frame, counts, query_ranks)
            index = method == "indexed" and bool(faiss_on(queries.device))
            searcher = Searcher(asked, frame, encoded, neighbours=neighbours, index=index)
            searcher.limit.clamp_(max=within)
        if skip is not None and len(skip):
            left = ~torch.isin(ids, skip.to(ids.device))
            block, ids = block[left.to(block.device)], ids[left]
        if low == 0:
            searcher.seed(block, SEEDS // query_ranks.world)
            searcher.limit = query_ranks.least(searcher.limit)
        searcher.add(block, ids)
        searcher.limit = query_ranks.least(searcher.limit)  # a candidate beyond any rank's is not among the nearest
    assert searcher is not None, "a pool that is not empty has a block"

    distances, ids = deliver_answers(searcher, counts, query_ranks)
    return Answer(
        distances=distances.to(queries.device),
        ids=ids.to(queries.device),
        measured=searcher.measured / max(1, len(asked)),
        method=f"{method} on {frame}",
        travelled="queries" if by_queries else "pool",
        received=ranks.received,
        exchange=ranks.seconds,
    )


class Shard(NamedTuple):
    """One rank's arguments, as far as every rank must know them before data is exchanged."""

    queries: int  # rows
    rows: int  # candidates
    first_id: int
    dims: int
    size: int  # of a block
    neighbours: int
    method: str

    def ids(self, low: int) -> Tensor:
        """Of the candidates in this rank's block that begins at row `low`."""
        low, high = min(low, self.rows), min(low + self.size, self.rows)
        return torch.arange(self.first_id + low, self.first_id + high)


def agree(shards: list[Shard]) -> list[Shard]:
    """Every rank's shard; ValueError, the same on every rank, if two contradict."""
    for rank, shard in enumerate(shards):
        if shard.dims != (dims := shards[0].dims):
            raise ValueError(f"nearest: the rows of rank {rank} have {shard.dims} values, those of rank 0 have {dims}")
        if shard[3:] != shards[0][3:]:
            raise ValueError(f"nearest: block size, neighbours or method of rank {rank} differ from rank 0's")
    spans = sorted((s.first_id, s.first_id + s.rows, rank) for rank, s in enumerate(shards) if s.rows)
    if not spans:
        raise ValueError("nearest: no rank has a candidate")
    for (_, last, rank), (first, _, other) in pairwise(spans):
        if first < last:
            raise ValueError(f"nearest: ranks {rank} and {other} both have a candidate with the id {first}")
    return shards


def describe(
    queries: Tensor, candidates: Tensor | Blocks, first_id: int, neighbours: int, method: str, rank: int
) -> Shard | ValueError:
    """This rank's shard, or what is wrong with its arguments."""
    if not isinstance(queries, Tensor) or not isinstance(candidates, Tensor | Blocks):
        return ValueError(f"nearest: queries and candidates of rank {rank} must be torch tensors, or Blocks of such")
    if queries.ndim != 2 or not queries.shape[1]:
        return ValueError(f"nearest: the queries of rank {rank} must be a matrix (q, d) with d >= 1")
    types = {str(rows.dtype).removeprefix("torch.") for rows in (queries, candidates) if isinstance(rows, Tensor)}
    if types != {"float32"}:
        given = " and ".join(sorted(types))
        return ValueError(f"nearest: queries and candidates of rank {rank} are {given}, they must be float32")
    dims = queries.shape[1]
    if isinstance(candidates, Tensor) and candidates.shape[1:] != queries.shape[1:]:
        return ValueError(f"nearest: the candidates of rank {rank} are not rows of {dims} values as the queries are")
    rows, size = (candidates := as_blocks(candidates)).rows, candidates.size
    if not (isinstance(rows, int) and isinstance(size, int) and rows >= 0 and size >= 1):
        return ValueError(f"nearest: the Blocks of rank {rank} need rows >= 0 and size >= 1, whole numbers")
    if not isinstance(first_id, int) or not 0 <= first_id <= MAX_ID - rows:
        return ValueError(f"nearest: the ids of rank {rank} leave [0, 2**62): it starts at {first_id}")
    if method not in METHODS:
        return ValueError(f"nearest: the method of rank {rank} is none of {', '.join(METHODS)}")
    if not isinstance(neighbours, int) or not 1 <= neighbours <= MOST_NEIGHBOURS:
        return ValueError(f"nearest: neighbours of rank {rank} must be a whole number from 1 to {MOST_NEIGHBOURS}")
    if (bad := first_not_finite(queries)) >= 0:
        return NotFinite(f"nearest: NaN or infinity in the queries of rank {rank}, row {bad}")
    return Shard(len(queries), rows, first_id, dims, size, neighbours, method)


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


def make_block(blocks: Blocks, low: int, queries: Tensor, ranks: Ranks) -> Tensor:
    """Collective: this rank's candidates of the block that begins at row `low`, on the device of the queries. All ranks
    raise here together if `make` fails on one, or returns anything but such a block.
    """
    low, high = (min(row, blocks.rows) for row in (low, low + blocks.size))
    try:
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
    ranks.collect(fault)
    return block


def gather_block(block: Tensor, spans: list[Tensor], ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Collective: the ranks' blocks, whose ids are `spans`, as one (n, d), with ids (n,) ascending."""
    block, ids = ranks.gather(block, [len(span) for span in spans]), torch.cat(spans)
    if (ids.diff() < 0).any():
        order = ids.argsort()
        block, ids = block[order.to(block.device)], ids[order]
    return block, ids


def agree_on_plan(queries: Tensor, block: Tensor, method: str, pool: list[int], ranks: Ranks) -> tuple[str, Frame]:
    """Collective: the plan of the first rank with candidates, from the queries of all `ranks` and its first `block`."""
    leader = next(rank for rank, rows in enumerate(pool) if rows)
    plan = None
    if ranks.rank == leader:
        method, frame = plan_search(queries, block, method=method, expected=max(pool))
        plan = method, frame.to("cpu")
    method, frame = ranks.broadcast(plan, leader)
    if ranks.rank != leader:
        ranks.received += frame.centre.nbytes + (0 if frame.basis is None else frame.basis.nbytes)
    return method, frame.to(queries.device)


def encode_parts(queries: Tensor, frame: Frame, counts: list[int], ranks: Ranks) -> Quantized:
    """Collective: the queries of all ranks in the frame's coordinates; each rank encodes its part of them."""
    first = sum(counts[: ranks.rank])
    mine = encode(queries[first : first + counts[ranks.rank]], frame)
    return Quantized(*(ranks.gather(part, counts) for part in mine))


def deliver_answers(searcher: Searcher, counts: list[int], ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Collective: distances and ids (q, k) of this rank's queries, the least of all ranks' answers."""
    packed = torch.stack([searcher.distances.view(torch.int64), searcher.ids], dim=2)
    parts = ranks.deliver(packed, counts).transpose(0, 1).flatten(1, 2)  # (q, world * k, 2)
    distances, ids = parts[..., 0].contiguous().view(torch.float64), parts[..., 1]
    order = sort_lexically(distances, ids)[:, : searcher.neighbours]
    ids = ids.gather(1, order)
    return distances.gather(1, order), torch.where(ids == NO_ID, -1, ids)
