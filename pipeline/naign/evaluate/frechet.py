"""Frechet distance between two sets, on the features of a named encoder: FD-<encoder>, not FID, that of one Inception.

    d^2 = |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))      (Dowson & Landau 1982; as in FID, arXiv 1706.08500)

tr((C1 C2)^(1/2)) = tr((R C2 R)^(1/2)) with R = C1^(1/2): two symmetric eigen-decompositions in float64, also exact for
singular covariances, where `scipy.linalg.sqrtm(C1 @ C2)` is complex or inaccurate.
"""

import torch
from torch import Tensor

from naign.errors import InputError


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d), both float64, of features (n, d); InputError for n < 2."""
    if len(features) < 2:
        few = f"a covariance needs at least 2 rows of features, not {len(features)}"
        raise InputError(f"{few}: measure more examples, or smaller ones")
    features = features.double()
    return features.mean(0), torch.atleast_2d(features.T.cov())  # `cov` of one feature is a scalar


def gaussian_distance(
    mean1: Tensor,
    covariance1: Tensor,
    mean2: Tensor,
    covariance2: Tensor,
) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians: means (d,), covariances (d, d), float64."""
    values, vectors = torch.linalg.eigh(covariance1)
    roots = values.clamp(min=0).sqrt()  # rounding may leave an eigenvalue at -1e-17
    root = (vectors * roots) @ vectors.T
    product = root @ covariance2 @ root
    symmetric = (product + product.T) / 2
    eigenvalues = torch.linalg.eigvalsh(symmetric)
    overlap = eigenvalues.clamp(min=0).sqrt().sum()
    apart = (mean1 - mean2).square().sum()
    squared = apart + covariance1.trace() + covariance2.trace() - 2 * overlap
    return max(float(squared), 0.0)


def frechet_distance(features1: Tensor, features2: Tensor) -> float:
    """Squared Frechet distance of features (n, d) and (m, d), in squared units of the features."""
    return gaussian_distance(*gaussian(features1), *gaussian(features2))
