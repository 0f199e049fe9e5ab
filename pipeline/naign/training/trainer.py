"""A run while it trains: what `setup` made once, and the phases of its rounds."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock

from naign.checkpoint.writer import Writer
from naign.config import Config
from naign.data.loader import Stream
from naign.distributed.engine import Engine
from naign.distributed.signals import StopRequest
from naign.distributed.watchdog import Watchdog
from naign.errors import InputError, one_line
from naign.model.bank import Bank
from naign.model.prior import Latents, Prior
from naign.observe import Monitor, Stragglers, parse_rounds, profiled, title
from naign.training.state import State

SMALLER = {  # what halves the memory of a phase
    "take": "halve match.round",
    "match": "halve match.block, the samples that are generated at once, then match.round",
    "fit": "double train.accumulate, which halves what a forward holds, or set train.recompute",
    "prior": "halve prior.batch",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """What does not change while a run trains; `state` does, and so do the objects' own states."""

    config: Config
    accelerator: Accelerator
    rounds: int  # of stage 1, in which f is trained
    state: State
    engine: Engine  # f and its optimizer
    latents: Latents
    prior: Prior
    bank: Bank  # filled at the end of stage 2
    stream: Stream
    monitor: Monitor
    writer: Writer
    phases: "Phases"
    stragglers: Stragglers
    stop: StopRequest
    watchdog: Watchdog
    lock: FileLock | None  # on the run's folder, held by rank 0
    callbacks: tuple[Any, ...]  # of naign.training.callbacks

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)

    def apart(self, phase: str, times: float = 1.0) -> AbstractContextManager[None]:
        """Context of a forward that this rank computes alone, unless the network is sharded."""
        if self.engine.sharded:
            return nullcontext()
        return self.phases.alone(phase, times)

    @property
    def finished(self) -> bool:
        """Whether f and the prior are trained."""
        return self.state.round >= self.rounds and self.state.fitted >= 1


class Phases:
    """The phases of a run on this rank: what they tell the watchdog and the profiler, and the time they take."""

    def __init__(self, config: Config, state: State, watchdog: Watchdog, rank: int) -> None:
        self._config = config
        self._rank = rank
        self._state = state
        self._watchdog = watchdog
        self._phase = ""
        self.start()
        self.seconds = dict[str, float]()  # that each phase of the current round took
        self.apart = dict[str, float]()  # of these, what this rank did without the others
        self.cpu_seconds = 0.0  # processor time of this rank since the newest checkpoint

    def start(self) -> None:
        """Begin to measure time: what was spent before does not count as training."""
        self._wall = time.perf_counter()
        self._cpu = time.process_time()

    def count(self) -> None:
        """Add the wall and processor time since the last call to the run's."""
        self._state.seconds += time.perf_counter() - self._wall
        self.cpu_seconds += time.process_time() - self._cpu
        self.start()

    @contextmanager
    def round(self) -> Iterator[None]:
        """A round of stage 1."""
        self.seconds.clear()
        self.apart.clear()
        traced: AbstractContextManager[None] = nullcontext()
        if self._state.round in parse_rounds(self._config.profile.rounds):
            traced = profiled(Path(self._config.run.path), self._rank, self._state.round)
        try:
            with traced:
                yield
        finally:
            self.count()

    @contextmanager
    def enter(self, name: str) -> Iterator[None]:
        """A phase of the round. Raises InputError, with a remedy, where the memory is full."""
        outer = self._phase
        self._announce(name)
        start = time.perf_counter()
        try:
            with torch.profiler.record_function(name):
                yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            remedy = SMALLER.get(name, "take a smaller network, or a larger GPU")
            full = f"the memory is full in round {self._state.round}, phase {name}"
            raise InputError(f"{full}: {remedy}. {one_line(error)}") from None
        self.seconds[name] = time.perf_counter() - start
        self._phase = outer
        if outer:
            self._announce(outer)

    def _announce(self, name: str) -> None:
        self._phase = name
        self._watchdog.enter(name, self._state.round)
        title(name)

    @contextmanager
    def alone(self, name: str, times: float = 1.0) -> Iterator[None]:
        """What this rank does without the others, as one of `times` parts that take equally long."""
        start = _wait()
        yield
        seconds = _wait() - start
        self.apart[name] = self.apart.get(name, 0.0) + times * seconds


def _wait() -> float:
    """The time, once a GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
