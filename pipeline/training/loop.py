"""The rounds: take, match, fit, report, checkpoint.

Progress is counted in images seen. Everything random is a function of (seed, round, number), so a run that resumes goes
on exactly as if it had never stopped: at a round's start or in the middle of its fit.
"""

import logging
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator
from torch import Tensor

from pipeline.checkpoint.bucket import newest_first, take_over
from pipeline.checkpoint.writer import Writer
from pipeline.config import Config, to_dict
from pipeline.data.damage import check_damage
from pipeline.data.decode import scaled
from pipeline.data.loader import Stream, Taken
from pipeline.data.order import rank_rows
from pipeline.distributed.ranks import together, total
from pipeline.distributed.signals import StopRequest
from pipeline.distributed.watchdog import Watchdog
from pipeline.errors import Diverged, InputError, Stopped, Unavailable
from pipeline.match.across_ranks import NotFinite
from pipeline.match.matcher import Match, match_round
from pipeline.model import latents
from pipeline.model.networks import build_network
from pipeline.observe.doctor import preflight
from pipeline.observe.logs import at_round, set_up
from pipeline.observe.monitor import Monitor
from pipeline.observe.speed import Profiler, forward_flops, parse_rounds
from pipeline.training.fit import fit
from pipeline.training.report import report
from pipeline.training.round import Drawing, Run, Work
from pipeline.training.run_folder import check_shared, claim, count_rounds, have
from pipeline.training.setup import (
    build_engine,
    check_engine,
    headline,
    open_features,
    open_perceived,
    open_stream,
    shared,
)
from pipeline.training.state import Position, Saved, Under, restore, restore_weights, snapshot

log = logging.getLogger("naign.train")


