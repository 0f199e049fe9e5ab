"""Fast float32 distances: FAISS on the CPU, torch on CUDA. The only file that imports FAISS."""

from functools import lru_cache
from typing import Any

import faiss
import torch
from torch import Tensor

_ROWS = 4096
_WORKING_SET = 1 << 23  # float32 values treated at once on CUDA


def flat(queries: Tensor, candidates: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` nearest candidates in float32: squared L2 (q, count) float32 and rows (q, count) int64."""
    if queries.is_cuda:
        if hasattr(faiss, "StandardGpuResources"):  # a GPU build
            from faiss.contrib import torch_utils  # noqa: F401  (lets FAISS take tensors)

            near: tuple[Tensor, Tensor] = faiss.knn_gpu(_resources(queries.device), queries, candidates, count)
            return near
        parts = [pairwise(part, candidates).topk(count, dim=1, largest=False) for part in queries.split(_ROWS)]
        return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
    faiss.omp_set_num_threads(torch.get_num_threads())
    distances, rows = faiss.knn(queries.numpy(), candidates.numpy(), count)
    return torch.from_numpy(distances), torch.from_numpy(rows)


@lru_cache
def _resources(device: torch.device) -> Any:
    """FAISS's memory on a device: some 1.5 GB, allocated once."""
    return faiss.StandardGpuResources()


def pairwise(queries: Tensor, candidates: Tensor) -> Tensor:
    """Squared L2 (q, n) float32 by a matrix product: fast, and inexact where it cancels."""
    squares = queries.square().sum(1)[:, None] + candidates.square().sum(1)
    return (squares - 2 * (queries @ candidates.T)).clamp(min=0)


def pair_distances(queries: Tensor, candidates: Tensor, query_rows: Tensor, candidate_rows: Tensor) -> Tensor:
    """Squared L2 (s,) float32 between queries[query_rows] and candidates[candidate_rows], by differences.

    All terms are nonnegative, so in any order of summation the relative error is at most gamma_(d + 3), and the error
    where squares underflow less than d 2^-126.
    """
    out = torch.empty(len(query_rows), dtype=torch.float32, device=queries.device)
    if queries.is_cuda:
        step = max(1, _WORKING_SET // max(1, queries.shape[1]))
        for start in range(0, len(out), step):
            part = slice(start, start + step)
            out[part] = (queries[query_rows[part]] - candidates[candidate_rows[part]]).square().sum(1)
        return out
    faiss.omp_set_num_threads(torch.get_num_threads())
    query_rows, candidate_rows = query_rows.contiguous(), candidate_rows.contiguous()
    faiss.pairwise_indexed_L2sqr(  # type: ignore[attr-defined]
        queries.shape[1],
        len(out),
        *(faiss.swig_ptr(rows.numpy()) for rows in (queries, query_rows, candidates, candidate_rows, out)),
    )
    return out
