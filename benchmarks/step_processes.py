"""What step.py measures in processes of their own: both loops of the fit, checkpoints, and starts."""

import ctypes
import gc
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from data_peers import status
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from naign.checkpoint.writer import MANIFEST, Writer
from naign.config import Config, TrainConfig, flatten
from naign.data.format.writer import pack
from naign.data.loader import Stream
from naign.data.order import rank_rows
from naign.data.sources.source import Example, Made, Source
from naign.distributed.connect import build_accelerator
from naign.distributed.host import keep_memory, set_threads
from naign.distributed.signals import StopRequest
from naign.distributed.watchdog import Watchdog
from naign.match.matcher import Match
from naign.model.networks import build_network
from naign.model.prior import Prior, build_prior
from naign.model.scale import scaled
from naign.observe.monitor import Monitor
from naign.observe.speed import Profiler
from naign.settings.budget import count_rounds
from naign.training.engines import build_engine
from naign.training.fit import fit, learning_rate, steps_of
from naign.training.loop import checkpoint
from naign.training.round import RoundRandom, RoundState
from naign.training.run import Phases, Run
from naign.training.state import Position

Record = dict[str, Any]
Contender = Literal["ours", "bare"]
WHO: tuple[Contender, ...] = get_args(Contender)


def on_ranks(world: int, method: str, measure: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `measure(*arguments)` returns on each of so many fresh ranks, started by a method of multiprocessing."""
    context = get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__, "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world, context) as pool:
        tasks = [pool.submit(on_rank, rank, world, folder, measure, arguments) for rank in range(world)]
        return [task.result() for task in tasks]


def on_rank(rank: int, world: int, folder: str, measure: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """As a launcher and pipeline/train.py start it."""
    with (Path(folder) / f"stderr{rank}").open("w") as file:
        os.dup2(file.fileno(), 2)  # the progress bar is drawn as ever, and not seen
    keep_memory()
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    set_threads(0)
    result = measure(*arguments)
    if world > 1:
        dist.destroy_process_group()
    return result


@contextmanager
def opened(config: Config, precision: str = "", *, rounds: int = 0) -> Iterator[Callable[[nn.Module], Run]]:
    """All that a run has but the network; with that it becomes a Run, all as in `naign.training.prepare`.

    `rounds`: that are trained; 0: those of the budget.
    """
    accelerator = build_accelerator(precision=precision)
    rank, world, folder = accelerator.process_index, accelerator.num_processes, Path(config.run.path)
    stop = StopRequest(within=config.stop.within, world=world)
    rounds = rounds or count_rounds(flatten(config))
    monitor = Monitor(folder, active=rank == 0, images=config.train.images, seen=0, config="", settings={})
    watchdog = Watchdog(rank=rank, world=world, timeout=config.train.timeout)
    share = {"seed": config.seed, "round_size": config.match.round, "rank": rank, "world": world}
    with Stream(config.data, **share) as stream, monitor, watchdog:

        def run(bare: nn.Module) -> Run:
            position, profiler = Position(), Profiler(folder, config.profile.rounds, rank)
            return Run(
                config=config,
                accelerator=accelerator,
                rank=rank,
                world=world,
                rounds=rounds,
                network_rounds=rounds,
                lock=None,
                stop=stop,
                stream=stream,
                watchdog=watchdog,
                phases=Phases(position, watchdog, profiler),
                perceived=None,
                flops=0,
                prior=build_prior(config.prior, stream.shape, bare),
                engine=build_engine(config, bare, accelerator),
                quality=None,
                monitor=monitor,
                writer=Writer(folder, rank=rank, world=world, keep=1, remote=""),
                position=position,
            )

        yield run


def random_images(folder: Path, shape: tuple[int, ...], count: int) -> str:
    """The path of a data set of so many random images, which is packed there."""

    def make(index: int) -> Example:
        draws = np.random.Generator(np.random.Philox(key=0, counter=index))
        return f"image-{index:06d}", draws.integers(0, 256, shape, dtype=np.uint8), -1

    splits = {"train": Made(length=count, make=make), "test": Made(length=4, make=make)}
    source = Source(name="random", kind="image", shape=shape, labels=(), splits=dict(splits))
    pack(source, str(folder), shards=4, progress=False)
    return str(folder)


def first_network(config: Config, shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(config.seed)
    return build_network(config.model, shape)


@dataclass(kw_only=True, slots=True)
class Given:
    """A rank's share of every round: images, and ids of their latents."""

    rank: int
    world: int
    images: Tensor
    ids: Tensor
    prior: Prior
    budget: int
    """Images to train on in all."""

    @classmethod
    def of(cls, config: Config, rounds: int) -> "Given":
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        share = {"seed": config.seed, "round_size": config.match.round, "rank": rank, "world": world}
        with Stream(config.data, **share) as stream:
            images = scaled(stream.take(0).images)
        first, stop = rank_rows(config.match.round, rank, world)
        pool = int(config.match.round * config.match.ratio)
        ids = torch.randperm(pool, generator=torch.Generator().manual_seed(0))[first:stop]
        prior, budget = build_prior(config.prior, tuple(images.shape[1:]), nn.Identity()), rounds * config.match.round
        return cls(rank=rank, world=world, images=images, ids=ids, prior=prior, budget=budget)


def fit_ours(run: Run, given: Given) -> None:
    """The next round, as the loop has it fitted."""
    config, position = run.config, run.position
    random = RoundRandom(config, position.round, tuple(given.images.shape[1:]), given.images.device, given.prior)
    first, _ = rank_rows(config.match.round, given.rank, given.world)
    state = RoundState(
        number=position.round, world_size_at_start=given.world, random=random, images=given.images, first=first
    )
    state.match = Match(ids=given.ids, distances=torch.zeros(len(given.ids)))
    with run.phases.enter("fit"):
        fit(run, state)
    position.round, position.done = position.round + 1, 0


class Bare:
    """What the mathematics needs."""

    def __init__(self, config: TrainConfig, network: nn.Module, world: int) -> None:
        self.clip, self.bare = config.clip, network
        self.network = DistributedDataParallel(network) if world > 1 else network
        betas = config.beta1, config.beta2
        self.adam = torch.optim.AdamW(network.parameters(), lr=config.lr, betas=betas, weight_decay=config.weight_decay)


def fit_bare(bare: Bare, config: Config, number: int, given: Given, rows: Tensor, rates: list[float]) -> None:
    """One round: rows (steps, images) of the rank's own share in each step, and each step's learning rate."""
    for mine, rate in zip(rows, rates, strict=True):
        bare.adam.param_groups[0]["lr"] = rate
        images = given.images[mine]
        drawn = given.prior.draw(config.seed, number, given.ids[mine], images.device)
        reconstructed, sampled = bare.network(torch.cat([images, drawn])).split(len(images))
        loss = (reconstructed - images).abs().mean() + (sampled - images).abs().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(bare.bare.parameters(), bare.clip)
        bare.adam.step()
        bare.adam.zero_grad()


def plan(config: Config, number: int, given: Given) -> tuple[Tensor, list[float]]:
    """What `fit_bare` is given."""
    train, size = config.train, config.match.round
    rows = steps_of(config, number, rank=given.rank, world=given.world, world_size_at_start=given.world)
    seen = range(number * size, (number + 1) * size, train.batch)
    first, _ = rank_rows(size, given.rank, given.world)
    return rows - first, [learning_rate(train, images, given.budget) for images in seen]


def alternate(config: Config, pairs: int) -> Record:
    """Seconds and CPU seconds a step of both, by turn; whether their weights are equal at the end, to the bit."""
    given = Given.of(config, 1 + pairs)
    shape = tuple(given.images.shape[1:])
    with opened(config, rounds=1 + pairs) as start:
        run = start(first_network(config, shape))
        bare = Bare(config.train, first_network(config, shape), given.world)
        seconds: dict[str, list[float]] = {who: [] for who in WHO}
        cpu: dict[str, list[float]] = {who: [] for who in WHO}
        for number in range(1 + pairs):
            rows, rates = plan(config, number, given)
            for who in WHO if number % 2 else reversed(WHO):
                if given.world > 1:
                    dist.barrier()
                begun, used = time.perf_counter(), time.process_time()
                if who == "ours":
                    fit_ours(run, given)
                else:
                    fit_bare(bare, config, number, given, rows, rates)
                if number:
                    seconds[who].append((time.perf_counter() - begun) / len(rows))
                    cpu[who].append((time.process_time() - used) / len(rows))
    weights = list(zip(run.engine.bare.parameters(), bare.bare.parameters(), strict=True))
    for ours, theirs in weights:
        torch.testing.assert_close(ours, theirs)
    return {"seconds": seconds, "cpu": cpu, "equal": all(torch.equal(ours, theirs) for ours, theirs in weights)}


def peak(config: Config, who: Contender) -> int:
    """Bytes that the resident set grows by at most with a network that is trained for two rounds."""
    given = Given.of(config, rounds := 2)
    shape = tuple(given.images.shape[1:])
    plans = [plan(config, number, given) for number in range(rounds)]
    with opened(config, rounds=rounds) as start:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: proc(5)
        before = status("VmRSS")
        if who == "ours":
            run = start(first_network(config, shape))
            for _ in range(rounds):
                fit_ours(run, given)
        else:
            bare = Bare(config.train, first_network(config, shape), given.world)
            for number, (rows, rates) in enumerate(plans):
                fit_bare(bare, config, number, given, rows, rates)
        return status("VmHWM") - before


def write(config: Config, checkpoints: int) -> Record:
    """Seconds by checkpoint: training stands still; it is written; rounds between and beside it. And its size."""
    given = Given.of(config, 2 * (1 + checkpoints))
    folder = Path(config.run.path) / "checkpoints"
    still, behind, alone, beside = list[float](), list[float](), list[float](), list[float]()
    with opened(config, rounds=2 * (1 + checkpoints)) as start:
        run = start(first_network(config, tuple(given.images.shape[1:])))
        gate, waited = run.engine.copied.wait, list[float]()
        run.engine.copied.wait = lambda timeout=None: bool(waited.append(seconds(gate)))  # type: ignore[method-assign]
        for _ in range(1 + checkpoints):
            alone.append(seconds(lambda: fit_ours(run, given)))
            waited.clear()
            begins = seconds(lambda: checkpoint(run))
            beside.append(seconds(lambda: fit_ours(run, given)))
            still.append(begins + sum(waited))
            run.writer.join()
            behind.append(run.writer.seconds)
    (newest,) = (path for path in folder.iterdir() if (path / MANIFEST).exists())
    size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    shutil.rmtree(folder)
    parameters = sum(value.numel() for value in run.engine.bare.parameters())
    seconds_by = {"still": still, "written": behind, "alone": alone, "beside": beside}
    return {"parameters": parameters, "bytes": size, **seconds_by}


def seconds(act: Callable[[], object]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def first_step(command: list[str], environment: dict[str, str]) -> float:
    """Seconds from a program's start until its progress bar moves; then it is killed."""
    begun = time.perf_counter()
    # In a session of its own: the launcher's child must not outlive it and write one more checkpoint.
    program = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    assert program.stderr is not None
    text, counts = "", list[str]()
    while len(set(counts)) < 2:
        read = os.read(program.stderr.fileno(), 1 << 16)
        seconds = time.perf_counter() - begun
        text += read.decode(errors="replace")
        assert read, f"{command} ended without a step:\n{text}"
        counts = re.findall(r"\| ([\d.]+k?)/[\d.]+k? \[", text)
    os.killpg(program.pid, signal.SIGKILL)
    assert float(counts[0].rstrip("k")) > 0, f"{command} began anew"
    program.wait()
    program.stderr.close()
    return seconds


# What was found.

WHO: tuple[Contender, ...] = get_args(Contender)
