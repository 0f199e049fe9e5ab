"""A convolutional energy-based model, trained by contrastive divergence with short Langevin chains (arXiv 1903.08689).

    accelerate launch pipeline/train.py --config configs/mnist_ebm.yaml

f(x) is x after the chain's steps without noise, so f of noise is a sample and f of a damaged image its repair.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from naign.errors import InputError
from naign.model.losses import Batch, Network, ObjectiveConfig
from naign.model.networks import NetworkConfig, halving
from naign.settings.constraints import AT_LEAST_0, POSITIVE, between
from naign_baselines.langevin import slope_of

STEEPEST = 0.03  # largest slope of a pixel that a step follows
JITTER = 0.005  # deviation of the noise that data gets, and a step adds
RESTARTED = 0.05  # share of chains that begin anew, from uniform noise


@dataclass(kw_only=True, slots=True)
class EbmNetworkConfig(NetworkConfig):
    name: str = "ebm"
    width: int = field(default=32, metadata=between(1, 2**12))
    """Channels at half resolution; twice that from a quarter of it on."""
    chains: int = field(default=8192, metadata=POSITIVE)
    """Samples that are kept, and carried on by the chains of later steps."""
    steps: int = field(default=40, metadata=between(1, 10**4))
    """Of a chain."""
    rate: float = field(default=10.0, metadata=AT_LEAST_0)
    """A step, as a multiple of the energy's slope."""

    only_with = "ebm"


class EnergyNetwork(nn.Module):
    """An energy of images (n, *shape), and f, which goes down it."""

    chains: Tensor  # (chains, *shape): the ends of earlier chains

    def __init__(self, config: EbmNetworkConfig, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.config = config
        channels = shape[0]
        layers = list[nn.Module]()
        for width in (config.width, 2 * config.width, 2 * config.width):
            layers.append(halving(channels, width))
            layers.append(nn.SiLU())
            channels = width
        side = shape[1] // 8
        layers.append(nn.Flatten())
        layers.append(nn.Linear(channels * side * side, 4 * config.width))
        layers.append(nn.SiLU())
        layers.append(nn.Linear(4 * config.width, 1))
        self.layers = nn.Sequential(*layers)
        self.shape = shape
        self.register_buffer("chains", 2 * torch.rand(config.chains, *shape) - 1)

    def forward(self, x: Tensor) -> Tensor:
        """f(x) for images (n, *shape); for their values as rows (n, D), as in training, the energies (n, 1)."""
        if x.ndim == 2:
            return self.layers(x.view(-1, *self.shape))
        with torch.enable_grad():
            for _ in range(self.config.steps):
                x = self.descend(x)
        return x

    def energy(self, x: Tensor) -> Tensor:
        """(n,), high for what is unlike the data."""
        return self.layers(x)[:, 0]

    def descend(self, x: Tensor) -> Tensor:
        """A step down the energy, without a gradient."""
        gentle = slope_of(self.energy, x).clamp(-STEEPEST, STEEPEST)
        moved = x.detach() - self.config.rate * gentle
        return moved.clamp(-1, 1)


def _build(config: EbmNetworkConfig, shape: tuple[int, ...], *, recompute: bool) -> nn.Module:
    if recompute:
        raise InputError("model.name=ebm keeps all activations: leave out train.recompute")
    if len(shape) != 3 or min(shape[1:]) < 8 or shape[1] != shape[2]:
        raise InputError(f"model.name=ebm takes square images of at least 8x8, not {tuple(shape)}")
    return EnergyNetwork(config, shape)


NETWORK = (EbmNetworkConfig, _build)


@dataclass(kw_only=True, slots=True)
class EbmConfig(ObjectiveConfig):
    name: str = "ebm"
    bound: float = field(default=0.1, metadata=AT_LEAST_0)
    """Weight of the squared energies of data and samples, which would drift away together."""

    only_with = "ebm"
    needs_frozen = True

    @property
    def needs_latents(self) -> bool:
        return False


def ebm(config: EbmConfig, network: Network, batch: Batch) -> dict[str, Tensor]:
    """The energy of data falls, that of the chains' ends rises."""
    model = batch.frozen
    assert isinstance(model, EnergyNetwork)
    drawn = torch.special.ndtr(batch.normals(0))  # uniform
    chosen = drawn.flatten(1)[:, :2]
    count = len(model.chains)
    rows = (chosen[:, 0] * count).long()
    rows = rows.clamp(max=count - 1)
    anew = chosen[:, 1] < RESTARTED
    uniform = 2 * drawn - 1
    samples = torch.where(anew.view(-1, 1, 1, 1), uniform, model.chains[rows])
    for step in range(model.config.steps):
        noise = JITTER * batch.normals(step + 1)
        jittered = (samples + noise).clamp(-1, 1)
        samples = model.descend(jittered)
    model.chains[rows] = samples
    noise = JITTER * batch.normals(model.config.steps + 1)
    data = (batch.images + noise).clamp(-1, 1)
    inputs = torch.cat([data, samples])
    energies = network(inputs.flatten(1)).float()[:, 0]
    real, other = energies.split(len(data))
    drift = real.square().mean() + other.square().mean()
    return {
        "total": real.mean() - other.mean() + config.bound * drift,
        "data": real.mean(),
        "samples": other.mean(),
    }


EBM = (EbmConfig, ebm)
