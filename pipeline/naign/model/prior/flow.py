"""Codes drawn by a rectified flow (arXiv 2209.03003) from noise, small beside f.

Codes are (n, c), of a network with a dense code, or (n, c, h, w), of one with a spatial code. They are whitened over
their c channels first, so that no direction is lost in the noise; directions of little spread stay small. Of many
channels only the DIRECTIONS of most spread are modelled: the others stay at their mean.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from naign.errors import require
from naign.model.prior.base import Codes, CodesConfig, CodesPrior, Device, Shape, labels_of
from naign.model.prior.features import LEAST, Features
from naign.model.prior.learner import Learner
from naign.model.prior.velocity import DenseVelocity, SpatialVelocity
from naign.philox import LEARN, normal, uniform
from naign.settings.constraints import POSITIVE, between

DIRECTIONS = 128  # principal directions of the codes' channels that are modelled, at most
DROPPED = 0.1  # share of conditions that the flow learns without, for guidance (arXiv 2207.12598)
BLIND = 0.4  # time from which the flow that guidance leads away from sees no condition
EARLY = 0.25  # share of the flow's training after which guidance keeps its weights
RIDGE = 0.3  # share of the mean variance that is added to each: fully whitening low-variance directions costs the rest
MIDDLE = 0.4  # time at which the student's second step begins, rounded to a step of the flow
TAUGHT = 4096  # paths at once that the student learns from
TAUGHT_RATE = 0.4  # its learning rate over prior.lr
ORDER = 2**31  # "round" of the order of rows; below it is the step
PATHS = 2**30  # "round" of the paths


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
    """Peak learning rate of the flow's Muon: a short warm-up, then a cosine to zero at its end."""
    steps: int = field(default=10, metadata=between(1, 10**4))
    """Steps from noise to a code, with an evaluation of the flow each: the method of Adams and Bashforth of order 2."""
    guidance: float = field(default=0.0, metadata=between(0, 10))
    """Strength of guidance: a code follows v + strength * (v - early), where v is the flow's velocity and early what it
    was after a quarter of its training (arXiv 2406.02507), late on the path without classes or features (2207.12598).
    1 makes up for a short training, and classes are met more often, at two evaluations a step; 0: none."""
    student: int = field(default=0, metadata=between(0, 2**30))
    """Paths of the flow from which a student learns to reach codes in two evaluations, rounded up to chunks of 4,096;
    0: no student. It learns from each as often as the flow from an image's code."""
    features: float = field(default=0.0, metadata=between(0, 100))
    """Condition the flow on features of its codes, found without labels (arXiv 2312.03701), with noise of this
    standard deviation, where their own is about 1; 0: no features. A sample draws those of a training image: with less
    noise it is nearer to the data, and to this image. 0.7 suits natural images. With data.flip an image and its
    mirror image have the same features."""

    def check(self) -> None:
        both = "prior.classes and prior.features exclude each other: choose one"
        require((not (self.classes and self.features), both))

    def check_codes(self, count: int, shape: Shape) -> None:
        few = f"prior.features are found from {LEAST:,} images or more, and these are {count:,}: leave it out"
        require((count >= LEAST or not self.features, few))


