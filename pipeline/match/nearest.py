"""The nearest candidate over all ranks, exactly: the one file that knows FAISS.

FAISS finds a few candidates fast in float32; which of them is nearest is decided in float64 by (distance, id). Since
that order is total, the answer is the same for every world size, batch size and thread count.
"""

import faiss
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

FETCH = 8
"""Candidates a query that are rescored exactly."""

_NO_ID = torch.iinfo(torch.int64).max
_RESCORE_ROWS = 4096


def nearest(
    queries: Tensor,  # (q, d) float32, any q >= 0 on each rank
    candidates: Tensor,  # (c, d) float32, any c >= 0 on each rank
    first_id: int,  # candidate i of this rank has id first_id + i
    *,
    group: dist.ProcessGroup | None = None,  # None: the default group, or one process where there is none
) -> tuple[Tensor, Tensor]:
    """Collective: squared L2 distance (q,) float32 and id (q,) int64 of the nearest candidate over all ranks.

    'Nearest' is by the float64 sum of squared differences of the given float32 values, smallest id on a tie; the
    distance is that sum rounded. Raises ValueError on every rank if any value anywhere is NaN or infinite, or if no
    rank has a candidate.

    Each rank gathers all queries, searches its own candidates, and the minimum travels: one (distance, id) a query.
    """
    world = dist.get_world_size(group) if dist.is_initialized() else 1
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    link = _link_device(group) if world > 1 else torch.device("cpu")

    found = torch.tensor([int(_finite(queries)), int(_finite(candidates)), len(candidates), len(queries)], device=link)
    counts = [torch.empty_like(found) for _ in range(world)]
    if world > 1:
        dist.all_gather(counts, found, group=group)
    else:
        counts = [found]
    table = torch.stack(counts).cpu()
    for column, name in enumerate(("queries", "candidates")):
        bad = (table[:, column] == 0).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"nearest: NaN or infinity in the {name} of rank {', '.join(map(str, bad))}")
    if int(table[:, 2].sum()) == 0:
        raise ValueError("nearest: no rank has a candidate")

    sizes = [int(size) for size in table[:, 3]]
    everyone = _gather_rows(queries, sizes, link, group) if world > 1 else queries
    distances, ids = _search(everyone.cpu().contiguous(), candidates.detach().cpu().contiguous(), first_id)
    if world > 1:
        distances, ids = _exchange(distances, ids, link, group)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return distances[mine].float().to(queries.device), ids[mine].to(queries.device)


def _search(queries: Tensor, candidates: Tensor, first_id: int) -> tuple[Tensor, Tensor]:
    """Exact distance float64 and id int64, each (q,), over this process's candidates; inf and _NO_ID without any."""
    total, dims = len(candidates), queries.shape[1]
    if total == 0 or len(queries) == 0:
        return torch.full((len(queries),), torch.inf, dtype=torch.float64), torch.full((len(queries),), _NO_ID)

    # ||x||^2 + ||y||^2 - 2xy cancels for data far from the origin, so search around a shared centre.
    centre = candidates.mean(0, dtype=torch.float64).float()
    near, far = (queries - centre).numpy(), (candidates - centre).numpy()
    fetch = min(FETCH, total)
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(dims)
    index.add(far)
    approximate, rows = index.search(near, fetch)

    distances, ids = _rescore(queries, candidates, torch.from_numpy(rows))
    if fetch < total:
        # A candidate that was not fetched is no nearer than the last fetched one, up to the rounding of either sum:
        # a sum of d + 2 float32 terms errs by at most (d + 2) eps times the sum of their magnitudes (Higham, 3.5).
        norms = np.square(near, dtype=np.float64).sum(1) + np.square(far, dtype=np.float64).sum(1).max()
        slack = torch.from_numpy(4 * (dims + 4) * float(np.finfo(np.float32).eps) * norms)
        unproved = (torch.from_numpy(approximate[:, -1]).double() - slack <= distances).nonzero().flatten()
        for part in unproved.split(_RESCORE_ROWS):
            distances[part], ids[part] = _scan(queries[part], candidates)
    return distances, ids + first_id


def _rescore(queries: Tensor, candidates: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The least (distance float64, row) among `rows` (q, k) for each query."""
    distances = torch.empty(len(queries), dtype=torch.float64)
    best = torch.empty(len(queries), dtype=torch.int64)
    for start in range(0, len(queries), _RESCORE_ROWS):
        part = slice(start, start + _RESCORE_ROWS)
        order = rows[part].sort(1).values  # ascending rows: argmin keeps the smallest on a tie
        exact = torch.stack([_exact(queries[part], candidates[column]) for column in order.unbind(1)], dim=1)
        distances[part], column = exact.min(1)
        # `min` promises no particular index on a tie, `argmax` of a mask of the minima gives the first.
        column = (exact == distances[part, None]).int().argmax(1)
        best[part] = order.gather(1, column[:, None]).squeeze(1)
    return distances, best


def _scan(queries: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The least (distance float64, row) of each query among all candidates, one candidate block at a time."""
    distances = torch.full((len(queries),), torch.inf, dtype=torch.float64)
    best = torch.full((len(queries),), _NO_ID)
    block = max(1, 2**24 // max(1, queries.shape[1] * min(len(queries), 64)))
    for rows in torch.arange(len(queries)).split(64):
        for start in range(0, len(candidates), block):
            part = candidates[start : start + block]
            exact = (queries[rows, None].double() - part[None].double()).square().sum(2)
            least = exact.min(1).values
            column = (exact == least[:, None]).int().argmax(1) + start
            better = least < distances[rows]
            distances[rows] = torch.where(better, least, distances[rows])
            best[rows] = torch.where(better, column, best[rows])
    return distances, best


def _exact(queries: Tensor, candidates: Tensor) -> Tensor:
    return (queries.double() - candidates.double()).square().sum(1)


def _exchange(
    distances: Tensor, ids: Tensor, link: torch.device, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The least (distance, id) of each query over all ranks, by two reductions."""
    least = distances.to(link).clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    winner = torch.where(distances.to(link) == least, ids.to(link), _NO_ID)
    dist.all_reduce(winner, dist.ReduceOp.MIN, group=group)
    return least.cpu(), winner.cpu()


def _gather_rows(rows: Tensor, sizes: list[int], link: torch.device, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' rows (sum(sizes), d) in rank order; shards may be uneven, so they travel padded to the longest."""
    padded = torch.zeros(max(sizes), rows.shape[1], dtype=rows.dtype, device=link)
    padded[: len(rows)] = rows.to(link)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _link_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors must lie to travel: NCCL moves device memory, gloo host memory."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())
