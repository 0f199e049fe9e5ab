"""Before the first round: refuse what cannot be trained, restore the newest checkpoint, or start from another model."""

import logging
import math
import socket
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock
from torch import Tensor, nn

from naign.checkpoint.bucket import newest_first, take_over
from naign.checkpoint.writer import Writer, newest_checkpoint
from naign.config import Config, count_rounds, flatten, to_dict
from naign.data.damage import find_damage
from naign.data.dataset import DataConfig
from naign.data.format.writer import pack
from naign.data.loader import Stream
from naign.data.sources.catalog import load
from naign.distributed.ranks import together, total
from naign.distributed.signals import StopRequest
from naign.distributed.watchdog import Watchdog
from naign.errors import InputError, require
from naign.match.matcher import check_groups
from naign.model.bank import Bank
from naign.model.naign import NAIGN
from naign.model.networks import build_network
from naign.model.prior import Latents, Prior, build_latents, build_prior
from naign.observe import Monitor, Stragglers, preflight, set_up
from naign.storage.local import write_atomically
from naign.storage.store import open_store
from naign.training.callbacks import Callback, call, find_callbacks
from naign.training.engines import build_engine, check_engine
from naign.training.run_folder import claim, find_claimed
from naign.training.state import State, restore, restore_draws, restore_weights
from naign.training.trainer import Phases, Trainer

log = logging.getLogger("naign.train")
OF_A_HOST = ("run.path", "data.path", "data.index", "data.workers", "data.trace", "train.threads")
"""Settings that may differ between ranks."""
Start = tuple[str, dict[str, Tensor]]  # the name of a network, and its weights


def set_up_run(config: Config, accelerator: Accelerator, callbacks: Sequence[Callback]) -> Trainer:
    """Refuse what cannot be trained, before anything is written, and restore the newest checkpoint. Collective.

    Raises InputError, or Unavailable for a store.
    """
    rank = accelerator.process_index
    world = accelerator.num_processes
    set_up(rank, world)
    watchdog = Watchdog(rank=rank, timeout=config.train.timeout)

    # What can be refused without weights.
    start = None
    settings = flatten(config)
    (first,) = broadcast_object_list([settings])
    with together(accelerator):
        for key, value in settings.items():
            same = key in OF_A_HOST or first.get(key) == value
            require((same, f"rank {rank} has {key}={value}, rank 0 {first.get(key)}: give all the same settings"))
        check_engine(config, accelerator)
        every = (*callbacks, *find_callbacks(config.train.callbacks))
        if rank == 0:
            start = read_start(config)
    (start,) = broadcast_object_list([start])
    with together(accelerator):
        stream = open_stream(config, accelerator)
        network, latents, prior = build_model(config, stream, accelerator.device)
        if start:
            warm_start(config, start, network)
        if rank == 0:
            warn_before(config, network)

    # The run's folder, and the newest checkpoint in it or in the bucket.
    checkpoint, lock = claim_together(config, accelerator)
    state = State()
    with together(accelerator):
        if checkpoint:  # the weights go into the network before an engine takes it, all else after
            restore_weights(checkpoint, network)
            restore_draws(checkpoint, latents, prior)
    with together(accelerator):
        engine = build_engine(config, network, accelerator, stream.shape)
        if checkpoint:
            state = restore(checkpoint, engine)
    rounds = count_rounds(config)
    if state.round < rounds and state.fitted:  # the budget was raised: the prior is fitted anew
        state.fitted = 0.0
        state.codes_seen = 0
        prior = build_prior_of(config, stream, network).to(accelerator.device)

    # What writes. A signal asked the process to leave at once until here.
    stop = StopRequest(within=config.stop.within, world=world, timeout=config.train.timeout + 60)
    unfinished = state.round < rounds or state.fitted < 1
    monitor = open_monitor(config, accelerator, stream, state, write=unfinished)
    writer = open_writer(config, accelerator, checkpoint, monitor, stop, watchdog, write=unfinished)
    run = Trainer(
        config=config,
        accelerator=accelerator,
        rounds=rounds,
        state=state,
        engine=engine,
        latents=latents,
        prior=prior,
        bank=Bank(),
        stream=stream,
        monitor=monitor,
        writer=writer,
        phases=Phases(config, state, watchdog, rank),
        stragglers=Stragglers(gather_object([socket.gethostname()])),
        stop=stop,
        watchdog=watchdog,
        lock=lock,
        callbacks=every,
    )
    writer.done = partial(call, run, "on_checkpoint")
    return run


