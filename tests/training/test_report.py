"""What a round reports: pictures of the network that every number is of."""

from types import SimpleNamespace

import numpy as np
import torch

from pipeline import philox
from pipeline.config import parse
from pipeline.observe import grid
from pipeline.training.report import draw
from pipeline.training.round import RoundRandom


def test_pictures_are_of_the_exported_network_and_of_the_same_latents_in_every_round():
    config, shape = parse(["--data.path=x"]), (1, 8, 8)
    engine = SimpleNamespace(exported=lambda part, x: x.tanh())  # without `sample`, which has the raw weights
    first, later = (
        draw(engine, RoundRandom(config, number, shape, torch.device("cpu")), torch.zeros(20, *shape))["samples"]
        for number in (3, 9)
    )
    assert np.array_equal(first, later)
    latents = RoundRandom(config, philox.SAMPLES, shape, torch.device("cpu")).latents(torch.arange(64))
    assert np.array_equal(first, grid(latents.tanh(), columns=8))
