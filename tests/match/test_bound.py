"""The bound never drops a pair that it may not drop, and drops nearly all that it should."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from naign.match import bound
from naign.match.bound import Frame, Sieve
from tests.match.problems import FAMILIES, draw, family, low_rank, oracle


def frame_of(rows, *, basis, dtype):
    """A frame around zero."""
    centre = torch.zeros(rows.shape[1])
    return Frame(
        centre=centre,
        basis=basis,
        magnitude=float(rows.abs().max()),
        dtype=dtype,
    )


def sift(queries, candidates, limit, frame):
    """(q, n) bool: pairs that survive, among them those of queries that are given up."""
    sieve = Sieve(queries, frame)
    rows, columns, given_up = sieve.list_near(sieve.factor_of(candidates), torch.from_numpy(limit.copy()))
    assert (columns < len(candidates)).all()
    alive = given_up[:, None].repeat(1, len(candidates))
    alive[rows, columns] = True
    return alive


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(FAMILIES),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**31),
    queries=st.integers(1, 40),
    candidates=st.integers(2, 700),
    dims=st.one_of(st.integers(1, 30), st.integers(31, 1100)),
    width=st.integers(1, 60),
)
def test_every_candidate_within_the_limit_survives(
    kind,
    dtype,
    seed,
    queries,
    candidates,
    dims,
    width,
):
    near, far = family(
        kind,
        seed,
        queries,
        candidates,
        dims,
    )
    exact, order = oracle(near, far, 3)
    column = min(seed % 3, order.shape[1] - 1)
    rows = torch.cat([near, far])
    frame = frame_of(rows, basis=bound.find_basis(rows, width), dtype=dtype)
    alive = sift(near, far, exact[:, column], frame)  # exactly a candidate's own distance: as tight as can be
    within = torch.from_numpy(order[:, : column + 1].copy())
    assert alive.gather(1, within).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_far_is_dropped(dtype):
    queries, candidates = low_rank(
        5,
        50,
        2000,
        784,
        noise=0.01,
    )
    frame = frame_of(candidates, basis=bound.find_basis(candidates, 40), dtype=dtype)
    alive = sift(
        queries,
        candidates,
        oracle(queries, candidates)[0][:, 0],
        frame,
    )
    assert alive.sum() / len(queries) < 60  # of 2,000


def test_a_bad_basis_widens_the_bound_but_drops_nothing_it_may_not():
    queries = draw(0, 60, 300)
    candidates = draw(1, 900, 300)
    basis = bound.find_basis(candidates, 30) + 0.01 * draw(2, 300, 30)
    exact, order = oracle(queries, candidates)
    frame = frame_of(candidates, basis=basis, dtype=torch.bfloat16)
    alive = sift(queries, candidates, exact[:, 0], frame)
    assert alive.gather(1, torch.from_numpy(order)).all()


def test_the_last_coordinate_is_at_least_what_the_basis_leaves_out():
    basis = torch.linalg.qr(draw(0, 100, 8)).Q
    rows = draw(1, 50, 8) @ basis.T + 0.01 * draw(2, 50, 100)
    longer = 1.01 * basis  # its projections are longer than the rows themselves
    frame = frame_of(rows, basis=longer, dtype=torch.float32)
    encoded = bound.encode(rows, frame)
    rest = (rows - rows @ basis @ basis.T).double().norm(dim=1) * frame.scale
    assert (encoded.values[:, -1] + encoded.error >= rest).all()
