"""Steps that leave their norm on the device: what a GPU does, here on the CPU."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from naign.config import TrainConfig
from naign.distributed.engine import Engine
from naign.errors import Diverged
from naign.training.fit import settle

STEPS, BAD = 7, (2, 3)


def engine(ahead, **settings):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 6))
    train = TrainConfig(lr=1e-2, clip=0.5, batch=4, ema=0.9, **settings)
    return Engine(Accelerator(cpu=True), network, train, ahead=ahead)


def take(engine, number):
    """A step; its gradient is not finite in the steps BAD."""
    images = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
    with engine.micro_batch():
        loss = (engine.forward(images) - images).square().sum()
        engine.backward(loss * (math.inf if number in BAD else 1.0))
    return engine.step()


def state(engine):
    moments = [value for _, found in engine.states() for value in found.values()]
    return [value.clone() for value in (*moments, *engine.ema.parameters())]


def test_norms_left_on_the_device_make_the_same_steps():
    found = {}
    for ahead in (False, True):
        one = engine(ahead)
        assert one.ahead == ahead
        norms = [take(one, number) for number in range(STEPS)]
        assert all(isinstance(norm, torch.Tensor) == ahead for norm in norms)
        found[ahead] = [float(norm) for norm in norms], state(one), one.steps
    (norms, there, steps), (ahead_norms, ahead_there, ahead_steps) = found[False], found[True]
    assert steps == ahead_steps == STEPS - len(BAD)
    assert [math.isfinite(norm) for norm in norms] == [math.isfinite(norm) for norm in ahead_norms]
    for before, after in zip(there, ahead_there, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-7)


def test_a_skipped_step_leaves_everything_bit_for_bit():
    one = engine(True)
    for number in range(BAD[0]):
        take(one, number)
    before, count = state(one), one.steps
    for number in BAD:
        assert not math.isfinite(take(one, number))
    assert all(torch.equal(a, b) for a, b in zip(before, state(one), strict=True)) and one.steps == count


def test_a_restored_engine_goes_on_bit_for_bit():
    whole = engine(True)
    for number in range(STEPS):
        take(whole, number)
    first, second = engine(True), engine(True)
    for number in range(4):
        take(first, number)
    for (name, kept), average in zip(first.states(), first.ema.parameters(), strict=True):
        assert set(kept) == {"weight", "exp_avg", "exp_avg_sq"}
        second.restore(name, {key: value.clone() for key, value in kept.items()}, first.steps)
        dict(second.ema.named_parameters())[name].data.copy_(average)
    for number in range(4, STEPS):
        take(second, number)
    assert all(torch.equal(a, b) for a, b in zip(state(whole), state(second), strict=True))


@pytest.mark.parametrize("left", [0, 1])
def test_sums_are_those_of_the_steps_that_were_made(left, caplog):
    run = SimpleNamespace(position=SimpleNamespace(skipped=0, bad_steps=0), rank=0)
    kept, unread = SimpleNamespace(sums={}), []
    for number, norm in enumerate((1.0, 2.0, math.nan, 4.0, math.inf)):
        unread.append((number, torch.tensor(norm) if left else norm, {"loss": torch.tensor(10.0 * number)}))
        settle(run, kept, unread, left)
        assert len(unread) == left
    settle(run, kept, unread)
    assert [record.args for record in caplog.records] == [(2,), (4,)] and not unread
    assert (run.position.skipped, run.position.bad_steps) == (2, 1)
    assert {name: float(value) for name, value in kept.sums.items()} == {"loss": 40, "gradient": 7, "steps": 3}


def test_steps_that_fail_in_a_row_end_the_run_though_they_are_read_late():
    settings = SimpleNamespace(run=SimpleNamespace(path="run"))
    run = SimpleNamespace(config=settings, position=SimpleNamespace(skipped=0, bad_steps=0), rank=0)
    run.writer = SimpleNamespace(join=lambda: None)
    unread = [(number, torch.tensor(math.nan), {}) for number in range(11)]
    with pytest.raises(Diverged, match="10 steps in a row"):
        settle(run, SimpleNamespace(sums={}, number=0), unread)


class Overwriting(torch.nn.Module):
    """Returns the same memory each time, as CUDA graphs do."""

    def __init__(self):
        super().__init__()
        self.weight, self.memory = torch.nn.Parameter(torch.ones(1)), torch.zeros(2, 3)

    def forward(self, x):
        assert x.data_ptr() != self.memory.data_ptr(), "fed its own output memory"
        return self.memory.copy_(x.detach() + 1)


def test_what_a_graph_returns_is_kept_apart_from_its_memory():
    one = Engine(Accelerator(cpu=True), Overwriting(), TrainConfig(lr=1e-2, weight_decay=0.0, clip=0.0, batch=2))
    one._graphs = True
    for evaluate in (one.sample, lambda x: one.exported("", x)):
        once = evaluate(torch.zeros(2, 3))
        twice = evaluate(once)
        assert once.eq(1).all() and twice.eq(2).all()
