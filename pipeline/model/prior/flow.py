"""Codes drawn by a rectified flow (arXiv 2209.03003) from noise, small beside f.

Codes are (n, c), of a network with a dense code, or (n, c, h, w), of one with a spatial code. They are whitened over
their c channels first, so that no direction is lost in the noise, but for those of little spread, which stay small; and
of many channels only the DIRECTIONS of most spread are modelled: the others stay at their mean.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pipeline.model.prior.base import WINDOW, CodesConfig, Device, Examples, Prior, Shape
from pipeline.model.prior.noise import Gaussian
from pipeline.model.prior.velocity import DenseVelocity, SpatialVelocity
from pipeline.philox import LEARN, normal, uniform
from pipeline.settings.constraints import POSITIVE, between

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
DECAY = 0.999  # a step, of the average of the velocity's weights, which is what draws
WARMUP = 200  # steps over which the learning rate rises
DIRECTIONS = 128  # principal directions of the codes' channels that are modelled, at most
RIDGE = 0.3  # of the mean variance, added to each: to whiten directions of little spread fully costs the others


@dataclass(kw_only=True, slots=True)
class FlowConfig(CodesConfig):
    name: str = "flow"
    width: int = field(default=512, metadata=between(8, 2**13))
    """Width of the flow: hidden units for a dense code, channels at full resolution for a spatial code."""
    depth: int = field(default=3, metadata=between(1, 64))
    """Depth of the flow: residual layers for a dense code; for a spatial code, blocks per resolution on each side of a
    U-Net."""
    passes: int = field(default=8, metadata=between(1, 10**4))
    """How often the flow learns from each image's code, each time with other noise."""
    batch: int = field(default=512, metadata=POSITIVE)
    """Codes per step, over all ranks."""
    lr: float = field(default=2e-3, metadata=POSITIVE)
    """Peak learning rate of the flow's AdamW: a short warm-up, then a cosine to zero at the end of the run."""
    steps: int = field(default=8, metadata=between(1, 10**4))
    """Steps of Heun's method from noise to a code: 2 x steps - 1 evaluations of the flow."""


