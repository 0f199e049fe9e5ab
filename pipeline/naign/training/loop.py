"""The loop: each round takes images, matches them with samples, fits the network, reports and checkpoints.

Everything random is a function of (seed, round, number), so a run that resumes goes on exactly as if it had never
stopped, also within the fit of a round. In its first stage f is trained, and the prior may learn beside it; in the
second, of prior.alone, f is frozen and the prior alone learns.
"""

import gc
import logging
from collections.abc import Sequence
from dataclasses import replace
from shlex import quote

from accelerate import Accelerator
from torch import Tensor

from naign import philox
from naign.config import Config
from naign.distributed.ranks import gather, together, total
from naign.errors import InputError, Stopped, Unavailable
from naign.observe import at_round
from naign.training.callbacks import Callback, call
from naign.training.fit import fit
from naign.training.learn_prior import learn_prior
from naign.training.prepare import prepare
from naign.training.quality import Quality
from naign.training.report import headline, report
from naign.training.round import RoundState, find_match, take
from naign.training.run import Run
from naign.training.state import PartialRound, snapshot

log = logging.getLogger("naign.train")

MEASURED = 2**40  # first id of the latents that quality measures: no evaluation reports on the same ones


def train(config: Config, accelerator: Accelerator, callbacks: Sequence[Callback] = ()) -> bool:
    """Train until the budget is spent. Returns False if a signal ended it earlier, after a checkpoint. Collective."""
    run, partial = prepare(config, accelerator, callbacks)
    with run.stream, run.monitor, run.watchdog:
        run.monitor.say(headline(run))
        if not gc.isenabled():  # since the program's start
            gc.freeze()  # objects that stay until the end are not searched again
            gc.enable()
        run_rounds(run, partial)
        finished = finish(run)
        gc.unfreeze()  # else Triton lists what it calls leaks when the program ends
    if run.lock:
        run.lock.release()
    if finished and run.rank == 0:
        place = config.run.remote or config.run.path
        ended = "" if run.position.round >= run.rounds else " (ended by quality.patience)"
        print(f"done{ended}: the run lies in {place}; measure it with: naign evaluate {quote(place)}")
    return finished


def run_rounds(run: Run, partial: PartialRound | None) -> None:
    """Train round by round, from `partial` on, until the run is finished or all ranks agree to stop. Collective."""
    position = run.position
    state: RoundState | None = None
    try:
        while not run.finished:
            at_round(position.round)
            before = position.seen
            with run.phases.round():
                with run.phases.enter("take"):
                    state, rows = take(run, partial)
                values = dict(learn_prior(run, state))
                if not run.prior_only:
                    with run.phases.enter("match"):
                        if run.config.objective.needs_match and state.match is None:
                            state.match = find_match(run, state)
                    with run.phases.enter("fit"):
                        values |= fit(run, state)
            position.round, position.done = position.round + 1, 0
            better = measure(run, run.quality, state, values) if run.quality else False
            if run.callbacks:
                with run.phases.enter("callbacks"), together(run.accelerator):
                    call(run, "on_round", values)
            with run.phases.enter("report"), together(run.accelerator):
                report(run, state, rows, values, images=position.seen - before)
            state = partial = None

            with run.phases.enter("checkpoint"):
                stopping = run.stop.poll_stop()[0] and not run.finished
                if run.finished or stopping or better or position.round % run.config.checkpoint.rounds == 0:
                    checkpoint(run, best=better)
            if stopping:
                raise Stopped
    except Stopped:
        checkpoint(run, gather_partial(run, state) if state and position.done else partial)
        where = f"round {position.round + 1} of {run.rounds}"
        run.monitor.say(f"stopped on request in {where}; the same command goes on from here")
    except (InputError, Unavailable):  # raised on all ranks: a checkpoint that is being written can be finished
        run.writer.join(within=run.config.stop.within)
        raise


def measure(run: Run, quality: Quality, state: RoundState, values: dict[str, float]) -> bool:
    """Add quality/* to `values`, if a measurement is due. Returns whether it is the best so far. Collective."""
    rounds = run.position.round
    if rounds % run.config.quality.rounds:
        return False
    with run.phases.enter("quality"):
        random = replace(state.random, round=philox.SAMPLES)

        def latents(ids: Tensor) -> Tensor:
            run.watchdog.beat()
            return random.latents(ids + MEASURED)

        measured, better = quality.measure(run.engine, latents, state.images, rounds=rounds)
    values |= measured
    if quality.exhausted(rounds) and rounds < run.rounds:
        since = f"no better than in round {quality.best['round']}"
        run.monitor.say(f"stopped by quality.patience in round {rounds} of {run.rounds}: {since}")
    return better


def finish(run: Run) -> bool:
    """Wait for the last checkpoint and its copy. Returns whether the budget is spent and all is written. Collective."""
    run.watchdog.enter("finish", run.position.round)
    written = run.writer.finish()
    if not written:
        log.warning("the newest checkpoint, or its copy, could not be finished in time")
    return run.finished and not total([float(not written)], run.accelerator)[0]


def gather_partial(run: Run, state: RoundState) -> PartialRound:
    """What has to be kept of the current round, the match of all ranks included. Collective."""
    match = state.match
    if match and state.world_size_at_start == run.world:  # else every rank has the whole match
        ids, distances = (gather(part, run.accelerator).cpu() for part in (match.ids, match.distances))
        match = replace(match, ids=ids, distances=distances)
    return PartialRound(world_size_at_start=state.world_size_at_start, match=match, sums=state.sums)


def checkpoint(run: Run, kept: PartialRound | None = None, *, best: bool = False) -> None:
    """Begin to write checkpoints/step-XXXXXXXX in the background, unless it is there already. Collective."""
    position, writer = run.position, run.writer
    if (name := f"step-{position.step:08d}") == writer.newest:
        return
    if not position.step and run.prior.learns and not position.learned:
        return  # in the first round, before the prior has learned: a new start does the same
    ready = writer.join(share=0.5)  # the one before may still be on its way to the bucket
    late, spent = total([float(not ready), run.phases.cpu_seconds], run.accelerator)
    if late:
        log.warning("%s is not written: the one before it is still being sent, and time is short", name)
        return
    position.cpu_seconds, run.phases.cpu_seconds = position.cpu_seconds + spent, 0.0
    copy, files = snapshot(run.config, run.stream, run.engine, position, run.prior, kept)
    with together(run.accelerator):
        writer.start(name, copy, files, run.quality.record(name) if best and run.quality else "")
