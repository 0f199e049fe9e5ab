"""The exact nearest candidates over all ranks: checks of the arguments, communication, and the loop over blocks.

'Nearest' is a total order, (distance, id), so the answer is the same for every world size, block size and method. That
no nearer candidate is passed over is proved in bound.py; scan.py searches the candidates of this rank.

    distances, ids = nearest(images, samples, first_id)  # (q, d) and (c, d): each rank passes its own rows
    result = search(images, Blocks(rows=10**6, make=generate), first_id=rank * 10**6, neighbours=5)
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from naign.match.exact import NO_ID, sort_lexically
from naign.match.exchange import Ranks, ranks_of
from naign.match.scan import METHODS, Scan
from naign.philox import MAX_ID


@dataclass(kw_only=True, slots=True)
class Blocks:
    """Candidates that are generated block by block during the search: memory is O(size), not O(rows)."""

    rows: int
    """Candidates of this rank."""
    make: Callable[[int, int], Tensor]
    """make(low, high) -> this rank's candidates low to high, (high - low, d) float32. A search calls it for one block
    of `size` rows after another, equally often on every rank: a rank that has no candidates left is asked for an empty
    block, low == high. If it raises on any rank, all ranks leave the search before the next block: that rank with its
    own exception, the others with PeerFailed."""
    size: int = 4096
    """Candidates made and searched at once; the same on every rank."""


@dataclass(kw_only=True, slots=True)
class SearchResult:
    distances: Tensor  # (q, k) float64: squared L2, ascending; infinite where fewer than k candidates are left
    ids: Tensor  # (q, k) int64, ascending among equal distances; -1 where there is none
    measured: float  # candidates of this rank, per query, that no bound excluded
    method: str  # this rank's, with its parameters


class NotFinite(ValueError):
    """NaN or infinity among the queries or the candidates."""


class PeerFailed(RuntimeError):
    """Another rank failed to make its candidates, and says why there."""


def nearest(
    queries: Tensor,  # (q, d) float32, any q >= 0 on each rank
    candidates: Tensor,  # (c, d) float32, any c >= 0 on each rank
    first_id: int,  # candidate i of this rank has id first_id + i
    *,
    group: dist.ProcessGroup | None = None,  # None: the default group, or this process alone where there is none
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
    result = search(queries, candidates, first_id, group=group)
    return result.distances[:, 0].float(), result.ids[:, 0]


def search(
    queries: Tensor,  # this and first_id: as in `nearest`
    candidates: Tensor | Blocks,
    first_id: int,
    *,
    group: dist.ProcessGroup | Ranks | None = None,
    method: str = "auto",  # auto, flat or bounded; the result is the same
    neighbours: int = 1,  # k: how many of the nearest
) -> SearchResult:
    """Collective: the k nearest candidates of each query over all ranks. Raises as `nearest` does. All queries are sent
    to every rank, which answers for its candidates.
    """
    assert method in METHODS and neighbours >= 1
    ranks = group if isinstance(group, Ranks) else ranks_of(group)
    shards = ranks.each(lambda: describe(queries, candidates, first_id, ranks.first + ranks.rank))
    check_agreement(shards)

    blocks = as_blocks(candidates)
    queries = queries.detach()
    counts = [shard.queries for shard in shards]
    asked = ranks.gather(queries, counts)
    scan = Scan(
        asked,
        neighbours=neighbours,
        method=method,
        expected=blocks.rows,
    )
    for low in range(0, max(shard.rows for shard in shards), blocks.size):
        block, ids = make_block(
            blocks,
            first_id,
            low,
            queries,
            ranks,
        )
        search_block(scan, block, ids, ranks, first=low == 0)

    distances, ids = deliver_answers(scan, counts, ranks)
    return SearchResult(
        distances=distances,
        ids=ids,
        measured=scan.measured / max(1, len(asked)),
        method=scan.described,
    )


def search_block(
    scan: Scan,
    block: Tensor,
    ids: Tensor,
    ranks: Ranks,
    *,
    first: bool,
) -> None:
    """Collective: search this rank's next block of candidates (n, d) with ids (n,), ascending."""
    if first:
        scan.seed(block)
        scan.limit = ranks.least(scan.limit)
    scan.add(block, ids)
    scan.limit = ranks.least(scan.limit)  # a candidate beyond any rank's is not among the nearest


class Shard(NamedTuple):
    """One rank's arguments, as far as every rank must know them before data is exchanged."""

    queries: int  # rows
    rows: int  # candidates
    first_id: int
    dims: int
    size: int  # of a block


