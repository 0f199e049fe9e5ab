"""What training costs beyond its mathematics: a step of the fit, a checkpoint, a resumption.

    python benchmarks/step.py --to benchmarks/results/step

prints and writes three tables (step.md) and what was measured (step.json). Images are random, stored as MNIST's are;
the network and all settings are those of configs/mnist.yaml where nothing else is said. What step.json holds already
stays unless it is measured again: `--parts fit` measures that part alone.

Fit. `pipeline.fit.fit`, on a round with a match whose ids are given, beside the barest loop of the same mathematics,
`fit_bare` below: the same latents, drawn by pipeline.match.latents, the same losses, clipping and AdamW, but rows and
learning rates are worked out beforehand, and nothing is watched, counted, summed up or reported. On two gloo ranks ours
is what Accelerate makes of DDP, and the bare loop has torch's DistributedDataParallel. Both train in the same process,
each a network of its own from the same first weights, in turns of a round, 16 steps; who begins changes from turn to
turn. Seconds are medians, of the rank that took longer, and the ratio is the median of the turns' ratios, with its
quartiles; a first turn is not counted. CPU time, of all threads and ranks, is less disturbed by other programs. At the
end both must have the same weights. Memory is what the resident set of a fresh process (the larger of two ranks) grows
by at most from before there is a network, the images and all else being there already, through two rounds; the median
of fresh processes.

Checkpoints. `stands still` is `pipeline.loop.checkpoint`: copying and starting to write, once the checkpoint before is
done; `written in` is from then on to the manifest, in the background, with sync to disk and SHA-256. A round is fitted
between two checkpoints, and nothing while one is written. Medians of several; the first, whose copies take new memory
from the system, stands in parentheses.

Resumption. From the start of a fresh process to the end of its first step: imports, checking the checkpoint, reading it
and the data, and the first round's match. The run was left with a checkpoint as a kill leaves it, is resumed, and is
killed again after that step. The step is seen from outside, by the count of the progress bar, which moves with it.
Files are in the page cache. Median of several starts, and the longest.
"""

import ctypes
import gc
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import tyro
from data_peers import status
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import Config, TrainConfig, load
from pipeline.data.examples import Example, Made, Source
from pipeline.data.plan import rank_rows
from pipeline.data.samples import scaled
from pipeline.data.shards import pack
from pipeline.errors import InputError, exit_on_input_error
from pipeline.fit import fit, learning_rate
from pipeline.loop import checkpoint
from pipeline.match import latents
from pipeline.match.matcher import Match
from pipeline.model.networks import NetworkConfig, build_network
from pipeline.round import Drawing, Run, Work
from pipeline.run import Position
from pipeline.runtime.checkpoint import MANIFEST, Writer
from pipeline.runtime.distributed import build_accelerator, keep_memory, set_threads
from pipeline.runtime.monitor import Monitor
from pipeline.runtime.signals import StopRequest
from pipeline.runtime.speed import Profiler
from pipeline.runtime.watchdog import Watchdog
from pipeline.schedule import steps_of
from pipeline.setup import build_engine, open_stream

Record = dict[str, Any]
Contender = Literal["ours", "bare"]
Part = Literal["fit", "checkpoint", "resume"]

ROOT = Path(__file__).parents[1]
WORLDS = {"one process, 2 threads": 1, "two ranks of one thread, DDP": 2}
LARGE = NetworkConfig(width=256, depth=2)
"""For 64x64 images in colour."""
STARTS = {
    "`python pipeline/train.py`": [sys.executable],
    "`accelerate launch pipeline/train.py`": [sys.executable, "-m", "accelerate.commands.launch", "--quiet"],
}


@dataclass(kw_only=True, slots=True)
class Settings:
    """Measure what training costs beyond its mathematics."""

    to: Path | None = None
    """Where to write, without an ending; default: print only."""
    parts: tuple[Part, ...] = get_args(Part)
    """What to measure."""
    pairs: int = 40
    """Turns of each that fits."""
    memory: int = 3
    """Fresh processes of each that fits, for memory."""
    checkpoints: int = 5
    """Of each network, after the first."""
    starts: int = 5
    """Of each way to start, after the one that is not counted."""
    scratch: Path = Path(tempfile.gettempdir()) / "naign-step"
    """For data sets and checkpoints, up to 3 GB; on the disk that is to be measured."""
    quick: bool = False
    """A few turns, small networks, to see that all works."""

    def __post_init__(self) -> None:
        if self.quick:
            self.pairs = self.memory = self.checkpoints = self.starts = 1


