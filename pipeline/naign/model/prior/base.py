"""What every prior is: a distribution that latents are drawn from by (seed, round, id), and that may learn in a run.

A prior is a module whose parameters and buffers are its state, which travels with the model. Another package's prior is
a subclass of `Prior` with its settings, registered as an entry point of the group `naign.priors`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naign.errors import require
from naign.philox import CLASS, uniform
from naign.settings.constraints import between, check_fields

ENCODED = 512  # images encoded at once
WINDOW = 5  # rounds over which the mean and the covariance of codes are averaged, while f moves them

Shape = tuple[int, ...]
Device = torch.device | str


@dataclass(kw_only=True, slots=True)
class PriorConfig:
    """Base of every prior's settings."""

    name: str = ""
    """What latents are drawn from: `gaussian` (N(0, I)), `smooth` (few normals, enlarged), `halves` (N(0, I) and flat
    images), `flow` or `gmm` (decoded from codes that a flow or a Gaussian mixture draws, which learns in the same run),
    or one that another package registers, such as IGN's `fourier`."""

    def __post_init__(self) -> None:
        check_fields(self, "prior")

    # Shares of train.images, where they are no settings: before `begin` the prior is a simpler one, and over `alone`,
    # at the end, f is frozen and only the prior learns. `classes`: whether labels condition it.
    begin, alone, classes = 0.0, 0.0, False

    def check_rounds(self, rounds: int, images: int) -> None:
        """Raise InputError if so many rounds, of so many images each, are too few or too small to learn from."""
        late = f"prior.begin={self.begin:g} is after the last of {rounds} rounds: the prior would not be learned"
        learns, least = (rounds - 1) / rounds >= self.begin, math.ceil(1 / (1 - self.begin) - 1e-9)
        require((learns, f"{late}. Lower it, or raise train.images to {least * images} x train.passes, {least} rounds"))


@dataclass(kw_only=True, slots=True)
class CodesConfig(PriorConfig):
    """Base of the settings of priors of codes.

    f is an autoencoder: image -> code -> f(image). The prior learns the distribution of the codes of the data while f
    trains, and then alone, with f as it is. A latent is z = decode(code) of a drawn code: it is near the data already,
    f(z) is one evaluation of f, and the match has only to repair what is left.
    """

    begin: float = field(default=0.5, metadata=between(0, 0.99))
    """Share of train.images before which codes come from one Gaussian. Use 0 if matched latents are to move f."""
    alone: float = field(default=0.5, metadata=between(0, 0.99))
    """Share of train.images, at the end, over which f is frozen and only the prior learns."""
    classes: bool = False
    """Condition the prior on the labels of the images, so that samples of a class can be asked for (--label)."""

    def __post_init__(self) -> None:
        PriorConfig.__post_init__(self)
        shares = f"prior.begin is {self.begin:g} and prior.alone {self.alone:g}"
        gap = "between f's last step and the prior's first nothing would learn; at most 1 together"
        require((self.begin + self.alone <= 1 + 1e-9, f"{shares}: {gap}"))


