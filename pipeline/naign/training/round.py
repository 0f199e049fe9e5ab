"""The current round: its images, its random numbers and its match, and how a rank comes by them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from naign import philox
from naign.config import Config
from naign.data import damage
from naign.data.loader import Rows, Stream
from naign.data.order import rank_rows
from naign.distributed.ranks import together, total
from naign.distributed.signals import StopPoll
from naign.errors import Diverged, InputError, Stopped, Unavailable, require
from naign.match import Match, NotFinite, match_round
from naign.model.prior import Prior
from naign.model.scale import scaled
from naign.training.run import Run
from naign.training.state import PartialRound

REMEDY = "lower train.lr, set train.clip or raise the precision, in a new --run.path"  # for a run that diverged


@dataclass(slots=True)
class RoundRandom:
    """Random numbers of a round, by `philox`: a row is a function of (seed, round, its number), on any world size."""

    config: Config
    round: int
    shape: tuple[int, ...]
    device: torch.device
    prior: Prior
    decode: Callable[[Tensor], Tensor] = lambda drawn: drawn  # by f, of codes, where the prior draws codes

    def latents(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents (len(ids), *shape) from the prior, of the classes `labels` (n,) int64 where they are given."""
        prior: Any = self.prior
        asked = () if labels is None else (labels,)
        drawn = prior.draw(self.config.seed, self.round, ids, self.device, *asked)
        return self.decode(drawn) if self.prior.decodes else drawn

    def damaged(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Images (n, *shape) with objective.damage applied; independent of the latents."""
        kind = damage.find_damage(self.config.objective.damage)
        key = self.config.seed, self.round, numbers, (kind.uniforms(self.shape),), self.device
        uniform = philox.uniform(*key, stream=philox.DAMAGE)
        return kind.damage(images, self.normals(numbers), uniform, self.config.objective.noise)

    def normals(self, numbers: Tensor, step: int = 0) -> Tensor:
        """Standard normals (len(numbers), *shape), other ones for each `step`; independent of the latents."""
        key = self.config.seed, self.round, numbers + step * 2**40, self.shape, self.device
        return philox.normal(*key, stream=philox.NOISE)


@dataclass(kw_only=True, slots=True)
class RoundState(PartialRound):
    """The current round on this rank: the match is that of `images`, and the sums include the number of `steps`."""

    number: int
    random: RoundRandom
    images: Tensor  # (n, *shape): this rank's share, or the whole round if it was started with another world size
    labels: Tensor | None = None  # (n,) int64, of a run with prior.classes
    first: int = 0  # row of the round that images[0] is


def take(run: Run, kept: PartialRound | None) -> tuple[RoundState, Rows]:
    """Read this rank's share of the next round, and go on from what is kept of it. Collective."""
    config, number, device = run.config, run.position.round, run.accelerator.device
    rows = read_round(run, run.stream, number)
    images = scaled(rows.images.to(device))
    if config.prior.classes:
        missing = (rows.labels < 0).nonzero().flatten().tolist()
        keys = f"{rows.keys[missing[0]]} and {len(missing) - 1} more samples of a round have" if missing else ""
        with together(run.accelerator):
            require((not missing, f"prior.classes is set, but {keys} no label: repack the data set, or leave it out"))
    random = RoundRandom(config, number, run.stream.shape, device, run.prior, partial(run.engine.exported, "decode"))
    first, last = rank_rows(config.match.round, run.rank, run.world)
    state = RoundState(number=number, world_size_at_start=run.world, random=random, images=images, first=first)
    state.labels = rows.labels.to(device) if config.prior.classes else None
    if kept:
        state.world_size_at_start = kept.world_size_at_start
        if kept.world_size_at_start != run.world:  # each step's images are dealt anew, from the whole round
            first, last, state.first = 0, config.match.round, 0
            with together(run.accelerator):
                data = replace(config.data, trace="", workers=0)
                whole = Stream(data, seed=config.seed, round_size=config.match.round, prefetch=False)
            with whole:
                state.images = scaled(read_round(run, whole, number).images.to(device))
        state.sums = {name: value.to(device) for name, value in kept.sums.items()}
        if match := kept.match:
            state.match = replace(match, ids=match.ids[first:last], distances=match.distances[first:last])
    return state, rows


def read_round(run: Run, stream: Stream, number: int) -> Rows:
    """A round from `stream`, once every rank has read its own. Collective.

    Only rows that arrive, on any rank, count as progress: a store that stalls ends the run after train.timeout.
    """
    arrived = math.inf  # rows read by all ranks at the last look

    def all_done(done: bool) -> bool:
        nonlocal arrived
        before, (arrived, missing) = arrived, total([stream.rows_read, float(not done)], run.accelerator)
        if arrived > before:
            run.watchdog.beat()
        return not missing

    problem: Exception | None = None
    with together(run.accelerator):
        try:
            rows = stream.take(number, lambda: all_done(False) or run.stop.seen())
        except (InputError, Unavailable, Stopped) as error:
            problem = error
        run.watchdog.beat()
        while not all_done(True):
            pass  # it takes as long as the slowest rank is between two looks
        if problem:
            raise problem
    return rows


def find_match(run: Run, state: RoundState) -> Match:
    """For each image of this rank the latent whose sample is nearest, out of the pool of all ranks. Collective."""
    stop_requested = StopPoll(run.stop)

    def poll() -> None:
        run.watchdog.beat()
        if stop_requested():
            raise Stopped

    def sample(ids: Tensor) -> Tensor:
        return run.engine.sample(state.random.latents(ids))

    try:
        match = match_round(state.images, sample, run.config.match, poll)
    except NotFinite as error:  # on all ranks
        diverged = f"the network's samples are not finite in round {state.number} ({error}): the run has diverged"
        raise Diverged(f"{diverged}; {REMEDY}") from None
    if match.described != run.monitor.described:
        run.monitor.described = match.described
        run.monitor.say(match.described)
    return match