def train(config: Config, accelerator: Accelerator) -> bool:
    """Train until the budget is spent; False if a signal ended it earlier, after a checkpoint. Collective."""
    # Setup: everything that can be refused is refused here, on every rank, before anything is written.
    rank, world = accelerator.process_index, accelerator.num_processes
    set_up(rank, world)
    stop = StopRequest(within=config.stop.within, world=world, timeout=config.train.timeout + 60)
    with together(accelerator):
        check_engine(config, accelerator)
        stream = open_stream(config, rank, world)
        torch.manual_seed(config.seed)  # the first weights, the same on every rank
        bare = build_network(config.model, stream.shape, recompute=config.train.recompute).to(accelerator.device)
        latents.check_law(config.match.latents, stream.shape)
        check_damage(config.objective.damage, stream.shape)
        features = open_features(config.match.space, stream.shape, accelerator.device)
        perceived = open_perceived(config.objective, stream.shape, accelerator.device)
        forward = forward_flops(bare, stream.shape)
        size = 4 * (4 if config.train.ema else 3) * sum(value.numel() for value in bare.parameters())
        if rank == 0:
            for warning in preflight(
                run=config.run.path,
                remote=config.run.remote,
                checkpoint_bytes=size,
                say=log.debug,
            ):
                log.warning("%s", warning)
    lock, newest, word = None, None, ""
    with together(accelerator):
        if rank == 0:
            newest, word, lock = claim(config)
    name, word = shared([newest.name if newest else "", word], accelerator)
    with together(accelerator):
        checked = check_shared(config, word)

    # Resume.
    spectrum = None
    with together(accelerator):
        if name and rank:
            newest = have(config, name, checked=checked)
        if newest:
            spectrum = restore_weights(newest, bare)
    with together(accelerator):
        engine = build_engine(config, bare, accelerator)
        saved = restore(newest, engine, rank=rank, world=world, size=config.match.round) if newest else None
    position = saved.position if saved else Position()
    trained = config.match.round * config.train.passes  # images a round
    rounds = count_rounds(config)
    claimed, unsent = "", False
    with together(accelerator):
        monitor = Monitor(
            Path(config.run.path),
            active=rank == 0,
            images=rounds * trained,
            images_seen=position.images_seen,
            config=yaml.safe_dump(to_dict(config), sort_keys=False),
        )
        if rank == 0 and config.run.remote:
            unsent = bool(name) and name not in newest_first(config.run.remote)
            if unsent or position.round < rounds:
                claimed = take_over(config.run.remote)
    watch = Watchdog(rank=rank, world=world, timeout=config.train.timeout)
    writer = Writer(
        Path(config.run.path),
        rank=rank,
        world=world,
        keep=config.checkpoint.keep,
        every=config.checkpoint.keep_every,
        remote=config.run.remote,
        claim=claimed,
        beat=watch.beat,
        left=lambda: stop.left if stop.seen() else math.inf,
        patience=max(3600.0, config.train.timeout),
        flush=monitor.flush,
    )
    profiler = Profiler(Path(config.run.path), config.profile.rounds, rank)
    if rank == 0 and any(number >= rounds or number < position.round for number in parse_rounds(config.profile.rounds)):
        log.warning("profile.rounds=%s: rounds %d to %d are ahead", config.profile.rounds, position.round, rounds - 1)
    run = Run(
        config=config,
        accelerator=accelerator,
        engine=engine,
        stream=stream,
        stop=stop,
        monitor=monitor,
        watch=watch,
        profiler=profiler,
        writer=writer,
        position=position,
        features=features,
        perceived=perceived,
        spectrum=spectrum,
        forward=forward,
        written=name,
    )
    with stream, monitor, watch, profiler:
        if total([float(unsent)], accelerator)[0]:
            writer.resend(name)
        if position.round >= rounds:
            monitor.say(f"nothing left to do: {config.run.path} has seen its {position.images_seen} images")
        else:
            monitor.say(headline(run, rounds, newest))
        work, clock, spent = None, list[float](), 0.0
        try:
            while position.round < rounds:
                last = position.round + 1 == rounds
                at_round(position.round)
                with profiler.round(position.round):
                    clock, done = [time.perf_counter()], position.done
                    spent = time.process_time()
                    with run.phase("take"):
                        work, taken = take(run, saved)
                    clock.append(time.perf_counter())
                    with run.phase("match"):
                        if config.objective.needs_match and work.match is None:
                            work.match = find_match(run, work)
                    clock.append(time.perf_counter())
                    with run.phase("fit"):
                        values = fit(run, work, rounds * trained)
                    clock.append(time.perf_counter())
                position.round, position.done = position.round + 1, 0
                position.seconds += clock[-1] - clock[0]
                position.cpu_seconds += time.process_time() - spent
                with run.phase("report"), together(accelerator):
                    report(run, work, taken, values, clock, rounds, trained - done * config.train.batch)
                saved = work = None

                with run.phase("checkpoint"):
                    stopping = stop.agree()[0] and not last
                    if last or stopping or position.round % config.checkpoint.rounds == 0:
                        checkpoint(run, None)
                if stopping:
                    raise Stopped
        except Stopped:
            if len(clock) < 4:  # the round's part that is done; a whole one has been counted
                position.seconds += time.perf_counter() - clock[0]
                position.cpu_seconds += time.process_time() - spent
            if position.done and work is None:  # resumed within a round, and stopped before it could go on
                assert saved is not None
                checkpoint(run, saved.under, began=saved.began)
            elif position.done:
                assert work is not None
                checkpoint(run, under_way(run, work), began=work.began)
            else:
                checkpoint(run, None)
            monitor.say(
                f"stopped on request in round {position.round + 1} of {rounds}; the same command goes on from here"
            )
        except (InputError, Unavailable):  # of all ranks; what is being written is whole
            writer.join(within=config.stop.within)
            raise
        watch.enter("finish", position.round)
        written = writer.join()
        if written and writer.unsent:  # once more: whoever starts this run may have nothing else of it
            writer.resend(writer.unsent)
            written = writer.join()
        if not written:
            log.warning("the newest checkpoint, or its copy, could not be finished in time")
        finished = position.round >= rounds and not total([float(not written)], accelerator)[0]
    if lock:
        lock.release()
    return finished


