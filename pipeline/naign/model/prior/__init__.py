"""The priors: what latents are drawn from. One file a kind of prior; they are chosen by name."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from naign.errors import require
from naign.model.networks import code_shape
from naign.model.prior.base import CodesPrior, Examples, Prior, PriorConfig, Shape
from naign.model.prior.flow import FlowConfig
from naign.model.prior.gmm import Gmm, GmmConfig
from naign.model.prior.noise import Gaussian, Halves, Smooth, SmoothConfig
from naign.model.prior.student import TaughtFlow
from naign.settings.registry import lookup

PRIORS: dict[str, tuple[type[PriorConfig], type[Prior]]] = {
    "gaussian": (PriorConfig, Gaussian),
    "smooth": (SmoothConfig, Smooth),
    "halves": (PriorConfig, Halves),
    "flow": (FlowConfig, TaughtFlow),
    "gmm": (GmmConfig, Gmm),
}
"""Settings and prior by name; other packages add theirs as entry points of the group `naign.priors`."""


def find_prior(name: str) -> tuple[type[PriorConfig], type[Prior]]:
    """The settings and the class of the prior of that name; InputError for an unknown one."""
    remedies = {"fourier": "fourier is IGN's, install it: pip install -e benchmarks/baselines"}
    return lookup("prior.name", name, PRIORS, "naign.priors", remedies=remedies)


def build_prior(
    config: PriorConfig, shape: Shape, network: nn.Module, *, seed: int = 0, labels: Sequence[str] = ()
) -> Prior:
    """The prior of latents (n, *shape) for that network, before it has learned; InputError where they do not fit.

    `labels` name the classes of the data, on which it is conditioned with prior.classes.
    """
    kind = find_prior(config.name)[1]
    drawn = code_shape(network, f"prior.name={config.name}") if kind.decodes else shape
    blind = f"prior.classes does not go with prior.name={config.name}: choose flow or gmm"
    missing = "prior.classes is set, but the data set has no labels: pack or index it with some, or leave it out"
    require((not config.classes or issubclass(kind, CodesPrior), blind), (not config.classes or labels, missing))
    conditions: dict[str, Any] = {"labels": labels} if config.classes else {}
    return kind(config, drawn, seed=seed, **conditions).requires_grad_(False)
