"""Exact squared L2 distances, in float64: these, then ids on a tie (`order.py`), decide which candidate is nearest."""

import torch
from torch import Tensor

_WORKING_SET = {"cpu": 1 << 17, "cuda": 1 << 24}
"""float64 values treated at once: on a CPU to stay in the second-level cache, on a GPU in few launches."""


def exact_distances(queries: Tensor, candidates: Tensor, query_rows: Tensor, candidate_rows: Tensor) -> Tensor:
    """Squared L2 (s,) float64 between queries[query_rows] and candidates[candidate_rows].

    A pair's result does not depend on the pairs beside it: else a copy of a candidate could be nearer than the one of
    the smaller id.
    """
    out = torch.empty(len(query_rows), dtype=torch.float64, device=queries.device)
    step = max(2, _WORKING_SET.get(queries.device.type, _WORKING_SET["cpu"]) // max(1, queries.shape[1]))
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
    """The sum of each row of (n, d), in an order that d alone decides; uses up `values`.

    The second half of the columns is added to the first, until one is left. A GPU's `sum` takes another order for
    other numbers of rows.
    """
    if not values.shape[1]:
        return values.sum(1)
    while (width := values.shape[1]) > 1:
        half = (width + 1) // 2
        values[:, : width - half] += values[:, half:]
        values = values[:, :half]
    return values[:, 0]
