"""A round's match: generate a pool of samples, and assign to every image the sample that training moves towards it."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.match.across_ranks import Answer, Blocks, search
from pipeline.match.assign import assign_once
from pipeline.match.exchange import Ranks, ranks_of
from pipeline.match.method import METHODS
from pipeline.match.one_rank import Timer
from pipeline.match.space import SpaceConfig, embed
from pipeline.settings.constraints import FREE, POSITIVE, SHARE, between, check_fields, one_of

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
    """free: each image's nearest sample, which other images may share; one_to_one: nearest pairs first, each sample
    once."""
    reject_share: float = field(default=0.0, metadata=SHARE)
    """Share of the pool to reject: its samples nearest to any image are not matched. RS-IMLE (arXiv 2409.17439), whose
    distance epsilon is set anew each round."""
    space: SpaceConfig = field(default_factory=SpaceConfig)
    block: int = field(default=512, metadata=POSITIVE)
    """Samples generated at once. The pool is cut into the same blocks on every world size, so samples are the same."""
    method: str = field(default="auto", metadata=FREE | one_of(METHODS))
    """How to search: flat, projected, rounded, or auto, which tries them. The match is the same."""

    def __post_init__(self) -> None:
        check_fields(self, "match")
        if self.once and self.pool < self.round:
            raise InputError(
                f"match.assignment={self.assignment} gives no two images one sample, and match.ratio="
                f"{self.ratio} makes {self.pool} for {self.round} images: use --match.ratio=1 or more"
            )

    @property
    def once(self) -> bool:
        """Whether each sample is matched at most once."""
        return self.assignment == "one_to_one"

    @property
    def pool(self) -> int:
        """Samples in the pool, over all ranks."""
        return max(1, round(self.ratio * self.round))


@dataclass(kw_only=True, slots=True)
class Match:
    ids: Tensor  # (n,) int64: latent id of the sample of each image of this rank
    distances: Tensor  # (n,) float32: squared L2 distance to it, in the space of the match
    described: str = ""  # how it was searched, for a log
    values: dict[str, float] = field(default_factory=dict)  # metrics over all ranks, the same on each


def match_round(
    images: Tensor,  # (n, *shape) float32: this rank's images of the round
    sample: Callable[[Tensor], Tensor],  # ids (b,) -> samples (b, *shape): f(z) without gradient; called on all ranks
    config: MatchConfig,
    features: Callable[[Tensor], Tensor] | None = None,  # of the space's encoder, where it has a weight
    poll: Callable[[], None] = lambda: None,  # called before each block, equally often on every rank; may raise on all
) -> Match:
    """Collective: the sample of the pool that each image is matched to.

    The pool is generated in fixed blocks of ids, of which each rank has a contiguous range. So the match is the same on
    every world size that has the same images in the same order. An exception of `poll` ends the match at once.
    Raises InputError on every rank if rejection leaves too few samples.
    """
    ranks, timer, searches = ranks_of(None), Timer("generate", "assign"), list[Answer]()
    counts = ranks.collect(len(images))
    number = sum(counts[: ranks.rank])  # of this rank's first image

    def embedded(rows: Tensor, number: int) -> Tensor:
        return embed(rows, config.space, features, number=number)

    with timer("generate"):
        queries = embedded(images, number)
    blocks, first = Pool(config, sample, embedded, queries.shape[1], ranks, poll).share()
    rejected, values = torch.empty(0, dtype=torch.int64), dict[str, float]()
    if config.reject_share:
        near = measure_pool(blocks, queries, number, config, ranks, timer, searches)
        probe = near[: -(-PROBE // config.block) * config.block].sort().values
        reject = float(probe[int(config.reject_share * len(probe))])
        rejected, values["match/reject"] = (near < reject).nonzero().flatten(), math.sqrt(reject)
        check_left(config, len(rejected), sum(counts))

    def find(rows: Tensor, neighbours: int, assigned: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances and ids, (len(rows), neighbours) each, of the nearest samples of some images."""
        skip = torch.cat([rejected, assigned])
        answer = search(queries[rows], blocks, first, method=config.method, neighbours=neighbours, skip=skip)
        searches.append(answer)
        return answer.distances.cpu(), answer.ids.cpu()

    main = len(searches)
    with timer("assign"):
        if config.once:
            distances, ids = assign_once(find, ranks, counts)
        else:
            distances, ids = (nearest[:, 0] for nearest in find(torch.arange(len(queries)), 1, rejected[:0]))
    timer.seconds["assign"] -= sum(sum(answer.seconds.values()) for answer in searches[main:])

    values |= summarize(distances, ids, counts, ranks) | {"match/rejected": len(rejected) / config.pool}
    values |= costs(searches, main, timer, ranks)
    sent = f", every rank is sent the {searches[main].travelled}" if ranks.world > 1 else ""
    described = f"match: {searches[main].method}{sent}"
    return Match(ids=ids, distances=distances.float(), values=values, described=described)


