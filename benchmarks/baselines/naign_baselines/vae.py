"""A variational autoencoder (arXiv 1312.6114) on the networks of NAIGN: network, objective and prior.

    accelerate launch pipeline/train.py --config configs/mnist_vae.yaml

f(x) decodes the mean of x's code. Latents of the prior `code-normal` are decoded from codes N(0, I): they are the VAE's
samples, and f(z) is the reconstruction of such a sample.
"""

import math
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from naign.errors import InputError
from naign.model.losses import Batch, Network, ObjectiveConfig
from naign.model.networks import ConvConfig, ImageNetwork, build_network, find_network
from naign.model.prior.base import Device, Prior, PriorConfig
from naign.philox import normal
from naign.settings.constraints import AT_LEAST_0, one_of

SMALLEST = 1e-6  # mean error of a batch: its logarithm stays finite
WIDEST = 10.0  # log-variance of a code, either way


@dataclass(kw_only=True, slots=True)
class VaeNetworkConfig(ConvConfig):
    name: str = "vae"
    body: str = field(default="conv", metadata=one_of(("conv", "spatial")))
    """The network of that name, but for the last layer of its encoder, which gives mean and log-variance."""

    only_with = "vae"


class VariationalNetwork(nn.Module):
    """The mean and the log-variance of codes, and their decoder. Dense codes are (c,), spatial ones (c, h, w)."""

    def __init__(self, body: ImageNetwork, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.body = body
        self.shape = shape
        self.code = body.code
        channels = 2 * body.code[0]
        last = body.encoder[-1]
        if isinstance(last, nn.Linear):
            body.encoder[-1] = nn.Linear(last.in_features, channels)
        else:
            body.encoder[-1] = nn.Conv2d(last.in_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """f(x) for images (n, *shape).

        For training, rows of an image's values and of as much noise as a code has values, (n, D + c): the image decoded
        from a code that is drawn with that noise, the code's mean and its log-variance, (n, D + 2c).
        """
        if x.ndim > 2:
            return self.decode(self.encode(x))
        sizes = [math.prod(self.shape), math.prod(self.code)]
        values, noise = x.split(sizes, dim=1)
        images = values.view(-1, *self.shape)
        mean, log_variance = self._law(images)
        deviation = (log_variance / 2).exp()
        drawn = self.decode(mean + deviation * noise.view_as(mean))
        parts = (drawn, mean, log_variance)
        return torch.cat([part.flatten(1).float() for part in parts], dim=1)

    def encode(self, x: Tensor) -> Tensor:
        return self._law(x)[0]

    def decode(self, code: Tensor) -> Tensor:
        return self.body.decode(code)

    def _law(self, x: Tensor) -> tuple[Tensor, Tensor]:
        law = self.body.encode(x)
        mean, log_variance = law.chunk(2, dim=1)
        return mean, log_variance.clamp(-WIDEST, WIDEST)


def _build(
    config: VaeNetworkConfig,
    shape: tuple[int, ...],
    *,
    recompute: bool,
) -> nn.Module:
    if recompute:
        raise InputError("model.name=vae keeps all activations: leave out train.recompute")
    kind = find_network(config.body)[0]
    settings = asdict(config)
    for name in ("name", "init", "body"):
        del settings[name]
    body = build_network(kind(**settings), shape)
    assert isinstance(body, ImageNetwork)
    return VariationalNetwork(body, shape)


NETWORK = (VaeNetworkConfig, _build)


@dataclass(kw_only=True, slots=True)
class VaeConfig(ObjectiveConfig):
    name: str = "vae"

    likelihood: str = field(default="gaussian", metadata=one_of(("gaussian", "laplace")))
    """Of an image given its code: gaussian (squared errors) or laplace (absolute errors), of one scale for all values,
    which is at its optimum for every batch (arXiv 2006.13202)."""

    kl: float = field(default=1.0, metadata=AT_LEAST_0)
    """Weight of the divergence of codes from N(0, I); at 1 the loss is the bound on the likelihood."""

    only_with = "vae"

    @property
    def needs_latents(self) -> bool:
        return False


def vae(config: VaeConfig, network: Network, batch: Batch) -> dict[str, Tensor]:
    """The negative bound on the log-likelihood, in nats a value and up to a constant."""
    images = batch.images.flatten(1)
    size = images.shape[1]
    dims = math.prod(getattr(batch.frozen, "code", ()))
    draws = math.ceil(dims / size)  # a draw has as many values as an image
    rows = [images]
    for step in range(draws):
        rows.append(batch.normals(step).flatten(1))
    inputs = torch.cat(rows, dim=1)[:, : size + dims]
    outputs = network(inputs)
    drawn, mean, log_variance = outputs.split([size, dims, dims], dim=1)

    # Minus the log-likelihood at the optimal scale: log sigma or log b, and a constant.
    if config.likelihood == "gaussian":
        error = (drawn - images).square().mean()
        misfit = error.clamp(min=SMALLEST).log() / 2
    else:
        error = (drawn - images).abs().mean()
        misfit = error.clamp(min=SMALLEST).log()
    divergences = mean.square() + log_variance.exp() - 1 - log_variance
    divergence = divergences.sum(1).mean() / 2
    return {
        "total": misfit + config.kl * divergence / size,
        "reconstruction": error,
        "divergence": divergence,
    }


VAE = (VaeConfig, vae)


@dataclass(kw_only=True, slots=True)
class CodeNormalConfig(PriorConfig):
    name: str = "code-normal"


class CodeNormal(Prior):
    """Codes N(0, I)."""

    decodes = True

    def draw(
        self,
        seed: int,
        round: int,
        ids: Tensor,
        device: Device,
    ) -> Tensor:
        return normal(seed, round, ids, self.shape, device)


PRIOR = (CodeNormalConfig, CodeNormal)
