"""The nearest candidate over all ranks, exactly: what travels between ranks, and what is refused.

The search itself is one rank's work (`search.py`). 'Nearest' is a total order, (distance, id), so the answer is the
same for every world size, block size, thread count and backend.

    distances, ids = nearest(images, samples, first_id)  # tensors (q, d) and (c, d): each rank its own
    found = search(images, Blocks(rows=10**6, make=generate), first_id=rank * 10**6, neighbours=5)
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.match.bound import Quantized, encode
from pipeline.match.exchange import Ranks, ranks_of
from pipeline.match.method import METHODS, Plan, make_plan, share_plan
from pipeline.match.one_rank import SEEDS, Searcher, Watch
from pipeline.match.order import NO_ID, keep_least
from pipeline.philox import MAX_ID

MOST_NEIGHBOURS = 2**20

_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(kw_only=True, slots=True)
class Blocks:
    """Candidates that are made when they are searched and then forgotten, so that memory is O(size), not O(rows)."""

    rows: int
    """Candidates of this rank."""
    make: Callable[[int, int], Tensor]
    """make(low, high) -> this rank's candidates low to high, (high - low, d) float32: called once for each block of
    `size` rows, in order. A search that is repeated calls it again."""
    size: int = 4096
    """Candidates made and searched at once; the same on every rank."""
    lockstep: bool = False
    """Whether making is collective: then `make` is called on every rank as often as on that with most rows, with
    low == high where this one has no more, and also after a rank's candidates were found wrong."""


@dataclass(kw_only=True, slots=True)
class Found:
    distances: Tensor
    """(q, k) float64: squared L2 distances, ascending; infinite where fewer than k candidates are left."""
    ids: Tensor
    """(q, k) int64: their ids, ascending among equal distances; -1 where there is none."""
    rejected: int
    """Candidates of all ranks that were nearer than `reject` to a query of any rank."""
    proved: float
    """Share of this rank's (query, candidate) pairs that needed no wider sieve than the method's own."""
    measured: float
    """Candidates of this rank whose distance no bound spared, a query."""
    method: str
    """What this rank used, with its parameters, in words."""
    travelled: str
    """queries or pool: what every rank was sent."""
    received: int
    """Bytes that other ranks sent to this one."""
    seconds: dict[str, float] = field(default_factory=dict)
    """make, project, search, rescore, exchange: of this rank."""


class NotFinite(ValueError):
    """NaN or infinity where a distance is to be measured."""


def nearest(
    queries: Tensor,  # (q, d) float32, any q >= 0 on each rank
    candidates: Tensor | Blocks,  # (c, d) float32, any c >= 0 on each rank
    first_id: int,  # candidate i of this rank has id first_id + i
    *,
    group: dist.ProcessGroup | None = None,  # None: the default group, or one process where there is none
    method: str = "auto",  # of METHODS; the answer is the same
) -> tuple[Tensor, Tensor]:
    """Collective: squared L2 distance (q,) float32 and id (q,) int64 of the nearest candidate over all ranks.

    'Nearest' is by the float64 sum of squared differences of the given float32 values, smallest id on a tie; the
    distance is that sum rounded, which is infinity above 3.4e38. Queries may lie on any device, results lie there too.
    Raises ValueError on every rank if any value anywhere is NaN or infinite, if shapes or types differ, if ids leave
    [0, 2**62) or are shared by ranks, or if no rank has a candidate; RuntimeError if a rank dies or falls silent for
    longer than the process group's timeout.

    Args:
        queries: (q, d) float32, any q >= 0 on each rank.
        candidates: (c, d) float32, any c >= 0 on each rank; or Blocks that make them.
        first_id: Candidate i of this rank has the id first_id + i.
        group: The ranks; None: the default group, or one process where there is none.
        method: auto, flat, projected or rounded. The answer is the same.
    """
    found = search(queries, candidates, first_id, group=group, method=method)
    return found.distances[:, 0].float(), found.ids[:, 0]


