"""Before the first round: refuse what cannot be trained, restore the newest checkpoint, or start from another model."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial as bind
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from torch import Tensor, nn

from naign.checkpoint.bucket import newest_first, take_over
from naign.checkpoint.writer import Writer, newest_checkpoint
from naign.config import Config, flatten, to_dict
from naign.data.damage import find_damage
from naign.data.dataset import DataConfig, lists_data_sets
from naign.data.format.writer import pack
from naign.data.loader import Stream
from naign.data.sources.catalog import load
from naign.distributed.host import warn_of_others
from naign.distributed.ranks import together, total
from naign.distributed.signals import StopRequest
from naign.distributed.watchdog import Watchdog
from naign.errors import InputError, require
from naign.model.encoders import names, open_encoder
from naign.model.losses import Distance, ObjectiveConfig, perceptual
from naign.model.naign import NAIGN
from naign.model.networks import build_network
from naign.model.prior import Prior, build_prior
from naign.observe import Monitor, Profiler, fit_flops, forward_flops, preflight, set_up
from naign.settings.budget import count_network_rounds, count_rounds
from naign.storage.local import write_atomically
from naign.storage.store import open_store
from naign.training.callbacks import Callback, call, find_callbacks
from naign.training.engines import build_engine, check_engine
from naign.training.quality import Quality
from naign.training.run import Phases, Run
from naign.training.run_folder import claim, find_claimed
from naign.training.state import PartialRound, Position, restore, restore_prior, restore_weights, shapes_of

log = logging.getLogger("naign.train")
THREAD = 9e10  # FLOP/s of a thread, which mnist_imle_long reached on two
Start = tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]  # metadata, weights and the prior's state


def prepare(config: Config, accelerator: Accelerator, callbacks: Sequence[Callback]) -> tuple[Run, PartialRound | None]:
    """Refuse what cannot be trained, before anything is written, and restore the newest checkpoint. Collective.

    Returns the run, and what its checkpoint kept of a round. Raises InputError, or Unavailable for a store.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    set_up(rank, world)
    stop = StopRequest(within=config.stop.within, world=world, timeout=config.train.timeout + 60)
    watchdog = Watchdog(rank=rank, world=world, timeout=config.train.timeout)
    with together(accelerator):
        check_engine(config, accelerator)
        every = (*callbacks, *find_callbacks(config.train.callbacks))
        start = read_start(config) if rank == 0 else None
    (start,) = broadcast_object_list([start])
    with together(accelerator):
        stream, network, prior = build_model(config, accelerator, start)
        perceived = open_perceived(config.objective, stream.shape, accelerator.device)
        flops = count_flops(config, network, stream.shape, accelerator)
    quality = Quality(config, stream, accelerator) if config.quality.rounds else None
    checkpoint, lock = claim_together(config, accelerator)
    position, partial = Position(), None
    with together(accelerator):
        if checkpoint:  # the weights go into the network before an engine takes it, all else after
            restore_weights(checkpoint, network)
            restore_prior(checkpoint, prior)
    with together(accelerator):
        engine = build_engine(config, network, accelerator, stream.shape)
        if checkpoint:
            position, partial = restore(checkpoint, engine, size=config.match.round)
    if quality:
        quality.restore_best(config.run.path, position.round)
    rounds, network_rounds = count_all_rounds(config)
    write = position.round < rounds and not (quality and quality.exhausted(position.round))
    monitor, writer = open_outputs(config, accelerator, position, checkpoint, stop, watchdog, write=write)
    run = Run(
        config=config,
        accelerator=accelerator,
        rank=rank,
        world=world,
        rounds=rounds,
        network_rounds=network_rounds,
        lock=lock,
        stop=stop,
        stream=stream,
        watchdog=watchdog,
        phases=Phases(position, watchdog, Profiler(Path(config.run.path), config.profile.rounds, rank)),
        perceived=perceived,
        flops=flops,
        prior=prior,
        engine=engine,
        quality=quality,
        monitor=monitor,
        writer=writer,
        position=position,
        callbacks=every,
    )
    writer.done = bind(call, run, "on_checkpoint")
    return run, partial


