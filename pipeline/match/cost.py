"""Which sieve will be the cheapest: measured on a few hundred queries of the round, priced at this machine's rates.

A wrong guess costs time and nothing else, since every method gives the same answer.
"""

import math
import time
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pipeline.match import screen

WIDTHS = (55, 119, 183, 247)
"""Projected coordinates that are considered: with those that `screen` adds, multiples of 64."""

_PROBE = 256  # queries that are tried
_SETTLED = 0.3  # of the candidates that survive a probe's limits survive those of a whole search


def cheapest(
    queries: Tensor,  # (n, d) float32: some of the round's, centred
    candidates: Tensor,  # (n, d) float32: some of the pool's, centred
    basis: Tensor,  # (d, p) float32: principal directions, most variance first
    departure: float,  # of the basis from an orthonormal one
    *,
    asked: int,  # queries in all
    expected: int,  # candidates in all
) -> tuple[str, int]:
    """`flat`, `rounded` or `projected`, and the coordinates to project to (0: none)."""
    queries = queries[:: max(1, len(queries) // _PROBE)]
    dims, pairs = queries.shape[1], asked * expected
    rates = measure_rates(queries.device, torch.get_num_threads())
    magnitude = max(float(queries.abs().max()), float(candidates.abs().max()))
    limit = pairwise(queries, candidates).amin(1).double() * (1 + screen.gamma(dims + 4))
    costs = {("flat", 0): pairs * dims * rates.single}
    for width in (0, *(width for width in WIDTHS if width <= basis.shape[1])):
        frame = screen.build_frame(
            torch.zeros_like(queries[0]),
            basis[:, :width].contiguous() if width else None,
            magnitude,
            fastest_type(queries.device),
            departure,
        )
        seen = screen.coarsen(queries, frame)
        a = screen.left(seen, frame)
        a[:, -3:] = screen.limit_columns(seen.square, frame, limit)
        found, _, given_up = screen.survivors(a, screen.right(screen.coarsen(candidates, frame), frame))
        share = (len(found) + int(given_up.sum()) * len(candidates)) / (len(queries) * len(candidates))
        costs["projected" if width else "rounded", width] = (
            (asked + expected) * dims * (width * rates.single + rates.value)
            + pairs * (frame.width * min(rates.half, rates.single) + rates.sign)
            + pairs * share * _SETTLED * (rates.pair + dims * rates.value)
        )
    return min(costs, key=lambda choice: costs[choice])


def pairwise(queries: Tensor, candidates: Tensor) -> Tensor:
    """Squared L2 (q, n) float32, by a matrix product: roughly."""
    squares = queries.square().sum(1)[:, None] + candidates.square().sum(1)
    return (squares - 2 * (queries @ candidates.T)).clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds, by measurement: they decide what is used, never what is answered."""

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
        pair=40 * share,
        value=0.1 * share,
    )


def fastest_type(device: torch.device) -> torch.dtype:
    """bfloat16 where its products are faster than float32's; a processor without instructions for it is slower."""
    rates = measure_rates(device, torch.get_num_threads())
    return torch.bfloat16 if rates.half < rates.single else torch.float32
