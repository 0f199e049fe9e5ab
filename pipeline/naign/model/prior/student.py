"""A flow with a student: two evaluations from noise to a code, where the flow takes many.

The student begins as the flow's velocity and learns in the same run, once the flow has learned, to follow the flow's
paths in two steps, by regression: from noise to where the path is at a time of about MIDDLE, and from there to its end.
Both are smooth functions of where they begin (arXiv 2209.03003, section 2.2).
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from naign.model.prior.base import Examples, Shape
from naign.model.prior.flow import Flow, FlowConfig, cosine, first_round, moving, still
from naign.philox import LEARN, normal

RATE = 0.5  # of the student's learning rate, over prior.lr
MIDDLE = 0.4  # time at which the second step begins, rounded to a step of the flow
SOLVED = 512  # draws of noise that the flow follows at once


class TaughtFlow(Flow):
    """A flow, and its student where `student` is not 0. `learner` trains the flow, then the student."""

    def __init__(self, config: FlowConfig, shape: Shape, *, seed: int = 0, labels: Sequence[str] = ()) -> None:
        super().__init__(config, shape, seed=seed, labels=labels)
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

    def ends(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        if not self.taught:
            return super().ends(noise, labels)
        late = torch.zeros(len(noise), dtype=torch.bool, device=noise.device)
        return self._step(self.student, self._step(self.student, noise, late, labels), ~late, labels)

    def learn(self, examples: Examples) -> Iterator[float]:
        """As a flow learns; from `end` on, the student from as many draws of noise as a round has images, each
        with the class of one. The metric loss/student is the absolute error per value.
        """
        rounds = round(1 / examples.covers) if self.config.student else 1
        if examples.progress < (first := first_round(self.config.end, rounds) / rounds) or not self.config.student:
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
        labels = self.read_labels(examples, count=False)
        parts = torch.arange(count)[examples.part(count)].split(SOLVED)
        paths = [self._two_steps(noise[part], _of(labels, part)) for part in parts]
        halves, ends = (examples.gather(torch.cat(part)) for part in zip(*paths, strict=True))
        for mine, batch, now in self.batches(examples, count):
            late = (mine + self.learner.done) % 2 == 1  # rows that learn the second step
            chosen = late.view(-1, *(1,) * (noise.ndim - 1))
            points = torch.where(chosen, halves[mine], noise[mine])
            with examples.autocast():
                reached = self._step(self.learner.network, points, late, _of(labels, mine))
            loss = (reached.float() - torch.where(chosen, ends[mine], halves[mine])).abs().sum()
            rate = self.config.lr * RATE * cosine((now - first) / (1 - first))
            self.learner.step(loss / (batch * noise[0].numel()), rate, self.student, examples.add)
            yield now

    @property
    def _half(self) -> int:
        """The flow's steps that the student's first one takes."""
        return max(1, round(MIDDLE * self.config.steps))

    def _two_steps(self, noise: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The points (n, d, ...) that the flow's paths from `noise` reach where the student's two steps end."""
        path = [*self.path(noise, labels)]
        return path[self._half], path[-1]

    def _step(self, student: nn.Module, points: Tensor, late: Tensor, labels: Tensor | None) -> Tensor:
        """The first step of the student from points (n, d, ...), or the second of rows that are `late`, (n,) bool."""
        middle = self._half / self.config.steps
        length = torch.where(late, 1 - middle, middle).view(-1, *(1,) * (points.ndim - 1))
        return points + length * student(points, late * middle, labels)


def _of(labels: Tensor | None, rows: Tensor) -> Tensor | None:
    """The labels of these rows, where there are any."""
    return None if labels is None else labels[rows]