@dataclass(kw_only=True, slots=True, frozen=True)
class Examples:
    """A round's images as a prior learns from them, and how ranks learn as one."""

    images: Tensor  # (n, *shape) float32: this rank's; every rank has as many
    labels: Tensor | None = None  # (n,) int64, where the prior has classes
    encode: Callable[[Tensor], Tensor] = lambda images: images  # by f, to codes
    round: int = 0
    progress: float = 0.0  # share of the run before this round
    covers: float = 0.0  # share of the run that this round is
    settled: int = 0  # rounds since which f has not changed
    stride: int = 1  # every so-many-th image is enough for a mean and a covariance that nothing is trained on yet
    rank: int = 0
    world: int = 1
    gather: Callable[[Tensor], Tensor] = lambda rows: rows  # the rows of all ranks, in rank order
    add: Callable[[Tensor], Tensor] = lambda value: value  # its sum over ranks
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def part(self, count: int) -> slice:
        """This rank's part of so many rows."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def codes(self, stride: int = 1) -> Tensor:
        """Codes of every stride-th image of all ranks. Collective."""
        return self.gather(torch.cat([self.encode(part) for part in self.images[::stride].split(ENCODED)]))


class Prior(nn.Module):
    """A distribution of latents, or of codes that f decodes into latents. Its buffers are its state."""

    decodes = False
    """Whether it draws codes, of the shape of f's, rather than latents. Then a latent is a sample already."""
    learns = False
    """Whether `learn` changes it."""
    begun = True
    """Whether a state that was loaded has learned after prior.begin: until then a prior of codes is one Gaussian."""
    labels: tuple[str, ...] = ()
    """The names of the classes that it is conditioned on, in the order of their numbers."""
    arc = False
    """Whether draws are normals, or linear in them: all along an arc between two draws the distribution is the same."""

    def __init__(self, config: Any, shape: Shape, *, seed: int = 0) -> None:
        super().__init__()
        self.config, self.shape, self.seed = config, shape, seed  # shape of one draw; seed of what it learns with
        self.metrics: dict[str, float] = {}  # of the newest round that it learned from; the run ends if not finite

    def draw(self, seed: int, round: int, ids: Tensor, device: Device) -> Tensor:
        """(n, *shape) float32 on `device`; row i depends on (seed, round, ids[i]) and the state alone."""
        raise NotImplementedError

    def learn(self, examples: Examples) -> Iterator[float]:
        """Learn from a round; yield the run's progress after each step, where it may stop. Collective."""
        yield from ()

    def training_state(self) -> dict[str, Tensor]:
        """What learning resumes from: names and shapes are always the same."""
        return self.state_dict()

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Resume from what `training_state` returned."""
        self.load_state_dict({name: state[name] for name in self.state_dict()})

    def between(self, seeds: tuple[int, int], round: int, device: Device, *, steps: int) -> Tensor:
        """(steps, *shape) between id 0's draws of two seeds, in equal steps of an arc's angle or of a line."""
        ids = torch.zeros(1, dtype=torch.int64)
        first, last = (self.draw(seed, round, ids, device) for seed in seeds)
        share = torch.linspace(0, 1, steps, device=first.device).view(-1, *(1,) * (first.ndim - 1))
        angle = F.cosine_similarity(first.flatten(), last.flatten(), dim=0).clamp(-1, 1).acos()
        if not self.arc or angle < 1e-3 or angle > math.pi - 1e-3:  # in one line no arc is the shortest
            return torch.lerp(first, last, share)
        return (((1 - share) * angle).sin() * first + (share * angle).sin() * last) / angle.sin()


class CodesPrior(Prior):
    """Base of priors of codes, which may be conditioned on the classes that `labels` name. Their `draw` also takes the
    classes (n,) int64 of what it draws; None: those that `choose` draws.
    """

    decodes = learns = True
    class_counts: Tensor  # (classes,) int64, where there are any: images of each that it learned from

    def __init__(self, config: Any, shape: Shape, *, seed: int = 0, labels: Sequence[str] = ()) -> None:
        super().__init__(config, shape, seed=seed)
        self.labels = tuple(labels)
        if self.labels:
            self.register_buffer("class_counts", torch.zeros(len(self.labels), dtype=torch.int64))

    def choose(self, seed: int, round: int, ids: Tensor, device: Device) -> Tensor | None:
        """Classes (n,) int64 in proportion to `class_counts`, by (seed, round, id); None without classes."""
        if not self.labels:
            return None
        drawn = uniform(seed, round, ids, (1,), device, stream=CLASS).flatten()
        shares = self.class_counts.cumsum(0).float() / self.class_counts.sum().clamp(min=1).float()
        return torch.searchsorted(shares, drawn.contiguous()).clamp(max=len(self.labels) - 1)

    def read_labels(self, examples: Examples, *, count: bool) -> Tensor | None:
        """The classes (n,) of a round's images of all ranks, which are counted where asked; None without classes."""
        if not self.labels:
            return None
        assert examples.labels is not None
        labels = examples.gather(examples.labels)
        if count:
            before = self.class_counts if examples.round else torch.zeros_like(self.class_counts)
            self.class_counts.copy_(before + torch.bincount(labels, minlength=len(self.labels)))
        return labels
