"""What a run is, which never changes while it trains, and the phases of its rounds."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from naign.model.losses import Distance
from naign.model.prior import Prior
from naign.observe import Monitor, Profiler, title
from naign.training.quality import Quality
from naign.training.state import Position

SMALLER = {  # what halves the memory of a phase
    "take": "halve match.round",
    "match": "halve match.block, the samples that are generated at once, then match.round",
    "fit": "double train.accumulate, which halves what a forward holds, or set train.recompute",
    "learn": "halve prior.batch",
    "quality": "halve quality.samples",
}


class Phases:
    """The phases of the rounds on this rank: what they tell the watchdog and the profiler, and the time they take."""

    def __init__(self, position: Position, watchdog: Watchdog, profiler: Profiler) -> None:
        self._position, self._watchdog, self._profiler = position, watchdog, profiler
        self.seconds = dict[str, float]()  # that each phase of the current round took
        self.total = defaultdict[str, float](float)  # the same of all rounds of this start
        self.cpu_seconds = 0.0  # processor time of this rank since the newest checkpoint

    @contextmanager
    def round(self) -> Iterator[None]:
        """A round: add its wall and processor time to the run's, also where it is stopped."""
        self.seconds.clear()
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            with self._profiler.round(self._position.round):
                yield
        finally:
            self._position.seconds += time.perf_counter() - wall
            self.cpu_seconds += time.process_time() - cpu

    @contextmanager
    def enter(self, name: str) -> Iterator[None]:
        """A phase of the round. Raises InputError, with a remedy, where the GPU's memory is full."""
        self._watchdog.enter(name, self._position.round)
        title(name)
        start = time.perf_counter()
        try:
            with self._profiler.phase(name):
                yield
        except torch.cuda.OutOfMemoryError as error:
            remedy = SMALLER.get(name, "take a smaller network, or a larger GPU")
            full = f"the GPU's memory is full in round {self._position.round}, phase {name}"
            raise InputError(f"{full}: {remedy}. {one_line(error)}") from None
        self.seconds[name] = time.perf_counter() - start
        self.total[name] += self.seconds[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What `prepare` made once, for all rounds. What changes is `position`, and the state of the objects."""

    config: Config
    accelerator: Accelerator
    rank: int
    world: int
    rounds: int  # that spend the budget
    network_rounds: int  # the first of them, in which f is trained; in the others the prior learns alone
    lock: FileLock | None  # on the run folder, held by rank 0
    stop: StopRequest
    stream: Stream
    watchdog: Watchdog
    phases: Phases
    perceived: Distance | None  # of the objective's encoder
    flops: int  # of f of one image
    prior: Prior
    engine: Engine
    quality: Quality | None  # where it is measured
    monitor: Monitor
    writer: Writer
    position: Position
    callbacks: tuple[Any, ...] = ()  # of naign.training.callbacks

    @property
    def finished(self) -> bool:
        """Whether the budget is spent, or quality.patience ended the run."""
        rounds = self.position.round
        return rounds >= self.rounds or (self.quality is not None and self.quality.exhausted(rounds))

    @property
    def prior_only(self) -> bool:
        """Whether f is frozen in the current round, and the prior alone learns."""
        return self.position.round >= self.network_rounds
