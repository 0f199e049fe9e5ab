"""A proof, for most (query, candidate) pairs at once, that the candidate is too far: one low-precision matrix product.

Write a = q - c0 and b = x - c0 for a query q and a candidate x around a common centre c0. Then

    |q - x|^2 = |a|^2 + |b|^2 - 2 a.b

and x can only be as near as sqrt(t) to q if 2 a.b + (t - |a|^2) - |b|^2 >= 0. What follows bounds a.b from above by a
dot product of few, coarse coordinates, so the sign of ONE matrix product A B' decides every pair: negative means proved
too far. Everything else survives and is measured exactly elsewhere.

1. Projection. W has orthonormal columns; split a into W W'a and the rest. By Cauchy-Schwarz on the rest

       a.b <= (W'a).(W'b) + r_a r_b        with r_a = sqrt(|a|^2 - |W'a|^2),

   so y = (W'a, r_a) has |y| = |a| and a.b <= y_a.y_b. Without a basis y = a, and equality holds.
2. What is computed is V'a with a basis V near W (the polar factor of V: |V - W| <= delta = |V'V - I|_F), in float32, in
   chunks of k coordinates, of a float32 difference. With u = 2^-24 and gamma_n = n u / (1 - n u) (Higham, "Accuracy and
   stability of numerical algorithms", 3.1) each coordinate errs by at most gamma_(k + chunks) |V_i| |a|, all p together
   by sqrt(p) times that, so |fl(V'a) - W'a| <= eta |a| with eta = delta + 2u + (1 + delta) sqrt(p) gamma_(k + chunks).
   r_a is rounded so that it stays above the true one. Then a.b <= y_a.y_b + 2 eta (1 + eta) |a||b|.
3. Rounding y to yy in bfloat16, with the error e = |y - yy| measured, not estimated:
   y_a.y_b = yy_a.yy_b + (y_a - yy_a).yy_b + y_a.(y_b - yy_b) <= yy_a.yy_b + e_a (|b| + e_b) + |a| e_b.
4. The product of n coordinates is summed in float32 in an unknown order, so it errs by at most g = gamma_(2n) times the
   sum of the terms' magnitudes (2n: a hardware step may round twice), which is at most
   4 |a|(|b| + e_b) + 1.01 |b|^2 + 1.01 |t - |a|^2|. Rounding the sum to bfloat16 in the end keeps its sign.
5. A product of small numbers underflows by at most 2^-126, d of them by d 2^-126: that much is taken off and added to
   what 2 computes and to the squares. Rows too long for float32 are not screened at all.

The corrections of 2 to 4 are products of a number of the query and a number of the candidate, so they are coordinates:

    A = [2 yy_a | 2 (e_a + kappa |a|) | 2 |a| |          1 1 1         | three parts of t - |a|^2 ]
    B = [  yy_b |     |b| + e_b       |  e_b  | three parts of -|b|^2  |          1 1 1           ]

with kappa = 2 eta (1 + eta) + 2 g, every number rounded up, and squares written as three bfloat16 numbers (24 bits).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

EXTRA = 8
"""Coordinates of A and B beside y: two corrections, twice three parts of a square."""
CHUNK = 512
"""Coordinates that are summed in float32 before the sum is added to the others."""
GROUP = 64
"""Candidates whose signs are looked at together."""
LARGEST = 1e15
"""Scaled norms above this could overflow: such rows are not screened."""

_U = 2.0**-24
_WORKING_SET = 6 << 20  # float32 values treated at once: they stay in the last-level cache
_TILE = 1024  # rows of A a product: it stays in the last-level cache, beside other ranks' tiles
_FEW_GROUPS = 8  # so few groups are always listed
_FEW_ROWS = 16  # one row of so many may always be listed


@dataclass(kw_only=True, slots=True)
class Frame:
    """The coordinates in which rows are bounded."""

    centre: Tensor
    """(d,) float32."""
    basis: Tensor | None
    """(d, p) float32, nearly orthonormal columns; None: all coordinates as they are."""
    scale: float
    """A power of two that brings the data near one, so that nothing overflows."""
    dtype: torch.dtype
    """bfloat16 or float32: of the product."""
    eta: float = 0.0
    """Relative error of the projection, see 2."""

    @property
    def width(self) -> int:
        """Coordinates of A and B."""
        return EXTRA + (len(self.centre) if self.basis is None else self.basis.shape[1] + 1)

    @property
    def slack(self) -> float:
        """g of 4."""
        return gamma(2 * self.width)


@dataclass(kw_only=True, slots=True)
class Projected:
    """Rows in the coordinates of a frame, in units of its scale."""

    values: Tensor
    """(n, p) or (n, d) float32."""
    square: Tensor
    """(n,) float64: |a|^2, nearly."""
    doubt: float
    """Relative error of `square`."""
    underflow: float
    """What products of small numbers can have lost: of a value; times the scale, of `square`."""


@dataclass(kw_only=True, slots=True)
class Quantized:
    """Rows in a frame, in units of its scale."""

    values: Tensor
    """(n, p + 1) or (n, d) of the frame's dtype: yy."""
    error: Tensor
    """(n,) float64 at least |y - yy|."""
    length: Tensor
    """(n,) float64 at least |a| and |y|."""
    square: Tensor
    """(n,) float64 at most |a|^2, nearly equal."""

    @property
    def usable(self) -> bool:
        return not len(self.length) or float(self.length.max()) < LARGEST  # NaN is not below anything


