"""A round's match: generate a pool of samples, and assign to every image the sample that training moves towards it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from naign.errors import InputError
from naign.match.across_ranks import Answer, Blocks, search
from naign.match.assign import assign_once
from naign.match.exchange import Ranks, ranks_of
from naign.match.method import METHODS
from naign.settings.constraints import FREE, POSITIVE, SHARE, between, one_of

PROBE = 1024  # first samples of the pool, in whole blocks, of which `reject_share` is the share to reject

HELD_ROWS, HELD_VALUES = 4096, 2**26
"""Samples, and float32 values, of the pool in memory at once: at most these, but at least one block. For further
searches a rank keeps its part of the pool if that has no more values; a larger part is generated again."""


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
    """How to search: flat, indexed, projected, rounded, or auto, which tries them. The match is the same."""

    def check(self) -> None:
        """Raise InputError for settings that contradict each other."""
        if self.assignment == "one_to_one" and self.pool < self.round:
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
    Raises InputError on every rank if rejection leaves too few samples.
    """
    start, ranks, searches = time.perf_counter(), ranks_of(None), list[Answer]()
    once = config.assignment == "one_to_one"
    counts = ranks.collect(len(images))
    number = sum(counts[: ranks.rank])  # of this rank's first image
    queries = images.float().flatten(1)
    pool = Pool(config, sample, queries.shape[1], ranks, poll)
    blocks, first = pool.share()
    rejected, values = torch.empty(0, dtype=torch.int64), dict[str, float]()
    if config.reject_share:
        rejected, reject = reject_nearest(blocks, queries, number, config, ranks, searches)
        values["match/reject"], left = math.sqrt(reject), config.pool - len(rejected)
        if once and left < sum(counts):
            few = f"{left} of {config.pool} samples are left for {sum(counts)} images with match.assignment=one_to_one"
            raise InputError(f"{few}, {len(rejected)} were rejected: lower match.reject_share, or raise match.ratio")

    def find(rows: Tensor, neighbours: int, assigned: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances and ids, (len(rows), neighbours) each, of the nearest samples of some images."""
        skip = torch.cat([rejected, assigned])
        answer = search(queries[rows], blocks, first, method=config.method, neighbours=neighbours, skip=skip)
        searches.append(answer)
        return answer.distances.cpu(), answer.ids.cpu()

    main = len(searches)
    if once:
        distances, ids = assign_once(find, ranks, counts)
    else:
        distances, ids = (nearest[:, 0] for nearest in find(torch.arange(len(queries)), 1, rejected[:0]))

    values |= summarize(distances, ids, counts, ranks) | {"match/rejected": len(rejected) / config.pool}
    values |= costs(searches, searches[main], pool.seconds, time.perf_counter() - start, ranks)
    sent = f", every rank is sent the {searches[main].travelled}" if ranks.world > 1 else ""
    described = f"match: {searches[main].method}{sent}"
    return Match(ids=ids, distances=distances.float(), values=values, described=described)


@dataclass(slots=True)
class Pool:
    """The samples of a round, generated in blocks of ids when they are searched."""

    config: MatchConfig
    sample: Callable[[Tensor], Tensor]  # as in match_round
    dims: int  # values of a sample
    ranks: Ranks
    poll: Callable[[], None]  # as in match_round
    seconds: float = 0.0  # spent on generating

    def share(self) -> tuple[Blocks, int]:
        """This rank's part of the pool, of whole blocks or all, and the id of its first sample."""
        config, ranks, dims = self.config, self.ranks, self.dims
        shares = [block_range(config.pool, config.block, rank, ranks.world) for rank in range(ranks.world)]
        first, last = shares[ranks.rank]
        most = max(last - first for first, last in shares)
        keep = (config.assignment == "one_to_one" or config.reject_share > 0) and most * dims <= HELD_VALUES
        size = max(1, min(HELD_ROWS, HELD_VALUES // dims) // config.block) * config.block
        kept: dict[int, Tensor] = {}

        def make(low: int, high: int) -> Tensor:
            # `low` is the same on every rank: they differ by one block at most, the last one of the last part.
            if low in kept:
                self.poll()
                return kept[low]
            start = time.perf_counter()
            blocks = -(-(min(most, low + size) - low) // config.block)
            samples = self._generate(torch.arange(first + low, first + high), blocks)
            made = samples.float().flatten(1)
            if keep:
                kept[low] = made
            self.seconds += time.perf_counter() - start
            return made

        return Blocks(rows=last - first, make=make, size=size), first

    def _generate(self, ids: Tensor, blocks: int) -> Tensor:
        """The samples of `ids` (n,). Every rank polls and samples as often as the one with most `blocks`: both may be
        collective, sampling where a rank holds a part of the weights. A rank whose sampling fails goes on polling.
        """
        parts = ids.split(self.config.block) if len(ids) else ()
        samples, failure = list[Tensor](), None
        for number in range(blocks):
            self.poll()
            try:
                if failure is None:
                    samples.append(self.sample(parts[number] if number < len(parts) else torch.arange(1)))
            except Exception as error:
                failure = error
        if failure is not None:
            raise failure
        return torch.cat(samples[: len(parts)] or [samples[0][:0]])


def block_range(pool: int, block: int, rank: int, world: int) -> tuple[int, int]:
    """The ids [first, last) of the pool that `rank` generates: whole blocks, shared out evenly."""
    blocks = -(-pool // block)
    return min(pool, blocks * rank // world * block), min(pool, blocks * (rank + 1) // world * block)


def reject_nearest(
    blocks: Blocks, queries: Tensor, number: int, config: MatchConfig, ranks: Ranks, searches: list[Answer]
) -> tuple[Tensor, float]:
    """Collective: ids, on every rank, of the samples that are too near to an image, and the least squared distance.
    Image i of this rank, queries[i], is number + i of the round; the searches made are added to `searches`.
    """
    rows, parts = ranks.collect(blocks.rows), list[Tensor]()
    for low in range(0, max(rows), blocks.size):
        samples = blocks.make(min(low, blocks.rows), min(low + blocks.size, blocks.rows))
        searches.append(search(samples, queries, number, method=config.method))
        parts.append(searches[-1].distances[:, 0])
    near = ranks.gather(torch.cat(parts), rows).cpu()
    probe = near[: -(-PROBE // config.block) * config.block].sort().values
    reject = float(probe[int(config.reject_share * len(probe))])
    return (near < reject).nonzero().flatten(), reject


def summarize(distances: Tensor, ids: Tensor, counts: list[int], ranks: Ranks) -> dict[str, float]:
    """Collective: mean and quantiles of a match's squared distances, and how many images share a sample."""
    pairs = ranks.gather(torch.stack([distances.view(torch.int64), ids], dim=1), counts)
    everyone = pairs[:, 0].view(torch.float64).numpy()
    chosen = pairs[:, 1].unique(return_counts=True)[1]
    quantiles = {f"match/distance_p{tenth}0": float(np.quantile(everyone, tenth / 10)) for tenth in (1, 5, 9)}
    shares = {"match/used": len(chosen) / len(pairs), "match/top_share": int(chosen.max()) / len(pairs)}
    return {"match/distance": float(everyone.mean()), **quantiles, **shares}


def costs(searches: list[Answer], main: Answer, generate: float, total: float, ranks: Ranks) -> dict[str, float]:
    """Collective: the cost of a match; seconds and bytes are those of the rank with most of each."""
    exchange = ranks.seconds + sum(answer.exchange for answer in searches)
    mine = {
        "match/received": float(ranks.received + sum(answer.received for answer in searches)),
        "seconds/generate": generate,
        "seconds/exchange": exchange,
        "seconds/search": total - generate - exchange,
    }
    measured, every = zip(*ranks.collect((main.measured, mine)), strict=True)
    most = {name: max(each[name] for each in every) for name in mine}
    return {"match/measured": sum(measured) / ranks.world, **most}
