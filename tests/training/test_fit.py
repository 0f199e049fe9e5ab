"""Every image of a round is fitted once a pass, whichever ranks start it and whichever end it."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from pipeline.config import Config
from pipeline.distributed import Engine
from pipeline.match import MatchConfig, SpaceConfig
from pipeline.model.networks import ConvConfig, build_network
from pipeline.training.fit import pass_order, refined, steps_of

ROUND = {"size": 48, "batch": 6, "passes": 2}


def whole(world, start):
    """The rows of every step, over all ranks: (steps, batch)."""
    return torch.cat(
        [steps_of(3, 7, **ROUND, rank=rank, world=world, world_size_at_start=start) for rank in range(world)], dim=1
    )


@pytest.mark.parametrize("start", [1, 2, 3, 6])
@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_each_image_once_a_pass_and_the_same_ones_in_each_step(world, start):
    steps = whole(world, start)
    assert steps.shape == (16, 6)
    assert all(turn.flatten().sort().values.tolist() == list(range(48)) for turn in steps.split(8))
    assert torch.equal(steps.sort(dim=1).values, whole(start, start).sort(dim=1).values)


def test_a_rank_that_started_the_round_reads_its_own_share():
    for rank in range(3):
        steps = steps_of(3, 7, **ROUND, rank=rank, world=3, world_size_at_start=3)
        assert steps.min() == 16 * rank and steps.max() == 16 * rank + 15
        assert torch.equal(steps[0], 16 * rank + pass_order(16, 3, 7, 0, rank)[:2])


def test_passes_and_rounds_differ():
    steps = whole(1, 1)
    assert not torch.equal(steps[:8], steps[8:])
    assert not torch.equal(steps, steps_of(3, 8, **ROUND, rank=0, world=1, world_size_at_start=1))


@pytest.mark.parametrize("space", [{}, {"pixels": 0.0, "code": 1.0}])
def test_refined_latents_have_nearer_samples_and_leave_the_weights_alone(space):
    torch.manual_seed(0)
    network = build_network(ConvConfig(width=8, code=16), (1, 8, 8))
    engine = SimpleNamespace(bare=network, _dtype=torch.float32)
    engine.slope = partial(Engine.slope, engine)
    latents, images = torch.randn(5, 1, 8, 8), torch.randn(5, 1, 8, 8).tanh()

    def refine(steps, latents=latents, images=images):
        config = Config(match=MatchConfig(refine=steps, refine_rate=0.05, space=SpaceConfig(**space)))
        return refined(SimpleNamespace(config=config, engine=engine, features=None), latents, images)

    def far(latents):
        part = network.encode if space else lambda x: x
        return (part(network(latents)) - part(images)).square().flatten(1).sum(1)

    assert refine(0) is latents
    (one, three) = (refine(steps) for steps in (1, 3))
    torch.testing.assert_close((one - latents).square().flatten(1).mean(1).sqrt(), torch.full((5,), 0.05))
    assert (far(one) < far(latents)).all() and (far(three) < far(one)).all()
    torch.testing.assert_close(refine(3, latents[2:], images[2:]), three[2:], rtol=1e-4, atol=1e-5)
    assert all(value.grad is None for value in network.parameters())