@dataclass(slots=True)
class Pool:
    """The samples of a round, generated in blocks of ids and embedded when they are searched."""

    config: MatchConfig
    sample: Callable[[Tensor], Tensor]  # as in match_round
    embedded: Callable[[Tensor, int], Tensor]  # samples, and the number of the first -> (n, dims)
    dims: int  # values of an embedding
    ranks: Ranks
    poll: Callable[[], None]  # as in match_round

    def share(self) -> tuple[Blocks, int]:
        """This rank's part of the pool, of whole blocks or all, and the id of its first sample."""
        config, ranks, dims = self.config, self.ranks, self.dims
        shares = [block_range(config.pool, config.block, rank, ranks.world) for rank in range(ranks.world)]
        first, last = shares[ranks.rank]
        most = max(last - first for first, last in shares)
        keep = (config.once or config.reject_share > 0) and most * dims <= HELD_VALUES
        size = max(1, min(HELD_ROWS, HELD_VALUES // dims) // config.block) * config.block
        kept: dict[int, Tensor] = {}

        def make(low: int, high: int) -> Tensor:
            # `low` is the same on every rank: they differ by one block at most, the last one of the last part.
            if low in kept:
                self.poll()
                return kept[low]
            blocks = -(-(min(most, low + size) - low) // config.block)
            made = self.embedded(self._generate(torch.arange(first + low, first + high), blocks), first + low)
            if keep:
                kept[low] = made
            return made

        return Blocks(rows=last - first, make=make, size=size), first

    def _generate(self, ids: Tensor, blocks: int) -> Tensor:
        """The samples of `ids` (n,), in as many `blocks` as the rank that generates most.

        Every rank polls and samples so often: both may be collective, sampling where each rank holds a part of the
        weights. A rank whose sampling fails goes on polling.
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


def measure_pool(
    blocks: Blocks,  # this rank's part of the pool
    queries: Tensor,  # (n, d): this rank's embedded images
    number: int,  # of the first of them
    config: MatchConfig,
    ranks: Ranks,
    timer: Timer,
    searches: list[Answer],  # to which those made here are added
) -> Tensor:
    """Collective: the squared distance of each sample to the image nearest to it, (config.pool,) float64 by id."""
    rows, parts = ranks.collect(blocks.rows), list[Tensor]()
    for low in range(0, max(rows), blocks.size):
        with timer("generate"):
            samples = blocks.make(min(low, blocks.rows), min(low + blocks.size, blocks.rows))
        searches.append(search(samples, queries, number, method=config.method))
        parts.append(searches[-1].distances[:, 0])
    return ranks.gather(torch.cat(parts), rows).cpu()


def check_left(config: MatchConfig, rejected: int, images: int) -> None:
    """InputError unless rejection leaves a sample for each of `images` where each sample is matched once."""
    left = config.pool - rejected
    if config.once and left < images:
        raise InputError(
            f"{left} of the pool's {config.pool} samples are left for {images} images with match.assignment="
            f"{config.assignment}, {rejected} were rejected: lower match.reject_share, or raise match.ratio"
        )


def summarize(distances: Tensor, ids: Tensor, counts: list[int], ranks: Ranks) -> dict[str, float]:
    """Collective: mean and quantiles of a match's squared distances, and how many images share a sample."""
    pairs = ranks.gather(torch.stack([distances.view(torch.int64), ids], dim=1), counts)
    everyone = pairs[:, 0].view(torch.float64).numpy()
    chosen = pairs[:, 1].unique(return_counts=True)[1]
    quantiles = {f"match/distance_p{tenth}0": float(np.quantile(everyone, tenth / 10)) for tenth in (1, 5, 9)}
    shares = {"match/used": len(chosen) / len(pairs), "match/top_share": int(chosen.max()) / len(pairs)}
    return {"match/distance": float(everyone.mean()), **quantiles, **shares}


def costs(searches: list[Answer], main: int, timer: Timer, ranks: Ranks) -> dict[str, float]:
    """Collective: the cost of a match's searches; seconds and bytes are those of the rank with most of each."""
    spent = Counter[str]()
    for seconds in (timer.seconds, *(answer.seconds for answer in searches)):
        spent.update(seconds)
    spent["generate"] += spent.pop("make")
    received = float(ranks.received + sum(answer.received for answer in searches))
    mine = {"match/received": received, **{f"seconds/{name}": value for name, value in spent.items()}}
    proved, measured, most = zip(*ranks.collect((searches[main].proved, searches[main].measured, mine)), strict=True)
    largest = {name: max(each[name] for each in most) for name in mine}
    return {"match/proved": sum(proved) / ranks.world, "match/measured": sum(measured), **largest}
