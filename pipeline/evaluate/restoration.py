"""How well f repairs what it was never shown: four kinds of damage, three measures, and every trivial answer beside it.

Damage, images in [-1, 1] (black is -1):
    blur          9x9 Gaussian kernel, sigma 2, edges reflected
    noise         Gaussian noise, sigma 0.5, clamped to [-1, 1]
    salt_pepper   20 % of the pixels replaced, half by white, half by black; all channels of a pixel together
    rows          five random rows set black
Images less than 28 pixels high are damaged in proportion, otherwise nothing would be left of an 8x8 digit: blur has
sigma 2 * H / 28, and round(5 * H / 28) rows, at least one, are blackened.

A number alone says nothing: on MNIST all-black scores a mean absolute error of 0.26. So the damaged image itself, all
black, the per-pixel median of the training set and the nearest training image are measured with it.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from pipeline.evaluate.coverage import nearest

Kind = Literal["blur", "noise", "salt_pepper", "rows"]
KINDS: tuple[Kind, ...] = get_args(Kind)
RANGE = 2.0
"""Images lie in [-1, 1]."""
REFERENCE_HEIGHT = 28
"""Height in pixels for which the damages are defined; lower images get proportionally less."""


def gaussian_kernel(*, size: int = 9, sigma: float = 2.0) -> Tensor:
    """(size, size) float32 Gaussian kernel that sums to 1; sigma in pixels."""
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = torch.outer(weights, weights)
    return (kernel / kernel.sum()).float()


def _shrink(height: int) -> float:
    return min(1.0, height / REFERENCE_HEIGHT)


def blackened_rows(height: int) -> int:
    """How many rows the damage 'rows' takes from an image of that height in pixels."""
    return max(1, round(5 * _shrink(height)))


def degrade(images: Tensor, kind: Kind, *, seed: int = 0) -> Tensor:
    """(n, C, H, W) float32 in [-1, 1] -> damaged images of the same shape and range; a function of (images, seed)."""
    count, channels, height, width = images.shape
    generator = torch.Generator().manual_seed(seed)
    match kind:
        case "blur":
            kernel = gaussian_kernel(sigma=2.0 * _shrink(height)).expand(channels, 1, 9, 9)
            padded = F.pad(images, (4, 4, 4, 4), mode="reflect" if min(height, width) > 4 else "replicate")
            return F.conv2d(padded, kernel, groups=channels).clamp(-1, 1)
        case "noise":
            return (images + 0.5 * torch.randn(images.shape, generator=generator)).clamp(-1, 1)
        case "salt_pepper":
            chance = torch.rand(count, 1, height, width, generator=generator)
            salted = torch.where(chance < 0.1, 1.0, images)
            return torch.where(chance >= 0.9, -1.0, salted)
        case "rows":
            order = torch.rand(count, height, generator=generator).argsort(1)[:, : blackened_rows(height)]
            rows = torch.zeros(count, height, dtype=torch.bool).scatter_(1, order, True)
            return images.masked_fill(rows[:, None, :, None], -1.0)


def mae(estimates: Tensor, clean: Tensor) -> float:
    """Mean absolute error over all values of two sets of one shape, in the images' scale."""
    return float((estimates - clean).abs().double().mean())


def psnr(estimates: Tensor, clean: Tensor) -> float | None:
    """Peak signal-to-noise ratio in dB of the mean squared error over all images; None where that is zero.

    Over all images, not the mean of each image's ratio: an image that a damage left untouched would make it infinite.
    """
    ratio = float(peak_signal_noise_ratio(estimates, clean, data_range=RANGE))
    return ratio if math.isfinite(ratio) else None


def ssim(estimates: Tensor, clean: Tensor) -> float:
    """Mean structural similarity (Wang et al. 2004) of (n, C, H, W) images: 11x11 window, sigma 1.5.

    Images under 16 pixels have no room for that window: theirs is 5x5, sigma 0.5.
    """
    sigma = 1.5 if min(clean.shape[2:]) >= 16 else 0.5
    similarity = structural_similarity_index_measure(estimates, clean, sigma=sigma, data_range=RANGE)
    assert isinstance(similarity, Tensor)
    return float(similarity)


def median(images: Tensor) -> Tensor:
    """(n, C, H, W) uint8 -> (C, H, W) float32 in [-1, 1]: the median of each pixel (the lower one of an even n)."""
    return images.median(0).values.float() / 127.5 - 1


def repair(
    clean: Tensor,  # (n, C, H, W) in [-1, 1]: test images
    kind: Kind,
    project: Callable[[Tensor], Tensor],  # f, on such a batch
    *,
    typical: Tensor,  # (C, H, W): per-pixel median of the training set
    reference: Tensor,  # (m, C, H, W): training images to answer with the nearest of
    seed: int = 0,
) -> dict[str, Tensor]:
    """Every answer to one damage, by name, each (n, C, H, W): input, once, twice, black, median, nearest."""
    damaged = degrade(clean, kind, seed=seed)
    once = project(damaged)
    return {
        "input": damaged,
        "once": once,
        "twice": project(once),
        "black": torch.full_like(clean, -1.0),
        "median": typical.expand_as(clean),
        "nearest": reference[nearest(damaged, reference)[1]],
    }


def scores(answers: dict[str, Tensor], clean: Tensor, *, measured: int = 1000) -> dict[str, object]:
    """Mean absolute error of each answer by name, and psnr (dB) and ssim of the first `measured` in two tables."""
    errors: dict[str, object] = {name: mae(answer, clean) for name, answer in answers.items()}
    truth = clean[:measured]
    errors["psnr"] = {name: psnr(answer[:measured], truth) for name, answer in answers.items()}
    errors["ssim"] = {name: ssim(answer[:measured], truth) for name, answer in answers.items()}
    return errors
