"""Match: each image finds the latent whose sample is nearest, out of the pool of all ranks."""

import logging

import torch
from torch import Tensor

from pipeline.errors import Diverged, Stopped
from pipeline.match import Match, NotFinite, match_round
from pipeline.training.fit import REMEDY
from pipeline.training.round import RoundState
from pipeline.training.run import Run

log = logging.getLogger("naign.train")


def find_match(run: Run, state: RoundState) -> Match:
    """For each image of this rank the latent whose sample is nearest, out of the pool of all ranks. Collective."""
    stop_requested, engine = run.phases.poll("match"), run.engine

    def poll() -> None:
        run.watchdog.beat()
        if stop_requested():
            raise Stopped

    def sample(ids: Tensor) -> Tensor:
        try:
            parts = ids.chunk(1 + engine.halved)
            return torch.cat([engine.sample(state.random.latents(part)) for part in parts])
        except torch.cuda.OutOfMemoryError:
            if engine.halved or engine.sharded:  # a sharded forward is collective: ranks would no longer be in step
                raise
            engine.halved = True
        torch.cuda.empty_cache()
        log.warning("match.block=%d samples do not fit this GPU: they are generated in halves", run.config.match.block)
        return sample(ids)

    try:
        match = match_round(state.images, sample, run.config.match, run.features, poll)
    except NotFinite as error:  # on all ranks
        diverged = f"the network's samples are not finite in round {state.number} ({error}): the run has diverged"
        raise Diverged(f"{diverged}; {REMEDY}") from None
    if match.described != run.monitor.described:
        run.monitor.described = match.described
        run.monitor.say(match.described)
    return match
