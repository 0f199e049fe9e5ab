"""A round's match: generate a pool of samples, and assign to every image the sample that training moves towards it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from naign.errors import InputError
from naign.match.assign import assign_once
from naign.match.exchange import Ranks, ranks_of
from naign.match.index import Blocks, SearchResult, search
from naign.match.pool import Pool
from naign.match.scan import METHODS
from naign.settings.constraints import FREE, POSITIVE, SHARE, between, one_of

PROBE = 1024  # first samples of the pool, in whole blocks, of which `reject_share` is the share to reject


@dataclass(kw_only=True, slots=True)
class MatchConfig:
    ratio: float = field(default=1.0, metadata=between(1e-6, 10**6))
    """Samples in the pool for each image of the round; 1 to 100 is sensible."""
    round: int = field(default=2048, metadata=POSITIVE)
    """Images per round, over all ranks."""
    assignment: str = field(default="free", metadata=one_of(("free", "one_to_one")))
    """free: each image's nearest sample, which others may share; one_to_one: nearest pairs first, each sample once."""
    reject_share: float = field(default=0.0, metadata=SHARE)
    """Share of the pool to reject: its samples nearest to any image are not matched. RS-IMLE (arXiv 2409.17439), whose
    distance epsilon is set anew each round."""
    block: int = field(default=512, metadata=POSITIVE)
    """Samples generated at once. The pool is cut into the same blocks on every world size, so samples are the same."""
    method: str = field(default="auto", metadata=FREE | one_of(METHODS))
    """How to search: flat (by FAISS), bounded, or auto, which chooses the faster one. The match is the same."""

    def check(self) -> None:
        """Raise InputError for settings that contradict each other."""
        if self.assignment == "free":
            return
        if self.reject_share:
            raise InputError(f"match.reject_share needs match.assignment=free, not {self.assignment}")
        if self.pool < self.round:
            few = f"match.ratio={self.ratio} makes {self.pool} for {self.round} images: use --match.ratio=1 or more"
            raise InputError(f"match.assignment={self.assignment} gives no two images one sample, and {few}")

    @property
    def pool(self) -> int:
        """Samples in the pool, over all ranks."""
        return max(1, round(self.ratio * self.round))


@dataclass(kw_only=True, slots=True)
class Match:
    ids: Tensor  # (n,) int64: latent id of the sample of each image of this rank
    distances: Tensor  # (n,) float32: squared L2 distance to it, of pixels
    described: str = ""  # how it was searched, for a log
    values: dict[str, float] = field(default_factory=dict)  # metrics over all ranks, the same on each


def match_round(
    images: Tensor,  # (n, *shape) float32: this rank's images of the round
    sample: Callable[[Tensor], Tensor],  # ids (b,) -> samples (b, *shape): f(z) without gradient; called on all ranks
    config: MatchConfig,
    poll: Callable[[], None] = lambda: None,  # called before each block, equally often on every rank; may raise on all
) -> Match:
    """Collective: the sample of the pool that each image is matched to.

    The pool is generated in fixed blocks of ids, of which each rank has a contiguous range. So the match is the same on
    every world size that has the same images in the same order. An exception of `poll` ends the match at once.
    """
    start = time.perf_counter()
    ranks = ranks_of(None)
    queries = images.float().flatten(1)
    counts = ranks.collect(len(images))
    once = config.assignment == "one_to_one"
    pool = Pool(
        size=config.pool,
        block=config.block,
        sample=sample,
        poll=poll,
        dims=queries.shape[1],
        ranks=ranks,
        keep=once or config.reject_share > 0,
    )
    blocks = pool.blocks()
    values = {"match/rejected": 0.0}
    searches = list[SearchResult]()

    def find(rows: Tensor, neighbours: int, assigned: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances and ids, (len(rows), neighbours) each, of the nearest samples of some images."""
        blocks.skip = assigned
        result = search(
            queries[rows],
            blocks,
            pool.first,
            method=config.method,
            neighbours=neighbours,
        )
        searches.append(result)
        return result.distances.cpu(), result.ids.cpu()

    if once:
        distances, ids = assign_once(find, ranks, counts)
    else:
        rejected = torch.empty(0, dtype=torch.int64)
        if config.reject_share:
            near = nearest_images(
                blocks,
                queries,
                sum(counts[: ranks.rank]),
                config,
                ranks,
                searches,
            )
            least = rejection_distance(near, config)
            rejected = (near < least).nonzero().flatten()
            values = {
                "match/rejected": len(rejected) / config.pool,
                "match/reject": math.sqrt(least),
            }
        near_distances, near_ids = find(torch.arange(len(queries)), 1, rejected)
        distances = near_distances[:, 0]
        ids = near_ids[:, 0]

    values |= summarize(distances, ids, counts, ranks)
    values |= costs(searches, pool.seconds, time.perf_counter() - start, ranks)
    return Match(
        ids=ids,
        distances=distances.float(),
        values=values,
        described=f"match: {searches[-1].method}",
    )


def nearest_images(
    blocks: Blocks,
    queries: Tensor,
    first: int,  # number in the round of this rank's first image
    config: MatchConfig,
    ranks: Ranks,
    searches: list[SearchResult],  # the searches made are added
) -> Tensor:
    """Collective: squared distance (pool,) float64, on every rank, of each sample of the pool to its nearest image."""
    sizes = ranks.collect(blocks.rows)
    parts = []
    for low in range(0, max(sizes), blocks.size):
        samples = blocks.make(min(low, blocks.rows), min(low + blocks.size, blocks.rows))
        result = search(samples, queries, first, method=config.method)
        searches.append(result)
        parts.append(result.distances[:, 0])
    return ranks.gather(torch.cat(parts), sizes).cpu()


def rejection_distance(near: Tensor, config: MatchConfig) -> float:
    """The squared distance to an image below which samples are rejected, by the first of all distances `near`."""
    blocks = math.ceil(PROBE / config.block)
    probe = near[: blocks * config.block].sort().values
    return float(probe[int(config.reject_share * len(probe))])


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


def costs(searches: list[SearchResult], generate: float, total: float, ranks: Ranks) -> dict[str, float]:
    """Collective: the cost of a match; seconds are those of the slowest rank in each."""
    exchange = ranks.seconds + sum(result.exchange for result in searches)
    mine = {
        "match/measured": searches[-1].measured,
        "seconds/generate": generate,
        "seconds/exchange": exchange,
        "seconds/search": total - generate - exchange,
    }
    every = ranks.collect(mine)
    return {name: max(values[name] for values in every) for name in mine}
