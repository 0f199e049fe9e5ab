"""A round's match: generate a pool of samples, and find for every image the sample that training pulls towards it."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.match.across_ranks import Blocks, Found, search
from pipeline.match.assign import assign_once
from pipeline.match.exchange import Ranks, ranks_of
from pipeline.match.method import METHODS
from pipeline.match.one_rank import Timer
from pipeline.match.space import SpaceConfig, embed
from pipeline.model.codes import CodesConfig
from pipeline.model.latents import check_law
from pipeline.settings.constraints import FREE, POSITIVE, SHARE, between, check_fields, one_of

PROBE = 1024  # samples of the pool on which `reject_share` is measured, rounded up to whole blocks

HELD_ROWS, HELD_VALUES = 4096, 2**26
"""Samples, and float32 values, of the pool in memory at once: at most these, but at least one block. one_to_one keeps a
rank's part of the pool for the next searches if it has no more values; a larger part is generated again."""


@dataclass(kw_only=True, slots=True)
class MatchConfig:
    ratio: float = field(default=4.0, metadata=between(1e-6, 10**6))
    """Samples in the pool for each image of the round; 1 to 100 is sensible."""
    round: int = field(default=2048, metadata=POSITIVE)
    """Images per round, over all ranks."""
    latents: str = "smooth4"
    """Distribution ("law") of the latents: codes (decoded from codes that a flow or a mixture draws, which learns in
    the same run), gaussian, smoothG (G x G normals, enlarged), mixture (half flat) or fourier (IGN's)."""
    codes: CodesConfig = field(default_factory=CodesConfig)
    flat: float = field(default=0.0, metadata=between(0, 0.5))
    """Share of the pool whose latents are flat images with some noise, so that f learns to map these to the data as
    well. Samples of the trained model use none."""
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
        check_law(self.latents)
        if self.once and self.pool < self.round:
            raise InputError(
                f"match.assignment={self.assignment} gives every image a sample of its own and match.ratio="
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
    poll: Callable[[], None] = lambda: None,  # called before each block, as often on every rank; may raise on all alike
    code: Callable[[Tensor], Tensor] | None = None,  # of f, where the space gives it a weight
) -> Match:
    """Collective: the sample of the pool that each image is matched to.

    The pool is generated in fixed blocks of ids, dealt to the ranks in contiguous runs, so the match is the same for
    every world size that shares out the same images in the same order. What `poll` raises ends the match at once.
    Raises InputError on every rank if rejection leaves too few samples.
    """
    ranks, timer, searches = ranks_of(None), Timer("generate", "assign"), list[Found]()
    counts = ranks.collect(len(images))
    number = sum(counts[: ranks.rank])  # of this rank's first image
    with timer("generate"):
        queries = embed(images, config.space, features, code, number=number)
    share = partial(share_pool, config, sample, (features, code), queries.shape[1], ranks, poll)

    reject = None
    if config.reject_share:
        reject, probe = measure_rejection(config, share, queries, number, ranks, timer)
        searches.append(probe)

    blocks, first = share(pool=config.pool)

    def find(rows: Tensor, neighbours: int, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Squared distances and ids, (len(rows), neighbours) each, of the nearest samples of some images."""
        everyone = reject is not None or len(rows) == len(queries)  # images that ask for nothing reject all the same
        asking = queries if everyone else queries[rows]
        found = search(asking, blocks, first, method=config.method, neighbours=neighbours, reject=reject, skip=skip)
        searches.append(found)
        check_left(config, found.rejected, sum(counts))
        distances, ids = found.distances.cpu(), found.ids.cpu()
        return (distances[rows], ids[rows]) if everyone else (distances, ids)

    with timer("assign"):
        main = len(searches)
        if config.once:
            distances, ids = assign_once(find, ranks, counts)
        else:
            distances, ids = (best[:, 0] for best in find(torch.arange(len(queries)), 1))
    timer.seconds["assign"] -= sum(sum(found.seconds.values()) for found in searches[main:])

    values = summarize(distances, ids, counts, ranks) | {"match/rejected": searches[main].rejected / config.pool}
    values |= {} if reject is None else {"match/reject": math.sqrt(reject)}
    values |= costs(searches, main, timer, ranks)
    sent = f", every rank is sent the {searches[main].travelled}" if ranks.world > 1 else ""
    described = f"match: {searches[main].method}{sent}"
    return Match(ids=ids, distances=distances.float(), values=values, described=described)


def share_pool(
    config: MatchConfig,
    sample: Callable[[Tensor], Tensor],  # as in match_round
    encoders: tuple[Callable[[Tensor], Tensor] | None, ...],  # features and code, as in match_round
    dims: int,  # values of an embedding
    ranks: Ranks,
    poll: Callable[[], None],  # as in match_round
    *,
    pool: int,  # samples: whole blocks, or all
) -> tuple[Blocks, int]:
    """This rank's part of the samples with ids [0, pool), embedded when they are searched, and the id of its first."""
    shares = [block_range(pool, config.block, rank, ranks.world) for rank in range(ranks.world)]
    first, last = shares[ranks.rank]
    most = max(last - first for first, last in shares)
    keep = config.once and most * dims <= HELD_VALUES
    size = max(1, min(HELD_ROWS, HELD_VALUES // dims) // config.block) * config.block
    kept: dict[int, Tensor] = {}

    def make(low: int, high: int) -> Tensor:
        step = -(-low // size)
        if step in kept:
            poll()
            return kept[step]
        parts = torch.arange(first + low, first + high).split(config.block) if low < high else ()
        samples, failure = list[Tensor](), None
        # Every rank polls and samples as often as the one with most blocks: both may be collective, sampling where each
        # rank holds a part of the weights. A rank whose sampling fails goes on polling.
        blocks = -(-(min(most, (step + 1) * size) - step * size) // config.block)
        for number in range(blocks):
            poll()
            try:
                if failure is None:
                    samples.append(sample(parts[number] if number < len(parts) else torch.arange(1)))
            except Exception as error:
                failure = error
        if failure is not None:
            raise failure
        made = embed(torch.cat(samples[: len(parts)] or [samples[0][:0]]), config.space, *encoders, number=first + low)
        if keep:
            kept[step] = made
        return made

    return Blocks(rows=last - first, make=make, size=size, lockstep=True), first


def block_range(pool: int, block: int, rank: int, world: int) -> tuple[int, int]:
    """The ids [first, last) of the pool that `rank` generates: whole blocks, shared out evenly."""
    blocks = -(-pool // block)
    return min(pool, blocks * rank // world * block), min(pool, blocks * (rank + 1) // world * block)


def measure_rejection(
    config: MatchConfig,
    share: Callable[..., tuple[Blocks, int]],  # share_pool but for `pool`
    queries: Tensor,  # (n, d): this rank's embedded images
    number: int,  # of the first of them
    ranks: Ranks,
    timer: Timer,
) -> tuple[float, Found]:
    """Collective: the squared distance below which reject_share of a probe of the pool lies, and the probe's search."""
    probe, _ = share(pool=min(config.pool, -(-PROBE // config.block) * config.block))
    most = max(ranks.collect(probe.rows))
    with timer("generate"):
        edges = [min(edge, probe.rows) for edge in range(0, most + probe.size, probe.size)]
        made = torch.cat([probe.make(low, high) for low, high in zip(edges, edges[1:], strict=False)])
    found = search(made, queries, number, method=config.method)
    near = ranks.gather(found.distances, ranks.collect(probe.rows)).flatten().sort().values
    return float(near[int(config.reject_share * len(near))]), found


def check_left(config: MatchConfig, rejected: int, images: int) -> None:
    """InputError unless rejection leaves a sample for each of `images` where each sample is matched once."""
    left = config.pool - rejected
    if config.once and left < images:
        raise InputError(
            f"{left} of the pool's {config.pool} samples are left for {images} images with match.assignment="
            f"{config.assignment}, {rejected} were rejected: lower match.reject_share, or raise match.ratio"
        )


def summarize(distances: Tensor, ids: Tensor, counts: list[int], ranks: Ranks) -> dict[str, float]:
    """Collective: mean and quantiles of a match's squared distances, and how its samples are shared."""
    pairs = ranks.gather(torch.stack([distances.view(torch.int64), ids], dim=1), counts)
    everyone = pairs[:, 0].view(torch.float64).numpy()
    chosen = pairs[:, 1].unique(return_counts=True)[1]
    quantiles = {f"match/distance_p{tenth}0": float(np.quantile(everyone, tenth / 10)) for tenth in (1, 5, 9)}
    shares = {"match/used": len(chosen) / len(pairs), "match/top_share": int(chosen.max()) / len(pairs)}
    return {"match/distance": float(everyone.mean()), **quantiles, **shares}


def costs(searches: list[Found], main: int, timer: Timer, ranks: Ranks) -> dict[str, float]:
    """Collective: what the searches of a match took; of seconds and bytes, those of the rank that has most of each."""
    spent = Counter[str]()
    for seconds in (timer.seconds, *(found.seconds for found in searches)):
        spent.update(seconds)
    spent["generate"] += spent.pop("make")
    received = float(ranks.received + sum(found.received for found in searches))
    mine = {"match/received": received, **{f"seconds/{name}": value for name, value in spent.items()}}
    proved, measured, most = zip(*ranks.collect((searches[main].proved, searches[main].measured, mine)), strict=True)
    largest = {name: max(each[name] for each in most) for name in mine}
    return {"match/proved": sum(proved) / ranks.world, "match/measured": sum(measured), **largest}
