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
WIDTH = 119  # projected coordinates; with the bound's nine, a multiple of 64
SEEDS = 512  # candidates that are searched first, by `flat`, to limit how far the nearest can be
FETCH = 8  # candidates that `flat` asks for beyond the k wanted
_SAMPLE = 256  # rows of either side that centre and basis are found from
_LEAST_ROWS = 512  # candidates bounded at once, at least: else WORKING_SET values
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
        # Errors of a float32 sum of d squared differences: relative, and absolute where squares underflow.
        self._relative = bound.gamma(dims + 4)
        self._absolute = dims * 2.0**-126

    @bound.full_precision()
    def add(self, candidates: Tensor, ids: Tensor) -> None:
        """Search a block: candidates (n, d) float32 finite, ids (n,) int64 ascending."""
        if not len(self.queries):
            return
        candidates = candidates.to(self.queries.device).contiguous()
        ids = ids.to(self.queries.device)
        most = at_once(WORKING_SET, ids)
        step = max(_LEAST_ROWS, most // self.queries.shape[1] // _LEAST_ROWS * _LEAST_ROWS)
        for start in range(0, len(candidates), step):
            if not self._bounded or self.limit.isinf().any():
                everyone = torch.arange(len(self.queries), device=ids.device)
                self._search_flat(candidates[start:], ids[start:], everyone)
                return
            part = slice(start, start + step)
            self._search_bounded(candidates[part], ids[part])

    def _search_bounded(self, candidates: Tensor, ids: Tensor) -> None:
        """Search some of a block by the bound, and by FAISS for the queries that it gives up."""
        if self._sieve is None:
            self._sieve = Sieve(self.queries, choose_frame(self.queries, candidates))
            self.described = f"bounded on {self._sieve.frame}"
        rows, columns, given_up = self._sieve.list_near(candidates, self._reach())
        self._measure(
            candidates,
            ids,
            rows,
            columns,
        )
        left = given_up.nonzero().flatten()
        if len(left):
            self._search_flat(candidates, ids, left)
        if len(left) > len(given_up) / 2:  # no projection separates these data
            self._bounded = False

    def _search_flat(self, candidates: Tensor, ids: Tensor, rows: Tensor) -> None:
        """Search a block for the queries `rows` by FAISS. A candidate that it does not return is no nearer than the
        last one returned, up to rounding: a sum of d + 2 float32 terms errs by at most gamma_(d + 4) times the sum of
        their magnitudes, at most twice the squared norms (Higham, section 3.1).
        """
        count = min(self.neighbours + FETCH, len(candidates))
        centre = candidates.mean(0, dtype=torch.float64).float()
        near = self.queries[rows] - centre
        far = candidates - centre
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
        if count < len(candidates):
            proved &= least[:, -1] > reach
        may_win = (least <= reach[:, None]) & proved[:, None]
        which, place = may_win.nonzero(as_tuple=True)
        self._measure(
            candidates,
            ids,
            rows[which],
            columns[which, place],
        )

        left = rows[~proved]
        everyone = torch.arange(len(candidates), device=rows.device)
        for part in left.split(max(1, _PAIRS["cpu"] // len(everyone))):
            self._measure(
                candidates,
                ids,
                part.repeat_interleave(len(everyone)),
                everyone.repeat(len(part)),
            )

    def _measure(
        self,
        candidates: Tensor,
        ids: Tensor,
        rows: Tensor,
        columns: Tensor,
    ) -> None:
        """Measure pairs (s,) of a query and a candidate, each pair once, and merge them into the kept ones."""
        self.measured += len(rows)
        most = at_once(_PAIRS, rows)
        for some, others in zip(rows.split(most), columns.split(most), strict=True):
            if not rows.is_cuda:
                may_win = self._may_win(candidates, some, others)
                some = some[may_win]
                others = others[may_win]
            if len(some):
                distances = exact_distances(
                    self.queries,
                    candidates,
                    some,
                    others,
                )
                self._keep(some, distances, ids[others])

    def _may_win(self, candidates: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Which pairs can be among the nearest, (s,) bool, by their distances in float32."""
        near = pair_distances(
            self.queries,
            candidates,
            rows,
            columns,
        ).double()
        least = torch.where(near.isinf(), 0.0, near * (1 - self._relative) - self._absolute)  # inf: it overflowed
        if self.neighbours == 1:
            most = near * (1 + self._relative) + self._absolute
            self.limit.scatter_reduce_(
                0,
                rows,
                most,
                "amin",
            )
        return least <= self._reach()[rows]

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
    basis = bound.find_basis(centred, WIDTH)
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
