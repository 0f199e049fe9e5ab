"""What a prior is: the distribution of f's latents that is fitted once f is trained.

A prior is a module whose parameters and buffers are its state, which travels with the model. Another package's prior is
a subclass of `Prior` with its settings, registered as an entry point of the group `naign.priors`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from naign.data.order import parts
from naign.philox import CLASS, uniform
from naign.settings.constraints import POSITIVE

KEPT = 2**28
"""Values of codes that are in memory at once, at most: 1 GB."""

Shape = tuple[int, ...]
Device = torch.device | str


@dataclass(kw_only=True, slots=True)
class PriorConfig:
    """Base of the settings of all priors."""

    name: str = "none"
    """Distribution of samples: `gmm` (a Gaussian mixture of the codes of the data), `flow` (a rectified flow of these
    codes), `none` (samples are f of noise), or one that another package registers."""

    classes = False
    images = 0
    passes = 1

    def check(self) -> None:
        """Raise InputError for settings that contradict each other."""

    def check_codes(self, count: int, shape: Shape) -> None:
        """Raise InputError if `count` codes of this shape are too few or too large to be fitted."""


@dataclass(kw_only=True, slots=True)
class CodesConfig(PriorConfig):
    """Base of the settings of priors of codes.

    f is an autoencoder: image -> code -> f(image). Once f is trained, the prior is fitted to the codes of the data. A
    sample is f(decode(code)) of a drawn code.
    """

    images: int = field(default=60_000, metadata=POSITIVE)
    """Training images whose codes the prior is fitted to, rounded up to whole rounds; more than the data set has are
    further epochs, with other crops and mirroring."""
    classes: bool = False
    """Condition the prior on the labels of the images, so that samples of a class can be asked for (--label)."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Codes:
    """The codes of training images that a prior is fitted to, in chunks that fit into memory.

    Every rank reads the same chunks and computes on its `part` of their rows; `add` sums over the ranks.
    """

    sizes: tuple[int, ...]  # codes of each chunk
    read: Callable[[int], tuple[list[Tensor], Tensor | None]]
    """Collective: codes (n, *shape) float32, if the prior `mirrors` then also those of the mirrored images, and labels
    (n,) int64 if it is conditioned on classes."""
    rank: int = 0
    world: int = 1
    add: Callable[[Tensor], Tensor] = lambda value: value  # collective
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def part(self, rows: Tensor) -> Tensor:
        """This rank's part of some rows (n, ...)."""
        first, last = parts(0, len(rows), self.world)[self.rank]
        return rows[first:last]

    def of_first(self, value: Tensor) -> Tensor:
        """Rank 0's value on every rank, since other machines may round otherwise. Collective."""
        return self.add(value * (self.rank == 0))


class Prior(nn.Module):
    """A distribution of latents, or of codes that f decodes into latents. Its parameters and buffers are its state."""

    decodes = False
    """Whether it draws codes, of the shape of f's, rather than latents."""
    learns = False
    """Whether `fit` changes it."""
    mirrors = False
    """Whether `fit` needs the codes of mirrored images too, where data.flip mirrors images at random."""
    labels: tuple[str, ...] = ()
    """The names of the classes that it is conditioned on, in the order of their numbers."""

    def __init__(self, config: Any, shape: Shape, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.shape = shape  # of one draw
        self.seed = seed  # of what it is fitted with

    def draw(
        self,
        seed: int,
        round: int,
        ids: Tensor,
        device: Device,
    ) -> Tensor:
        """Draw (n, *shape) float32 on `device`; row i depends on (seed, round, ids[i]) and the state alone."""
        raise NotImplementedError

    def fit(self, codes: Codes) -> Iterator[float]:
        """Fit the prior to the codes of the data, from the loaded state on. Collective.

        A prior that does not decode is fitted to the images themselves, as `codes`. Yields the share of the fit that is
        done after each step, where the run may stop; 1 at the end.
        """
        yield from ()

    def read_metrics(self) -> dict[str, float]:
        """Metrics of the fit since the last call, such as prior/loss. The run ends if one of them is not finite."""
        return {}

    def training_state(self) -> dict[str, Tensor]:
        """What `fit` resumes from: names and shapes are always the same."""
        return self.state_dict()

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Resume from what `training_state` returned."""
        self.load_state_dict({name: state[name] for name in self.state_dict()})


class CodesPrior(Prior):
    """Base of priors that are fitted to codes, which may be conditioned on the classes that `labels` name.

    Their `draw` also takes the classes (n,) int64 of what it draws; None: those that `choose` draws.
    """

    decodes = True
    learns = True
    class_counts: Tensor  # (classes,) int64, where there are any: images of each that it was fitted to

    def __init__(
        self,
        config: Any,
        shape: Shape,
        *,
        seed: int = 0,
        labels: Sequence[str] = (),
    ) -> None:
        super().__init__(config, shape, seed=seed)
        self.labels = tuple(labels)
        if self.labels:
            self.register_buffer("class_counts", torch.zeros(len(self.labels), dtype=torch.int64))

    def choose(
        self,
        seed: int,
        round: int,
        ids: Tensor,
        device: Device,
    ) -> Tensor | None:
        """Classes (n,) int64 in proportion to `class_counts`, by (seed, round, id); None without classes."""
        if not self.labels:
            return None
        drawn = by_chance(seed, round, ids, device)
        total = self.class_counts.sum().clamp(min=1)
        shares = self.class_counts.cumsum(0) / total
        chosen = torch.searchsorted(shares, drawn)
        return chosen.clamp(max=len(self.labels) - 1)

    def count_classes(self, labels: Tensor | None) -> None:
        """Set `class_counts` to those of the labels (n,) of codes."""
        if labels is not None:
            self.class_counts.copy_(torch.bincount(labels, minlength=len(self.labels)))


def by_chance(
    seed: int,
    round: int,
    ids: Tensor,
    device: Device,
) -> Tensor:
    """Uniform numbers (n,) by which conditions are drawn: a function of (seed, round, id)."""
    drawn = uniform(
        seed,
        round,
        ids,
        (1,),
        device,
        stream=CLASS,
    )
    return drawn.flatten().contiguous()


def labels_of(labels: Tensor | None, rows: Tensor) -> Tensor | None:
    """The labels of some rows; None without labels."""
    if labels is None:
        return None
    return labels[rows]
