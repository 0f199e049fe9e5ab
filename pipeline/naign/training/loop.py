"""The training of a run, in two stages: f learns in rounds, then the prior is fitted to the codes of the data.

Everything random is a function of (seed, round, number), so a run that resumes goes on exactly as if it had never
stopped. A stop ends stage 1 between two rounds; what was begun of a round is repeated.
"""

import gc
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from shlex import quote

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from naign import philox
from naign.config import Config
from naign.data.damage import find_damage
from naign.data.loader import Rows
from naign.data.order import parts, rank_rows
from naign.data.scale import scaled
from naign.distributed.ranks import together, total
from naign.distributed.signals import StopPoll
from naign.errors import SHARED, Diverged, InputError, Stopped
from naign.match import Match, NotFinite, match_round
from naign.match.sharded import ShardedIndex
from naign.model.bank import CODES, REFERENCES, VALUES, disturbed, rounded, unit
from naign.model.losses import DISTANCES, Batch, compute_losses
from naign.model.prior import Codes
from naign.model.prior.base import KEPT
from naign.observe import at_round
from naign.training.callbacks import Callback, call
from naign.training.report import headline, report_prior, report_round
from naign.training.setup import count_codes, count_fitted, set_up_run
from naign.training.state import Snapshot, snapshot
from naign.training.steps import REMEDY, StepLosses, learning_rate, rows_of_steps
from naign.training.trainer import Trainer

log = logging.getLogger("naign.train")

ENCODED = 512  # images encoded at once
REPORTS = 10  # of stage 2
SAVED = 60.0  # seconds between two checkpoints of stage 2


def train(config: Config, accelerator: Accelerator, callbacks: Sequence[Callback] = ()) -> bool:
    """Train f, then fit the prior. Returns False if a signal ended the run, after a checkpoint. Collective."""
    run = set_up_run(config, accelerator, callbacks)
    with run.stream, run.monitor, run.watchdog:
        run.monitor.say(headline(run))
        gc.enable()  # which it was not since the program's start
        run.phases.start()
        try:
            train_network(run)
            fit_prior(run)
        except Stopped:
            stage = f"round {run.state.round + 1} of {run.rounds}"
            if run.state.round >= run.rounds:
                stage = f"the fit of the prior, of which {run.state.fitted:.0%} is done"
            place = run.writer.newest or "the start: no round was done"
            run.monitor.say(f"stopped on request in {stage}; the same command goes on from {place}")
        except SHARED:  # raised on all ranks: a checkpoint that is being written can be finished
            run.writer.join(within=config.stop.within)
            raise
        finished = finish(run)
    if run.lock:
        run.lock.release()
    if finished and run.rank == 0:
        place = config.run.remote or config.run.path
        print(f"done: the run lies in {place}; measure it with: naign evaluate {quote(place)}")
    return finished


def train_network(run: Trainer) -> None:
    """Stage 1: train f round by round, until it has seen train.images. Collective; raises Stopped."""
    config = run.config
    state = run.state
    longest = 0.0  # seconds of a round of this start
    while state.round < run.rounds:
        at_round(state.round)
        kept = None
        if longest > config.stop.within / 2:  # a stop may not wait for the end of the round
            kept = take_snapshot(run)
        with run.phases.round():
            try:
                with run.phases.enter("take"):
                    rows, images = read_round(run, state.round)
                    if state.round == 0:
                        run.latents.measure(images, run.accelerator.reduce, run.world)
                match = None
                with run.phases.enter("match"):
                    if config.objective.needs_match:
                        match = find_match(run, images)
            except Stopped:  # f is as it was when the round began
                save(run)
                raise
            try:
                with run.phases.enter("fit"):
                    # A round that is left without a snapshot loses all rounds since the last checkpoint.
                    losses = fit(run, images, match, may_stop=bool(kept) or longest == 0)
            except Stopped:
                if kept:
                    save(run, kept)
                raise
        spent = total([sum(run.phases.seconds.values())], run.accelerator)[0] / run.world
        longest = max(longest, spent)  # the same on every rank: a snapshot is collective
        state.round += 1
        if state.round == run.rounds and not run.prior.learns:
            state.fitted = 1.0  # nothing is left to fit
        if run.callbacks:
            with run.phases.enter("callbacks"), together(run.accelerator):
                call(run, "on_round", losses)
        with run.phases.enter("report"), together(run.accelerator):
            report_round(run, rows, images, match, losses)
        with run.phases.enter("checkpoint"):
            stopping, _ = run.stop.poll_stop()
            due = state.round % config.checkpoint.rounds == 0 or state.round == run.rounds
            if due or stopping:
                save(run)
        if stopping and not run.finished:
            raise Stopped


