"""How well f repairs the damage of data/damage.py, in three measures, beside trivial answers.

A number alone says nothing: on MNIST all-black scores a mean absolute error of 0.26. So the damaged image itself, all
black, the per-pixel median of the training set and the nearest training image are measured with it.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from naign.data.damage import Kind, degrade
from naign.evaluate.coverage import nearest

RANGE = 2.0  # images lie in [-1, 1]


def mae(estimates: Tensor, clean: Tensor) -> float:
    """Mean absolute error over all values of two sets of one shape, in the images' scale."""
    return float((estimates - clean).abs().double().mean())


def psnr(estimates: Tensor, clean: Tensor) -> float | None:
    """Peak signal-to-noise ratio in dB of the mean squared error over all images, None where that is zero; not the mean
    of each image's, which one that a damage left untouched would make infinite.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    ratio = float(peak_signal_noise_ratio(estimates, clean, data_range=RANGE))
    return ratio if math.isfinite(ratio) else None


def ssim(estimates: Tensor, clean: Tensor) -> float:
    """Mean SSIM (Wang et al. 2004) of (n, C, H, W) images: 11x11 window, sigma 1.5; under 16 pixels 5x5, sigma 0.5."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    sigma = 1.5 if min(clean.shape[2:]) >= 16 else 0.5
    return float(structural_similarity_index_measure(estimates, clean, sigma=sigma, data_range=RANGE))  # type: ignore[arg-type]


def repair(
    clean: Tensor, kind: Kind, project: Callable[[Tensor], Tensor], *, typical: Tensor, reference: Tensor, seed: int = 0
) -> dict[str, Tensor]:
    """Every answer to one damage of test images, by name: input, once, twice, black, median, nearest, as `clean`
    (n, C, H, W) in [-1, 1]. `typical` (C, H, W) is the per-pixel median of the training set, the nearest one is of the
    training images `reference` (m, C, H, W).
    """
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
    errors = {name: mae(answer, clean) for name, answer in answers.items()}
    some = {name: (answer[:measured], clean[:measured]) for name, answer in answers.items()}
    tables = {kind.__name__: {name: kind(*pair) for name, pair in some.items()} for kind in (psnr, ssim)}
    return {**errors, **tables}
