"""Every image of a round is fitted once a pass, whichever ranks start it and whichever end it."""

import dataclasses

import pytest
import torch

from naign.config import Config
from naign.training.fit import learning_rate, pass_order, steps_of

CONFIG = Config(seed=3)
CONFIG.match.round, CONFIG.train.batch, CONFIG.train.passes = 48, 6, 2


def whole(world, start):
    """The rows of every step, over all ranks: (steps, batch)."""
    return torch.cat(
        [steps_of(CONFIG, 7, rank=rank, world=world, world_size_at_start=start) for rank in range(world)], dim=1
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
        steps = steps_of(CONFIG, 7, rank=rank, world=3, world_size_at_start=3)
        assert steps.min() == 16 * rank and steps.max() == 16 * rank + 15
        assert torch.equal(steps[0], 16 * rank + pass_order(16, 3, 7, 0, rank)[:2])


def test_passes_and_rounds_differ():
    steps = whole(1, 1)
    assert not torch.equal(steps[:8], steps[8:])
    assert not torch.equal(steps, steps_of(CONFIG, 8, rank=0, world=1, world_size_at_start=1))


def test_the_learning_rate_rises_over_at_most_half_of_a_budget_and_falls_to_its_end():
    train = dataclasses.replace(CONFIG.train, lr=1.0, lr_end=0.1, warmup=10**6, batch=10)
    rates = [learning_rate(train, seen, 1000) for seen in range(0, 1001, 10)]
    assert rates[0] == 10 / 510 and rates.index(max(rates)) == 50 and max(rates) == 1.0
    assert rates[75] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)


@pytest.mark.parametrize(("schedule", "left"), [("constant", [1, 1, 1, 1]), ("wsd", [1, 1, 0.55, 0.1])])
def test_a_schedule_by_name(schedule, left):
    train = dataclasses.replace(CONFIG.train, lr=1.0, lr_end=0.1, warmup=100, batch=10, schedule=schedule)
    rates = [learning_rate(train, seen, 1100) for seen in (100, 900, 950, 1100)]
    assert rates == pytest.approx(left)
    assert learning_rate(train, 50, 1100) == learning_rate(dataclasses.replace(train, schedule="cosine"), 50, 1100)