def fit(
    run: Trainer,
    images: Tensor,
    match: Match | None,
    *,
    may_stop: bool = True,
) -> dict[str, float]:
    """Train f on each image of the round train.passes times, with its latent. Collective; raises Stopped where it may.

    Returns each loss's mean over steps and ranks, and the last learning rate. Raises Diverged as StepLosses does.
    """
    config = run.config
    engine = run.engine
    state = run.state
    objective = config.objective
    losses = StepLosses(run)
    stop_requested = StopPoll(run.stop)
    first, _ = rank_rows(config.match.round, run.rank, run.world)
    budget = run.rounds * config.match.round * config.train.passes
    matched = None if match is None else match.ids.to(images.device)
    # Uploaded once a round: an upload a step would make the launches wait for the device.
    steps = rows_of_steps(config, state.round, rank=run.rank, world=run.world).to(images.device)
    for done, numbers_of_step in enumerate(steps):
        run.watchdog.beat()
        if stop_requested() and may_stop and not fits_in_time(run, stop_requested.elapsed, done / len(steps)):
            raise Stopped
        rate = learning_rate(config.train, state.images_seen, budget)
        engine.set_lr(rate)
        for numbers in numbers_of_step.split(engine.micro):  # unique within the round, passes included
            rows = numbers % config.match.round - first
            latents = damaged = None
            if objective.needs_latents:
                ids = numbers if matched is None else matched[rows]
                latents = run.latents.draw(config.seed, state.round, ids, images.device)
                if matched is not None:
                    latents = run.latents.buried(latents, config.seed, state.round, numbers)
            if objective.needs_damaged:
                damaged = damage_images(config, state.round, images[rows], numbers)
            with engine.micro_batch():
                batch = Batch(
                    images=images[rows],
                    latents=latents,
                    damaged=damaged,
                    distance=DISTANCES[objective.distance],
                    frozen=engine.bare,
                    normals=partial(draw_noise, config, state.round, images.shape[1:], images.device, numbers),
                )
                # One step's forwards stand for all of the round; a backward takes as long as two.
                with run.apart("fit", 3 * len(steps)) if done == len(steps) // 2 else nullcontext():
                    terms = compute_losses(objective, engine.forward, batch)
                engine.backward(terms["total"])
            losses.add(terms)
        norm = engine.step()  # clips the gradient, makes the step, moves the average of the weights
        losses.end_step(norm)
        state.step += 1
        state.images_seen += config.train.batch
        run.monitor.advance(config.train.batch)
    return losses.means() | {"train/lr": rate}


def draw_noise(
    config: Config,
    round: int,
    shape: Sequence[int],
    device: torch.device,
    numbers: Tensor,
    step: int = 0,
) -> Tensor:
    """Standard normals (len(numbers), *shape), other ones for each `step`; independent of the latents."""
    return philox.normal(config.seed, round, numbers + step * 2**40, tuple(shape), device, stream=philox.NOISE)


def damage_images(config: Config, round: int, images: Tensor, numbers: Tensor) -> Tensor:
    """Images (n, *shape) with objective.damage applied; a function of (seed, round, numbers)."""
    kind = find_damage(config.objective.damage)
    shape = images.shape[1:]
    drawn = philox.uniform(
        config.seed,
        round,
        numbers,
        (kind.uniforms(shape),),
        images.device,
        stream=philox.DAMAGE,
    )
    noise = draw_noise(config, round, shape, images.device, numbers)
    return kind.damage(images, noise, drawn, config.objective.noise)


def find_match(run: Trainer, images: Tensor) -> Match:
    """For each image of this rank the latent whose sample is nearest, out of the pool of all ranks. Collective."""
    stop_requested = StopPoll(run.stop)

    def poll() -> None:
        run.watchdog.beat()
        if stop_requested():
            raise Stopped

    def sample(ids: Tensor) -> Tensor:
        latents = run.latents.draw(run.config.seed, run.state.round, ids, images.device)
        with run.apart("match"):
            return run.engine.sample(latents)

    try:
        return match_round(images, sample, run.config.match, poll)
    except NotFinite as error:  # on all ranks
        diverged = f"the network's samples are not finite in round {run.state.round} ({error}): the run has diverged"
        raise Diverged(f"{diverged}; {REMEDY}") from None


