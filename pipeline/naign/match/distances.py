"""Squared L2 distances, fast or exact, and the total order (distance, id), which makes an answer unique.

Fast: float32, by FAISS on the CPU and torch on CUDA; no other file imports FAISS. Exact: float64, which decides.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from naign.distributed.host import why_no_faiss
from naign.errors import InputError, one_line, require

log = logging.getLogger("naign.match")

NO_ID = torch.iinfo(torch.int64).max  # of a missing candidate; sorts behind all others
_ROWS = 4096
_SINGLE_SET = 1 << 23  # float32 values treated at once on CUDA
_DOUBLE_SET = {"cpu": 1 << 17, "cuda": 1 << 24}
"""float64 values treated at once: on a CPU to stay in the second-level cache, on a GPU in few launches."""
_INDEX_MEMORY = 1 << 29  # bytes of a GPU that FAISS keeps; by default it keeps 1.5 GiB
_MOST_PRODUCTS = 2048  # of a row, which FAISS lists on a GPU (GPU_MAX_SELECTION_K): for more it would abort


@cache
def load_faiss() -> Any:
    """FAISS, imported at the first search. Raises InputError where it is missing or broken, or two builds are mixed."""
    require((not (problem := why_no_faiss()), problem))
    try:
        import faiss

        return faiss
    except (ImportError, RuntimeError) as error:
        raise InputError(f"FAISS cannot be loaded: {one_line(error)}: `naign doctor` says which build fits") from None


def flat(queries: Tensor, candidates: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` nearest candidates in float32: squared L2 (q, count) float32 and rows (q, count) int64."""
    if queries.is_cuda:
        parts = [pairwise(part, candidates).topk(count, dim=1, largest=False) for part in queries.split(_ROWS)]
        return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
    faiss = load_faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    distances, rows = faiss.knn(queries.numpy(), candidates.numpy(), count)
    return torch.from_numpy(distances), torch.from_numpy(rows)


