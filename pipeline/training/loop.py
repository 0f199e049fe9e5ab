"""The loop: each round takes images, matches them with samples, fits the network, reports and checkpoints.

Progress is counted in images seen. Everything random is a function of (seed, round, number), so a run that resumes goes
on exactly as if it had never stopped, whether it stopped between two rounds or within the fit of one.
"""

import gc
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline import philox
from pipeline.config import Config
from pipeline.data import Rows, Stream, rank_rows
from pipeline.distributed import broadcast, gather, reduce, together, total, warn_of_others
from pipeline.errors import Diverged, InputError, Stopped, Unavailable
from pipeline.match import Match, NotFinite, match_round
from pipeline.model import scaled
from pipeline.model.prior import Examples
from pipeline.observe import at_round
from pipeline.training.fit import REMEDY, fit
from pipeline.training.prepare import prepare, resume
from pipeline.training.quality import Quality
from pipeline.training.report import headline, report
from pipeline.training.round import RoundRandom, RoundState, Run
from pipeline.training.state import PartialRound, snapshot

log = logging.getLogger("naign.train")

MEASURED = 2**40  # first id of the latents that quality measures: no evaluation reports on the same ones
TRACKED = 1024  # images of a round, at least, whose codes' mean and covariance a prior tracks


def train(config: Config, accelerator: Accelerator) -> bool:
    """Train until the budget is spent. Returns False if a signal ended it earlier, after a checkpoint. Collective."""
    run, network = prepare(config, accelerator)
    partial = resume(run, network)
    with run.stream, run.monitor, run.watchdog, run.profiler:
        run.monitor.say(headline(run))
        if not gc.isenabled():  # since the program's start
            gc.freeze()  # what stays until the end is not looked through again
            gc.enable()
        run_rounds(run, partial)
        finished = finish(run)
    if run.lock:
        run.lock.release()
    if finished and run.rank == 0:
        place = config.run.remote or config.run.path
        print(f"done: the run lies in {place}; measure it with: naign evaluate {place}")
    return finished


def run_rounds(run: Run, partial: PartialRound | None) -> None:
    """Train round by round, from `partial` on, until the budget is spent or all ranks agree to stop. Collective."""
    config, position = run.config, run.position
    images = config.match.round * config.train.passes  # trained on in each round
    first = position.round
    state: RoundState | None = None
    try:
        while position.round < run.rounds:
            at_round(position.round)
            run.seconds.clear()
            done = position.done
            with run.profiler.round(position.round), measured(run):
                with run.phase("take"):
                    state, taken = take(run, partial)
                values = learn_prior(run, state) if run.prior.learns else {}
                if position.round < run.fitted:
                    with run.phase("match"):
                        if config.objective.needs_match and state.match is None:
                            state.match = find_match(run, state)
                    with run.phase("fit"):
                        values |= fit(run, state, run.fitted * images)
                else:  # f stays as it is
                    position.images_seen += images
                    position.step += images // config.train.batch
                    run.monitor.advance(images)
            position.round, position.done = position.round + 1, 0
            better = False
            if run.quality and run.quality.due(position.round):
                with run.phase("quality"):
                    better = measure(run, run.quality, state, values)
            with run.phase("report"), together(run.accelerator):
                report(run, state, taken, values, images=images - done * config.train.batch)
            if state.number == first and run.world == 1 and run.accelerator.device.type == "cpu":
                warn_of_others()  # again: two runs that start together see one another only now
            state = partial = None

            with run.phase("checkpoint"):
                last = position.round == run.rounds
                stopping = run.stop.poll_stop()[0] and not last
                if last or stopping or better or position.round % config.checkpoint.rounds == 0:
                    checkpoint(run, best=better)
            if stopping:
                raise Stopped
    except Stopped:
        checkpoint(run, gather_partial(run, state) if state and position.done else partial)
        where = f"round {position.round + 1} of {run.rounds}"
        run.monitor.say(f"stopped on request in {where}; the same command goes on from here")
    except (InputError, Unavailable):  # raised on all ranks: a checkpoint that is being written can be finished
        run.writer.join(within=config.stop.within)
        raise


