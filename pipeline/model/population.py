"""Terms that compare samples with images as sets, in the space of the match, over the micro-batches of all ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.errors import InputError


@dataclass(kw_only=True, slots=True, frozen=True)
class Population:
    """How the ranks see their samples and images together. Every rank passes as many rows."""

    embed: Callable[[Tensor], Tensor]  # (n, *shape) -> (n, d) float32, with gradient
    gather: Callable[[Tensor], Tensor] = lambda rows: rows  # all ranks' rows, in rank order, without gradient
    rank: int = 0
    world: int = 1

    def place(self, rows: int) -> slice:
        """Where this rank's rows are among those of all ranks."""
        return slice(self.rank * rows, (self.rank + 1) * rows)

    def embedded(self, samples: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Collective: this rank's samples with gradient, then those and the images of all ranks without."""
        mine = self.embed(samples)
        with torch.no_grad():
            return mine, self.gather(mine.detach()), self.gather(self.embed(images)).clone()


def drift_loss(mine: Tensor, samples: Tensor, images: Tensor, config: Any, ranks: Population) -> Tensor:
    """Mean squared difference of samples and where the drift takes them (arXiv 2602.04770), which is held.

    The first three are `Population.embedded`'s. All ranks compute the whole field, so it is that of one rank.
    """
    temperatures = parse_temperatures(config.temperatures)
    with torch.no_grad():
        field, scale = drift_field(samples, images, temperatures, config.repulsion)
        target = mine / scale + field[ranks.place(len(mine))]
    return (mine / scale - target).square().mean()


def drift_field(
    samples: Tensor,  # (n, d) float32
    images: Tensor,  # (m, d) float32
    temperatures: list[float],  # in units of the mean distance
    repulsion: float = 1.0,  # 0: none, and the softmax is over images alone
) -> tuple[Tensor, Tensor]:
    """The drift (n, d) of samples that are divided by the scale (), which makes the mean distance the root of d.

    Sample i is pulled to image j by A_ij and pushed from sample k by A_ik, A the root of the product of the softmax
    over each row and that over each column of -distance / temperature. The drift of each temperature has unit mean
    square; they are added. Without repulsion and as the temperature goes to 0, pairs that are nearest to each other
    remain: IMLE's pull. Raises InputError where a temperature leaves no drift.
    """
    count, exact = len(samples), "donot_use_mm_for_euclid_dist"
    far = torch.cdist(samples, images, compute_mode=exact)
    total, pairs = far.sum(), far.numel()
    if repulsion:
        others = torch.cdist(samples, samples, compute_mode=exact)
        total, pairs = total + others.sum(), pairs + count * (count - 1)
        far = torch.cat([far, others.fill_diagonal_(math.inf)], dim=1)
    mean = (total / pairs).clamp(min=1e-30)
    scale = mean / math.sqrt(samples.shape[1])
    samples, images, field = samples / scale, images / scale, torch.zeros_like(samples)
    squares = []
    for temperature in temperatures:
        logits = -far / (mean * temperature)
        weights = ((logits.log_softmax(1) + logits.log_softmax(0)) / 2).exp()
        pull = weights[:, : len(images)]
        drift = pull @ images - pull.sum(1, keepdim=True) * samples
        if repulsion:
            push = weights[:, len(images) :]
            away = push @ samples - push.sum(1, keepdim=True) * samples
            drift = push.sum(1, keepdim=True) * drift - repulsion * pull.sum(1, keepdim=True) * away
        squares.append(drift.double().square().mean())
        field += drift / squares[-1].sqrt().float()
    # One read of the device a step. A mean distance that is not finite has the step skipped, as any loss that is not.
    distance, *found = torch.stack([mean.double(), *squares]).tolist()
    for temperature, square in zip(temperatures, found, strict=True):
        if math.isfinite(distance) and not (math.isfinite(square) and square > 0):
            said = f"objective.temperatures: at {temperature:g} of the mean distance no sample is moved"
            raise InputError(f"{said} (all weights are 0 in {count} samples): use higher ones, such as 0.02,0.05,0.2")
    return field, scale


def moments_loss(mine: Tensor, samples: Tensor, images: Tensor, ranks: Population) -> Tensor:
    """Squared differences of the means and of the covariances of samples and images, relative to the images' own size.

    Generative feature matching (arXiv 1904.02762). The difference is measured in either half of the rows, and the two
    multiplied: so the mean is the squared difference itself, without the variance of few samples, which a square of
    one estimate would also reduce. It may be negative. The gradient is that of this rank's samples.
    """
    place = ranks.place(len(mine))
    samples = torch.cat([samples[: place.start], mine, samples[place.stop :]])
    ours, theirs = ([rows[half::2] for half in (0, 1)] for rows in (samples, images))
    first, second = (a.mean(0) - b.mean(0) for a, b in zip(ours, theirs, strict=True))
    whole = images - images.mean(0)
    means = (first * second).sum() / (whole.square().sum() / (len(whole) - 1)).clamp(min=1e-30)
    (a, b), (c, d) = ([rows - rows.mean(0) for rows in halves] for halves in (ours, theirs))
    spread = _product(a, b) - _product(a, d) - _product(c, b) + _product(c, d)
    loss = means + spread / _product(whole, whole).clamp(min=1e-30)
    return loss.detach() + ranks.world * (loss - loss.detach())  # gradients are averaged over ranks, here they add


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of the covariances of centred rows (n, d) and (m, d), without a matrix of d x d."""
    return (a @ b.T).square().sum() / ((len(a) - 1) * (len(b) - 1))


def parse_temperatures(text: str) -> list[float]:
    """Positive numbers with commas between them; InputError for anything else."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(1e-12 <= value <= 1e12 for value in found):
        raise InputError(f"objective.temperatures is '{text}': give positive numbers, as in 0.02,0.05,0.2")
    return found


class _Encoder(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        code: Tensor = self.network.encode(x)  # type: ignore[operator]
        return code


def stopped_code(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """`encode` with the network's present weights held: gradients pass to the images alone."""
    encoder = _Encoder(network)

    def encode(images: Tensor) -> Tensor:
        held = {name: value.detach() for name, value in encoder.named_parameters()}
        code: Tensor = functional_call(encoder, held, (images.to(next(iter(held.values())).dtype),))
        return code

    return encode
