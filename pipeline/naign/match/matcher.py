"""A round's match: generate a pool of samples, and find the one nearest to each image, to which training moves it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from naign.errors import one_line, require
from naign.match.exchange import Ranks, nearby_ranks, ranks_of
from naign.match.index import NotFinite, PeerFailed, search
from naign.match.pool import Pool
from naign.settings.constraints import AT_LEAST_0, POSITIVE, between


@dataclass(kw_only=True, slots=True)
class MatchConfig:
    ratio: float = field(default=10.0, metadata=between(1e-6, 10**6))
    """Samples in the pool for each image of the round; 1 to 100 is sensible."""
    round: int = field(default=2048, metadata=POSITIVE)
    """Images per round, over all ranks."""
    group: int = field(default=0, metadata=AT_LEAST_0)
    """Images in a row of a round that share a part of the pool, and are matched with that alone; 0: the whole round.
    What a match costs a rank then depends on this, not on the number of ranks."""
    block: int = field(default=512, metadata=POSITIVE)
    """Samples generated at once. The pool is cut into the same blocks on every world size, so samples are the same."""

    @property
    def images(self) -> int:
        """Images of a group."""
        return self.group or self.round

    @property
    def part(self) -> int:
        """Samples in a group's part of the pool."""
        return max(1, round(self.ratio * self.images))

    @property
    def pool(self) -> int:
        """Samples in the pool, over all ranks."""
        return self.round // self.images * self.part


@dataclass(kw_only=True, slots=True)
class Match:
    ids: Tensor  # (n,) int64: latent id of the sample of each image of this rank
    distances: Tensor  # (n,) float32: squared L2 distance to it, of pixels
    values: dict[str, float]  # metrics, the same on each rank: means over groups


def match_round(
    images: Tensor,  # (n, *shape) float32: this rank's images of the round
    sample: Callable[[Tensor], Tensor],  # ids (b,) -> samples (b, *shape): f(z) without gradient; called on all ranks
    config: MatchConfig,
    poll: Callable[[], None] = lambda: None,  # called before each block, equally often on every rank; may raise on all
) -> Match:
    """Collective: the sample of its group's part of the pool that is nearest to each image.

    The pool is generated in fixed blocks of ids, of which each rank of a group has a contiguous range. So the match is
    the same on every world size that has the same images in the same order. An exception of `poll` ends the match at
    once, any other at its end, on all ranks.
    """
    everyone = ranks_of(None)
    if config.group:
        check_groups(config, everyone.world)
    span = max(1, config.images * everyone.world // config.round)  # ranks that share a group
    ranks = nearby_ranks(span)
    count = max(1, config.round // config.images // everyone.world)  # groups of a rank
    first = everyone.rank // span * count
    queries = images.float().flatten(1)
    found: list[tuple[Tensor, Tensor, dict[str, float]]] = []
    failure: Exception | None = None
    for number, part in enumerate(queries.tensor_split(count), first):
        pool = Pool(
            start=number * config.part,
            size=config.part,
            block=config.block,
            sample=sample,
            poll=poll,
            dims=queries.shape[1],
            ranks=ranks,
        )
        try:
            if failure is None:
                found.append(_match_group(part, pool, ranks))
                continue
        except Exception as error:
            of_group = span == 1 or pool.failed or isinstance(error, (PeerFailed, ValueError))
            if span == everyone.world or pool.polled_out or not of_group:
                raise
            failure = error.with_traceback(None)  # which would keep samples
        pool.skip()
    if span < everyone.world:
        _raise_together(failure, everyone)
    distances, ids, values = zip(*found, strict=True)
    total = {key: sum(each[key] for each in values) / count for key in values[0]}
    if span < everyone.world:
        total = dict(zip(total, everyone.mean(list(total.values())), strict=True))
    return Match(
        ids=torch.cat(ids),
        distances=torch.cat(distances).float(),
        values=total,
    )


def _raise_together(failure: Exception | None, ranks: Ranks) -> None:
    """Collective: where a rank has failed, raise that there, and what it says on the others."""
    if not sum(ranks.mean([float(failure is not None)])):
        return
    told = None
    if failure is not None and not isinstance(failure, PeerFailed):
        kind = NotFinite if isinstance(failure, NotFinite) else PeerFailed
        told = kind(f"rank {ranks.rank}: {type(failure).__name__}: {one_line(failure)}")
    try:
        ranks.collect(told)
    except (NotFinite, PeerFailed) as error:
        raise failure if told and failure else error from None


def check_groups(config: MatchConfig, world: int) -> None:
    """Raise InputError where groups do not fit into the parts of a round that so many ranks have."""
    size = config.images
    share = max(1, config.round // world)
    apart = f"match.group={size} neither divides the {share} images a round of one of {world} ranks, nor is a multiple"
    require(
        (config.round % size == 0, f"match.group={size} does not divide match.round={config.round}: choose a divisor"),
        (share % size == 0 or size % share == 0, f"{apart}: choose one that is"),
    )


def _match_group(queries: Tensor, pool: Pool, ranks: Ranks) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Collective: distances (n,) float64 and ids (n,) of this rank's images of a group, and metrics of the group."""
    counts = ranks.collect(len(queries))
    result = search(
        queries,
        pool.blocks(),
        pool.first,
        group=ranks,
    )
    distances = result.distances[:, 0].cpu()
    ids = result.ids[:, 0].cpu()
    values = summarize(distances, ids, counts, ranks)
    values["match/measured"] = max(ranks.collect(result.measured))
    return distances, ids, values


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
