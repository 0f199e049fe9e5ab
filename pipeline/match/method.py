"""How a round will be searched: a centre, a basis, and the sieve that a few hundred queries say will be the cheapest.

A wrong guess costs time and nothing else, since every method gives the same answer.
"""

import math
import time
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pipeline.match import bound
from pipeline.match.bound import Frame
from pipeline.match.exchange import Ranks
from pipeline.match.index import pairwise

METHODS = ("auto", "flat", "projected", "rounded")
WIDTHS = (55, 119, 183, 247)
"""Projected coordinates that are considered: with those that `screen` adds, multiples of 64."""

_USUAL = 119  # coordinates for who asks for `projected`
_SAMPLE, _SAMPLE_VALUES = (256, 512), 4 << 20  # rows of either side, and float32 values, the basis is found from
_PROBE = 256  # queries that are tried
_SMALL = 1e9  # multiply-adds of a flat search below which preparing anything else cannot pay
_MEDIUM = 1e11  # and below which it had better be brief
_MOST = 1 / 32  # survivors among candidates with which a query is given up where there are many candidates
_SETTLED = 0.3  # of the candidates that survive a probe's limits survive those of a whole search


@dataclass(kw_only=True, slots=True)
class Plan:
    method: str
    """flat, projected or rounded."""
    centre: Tensor
    """(d,) float32: what distances are measured around."""
    basis: Tensor
    """(d, p) float32, nearly orthonormal, of the method `projected`; p = 0 for the others."""
    magnitude: float
    """Largest absolute value around the centre, roughly."""
    departure: float
    """Of the basis from an orthonormal one."""
    dtype: torch.dtype
    """Of the products: bfloat16, or float32."""

    @property
    def described(self) -> str:
        """The method with its parameters, in words."""
        coordinates = self.basis.shape[1] if self.method == "projected" else len(self.centre)
        kind = torch.float32 if self.method == "flat" else self.dtype
        return f"{self.method} on {coordinates} coordinates in {str(kind).removeprefix('torch.')}"

    def frame(self, name: str) -> Frame:
        """The coordinates that the sieve of that name bounds distances in."""
        basis = self.basis if name == "projected" else None
        return bound.build_frame(self.centre, basis, self.magnitude, self.dtype, self.departure)