def fits_in_time(run: Trainer, seconds: float, done: float) -> bool:
    """Whether the rest of a round, of which the share `done` has taken so many seconds, and a checkpoint end before
    the run must. Collective.
    """
    left = run.stop.left - max(run.writer.seconds, 0.2 * run.config.stop.within)
    needed = seconds * (1 - done) / max(done, 1e-9)
    return not total([needed > left], run.accelerator)[0]


def read_round(run: Trainer, number: int) -> tuple[Rows, Tensor]:
    """This rank's rows of a round, and their images in [-1, 1], once every rank has read its own. Collective.

    Only rows that arrive, on any rank, count as progress: a store that stalls ends the run after train.timeout.
    """
    arrived = math.inf  # rows read by all ranks at the last look

    def all_done(done: bool) -> bool:
        nonlocal arrived
        before = arrived
        arrived, missing = total([run.stream.rows_read, not done], run.accelerator)
        if arrived > before:
            run.watchdog.beat()
        return not missing

    problem: Exception | None = None
    with together(run.accelerator):
        try:
            with run.phases.alone("take"):
                rows = run.stream.take(number, lambda: all_done(False) or run.stop.seen())
        except SHARED as error:
            problem = error
        run.watchdog.beat()
        while not all_done(True):
            pass  # it takes as long as the slowest rank is between two looks
        if problem:
            raise problem
    return rows, scaled(rows.images.to(run.accelerator.device))


def fit_prior(run: Trainer) -> None:
    """Stage 2: fit the prior to the codes of the data, with f as it is. Collective; raises Stopped."""
    state = run.state
    if state.fitted >= 1:
        return
    name = run.config.prior.name
    count = count_codes(run.config, run.stream)
    run.monitor.say(f"stage 2: f is trained, and {name} is fitted to the codes of {count} images")
    at_round(None)
    stop_requested = StopPoll(run.stop)
    saved = 0.0
    with run.phases.enter("prior"):
        try:
            for fitted in run.prior.fit(encode_data(run)):
                run.watchdog.beat()
                state.step += 1
                reported = int(REPORTS * state.fitted)
                if fitted < 1:  # all of it is done once the bank is filled, too
                    advance_prior(run, fitted)
                stopping = stop_requested()
                if reported < int(REPORTS * fitted) < REPORTS:
                    with together(run.accelerator):
                        report_prior(run)
                if stopping and fitted < 1:
                    raise Stopped
                if stop_requested.elapsed - saved > SAVED:
                    saved = stop_requested.elapsed
                    save(run)
            broadcast(list(run.prior.state_dict().values()))  # the same bits on every rank, whatever its machine
            if run.prior.decodes and len(run.stream.shape) == 3:  # images
                with run.phases.enter("bank"):
                    fill_bank(run)
        except Stopped:
            save(run)
            raise
    state.step += 1  # also for a prior that is fitted without steps
    advance_prior(run, 1.0)
    with run.phases.enter("report"), together(run.accelerator):
        report_prior(run)
    save(run)


def advance_prior(run: Trainer, fitted: float) -> None:
    """Count the share of stage 2 that is done."""
    before = run.state.codes_seen
    run.state.fitted = fitted
    run.state.codes_seen = round(fitted * count_fitted(run.config, run.stream))
    run.monitor.advance(run.state.codes_seen - before)


