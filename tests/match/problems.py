"""Search problems that are chosen to break float32, and the float64 oracle that knows their answers."""

import numpy as np
import torch


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle(queries, candidates, neighbours=1):
    """Distances float64 and rows (q, k) by brute force, in the order (distance, row)."""
    far = candidates.double().numpy()
    exact = np.empty((len(queries), len(far)))
    for row, query in enumerate(queries.double().numpy()):
        exact[row] = np.square(query - far).sum(1)
    order = np.argsort(exact, axis=1, kind="stable")[:, :neighbours]
    return np.take_along_axis(exact, order, 1), order


def low_rank(
    seed,
    queries,
    candidates,
    dims,
    noise=0.05,
):
    """Rows near a plane, as images are: what a projection is for."""
    plane = draw(seed, 6, dims)
    return (
        draw(seed + 1, queries, 6) @ plane + noise * draw(seed + 3, queries, dims),
        draw(seed + 2, candidates, 6) @ plane + noise * draw(seed + 4, candidates, dims),
    )


def scaled(seed, rows, dims):
    """Rows of all scales that float32 has."""
    scales = (20 * draw(seed + 2, rows, 1)).clamp(-40, 37)
    return draw(seed, rows, dims) * 10.0**scales


def family(
    kind,
    seed,
    q,
    c,
    d,
):
    """A problem (queries (q, d), candidates (c, d)) of a kind of FAMILIES."""
    queries = draw(seed, q, d)
    candidates = draw(seed + 1, c, d)
    match kind:
        case "gaussian":
            return queries, candidates
        case "levels":
            return queries.round(), candidates.round()
        case "low rank":
            return low_rank(
                seed,
                q,
                c,
                d,
                noise=0.01,
            )
        case "near-duplicates":
            copies = candidates[: 1 + c // 3].repeat(3, 1)[:c]
            return queries, copies + 1e-7 * draw(seed + 2, c, d)
        case "exact duplicates":
            return queries, candidates[: 1 + c // 4].repeat(4, 1)[:c]
        case "all equal":
            return queries, candidates[:1].repeat(c, 1)
        case "everything equal":
            return torch.full((q, d), 0.3), torch.full((c, d), 0.3)
        case "offset":
            return queries + 100, candidates + 100
        case "huge":
            return queries * 1e37, candidates * 1e37
        case "tiny":
            return queries * 1e-38, candidates * 1e-38
        case "all scales":
            return scaled(seed, q, d), scaled(seed + 1, c, d)
        case "one outlier":
            candidates *= 1e-3
            candidates[-1] *= 1e33
            return queries, candidates
        case "answers among the queries":
            return queries, draw(seed, max(q, c), d)[:c]
        case "zero and minus zero":
            return torch.zeros(q, d), torch.zeros(c, d) * candidates[:, :1]
    raise KeyError(kind)


FAMILIES = (
    "gaussian",
    "levels",
    "low rank",
    "near-duplicates",
    "exact duplicates",
    "all equal",
    "everything equal",
    "offset",
    "huge",
    "tiny",
    "all scales",
    "one outlier",
    "answers among the queries",
    "zero and minus zero",
)

CASES = {
    "random": family("gaussian", 0, 500, 3000, 40),
    "one dimension": family("gaussian", 0, 300, 900, 1),
    "near-duplicates": family("near-duplicates", 3, 200, 650, 64),
    "low rank": low_rank(7, 90, 1500, 784),
    "exact duplicates": family("exact duplicates", 0, 50, 1200, 16),
    "fewer candidates than fetched": family("gaussian", 0, 20, 3, 8),
    "one candidate": family("gaussian", 0, 20, 1, 8),
    "queries among the candidates": family(
        "answers among the queries",
        1,
        100,
        3000,
        40,
    ),
    "wide": family(
        "gaussian",
        0,
        20,
        60,
        12_288,
    ),
    "wide and low rank": low_rank(9, 90, 400, 12_288),
}
"""Fixed problems (queries, candidates)."""
