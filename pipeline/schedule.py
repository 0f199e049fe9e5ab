"""Which images of a round a rank fits in which step: pure functions of (seed, round, world size, rank)."""

import numpy as np
import torch
from torch import Tensor


def pass_order(count: int, *key: int) -> Tensor:
    """A permutation (count,) that depends on the arguments alone: it sorts raw draws, which NumPy never changes."""
    return torch.from_numpy(np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(count), kind="stable"))


def steps_of(
    seed: int,
    round: int,
    *,
    size: int,  # images of the round
    batch: int,  # images a step, over all ranks
    passes: int,
    rank: int,
    world: int,
    began: int,  # the world size that began the round: as a rule this one
) -> Tensor:
    """The rows of the round (steps, batch / world) int64 that `rank` fits in each step.

    Every pass has each image of the round once, over all ranks. A rank fits its own contiguous share of the round, in
    an order of its own; in a round that another world size began every step keeps its images, which are dealt anew.
    """
    share = size // began
    ranks = [rank] if began == world else range(began)
    passed = [
        torch.stack([other * share + pass_order(share, seed, round, turn, other) for other in ranks])
        for turn in range(passes)
    ]
    steps = torch.cat([rows.view(len(ranks), -1, batch // began).transpose(0, 1).flatten(1) for rows in passed])
    return steps if began == world else steps.view(len(steps), world, -1)[:, rank]