def measure(run: Run, quality: Quality, state: RoundState, values: dict[str, float]) -> bool:
    """Add quality/* to `values`, and end the run where patience ends. Returns whether it is the best. Collective."""
    random, rounds = replace(state.random, round=philox.SAMPLES), run.position.round
    measured, better = quality.measure(
        run.engine,
        lambda ids: random.latents(ids + MEASURED),
        state.images,
        rounds=rounds,
        beat=run.watchdog.beat,
    )
    values |= measured
    if quality.exhausted(rounds) and rounds < run.rounds:
        run.monitor.say(f"stopped in round {rounds} of {run.rounds}: no better than in round {quality.best['round']}")
        run.rounds = rounds
    return better


def finish(run: Run) -> bool:
    """Wait for the last checkpoint and its copy. Returns whether the budget is spent and all is written. Collective."""
    run.watchdog.enter("finish", run.position.round)
    written = run.writer.join()
    if written and run.writer.unsent:  # once more: whoever starts this run again may have only the bucket
        run.writer.resend(run.writer.unsent)
        written = run.writer.join()
    if not written:
        log.warning("the newest checkpoint, or its copy, could not be finished in time")
    return run.position.round >= run.rounds and not total([float(not written)], run.accelerator)[0]


@contextmanager
def measured(run: Run) -> Iterator[None]:
    """Add up the wall and processor time spent inside, also where the round is stopped."""
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        run.position.seconds += time.perf_counter() - wall
        run.cpu_seconds += time.process_time() - cpu


def take(run: Run, kept: PartialRound | None) -> tuple[RoundState, Rows]:
    """Read this rank's share of the next round, and go on from what is kept of it. Collective."""
    config, number, device = run.config, run.position.round, run.accelerator.device
    taken = read_round(run, run.stream, number)
    images = scaled(taken.images.to(device))
    random = RoundRandom(config, number, run.stream.shape, device, run.prior, partial(run.engine.exported, "decode"))
    first, last = rank_rows(config.match.round, run.rank, run.world)
    state = RoundState(number=number, world_size_at_start=run.world, random=random, images=images, first=first)
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
    return state, taken


def learn_prior(run: Run, state: RoundState) -> dict[str, float]:
    """Let the prior learn from a round, unless it did before a stop. Returns its metrics. Collective."""
    if run.position.learned > state.number:
        return run.prior.metrics
    with run.phase("learn"):
        stop_requested = run.poll("learn")
        examples = Examples(
            images=state.images,
            encode=partial(run.engine.exported, "encode"),
            round=state.number,
            progress=state.number / run.rounds,
            covers=1 / run.rounds,
            settled=max(0, state.number - run.fitted),
            stride=tracked_every(run.config),
            rank=run.rank,
            world=run.world,
            gather=partial(gather, accelerator=run.accelerator),
            add=partial(reduce, accelerator=run.accelerator),
            autocast=run.accelerator.autocast,
        )
        for _ in run.prior.learn(examples):
            run.watchdog.beat()
            if stop_requested():
                raise Stopped
        run.position.learned = state.number + 1
        for name, value in run.prior.metrics.items():
            if not math.isfinite(value):
                raise Diverged(f"{name} of the prior is not finite in round {state.number}: lower prior.lr")
        broadcast(run.prior.state_dict().values())  # the same bits on every rank, whatever its machine
    return run.prior.metrics


def tracked_every(config: Config) -> int:
    """The stride in a round's images at which they are encoded before the flow of codes begins.

    Until then samples are for pictures only, unless f is trained on latents. The stride divides the rows of a rank for
    any number of ranks, so that the same images are encoded on every world size.
    """
    steps = config.match.round // config.train.batch
    wanted = 1 if config.objective.needs_latents else config.match.round // TRACKED
    return max(every for every in range(1, steps + 1) if steps % every == 0 and every <= max(1, wanted))