def encode_data(run: Trainer) -> Codes:
    """The codes of prior.images training images, in the rounds after those of stage 1. Collective.

    They are encoded when they are read. All ranks hold them, as many as KEPT values at a time.
    """
    size = run.config.match.round
    rounds = -(-count_codes(run.config, run.stream) // size)
    held = max(1, KEPT // (size * math.prod(run.prior.shape)))  # rounds of a chunk
    chunks = torch.arange(rounds).split(held)

    def read(chunk: int) -> tuple[list[Tensor], Tensor | None]:
        codes = []
        labels = []
        mirrored = []
        for number in chunks[chunk].tolist():
            with run.phases.enter("encode"):
                rows, images = read_round(run, run.rounds + number)
                if run.config.data.flip and run.prior.mirrors:
                    twins = apply(run, "encode", images.flip(-1))
                    mirrored.append(run.accelerator.gather(twins))
                if run.prior.decodes:  # it is fitted to the images' codes
                    images = apply(run, "encode", images)
                codes.append(run.accelerator.gather(images))
                if run.config.prior.classes:
                    labels.append(run.accelerator.gather(read_labels(run, rows)))
        views = [torch.cat(parts) for parts in (codes, mirrored) if parts]
        return views, torch.cat(labels) if labels else None

    return Codes(
        sizes=tuple(len(chunk) * size for chunk in chunks),
        read=read,
        rank=run.rank,
        world=run.world,
        add=run.accelerator.reduce,
        autocast=run.accelerator.autocast,
    )


def fill_bank(run: Trainer) -> None:
    """Fill the bank with the codes that the prior was fitted to, or some of them. Images of the first round are its
    references: each looks for the nearest code but its own. Collective.
    """
    size = run.config.match.round
    most = min(CODES, max(1, VALUES // math.prod(run.prior.shape)))
    codes = []
    for number in range(-(-min(most, count_codes(run.config, run.stream)) // size)):
        _, images = read_round(run, run.rounds + number)
        if number == 0:
            references = images[: max(1, REFERENCES // run.world)]
        codes.append(run.accelerator.gather(rounded(apply(run, "encode", images))))
    known = torch.cat(codes)[:most].unique(dim=0)  # an image may be there twice where an epoch ends
    first, last = parts(0, len(known), run.world)[run.rank]
    index = ShardedIndex(known.shape[1])
    index.add(unit(known[first:last]), first)
    measured = []
    for images in (references, disturbed(references)):
        distances, _ = index.search(unit(rounded(apply(run, "encode", images))), k=2)
        itself = distances[:, 0] == 0
        squares = torch.where(itself, distances[:, 1], distances[:, 0])
        moved = apply(run, "", images) - images
        energies = moved.square().flatten(1).mean(1)
        measured.append(run.accelerator.gather(energies))
        measured.append(run.accelerator.gather(squares.sqrt().float()))
    run.bank.codes = known
    run.bank.energies, run.bank.distances, *unlike = measured
    run.bank.weigh(*unlike)


def apply(run: Trainer, part: str, images: Tensor) -> Tensor:
    """f or a part of it, as it is exported, applied to images (n, *shape) in batches, in float32. Collective."""
    return torch.cat([run.engine.exported(part, some) for some in images.split(ENCODED)])


def read_labels(run: Trainer, rows: Rows) -> Tensor:
    """The labels (n,) of this rank's rows; InputError on every rank if some are missing."""
    missing = (rows.labels < 0).nonzero().flatten().tolist()
    with together(run.accelerator):
        if missing:
            keys = f"{rows.keys[missing[0]]} and {len(missing) - 1} more samples of a round have no label"
            raise InputError(f"prior.classes is set, but {keys}: repack the data set, or leave it out")
    return rows.labels.to(run.accelerator.device)


def take_snapshot(run: Trainer) -> Snapshot:
    """A snapshot of the run now. Collective."""
    run.phases.count()
    run.state.cpu_seconds += total([run.phases.cpu_seconds], run.accelerator)[0]
    run.phases.cpu_seconds = 0.0
    return snapshot(
        run.config,
        run.stream,
        run.engine,
        run.state,
        run.latents,
        run.prior,
        run.bank,
    )


def save(run: Trainer, taken: Snapshot | None = None) -> None:
    """Begin to write a checkpoint in the background, of the run as it is now or of a snapshot that was taken, unless it
    is there already. Collective.
    """
    writer = run.writer
    taken = taken or take_snapshot(run)
    if taken.name in (writer.newest, "step-00000000"):  # a new start does the same
        return
    ready = writer.join(share=0.5)  # the one before may still be on its way to the bucket
    if total([not ready], run.accelerator)[0]:
        log.warning("%s is not written: the one before it is still being sent, and time is short", taken.name)
        return
    with together(run.accelerator):
        writer.start(taken.name, taken.files)


def finish(run: Trainer) -> bool:
    """Wait for the last checkpoint and its copy. Returns whether the run is finished and all is written. Collective."""
    run.watchdog.enter("finish", run.state.round)
    written = run.writer.finish()
    if not written:
        log.warning("the newest checkpoint, or its copy, could not be finished in time")
    return run.finished and not total([not written], run.accelerator)[0]
