"""The priors: what samples are drawn from once f is trained. One file a kind of prior; they are chosen by name."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from naign.errors import require
from naign.model.networks import code_shape
from naign.model.prior.base import Codes, CodesPrior, Prior, PriorConfig, Shape
from naign.model.prior.flow import Flow, FlowConfig
from naign.model.prior.mixture import Mixture, MixtureConfig
from naign.model.prior.noise import Latents, LatentsConfig, SmoothConfig, build_latents, find_latents
from naign.settings.registry import lookup

PRIORS: dict[str, tuple[type[PriorConfig], type[Prior]]] = {
    "none": (PriorConfig, Prior),
    "gmm": (MixtureConfig, Mixture),
    "flow": (FlowConfig, Flow),
}
"""Settings and prior by name; other packages add theirs as entry points of the group `naign.priors`."""


def find_prior(name: str) -> tuple[type[PriorConfig], type[Prior]]:
    """The settings and the class of the prior of that name; InputError for an unknown one."""
    return lookup("prior.name", name, PRIORS, "naign.priors")


def build_prior(
    config: PriorConfig,
    shape: Shape,
    network: nn.Module,
    *,
    seed: int = 0,
    labels: Sequence[str] = (),
) -> Prior:
    """The prior of samples (n, *shape) of that network, before it is fitted; InputError where they do not fit.

    `labels` name the classes of the data, on which it is conditioned with prior.classes.
    """
    kind = find_prior(config.name)[1]
    drawn = shape
    if kind.decodes:
        drawn = code_shape(network, f"prior.name={config.name}")
    conditions: dict[str, Any] = {}
    if config.classes:
        blind = f"prior.classes does not go with prior.name={config.name}: choose flow or gmm"
        missing = "prior.classes is set, but the data set has no labels: pack or index it with some, or leave it out"
        require((issubclass(kind, CodesPrior), blind), (labels, missing))
        conditions["labels"] = labels
    return kind(
        config,
        drawn,
        seed=seed,
        **conditions,
    ).requires_grad_(False)