def read_round(run: Run, stream: Stream, number: int) -> Rows:
    """A round from `stream`, once every rank has read its own. Collective.

    Only rows that arrive, on any rank, count as progress: a store that stalls ends the run after train.timeout.
    """
    rows = math.inf  # read by all ranks at the last look

    def all_done(done: bool) -> bool:
        nonlocal rows
        before, (rows, missing) = rows, total([stream.rows_read, float(not done)], run.accelerator)
        if rows > before:
            run.watchdog.beat()
        return not missing

    problem: Exception | None = None
    with together(run.accelerator):
        try:
            taken = stream.take(number, lambda: all_done(False) or run.stop.seen())
        except (InputError, Unavailable, Stopped) as error:
            problem = error
        run.watchdog.beat()
        while not all_done(True):
            pass  # it takes as long as the slowest rank is between two looks
        if problem:
            raise problem
    return taken


def find_match(run: Run, state: RoundState) -> Match:
    """For each image of this rank the latent whose sample is nearest, out of the pool of all ranks. Collective."""
    stop_requested, engine = run.poll("match"), run.engine

    def poll() -> None:
        run.watchdog.beat()
        if stop_requested():
            raise Stopped

    def sample(ids: Tensor) -> Tensor:
        try:
            parts = ids.chunk(1 + run.halved)
            return torch.cat([engine.sample(state.random.latents(part)) for part in parts])
        except torch.cuda.OutOfMemoryError:
            if run.halved or engine.sharded:  # a sharded forward is collective: ranks would no longer be in step
                raise
            run.halved = True
        torch.cuda.empty_cache()
        log.warning("match.block=%d samples do not fit this GPU: they are generated in halves", run.config.match.block)
        return sample(ids)

    try:
        match = match_round(state.images, sample, run.config.match, run.features, poll, engine.encode)
    except NotFinite as error:  # on all ranks
        said = f"the network's samples are not finite in round {state.number} ({error}): the run has diverged"
        raise Diverged(f"{said}; {REMEDY}") from None
    if match.described != run.monitor.described:
        run.monitor.described = match.described
        run.monitor.say(match.described)
    return match


def gather_partial(run: Run, state: RoundState) -> PartialRound:
    """What has to be kept of the current round, the match of all ranks included. Collective."""
    match = state.match
    if match and state.world_size_at_start == run.world:  # else every rank has the whole match
        ids, distances = (gather(part, run.accelerator).cpu() for part in (match.ids, match.distances))
        match = replace(match, ids=ids, distances=distances)
    return PartialRound(world_size_at_start=state.world_size_at_start, match=match, sums=state.sums)


def checkpoint(run: Run, kept: PartialRound | None = None, *, best: bool = False) -> None:
    """Begin to write checkpoints/step-XXXXXXXX in the background, unless it is there already. Collective."""
    if (name := f"step-{run.position.step:08d}") == run.checkpointed:
        return
    if not run.position.step and run.prior.learns and not run.position.learned:
        return  # in the first round, before the prior has learned: a new start does the same
    ready = run.writer.join(share=0.5)  # the one before may still be on its way to the bucket
    late, spent = total([float(not ready), run.cpu_seconds], run.accelerator)
    if late:
        log.warning("%s is not written: the one before it is still being sent, and time is short", name)
        return
    run.position.cpu_seconds, run.cpu_seconds = run.position.cpu_seconds + spent, 0.0
    copy, files = snapshot(run.config, run.stream, run.engine, run.position, run.prior, kept)
    with together(run.accelerator):
        run.writer.start(name, copy, files, run.quality.record(name) if best and run.quality else "")
    run.checkpointed = name
