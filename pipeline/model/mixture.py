"""Gaussian mixtures on the codes of a trained f: the law of latents that needs no training (arXiv 1903.12436)."""

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.errors import InputError, require
from pipeline.philox import SCALE, normal, uniform

DIRECTIONS = 64  # principal directions of the codes that a mixture models; the others stay at the mean
FEW = 20  # codes a component, at least


def fit_mixture(codes: Tensor, components: int, *, seed: int = 0) -> dict[str, Tensor]:
    """The state of a law of latents `codes`: `components` full Gaussians on the leading directions of (n, *shape).

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
    basis = directions[:kept] * (spread[:kept] / math.sqrt(len(flat)))[:, None]
    white = (flat - mean) @ directions[:kept].T / (spread[:kept] / math.sqrt(len(flat)))
    mixture = GaussianMixture(components, reg_covar=1e-4, random_state=seed % 2**32)
    with warnings.catch_warnings():  # it has then done its 100 iterations
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(white.numpy())
    found = {
        "weights": torch.from_numpy(mixture.weights_),
        "means": torch.from_numpy(mixture.means_),
        "factors": torch.linalg.cholesky(torch.from_numpy(mixture.covariances_)),
        "basis": basis,
        "mean": mean,
    }
    return {"shape": torch.tensor(codes.shape[1:]), **{name: value.float() for name, value in found.items()}}


def is_mixture(state: Mapping[str, Tensor]) -> bool:
    return "factors" in state


def check_mixture(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The shape of a code. Raises KeyError, ValueError or RuntimeError for what `fit_mixture` does not return."""
    shape = tuple(state["shape"].tolist())
    components, kept = state["means"].shape
    if not components or not kept:
        raise ValueError("the mixture has no components")
    sizes = {"weights": (components,), "factors": (components, kept, kept), "mean": (math.prod(shape),)}
    sizes["basis"] = (kept, math.prod(shape))
    for name, size in sizes.items():
        if tuple(state[name].shape) != size:
            raise ValueError(f"the mixture's {name} have shape {tuple(state[name].shape)}, not {size}")
    return shape


def draw_mixture(
    state: Mapping[str, Tensor],
    seed: int,
    round: int,
    ids: Tensor,
    device: torch.device | str = "cpu",
    code: tuple[int, ...] | None = None,  # shape of a code; None: it is read from the state, which waits for a GPU
) -> Tensor:
    """Codes (n, *code) float32; row i depends on (seed, round, ids[i]) alone."""
    which = uniform(seed, round, ids, (1,), device, stream=SCALE)
    chosen = torch.searchsorted(state["weights"].cumsum(0), which.flatten().contiguous()).clamp(
        max=len(state["weights"]) - 1
    )
    noise = normal(seed, round, ids, (state["basis"].shape[0],), device)
    white = state["means"][chosen] + torch.einsum("nij,nj->ni", state["factors"][chosen], noise)
    return (white @ state["basis"] + state["mean"]).view(-1, *(code or state["shape"].tolist()))
