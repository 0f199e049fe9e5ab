"""The search against a float64 oracle, on data chosen to break float32."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.match.nearest import nearest


def oracle(queries, candidates):
    """Distance float32 and row by float64 brute force, the smallest row on a tie."""
    q, c = queries.double().numpy(), candidates.double().numpy()
    exact = np.stack([np.square(c - row).sum(1) for row in q])
    return exact.min(1).astype(np.float32), exact.argmin(1)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(seed, dims, offset=0.0):
    """Candidates with near-duplicates 1e-7 apart, and queries near them."""
    base = draw(seed, 300, dims)
    twins = torch.cat([base, base + 1e-7 * draw(seed + 1, 300, dims), base[:50]]) + offset
    return base[:200] + 0.3 * draw(seed + 2, 200, dims) + offset, twins


CASES = {
    "random": (draw(0, 500, 40), draw(1, 3000, 40)),
    "one dimension": (draw(0, 300, 1), draw(1, 900, 1)),
    "near-duplicates": planted(3, 64),
    "offset 100": planted(4, 64, offset=100.0),
    "all candidates equal": (draw(0, 50, 16), draw(1, 1, 16).repeat(400, 1)),
    "exact duplicates": (draw(0, 50, 16), draw(1, 40, 16).repeat(30, 1)),
    "fewer candidates than fetched": (draw(0, 20, 8), draw(1, 3, 8)),
    "queries among the candidates": (draw(1, 3000, 40)[:100], draw(1, 3000, 40)),
    "wide": (draw(0, 20, 12_288), draw(1, 60, 12_288)),
}


@pytest.mark.parametrize("case", CASES)
def test_nearest_equals_the_oracle(case):
    queries, candidates = CASES[case]
    distances, ids = nearest(queries, candidates, 1000)
    expected, rows = oracle(queries, candidates)
    assert (ids - 1000).tolist() == rows.tolist()
    assert distances.tolist() == pytest.approx(expected.tolist(), rel=1e-7)
    assert (distances.dtype, ids.dtype) == (torch.float32, torch.int64)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    queries=st.integers(0, 30),
    candidates=st.integers(1, 60),
    dims=st.integers(1, 20),
    levels=st.integers(1, 6),
)
def test_ties_go_to_the_smallest_id(seed, queries, candidates, dims, levels):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(levels, (queries, dims), generator=generator).float()
    c = torch.randint(levels, (candidates, dims), generator=generator).float()
    distances, ids = nearest(q, c, 7)
    if queries:
        expected, rows = oracle(q, c)
        assert (ids - 7).tolist() == rows.tolist() and distances.tolist() == expected.tolist()
    else:
        assert distances.shape == ids.shape == (0,)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["queries", "candidates"])
def test_values_that_are_not_finite_are_refused(value, where):
    rows = {"queries": draw(0, 5, 4), "candidates": draw(1, 5, 4)}
    rows[where][3, 2] = value
    with pytest.raises(ValueError, match=f"{where} of rank 0"):
        nearest(rows["queries"], rows["candidates"], 0)


def test_no_candidate_anywhere_is_refused():
    with pytest.raises(ValueError, match="no rank has a candidate"):
        nearest(draw(0, 5, 4), torch.empty(0, 4), 0)
