"""The search against a float64 oracle: whatever the method, the blocks and the threads, on data that breaks float32."""

import subprocess
import sys
import weakref
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from naign.match import Blocks, bound, nearest, scan, search
from naign.match.exact import exact_distances, halved_sum
from tests.conftest import environment
from tests.match.problems import CASES, FAMILIES, draw, family, low_rank, oracle

METHODS = ("flat", "bounded")


@cache
def answer(case):
    """The oracle's, which takes longer than the searches."""
    return oracle(*CASES[case])


def in_blocks(rows, size):
    return Blocks(rows=len(rows), make=lambda low, high: rows[low:high], size=size)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_the_nearest_is_the_oracles(case, method):
    queries, candidates = CASES[case]
    result = search(queries, candidates, 1000, method=method)
    expected, rows = answer(case)
    assert (result.ids - 1000).tolist() == rows.tolist()
    assert_close(result.distances, torch.from_numpy(expected), rtol=1e-12, atol=0)


def test_nearest_returns_squared_distances_in_float32():
    queries, candidates = CASES["random"]
    first = 2**62 - len(candidates)
    distances, ids = nearest(queries, candidates, first)
    expected, rows = answer("random")
    assert distances.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert (ids - first).tolist() == rows[:, 0].tolist()
    assert torch.equal(distances, torch.from_numpy(expected[:, 0]).float())


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(FAMILIES),
    method=st.sampled_from(METHODS),
    halves=st.booleans(),
    seed=st.integers(0, 2**31),
    queries=st.integers(0, 40),
    candidates=st.integers(1, 700),
    dims=st.one_of(st.integers(1, 20), st.integers(21, 700)),
    block=st.integers(1, 900),
    neighbours=st.integers(1, 5),
)
def test_any_problem_in_any_blocks(
    kind,
    method,
    halves,
    seed,
    queries,
    candidates,
    dims,
    block,
    neighbours,
):
    near, far = family(
        kind,
        seed,
        queries,
        candidates,
        dims,
    )
    blocks = in_blocks(far, max(block, len(far) // 20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "product_type", lambda device: torch.bfloat16 if halves else torch.float32)
        found = search(
            near,
            blocks,
            7,
            method=method,
            neighbours=neighbours,
        )
    expected, rows = oracle(near, far, neighbours)
    kept = rows.shape[1]
    if kind != "all scales":  # there, float64 sums differ by the order of their terms alone
        assert torch.equal(found.ids[:, :kept], 7 + torch.from_numpy(rows))
    assert_close(found.distances[:, :kept], torch.from_numpy(expected), rtol=1e-12, atol=0)
    assert (found.ids[:, kept:] == -1).all()
    assert found.distances[:, kept:].isinf().all()


@pytest.mark.parametrize("case", ["near-duplicates", "low rank"])
def test_threads_and_blocks_do_not_change_a_bit(case):
    queries, candidates = CASES[case]
    answers = set()
    before = torch.get_num_threads()
    try:
        for method in METHODS:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                for size in (17, 100, 4096):
                    found = search(queries, in_blocks(candidates, size), 0, method=method)
                    bits = torch.stack([found.distances.view(torch.int64), found.ids])
                    answers.add(tuple(bits.flatten().tolist()))
    finally:
        torch.set_num_threads(before)
    assert len(answers) == 1


def test_a_block_is_forgotten_before_the_next_is_made():
    references = []
    alive = []

    def make(low, high):
        alive.append(sum(reference() is not None for reference in references))
        block = draw(low, high - low, 30)
        references.append(weakref.ref(block))
        return block

    search(draw(1, 50, 30), Blocks(rows=5000, make=make, size=500), 0)
    assert len(alive) == 10
    assert max(alive) <= 1


def test_many_rows_of_many_values_are_bounded():
    queries, candidates = low_rank(7, 90, 3000, 784)
    found = search(queries, candidates, 0)
    assert found.method.startswith("bounded on 87 ")
    assert found.measured < 0.02 * len(candidates)
    assert search(queries, candidates[:2000], 0).method == "flat"
    assert search(queries[:, :200], candidates[:, :200], 0).method == "flat"


def test_data_that_no_projection_separates_are_searched_by_faiss(monkeypatch):
    bounded = []
    factor_of = bound.Sieve.factor_of

    def counted(sieve, candidates):
        bounded.append(len(candidates))
        return factor_of(sieve, candidates)

    monkeypatch.setattr(bound.Sieve, "factor_of", counted)
    queries = draw(0, 200, 900)
    candidates = draw(1, 4000, 900)
    found = search(
        queries,
        in_blocks(candidates, 1000),
        0,
        method="bounded",
    )
    assert bounded == [1000]
    assert found.ids.tolist() == oracle(queries, candidates)[1].tolist()


@pytest.mark.parametrize("where, value", [("queries", torch.nan), ("candidates", -torch.inf)])
def test_values_that_are_not_finite_are_refused(value, where):
    rows = {"queries": draw(0, 5, 4), "candidates": draw(1, 5, 4)}
    rows[where][3, 2] = value
    with pytest.raises(ValueError, match=f"{where} of rank 0, row 3"):
        nearest(rows["queries"], rows["candidates"], 0)


NOT_ROWS = r"must be float32 torch tensors \(n, d\) of the same d >= 1, not "


@pytest.mark.parametrize(
    "queries, candidates, first, what",
    [
        (draw(0, 5, 4), torch.empty(0, 4), 0, "no rank has a candidate"),
        (draw(0, 5, 4), draw(1, 5, 3), 0, NOT_ROWS + r"torch.float32 \(5, 3\)"),
        (draw(0, 5, 4), draw(1, 5, 4, 2), 0, NOT_ROWS),
        (draw(0, 5, 4), draw(1, 5, 4).half(), 0, NOT_ROWS + "torch.float16"),
        (draw(0, 5, 4), draw(1, 5, 4), 2**62 - 4, "leave .0, 2..62."),
        (draw(0, 5, 4).numpy(), draw(1, 5, 4), 0, NOT_ROWS + "float32"),
    ],
)
def test_what_does_not_fit_is_refused(queries, candidates, first, what):
    with pytest.raises(ValueError, match=what):
        nearest(queries, candidates, first)


def test_blocks_that_are_not_what_they_should_be_are_refused():
    bad = draw(0, 20, 4)
    bad[13, 0] = torch.nan
    queries = draw(0, 5, 4)
    for block, what in (
        (draw(0, 20, 3), "row 10"),
        (draw(0, 20, 4).double(), "row 10"),
        (bad, "candidates of rank 0, row 13"),
    ):
        blocks = Blocks(
            rows=20,
            make=lambda low, high, block=block: block[low:high] if low else draw(0, high - low, 4),
            size=10,
        )
        with pytest.raises(ValueError, match=what):
            search(queries, blocks, 0)
    with pytest.raises(ZeroDivisionError):
        search(queries, Blocks(rows=5, make=lambda low, high: draw(0, 1 // 0, 4)), 0)


@pytest.mark.parametrize("method", METHODS)
def test_settings_that_make_products_coarser_change_nothing(method):
    """As training may set them: the bounds stand on products that are what they say."""
    queries, candidates = CASES["low rank"]
    precision = torch.get_float32_matmul_precision()
    dtype = torch.get_default_dtype()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.set_default_dtype(torch.float64)
        found = search(
            queries.clone().requires_grad_(),
            candidates.T.contiguous().T,
            0,
            method=method,
        )
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(dtype)
    assert found.ids.tolist() == answer("low rank")[1].tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("magnitude", [2.8e-23, 4.5e-23, 1e-19])
@pytest.mark.parametrize("bulk", [0.0, 1e-16])
def test_squares_that_underflow_prove_nothing(method, magnitude, bulk):
    """The nearest come in the second block, when there are limits already."""
    corners = magnitude * draw(0, 300, 50).sign()
    far = corners + 0.2 * magnitude * draw(1, 300, 50)
    near = corners + 0.1 * magnitude * draw(2, 300, 50)
    candidates = torch.cat([far, near])
    if bulk:
        candidates = torch.cat([candidates, bulk * draw(3, 60, 50)])
    queries = corners + 0.02 * magnitude * draw(4, 300, 50)
    found = search(queries, in_blocks(candidates, 300), 0, method=method)
    assert found.ids.tolist() == oracle(queries, candidates)[1].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_distances_beyond_the_largest_norms_are_distances(method):
    queries = 0.5 * draw(0, 1200, 20)
    queries[1, 0] = -3.2e15
    candidates = 0.5 * draw(1, 2, 20)
    candidates[0, 0] = 3.2e15
    candidates[1, 0] = 3.3e15
    assert search(queries, candidates, 0, method=method).ids[1].tolist() == [0]


def test_the_public_names_and_nothing_heavy_are_imported():
    code = """
import inspect, sys
from naign import nearest
from naign.philox import normal
assert list(inspect.signature(nearest).parameters) == ["queries", "candidates", "first_id", "group"]
assert not {"boto3", "deepspeed", "sklearn", "tensorboard", "torchmetrics"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


@pytest.mark.parametrize("dims", [1, 3, 784])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_distance_depends_on_no_other_pair(dims, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    values = torch.rand(50, dims, dtype=torch.float64)
    assert_close(halved_sum(values.clone()), values.sum(1))
    rows = torch.arange(400, device=device)
    queries = draw(dims, 400, dims).to(device)
    candidates = draw(dims + 1, 400, dims).to(device)
    whole = exact_distances(queries, candidates, rows, rows)
    for count in (1, 2, 13, 64):
        some = exact_distances(
            queries,
            candidates,
            rows[:count],
            rows[:count],
        )
        assert torch.equal(some, whole[:count])
