"""A round's match: generate a pool of samples, and find the one nearest to each image, to which training moves it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from naign.match.exchange import Ranks, ranks_of
from naign.match.index import search
from naign.match.pool import Pool
from naign.settings.constraints import POSITIVE, between


@dataclass(kw_only=True, slots=True)
class MatchConfig:
    ratio: float = field(default=10.0, metadata=between(1e-6, 10**6))
    """Samples in the pool for each image of the round; 1 to 100 is sensible."""
    round: int = field(default=2048, metadata=POSITIVE)
    """Images per round, over all ranks."""
    block: int = field(default=512, metadata=POSITIVE)
    """Samples generated at once. The pool is cut into the same blocks on every world size, so samples are the same."""

    @property
    def pool(self) -> int:
        """Samples in the pool, over all ranks."""
        return max(1, round(self.ratio * self.round))


@dataclass(kw_only=True, slots=True)
class Match:
    ids: Tensor  # (n,) int64: latent id of the sample of each image of this rank
    distances: Tensor  # (n,) float32: squared L2 distance to it, of pixels
    values: dict[str, float]  # metrics over all ranks, the same on each


def match_round(
    images: Tensor,  # (n, *shape) float32: this rank's images of the round
    sample: Callable[[Tensor], Tensor],  # ids (b,) -> samples (b, *shape): f(z) without gradient; called on all ranks
    config: MatchConfig,
    poll: Callable[[], None] = lambda: None,  # called before each block, equally often on every rank; may raise on all
) -> Match:
    """Collective: the sample of the pool that is nearest to each image.

    The pool is generated in fixed blocks of ids, of which each rank has a contiguous range. So the match is the same on
    every world size that has the same images in the same order. An exception of `poll` ends the match at once.
    """
    ranks = ranks_of(None)
    queries = images.float().flatten(1)
    counts = ranks.collect(len(images))
    pool = Pool(
        size=config.pool,
        block=config.block,
        sample=sample,
        poll=poll,
        dims=queries.shape[1],
        ranks=ranks,
    )
    result = search(queries, pool.blocks(), pool.first)
    distances = result.distances[:, 0].cpu()
    ids = result.ids[:, 0].cpu()
    values = summarize(distances, ids, counts, ranks)
    values["match/measured"] = max(ranks.collect(result.measured))
    return Match(
        ids=ids,
        distances=distances.float(),
        values=values,
    )


def summarize(distances: Tensor, ids: Tensor, counts: list[int], ranks: Ranks) -> dict[str, float]:
    """Collective: mean and quantiles of a match's squared distances, and how many images share a sample."""
    pairs = ranks.gather(torch.stack([distances.view(torch.int64), ids], dim=1), counts)
    everyone = pairs[:, 0].view(torch.float64).numpy()
    chosen = pairs[:, 1].unique(return_counts=True)[1]
    values = {"match/distance": float(everyone.mean())}
    for percent in (10, 50, 90):
        values[f"match/distance_p{percent}"] = float(np.quantile(everyone, percent / 100))
    values["match/used"] = len(chosen) / len(pairs)
    values["match/top_share"] = int(chosen.max()) / len(pairs)
    return values