def build_model(config: Config, accelerator: Accelerator, start: Start | None) -> tuple[Stream, nn.Module, Prior]:
    """The stream, the network with its first weights, and the prior; InputError where they do not go together."""
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    data = replace(config.data, workers=config.data.workers or (2 if device.type == "cuda" else 1))
    stream = Stream(data, seed=config.seed, round_size=config.match.round, rank=rank, world=world)
    bare = [manifest.name for manifest in stream.sets.manifests if not manifest.labels]
    labels = () if bare else stream.manifest.labels  # of a list, all must have them
    torch.manual_seed(config.seed)  # the same first weights on every rank
    network = build_network(config.model, stream.shape, recompute=config.train.recompute).to(device)
    prior = build_prior(config.prior, stream.shape, network, seed=config.seed, labels=labels).to(device)
    config.prior.check_rounds(count_all_rounds(config)[0], config.match.round)
    if start:
        warm_start(config, start, network, prior)
    find_damage(config.objective.damage).check(stream.shape)
    if rank == 0:
        copies = 4 if config.train.ema else 3  # of the weights: they, two moments, their average
        size = 4 * copies * sum(value.numel() for value in network.parameters())
        for warning in preflight(config.run.path, config.run.remote, size):
            log.warning("%s", warning)
        if config.objective.name == "naign" and not (config.objective.needs_latents or prior.decodes):
            untrained = "objective.imle is 0 and objective.third none: f is not trained on latents of prior.name"
            log.warning("%s=%s, so f(z) is no sample; set one, or prior.name=gmm", untrained, config.prior.name)
        if device.type == "cpu":
            warn_of_others()
    return stream, network, prior


def count_flops(config: Config, network: nn.Module, shape: tuple[int, ...], accelerator: Accelerator) -> int:
    """Floating-point operations of a forward of f. Warns of a recipe for GPUs: on CPUs it would take days."""
    flops, threads = forward_flops(network, shape), accelerator.num_processes * torch.get_num_threads()
    images = count_all_rounds(config)[1] * config.match.round * config.train.passes
    hours = fit_flops(flops, config.objective.forwards) * images / (THREAD * threads * 3600)
    if hours > 24 and accelerator.device.type == "cpu" and accelerator.is_main_process:
        instead = "use a GPU, or a recipe for CPUs: --config pictures for 64x64, cifar10_cpu, photos"
        log.warning("training f alone would take about %.0f hours on %d threads: %s", hours, threads, instead)
    return flops


def open_outputs(
    config: Config,
    accelerator: Accelerator,
    position: Position,
    checkpoint: Path | None,  # that the run resumes from
    stop: StopRequest,
    watchdog: Watchdog,
    *,
    write: bool,  # whether a round is ahead
) -> tuple[Monitor, Writer]:
    """What reports and what writes checkpoints. The bucket is taken over only if anything will be sent, and config.yaml
    written only if a round is ahead. Collective.
    """
    settings, folder, remote = flatten(config), Path(config.run.path), config.run.remote
    rank, world, owner, unsent = accelerator.process_index, accelerator.num_processes, "", False
    rounds, network_rounds = count_all_rounds(config)
    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    with together(accelerator):
        if rank == 0 and write:  # a run that has ended keeps its settings
            write_atomically(folder / "config.yaml", text)
        monitor = Monitor(
            folder,
            active=rank == 0,
            images=(network_rounds * (config.train.passes - 1) + rounds) * config.match.round,
            seen=position.seen,
            settings=settings,
            trackers=config.report.trackers,
        )
        if rank == 0 and remote:
            unsent = checkpoint is not None and checkpoint.name not in newest_first(remote)
            owner = take_over(remote) if unsent or write else ""
    writer = Writer(
        folder,
        rank=rank,
        world=world,
        keep=config.checkpoint.keep,
        remote=remote,
        claim=owner,
        newest=checkpoint.name if checkpoint else "",
        beat=watchdog.beat,
        left=lambda: stop.left if stop.seen() else math.inf,
        patience=max(3600.0, config.train.timeout),
        flush=monitor.flush,
    )
    if total([float(unsent)], accelerator)[0]:
        writer.resend(writer.newest)
    return monitor, writer


