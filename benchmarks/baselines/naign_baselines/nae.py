"""The normalised autoencoder (arXiv 2105.05735), the baseline of the energy."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import functional_call

from naign.model.losses import Batch, Network, ObjectiveConfig
from naign.settings.constraints import AT_LEAST_0


@dataclass(kw_only=True, slots=True)
class NaeConfig(ObjectiveConfig):
    name: str = "nae"

    langevin_steps: int = field(default=10, metadata=AT_LEAST_0)
    """Steps of the chain that a sample is taken from."""

    langevin_rate: float = field(default=0.2, metadata=AT_LEAST_0)
    """A step down the energy, as a share of the residual f(x) - x where f does not depend on x."""

    langevin_noise: float = field(default=0.02, metadata=AT_LEAST_0)
    """Standard deviation of the noise of a step."""

    bound: float = field(default=1.0, metadata=AT_LEAST_0)
    """Weight of the squared energy of samples, which would grow without bounds."""

    @property
    def needs_match(self) -> bool:
        return False

    needs_frozen = True

    @property
    def forwards(self) -> int:
        return 2 + self.langevin_steps


def nae(config: NaeConfig, network: Network, batch: Batch) -> dict[str, Tensor]:
    """The energy (f(x) - x)^2 of data falls, that of samples by Langevin steps on it rises.

    The chains start on the decoder's manifold, as the paper's do: here at f(z), there at the end of a chain in the
    code, which a network from images to images does not show. Its temperature is 1.
    """
    weights = {}
    for name, value in batch.frozen.named_parameters():
        weights[name] = value.detach()
    with torch.no_grad():
        samples = functional_call(batch.frozen, weights, (batch.latents,))
    for step in range(config.langevin_steps):
        samples.requires_grad_(True)
        residual = functional_call(batch.frozen, weights, (samples,)) - samples
        energy = residual.square().sum() / 2
        (slope,) = torch.autograd.grad(energy, samples)
        noise = config.langevin_noise * batch.normals(step)
        samples = samples.detach() - config.langevin_rate * slope + noise
        samples = samples.clamp(-1, 1)
    inputs = torch.cat([batch.images, samples.detach()])
    residual = network(inputs) - inputs
    energies = residual.square().flatten(1).mean(1)
    data, other = energies.split(len(batch.images))
    bound = config.bound * other.square().mean()
    return {
        "total": data.mean() - other.mean() + bound,
        "reconstruction": data.mean(),
        "samples": other.mean(),
    }


NAE = (NaeConfig, nae)
