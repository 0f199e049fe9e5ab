"""What f is trained to do: reconstruction plus IMLE, with optional further terms.

An objective is one line in OBJECTIVES, or an entry point of the group `naign.objectives` in another package: the class
of its settings and its loss. The baselines IGN and NAE come that way, from `benchmarks/baselines`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from naign.data import damage
from naign.errors import InputError
from naign.settings.constraints import AT_LEAST_0, one_of
from naign.settings.registry import lookup

Distance = Callable[[Tensor, Tensor], Tensor]
"""Takes two batches of one shape and returns a scalar."""
DISTANCES: dict[str, Distance] = {
    "l1": lambda a, b: (a - b).abs().mean(),
    "l2": lambda a, b: (a - b).square().mean(),
    "norm": lambda a, b: (a - b).flatten(1).norm(dim=1).mean() / math.sqrt(a[0].numel()),
}
Network = Callable[[Tensor], Tensor]


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """Base of every objective's settings. Constants and properties say what the loss needs; subclasses set others."""

    name: str = ""
    """`naign` (reconstruction + IMLE), or one that another package registers, such as the baselines `ign` and `nae`."""

    only_with = ""
    """The one model.name that it trains; empty: any."""
    needs_frozen = False
    """Whether the loss evaluates `Batch.frozen`, the module without the engine's wrapper. FSDP2, ZeRO-3, and ZeRO in
    half precision do not allow that."""

    distance = "l1"
    damage = "noise"
    noise = 0.0

    def check(self) -> None:
        """Raise InputError for settings that contradict each other."""

    @property
    def needs_latents(self) -> bool:
        """Whether the loss takes latents."""
        return True

    @property
    def needs_match(self) -> bool:
        """Whether the latents are matched with the images, rather than drawn for each step."""
        return self.needs_latents

    @property
    def needs_damaged(self) -> bool:
        """Whether the loss takes damaged images, by the settings' `damage` and `noise`, as those of NaignConfig."""
        return False


@dataclass(kw_only=True, slots=True)
class DistanceConfig(ObjectiveConfig):
    """Base of the settings of objectives whose terms are distances d between images: `Batch.distance`."""

    distance: str = field(default="l1", metadata=one_of(DISTANCES))
    """d in every term: l1 or l2 (squared), as means over values; or norm, each sample's root mean square."""


@dataclass(kw_only=True, slots=True)
class NaignConfig(DistanceConfig):
    name: str = "naign"
    reconstruction: float = field(default=1.0, metadata=AT_LEAST_0)
    """Weight of d(f(x), x)."""
    imle: float = field(default=1.0, metadata=AT_LEAST_0)
    """Weight of d(f(z*), x), z* the latent whose sample is nearest to x. 0, and third=none: no match."""
    third: str = field(default="matched", metadata=one_of(("none", "matched")))
    """Third term, of weight 1: none, or matched, d(f(f(z*)), x)."""
    denoising: float = field(default=1.0, metadata=AT_LEAST_0)
    """Weight of d(f(damaged x), x)."""
    damage: str = "mixed"
    """denoising: noise; mixed (lost detail, noise, specks and stripes: naign/data/damage.py); mild, as mixed, but
    less often, so that one image in five stays whole and `reconstruction` can be 0; photo, as mild, but flat images
    stay what they are; or holes, as mild, and boxes and strokes are missing from every second image, which is for
    `naign restore --mask`."""
    noise: float = field(default=0.5, metadata=AT_LEAST_0)
    """denoising: the noise's standard deviation is uniform in [0, this] for each image."""

    def check(self) -> None:
        if not (self.reconstruction or self.imle or self.denoising or self.third != "none"):
            raise InputError("objective.reconstruction and all other terms weigh 0: nothing would be trained")
        if self.denoising:
            damage.find_damage(self.damage)

    @property
    def needs_latents(self) -> bool:
        return self.imle > 0 or self.third != "none"

    @property
    def needs_damaged(self) -> bool:
        return self.denoising > 0


@dataclass(kw_only=True, slots=True, frozen=True)
class Batch:
    """What a loss is computed from: b images and what belongs to each, row for row."""

    images: Tensor  # (b, *shape) float32
    latents: Tensor | None = None  # (b, *shape) float32, the matched ones if needs_match; None if not needs_latents
    damaged: Tensor | None = None  # (b, *shape) float32: the images, damaged; None if not needs_damaged
    distance: Distance  # of the settings
    frozen: nn.Module  # bare: `functional_call(frozen, detached weights, (x,))` is f(x) with its present weights held
    normals: Callable[[int], Tensor]  # of a chain's step: (b, *shape) float32, standard normals by number and step


Loss = Callable[[Any, Network, Batch], dict[str, Tensor]]
"""Takes an objective's settings, the network as the engine runs it (gradients are averaged over ranks) and a batch.
Returns scalars: the weighted sum as `total`, and each unweighted term by its name. Independent forwards cost less as
one forward of all their inputs."""


def compute_losses(config: ObjectiveConfig, network: Network, batch: Batch) -> dict[str, Tensor]:
    """The terms of an objective's loss (see Loss) on a batch. InputError where it returns no total."""
    assert (batch.damaged is not None) == config.needs_damaged
    assert batch.latents is not None or not config.needs_latents
    terms = find_objective(config.name)[1](config, network, batch)
    if "total" not in terms:
        raise InputError(f"the loss of objective.name={config.name} returns no total: see docs/extend.md")
    return terms


def find_objective(name: str) -> tuple[type[ObjectiveConfig], Loss]:
    """The settings and the loss of that name; InputError for an unknown one."""
    return lookup("objective.name", name, OBJECTIVES, "naign.objectives")


def _naign(config: NaignConfig, network: Network, batch: Batch) -> dict[str, Tensor]:
    """arXiv 2511.02614: w_rec E d(f(x), x) + w_imle E d(f(z_sigma(i)), x_i) + optional terms."""
    images = batch.images
    inputs: dict[str, Tensor] = {}
    if config.reconstruction:
        inputs["reconstruction"] = images
    if batch.latents is not None:
        inputs["imle"] = batch.latents
    if batch.damaged is not None:
        inputs["denoising"] = batch.damaged
    outputs = network(torch.cat(list(inputs.values())))
    made = dict(zip(inputs, outputs.split(len(images)), strict=True))
    terms = {"total": images.new_zeros(())}
    for name, output in made.items():
        terms[name] = batch.distance(output, images)
        terms["total"] = terms["total"] + getattr(config, name) * terms[name]
    if config.third != "none":
        terms["third"] = batch.distance(network(made["imle"]), images)
        terms["total"] = terms["total"] + terms["third"]
    return terms


OBJECTIVES: dict[str, tuple[type[ObjectiveConfig], Loss]] = {"naign": (NaignConfig, _naign)}