def topk(a: Tensor, b: Tensor, count: int, resources: Any = None) -> tuple[Tensor, Tensor]:
    """The `count` largest values of each row of A B', or fewer if B is small, and their columns: (q, k) float32,
    descending, and int64. A (q, w) and B (n, w) are both bfloat16 or both float32; FAISS's brute force sums in float32.
    """
    faiss, count = load_faiss(), min(count, len(b), _MOST_PRODUCTS)
    if a.is_cuda:  # FAISS searches on the current GPU, on torch's stream of it
        # Not by METRIC_L2, which rounds squares to the type of the rows (l2NormRowMajor in gpu/impl/L2Norm.cu), nor by
        # cuVS, which takes float32 alone. No product uses TF32 (rawGemm in gpu/utils/MatrixMult-inl.cuh).
        with torch.cuda.device(a.device):
            resources = resources or faiss_on(a.device)
            values, columns = faiss.knn_gpu(resources, a, b, count, metric=faiss.METRIC_INNER_PRODUCT)
            return values, columns
    faiss.omp_set_num_threads(torch.get_num_threads())
    values, columns = faiss.knn(a.float().numpy(), b.float().numpy(), count, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(values), torch.from_numpy(columns)


@cache
def faiss_on(device: torch.device) -> Any:
    """FAISS's memory and handles of a GPU, made once, or True for the CPU. None where `topk` does not work: FAISS is no
    GPU build, or, as the log tells, it fails or finds other products than on the CPU.
    """
    faiss = load_faiss()
    if device.type != "cuda" or not hasattr(faiss, "StandardGpuResources"):
        return True if device.type == "cpu" else None
    try:
        if torch.cuda.get_device_capability(device) < (7, 0):  # for which its builds have no code: it would abort
            raise RuntimeError("it needs compute capability 7.0")
        from faiss.contrib import torch_utils  # noqa: F401  (lets FAISS take tensors)

        resources = faiss.StandardGpuResources()
        resources.setTempMemory(_INDEX_MEMORY)
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        if not finds_products(lambda a, b: topk(a.to(device, dtype), b.to(device, dtype), 9, resources)):
            raise RuntimeError("it finds other products than on the CPU")
        return resources
    except Exception as error:  # whatever a build of another version lacks
        log.warning(f"FAISS is not used on {device}, torch searches there: {one_line(error)}")
        return None


def finds_products(search: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> bool:
    """Whether `search` finds the 9 largest products of each row as `topk` does on the CPU. Their sums are exact."""
    rows = torch.randint(-8, 9, (3064, 72), generator=torch.Generator().manual_seed(0)).float()
    values, columns = (part.cpu() for part in search(rows[:64], rows[64:]))
    expected = topk(rows[:64], rows[64:], 9)[0]
    return torch.equal(values, expected) and torch.equal((rows[:64] @ rows[64:].T).gather(1, columns), expected)


def pairwise(queries: Tensor, candidates: Tensor) -> Tensor:
    """Squared L2 (q, n) float32 by a matrix product: fast, and inexact where it cancels."""
    squares = queries.square().sum(1)[:, None] + candidates.square().sum(1)
    return (squares - 2 * (queries @ candidates.T)).clamp(min=0)


def pair_distances(queries: Tensor, candidates: Tensor, query_rows: Tensor, candidate_rows: Tensor) -> Tensor:
    """Squared L2 (s,) float32 between queries[query_rows] and candidates[candidate_rows], by differences. All terms are
    nonnegative, so in any order of summation the relative error is at most gamma_(d + 3), and the error where squares
    underflow less than d 2^-126.
    """
    out = torch.empty(len(query_rows), dtype=torch.float32, device=queries.device)
    if queries.is_cuda:
        step = max(1, _SINGLE_SET // max(1, queries.shape[1]))
        for start in range(0, len(out), step):
            part = slice(start, start + step)
            out[part] = (queries[query_rows[part]] - candidates[candidate_rows[part]]).square().sum(1)
        return out
    faiss = load_faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    query_rows, candidate_rows = query_rows.contiguous(), candidate_rows.contiguous()
    faiss.pairwise_indexed_L2sqr(
        queries.shape[1],
        len(out),
        *(faiss.swig_ptr(rows.numpy()) for rows in (queries, query_rows, candidates, candidate_rows, out)),
    )
    return out


def exact_distances(queries: Tensor, candidates: Tensor, query_rows: Tensor, candidate_rows: Tensor) -> Tensor:
    """Squared L2 (s,) float64 between queries[query_rows] and candidates[candidate_rows]. A pair's result does not
    depend on the pairs beside it: else a copy of a candidate could be nearer than the one of the smaller id.
    """
    out = torch.empty(len(query_rows), dtype=torch.float64, device=queries.device)
    step = max(2, _DOUBLE_SET.get(queries.device.type, _DOUBLE_SET["cpu"]) // max(1, queries.shape[1]))
    for start in range(0, len(out), step):
        part = slice(start, start + step)
        left, right = queries[query_rows[part]].double(), candidates[candidate_rows[part]].double()
        if len(left) == 1:  # torch would split the sum of a single row among threads, and so round it differently
            left, right = left.expand(2, -1), right.expand(2, -1)
        squares = (left - right).square_()
        sums = squares.sum(1) if squares.device.type == "cpu" else halved_sum(squares)
        out[part] = sums[: len(out[part])]
    return out


def halved_sum(values: Tensor) -> Tensor:
    """The sum of each row of (n, d >= 1), in an order that d alone decides, unlike that of a GPU's `sum`: the second
    half of the columns is added to the first, until one is left. Uses up `values`.
    """
    while (width := values.shape[1]) > 1:
        half = (width + 1) // 2
        values[:, : width - half] += values[:, half:]
        values = values[:, :half]
    return values[:, 0]


def sort_lexically(*keys: Tensor) -> Tensor:
    """The permutation (..., n) that sorts along the last dimension by the first key, then the second, and so on."""
    order = torch.arange(keys[0].shape[-1], device=keys[0].device).expand(keys[0].shape)
    for key in reversed(keys):
        order = order.gather(-1, torch.sort(key.gather(-1, order), dim=-1, stable=True).indices)
    return order


def first_copies(rows: Tensor, count: int) -> Tensor:
    """Indices, ascending, of the rows (n, d) that have fewer than `count` bitwise equal rows before them."""
    raw = rows.cpu().numpy()
    kind = np.unique(raw.view(np.dtype((np.void, raw.dtype.itemsize * raw.shape[1]))).ravel(), return_inverse=True)[1]
    order = np.argsort(kind, kind="stable")
    place = np.arange(len(kind)) - np.searchsorted(kind[order], kind[order])
    return torch.from_numpy(np.sort(order[place < count])).to(rows.device)
