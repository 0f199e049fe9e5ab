"""Codes drawn by a rectified flow (arXiv 2209.03003) from noise, small beside f, and by a student of it in two steps.

Codes are (n, c), of a network with a dense code, or (n, c, h, w), of one with a spatial code. They are whitened over
their c channels first, so that no direction is lost in the noise; directions of little spread stay small. Of many
channels only the DIRECTIONS of most spread are modelled: the others stay at their mean.

The student begins as the flow's velocity and learns, once the flow has learned, to follow the flow's paths in two
steps, by regression: from noise to where the path is at a time of about MIDDLE, and from there to its end. Both are
smooth functions of where they begin (arXiv 2209.03003, section 2.2).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from naign.errors import require
from naign.model.prior.base import Codes, CodesConfig, CodesPrior, Device, Shape, labels_of
from naign.model.prior.learner import Learner
from naign.model.prior.velocity import DenseVelocity, SpatialVelocity
from naign.philox import LEARN, normal, uniform
from naign.settings.constraints import AT_LEAST_0, POSITIVE, between

DIRECTIONS = 128  # principal directions of the codes' channels that are modelled, at most
DROPPED = 0.1  # share of labels that the flow learns without, for guidance (arXiv 2207.12598)
GUIDED = 0.6  # time from which guidance by classes acts; before, it costs variety and adds little (arXiv 2404.07724)
EARLY = 0.25  # share of the flow's training after which autoguidance keeps its weights
RIDGE = 0.3  # share of the mean variance that is added to each: fully whitening low-variance directions costs the rest
RATE = 0.5  # the student's learning rate over prior.lr
MIDDLE = 0.4  # time at which the student's second step begins, rounded to a step of the flow
SOLVED = 4096  # paths of a chunk that the student learns from
AT_ONCE = 512  # of them, followed at once

PATHS = 2**30  # "round" of the noise that paths begin at
ORDER = 2**31  # "round" of the order of rows; below PATHS it is the step

UNFITTED, LEARNS, KEPT, TAUGHT = range(4)
"""Phases of a flow: before its first step; while it learns; once autoguidance has kept its weights; once the student
has begun to learn."""


@dataclass(kw_only=True, slots=True)
class FlowConfig(CodesConfig):
    name: str = "flow"
    width: int = field(default=512, metadata=between(8, 2**13))
    """Width of the flow: hidden units for a dense code, channels at full resolution for a spatial code."""
    depth: int = field(default=3, metadata=between(1, 64))
    """Depth of the flow: residual layers for a dense code; for a spatial one, U-Net blocks per resolution and side."""
    passes: int = field(default=8, metadata=between(1, 10**4))
    """How often the flow learns from each image's code, each time with other noise."""
    batch: int = field(default=512, metadata=POSITIVE)
    """Codes per step, over all ranks."""
    lr: float = field(default=2e-3, metadata=POSITIVE)
    """Peak learning rate of the flow's AdamW: a short warm-up, then a cosine to zero at its end."""
    steps: int = field(default=10, metadata=between(1, 10**4))
    """Steps from noise to a code, with an evaluation of the flow each: the method of Adams and Bashforth of order 2."""
    autoguidance: float = field(default=0.0, metadata=between(0, 10))
    """Strength of autoguidance (arXiv 2406.02507): a code follows v + strength * (v - early), where v is the flow's
    velocity and early what it was after a quarter of its training. Up to 2 makes up for a short training, at two
    evaluations a step; 0: none."""
    guidance: float = field(default=0.0, metadata=between(0, 10))
    """Strength of guidance by classes (arXiv 2207.12598): strength * (v - v of no class) is added to the velocity
    over the last two fifths of the path, at one more evaluation a step; 0: none. Samples match their class more."""
    student: int = field(default=0, metadata=AT_LEAST_0)
    """Paths of the flow from which a student learns to reach a code in two evaluations; 0: no student. A quarter of
    prior.images is enough."""

    def check(self) -> None:
        blind = f"prior.guidance is {self.guidance:g}, but there are no classes to guide by: set prior.classes"
        require((self.classes or not self.guidance, blind))


