"""Learn: the prior learns from a round, where it is one that learns; how is in its file of `model/prior/`."""

import math
from functools import partial

from accelerate.utils import broadcast

from naign.config import Config
from naign.distributed.ranks import gather
from naign.distributed.signals import StopPoll
from naign.errors import Diverged, Stopped
from naign.model.prior import Examples
from naign.training.round import RoundState
from naign.training.run import Run

TRACKED = 1024  # images of a round, at least, whose codes' mean and covariance a prior tracks


def learn_prior(run: Run, state: RoundState) -> dict[str, float]:
    """Let the prior learn from a round, unless it did before a stop. Returns its metrics. Collective."""
    prior, position, accelerator = run.prior, run.position, run.accelerator
    if not prior.learns or position.learned > state.number:
        return prior.metrics
    with run.phases.enter("learn"):
        stop_requested = StopPoll(run.stop)
        examples = Examples(
            images=state.images,
            labels=state.labels,
            encode=partial(run.engine.exported, "encode"),
            round=state.number,
            progress=state.number / run.rounds,
            covers=1 / run.rounds,
            settled=max(0, state.number - run.network_rounds),
            stride=tracked_every(run.config),
            rank=run.rank,
            world=run.world,
            gather=partial(gather, accelerator=accelerator),
            add=accelerator.reduce,
            autocast=accelerator.autocast,
        )
        size, shown = run.config.match.round if run.prior_only else 0, 0
        for progress in prior.learn(examples):
            position.step += 1  # also beside f: it names the checkpoint of a stop, and none is written twice
            run.watchdog.beat()
            learned = int(size * (progress - examples.progress) / examples.covers)
            run.monitor.advance(learned - shown)
            shown = learned
            if stop_requested():
                raise Stopped
        position.learned = state.number + 1
        if run.prior_only:
            position.step += 1  # also of a prior that makes no steps
            position.codes_seen += run.config.match.round
            run.monitor.advance(size - shown)
        if bad := [name for name, value in prior.metrics.items() if not math.isfinite(value)]:
            raise Diverged(f"{bad[0]} of the prior is not finite in round {state.number}: lower prior.lr")
        broadcast(list(prior.state_dict().values()))  # the same bits on every rank, whatever its machine
    return prior.metrics


def tracked_every(config: Config) -> int:
    """The stride in a round's images at which they are encoded before the flow of codes begins: until then samples are
    for pictures only, unless f is trained on latents. It divides the rows of a rank for any number of ranks, so that
    the same images are encoded on every world size.
    """
    steps = config.match.round // config.train.batch
    wanted = 1 if config.objective.needs_latents else config.match.round // TRACKED
    return max(every for every in range(1, steps + 1) if steps % every == 0 and every <= max(1, wanted))
