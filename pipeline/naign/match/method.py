"""How to search a round: the centre, the basis, and the method that a probe of the data predicts to be cheapest.

Every method gives the same answer, so a wrong prediction costs only time.
"""

import timeit
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from naign.match import bound
from naign.match.bound import Frame
from naign.match.distances import faiss_on, pairwise, topk
from naign.match.one_rank import FETCH

METHODS = ("auto", "flat", "indexed", "projected", "rounded")
WIDTHS = (55, 119, 183, 247)  # projected coordinates to choose from: with the bound's nine, multiples of 64
_USUAL = 119  # coordinates of `projected` where nothing is probed
_SAMPLE, _SAMPLE_VALUES = (256, 512), 4 << 20  # rows of either side, and float32 values, that the basis is found from
_PROBE = 256  # queries that are probed
_SMALL = 1e9  # multiply-adds of a flat search below which no preparation can pay
_MEDIUM = 1e11  # multiply-adds below which the preparation is kept short
_MOST = 1 / 32  # share of surviving candidates at which a query of a large search is given up
_COSTS = 0.15, 100, 0.15  # ns to test the sign of a pair, to list a surviving pair, to read a value, on one thread
_WHOLE = 4096  # values of a row up to which a GPU bounds by all of them
_SETTLED = 0.3  # survivors of a whole search for each survivor of the probe, whose limits are wider


@bound.full_precision()
def plan_search(queries: Tensor, candidates: Tensor, *, method: str, expected: int) -> tuple[str, Frame]:
    """The method, one of METHODS but auto, and the coordinates it begins with, at a cost that is small beside it: for
    all `queries` (q, d) and `expected` candidates, of which `candidates` (n >= 1, d) are some; both float32.
    """
    count, dims = queries.shape
    work = count * expected * dims
    rows = _SAMPLE[0] if work < _MEDIUM else min(max(_SAMPLE_VALUES // dims, _SAMPLE[0]), _SAMPLE[1])
    queries, candidates = queries[:: -(-count // rows) or 1], candidates[:: -(-len(candidates) // rows)]
    centre, centred = candidates.double().mean(0).float(), torch.cat([queries, candidates])
    if torch.isfinite(centred - centre).all():
        centred -= centre
    else:
        centre = torch.zeros_like(centre)
    single, half = measure_rates(queries.device, torch.get_num_threads())
    chosen = without_probe(method, work=work, dims=dims, gpu=queries.device.type == "cuda", halves=half < single)
    halves = half < single and chosen != "flat"  # bfloat16 where the hardware multiplies it
    dtype = torch.bfloat16 if halves else torch.float32
    frame = Frame(centre=centre, basis=None, magnitude=float(centred.abs().max()), dtype=dtype)
    if chosen in ("auto", "projected"):
        basis = bound.find_basis(centred, WIDTHS[-1] if chosen == "auto" and work >= _MEDIUM else _USUAL)
        frame = replace(frame, basis=basis, departure=bound.departure(basis))
    if chosen == "auto":
        samples = centred[: len(queries)], centred[len(queries) :]
        chosen, frame = cheapest(frame, *samples, count=count, expected=expected)
    if method == "auto" and chosen == "rounded" and index_is_faster(queries.device, frame.width, frame.dtype):
        chosen = "indexed"
    return chosen, frame


def without_probe(method: str, *, work: float, dims: int, gpu: bool, halves: bool) -> str:
    """The method where no probe is needed to choose it, else `auto`. On a GPU that multiplies bfloat16 faster
    (`halves`) the bound by all values of a row takes less time than a probe, a basis and a projection would.
    """
    if method == "auto" and work < _SMALL:
        return "flat"
    return "rounded" if method == "auto" and gpu and halves and dims <= _WHOLE else method


def cheapest(frame: Frame, queries: Tensor, candidates: Tensor, *, count: int, expected: int) -> tuple[str, Frame]:
    """`flat`, `rounded` or `projected`, and the frame, given with the widest basis, with the best of its widths.
    `queries` and `candidates` (n, d) float32 are centred samples of `count` and `expected` in all.
    """
    assert frame.basis is not None
    queries, threads = queries[:: max(1, len(queries) // _PROBE)], torch.get_num_threads()
    dims, pairs = queries.shape[1], count * expected
    single, half = measure_rates(queries.device, threads)
    sign, pair, value = (cost * (1e-9 / threads if queries.device.type == "cpu" else 1e-12) for cost in _COSTS)
    limit = pairwise(queries, candidates).amin(1).double() * (1 + bound.gamma(dims + 4))
    flat = pairs * dims * single
    choices = [(flat, "flat", replace(frame, basis=None, dtype=torch.float32))]
    for width in (0, *(width for width in WIDTHS if width <= frame.basis.shape[1])):
        narrow = replace(frame, basis=frame.basis[:, :width].contiguous() if width else None)
        probe = replace(narrow, centre=torch.zeros_like(frame.centre))
        near = bound.encode(queries, probe)
        a = bound.query_factor(near, probe)
        a[:, -3:] = bound.limit_columns(near.square, probe, limit)
        rows, _, given_up = bound.survivors(a, bound.candidate_factor(bound.encode(candidates, probe), probe))
        share = torch.bincount(rows, minlength=len(queries)) / len(candidates)
        given_up |= share > _MOST
        cost = (
            (count + expected) * dims * (width * single + value)
            + pairs * (narrow.width * min(half, single) + sign)
            + pairs * float(share[~given_up].sum()) / len(queries) * _SETTLED * (pair + dims * value)
            + float(given_up.float().mean()) * (choices[1][0] if width else 4 * flat)
        )
        choices.append((cost, "projected" if width else "rounded", narrow))
    return min(choices, key=lambda choice: choice[0])[1:]


@lru_cache
def index_is_faster(device: torch.device, width: int, dtype: torch.dtype) -> bool:
    """Whether FAISS lists the largest products on a GPU faster than torch those that are not negative. Milliseconds."""
    if device.type != "cuda" or not faiss_on(device):
        return False
    a = torch.ones(4096, width, dtype=dtype, device=device)
    b = -a  # usual: few products are not negative
    by_faiss = timeit.repeat(lambda: float(topk(a, b, 1 + FETCH)[0][0, 0]), number=1, repeat=4)
    return min(by_faiss) < min(timeit.repeat(lambda: len(bound.survivors(a, b)[0]), number=1, repeat=4))


@lru_cache
def measure_rates(device: torch.device, threads: int) -> tuple[float, float]:
    """Seconds of a multiply-add of a matrix product, in float32 and in bfloat16; takes some milliseconds."""
    rows, inner = (1024, 256) if device.type == "cpu" else (8192, 2048)  # a small one measures a GPU's latency

    def seconds(dtype: torch.dtype) -> float:
        a, b = (torch.ones(shape, dtype=dtype, device=device) for shape in ((rows, inner), (inner, rows)))
        best = min(timeit.repeat(lambda: float((a @ b)[0, 0]), number=1, repeat=4))  # `float` waits for the device
        return best / (rows * rows * inner)

    return seconds(torch.float32), seconds(torch.bfloat16)
