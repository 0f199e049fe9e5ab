"""One rank's exact search: blocks of candidates are screened, survivors measured, and the nearest kept.

Each query of a block passes through sieves of rising cost until one settles it:

    projected   the bound of `bound.py` on p principal coordinates, in bfloat16 where the hardware is faster at it
    rounded     the same bound on all coordinates, for data that no projection separates
    wide        float64 by matrix product, for near-duplicates, which float32 cannot separate

A search begins with the sieve that its method names. The method `indexed` is `rounded`, but a FAISS index first lists
the few candidates that the bound excludes least. The method `flat` uses, instead of the first two, a FAISS index that
returns a few more than k candidates, and a bound on all others.

Survivors are measured in float32 by differences. Those that may still win are measured in float64, and the first by
(distance, id) are kept. No sieve drops a candidate that could be among them, so methods differ only in speed.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from naign.match import bound
from naign.match.bound import Frame, Quantized
from naign.match.distances import NO_ID, exact_distances, first_copies, flat, pair_distances, sort_lexically, topk

SEEDS = 2048  # candidates that the first limits come from
FETCH = 8  # candidates that `flat` and `indexed` ask for beyond the k wanted
_WIDE_ROWS = 512  # queries in a float64 product
_LEAST_ROWS = 512
_WORKING_SET = {"cpu": 6 << 20, "cuda": 128 << 20}
"""float32 values searched at once, but _LEAST_ROWS candidates at least: on a CPU to stay in the last-level cache."""
_PAIRS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Pairs measured at once."""


class Sieve(NamedTuple):
    frame: Frame
    a: Tensor  # (q, width): the queries' factor of the product
    square: Tensor  # (q,) float64: the queries' squared norms
    usable: bool  # False where the queries are too long to be screened


