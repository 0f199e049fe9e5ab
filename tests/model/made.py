"""Small models, and a comparison."""

import torch
from torch.testing import assert_close

from naign.model.naign import NAIGN, read_settings
from naign.model.networks import build_network

CONV = {"name": "conv", "width": 4, "depth": 1, "code": 8}


def make_model(network=None, shape=(1, 8, 8), state=None, **metadata):
    """A model of random weights; `network` are its settings, `metadata` what differs from the usual."""
    settings = network or CONV
    metadata = {"model": settings, "shape": list(shape), "prior": {"name": "none"}} | metadata
    torch.manual_seed(0)
    return NAIGN(build_network(read_settings("model", settings), shape), metadata, state)


def wrapped(network, shape, **metadata):
    """A model of any module, without a prior."""
    usual = {
        "shape": list(shape),
        "latents": {"name": "gaussian"},
        "prior": {"name": "none"},
    }
    return NAIGN(network, usual | metadata)


def prior_state(prior):
    """Its part of a model's state."""
    return {f"prior.{name}": value for name, value in prior.state_dict().items()}


def assert_near(actual, expected, within):
    """Values that differ by at most `within`."""
    assert_close(
        actual,
        expected,
        atol=within,
        rtol=0,
    )