@contextmanager
def full_precision() -> Iterator[None]:
    """Products as the bound assumes them: float32 ones not in TF32 or bfloat16, and bfloat16 ones summed in float32."""
    precision, cuda = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul
    reduced = cuda.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    cuda.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        cuda.allow_bf16_reduced_precision_reduction = reduced


def build_frame(
    centre: Tensor,  # (d,) float32
    basis: Tensor | None,  # (d, p) float32 with nearly orthonormal columns
    magnitude: float,  # largest absolute value of a centred coordinate, roughly
    dtype: torch.dtype,
    departure: float = 0.0,  # of the basis, or of one whose first columns it is
) -> Frame:
    """The frame with its error bound; the basis may be as inexact as it likes, only the bound grows."""
    exponent = torch.frexp(torch.tensor(magnitude, dtype=torch.float64)).exponent if magnitude > 0 else torch.tensor(0)
    scale = 2.0 ** -float(exponent.clamp(-60, 60))  # itself far inside float32
    eta = 2 * _U
    if basis is not None:
        terms = min(len(basis), CHUNK) - (-len(basis) // CHUNK)
        eta += departure + (1 + departure) * basis.shape[1] ** 0.5 * gamma(terms)
    return Frame(centre=centre, basis=basis, scale=scale, dtype=dtype, eta=eta)


def narrowed(frame: Frame, width: int) -> Frame:
    """The frame of the first `width` directions of a basis: its bounds are no wider."""
    assert frame.basis is not None
    return replace(frame, basis=frame.basis[:, :width])


def find_basis(
    rows: Tensor,  # (n, d) float32, centred
    width: int,  # p
) -> Tensor:
    """The leading p principal directions of the rows, (d, at most min(p, d, n)) float32, most variance first.

    By subspace iteration (Halko, Martinsson, Tropp 2011, section 4.5), which is nearly optimal, as any basis is valid;
    then made orthonormal in float64.
    """
    rows = rows / rows.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(rows), min(width, *rows.shape), generator=generator, dtype=rows.dtype).to(rows.device)
    spanned = (rows.T @ torch.linalg.qr(rows @ (rows.T @ start)).Q).double()
    values, turn = torch.linalg.eigh(spanned.T @ spanned)
    kept = values > 1e-12 * values[-1]  # directions that there are at all
    basis = spanned @ (turn[:, kept] * values[kept].rsqrt()).flip(1)
    found: Tensor = basis.float().contiguous()
    return found


def departure(basis: Tensor) -> float:
    """|V'V - I|_F of a basis V (d, p), which bounds its distance to an orthonormal one."""
    wide = basis.double()
    identity = torch.eye(basis.shape[1], dtype=torch.float64, device=basis.device)
    return float(torch.linalg.matrix_norm(wide.T @ wide - identity))


