"""The priors: what latents are drawn from. One file a prior; `registry` finds them by name."""

from pipeline.model.prior.base import Examples, Prior, PriorConfig
from pipeline.model.prior.registry import build_prior, find_prior
