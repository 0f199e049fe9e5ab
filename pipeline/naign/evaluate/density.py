"""Does the energy E(x) = mean (f(x) - x)^2 tell data from what is not data?

AUROC: the chance that a random outlier, made from test images, has more energy than a random test image; 1 is perfect,
0.5 a coin, and 0 says that the network takes the outlier for better than any real image, as autoencoders take black.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def outliers(images: Tensor, *, seed: int = 0) -> dict[str, Tensor]:
    """(n, C, H, W) in [-1, 1] -> sets of what is not data, by name: (n, C, H, W), or (1, C, H, W) for a constant."""
    generator = torch.Generator().manual_seed(seed)
    one = images[:1]
    return {
        "uniform noise": torch.rand(images.shape, generator=generator) * 2 - 1,
        "gaussian noise": torch.randn(images.shape, generator=generator).clamp(-1, 1),
        "black": torch.full_like(one, -1.0),
        "grey": torch.zeros_like(one),
        "white": torch.ones_like(one),
        "inverted": -images,
        "upside down": images.flip(2),
    }


def auroc(inlier: Tensor, outlier: Tensor) -> float:
    """Area under the ROC curve of scores (n,) of data against scores (m,) of outliers, higher meaning outlier."""
    from sklearn.metrics import roc_auc_score

    scores = torch.cat([inlier, outlier])
    most = torch.finfo(scores.dtype).max
    finite = scores.nan_to_num(nan=most, posinf=most)
    is_outlier = torch.arange(len(scores)) >= len(inlier)
    return float(roc_auc_score(is_outlier.numpy(), finite.numpy()))


def separation(
    images: Tensor,
    project: Callable[[Tensor], Tensor],
    *,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """AUROC by outlier made from images (n, C, H, W): {"energy": {outlier: a}, "twice": {...}}.

    `project` is f; `twice` is of the energy mean (f(f(x)) - x)^2.
    """

    def scores(batch: Tensor) -> dict[str, Tensor]:
        once = project(batch)
        answers = {"energy": once, "twice": project(once)}
        found = {}
        for name, answer in answers.items():
            squares = (answer - batch).square()
            found[name] = squares.flatten(1).mean(1)
        return found

    real = scores(images)
    found: dict[str, dict[str, float]] = {"energy": {}, "twice": {}}
    for name, batch in outliers(images, seed=seed).items():
        for score, values in scores(batch).items():
            found[score][name] = auroc(real[score], values)
    return found