def take(run: Run, saved: Saved | None) -> tuple[Work, Taken]:
    """Collective: this rank's share of the next round's images, or all of a round that another world size began."""
    position, device = run.position, run.accelerator.device
    number = position.round
    with together(run.accelerator):
        taken = run.stream.take(number, run.stop.seen)
        images = scaled(taken.images.to(device))
    if run.config.match.latents == "fourier" and run.spectrum is None:
        run.spectrum = latents.measure_spectrum(images, lambda mean: run.accelerator.reduce(mean, "mean"))
    draw = Drawing(run.config, number, run.stream.shape, device, run.spectrum)
    first, stop = rank_rows(run.config.match.round, run.rank, run.world)
    work = Work(number=number, began=run.world, draw=draw, images=images, first=first)
    if saved and position.done:
        assert saved.under is not None
        work.began = saved.began
        if work.began != run.world:
            first, stop, work.first = 0, run.config.match.round, 0
            with together(run.accelerator):
                whole = replace(run.config.data, trace="", workers=0)
                with Stream(whole, seed=run.config.seed, round_size=run.config.match.round, prefetch=False) as stream:
                    work.images = scaled(stream.take(number, run.stop.seen).images.to(device))
        work.sums = {name: value.to(device) for name, value in saved.under.sums.items()}
        if saved.under.ids is not None and saved.under.distances is not None:
            ids, distances = saved.under.ids[first:stop], saved.under.distances[first:stop]
            work.match = Match(ids=ids, distances=distances, values=saved.under.values)
    return work, taken


def find_match(run: Run, work: Work) -> Match:
    """Collective: the latent whose sample is nearest to each image of this rank, out of the pool of all ranks."""
    poll = run.poll("match")

    def sample(ids: Tensor) -> Tensor:
        return run.engine.sample(work.draw.latents(ids))

    def look() -> None:
        run.watch.beat()
        if poll():
            raise Stopped

    try:
        match = match_round(work.images, sample, run.config.match, run.features, look)
    except NotFinite as error:  # on all ranks
        raise Diverged(
            f"the network's samples are not finite in round {work.number} ({error}): the run has diverged; lower "
            "train.lr, set train.clip or raise the precision, in a new --run.path"
        ) from None
    if match.described != run.monitor.described:
        run.monitor.described = match.described
        run.monitor.say(match.described)
    return match


def under_way(run: Run, work: Work) -> Under:
    """Collective: what of the round has to be kept, on rank 0 for all."""
    match, found = work.match, Under(sums=work.sums)
    if match is None:
        return found
    found.values = match.values
    parts = [match.ids, match.distances.cpu()]
    if work.began == run.world and run.world > 1:
        group = dist.new_group(backend="gloo")
        for place, mine in enumerate(parts):
            everyone = [torch.empty_like(mine) for _ in range(run.world)]
            dist.all_gather(everyone, mine.contiguous(), group=group)
            parts[place] = torch.cat(everyone)
    found.ids, found.distances = parts
    return found


def checkpoint(run: Run, under: Under | None, *, began: int = 0) -> None:
    """Collective: begin to write checkpoints/step-XXXXXXXX, unless it is there already."""
    name = f"step-{run.position.step:08d}"
    if name == run.written:
        return
    ready = run.writer.join(share=0.5)  # what was written before may still be on its way to the bucket
    if total([float(not ready)], run.accelerator)[0]:
        log.warning("%s is not written: the one before it is still being sent, and time is short", name)
        return
    copy, files = snapshot(
        run.config, run.stream, run.engine, run.position, run.spectrum, under=under, began=began or run.world
    )
    with together(run.accelerator):
        run.writer.start(name, copy, files)
    run.written = name
