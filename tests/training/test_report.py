"""What a run reports: pictures of the network that every number is of."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from naign import philox
from naign.config import parse
from naign.model.prior import build_latents
from naign.observe import grid
from naign.training.report import _draw
from naign.training.state import State

SHAPE = (1, 8, 8)


@pytest.fixture
def run():
    config = parse(["--data.path=x", "--latents.name=gaussian", "--prior.name=none"])
    return SimpleNamespace(
        rank=0,
        config=config,
        engine=SimpleNamespace(exported=lambda part, x: x.tanh()),  # without `sample`, which has the raw weights
        latents=build_latents(config.latents, SHAPE),
        prior=SimpleNamespace(labels=(), learns=False),
        state=State(round=3),
        watchdog=SimpleNamespace(beat=lambda: None),
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )


def test_pictures_are_of_the_exported_network_and_of_the_same_latents_in_every_round(run):
    first = _draw(run, torch.zeros(20, *SHAPE))["samples"]
    run.state.round = 9
    later = _draw(run, torch.zeros(20, *SHAPE))["samples"]
    assert np.array_equal(first, later)
    drawn = run.latents.draw(run.config.seed, philox.SAMPLES, torch.arange(64), "cpu")
    assert np.array_equal(first, grid(drawn.tanh(), columns=8))


@pytest.mark.parametrize(("network", "warned"), [(torch.zeros_like, True), (torch.tanh, False)])
def test_a_network_that_makes_one_image_of_all_is_named(run, caplog, network, warned):
    run.engine.exported = lambda part, x: network(x)
    images = torch.rand(12, *SHAPE, generator=torch.Generator().manual_seed(0))
    _draw(run, images)
    assert ("f makes one image of all: lower train.lr" in caplog.text) == warned
