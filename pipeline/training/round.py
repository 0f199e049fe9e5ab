"""What the parts of a round share: the run, and the round under way."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline import philox
from pipeline.checkpoint.writer import Writer
from pipeline.config import Config
from pipeline.data import damage
from pipeline.data.loader import Stream
from pipeline.distributed.engine import Engine
from pipeline.distributed.signals import Poll, StopRequest
from pipeline.distributed.watchdog import Watchdog
from pipeline.match.matcher import Match
from pipeline.model import latents
from pipeline.model.objectives import Distance
from pipeline.observe.logs import title
from pipeline.observe.monitor import Monitor
from pipeline.observe.speed import Profiler
from pipeline.training.state import Position


@dataclass(slots=True)
class Drawing:
    """The random numbers of one round, by number."""

    config: Config
    round: int
    shape: tuple[int, ...]
    device: torch.device
    spectrum: Tensor | None

    def latents(self, ids: Tensor) -> Tensor:
        """Latents (len(ids), *shape) by the configured law."""
        match, seed = self.config.match, self.config.seed
        return latents.draw(
            match.latents, seed, self.round, ids, self.shape, self.device, spectrum=self.spectrum, flat=match.flat
        )

    def damaged(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Images (n, *shape) with the damage of their numbers in the round, independent of the latents."""
        law, seed = self.config.objective.damage, self.config.seed
        normals = self.normals(numbers)
        shape = (damage.uniforms(law, self.shape),)
        uniform = philox.uniform(seed, self.round, numbers, shape, self.device, stream=philox.DAMAGE)
        return damage.damage(law, images, normals, uniform, self.config.objective.noise)

    def normals(self, numbers: Tensor, step: int = 0) -> Tensor:
        """Standard normals (len(numbers), *shape) of each step, independent of the latents."""
        numbers = numbers + step * 2**40
        return philox.normal(self.config.seed, self.round, numbers, self.shape, self.device, stream=philox.NOISE)

    def jittered(self, ids: Tensor, numbers: Tensor) -> Tensor:
        """The latents of matched ids with match.jitter's noise, which is that of the images' numbers."""
        drawn = self.latents(ids)
        if not self.config.match.jitter:
            return drawn
        noise = philox.normal(self.config.seed, self.round, numbers, self.shape, self.device, stream=philox.JITTER)
        return drawn + self.config.match.jitter * noise


@dataclass(kw_only=True, slots=True)
class Run:
    """What the parts of a round share."""

    config: Config
    accelerator: Accelerator
    engine: Engine
    stream: Stream
    stop: StopRequest
    monitor: Monitor
    watch: Watchdog
    profiler: Profiler
    writer: Writer
    position: Position
    features: Callable[[Tensor], Tensor] | None
    """Of the match's space."""
    perceived: Distance | None
    """Of the objective's encoder."""
    spectrum: Tensor | None
    """Of the fourier law, measured on the first round."""
    forward: int = 0
    """Floating-point operations of f of one image."""
    polls: dict[str, Poll] = field(default_factory=dict)
    """Of each phase in which all ranks go in step."""
    written: str = ""
    """Name of the newest checkpoint."""
    bad: int = 0
    """Steps in a row, up to now, that were skipped."""

    def poll(self, phase: str) -> Poll:
        """Collective: whether to stop is looked at in `phase`, which begins."""
        return self.polls.setdefault(phase, Poll(self.stop)).begin()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a part of a round, for whoever looks: the watchdog, a trace."""
        self.watch.enter(name, self.position.round)
        title(name)
        with self.profiler.phase(name):
            yield

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)


@dataclass(kw_only=True, slots=True)
class Work:
    """The round under way on this rank."""

    number: int
    began: int
    """The world size that began it."""
    draw: Drawing
    images: Tensor
    """(n, *shape) from row `first` of the round on: this rank's share; all, if another world size began the round."""
    first: int = 0
    match: Match | None = None
    """Of these images."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Of each loss, and of `steps`, over the steps that count."""
