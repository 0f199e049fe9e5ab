"""The bound that makes a match exact: one low-precision matrix product proves that most candidates are too far.

For a query q, a candidate x and a common centre c0 let a = q - c0 and b = x - c0. Then

    |q - x|^2 = |a|^2 + |b|^2 - 2 a.b

so |q - x|^2 <= t requires 2 a.b + (t - |a|^2) - |b|^2 >= 0. The steps below bound a.b from above by a dot product of
few, coarse coordinates. The sign of ONE matrix product A B' then decides every pair: a negative entry proves that x is
farther than sqrt(t). All other pairs survive, and their distances are computed exactly (`exact.py`).

1. Projection. W has orthonormal columns. Split a into W W'a and the rest, and apply Cauchy-Schwarz to the rests:

       a.b <= (W'a).(W'b) + r_a r_b        with r_a = sqrt(|a|^2 - |W'a|^2).

   With y = (W'a, r_a) this reads a.b <= y_a.y_b, and |y| = |a|.
2. Computed projection. The code computes V'a in float32, in chunks of k coordinates, from a float32 difference a; the
   basis V is only nearly orthonormal. Let W be the polar factor of V, so |V - W| <= delta = |V'V - I|_F. With u = 2^-24
   and gamma_n = n u / (1 - n u) (Higham, "Accuracy and stability of numerical algorithms", 3.1) each coordinate errs by
   at most gamma_(k + chunks) |V_i| |a|, and all p together by sqrt(p) times that. Hence |fl(V'a) - W'a| <= eta |a| with
   eta = delta + 2u + (1 + delta) sqrt(p) gamma_(k + chunks). r_a is rounded so that it stays above its true value. Then
   a.b <= y_a.y_b + 2 eta (1 + eta) |a||b|.
3. Quantization. Let yy be y rounded to bfloat16. The error e = |y - yy| is measured, not estimated:
   y_a.y_b = yy_a.yy_b + (y_a - yy_a).yy_b + y_a.(y_b - yy_b) <= yy_a.yy_b + e_a (|b| + e_b) + |a| e_b.
4. Summation. A product of n coordinates, summed in float32 in any order, errs by at most g = gamma_(2n) times the sum
   of its terms' magnitudes (2n, since hardware may round twice a step). That sum is at most
   4 |a|(|b| + e_b) + 1.01 |b|^2 + 1.01 |t - |a|^2|. Rounding the result to bfloat16 keeps its sign.
5. Range. A product of small numbers underflows by at most 2^-126, and d of them by d 2^-126. That amount is added to
   the errors of step 2 and taken off the squares. Rows too long for float32 are not screened at all.

The corrections of steps 2 to 4, products of a number of the query and one of the candidate, are further coordinates:

    A = [2 yy_a | 2 (e_a + kappa |a|) | 2 |a| |          1 1 1         | three parts of t - |a|^2 ]
    B = [  yy_b |     |b| + e_b       |  e_b  | three parts of -|b|^2  |          1 1 1           ]

with kappa = 2 eta (1 + eta) + 2 g. Every number is rounded up; a square is a sum of three bfloat16 numbers (24 bits).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from naign.match.exact import at_once

EXTRA = 8  # coordinates of A and B beside y: two corrections, and three parts of either square
CHUNK = 512  # coordinates that are summed in float32 before the sum is added to the others
GROUP = 64  # candidates whose signs are tested together
LARGEST = 1e15  # rows whose scaled norm is larger could overflow and are not screened
_U = 2.0**-24
_UP = 1 + 2.0**-7  # times it, a nonnegative float64 is rounded up, by slightly more than necessary
WORKING_SET = {"cpu": 6 << 20, "cuda": 128 << 20}
"""float32 values treated at once: on a CPU to stay in the last-level cache, on a GPU in few launches."""
_TILE = {"cpu": 1024, "cuda": 8192}
"""Rows of A in a product: on a CPU to stay in the last-level cache beside other ranks' tiles."""
_MOST_GROUPS = 7 / 8
_MOST_PAIRS = 1 / 16
"""A query is given up if a larger share of the groups has a survivor, or a larger share of the candidates survives."""
_FEW_GROUPS = 8  # a query with at most so many groups of survivors is not given up
_FEW = 1 / 32  # share of the queries that are not given up in any case


