"""One rank's exact search: blocks of candidates are screened, the few that survive measured, the nearest kept.

A block passes through sieves of rising cost, each query only as far as it must:

    projected   the bound of `bound.py` on p principal coordinates, in bfloat16 where the hardware is faster at it
    rounded     the same bound on all coordinates: for data that no projection tells apart
    wide        float64 by matrix product: for near-duplicates, which no float32 tells apart

The method is the first of them; `flat` has instead of the first two a FAISS index, which is asked for some more
candidates than are wanted, and a bound on the rest.

What survives is measured in float32 by differences, what may still win in float64; the kept ones are least by
(distance float64, id). Every sieve keeps all candidates that can be among them, so methods differ in speed alone.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.match import bound
from pipeline.match.bound import Frame, Quantized
from pipeline.match.exact import exact_distances
from pipeline.match.index import flat, pair_distances
from pipeline.match.method import Plan
from pipeline.match.order import NO_ID, first_copies, sort_lexically

_FETCH = 8  # candidates that `flat` asks for beyond the k wanted
SEEDS = 2048  # candidates that the first limits come from
_WIDE_ROWS = 512
_WORKING_SET, _LEAST_ROWS = 6 << 20, 512  # float32 values searched at once stay in the last-level cache
_PAIRS = 1 << 20  # pairs measured at once


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


class Watch:
    """Seconds by name; `with watch(name):` adds to them."""

    def __init__(self, *names: str) -> None:
        self.seconds = dict.fromkeys(names, 0.0)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


class Searcher:
    """The k nearest of all candidates added so far, for each query: `distances` (q, k) float64 and `ids` (q, k) int64.

    Both ascend by (distance, id); infinite and NO_ID where there are fewer than k yet.
    """

    def __init__(
        self,
        queries: Tensor,  # (q, d) float32, finite
        plan: Plan,
        watch: Watch,  # told what the time goes to
        *,
        neighbours: int = 1,  # k
        reject: float | None = None,  # squared L2: candidates nearer than this to any query are left out
        encoded: Quantized | None = None,  # the queries in the frame of the plan's method, if they are there already
    ) -> None:
        self.queries = queries.contiguous()
        self.neighbours, self.reject = neighbours, reject
        shape = (len(queries), neighbours)
        self.distances = torch.full(shape, torch.inf, dtype=torch.float64, device=queries.device)
        self.ids = torch.full(shape, NO_ID, device=queries.device)
        self.limit = self.distances.new_full((len(queries),), torch.inf)
        """(q,) squared L2: no candidate beyond can be of the k nearest. May be lowered to what other ranks know."""
        self.rejected = 0
        self.measured = 0
        """Pairs whose distance was computed by differences, since no bound excluded them."""
        self._plan, self._timed = plan, watch
        self._sieves: dict[str, Sieve] = {}
        if encoded is not None:
            self._sieves[plan.method] = make_sieve(plan.frame(plan.method), encoded)
        self._searched = self._widened = 0
        # float32 sums of d squared differences err by this, relatively and where squares underflow.
        dims = queries.shape[1]
        self._relative, self._absolute = bound.gamma(dims + 4), dims * 2.0**-126

    @property
    def proved(self) -> float:
        """Share of (query, candidate) pairs that needed no wider sieve than the first."""
        return 1 - self._widened / max(1, self._searched)

    @bound.full_precision()
    def seed(self, candidates: Tensor, most: int = SEEDS) -> None:
        """Lower the limits to the distances of those of some candidates that the first sieve likes best.

        Any candidate's distance is a limit, as long as it will be added and not be rejected; `add` keeps it.
        """
        candidates = candidates[:most].to(self.queries.device).contiguous()
        k = self.neighbours
        if self._plan.method == "flat" or len(candidates) < k or not len(self.queries):
            return
        sieve = self._sieve(self._plan.method)
        with self._timed("project"):
            encoded = bound.encode(candidates, sieve.frame)
        if not (sieve.usable and encoded.usable):
            return
        with self._timed("search"):
            b = bound.candidate_factor(encoded, sieve.frame)[: len(candidates)].T
            sieve.a[:, -3:] = 0
            best = torch.cat([(part @ b).topk(k, dim=1).indices for part in sieve.a.split(_WIDE_ROWS)])
        with self._timed("rescore"):
            rows = torch.arange(len(best), device=best.device).repeat_interleave(k)
            near = pair_distances(self.queries, candidates, rows, best.flatten()).double().view(-1, k).amax(1)
            self.limit = torch.minimum(self.limit, near * (1 + self._relative) + self._absolute)

    @bound.full_precision()
    def add(self, candidates: Tensor, ids: Tensor) -> None:
        """Search a block: candidates (n, d) float32 finite, ids (n,) int64 ascending."""
        if len(self.queries):
            candidates, ids = candidates.to(self.queries.device).contiguous(), ids.to(self.queries.device)
            rows = max(_LEAST_ROWS, _WORKING_SET // self.queries.shape[1] // _LEAST_ROWS * _LEAST_ROWS)
            for part, numbers in zip(candidates.split(rows), ids.split(rows), strict=True):
                self._add(part, numbers)

    def _add(self, candidates: Tensor, ids: Tensor) -> None:
        if not len(candidates):
            return
        if self.reject is not None:
            near = self._nearer(candidates, self.reject)
            self.rejected += int(near.sum())
            candidates, ids = candidates[~near], ids[~near]
            if not len(candidates):
                return
        if self._plan.method == "flat":
            self._add_flat(candidates, ids)
            return
        if self.limit.isinf().any():
            self.seed(candidates)
        self._count(len(self.queries) * len(candidates))
        rows = torch.arange(len(self.queries), device=ids.device)
        for name in self._ladder():
            found, columns, rows = self._sift(name, candidates, rows, self.limit)
            self._measure(candidates, ids, found, columns)
            if name == self._plan.method:
                self._count(widened=len(rows) * len(candidates))
        self._widen(candidates, ids, rows)

    def _ladder(self) -> tuple[str, ...]:
        return ("projected", "rounded") if self._plan.method == "projected" else ("rounded",)

    def _sift(self, name: str, candidates: Tensor, rows: Tensor, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of queries `rows` and candidates that can be within `limit` (q,) of each other; and rows given up."""
        none = rows[:0]
        if not len(rows):
            return none, none, rows
        sieve = self._sieve(name)
        with self._timed("project"):
            encoded = bound.encode(candidates, sieve.frame)
        if not (sieve.usable and encoded.usable):
            return none, none, rows
        with self._timed("search"):
            a, square = (sieve.a, sieve.square) if len(rows) == len(sieve.a) else (sieve.a[rows], sieve.square[rows])
            a[:, -3:] = bound.limit_columns(square, sieve.frame, self._reach(limit[rows]))
            found, columns, given_up = bound.survivors(a, bound.candidate_factor(encoded, sieve.frame))
        return rows[found], columns, rows[given_up]

    def _measure(self, candidates: Tensor, ids: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Keep what is nearest of the pairs (rows, columns): in float32 what can be, in float64 what is."""
        self.measured += len(rows)
        with self._timed("rescore"):
            for start in range(0, len(rows), _PAIRS):
                part = slice(start, start + _PAIRS)
                row, column, limit = rows[part], columns[part], self.limit
                near = pair_distances(self.queries, candidates, row, column).double()
                if self.neighbours == 1:
                    most = near * (1 + self._relative) + self._absolute
                    limit = limit.scatter_reduce(0, row, most, "amin")
                may = self._least(near) <= self._reach(limit)[row]
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
        if k > 1:  # a pair may come twice, from a sieve and from the next
            again = (all_rows[order].diff() == 0) & (all_ids[order].diff() == 0) & (all_ids[order][1:] != NO_ID)
            order = torch.cat([order[:1], order[1:][~again]])
        all_rows, all_distances, all_ids = all_rows[order], all_distances[order], all_ids[order]
        first = torch.searchsorted(all_rows, queries)
        best = first[:, None] + torch.arange(k, device=rows.device)  # every query has at least its k old entries
        self.distances[queries], self.ids[queries] = all_distances[best], all_ids[best]
        self.limit[queries] = torch.minimum(self.limit[queries], self.distances[queries, -1])

    def _widen(self, candidates: Tensor, ids: Tensor, rows: Tensor) -> None:
        """Search a block for some queries by float64, which errs by (d + 8) 2^-53 of the squared norms at most."""
        if not len(rows):
            return
        with self._timed("search"):
            first = first_copies(candidates, self.neighbours)  # of equal candidates only the first k can be kept
            b, b_square = self._wide(candidates[first])
        for part in rows.split(_WIDE_ROWS):
            with self._timed("search"):
                distances, error = self._wide_distances(part, b, b_square)
                reach = self._reach(self.limit[part])[:, None]
                if len(first) >= self.neighbours:
                    nearest = (distances + error).topk(self.neighbours, dim=1, largest=False).values[:, -1:]
                    reach = torch.minimum(reach, nearest)
                found, columns = (distances - error <= reach).nonzero(as_tuple=True)
            self.measured += len(found)
            with self._timed("rescore"):
                for some in torch.arange(len(found), device=found.device).split(_PAIRS):
                    self._keep(candidates, ids, part[found[some]], first[columns[some]])

    def _nearer(self, candidates: Tensor, limit: float) -> Tensor:
        """(n,) bool: candidates with a query at a squared distance below `limit`."""
        near = torch.zeros(len(candidates), dtype=torch.bool, device=candidates.device)
        everywhere = self.limit.new_full((len(self.queries),), limit)
        rows = torch.arange(len(self.queries), device=candidates.device)
        for name in self._ladder():
            found, columns, rows = self._sift(name, candidates, rows, everywhere)
            with self._timed("rescore"):
                for start in range(0, len(found), _PAIRS):
                    row, column = found[start : start + _PAIRS], columns[start : start + _PAIRS]
                    distance = pair_distances(self.queries, candidates, row, column).double()
                    near[column[distance * (1 + self._relative) + self._absolute < limit]] = True
                    may = (self._least(distance) < limit) & ~near[column]
                    exact = exact_distances(self.queries, candidates, row[may], column[may])
                    near[column[may][exact < limit]] = True
        if not len(rows):
            return near
        b, b_square = self._wide(candidates)
        for part in rows.split(_WIDE_ROWS):
            distances, error = self._wide_distances(part, b, b_square)
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
        fetch = min(self.neighbours + _FETCH, len(candidates))
        with self._timed("search"):
            near, far = self.queries - self._plan.centre, candidates - self._plan.centre
            approximate, columns = flat(near, far, fetch)
            norms = near.double().square().sum(1) + far.double().square().sum(1).max()
            least = approximate.double() - 4 * bound.gamma(near.shape[1] + 4) * norms[:, None] - 4 * self._absolute
            overflown = (~torch.isfinite(approximate) | (columns < 0)).any(1)
            rows, places = ((least <= self._reach(self.limit)[:, None]) & (columns >= 0)).nonzero(as_tuple=True)
        self._measure(candidates, ids, rows, columns[rows, places])
        self._count(len(self.queries) * len(candidates))
        unproved = overflown
        if fetch < len(candidates):
            unproved = unproved | ~(least[:, -1] > self._reach(self.limit))
        rows = unproved.nonzero().flatten()
        self._count(widened=len(rows) * len(candidates))
        self._widen(candidates, ids, rows)

    def _sieve(self, name: str) -> Sieve:
        """The sieve of that name, made when first asked for."""
        if name not in self._sieves:
            with self._timed("project"):
                frame = self._plan.frame(name)
                self._sieves[name] = make_sieve(frame, bound.encode(self.queries, frame))
        return self._sieves[name]

    def _wide(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows as float64 around the centre, and their squared norms."""
        centred = rows.double() - self._plan.centre.double()
        return centred, centred.square().sum(1)

    def _wide_distances(self, rows: Tensor, b: Tensor, b_square: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances (r, n) float64 of queries `rows` to candidates b, and what they err by at most."""
        a, a_square = self._wide(self.queries[rows])
        squares = a_square[:, None] + b_square
        return squares - 2 * (a @ b.T), 8 * (a.shape[1] + 8) * 2.0**-53 * squares

    def _least(self, near: Tensor) -> Tensor:
        """The least that squared distances can be which float32 takes for `near`; it overflows to infinity."""
        return torch.where(near.isinf(), 0.0, near * (1 - self._relative) - self._absolute)

    def _reach(self, limit: Tensor) -> Tensor:
        """`limit` with the rounding of a float64 sum of d squares, since it is such sums that are compared."""
        return limit * (1 + 4 * (self.queries.shape[1] + 4) * 2.0**-53)

    def _count(self, searched: int = 0, widened: int = 0) -> None:
        self._searched += searched
        self._widened += widened


def make_sieve(frame: Frame, encoded: Quantized) -> Sieve:
    """The sieve of a frame for the queries as it sees them."""
    return Sieve(frame=frame, a=bound.query_factor(encoded, frame), square=encoded.square, usable=encoded.usable)
