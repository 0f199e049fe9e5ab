"""The bound never drops a pair that it may not drop, and drops nearly all that it should."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from naign.match import bound
from naign.match.bound import Frame
from tests.match.problems import FAMILIES, draw, oracle


def framed(basis, dtype):
    """The frame of a basis around zero."""
    departure = bound.departure(basis)
    return Frame(centre=torch.zeros(len(basis)), basis=basis, magnitude=4.0, dtype=dtype, departure=departure)


def sifted(queries, candidates, limit, *, width, dtype, centre=None):
    """(q, n) bool: pairs that survive, given up ones among them; None where the data cannot be screened."""
    centre = candidates.double().mean(0).float() if centre is None else centre
    around = torch.cat([queries, candidates]) - centre
    if not torch.isfinite(around).all():
        return None
    basis = bound.find_basis(around, width) if width else None
    departure = bound.departure(basis) if width else 0.0
    frame = Frame(centre=centre, basis=basis, magnitude=float(around.abs().max()), dtype=dtype, departure=departure)
    seen, shown = bound.encode(queries, frame), bound.encode(candidates, frame)
    if not (seen.usable and shown.usable):
        return None
    a = bound.query_factor(seen, frame)
    a[:, -3:] = bound.limit_columns(seen.square, frame, limit)
    rows, columns, given_up = bound.survivors(a, bound.candidate_factor(shown, frame))
    alive = given_up[:, None].repeat(1, len(candidates))
    assert (columns < len(candidates)).all()
    alive[rows, columns] = True
    return alive


@settings(max_examples=200, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**31),
    queries=st.integers(1, 40),
    candidates=st.integers(2, 700),
    dims=st.one_of(st.integers(1, 30), st.integers(31, 1100)),
    width=st.integers(0, 60),
)
def test_every_candidate_within_the_limit_survives(family, dtype, seed, queries, candidates, dims, width):
    q, c = FAMILIES[family](seed, queries, candidates, dims)
    exact, order = oracle(q, c, 3)
    column = min(seed % 3, order.shape[1] - 1)
    limit = torch.from_numpy(exact[:, column].copy())  # exactly a candidate's own distance: as tight as can be
    alive = sifted(q, c, limit, width=width, dtype=dtype)
    if alive is not None:
        assert alive.gather(1, torch.from_numpy(order[:, : column + 1].copy())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [0, 40])
def test_what_is_far_is_dropped(dtype, width):
    queries, candidates = FAMILIES["low rank"](5, 50, 2000, 784)
    limit = torch.from_numpy(oracle(queries, candidates)[0][:, 0].copy())
    alive = sifted(queries, candidates, limit, width=width, dtype=dtype)
    assert alive.sum() / len(queries) < 60  # of 2,000


def test_a_bad_basis_widens_the_bound_but_drops_nothing_it_may_not():
    queries, candidates = draw(0, 60, 300), draw(1, 900, 300)
    basis = bound.find_basis(candidates, 30) + 0.01 * draw(2, 300, 30)
    exact, order = oracle(queries, candidates)
    frame = framed(basis, torch.bfloat16)
    seen = bound.encode(queries, frame)
    a = bound.query_factor(seen, frame)
    a[:, -3:] = bound.limit_columns(seen.square, frame, torch.from_numpy(exact[:, 0].copy()))
    rows, columns, given_up = bound.survivors(a, bound.candidate_factor(bound.encode(candidates, frame), frame))
    pairs = set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert all(given_up[row] or (row, int(order[row, 0])) in pairs for row in range(60))


def test_the_basis_is_orthonormal_and_finds_the_plane():
    rows = draw(0, 500, 5) @ draw(1, 5, 200)
    basis = bound.find_basis(rows, 30)
    assert basis.shape[1] >= 5 and bound.departure(basis) < 1e-4
    assert float((rows @ basis).square().sum() / rows.square().sum()) == pytest.approx(1, abs=1e-5)
    assert bound.find_basis(torch.zeros(10, 7), 3).shape == (7, 0)


def test_the_last_coordinate_is_at_least_what_the_basis_leaves_out():
    basis = torch.linalg.qr(draw(0, 100, 8)).Q
    rows = draw(1, 50, 8) @ basis.T + 0.01 * draw(2, 50, 100)
    longer = 1.01 * basis  # its projections are longer than the rows themselves
    frame = framed(longer, torch.float32)
    seen = bound.encode(rows, frame)
    rest = (rows - rows @ basis @ basis.T).double().norm(dim=1) * frame.scale
    assert (seen.values[:, -1] + seen.error >= rest).all()
