"""IGN (arXiv 2311.01462): reconstruction + idempotence - tightness, the adversarial baseline."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import functional_call

from naign.model.losses import Batch, DistanceConfig, Network
from naign.settings.constraints import AT_LEAST_0, POSITIVE


@dataclass(kw_only=True, slots=True)
class IgnConfig(DistanceConfig):
    name: str = "ign"

    reconstruction: float = field(default=1.0, metadata=AT_LEAST_0)
    """Weight of d(f(x), x); the paper has 20."""

    idempotence: float = field(default=20.0, metadata=AT_LEAST_0)
    """Weight of d(f'(f(z)), f(z)), f' frozen."""

    tightness: float = field(default=2.5, metadata=AT_LEAST_0)
    """Weight of -d(f(f'(z)), f'(z))."""

    clamp: float = field(default=1.5, metadata=POSITIVE)
    """The tightness saturates at this multiple of the reconstruction loss."""

    @property
    def needs_match(self) -> bool:
        return False

    needs_frozen = True


def ign(config: IgnConfig, network: Network, batch: Batch) -> dict[str, Tensor]:
    """Idempotence reaches the weights through the inner f only, tightness through the outer f only."""
    assert batch.latents is not None
    outputs = network(torch.cat([batch.images, batch.latents]))
    reconstructed, sampled = outputs.split(len(batch.images))
    reconstruction = batch.distance(reconstructed, batch.images)

    weights = {}
    for name, value in batch.frozen.named_parameters():
        weights[name] = value.detach()
    again = functional_call(batch.frozen, weights, (sampled,))
    idempotence = batch.distance(again, sampled)

    held = sampled.detach()
    tightness = batch.distance(network(held), held)
    # The paper's clamp: unbounded, the tightness grows until nothing else counts. The scale itself is not optimised.
    limit = config.clamp * reconstruction.detach()
    clamped = torch.tanh(tightness / limit) * limit
    loss = config.reconstruction * reconstruction
    loss = loss + config.idempotence * idempotence
    loss = loss - config.tightness * clamped
    return {
        "total": loss,
        "reconstruction": reconstruction,
        "idempotence": idempotence,
        "tightness": tightness,
    }


IGN = (IgnConfig, ign)
