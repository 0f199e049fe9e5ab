"""A flow with a student: two evaluations from noise to a code, where the flow takes many.

The student begins as the flow's velocity and learns in the same run, once the flow has learned: by regression on the
flow's own end points, which are a smooth function of the noise (arXiv 2209.03003, section 2.2). Its first evaluation is
at the noise, the second at a point between the noise and what the first has led to.
"""

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.prior.base import Examples, Shape
from pipeline.model.prior.flow import Flow, FlowConfig, between_ends, cosine, moving, still
from pipeline.philox import LEARN, normal

RATE = 0.5  # of the student's learning rate, over prior.lr
MIDDLE = 0.4  # time of the second evaluation
SOLVED = 512  # draws of noise that the flow follows at once


class TaughtFlow(Flow):
    """A flow, and its student where `student` is not 0. `learner` trains the flow, then the student."""

    def __init__(self, config: FlowConfig, shape: Shape, *, seed: int = 0) -> None:
        super().__init__(config, shape, seed=seed)
        self.taught = False  # whether the student has begun to learn
        if config.student:
            self.student = deepcopy(self.velocity)

    @property
    def metric(self) -> str:
        return "loss/student" if self.taught else super().metric

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        loaded = super().load_state_dict(state, strict, assign)
        self.taught = bool(self.config.student) and moving(self.student)
        return loaded

    def ends(self, noise: Tensor) -> Tensor:
        return leap(self.student, noise) if self.taught else super().ends(noise)

    def learn(self, examples: Examples) -> Iterator[None]:
        """As a flow learns; from `end` on, the student from as many draws of noise as a round has images. The metric
        loss/student is the absolute error per value.
        """
        if not self.config.student or examples.progress < (first := self._first(examples.covers)):
            if self.taught:  # by another run (`model.init`), or one that is longer now: it is taught anew
                still(self.student)
                self.learner.restart(self.velocity)
                self.taught = False
            yield from super().learn(examples)
            return
        if not self.taught:
            self.student.load_state_dict(self.velocity.state_dict())
            self.learner.restart(self.student)
            self.taught, self.metrics = True, {}
        count = len(examples.images) * examples.world
        ids = torch.arange(count) + count  # those below are of the order of rows
        noise = normal(self.seed, examples.round, ids, self.noise_shape, examples.images.device, stream=LEARN)
        parts = noise[examples.part(count)].split(SOLVED)
        ends = examples.gather(torch.cat([super(TaughtFlow, self).ends(part) for part in parts]))
        for mine, batch, now in self.batches(examples, count):
            second = (mine + self.learner.done) % 2 == 1  # rows that learn the second evaluation in this step
            points, time = noise[mine], second.to(noise.device) * MIDDLE
            with examples.autocast():
                with torch.no_grad():
                    points[second] = middle(self.learner.network, points[second])
                codes = jump(self.learner.network, points, time)
            loss = (codes.float() - ends[mine]).abs().sum() / (batch * noise[0].numel())
            rate = self.config.lr * RATE * cosine((now - first) / (1 - first))
            self.learner.step(loss, rate, self.student, examples.add)
            yield

    def _first(self, covers: float) -> float:
        """The share of the run at which the first round of the student begins, of rounds that are `covers` each."""
        rounds = round(1 / covers)
        return math.ceil(self.config.end * rounds - 1e-9) / rounds


def leap(student: nn.Module, noise: Tensor) -> Tensor:
    """Whitened codes (n, d, ...) of noise (n, d, ...) in two evaluations."""
    return jump(student, middle(student, noise), noise.new_full((len(noise),), MIDDLE))


def middle(student: nn.Module, noise: Tensor) -> Tensor:
    """Where the second evaluation is made, (n, d, ...)."""
    first = jump(student, noise, noise.new_zeros(len(noise)))
    return between_ends(noise, first, noise.new_full((len(noise),), MIDDLE))


def jump(student: nn.Module, points: Tensor, time: Tensor) -> Tensor:
    """From points (n, d, ...) at times (n,) straight to codes."""
    return points + (1 - time).view(-1, *(1,) * (points.ndim - 1)) * student(points, time)
