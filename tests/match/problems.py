"""Search problems that are chosen to break float32, and the float64 oracle that knows their answers."""

import numpy as np
import torch


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle(queries, candidates, neighbours=1):
    """Distances float64 and rows (q, k) by brute force, in the order (distance, row)."""
    q, c = queries.double().numpy(), candidates.double().numpy()
    step = max(1, 2**22 // max(1, c.size))
    exact = np.concatenate(
        [np.square(q[i : i + step, None] - c[None]).sum(2) for i in range(0, len(q), step)] or [np.empty((0, len(c)))]
    )
    order = np.argsort(exact, axis=1, kind="stable")[:, :neighbours]
    return np.take_along_axis(exact, order, 1), order


def planted(seed, dims, offset=0.0):
    """Candidates with near-duplicates 1e-7 apart, and queries near them."""
    base = draw(seed, 300, dims)
    twins = torch.cat([base, base + 1e-7 * draw(seed + 1, 300, dims), base[:50]]) + offset
    return base[:200] + 0.3 * draw(seed + 2, 200, dims) + offset, twins


def low_rank(seed, dims, rank=6):
    """Rows near a plane, as images are: what a projection is for."""
    plane = draw(seed, rank, dims)
    return tuple(
        draw(seed + 1 + i, n, rank) @ plane + 0.05 * draw(seed + 3 + i, n, dims) for i, n in enumerate((90, 1500))
    )


FAMILIES = {
    "gaussian": lambda seed, q, c, d: (draw(seed, q, d), draw(seed + 1, c, d)),
    "levels": lambda seed, q, c, d: (draw(seed, q, d).round(), draw(seed + 1, c, d).round()),
    "low rank": lambda seed, q, c, d: (
        draw(seed, q, 3) @ draw(seed + 2, 3, d),
        draw(seed + 1, c, 3) @ draw(seed + 2, 3, d) + 0.01 * draw(seed + 3, c, d),
    ),
    "near-duplicates": lambda seed, q, c, d: (
        draw(seed, q, d),
        draw(seed + 1, 1 + c // 3, d).repeat(3, 1)[:c] + 1e-7 * draw(seed + 2, c, d),
    ),
    "exact duplicates": lambda seed, q, c, d: (draw(seed, q, d), draw(seed + 1, 1 + c // 4, d).repeat(4, 1)[:c]),
    "all equal": lambda seed, q, c, d: (draw(seed, q, d), draw(seed + 1, 1, d).repeat(c, 1)),
    "everything equal": lambda seed, q, c, d: (torch.full((q, d), 0.3), torch.full((c, d), 0.3)),
    "offset": lambda seed, q, c, d: (draw(seed, q, d) + 100, draw(seed + 1, c, d) + 100),
    "huge": lambda seed, q, c, d: (draw(seed, q, d) * 1e37, draw(seed + 1, c, d) * 1e37),
    "tiny": lambda seed, q, c, d: (draw(seed, q, d) * 1e-38, draw(seed + 1, c, d) * 1e-38),
    "all scales": lambda seed, q, c, d: (
        draw(seed, q, d) * 10.0 ** (20 * draw(seed + 2, q, 1)).clamp(-40, 37),
        draw(seed + 1, c, d) * 10.0 ** (20 * draw(seed + 3, c, 1)).clamp(-40, 37),
    ),
    "one outlier": lambda seed, q, c, d: (
        draw(seed, q, d),
        torch.cat([draw(seed + 1, c - 1, d) * 1e-3, 1e30 * draw(seed + 3, 1, d)]),
    ),
    "answers among the queries": lambda seed, q, c, d: (draw(seed, q, d), draw(seed, max(q, c), d)[:c]),
    "zero and minus zero": lambda seed, q, c, d: (
        torch.zeros(q, d),
        torch.where(draw(seed, c, 1) > 0, torch.zeros(c, d), -torch.zeros(c, d)),
    ),
}
"""Problems (queries (q, d), candidates (c, d)) by kind: family(seed, q, c, d)."""

CASES = {
    "random": (draw(0, 500, 40), draw(1, 3000, 40)),
    "one dimension": (draw(0, 300, 1), draw(1, 900, 1)),
    "two dimensions": (draw(0, 300, 2), draw(1, 900, 2)),
    "near-duplicates": planted(3, 64),
    "offset 100": planted(4, 64, offset=100.0),
    "low rank": low_rank(7, 784),
    "all candidates equal": (draw(0, 50, 16), draw(1, 1, 16).repeat(700, 1)),
    "exact duplicates": (draw(0, 50, 16), draw(1, 40, 16).repeat(30, 1)),
    "fewer candidates than fetched": (draw(0, 20, 8), draw(1, 3, 8)),
    "one candidate": (draw(0, 20, 8), draw(1, 1, 8)),
    "queries among the candidates": (draw(1, 3000, 40)[:100], draw(1, 3000, 40)),
    "wide": (draw(0, 20, 12_288), draw(1, 60, 12_288)),
    "wide and low rank": tuple(rows[:400] for rows in low_rank(9, 12_288)),
}
"""Fixed problems (queries, candidates)."""
