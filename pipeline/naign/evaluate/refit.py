"""A Gaussian mixture fitted to the codes of a trained f, as another prior of its latents (arXiv 1903.12436)."""

import math
import time
import warnings
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from naign.data.loader import read_split
from naign.errors import require
from naign.evaluate.recorded import recorded
from naign.model.naign import NAIGN
from naign.model.networks import code_shape
from naign.model.prior.gmm import FEW, GmmConfig
from naign.model.scale import scaled

IMAGES = 60_000  # whose codes are fitted, at most
DIRECTIONS = 64  # principal directions of the codes that the mixture models; the others stay at the mean


def with_mixture(model: NAIGN, folder: str, *, components: int = 50, data: str | None = None) -> NAIGN:
    """The same f with latents z = decode(code), the code drawn from a mixture fitted to those of training images.

    `folder` is where the model was read from, `data` a packed data set (None: the one of its training). The fit's
    processor time is added to the training's. Raises InputError for an f without a code, too few images, or unfit data.
    """
    code_shape(model.network, f"a mixture for the model in {folder}")
    begin = time.process_time()
    config, _, _ = recorded(model, folder, data)
    images, _ = read_split(config, config.split, limit=IMAGES)
    encode: Any = model.network.encode
    parts = []
    with torch.inference_mode():
        for part in images.split(500):
            parts.append(encode(scaled(part).to(model.device)))
    codes = torch.cat(parts).float().cpu()
    state = {}
    for name, value in fit_mixture(codes, components).items():
        state[name] = value.to(model.device)
    spent = time.process_time() - begin
    metadata = model.metadata | {"prior": asdict(GmmConfig(components=components))}
    metadata.pop("labels", None)  # of classes, which the mixture does not tell apart
    metadata["fit"] = {"images": len(codes), "cpu_seconds": spent}
    trained = metadata.get("cpu_seconds")
    if isinstance(trained, int | float):
        metadata["cpu_seconds"] = trained + spent
    return NAIGN(model.network, metadata, state)


def fit_mixture(codes: Tensor, components: int) -> dict[str, Tensor]:
    """The state of a `Gmm` of codes (n, *shape), on leading directions; InputError for under FEW codes a component."""
    from sklearn.exceptions import ConvergenceWarning  # slow to import
    from sklearn.mixture import GaussianMixture

    flat = codes.flatten(1).double()
    require((components >= 1, f"{components} components: a mixture needs at least 1"))
    needed = max(FEW * components, 2)
    require((len(flat) >= needed, f"a mixture of {components} components needs {needed} images, not {len(flat)}"))
    mean = flat.mean(0)
    _, spread, directions = torch.linalg.svd(flat - mean, full_matrices=False)
    kept = int((spread[:DIRECTIONS] > 1e-6 * spread[0]).sum())
    require((kept, "the codes of all images are the same: there is nothing to fit a mixture to"))
    directions = directions[:kept]
    deviations = spread[:kept, None] / math.sqrt(len(flat))
    mixture = GaussianMixture(components, reg_covar=1e-4, random_state=0)
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # it has then done its 100 iterations
        mixture.fit(((flat - mean) @ (directions / deviations).T).numpy())
    basis = directions * deviations  # (kept, values): from whitened codes back
    factors = torch.linalg.cholesky(torch.from_numpy(mixture.covariances_))
    return {
        "weights": torch.from_numpy(mixture.weights_).float(),
        "means": (torch.from_numpy(mixture.means_) @ basis + mean).float(),
        "factors": (basis.T @ factors).float(),
    }
