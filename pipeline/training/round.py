"""What the phases of a round share: the run, and the state of the current round."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from filelock import FileLock
from torch import Tensor

from pipeline import philox
from pipeline.checkpoint import Writer
from pipeline.checkpoint.done import count_rounds
from pipeline.config import Config, flatten
from pipeline.data import Stream, damage
from pipeline.distributed import Engine, StopPoll, StopRequest, Watchdog
from pipeline.errors import InputError, one_line
from pipeline.model.losses import Distance
from pipeline.model.prior import Prior
from pipeline.observe import Monitor, Profiler, title
from pipeline.training.quality import Quality
from pipeline.training.state import PartialRound, Position

SMALLER = {
    "take": "halve match.round",
    "match": "halve match.block, the samples that are generated at once, then match.round",
    "fit": "double train.accumulate, which halves what a forward holds, or set train.recompute",
    "learn": "halve prior.batch",
    "quality": "halve quality.samples",
}
"""What halves the memory of a phase."""


@dataclass(slots=True)
class RoundRandom:
    """Random numbers of one round: each row is a function of (seed, round, its number), on any device."""

    config: Config
    round: int
    shape: tuple[int, ...]
    device: torch.device
    prior: Prior
    decode: Callable[[Tensor], Tensor] = lambda drawn: drawn  # by f, of codes, where the prior draws codes

    def latents(self, ids: Tensor) -> Tensor:
        """Latents (len(ids), *shape) from the prior."""
        drawn = self.prior.draw(self.config.seed, self.round, ids, self.device)
        return self.decode(drawn) if self.prior.decodes else drawn

    def damaged(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Images (n, *shape) with objective.damage applied; independent of the latents."""
        law = damage.find_law(self.config.objective.damage)
        key = self.config.seed, self.round, numbers, (law.uniforms(self.shape),), self.device
        uniform = philox.uniform(*key, stream=philox.DAMAGE)
        return law.damage(images, self.normals(numbers), uniform, self.config.objective.noise)

    def normals(self, numbers: Tensor, step: int = 0) -> Tensor:
        """Standard normals (len(numbers), *shape), other ones for each `step`; independent of the latents."""
        key = self.config.seed, self.round, numbers + step * 2**40, self.shape, self.device
        return philox.normal(*key, stream=philox.NOISE)


@dataclass(kw_only=True, slots=True)
class Run:
    """What the phases of all rounds share."""

    config: Config
    accelerator: Accelerator
    rank: int = field(init=False)
    world: int = field(init=False)
    rounds: int = field(init=False)  # that spend the budget
    fitted: int = field(init=False)  # rounds in which f is trained; in those after them the prior learns alone
    stop: StopRequest
    stream: Stream
    watchdog: Watchdog
    prior: Prior
    features: Callable[[Tensor], Tensor] | None  # of the match's space
    perceived: Distance | None  # of the objective's encoder
    flops: int = 0  # of f of one image
    bad_steps: int = 0  # skipped in a row, up to now
    halved: bool = False  # whether a block of samples is generated in two parts, since a whole one did not fit
    polls: dict[str, StopPoll] = field(default_factory=dict)  # by phase in which the ranks go in step
    seconds: dict[str, float] = field(default_factory=dict)  # that each phase took last

    # Set by `resume`:
    lock: FileLock | None = None  # on the run folder, held by rank 0
    engine: Engine = field(init=False)
    monitor: Monitor = field(init=False)
    profiler: Profiler = field(init=False)
    writer: Writer = field(init=False)
    position: Position = field(default_factory=Position)
    cpu_seconds: float = 0.0  # of this rank, since the newest checkpoint
    checkpointed: str = ""  # name of the newest checkpoint
    quality: Quality | None = None  # where it is measured

    def poll(self, phase: str) -> StopPoll:
        """A poll for stop requests in `phase`, which begins. Collective."""
        return self.polls.setdefault(phase, StopPoll(self.stop)).begin()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Tell the watchdog, the profiler and the thread's title of a phase of the round, and time it."""
        self.watchdog.enter(name, self.position.round)
        title(name)
        start = time.perf_counter()
        try:
            with self.profiler.phase(name):
                yield
        except torch.cuda.OutOfMemoryError as error:
            remedy = SMALLER.get(name, "take a smaller network, or a larger GPU")
            said = f"the GPU's memory is full in round {self.position.round}, phase {name}"
            raise InputError(f"{said}: {remedy}. {one_line(error)}") from None
        self.seconds[name] = time.perf_counter() - start

    def __post_init__(self) -> None:
        self.rank, self.world = int(self.accelerator.process_index), int(self.accelerator.num_processes)
        self.rounds = count_rounds(flatten(self.config))
        self.fitted = self.rounds - int(self.rounds * self.config.prior.alone)


@dataclass(kw_only=True, slots=True)
class RoundState(PartialRound):
    """The current round on this rank: the match is that of `images`, and the sums include the number of `steps`."""

    number: int
    random: RoundRandom
    images: Tensor  # (n, *shape): this rank's share, or the whole round if it was started with another world size
    first: int = 0  # row of the round that images[0] is
