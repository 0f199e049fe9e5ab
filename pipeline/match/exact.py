"""Exact squared L2 distances, in float64: these, then ids on a tie (`order.py`), decide which candidate is nearest."""

import torch
from torch import Tensor

_WORKING_SET = 1 << 17  # float64 values treated at once, to stay in the second-level cache


def exact_distances(queries: Tensor, candidates: Tensor, query_rows: Tensor, candidate_rows: Tensor) -> Tensor:
    """Squared L2 (s,) float64 between queries[query_rows] and candidates[candidate_rows].

    On the CPU a pair's result does not depend on the pairs beside it.
    """
    out = torch.empty(len(query_rows), dtype=torch.float64, device=queries.device)
    step = max(2, _WORKING_SET // max(1, queries.shape[1]))
    for start in range(0, len(out), step):
        part = slice(start, start + step)
        left, right = queries[query_rows[part]].double(), candidates[candidate_rows[part]].double()
        if len(left) == 1:  # torch would split the sum of a single row among threads, and so round it differently
            left, right = left.expand(2, -1), right.expand(2, -1)
        out[part] = (left - right).square_().sum(1)[: len(out[part])]
    return out
