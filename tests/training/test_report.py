"""What a run reports: pictures of the network that every number is of."""

from types import SimpleNamespace

import numpy as np
import torch

from naign import philox
from naign.config import parse
from naign.model.prior import build_latents
from naign.observe import grid
from naign.training.report import _draw
from naign.training.state import State

SHAPE = (1, 8, 8)


def test_pictures_are_of_the_exported_network_and_of_the_same_latents_in_every_round():
    config = parse(["--data.path=x", "--latents.name=gaussian", "--prior.name=none"])
    latents = build_latents(config.latents, SHAPE)
    run = SimpleNamespace(
        rank=0,
        config=config,
        engine=SimpleNamespace(exported=lambda part, x: x.tanh()),  # without `sample`, which has the raw weights
        latents=latents,
        prior=SimpleNamespace(labels=(), learns=False),
        state=State(round=3),
        watchdog=SimpleNamespace(beat=lambda: None),
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    first = _draw(run, torch.zeros(20, *SHAPE))["samples"]
    run.state.round = 9
    later = _draw(run, torch.zeros(20, *SHAPE))["samples"]
    assert np.array_equal(first, later)
    drawn = latents.draw(config.seed, philox.SAMPLES, torch.arange(64), "cpu")
    assert np.array_equal(first, grid(drawn.tanh(), columns=8))
