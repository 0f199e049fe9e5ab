"""Squared L2 distances, fast or exact, and the total order (distance, id), which makes an answer unique.

Fast: float32, by FAISS on the CPU and torch on CUDA; no other file imports FAISS. Exact: float64, which decides.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from naign.distributed.host import why_no_faiss
from naign.errors import InputError, one_line

NO_ID = torch.iinfo(torch.int64).max  # of a missing candidate; sorts behind all others
_ROWS = 4096
_VALUES = {"cpu": 1 << 17, "cuda": 1 << 24}
"""float64 values treated at once: on a CPU to stay in the second-level cache, on a GPU in few launches."""


@cache
def load_faiss() -> Any:
    """FAISS, imported at the first search. Raises InputError where it is missing or broken, or two builds are mixed."""
    problem = why_no_faiss()
    if problem:
        raise InputError(problem)
    try:
        import faiss

        return faiss
    except (ImportError, RuntimeError) as error:
        raise InputError(f"FAISS cannot be loaded: {one_line(error)}: `naign doctor` says which build fits") from None


def at_once(most: dict[str, int], rows: Tensor) -> int:
    """How much is treated at once on the device of `rows`: `most` by the type of device, elsewhere as on a CPU."""
    return most.get(rows.device.type, most["cpu"])


def propose(queries: Tensor, candidates: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` nearest candidates in float32: squared L2 (q, count) float32 and rows (q, count) int64."""
    if queries.is_cuda:
        values = []
        indices = []
        for part in queries.split(_ROWS):
            least = squares(part, candidates).topk(count, dim=1, largest=False)
            values.append(least.values)
            indices.append(least.indices)
        return torch.cat(values), torch.cat(indices)
    faiss = load_faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    distances, rows = faiss.knn(queries.numpy(), candidates.numpy(), count)
    return torch.from_numpy(distances), torch.from_numpy(rows)


def squares(queries: Tensor, candidates: Tensor) -> Tensor:
    """Squared L2 (q, n) float32 by a matrix product: fast, and inexact where it cancels."""
    near = queries.square().sum(1)
    far = candidates.square().sum(1)
    found = near[:, None] + far - 2 * (queries @ candidates.T)
    return found.clamp(min=0)


def pair_distances(queries: Tensor, candidates: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Squared L2 (s,) float32 between queries[rows] and candidates[columns], by differences, on a CPU. All terms are
    nonnegative, so in any order of summation the relative error is at most gamma_(d + 3), and the error where squares
    underflow less than d 2^-126.
    """
    out = queries.new_empty(len(rows))
    faiss = load_faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    arrays = [part.contiguous().numpy() for part in (queries, rows, candidates, columns, out)]
    faiss.pairwise_indexed_L2sqr(queries.shape[1], len(out), *map(faiss.swig_ptr, arrays))
    return out


def exact_distances(queries: Tensor, candidates: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Squared L2 (s,) float64 between queries[rows] and candidates[columns], by differences. A pair's result does not
    depend on the pairs beside it: else a copy of a candidate could be nearer than the one of the smaller id.
    """
    out = queries.new_empty(len(rows), dtype=torch.float64)
    step = max(1, at_once(_VALUES, queries) // queries.shape[1])
    for start in range(0, len(out), step):
        part = slice(start, start + step)
        differences = queries[rows[part]].double() - candidates[columns[part]]
        out[part] = halved_sum(differences.square_())
    return out


def halved_sum(values: Tensor) -> Tensor:
    """The sum of each row of (n, d >= 1), in an order that d alone decides, unlike that of torch's `sum`: the second
    half of the columns is added to the first, until one is left. Uses up `values`.
    """
    width = values.shape[1]
    while width > 1:
        half = (width + 1) // 2
        values[:, : width - half] += values[:, half:width]
        width = half
    return values[:, 0]


def sort_lexically(*keys: Tensor) -> Tensor:
    """The permutation (..., n) that sorts along the last dimension by the first key, then the second, and so on."""
    order = torch.argsort(keys[-1], dim=-1, stable=True)
    for key in reversed(keys[:-1]):
        again = torch.argsort(key.gather(-1, order), dim=-1, stable=True)
        order = order.gather(-1, again)
    return order