class Flow(CodesPrior):
    """The velocity of whitened codes on straight paths from noise (t = 0) to the data (t = 1), and its student.

    Whitened codes, and noise, are (n, d, ...), of at most DIRECTIONS channels. The state averages `learner`'s weights.
    """

    config: FlowConfig
    phase: Tensor  # () int64, one of the phases above
    mean: Tensor  # (c,) of the channels, over positions
    inward: Tensor  # (d, c): from codes, less their mean, to whitened ones
    outward: Tensor  # (c, d), and back

    def __init__(
        self,
        config: FlowConfig,
        shape: Shape,
        *,
        seed: int = 0,
        labels: Sequence[str] = (),
    ) -> None:
        super().__init__(
            config,
            shape,
            seed=seed,
            labels=labels,
        )
        channels = shape[0]
        directions = min(DIRECTIONS, channels)
        self.noise_shape = (directions, *shape[1:])
        kind = DenseVelocity if len(shape) == 1 else SpatialVelocity
        with torch.random.fork_rng(devices=[]):  # its first weights change none that are drawn besides
            torch.manual_seed(seed)
            self.velocity = kind(
                self.noise_shape,
                config.width,
                config.depth,
                classes=len(self.labels),
            )
        if config.autoguidance:
            self.early = deepcopy(self.velocity)
        if config.student:
            self.student = deepcopy(self.velocity)
        self.register_buffer("phase", torch.full((), UNFITTED))
        self._phase = UNFITTED  # the same, without waiting for a device
        self.register_load_state_dict_post_hook(_read_phase)  # type: ignore[no-untyped-call]
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("inward", torch.eye(directions, channels))
        self.register_buffer("outward", torch.eye(channels, directions))

    def _enter(self, phase: int) -> None:
        self.phase.fill_(phase)
        self._phase = phase

    @cached_property
    def learner(self) -> Learner:
        """What trains the flow and, later, the student."""
        return Learner(self.velocity)

    def draw(
        self,
        seed: int,
        round: int,
        ids: Tensor,
        device: Device,
        labels: Tensor | None = None,
    ) -> Tensor:
        if labels is None:
            labels = self.choose(seed, round, ids, device)
        return self.solve(
            normal(
                seed,
                round,
                ids,
                self.noise_shape,
                device,
            ),
            labels,
        )

    def solve(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """The codes (n, c, ...) of standard normals (n, d, ...), of the classes (n,) where there are any."""
        if self._phase == TAUGHT:
            early = torch.zeros(len(noise), dtype=torch.bool, device=noise.device)
            middle = self._leap(self.student, noise, early, labels)
            codes = self._leap(self.student, middle, ~early, labels)
        else:
            *_, codes = self.path(noise, labels)
        return torch.einsum("ij,nj...->ni...", self.outward, codes) + self._mean_of(codes)

    def path(self, noise: Tensor, labels: Tensor | None = None) -> Iterator[Tensor]:
        """`noise`, and the points (n, d, ...) that the flow's paths reach at times 1 / steps, 2 / steps, ..., 1.

        The velocity is v + autoguidance * (v - early) + guidance * (v - that of no class), v and early of the classes;
        the last of these from GUIDED on.
        """
        steps = self.config.steps
        autoguided = bool(self.config.autoguidance) and self._phase >= KEPT
        codes = noise
        before: Tensor | None = None
        yield codes
        for step in range(steps):
            time = noise.new_full((len(noise),), step / steps)
            plain = self.velocity(codes, time, labels)
            velocity = plain
            if autoguided:
                velocity = velocity + self.config.autoguidance * (plain - self.early(codes, time, labels))
            if self.config.guidance and labels is not None and step >= GUIDED * steps:
                no_class = torch.full_like(labels, len(self.labels))
                velocity = velocity + self.config.guidance * (plain - self.velocity(codes, time, no_class))
            if before is None:
                slope = velocity  # Euler's step first
            else:
                slope = 1.5 * velocity - 0.5 * before
            codes = codes + slope / steps
            before = velocity
            yield codes

    def whiten(self, codes: Tensor) -> Tensor:
        """(n, c, ...) -> (n, d, ...)"""
        return torch.einsum("ij,nj...->ni...", self.inward, codes - self._mean_of(codes))

    def _mean_of(self, codes: Tensor) -> Tensor:
        """The mean (1, c, 1, ...), to add to codes (n, c, ...)."""
        return self.mean.view(1, -1, *(1,) * (codes.ndim - 2))

    def fit(self, codes: Codes) -> Iterator[float]:
        """Fit the flow, then the student; metrics are prior/loss, the squared error per value, and prior/student, the
        absolute one. A function of the state, the codes and the seed, whatever the number of ranks, but for the order
        in which gradients are added.
        """
        flow_steps = sum(self._count_steps(size) for size in codes.sizes)
        whole, rest = divmod(self.config.student, SOLVED)
        paths = [SOLVED] * whole + [rest] * (rest > 0)
        steps = flow_steps + sum(self._count_steps(size) for size in paths)
        if self._phase < TAUGHT:
            for made in self._fit_flow(codes, flow_steps):
                yield made / steps
        if self.config.student:
            for made in self._fit_student(codes, paths, steps - flow_steps):
                yield (flow_steps + made) / steps

    def _fit_flow(self, codes: Codes, steps: int) -> Iterator[int]:
        """Train the velocity; yields the number of steps made."""
        learner = self.learner
        for chunk, batches in self._batches(codes.sizes, learner.made):
            read, labels = codes.read(chunk)
            if not self.labels:
                labels = None
            if self._phase == UNFITTED:
                self._measure(read, labels)
            whitened = self.whiten(read)
            for rows in batches:
                if self.config.autoguidance and self._phase == LEARNS and learner.made >= EARLY * steps:
                    self.early.load_state_dict(self.velocity.state_dict())
                    self._enter(KEPT)
                mine = codes.part(rows.to(whitened.device))
                numbers = codes.part(torch.arange(len(rows), device=whitened.device))
                loss = self._error(
                    whitened[mine],
                    learner.made,
                    numbers,
                    labels_of(labels, mine),
                    codes,
                )
                scale = len(rows) * math.prod(self.noise_shape)
                rate = self.config.lr * cosine(learner.made / steps)
                learner.step(loss / scale, rate, self.velocity, codes.add)
                yield learner.made

    def _measure(self, codes: Tensor, labels: Tensor | None) -> None:
        """Measure the whitening and the classes of the first chunk."""
        self.count_classes(labels)
        values = codes.transpose(0, 1).flatten(1).double()
        mean = values.mean(1)
        centred = values - mean[:, None]
        spread, directions = torch.linalg.eigh(centred @ centred.T / values.shape[1])
        kept = len(self.inward)
        deviations = (spread[-kept:].clamp(min=0) + RIDGE * spread.mean()).clamp(min=1e-30).sqrt()
        self.mean.copy_(mean)
        self.inward.copy_((directions[:, -kept:] / deviations).T)
        self.outward.copy_(directions[:, -kept:] * deviations)
        self._enter(LEARNS)

    def _error(
        self,
        wanted: Tensor,
        step: int,
        numbers: Tensor,
        labels: Tensor | None,
        codes: Codes,
    ) -> Tensor:
        """Sum of the squared errors of the velocity at random times of straight paths that end at `wanted`."""
        size = math.prod(wanted.shape[1:])
        drawn = normal(
            self.seed,
            step,
            numbers,
            (size + 2,),
            wanted.device,
            stream=LEARN,
        )
        noise = drawn[:, :size].view_as(wanted)
        time = drawn[:, size].sigmoid()
        if labels is not None:
            dropped = torch.special.ndtr(drawn[:, -1]) < DROPPED
            labels = labels.masked_fill(dropped, len(self.labels))
        share = _as_rows(time, wanted)
        with codes.autocast():
            velocity = self.learner.network(share * wanted + (1 - share) * noise, time, labels)
        return (velocity.float() - (wanted - noise)).square().sum()

    def _fit_student(self, codes: Codes, paths: Sequence[int], steps: int) -> Iterator[int]:
        """Train the student on paths of the flow; yields the number of steps made."""
        if self._phase != TAUGHT:
            self.student.load_state_dict(self.velocity.state_dict())
            self.learner = Learner(self.student)
            self._enter(TAUGHT)
        learner = self.learner
        for chunk, batches in self._batches(paths, learner.made):
            noise, halves, ends, labels = self._follow(chunk * SOLVED, paths[chunk], codes)
            for rows in batches:
                mine = codes.part(rows.to(noise.device))
                late = (mine + learner.made) % 2 == 1  # rows that learn the second step
                chosen = _as_rows(late, noise)
                points = torch.where(chosen, halves[mine], noise[mine])
                wanted = torch.where(chosen, ends[mine], halves[mine])
                with codes.autocast():
                    reached = self._leap(learner.network, points, late, labels_of(labels, mine))
                error = (reached.float() - wanted).abs().sum()
                rate = self.config.lr * RATE * cosine(learner.made / steps)
                learner.step(
                    error / (len(rows) * noise[0].numel()),
                    rate,
                    self.student,
                    codes.add,
                )
                yield learner.made

    @torch.no_grad()
    def _follow(self, first: int, count: int, codes: Codes) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Noise (n, d, ...), the points on the flow's paths where the student's steps end, and the classes. Collective:
        each rank follows its part.
        """
        device = self.mean.device
        ids = torch.arange(first, first + count)
        noise = normal(
            self.seed,
            PATHS,
            ids,
            self.noise_shape,
            device,
            stream=LEARN,
        )
        labels = self.choose(self.seed, PATHS, ids, device)
        halves = torch.zeros_like(noise)
        ends = torch.zeros_like(noise)
        for rows in codes.part(torch.arange(count, device=device)).split(AT_ONCE):
            path = list(self.path(noise[rows], labels_of(labels, rows)))
            halves[rows] = path[self._half]
            ends[rows] = path[-1]
        return noise, codes.add(halves), codes.add(ends), labels

    @property
    def _half(self) -> int:
        """The flow's steps that the student's first one takes."""
        return max(1, round(MIDDLE * self.config.steps))

    def _leap(
        self,
        student: nn.Module,
        points: Tensor,
        late: Tensor,
        labels: Tensor | None,
    ) -> Tensor:
        """The first step of the student from points (n, d, ...), or the second of rows that are `late`, (n,) bool."""
        middle = self._half / self.config.steps
        length = torch.where(late, 1 - middle, middle)
        moved: Tensor = student(points, late * middle, labels)
        return points + _as_rows(length, points) * moved

    def _count_steps(self, size: int) -> int:
        """Steps on a chunk of so many rows."""
        return -(-size * self.config.passes // self.config.batch)

    def _batches(self, sizes: Sequence[int], made: int) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """The number of each chunk and the rows of its batches from step `made` on; each row occurs `passes` times."""
        for chunk, size in enumerate(sizes):
            count = self._count_steps(size)
            if made < count:
                drawn = uniform(
                    self.seed,
                    ORDER + chunk,
                    torch.arange(size),
                    (self.config.passes,),
                    stream=LEARN,
                )
                order = drawn.argsort(dim=0, stable=True).T.flatten()
                yield chunk, order.split(self.config.batch)[made:]
            made = max(0, made - count)

    def read_metrics(self) -> dict[str, float]:
        name = "prior/loss"
        if self._phase == TAUGHT:
            name = "prior/student"
        return {name: self.learner.report()}

    def training_state(self) -> dict[str, Tensor]:
        return self.state_dict() | self.learner.tensors() | {"made": torch.tensor(self.learner.made)}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_training_state(state)
        self.learner.load(state, int(state["made"]))


def _read_phase(flow: Any, _: Any) -> None:
    """After a state was loaded."""
    flow._phase = int(flow.phase)


def cosine(share: float) -> float:
    """The factor of a learning rate that falls from 1 to 0."""
    return (1 + math.cos(math.pi * share)) / 2


def _as_rows(values: Tensor, like: Tensor) -> Tensor:
    """(n,) -> (n, 1, ...), to multiply rows of `like`."""
    return values.view(-1, *(1,) * (like.ndim - 1))
