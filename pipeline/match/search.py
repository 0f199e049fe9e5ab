"""One rank's exact search: blocks of candidates are screened, the few that survive measured, the nearest kept.

A block passes through one to three sieves of rising cost, each query only as far as it must:

    projected   the bound of `screen.py` on p principal coordinates, in bfloat16 where the hardware is faster at it
    rounded     the same bound on all coordinates: for data that no projection tells apart
    wide        float64 by matrix product: for near-duplicates, which no float32 tells apart
    flat        instead of the first two: a FAISS index, some more candidates than asked for, and a bound on the rest

What survives is measured in float32 by differences, what may still win in float64; the kept ones are least by
(distance float64, id). Every sieve keeps all candidates that can be among them, so methods differ in speed alone.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pipeline.match import screen
from pipeline.match.index import exact_distances, flat, pair_distances
from pipeline.match.screen import Frame

METHODS = ("auto", "flat", "projected", "rounded")
WIDTHS = (55, 119, 183, 247)
"""Projected coordinates that `auto` considers: with those that `screen` adds, multiples of 64."""
NO_ID = torch.iinfo(torch.int64).max

_SAMPLE = 1024  # rows of either side that the basis is found from
_PROBE = 256  # queries that the probe looks at
_FETCH = 8  # candidates that `flat` asks for beyond the k wanted
_SEEDS = 2048  # candidates of the first block that the first limits come from
_SMALL = 1e9  # multiply-adds of a flat search below which preparing anything else cannot pay
_WIDE_ROWS = 512
_PAIRS = 1 << 20  # pairs measured at once
_SETTLED = 0.3  # of the candidates that survive a probe's limits survive those of a whole search


@dataclass(kw_only=True, slots=True)
class Sieve:
    """A screen and the queries as it sees them."""

    frame: Frame
    a: Tensor
    """(q, width): the queries' side of the product."""
    square: Tensor
    """(q,) float64: their squared norms."""
    usable: bool
    """False where they are too large for the arithmetic."""


