"""What f is trained to do: NAIGN's reconstruction plus IMLE; as baselines IGN and the normalised autoencoder.

All take one network, a batch of images and a batch of latents of the same size, and return the terms of the loss. What
does not depend on another forward costs one of all inputs together. Without the terms that take latents (imle=0,
third=none) NAIGN is an autoencoder, with denoising one that repairs as well.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.data import damage
from pipeline.errors import InputError

Distance = Callable[[Tensor, Tensor], Tensor]
"""Of two batches of one shape, a scalar."""
DISTANCES: dict[str, Distance] = {
    "l1": lambda a, b: (a - b).abs().mean(),
    "l2": lambda a, b: (a - b).square().mean(),
    "norm": lambda a, b: (a - b).flatten(1).norm(dim=1).mean() / math.sqrt(a[0].numel()),
    "l1+l2": lambda a, b: (a - b).abs().mean() + (a - b).square().mean(),
}
Network = Callable[[Tensor], Tensor]
OBJECTIVES = ("naign", "ign", "nae")
THIRD_TERMS = ("none", "idempotence", "matched")


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    name: str = "naign"
    """`naign` (reconstruction + IMLE), or a baseline: `ign` (reconstruction + idempotence - tightness) or `nae`
    (normalised autoencoder: energy of the data - energy of samples)."""

    distance: str = "l1"
    """d in every term: l1, l2 (squared) or l1+l2, means over values, or norm, the root of each sample's mean square."""

    perceptual: float = 0.0
    """naign and ign: how much d also counts what two images differ by in the layers of a frozen encoder."""

    encoder: str = ""
    """perceptual: a shipped one's name (mnist-cnn64, ...) or a safetensors file; another than an evaluation is on."""

    reconstruction: float = 1.0
    """Weight of d(f(x), x); IGN's paper has 20."""

    imle: float = 1.0
    """naign: weight of d(f(z*), x), z* the latent whose sample is nearest to x."""

    third: str = "none"
    """naign: none, idempotence d(f(f(z*)), f(z*)) or matched d(f(f(z*)), x)."""

    third_weight: float = 1.0
    """naign: weight of the third term."""

    denoising: float = 0.0
    """naign: weight of d(f(damaged x), x)."""

    damage: str = "noise"
    """naign, denoising: noise, or mixed (lost detail, noise, specks and stripes: pipeline/data/damage.py)."""

    noise: float = 0.5
    """naign, denoising: the noise's standard deviation is uniform in [0, this] for each image."""

    idempotence: float = 20.0
    """ign: weight of d(f'(f(z)), f(z)), f' frozen."""

    tightness: float = 2.5
    """ign: weight of -d(f(f'(z)), f'(z))."""

    clamp: float = 1.5
    """ign: the tightness saturates at this multiple of the reconstruction loss."""

    langevin_steps: int = 10
    """nae: steps of the chain that a sample is taken from."""

    langevin_rate: float = 0.2
    """nae: a step down the energy, as a share of the residual f(x) - x where f does not depend on x."""

    langevin_noise: float = 0.02
    """nae: standard deviation of the noise of a step."""

    bound: float = 1.0
    """nae: weight of the squared energy of samples, which would grow without bounds."""

    def __post_init__(self) -> None:
        choices = {"name": OBJECTIVES, "distance": DISTANCES, "third": THIRD_TERMS, "damage": damage.names()}
        for name, allowed in choices.items():
            if name == "third" and self.third == "denoising":
                raise InputError(
                    "objective.third is 'denoising': that term has a weight of its own, objective.denoising"
                )
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"objective.{name} is '{getattr(self, name)}': choose one of {', '.join(map(str, allowed))}"
                )
        weights = ("reconstruction", "imle", "third_weight", "denoising", "noise", "idempotence", "tightness")
        for name in (*weights, "perceptual", "langevin_steps", "langevin_rate", "langevin_noise", "bound"):
            if getattr(self, name) < 0:
                raise InputError(f"objective.{name} is {getattr(self, name)}: it must be at least 0")
        third = self.third_weight if self.third != "none" else 0.0
        if self.name == "naign" and not (self.reconstruction or self.imle or third or self.denoising):
            raise InputError("objective.reconstruction and all other terms weigh 0: nothing would be trained")
        if bool(self.perceptual) != bool(self.encoder):
            raise InputError(
                f"objective.perceptual is {self.perceptual} and objective.encoder '{self.encoder}': give both or none"
            )
        if self.perceptual and self.name == "nae":
            raise InputError("objective.perceptual: the energy of objective.name=nae knows no other distance")
        if self.clamp <= 0:
            raise InputError(f"objective.clamp is {self.clamp}: it must be positive")

    @property
    def needs_match(self) -> bool:
        """Whether latents are chosen by the match rather than drawn anew."""
        return self.name == "naign" and self.needs_latents

    @property
    def needs_latents(self) -> bool:
        """Whether the loss takes latents at all."""
        return self.name != "naign" or self.imle > 0 or self.third != "none"

    @property
    def forwards(self) -> int:
        """Forwards of f an image and pass, a backward through each."""
        if self.name == "ign":
            return 4
        if self.name == "nae":
            return 2 + self.langevin_steps
        return (self.reconstruction > 0) + self.needs_latents + (self.third != "none") + self.needs_damaged

    @property
    def needs_damaged(self) -> bool:
        """Whether the loss takes damaged images."""
        return self.name == "naign" and self.denoising > 0