@dataclass(kw_only=True, slots=True)
class Frame:
    """The coordinates in which distances are bounded. Any basis is valid: a worse one only widens the bound."""

    centre: Tensor  # (d,) float32
    basis: Tensor  # (d, p) float32 with nearly orthonormal columns
    magnitude: float  # largest absolute value of a centred coordinate, roughly
    dtype: torch.dtype  # of the product: bfloat16 or float32
    departure: float = field(init=False)  # |V'V - I|_F of the basis V, which bounds its distance to an orthonormal one
    padded: Tensor = field(init=False)  # (d, p + 1): the basis and a column of zeros, in whose place r_a comes

    def __post_init__(self) -> None:
        self.padded = nn.functional.pad(self.basis, (0, 1))
        basis = self.basis.double()
        product = basis.T @ basis
        identity = torch.eye(len(product)).to(product)
        self.departure = float(torch.linalg.matrix_norm(product - identity))

    def __str__(self) -> str:
        return f"{self.coordinates} coordinates in {str(self.dtype).removeprefix('torch.')}"

    @property
    def coordinates(self) -> int:
        return self.basis.shape[1]

    @property
    def scale(self) -> float:
        """A power of two that brings the data near one, well inside float32's range."""
        exponent = math.frexp(self.magnitude)[1]
        return 2.0 ** -min(max(exponent, -60), 60)

    @property
    def eta(self) -> float:
        """Relative error of the projection (step 2)."""
        dims = len(self.basis)
        chunks = math.ceil(dims / CHUNK)
        terms = min(dims, CHUNK) + chunks
        projection = (1 + self.departure) * math.sqrt(self.coordinates) * gamma(terms)
        return 2 * _U + self.departure + projection

    @property
    def slack(self) -> float:
        """The error g of a summation (step 4)."""
        return gamma(2 * (self.coordinates + 1 + EXTRA))


class Quantized(NamedTuple):
    """Rows in the coordinates of a frame, in units of its scale, rounded to its dtype."""

    values: Tensor  # (n, p + 1) of the frame's dtype: yy
    error: Tensor  # (n,) float64: at least |y - yy|
    length: Tensor  # (n,) float64: at least |a| and |y|
    square: Tensor  # (n,) float64: at most |a|^2, and nearly equal

    @property
    def usable(self) -> bool:
        """Whether no row is too long to be screened."""
        return not len(self.length) or float(self.length.max()) < LARGEST  # False for NaN


@contextmanager
def full_precision() -> Iterator[None]:
    """Products as the proof assumes: float32 ones without TF32 or bfloat16, bfloat16 ones summed in float32."""
    precision = torch.get_float32_matmul_precision()
    cuda = torch.backends.cuda.matmul
    reduced = cuda.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    cuda.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        cuda.allow_bf16_reduced_precision_reduction = reduced


def find_basis(rows: Tensor, width: int) -> Tensor:
    """The leading principal directions of centred rows (n, d), (d, at most min(width, d, n)), most variance first: one
    step of subspace iteration (Halko, Martinsson, Tropp 2011, section 4.5), made orthonormal in float64.
    """
    tiny = torch.finfo(torch.float32).tiny
    rows = rows / rows.abs().max().clamp(min=tiny)
    start = torch.randn(
        len(rows),
        min(width, *rows.shape),
        generator=torch.Generator().manual_seed(0),
        dtype=rows.dtype,
    )
    span = rows @ (rows.T @ start.to(rows.device))
    spanned = (rows.T @ torch.linalg.qr(span).Q).double()
    values, turn = torch.linalg.eigh(spanned.T @ spanned)
    kept = values > 1e-12 * values[-1]  # the rows may span fewer directions
    scaled = turn[:, kept] * values[kept].rsqrt()
    basis = spanned @ scaled.flip(1)
    leading: Tensor = basis.float().contiguous()
    return leading


