"""A flow with a student: one evaluation from noise to a code, where the flow takes many.

The student begins as the flow's velocity at t = 0 and learns in the same run, once the flow has learned:

1. by regression on the flow's own end points, which are a smooth function of the noise (arXiv 2209.03003, section 2.2);
2. in the last steps also by distribution matching (arXiv 2311.18828), which restores what a regression blurs: codes
   move by the difference of two velocities, of flows that go on learning from the data's codes and from the student's.
   Both learn from the same noise at the same rate, so most of their errors cancel; those of the flow itself, which is
   trained for long, and of one new critic do not. Their rate is above the student's: if they lag, it collapses.
   All is float32: bfloat16 rounds away the differences of velocities.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.prior.base import Examples, Shape
from pipeline.model.prior.flow import Flow, FlowConfig, between_ends, cosine, moving
from pipeline.model.prior.learner import BETAS, Learner
from pipeline.philox import LEARN, normal

FLOW, REGRESSION, MATCHING = range(3)  # what learns: the flow, or its student by regression, or by both
MATCHED = 0.15  # share of the student's steps, the last ones, by distribution matching too
REGRESSED, MOVED, JUDGED = 1 / 2, 1 / 20, 1 / 5  # learning rates over prior.lr: of the student, and of the critics
LEAST = 0.05  # factor of the critics' learning rate in the end, where the student's is 0
STEADY = (0.0, 0.99)  # AdamW's betas in distribution matching, where gradients change with both networks
SHORT = 20  # steps of the student's warm-up there
STUDENT_DECAY, CRITIC_DECAY = 0.995, 0.98  # a step there, of the averages of weights
SOLVED = 512  # draws of noise that the flow follows at once


class TaughtFlow(Flow):
    """A flow, and its student where `student` is not 0. `learner` trains the flow, then the student."""

    def __init__(self, config: FlowConfig, shape: Shape, *, seed: int = 0) -> None:
        super().__init__(config, shape, seed=seed)
        self.phase = FLOW
        self.taught = False  # whether the student has begun to learn
        if config.student:
            self.student = deepcopy(self.velocity)

    @cached_property
    def critics(self) -> "dict[str, Critic]":
        """Of the student's codes, and of the data's."""
        return {name: Critic(self.velocity) for name in ("made", "real")}

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        loaded = super().load_state_dict(state, strict, assign)
        if self.config.student:
            self.taught = moving(self.student)
        return loaded

    def ends(self, noise: Tensor) -> Tensor:
        return jump(self.student, noise) if self.taught else super().ends(noise)

    def learn(self, examples: Examples) -> Iterator[None]:
        """As a flow learns; from `end` on, the student from as many draws of noise as a round has images."""
        if not self.config.student or examples.progress < (first := self._first(examples.covers)):
            yield from super().learn(examples)
            return
        count = len(examples.images) * examples.world
        ids = torch.arange(count) + count  # those below are of the order of rows
        noise = normal(self.seed, examples.round, ids, self.noise_shape, examples.images.device, stream=LEARN)
        parts = noise[examples.part(count)].split(SOLVED)
        ends = examples.gather(torch.cat([super(TaughtFlow, self).ends(part) for part in parts]))
        real: Tensor | None = None
        for mine, batch, now in self.batches(examples, count, "loss/student"):
            share = (now - first) / (1 - first)  # of the student's steps
            self._enter(REGRESSION if share < 1 - MATCHED else MATCHING)
            if self.phase == MATCHING and real is None:
                real = self.whiten(examples.codes())
            ids = mine + (self.learner.done + 2) * count
            self._step(noise[mine], ends[mine], None if real is None else real[mine], ids, batch, share, examples)
            yield

    def _first(self, covers: float) -> float:
        """The share of the run at which the first round of the student begins, of rounds that are `covers` each."""
        rounds = round(1 / covers)
        return math.ceil(self.config.end * rounds - 1e-9) / rounds

    def _enter(self, phase: int) -> None:
        """Begin a phase, unless it has begun: the student from the flow, then from the average of its weights."""
        if phase == self.phase:
            return
        if self.phase == FLOW:
            self.student.load_state_dict(self.velocity.state_dict())
            self.taught = True
        self.learner.restart(self.student, BETAS if phase == REGRESSION else STEADY)
        if phase == MATCHING:
            for critic in self.critics.values():
                critic.restart(self.velocity)
        self.phase = phase

    def _step(
        self,
        noise: Tensor,  # (m, d, ...): this rank's rows of a batch
        ends: Tensor,  # (m, d, ...): the flow's whitened codes of that noise
        real: Tensor | None,  # (m, d, ...): as many whitened codes of images; None in regression
        ids: Tensor,  # (m,): of further random numbers
        batch: int,  # rows of all ranks
        share: float,  # of the student's steps before this one
        examples: Examples,
    ) -> None:
        rate, size = self.config.lr, noise[0].numel()
        with nullcontext() if self.phase == MATCHING else examples.autocast():
            codes = jump(self.learner.network, noise).float()
        loss = (codes - ends).abs().sum() / (batch * size)
        if self.phase == REGRESSION:
            rate *= REGRESSED * cosine(share / (1 - MATCHED))
            self.learner.step(loss, rate, self.student, examples.add)
            return
        assert real is not None, "matching compares with codes of the data"
        lower, fixed = cosine(1 - (1 - share) / MATCHED), codes.detach()
        drawn = normal(self.seed, examples.round, ids, (2, size + 1), noise.device, stream=LEARN)
        (first, time), (second, other) = ((part[:, 1:].view_as(noise), part[:, 0]) for part in drawn.unbind(1))
        for name, seen in (("made", fixed), ("real", real)):
            self.critics[name].learn(seen, first, time.sigmoid(), batch, rate * JUDGED * max(LEAST, lower), examples)
        moved = fixed + self._pull(fixed, second, 0.02 + 0.96 * torch.special.ndtr(other))
        loss = loss + (codes - moved).square().sum() / (2 * batch * math.sqrt(size))
        rate *= MOVED * lower
        self.learner.step(loss, rate, self.student, examples.add, decay=STUDENT_DECAY, warmup=SHORT)

    @torch.no_grad()
    def _pull(self, codes: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """How far codes move towards the data's distribution, (m, d, ...): equations 7 and 8 of arXiv 2311.18828."""
        at, left = between_ends(noise, codes, time), (1 - time).view(-1, *(1,) * (codes.ndim - 1))
        made, real = (self.critics[name].average(at, time) for name in ("made", "real"))
        scale = (codes - at - left * real).abs().flatten(1).mean(1).view_as(left)
        return left * (real - made) / scale

    def training_state(self) -> dict[str, Tensor]:
        state = super().training_state()
        if not self.config.student:
            return state
        phase = [self.phase, self.critics["made"].made, self.metrics.get("loss/student", math.nan)]
        return state | self._critics() | {"phase": torch.tensor(phase, dtype=torch.float64)}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_training_state(state)
        if not self.config.student:
            return
        phase, made, loss = state["phase"].tolist()
        self.phase = int(phase)
        self.learner.adam.param_groups[0]["betas"] = STEADY if self.phase == MATCHING else BETAS
        for name, value in self._critics().items():
            value.copy_(state[name])
        for critic in self.critics.values():
            critic.resume_at(int(made))
        if not math.isnan(loss):
            self.metrics = {"loss/student": loss}

    def _critics(self) -> dict[str, Tensor]:
        named = {name: critic.tensors() for name, critic in self.critics.items()}
        return {f"{name}.{key}": value for name, tensors in named.items() for key, value in tensors.items()}


class Critic(Learner):
    """The velocity of a flow that follows some codes, and the average of its weights."""

    def __init__(self, velocity: nn.Module) -> None:
        super().__init__(velocity, STEADY)
        self.average = deepcopy(velocity)

    def restart(self, network: nn.Module, betas: tuple[float, float] = STEADY) -> None:
        super().restart(network, betas)
        self.average.load_state_dict(network.state_dict())

    def learn(self, codes: Tensor, noise: Tensor, time: Tensor, batch: int, rate: float, examples: Examples) -> None:
        """A step on the squared error of the velocity at these times, by this rank's rows of a batch. Collective."""
        velocity = self.network(between_ends(noise, codes, time), time)
        loss = (velocity - (codes - noise)).square().sum() / (batch * codes[0].numel())
        self.step(loss, rate, self.average, examples.add, decay=CRITIC_DECAY, warmup=1)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {f"average.{name}": value for name, value in self.average.state_dict().items()}


def jump(network: nn.Module, noise: Tensor) -> Tensor:
    """Whitened codes (n, d, ...) of noise (n, d, ...) in one evaluation."""
    return noise + network(noise, noise.new_zeros(len(noise)))