def main(settings: Settings) -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    machine = {
        "processor": next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        **{name: version(name) for name in ("torch", "accelerate")},
    }
    results: Record = {"machine": machine}
    file = settings.to.with_suffix(".json") if settings.to else None
    if file and file.exists():
        results = json.loads(file.read_text())
        if results["machine"] != machine:
            raise InputError(f"{file} was measured on another machine: remove it, or write --to another place")
    settings.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.scratch) as scratch:
        bench = Bench(settings, Path(scratch))
        for part in settings.parts:
            results[part] = {"fit": bench.fits, "checkpoint": bench.checkpoints, "resume": bench.resumptions}[part]()
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(results, indent=1) + "\n")
                file.with_suffix(".md").write_text(page(results))
    print(page(results))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Bench:
    """Measures, each measurement in processes of its own."""

    def __init__(self, settings: Settings, scratch: Path) -> None:
        self.settings, self.scratch = settings, scratch
        self.config = load(str(ROOT / "configs/mnist.yaml"))
        if settings.quick:
            self.config.model = NetworkConfig(width=8, code=16)
            self.config.match.round = 512
        self.config.data.path = self.packed((1, 28, 28), 4 * self.config.match.round if settings.quick else 60_000)
        self.config.run.path = str(scratch / "run")

    def packed(self, shape: tuple[int, ...], count: int) -> str:
        """A data set of random images."""

        def make(index: int) -> Example:
            draws = np.random.Generator(np.random.Philox(key=0, counter=index))
            return f"image-{index:06d}", draws.integers(0, 256, shape, dtype=np.uint8), -1

        path = str(self.scratch / f"images{shape[1]}")
        splits = {"train": Made(length=count, make=make), "test": Made(length=4, make=make)}
        pack(Source(name="random", kind="image", shape=shape, labels=(), splits=dict(splits)), path, shards=4)
        return path

    def fits(self) -> Record:
        """Seconds and memory of both, and whether they end with the same weights."""
        settings, found = self.settings, Record()
        for title, world in WORLDS.items():
            turns = on_ranks(world, alternate, self.config, settings.pairs)
            seconds = {
                who: [max(turn) for turn in zip(*(rank["seconds"][who] for rank in turns), strict=True)] for who in WHO
            }
            cpu = {who: [sum(turn) for turn in zip(*(rank["cpu"][who] for rank in turns), strict=True)] for who in WHO}
            row = {"ratio": ratio(seconds), "cpu": ratio(cpu), "equal": all(rank["equal"] for rank in turns)}
            say(f"{title}: {row['ratio'][1]:.3f} times bare (CPU time {row['cpu'][1]:.3f}), same bits: {row['equal']}")
            peaks: dict[str, list[int]] = {who: [] for who in WHO}
            for _ in range(settings.memory):
                for who in WHO:
                    peaks[who].append(max(on_ranks(world, peak, self.config, who)))
                    say(f"  {who}: {peaks[who][-1] / 1e6:.1f} MB")
            for who in WHO:
                row[who] = {
                    "seconds": statistics.median(seconds[who]),
                    "least": min(seconds[who]),
                    "memory": statistics.median(peaks[who]),
                }
            found[title] = row
        return found

    def checkpoints(self) -> Record:
        """Of both networks."""
        large = deepcopy(self.config)
        large.model = NetworkConfig(width=16, depth=1) if self.settings.quick else LARGE
        large.match.round = large.train.batch = 4
        large.data.path = self.packed((3, 64, 64), 8)
        found = {}
        for title, config in (("configs/mnist.yaml", self.config), ("width 256, depth 2, 64x64 in colour", large)):
            (found[title],) = on_ranks(1, write, config, self.settings.checkpoints)
            say(f"{title}: {found[title]}")
        return found

    def resumptions(self) -> dict[str, list[float]]:
        """Seconds to the first step, by way to start."""
        rounds = 3
        options = [
            *("--config", str(ROOT / "configs/mnist.yaml"), "--data.path", self.config.data.path),
            *("--run.path", str(self.scratch / "resumed"), "--checkpoint.rounds=1", "--checkpoint.keep=0"),
            *(f"--train.images={rounds * self.config.match.round}", f"--match.round={self.config.match.round}"),
            *(f"--model.width={self.config.model.width}", f"--model.code={self.config.model.code}"),
            "--report.pictures=0",
        ]
        command = [str(ROOT / "pipeline/train.py"), *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *command], env=environment, check=True, capture_output=True)
        newest = max((self.scratch / "resumed/checkpoints").iterdir())
        shutil.rmtree(newest)
        seconds: dict[str, list[float]] = {title: [] for title in STARTS}
        for number in range(1 + self.settings.starts):
            for title, start in STARTS.items():
                taken = first_step([*start, *command], environment)
                say(f"{title}: {taken:.2f} s")
                if number:
                    seconds[title].append(taken)
        return seconds


