"""What a round reports: pictures of the network that every number is of."""

from types import SimpleNamespace

import numpy as np
import torch

from naign import philox
from naign.config import parse
from naign.model.prior import build_prior
from naign.observe import grid
from naign.training.report import draw
from naign.training.round import RoundRandom

SHAPE = (1, 8, 8)


def random(number: int) -> RoundRandom:
    config = parse(["--data.path=x", "--prior.name=gaussian"])
    prior = build_prior(config.prior, SHAPE, torch.nn.Identity())
    return RoundRandom(config, number, SHAPE, torch.device("cpu"), prior)


def test_pictures_are_of_the_exported_network_and_of_the_same_latents_in_every_round():
    engine = SimpleNamespace(exported=lambda part, x: x.tanh())  # without `sample`, which has the raw weights
    first, later = (draw(engine, random(number), torch.zeros(20, *SHAPE))["samples"] for number in (3, 9))
    assert np.array_equal(first, later)
    latents = random(philox.SAMPLES).latents(torch.arange(64))
    assert np.array_equal(first, grid(latents.tanh(), columns=8))