def describe(queries: Tensor, candidates: Tensor | Blocks, first_id: int, rank: int) -> Shard:
    """This rank's shard. Raises ValueError if its arguments are wrong."""
    given = [queries]
    if not isinstance(candidates, Blocks):
        given.append(candidates)
    for rows in given:
        if not are_rows(rows) or not 1 <= rows.shape[1] == queries.shape[1]:
            raise ValueError(
                f"nearest: queries and candidates of rank {rank} must be float32 torch tensors (n, d) of the same "
                f"d >= 1, not {described(rows)}"
            )
    blocks = as_blocks(candidates)
    if not isinstance(first_id, int) or not 0 <= first_id <= MAX_ID - blocks.rows:
        raise ValueError(f"nearest: the ids of rank {rank} leave [0, 2**62): it starts at {first_id}")
    check_finite(queries, f"the queries of rank {rank}", first_row=0)
    return Shard(
        queries=len(queries),
        rows=blocks.rows,
        first_id=first_id,
        dims=queries.shape[1],
        size=blocks.size,
    )


def check_agreement(shards: list[Shard]) -> None:
    """ValueError, the same on every rank, if two shards contradict."""
    first = shards[0]
    for rank, shard in enumerate(shards):
        if (shard.dims, shard.size) != (first.dims, first.size):
            raise ValueError(
                f"nearest: the rows of rank {rank} have {shard.dims} values in blocks of {shard.size}, "
                f"those of rank 0 {first.dims} in {first.size}"
            )
    spans = [Span(shard.first_id, shard.rows, rank) for rank, shard in enumerate(shards) if shard.rows]
    if not spans:
        raise ValueError("nearest: no rank has a candidate")
    check_apart(spans)


class Span(NamedTuple):
    """Ids that a rank has, one after another."""

    first: int
    rows: int
    rank: int


def check_apart(spans: Iterable[Span]) -> None:
    """ValueError if two spans share an id."""
    for span, other in pairwise(sorted(spans)):
        if other.first < span.first + span.rows:
            raise ValueError(
                f"nearest: ranks {span.rank} and {other.rank} both have a candidate with the id {other.first}"
            )


def are_rows(rows: object) -> bool:
    """Whether these are rows (n, d) float32 in a dense tensor."""
    if not isinstance(rows, Tensor) or rows.dtype != torch.float32 or rows.ndim != 2:
        return False
    return rows.layout == torch.strided and not rows.is_meta


def described(rows: object) -> str:
    """Type and shape, for an error."""
    return f"{getattr(rows, 'dtype', type(rows).__name__)} {tuple(getattr(rows, 'shape', ()))}"


def as_blocks(candidates: Tensor | Blocks) -> Blocks:
    """Candidates as blocks: slices of a tensor."""
    if isinstance(candidates, Blocks):
        return candidates
    return Blocks(
        rows=len(candidates),
        make=lambda low, high: candidates[low:high],
        size=1 << 16,
    )


def check_finite(rows: Tensor, what: str, *, first_row: int) -> None:
    """NotFinite if any of the rows (n, d), which begin at `first_row`, holds NaN or infinity."""
    if torch.isfinite(rows.sum()):  # finite values alone have a finite sum
        return
    bad = ~torch.isfinite(rows).all(1)
    if bad.any():
        row = first_row + int(bad.int().argmax())
        raise NotFinite(f"nearest: NaN or infinity in {what}, row {row}")


def make_block(
    blocks: Blocks,
    first_id: int,
    low: int,
    queries: Tensor,
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """Collective: this rank's candidates of the block that begins at row `low`, (n, d) on the device of the queries,
    and their ids (n,). All ranks raise here together if `make` fails on one, or returns anything but such a block.
    """
    me = ranks.first + ranks.rank
    first = min(low, blocks.rows)
    last = min(low + blocks.size, blocks.rows)
    try:
        block = torch.as_tensor(blocks.make(first, last)).detach().to(queries.device)
    except Exception:
        with contextlib.suppress(Exception):  # this rank's exception says more
            ranks.collect(PeerFailed(f"nearest: rank {me} failed to make its candidates from row {first} on"))
        raise

    def checked() -> None:
        what = f"the candidates of rank {me}"
        if block.shape != (last - first, queries.shape[1]) or block.dtype != queries.dtype:
            raise ValueError(f"nearest: shape or type differs from the queries' for {what}, row {first}")
        check_finite(block, what, first_row=first)

    ranks.each(checked)
    return block, torch.arange(first_id + first, first_id + last)


def deliver_answers(scan: Scan, counts: list[int], ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Collective: distances and ids (q, k) of this rank's queries, the least of all ranks' answers."""
    packed = torch.stack([scan.distances.view(torch.int64), scan.ids], dim=2)
    parts = ranks.deliver(packed, counts).transpose(0, 1).flatten(1, 2)  # (q, world * k, 2)
    distances = parts[..., 0].contiguous().view(torch.float64)
    ids = parts[..., 1]
    order = sort_lexically(distances, ids)[:, : scan.neighbours]
    ids = ids.gather(1, order)
    return distances.gather(1, order), torch.where(ids == NO_ID, -1, ids)
