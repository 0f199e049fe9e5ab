"""A round's match: generate a pool of samples, and tell every image which of them f shall pull towards it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import InputError
from pipeline.match.across_ranks import Blocks, Found, search
from pipeline.match.exchange import Ranks, ranks_of
from pipeline.match.method import METHODS
from pipeline.match.space import SpaceConfig, embed
from pipeline.model.latents import check_law
from pipeline.settings import FREE

ASSIGNMENTS = ("free", "one_to_one")

PROBE = 1024
"""Samples of the pool on which `reject_share` is measured, rounded up to whole blocks."""

HELD_ROWS, HELD_VALUES = 4096, 2**26
"""Samples, and float32 values, of the pool that are held at once: at most these, but at least a block. A part of the
pool with no more values is kept while one_to_one searches it again; a larger one is generated again."""

NEIGHBOURS, MOST_PAIRS = 16, 2**22
"""one_to_one: samples that an image asks for at first, and the most that all images together ask for when some want
more: twice as many as before where most have been settled, else eight times."""

COSTS = {"make": "generate", "project": "project", "search": "search", "rescore": "rescore", "exchange": "exchange"}
"""What the search calls the parts of its time, and what they are reported as."""


@dataclass(kw_only=True, slots=True)
class MatchConfig:
    ratio: float = 4.0
    """Samples in the pool for each image of the round."""

    round: int = 2048
    """Images a round, over all ranks."""

    latents: str = "smooth4"
    """Law of the latents: gaussian, smoothG (G x G normals enlarged), mixture (half flat) or fourier (IGN's)."""

    flat: float = 0.0
    """Share of the pool whose latents are flat images with some noise, whatever the law, so that f carries those to the
    data as well; samples of the trained model are drawn without."""

    jitter: float = 0.0
    """Standard deviation of normal noise added to the matched latents when fitting; up to 0.01 in the literature."""

    assignment: str = "free"
    """free: each image's nearest sample, which several may share; one_to_one: nearest pairs first, each sample once."""

    reject: float = 0.0
    """L2 distance below which a sample is too near to any image to be matched (RS-IMLE's epsilon); 0: none is."""

    reject_share: float = 0.0
    """Share of the pool to reject: sets that distance anew each round."""

    space: SpaceConfig = field(default_factory=SpaceConfig)

    block: int = 512
    """Samples generated at once. The pool is cut into the same blocks on every world size, so samples are the same."""

    method: str = field(default="auto", metadata=FREE)
    """How to search: flat, projected, rounded, or auto, which tries them. The match is the same."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1e6:
            raise InputError(f"match.ratio is {self.ratio}: it must be positive, 1 to 100 is sensible")
        if self.round < 1 or self.block < 1:
            raise InputError(f"match.round={self.round} and match.block={self.block} must be at least 1")
        check_law(self.latents)
        for name, allowed in (("assignment", ASSIGNMENTS), ("method", METHODS)):
            if getattr(self, name) not in allowed:
                raise InputError(f"match.{name} is '{getattr(self, name)}': choose one of {', '.join(allowed)}")
        if not 0 <= self.flat <= 0.5:
            raise InputError(f"match.flat is {self.flat}: it must lie between 0 and 0.5")
        for name in ("jitter", "reject"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"match.{name} is {getattr(self, name)}: it must be a number from 0 on")
        if not 0 <= self.reject_share < 1:
            raise InputError(f"match.reject_share is {self.reject_share}: it must lie in [0, 1)")
        if self.reject and self.reject_share:
            raise InputError(
                f"match.reject={self.reject} and match.reject_share={self.reject_share} both set the distance of "
                "rejection: leave one of them 0"
            )
        if self.assignment == "one_to_one" and self.pool < self.round:
            raise InputError(
                f"match.assignment=one_to_one gives every image a sample of its own and match.ratio={self.ratio} makes "
                f"{self.pool} for {self.round} images: use --match.ratio=1 or more"
            )

    @property
    def pool(self) -> int:
        return max(1, round(self.ratio * self.round))


@dataclass(kw_only=True, slots=True)
class Match:
    ids: Tensor
    """(n,) int64: latent id of the pool sample of each image of this rank."""

    distances: Tensor
    """(n,) float32: squared L2 distance to it, in the space of the match."""

    described: str = ""
    """How it was searched, in words."""

    values: dict[str, float] = field(default_factory=dict)
    """What to report of it, over all ranks and so the same on each."""


def match_round(
    images: Tensor,  # (n, *shape) float32: this rank's images of the round
    sample: Callable[[Tensor], Tensor],  # ids (b,) -> samples (b, *shape): f(z) without gradient; called on all ranks
    config: MatchConfig,
    features: Callable[[Tensor], Tensor] | None = None,  # of match.space.encoder, where it has a weight
    look: Callable[[], None] = lambda: None,  # called before each part of the pool, as often on every rank; may raise
) -> Match:
    """Collective. The pool is generated in fixed blocks of ids, dealt to the ranks in contiguous runs.

    The match is the same for every world size that shares out the same images in the same order. Raises InputError on
    every rank if rejection leaves too few samples.
    """
    start = time.perf_counter()
    ranks, searches = ranks_of(None), list[Found]()
    counts = ranks.table([len(images)])[:, 0].tolist()
    number = sum(counts[: ranks.rank])  # of this rank's first image
    queries = embed(images, config.space, features, number=number)
    prepared = time.perf_counter() - start

    # Rejection: the squared distance below which a sample is too near.
    reject = config.reject * config.reject if config.reject else None
    if config.reject_share:
        whole = -(-PROBE // config.block) * config.block
        probe, _ = share_pool(config, sample, features, queries.shape[1], ranks, look, pool=min(config.pool, whole))
        clock = time.perf_counter()
        most = int(ranks.table([probe.rows]).max())
        steps = [[min(edge, probe.rows) for edge in (low, low + probe.size)] for low in range(0, most, probe.size)]
        made = torch.cat([probe.make(low, high) for low, high in steps])
        prepared += time.perf_counter() - clock
        searches.append(search(made, queries, number, method=config.method))
        near = searches[0].distances
        near = ranks.gather(near, ranks.table([len(near)])[:, 0].tolist()).flatten().sort().values
        reject = float(near[int(config.reject_share * len(near))])

    # Search, as often as the assignment asks.
    blocks, first = share_pool(config, sample, features, queries.shape[1], ranks, look, pool=config.pool)
    probes = len(searches)

    def find(rows: Tensor, neighbours: int, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Squared distances and ids (len(rows), neighbours) of the nearest samples of some images of this rank."""
        everyone = reject is not None or len(rows) == len(queries)  # images that ask for nothing reject all the same
        asking = queries if everyone else queries[rows]
        found = search(asking, blocks, first, method=config.method, neighbours=neighbours, reject=reject, skip=skip)
        searches.append(found)
        if len(searches) == probes + 1:
            check_left(config, found.rejected, reject, sum(counts))
        distances, ids = found.distances.cpu(), found.ids.cpu()
        return (distances[rows], ids[rows]) if everyone else (distances, ids)

    clock = time.perf_counter()
    if config.assignment == "one_to_one":
        distances, ids = assign_once(find, ranks, counts)
    else:
        distances, ids = (best[:, 0] for best in find(torch.arange(len(queries)), 1))

    # Report.
    searched = time.perf_counter() - clock - sum(sum(found.seconds.values()) for found in searches[probes:])
    pairs = ranks.gather(torch.stack([distances.view(torch.int64), ids], dim=1), counts)
    chosen = pairs[:, 1].unique(return_counts=True)[1]
    values = spread(pairs[:, 0].view(torch.float64).numpy())
    values |= {"match/used": len(chosen) / len(pairs), "match/top_share": int(chosen.max()) / len(pairs)}
    main = searches[probes]
    values["match/rejected"] = main.rejected / config.pool
    if reject is not None:
        values["match/reject"] = math.sqrt(reject)
    values |= costs(searches, main, ranks, prepared=prepared, assigning=searched)
    return Match(
        ids=ids,
        distances=distances.float(),
        values=values,
        described=f"match: {main.method}" + (f", every rank is sent the {main.travelled}" if ranks.world > 1 else ""),
    )


def share_pool(
    config: MatchConfig,
    sample: Callable[[Tensor], Tensor],  # as in match_round
    features: Callable[[Tensor], Tensor] | None,  # as in match_round
    dims: int,  # values of an embedding
    ranks: Ranks,
    look: Callable[[], None],  # as in match_round
    *,
    pool: int,  # samples, whole blocks or all of them
) -> tuple[Blocks, int]:
    """This rank's part of the samples with ids [0, pool), embedded when they are searched, and the id of its first."""
    shares = [block_range(pool, config.block, rank, ranks.world) for rank in range(ranks.world)]
    first, last = shares[ranks.rank]
    most = max(last - first for first, last in shares)
    again = config.assignment == "one_to_one" and most * dims <= HELD_VALUES
    size = max(1, min(HELD_ROWS, HELD_VALUES // dims) // config.block) * config.block
    kept: dict[int, Tensor] = {}

    def make(low: int, high: int) -> Tensor:
        look()
        step = -(-low // size)
        if step in kept:
            return kept[step]
        ids = torch.arange(first + low, first + high)
        samples = [sample(block) for block in ids.split(config.block)] if len(ids) else []
        # All ranks call as often as that with most blocks: a network whose weights lie on all of them is run together.
        blocks = -(-(min(most, (step + 1) * size) - step * size) // config.block)
        idle = [sample(torch.arange(1)) for _ in range(blocks - len(samples))]
        made = embed(torch.cat(samples or [idle[0][:0]]), config.space, features, number=first + low)
        if again:
            kept[step] = made
        return made

    return Blocks(rows=last - first, make=make, size=size, lockstep=True), first


def block_range(pool: int, block: int, rank: int, world: int) -> tuple[int, int]:
    """The ids [first, last) of the pool that `rank` generates: whole blocks, as even as they go."""
    blocks = -(-pool // block)
    return min(pool, blocks * rank // world * block), min(pool, blocks * (rank + 1) // world * block)


def check_left(config: MatchConfig, rejected: int, reject: float | None, images: int) -> None:
    """InputError unless rejection leaves a sample, and under one_to_one one for each of `images`."""
    left = config.pool - rejected
    if left >= (images if config.assignment == "one_to_one" else 1):
        return
    wanted = f"{images} images with match.assignment=one_to_one" if left else f"{images} images"
    key = "match.reject_share" if config.reject_share else "match.reject"
    raise InputError(
        f"{left} of the pool's {config.pool} samples are left for {wanted}: {rejected} lie nearer than "
        f"{math.sqrt(reject or 0):.4g} to an image and were rejected; lower {key}, or raise match.ratio"
    )


def assign_once(
    find: Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor]],  # as in match_round
    ranks: Ranks,
    counts: list[int],  # images of each rank
) -> tuple[Tensor, Tensor]:
    """Collective: squared distance float64 and id, each (n,), of the sample that each image of this rank gets.

    Of all pairs of an image and a sample the least by (distance, number of the image, id) is taken, of all pairs of
    the images and samples that remain again the least, and so on. Every rank does this by itself on the nearest few
    samples of each image; an image that finds all of its own taken wants more, and until it has them nothing that comes
    after its last one is settled. All that are not settled then ask again, of the samples that are left.
    """
    edges = np.cumsum([0, *counts])
    answers = np.zeros((edges[-1], 2), np.int64)  # of each image: the distance's bits, and the id
    settled = np.zeros(0, np.int64)  # ids
    asking, neighbours = np.arange(edges[-1]), NEIGHBOURS
    while len(asking):
        parts = np.split(asking, np.searchsorted(asking, edges[1:-1]))
        rows = torch.from_numpy(parts[ranks.rank] - edges[ranks.rank])
        distances, ids = find(rows, neighbours, torch.from_numpy(np.sort(settled)) if len(settled) else None)
        pairs = torch.stack([distances.view(torch.int64), ids], dim=2)
        found = ranks.gather(pairs, [len(part) for part in parts]).numpy()
        taken, columns = take_in_order(found[:, :, 0].view(np.float64), found[:, :, 1])
        answers[asking[taken]] = found[taken, columns]
        settled = np.concatenate([settled, found[taken, columns, 1]])
        most = MOST_PAIRS // max(1, len(asking) - len(taken))
        neighbours = max(NEIGHBOURS, min(neighbours * (2 if 2 * len(taken) > len(asking) else 8), most))
        asking = np.delete(asking, taken)
    mine = torch.from_numpy(answers[edges[ranks.rank] : edges[ranks.rank + 1]])
    return mine[:, 0].contiguous().view(torch.float64), mine[:, 1].contiguous()


def take_in_order(
    distances: NDArray[np.float64],  # (n, k): ascending along each row; inf where there is no sample
    ids: NDArray[np.int64],  # (n, k): ascending where distances are alike; -1 where there is no sample
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pairs (rows, columns) that are taken whatever samples each image has behind those that are known.

    Pairs that are not known come after all known ones of their image. So what is taken before the first last pair of
    an image that finds all of its samples taken is settled.
    """
    names, numbers = np.unique(ids, return_inverse=True)
    numbers = numbers.reshape(ids.shape)
    gone = names < 0
    column = np.zeros(len(ids), np.int64)  # of the nearest sample that each image can still have
    least, choice = distances[:, 0].copy(), numbers[:, 0].copy()
    bound, taken = (math.inf, len(ids)), list[int]()
    while True:
        row = int(least.argmin())
        if (least[row], row) >= min(bound, (math.inf, 0)):
            rows = np.array(taken, np.int64)
            return rows, column[rows]
        taken.append(row)
        least[row] = math.inf
        gone[choice[row]] = True
        losers = np.flatnonzero(choice == choice[row])
        choice[row] = -1
        losers = losers[losers != row]
        while len(losers):
            column[losers] += 1
            starved = losers[column[losers] == ids.shape[1]]
            if len(starved):
                last = distances[starved, -1]
                bound = min(bound, min(zip(last.tolist(), starved.tolist(), strict=True)))
                least[starved], choice[starved] = math.inf, -1
                losers = losers[column[losers] < ids.shape[1]]
            least[losers], choice[losers] = distances[losers, column[losers]], numbers[losers, column[losers]]
            losers = losers[gone[choice[losers]]]


def spread(distances: NDArray[np.float64]) -> dict[str, float]:
    """Mean and quantiles of the squared distances of a match."""
    quantiles = np.quantile(distances, (0.1, 0.5, 0.9))
    return {"match/distance": float(distances.mean())} | {
        f"match/distance_{name}": float(value) for name, value in zip(("p10", "p50", "p90"), quantiles, strict=True)
    }


def costs(searches: list[Found], main: Found, ranks: Ranks, *, prepared: float, assigning: float) -> dict[str, float]:
    """Collective: what the searches of a match took; of seconds and bytes, those of the rank that has most of each."""
    seconds = dict.fromkeys(COSTS.values(), 0.0) | {"generate": prepared, "assign": assigning}
    for found in searches:
        for name, spent in found.seconds.items():
            seconds[COSTS[name]] += spent
    received = float(ranks.received + sum(found.received for found in searches))
    mine = torch.tensor([[main.proved, main.measured, received, *seconds.values()]], dtype=torch.float64)
    everyone = ranks.gather(mine, [1] * ranks.world)
    most = everyone.max(0).values.tolist()
    values = {"match/proved": float(everyone[:, 0].mean()), "match/measured": float(everyone[:, 1].sum())}
    return (
        values
        | {"match/received": most[2]}
        | {f"seconds/{name}": spent for name, spent in zip(seconds, most[3:], strict=True)}
    )