@full_precision()
def encode(rows: Tensor, frame: Frame) -> Quantized:
    """Rows (n, d) float32 as the frame sees them."""
    parts = [quantize(project(part, frame), frame) for part in rows.split(max(1, _WORKING_SET // rows.shape[1]))]
    if len(parts) == 1:
        return parts[0]
    return Quantized(
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in ("values", "error", "length", "square")}
    )


def project(rows: Tensor, frame: Frame) -> Projected:
    """Rows (n, d) float32 in the frame's coordinates, before rounding."""
    centred = rows - frame.centre
    # Each chunk's square errs by gamma_(k + 6) relatively; adding the chunks adds nothing to that.
    squares = [torch.linalg.vector_norm(part, dim=1).double().square() for part in centred.split(CHUNK, 1)]
    if frame.basis is None:
        values = centred
    else:
        seen = centred.new_zeros(frame.basis.shape[1], len(rows))
        for part, basis in zip(centred.split(CHUNK, 1), frame.basis.split(CHUNK), strict=True):
            seen += basis.T @ part.T  # this way round any number of directions is as fast as a round one
        values = seen.T
    return Projected(
        values=values * frame.scale,
        square=torch.stack(squares).sum(0) * frame.scale**2,
        doubt=gamma(min(rows.shape[1], CHUNK) + 8),
        underflow=rows.shape[1] * 2.0**-126 * frame.scale,
    )


def quantize(projected: Projected, frame: Frame) -> Quantized:
    """What was seen, or its first coordinates for a frame of fewer, as numbers of the frame's type."""
    lost_square = projected.underflow * frame.scale
    above = projected.square * (1 + projected.doubt) + lost_square
    length = above.sqrt() * (1 + 4 * frame.eta)
    values = projected.values
    if frame.basis is not None:
        values = values[:, : frame.basis.shape[1]]
        lost_values = projected.underflow * values.shape[1] ** 0.5
        least = (values.double().norm(dim=1) - frame.eta * length - lost_values).clamp(min=0)
        rest = (above - least.square()).clamp(min=0).sqrt() * (1 + 4 * _U)
        values = torch.cat([values, rest.float()[:, None]], 1)
    encoded = values.to(frame.dtype)
    lost = torch.linalg.vector_norm(values - encoded.float(), dim=1).double() * (1 + gamma(values.shape[1] + 2))
    lost += projected.underflow * values.shape[1] ** 0.5
    square = (projected.square * (1 - projected.doubt) - lost_square).clamp(min=0)
    return Quantized(values=encoded, error=lost, length=length, square=square)


def query_factor(encoded: Quantized, frame: Frame) -> Tensor:
    """A: (q, width) for queries, its last three columns still to be set by `limit_columns`."""
    g = frame.slack
    kappa = 2 * frame.eta * (1 + frame.eta) + 2 * g
    one = torch.ones(len(encoded.values), 3, dtype=frame.dtype, device=encoded.values.device)
    corrections = torch.stack([2 * (encoded.error + kappa * encoded.length), 2 * encoded.length], 1)
    return torch.cat([2 * encoded.values, _up(corrections, frame.dtype), one, torch.zeros_like(one)], 1)


def limit_columns(square: Tensor, frame: Frame, limit: Tensor) -> Tensor:
    """The last three columns of A, (q, 3), for t = `limit` (q,) float64 in the data's own units."""
    rest = (limit * frame.scale**2).clamp(max=10 * LARGEST**2) - square  # beyond any distance of rows of that length
    return _parts(rest + 1.01 * frame.slack * rest.abs() + 1e-30, frame.dtype)  # 1e-30: products may underflow


def candidate_factor(encoded: Quantized, frame: Frame) -> Tensor:
    """B: (n, width) for candidates, filled up to a multiple of GROUP with rows that never survive."""
    rest = encoded.square * (1.01 * frame.slack - 1)
    one = torch.ones_like(rest)
    rows = torch.cat(
        [
            encoded.values,
            _up(torch.stack([encoded.length + encoded.error, encoded.error], 1), frame.dtype),
            _parts(rest, frame.dtype),
            torch.stack([one, one, one], 1).to(frame.dtype),
        ],
        dim=1,
    )
    never = rows.new_zeros(-len(rows) % GROUP, rows.shape[1])
    never[:, -6] = -1e30
    return torch.cat([rows, never])


def survivors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs that may be near: (s,) rows of A in ascending order and (s,) rows of B; and (q,) bool: rows of A given up.

    Rows of which nearly every group has a survivor, or one candidate in sixteen is one, are given up and have no pairs,
    unless they are so few that listing all of their survivors costs little. A float's sign is its integer's, so the
    largest integer of a group tells whether any of its candidates survives.
    """
    whole = torch.int16 if a.dtype == torch.bfloat16 else torch.int32
    groups = len(b) // GROUP
    most = max(_FEW_GROUPS, groups * 7 // 8)
    none = torch.empty(0, dtype=torch.int64, device=a.device)
    rows, columns, given_up = [none], [none], [none.bool()]
    tile = a.new_empty(min(_TILE, len(a)), len(b))  # one for all products: fresh memory costs as much as they do
    for start in range(0, len(a), _TILE):
        part = a[start : start + _TILE]
        signs = torch.mm(part, b.T, out=tile[: len(part)]).view(whole).view(-1, groups, GROUP)
        alive = signs.amax(2) >= 0
        heavy = alive.sum(1) > most
        heavy &= heavy.sum() * _FEW_ROWS > len(part)
        row, group = (alive & ~heavy[:, None]).nonzero(as_tuple=True)
        which, member = (signs[row, group] >= 0).nonzero(as_tuple=True)
        row, column = row[which], group[which] * GROUP + member
        over = torch.bincount(row, minlength=len(part)) > max(_FEW_GROUPS * GROUP, len(b) // _FEW_ROWS)
        over &= over.sum() * _FEW_ROWS > len(part)
        if over.any():
            row, column = row[~over[row]], column[~over[row]]
        rows.append(row + start)
        columns.append(column)
        given_up.append(heavy | over)
    return torch.cat(rows), torch.cat(columns), torch.cat(given_up)


def _up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Nonnegative float64 values rounded up, by a little more than need be."""
    return (values * (1 + 2.0**-7)).to(dtype)


def _parts(values: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, 3): numbers of `dtype` whose exact sum is at least `values` (n,) float64 and nearly equal."""
    rest, parts = values + values.abs() * 2.0**-21, []
    for _ in range(3):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].double()
    return torch.stack(parts, 1)


def gamma(terms: int) -> float:
    """Higham's gamma_n for float32."""
    return terms * _U / (1 - terms * _U)
