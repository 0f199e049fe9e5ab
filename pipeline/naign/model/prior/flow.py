"""Codes drawn by a rectified flow (arXiv 2209.03003) from noise, small beside f.

Codes are (n, c), of a network with a dense code, or (n, c, h, w), of one with a spatial code. They are whitened over
their c channels first, so that no direction is lost in the noise, but for those of little spread, which stay small; and
of many channels only the DIRECTIONS of most spread are modelled: the others stay at their mean.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from naign.errors import require
from naign.model.prior.base import WINDOW, CodesConfig, CodesPrior, Device, Examples, Shape
from naign.model.prior.learner import Learner
from naign.model.prior.noise import Gaussian
from naign.model.prior.velocity import DenseVelocity, SpatialVelocity, Velocity
from naign.philox import LEARN, normal, uniform
from naign.settings.constraints import POSITIVE, between

DIRECTIONS = 128  # principal directions of the codes' channels that are modelled, at most
DROPPED = 0.1  # share of labels that the flow learns without, for guidance (arXiv 2207.12598)
GUIDED = 0.6  # time from which guidance by classes acts; before, it costs variety and adds little (arXiv 2404.07724)
EARLY = 0.25  # share of the flow's training after which autoguidance keeps its weights
RIDGE = 0.3  # of the mean variance, added to each: to whiten directions of little spread fully costs the others


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
    student: float = field(default=0.0, metadata=between(0, 0.99))
    """Share of train.images, the last of `alone`, over which a student of the flow learns to reach a code in two
    evaluations; 0: no student. A quarter of what the flow has is enough."""

    def __post_init__(self) -> None:
        CodesConfig.__post_init__(self)
        blind = f"prior.guidance is {self.guidance:g}, but there are no classes to guide by: set prior.classes"
        require((self.classes or not self.guidance, blind))
        shares = f"prior.student is {self.student:g}, prior.alone {self.alone:g} and prior.begin {self.begin:g}"
        fits = not self.student or (1e-6 <= self.student <= self.alone and self.begin + self.student < 1 - 1e-6)
        order = "the student learns when f is frozen and the flow has learned. Lower prior.student, but not below 1e-6"
        require((fits, f"{shares}: {order}"))

    def check_rounds(self, rounds: int, images: int) -> None:
        CodesConfig.check_rounds(self, rounds, images)
        enough = range(max(rounds, int(1 / self.student)), 2**62) if self.student else ()
        least = next((n for n in enough if first_round(self.begin, n) < first_round(self.end, n) < n), rounds)
        short = f"prior.begin={self.begin:g} and prior.student={self.student:g} leave the flow or its student none of"
        remedy = f"Change them, or raise train.images to {least * images} x train.passes, {least} rounds"
        require((rounds == least, f"{short} {rounds} rounds. {remedy}"))

    @property
    def end(self) -> float:
        """Share of train.images after which the flow learns no more."""
        return 1 - self.student


class Flow(CodesPrior):
    """The velocity of whitened codes on straight paths from noise (t = 0) to the data (t = 1).

    Whitened codes, and noise, are (n, d, ...), of at most DIRECTIONS channels. Its state averages `learner`'s weights.
    """

    config: FlowConfig
    mean: Tensor  # (c,) of the channels, over positions
    covariance: Tensor  # (c, c)
    inward: Tensor  # (d, c): from codes, less their mean, to whitened ones
    outward: Tensor  # (c, d), and back

    def __init__(self, config: FlowConfig, shape: Shape, *, seed: int = 0, labels: Sequence[str] = ()) -> None:
        super().__init__(config, shape, seed=seed, labels=labels)
        channels, number = shape[0], min(DIRECTIONS, shape[0])
        self.noise_shape = (number, *shape[1:])
        self.moves = self.guides = False  # whether the velocity is not zero, and neither is `early`
        kind = DenseVelocity if len(shape) == 1 else SpatialVelocity
        with torch.random.fork_rng(devices=[]):  # its first weights change none that are drawn besides
            torch.manual_seed(seed)
            self.velocity = kind(self.noise_shape, config.width, config.depth, classes=len(self.labels))
        if config.autoguidance:
            self.early = deepcopy(self.velocity)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("covariance", torch.eye(channels))
        self.register_buffer("inward", torch.eye(number, channels))
        self.register_buffer("outward", torch.eye(channels, number))

    @property
    def metric(self) -> str:
        """The name of its loss."""
        return "loss/codes"

    @cached_property
    def learner(self) -> "Learner":
        return Learner(self.velocity)

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        loaded = super().load_state_dict(state, strict, assign)
        self.begun = self.moves = moving(self.velocity)
        self.guides = bool(self.config.autoguidance) and moving(self.early)
        return loaded

    def draw(self, seed: int, round: int, ids: Tensor, device: Device, labels: Tensor | None = None) -> Tensor:
        labels = self.choose(seed, round, ids, device) if labels is None else labels
        return self.solve(normal(seed, round, ids, self.noise_shape, device), labels)

    def between(self, seeds: tuple[int, int], round: int, device: Device, *, steps: int) -> Tensor:
        """Codes on paths that begin on an arc between the noise of two draws; half of them have the class of each."""
        noise, labels = Gaussian(self.config, self.noise_shape).between(seeds, round, device, steps=steps), None
        if self.labels:
            ends = [self.choose(seed, round, torch.zeros(1, dtype=torch.int64), device) for seed in seeds]
            labels = torch.cat([end for end in ends if end is not None])[torch.arange(steps) * 2 // steps]
        return self.solve(noise, labels)

    def solve(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """The codes (n, c, ...) of standard normals (n, d, ...), of the classes (n,) where there are any."""
        codes = self.ends(noise, labels)
        return torch.einsum("ij,nj...->ni...", self.outward, codes) + _rows(self.mean, codes)

    def ends(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """The whitened codes (n, d, ...) at the ends of the paths that begin at `noise`, (n, d, ...)."""
        return deque(self.path(noise, labels), maxlen=1).pop()

    def path(self, noise: Tensor, labels: Tensor | None = None) -> Iterator[Tensor]:
        """`noise`, and the points (n, d, ...) that the paths reach at times 1 / steps, 2 / steps, ..., 1.

        The velocity is v + autoguidance * (v - early) + guidance * (v - that of no class), v and early of the classes;
        the last of these from GUIDED on.
        """
        codes, before, steps = noise, noise[:0], self.config.steps
        yield codes
        for step in range(steps):
            if self.moves:  # until the flow has learned, paths stand still
                time = noise.new_full((len(noise),), step / steps)
                velocity = plain = self.velocity(codes, time, labels)
                if self.guides:
                    velocity = velocity + self.config.autoguidance * (plain - self.early(codes, time, labels))
                if self.config.guidance and labels is not None and step >= GUIDED * steps:
                    blind = self.velocity(codes, time, torch.full_like(labels, len(self.labels)))
                    velocity = velocity + self.config.guidance * (plain - blind)
                codes = codes + (1.5 * velocity - 0.5 * before if step else velocity) / steps  # Euler's step first
                before = velocity
            yield codes

    def whiten(self, codes: Tensor) -> Tensor:
        """(n, c, ...) -> (n, d, ...)"""
        return torch.einsum("ij,nj...->ni...", self.inward, codes - _rows(self.mean, codes))

    def follow(self, mean: Tensor, covariance: Tensor, keep: float) -> None:
        """Move the mean and the covariance towards these by the share `keep`, and whiten by them. Of all whitening
        matrices it takes the one that changes whitened codes least, since the velocity goes on learning.
        """
        self.mean.lerp_(mean, keep)
        self.covariance.lerp_(covariance, keep)
        values, directions = torch.linalg.eigh(self.covariance.double())
        directions = directions[:, -len(self.inward) :]
        spread = (values[-len(self.inward) :].clamp(min=0) + RIDGE * values.mean()).clamp(min=1e-30).sqrt()
        left, _, right = torch.linalg.svd(self.inward.double() @ (directions * spread))
        turn = left @ right
        self.inward.copy_(turn @ (directions / spread).T)
        self.outward.copy_((directions * spread) @ turn.T)

    def learn(self, examples: Examples) -> Iterator[float]:
        """Learn from the codes of a round, step by step; the metric loss/codes is the squared error per value.

        Before `begin` only the mean and the covariance are tracked. A function of the state, the codes and the seed,
        whatever the number of ranks, but for the order in which gradients are added.
        """
        learner, begun = self.learner, examples.progress >= self.config.begin
        if self.guides and examples.round == 0 and not learner.made:  # they are another run's: `model.init`
            still(self.early)
            self.guides = False
        codes = examples.codes(1 if begun else examples.stride)
        labels = self.read_labels(examples, count=not learner.done)
        if not learner.done:
            keep = max(1 / (examples.round + 1), 1 / (WINDOW + examples.settled))
            values = codes.transpose(0, 1).flatten(1)
            self.follow(values.mean(1), values.cov(), keep)
        if not begun:  # and a round that a shorter run stopped in is not gone on with
            learner.done, learner.sum = 0, 0.0
            return
        wanted = self.whiten(codes)
        for mine, batch, now in self.batches(examples, len(codes)):
            share = (now - self.config.begin) / (self.config.end - self.config.begin)
            if self.config.autoguidance and self.moves and not self.guides and share >= EARLY:
                self.early.load_state_dict(self.velocity.state_dict())
                self.guides = True
            rate = self.config.lr * cosine(share)
            classes = None if labels is None else labels[mine]
            numbers = mine + (learner.done + 1) * len(codes)
            loss = self._loss(wanted[mine], numbers, examples, classes)
            learner.step(loss / (batch * wanted[0].numel()), rate, self.velocity, examples.add)
            self.moves = True
            yield now

    def batches(self, examples: Examples, count: int) -> Iterator[tuple[Tensor, int, float]]:
        """For each step left of a round, in which each of `count` rows occurs `passes` times: this rank's rows of the
        batch, how many all ranks have, and the run's progress. In the end `metrics` has the mean loss.
        """
        drawn = uniform(self.seed, examples.round, torch.arange(count), (self.config.passes,), stream=LEARN)
        order = drawn.argsort(dim=0).T.flatten().to(examples.images.device)  # an upload a step would wait for a GPU
        batches, learner = order.split(self.config.batch), self.learner
        while learner.done < len(batches):
            rows = batches[learner.done]
            now = examples.progress + examples.covers * learner.done / len(batches)
            yield rows[examples.part(len(rows))], len(rows), now
        self.metrics = {self.metric: float(learner.sum) / len(batches)}
        learner.done, learner.sum = 0, 0.0

    def _loss(self, wanted: Tensor, numbers: Tensor, examples: Examples, labels: Tensor | None) -> Tensor:
        """Sum of the squared errors of the velocity at random times of straight paths that end at `wanted`."""
        size = math.prod(wanted.shape[1:])
        drawn = normal(self.seed, examples.round, numbers, (size + 1 + bool(self.labels),), wanted.device, stream=LEARN)
        noise, time = drawn[:, :size].view_as(wanted), drawn[:, size].sigmoid()
        if labels is not None:
            labels = labels.masked_fill(torch.special.ndtr(drawn[:, -1]) < DROPPED, len(self.labels))
        share = time.view(-1, *(1,) * (wanted.ndim - 1))
        points = share * wanted + (1 - share) * noise
        with examples.autocast():
            velocity = self.learner.network(points, time, labels)
        return (velocity.float() - (wanted - noise)).square().sum()

    def training_state(self) -> dict[str, Tensor]:
        learner = self.learner
        progress = [learner.made, learner.done, float(learner.sum), self.metrics.get(self.metric, math.nan)]
        return self.state_dict() | learner.tensors() | {"progress": torch.tensor(progress, dtype=torch.float64)}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_training_state(state)
        made, done, self.learner.sum, loss = state["progress"].tolist()
        self.metrics = {} if math.isnan(loss) else {self.metric: loss}
        self.learner.done = int(done)
        self.learner.resume_at(int(made))
        for name, value in self.learner.tensors().items():
            value.copy_(state[name])


def moving(velocity: Velocity) -> bool:
    """Whether a velocity is not zero, as it is at first."""
    return any(bool(value.any()) for value in velocity.outer.parameters())


def still(velocity: Velocity) -> None:
    """Make a velocity zero, as it is at first."""
    for value in velocity.outer.parameters():
        torch.nn.init.zeros_(value)


def first_round(share: float, rounds: int) -> int:
    """The first of so many rounds that begins when this share of the run, or more, is done."""
    return math.ceil(share * rounds - 1e-9)


def cosine(share: float) -> float:
    """The factor of a learning rate that falls from 1 to 0."""
    return (1 + math.cos(math.pi * share)) / 2


def _rows(mean: Tensor, codes: Tensor) -> Tensor:
    return mean.view(1, -1, *(1,) * (codes.ndim - 2))