class Flow(CodesPrior):
    """The velocity of whitened codes on straight paths from noise (t = 0) to the data (t = 1).

    Whitened codes, and noise, are (n, d, ...), of at most DIRECTIONS channels. The state averages `learner`'s weights.
    The student takes the flow's paths, guidance included, in two steps, and draws in its place.
    """

    config: FlowConfig
    mean: Tensor  # (c,) of the channels, over positions
    inward: Tensor  # (d, c): from codes, less their mean, to whitened ones
    outward: Tensor  # (c, d), and back

    def __init__(
        self,
        config: FlowConfig,
        shape: Shape,
        **options: Any,  # seed and labels
    ) -> None:
        super().__init__(config, shape, **options)
        channels = shape[0]
        directions = min(DIRECTIONS, channels)
        self.noise_shape = (directions, *shape[1:])
        kind = DenseVelocity if len(shape) == 1 else SpatialVelocity
        sizes = {"classes": len(self.labels)}
        if config.features:
            self.features = Features(self.noise_shape)
            self.mirrors = True
            sizes["features"] = self.features.size
        with torch.random.fork_rng(devices=[]):  # its first weights change none that are drawn besides
            torch.manual_seed(self.seed)
            self.velocity = kind(
                self.noise_shape,
                config.width,
                config.depth,
                **sizes,
            )
        if config.guidance:
            self.early = deepcopy(self.velocity)
        if config.student:
            self.student = deepcopy(self.velocity)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("inward", torch.eye(directions, channels))
        self.register_buffer("outward", torch.eye(channels, directions))

    @cached_property
    def learner(self) -> Learner:
        """What trains the flow."""
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
            labels = self._condition(seed, round, ids, device)
        noise = normal(
            seed,
            round,
            ids,
            self.noise_shape,
            device,
        )
        return self.solve(noise, labels)

    def _condition(self, seed: int, round: int, ids: Tensor, device: Device) -> Tensor | None:
        """Classes (n,) or features (n, k) of training images, as often as they occur; None without either."""
        if self.config.features:
            return self.features.choose(seed, round, ids, device)
        return self.choose(seed, round, ids, device)

    def solve(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """The codes (n, c, ...) of standard normals (n, d, ...), of classes (n,) or features (n, k) if there are."""
        if self.config.student:
            early = torch.zeros(len(noise), dtype=torch.bool, device=noise.device)
            middle = self._leap(self.student, noise, early, condition)
            codes = self._leap(self.student, middle, ~early, condition)
        else:
            codes = self._path(noise, condition)[-1]
        return torch.einsum("ij,nj...->ni...", self.outward, codes) + self._mean_of(codes)

    def _path(self, noise: Tensor, condition: Tensor | None) -> list[Tensor]:
        """The points (n, d, ...) of the flow's paths from noise at times 0, 1 / steps, 2 / steps, ..., 1.

        The velocity is v + guidance * (v - early), with the condition; from BLIND on early is without it.
        """
        steps = self.config.steps
        points = [noise]
        before: Tensor | None = None
        for step in range(steps):
            codes = points[-1]
            time = noise.new_full((len(noise),), step / steps)
            velocity = plain = self.velocity(codes, time, condition)
            if self.config.guidance:
                seen = condition
                if condition is not None and step >= BLIND * steps:
                    seen = torch.full_like(condition, len(self.labels))  # no class, or zeros of features
                velocity = plain + self.config.guidance * (plain - self.early(codes, time, seen))
            if before is None:
                slope = velocity  # Euler's step first
            else:
                slope = 1.5 * velocity - 0.5 * before
            points.append(codes + slope / steps)
            before = velocity
        return points

    @property
    def _half(self) -> int:
        """The flow's steps that the student's first one takes."""
        return max(1, round(MIDDLE * self.config.steps))

    def _leap(
        self,
        student: nn.Module,
        points: Tensor,
        late: Tensor,
        condition: Tensor | None,
    ) -> Tensor:
        """The student's first step from points (n, d, ...), or the second of rows that are `late`, (n,) bool."""
        middle = self._half / self.config.steps
        length = torch.where(late, 1 - middle, middle)
        moved = student(points, late * middle, condition)
        return points + rows_of(length, points) * moved

    def whiten(self, codes: Tensor) -> Tensor:
        """(n, c, ...) -> (n, d, ...)"""
        return torch.einsum("ij,nj...->ni...", self.inward, codes - self._mean_of(codes))

    def _mean_of(self, codes: Tensor) -> Tensor:
        """The mean (1, c, 1, ...), to add to codes (n, c, ...)."""
        return self.mean.view(1, -1, *(1,) * (codes.ndim - 2))

    def fit(self, codes: Codes) -> Iterator[float]:
        """Fit the flow, then the student; metrics are prior/loss and prior/student, squared errors per value. A
        function of the state, the codes and the seed, whatever the number of ranks, but for the order in which
        gradients are added.
        """
        paths = [TAUGHT] * -(-self.config.student // TAUGHT)
        flow = sum(self._count_steps(size) for size in codes.sizes)
        student = sum(self._count_steps(size) for size in paths)
        stages = [self._fit_flow(codes, flow)]
        if paths:
            stages.append(
                self._fit_student(
                    codes,
                    paths,
                    flow,
                    student,
                )
            )
        for _ in chain(*stages):
            yield self.learner.made / (flow + student)

    def _fit_flow(self, codes: Codes, steps: int) -> Iterator[None]:
        """Train the velocity; yields after each step."""
        learner = self.learner
        for chunk, batches in self._batches(codes.sizes, learner.made):
            views, condition = codes.read(chunk)
            if not learner.made:
                self._measure(views[0], condition)
                for value in (self.mean, self.inward, self.outward):
                    value.copy_(codes.of_first(value))
            views = [self.whiten(view) for view in views]
            whitened = views[0]
            if self.config.features:
                if not learner.made:
                    self.features.fit(views, codes, self.seed, self.config.features)
                condition = self.features(*views)
            for rows in batches:
                if self.config.guidance and learner.made == math.ceil(EARLY * steps):
                    self.early.load_state_dict(self.velocity.state_dict())
                mine = codes.part(rows.to(whitened.device))
                numbers = codes.part(torch.arange(len(rows), device=whitened.device))
                loss = self._error(
                    whitened[mine],
                    numbers,
                    labels_of(condition, mine),
                    codes,
                )
                scale = len(rows) * math.prod(self.noise_shape)
                rate = self.config.lr * cosine(learner.made / steps)
                learner.step(loss / scale, rate, self.velocity, codes.add)
                yield

    def _fit_student(
        self,
        codes: Codes,
        paths: Sequence[int],
        first: int,
        steps: int,
    ) -> Iterator[None]:
        """Train the student on paths of the flow, after its `first` steps; yields after each step."""
        learner = self.learner
        if learner.made == first:
            for network in (self.student, learner.network):
                network.load_state_dict(self.velocity.state_dict())
        learner.begun = first
        for chunk, batches in self._batches(paths, learner.made - first):
            noise, halves, ends, condition = self._follow(chunk, codes)
            for rows in batches:
                mine = codes.part(rows.to(noise.device))
                late = (mine + learner.made) % 2 == 1  # rows that learn the second step
                chosen = rows_of(late, noise)
                points = torch.where(chosen, halves[mine], noise[mine])
                wanted = torch.where(chosen, ends[mine], halves[mine])
                with codes.autocast():
                    reached = self._leap(learner.network, points, late, labels_of(condition, mine))
                error = (reached.float() - wanted).square().sum()
                scale = len(rows) * math.prod(self.noise_shape)
                share = (learner.made - first) / steps
                rate = self.config.lr * TAUGHT_RATE * cosine(share)
                learner.step(
                    error / scale,
                    rate,
                    self.student,
                    codes.add,
                )
                yield

    @torch.no_grad()
    def _follow(self, chunk: int, codes: Codes) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Noise (TAUGHT, d, ...), the points of its paths where the student's steps end, and the conditions.
        Collective: each rank follows its part.
        """
        ids = torch.arange(chunk * TAUGHT, (chunk + 1) * TAUGHT)
        device = self.mean.device
        noise = normal(
            self.seed,
            PATHS,
            ids,
            self.noise_shape,
            device,
            stream=LEARN,
        )
        condition = self._condition(self.seed, PATHS, ids, device)
        halves = torch.zeros_like(noise)
        ends = torch.zeros_like(noise)
        for rows in codes.part(torch.arange(TAUGHT, device=device)).split(self.config.batch):
            with codes.autocast():
                points = self._path(noise[rows], labels_of(condition, rows))
            halves[rows] = points[self._half].float()
            ends[rows] = points[-1].float()
        return noise, codes.add(halves), codes.add(ends), condition

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

    def _error(
        self,
        wanted: Tensor,
        numbers: Tensor,
        condition: Tensor | None,
        codes: Codes,
    ) -> Tensor:
        """Sum of the squared errors of the velocity at random times of straight paths that end at `wanted`."""
        size = math.prod(wanted.shape[1:])
        kept = size + 1  # noise and a time, before what the condition asks for
        conditions = self.features.size if self.config.features else 0
        drawn = normal(
            self.seed,
            self.learner.made,
            numbers,
            (kept + conditions + 1,),
            wanted.device,
            stream=LEARN,
        )
        noise = drawn[:, :size].view_as(wanted)
        time = drawn[:, size].sigmoid()
        if condition is not None:
            if conditions:
                condition = condition + self.config.features * drawn[:, kept:-1]
            dropped = torch.special.ndtr(drawn[:, -1]) < DROPPED
            condition = condition.masked_fill(rows_of(dropped, condition), len(self.labels))  # zeros of features
        share = rows_of(time, wanted)
        with codes.autocast():
            velocity = self.learner.network(share * wanted + (1 - share) * noise, time, condition)
        return (velocity.float() - (wanted - noise)).square().sum()

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
        name = "prior/student" if self.learner.begun else "prior/loss"
        return {name: self.learner.report()}

    def training_state(self) -> dict[str, Tensor]:
        return self.state_dict() | self.learner.tensors() | {"made": torch.tensor(self.learner.made)}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_training_state(state)
        self.learner.load(state, int(state["made"]))


def rows_of(values: Tensor, like: Tensor) -> Tensor:
    """(n,) -> (n, 1, ...), of as many dimensions as `like`."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def cosine(share: float) -> float:
    """The factor of a learning rate that falls from 1 to 0."""
    return (1 + math.cos(math.pi * share)) / 2