class Searcher:
    """The k nearest of all candidates added so far, for each query: `distances` (q, k) float64 and `ids` (q, k) int64.
    Both ascend by (distance, id), and are infinite and NO_ID where there are fewer than k yet.
    """

    def __init__(
        self, queries: Tensor, frame: Frame, encoded: Quantized | None, *, neighbours: int, index: bool
    ) -> None:
        """Queries (q, d) float32, finite, and `encoded` in a frame; None: the method is `flat`. With a basis the first
        sieve is `projected`, else `rounded`. With `index` FAISS goes through the first sieve before torch does.
        """
        self.queries, self.neighbours = queries.contiguous(), neighbours
        shape, device = (len(queries), neighbours), queries.device
        self.distances = torch.full(shape, torch.inf, dtype=torch.float64, device=device)
        self.ids = torch.full(shape, NO_ID, device=device)
        self.limit = self.distances.new_full((len(queries),), torch.inf)
        """(q,) squared L2 beyond which no candidate is among the k nearest. Callers may lower it."""
        self.measured = 0  # pairs that no bound excluded
        self._frame = frame
        self._sieves = [_build_sieve(frame, encoded)] * (1 + index) if encoded else []
        self._index = index
        # Errors of a float32 sum of d squared differences: relative, and absolute where squares underflow.
        dims = queries.shape[1]
        self._relative, self._absolute = bound.gamma(dims + 4), dims * 2.0**-126

    @bound.full_precision()
    def seed(self, candidates: Tensor, most: int = SEEDS) -> None:
        """Lower the limits to the distances of the candidates that score best in the first sieve; `add` adds them."""
        candidates, k = candidates[:most].to(self.queries.device).contiguous(), self.neighbours
        if not self._sieves or len(candidates) < k or not len(self.queries):
            return
        sieve = self._sieves[0]
        if (b := _screen(sieve, candidates)) is None:
            return
        sieve.a[:, -3:] = 0
        best = torch.cat([(part @ b[: len(candidates)].T).topk(k, dim=1).indices for part in sieve.a.split(_WIDE_ROWS)])
        rows = torch.arange(len(best), device=best.device).repeat_interleave(k)
        _, most_distant = self._interval(candidates, rows, best.flatten())
        self.limit = torch.minimum(self.limit, most_distant.view(-1, k).amax(1))

    @bound.full_precision()
    def add(self, candidates: Tensor, ids: Tensor) -> None:
        """Search a block: candidates (n, d) float32 finite, ids (n,) int64 ascending."""
        if not len(self.queries) or not len(candidates):
            return
        candidates, ids = candidates.to(self.queries.device).contiguous(), ids.to(self.queries.device)
        most = _WORKING_SET.get(self.queries.device.type, _WORKING_SET["cpu"])
        step = max(_LEAST_ROWS, most // self.queries.shape[1] // _LEAST_ROWS * _LEAST_ROWS)
        for part, numbers in zip(candidates.split(step), ids.split(step), strict=True):
            rows = self._sift(part, numbers) if self._sieves else self._add_flat(part, numbers)
            self._add_wide(part, numbers, rows)

    def _sift(self, candidates: Tensor, ids: Tensor) -> Tensor:
        """Search a block by the sieves, and return the queries that all of them give up."""
        if self.limit.isinf().any():
            self.seed(candidates)
        rows = torch.arange(len(self.queries), device=ids.device)
        for number in range(2 if self._index or self._frame.basis is not None else 1):
            if number == len(self._sieves):  # `rounded` after `projected`, made when it is first needed
                whole = replace(self._frame, basis=None)
                self._sieves.append(_build_sieve(whole, bound.encode(self.queries, whole)))
            sieve = self._sieves[number]
            if (b := _screen(sieve, candidates)) is not None:
                a = sieve.a if len(rows) == len(sieve.a) else sieve.a[rows]
                a[:, -3:] = bound.limit_columns(sieve.square[rows], sieve.frame, self._reach(self.limit[rows]))
                find = self._from_index if self._index and number == 0 else bound.survivors
                surviving, columns, given_up = find(a, b)
                self._measure(candidates, ids, rows[surviving], columns)
                rows = rows[given_up]
            if not len(rows):
                break
        return rows

    def _from_index(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `bound.survivors`, from the k + FETCH largest products of each row of A. A row is given up, with these
        listed, if none of them is negative: there may be more.
        """
        products, columns = topk(a, b, self.neighbours + FETCH)
        rows, places = (products >= 0).nonzero(as_tuple=True)
        return rows, columns[rows, places], (products[:, -1] >= 0) & (products.shape[1] < len(b))

    def _measure(self, candidates: Tensor, ids: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Measure the pairs (rows, columns) in float32, and in float64 those that may still win."""
        self.measured += len(rows)
        for row, column in _portions(rows, columns):
            least, most = self._interval(candidates, row, column)
            limit = self.limit.scatter_reduce(0, row, most, "amin") if self.neighbours == 1 else self.limit
            may = least <= self._reach(limit)[row]
            self._keep(candidates, ids, row[may], column[may])

    def _keep(self, candidates: Tensor, ids: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Measure pairs in float64 and merge them into the kept ones."""
        if not len(rows):
            return
        distances = exact_distances(self.queries, candidates, rows, columns)
        queries, k = rows.unique(), self.neighbours
        all_rows = torch.cat([queries.repeat_interleave(k), rows])
        all_distances = torch.cat([self.distances[queries].flatten(), distances])
        all_ids = torch.cat([self.ids[queries].flatten(), ids[columns]])
        order = sort_lexically(all_rows, all_distances, all_ids)
        if k > 1:  # two sieves may list the same pair
            again = (all_rows[order].diff() == 0) & (all_ids[order].diff() == 0) & (all_ids[order][1:] != NO_ID)
            order = torch.cat([order[:1], order[1:][~again]])
        all_rows, all_distances, all_ids = all_rows[order], all_distances[order], all_ids[order]
        # Each query has at least its k old entries.
        best = torch.searchsorted(all_rows, queries)[:, None] + torch.arange(k, device=rows.device)
        self.distances[queries], self.ids[queries] = all_distances[best], all_ids[best]
        self.limit[queries] = torch.minimum(self.limit[queries], self.distances[queries, -1])

    def _add_flat(self, candidates: Tensor, ids: Tensor) -> Tensor:
        """Search a block by FAISS, and return the queries whose answer that does not prove. A candidate that it did not
        return is no nearer than the last one returned, up to rounding: a sum of d + 2 float32 terms errs by at most
        gamma_(d + 4) times the sum of their magnitudes, at most twice the squared norms (Higham, section 3.1).
        """
        fetch = min(self.neighbours + FETCH, len(candidates))
        near, far = self.queries - self._frame.centre, candidates - self._frame.centre
        approximate, columns = flat(near, far, fetch)
        norms = near.double().square().sum(1) + far.double().square().sum(1).max()
        least = approximate.double() - 4 * self._relative * norms[:, None] - 4 * self._absolute
        unproved = (~torch.isfinite(approximate) | (columns < 0)).any(1)
        rows, places = ((least <= self._reach(self.limit)[:, None]) & (columns >= 0)).nonzero(as_tuple=True)
        self._measure(candidates, ids, rows, columns[rows, places])
        if fetch < len(candidates):
            unproved |= ~(least[:, -1] > self._reach(self.limit))
        return unproved.nonzero().flatten()

    def _add_wide(self, candidates: Tensor, ids: Tensor, rows: Tensor) -> None:
        """Search a block for some of the queries by float64 products."""
        if not len(rows):
            return
        first = first_copies(candidates, self.neighbours)  # of equal candidates only the first k can be kept
        far, far_square = self._centred(candidates[first])
        for part in rows.split(_WIDE_ROWS):
            near, near_square = self._centred(self.queries[part])
            squares = near_square[:, None] + far_square
            distances = squares - 2 * (near @ far.T)
            error = 8 * (near.shape[1] + 8) * 2.0**-53 * squares  # that of the products is at most an eighth of it
            reach = self._reach(self.limit[part])[:, None]
            if len(first) >= self.neighbours:
                nearest = (distances + error).topk(self.neighbours, dim=1, largest=False).values[:, -1:]
                reach = torch.minimum(reach, nearest)
            places, columns = (distances - error <= reach).nonzero(as_tuple=True)
            self.measured += len(places)
            for row, column in _portions(part[places], first[columns]):
                self._keep(candidates, ids, row, column)

    def _interval(self, candidates: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the most, (s,) float64 each, that the squared distances of pairs can be, by float32."""
        near = pair_distances(self.queries, candidates, rows, columns).double()
        least = torch.where(near.isinf(), 0.0, near * (1 - self._relative) - self._absolute)  # inf: it overflowed
        return least, near * (1 + self._relative) + self._absolute

    def _centred(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in float64 around the centre, and their squared norms."""
        centred = rows.double() - self._frame.centre.double()
        return centred, centred.square().sum(1)

    def _reach(self, limit: Tensor) -> Tensor:
        """`limit` plus the rounding of a float64 sum of d squares, since such sums are compared."""
        return limit * (1 + 4 * (self.queries.shape[1] + 4) * 2.0**-53)


def _build_sieve(frame: Frame, queries: Quantized) -> Sieve:
    return Sieve(frame, bound.query_factor(queries, frame), queries.square, queries.usable)


def _screen(sieve: Sieve, candidates: Tensor) -> Tensor | None:
    """The candidates' factor of a sieve's product; None where they or the queries are too long for it."""
    encoded = bound.encode(candidates, sieve.frame)
    return bound.candidate_factor(encoded, sieve.frame) if sieve.usable and encoded.usable else None


def _portions(rows: Tensor, columns: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs in portions of at most _PAIRS."""
    most = _PAIRS.get(rows.device.type, _PAIRS["cpu"])
    return zip(rows.split(most), columns.split(most), strict=True)