@bound.full_precision()
def make_plan(
    queries: Tensor,  # (q, d) float32: the round's
    candidates: Tensor,  # (n, d) float32: some of the pool's, n >= 1
    *,
    method: str,  # of METHODS
    expected: int,  # candidates that will be searched
) -> Plan:
    """The plan of a search, at a cost that is small beside it."""
    asked, dims = queries.shape
    work = asked * expected * dims
    rows = _SAMPLE[0] if work < _MEDIUM else min(max(_SAMPLE_VALUES // dims, _SAMPLE[0]), _SAMPLE[1])
    queries, candidates = queries[:: -(-asked // rows) or 1], candidates[:: -(-len(candidates) // rows)]
    centre = candidates.double().mean(0).float()
    around = torch.cat([queries, candidates]) - centre
    if not torch.isfinite(around).all():
        centre = torch.zeros_like(centre)
        around = torch.cat([queries, candidates])
    plan = Plan(
        method=method,
        centre=centre,
        basis=centre.new_zeros(dims, 0),
        magnitude=float(around.abs().max()),
        departure=0.0,
        dtype=fastest_type(queries.device),
    )
    if method == "auto" and work < _SMALL:
        plan.method = "flat"
    if plan.method in ("auto", "projected"):
        plan.basis = bound.find_basis(around, WIDTHS[-1] if method == "auto" and work >= _MEDIUM else _USUAL)
        plan.departure = bound.departure(plan.basis)
    if plan.method == "auto":
        queries, candidates = around[: len(queries)], around[len(queries) :]
        plan.method, width = cheapest(plan, queries, candidates, asked=asked, expected=expected)
        plan.basis = plan.basis[:, :width].contiguous()
    return plan


def share_plan(plan: Plan | None, ranks: Ranks, source: int, like: Tensor) -> Plan:
    """Collective: the plan that rank `source` has, for rows (n, d) as `like`."""
    about, numbers = torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.float64)
    if plan is not None:
        about[:] = torch.tensor([METHODS.index(plan.method), plan.basis.shape[1], plan.dtype == torch.bfloat16])
        numbers[:] = torch.tensor([plan.magnitude, plan.departure], dtype=torch.float64)
    about, numbers = ranks.broadcast(about, source), ranks.broadcast(numbers, source)
    method, width, half = about.tolist()
    magnitude, departure = numbers.tolist()
    dims = like.shape[1]
    return Plan(
        method=METHODS[method],
        centre=ranks.broadcast(plan.centre if plan else like.new_zeros(dims), source),
        basis=ranks.broadcast(plan.basis if plan else like.new_zeros(dims, width), source),
        magnitude=magnitude,
        departure=departure,
        dtype=torch.bfloat16 if half else torch.float32,
    )


def cheapest(
    plan: Plan,  # with a basis as wide as may be
    queries: Tensor,  # (n, d) float32: some of the round's, centred
    candidates: Tensor,  # (n, d) float32: some of the pool's, centred
    *,
    asked: int,  # queries in all
    expected: int,  # candidates in all
) -> tuple[str, int]:
    """`flat`, `rounded` or `projected`, and the coordinates to project to (0: none)."""
    queries = queries[:: max(1, len(queries) // _PROBE)]
    dims, pairs = queries.shape[1], asked * expected
    rates = measure_rates(queries.device, torch.get_num_threads())
    limit = pairwise(queries, candidates).amin(1).double() * (1 + bound.gamma(dims + 4))
    costs = {("flat", 0): pairs * dims * rates.single}
    around = torch.zeros_like(plan.centre)
    for name, widths in (("rounded", [0]), ("projected", [width for width in WIDTHS if width <= plan.basis.shape[1]])):
        frame = bound.build_frame(
            around, plan.basis if name == "projected" else None, plan.magnitude, plan.dtype, plan.departure
        )
        seen, shown = bound.project(queries, frame), bound.project(candidates, frame)
        for width in widths:
            narrow = bound.narrowed(frame, width) if width else frame
            mine, theirs = (bound.quantize(projected, narrow) for projected in (seen, shown))
            a = bound.query_factor(mine, narrow)
            a[:, -3:] = bound.limit_columns(mine.square, narrow, limit)
            rows, _, given_up = bound.survivors(a, bound.candidate_factor(theirs, narrow))
            share = torch.bincount(rows, minlength=len(queries)) / len(candidates)
            given_up |= share > _MOST
            costs[name, width] = (
                (asked + expected) * dims * (width * rates.single + rates.value)
                + pairs * (narrow.width * min(rates.half, rates.single) + rates.sign)
                + pairs * float(share[~given_up].sum()) / len(queries) * _SETTLED * (rates.pair + dims * rates.value)
                + float(given_up.float().mean()) * (costs["rounded", 0] if width else 4 * costs["flat", 0])
            )
    return min(costs, key=lambda choice: costs[choice])


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds on this machine; they decide what is used, never what is answered.

    Those of matrix products are measured, the others are what a processor of 2024 needs, roughly, spread over threads.
    """

    single: float
    """A multiply-add of a float32 matrix product."""
    half: float
    """A multiply-add of a bfloat16 matrix product."""
    sign: float
    """Looking at the sign of a pair."""
    pair: float
    """Listing a pair that survives."""
    value: float
    """Reading a value of a row."""


@lru_cache
def measure_rates(device: torch.device, threads: int) -> Rates:
    """Some milliseconds' work."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(1024, 256, dtype=dtype, device=device), torch.ones(256, 1024, dtype=dtype, device=device)
        best = math.inf
        for _ in range(4):
            start = time.perf_counter()
            float((a @ b)[0, 0])  # waits for the device
            best = min(best, time.perf_counter() - start)
        return best / (1024 * 1024 * 256)

    share = 1e-9 / threads if device.type == "cpu" else 1e-12
    return Rates(
        single=seconds(torch.float32),
        half=seconds(torch.bfloat16),
        sign=0.15 * share,
        pair=100 * share,
        value=0.15 * share,
    )


def fastest_type(device: torch.device) -> torch.dtype:
    """bfloat16 where its products are faster than float32's; a processor without instructions for it is slower."""
    rates = measure_rates(device, torch.get_num_threads())
    return torch.bfloat16 if rates.half < rates.single else torch.float32