def search(
    queries: Tensor,  # as in `nearest`
    candidates: Tensor | Blocks,  # as in `nearest`
    first_id: int,  # as in `nearest`
    *,
    group: dist.ProcessGroup | None = None,  # as in `nearest`
    method: str = "auto",  # as in `nearest`
    neighbours: int = 1,  # k: how many of the nearest
    reject: float | None = None,  # squared L2: candidates nearer than this to any query of any rank are left out
    skip: Tensor | None = None,  # (s,) int64: ids that are left out, the same on every rank
) -> Found:
    """Collective: the `neighbours` nearest candidates of each query over all ranks. Raises as `nearest` does.

    Every rank is sent either all queries, and answers with one (distance, id) a query and neighbour of its own
    candidates; or all candidates, block by block, and needs no answer: whichever are fewer rows. Only who knows all
    queries can reject a candidate, so with `reject` the queries travel. A query that is left with fewer candidates than
    `neighbours` has infinite distances and ids of -1 behind them.

    Args:
        queries, candidates, first_id, group, method: As in `nearest`.
        neighbours: k, how many of the nearest.
        reject: Squared L2: candidates at less than this from any query of any rank are left out. None: none are.
        skip: (s,) int64 ids that are left out, the same on every rank.
    """
    ranks, watch, trouble = ranks_of(group), Watch("make", "project", "search", "rescore", "exchange"), _Trouble()
    blocks = candidates if isinstance(candidates, Blocks) else _slices(candidates)
    with watch("exchange"):
        header = ranks.table(_describe(queries, candidates, blocks, first_id, neighbours, reject, method))
        _refuse(header.tolist())
        asked, pool = header[:, _ROWS].tolist(), header[:, _POOL].tolist()
        by_queries = reject is not None or sum(asked) <= sum(pool)
        queries = queries.detach()
        everyone = ranks.gather(queries, asked) if by_queries else queries
    searcher = None
    for step in range(-(-max(pool) // blocks.size)):
        low, high = (min(edge * blocks.size, blocks.rows) for edge in (step, step + 1))
        with watch("make"):
            block, ids = trouble.make(blocks, low, high, queries), torch.arange(first_id + low, first_id + high)
        if not by_queries:
            with watch("exchange"):
                sizes = [min(blocks.size, max(0, rows - step * blocks.size)) for rows in pool]
                block, ids = ranks.gather(block, sizes), ranks.gather(ids, sizes)
                if (ids.diff() < 0).any():
                    order = ids.argsort()
                    block, ids = block[order.to(block.device)], ids[order]
        if searcher is None:
            if by_queries:
                plan, encoded = _agree(ranks, watch, everyone, block, method, pool, asked)
            else:
                with watch("project"):
                    plan, encoded = make_plan(everyone, block, method=method, expected=sum(pool)), None
            searcher = Searcher(everyone, plan, watch, neighbours=neighbours, reject=reject, encoded=encoded)
        if skip is not None and len(skip):
            left = ~torch.isin(ids, torch.as_tensor(skip, device=ids.device))
            block, ids = block[left.to(block.device)], ids[left]
        if step == 0 and reject is None:
            if not trouble.code:
                searcher.seed(block, SEEDS // (ranks.world if by_queries else 1))
            if by_queries:
                with watch("exchange"):
                    searcher.limit = ranks.least(searcher.limit)
        if not trouble.code:
            searcher.add(block, ids)
        if by_queries:
            with watch("exchange"):
                searcher.limit = ranks.least(searcher.limit)
    assert searcher is not None, "a pool that is not empty has a block"

    with watch("exchange"):
        flags = ranks.table([trouble.code, trouble.row, searcher.rejected])
        trouble.blame(flags.tolist())
        packed = torch.stack([searcher.distances.view(torch.int64), searcher.ids], dim=2)
        parts = ranks.deliver(packed, asked) if by_queries else packed[None]
        distances, ids = keep_least(parts[..., 0].contiguous().view(torch.float64), parts[..., 1], neighbours)
    return Found(
        distances=distances.to(queries.device),
        ids=torch.where(ids == NO_ID, -1, ids).to(queries.device),
        rejected=int(flags[:, 2].sum()),
        proved=searcher.proved,
        measured=searcher.measured / max(1, len(everyone)),
        method=plan.described,
        travelled="queries" if by_queries else "pool",
        received=ranks.received,
        seconds=watch.seconds,
    )


def _agree(
    ranks: Ranks,
    watch: Watch,
    queries: Tensor,  # every rank's
    block: Tensor,  # this rank's first candidates
    method: str,
    pool: list[int],  # candidates of each rank
    asked: list[int],  # queries of each rank
) -> tuple[Plan, Quantized | None]:
    """Collective: the plan of the first rank that has candidates, and all queries as it sees them."""
    leader = next(rank for rank, rows in enumerate(pool) if rows)
    plan = None
    if ranks.rank == leader:
        with watch("project"):
            plan = make_plan(queries, block, method=method, expected=max(pool))
    if ranks.world == 1:
        assert plan is not None
        return plan, None
    with watch("exchange"):
        plan = share_plan(plan, ranks, leader, queries)
    if plan.method == "flat":
        return plan, None
    with watch("project"):
        first = sum(asked[: ranks.rank])
        mine = encode(queries[first : first + asked[ranks.rank]], plan.frame(plan.method))
    with watch("exchange"):
        raw = ranks.gather(mine.values.view(torch.uint8), asked).view(plan.dtype)
        numbers = ranks.gather(torch.stack([mine.error, mine.length, mine.square], 1), asked)
    return plan, Quantized(values=raw, error=numbers[:, 0], length=numbers[:, 1], square=numbers[:, 2])


_DIMS, _TYPE, _ROWS, _BAD, _CANDIDATE_DIMS, _POOL, _FIRST, _SIZE, _NEIGHBOURS, _REJECT, _METHOD = range(11)
_NO_TENSOR = -100


def _describe(
    queries: Tensor,
    candidates: Tensor | Blocks,
    blocks: Blocks,
    first_id: int,
    neighbours: int,
    reject: float | None,
    method: str,
) -> list[int]:
    """What every rank must know of this one before anything travels, right or wrong."""
    kind = dims = _NO_TENSOR
    candidate_dims = -1  # not known before they are made
    if isinstance(queries, Tensor):
        kind = _TYPES.index(queries.dtype) if queries.dtype in _TYPES else -1
        dims = queries.shape[1] if queries.ndim == 2 else -queries.ndim
    if not isinstance(candidates, Tensor | Blocks):
        kind = _NO_TENSOR
    elif isinstance(candidates, Tensor):
        candidate_dims = candidates.shape[1] if candidates.ndim == 2 else -2
        kind = kind if kind == _NO_TENSOR or candidates.dtype == queries.dtype else -1
    fits = dims >= 1 and kind == 0
    bound = -1  # none
    if reject is not None:  # the bits of numbers from 0 on are integers from 0 on
        bound = int(torch.tensor(reject, dtype=torch.float64).view(torch.int64)) if 0 <= reject < torch.inf else -2
    return [
        dims,
        kind,
        len(queries) if fits else 0,
        first_not_finite(queries) if fits else -1,
        candidate_dims,
        min(blocks.rows, MAX_ID + 1) if isinstance(blocks.rows, int) else -1,
        max(-1, min(first_id, MAX_ID + 1)) if isinstance(first_id, int) else -1,
        min(blocks.size, MAX_ID) if isinstance(blocks.size, int) else 0,
        min(neighbours, MOST_NEIGHBOURS + 1) if isinstance(neighbours, int) else 0,
        bound,
        METHODS.index(method) if method in METHODS else -1,
    ]


def _refuse(header: list[list[int]]) -> None:
    """ValueError, the same on every rank, for what one rank alone can have got wrong."""
    dims = header[0][_DIMS]
    for rank, row in enumerate(header):
        if _NO_TENSOR in (row[_DIMS], row[_TYPE]):
            raise ValueError(f"nearest: queries and candidates of rank {rank} must be torch tensors, or Blocks of such")
        if row[_DIMS] < 1:
            raise ValueError(f"nearest: the queries of rank {rank} must be a matrix (q, d) with d >= 1")
        if row[_TYPE] != 0:
            name = "of two types" if row[_TYPE] < 0 else str(_TYPES[row[_TYPE]]).removeprefix("torch.")
            raise ValueError(f"nearest: queries and candidates of rank {rank} are {name}, they must be float32")
        if row[_DIMS] != dims:
            raise ValueError(f"nearest: the rows of rank {rank} have {row[_DIMS]} values, those of rank 0 have {dims}")
        if row[_CANDIDATE_DIMS] not in (-1, dims):
            raise ValueError(f"nearest: the candidates of rank {rank} are not rows of {dims} values as the queries are")
        if row[_POOL] < 0 or row[_SIZE] < 1:
            raise ValueError(f"nearest: the Blocks of rank {rank} need rows >= 0 and size >= 1, whole numbers")
        if row[_FIRST] < 0 or row[_FIRST] + row[_POOL] > MAX_ID:
            raise ValueError(f"nearest: the ids of rank {rank} leave [0, 2**62): it starts at {row[_FIRST]}")
        if row[_METHOD] < 0:
            raise ValueError(f"nearest: the method of rank {rank} is none of {', '.join(METHODS)}")
        if not 1 <= row[_NEIGHBOURS] <= MOST_NEIGHBOURS:
            raise ValueError(f"nearest: neighbours of rank {rank} must be a whole number from 1 to {MOST_NEIGHBOURS}")
        if row[_REJECT] < -1:
            raise ValueError(f"nearest: reject of rank {rank} must be a finite squared distance from 0 on, or None")
        if row[_SIZE:] != header[0][_SIZE:]:
            raise ValueError(f"nearest: block size, neighbours, reject or method of rank {rank} differ from rank 0's")
        if row[_BAD] >= 0:
            raise NotFinite(f"nearest: NaN or infinity in the queries of rank {rank}, row {row[_BAD]}")
    if sum(row[_POOL] for row in header) == 0:
        raise ValueError("nearest: no rank has a candidate")
    spans = sorted((row[_FIRST], row[_FIRST] + row[_POOL], rank) for rank, row in enumerate(header) if row[_POOL])
    for (_, last, rank), (first, _, other) in zip(spans, spans[1:], strict=False):
        if first < last:
            raise ValueError(f"nearest: ranks {rank} and {other} both have a candidate with the id {first}")


class _Trouble:
    """The first thing that is wrong with this rank's candidates: kept until every rank can be told."""

    def __init__(self) -> None:
        self.code, self.row = 0, -1
        self.error: Exception | None = None

    def make(self, blocks: Blocks, low: int, high: int, queries: Tensor) -> Tensor:
        """Candidates low to high; zeros in their stead once there was trouble."""
        shape = (high - low, queries.shape[1])
        if (self.code or low == high) and not blocks.lockstep:
            return queries.new_zeros(shape)
        try:
            block = torch.as_tensor(blocks.make(low, high)).detach().to(queries.device)
            if self.code:
                return queries.new_zeros(shape)
            if block.shape == shape and block.dtype == queries.dtype:
                bad = first_not_finite(block)
                if bad < 0:
                    return block
                self.code, self.row = 1, low + bad
            else:
                self.code, self.row = 2, low
        except Exception as error:  # whatever it is: it is raised again once no other rank waits for this one
            if self.error is None:
                self.code, self.row, self.error = 3, low, error
        return queries.new_zeros(shape)

    def blame(self, flags: list[list[int]]) -> None:
        """Raise on every rank what went wrong on any."""
        if self.error is not None:
            raise self.error
        for rank, (code, row, _) in enumerate(flags):
            if code == 3:
                raise RuntimeError(f"nearest: rank {rank} failed to make its candidates from row {row} on")
            if code:
                what = ("NaN or infinity in", "shape or type differs from the queries' for")[code - 1]
                raise (NotFinite if code == 1 else ValueError)(
                    f"nearest: {what} the candidates of rank {rank}, row {row}"
                )


def first_not_finite(rows: Tensor) -> int:
    """The first of the rows (n, d) that holds NaN or infinity; -1 if none does."""
    if not rows.numel() or bool(torch.isfinite(rows.sum())):  # which NaN and infinity never leave finite
        return -1
    bad = ~torch.isfinite(rows).all(1)
    return int(bad.int().argmax()) if bad.any() else -1


def _slices(candidates: Tensor) -> Blocks:
    """Candidates that are there already, as blocks."""
    rows = len(candidates) if isinstance(candidates, Tensor) and candidates.ndim else 0
    return Blocks(rows=rows, make=lambda low, high: candidates[low:high])
