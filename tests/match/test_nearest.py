"""The search against a float64 oracle: whatever the method, the blocks and the threads, on data that breaks float32."""

import subprocess
import sys
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from naign.match import Blocks, bound, nearest, search
from naign.match.distances import exact_distances, halved_sum
from naign.match.method import METHODS, without_probe
from tests.conftest import environment
from tests.match.problems import CASES, FAMILIES, draw, oracle


@cache
def answer(case):
    """The oracle's, which takes longer than the searches."""
    return oracle(*CASES[case])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_nearest_equals_the_oracle(case, method):
    queries, candidates = CASES[case]
    distances, ids = nearest(queries, candidates, 1000, method=method)
    expected, rows = answer(case)
    assert (ids - 1000).tolist() == rows[:, 0].tolist()
    assert distances.tolist() == pytest.approx(expected[:, 0].astype("float32").tolist(), rel=1e-7)
    assert (distances.dtype, ids.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(
    ("method", "work", "dims", "gpu", "halves", "expected"),
    [
        ("auto", 1e8, 3072, True, True, "flat"),
        ("auto", 1e12, 3072, True, True, "rounded"),
        ("auto", 1e12, 12288, True, True, "auto"),
        ("auto", 1e12, 3072, True, False, "auto"),
        ("auto", 1e12, 3072, False, True, "auto"),
        ("projected", 1e12, 3072, True, True, "projected"),
    ],
)
def test_a_gpu_bounds_by_all_values_without_a_probe(method, work, dims, gpu, halves, expected):
    assert without_probe(method, work=work, dims=dims, gpu=gpu, halves=halves) == expected


@settings(max_examples=150, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    method=st.sampled_from(METHODS),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**31),
    queries=st.integers(0, 40),
    candidates=st.integers(1, 700),
    dims=st.one_of(st.integers(1, 20), st.integers(21, 700)),
    block=st.integers(1, 900),
    neighbours=st.integers(1, 5),
)
def test_any_problem_in_any_blocks(family, method, dtype, seed, queries, candidates, dims, block, neighbours):
    q, c = FAMILIES[family](seed, queries, candidates, dims)
    blocks = Blocks(rows=len(c), make=lambda low, high: c[low:high], size=max(block, -(-len(c) // 20)))
    with pytest.MonkeyPatch.context() as patch:
        rates = (2.0, 1.0) if dtype == torch.bfloat16 else (1.0, 2.0)
        patch.setattr("naign.match.method.measure_rates", lambda device, threads: rates)
        found = search(q, blocks, 7, method=method, neighbours=neighbours)
    expected, rows = oracle(q, c, neighbours)
    kept = rows.shape[1]
    if family != "all scales":  # there, float64 sums differ by the order of their terms alone
        assert (found.ids[:, :kept] - 7).tolist() == rows.tolist()
    assert found.distances[:, :kept].tolist() == [pytest.approx(row, rel=1e-12) for row in expected.tolist()]
    assert (found.ids[:, kept:] == -1).all() and found.distances[:, kept:].isinf().all()


@settings(max_examples=80, deadline=None)
@given(
    family=st.sampled_from(sorted(set(FAMILIES) - {"all scales"})),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 2**31),
    queries=st.integers(1, 30),
    candidates=st.integers(2, 600),
    dims=st.integers(1, 300),
    skipped=st.integers(0, 600),
)
def test_candidates_that_are_skipped_are_left_out(family, method, seed, queries, candidates, dims, skipped):
    q, c = FAMILIES[family](seed, queries, candidates, dims)
    skip = torch.randperm(len(c), generator=torch.Generator().manual_seed(seed))[:skipped]
    found = search(q, Blocks(rows=len(c), make=lambda low, high: c[low:high], size=97), 0, method=method, skip=skip)
    left = torch.ones(len(c), dtype=torch.bool)
    left[skip] = False
    kept = left.nonzero().flatten()
    if len(kept):
        assert found.ids[:, 0].tolist() == kept[torch.from_numpy(oracle(q, c[kept])[1][:, 0])].tolist()
    else:
        assert (found.ids == -1).all() and found.distances.isinf().all()


@pytest.mark.parametrize("method", METHODS)
def test_threads_and_blocks_do_not_change_a_bit(method):
    queries, candidates = CASES["near-duplicates"]
    answers = set()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for size in (17, 100, 4096):
                blocks = Blocks(rows=len(candidates), make=lambda low, high: candidates[low:high], size=size)
                distances, ids = nearest(queries, blocks, 0, method=method)
                answers.add((tuple(distances.tolist()), tuple(ids.tolist())))
    finally:
        torch.set_num_threads(before)
    assert len(answers) == 1


def test_a_block_is_forgotten_before_the_next_is_made():
    alive, made = [], []

    def make(low, high):
        import weakref

        made.append(sum(reference() is not None for reference in alive))
        block = draw(low, high - low, 30)
        alive.append(weakref.ref(block))
        return block

    nearest(draw(1, 50, 30), Blocks(rows=5000, make=make, size=500), 0)
    assert len(made) == 10 and max(made) <= 1


def test_the_first_sieve_decides_where_data_lie_near_a_plane(monkeypatch):
    queries, candidates = CASES["low rank"]
    widths, survivors = set(), bound.survivors
    monkeypatch.setattr(bound, "survivors", lambda a, b: widths.add(a.shape[1]) or survivors(a, b))
    found = search(queries, candidates, 0, method="projected")
    assert found.method.startswith("projected on 119 ") and widths == {128}  # no wider sieve is asked
    assert found.measured < 0.01 * len(candidates)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["queries", "candidates"])
def test_values_that_are_not_finite_are_refused(value, where):
    rows = {"queries": draw(0, 5, 4), "candidates": draw(1, 5, 4)}
    rows[where][3, 2] = value
    with pytest.raises(ValueError, match=f"{where} of rank 0, row 3"):
        nearest(rows["queries"], rows["candidates"], 0)


@pytest.mark.parametrize(
    ("queries", "candidates", "first", "what"),
    [
        (draw(0, 5, 4), torch.empty(0, 4), 0, "no rank has a candidate"),
        (draw(0, 5, 4), draw(1, 5, 3), 0, "are not rows of 4 values"),
        (draw(0, 5), draw(1, 5, 3), 0, "must be a matrix"),
        (draw(0, 5, 4), draw(1, 5, 4, 2), 0, "are not rows of 4 values"),
        (draw(0, 5, 4).double(), draw(1, 5, 4).double(), 0, "float64, they must be float32"),
        (draw(0, 5, 4).half(), draw(1, 5, 4).half(), 0, "float16, they must be float32"),
        (draw(0, 5, 4), draw(1, 5, 4).double(), 0, "float32 and float64, they must be float32"),
        (draw(0, 5, 4), draw(1, 5, 4), 2**62 - 4, "leave .0, 2..62."),
        (draw(0, 5, 4), draw(1, 5, 4), -1, "leave .0, 2..62."),
        (draw(0, 5, 4), draw(1, 5, 4), 2**80, "leave .0, 2..62."),
        (draw(0, 5, 4), draw(1, 5, 4), "a", "leave .0, 2..62."),
        (draw(0, 5, 4).numpy(), draw(1, 5, 4), 0, "must be torch tensors"),
        (draw(0, 5, 4), draw(1, 5, 4).tolist(), 0, "must be torch tensors"),
        (draw(0, 5, 4), Blocks(rows=-1, make=lambda low, high: draw(1, 5, 4)), 0, "need rows >= 0"),
        (draw(0, 5, 4), Blocks(rows=5, make=lambda low, high: draw(1, 5, 4), size=0), 0, "size >= 1"),
    ],
)
def test_what_does_not_fit_is_refused(queries, candidates, first, what):
    with pytest.raises(ValueError, match=what):
        nearest(queries, candidates, first)


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ({"method": "fast"}, "method of rank 0 is none of auto"),
        ({"neighbours": 0}, "a whole number from 1"),
        ({"neighbours": 2.0}, "a whole number from 1"),
        ({"neighbours": 2**63}, "a whole number from 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(option, what):
    with pytest.raises(ValueError, match=what):
        search(draw(0, 5, 4), draw(1, 5, 4), 0, **option)


def test_the_largest_ids_are_answers_too():
    queries, candidates = draw(0, 5, 4), draw(1, 9, 4)
    assert (nearest(queries, candidates, 2**62 - 9)[1] - (2**62 - 9)).tolist() == oracle(queries, candidates)[1][
        :, 0
    ].tolist()


def test_blocks_that_are_not_what_they_should_be_are_refused():
    def blocks(block):
        return Blocks(rows=20, make=lambda low, high: block[low:high] if low else draw(0, high - low, 4), size=10)

    for block, what in ((draw(0, 20, 3), "row 10"), (draw(0, 20, 4).double(), "row 10"), (draw(0, 15, 4), "row 10")):
        with pytest.raises(ValueError, match=what):
            nearest(draw(0, 5, 4), blocks(block), 0)
    bad = draw(0, 20, 4)
    bad[13, 0] = torch.nan
    with pytest.raises(ValueError, match="candidates of rank 0, row 13"):
        nearest(draw(0, 5, 4), blocks(bad), 0)
    with pytest.raises(ZeroDivisionError):
        nearest(draw(0, 5, 4), Blocks(rows=5, make=lambda low, high: draw(0, 1 // 0, 4)), 0)


@pytest.mark.parametrize("method", METHODS)
def test_settings_that_make_products_coarser_change_nothing(method):
    """As training may set them: the bounds stand on products that are what they say."""
    queries, candidates = CASES["low rank"]
    expected = nearest(queries, candidates, 0, method="flat")
    before = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.set_default_dtype(torch.float64)
        found = nearest(queries.clone().requires_grad_(), candidates.T.contiguous().T, 0, method=method)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.set_default_dtype(before[1])
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("magnitude", [2.8e-23, 3.2e-23, 4.5e-23, 1e-19])
@pytest.mark.parametrize("bulk", [0.0, 1e-16, 1e-9])
def test_squares_that_underflow_prove_nothing(method, magnitude, bulk):
    """The nearest come in the second block, when there are limits already."""
    corners = magnitude * draw(0, 300, 50).sign()
    far, near = (corners + magnitude * share * draw(seed, 300, 50) for seed, share in ((1, 0.2), (2, 0.1)))
    candidates = torch.cat([far, near, bulk * draw(3, 60, 50)]) if bulk else torch.cat([far, near])
    queries = corners + 0.02 * magnitude * draw(4, 300, 50)
    blocks = Blocks(rows=len(candidates), make=lambda low, high: candidates[low:high], size=300)
    _, ids = nearest(queries, blocks, 0, method=method)
    assert ids.tolist() == oracle(queries, candidates)[1][:, 0].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_distances_beyond_the_largest_norms_are_distances(method):
    queries, candidates = 0.5 * draw(0, 1200, 20), 0.5 * draw(1, 1200, 20)
    queries[1, 0], candidates[1, 0], candidates[2, 0] = -3.2e15, 3.2e15, 3.3e15
    skip = torch.tensor([row for row in range(1200) if row not in (1, 2)])
    assert search(queries, candidates, 0, method=method, skip=skip).ids[1].tolist() == [1]


@pytest.mark.parametrize("method", ["projected", "rounded"])
def test_a_pool_that_is_mostly_one_sample_is_not_listed_pair_by_pair(method):
    queries = draw(0, 200, 60)
    candidates = torch.cat([draw(1, 1, 60).repeat(3300, 1) * 0.1, 3 * draw(2, 796, 60)])
    found = search(queries, candidates, 0, method=method)
    assert found.measured < 200 and found.ids[:, 0].tolist() == oracle(queries, candidates)[1][:, 0].tolist()


def test_the_public_names_and_nothing_heavy_are_imported():
    code = """
import inspect, sys
from naign.match import nearest
from naign.philox import normal
assert list(inspect.signature(nearest).parameters)[:4] == ["queries", "candidates", "first_id", "group"]
assert not {"boto3", "deepspeed", "sklearn", "tensorboard", "torchmetrics"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


@pytest.mark.parametrize("dims", [1, 2, 3, 64, 784, 3072])
def test_a_sum_for_a_gpu_depends_on_no_other_row(dims: int) -> None:
    values = torch.rand(50, dims, generator=torch.Generator().manual_seed(dims), dtype=torch.float64)
    whole = halved_sum(values.clone())
    torch.testing.assert_close(whole, values.sum(1))
    for rows in (1, 2, 7, 31):
        assert torch.equal(halved_sum(values[:rows].clone()), whole[:rows])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dims", [64, 784, 3072])
def test_a_distance_on_a_gpu_depends_on_no_other_pair(dims: int) -> None:
    generator, rows = torch.Generator().manual_seed(dims), torch.arange(400).cuda()
    queries, candidates = (torch.randn(400, dims, generator=generator).cuda() for _ in range(2))
    whole = exact_distances(queries, candidates, rows, rows)
    for count in (1, 2, 13, 64):
        assert torch.equal(exact_distances(queries, candidates, rows[:count], rows[:count]), whole[:count])
