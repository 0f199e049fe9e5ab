"""A round's match: generate a pool of samples, and tell every image the id of its nearest one in the whole pool."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.match.latents import check_law
from pipeline.match.nearest import nearest


@dataclass(kw_only=True, slots=True)
class MatchConfig:
    ratio: float = 4.0
    """Samples in the pool for each image of the round."""

    round: int = 2048
    """Images a round, over all ranks."""

    latents: str = "smooth4"
    """Law of the latents: gaussian, smoothG (G x G normals enlarged), mixture (half flat) or fourier (IGN's)."""

    block: int = 512
    """Samples generated at once. The pool is cut into the same blocks on every world size, so samples are the same."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1e6:
            raise InputError(f"match.ratio is {self.ratio}: it must be positive, 1 to 100 is sensible")
        if self.round < 1 or self.block < 1:
            raise InputError(f"match.round={self.round} and match.block={self.block} must be at least 1")
        check_law(self.latents)

    @property
    def pool(self) -> int:
        return max(1, round(self.ratio * self.round))


@dataclass(kw_only=True, slots=True)
class Match:
    ids: Tensor
    """(n,) int64: latent id of the nearest pool sample of each image of this rank."""

    distances: Tensor
    """(n,) float32: squared L2 distance to it."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Time to generate the pool and to search it."""


def match_round(
    images: Tensor,  # (n, *shape) float32: this rank's images of the round
    sample: Callable[[Tensor], Tensor],  # ids (b,) -> samples (b, *shape): f(z) without gradient
    *,
    pool: int,  # samples in the whole pool
    block: int,  # samples generated at once
    rank: int,
    world: int,
) -> Match:
    """Collective. The pool is generated in fixed blocks of ids, dealt to the ranks in contiguous runs."""
    start = time.perf_counter()
    first, last = block_range(pool, block, rank, world)
    candidates = torch.empty(last - first, images[0].numel())
    for low in range(first, last, block):
        high = min(low + block, last)
        candidates[low - first : high - first] = sample(torch.arange(low, high)).flatten(1).float().cpu()
    generated = time.perf_counter()
    distances, ids = nearest(images.flatten(1), candidates, first)
    searched = time.perf_counter()
    return Match(ids=ids, distances=distances, seconds={"generate": generated - start, "search": searched - generated})


def block_range(pool: int, block: int, rank: int, world: int) -> tuple[int, int]:
    """The ids [first, last) of the pool that `rank` generates: whole blocks, as even as they go."""
    blocks = -(-pool // block)
    return min(pool, blocks * rank // world * block), min(pool, blocks * (rank + 1) // world * block)
