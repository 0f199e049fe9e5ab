"""A Gaussian mixture fitted to the codes of a trained f."""

import pytest
import torch

from naign.errors import InputError
from naign.model.naign import NAIGN
from naign.model.networks import SpatialConfig, build_network
from naign.model.prior import Codes, Mixture, MixtureConfig


@pytest.fixture
def model():
    settings = {"name": "spatial", "width": 8, "code": 2}
    network = build_network(SpatialConfig(**settings), (1, 8, 8))
    prior = Mixture(MixtureConfig(components=2), network.code)
    list(prior.fit(Codes.of(torch.randn(100, *network.code))))
    metadata = {"shape": [1, 8, 8], "prior": {"name": "gmm", "components": 2}, "model": settings}
    state = {f"prior.{name}": value for name, value in prior.state_dict().items()}
    return NAIGN(network, metadata, state)


def test_it_travels_with_the_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert torch.equal(model.sample(5, seed=1), NAIGN.from_pretrained(tmp_path).sample(5, seed=1))


@pytest.mark.parametrize("broken", ["factors", "means", "components"])
def test_a_state_that_does_not_fit_is_refused(model, tmp_path, broken):
    if broken == "components":
        model.metadata["prior"]["components"] = 3
    else:
        model.prior.register_buffer(broken, model.prior.get_buffer(broken)[1:])
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="does not hold the model that its header describes"):
        NAIGN.from_pretrained(tmp_path)
