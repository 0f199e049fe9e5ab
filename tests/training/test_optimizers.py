"""The optimizers by name: what they step, and that a restored one goes on bit for bit."""

from importlib.metadata import EntryPoint
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from naign.config import TrainConfig
from naign.distributed.engine import Engine
from naign.distributed.muon import orthogonal
from naign.distributed.optimizers import OPTIMIZERS, find_optimizer
from naign.errors import InputError
from tests.distributed.fsdp_cases import hand_over
from tests.e2e.runs import same


def momentum(parameters, *, lr, **_):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def narrow(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr)


def nothing(parameters, **_):
    return None


def failing(parameters, **_):
    raise ValueError("no such learning rate")


bare = map  # a builtin without a signature


class Counting(torch.optim.Optimizer):
    def __init__(self, parameters, *, lr, **_):
        super().__init__(parameters, {"lr": lr})

    def step(self):
        for value in self.param_groups[0]["params"]:
            self.state[value] = {"calls": 1 + self.state[value].get("calls", 0)}


@pytest.fixture(autouse=True)
def theirs(monkeypatch):
    points = {}
    for name in ("momentum", "Counting", "narrow", "nothing", "failing", "bare"):
        points[name] = EntryPoint(name, f"{__name__}:{name}", "naign.optimizers")
    asked = {"naign.optimizers": points}
    monkeypatch.setattr("naign.settings.registry._entry_points", lambda group: asked.get(group, {}))


def make(optimizer, *, ahead=None, **settings):
    AcceleratorState._reset_state(True)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(
            1,
            8,
            4,
            2,
            1,
        ),
        nn.Flatten(),
        nn.Linear(128, 9),
        nn.Linear(9, 128),
        nn.Unflatten(1, (8, 4, 4)),
        nn.ConvTranspose2d(
            8,
            1,
            4,
            2,
            1,
        ),
    )
    train = TrainConfig(optimizer=optimizer, lr=1e-2, batch=4, **settings)
    return Engine(Accelerator(cpu=True), network, train, ahead=ahead)


def train(engine, first, last):
    losses = []
    for number in range(first, last):
        images = torch.randn(
            4,
            1,
            8,
            8,
            generator=torch.Generator().manual_seed(number % 2),
        )
        with engine.micro_batch():
            loss = (engine.forward(images) - images).square().mean()
            engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", [*OPTIMIZERS, "momentum"])
def test_a_restored_optimizer_goes_on_bit_for_bit(name):
    whole = make(name)
    first = make(name)
    second = make(name)
    losses = train(whole, 0, 12)
    assert losses[-1] < losses[1]
    train(first, 0, 5)
    hand_over(first, second)
    assert train(second, 5, 12) == losses[5:]
    for (_, mine), (_, other) in zip(whole.states(), second.states(), strict=True):
        assert len(mine) > 1 and same(mine, other)


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (12, 2, 3, 3)])
def test_a_step_of_muon_goes_as_far_in_every_direction(shape):
    torch.manual_seed(0)
    direction = torch.randn(shape)
    direction.flatten(1)[:, 0] *= 10
    step = orthogonal(direction)
    assert step.shape == shape
    matrix = step.flatten(1)
    assert 0.12 < matrix.square().mean().sqrt() < 0.24  # that of AdamW is about 0.2
    spread = torch.linalg.svdvals(matrix)
    assert spread[0] < 2 * spread[-1]
    before = torch.linalg.svdvals(direction.flatten(1))
    assert before[0] > 5 * before[-1]


def test_muon_leaves_vectors_to_adamw():
    mine = make("muon")
    theirs = make("adamw")
    train(mine, 0, 1)
    train(theirs, 0, 1)
    for (name, ours), (_, others) in zip(mine.states(), theirs.states(), strict=True):
        assert same(ours, others) == (ours["weight"].ndim == 1), name


def test_only_a_fused_optimizer_leaves_its_norm_on_the_device():
    for name, ahead in (("adamw", True), ("momentum", False)):
        assert make(name, ahead=True).ahead == ahead


def test_an_unknown_optimizer_names_the_known_ones():
    with pytest.raises(InputError, match="train.optimizer is 'adam': .*adamw.*; did you mean adamw"):
        find_optimizer("adam")


def test_an_optimizer_is_tried_once(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "counted", Mock(side_effect=OPTIMIZERS["adamw"]))
    assert find_optimizer("counted") is find_optimizer("counted") is OPTIMIZERS["counted"]
    assert OPTIMIZERS["counted"].call_count == 1


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("narrow", "unexpected keyword"),
        ("nothing", "it returns a NoneType"),
        ("failing", "no such"),
        ("bare", "map"),
    ],
)
def test_an_optimizer_that_cannot_be_built_is_refused(name, problem):
    with pytest.raises(InputError, match=f"'{name}' cannot be built: .*{problem}.*: fix its package"):
        find_optimizer(name)


def test_a_state_that_no_checkpoint_holds_is_refused():
    engine = make("Counting")
    engine.step()
    with pytest.raises(InputError, match="keeps 'calls' of a weight"):
        list(engine.states())
    next(iter(engine._adam.state.values()))["calls"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(InputError, match="not a tensor of floats"):
        list(engine.states())