# In processes of their own.


def on_ranks(world: int, measure: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `measure(*arguments)` returns on each of so many fresh ranks."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world, get_context("spawn")) as pool:
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
def opened(config: Config) -> Iterator[Callable[[nn.Module], Run]]:
    """All that a run has but the network; with that it becomes a Run, all as in `pipeline.loop.train`."""
    accelerator = build_accelerator()
    rank, world, folder = accelerator.process_index, accelerator.num_processes, Path(config.run.path)
    stop = StopRequest(within=config.stop.within, world=world)
    monitor = Monitor(folder, active=rank == 0, images=config.train.images, images_seen=0, config="")
    watch = Watchdog(rank=rank, world=world, timeout=config.train.timeout)
    with open_stream(config, rank, world) as stream, monitor, watch:

        def run(bare: nn.Module) -> Run:
            return Run(
                config=config,
                accelerator=accelerator,
                engine=build_engine(config, bare, accelerator),
                stream=stream,
                stop=stop,
                monitor=monitor,
                watch=watch,
                profiler=Profiler(folder, config.profile.rounds, rank),
                writer=Writer(folder, rank=rank, world=world, keep=1, every=0, remote=""),
                position=Position(),
                features=None,
                spectrum=None,
            )

        yield run


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
    budget: int
    """Images to train on in all."""

    @classmethod
    def of(cls, config: Config, rounds: int) -> "Given":
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        with open_stream(config, rank, world) as stream:
            images = scaled(stream.take(0).images)
        first, stop = rank_rows(config.match.round, rank, world)
        pool = int(config.match.round * config.match.ratio)
        ids = torch.randperm(pool, generator=torch.Generator().manual_seed(0))[first:stop]
        return cls(rank=rank, world=world, images=images, ids=ids, budget=rounds * config.match.round)


def fit_ours(run: Run, given: Given) -> None:
    """The next round, as the loop has it fitted."""
    config, position = run.config, run.position
    draw = Drawing(config, position.round, tuple(given.images.shape[1:]), given.images.device, None)
    first, _ = rank_rows(config.match.round, given.rank, given.world)
    work = Work(number=position.round, began=given.world, draw=draw, images=given.images, first=first)
    work.match = Match(ids=given.ids, distances=torch.zeros(len(given.ids)))
    with run.phase("fit"):
        fit(run, work, given.budget)
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
        drawn = latents.draw(config.match.latents, config.seed, number, given.ids[mine], images.shape[1:])
        reconstructed, sampled = bare.network(torch.cat([images, drawn])).split(len(images))
        loss = (reconstructed - images).abs().mean() + (sampled - images).abs().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(bare.bare.parameters(), bare.clip)
        bare.adam.step()
        bare.adam.zero_grad()


def plan(config: Config, number: int, given: Given) -> tuple[Tensor, list[float]]:
    """What `fit_bare` is given."""
    train, size = config.train, config.match.round
    sizes = {"size": size, "batch": train.batch, "passes": train.passes}
    rows = steps_of(config.seed, number, **sizes, rank=given.rank, world=given.world, began=given.world)
    seen = range(number * size, (number + 1) * size, train.batch)
    first, _ = rank_rows(size, given.rank, given.world)
    return rows - first, [learning_rate(train, images, given.budget) for images in seen]


def alternate(config: Config, pairs: int) -> Record:
    """Seconds and CPU seconds a step of both, by turn; whether their weights are equal at the end, to the bit."""
    given = Given.of(config, 1 + pairs)
    shape = tuple(given.images.shape[1:])
    with opened(config) as start:
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
    with opened(config) as start:
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
    """Seconds for which training stands still, and those of writing, by checkpoint; bytes and parameters."""
    given = Given.of(config, 1 + checkpoints)
    folder = Path(config.run.path) / "checkpoints"
    still, behind = [], []
    with opened(config) as start:
        run = start(first_network(config, tuple(given.images.shape[1:])))
        for _ in range(1 + checkpoints):
            fit_ours(run, given)
            begun = time.perf_counter()
            checkpoint(run, None)
            still.append(time.perf_counter() - begun)
            run.writer.join()
            behind.append(run.writer.seconds)
    (newest,) = (path for path in folder.iterdir() if (path / MANIFEST).exists())
    size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    shutil.rmtree(folder)
    parameters = sum(value.numel() for value in run.engine.bare.parameters())
    return {"parameters": parameters, "bytes": size, "still": still, "written": behind}


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


def ratio(values: dict[str, list[float]]) -> list[float]:
    """The quartiles of the turns' ratios."""
    found = [ours / bare for ours, bare in zip(values["ours"], values["bare"], strict=True)]
    return statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else 3 * found


def page(results: Record) -> str:
    machine, median = results["machine"], statistics.median
    parts = [
        f"`python benchmarks/step.py --to benchmarks/results/step` on {machine['processor']},\n"
        f"{machine['cores']} cores, torch {machine['torch']}, accelerate {machine['accelerate']}.\n"
        "The head of the script says what was measured, and how to repeat it."
    ]
    if "fit" in results:
        rows = [["fit", "ours, a step", "bare", "ratio", "of CPU time", "ours, memory", "bare", "ratio", "weights"]]
        for title, row in results["fit"].items():
            ours, bare = row["ours"], row["bare"]
            rows.append([title, *(f"{1e3 * one['seconds']:.1f} ms" for one in (ours, bare))])
            rows[-1] += [f"{middle:.3f} ({low:.3f} to {high:.3f})" for low, middle, high in (row["ratio"], row["cpu"])]
            rows[-1] += [f"{one['memory'] / 1e6:.1f} MB" for one in (ours, bare)]
            rows[-1] += [f"{ours['memory'] / bare['memory']:.3f}", "the same bits" if row["equal"] else "close"]
        parts.append(table(rows))
    if "checkpoint" in results:
        rows = [["checkpoint", "parameters", "size", "stands still (first)", "written in (first)", "share"]]
        for title, row in results["checkpoint"].items():
            (first, *still), (slow, *written) = row["still"], row["written"]
            rows.append([title, f"{row['parameters'] / 1e6:.2f} M", f"{row['bytes'] / 1e6:,.1f} MB"])
            rows[-1] += [f"{1e3 * median(still):.1f} ms ({1e3 * first:.1f})"]
            rows[-1] += [f"{1e3 * median(written):,.0f} ms ({1e3 * slow:,.0f})"]
            rows[-1] += [f"{100 * median(still) / median(written):.1f} %"]
        parts.append(table(rows))
    if "resume" in results:
        rows = [["resumption", "to the end of the first step", "longest"]]
        rows += [
            [title, f"{median(seconds):.1f} s", f"{max(seconds):.1f} s"] for title, seconds in results["resume"].items()
        ]
        parts.append(table(rows))
    return "\n\n".join(parts) + "\n"


def table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "| --- " * len(rows[0]) + "|", *lines[1:]])


if __name__ == "__main__":
    with exit_on_input_error("step"):
        main(tyro.cli(Settings))
