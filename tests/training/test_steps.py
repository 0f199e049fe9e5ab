"""Every image of a round is fitted once a pass, in the same steps on every world size; the learning rate; losses."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from naign.config import Config
from naign.errors import Diverged
from naign.training.state import State
from naign.training.steps import BAD_STEPS, StepLosses, learning_rate, rows_of_steps

CONFIG = Config(seed=3)
CONFIG.match.round = 48
CONFIG.train.batch = 6
CONFIG.train.passes = 2


def whole(world, round=7):
    """The rows of every step, over all ranks: (steps, batch)."""
    return torch.cat([rows_of_steps(CONFIG, round, rank=rank, world=world) for rank in range(world)], dim=1)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_each_image_once_a_pass_and_the_same_ones_in_each_step_on_every_world_size(world):
    steps = whole(world)
    assert steps.shape == (16, 6)
    for number, one_pass in enumerate(steps.split(8)):
        assert one_pass.flatten().sort().values.tolist() == list(range(48 * number, 48 * (number + 1)))
    assert torch.equal(steps.sort(dim=1).values, whole(1).sort(dim=1).values)


def test_a_rank_trains_on_the_rows_that_it_has_read():
    for rank in range(3):
        rows = rows_of_steps(CONFIG, 7, rank=rank, world=3) % 48
        assert rows.min() == 16 * rank and rows.max() == 16 * rank + 15


def test_passes_and_rounds_differ():
    steps = whole(1)
    assert not torch.equal(steps[:8], steps[8:] - 48)
    assert not torch.equal(steps, whole(1, round=8))


def test_the_learning_rate_rises_over_at_most_half_of_a_budget_and_falls_to_its_end():
    train = dataclasses.replace(
        CONFIG.train,
        lr=1.0,
        lr_end=0.1,
        warmup=10**6,
        batch=10,
    )
    rates = [learning_rate(train, seen, 1000) for seen in range(0, 1001, 10)]
    assert rates[0] == 10 / 510 and rates.index(max(rates)) == 50 and max(rates) == 1.0
    assert rates[75] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    constant = dataclasses.replace(train, lr_end=1.0)
    assert learning_rate(constant, 900, 1000) == 1.0


def losses(ahead):
    accelerator = SimpleNamespace(reduce=lambda value: value, device="cpu")
    return StepLosses(
        SimpleNamespace(
            engine=SimpleNamespace(ahead=ahead, accumulate=1),
            state=State(round=4),
            rank=0,
            world=1,
            accelerator=accelerator,
            writer=SimpleNamespace(join=lambda: True),
            config=CONFIG,
        )
    )


@pytest.mark.parametrize("ahead", [False, True])
def test_steps_that_were_skipped_are_counted_and_left_out_of_the_mean(ahead):
    kept = losses(ahead)
    for value, norm in ((1.0, 2.0), (torch.nan, torch.inf), (3.0, 4.0)):
        kept.add({"total": torch.tensor(value)})
        kept.end_step(torch.tensor(norm) if ahead else norm)
    assert kept.means() == {"loss/gradient_norm": 3.0, "loss/total": 2.0}
    assert kept._run.state.skipped == 1 and kept._run.state.bad_steps == 0


def test_many_skipped_steps_in_a_row_end_the_run():
    kept = losses(ahead=False)
    for _ in range(BAD_STEPS - 1):
        kept.end_step(float("nan"))
    with pytest.raises(Diverged, match="10 steps in a row were not finite, the last in round 4"):
        kept.end_step(float("nan"))