@full_precision()
def encode(rows: Tensor, frame: Frame) -> Quantized:
    """Rows (n, d) float32, projected and quantized."""
    most = max(1, at_once(WORKING_SET, rows) // rows.shape[1])
    parts = [_encode_part(part, frame) for part in rows.split(most)]
    if len(parts) == 1:
        return parts[0]
    return Quantized(*map(torch.cat, zip(*parts, strict=True)))


def _encode_part(rows: Tensor, frame: Frame) -> Quantized:
    """As `encode`, but all rows at once."""
    dims = rows.shape[1]
    centred = rows - frame.centre
    # Each chunk's square errs by gamma_(k + 6) relatively; the sum over the chunks is exact enough in float64.
    square = rows.new_zeros(len(rows), dtype=torch.float64)
    for part in centred.split(CHUNK, 1):
        square += torch.linalg.vector_norm(part, dim=1).double().square()
    square *= frame.scale**2
    relative_error = gamma(min(dims, CHUNK) + 8)
    underflow = dims * 2.0**-126 * frame.scale
    lost_square = underflow * frame.scale
    above = square * (1 + relative_error) + lost_square
    length = above.sqrt() * (1 + 4 * frame.eta)
    values = centred.new_zeros(len(rows), frame.coordinates + 1)  # steps 1 and 2
    chunks = zip(centred.split(CHUNK, 1), frame.padded.split(CHUNK), strict=True)
    for part, basis in chunks:
        values.add_(part @ basis)
    values *= frame.scale
    projection_error = frame.eta * length + underflow * frame.coordinates**0.5
    least = (values.double().norm(dim=1) - projection_error).clamp(min=0)
    rest = (above - least.square()).clamp(min=0).sqrt()
    rest = rest * (1 + 4 * _U)
    values[:, -1] = rest
    width = values.shape[1]
    rounded = values.to(frame.dtype)  # step 3
    error = torch.linalg.vector_norm(values - rounded.float(), dim=1).double()
    error = error * (1 + gamma(width + 2)) + underflow * width**0.5
    square = (square * (1 - relative_error) - lost_square).clamp(min=0)
    return Quantized(
        values=rounded,
        error=error,
        length=length,
        square=square,
    )


class Sieve:
    """The matrix A of queries in a frame, which lists the candidates that may be near to them."""

    def __init__(self, queries: Tensor, frame: Frame) -> None:
        """Queries (q, d) float32, finite."""
        encoded = encode(queries, frame)
        kappa = 2 * frame.eta * (1 + frame.eta) + 2 * frame.slack
        error = encoded.error + kappa * encoded.length
        corrections = torch.stack([error, encoded.length], 1) * (2 * _UP)
        one = encoded.values.new_ones(len(queries), 3)
        self.frame = frame
        self._usable = encoded.usable
        self._square = encoded.square
        # A (q, width); its last three columns depend on the limit.
        self._factor = torch.cat(
            [
                2 * encoded.values,
                corrections.to(frame.dtype),
                one,
                torch.zeros_like(one),
            ],
            1,
        )

    def factor_of(self, candidates: Tensor) -> Tensor | None:
        """B of candidates (n, d); None if a row of them or of the queries is too long to be screened."""
        encoded = encode(candidates, self.frame)
        if not (self._usable and encoded.usable):
            return None
        return candidate_factor(encoded, self.frame)

    def find_promising(
        self,
        factor: Tensor,  # B
        rows: int,  # of candidates, without padding
        count: int,
    ) -> Tensor:
        """The `count` candidates that the bound puts nearest to each query, (q, count) rows."""
        self._factor[:, -3:] = 0
        found = []
        for part in self._factor.split(at_once(_TILE, factor)):
            products = part @ factor[:rows].T
            best = products.max(1, keepdim=True) if count == 1 else products.topk(count, dim=1)
            found.append(best.indices)
        return torch.cat(found)

    def list_near(self, factor: Tensor | None, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which candidates may be within `limit` (q,) float64, a squared distance, of the queries: pairs of rows (s,)
        of queries, ascending, and (s,) of candidates. And (q,) bool: queries that are given up, and have no pairs.
        """
        if factor is None:
            nothing = limit.new_empty(0, dtype=torch.int64)
            return nothing, nothing, torch.ones_like(limit, dtype=torch.bool)
        scaled = (limit * self.frame.scale**2).clamp(max=10 * LARGEST**2)  # no usable rows are that far apart
        rest = scaled - self._square
        rest += 1.01 * self.frame.slack * rest.abs() + 1e-30  # 1e-30: products may underflow
        self._factor[:, -3:] = _split(rest, self.frame.dtype)
        return survivors(self._factor, factor)


def candidate_factor(encoded: Quantized, frame: Frame) -> Tensor:
    """B (n, width) for candidates, padded to a multiple of GROUP with rows that never survive."""
    corrections = torch.stack([encoded.length + encoded.error, encoded.error], 1) * _UP
    rest = _split(encoded.square * (1.01 * frame.slack - 1), frame.dtype)
    rows = torch.cat(
        [
            encoded.values,
            corrections.to(frame.dtype),
            rest,
            torch.ones_like(rest),
        ],
        1,
    )
    never = rows.new_zeros(-len(rows) % GROUP, rows.shape[1])
    never[:, -6] = -1e30
    return torch.cat([rows, never])


def survivors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs whose product is not negative: (s,) rows of A, ascending, and (s,) rows of B. And (q,) bool: rows of A that
    are given up, since nearly every group of rows of B has a survivor, or too many survive; but not if these are few.
    """
    integer = torch.int32
    if a.dtype == torch.bfloat16:
        integer = torch.int16
    groups = len(b) // GROUP
    most_groups = max(_FEW_GROUPS, groups * _MOST_GROUPS)
    most_pairs = max(_FEW_GROUPS, len(b) * _MOST_PAIRS)
    rows = []
    columns = []
    given_up = []
    height = at_once(_TILE, a)
    tile = a.new_empty(min(height, len(a)), len(b))  # reused: fresh memory would cost as much as the product
    for start in range(0, len(a), height):
        part = a[start : start + height]
        # A float has its sign bit in the place of an integer's.
        products = torch.mm(part, b.T, out=tile[: len(part)])
        signs = products.view(integer).view(-1, groups, GROUP)
        alive = signs.amax(2) >= 0
        crowded = alive.sum(1) > most_groups
        crowded &= crowded.sum() > len(part) * _FEW
        row, group = (alive & ~crowded[:, None]).nonzero(as_tuple=True)
        members = signs.flatten(0, 1).index_select(0, row * groups + group)
        which, member = (members >= 0).nonzero(as_tuple=True)
        row = row[which]
        column = group[which] * GROUP + member
        many = torch.bincount(row, minlength=len(part)) > most_pairs
        many &= many.sum() > len(part) * _FEW
        crowded |= many
        listed = ~crowded[row]
        rows.append(row[listed] + start)
        columns.append(column[listed])
        given_up.append(crowded)
    return torch.cat(rows), torch.cat(columns), torch.cat(given_up)


def _split(values: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, 3): numbers of `dtype` whose exact sum is at least `values` (n,) float64 and nearly equal."""
    rest = values + values.abs() * 2.0**-21
    parts = []
    for _ in range(3):
        part = rest.to(dtype)
        parts.append(part)
        rest = rest - part.double()
    return torch.stack(parts, 1)


def gamma(terms: int) -> float:
    """Higham's gamma_n for float32."""
    return terms * _U / (1 - terms * _U)