class Searcher:
    """The k nearest of all candidates added so far, for each query: `distances` (q, k) float64 and `ids` (q, k) int64.

    Both ascend by (distance, id); infinite and NO_ID where there are fewer than k yet.
    """

    def __init__(
        self,
        queries: Tensor,  # (q, d) float32, finite
        *,
        neighbours: int = 1,  # k
        method: str = "auto",  # of METHODS
        reject: float | None = None,  # squared L2: candidates nearer than this to any query are left out
        expected: int = 0,  # candidates that will be added in all, roughly: what preparing may cost depends on it
    ) -> None:
        self.queries = queries.contiguous()
        self.neighbours, self.method, self.reject, self.expected = neighbours, method, reject, expected
        shape = (len(queries), neighbours)
        self.distances = torch.full(shape, torch.inf, dtype=torch.float64, device=queries.device)
        self.ids = torch.full(shape, NO_ID, device=queries.device)
        self.rejected = 0
        self.seconds = dict.fromkeys(("project", "search", "rescore"), 0.0)
        self._limit = self.distances.new_full((len(queries),), torch.inf)  # no candidate beyond can be of the k nearest
        self._centre: Tensor | None = None
        self._basis: Tensor | None = None
        self._departure = 0.0
        self._magnitude = 0.0
        self._sieves: dict[str, Sieve] = {}
        self._searched = self._widened = 0
        # float32 sums of d squared differences err by this, relatively and where squares underflow.
        dims = queries.shape[1]
        self._relative, self._absolute = screen.gamma(dims + 4), dims * 2.0**-126

    @property
    def proved(self) -> float:
        """Share of (query, candidate) pairs that the first sieve decided."""
        return 1 - self._widened / max(1, self._searched)

    @property
    def described(self) -> str:
        """The method with its parameters."""
        sieve = self._sieves.get(self.method)
        if sieve is None:
            return self.method
        coordinates = len(sieve.frame.centre) if sieve.frame.basis is None else sieve.frame.basis.shape[1]
        return f"{self.method} on {coordinates} coordinates in {str(sieve.frame.dtype).removeprefix('torch.')}"

    def add(self, candidates: Tensor, ids: Tensor) -> None:
        """Search a block: candidates (n, d) float32 finite, ids (n,) int64 ascending."""
        candidates, ids = candidates.to(self.queries.device).contiguous(), ids.to(self.queries.device)
        if not len(candidates) or not len(self.queries):
            return
        if self._centre is None:
            with self._timed("project"):
                self._prepare(candidates)
        if self.reject is not None:
            near = self._nearer(candidates, self.reject)
            self.rejected += int(near.sum())
            candidates, ids = candidates[~near], ids[~near]
            if not len(candidates):
                return
        if self.method == "flat":
            self._add_flat(candidates, ids)
            return
        self._seed(candidates)
        self._count(len(self.queries) * len(candidates))
        rows = torch.arange(len(self.queries), device=ids.device)
        for name in self._ladder():
            found, columns, rows = self._sift(name, candidates, rows, self._limit)
            self._measure(candidates, ids, found, columns)
            if name == self.method:
                self._count(widened=len(rows) * len(candidates))
        self._widen(candidates, ids, rows)

    def _ladder(self) -> tuple[str, ...]:
        return ("projected", "rounded") if self.method == "projected" else ("rounded",)

    def _sift(self, name: str, candidates: Tensor, rows: Tensor, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of queries `rows` and candidates that can be within `limit` (q,) of each other; and the rows given up."""
        none = rows[:0]
        if not len(rows):
            return none, none, rows
        sieve = self._sieve(name)
        with self._timed("project"):
            coarse = screen.coarsen(candidates, sieve.frame)
        if not (sieve.usable and coarse.usable):
            return none, none, rows
        with self._timed("search"):
            a, square = (sieve.a, sieve.square) if len(rows) == len(sieve.a) else (sieve.a[rows], sieve.square[rows])
            a[:, -3:] = screen.limit_columns(square, sieve.frame, self._reach(limit[rows]))
            found, columns, given_up = screen.survivors(a, screen.right(coarse, sieve.frame))
        return rows[found], columns, rows[given_up]

    def _measure(self, candidates: Tensor, ids: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Keep what is nearest of the pairs (rows, columns): in float32 what can be, in float64 what is."""
        with self._timed("rescore"):
            for start in range(0, len(rows), _PAIRS):
                part = slice(start, start + _PAIRS)
                row, column, limit = rows[part], columns[part], self._limit
                near = pair_distances(self.queries, candidates, row, column).double()
                if self.neighbours == 1:
                    most = near * (1 + self._relative) + self._absolute
                    limit = limit.scatter_reduce(0, row, most, "amin")
                may = ~(near * (1 - self._relative) - self._absolute > self._reach(limit)[row])  # NaN may
                self._keep(candidates, ids, row[may], column[may])

    def _keep(self, candidates: Tensor, ids: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Merge pairs, measured exactly, into what is kept."""
        if not len(rows):
            return
        distances = exact_distances(self.queries, candidates, rows, columns)
        queries = rows.unique()
        k = self.neighbours
        all_rows = torch.cat([queries.repeat_interleave(k), rows])
        all_distances = torch.cat([self.distances[queries].flatten(), distances])
        all_ids = torch.cat([self.ids[queries].flatten(), ids[columns]])
        order = sort_lexically(all_rows, all_distances, all_ids)
        all_rows, all_distances, all_ids = all_rows[order], all_distances[order], all_ids[order]
        first = torch.searchsorted(all_rows, queries)
        best = first[:, None] + torch.arange(k, device=rows.device)  # every query has at least its k old entries
        self.distances[queries], self.ids[queries] = all_distances[best], all_ids[best]
        self._limit[queries] = torch.minimum(self._limit[queries], self.distances[queries, -1])

    def _widen(self, candidates: Tensor, ids: Tensor, rows: Tensor) -> None:
        """Search a block for some queries by float64, whose rounding is bounded by (d + 8) 2^-53 of the squared norms."""
        if not len(rows):
            return
        with self._timed("search"):
            first = first_copies(candidates, self.neighbours)  # of equal candidates only the first k can be kept
            b, b_square = self._wide(candidates[first])
        for part in rows.split(_WIDE_ROWS):
            with self._timed("search"):
                a, a_square = self._wide(self.queries[part])
                error = self._wide_error(a_square, b_square)
                distances = a_square[:, None] + b_square - 2 * (a @ b.T)
                reach = self._reach(self._limit[part])[:, None]
                if len(first) >= self.neighbours:
                    nearest = (distances + error).topk(self.neighbours, dim=1, largest=False).values[:, -1:]
                    reach = torch.minimum(reach, nearest)
                found, columns = (distances - error <= reach).nonzero(as_tuple=True)
            with self._timed("rescore"):
                for some in torch.arange(len(found), device=found.device).split(_PAIRS):
                    self._keep(candidates, ids, part[found[some]], first[columns[some]])

    def _nearer(self, candidates: Tensor, limit: float) -> Tensor:
        """(n,) bool: candidates with a query at a squared distance below `limit`."""
        near = torch.zeros(len(candidates), dtype=torch.bool, device=candidates.device)
        everywhere = self._limit.new_full((len(self.queries),), limit)
        rows = torch.arange(len(self.queries), device=candidates.device)
        for name in self._ladder():
            found, columns, rows = self._sift(name, candidates, rows, everywhere)
            with self._timed("rescore"):
                for start in range(0, len(found), _PAIRS):
                    row, column = found[start : start + _PAIRS], columns[start : start + _PAIRS]
                    distance = pair_distances(self.queries, candidates, row, column).double()
                    near[column[distance * (1 + self._relative) + self._absolute < limit]] = True
                    may = ~(distance * (1 - self._relative) - self._absolute >= limit) & ~near[column]
                    exact = exact_distances(self.queries, candidates, row[may], column[may])
                    near[column[may][exact < limit]] = True
        if not len(rows):
            return near
        b, b_square = self._wide(candidates)
        for part in rows.split(_WIDE_ROWS):
            a, a_square = self._wide(self.queries[part])
            error = self._wide_error(a_square, b_square)
            distances = a_square[:, None] + b_square - 2 * (a @ b.T)
            near |= (distances + error < limit).any(0)
            found, columns = ((distances - error < limit) & ~near).nonzero(as_tuple=True)
            for some in torch.arange(len(found), device=found.device).split(_PAIRS):
                column = columns[some]
                near[column[exact_distances(self.queries, candidates, part[found[some]], column) < limit]] = True
        return near

    def _add_flat(self, candidates: Tensor, ids: Tensor) -> None:
        """A FAISS index of the block; what it did not return is no nearer than the last it did, up to its rounding.

        Its sums of d + 2 float32 terms err by at most gamma_(d + 4) times the sum of their magnitudes, which twice the
        squared norms bounds (Higham, 3.1).
        """
        assert self._centre is not None
        fetch = min(self.neighbours + _FETCH, len(candidates))
        with self._timed("search"):
            near, far = self.queries - self._centre, candidates - self._centre
            approximate, columns = flat(near, far, fetch)
            norms = near.double().square().sum(1) + far.double().square().sum(1).max()
            least = approximate.double() - 4 * screen.gamma(near.shape[1] + 4) * norms[:, None] - self._absolute
            rows, places = ((least <= self._reach(self._limit)[:, None]) & (columns >= 0)).nonzero(as_tuple=True)
        self._measure(candidates, ids, rows, columns[rows, places])
        self._count(len(self.queries) * len(candidates))
        if fetch < len(candidates):
            unproved = (~(least[:, -1] > self._reach(self._limit))).nonzero().flatten()
            self._count(widened=len(unproved) * len(candidates))
            self._widen(candidates, ids, unproved)

    def _seed(self, candidates: Tensor) -> None:
        """First limits: the distances of those candidates that the first sieve likes best, whatever they are."""
        rows = self._limit.isinf().nonzero().flatten()
        sieve = self._sieve(self._ladder()[0])
        candidates = candidates[:_SEEDS]
        if not len(rows) or len(candidates) < self.neighbours or not sieve.usable:
            return
        with self._timed("project"):
            coarse = screen.coarsen(candidates, sieve.frame)
        if not coarse.usable:
            return
        with self._timed("search"):
            b = screen.right(coarse, sieve.frame)[: len(candidates)].T
            a = sieve.a
            a[:, -3:] = 0
            best = torch.cat([(part @ b).topk(self.neighbours, dim=1).indices for part in a.split(_WIDE_ROWS)])[rows]
        with self._timed("rescore"):
            near = pair_distances(self.queries, candidates, rows.repeat_interleave(self.neighbours), best.flatten())
            most = near.double().view(-1, self.neighbours).amax(1) * (1 + self._relative) + self._absolute
            self._limit[rows] = torch.minimum(self._limit[rows], most.nan_to_num(nan=torch.inf))

    def _prepare(self, candidates: Tensor) -> None:
        """Centre, basis and method, from the round's queries and the first block."""
        queries = self.queries[:: max(1, len(self.queries) // _SAMPLE)]
        candidates = candidates[:: max(1, len(candidates) // _SAMPLE)]
        self._centre = candidates.double().mean(0).float()
        around = torch.cat([queries, candidates]) - self._centre
        if not torch.isfinite(around).all():
            self._centre = torch.zeros_like(self._centre)
            around = torch.cat([queries, candidates])
        self._magnitude = float(around.abs().max())
        dims = self.queries.shape[1]
        if self.method == "auto" and len(self.queries) * max(len(candidates), self.expected) * dims < _SMALL:
            self.method = "flat"
        if self.method in ("auto", "projected"):
            self._basis = screen.find_basis(around, max(WIDTHS))
            self._departure = screen.departure(self._basis)
        if self.method == "auto":
            self._choose(around[: len(queries)], around[len(queries) :])
        elif self.method == "projected":
            self._basis = self._basis[:, : WIDTHS[1]]

    def _choose(self, queries: Tensor, candidates: Tensor) -> None:
        """The method, and the basis' width, that a search of a few hundred queries says will be the cheapest."""
        queries = queries[:: max(1, len(queries) // _PROBE)]
        count, dims, expected = len(self.queries), self.queries.shape[1], max(self.expected, len(candidates))
        rates = measure_rates(queries.device, torch.get_num_threads())
        limit = (pairwise(queries, candidates).amin(1) * (1 + self._relative)).double()
        costs = {("flat", 0): count * expected * dims * rates.single}
        nothing = torch.zeros_like(self._centre)
        for width in (0, *WIDTHS):
            if width and width >= self._basis.shape[1]:
                continue
            frame = screen.build_frame(
                nothing,
                self._basis[:, :width] if width else None,
                self._magnitude,
                fastest_type(queries.device),
                self._departure,
            )
            seen = screen.coarsen(queries, frame)
            a = screen.left(seen, frame)
            a[:, -3:] = screen.limit_columns(seen.square, frame, limit)
            found, _, given_up = screen.survivors(a, screen.right(screen.coarsen(candidates, frame), frame))
            share = (len(found) + int(given_up.sum()) * len(candidates)) / (len(queries) * len(candidates))
            costs["projected" if width else "rounded", width] = (
                (count + expected) * dims * (width * rates.single + rates.value)
                + count
                * expected
                * (frame.width * (rates.half if frame.dtype == torch.bfloat16 else rates.single) + rates.sign)
                + count * expected * share * _SETTLED * (rates.pair + dims * rates.value)
            )
        self.method, width = min(costs, key=lambda choice: costs[choice])
        self._basis = self._basis[:, :width] if width else None

    def _sieve(self, name: str) -> Sieve:
        """The sieve of that name, made when first asked for."""
        if name not in self._sieves:
            assert self._centre is not None
            with self._timed("project"):
                basis = self._basis if name == "projected" else None
                frame = screen.build_frame(
                    self._centre, basis, self._magnitude, fastest_type(self.queries.device), self._departure
                )
                coarse = screen.coarsen(self.queries, frame)
                self._sieves[name] = Sieve(
                    frame=frame, a=screen.left(coarse, frame), square=coarse.square, usable=coarse.usable
                )
        return self._sieves[name]

    def _wide(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows as float64 around the centre, and their squared norms."""
        assert self._centre is not None
        centred = rows.double() - self._centre.double()
        return centred, centred.square().sum(1)

    def _wide_error(self, a_square: Tensor, b_square: Tensor) -> Tensor:
        return 8 * (self.queries.shape[1] + 8) * 2.0**-53 * (a_square[:, None] + b_square)

    def _reach(self, limit: Tensor) -> Tensor:
        """`limit` with the rounding of a float64 sum of d squares, since it is such sums that are compared."""
        return limit * (1 + 4 * (self.queries.shape[1] + 4) * 2.0**-53)

    def _count(self, searched: int = 0, widened: int = 0) -> None:
        self._searched += searched
        self._widened += widened

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


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


def pairwise(queries: Tensor, candidates: Tensor) -> Tensor:
    """Squared L2 (q, n) float32, by a matrix product: roughly."""
    squares = queries.square().sum(1)[:, None] + candidates.square().sum(1)
    return (squares - 2 * (queries @ candidates.T)).clamp(min=0)


def sort_lexically(*keys: Tensor) -> Tensor:
    """The order (n,) of rows sorted by the first key, then the second, and so on."""
    order = torch.arange(len(keys[0]), device=keys[0].device)
    for key in reversed(keys):
        order = order[torch.sort(key[order], stable=True).indices]
    return order


def keep_least(distances: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` by (distance, id) of each query's answers from several ranks, (world, q, k) each."""
    if len(distances) == 1:
        return distances[0], ids[0]
    distances, ids = distances.transpose(0, 1).flatten(1), ids.transpose(0, 1).flatten(1)
    for key in (ids, distances):  # the least important key first
        order = torch.sort(key, dim=1, stable=True).indices[:, : key.shape[1]]
        distances, ids = distances.gather(1, order), ids.gather(1, order)
    return distances[:, :count].contiguous(), ids[:, :count].contiguous()


def first_copies(rows: Tensor, count: int) -> Tensor:
    """Rows (n, d) that have fewer than `count` equal ones before them, ascending."""
    raw = rows.cpu().numpy()
    kind = np.unique(raw.view(np.dtype((np.void, raw.dtype.itemsize * raw.shape[1]))).ravel(), return_inverse=True)[1]
    order = np.argsort(kind, kind="stable")
    place = np.arange(len(kind)) - np.searchsorted(kind[order], kind[order])
    return torch.from_numpy(np.sort(order[place < count])).to(rows.device)