def claim_together(config: Config, accelerator: Accelerator) -> tuple[Path | None, FileLock | None]:
    """The checkpoint to resume from, on this rank's disk, and rank 0's lock on the folder. Collective."""
    checkpoint, token, lock = None, "", None
    with together(accelerator):
        if accelerator.is_main_process:
            checkpoint, token, lock = claim(config)
    name, token = broadcast_object_list([checkpoint.name if checkpoint else "", token])
    with together(accelerator):
        if not accelerator.is_main_process:
            checkpoint = find_claimed(config, name, token)
    return checkpoint, lock


def pack_missing(data: DataConfig, arguments: list[str]) -> None:
    """Fetch and pack data.source if data.path holds no data set; InputError if it is meant for another path."""
    source = data.source or ("mnist" if data.path == DataConfig().path else "")
    if lists_data_sets(data):
        require((not data.source, "data.source packs one data set, and data.path names several: leave it out"))
    elif source and not data.index and not open_store(data.path).exists("index.json"):  # indexed tars are others'
        given, command = {word.partition("=")[0] for word in arguments}, f"naign pack {source} --to {data.path}"
        if data.source and "--data.path" in given and "--data.source" not in given:
            raise InputError(f"{data.path}: no data set here, check --data.path; or pack one there, as with {command}")
        print(f"no data at {data.path} yet: packing it, as `{command}` does; a minute or more", flush=True)
        pack(load(source), data.path)


def count_all_rounds(config: Config) -> tuple[int, int]:
    """Rounds that spend the budget, and the first of them, in which f is trained."""
    settings = flatten(config) | {"prior.alone": config.prior.alone}  # another package's prior may compute it
    return count_rounds(settings), count_network_rounds(settings)


def read_start(config: Config) -> Start | None:
    """The model at model.init; None if there is none, or a checkpoint to resume from. For rank 0, which shares it."""
    folder, remote = Path(config.run.path) / "checkpoints", config.run.remote
    if not config.model.init or newest_checkpoint(folder) or (remote and next(iter(newest_first(remote)), None)):
        return None
    model = NAIGN.from_pretrained(config.model.init)
    return model.metadata, model.network.state_dict(), model.prior.state_dict()


def warm_start(config: Config, start: Start, network: nn.Module, prior: Prior) -> None:
    """Load the weights whose name and shape agree, with model.blend or without, and the state of the prior if all of it
    does; InputError for a model of another kind, or without any weight that fits.
    """
    metadata, weights, prior_state = start
    place, name = config.model.init, metadata["model"]["name"]
    if name != config.model.name:
        raise InputError(f"model.init={place} is a model of model.name={name}, this run's is {config.model.name}")
    state, inner = network.state_dict(), "network."  # under this name a BlendedNetwork has the one without
    named = {f"{inner}{key}": value for key, value in weights.items()}
    named |= {key.removeprefix(inner): value for key, value in weights.items()} | weights
    fits = {key: named[key] for key, value in state.items() if key in named and value.shape == named[key].shape}
    if not fits:
        raise InputError(f"model.init={place} fits nothing of this network: no weight has its name and its shape")
    network.load_state_dict(state | fits)
    others = ", ".join(sorted(state.keys() - fits.keys()))
    log.info("%d of %d weights are from %s%s", len(fits), len(state), place, f", not {others}" if others else "")
    same_prior = metadata["prior"]["name"] == config.prior.name and (*metadata.get("labels", ()),) == prior.labels
    if same_prior and shapes_of(prior_state) == shapes_of(prior.state_dict()):
        prior.load_state_dict(prior_state)
    elif prior_state and prior.state_dict():
        log.info("the prior is not from %s: its name, its classes or its sizes differ", place)


def open_perceived(objective: ObjectiveConfig, shape: tuple[int, ...], device: torch.device) -> Distance | None:
    """The perceptual part of the objective's distance, if it has one; InputError where it is not for such data."""
    if not objective.perceptual:
        return None
    stages: Any = getattr(open_encoder("objective.encoder", objective.encoder, shape, device).network, "stages", None)
    with torch.no_grad():
        seen = stages and stages(torch.zeros(1, *shape, device=device))
    if not seen:
        there = ", ".join([*names(), "efficientnet-lite0"])
        raise InputError(f"objective.encoder '{objective.encoder}' has no layers: choose one of {there}")
    return perceptual(stages)