def open_stream(config: Config, accelerator: Accelerator) -> Stream:
    """The rounds of the data, as this rank reads them."""
    workers = config.data.workers
    if not workers:
        workers = 2 if accelerator.device.type == "cuda" else 1
    stream = Stream(
        replace(config.data, workers=workers),
        seed=config.seed,
        round_size=config.match.round,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    check_groups(config.match, accelerator.num_processes)
    return stream


def build_model(config: Config, stream: Stream, device: torch.device) -> tuple[nn.Module, Latents, Prior]:
    """The network with its first weights, the latents, and the prior; InputError where they do not go together, or a
    setting does not fit the data.
    """
    torch.manual_seed(config.seed)  # the same first weights on every rank
    network = build_network(config.model, stream.shape, recompute=config.train.recompute).to(device)
    latents = build_latents(config.latents, stream.shape).to(device)
    prior = build_prior_of(config, stream, network).to(device)
    if config.objective.needs_damaged:
        find_damage(config.objective.damage).check(stream.shape)
    if prior.learns:
        name = config.prior.name
        require(
            (
                config.prior.images > 0,
                f"prior.name={name} is fitted to images, and its settings have no `images`: add it",
            )
        )
        codes = -(-count_codes(config, stream) // config.match.round) * config.match.round
        config.prior.check_codes(codes, prior.shape)
    return network, latents, prior


def build_prior_of(config: Config, stream: Stream, network: nn.Module) -> Prior:
    """The prior, before it is fitted."""
    return build_prior(config.prior, stream.shape, network, seed=config.seed, labels=stream.manifest.labels)


def count_codes(config: Config, stream: Stream) -> int:
    """How many codes the prior is fitted to: no image twice where its code is the same."""
    if config.data.flip or config.data.crop:
        return config.prior.images
    return min(config.prior.images, stream.order.total)


def count_fitted(config: Config, stream: Stream) -> int:
    """How many codes stage 2 goes through, over all passes."""
    return count_codes(config, stream) * config.prior.passes


def warn_before(config: Config, network: nn.Module) -> None:
    """Warn of what the run lacks."""
    copies = 4 if config.train.ema else 3  # of the weights: they, two moments, their average
    size = 4 * copies * sum(value.numel() for value in network.parameters())
    for warning in preflight(config.run.path, config.run.remote, size):
        log.warning("%s", warning)


def open_monitor(
    config: Config,
    accelerator: Accelerator,
    stream: Stream,
    state: State,
    *,
    write: bool,
) -> Monitor:
    """What reports. config.yaml is written only if something is left to train. Collective."""
    folder = Path(config.run.path)
    is_main = accelerator.is_main_process
    with together(accelerator):
        if is_main and write:  # a run that has ended keeps its settings
            write_atomically(folder / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
        monitor = Monitor(
            folder,
            active=is_main,
            images=count_rounds(config) * config.match.round * config.train.passes + count_fitted(config, stream),
            seen=state.seen,
            settings=flatten(config),
            trackers=config.report.trackers,
        )
    return monitor


def open_writer(
    config: Config,
    accelerator: Accelerator,
    checkpoint: Path | None,  # that the run resumes from
    monitor: Monitor,
    stop: StopRequest,
    watchdog: Watchdog,
    *,
    write: bool,  # whether something is left to train
) -> Writer:
    """What writes checkpoints. The bucket is taken over only if anything will be sent. Collective."""
    remote = config.run.remote
    owner = ""
    unsent = False
    with together(accelerator):
        if accelerator.is_main_process and remote:
            unsent = checkpoint is not None and checkpoint.name not in newest_first(remote)
            if unsent or write:
                owner = take_over(remote)
    writer = Writer(
        Path(config.run.path),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        keep=config.checkpoint.keep,
        remote=remote,
        claim=owner,
        timeout=max(3600.0, config.train.timeout),
    )
    writer.newest = checkpoint.name if checkpoint else ""
    writer.beat = watchdog.beat
    writer.left = lambda: stop.left if stop.seen() else math.inf
    writer.flush = monitor.flush
    if total([unsent], accelerator)[0]:
        writer.resend()
    return writer


def claim_together(config: Config, accelerator: Accelerator) -> tuple[Path | None, FileLock | None]:
    """The checkpoint to resume from, on this rank's disk, and rank 0's lock on the folder. Collective."""
    checkpoint = None
    token = ""
    lock = None
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
    source = data.source
    if not source and data.path == DataConfig().path:
        source = "mnist"
    if not source or data.index or open_store(data.path).exists("index.json"):  # indexed tars are others'
        return
    command = f"naign pack {source} --to {data.path}"
    given = {word.partition("=")[0] for word in arguments}
    if data.source and "--data.path" in given and "--data.source" not in given:
        raise InputError(f"{data.path}: no data set here, check --data.path; or pack one there, as with {command}")
    print(f"no data at {data.path} yet: packing it, as `{command}` does; a minute or more", flush=True)
    pack(load(source), data.path)


def read_start(config: Config) -> Start | None:
    """The model at model.init; None if there is none, or a checkpoint to resume from. For rank 0, which shares it."""
    if not config.model.init or newest_checkpoint(Path(config.run.path) / "checkpoints"):
        return None
    remote = config.run.remote
    if remote and next(newest_first(remote), None):
        return None
    model = NAIGN.from_pretrained(config.model.init)
    return model.metadata["model"]["name"], model.network.state_dict()


def warm_start(config: Config, start: Start, network: nn.Module) -> None:
    """Load the weights whose name and shape agree; InputError for a model of another kind, or without any that fits."""
    place = config.model.init
    name, weights = start
    if name != config.model.name:
        raise InputError(f"model.init={place} is a model of model.name={name}, this run's is {config.model.name}")
    state = network.state_dict()
    fits = {key: weights[key] for key, value in state.items() if key in weights and value.shape == weights[key].shape}
    if not fits:
        raise InputError(f"model.init={place} fits nothing of this network: no weight has its name and its shape")
    network.load_state_dict(state | fits)
    log.info("%d of %d weights are from %s", len(fits), len(state), place)