class Flow(Prior):
    """The velocity of whitened codes on straight paths from noise (t = 0) to the data (t = 1).

    Whitened codes, and noise, are (n, d, ...), of at most DIRECTIONS channels. Its state is the average of the weights
    in training, which `learner` holds.
    """

    decodes = learns = True
    mean: Tensor  # (c,) of the channels, over positions
    covariance: Tensor  # (c, c)
    inward: Tensor  # (d, c): from codes, less their mean, to whitened ones
    outward: Tensor  # (c, d), and back

    def __init__(self, config: FlowConfig, shape: Shape, *, seed: int = 0) -> None:
        super().__init__(config, shape, seed=seed)
        channels, number = shape[0], min(DIRECTIONS, shape[0])
        self.noise_shape = (number, *shape[1:])
        self.moves = False  # whether the velocity is not zero
        kind = DenseVelocity if len(shape) == 1 else SpatialVelocity
        with torch.random.fork_rng(devices=[]):  # its first weights change none that are drawn besides
            torch.manual_seed(seed)
            self.velocity = kind(self.noise_shape, config.width, config.depth)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("covariance", torch.eye(channels))
        self.register_buffer("inward", torch.eye(number, channels))
        self.register_buffer("outward", torch.eye(channels, number))

    @cached_property
    def learner(self) -> "Learner":
        return Learner(self.velocity)

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        loaded = super().load_state_dict(state, strict, assign)
        self.moves = any(bool(value.any()) for value in self.velocity.outer.parameters())
        return loaded

    def draw(self, seed: int, round: int, ids: Tensor, device: Device) -> Tensor:
        return self.solve(normal(seed, round, ids, self.noise_shape, device))

    def between(self, seeds: tuple[int, int], round: int, device: Device, *, steps: int) -> Tensor:
        """Codes on paths that begin on an arc between the noise of two draws."""
        return self.solve(Gaussian(self.config, self.noise_shape).between(seeds, round, device, steps=steps))

    def solve(self, noise: Tensor) -> Tensor:
        """The codes (n, c, ...) at the ends of the paths that begin at standard normals (n, d, ...)."""
        codes, steps = noise, self.config.steps if self.moves else 0  # until the flow has learned, paths stand still
        for step in range(steps):  # Heun's method; the last step is Euler's
            velocity = self.velocity(codes, noise.new_full((len(noise),), step / steps))
            if step + 1 < steps:
                ahead = self.velocity(codes + velocity / steps, noise.new_full((len(noise),), (step + 1) / steps))
                velocity = (velocity + ahead) / 2
            codes = codes + velocity / steps
        return torch.einsum("ij,nj...->ni...", self.outward, codes) + _rows(self.mean, codes)

    def whiten(self, codes: Tensor) -> Tensor:
        """(n, c, ...) -> (n, d, ...)"""
        return torch.einsum("ij,nj...->ni...", self.inward, codes - _rows(self.mean, codes))

    def follow(self, mean: Tensor, covariance: Tensor, keep: float) -> None:
        """Move the mean and the covariance towards these by the share `keep`, and whiten by them.

        Of all whitening matrices it takes the one that changes whitened codes least, since the velocity goes on
        learning.
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

    def learn(self, examples: Examples) -> Iterator[None]:
        """Learn from the codes of a round, step by step; the metric loss/codes is the squared error per value.

        Before `begin` only the mean and the covariance are tracked. A function of the state, the codes and the seed,
        whatever the number of ranks, but for the order in which gradients are added.
        """
        learner, begun = self.learner, examples.progress >= self.config.begin
        codes = examples.codes(1 if begun else examples.stride)
        if not learner.done:
            keep = max(1 / (examples.round + 1), 1 / (WINDOW + examples.settled))
            values = codes.transpose(0, 1).flatten(1)
            self.follow(values.mean(1), values.cov(), keep)
        if not begun:  # and a round that a shorter run stopped in is not gone on with
            learner.done, learner.sum = 0, 0.0
            return
        wanted = self.whiten(codes)
        ids = torch.arange(len(codes))
        order = uniform(self.seed, examples.round, ids, (self.config.passes,), stream=LEARN).argsort(dim=0).T.flatten()
        batches = order.split(self.config.batch)
        while learner.done < len(batches):
            now = examples.progress + examples.covers * learner.done / len(batches)
            learned = (now - self.config.begin) / (1 - self.config.begin)  # share of what the flow learns from
            rate = self.config.lr * (1 + math.cos(math.pi * learned)) / 2
            rows = batches[learner.done]
            first, last = (len(rows) * part // examples.world for part in (examples.rank, examples.rank + 1))
            mine = rows[first:last]
            loss = self._loss(wanted[mine.to(codes.device)], mine + (learner.done + 1) * len(codes), examples)
            learner.step(loss / (len(rows) * wanted[0].numel()), rate, self.velocity, examples.add)
            self.moves = True
            yield
        self.metrics = {"loss/codes": float(learner.sum) / len(batches)}
        learner.done, learner.sum = 0, 0.0

    def _loss(self, wanted: Tensor, numbers: Tensor, examples: Examples) -> Tensor:
        """Sum of the squared errors of the velocity at random times of straight paths that end at `wanted`."""
        size = math.prod(wanted.shape[1:]) + 1
        drawn = normal(self.seed, examples.round, numbers, (size,), wanted.device, stream=LEARN)
        noise, time = drawn[:, :-1].view_as(wanted), drawn[:, -1].sigmoid()
        along = time.view(-1, *(1,) * (wanted.ndim - 1))
        with examples.autocast():
            velocity = self.learner.velocity(along * wanted + (1 - along) * noise, time)
        return (velocity.float() - (wanted - noise)).square().sum()

    def training_state(self) -> dict[str, Tensor]:
        learner = self.learner
        progress = [learner.made, learner.done, float(learner.sum), self.metrics.get("loss/codes", math.nan)]
        return self.state_dict() | learner.tensors() | {"progress": torch.tensor(progress, dtype=torch.float64)}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_training_state(state)
        made, done, self.learner.sum, loss = state["progress"].tolist()
        self.metrics = {} if math.isnan(loss) else {"loss/codes": loss}
        self.learner.made, self.learner.done = int(made), int(done)
        for name, value in self.learner.tensors().items():
            value.copy_(state[name])
        for moments in self.learner.adam.state.values():
            moments["step"].fill_(made)


class Learner:
    """The weights in training, AdamW's moments, and the progress within a round."""

    def __init__(self, velocity: nn.Module) -> None:
        self.velocity = deepcopy(velocity).requires_grad_(True)
        self.done = 0  # steps of the round
        self.sum: float | Tensor = 0.0  # of their losses
        self.made = 0  # steps of all rounds
        parameters = list(self.velocity.parameters())
        self.ahead = parameters[0].device.type != "cpu"  # whether norm and loss of a step stay on the device
        self.adam = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0)
        for value in parameters:  # as AdamW itself begins, but before the first step
            moments = {name: torch.zeros_like(value) for name in MOMENTS}
            self.adam.state[value] = {"step": torch.tensor(0.0), **moments}

    def step(self, loss: Tensor, rate: float, average: nn.Module, add: Callable[[Tensor], Tensor]) -> None:
        """A step on the mean loss over all ranks, which then move `average` too. Collective."""
        parameters = list(self.velocity.parameters())
        parts = torch.autograd.grad(loss, parameters)
        whole = add(torch.cat([*(part.flatten() for part in parts), loss.detach().view(1)]))
        norm = whole[:-1].norm()
        gradient = whole[:-1] * ((1 / (norm + 1e-6)).clamp(max=1) if self.ahead else min(1.0, 1 / (float(norm) + 1e-6)))
        for value, part in zip(parameters, gradient.split([value.numel() for value in parameters]), strict=True):
            value.grad = part.view_as(value)
        self.adam.param_groups[0]["lr"] = rate * min(1.0, (self.made + 1) / WARMUP)
        self.adam.step()
        self.made += 1
        move = get_ema_multi_avg_fn(min(DECAY, (1 + self.made) / (10 + self.made)))
        move(list(average.parameters()), [value.detach() for value in parameters], None)
        self.sum += whole[-1].double() if self.ahead else float(whole[-1])
        self.done += 1

    def tensors(self) -> dict[str, Tensor]:
        """The weights and their moments, by name."""
        named, states = dict(self.velocity.named_parameters()), self.adam.state
        moments = {f"{one}.{name}": states[value][one] for one in MOMENTS for name, value in named.items()}
        return {f"trained.{name}": value.detach() for name, value in named.items()} | moments


def _rows(mean: Tensor, codes: Tensor) -> Tensor:
    return mean.view(1, -1, *(1,) * (codes.ndim - 2))
