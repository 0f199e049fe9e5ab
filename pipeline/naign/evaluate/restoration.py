"""How well f repairs the damage of data/damage.py, in three measures, beside two answers that need no learning: the
damaged image itself, and the nearest training image.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from naign.data.damage import Kind, degrade
from naign.evaluate.coverage import nearest

RANGE = 2.0  # images lie in [-1, 1]
SIMILAR = 1000  # images of which PSNR and SSIM are measured


def mae(estimates: Tensor, clean: Tensor) -> float:
    """Mean absolute error over all values of two sets of one shape, in the images' scale."""
    return float((estimates - clean).abs().double().mean())


def psnr(estimates: Tensor, clean: Tensor) -> float | None:
    """Peak signal-to-noise ratio in dB of the mean squared error over all images, None where that is zero; not the mean
    of each image's, which one that a damage left untouched would make infinite.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    ratio = float(peak_signal_noise_ratio(estimates, clean, data_range=RANGE))
    if not math.isfinite(ratio):
        return None
    return ratio


def ssim(estimates: Tensor, clean: Tensor) -> float:
    """Mean SSIM (Wang et al. 2004) of (n, C, H, W) images: 11x11 window, sigma 1.5; under 16 pixels 5x5, sigma 0.5."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    sigma = 1.5 if min(clean.shape[2:]) >= 16 else 0.5
    return float(structural_similarity_index_measure(estimates, clean, sigma=sigma, data_range=RANGE))  # type: ignore[arg-type]


def repair(
    clean: Tensor,
    kind: Kind,
    project: Callable[[Tensor], Tensor],
    *,
    reference: Tensor,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Every answer to one damage of test images, by name: input, once, twice, nearest, as `clean` (n, C, H, W) in
    [-1, 1]. The nearest one is of the training images `reference` (m, C, H, W).
    """
    damaged = degrade(clean, kind, seed=seed)
    once = project(damaged)
    _, indices = nearest(damaged, reference)
    return {
        "input": damaged,
        "once": once,
        "twice": project(once),
        "nearest": reference[indices],
    }


def scores(answers: dict[str, Tensor], clean: Tensor) -> dict[str, Any]:
    """Mean absolute error of each answer by name, and psnr (dB) and ssim of the first SIMILAR in two tables."""
    found: dict[str, Any] = {"psnr": {}, "ssim": {}}
    for name, answer in answers.items():
        found[name] = mae(answer, clean)
        some = answer[:SIMILAR]
        found["psnr"][name] = psnr(some, clean[:SIMILAR])
        found["ssim"][name] = ssim(some, clean[:SIMILAR])
    return found
