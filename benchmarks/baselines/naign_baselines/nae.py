"""The normalised autoencoder (arXiv 2105.05735), the baseline of the energy."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from naign.errors import require
from naign.model.losses import Batch, Network, ObjectiveConfig
from naign.model.networks import code_shape
from naign.settings.constraints import AT_LEAST_0
from naign_baselines.langevin import slope_of


@dataclass(kw_only=True, slots=True)
class NaeConfig(ObjectiveConfig):
    """The energy is the mean of (f(x) - x)^2 over pixels; a chain's step goes down `rate` times its slope."""

    name: str = "nae"

    code_steps: int = field(default=10, metadata=AT_LEAST_0)
    """Steps of the chain of codes, which are measured in deviations of the batch's and start as standard normals. Its
    end is decoded, for the chain of images. 0, for networks without a code: that starts at f of noise."""

    code_rate: float = field(default=6.0, metadata=AT_LEAST_0)
    code_noise: float = field(default=0.3, metadata=AT_LEAST_0)
    """Standard deviation of the noise of a step. The paper's codes lie on a sphere of radius 1 in 32 dimensions, where
    0.05 is as much, and a rate of 0.2 as much as 6."""

    steps: int = field(default=10, metadata=AT_LEAST_0)
    """Steps of the chain of images."""

    rate: float = field(default=10.0, metadata=AT_LEAST_0)
    noise: float = field(default=0.05, metadata=AT_LEAST_0)

    bound: float = field(default=1.0, metadata=AT_LEAST_0)
    """Weight of the squared energy of samples, which would grow without bounds."""

    needs_frozen = True

    @property
    def needs_latents(self) -> bool:
        return not self.code_steps

    @property
    def needs_match(self) -> bool:
        return False


def nae(config: NaeConfig, network: Network, batch: Batch) -> dict[str, Tensor]:
    """The energy of data falls, that of samples by Langevin steps on it rises. Its temperature is 1."""
    model = batch.frozen
    energy = partial(_energy, model)
    if batch.latents is None:
        samples = _samples_of_codes(config, batch, energy)
    else:
        with torch.no_grad():
            samples = model(batch.latents)
    for step in range(config.steps):
        noise = config.noise * batch.normals(step)
        moved = samples - config.rate * slope_of(energy, samples) + noise
        samples = moved.clamp(-1, 1)
    inputs = torch.cat([batch.images, samples])
    data, other = _energy(network, inputs).split(len(batch.images))
    bound = config.bound * other.square().mean()
    return {
        "total": data.mean() - other.mean() + bound,
        "reconstruction": data.mean(),
        "samples": other.mean(),
    }


def _energy(f: Network, x: Tensor) -> Tensor:
    """(b,): the mean of (f(x) - x)^2."""
    residual = f(x) - x
    return residual.square().flatten(1).mean(1)


def _samples_of_codes(config: NaeConfig, batch: Batch, energy: Callable[[Tensor], Tensor]) -> Tensor:
    """Images (b, *shape): the decoded ends of chains of codes on the energy of what is decoded."""
    model = batch.frozen
    shape = code_shape(model, "objective.code_steps")
    count = math.prod(shape)
    values = batch.images[0].numel()
    larger = f"objective.name=nae: a code of {count} values is larger than an image of {values}"
    require((count <= values, f"{larger}: ask for a smaller model.code"))

    def normals(step: int) -> Tensor:
        drawn = batch.normals(config.steps + step).flatten(1)
        return drawn[:, :count].view(-1, *shape)

    with torch.no_grad():
        known = model.encode(batch.images).float()
    center = known.mean(0)
    scale = known.std(0)

    def decoded(codes: Tensor) -> Tensor:
        return model.decode(center + scale * codes)

    codes = normals(0)
    for step in range(config.code_steps):
        noise = config.code_noise * normals(step + 1)
        slope = slope_of(lambda at: energy(decoded(at)), codes)
        codes = codes - config.code_rate * slope + noise
    with torch.no_grad():
        return decoded(codes).float()


NAE = (NaeConfig, nae)