def losses(
    config: ObjectiveConfig,
    network: Network,  # as the engine runs it: its gradients are averaged over ranks
    images: Tensor,  # (b, *shape) float32
    latents: Tensor | None,  # (b, *shape) float32; naign: the matched ones, row for row; None: needs_latents is false
    damaged: Tensor | None = None,  # (b, *shape) float32: the images, damaged; needs_damaged only
    frozen: nn.Module | None = None,  # ign and nae: the bare module, evaluated with its present weights held fixed
    normals: Callable[[int], Tensor] | None = None,  # nae only: those of a step of its chains, (b, *shape)
    perceived: Distance | None = None,  # where perceptual has a weight: the encoder's, model/perceptual.py
) -> dict[str, Tensor]:
    """The weighted sum as `total` and each unweighted term under its own name, all scalars."""
    distance = DISTANCES[config.distance]
    if config.perceptual:
        distance = _sum(distance, config.perceptual, perceived)
    if config.name == "ign":
        assert frozen is not None and latents is not None
        return _ign(config, distance, network, images, latents, frozen)
    if config.name == "nae":
        assert frozen is not None and latents is not None and normals is not None
        return _nae(config, network, images, latents, frozen, normals)
    return _naign(config, distance, network, images, latents, damaged)


def _sum(distance: Distance, weight: float, perceived: Distance | None) -> Distance:
    assert perceived is not None, "a weight for what is perceived needs an encoder"
    return lambda a, b: distance(a, b) + weight * perceived(a, b)


def _naign(
    config: ObjectiveConfig,
    distance: Distance,
    network: Network,
    images: Tensor,
    latents: Tensor | None,
    damaged: Tensor | None,
) -> dict[str, Tensor]:
    """arXiv 2511.02614: w_rec E d(f(x), x) + w_imle E d(f(z_sigma(i)), x_i) + optional terms."""
    assert (damaged is not None) == config.needs_damaged and (latents is not None or not config.needs_latents)
    weights = {"third": config.third_weight}
    weights |= {name: getattr(config, name) for name in ("reconstruction", "imle", "denoising")}
    inputs = {"reconstruction": images if config.reconstruction else None, "imle": latents, "denoising": damaged}
    given = {name: value for name, value in inputs.items() if value is not None}
    parts = network(torch.cat(list(given.values()))).split(len(images))
    outputs = dict(zip(given, parts, strict=True))
    terms = {name: distance(output, images) for name, output in outputs.items()}
    if config.third == "idempotence":
        terms["third"] = distance(network(outputs["imle"]), outputs["imle"])
    elif config.third == "matched":
        terms["third"] = distance(network(outputs["imle"]), images)
    return {"total": sum((weights[name] * term for name, term in terms.items()), images.new_zeros(())), **terms}


def _ign(
    config: ObjectiveConfig,
    distance: Distance,
    network: Network,
    images: Tensor,
    latents: Tensor,
    frozen: nn.Module,
) -> dict[str, Tensor]:
    """arXiv 2311.01462: reconstruction, idempotence through the inner f only, tightness through the outer f only."""
    reconstructed, sampled = network(torch.cat([images, latents])).split(len(images))
    weights = {name: value.detach() for name, value in frozen.named_parameters()}
    held = sampled.detach()
    reconstruction = distance(reconstructed, images)
    idempotence = distance(functional_call(frozen, weights, (sampled,)), sampled)
    tightness = distance(network(held), held)
    # The paper's clamp: unbounded, the tightness grows until nothing else counts. The scale itself is not optimised.
    limit = config.clamp * reconstruction.detach()
    clamped = torch.tanh(tightness / limit) * limit
    loss = config.reconstruction * reconstruction + config.idempotence * idempotence - config.tightness * clamped
    return {"total": loss, "reconstruction": reconstruction, "idempotence": idempotence, "tightness": tightness}


def _nae(
    config: ObjectiveConfig,
    network: Network,
    images: Tensor,
    latents: Tensor,
    frozen: nn.Module,
    normals: Callable[[int], Tensor],
) -> dict[str, Tensor]:
    """arXiv 2105.05735: the energy (f(x) - x)^2 of data falls, that of samples by Langevin steps on it rises.

    The chains start on the decoder's manifold, as the paper's do: here at f(z), there at the end of a chain in the
    code, which a network from images to images does not show. Its temperature is 1.
    """
    weights = {name: value.detach() for name, value in frozen.named_parameters()}
    with torch.no_grad():
        samples = functional_call(frozen, weights, (latents,))
    for step in range(config.langevin_steps):
        samples.requires_grad_(True)
        residual = functional_call(frozen, weights, (samples,)) - samples
        (slope,) = torch.autograd.grad(residual.square().sum() / 2, samples)
        samples = samples.detach() - config.langevin_rate * slope
        samples = (samples + config.langevin_noise * normals(step)).clamp(-1, 1)
    inputs = torch.cat([images, samples.detach()])
    data, other = (network(inputs) - inputs).square().flatten(1).mean(1).split(len(images))
    bound = other.square().mean()
    total = data.mean() - other.mean() + config.bound * bound
    return {"total": total, "reconstruction": data.mean(), "samples": other.mean()}
