"""The exact search of one rank: blocks of candidates are screened, survivors measured, and the nearest kept.

There are two methods. They differ in speed alone, since neither drops a candidate that could be among the nearest:

    bounded   The bound of `bound.py` excludes most candidates by a product of few coordinates, in bfloat16 where the
              processor is faster at it. Queries for which it excludes too few are searched by `flat`.
    flat      FAISS returns a few more than k candidates, and a bound excludes all others. Queries for which it does not
              (near-duplicates, for example, which float32 cannot separate) are compared with every candidate.

What is not excluded is measured in float64 by differences, and the first by (distance, id) are kept.
"""

import torch
from torch import Tensor

from naign.match import bound
from naign.match.bound import WORKING_SET, Frame, Sieve
from naign.match.exact import (
    NO_ID,
    at_once,
    exact_distances,
    pair_distances,
    propose,
    sort_lexically,
)

METHODS = ("auto", "flat", "bounded")
LEAST_CANDIDATES = 2048  # of a rank
LEAST_DIMS = 256
"""From these on `bounded` pays for the conversion of each row, for however few queries. Measured with up to 16,384
rows of 32 to 3,072 values it is 1.4 to 3 times as fast as `flat`, and below up to 3 times as slow."""
WIDTH = 87  # projected coordinates; with the bound's nine, a multiple of 32
WIDTH_OF_MANY_DIMS = 119  # from MANY_DIMS on, where measuring a survivor costs more than a wider product
MANY_DIMS = 2048
FETCH = 8  # candidates that `flat` asks for beyond the k wanted
_SAMPLE = 768  # rows of either side that centre and basis are found from
_MOST_ROWS = {"cpu": 4096, "cuda": 1 << 20}
"""Candidates bounded at once, at most: else WORKING_SET values."""
_PAIRS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Pairs measured at once."""


class Scan:
    """The k nearest of all candidates added so far, for each query: `distances` (q, k) float64 and `ids` (q, k) int64.
    Both ascend by (distance, id), and are infinite and NO_ID where there are fewer than k yet.
    """

    def __init__(
        self,
        queries: Tensor,
        *,
        neighbours: int,
        method: str,
        expected: int,
    ) -> None:
        """Queries (q, d) float32, finite; a method of METHODS, and how many candidates will be added in all."""
        count, dims = queries.shape
        self.queries = queries.contiguous()
        self.neighbours = neighbours
        self.distances = queries.new_full(
            (count, neighbours),
            torch.inf,
            dtype=torch.float64,
        )
        self.ids = torch.full((count, neighbours), NO_ID, device=queries.device)
        self.limit = self.distances.new_full((count,), torch.inf)
        """(q,) squared L2 beyond which no candidate is among the k nearest. Callers may lower it."""
        self.measured = 0  # pairs that no bound excluded
        self.described = "flat"
        self._bounded = method == "bounded"
        if method == "auto":
            self._bounded = expected >= LEAST_CANDIDATES and dims >= LEAST_DIMS
        self._sieve: Sieve | None = None
        self._seeded: Tensor | None = None  # what `seed` computed of its candidates
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, columns and least distances of pairs
        rows = at_once(WORKING_SET, queries) // dims
        self._step = max(1, min(rows, at_once(_MOST_ROWS, queries)))
        # Errors of a float32 sum of d squared differences: relative, and absolute where squares underflow.
        self._relative = bound.gamma(dims + 4)
        self._absolute = dims * 2.0**-126

    @bound.full_precision()
    def seed(self, candidates: Tensor) -> None:
        """Lower the limits by the candidates (n, d) that the bound puts nearest, k for each query: one product, and q k
        measured pairs. Without it the first candidates that are added would survive in great numbers. They must be
        the first of those that are added next.
        """
        candidates = candidates[: self._step].to(self.queries.device).contiguous()
        if not self._bounded or not len(self.queries) or len(candidates) < self.neighbours:
            return
        sieve = self._make_sieve(candidates)
        self._seeded = sieve.factor_of(candidates)
        if self._seeded is None:
            return
        columns = sieve.find_promising(self._seeded, len(candidates), self.neighbours)
        rows = torch.arange(len(columns), device=columns.device)
        _, most = self._bracket(
            candidates,
            rows.repeat_interleave(self.neighbours),
            columns.flatten(),
        )
        farthest = most.view(columns.shape).amax(1)
        self.limit = torch.minimum(self.limit, farthest)

    @bound.full_precision()
    def add(self, candidates: Tensor, ids: Tensor) -> None:
        """Search a block: candidates (n, d) float32 finite, ids (n,) int64 ascending."""
        if not len(self.queries):
            return
        candidates = candidates.to(self.queries.device).contiguous()
        ids = ids.to(self.queries.device)
        seeded = self._seeded
        self._seeded = None
        for start in range(0, len(candidates), self._step):
            if not self._bounded or self.limit.isinf().any():
                everyone = torch.arange(len(self.queries), device=ids.device)
                part = slice(start, len(candidates))
                self._search_flat(candidates, ids, part, everyone)
                break
            part = slice(start, start + self._step)
            self._search_bounded(
                candidates,
                ids,
                part,
                seeded if start == 0 else None,
            )
        self.settle(candidates, ids)

    def _search_bounded(
        self,
        candidates: Tensor,
        ids: Tensor,
        part: slice,
        factor: Tensor | None,  # of this part, if it is known
    ) -> None:
        """Search a part of a block by the bound, and by FAISS for the queries that it gives up."""
        sieve = self._make_sieve(candidates)
        if factor is None:
            factor = sieve.factor_of(candidates[part])
        self.described = f"bounded on {sieve.frame}"
        rows, columns, given_up = sieve.list_near(factor, self._reach())
        self.measure(
            candidates,
            ids,
            rows,
            columns + part.start,
        )
        left = given_up.nonzero().flatten()
        if len(left):
            self._search_flat(candidates, ids, part, left)
        if len(left) > len(given_up) / 2:  # no projection separates these data
            self._bounded = False

    def _make_sieve(self, candidates: Tensor) -> Sieve:
        """The sieve, made at the first call."""
        if self._sieve is None:
            frame = choose_frame(self.queries, candidates[: self._step])
            self._sieve = Sieve(self.queries, frame)
        return self._sieve

    def _search_flat(self, candidates: Tensor, ids: Tensor, part: slice, rows: Tensor) -> None:
        """Search a part of a block for the queries `rows` by FAISS. A candidate that it does not return is no nearer
        than the last one returned, up to rounding: a sum of d + 2 float32 terms errs by at most gamma_(d + 4) times the
        sum of their magnitudes, at most twice the squared norms (Higham, section 3.1).
        """
        searched = candidates[part]
        count = min(self.neighbours + FETCH, len(searched))
        centre = searched.mean(0, dtype=torch.float64).float()
        near = self.queries[rows] - centre
        far = searched - centre
        proposed, columns = propose(near, far, count)
        finite = torch.isfinite(proposed) & (columns >= 0)
        proved = finite.all(1)
        near_square = near.norm(dim=1).double().square()
        far_square = far.norm(dim=1).double().square().max()
        error = 4 * self._relative * (near_square + far_square) + 4 * self._absolute
        proposed = proposed.double()
        if count >= self.neighbours:
            most = proposed[:, self.neighbours - 1] + error
            most = torch.where(proved, most, torch.inf)
            self.limit[rows] = torch.minimum(self.limit[rows], most)
        reach = self._reach()[rows]
        least = proposed - error[:, None]
        if count < len(searched):
            proved &= least[:, -1] > reach
        may_win = (least <= reach[:, None]) & proved[:, None]
        which, place = may_win.nonzero(as_tuple=True)
        self.measure(
            candidates,
            ids,
            rows[which],
            columns[which, place] + part.start,
        )

        left = rows[~proved]
        everyone = torch.arange(part.start, part.start + len(searched), device=rows.device)
        for some in left.split(max(1, _PAIRS["cpu"] // len(everyone))):
            self.measure(
                candidates,
                ids,
                some.repeat_interleave(len(everyone)),
                everyone.repeat(len(some)),
            )

    def measure(
        self,
        candidates: Tensor,
        ids: Tensor,
        rows: Tensor,
        columns: Tensor,
    ) -> None:
        """Measure pairs (s,) of a query and a candidate of a block, each pair once: in float32 now, and those that can
        still be among the nearest in float64 when the block is settled.
        """
        self.measured += len(rows)
        at_most = at_once(_PAIRS, rows)
        for some, others in zip(rows.split(at_most), columns.split(at_most), strict=True):
            least, most = self._bracket(candidates, some, others)
            if self.neighbours == 1:  # of several only their float64 distances lower the limit
                self.limit.scatter_reduce_(
                    0,
                    some,
                    most,
                    "amin",
                )
            may_win = least <= self._reach()[some]
            self._waiting.append((some[may_win], others[may_win], least[may_win]))
            waiting = sum(len(pairs[0]) for pairs in self._waiting)
            if self.neighbours > 1 or waiting >= at_most:
                self.settle(candidates, ids)

    def _bracket(self, candidates: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """What the distances of pairs are at least and at most, (s,) float64 each, by their distances in float32."""
        if rows.is_cuda:
            distances = exact_distances(
                self.queries,
                candidates,
                rows,
                columns,
            )
            return distances, distances
        near = pair_distances(
            self.queries,
            candidates,
            rows,
            columns,
        ).double()
        least = torch.where(near.isinf(), 0.0, near * (1 - self._relative) - self._absolute)  # inf: it overflowed
        most = near * (1 + self._relative) + self._absolute
        return least, most

    def settle(self, candidates: Tensor, ids: Tensor) -> None:
        """Measure the waiting pairs in float64 and merge them into the kept ones."""
        if not self._waiting:
            return
        rows, columns, least = map(torch.cat, zip(*self._waiting, strict=True))
        self._waiting.clear()
        may_win = least <= self._reach()[rows]
        rows = rows[may_win]
        columns = columns[may_win]
        if len(rows):
            distances = exact_distances(
                self.queries,
                candidates,
                rows,
                columns,
            )
            self._keep(rows, distances, ids[columns])

    def _keep(self, rows: Tensor, distances: Tensor, ids: Tensor) -> None:
        """Merge measured pairs into the k nearest of their queries."""
        queries = rows.unique()
        all_rows = torch.cat([queries.repeat_interleave(self.neighbours), rows])
        all_distances = torch.cat([self.distances[queries].flatten(), distances])
        all_ids = torch.cat([self.ids[queries].flatten(), ids])
        order = sort_lexically(all_rows, all_distances, all_ids)
        # Each query has at least its k old entries.
        first = torch.searchsorted(all_rows[order], queries)
        places = torch.arange(self.neighbours, device=rows.device)
        best = order[first[:, None] + places]
        self.distances[queries] = all_distances[best]
        self.ids[queries] = all_ids[best]
        self.limit[queries] = torch.minimum(self.limit[queries], self.distances[queries, -1])

    def _reach(self) -> Tensor:
        """`limit` plus the rounding of a float64 sum of d squares, since such sums are compared."""
        return self.limit * (1 + 4 * (self.queries.shape[1] + 4) * 2.0**-53)


def choose_frame(queries: Tensor, candidates: Tensor) -> Frame:
    """The coordinates of the bound, from samples of the queries and the candidates."""
    queries = queries[:: -(-len(queries) // _SAMPLE)]
    candidates = candidates[:: -(-len(candidates) // _SAMPLE)]
    rows = torch.cat([queries, candidates])
    centre = candidates.mean(0, dtype=torch.float64).float()
    if not torch.isfinite(rows - centre).all():
        centre = torch.zeros_like(centre)
    centred = rows - centre
    width = WIDTH_OF_MANY_DIMS if len(centre) >= MANY_DIMS else WIDTH
    basis = bound.find_basis(centred, width)
    return Frame(
        centre=centre,
        basis=basis,
        magnitude=float(centred.abs().max()),
        dtype=product_type(queries.device),
    )


def product_type(device: torch.device) -> torch.dtype:
    """The type in which the device multiplies matrices fastest."""
    from naign.distributed.connect import choose_precision  # imports Accelerate, which takes a second

    if choose_precision(on_cpu=device.type != "cuda") == "bf16":
        return torch.bfloat16
    return torch.float32
