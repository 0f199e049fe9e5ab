"""A Gaussian mixture fitted to the codes of a trained f: a prior that needs no training (arXiv 1903.12436)."""

import math
import warnings

import torch
from torch import Tensor

from pipeline.errors import InputError, require
from pipeline.model.prior.gmm import FEW

DIRECTIONS = 64  # principal directions of the codes that the mixture models; the others stay at the mean


def fit_mixture(codes: Tensor, components: int, *, seed: int = 0) -> dict[str, Tensor]:
    """The state of a `Gmm`: `components` Gaussians on the leading directions of codes (n, *shape).

    Raises InputError for fewer than FEW codes a component.
    """
    from sklearn.exceptions import ConvergenceWarning  # slow to import
    from sklearn.mixture import GaussianMixture

    flat = codes.flatten(1).double()
    require((components >= 1, f"{components} components: a mixture needs at least 1"))
    needed = max(FEW * components, 2)
    require((len(flat) >= needed, f"a mixture of {components} components needs {needed} images, not {len(flat)}"))
    mean = flat.mean(0)
    _, spread, directions = torch.linalg.svd(flat - mean, full_matrices=False)
    kept = int((spread[:DIRECTIONS] > 1e-6 * spread[0]).sum())
    if not kept:
        raise InputError("the codes of all images are the same: there is nothing to fit a mixture to")
    deviations, directions = spread[:kept, None] / math.sqrt(len(flat)), directions[:kept]
    mixture = GaussianMixture(components, reg_covar=1e-4, random_state=seed % 2**32)
    with warnings.catch_warnings():  # it has then done its 100 iterations
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(((flat - mean) @ (directions / deviations).T).numpy())
    basis = directions * deviations  # (kept, values): from whitened codes back
    factors = torch.linalg.cholesky(torch.from_numpy(mixture.covariances_))
    return {
        "weights": torch.from_numpy(mixture.weights_).float(),
        "means": (torch.from_numpy(mixture.means_) @ basis + mean).float(),
        "factors": (basis.T @ factors).float(),
    }
